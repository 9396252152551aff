"""A cost that was measured: tables over a grid of widths, interpolated between its points."""
from collections.abc import Mapping, Sequence
from typing import Union

import numpy as np
import torch

from .cost import Cost, Distribution, Width, check_distributions, check_names
from .factors import Factors, Grid, sum_terms
from .space import WidthError, WidthSpace

__all__ = ['Tables']


class Tables(Cost):
    """A cost given by tables over the widths of a grid; between two widths it is linear in each group.

    Groups that the tables do not have keep their base width.

    Attributes:
        space: The width space whose groups are the variables.
        unit: What is counted, for messages.
        tables: The tables.
        blocks: Module -> what is its part of the sum; only these can be left out.
    """

    def __init__(self, space: WidthSpace, unit: str, tables: Factors, blocks: Mapping[str, Factors] = {}):
        self.space, self.unit, self.tables = space, unit, tables
        self.blocks = {name: Tables(space, unit, part) for name, part in blocks.items()}
        self._levels = {name: torch.tensor(widths, dtype=torch.float64) for name, widths in tables.grid.items()}
        self._unary = {name: torch.as_tensor(np.asarray(t, dtype=np.float64)) for name, t in tables.unary.items()}
        self._pairwise = {pair: torch.as_tensor(np.asarray(t, dtype=np.float64)) for pair, t in tables.pairwise.items()}

    def __call__(self, widths: Mapping[str, Width] = {}, skips: Sequence[str] = ()) -> Union[float, torch.Tensor]:
        """The sum of the tables' entries at widths (see `Cost`).

        Raises:
            WidthError: Widths do not fit the space or lie outside of what was measured, or blocks are to be left out.
        """
        given = [w for w in widths.values() if isinstance(w, torch.Tensor)] if isinstance(widths, Mapping) else []
        if given:
            check_names(self.space, widths, skips)
        else:
            self.space.check(widths, skips)
        full = self._full(widths)
        self._check({name: w.item() if isinstance(w, torch.Tensor) else w for name, w in full.items()}, skips)
        total = self._sum({name: self._weights(name, full[name]) for name in self.tables.grid})
        for block in skips:
            part = self.blocks[block]
            total = total - part({name: w for name, w in widths.items() if name in part.tables.grid})
        return total if given else total.item()

    def of(self, module: str, widths: Mapping[str, int] = {}) -> float:
        self._check({}, [module])
        part = self.blocks[module]
        return part({name: w for name, w in widths.items() if name in part.tables.grid})

    def expectation(
            self, distributions: Mapping[str, Distribution], skips: Sequence[str] = ()) -> Union[float, torch.Tensor]:
        check_distributions(self.space, distributions, skips)
        others = {name: w for name, w in self._full({}).items() if name not in distributions}
        self._check(others, skips)
        weights = {name: self._weights(name, w) for name, w in others.items()}
        for name, (widths, p) in distributions.items():
            for w in widths:
                self._check({name: w}, skips)
            if name in self.tables.grid:
                at = torch.stack([self._weights(name, w) for w in widths])
                weights[name] = torch.as_tensor(p, dtype=torch.float64, device='cpu') @ at
        total = self._sum(weights)
        for block in skips:
            part = self.blocks[block]
            total = total - part.expectation({name: d for name, d in distributions.items() if name in part.tables.grid})
        return total if any(isinstance(p, torch.Tensor) for _, p in distributions.values()) else total.item()

    def factors(self, grid: Grid, skips: Sequence[str] = ()) -> Factors:
        self._check({name: w for name, w in self._full({}).items() if name not in grid}, skips)
        for name, widths in grid.items():
            for w in widths:
                self.space.check({name: w})
                self._check({name: w}, ())
        at = {name: torch.stack([self._weights(name, w) for w in grid.get(name, [self.space[name].size])]).numpy()
              for name in self.tables.grid}  # (widths of the grid, widths of the tables)
        moved = [((name,), at[name] @ np.asarray(table, dtype=np.float64)) for name, table in self.tables.unary.items()]
        moved += [((a, b), at[a] @ np.asarray(table, dtype=np.float64) @ at[b].T) for (a, b), table in self.tables.pairwise.items()]
        terms = []
        for names, table in moved:  # groups outside the grid have length 1
            free = [n for n in names if n in grid]
            terms.append((free, table.reshape([len(grid[n]) for n in free])))
        constant = float(self.tables.constant)
        for block in skips:
            own = self.blocks[block].tables.grid
            part = self.blocks[block].factors({name: widths for name, widths in grid.items() if name in own})
            constant -= part.constant
            terms += [((name,), -table) for name, table in part.unary.items()]
            terms += [(names, -table) for names, table in part.pairwise.items()]
        return sum_terms(grid, terms, constant)

    def show(self, value: Union[int, float]) -> str:
        return f'{value:.4g} {self.unit}'

    def _full(self, widths: Mapping[str, Width]) -> dict[str, Width]:
        """Widths with those of the groups that the tables have and that are left out."""
        return {name: self.space[name].size for name in self.tables.grid} | dict(widths)

    def _check(self, widths: Mapping[str, float], skips: Sequence[str]) -> None:
        """Raises WidthError where nothing was measured."""
        if unknown := [name for name in skips if name not in self.blocks]:
            known = f"{', '.join(list(self.blocks)[:3])} and so on" if self.blocks else 'whole networks'
            raise WidthError(f"{self.space.architecture}: {self.unit} were measured of {known}: '{unknown[0]}' cannot be left out, "
                             'nor weighed (timm-width latency measure --blocks measures blocks alone)')
        for name, width in widths.items():
            levels = self.tables.grid.get(name, (self.space[name].size,))
            if not levels[0] <= width <= levels[-1]:
                where = f'outside {levels[0]}..{levels[-1]}' if name in self.tables.grid else f'not its base width {levels[0]}'
                raise WidthError(f"{self.space.architecture}: '{name}': width {width:g} is {where}, where nothing was measured")

    def _weights(self, name: str, width: Width) -> torch.Tensor:
        """Shares of the two levels around a width: (levels,), summing to 1."""
        levels = self._levels[name]
        out = torch.zeros(len(levels), dtype=torch.float64)
        if len(levels) == 1:
            return out + 1
        w = torch.as_tensor(width, dtype=torch.float64, device='cpu')
        high = min(max(int(torch.searchsorted(levels, w.detach())), 1), len(levels) - 1)
        share = (w - levels[high - 1]) / (levels[high] - levels[high - 1])
        return out.index_add(0, torch.tensor([high - 1, high]), torch.stack([1 - share, share]))

    def _sum(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        total = torch.tensor(float(self.tables.constant), dtype=torch.float64)
        for name, table in self._unary.items():
            total = total + weights[name] @ table
        for (a, b), table in self._pairwise.items():
            total = total + weights[a] @ table @ weights[b]
        return total
