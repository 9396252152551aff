"""A policy learns and chooses: its shared network is trained, its scores are kept, its answers are checked."""
import dataclasses
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Optional

from torch import nn
from tqdm import tqdm

from . import policies
from .config import digest
from .engine import Training, is_primary, say
from .holdout import Holdout, Journal
from .policies.base import Choice, Grid
from .problem import Problem

__all__ = ['Answer', 'after_epoch', 'choose', 'folder_name']


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


def _choose_once(problem: Problem, name: str, policy: policies.Policy) -> list[Answer]:
    args, state = problem.args, Path(problem.args.output) / 'search'
    warmup = min(args.warmup_epochs, args.search_epochs / 5)
    training, held = problem.training_batches(), problem.held_batches()
    network, source = None, {}
    if policy.trains():
        model, space = problem.traced(policy.start, args.seed)
        shared = policy.prepare(model, space)
        _say_notes(args, name, policy)
        trained = Training(shared, training, args, args.search_epochs, f'search ({name})', warmup, policy.train_step,
                           list(policy.parameters()))
        network = trained.run(state / f'{name}.pth.tar', after_epoch(args, name, policy), policy)
        weights = {n.removeprefix('model.'): t for n, t in network.state_dict().items()}
        source = {'of': digest(weights), 'file': f'{state.name}/{name}.pth.tar'}

    def train(choice: Choice) -> nn.Module:
        return Training(problem.model(choice, args.seed), training, args, args.search_epochs, 'candidate', warmup).run()

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
