"""The stages of a search whose bins become smaller: budgets that shrink, and grids within what the stage before has found.

Section 3.3 of "Locally free weight sharing for network width search" (CafeNet, Su et al., ICLR 2021), eq. 10.
"""
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Optional, Union

from .bins import bin_grid
from .budget import Budget
from .factors import Grid
from .space import WidthError, WidthSpace

__all__ = ['are_finest', 'first_bins', 'stage_budgets', 'stage_grid']


def stage_budgets(
        budgets: Sequence[Budget],
        whole: Sequence[Union[int, float]],
        stage: int,
        stages: int,
) -> Sequence[Budget]:
    """FLOPs(t), eq. 10: from the cost of the first shared network to the budgets, in equal steps.

    Args:
        budgets: What the last stage must meet.
        whole: For each of them, the cost of the largest network of the first stage.
        stage: t, from 1.
        stages: T.
    """
    if stage >= stages:
        return budgets
    limits = (all_of - (all_of - b.limit) * stage / stages for all_of, b in zip(whole, budgets))
    return [replace(b, limit=math.floor(limit) if isinstance(b.limit, int) else limit) for b, limit in zip(budgets, limits)]


def first_bins(space: WidthSpace, grid: Grid, beta: float) -> Optional[dict[str, int]]:
    """Group -> channels of a bin, if a grid is that of the bins of at least beta channels, or its upper part; else None."""
    bins = bin_grid(space, {name: widths[-1] for name, widths in grid.items()}, beta)
    if any(levels[-len(w):] != tuple(w) for levels, w in zip(bins.values(), grid.values())):
        return None
    return {name: levels[0] for name, levels in bins.items()}


def are_finest(space: WidthSpace, bins: Mapping[str, int]) -> bool:
    """Whether no bin can be split."""
    return all(size <= space[name].unit for name, size in bins.items())


def stage_grid(
        space: WidthSpace,
        budget: Budget,
        found: Mapping[str, int],
        beta: float,
        most: Mapping[str, int],
        smallest: Mapping[str, int],
        floor: Mapping[str, int],
) -> tuple[Grid, dict[str, int]]:
    """The grid of the stage that follows.

    Args:
        space: The width space of the model.
        budget: Of this stage: only widths whose cost it knows are on the grid (a latency is only where it was measured).
        found: Group -> width that the stage before has found, the largest from here on.
        beta: The least size of a bin.
        most: Group -> the largest size of a bin: that of the stage before.
        smallest: Group -> the smallest width of the stage before. That of this stage is no larger.
        floor: Group -> the least width that was asked for, of the groups for which one was.

    Returns:
        The grid, and group -> channels of a bin.
    """
    def known(name: str, width: int) -> bool:
        try:
            budget.cost({**found, name: width})
        except WidthError:
            return False
        return True

    bins, grid = bin_grid(space, found, beta, most=most), {}
    for name, levels in bins.items():
        kept = [w for w in levels if w >= floor.get(name, 0) and known(name, w)]
        least = smallest[name]
        grid[name] = (*([least] if not kept or least < kept[0] else []), *kept)
    return grid, {name: levels[0] for name, levels in bins.items()}
