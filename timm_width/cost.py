"""What a network costs as a function of its widths: exact, differentiable polynomials, and budgets on them.

A cost is a sum of monomials `coefficient * n_a * n_b * ...`, where n_g is the number of steps (ids) kept of group g. `Macs` has
them from the sites of a `WidthSpace` (one multiply-add = 1), `Params` from the shapes of its parameters. One representation
serves evaluation, gradients, expectations and solvers. Frozen groups cannot change and are folded into the coefficients.

>>> macs = Macs(space)
>>> macs({'blocks.1.0.conv_pw': 48})                                    # an int, exact
>>> macs({'blocks.1.0.conv_pw': torch.tensor(48.5, requires_grad=True)})  # a 0-dim float64 tensor
>>> macs.expectation({'blocks.1.0.conv_pw': ((24, 48), probabilities)})
>>> Budget.parse('macs=0.5x', space).met(widths)
"""
import math
import operator
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, reduce
from typing import Iterable, Mapping, NamedTuple, Optional, Sequence, Union

import numpy as np
import torch

from .space import MAX_GROWTH, Axis, WidthError, WidthSpace, nearest

__all__ = ['Budget', 'BudgetError', 'Cost', 'Macs', 'Pairs', 'Params']

Width = Union[int, float, torch.Tensor]
Distribution = tuple[Sequence[int], Union[Sequence[float], np.ndarray, torch.Tensor]]

INT64_SAFE = 2 ** 62  # a cost that may exceed this is summed in Python integers
SUM_TOLERANCE = 1e-2  # by how much probabilities (of half precision, even) may miss a sum of 1


class Pairs(NamedTuple):
    """A cost as factors over at most two groups, in exact integers over *steps* (a width divided by its group's unit).

    Attributes:
        constant: What no width changes.
        unary: Group -> (linear, quadratic) coefficients of its steps.
        pairwise: (group, group) in the order of the space, each pair once -> coefficient of the product of their steps.
    """
    constant: int
    unary: dict[str, tuple[int, int]]
    pairwise: dict[tuple[str, str], int]


class Cost:
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
        """Evaluates the cost.

        Args:
            widths: Group -> channels; groups left out are at their base. Tensors must have no dimension and may be fractional.
            skips: Residual blocks to leave out.

        Returns:
            The exact cost as an int if all widths are ints, else a differentiable float64 tensor without dimensions.

        Raises:
            WidthError: Widths or skips do not fit the space. Of tensors, only names and dimensions are checked.
        """
        if not isinstance(widths, Mapping) or not any(isinstance(w, torch.Tensor) for w in widths.values()):
            self.space.check(widths, skips)
            steps = self._base.copy()
            for name, width in widths.items():
                i = self.space.index[name]
                steps[i] = int(width) // self.space.groups[i].unit
            return int((self._kept(skips) * _monomials(steps, self._columns)).sum())
        return self._relaxed(widths, skips)

    def expectation(
            self, distributions: Mapping[str, Distribution], skips: Sequence[str] = ()) -> Union[float, torch.Tensor]:
        """Expected cost when groups draw their widths independently; exact also where a group is squared.

        Args:
            distributions: Group -> (widths, their probabilities); groups left out are at their base.
            skips: Residual blocks to leave out.

        Returns:
            A float64 tensor without dimensions, differentiable in the probabilities that are tensors; a float if none is.

        Raises:
            WidthError: Groups, widths or skips do not fit the space, or the probabilities do not fit the widths.
        """
        if not isinstance(distributions, Mapping):
            raise WidthError(f'distributions must be a dict of group name -> (widths, probabilities), '
                             f'not {type(distributions).__name__}')
        self._check_names(distributions, skips)
        for name, d in distributions.items():
            if not isinstance(d, (tuple, list)) or len(d) != 2 or len(d[0]) == 0:
                raise WidthError(f"'{name}': a distribution is (widths, their probabilities), not {str(d)[:60]!r}")
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

    def pairs(self, skips: Sequence[str] = ()) -> Pairs:
        """The same sum as factors over at most two groups, for solvers.

        Args:
            skips: Residual blocks to leave out.

        Returns:
            Integer coefficients over steps, not channels.

        Raises:
            ValueError: A term is not linear, quadratic or a product of two groups.
        """
        self.space.check({}, skips)
        names = [g.name for g in self.space.groups]
        constant, pairwise = 0, {}
        unary: dict[str, list[int]] = {}
        for c, key, owner in zip(self._kept(skips), self._keys, self._owners):
            c = int(c)
            if c == 0:
                continue
            if len(key) > 2:
                different = [names[g] for g in dict.fromkeys(key)]
                product = ' x '.join(names[g] for g in key)
                why = f'over {len(different)} groups' if len(different) > 2 else f'of degree {len(key)}'
                raise ValueError(f"{self.space.architecture}: {self.unit} of '{owner}' have a term {why} ({product}); "
                                 'only linear and quadratic terms and products of two groups can be written as pairs')
            if not key:
                constant += c
            elif len(key) == 2 and key[0] != key[1]:
                pair = (names[key[0]], names[key[1]])
                pairwise[pair] = pairwise.get(pair, 0) + c
            else:
                unary.setdefault(names[key[0]], [0, 0])[len(key) - 1] += c
        return Pairs(constant, {name: tuple(c) for name, c in unary.items()}, pairwise)

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.space.architecture}: {self():,} {self.unit} at base widths)'

    def _kept(self, skips: Sequence[str]) -> np.ndarray:
        """Coefficients, zero for the terms of modules inside the blocks left out."""
        out = self._coefficients
        for block in skips:
            if block not in self._dropped:
                inside = {o: o == block or o.startswith(block + '.') for o in set(self._owners)}
                self._dropped[block] = np.array([inside[o] for o in self._owners], dtype=bool)
            out = np.where(self._dropped[block], 0, out)
        return out

    def _check_names(self, names: Iterable[str], skips: Sequence[str]) -> None:
        base = {g.name: g.size for g in self.space.groups}
        self.space.check({n: base.get(n, 0) for n in names}, skips)

    def _relaxed(self, widths: Mapping[str, Width], skips: Sequence[str]) -> torch.Tensor:
        """The cost at widths of which some are tensors."""
        self._check_names(widths, skips)
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
        for w in widths:
            self.space.check({name: w})
        p = torch.as_tensor(probabilities, dtype=torch.float64, device=powers.device)
        if p.shape != (len(widths),):
            raise WidthError(f"'{name}': {len(widths)} widths need as many probabilities, not shape {tuple(p.shape)}")
        total, least = p.detach().sum().item(), p.detach().min().item()
        if not (abs(total - 1) <= SUM_TOLERANCE and least >= -SUM_TOLERANCE):
            raise WidthError(f"'{name}': probabilities must not be negative and sum to 1, "
                             f'but they sum to {total:g} and the least is {least:g}')
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


class Macs(Cost):
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


class Params(Cost):
    """Parameters, tied ones once; buffers are not counted."""

    def __init__(self, space: WidthSpace):
        super().__init__(space, 'params', (
            (name.rpartition('.')[0], 1, [s if a is None else a for s, a in zip(t.shape, t.axes)])
            for name, t in space.tensors.items() if t.is_param))


# -- budgets -----------------------------------------------------------------------------------------------------------------

_COSTS = {'macs': Macs, 'params': Params}
_SUFFIXES = {'': 1, 'k': 10 ** 3, 'm': 10 ** 6, 'g': 10 ** 9}
_FORMS = "a budget is written as 'macs=150M', 'macs=1.2G', 'macs=300000000', 'params=2M' or 'macs=0.5x' (of the base network)"
_NUMBER = re.compile(
    r'(?P<number>[+-]?(?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:e[+-]?[0-9]{1,2})?)(?P<suffix>[kmgx]?)')
_NOT_FINITE = re.compile(r'[+-]?(?:nan|inf|infinity)[kmgx]?')


class BudgetError(ValueError):
    """A budget that cannot be read, or that no network or every network meets."""


@dataclass(frozen=True)
class Budget:
    """A cost and its limit.

    Attributes:
        cost: What is limited.
        limit: The most it may be.
        text: How the budget was written.
    """
    cost: Cost
    limit: int
    text: str

    @classmethod
    def parse(cls, text: str, space: WidthSpace) -> 'Budget':
        """Reads a budget such as 'macs=150M', 'params=2M' or 'macs=0.5x'.

        Args:
            text: Name of a cost, '=', and a number with an optional suffix K, M, G, or x for a multiple of the base cost.
            space: The width space that it is for.

        Raises:
            BudgetError: The text is none of the forms.
        """
        shown = f'{str(text)[:60]!r}'
        name, equals, value = str(text).partition('=')
        name, value = name.strip().lower(), value.strip().lower()
        if not isinstance(text, str) or not equals or not name:
            raise BudgetError(f'{shown} is not a budget: {_FORMS}')
        if name == 'latency':
            raise BudgetError(f'{shown}: latency budgets need a latency model and are not available yet; {_FORMS}')
        if name not in _COSTS:
            raise BudgetError(f"{shown}: unknown cost '{name[:40]}'{nearest(name, _COSTS)}; known are macs (one multiply-add "
                              f'is 1) and params; {_FORMS}')
        found = _NUMBER.fullmatch(value)
        if not found and not _NOT_FINITE.fullmatch(value):
            raise BudgetError(f"{shown}: cannot read '{value[:40]}' as a limit; {_FORMS}")
        number = Fraction(found['number']) if found else Fraction(0)
        if number <= 0:
            raise BudgetError(f'{shown}: the limit must be positive and finite; {_FORMS}')
        cost = _COSTS[name](space)
        limit = math.floor(number * (cost() if found['suffix'] == 'x' else _SUFFIXES[found['suffix']]))
        if limit < 1:
            hint = '' if found['suffix'] else f" (a share of the base is '{name}={value}x')"
            raise BudgetError(f'{shown}: the limit is less than one of {cost.unit}{hint}; {_FORMS}')
        return cls(cost, limit, text.strip())

    def met(self, widths: Mapping[str, Width] = {}, skips: Sequence[str] = ()) -> bool:
        """Whether a network costs at most the limit.

        Args:
            widths: Group -> channels; groups left out are at their base.
            skips: Residual blocks to leave out.
        """
        return bool(self.cost(widths, skips) <= self.limit)

    def check_feasible(
            self,
            smallest_widths: Optional[Mapping[str, int]] = None,
            largest_widths: Optional[Mapping[str, int]] = None,
    ) -> None:
        """Checks that the budget can be met, and that it asks for something.

        Args:
            smallest_widths: The smallest network that may be chosen; by default every group at one step.
            largest_widths: The largest network that may be chosen; by default the base.

        Raises:
            BudgetError: The limit is below the cost of the smallest network or above that of the largest.
        """
        if smallest_widths is None:
            smallest_widths = {name: g.unit for name, g in self.cost.space.searchable.items()}
        low, high = self.cost(smallest_widths), self.cost({} if largest_widths is None else largest_widths)
        if not low <= self.limit <= high:
            word, size, end = ('below', 'smallest', low) if self.limit < low else ('above', 'largest', high)
            raise BudgetError(
                f"budget '{self.text}' is {self.limit:,} {self.cost.unit}, {word} the {size} network's {end:,}; for "
                f'{self.cost.space.architecture} at the widths allowed, give a limit between {low:,} and {high:,}')

    def __str__(self) -> str:
        return f'{self.text} (at most {self.limit:,} {self.cost.unit})'
