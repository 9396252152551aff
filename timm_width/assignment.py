"""Locally free assignments: which channels of a shared network a width may be made of, beside the first ones.

Section 3.1 of "Locally free weight sharing for network width search" (CafeNet, Su et al., ICLR 2021), in units of the bins of a
grid: bin i of a group holds its channels from width i - 1 to width i of the grid.
"""
import itertools
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Optional

import numpy as np

__all__ = ['assignments', 'channels', 'sharing_degree']


@lru_cache(maxsize=4096)
def assignments(c: int, n: int, r: int) -> tuple[tuple[int, ...], ...]:
    """All I(c), eq. 5: the bins 1 to c - r - 1, and r + 1 free ones of the zone from c - r to c + r.

    At the edges the zone is clipped to 1 to n, and there are at most c bins to choose: c = 1 of Figure 1 has two assignments, and
    c = n one.

    Args:
        c: Number of bins kept, from 1 to n.
        n: Number of bins.
        r: The offset.

    Returns:
        Ascending bins, counted from 1, of each assignment; the fixed pattern 1 to c comes first.
    """
    base = tuple(range(1, max(c - r - 1, 0) + 1))
    zone = range(max(c - r, 1), min(c + r, n) + 1)
    return tuple(base + free for free in itertools.combinations(zone, min(r + 1, c)))


def sharing_degree(a: Collection[int], b: Collection[int]) -> float:
    """Weight sharing degree of two assignments, eq. 4: their overlap as a share of the smaller one."""
    return len({*a} & {*b}) / min(len(a), len(b))


def channels(bins: Sequence[int], ends: Sequence[int]) -> Optional[np.ndarray]:
    """The steps (ids) that an assignment keeps; as many as its width has, also where bins are not of one size.

    Those of the bins kept, in ascending order, up to the width; where these are fewer, the first of the bins left out below the
    last one kept complete it.

    Args:
        bins: Ascending bins, counted from 1.
        ends: Steps up to the end of each bin, ascending.

    Returns:
        Ascending indices; None for the fixed pattern, the first ones.
    """
    c = len(bins)
    if bins[-1] == c:
        return None
    starts = [0, *ends]
    order = [*bins, *sorted({*range(1, bins[-1])} - {*bins})]
    taken = np.concatenate([np.arange(starts[i - 1], starts[i]) for i in order])
    return np.sort(taken[:ends[c - 1]])
