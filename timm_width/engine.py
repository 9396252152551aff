"""The training loop that search and train share, and the flags that drive it, named and meant as in timm's train.py.

Data, optimisers, schedules, losses and metrics are timm's. Mixup, EMA, gradient accumulation, checkpoints that resume a run,
and several processes are still to come.
"""
import os
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Optional

import timm
import torch
import yaml
from timm.data import resolve_data_config
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import AverageMeter, NativeScaler, accuracy, random_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .config import check_config
from .data import DEFAULTS, UsageError
from .space import WidthError, nearest

__all__ = ['Parser', 'add_arguments', 'check_arguments', 'create', 'data_config', 'fit', 'top1', 'write_args']

# flag -> (least, most) that makes sense; None is no bound
RANGES: dict[str, tuple[Optional[float], Optional[float]]] = {
    'epochs': (1, None), 'warmup_epochs': (0, None), 'batch_size': (1, None), 'workers': (0, None), 'img_size': (1, None),
    'num_classes': (2, None), 'lr': (0, None), 'lr_base': (0, None), 'lr_base_size': (1, None), 'min_lr': (0, None),
    'warmup_lr': (0, None), 'momentum': (0, None), 'weight_decay': (0, None), 'smoothing': (0, 1), 'hflip': (0, 1),
    'crop_pct': (0.01, 1), 'seed': (0, 2 ** 32 - 1),
}
AMP_DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: Action) -> str:
        return action.help if action.default in (None, '', False, []) else super()._get_help_string(action)


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are one line, without the list of all flags."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=_Formatter, **kwargs)

    def error(self, message: str):
        raise UsageError(f'{message} (--help lists the flags)')


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags for data, model, training and output. Name, type and default are timm's, but for --device."""
    group = parser.add_argument_group('data')
    group.add_argument('--dataset', default='', metavar='NAME', help=f"embedded images: {', '.join(DEFAULTS)}")
    group.add_argument('--data-dir', metavar='FOLDER', help='images in train/CLASS/ and val/CLASS/ (or validation/CLASS/)')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='processes that load images')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='resnet50', metavar='NAME', help="a timm model, or 'local-dir:FOLDER'")
    group.add_argument('--pretrained', action='store_true', help='start from pretrained weights')
    group.add_argument('--num-classes', type=int, metavar='N', help='outputs of the model (default: the classes found)')
    group.add_argument('--img-size', type=int, metavar='N', help="side of the images (default: the model's)")
    group.add_argument('--crop-pct', type=float, metavar='N',
                       help="part of a validation image that is seen (default: the model's)")
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='images per step')
    group.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME',
                       help='torch device')
    group.add_argument('--amp', action='store_true', help='mixed precision')
    group.add_argument('--amp-dtype', default='float16', choices=AMP_DTYPES, help='lower precision of --amp')

    group = parser.add_argument_group('optimiser and schedule')
    group.add_argument('--opt', default='sgd', metavar='NAME', help="any of timm's optimisers")
    group.add_argument('--momentum', type=float, default=0.9, metavar='M', help='momentum of the optimiser')
    group.add_argument('--weight-decay', type=float, default=2e-5, metavar='D', help='weight decay')
    group.add_argument('--lr', type=float, metavar='LR', help='learning rate (default: from --lr-base)')
    group.add_argument('--lr-base', type=float, default=0.1, metavar='LR', help='learning rate of a batch of --lr-base-size')
    group.add_argument('--lr-base-size', type=int, default=256, metavar='N', help='batch size that --lr-base is for')
    group.add_argument('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'),
                       help="how --lr-base follows the batch size (default: 'sqrt' for adaptive optimisers, else 'linear')")
    group.add_argument('--sched', default='cosine', metavar='NAME', help="any of timm's schedules")
    group.add_argument('--sched-on-updates', action='store_true', help='change the learning rate every step, not every epoch')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='length of the final training')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of rising learning rate')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='LR', help='learning rate at the start')
    group.add_argument('--min-lr', type=float, default=0., metavar='LR', help='learning rate at the end')

    group = parser.add_argument_group('augmentation and regularisation')
    group.add_argument('--no-aug', action='store_true', help='no augmentation')
    group.add_argument('--scale', type=float, nargs=2, default=[0.08, 1.], metavar='PCT',
                       help='part of an image that a crop keeps')
    group.add_argument('--ratio', type=float, nargs=2, default=[3 / 4, 4 / 3], metavar='R', help='aspect ratio of a crop')
    group.add_argument('--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip')
    group.add_argument('--color-jitter', type=float, default=0.4, metavar='PCT', help='strength of colour changes')
    group.add_argument('--smoothing', type=float, default=0.1, metavar='P', help='label smoothing')

    group = parser.add_argument_group('run')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='seed of all that is random')
    group.add_argument('--output', required=True, metavar='FOLDER', help='new or empty folder for the results')
    group.add_argument('--overwrite', action='store_true', help='replace the results of an earlier run in --output')


def check_arguments(args: Namespace, ranges: Mapping[str, tuple] = RANGES) -> None:
    """Refuses values that would fail later: numbers out of range, no such device or optimiser, an output folder in use.

    Raises:
        UsageError: With the flag, its value and what would be right.
    """
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if value is None:
            continue
        if not ((least is None or value >= least) and (most is None or value <= most)):
            wanted = f'at least {least}' if most is None else f'from {least} to {most}'
            raise UsageError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")
    for name in ('scale', 'ratio'):
        low, high = getattr(args, name)
        if not 0 < low <= high or name == 'scale' and high > 1:
            raise UsageError(f"--{name} needs two numbers, the smaller first{', from above 0 to 1' * (name == 'scale')}, "
                             f'not {low:g} {high:g}')
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as e:
        raise UsageError(f"--device '{args.device}' cannot be used here: {str(e).splitlines()[0]}") from None
    source, _, path = args.model.partition(':')
    if source == 'local-dir' and Path(path).resolve() == Path(args.output).resolve():
        raise UsageError(f"--output '{args.output}' is the folder of --model: the results would replace what they start from")
    try:
        _optimiser(nn.Linear(1, 1), args, max(args.epochs, 2), 2)
    except ValueError as e:
        raise UsageError(f'--opt {args.opt} --sched {args.sched}: {e}') from None
    _check_output(Path(args.output), args.overwrite)


def _check_output(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output '{folder}' is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UsageError(f"--output '{folder}' exists and is not empty: give another folder, or --overwrite")
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f"--output '{folder}' cannot be made: '{there}' is not a folder that one can write to")


def create(name: str, num_classes: int, pretrained: bool = False) -> nn.Module:
    """timm.create_model whose failures are UsageErrors.

    Args:
        name: A timm model, or 'local-dir:FOLDER'.
        num_classes: Outputs of the classifier.
        pretrained: Whether to load weights.

    Raises:
        UsageError: There is no such model, or it cannot be built.
    """
    source, _, path = name.partition(':')
    if source == 'local-dir' and not (Path(path) / 'config.json').is_file():
        raise UsageError(f"--model '{name}': '{path}' is not a folder with a config.json")
    base = name.partition('.')[0]
    if not path and not timm.is_model(base):
        raise UsageError(f"unknown model '{name}'{nearest(base, timm.list_models())}")
    if source == 'local-dir':
        check_config(path)
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    except WidthError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError, LookupError, AttributeError, ArithmeticError) as e:
        # an unknown tag, no weights, no network, arguments that the model refuses in its own way
        reason = (str(e).strip().splitlines() or [''])[0]
        raise UsageError(f"model '{name}' cannot be built: {type(e).__name__}: {reason}") from e
    if getattr(model, 'in_chans', 3) != 3:
        raise UsageError(f"model '{name}' takes images of {model.in_chans} channels; the images here have 3")
    return model


def data_config(args: Namespace, model: nn.Module) -> dict[str, Any]:
    """timm's data config (input size, mean, interpolation, ...) of a model under the flags."""
    return resolve_data_config(vars(args), model=model)


def fit(
        model: nn.Module,
        batches: DataLoader,
        args: Namespace,
        epochs: int,
        title: str = '',
        after_epoch: Optional[Callable[[int, float, float], None]] = None,
) -> nn.Module:
    """Trains a model in place; seeds first, so that the same model on the same batches ends the same.

    Args:
        model: The model.
        batches: Training batches.
        args: The flags of `add_arguments`.
        epochs: Length of the training; the warm-up keeps its share of it.
        title: What the progress bar says.
        after_epoch: Called with the epoch, its mean loss and the learning rate of its last step.

    Returns:
        The same model, on args.device.
    """
    random_seed(args.seed)
    model.to(args.device).train()
    criterion = create_classification_loss(smoothing=args.smoothing).to(args.device)
    optimizer, scheduler, epochs = _optimiser(model, args, epochs, len(batches))
    scaler = NativeScaler(device='cuda') if args.amp and args.amp_dtype == 'float16' and 'cuda' in args.device else None
    updates = 0
    with tqdm(total=epochs * len(batches), desc=title, unit='step', leave=False, disable=None) as bar:
        for epoch in range(epochs):
            losses, lr = AverageMeter(), 0.
            for images, targets in batches:
                with _autocast(args):
                    loss = criterion(model(images), targets)
                optimizer.zero_grad()
                if scaler is None:
                    loss.backward()
                    optimizer.step()
                else:
                    scaler(loss, optimizer)
                losses.update(loss.detach(), len(targets))  # stays on the device: reading it would wait for the step
                lr, updates = optimizer.param_groups[0]['lr'], updates + 1
                if scheduler is not None:
                    scheduler.step_update(updates)
                bar.update()
            if scheduler is not None:
                scheduler.step(epoch + 1)
            if after_epoch is not None:
                after_epoch(epoch, float(losses.avg), lr)
    return model


@torch.inference_mode()
def top1(model: nn.Module, batches: DataLoader, args: Namespace) -> float:
    """Top-1 accuracy in percent."""
    model.to(args.device).eval()
    meter = AverageMeter()
    for images, targets in batches:
        with _autocast(args):
            output = model(images)
        meter.update(accuracy(output, targets)[0].item(), len(targets))
    return meter.avg


def _optimiser(model: nn.Module, args: Namespace, epochs: int, updates: int) -> tuple:
    """timm's optimiser and schedule, and the number of epochs with what the schedule adds."""
    lr = args.lr
    if lr is None:  # as timm derives it
        adaptive = any(word in args.opt.lower() for word in ('ada', 'lamb'))
        ratio = args.batch_size / args.lr_base_size
        lr = args.lr_base * (ratio ** 0.5 if (args.lr_base_scale or ('sqrt' if adaptive else 'linear')) == 'sqrt' else ratio)
    optimizer = create_optimizer_v2(model, **{**optimizer_kwargs(args), 'lr': lr})
    schedule = {**scheduler_kwargs(args), 'num_epochs': epochs, 'warmup_epochs': args.warmup_epochs * epochs / args.epochs}
    return optimizer, *create_scheduler_v2(optimizer, **schedule, updates_per_epoch=updates)


def _autocast(args: Namespace) -> AbstractContextManager:
    return torch.autocast(torch.device(args.device).type, AMP_DTYPES[args.amp_dtype], enabled=args.amp)


def write_args(args: Namespace, folder: Path) -> None:
    """Writes args.yaml, as timm does."""
    (folder / 'args.yaml').write_text(yaml.safe_dump(vars(args), default_flow_style=False))
