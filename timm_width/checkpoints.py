"""Folders and checkpoints of a training: timm's, with the random states of all processes besides."""
import os
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

import torch
from timm.models import safe_model_name
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, get_outdir, load_checkpoint_metadata, trim_summary

from .commandline import said
from .data import UsageError, first_line
from .engine import random_states_of_all

__all__ = ['RANDOM', 'Checkpoints', 'checkpoint_path', 'make_folder', 'resume']

RANDOM = 'random_states'  # our one key in timm's checkpoints
FOLDER = './output/train'
FAILURES = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError, EOFError)


class _State:
    """A task as timm's saver asks for it, with an entry of ours."""

    def __init__(self, task: TrainingTask):
        self.task, self.random_states = task, None

    def get_checkpoint_state(self, ema: bool = False, **kwargs: Any) -> dict[str, Any]:
        state = self.task.get_checkpoint_state(ema=ema, **kwargs)
        return state if ema or self.random_states is None else {**state, RANDOM: self.random_states}


class _Saver(CheckpointSaver):
    """timm's, whose files are replaced at once: a kill leaves the old one or the new one."""

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        beside = f'{dst}.saving'
        super()._duplicate(src, beside)
        os.replace(beside, dst)
        Path(beside).unlink(missing_ok=True)  # where both were the same file already


class Checkpoints:
    """Writes the checkpoints of a training; every process calls it, the first one writes.

    Args:
        task: What is trained.
        optimizer: Its optimiser.
        scaler: Its loss scaler; kept only where it scales.
        args: The flags.
        folder: Where to write, in the first process.
        decreasing: Whether less is better.
    """

    def __init__(self, task: TrainingTask, optimizer: Any, scaler: Any, args: Namespace, folder: Optional[Path], decreasing: bool):
        self.args, self.state = args, _State(task)
        self.saver = folder and _Saver(
            task.get_trainable_module(), optimizer, args=said(args), amp_scaler=scaler if scaler.is_enabled() else None,
            checkpoint_dir=str(folder), recovery_dir=str(folder), decreasing=decreasing, max_history=args.checkpoint_hist,
            task=self.state)

    def restore(self, path: Optional[str]) -> None:
        """Goes on with the history of the folder, if the checkpoint lies in it."""
        if self.saver and path and Path(path).resolve().parent == Path(self.saver.checkpoint_dir).resolve():
            self.saver.load_state_dict_from_checkpoint(path)

    @property
    def best(self) -> tuple[Optional[float], Optional[int]]:
        """The best metric so far, and its epoch; in the first process."""
        return (self.saver.best_metric, self.saver.best_epoch) if self.saver else (None, None)

    def save(self, epoch: int, metric: Optional[float]) -> tuple[Optional[float], Optional[int]]:
        """Saves the state after an epoch.

        Returns:
            The best metric, and its epoch.
        """
        self.state.random_states = random_states_of_all(self.args)
        if not self.saver:
            return None, None
        best = self.saver.save_checkpoint(epoch, metric=metric)
        if epoch + 1 in self.args.save_epochs:
            self.saver.save_milestone(epoch + 1)
        return best

    def save_recovery(self, epoch: int, batch: int) -> None:
        """Saves the state in the middle of an epoch: weights and optimiser; the order of its images cannot be gone on with."""
        if self.saver:
            self.state.random_states = None
            self.saver.save_recovery(epoch, batch_idx=batch)


def checkpoint_path(args: Namespace) -> Optional[str]:
    """The file that --resume names, if there is one.

    Raises:
        UsageError: It is not there.
    """
    if args.resume == 'auto':
        path = Path(args.output or FOLDER) / args.experiment / 'last.pth.tar'
        return str(path) if path.is_file() else None
    if args.resume and not os.path.isfile(args.resume):
        raise UsageError(f"--resume '{args.resume}': there is no such file")
    return args.resume or None


def resume(path: str, task: TrainingTask, args: Namespace, optimizer: Any, scaler: Any) -> tuple[Optional[int], Optional[dict]]:
    """Loads a checkpoint of timm or of ours into a task and its optimiser.

    Args:
        path: The file.
        task: What it is loaded into; its averaged weights come later, by `resume_average`.
        args: The flags.
        optimizer: The optimiser.
        scaler: The loss scaler.

    Returns:
        The epoch to go on with, and this process' random states where the file has them.

    Raises:
        UsageError: It is not a checkpoint of such a training.
    """
    try:
        epoch = resume_task_checkpoint(
            task, path, None if args.no_resume_opt else optimizer,
            scaler if scaler.is_enabled() and not args.no_resume_opt else None, log_info=False)
        found = load_checkpoint_metadata(path).get(RANDOM)
    except Exception as e:  # unpickling fails in many ways
        raise _refused(path, e) from e
    return epoch, found[args.rank] if found is not None and len(found) == args.world_size else None


def resume_average(path: str, task: TrainingTask) -> None:
    """Loads averaged weights into a task that keeps them; those of a checkpoint without become its weights."""
    try:
        load_task_ema_checkpoint(task, path)
    except FAILURES as e:
        raise _refused(path, e) from e


def _refused(path: str, e: Exception) -> UsageError:
    reason = first_line(e)
    return UsageError(f"--resume '{path}' is not a checkpoint of this model: {reason}")


def make_folder(args: Namespace, text: str, image_size: int, start_epoch: int) -> Path:
    """Makes the folder of a run, with its args.yaml; a summary.csv there loses the epochs that come again.

    Args:
        args: The flags.
        text: Of args.yaml.
        image_size: For its name.
        start_epoch: First epoch to come.
    """
    name = args.experiment or '-'.join([datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(image_size)])
    try:
        folder = Path(get_outdir(args.output or FOLDER, name))
        if start_epoch == 0 and (folder / 'summary.csv').is_file():
            print(f"'{folder}' holds an earlier run: its summary.csv starts anew (--resume auto would go on with it)", flush=True)
        (folder / 'args.yaml').write_text(text)
        trim_summary(str(folder / 'summary.csv'), start_epoch)
    except OSError as e:
        raise UsageError(f"--output '{args.output or FOLDER}' cannot be written: {e}") from None
    return folder


def save_images(images: torch.Tensor, folder: Path, batch: int) -> None:
    """Writes a batch as one picture."""
    from torchvision.utils import save_image
    save_image(images, folder / f'train-batch-{batch}.jpg', padding=0, normalize=True)
