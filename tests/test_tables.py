"""timm_width.tables: a measured cost is exact on its grid, linear between, and says where nothing was measured."""
import itertools

import numpy as np
import pytest
import torch

from timm_width.factors import Factors
from timm_width.space import WidthError
from timm_width.tables import Tables

from .test_cost import toy

GRID = {'a': (2, 8, 12), 'b': (1, 3), 'c': (1, 2, 4)}


def tables(seed: int = 0) -> Tables:
    """Pairs in another order than the alphabet's, too; 'c' has no table of its own."""
    rng = np.random.default_rng(seed)
    grid = {n: GRID[n] for n in ('c', 'a', 'b')}
    shape = {n: len(w) for n, w in grid.items()}
    return Tables(toy(), 'ms per image', Factors(
        grid, 0.25, {n: rng.random(shape[n]) for n in 'ab'},
        {(x, y): rng.random((shape[x], shape[y])) for x, y in (('c', 'a'), ('a', 'b'))}))


def points(grid):
    return [dict(zip(grid, p)) for p in itertools.product(*grid.values())]


def test_on_the_grid_it_is_the_sum_of_the_entries():
    cost = tables()
    for widths in points(GRID):
        assert cost(widths) == pytest.approx(cost.tables(widths), abs=1e-12)
    assert cost() == pytest.approx(cost.tables({'a': 8, 'b': 3, 'c': 2}))  # groups left out are at their base


def test_between_two_widths_it_is_linear():
    cost = tables()
    for w in (2, 3, 4):
        middle = cost({'a': 10, 'b': 2, 'c': w})
        around = [cost({'a': a, 'b': b, 'c': w}) for a in (8, 12) for b in (1, 3)]
        assert middle == pytest.approx(np.mean(around))


def test_gradients_are_those_of_the_interpolation():
    cost = tables()
    at = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (4.5, 2.2, 3.1)]
    assert torch.autograd.gradcheck(lambda a, b, c: cost({'a': a, 'b': b, 'c': c}), at)
    assert cost({'a': torch.tensor(9.), 'b': 2}).item() == pytest.approx((3 * cost({'a': 8, 'b': 2}) + cost({'a': 12, 'b': 2})) / 4)


def test_the_expectation_is_that_of_all_combinations():
    cost, rng = tables(), np.random.default_rng(1)
    distributions = {n: (GRID[n], rng.dirichlet(np.ones(len(GRID[n])))) for n in 'ab'}
    expected = sum(p * q * cost({'a': a, 'b': b}) for (a, p), (b, q) in itertools.product(*(zip(*d) for d in distributions.values())))
    assert cost.expectation(distributions) == pytest.approx(expected)
    p = torch.tensor(distributions['a'][1], requires_grad=True)
    found = cost.expectation({**distributions, 'a': (GRID['a'], p)})
    assert found.item() == pytest.approx(expected) and torch.autograd.grad(found, p)[0].abs().sum() > 0


@pytest.mark.parametrize('grid', [GRID, {'b': (2, 3), 'a': (2, 6, 10), 'c': (3,)}, {'b': (1, 3)}, {}], ids=str)
def test_factors_on_another_grid_are_the_interpolated_cost(grid):
    cost = tables()
    factors = cost.factors(grid)
    for widths in points(grid):
        assert factors(widths) == pytest.approx(cost(widths), abs=1e-12)


@pytest.mark.parametrize('widths, message', [
    ({'a': 14}, r"toy: 'a': width 14 is outside 2..12, where nothing was measured"),
    ({'z': 1}, "unknown group 'z'"),
    ({'a': torch.tensor(13.)}, 'width 13 is outside'),
    ({'c': 5}, 'width 5 is outside 1..4|outside 1..8'),
])
def test_widths_that_were_not_measured_are_refused(widths, message):
    with pytest.raises(WidthError, match=message):
        tables()(widths)


def test_a_group_without_tables_keeps_its_base_width():
    cost = Tables(toy(), 'ms per image', Factors({'a': (2, 8)}, 0., {'a': np.array([1., 2.])}))
    assert cost({'b': 3}) == 2
    with pytest.raises(WidthError, match="'b': width 2 is not its base width 3"):
        cost({'b': 2})


def test_blocks_cannot_be_left_out():
    with pytest.raises(WidthError, match="of whole networks: 'b.1' cannot be left out"):
        tables()({}, ['b.1'])
