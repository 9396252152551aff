"""What every policy is: an object that chooses widths within a budget, and knows neither data nor models."""
import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ..cost import Budget
from ..space import WidthSpace

__all__ = ['Choice', 'Evaluate', 'Grid', 'Policy', 'PolicyError', 'fill_budget', 'option', 'uniform_widths']

Grid = Mapping[str, Sequence[int]]  # group -> the widths that may be chosen, ascending
BISECTIONS = 40  # halvings of the factor: far below the distance of any two grid points


class PolicyError(ValueError):
    """An unknown policy, or options that it cannot work with."""


class Choice(NamedTuple):
    """What a policy answers with."""
    widths: Mapping[str, int]
    skips: tuple[str, ...] = ()


class Evaluate(Protocol):
    """Scores a network on the holdout, higher is better: it is trained briefly, from scratch, always under the same seed."""

    def __call__(self, widths: Mapping[str, int], skips: Sequence[str] = ()) -> float: ...


def option(default: Any, help: str) -> Any:
    """A field of `Options`: its default and what `--help` says."""
    return field(default=default, metadata={'help': help})


class Policy(ABC):
    """One way to choose widths, one paper: the docstring of a subclass cites it and says what differs.

    This first form knows policies that train every candidate by itself. Policies that train a shared network step by step, and
    the state that resumes them, are still to come.

    Args:
        space: The width space of the model.
        budget: What the answer must meet.
        grid: Group -> widths to choose from, ascending; the smallest of all meet the budget. Groups left out keep their base.
        options: An instance of the class's `Options`.
        seed: Seed of all that is drawn.
    """

    @dataclass(frozen=True)
    class Options:
        """Fields with defaults; each becomes a flag `--<policy>.<field>`."""

    def __init__(self, space: WidthSpace, budget: Budget, grid: Grid, options: Any = None, seed: int = 0):
        self.space, self.budget, self.grid, self.seed = space, budget, grid, seed
        self.options = self.Options() if options is None else options

    @property
    def evaluations(self) -> int:
        """How often `choose` will call `evaluate`, at most: for the progress bar."""
        return 0

    @abstractmethod
    def choose(self, evaluate: Evaluate) -> Choice:
        """Returns the answer, which meets the budget and lies on the grid."""


def fill_budget(space: WidthSpace, budget: Budget, grid: Grid, shape: Mapping[str, float]) -> dict[str, int]:
    """Scales a shape by one factor, found by bisection, to the largest network that meets the budget.

    Args:
        space: The width space of the model.
        budget: What to meet.
        grid: Group -> widths to round to.
        shape: Group -> ratio of its base width, before the factor.

    Returns:
        Group -> width, on the grid.
    """
    def scaled(factor: float) -> dict[str, int]:
        return {name: _nearest(widths, factor * shape[name] * space[name].size) for name, widths in grid.items()}

    low, high = 0.0, max(widths[-1] / (shape[name] * space[name].size) for name, widths in grid.items())
    if budget.met(scaled(high)):
        return scaled(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if budget.met(scaled(middle)) else (low, middle)
    return scaled(low)


def _nearest(widths: Sequence[int], width: float) -> int:
    """The entry closest to width; of two equally close ones the smaller."""
    i = bisect_left(widths, width)
    around = widths[max(i - 1, 0):i + 1]
    return min(around, key=lambda w: math.fabs(w - width))


def uniform_widths(space: WidthSpace, budget: Budget, grid: Grid) -> dict[str, int]:
    """The baseline that every search is held against: all groups by one factor."""
    return fill_budget(space, budget, grid, dict.fromkeys(grid, 1.0))
