"""Training of a timm task: the epochs of train.py, with validation, checkpoints and a line for each."""
import logging
import math
import time
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Optional

import torch
from timm.data import Mixup
from timm.task import TrainingTask
from timm.task.evaluator import evaluation_sample_limit
from timm.utils import distribute_bn, reduce_tensor, update_summary
from torch import distributed, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .checkpoints import Checkpoints, save_images
from .engine import Loop, Step, autocast, is_primary, set_random_states

__all__ = ['TaskTraining', 'evaluate']

_logger = logging.getLogger(__name__)


def task_step(step: Step) -> None:
    """One forward and one backward pass of a task."""
    step.backward(step.forward(step.targets)['loss'])


class TaskTraining(Loop):
    """A task under training.

    Args:
        task: The task, with its averages, compiled and distributed as it shall be.
        batches: Training batches.
        args: The flags.
        optimizer: With its schedule and the number of epochs, what `make_optimizer` gives.
        mixup: Mixes batches, where the loader does not.
        folder: Where --save-images go, in the first process.
        recover: Called with epoch and batch every --recovery-interval batches.
    """

    def __init__(
            self,
            task: TrainingTask,
            batches: DataLoader,
            args: Namespace,
            optimizer: tuple,
            mixup: Optional[Mixup] = None,
            folder: Optional[Path] = None,
            recover: Optional[Callable[[int, int], None]] = None,
    ):
        super().__init__(args, batches, task, task_step, args.model)
        self.task, self.mixup, self.folder, self.recover = task, mixup, folder, recover
        self.optimizer, self.scheduler, self.epochs = optimizer
        self.dtype = getattr(torch, args.model_dtype or 'float32')
        self.variable = 'naflex_loss_scale' if args.naflex_loader else 'variable_batch_loss_scale' if args.train_img_sizes else None
        self.started = time.perf_counter()

    def prepare(self, images: Any, targets: torch.Tensor) -> tuple[Any, torch.Tensor]:
        if self.args.no_prefetcher:
            if isinstance(images, (list, tuple)):  # augmentation splits, which the prefetcher would have put in a row
                images, targets = torch.cat(list(images)), targets.repeat(len(images), *[1] * (targets.ndim - 1))
            images, targets = _moved(images, self.args.device, self.dtype), targets.to(self.args.device)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
        return super().prepare(images, targets)

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        if self.args.synchronize_step and 'cuda' in self.args.device:
            torch.cuda.synchronize()

    def share(self, share: float, targets: torch.Tensor) -> float:
        how = self.variable and getattr(self.args, self.variable)
        if not self.variable:
            return share
        if how != 'none':
            share *= (len(targets) / self.args.batch_size) ** (0.5 if how == 'sqrt' else 1)
        if self.args.distributed:  # the processes' batches differ in size: DDP's mean shall be that of all images
            total = targets.new_tensor(len(targets), dtype=torch.float32)
            distributed.all_reduce(total)
            share *= len(targets) * self.args.world_size / total.item()
        return share

    def no_sync(self) -> AbstractContextManager:
        return self.task.no_sync()

    def clipped(self) -> Iterable[nn.Parameter]:
        return self.task.get_clip_parameters(exclude_head='agc' in self.args.clip_mode)

    def average(self) -> None:
        self.task.update_ema(step=self.updates)

    def after_update(self, update: int, step: Step) -> None:
        args, count = self.args, self.updates_per_epoch
        if update % args.log_interval == 0 or update == count - 1:
            images = len(step.targets) * args.grad_accum_steps * args.world_size * (min(args.log_interval, update) or 1)
            rate = images / max(time.perf_counter() - self.started, 1e-9)
            self.started = time.perf_counter()
            if is_primary(args) and update and update != count - 1:
                tqdm.write(f"epoch {self.epoch}, update {update} of {count}: loss {float(step.first_loss):.4f}, lr "
                           f"{self.optimizer.param_groups[0]['lr']:.3g}, {rate:.0f} images/s")
            if args.save_images and self.folder is not None and isinstance(step.images, torch.Tensor):
                save_images(step.images, self.folder, update)
        if self.recover is not None and args.recovery_interval and (update + 1) % args.recovery_interval == 0:
            self.recover(self.epoch, update)

    def train(
            self,
            validation: Optional[DataLoader],
            checkpoints: Checkpoints,
            start_epoch: int = 0,
            random_states: Optional[Mapping[str, Any]] = None,
            wandb: bool = False,
    ) -> tuple[list[dict[str, Any]], Optional[float], Optional[int]]:
        """Trains from an epoch to the end, or to --stop-epoch.

        Args:
            validation: Batches to validate on, if there are any.
            checkpoints: Writes them.
            start_epoch: First epoch.
            random_states: Of the checkpoint that this goes on from.
            wandb: Whether to log there.

        Returns:
            What each epoch gave, the best metric and its epoch.
        """
        args, stop = self.args, self.args.stop_epoch or self.epochs
        metric_name = args.eval_metric if validation is not None else 'loss'
        results: list[dict[str, Any]] = []
        best, best_epoch = checkpoints.best
        if start_epoch < stop and random_states is not None:
            self._go_on(validation, start_epoch, random_states)
        with tqdm(total=max(stop - start_epoch, 0) * len(self.batches), desc=self.title, unit='step', leave=False,
                  disable=None if is_primary(args) else True) as bar:
            for self.epoch in range(start_epoch, stop):
                self.updates = self.epoch * self.updates_per_epoch
                self._mix(not args.mixup_off_epoch or self.epoch < args.mixup_off_epoch)
                loss, _ = self.run_epoch(bar)
                loss = self._mean(loss)
                if not math.isfinite(loss):
                    _logger.warning(f'the loss is {loss} in epoch {self.epoch}: a lower --lr may help')
                self._distribute_bn()
                metrics = self._validate(validation) if self._validates(self.epoch) and validation is not None else None
                row = metrics if metrics is not None or validation is None else dict.fromkeys(
                    self.task.create_evaluator().metric_names, '')  # an epoch without validation keeps the columns
                lr = sum(g['lr'] for g in self.optimizer.param_groups) / len(self.optimizer.param_groups)
                if self.folder is not None:
                    update_summary(self.epoch, OrderedDict(loss=loss), row, self.folder / 'summary.csv', lr=lr, log_wandb=wandb)
                metric = loss if validation is None else metrics and metrics[metric_name]
                found = checkpoints.save(self.epoch, metric)
                best, best_epoch = found if found[0] is not None else (best, best_epoch)
                if self.scheduler is not None and (metric is not None or args.sched != 'plateau'):
                    self.scheduler.step(self.epoch + 1, metric)
                results.append({'epoch': self.epoch, 'train': {'loss': loss}, **({'validation': dict(metrics)} if metrics else {})})
                if is_primary(args):
                    told = ''.join(f', {k} {v:.4f}' if k == 'loss' else f', {k} {v:.2f} %' for k, v in (metrics or {}).items())
                    tqdm.write(f'epoch {self.epoch}: loss {loss:.4f}{told and f"; validation{told[1:]}"}; lr {lr:.3g}')
        return results, best, best_epoch

    def _go_on(self, validation: Optional[DataLoader], start_epoch: int, random_states: Mapping[str, Any]) -> None:
        """Sets the random states of the epoch before; workers that were running then are started first, as they draw a seed."""
        if self.args.workers and not self.args.use_multi_epochs_loader:
            for batches, ran in (self.batches, start_epoch > 0), (validation, any(map(self._validates, range(start_epoch)))):
                inner = getattr(batches, 'loader', batches)
                if ran and isinstance(inner, DataLoader) and inner.num_workers:
                    iter(inner)
        set_random_states(random_states)

    def _mix(self, enabled: bool) -> None:
        if self.mixup is not None:
            self.mixup.mixup_enabled = enabled
        elif hasattr(self.batches, 'mixup_enabled'):
            self.batches.mixup_enabled = enabled

    def _mean(self, loss: float) -> float:
        """The mean loss over all processes."""
        if not self.args.distributed:
            return loss
        return reduce_tensor(torch.tensor([loss], dtype=torch.float32, device=self.args.device), self.args.world_size).item()

    def _validates(self, epoch: int) -> bool:
        done, stop = epoch + 1, self.args.stop_epoch or self.epochs
        return done % self.args.val_interval == 0 or done == stop or done in self.args.save_epochs

    def _validate(self, validation: DataLoader) -> Mapping[str, float]:
        """The metrics of the weights, or of their averages where these are on the same device."""
        metrics = evaluate(self.task, validation, self.args)
        if self.task.has_ema() and not self.args.model_ema_force_cpu:
            metrics = evaluate(self.task, validation, self.args, ema=True)
        return metrics

    def _distribute_bn(self) -> None:
        """Gives all processes the same statistics of batch norms, as --dist-bn says."""
        args = self.args
        if args.distributed and args.dist_bn in ('broadcast', 'reduce'):
            for ema in (False, True):
                if not ema or self.task.has_ema() and not args.model_ema_force_cpu:
                    distribute_bn(self.task.get_trainable_module(ema=ema), args.world_size, args.dist_bn == 'reduce')


def evaluate(task: TrainingTask, batches: DataLoader, args: Namespace, ema: bool = False) -> Mapping[str, float]:
    """The metrics of a task's model, over the images of all processes.

    Args:
        task: The task.
        batches: Validation batches.
        args: The flags.
        ema: Whether of the averaged weights.
    """
    model = task.get_eval_model(ema=ema).eval()
    scores = task.create_evaluator(max_samples=evaluation_sample_limit(batches))
    dtype = getattr(torch, args.model_dtype or 'float32')
    with torch.inference_mode():
        for images, targets in batches:
            if args.no_prefetcher:
                images, targets = _moved(images, args.device, dtype), targets.to(args.device)
            if args.channels_last and isinstance(images, torch.Tensor):
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast(args):
                output = model(images)
            if isinstance(output, (tuple, list)):
                output = output[0]
            if args.tta > 1:
                output = output.unfold(0, args.tta, args.tta).mean(dim=2)
                targets = targets[0:targets.size(0):args.tta]
            scores.update(output, targets)
    return scores.compute(distributed=args.distributed)


def _moved(images: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(images, dict):  # NaFlex
        return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in images.items()}
    return images.to(device, dtype)
