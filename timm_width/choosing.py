"""A policy learns and chooses: its shared network is trained, its scores are kept, its answers are checked."""
import dataclasses
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Optional, Union

from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import policies
from .config import digest
from .data import TwoParts
from .engine import Training, is_primary, say, wait_for_all
from .holdout import Holdout, Journal
from .policies.base import Choice, Grid
from .problem import Problem

__all__ = ['Answer', 'after_epoch', 'choose', 'choose_sweep', 'folder_name', 'point_text', 'sweep_points']


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was chosen for a budget.

    Attributes:
        choice: The network.
        grid: What it was chosen from: of several stages, that of the last.
        source: The shared network whose channels it is made of, if these are not the first ones: its digest, `of`, and its
            `file` in the folder of the search.
    """
    choice: Choice
    grid: Grid
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)


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
            [found[i]] = _choose_once(part, f'{label}.{stage}', after)
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
    if (stop := first.shared_epochs(args.search_epochs)):
        _train(problem, name, first, problem.training_batches(first.architecture_share), beginning, stop)
    found: dict[float, tuple[Mapping[str, float], Answer, float]] = {}
    for point in points:
        label, policy = f'{name}.{folder_name(point_text(point))}', make(point)
        checkpoint = state / f'{label}.pth.tar'
        if stop and is_primary(args) and not checkpoint.is_file():
            shutil.copyfile(beginning, beside := checkpoint.with_name(f'.{checkpoint.name}.saving'))
            beside.replace(checkpoint)
        wait_for_all(args)
        [answer] = _choose_once(problem, label, policy)
        value = next(iter(point.values()))
        if value not in found or policy.search_loss < found[value][2]:
            found[value] = point, answer, policy.search_loss
    return list(found.values())


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
) -> nn.Module:
    """Trains a policy's shared network, or only its first epochs."""
    args = problem.args
    model, space = problem.traced(policy.start, args.seed)
    network = policy.prepare(model, space)
    _say_notes(args, name, policy)
    trained = Training(network, batches, args, args.search_epochs, f'search ({name})', _warmup(args), policy.train_step,
                       list(policy.parameters()))
    return trained.run(checkpoint, after_epoch(args, name, policy), policy, stop)


def _warmup(args: Namespace) -> float:
    return min(args.warmup_epochs, args.search_epochs / 5)


def _choose_once(problem: Problem, name: str, policy: policies.Policy) -> list[Answer]:
    args, state = problem.args, Path(problem.args.output) / 'search'
    training, held = problem.training_batches(policy.architecture_share), problem.held_batches()
    network, source = None, {}
    if policy.trains():
        network = _train(problem, name, policy, training, state / f'{name}.pth.tar')
        weights = {n.removeprefix('model.'): t for n, t in network.state_dict().items()}
        source = {'of': digest(weights), 'file': f'{state.name}/{name}.pth.tar'}

    def train(choice: Choice) -> nn.Module:
        return Training(problem.model(choice, args.seed), training, args, args.search_epochs, 'candidate', _warmup(args)).run()

    about = policy.evaluations
    if about and not sys.stderr.isatty():
        say(args, f'{name}: choosing by about {about} scores')
    # where there is no terminal, a line a minute instead of a bar
    slow = {} if sys.stderr.isatty() else {'mininterval': 60, 'ascii': True, 'bar_format': '{desc}: {n_fmt} scores, {elapsed}\n'}
    with tqdm(total=about, desc=f'choose ({name})', unit='net', disable=not is_primary(args) or not about, **slow) as bar:
        found = policy.choose(Holdout(args, network, training, held, train, Journal(state / f'{name}.scores.jsonl', args), bar))
    _say_notes(args, name, policy)
    choices = [_checked(problem, name, c) for c in found]
    for choice, budget in zip(choices, policy.goals, strict=True):
        if not budget.met(*choice):
            raise policies.PolicyError(f'policy {name} answered with a network over the budget {budget}')
    return [Answer(choice, problem.grid, source if choice.channels else {}) for choice in choices]


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
