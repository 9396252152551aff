"""Trains a timm model, plain or searched; takes every command line of timm's own train.py, and writes the same files.

    python train.py --data-dir flowers --model resnet18 --num-classes 5 --epochs 100 --output runs
    python train.py --data-dir flowers --model local-dir:runs/x --kd-model-name resnet50 --save-pretrained runs/y

A run's folder is OUTPUT/EXPERIMENT, or one named by time, model and image size, with args.yaml (for -c), summary.csv and
checkpoints: last.pth.tar, checkpoint-N, model_best, and where asked for milestone-N and recovery-E-B. With `--resume auto
--experiment NAME` the same command starts a run, and goes on with it after a kill. Runs under torchrun, too.
"""
import json
import logging
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, Optional

import torch
from timm.data import resolve_input_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.task import TrainingTask
from timm.utils import random_seed, set_jit_fuser, unwrap_model
from torch import nn

from . import commandline
from .checkpoints import Checkpoints, checkpoint_path, make_folder, resume, resume_average
from .data import UsageError, default_classes
from .engine import is_primary, learning_rate, make_optimizer, say, start_processes
from .output import publish
from .start import build_model, load_start
from .task_training import TaskTraining
from .tasks import make_task
from .training_data import make_loaders, open_datasets

__all__ = ['main', 'parse', 'train']

_logger = logging.getLogger(__name__)


def parse(argv: Optional[Sequence[str]] = None) -> tuple[Namespace, str]:
    """Reads a command line.

    Returns:
        The flags, and the text of args.yaml.
    """
    return commandline.parse(argv, __doc__)


def train(args: Namespace, text: str = '') -> list[dict[str, Any]]:
    """Runs a training.

    Random numbers are drawn in the order of timm's script: model, loaders, task, then epoch by epoch.

    Args:
        args: The flags.
        text: Of args.yaml.

    Returns:
        What each epoch gave: its number and its metrics.
    """
    _prepare(args)
    random_seed(args.seed, args.rank)
    model = build_model(args, args.num_classes or default_classes(args))
    args.num_classes = args.num_classes or model.num_classes
    load_start(model, args)
    try:
        config = resolve_input_data_config(model, vars(args))
    except (ValueError, AssertionError) as e:
        raise UsageError(str(e)) from e
    model = _convert(model, args)
    datasets = open_datasets(args, config['input_size'][0])
    batches, validation, mixup = make_loaders(args, config, *datasets, model)
    task = make_task(model, args)
    if validation is not None and args.eval_metric not in task.create_evaluator().metric_names:
        raise UsageError(f'--eval-metric must be one of {", ".join(task.create_evaluator().metric_names)}, not {args.eval_metric}')

    args.lr = learning_rate(args)
    updates = -(-len(batches) // args.grad_accum_steps)
    optimizer = make_optimizer(task.get_trainable_module(), args, args.epochs, updates, plateau=True)
    if args.stop_epoch is not None and not 1 <= args.stop_epoch <= optimizer[2]:
        raise UsageError(f'--stop-epoch must be from 1 to the {optimizer[2]} epochs of the schedule, not {args.stop_epoch}')
    training = TaskTraining(task, batches, args, optimizer, mixup)
    path, epoch, random_states = checkpoint_path(args), None, None
    if path:
        epoch, random_states = resume(path, task, args, training.optimizer, training.scaler)
    if args.model_ema:
        task.setup_ema(args.model_ema_decay, args.model_ema_warmup, torch.device('cpu') if args.model_ema_force_cpu else None)
        if path:
            resume_average(path, task)
    _compile(task, args)
    if args.distributed:
        ids = [torch.device(args.device)] if 'cuda' in args.device else None
        task.prepare_distributed(ids, broadcast_buffers=not args.no_ddp_bb)

    start = args.start_epoch if args.start_epoch is not None else epoch or 0
    if is_primary(args):
        training.folder = make_folder(args, text, config['input_size'][-1], start)
        say(args, f'{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, '
                   f'{len(batches)} batches of {args.batch_size} an epoch; {training.folder}')
    checkpoints = Checkpoints(task, training.optimizer, training.scaler, args, training.folder,
                              decreasing=validation is None or args.eval_metric == 'loss')
    checkpoints.restore(path)
    training.recover = checkpoints.save_recovery
    if training.scheduler is not None and start > 0:
        if args.sched_on_updates:
            training.scheduler.step_update(start * training.updates_per_epoch)
        else:
            training.scheduler.step(start)
    wandb = _start_wandb(args)
    results, best, best_epoch = training.train(validation, checkpoints, start, random_states, wandb)
    if best is not None:
        say(args, f'best {args.eval_metric if validation is not None else "loss"}: {best:.4f} (epoch {best_epoch})')
    if is_primary(args):
        publish(unwrap_model(task.get_eval_model(ema=task.has_ema())), args, config, results)
    return results


def _prepare(args: Namespace) -> None:
    """Devices and processes, before anything is built."""
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    start_processes(args)
    args.prefetcher = not args.no_prefetcher
    if args.sync_bn and args.distributed and 'cuda' not in args.device:
        raise UsageError('--sync-bn needs GPUs: torch has no such batch norm for the CPU')
    if args.torchscript and (args.torchcompile or args.sync_bn):
        raise UsageError('--torchscript goes with neither --torchcompile nor --sync-bn')
    if args.fuser:
        set_jit_fuser(args.fuser)


def _convert(model: nn.Module, args: Namespace) -> nn.Module:
    """Batch norms, device, type and layout."""
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=args.device, dtype=getattr(torch, args.model_dtype) if args.model_dtype else None)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.distributed and args.sync_bn:
        args.dist_bn = ''  # they agree already
        model = convert_sync_batchnorm(model)
    if args.torchscript:
        try:
            model = torch.jit.script(model)
        except Exception as e:  # of many kinds
            raise UsageError(f'--torchscript: {args.model} cannot be scripted: {str(e).strip().splitlines()[0]}') from e
    return model


def _compile(task: TrainingTask, args: Namespace) -> None:
    if args.torchcompile:
        try:
            task.compile(args.torchcompile, args.torchcompile_mode)
            if task.has_ema() and not args.model_ema_force_cpu:
                task.compile_ema(args.torchcompile, args.torchcompile_mode)
        except (RuntimeError, ValueError, ImportError) as e:
            raise UsageError(f'--torchcompile {args.torchcompile}: {str(e).strip().splitlines()[0]}') from e


def _start_wandb(args: Namespace) -> bool:
    """Starts a run of wandb, if that is asked for and installed."""
    if not args.log_wandb or not is_primary(args):
        return False
    try:
        import wandb
    except ImportError:
        _logger.warning('--log-wandb: wandb is not installed, so nothing is logged there (pip install wandb)')
        return False
    wandb.init(project=args.wandb_project, name=args.experiment or None, config=vars(commandline.said(args)), tags=args.wandb_tags,
               resume='must' if args.wandb_resume_id else None, id=args.wandb_resume_id or None)
    return True


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Parses, trains, and prints the best epochs as JSON, the best one last."""
    args, text = parse(argv)
    results = train(args, text)
    if is_primary(args):
        validated = [r for r in results if 'validation' in r]
        part, name = ('validation', args.eval_metric) if validated else ('train', 'loss')
        found = sorted(validated or results, key=lambda r: r[part][name], reverse=name == 'loss')
        print(f'--result\n{json.dumps(found[-10:], indent=4)}')
