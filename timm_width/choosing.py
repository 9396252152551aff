"""A policy learns and chooses: its shared network is trained, its scores are kept, its answers are checked."""
import dataclasses
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import policies
from .config import digest
from .data import TwoParts
from .engine import Training, is_primary, say, sum_of_all, wait_for_all
from .holdout import Holdout, Journal
from .meter import Meter
from .policies.base import Choice, Grid
from .problem import Problem

__all__ = ['Answer', 'after_epoch', 'check_begun', 'choose', 'choose_sweep', 'folder_name', 'point_text', 'sweep_points']


PROGRESS = '{desc}: {n_fmt} of up to {total_fmt} scores, {elapsed} so far, up to {remaining} left{postfix}\n'


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was chosen for a budget.

    Attributes:
        choice: The network.
        grid: What it was chosen from: of several stages, that of the last.
        source: The shared network whose channels it is made of, if there is one: its digest, `of`, and its `file` in the folder of
            the search.
        macs: What it took to find it: the MACs of all passes (see meter.py), of what several budgets share all.
        transfer: If it was carried over from a smaller network: how.
    """
    choice: Choice
    grid: Grid
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)
    macs: int = 0
    transfer: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check_begun(problem: Problem, name: str, policy: policies.Policy) -> None:
    """Refuses to go on with what another policy has begun, or this one with other options: before anything is written.

    Args:
        problem: What it learns on.
        name: What it is called.
        policy: It.

    Raises:
        PolicyError: It cannot go on.
    """
    path = Path(problem.args.output) / 'search' / f'{name}.pth.tar'
    if not problem.args.resume or not path.is_file():
        return
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)['extra']
    except Exception:  # a damaged file: the training that goes on from it says so
        return
    if isinstance(state, dict):
        policy.check_state(state)


def choose(problem: Problem, name: str, policy: policies.Policy) -> list[Answer]:
    """Lets a policy learn and choose, on a problem without validation images; and those that follow it.

    Args:
        problem: What it learns on.
        name: What it is called.
        policy: It.

    Returns:
        One network for each budget of the problem.
    """
    found = _choose_once(problem, name, policy)
    for i, after in enumerate(policy.following([answer.choice for answer in found])):
        label, stage = f'{name}.{folder_name(after.budgets[0].text)}', 2
        while after is not None:
            part = dataclasses.replace(problem, grid=after.grid, budgets=tuple(after.budgets))
            before = found[i].macs
            [found[i]] = _choose_once(part, f'{label}.{stage}', after)
            found[i] = dataclasses.replace(found[i], macs=before + found[i].macs)
            after, stage = next(iter(after.following([found[i].choice])), None), stage + 1
    return found


def choose_sweep(
        problem: Problem,
        name: str,
        make: Callable[[Mapping[str, float]], policies.Policy],
        sweep: Mapping[str, Sequence[float]],
) -> list[tuple[Mapping[str, float], Answer, float]]:
    """Lets a policy learn and choose with several values of its options, all from one shared beginning.

    Args:
        problem: What it learns on, with one budget.
        name: What it is called.
        make: Gives the policy with some of its options set.
        sweep: Option -> values. Each value of the first gives an answer; of the combinations of the others, the one with the
            best search loss.

    Returns:
        Of each value of the first option: the values of all options that were the best, the network, and its search loss.
    """
    args, state = problem.args, Path(problem.args.output) / 'search'
    points = sweep_points(sweep)
    beginning = state / f'{name}.shared.pth.tar'
    first = make(points[0])
    stop, shared = first.shared_epochs(args.search_epochs), 0
    if stop:
        _, shared = _train(problem, name, first, problem.training_batches(first.architecture_share), beginning, stop)
    found: dict[float, tuple[Mapping[str, float], Answer, float]] = {}
    macs: dict[float, int] = {}  # of all that was tried for a value, behind the beginning
    for point in points:
        label, policy = f'{name}.{folder_name(point_text(point))}', make(point)
        checkpoint = state / f'{label}.pth.tar'
        if stop and is_primary(args) and not checkpoint.is_file():
            shutil.copyfile(beginning, beside := checkpoint.with_name(f'.{checkpoint.name}.saving'))
            beside.replace(checkpoint)
        wait_for_all(args)
        [answer] = _choose_once(problem, label, policy)
        value = next(iter(point.values()))
        macs[value] = macs.get(value, 0) + answer.macs - shared
        if value not in found or policy.search_loss < found[value][2]:
            found[value] = point, answer, policy.search_loss
    return [(point, dataclasses.replace(answer, macs=shared + macs[value]), loss) for value, (point, answer, loss) in found.items()]


def sweep_points(sweep: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """All combinations of the values of options."""
    return [dict(zip(sweep, values)) for values in product(*sweep.values())]


def point_text(point: Mapping[str, float]) -> str:
    """What a combination of values is called: 'alpha=0.2 lam=0.4'."""
    return ' '.join(f'{option}={value:g}' for option, value in point.items())


def _train(
        problem: Problem,
        name: str,
        policy: policies.Policy,
        batches: Union[DataLoader, TwoParts],
        checkpoint: Path,
        stop: Optional[int] = None,
) -> tuple[nn.Module, int]:
    """Trains a policy's shared network, or only its first epochs; gives it, and the MACs that this took."""
    args, meter = problem.args, Meter()
    model, space = problem.traced(policy.start, args.seed)
    network = policy.prepare(model, space)
    _say_notes(args, name, policy)
    trained = Training(network, batches, args, args.search_epochs, f'search ({name})', _warmup(args), policy.train_step,
                       list(policy.parameters()), meter=meter)
    network = trained.run(checkpoint, after_epoch(args, name, policy), policy, stop)
    return network, sum_of_all(args, meter.macs)


def _warmup(args: Namespace) -> float:
    return min(args.warmup_epochs, args.search_epochs / 5)


def _choose_once(problem: Problem, name: str, policy: policies.Policy) -> list[Answer]:
    args, state = problem.args, Path(problem.args.output) / 'search'
    training, held = problem.training_batches(policy.architecture_share), problem.held_batches()
    network, source, macs = None, {}, 0
    if policy.trains():
        network, macs = _train(problem, name, policy, training, state / f'{name}.pth.tar')
        weights = {n.removeprefix('model.'): t for n, t in network.state_dict().items()}
        source = {'of': digest(weights), 'file': f'{state.name}/{name}.pth.tar'}

    def train(choice: Choice) -> tuple[nn.Module, int]:
        meter = Meter()
        trained = Training(problem.model(choice, args.seed), training, args, args.search_epochs, 'candidate', _warmup(args),
                           meter=meter).run()
        return trained, sum_of_all(args, meter.macs)

    most = policy.evaluations
    # where there is no terminal, a line a minute instead of a bar
    slow = {} if sys.stderr.isatty() else {'mininterval': 60, 'ascii': True, 'bar_format': PROGRESS}
    with tqdm(total=most, desc=f'choose ({name})', unit='score', disable=not is_primary(args) or not most, **slow) as bar:
        holdout = Holdout(args, network, training, held, train, Journal(state / f'{name}.scores.jsonl', args), bar)
        found = policy.choose(holdout)
    _say_notes(args, name, policy)
    choices = [_checked(problem, name, c) for c in found]
    for choice, budget in zip(choices, policy.goals, strict=True):
        if not budget.met(*choice):
            raise policies.PolicyError(f'policy {name} answered with a network over the budget {budget}')
    return [Answer(choice, problem.grid, source, macs + holdout.macs) for choice in choices]


def _checked(problem: Problem, name: str, found: Choice) -> Choice:
    """An answer in Python's own numbers, which JSON holds; with as many channels as its widths say."""
    widths, skips = found
    channels = {n: tuple(int(i) for i in kept) for n, kept in getattr(found, 'channels', {}).items()}
    choice = Choice({n: int(w) for n, w in widths.items()}, tuple(skips), channels)
    for n, kept in choice.channels.items():
        if len(kept) * problem.space[n].unit != choice.widths.get(n, problem.space[n].size):
            raise policies.PolicyError(f"policy {name} answered with {len(kept)} steps of '{n}' (of {problem.space[n].unit} "
                                       f'channels each), whose width is {choice.widths.get(n, problem.space[n].size)}')
    return choice


def _say_notes(args: Namespace, name: str, policy: policies.Policy) -> None:
    while policy.notes:
        say(args, f'{name}: {policy.notes.pop(0)}')


def after_epoch(args: Namespace, name: str, policy: Optional[policies.Policy] = None) -> Callable[[Training, float, float], None]:
    def told(training: Training, loss: float, lr: float) -> None:
        if policy is not None:
            policy.epoch_end(training.epoch - 1)
            _say_notes(args, name, policy)
        if is_primary(args) and not sys.stdout.isatty():
            print(f'{name}: epoch {training.epoch} of {training.epochs}, loss {loss:.3f}', flush=True)
    return told


def folder_name(budget: str) -> str:
    """What a budget's folder is called."""
    return re.sub(r'[^\w.]+', '-', budget)
