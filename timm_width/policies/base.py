"""What every policy is: an object that learns, on one model, which widths to choose within budgets.

A policy knows a width space, costs, a grid of widths and, one batch at a time, a `Step`. It knows neither data nor engine, and
builds nothing from timm: that is what makes a paper readable in one file.
"""
import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Optional, Protocol, Union

import numpy as np
import torch
from torch import nn

from ..budget import Budget
from ..factors import Grid, random_widths
from ..space import WidthSpace
from ..supernet import Supernet

__all__ = ['Choice', 'Evaluate', 'Grid', 'Policy', 'PolicyError', 'Score', 'Step', 'fill_budget', 'first_within',
           'greedy_path', 'greedy_scores', 'option', 'random_widths', 'uniform_widths']

BISECTIONS = 40  # halvings of the factor: far below the distance of any two grid points


class PolicyError(ValueError):
    """An unknown policy, or options that it cannot work with."""


class _Network(NamedTuple):
    widths: Mapping[str, int]
    skips: tuple[str, ...] = ()


class Choice(_Network):
    """A network: what a policy answers with. It is equal to another of the same widths and skips, and unpacks as these two.

    Attributes:
        widths: Group -> channels.
        skips: Residual blocks left out.
        channels: Group -> ascending indices of the steps (ids) of the shared network that it is made of, as `Supernet` takes
            them; of groups left out, the first ones.
    """
    channels: Mapping[str, Sequence[int]] = MappingProxyType({})  # of one that `_make` or `_replace` gives

    def __new__(
            cls,
            widths: Mapping[str, int],
            skips: tuple[str, ...] = (),
            channels: Optional[Mapping[str, Sequence[int]]] = None,
    ) -> 'Choice':
        self = super().__new__(cls, widths, skips)
        if channels is not None:
            self.channels = channels
        return self

    def _replace(self, **kwargs: Any) -> 'Choice':
        """Another network of the same channels, unless its widths are others."""
        found = super()._replace(**kwargs)
        if 'widths' not in kwargs:
            found.channels = self.channels
        return found


class Score(NamedTuple):
    """How well a network does on the holdout: top-1 accuracy (of labels: mAP) in percent, and mean cross-entropy."""
    top1: float
    loss: float

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better: by accuracy, and where that is the same, by the loss."""
        return self.top1, -self.loss


class Evaluate(Protocol):
    """Scores networks on the holdout, which no training step has seen."""

    def __call__(
            self,
            widths: Mapping[str, Union[int, Sequence[int]]],
            skips: Sequence[str] = (),
            batches: Optional[int] = None,
            statistics: str = 'batch',
    ) -> Score:
        """The trained shared network at widths.

        Args:
            widths: Group -> channels, the first ones; or the ascending indices of the steps (ids) to keep, as `Supernet` takes
                them.
            skips: Residual blocks to leave out.
            batches: Number of batches of the holdout, always the same ones; by default all.
            statistics: Of batch norms: 'batch' (of the images being scored), 'recalibrated' (estimated for these widths on
                training images) or 'running' (whatever training left).
        """

    def alone(self, widths: Mapping[str, int], skips: Sequence[str] = ()) -> Score:
        """A network of its own: built at these widths and trained briefly, from scratch, always under the same seed."""


class Step(Protocol):
    """One batch of the shared network's training. The engine steps the optimiser after `train_step` returns.

    Attributes:
        images: (N, C, H, W).
        targets: Class of each image, or (N, classes) under mixup.
        epoch: From 0.
        epochs: How many there will be.
        update: Number of optimiser steps so far.
        progress: Share of all updates that is done, from 0 to below 1.
        rng: For all that the policy draws. Seeded by the run's seed and the update: the same on every process, for every
            batch that one update accumulates, and after a resume.
        image_rng: For what it draws for each image: the same after a resume, but another for every process and batch.
        last: Whether the update ends with this batch; of those that one update accumulates, the others are not.
        for_architecture: Whether the batch is of the images that `Policy.architecture_share` sets aside.
    """
    images: torch.Tensor
    targets: torch.Tensor
    epoch: int
    epochs: int
    update: int
    progress: float
    rng: np.random.Generator
    image_rng: np.random.Generator
    last: bool
    for_architecture: bool

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs the network on the images; for a Supernet, `forward(widths, gates=..., skips=...)`."""

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """The training loss against the targets (label smoothing, mixup and so on as the flags say)."""

    def distill(self, logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Cross-entropy against the softmax of a teacher's logits, through which no gradient flows."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds a loss's gradients to those of this update; may be called several times."""

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors (n, ...) that all processes give, one after another: (n * processes, ...), the same in each of them."""


def option(default: Any, help: str) -> Any:
    """A field of `Options`: its default and what `--help` says."""
    return field(default=default, metadata={'help': help})


class Policy(ABC):
    """One way to choose widths, one paper: the docstring of a subclass cites it and says what differs.

    The engine calls `prepare` once, `train_step` for every batch and `epoch_end` after every epoch, if the class has a
    `train_step` of its own; then `choose`. A search that is killed goes on from the last epoch, with `load_state_dict`;
    within `choose`, scores known already are not computed again, so `choose` must ask for them in an order that only the
    seed and earlier scores decide.

    Args:
        space: The width space of the model, at its base widths.
        budgets: What the answers must meet, one answer each.
        grid: Group -> widths to choose from, ascending; the smallest of all meet every budget. Groups left out keep their base.
        options: An instance of the class's `Options`.
        seed: Seed of what is drawn outside `train_step`.

    Attributes:
        default_grid: What `--grid` is where it is not given.
        search_epochs: What `--search-epochs` is where it is not given.
        mixup: Whether images and targets may be mixed.
        learns_budget: Whether training depends on the budgets, so that a search that goes on cannot be given others.
        architecture_share: Share of the training images that come last in every epoch, apart from the others: for a policy that
            trains an architecture on other images than the weights.
        shrinks: Whether training removes parts of the network.
        sweeps: Options of which a search may try several values after one shared beginning (`shared_epochs`).
        incomparable: Those of them between whose values search losses do not compare: each must have an answer of its own.
        chooses_blocks: Whether it chooses among the blocks that a layer of the network may be (see twins.py).
        weighs_cost: Whether a budget may have no limit, since the policy weighs costs against accuracy.
        search_loss: What tells which of two searches was the better, without a score, once it is trained: less is.
        free_options: Options that only `choose` reads, so that a search that goes on may be given others.
        notes: Lines on what the policy did, for whoever runs it to show; they may take them away.
    """

    default_grid: str = 'multiples'
    search_epochs: int = 50
    mixup: bool = True
    learns_budget: bool = False
    architecture_share: float = 0.
    shrinks: bool = False
    sweeps: tuple[str, ...] = ()
    incomparable: tuple[str, ...] = ()
    search_loss: float = math.nan
    chooses_blocks: bool = False
    weighs_cost: bool = False
    free_options: tuple[str, ...] = ()

    @dataclass(frozen=True)
    class Options:
        """Fields with defaults; each becomes a flag `--<policy>.<field>`. `__post_init__` raises PolicyError on bad ones."""

    def __init__(
            self,
            space: WidthSpace,
            budgets: Sequence[Budget],
            grid: Grid,
            options: Any = None,
            seed: int = 0,
    ):
        self.space, self.budgets, self.grid, self.seed = space, tuple(budgets), grid, seed
        self.options = self.Options() if options is None else options
        self.notes: list[str] = []

    @property
    def largest(self) -> dict[str, int]:
        return {name: widths[-1] for name, widths in self.grid.items()}

    @property
    def smallest(self) -> dict[str, int]:
        return {name: widths[0] for name, widths in self.grid.items()}

    @property
    def start(self) -> Mapping[str, int]:
        """Widths of the model that `prepare` is given; groups left out have their base width."""
        return self.largest

    def prepare(self, model: nn.Module, space: WidthSpace) -> nn.Module:
        """Makes the network to train.

        Args:
            model: The model at the widths of `start`, the grid's largest.
            space: The width space traced from it; its groups have the names of `self.space`.
        """
        return Supernet(model, space)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the policy's own, which the engine's optimiser trains along with the weights, without weight decay."""
        return ()

    def keep_base_widths(self, fixed: Sequence[str], reason: str, strict: bool = False, largest: bool = False) -> None:
        """From here on, groups have one width to choose from, their base width; a note lists them.

        Args:
            fixed: The groups.
            reason: Why.
            strict: Whether the user has asked, by --<policy>.strict, that there be none.
            largest: Whether they keep the largest width of their grid instead.

        Raises:
            PolicyError: There are some and `strict` was given, the network cannot have their base width, or there are no others.
            BudgetError: The budgets cannot be met without them.
        """
        if not fixed:
            return
        policy = type(self).__name__.lower()
        why = ', '.join(fixed[:4]) + (f' and {len(fixed) - 4} more' if len(fixed) > 4 else '') + f': {reason}'
        if strict:
            raise PolicyError(f'--{policy}.strict: {why}; keep their widths with --fix')
        if len(fixed) == len(self.grid):
            raise PolicyError(f'{policy} can search no group of {self.space.architecture}: {why}')
        for name in fixed:
            base = self.largest[name] if largest else self.space[name].size
            if base not in self.grid[name]:
                raise PolicyError(f"{policy}: {why}; '{name}' would keep its {base} channels, which its grid does not have: "
                                  f"give --fix '{name}'")
        kept = self.largest if largest else self.space.base_widths
        self.grid = {name: (kept[name],) if name in fixed else widths for name, widths in self.grid.items()}
        for budget in self.budgets:
            budget.check_feasible(self.smallest, self.largest)
        self.notes.append(f"{len(fixed)} of {len(self.grid)} groups keep their {'largest' if largest else 'base'} width: {why}")

    def train_step(self, step: Step) -> None:  # noqa: B027
        """Learns from one batch. A policy without a step of its own has no shared network."""

    def epoch_end(self, epoch: int) -> None:  # noqa: B027
        """Called after each epoch."""

    @property
    def evaluations(self) -> int:
        """How often `choose` will ask for a score at most: for the progress bar."""
        return 0

    def shared_epochs(self, epochs: int) -> int:
        """How many of the first epochs do not depend on the options of `sweeps`."""
        return 0

    @property
    def goals(self) -> Sequence[Budget]:
        """What the answers of `choose` meet: the budgets; or, where others follow, those of this stage."""
        return self.budgets

    def following(self, found: Sequence[Choice]) -> Sequence['Policy']:
        """The policies that go on from what `choose` has found, each with a training of its own, within its own grid.

        Returns:
            One for each budget, for this budget alone; none if `found` are the answers.
        """
        return ()

    @classmethod
    def settle(cls, options: Any, rule: str) -> tuple[Any, str]:
        """The options and the grid to choose from, where one of them may say what the other is.

        Args:
            options: Those given.
            rule: What --grid says; empty if nothing.

        Raises:
            PolicyError: They contradict one another.
        """
        return options, rule or cls.default_grid

    @abstractmethod
    def choose(self, evaluate: Evaluate) -> Sequence[Choice]:
        """Returns one network per budget, in their order; each meets its budget and lies on the grid."""

    def state_dict(self) -> dict[str, Any]:
        """All that training has taught the policy beside the network's weights: tensors, numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Goes on from where `state_dict` was taken, which `check_state` has accepted."""

    def check_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Checks what `state_dict` gave, before anything is built or written.

        Raises:
            PolicyError: It is of another training.
        """

    @classmethod
    def trains(cls) -> bool:
        """Whether it has a shared network to train."""
        return cls.train_step is not Policy.train_step


def fill_budget(
        space: WidthSpace,
        budget: Budget,
        grid: Grid,
        shape: Mapping[str, float],
        skips: Sequence[str] = (),
) -> dict[str, int]:
    """Scales a shape by one factor, found by bisection, to the largest network that meets the budget.

    Args:
        space: The width space of the model.
        budget: What to meet.
        grid: Group -> widths to round to.
        shape: Group -> ratio of its base width, before the factor.
        skips: Residual blocks that are left out.

    Returns:
        Group -> width, on the grid.
    """
    def scaled(factor: float) -> dict[str, int]:
        return {name: _nearest(widths, factor * shape[name] * space[name].size) for name, widths in grid.items()}

    low, high = 0.0, max(widths[-1] / (shape[name] * space[name].size) for name, widths in grid.items())
    if budget.met(scaled(high), skips):
        return scaled(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if budget.met(scaled(middle), skips) else (low, middle)
    return scaled(low)


def _nearest(widths: Sequence[int], width: float) -> int:
    """The entry closest to width; of two equally close ones the smaller."""
    i = bisect_left(widths, width)
    around = widths[max(i - 1, 0):i + 1]
    return min(around, key=lambda w: math.fabs(w - width))


def greedy_path(
        grid: Grid,
        widths: Mapping[str, int],
        best: Callable[[Mapping[str, int], Sequence[Mapping[str, int]]], Mapping[str, int]],
) -> Iterable[Mapping[str, int]]:
    """Networks that slim one step of the grid at a time, in one group each, down to the smallest.

    Args:
        grid: Group -> widths, ascending.
        widths: The first network.
        best: Is given the last network and those that are one step slimmer, and picks one of these.
    """
    yield widths
    while candidates := [{**widths, name: levels[levels.index(widths[name]) - 1]}
                         for name, levels in grid.items() if widths[name] > levels[0]]:
        widths = best(widths, candidates)
        yield widths


def first_within(path: Iterable[Mapping[str, int]], budgets: Sequence[Budget]) -> list[Choice]:
    """For each budget, the first network on a path that meets it."""
    found: dict[int, Choice] = {}
    for widths in path:
        for i, budget in enumerate(budgets):
            if i not in found and budget.met(widths):
                found[i] = Choice(widths)
        if len(found) == len(budgets):
            break
    return [found[i] for i in range(len(budgets))]


def greedy_scores(grid: Grid) -> int:
    """How many networks a greedy path compares at most: if it goes down to the smallest."""
    several, steps = sum(len(levels) > 1 for levels in grid.values()), sum(len(levels) - 1 for levels in grid.values())
    few = min(several, steps)
    return (steps - few) * several + few * (few + 1) // 2


def uniform_widths(space: WidthSpace, budget: Budget, grid: Grid) -> dict[str, int]:
    """The baseline that every search is held against: all groups by one factor."""
    return fill_budget(space, budget, grid, dict.fromkeys(grid, 1.0))
