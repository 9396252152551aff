"""The training loop that search and train share, and scoring.

Data, optimisers, schedules, losses, averages of weights and metrics are timm's. The loop is the same for a plain model and for a
shared network that runs at many widths: what one batch does is a `train_step`, and a plain model's is `plain_step`.
"""
import json
import os
import random
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Iterator, Optional

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn, init_distributed_device, random_seed
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from .arguments import AMP_DTYPES
from .config import SUFFIX, check_config
from .data import UsageError, mixes
from .models import register
from .space import WidthError, nearest

__all__ = [
    'Step', 'Training', 'batch_statistics', 'create', 'data_config', 'is_primary', 'make_optimizer', 'of_primary', 'plain_step',
    'score', 'start_processes', 'top1', 'wait_for_all',
]


# -- models ----------------------------------------------------------------------------------------------------------------


def create(name: str, num_classes: Optional[int], pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm.create_model whose failures are UsageErrors.

    Args:
        name: A timm model, or 'local-dir:FOLDER'.
        num_classes: Outputs of the classifier.
        pretrained: Whether to load weights.
        **kwargs: Further arguments of create_model.

    Raises:
        UsageError: There is no such model, or it cannot be built.
    """
    source, _, path = name.partition(':')
    if source == 'local-dir' and not (Path(path) / 'config.json').is_file():
        raise UsageError(f"--model '{name}': '{path}' is not a folder with a config.json")
    base = name.partition('.')[0]
    if not path and not timm.is_model(base) and (Path(name) / 'config.json').is_file():
        raise UsageError(f"--model '{name}' is a folder: write local-dir:{name}")
    if not path and not timm.is_model(base):
        raise UsageError(f"unknown model '{name}'{nearest(base, timm.list_models())}")
    if source == 'local-dir':
        check_config(path)
        saved = json.loads((Path(path) / 'config.json').read_text(encoding='utf-8'))['architecture']
        if saved.endswith(SUFFIX):
            register(saved.removesuffix(SUFFIX))  # those outside the table of supported models, too
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except WidthError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError, LookupError, AttributeError, ArithmeticError,
            SafetensorError) as e:
        # an unknown tag, no weights, no network, arguments that the model refuses in its own way
        reason = (str(e).strip().splitlines() or [''])[0]
        raise UsageError(f"model '{name}' cannot be built: {type(e).__name__}: {reason}") from e
    return model


def data_config(args: Namespace, model: nn.Module) -> dict[str, Any]:
    """timm's data config (input size, mean, interpolation, ...) of a model under the flags.

    Raises:
        UsageError: The model takes images of other than three channels.
    """
    if getattr(model, 'in_chans', 3) != 3:
        raise UsageError(f"model '{args.model}' takes images of {model.in_chans} channels; the images here have 3")
    return resolve_data_config(vars(args), model=model)


# -- processes -------------------------------------------------------------------------------------------------------------


def start_processes(args: Namespace) -> None:
    """Joins the processes that torchrun started, if it did; sets args.device, .rank and .world_size."""
    init_distributed_device(args)


def is_primary(args: Namespace) -> bool:
    """Whether this process is the one that writes files."""
    return getattr(args, 'rank', 0) == 0


def wait_for_all(args: Namespace) -> None:
    """Returns when every process has come here."""
    if getattr(args, 'world_size', 1) > 1:
        distributed.barrier()


def of_primary(args: Namespace, value: Any) -> Any:
    """The value that the first process gives, in every process."""
    if getattr(args, 'world_size', 1) <= 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def _average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages gradients over all processes, once per update.

    Instead of DistributedDataParallel, which averages in every backward pass and cannot know which pass of a step is the last,
    nor which blocks it skips.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        g.copy_(part.view_as(g))


# -- training --------------------------------------------------------------------------------------------------------------


class Step:
    """One batch (see `policies.base.Step`): what a train_step works with."""

    def __init__(self, training: 'Training', images: torch.Tensor, targets: torch.Tensor):
        self._training = training
        self.images, self.targets = images, targets
        self.epoch, self.update = training.epoch, training.updates
        self.progress = training.updates / training.total_updates
        self.rng = np.random.default_rng([training.seed, training.updates])
        self.first_loss: Optional[torch.Tensor] = None

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with autocast(self._training.args):
            return self._training.network(self.images, *args, **kwargs)

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        with autocast(self._training.args):
            return self._training.criterion(logits, self.targets)

    def distill(self, logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), teacher.detach().float().softmax(-1))

    def backward(self, loss: torch.Tensor) -> None:
        if self.first_loss is None:
            self.first_loss = loss.detach()
        self._training.backward(loss)


def plain_step(step: Step) -> None:
    """One forward and one backward pass: training as everybody knows it."""
    step.backward(step.loss(step.forward()))


class Training:
    """A network under training: with its optimiser, its schedule, and how far it is.

    Seeds first, so that the same network on the same batches ends the same; a `state_dict` holds the random states too, so
    that a training that goes on from it ends where the unbroken one would (with `--workers 0` bit for bit).

    Args:
        network: A model, or a network that takes more than images.
        batches: Training batches.
        args: The flags of `add_arguments`.
        epochs: Length of the training.
        title: What the progress bar says.
        warmup_epochs: Epochs of rising learning rate; by default --warmup-epochs.
        train_step: What to do with a `Step`.
        parameters: Further parameters to train, without weight decay.
        seed: Seed of the order of images, of augmentation, and of what train_step draws; by default --seed.
    """

    def __init__(
            self,
            network: nn.Module,
            batches: DataLoader,
            args: Namespace,
            epochs: int,
            title: str = '',
            warmup_epochs: Optional[float] = None,
            train_step: Callable[[Step], None] = plain_step,
            parameters: Sequence[nn.Parameter] = (),
            seed: Optional[int] = None,
    ):
        self.args, self.batches, self.title, self.train_step = args, batches, title, train_step
        self.seed = args.seed if seed is None else seed
        random_seed(self.seed, getattr(args, 'rank', 0))
        if hasattr(batches.sampler, 'set_epoch'):
            batches.sampler.seed = self.seed  # of several processes: one order for all of them
        layout = {'memory_format': torch.channels_last} if args.channels_last else {}
        self.network = network.to(args.device, **layout)
        self.parameters = [*network.parameters(), *parameters]
        self.mixing = mixes(args)
        self.criterion = create_classification_loss(smoothing=args.smoothing, soft_targets=self.mixing).to(args.device)
        self.updates_per_epoch = -(-len(batches) // args.grad_accum_steps)
        self.optimizer, self.scheduler, self.epochs = make_optimizer(
            network, args, epochs, self.updates_per_epoch, warmup_epochs, parameters)
        self.total_updates = self.epochs * self.updates_per_epoch
        scaled = args.amp and args.amp_dtype == 'float16' and 'cuda' in args.device
        self.scaler = torch.amp.GradScaler('cuda', enabled=scaled)
        self.ema = ModelEmaV3(network, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
        self.epoch = self.updates = 0
        self._share = 1.  # of an update that one batch is

    @property
    def result(self) -> nn.Module:
        """The network to score and save: of averaged weights, where these are kept."""
        return self.network if self.ema is None else self.ema.module

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a loss of this batch to those of the update."""
        self.scaler.scale(loss * self._share).backward()

    def run(
            self,
            checkpoint: Optional[Path] = None,
            after_epoch: Optional[Callable[['Training', float, float], None]] = None,
            extra: Optional[Any] = None,
    ) -> nn.Module:
        """Trains to the end, from where it is.

        Args:
            checkpoint: File to go on from, if it is there, and to write after every epoch.
            after_epoch: Called after each epoch with this object, the epoch's mean loss and the learning rate of its last step.
            extra: Something with `state_dict` and `load_state_dict` to keep in the checkpoint, too.

        Returns:
            `result`.

        Raises:
            UsageError: The loss is no longer finite, or the checkpoint is of another training.
        """
        if checkpoint is not None and checkpoint.is_file():
            self._load(checkpoint, extra)
        steps = self.epochs * len(self.batches)
        with tqdm(total=steps, initial=self.epoch * len(self.batches), desc=self.title, unit='step', leave=False,
                  disable=None if is_primary(self.args) else True) as bar:
            while self.epoch < self.epochs:
                loss, lr = self._run_epoch(bar)
                self.epoch += 1
                if not np.isfinite(loss):
                    raise UsageError(f'{self.title}: the loss is {loss} in epoch {self.epoch}; a lower --lr may help')
                if after_epoch is not None:
                    after_epoch(self, loss, lr)
                if checkpoint is not None:
                    self._save(checkpoint, extra)
        return self.result

    def _run_epoch(self, bar: tqdm) -> tuple[float, float]:
        args, network = self.args, self.network
        network.train()
        if hasattr(self.batches.sampler, 'set_epoch'):
            self.batches.sampler.set_epoch(self.epoch)
        if self.mixing:
            self.batches.mixup_enabled = not args.mixup_off_epoch or self.epoch < args.mixup_off_epoch
        losses, lr, count = [], 0., len(self.batches)
        for i, (images, targets) in enumerate(self.batches):
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            accumulated = i % args.grad_accum_steps
            if accumulated == 0:
                self.optimizer.zero_grad()
                self._share = 1 / min(args.grad_accum_steps, count - i)
            step = Step(self, images, targets)
            self.train_step(step)
            if step.first_loss is not None:
                losses.append(step.first_loss)  # stays on the device: reading it would wait for the step
            if accumulated == args.grad_accum_steps - 1 or i == count - 1:
                lr = self.optimizer.param_groups[0]['lr']
                self._update()
            bar.update()
        if self.scheduler is not None:
            self.scheduler.step(self.epoch + 1)
        if getattr(args, 'world_size', 1) > 1:
            for net in dict.fromkeys((network, self.result)):  # in this order in every process
                distribute_bn(net, args.world_size, reduce=True)
        return float(torch.stack(losses).float().mean()) if losses else 0., lr

    def _update(self) -> None:
        args = self.args
        if getattr(args, 'world_size', 1) > 1:
            _average_gradients(self.parameters)
        if args.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.parameters, args.clip_grad, args.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates += 1
        if self.ema is not None:
            self.ema.update(self.network, step=self.updates)
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _save(self, path: Path, extra: Optional[Any]) -> None:
        """Writes where the training is, beside and then over what is there."""
        states = _random_states()
        if getattr(self.args, 'world_size', 1) > 1:
            everywhere: list[Any] = [None] * self.args.world_size
            distributed.all_gather_object(everywhere, states)
        else:
            everywhere = [states]
        if not is_primary(self.args):
            return
        state = {
            'epoch': self.epoch, 'updates': self.updates, 'epochs': self.epochs, 'seed': self.seed, 'random_states': everywhere,
            'network': self.network.state_dict(), 'optimizer': self.optimizer.state_dict(), 'scaler': self.scaler.state_dict(),
            'ema': None if self.ema is None else self.ema.module.state_dict(),
            'extra': None if extra is None else extra.state_dict()}
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f'.{path.name}.saving')
        torch.save(state, beside)
        os.replace(beside, path)

    def _load(self, path: Path, extra: Optional[Any]) -> None:
        try:
            state = _read_state(path, self.args.device)
            if (state['epochs'], state['seed']) != (self.epochs, self.seed) or len(state['random_states']) != getattr(
                    self.args, 'world_size', 1):
                raise ValueError('its length, seed or number of processes is another')
            self.network.load_state_dict(state['network'])
            self.optimizer.load_state_dict(state['optimizer'])
            self.scaler.load_state_dict(state['scaler'])
            if self.ema is not None:
                self.ema.module.load_state_dict(state['ema'])
            if extra is not None:
                extra.load_state_dict(state['extra'])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
            reason = (str(e).strip().splitlines() or [''])[0]
            raise UsageError(
                f"'{path}' is not a checkpoint of this training: {reason}; --overwrite instead of --resume starts anew") from e
        self.epoch, self.updates = state['epoch'], state['updates']  # the optimiser's state holds the learning rate
        _set_random_states(state['random_states'][getattr(self.args, 'rank', 0)])


def _read_state(path: Path, device: str) -> dict[str, Any]:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # a damaged pickle can raise anything
        raise ValueError('it is damaged') from e


def make_optimizer(
        network: nn.Module,
        args: Namespace,
        epochs: int,
        updates: int,
        warmup_epochs: Optional[float] = None,
        further: Sequence[nn.Parameter] = (),
) -> tuple:
    """timm's optimiser and schedule, and the number of epochs with what the schedule adds.

    Args:
        network: What to train.
        args: The flags.
        epochs: Length of the training.
        updates: Optimiser steps per epoch.
        warmup_epochs: Epochs of rising learning rate; by default --warmup-epochs.
        further: Parameters to add, without weight decay.

    Raises:
        UsageError: There is no such optimiser or schedule, or it does not take these values.
    """
    if args.sched == 'plateau':
        raise UsageError('--sched plateau follows a validation accuracy, and there is none while this trains: give another')
    lr = args.lr
    if lr is None:  # as timm derives it
        adaptive = any(word in args.opt.lower() for word in ('ada', 'lamb'))
        ratio = args.batch_size * args.grad_accum_steps * getattr(args, 'world_size', 1) / args.lr_base_size
        lr = args.lr_base * (ratio ** 0.5 if (args.lr_base_scale or ('sqrt' if adaptive else 'linear')) == 'sqrt' else ratio)
    try:
        optimizer = create_optimizer_v2(network, **{**optimizer_kwargs(args), 'lr': lr, **args.opt_kwargs})
        if further:
            optimizer.add_param_group({'params': list(further), 'weight_decay': 0.})
        schedule = {**scheduler_kwargs(args), 'num_epochs': epochs}
        if warmup_epochs is not None:
            schedule['warmup_epochs'] = warmup_epochs
        return optimizer, *create_scheduler_v2(optimizer, **schedule, updates_per_epoch=updates)
    except (ValueError, TypeError, AssertionError) as e:
        raise UsageError(f'--opt {args.opt} --sched {args.sched}: {e}') from e


def _random_states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        'torch': torch.get_rng_state(), 'python': random.getstate(),
        'numpy': (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states['torch'].cpu())
    version, keys, gauss = states['python']
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = states['numpy']
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    if states['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'].cpu())


# -- scoring ---------------------------------------------------------------------------------------------------------------


def autocast(args: Namespace) -> AbstractContextManager:
    """Mixed precision, if --amp asks for it."""
    return torch.autocast(torch.device(args.device).type, AMP_DTYPES[args.amp_dtype], enabled=args.amp)


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Evaluation mode but for batch norms, which normalise with the statistics of the batch."""
    modes = [(m, m.training) for m in network.modules()]
    try:
        network.eval()
        for m in network.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.training = True
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@torch.no_grad()
def score(network: nn.Module, batches: Iterable, args: Namespace, *call: Any, **kwargs: Any) -> tuple[float, float]:
    """Top-1 accuracy in percent and mean cross-entropy, over the batches of all processes; in whatever mode the network is.

    Args:
        network: A model, or a network that takes more than images.
        batches: Batches of images and classes; with several processes, this one's share of them.
        args: The flags.
        *call: What the network takes after the images.
        **kwargs: What the network takes by name.
    """
    total = torch.zeros(3, dtype=torch.float64, device='cpu' if 'mps' in args.device else args.device)
    for images, targets in batches:
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(args):
            logits = network(images, *call, **kwargs)
        loss = F.cross_entropy(logits.float(), targets, reduction='sum')
        total += torch.stack([(logits.argmax(1) == targets).sum(), loss, loss.new_tensor(len(targets))]).to(total)
    if getattr(args, 'world_size', 1) > 1:
        distributed.all_reduce(total)
    right, loss, count = total.tolist()
    if not count:
        raise UsageError('there is no image to score')
    return 100 * right / count, loss / count


def top1(model: nn.Module, batches: DataLoader, args: Namespace) -> float:
    """Top-1 accuracy of a trained model in percent."""
    return score(model.to(args.device).eval(), batches, args)[0]
