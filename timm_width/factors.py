"""A sum of tables over a grid of widths, each over at most two groups: what every cost becomes for a solver."""
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Union

import numpy as np

__all__ = ['Factors', 'Grid', 'random_widths', 'sum_terms']

Grid = Mapping[str, Sequence[int]]  # group -> widths, ascending
Number = Union[int, float]


@dataclass(frozen=True, eq=False)
class Factors:
    """A function of one width per group of a grid, as a constant plus tables.

    Attributes:
        grid: Group -> its widths, ascending; the index of a width is its place in every table.
        constant: What no width changes.
        unary: Group -> (widths of the group,) table; a group may have none.
        pairwise: (group, group), in the order of the grid and each pair once -> (widths of one, widths of the other) table.
            Tables hold integers (object arrays of Python integers where int64 might overflow) or float64.
    """
    grid: Grid
    constant: Number = 0
    unary: Mapping[str, np.ndarray] = field(default_factory=dict)
    pairwise: Mapping[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        order = {name: i for i, name in enumerate(self.grid)}
        for name, table in self.unary.items():
            if table.shape != (len(self.grid[name]),):
                raise ValueError(f"the table of '{name}' has shape {table.shape} for {len(self.grid[name])} widths")
        for (a, b), table in self.pairwise.items():
            if order[a] >= order[b] or table.shape != (len(self.grid[a]), len(self.grid[b])):
                raise ValueError(f"the table of '{a}' and '{b}' has shape {table.shape}, or not the order of the grid")

    def __call__(self, widths: Mapping[str, int]) -> Number:
        """The sum at widths of the grid, one for every group; exact where the tables are.

        Raises:
            ValueError: A width is not on the grid.
        """
        at = {name: _place(name, levels, widths) for name, levels in self.grid.items()}
        total = self.constant + sum(t[at[g]] for g, t in self.unary.items()) + sum(
            t[at[a], at[b]] for (a, b), t in self.pairwise.items())
        return total.item() if isinstance(total, np.generic) else total


def sum_terms(grid: Grid, terms: Iterable[tuple[Sequence[str], Union[Number, np.ndarray]]], constant: Number = 0) -> Factors:
    """Adds up terms, of which several may be over the same groups.

    Args:
        grid: Group -> widths, ascending.
        terms: (groups, table): none, one or two groups of the grid, in any order, and a table with a dimension for each.
        constant: What to begin with.
    """
    order = {name: i for i, name in enumerate(grid)}
    unary, pairwise = {}, {}
    for groups, table in terms:
        if not groups:
            constant += table.item() if isinstance(table, (np.ndarray, np.generic)) else table
        elif len(groups) == 1:
            unary[groups[0]] = unary.get(groups[0], 0) + table
        else:
            a, b = groups
            pair, table = ((a, b), table) if order[a] < order[b] else ((b, a), table.T)
            pairwise[pair] = pairwise.get(pair, 0) + table
    return Factors(grid, constant, unary, pairwise)


def random_widths(grid: Grid, rng: np.random.Generator) -> dict[str, int]:
    """Draws a width for every group, each entry of its grid equally likely."""
    return {name: widths[rng.integers(len(widths))] for name, widths in grid.items()}


def _place(name: str, levels: Sequence[int], widths: Mapping[str, int]) -> int:
    try:
        return levels.index(widths[name])
    except (KeyError, ValueError):
        raise ValueError(f"'{name}': {widths.get(name, 'nothing')} is not on the grid {tuple(levels)}") from None
