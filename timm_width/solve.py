"""Finds the best widths of a grid under a limit on their cost, where both are sums of tables over at most two groups.

`Lagrangian` finds the multiplier of the limit by bisection, as AOWS publishes it; what it answers is optimal up to the duality gap,
which it bounds. `exact` closes the gap by integer programming, on any graph.
"""
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional, Union

import numpy as np

from .elimination import Elimination, SolveError
from .factors import Factors, Grid

__all__ = ['ROUNDING', 'Elimination', 'Lagrangian', 'Solution', 'SolveError', 'exact', 'is_whole']

BATCH_CELLS = 2 ** 23  # of all tables of one pass over several multipliers

# the bisection of AOWS: from 0 to 10, the upper end doubled until it meets the limit, then halved 12 times
FIRST, STEPS = 10., 2 ** 12
DOUBLINGS = 64
# Its resolution, FIRST / STEPS, is absolute, so it depends on the unit of the cost. The paper's is a latency, with 0.04 ms for an
# example: all costs are scaled so that their limit is that number.
LIMIT = 0.04

ROUNDING = 1e-9  # relative: how far costs of floats may be over the limit, since sums in another order differ
FEASIBILITY = 1e-6  # of HiGHS, relative to the limit: how far its answers may be over it
CUTS = 100  # answers over the limit, by rounding, that `exact` cuts off before it gives up


@dataclass(frozen=True)
class Solution:
    """What a solver answers.

    Attributes:
        widths: Group -> width.
        objective: Its objective.
        cost: Its cost: at most the limit.
        bound: No network within the limit has a lower objective; the objective itself where the answer is proved to be the best.
        gamma: The multiplier, in units of the objective per unit of cost, at which it has the least objective + gamma * cost.
    """
    widths: Mapping[str, int]
    objective: float
    cost: Union[int, float]
    bound: float
    gamma: Optional[float] = None

    @property
    def gap(self) -> float:
        """The most by which a network within the limit may be better."""
        return self.objective - self.bound


class Lagrangian:
    """Minimises an objective under a limit on a cost, by the multiplier of the limit, with the bisection that AOWS publishes.

    The minimiser of objective + gamma * cost costs the less, the larger gamma is. The upper end of the bisection, 10, is doubled
    until its minimiser meets the limit; 12 halvings follow, and the answer is the minimiser at the upper end. Costs are scaled to
    a limit of 0.04, the milliseconds of the paper's example, so that the multipliers tried do not depend on their unit.

    The order of the bisection does not matter: `batch` multipliers of its grid are evaluated at once, most of them about where the
    minimisers to both sides, or of the last problem solved, change places. The answer is that of one after the other.

    Args:
        plan: For the pairs of the cost and of the objectives.
        cost: What is limited.
        limit: The most it may be: of costs in integers to the last unit, of others to a billionth.
        batch: How many multipliers are evaluated at once.

    Raises:
        SolveError: No network meets the limit.
    """

    def __init__(self, plan: Elimination, cost: Factors, limit: Union[int, float], batch: int = 16):
        self.plan, self.limit, self.constant = plan, limit, cost.constant
        self.batch = max(min(batch, BATCH_CELLS // plan.work), 1)
        self.cost = plan.flatten(cost)
        self.room = _most(cost, limit) - cost.constant  # for what widths change
        cells = self.cost.astype(np.float64)
        least = plan.total(self.cost, plan.minimise(cells))[0]
        if least > self.room:
            raise SolveError(f'no network of the grid costs at most {limit:,}: the least is {least + cost.constant:,}')
        self.scale = LIMIT / abs(limit) if limit else 1.  # of the paper's units, per unit of cost
        self._cells = cells * self.scale
        self._last: Optional[tuple[np.ndarray, np.ndarray]] = None  # the minimisers around the last answer, and their costs
        # ..., -4, -2, -1, 0, 1, 2, 4, ...
        away = np.arange(self.batch) - self.batch // 2
        self._spread = np.sign(away) * 2 ** np.maximum(abs(away) - 1, 0)
        at = plan.unary_cells
        # copied for every multiplier: adding tables of one shape is faster than stretching one of them
        self._pairs = plan.pairwise_tables(np.repeat(self._cells[at:, None], self.batch, 1))

    def solve(self, objective: Factors) -> Solution:
        """The answer for one objective: the same whatever was solved before, but sooner where that was about the same.

        Raises:
            SolveError: No multiplier is large enough for the limit.
        """
        cells = self.plan.flatten(objective).astype(np.float64)
        if not objective.pairwise:
            cells = cells[:self.plan.unary_cells]
        high, guess = FIRST, None
        if self._last is not None:
            guess = min(self._crossing(cells, *self._last), FIRST * 2. ** DOUBLINGS)
            high *= 2. ** max(math.ceil(math.log2(max(guess, FIRST) / FIRST)), 0)
        found = self._bisect(cells, high, guess)
        if found is None or (high > FIRST and found[0] <= STEPS // 2):  # doubling ends elsewhere
            high = self._upper_end(cells)
            found = self._bisect(cells, high)
        step, states, costs = found  # of the step, and of the one before if there is one
        self._last = (states, costs) if len(costs) == 2 else None
        gammas = high / STEPS * np.array([step, step - 1]) * self.scale
        values = self.plan.total(cells, states)
        bounds = values + gammas[:len(values)] * (costs - self.room).astype(np.float64)  # by weak duality
        value, constant = values[0].item(), objective.constant
        return Solution(self.plan.widths(states[:, 0]), constant + value, self.constant + costs.tolist()[0],
                        constant + min(bounds.max().item(), value), gammas[0].item())

    def _crossing(self, cells: np.ndarray, states: np.ndarray, costs: np.ndarray) -> float:
        """The multiplier at which two networks are as good, of which the second costs more."""
        values = self.plan.total(cells, states)
        return float(values[0] - values[1]) / (float(costs[1] - costs[0]) * self.scale)

    def energies(self, objective: Factors, gamma: float) -> np.ndarray:
        """All cells of objective + gamma * cost, for the plan, with gamma as a `Solution` has it."""
        return self.plan.flatten(objective) + gamma / self.scale * self._cells

    def _at(self, cells: np.ndarray, gammas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The minimisers (groups, batch) at `batch` multipliers, ascending, and what they cost (batch,)."""
        plan = self.plan
        scaled = cells[:, None] / gammas  # energies over gamma: the cost's tables are then the same for all
        scaled += self._cells[:len(cells), None]
        unary = plan.unary_tables(scaled)
        pairs = self._pairs if len(cells) == plan.unary_cells else plan.pairwise_tables(scaled[plan.unary_cells:])
        states = plan.minimise_tables(unary, pairs)
        return states, plan.total(self.cost, states)

    def _upper_end(self, cells: np.ndarray) -> float:
        """The first of 10, 20, 40, ... whose minimiser meets the limit."""
        for start in range(0, DOUBLINGS, self.batch):
            gammas = FIRST * 2. ** np.arange(start, start + self.batch)
            met = self._at(cells, gammas)[1] <= self.room
            if met.any():
                return float(gammas[met.argmax()])
        raise SolveError(f'no multiplier of the cost up to {gammas[-1]:.3g} makes the best network meet the limit {self.limit:,}: '
                         'the objective is too large, or not finite')

    def _bisect(
            self,
            cells: np.ndarray,
            high: float,
            guess: Optional[float] = None,
    ) -> Optional[tuple[int, np.ndarray, np.ndarray]]:
        """The least of the steps 1 ... STEPS whose multiplier, high * step / STEPS, meets the limit; None if the last does not.

        Returns:
            The step; its minimiser, and that of the step before if there is one: (groups, 1 or 2); and what these cost.
        """
        low, top = 0, STEPS + 1  # the last known to be over the limit, the first known to meet it
        best, over = None, ()
        while top - low > 1:
            steps = self._between(low, top, guess and guess / high * STEPS)
            states, costs = self._at(cells, high / STEPS * steps)
            met = costs <= self.room
            first = int(met.argmax()) if met[-1] else len(steps)
            if first < len(steps):
                top, best = int(steps[first]), (states[:, first], costs[first])
            if first:
                low, over = int(steps[first - 1]), ((states[:, first - 1], costs[first - 1]),)
            guess = None
            if best is not None and over:  # if no third network is better between the two, they change places here
                guess = self._crossing(cells, np.stack((best[0], over[0][0]), 1), (best[1], over[0][1]))
        if best is None:
            return None
        states, costs = zip(best, *over)
        return top, np.stack(states, 1), np.array(costs, dtype=self.cost.dtype)

    def _between(self, low: int, top: int, guess: Optional[float]) -> np.ndarray:
        """`batch` steps between two, ascending; some several times, where there are not as many."""
        if top > STEPS and guess is None:  # the last one, too
            return low - (low - STEPS) * np.arange(1, self.batch + 1) // self.batch
        if top - low <= self.batch + 1 or guess is None:
            return low + 1 + (top - low - 1) * np.arange(self.batch) // self.batch
        around = math.ceil(min(max(guess, low + 1), top - 1)) + self._spread
        return np.minimum(np.maximum(around, low + 1), min(top - 1, STEPS))


def exact(objective: Factors, cost: Factors, limit: Union[int, float], seconds: float = 60.) -> Solution:
    """The network of least objective whose cost is at most the limit, proved to be so; on any graph.

    An integer programme over one variable per width and one per pair of widths, by HiGHS. Its answers meet the limit to 1e-6 of it;
    one that is over it is cut off, and the rest searched again.

    Args:
        objective: What to minimise, over the grid of the cost.
        cost: What is limited.
        limit: The most it may be: of costs in integers to the last unit, of others to a billionth.
        seconds: Most time to take.

    Raises:
        SolveError: No network meets the limit, or the time is over.
    """
    from scipy.optimize import LinearConstraint, milp  # takes longer to import than all else here
    from scipy.sparse import csr_array

    pairs = list(dict.fromkeys([*objective.pairwise, *cost.pairwise]))
    program = _Program(cost.grid, pairs)
    value, weight = program.cells(objective), program.cells(cost)
    room = float(limit - cost.constant)
    unit = max(np.abs(value).max(initial=0), 1e-300) / 1e4  # HiGHS stops at an absolute gap of 1e-6
    heaviest = max(abs(room), np.abs(weight).max(initial=0) * 1e-6, 1e-300)
    equal, right = program.constraints()
    cuts: list[np.ndarray] = []
    deadline = time.monotonic() + seconds
    for _ in range(CUTS):
        limits = [LinearConstraint(equal, right, right), LinearConstraint(csr_array(weight[None] / heaviest), ub=room / heaviest)]
        if cuts:
            limits.append(LinearConstraint(csr_array(np.array(cuts)), ub=len(cost.grid) - 1))
        found = milp(value / unit, integrality=program.integral, bounds=(0, 1), constraints=limits, options={
            'mip_rel_gap': 0., 'time_limit': max(deadline - time.monotonic(), 1e-3)})
        if found.status == 2:
            raise SolveError(f'no network of the grid costs at most {limit:,}')
        if found.status != 0:
            raise SolveError(f'the best network was not proved to be that within {seconds:g} s: give more time, or a grid of fewer '
                             f'widths ({found.message.strip()[:80]})')
        widths, chosen = program.widths(found.x)
        spent, best = cost(widths), objective(widths)
        if spent <= _most(cost, limit):
            return Solution(widths, best, spent, best)
        cuts.append(chosen)
    raise SolveError(f'{CUTS} networks in a row were over the limit {limit:,} by less than {FEASIBILITY:g} of it: give a lower one')


def is_whole(cost: Factors) -> bool:
    """Whether its tables hold integers, whose sums are exact."""
    return all(t.dtype.kind in 'iuO' for t in (*cost.unary.values(), *cost.pairwise.values()))


def _most(cost: Factors, limit: Union[int, float]) -> Union[int, float]:
    return limit if is_whole(cost) else limit + ROUNDING * abs(limit)


class _Program:
    """The variables of `exact`: one for every width of every group, then one for every pair of widths of every pair of groups."""

    def __init__(self, grid: Grid, pairs: Sequence[tuple[str, str]]):
        self.grid, self.pairs = grid, pairs
        sizes = [len(w) for w in grid.values()] + [len(grid[a]) * len(grid[b]) for a, b in pairs]
        self.starts = dict(zip([*grid, *pairs], np.cumsum([0, *sizes]).tolist()))
        self.count = sum(sizes)
        self.integral = np.zeros(self.count)
        self.integral[:sum(sizes[:len(grid)])] = 1  # those of pairs follow

    def cells(self, factors: Factors) -> np.ndarray:
        out = np.zeros(self.count)
        for key, table in [*factors.unary.items(), *factors.pairwise.items()]:
            out[self.starts[key]:self.starts[key] + table.size] = np.asarray(table, dtype=np.float64).reshape(-1)
        return out

    def constraints(self) -> tuple:
        """One width per group; the pairs of a width of one group sum to that width's variable."""
        from scipy.sparse import csr_array

        rows, columns, values, right = [], [], [], []

        def add(positive: np.ndarray, negative: Sequence[int], equals: int) -> None:
            rows.extend([len(right)] * (len(positive) + len(negative)))
            columns.extend([*positive, *negative])
            values.extend([1.] * len(positive) + [-1.] * len(negative))
            right.append(equals)

        for name, widths in self.grid.items():
            add(self.starts[name] + np.arange(len(widths)), [], 1)
        for a, b in self.pairs:
            table = self.starts[a, b] + np.arange(len(self.grid[a]) * len(self.grid[b])).reshape(len(self.grid[a]), -1)
            for i, row in enumerate(table):
                add(row, [self.starts[a] + i], 0)
            for j, column in enumerate(table.T):
                add(column, [self.starts[b] + j], 0)
        return csr_array((values, (rows, columns)), shape=(len(right), self.count)), np.array(right)

    def widths(self, x: np.ndarray) -> tuple[dict[str, int], np.ndarray]:
        """The widths chosen, and the row of their variables."""
        widths, row = {}, np.zeros(self.count)
        for name, levels in self.grid.items():
            k = int(x[self.starts[name]:self.starts[name] + len(levels)].argmax())
            widths[name] = levels[k]
            row[self.starts[name] + k] = 1
        return widths, row
