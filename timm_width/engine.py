"""The training loop that search and train share, and scoring.

Data, optimisers, schedules, losses, averages of weights and metrics are timm's. The loop is the same for a plain model and for a
shared network that runs at many widths: what one batch does is a `train_step`, and a plain model's is `plain_step`.
"""
import json
import os
import random
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Iterator, Optional

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.layers import set_fast_norm
from timm.loss import create_classification_loss
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task.evaluator import MultiLabelClassificationEvaluator
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn, init_distributed_device, random_seed
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from .arguments import AMP_DTYPES
from .config import SUFFIX, check_config
from .data import UsageError, mixes
from .losses import criterion_kwargs
from .meter import Meter
from .models import register
from .space import WidthError, nearest

__all__ = [
    'Loop', 'Step', 'Training', 'autocast', 'batch_statistics', 'create', 'data_config', 'is_primary', 'learning_rate',
    'make_optimizer', 'model_arguments', 'of_primary', 'plain_step', 'say', 'random_states_of_all', 'score', 'set_random_states',
    'start_processes', 'sum_of_all', 'top1', 'wait_for_all',
]


# -- models ----------------------------------------------------------------------------------------------------------------


def model_arguments(args: Namespace) -> dict[str, Any]:
    """What the flags tell timm.create_model besides the name, the classes and --pretrained."""
    wanted = {'drop_rate': args.drop, 'drop_path_rate': args.drop_path, 'drop_block_rate': args.drop_block, 'global_pool': args.gp,
              'bn_momentum': args.bn_momentum, 'bn_eps': args.bn_eps, 'checkpoint_path': args.initial_checkpoint}
    overlay = {**({'file': args.pretrained_path, 'num_classes': -1} if args.pretrained_path else {}), **args.pretrained_cfg_overlay}
    wanted['pretrained_cfg_overlay'] = overlay
    return {**{k: v for k, v in wanted.items() if v not in (None, '', {})}, **args.model_kwargs}


def create(
        name: str,
        num_classes: Optional[int],
        pretrained: bool = False,
        inputs: Optional[Mapping[str, Any]] = None,
        **kwargs: Any,
) -> nn.Module:
    """timm.create_model whose failures are UsageErrors.

    Args:
        name: A timm model, or 'local-dir:FOLDER'.
        num_classes: Outputs of the classifier.
        pretrained: Whether to load weights.
        inputs: Flags that say the size and the channels of the images, for models that must know.
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
        if inputs is None:
            return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
        return timm.create_model(
            pretrained=pretrained, **resolve_model_input_args(name, dict(inputs), num_classes=num_classes, **kwargs))
    except WidthError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError, LookupError, AttributeError, ArithmeticError,
            SafetensorError) as e:
        # an unknown tag, no weights, no network, arguments that the model refuses in its own way
        reason = (str(e).strip().splitlines() or [''])[0]
        raise UsageError(f"model '{name}' cannot be built: {type(e).__name__}: {reason}") from e


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
    """Joins the processes that torchrun started, if it did; sets args.device, .rank and .world_size, and --fast-norm."""
    init_distributed_device(args)
    if args.fast_norm:
        set_fast_norm()


def is_primary(args: Namespace) -> bool:
    """Whether this process is the one that writes files."""
    return getattr(args, 'rank', 0) == 0


def say(args: Namespace, text: str) -> None:
    """Prints a line, once for all processes."""
    if is_primary(args):
        print(text, flush=True)


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


def sum_of_all(args: Namespace, number: int) -> int:
    """The sum of the numbers that the processes give, in each of them."""
    if getattr(args, 'world_size', 1) <= 1:
        return number
    found: list[Any] = [None] * args.world_size
    distributed.all_gather_object(found, number)
    return sum(found)


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

    def __init__(self, training: 'Loop', images: Any, targets: torch.Tensor, last: bool = True):
        self._training = training
        self.images, self.targets, self.last = images, targets, last
        self.epoch, self.update, self._batch = training.epoch, training.updates, training.batch
        self.epochs, self.for_architecture = training.epochs, getattr(training.batches, 'second', False)
        self.first_loss: Optional[torch.Tensor] = None

    @property
    def progress(self) -> float:
        return self.update / self._training.total_updates

    @cached_property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self._training.seed, self.update])

    @cached_property
    def image_rng(self) -> np.random.Generator:
        rank = getattr(self._training.args, 'rank', 0)
        # one that ended in zeros would be as that of `rng`
        return np.random.default_rng([self._training.seed, self.update, self._batch, 1 + rank])

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with autocast(self._training.args):
            return self._training.call(self.images, *args, **kwargs)

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        with autocast(self._training.args):
            return self._training.criterion(logits, self.targets)

    def distill(self, logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if self._training.args.task == 'multilabel':
            return F.binary_cross_entropy_with_logits(logits.float(), teacher.detach().float().sigmoid())
        return F.cross_entropy(logits.float(), teacher.detach().float().softmax(-1))

    def backward(self, loss: torch.Tensor) -> None:
        if self.first_loss is None:
            self.first_loss = loss.detach()
        self._training.backward(loss)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        world_size = getattr(self._training.args, 'world_size', 1)
        if world_size < 2:
            return tensor
        found = [torch.empty_like(tensor) for _ in range(world_size)]
        distributed.all_gather(found, tensor.contiguous())
        return torch.cat(found)


def plain_step(step: Step) -> None:
    """One forward and one backward pass: training as everybody knows it."""
    step.backward(step.loss(step.forward()))


class Scaler(torch.amp.GradScaler):
    """Scales losses where gradients in float16 would vanish."""
    state_dict_key = 'amp_scaler'  # in timm's checkpoints

    def __init__(self, args: Namespace):
        super().__init__('cuda', enabled=args.amp and args.amp_dtype == 'float16' and 'cuda' in args.device)


class Loop:
    """Epochs of batches, as search and train have in common; each says with its own class what is trained.

    Args:
        args: The flags.
        batches: Training batches.
        network: What is put into training mode, and called by `Step.forward`.
        train_step: What to do with a `Step`.
        title: What the progress bar says.
        seed: Seed of what train_step draws; by default --seed.

    Attributes:
        optimizer, scheduler, epochs: Of timm; `make_optimizer` makes them.
        epoch, updates: How far it is.
        batch: Number of the batch within its update, from 0.
    """
    optimizer: torch.optim.Optimizer
    scheduler: Any
    epochs: int

    def __init__(
            self,
            args: Namespace,
            batches: DataLoader,
            network: nn.Module,
            train_step: Callable[[Step], None],
            title: str,
            seed: Optional[int] = None,
    ):
        self.args, self.batches, self.network, self.train_step, self.title = args, batches, network, train_step, title
        self.seed = args.seed if seed is None else seed
        self.scaler = Scaler(args)
        self.updates_per_epoch = sum(-(-(b - a) // args.grad_accum_steps) for a, b in zip((0, *self.ends), self.ends))
        self.epoch = self.updates = self.batch = 0
        self._share = 1.  # of an update that one batch is

    @property
    def ends(self) -> Sequence[int]:
        """Numbers of batches after which an update ends, whatever --grad-accum-steps says."""
        return getattr(self.batches, 'ends', (len(self.batches),))

    @property
    def total_updates(self) -> int:
        return self.epochs * self.updates_per_epoch

    def call(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the network."""
        return self.network(images, *args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a loss of this batch to those of the update."""
        second_order = getattr(self.optimizer, 'is_second_order', False)  # AdaHessian
        loss = loss if self._share == 1 else loss * self._share
        self.scaler.scale(loss).backward(create_graph=second_order)

    def run_epoch(self, bar: tqdm) -> tuple[float, float]:
        """Trains for one epoch.

        Returns:
            The mean loss of its images, and the learning rate of its last update.
        """
        self.network.train()
        for part in (self.batches.sampler, getattr(self.batches, 'batch_sampler', None), self.batches.dataset):
            if hasattr(part, 'set_epoch'):
                part.set_epoch(self.epoch)
        losses, sizes, lr, ends = [], [], 0., self.ends
        for i, batch in enumerate(self.batches):
            images, targets = self.prepare(*batch)
            start = max((end for end in ends if end <= i), default=0)
            left = next((end for end in ends if end > i), i + 1) - i  # some loaders give more than they say
            self.batch = (i - start) % self.args.grad_accum_steps
            last = self.batch == self.args.grad_accum_steps - 1 or left == 1
            if self.batch == 0:
                self.optimizer.zero_grad()
                self._share = 1 / min(self.args.grad_accum_steps, left)
            share, self._share = self._share, self.share(self._share, targets)
            step = Step(self, images, targets, last)
            with nullcontext() if last else self.no_sync():
                self.train_step(step)
            self._share = share
            if step.first_loss is not None:
                losses.append(step.first_loss)  # stays on the device: reading it would wait for the step
                sizes.append(len(targets))
            if last:
                lr = self.optimizer.param_groups[0]['lr']
                self._update()
                self.after_update(i // self.args.grad_accum_steps, step)
            bar.update()
        if hasattr(self.optimizer, 'sync_lookahead'):
            self.optimizer.sync_lookahead()
        if not losses:
            return 0., lr
        weights = torch.tensor(sizes, dtype=torch.float32, device=losses[0].device)
        return float(torch.stack(losses).float() @ weights / weights.sum()), lr

    def prepare(self, images: Any, targets: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """A batch as the network takes it."""
        if self.args.channels_last and isinstance(images, torch.Tensor):
            images = images.contiguous(memory_format=torch.channels_last)
        return images, targets

    def share(self, share: float, targets: torch.Tensor) -> float:
        """What part of an update a batch is, where its size says more than the number of its batches."""
        return share

    def no_sync(self) -> AbstractContextManager:
        """Around the batches of an update but the last."""
        return nullcontext()

    def clipped(self) -> Iterable[nn.Parameter]:
        """The parameters whose gradients --clip-grad clips."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Makes the gradients of an update those of all processes, where backward has not."""

    def average(self) -> None:
        """Follows the weights with their averages, after an update."""

    def after_update(self, update: int, step: Step) -> None:
        """Called after each update, with its number in the epoch and the batch that ended it."""

    def _update(self) -> None:
        args = self.args
        if all(p.grad is None for p in self.clipped()):  # what the batches trained is not the optimiser's
            self.updates += 1
            if self.scheduler is not None:
                self.scheduler.step_update(self.updates)
            return
        self.synchronize()
        if args.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.clipped(), args.clip_grad, args.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates += 1
        self.average()
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)


class Training(Loop):
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
        meter: Counts what the passes of this process cost; checkpoints keep it.
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
            meter: Optional[Meter] = None,
    ):
        random_seed(args.seed if seed is None else seed, getattr(args, 'rank', 0))
        layout = {'memory_format': torch.channels_last} if args.channels_last else {}
        super().__init__(args, batches, network.to(args.device, **layout), train_step, title, seed)
        if hasattr(batches.sampler, 'set_epoch'):
            batches.sampler.seed = self.seed  # of several processes: one order for all of them
        self.further, self.meter = list(parameters), meter
        self.parameters = [*network.parameters(), *parameters]
        self.mixing = mixes(args)
        try:
            self.criterion = create_classification_loss(**criterion_kwargs(args, args.num_classes)).to(args.device)
        except ValueError as e:
            raise UsageError(str(e)) from e
        self.optimizer, self.scheduler, self.epochs = make_optimizer(
            network, args, epochs, self.updates_per_epoch, warmup_epochs, parameters)
        self.ema = ModelEmaV3(network, args.model_ema_decay, use_warmup=args.model_ema_warmup,
                              device='cpu' if args.model_ema_force_cpu else None) if args.model_ema else None

    @property
    def result(self) -> nn.Module:
        """The network to score and save: of averaged weights, where these are kept."""
        return self.network if self.ema is None else self.ema.module

    def run(
            self,
            checkpoint: Optional[Path] = None,
            after_epoch: Optional[Callable[['Training', float, float], None]] = None,
            extra: Optional[Any] = None,
            stop: Optional[int] = None,
    ) -> nn.Module:
        """Trains to the end, from where it is.

        Args:
            checkpoint: File to go on from, if it is there, and to write after every epoch.
            after_epoch: Called after each epoch with this object, the epoch's mean loss and the learning rate of its last step.
            extra: Something with `state_dict` and `load_state_dict` to keep in the checkpoint, too.
            stop: Number of epochs after which to leave the rest to another call.

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
            while self.epoch < (self.epochs if stop is None else stop):
                loss, lr = self._run_epoch(bar)
                self.epoch += 1
                if not np.isfinite(loss):
                    raise UsageError(f'{self.title}: the loss is {loss} in epoch {self.epoch}; a lower --lr may help')
                if after_epoch is not None:
                    after_epoch(self, loss, lr)
                self._forget_removed()
                if checkpoint is not None:
                    self._save(checkpoint, extra)
        return self.result

    def _run_epoch(self, bar: tqdm) -> tuple[float, float]:
        args = self.args
        if self.mixing:
            self.batches.mixup_enabled = not args.mixup_off_epoch or self.epoch < args.mixup_off_epoch
        loss, lr = self.run_epoch(bar)
        if self.scheduler is not None:
            self.scheduler.step(self.epoch + 1)
        if getattr(args, 'world_size', 1) > 1:
            for net in dict.fromkeys((self.network, self.result)):  # in this order in every process
                distribute_bn(net, args.world_size, reduce=True)
        return loss, lr

    def _forget_removed(self) -> None:
        """Lets go of the parameters that the network has no more."""
        self.parameters = [*self.network.parameters(), *self.further]
        left = set(map(id, self.parameters))
        for group in self.optimizer.param_groups:
            group['params'] = [p for p in group['params'] if id(p) in left]
        for optimizer in (self.optimizer, getattr(self.optimizer, '_base_optimizer', None)):  # of Lookahead
            for p in [p for p in getattr(optimizer, 'state', ()) if id(p) not in left]:
                del optimizer.state[p]

    def call(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        run = self.network if self.meter is None else partial(self.meter, self.network)
        return run(images, *args, **kwargs)

    def clipped(self) -> Iterable[nn.Parameter]:
        return self.parameters

    def synchronize(self) -> None:
        if getattr(self.args, 'world_size', 1) > 1:
            _average_gradients(self.parameters)

    def average(self) -> None:
        if self.ema is not None:
            self.ema.update(self.network, step=self.updates)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _save(self, path: Path, extra: Optional[Any]) -> None:
        """Writes where the training is, beside and then over what is there."""
        everywhere = random_states_of_all(self.args)
        if not is_primary(self.args):
            return
        state = {
            'epoch': self.epoch, 'updates': self.updates, 'epochs': self.epochs, 'seed': self.seed, 'random_states': everywhere,
            'network': self.network.state_dict(), 'optimizer': self.optimizer.state_dict(), 'scaler': self.scaler.state_dict(),
            'ema': None if self.ema is None else self.ema.module.state_dict(),
            'extra': None if extra is None else extra.state_dict(), 'macs': 0 if self.meter is None else self.meter.macs}
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
            if extra is not None:
                extra.load_state_dict(state['extra'])  # which may remove parts of the network
                self._forget_removed()
            self.network.load_state_dict(state['network'])
            self.optimizer.load_state_dict(state['optimizer'])
            self.scaler.load_state_dict(state['scaler'])
            if self.ema is not None:
                self.ema.module.load_state_dict(state['ema'])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
            reason = (str(e).strip().splitlines() or [''])[0]
            raise UsageError(
                f"'{path}' is not a checkpoint of this training: {reason}; --overwrite instead of --resume starts anew") from e
        if self.meter is not None:
            self.meter.macs = state.get('macs', 0)  # a checkpoint of an earlier version has none
        self.epoch, self.updates = state['epoch'], state['updates']  # the optimiser's state holds the learning rate
        set_random_states(state['random_states'][getattr(self.args, 'rank', 0)])


def _read_state(path: Path, device: str) -> dict[str, Any]:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # a damaged pickle can raise anything
        raise ValueError('it is damaged') from e


def learning_rate(args: Namespace) -> float:
    """--lr (0 too, which timm takes for none given), or what timm derives from --lr-base and the images per update."""
    if args.lr is not None:
        return args.lr
    adaptive = any(word in args.opt.lower() for word in ('ada', 'lamb'))
    ratio = args.batch_size * args.grad_accum_steps * getattr(args, 'world_size', 1) / args.lr_base_size
    return args.lr_base * (ratio ** 0.5 if (args.lr_base_scale or ('sqrt' if adaptive else 'linear')) == 'sqrt' else ratio)


def make_optimizer(
        network: nn.Module,
        args: Namespace,
        epochs: int,
        updates: int,
        warmup_epochs: Optional[float] = None,
        further: Sequence[nn.Parameter] = (),
        plateau: bool = False,
) -> tuple:
    """timm's optimiser and schedule, and the number of epochs with what the schedule adds.

    Args:
        network: What to train.
        args: The flags.
        epochs: Length of the training.
        updates: Optimiser steps per epoch.
        warmup_epochs: Epochs of rising learning rate; by default --warmup-epochs.
        further: Parameters to add, without weight decay.
        plateau: Whether a validation metric will be there for --sched plateau.

    Raises:
        UsageError: There is no such optimiser or schedule, or it does not take these values.
    """
    if args.sched == 'plateau' and not plateau:
        raise UsageError('--sched plateau follows a validation accuracy, and there is none while this trains: give another')
    try:
        optimizer = create_optimizer_v2(network, **{**optimizer_kwargs(args), 'lr': learning_rate(args), **args.opt_kwargs})
        if further:
            optimizer.add_param_group({'params': list(further), 'weight_decay': 0.})
        schedule = {**scheduler_kwargs(args), 'num_epochs': epochs}
        if warmup_epochs is not None:
            schedule['warmup_epochs'] = warmup_epochs
        return optimizer, *create_scheduler_v2(optimizer, **schedule, updates_per_epoch=updates)
    except (ValueError, TypeError, AssertionError) as e:
        raise UsageError(f'--opt {args.opt} --sched {args.sched}: {e}') from e


def random_states() -> dict[str, Any]:
    """What the next random numbers of this process depend on."""
    name, keys, *rest = np.random.get_state()
    return {
        'torch': torch.get_rng_state(), 'python': random.getstate(),
        'numpy': (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def random_states_of_all(args: Namespace) -> list[dict[str, Any]]:
    """Those of every process, in each of them."""
    if getattr(args, 'world_size', 1) < 2:
        return [random_states()]
    found: list[Any] = [None] * args.world_size
    distributed.all_gather_object(found, random_states())
    return found


def set_random_states(states: dict[str, Any]) -> None:
    """Sets what `random_states` gave."""
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

    Under --task multilabel it is the mean average precision in percent, and the mean binary cross-entropy.

    Args:
        network: A model, or a network that takes more than images.
        batches: Batches of images and classes; with several processes, this one's share of them.
        args: The flags.
        *call: What the network takes after the images.
        **kwargs: What the network takes by name.
    """
    if getattr(args, 'task', '') == 'multilabel':
        return _score_labels(network, batches, args, *call, **kwargs)
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


def _score_labels(network: nn.Module, batches: Iterable, args: Namespace, *call: Any, **kwargs: Any) -> tuple[float, float]:
    found = MultiLabelClassificationEvaluator(args.device)
    for images, targets in batches:
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(args):
            logits = network(images, *call, **kwargs)
        found.update(logits, targets)
    metrics = found.compute(distributed=getattr(args, 'world_size', 1) > 1)
    return metrics['map'], metrics['loss']


def top1(model: nn.Module, batches: DataLoader, args: Namespace) -> float:
    """Top-1 accuracy of a trained model in percent, or its mean average precision."""
    return score(model.to(args.device).eval(), batches, args)[0]
