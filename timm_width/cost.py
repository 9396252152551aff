"""What a network costs as a function of its widths; here, exact and differentiable polynomials.

A cost is a sum of monomials `coefficient * n_a * n_b * ...`, where n_g is the number of steps (ids) kept of group g. `Macs` has
them from the sites of a `WidthSpace` (one multiply-add = 1), `Params` from the shapes of its parameters. One representation
serves evaluation, gradients, expectations and, as tables over a grid, solvers. Frozen groups cannot change and are folded into
the coefficients. Costs that were measured are in tables.py.

>>> macs = Macs(space)
>>> macs({'blocks.1.0.conv_pw': 48})                                    # an int, exact
>>> macs({'blocks.1.0.conv_pw': torch.tensor(48.5, requires_grad=True)})  # a 0-dim float64 tensor
>>> macs.expectation({'blocks.1.0.conv_pw': ((24, 48), probabilities)})
"""
import math
import operator
from abc import ABC, abstractmethod
from collections import Counter
from functools import cached_property, reduce
from typing import Iterable, Mapping, Sequence, Union

import numpy as np
import torch

from .factors import Factors, Grid, sum_terms
from .space import MAX_GROWTH, Axis, WidthError, WidthSpace

__all__ = ['Cost', 'CostError', 'Macs', 'Params', 'Polynomial']

Width = Union[int, float, torch.Tensor]
Distribution = tuple[Sequence[int], Union[Sequence[float], np.ndarray, torch.Tensor]]

INT64_SAFE = 2 ** 62  # a cost that may exceed this is summed in Python integers
SUM_TOLERANCE = 1e-2  # by how much probabilities (of half precision, even) may miss a sum of 1


class CostError(ValueError):
    """A cost that is not of the form that is asked for."""


class Cost(ABC):
    """What a network costs at some widths: a sum of factors, each over few groups.

    Attributes:
        space: The width space whose groups are the variables.
        unit: What is counted, for messages.
    """
    space: WidthSpace
    unit: str

    @abstractmethod
    def __call__(self, widths: Mapping[str, Width] = {}, skips: Sequence[str] = ()) -> Union[int, float, torch.Tensor]:
        """Evaluates the cost.

        Args:
            widths: Group -> channels; groups left out are at their base. Tensors must have no dimension and may be fractional.
            skips: Residual blocks to leave out.

        Returns:
            A number if all widths are ints (an int where the cost is a count), else a differentiable float64 tensor without
            dimensions.

        Raises:
            WidthError: Widths or skips do not fit.
        """

    @abstractmethod
    def of(self, module: str, widths: Mapping[str, int] = {}) -> Union[int, float]:
        """What the layers inside a module cost.

        Args:
            module: Its name.
            widths: Group -> channels; groups left out are at their base.

        Raises:
            WidthError: The widths do not fit, or the cost of this module is not known.
        """

    @abstractmethod
    def expectation(
            self, distributions: Mapping[str, Distribution], skips: Sequence[str] = ()) -> Union[float, torch.Tensor]:
        """Expected cost when groups draw their widths independently.

        Args:
            distributions: Group -> (widths, their probabilities); groups left out are at their base.
            skips: Residual blocks to leave out.

        Returns:
            A float64 tensor without dimensions, differentiable in the probabilities that are tensors; a float if none is.

        Raises:
            WidthError: Groups, widths or skips do not fit the space, or the probabilities do not fit the widths.
        """

    @abstractmethod
    def factors(self, grid: Grid, skips: Sequence[str] = ()) -> Factors:
        """The cost as tables over a grid, for solvers; groups that are not in it are at their base.

        Args:
            grid: Group -> widths, ascending.
            skips: Residual blocks to leave out.

        Raises:
            CostError: A term depends on more than two groups of the grid.
            WidthError: The grid or the skips do not fit.
        """

    def show(self, value: Union[int, float]) -> str:
        """A value with its unit, as in messages."""
        return f'{value:,} {self.unit}'

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.space.architecture}: {self.show(self())} at base widths)'


def check_names(space: WidthSpace, names: Iterable[str], skips: Sequence[str] = ()) -> None:
    """Raises WidthError for groups or blocks that the space does not have."""
    base = {g.name: g.size for g in space.groups}
    space.check({n: base.get(n, 0) for n in names}, skips)


def check_distributions(space: WidthSpace, distributions: Mapping[str, Distribution], skips: Sequence[str]) -> None:
    """Raises WidthError for what `Cost.expectation` cannot work with."""
    if not isinstance(distributions, Mapping):
        raise WidthError(f'distributions must be a dict of group name -> (widths, probabilities), '
                         f'not {type(distributions).__name__}')
    check_names(space, distributions, skips)
    for name, d in distributions.items():
        if not isinstance(d, (tuple, list)) or len(d) != 2 or len(d[0]) == 0:
            raise WidthError(f"'{name}': a distribution is (widths, their probabilities), not {str(d)[:60]!r}")
        widths, p = d[0], torch.as_tensor(d[1], dtype=torch.float64).detach()
        for w in widths:
            space.check({name: w})
        if p.shape != (len(widths),):
            raise WidthError(f"'{name}': {len(widths)} widths need as many probabilities, not shape {tuple(p.shape)}")
        total, least = p.sum().item(), p.min().item()
        if not (abs(total - 1) <= SUM_TOLERANCE and least >= -SUM_TOLERANCE):
            raise WidthError(f"'{name}': probabilities must not be negative and sum to 1, "
                             f'but they sum to {total:g} and the least is {least:g}')


class Polynomial(Cost):
    """A sum of products of widths, each owned by the module that causes it.

    Attributes:
        space: The width space whose groups are the variables.
        unit: What is counted, for messages.
    """

    def __init__(self, space: WidthSpace, unit: str, products: Iterable[tuple[str, int, Sequence[Union[int, Axis]]]]):
        """Expands products of axes into monomials.

        Args:
            space: The width space whose groups the axes refer to.
            unit: What is counted, for messages.
            products: (owner module, coefficient, factors); a factor is a fixed length or an axis.
        """
        self.space, self.unit = space, unit
        linear: dict[Axis, dict[tuple, int]] = {}
        merged: dict[tuple[str, tuple], int] = {}
        for owner, coefficient, factors in products:
            terms = {(): coefficient * math.prod(f for f in factors if isinstance(f, int))}
            for axis in factors:
                if isinstance(axis, int):
                    continue
                if axis not in linear:
                    linear[axis] = _linear(space, axis)
                terms = _product(terms, linear[axis])
            for key, c in terms.items():
                merged[owner, key] = merged.get((owner, key), 0) + c
        self._keys = [key for _, key in merged]
        self._owners = [owner for owner, _ in merged]
        most = [MAX_GROWTH * g.steps for g in space.groups]
        bound = sum(c * math.prod(most[g] for g in key) for (_, key), c in merged.items())
        self._dtype = np.int64 if bound < INT64_SAFE else object
        self._coefficients = np.array(list(merged.values()), dtype=self._dtype)
        self._columns = _columns(self._keys, len(space.groups))
        self._base = np.array([g.steps for g in space.groups] + [1], dtype=self._dtype)
        self._dropped: dict[str, np.ndarray] = {}  # block -> mask of the terms inside it

    def __call__(self, widths: Mapping[str, Width] = {}, skips: Sequence[str] = ()) -> Union[int, torch.Tensor]:
        """The exact cost as an int if all widths are ints (see `Cost`). Of tensors, only names and dimensions are checked."""
        if not isinstance(widths, Mapping) or not any(isinstance(w, torch.Tensor) for w in widths.values()):
            self.space.check(widths, skips)
            return int((self._kept(skips) * _monomials(self._at(widths), self._columns)).sum())
        return self._relaxed(widths, skips)

    def of(self, module: str, widths: Mapping[str, int] = {}) -> int:
        return self(widths) - int((self._kept([module]) * _monomials(self._at(widths), self._columns)).sum())

    def expectation(
            self, distributions: Mapping[str, Distribution], skips: Sequence[str] = ()) -> Union[float, torch.Tensor]:
        """Exact also where a group is squared (see `Cost`)."""
        check_distributions(self.space, distributions, skips)
        given = [p for _, p in distributions.values() if isinstance(p, torch.Tensor)]
        device = given[0].device if given else torch.device('cpu')
        degree, n = len(self._columns), len(self._base)
        powers = torch.arange(1, degree + 1, dtype=torch.float64, device=device)[:, None]
        moments = torch.as_tensor(self._base.astype(np.float64), device=device) ** powers  # E[n^k], row k - 1
        if distributions:
            drawn = [self._moments(name, *d, powers) for name, d in distributions.items()]
            at = torch.tensor([self.space.index[name] for name in distributions], device=device)
            moments = moments.index_copy(1, at, torch.stack(drawn, 1))
        columns = [torch.as_tensor(c, device=device) for c in self._moment_columns(n)]
        coefficients = torch.as_tensor(self._kept(skips).astype(np.float64), device=device)
        total = (coefficients * _monomials(moments.reshape(-1), columns)).sum()
        return total if given else total.item()

    def factors(self, grid: Grid, skips: Sequence[str] = ()) -> Factors:
        steps = {self.space.index[name]: self._steps(name, widths) for name, widths in grid.items()}
        order = {g: i for i, g in enumerate(steps)}
        names = [g.name for g in self.space.groups]
        self.space.check({}, skips)
        terms = []
        for c, key, owner in zip(self._kept(skips), self._keys, self._owners):
            c = int(c)
            if c == 0:
                continue
            free = sorted({g for g in key if g in steps}, key=order.get)
            c *= math.prod(int(self._base[g]) for g in key if g not in steps)
            if len(free) > 2:
                raise CostError(f"{self.space.architecture}: {self.unit} of '{owner}' have a term over {len(free)} groups "
                                f"({' x '.join(names[g] for g in free)}), and a sum of tables over two groups each is needed: "
                                'keep the width of one of them')
            table = c
            for g in free:
                table = np.multiply.outer(table, steps[g] ** key.count(g))
            terms.append(([names[g] for g in free], table))
        return sum_terms(grid, terms)

    def _steps(self, name: str, widths: Sequence[int]) -> np.ndarray:
        for w in widths:
            self.space.check({name: w})
        return np.array([int(w) // self.space[name].unit for w in widths], dtype=self._dtype)

    def _kept(self, skips: Sequence[str]) -> np.ndarray:
        """Coefficients, zero for the terms of modules inside the blocks left out."""
        out = self._coefficients
        for block in skips:
            if block not in self._dropped:
                inside = {o: o == block or o.startswith(block + '.') for o in set(self._owners)}
                self._dropped[block] = np.array([inside[o] for o in self._owners], dtype=bool)
            out = np.where(self._dropped[block], 0, out)
        return out


    def _at(self, widths: Mapping[str, int]) -> np.ndarray:
        steps = self._base.copy()
        for name, width in widths.items():
            i = self.space.index[name]
            steps[i] = int(width) // self.space.groups[i].unit
        return steps

    def _relaxed(self, widths: Mapping[str, Width], skips: Sequence[str]) -> torch.Tensor:
        """The cost at widths of which some are tensors."""
        check_names(self.space, widths, skips)
        device = next(w.device for w in widths.values() if isinstance(w, torch.Tensor))
        steps = []
        for name, width in widths.items():
            group = self.space[name]
            try:
                w = torch.as_tensor(width, dtype=torch.float64, device=device)
            except (TypeError, ValueError, RuntimeError):
                raise WidthError(f"'{name}': width must be a number or a tensor, not {str(width)[:40]!r}") from None
            if w.ndim:
                raise WidthError(f"'{name}': a width must be a tensor without dimensions, not of shape {tuple(w.shape)}")
            if group.frozen is not None and w.item() != group.size:
                raise WidthError(f"'{name}' is frozen at {group.size} ({group.frozen}), not {w.item():g}")
            steps.append(w / group.unit)
        at = torch.tensor([self.space.index[name] for name in widths], device=device)
        table = torch.as_tensor(self._base.astype(np.float64), device=device).index_copy(0, at, torch.stack(steps))
        columns = [torch.as_tensor(c, device=device) for c in self._columns]
        return (torch.as_tensor(self._kept(skips).astype(np.float64), device=device) * _monomials(table, columns)).sum()

    def _moments(self, name: str, widths: Sequence[int], probabilities, powers: torch.Tensor) -> torch.Tensor:
        """E[n^k] of one group for every power k, in steps."""
        p = torch.as_tensor(probabilities, dtype=torch.float64, device=powers.device)
        steps = torch.tensor([int(w) for w in widths], dtype=torch.float64, device=powers.device) / self.space[name].unit
        return (p * steps ** powers).sum(1)

    @cached_property
    def _moment_keys(self) -> list[list[tuple[int, int]]]:
        return [list(Counter(key).items()) for key in self._keys]

    def _moment_columns(self, n: int) -> list[np.ndarray]:
        """Columns into a flat table of n moments per power: a group that occurs k times in a monomial is one factor E[n^k]."""
        return _columns([[(k - 1) * n + g for g, k in key] for key in self._moment_keys], n - 1)


def _linear(space: WidthSpace, axis: Axis) -> dict[tuple, int]:
    """Length of an axis as monomials of steps: (group,) -> channels per step, () -> channels of frozen groups."""
    out: dict[tuple, int] = {}
    for g, r in axis:
        frozen = space.groups[g].frozen is not None
        key, c = ((), r * space.groups[g].steps) if frozen else ((g,), r)
        out[key] = out.get(key, 0) + c
    return out


def _product(a: dict[tuple, int], b: dict[tuple, int]) -> dict[tuple, int]:
    out: dict[tuple, int] = {}
    for ka, ca in a.items():
        for kb, cb in b.items():
            key = tuple(sorted(ka + kb))
            out[key] = out.get(key, 0) + ca * cb
    return out


def _columns(keys: Sequence[Sequence[int]], pad: int) -> list[np.ndarray]:
    """Index columns of monomials, short ones padded with the index of a constant 1."""
    degree = max(map(len, keys), default=0) or 1
    index = np.array([[*key, *[pad] * (degree - len(key))] for key in keys], dtype=np.int64).reshape(-1, degree)
    return list(np.ascontiguousarray(index.T))


def _monomials(table, columns: Sequence):
    """Products of table entries, one per monomial; for arrays and tensors alike."""
    return reduce(operator.mul, (table[c] for c in columns))


class Macs(Polynomial):
    """Multiply-adds of one image: convolutions, linear layers and matrix products."""

    def __init__(self, space: WidthSpace, deployed: bool = False):
        """Reads the sites of a space.

        Args:
            space: The width space.
            deployed: Count a re-parameterisable model in its deployed (fused) form.

        Raises:
            ValueError: The model has no deployed form.
        """
        sites = space.deployed_sites if deployed else space.sites
        if sites is None:
            raise ValueError(f'{space.architecture} has no deployed form in this space: trace it with trace(model, deployed=True); '
                             'a model that is not re-parameterisable has none')
        super().__init__(space, 'MACs', ((s.name, s.positions, s.factors) for s in sites))


class Params(Polynomial):
    """Parameters, tied ones once; buffers are not counted."""

    def __init__(self, space: WidthSpace):
        super().__init__(space, 'params', (
            (name.rpartition('.')[0], 1, [s if a is None else a for s, a in zip(t.shape, t.axes)])
            for name, t in space.tensors.items() if t.is_param))
