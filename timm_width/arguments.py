"""The flags that search and train share, named and meant as in timm's train.py, and the checks of what they say."""
import os
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from timm.utils import ParseKwargs

from .data import DEFAULTS, UsageError
from .space import nearest

__all__ = ['AMP_DTYPES', 'RANGES', 'Parser', 'add_arguments', 'check_arguments', 'check_output', 'write_args']

# flag -> (least, most) that makes sense; None is no bound
RANGES: dict[str, tuple[Optional[float], Optional[float]]] = {
    'epochs': (1, None), 'warmup_epochs': (0, None), 'batch_size': (1, None), 'validation_batch_size': (1, None),
    'workers': (0, None), 'img_size': (1, None), 'num_classes': (2, None), 'lr': (0, None), 'lr_base': (0, None),
    'lr_base_size': (1, None), 'min_lr': (0, None), 'warmup_lr': (0, None), 'momentum': (0, None), 'weight_decay': (0, None),
    'clip_grad': (0, None), 'grad_accum_steps': (1, None), 'smoothing': (0, 1), 'hflip': (0, 1), 'vflip': (0, 1),
    'reprob': (0, 1), 'mixup': (0, None), 'cutmix': (0, None), 'mixup_prob': (0, 1), 'mixup_switch_prob': (0, 1),
    'drop': (0, 1), 'drop_path': (0, 1), 'crop_pct': (0.01, 1), 'model_ema_decay': (0, 1), 'seed': (0, 2 ** 32 - 1),
}
PROCESS = ('rank', 'local_rank', 'distributed')
AMP_DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: Action) -> str:
        return action.help if action.default in (None, '', False, [], {}) else super()._get_help_string(action)


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are one line, without the list of all flags."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=_Formatter, **kwargs)

    def error(self, message: str):
        if message.startswith('unrecognized arguments: -'):
            flag = message.split()[2]
            message += nearest(flag, [s for a in self._actions for s in a.option_strings])
        raise UsageError(f'{message} (--help lists the flags)')


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags for data, model, training and output. Name, type and default are timm's, but for --device."""
    group = parser.add_argument_group('data')
    group.add_argument('--dataset', default='', metavar='NAME',
                       help=f"{', '.join(DEFAULTS)} (embedded), or a name that timm's create_dataset takes: torch/cifar10, "
                            'hfds/OWNER/NAME; by default the folders of images in --data-dir')
    group.add_argument('--data-dir', metavar='FOLDER', help='images in train/CLASS/ and val/CLASS/, or where the dataset is')
    group.add_argument('--train-split', default='train', metavar='NAME', help='split to train on')
    group.add_argument('--val-split', default='validation', metavar='NAME', help='split to validate on')
    group.add_argument('--class-map', default='', metavar='FILE', help='class name to index, one name a line')
    group.add_argument('--dataset-download', action='store_true', help='download the dataset, where timm can')
    group.add_argument('--dataset-trust-remote-code', action='store_true', help='let a dataset of the Hub run its code')
    group.add_argument('--input-img-mode', metavar='MODE', help='PIL mode that images are converted to (default: RGB)')
    group.add_argument('--input-key', metavar='KEY', help='where a dataset keeps its images')
    group.add_argument('--target-key', metavar='KEY', help='where a dataset keeps its labels')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='processes that load images')
    group.add_argument('--pin-mem', action='store_true', help='page-locked memory, for faster copies to a GPU')
    group.add_argument('--worker-seeding', default='all', metavar='MODE', help="what each worker seeds: 'all' or 'partial'")

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='resnet50', metavar='NAME',
                       help="a timm model, 'local-dir:FOLDER' or 'hf-hub:OWNER/NAME'")
    group.add_argument('--pretrained', action='store_true', help='start from pretrained weights')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
                       help='further arguments of the model')
    group.add_argument('--num-classes', type=int, metavar='N', help='outputs of the model (default: the classes found)')
    group.add_argument('--gp', metavar='NAME', help='global pooling: fast, avg, max, avgmax, avgmaxc')
    group.add_argument('--drop', type=float, default=0., metavar='P', help='dropout')
    group.add_argument('--drop-path', type=float, metavar='P', help='stochastic depth')
    group.add_argument('--img-size', type=int, metavar='N', help="side of the images (default: the model's)")
    group.add_argument('--crop-pct', type=float, metavar='N',
                       help="part of a validation image that is seen (default: the model's)")
    group.add_argument('--mean', type=float, nargs='+', metavar='MEAN', help="pixel mean (default: the model's)")
    group.add_argument('--std', type=float, nargs='+', metavar='STD', help="pixel deviation (default: the model's)")
    group.add_argument('--interpolation', default='', metavar='NAME', help="resizing (default: the model's)")
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='images per step and process')
    group.add_argument('-vb', '--validation-batch-size', type=int, metavar='N', help='images per step when nothing is trained')
    group.add_argument('--channels-last', action='store_true', help='channels-last memory layout')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='batches per optimiser step')
    group.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME',
                       help='torch device')
    group.add_argument('--amp', action='store_true', help='mixed precision')
    group.add_argument('--amp-dtype', default='float16', choices=AMP_DTYPES, help='lower precision of --amp')
    group.add_argument('--model-ema', action='store_true', help='average the weights; the averages are what is scored and saved')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='D', help='decay of these averages')
    group.add_argument('--model-ema-warmup', action='store_true', help='let the decay rise from 0')

    group = parser.add_argument_group('optimiser and schedule')
    group.add_argument('--opt', default='sgd', metavar='NAME', help="any of timm's optimisers")
    group.add_argument('--opt-eps', type=float, metavar='E', help="the optimiser's epsilon")
    group.add_argument('--opt-betas', type=float, nargs='+', metavar='B', help="the optimiser's betas")
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
                       help='further arguments of the optimiser')
    group.add_argument('--momentum', type=float, default=0.9, metavar='M', help='momentum of the optimiser')
    group.add_argument('--weight-decay', type=float, default=2e-5, metavar='D', help='weight decay')
    group.add_argument('--layer-decay', type=float, metavar='D', help='decay of the learning rate from layer to layer')
    group.add_argument('--clip-grad', type=float, metavar='N', help='clip gradients at this value')
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='how gradients are clipped')
    group.add_argument('--lr', type=float, metavar='LR', help='learning rate (default: from --lr-base)')
    group.add_argument('--lr-base', type=float, default=0.1, metavar='LR', help='learning rate of a batch of --lr-base-size')
    group.add_argument('--lr-base-size', type=int, default=256, metavar='N', help='batch size that --lr-base is for')
    group.add_argument('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'),
                       help="how --lr-base follows the batch size (default: 'sqrt' for adaptive optimisers, else 'linear')")
    group.add_argument('--sched', default='cosine', metavar='NAME', help="any of timm's schedules")
    group.add_argument('--sched-on-updates', action='store_true', help='change the learning rate every step, not every epoch')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='length of the training')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of rising learning rate')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='LR', help='learning rate at the start')
    group.add_argument('--min-lr', type=float, default=0., metavar='LR', help='learning rate at the end')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, metavar='RATE', help='decay of step-wise schedules')
    group.add_argument('--decay-epochs', type=float, default=90, metavar='N', help='epochs between their steps')
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N', help='or these epochs')

    group = parser.add_argument_group('augmentation and regularisation')
    group.add_argument('--no-aug', action='store_true', help='no augmentation')
    group.add_argument('--scale', type=float, nargs=2, default=[0.08, 1.], metavar='PCT',
                       help='part of an image that a crop keeps')
    group.add_argument('--ratio', type=float, nargs=2, default=[3 / 4, 4 / 3], metavar='R', help='aspect ratio of a crop')
    group.add_argument('--train-crop-mode', metavar='MODE', help='how training images are cropped: rrc, rkrc or rkrr')
    group.add_argument('--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip')
    group.add_argument('--vflip', type=float, default=0., metavar='P', help='probability of a vertical flip')
    group.add_argument('--color-jitter', type=float, default=0.4, metavar='PCT', help='strength of colour changes')
    group.add_argument('--aa', metavar='NAME', help="AutoAugment policy: 'v0', 'original', 'rand-m9-mstd0.5', 'augmix-m3', ...")
    group.add_argument('--reprob', type=float, default=0., metavar='P', help='probability of random erasing')
    group.add_argument('--remode', default='pixel', metavar='MODE', help='what erased pixels become: const, rand or pixel')
    group.add_argument('--recount', type=int, default=1, metavar='N', help='erasures per image')
    group.add_argument('--smoothing', type=float, default=0.1, metavar='P', help='label smoothing')
    group.add_argument('--mixup', type=float, default=0., metavar='ALPHA', help='mixup, if above 0')
    group.add_argument('--cutmix', type=float, default=0., metavar='ALPHA', help='cutmix, if above 0')
    group.add_argument('--cutmix-minmax', type=float, nargs='+', metavar='R', help='least and largest ratio of cutmix')
    group.add_argument('--mixup-prob', type=float, default=1., metavar='P', help='probability of mixup or cutmix')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, metavar='P', help='probability of cutmix, of the two')
    group.add_argument('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='what shares a mixing ratio')
    group.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N', help='no mixing from this epoch on, if above 0')

    group = parser.add_argument_group('run')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='seed of all that is random')


def check_arguments(args: Namespace, ranges: Mapping[str, tuple] = RANGES) -> None:
    """Refuses values that would fail later: numbers out of range, no such device.

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


def check_output(folder: Path, overwrite: bool, source: str = '') -> None:
    """Refuses an output folder that is in use, cannot be made, or is where the model comes from.

    Args:
        folder: The folder.
        overwrite: Whether it may be in use.
        source: --model.

    Raises:
        UsageError: With the reason.
    """
    kind, _, path = source.partition(':')
    if kind == 'local-dir' and Path(path).resolve() == folder.resolve():
        raise UsageError(f"--output '{folder}' is the folder of --model: the results would replace what they start from")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output '{folder}' is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UsageError(f"--output '{folder}' exists and is not empty: give another folder, or --overwrite")
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f"--output '{folder}' cannot be made: '{there}' is not a folder that one can write to")


def write_args(args: Namespace, folder: Path) -> None:
    """Writes args.yaml, as timm does; without what only tells processes apart."""
    said = {k: v for k, v in vars(args).items() if k not in PROCESS}
    (folder / 'args.yaml').write_text(yaml.safe_dump(said, default_flow_style=False))
