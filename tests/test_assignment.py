"""Locally free assignments: the counts and the figure of the paper, and what every assignment keeps."""
import math

import numpy as np
import pytest

from timm_width.assignment import assignments, channels, sharing_degree


@pytest.mark.parametrize('n, r, count', [(6, 1, 15), (10, 1, 27), (20, 1, 57), (6, 2, 34), (10, 2, 74), (20, 2, 174)])
def test_counts(n, r, count):
    """facts/ALGORITHMS.md 8E; at most C(2r + 1, r + 1) for each width."""
    found = [len(assignments(c, n, r)) for c in range(1, n + 1)]
    assert sum(found) == count <= n * math.comb(2 * r + 1, r + 1)
    assert max(found) == math.comb(2 * r + 1, r + 1)


def test_figure_1():
    """Six channels, r = 1."""
    table = {1: [(1,), (2,)],
             2: [(1, 2), (1, 3), (2, 3)],
             3: [(1, 2, 3), (1, 2, 4), (1, 3, 4)],
             4: [(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 4, 5)],
             5: [(1, 2, 3, 4, 5), (1, 2, 3, 4, 6), (1, 2, 3, 5, 6)],
             6: [(1, 2, 3, 4, 5, 6)]}
    assert {c: list(assignments(c, 6, 1)) for c in range(1, 7)} == table


@pytest.mark.parametrize('r', range(4))
@pytest.mark.parametrize('n', [1, 2, 5, 9])
def test_an_assignment_has_its_base_and_free_bins_of_its_zone(n, r):
    for c in range(1, n + 1):
        found = assignments(c, n, r)
        assert found[0] == tuple(range(1, c + 1)) and len(set(found)) == len(found)
        low, high = max(c - r, 1), min(c + r, n)  # of the zone
        assert len(found) == math.comb(high - low + 1, min(r + 1, c)) and (len(found) == 1) == (r == 0 or c == n)
        for bins in found:
            base = max(c - r - 1, 0)
            assert len(bins) == c and bins[:base] == tuple(range(1, base + 1))
            assert all(max(c - r, 1) <= b <= min(c + r, n) for b in bins[base:])


def test_sharing_degree_is_one_for_the_fixed_pattern_and_bounded_below_by_the_base():
    """Theorem 1; and c_b / c <= d <= 1 for r = 1 and c < c~."""
    assert sharing_degree((1, 2), (2, 3, 4)) == 0.5
    for r in range(4):
        degrees = {}
        for c in range(1, 10):
            for wider in range(c + 1, 11):
                all_ = [sharing_degree(a, b) for a in assignments(c, 10, r) for b in assignments(wider, 10, r)]
                assert max(c - r - 1, 0) / c <= min(all_) and max(all_) <= 1
                degrees[c, wider] = min(all_)
        assert (min(degrees.values()) == 1) == (r == 0)
        if r == 1:  # the bound is met
            assert degrees[5, 6] == 4 / 5 and degrees[1, 2] == 0


@pytest.mark.parametrize('ends', [(2, 4, 6, 8, 10), (2, 4, 6, 8, 13), (5, 6, 7, 8, 9), (3, 4, 9, 10, 16)])
def test_as_many_channels_as_the_width_has_whatever_the_sizes_of_the_bins(ends):
    n = len(ends)
    for r in range(4):
        for c in range(1, n + 1):
            seen = set()
            for bins in assignments(c, n, r):
                kept = channels(bins, ends)
                assert (kept is None) == (bins == tuple(range(1, c + 1)))
                kept = np.arange(ends[c - 1]) if kept is None else kept
                assert len(kept) == ends[c - 1] and (np.diff(kept) > 0).all() and kept[-1] < ends[-1]
                seen.add(kept.tobytes())
            if len(set(np.diff((0, *ends))[:-1])) == 1:  # but for the last one, of one size
                assert len(seen) == len(assignments(c, n, r))


def test_channels_of_even_bins_are_those_of_the_bins():
    assert channels((1, 3), (2, 4, 6)).tolist() == [0, 1, 4, 5]
    assert channels((2,), (2, 4, 6)).tolist() == [2, 3]
    assert channels((1, 3), (2, 4, 9)).tolist() == [0, 1, 4, 5]  # of the last bin, as many as make 4
    assert channels((2,), (3, 4)).tolist() == [0, 1, 3]  # the first bin completes it
