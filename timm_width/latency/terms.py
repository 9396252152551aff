"""The layers of a network as terms of its latency, and which of them share their unknowns.

Equation by equation this is the linear system of AOWS (section 4 and supplement A of "AOWS: Adaptive and Optimal Network Width
Search With Latency Constraints", CVPR 2020): the latency of a network is the sum of one unknown for each of its layers, chosen by
the widths that the layer reads and makes; layers that are alike (the same images, kernel, stride, channels) share their unknowns.

What one layer is: all convolutions, linear layers and products over the same two searched groups, because timings of whole
networks cannot tell them apart; and with them the layers before that work on one of the two alone and did not make it (a
depthwise convolution, squeeze-excite). A stem or a classifier is a term of one group.
"""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy import sparse

from ..cost import CostError
from ..factors import Factors, Grid, sum_terms
from ..space import Axis, Site, WidthSpace

__all__ = ['Term', 'Unknowns', 'find_terms', 'make_term', 'scope_of']


@dataclass(frozen=True)
class Term:
    """Layers whose latency depends on the widths of the same groups.

    Attributes:
        groups: None, one, or two groups of the grid; of two, the one that is read first.
        layers: Their names.
        kind: Equal for terms that share their unknowns.
        form: Equal for terms that differ by the size of their images alone.
        size: Positions of the images that the first layer reads.
    """
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    kind: tuple
    form: tuple
    size: int


def find_terms(space: WidthSpace, grid: Grid) -> list[Term]:
    """Groups the layers of a network into the terms of its latency.

    Args:
        space: Its width space.
        grid: Group -> widths. Layers of which no group is in the grid are one constant term.

    Raises:
        CostError: A layer depends on more than two groups of the grid.
    """
    found: dict[frozenset, list[Site]] = {}  # scope -> sites, in the order of the network
    waiting: dict[str, list[Site]] = {}  # group -> sites over it alone that the next pair takes
    made: set[str] = set()
    for site in space.sites:
        scope = scope_of(space, grid, site)
        if len(scope) > 2:
            raise CostError(f"{space.architecture}: the latency of '{site.name}' depends on {len(scope)} searched groups "
                            f"({', '.join(sorted(scope))}), and a latency model has tables over two each: keep the width of all "
                            'but two of them (--fix)')
        if len(scope) == 1 and scope <= made:
            waiting.setdefault(*scope, []).append(site)
        else:
            before = [s for group in sorted(scope) for s in waiting.pop(group, [])] if len(scope) == 2 else []
            found.setdefault(scope, []).extend([*before, site])
        made |= scope
    for group, sites in waiting.items():  # no pair follows: a classifier
        found.setdefault(frozenset([group]), []).extend(sites)
    return [make_term(space, grid, scope, sites) for scope, sites in found.items()]


def scope_of(space: WidthSpace, grid: Grid, site: Site) -> frozenset[str]:
    """The groups of the grid on which a site depends."""
    names = (space.groups[g].name for axis in site.factors if not isinstance(axis, int) for g, _ in axis)
    return frozenset(name for name in names if name in grid)


def make_term(space: WidthSpace, grid: Grid, scope: frozenset[str], sites: Sequence[Site]) -> Term:
    """The term of some layers that depend on the groups of a scope."""
    first = next((s for s in sites if scope_of(space, grid, s) == scope), sites[0])
    read = {space.groups[g].name for g, _ in first.inputs or ()}
    groups = tuple(sorted(scope, key=lambda name: (name not in read, space.index[name])))
    roles = {name: i for i, name in enumerate(groups)}

    def length(axis: int | Axis) -> tuple:
        """An axis as a fixed length, and channels for each step of each role."""
        if isinstance(axis, int):
            return (axis,)
        pieces = [(space.groups[g], r) for g, r in axis]
        fixed = sum(g.steps * r for g, r in pieces if g.name not in roles)
        return fixed, *((roles[g.name], g.unit, r) for g, r in pieces if g.name in roles)

    kind, form = [], []
    for s in sites:
        factors = tuple(length(axis) for axis in s.factors)
        per_output = Fraction(s.positions, math.prod(s.output_size))
        strides = tuple(Fraction(i, o) for i, o in zip(s.input_size, s.output_size))
        kind.append((s.kind, s.positions, s.input_size, s.output_size, factors))
        form.append((s.kind, per_output, strides, factors))
    return Term(groups, tuple(s.name for s in sites), tuple(kind), tuple(form), math.prod(sites[0].input_size))


class Unknowns:
    """The unknowns of a network's latency: one for each term and choice of its widths, shared by terms that are alike.

    Args:
        space: The width space.
        grid: Group -> widths.

    Attributes:
        grid: The grid.
        terms: The terms.
        index: For each term, the unknown of each choice of its groups' widths; an array with a dimension for each group.
        count: Number of unknowns.
        steps: (rows, unknowns) matrix of the soft monotonicity: each row has 1 and -1 at two unknowns of one form that differ in
            one width, or in the size of the images, and there are neighbours; the first should not take longer than the second.
    """

    def __init__(self, space: WidthSpace, grid: Grid):
        self.grid, self.terms = grid, find_terms(space, grid)
        number: dict[tuple, int] = {}
        self.index = []
        for term in self.terms:
            levels = [grid[name] for name in term.groups]
            shape = [len(level) for level in levels]
            at = [number.setdefault((term.kind, *(level[i] for level, i in zip(levels, place))), len(number))
                  for place in np.ndindex(*shape)]
            self.index.append(np.array(at, dtype=np.int64).reshape(shape))
        self.count = len(number)
        self.steps = self._monotone(number)

    def _monotone(self, number: Mapping[tuple, int]) -> sparse.csr_matrix:
        places = {}  # unknown -> (form, size, widths)
        about = {term.kind: term for term in self.terms}
        for (kind, *widths), i in number.items():
            places[i] = (about[kind].form, about[kind].size, *widths)
        rows = []
        for coordinate in range(1, 4):
            lines: dict[tuple, list[tuple[int, int]]] = {}  # all other coordinates -> (this one, unknown)
            for i, place in places.items():
                if coordinate < len(place):
                    lines.setdefault((*place[:coordinate], *place[coordinate + 1:]), []).append((place[coordinate], i))
            for line in lines.values():
                line.sort()
                rows += [(a, b) for (x, a), (y, b) in zip(line, line[1:]) if x < y]
        m = len(rows)
        data, at = np.tile([1., -1.], m), np.array(rows, dtype=np.int64).reshape(-1)
        return sparse.csr_matrix((data, (np.repeat(np.arange(m), 2), at)), shape=(m, self.count))

    def rows(self, configurations: Sequence[Mapping[str, int]]) -> sparse.csr_matrix:
        """How often each unknown occurs in each network: (networks, unknowns)."""
        levels = {name: {w: i for i, w in enumerate(widths)} for name, widths in self.grid.items()}
        at = {name: np.array([levels[name][c[name]] for c in configurations], dtype=np.int64) for name in self.grid}
        columns = [index[tuple(at[name] for name in term.groups)] if term.groups else np.full(len(configurations), index)
                   for term, index in zip(self.terms, self.index)]
        m, n = len(configurations), len(columns)
        places = (np.repeat(np.arange(m), n), np.stack(columns, 1).reshape(-1))
        return sparse.csr_matrix((np.ones(m * n), places), shape=(m, self.count))  # entries of one place are added

    def features(self) -> sparse.csr_matrix:
        """A basis of the unknowns that are bilinear in the widths of each kind of term: (unknowns, features), each at most 1."""
        columns: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
        for term, index in zip(self.terms, self.index):
            levels = [np.array(self.grid[name], dtype=float) for name in term.groups]
            for which in np.ndindex(*[2] * len(levels)):
                value = np.ones(index.shape)
                for i, level in enumerate(levels):
                    if which[i]:
                        value = value * level.reshape([-1 if k == i else 1 for k in range(len(levels))])
                key = (term.kind, which)
                before = columns.get(key, (np.zeros(0, dtype=np.int64), np.zeros(0)))
                columns[key] = (np.append(before[0], index.reshape(-1)), np.append(before[1], value.reshape(-1)))
        places, data, number = [], [], []
        for i, (at, value) in enumerate(columns.values()):
            at, first = np.unique(at, return_index=True)  # alike terms share unknowns
            places.append(at)
            data.append(value[first] / value.max())
            number.append(np.full(len(at), i))
        at = (np.concatenate(places), np.concatenate(number))
        return sparse.csr_matrix((np.concatenate(data), at), shape=(self.count, len(columns)))

    def factors(self, values: np.ndarray) -> Factors:
        """The terms as tables over the grid, with a value for each unknown."""
        return sum_terms(self.grid, ((term.groups, values[index]) for term, index in zip(self.terms, self.index)), 0.)
