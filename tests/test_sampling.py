"""timm_width.latency.sampling: equation A.2 of AOWS, and an order in which stopping early is no loss."""
import itertools

import numpy as np
import pytest

from timm_width.latency.sampling import biased_networks, networks_to_time
from timm_width.latency.terms import Unknowns

from .test_terms import problem


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet'])
def test_every_network_holds_as_many_as_can_be_of_what_was_seen_least(name):
    """By enumeration of a small grid."""
    space, grid = problem(name, '0.5,1')
    grid = dict(list(grid.items())[:7])
    unknowns = Unknowns(space, grid)
    everything = [dict(zip(grid, point)) for point in itertools.product(*grid.values())]
    rows = unknowns.rows(everything).toarray()
    seen = np.zeros(unknowns.count)
    for widths in biased_networks(unknowns, 12, seed=1):
        least = seen == seen.min()
        assert rows[everything.index(widths)] @ least == (rows @ least).max()
        seen += rows[everything.index(widths)]


def test_all_unknowns_are_seen_soon():
    """In MobileNet-v1's 1,612, one layer's table has 196 unknowns, so that is the least number of networks."""
    unknowns = Unknowns(*problem('mobilenetv1_100'))
    networks = biased_networks(unknowns, 210)
    assert (unknowns.rows(networks).sum(0) > 0).all()
    uniform = [{n: int(w[i]) for (n, w), i in zip(unknowns.grid.items(), row)}
               for row in np.random.default_rng(0).integers(6, size=(210, len(unknowns.grid)))]
    assert (unknowns.rows(uniform).sum(0) == 0).any()


def test_networks_are_seeded_and_those_held_out_come_evenly():
    space, grid = problem('mobilenetv2_035', '0.5,0.75,1')
    found = networks_to_time(space, grid, 60, seed=3)
    assert found == networks_to_time(space, grid, 60, seed=3) and found != networks_to_time(space, grid, 60, seed=4)
    assert [use for use, _ in found] == (['train'] * 9 + ['valid']) * 6
    assert found[0][1] == {n: w[-1] for n, w in grid.items()} and found[1][1] == {n: w[0] for n, w in grid.items()}
    for _, widths in found:
        assert list(widths) == list(grid) and all(w in grid[n] for n, w in widths.items())
    many = [use for use, _ in networks_to_time(space, {n: w[:2] for n, w in list(grid.items())[:3]}, 2200)]
    assert many.count('valid') == 200 and 'valid' not in many[2000:]


@pytest.mark.parametrize('samples', [1, 2, 9, 10, 11])
def test_few_samples_are_as_many_as_asked_for(samples):
    space, grid = problem('test_resnet', '0.5,1')
    assert len(networks_to_time(space, grid, samples)) == samples
