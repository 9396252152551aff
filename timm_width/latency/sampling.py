"""Which networks to time for a latency model, in an order in which stopping early is no loss.

Biased sampling, supplement A of AOWS: each network holds as many as can be of the unknowns that were timed least so far, so that
all are seen soon and evenly.
"""
from collections.abc import Mapping, Sequence

import numpy as np

from ..elimination import Elimination
from ..factors import Factors, Grid, random_widths
from ..space import WidthSpace
from .terms import Unknowns

__all__ = ['LEAST_SAMPLES', 'LEAST_VALID', 'biased_networks', 'networks_to_time']

VALID_EVERY = 10  # one network in so many is held out
LEAST_VALID = 5
LEAST_SAMPLES = VALID_EVERY * LEAST_VALID
MAX_VALID = 200  # as many as the authors hold out
TIE = 1e-3  # of a network's choices in all, far below one unknown: what is no matter to the bias is drawn


def networks_to_time(space: WidthSpace, grid: Grid, samples: int, seed: int = 0) -> list[tuple[str, dict[str, int]]]:
    """Networks to fit to, and among them others to validate on.

    Args:
        space: The width space.
        grid: Group -> widths.
        samples: How many networks.
        seed: Of what is drawn.

    Returns:
        (use, widths), where use is 'train' (biased, the largest and the smallest network first) or 'valid' (uniform; one in ten
        until there are 200).

    Raises:
        CostError: A layer depends on more than two groups of the grid.
        SolveError: The groups depend on one another too much.
    """
    rng = np.random.default_rng(seed)
    valid = min(samples // VALID_EVERY, MAX_VALID)
    ends = [{name: widths[i] for name, widths in grid.items()} for i in (-1, 0)]
    train = iter(biased_networks(Unknowns(space, grid), samples - valid, seed, ends))
    uses = ['valid' if (i + 1) % VALID_EVERY == 0 and i < VALID_EVERY * valid else 'train' for i in range(samples)]
    return [(use, next(train) if use == 'train' else random_widths(grid, rng)) for use in uses]


def biased_networks(unknowns: Unknowns, count: int, seed: int = 0, first: Sequence[Mapping[str, int]] = ()) -> list[dict[str, int]]:
    """Draws networks one after another, each the minimiser of equation A.2.

    Args:
        unknowns: Those of the latency.
        count: How many networks.
        seed: Of how ties are broken.
        first: Networks to begin with.
    """
    rng, grid = np.random.default_rng([seed, 1]), unknowns.grid
    seen = np.zeros(unknowns.count, dtype=np.int64)  # N
    found = [dict(widths) for widths in first[:count]]
    if found:
        seen += unknowns.rows(found).sum(0).A1.astype(np.int64)
    plan = Elimination(grid, unknowns.factors(np.zeros(unknowns.count)).pairwise)
    while len(found) < count:
        energy = -(seen == seen.min()).astype(np.float64)  # M = min N (A.1); -[N = M] (A.2)
        tables = unknowns.factors(energy)
        noise = {name: rng.random(len(widths)) * TIE / len(grid) for name, widths in grid.items()}
        unary = {name: tables.unary.get(name, 0) + noise[name] for name in grid}
        state = plan.minimise(plan.flatten(Factors(grid, 0., unary, tables.pairwise)))
        found.append(plan.widths(state[:, 0]))
        seen += unknowns.rows(found[-1:]).sum(0).A1.astype(np.int64)
    return found
