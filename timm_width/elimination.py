"""Variable elimination: minima, log-partition functions, marginals and samples of sums of tables over at most two groups.

Groups are the nodes of a graph and pairwise tables its edges. One node after another is removed, which takes time and memory
that grow exponentially only with the treewidth of the graph: 1 for a chain, where this is the Viterbi algorithm and the
forward-backward algorithm, and a few for residual networks.
"""
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Optional, Union

import numpy as np

from .factors import Factors, Grid

__all__ = ['Elimination', 'SolveError', 'draw']

MAX_CELLS = 2 ** 22  # of one table: 32 MiB of float64

Index = tuple[Union[slice, None], ...]
_ALL = slice(None)


class SolveError(ValueError):
    """A problem that cannot be solved: no answer meets the limit, its graph is too dense, or it takes too long."""


@dataclass(frozen=True)
class _Bucket:
    """One step of an elimination: all tables with a group, summed, of which that group is then removed.

    Attributes:
        group: Its number.
        rest: The others in these tables, in the order in which they go.
        low: Messages over the group alone, as numbers of the buckets that sent them.
        pairs, messages: (number of the table or bucket, index that gives it the axes of the sum, or None if it has them).
        expand: That index for a table over the group alone.
        parent: Bucket to which the message goes, or None.
        drop: Axes of the parent's sum that are not in `rest`.
    """
    group: int
    rest: tuple[int, ...]
    low: tuple[int, ...]
    pairs: tuple[tuple[int, Optional[Index]], ...]
    messages: tuple[tuple[int, Optional[Index]], ...]
    expand: Optional[Index]
    parent: Optional[int]
    drop: tuple[int, ...]


class Elimination:
    """The order in which the groups of a graph are removed, planned once and run on any tables.

    Tables are given as energies: one vector of all cells (see `flatten`), or a matrix (cells, batch) of several such vectors,
    which are worked on at once. A network has the sum of its energies; its probability is exp(-sum) over that of all networks.

    Args:
        grid: Group -> its widths.
        pairs: The pairs of groups that tables may have, in the order of the grid.
        max_cells: Most cells of one table.

    Attributes:
        grid: The grid.
        names: Its groups; rows of states are in this order.
        cells: Number of cells of all tables given; unary_cells, of the unary ones, which come first.
        work: Number of cells of all tables made.

    Raises:
        SolveError: A table would have more cells: the treewidth of the graph is too large.
    """

    def __init__(self, grid: Grid, pairs: Iterable[tuple[str, str]], max_cells: int = MAX_CELLS):
        self.grid, self.names = grid, tuple(grid)
        self._sizes = [len(grid[name]) for name in self.names]
        number = {name: i for i, name in enumerate(self.names)}
        edges = {tuple(sorted((number[a], number[b]))) for a, b in pairs}
        scopes = self._order(edges, max_cells)
        self.work = sum(math.prod(self._sizes[i] for i in scope) for scope in scopes)
        place = {scope[0]: k for k, scope in enumerate(scopes)}
        # of every pair, the one that goes first is the table's first axis
        self._edges = sorted((tuple(sorted(edge, key=place.get)) for edge in edges), key=lambda e: (place[e[0]], place[e[1]]))
        self._pair_number = {edge: k for k, edge in enumerate(self._edges)}
        starts = np.cumsum([0, *self._sizes, *(self._sizes[a] * self._sizes[b] for a, b in self._edges)])
        self._starts, self.cells, self.unary_cells = starts.tolist(), int(starts[-1]), int(starts[len(grid)])
        self._buckets = [self._bucket(k, scopes, place) for k in range(len(scopes))]
        self._unary_starts, self._pair_starts = np.split(starts[:-1, None], [len(grid)])
        self._first, self._second = (np.array([edge[i] for edge in self._edges], dtype=np.int64) for i in (0, 1))
        self._strides = np.array(self._sizes, dtype=np.int64)[self._second][:, None]

    def _order(self, edges: Iterable[tuple[int, int]], max_cells: int) -> list[tuple[int, ...]]:
        """Removes the group with the smallest table first; returns the scopes of the tables, sorted as they go."""
        beside = {i: set() for i in range(len(self.names))}
        for a, b in edges:
            beside[a].add(b)
            beside[b].add(a)
        made = []
        while beside:
            def cells(i: int) -> int:
                return self._sizes[i] * math.prod(self._sizes[j] for j in beside[i])

            i = min(beside, key=cells)
            if cells(i) > max_cells:
                raise SolveError(
                    f"too many groups depend on one another: to eliminate '{self.names[i]}' takes a table over "
                    f'{len(beside[i]) + 1} groups of {cells(i):.3g} cells, and {max_cells:.3g} is the most; give a grid of fewer '
                    'widths (--grid), or fix groups (--fix)')
            near = beside.pop(i)
            for j in near:
                beside[j] |= near
                beside[j] -= {i, j}
            made.append((i, near))
        place = {i: k for k, (i, _) in enumerate(made)}
        return [(i, *sorted(near, key=place.get)) for i, near in made]

    def _bucket(self, k: int, scopes: Sequence[tuple[int, ...]], place: Mapping[int, int]) -> _Bucket:
        def index(axes: Sequence[int]) -> Optional[Index]:
            return None if len(axes) == len(scopes[k]) else tuple(slice(None) if i in axes else None for i in scopes[k])

        group, *rest = scopes[k]
        senders = [m for m in range(k) if len(scopes[m]) > 1 and scopes[m][1] == group]
        parent = place[rest[0]] if rest else None
        return _Bucket(
            group, tuple(rest), tuple(m for m in senders if len(scopes[m]) == 2),
            tuple((p, index(edge)) for p, edge in enumerate(self._edges) if edge[0] == group),
            tuple((m, index(scopes[m][1:])) for m in senders if len(scopes[m]) > 2), index((group,)), parent,
            tuple(axis for axis, i in enumerate(scopes[parent]) if i not in rest) if rest else ())

    # -- tables ------------------------------------------------------------------------------------------------

    def flatten(self, factors: Factors) -> np.ndarray:
        """All cells of tables, without their constant, as a vector; of the dtype of the tables.

        Raises:
            ValueError: They have a pair that was not planned for.
        """
        tables = [*factors.unary.values(), *factors.pairwise.values()]
        out = np.zeros(self.cells, dtype=np.result_type(*tables) if tables else np.float64)
        number = {name: i for i, name in enumerate(self.names)}
        for name, table in factors.unary.items():
            i = number[name]
            out[self._starts[i]:self._starts[i + 1]] = table
        for (a, b), table in factors.pairwise.items():
            edge = number[a], number[b]
            k = self._pair_number.get(edge)
            if k is None:
                k, table = self._pair_number.get(edge[::-1]), table.T
            if k is None:
                raise ValueError(f"no table of '{a}' and '{b}' was planned for")
            k += len(self.names)
            out[self._starts[k]:self._starts[k + 1]] = table.reshape(-1)
        return out

    def total(self, cells: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Sums of a vector of cells (all, or the unary ones alone) at states (groups, batch), exact where they are integers."""
        total = cells[self._unary_starts + states].sum(0)
        if len(cells) > self.unary_cells:
            total = total + cells[self._pair_starts + states[self._first] * self._strides + states[self._second]].sum(0)
        return total

    def widths(self, states: np.ndarray) -> dict[str, int]:
        """The widths of one column of states."""
        return {name: self.grid[name][k] for name, k in zip(self.names, states.tolist())}

    def unary_tables(self, cells: np.ndarray) -> list[np.ndarray]:
        """Views of unary cells (cells, batch): for each group (widths, batch)."""
        return [cells[start:end] for start, end in zip(self._starts, self._starts[1:len(self.names) + 1])]

    def pairwise_tables(self, cells: np.ndarray) -> list[np.ndarray]:
        """Views of pairwise cells (cells, batch): for each pair (widths, widths, batch)."""
        starts = [start - self.unary_cells for start in self._starts[len(self.names):]]
        return [cells[start:end].reshape(self._sizes[a], self._sizes[b], -1)
                for start, end, (a, b) in zip(starts, starts[1:], self._edges)]

    def _tables(self, energies: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        energies = energies if energies.ndim == 2 else energies[:, None]
        return self.unary_tables(energies[:self.unary_cells]), self.pairwise_tables(energies[self.unary_cells:])

    # -- passes ------------------------------------------------------------------------------------------------

    @staticmethod
    def _sum(bucket: _Bucket, unary: Sequence[np.ndarray], pairs: Sequence[np.ndarray], sent: Sequence[np.ndarray]) -> np.ndarray:
        """The sum of a bucket's tables: (widths of the group, those of the rest ..., batch)."""
        out = unary[bucket.group]
        for m in bucket.low:
            out = out + sent[m]
        if bucket.expand is not None:
            out = out[bucket.expand]
        for p, index in bucket.pairs:
            out = out + (pairs[p] if index is None else pairs[p][index])
        for m, index in bucket.messages:
            out = out + (sent[m] if index is None else sent[m][index])
        return out

    def minimise(self, energies: np.ndarray) -> np.ndarray:
        """The states (groups, batch) of least energy; of equal ones, always the same."""
        return self.minimise_tables(*self._tables(energies))

    def minimise_tables(self, unary: Sequence[np.ndarray], pairs: Sequence[np.ndarray]) -> np.ndarray:
        """The same, of tables as `unary_tables` and `pairwise_tables` give them."""
        sums, sent = [], []
        for bucket in self._buckets:
            table = self._sum(bucket, unary, pairs, sent)
            sums.append(table)
            sent.append(np.minimum.reduce(table, 0) if bucket.rest else None)
        states: list[np.ndarray] = [np.empty(0)] * len(self.names)
        columns = np.arange(unary[0].shape[-1])
        for bucket in reversed(self._buckets):
            table = sums.pop()
            if bucket.rest:
                table = table[(_ALL, *[states[i] for i in bucket.rest], columns)]
            states[bucket.group] = table.argmin(0)
        return np.array(states)

    def _conditionals(self, energies: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """For every bucket, the probabilities of its group given the rest; and the log-partition function (batch,)."""
        unary, pairs = self._tables(np.asarray(energies, dtype=np.float64))
        found, sent, logarithm = [], [], 0.
        for bucket in self._buckets:
            table = self._sum(bucket, unary, pairs, sent)
            least = np.minimum.reduce(table, 0)
            table = np.exp(least - table)
            total = np.add.reduce(table, 0)
            table /= total
            found.append(table)
            sent.append(least - np.log(total))
            if not bucket.rest:
                logarithm = logarithm - sent[-1]
        return found, logarithm

    def log_partition(self, energies: np.ndarray) -> np.ndarray:
        """The logarithm of the sum of exp(-energy) over all networks: (batch,)."""
        return self._conditionals(energies)[1]

    def marginals(self, energies: np.ndarray) -> list[np.ndarray]:
        """The probability of every width of every group: for each group, (widths, batch)."""
        conditionals, _ = self._conditionals(energies)
        joint: list[Optional[np.ndarray]] = [None] * len(self._buckets)
        found: list[np.ndarray] = [np.empty(0)] * len(self.names)
        for k in reversed(range(len(self._buckets))):
            bucket, table = self._buckets[k], conditionals[k]
            if bucket.rest:
                table = table * joint[bucket.parent].sum(bucket.drop)
            joint[k] = table
            found[bucket.group] = table.sum(tuple(range(1, 1 + len(bucket.rest)))) if bucket.rest else table
        return found

    def sample(self, energies: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draws networks by their joint probability.

        Args:
            energies: One vector of cells.
            rng: Draws one number per group and network.
            count: How many.

        Returns:
            States (groups, count).
        """
        conditionals, _ = self._conditionals(energies)
        states = np.empty((len(self.names), count), dtype=np.int64)
        for bucket, table in zip(reversed(self._buckets), reversed(conditionals)):
            table = table[(slice(None), *[states[i] for i in bucket.rest], 0)]
            states[bucket.group] = draw(table.reshape(len(table), -1), rng.random(count))
        return states


def draw(probabilities: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Where numbers from [0, 1) fall among probabilities (outcomes, 1 or count): (count,)."""
    upto = probabilities.cumsum(0)
    return (upto <= at * upto[-1]).sum(0)
