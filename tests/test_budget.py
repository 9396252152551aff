"""timm_width.budget: how budgets are written, met and refused."""
import numpy as np
import pytest
import torch

from timm_width.budget import Budget, BudgetError
from timm_width.cost import Macs, Params
from timm_width.factors import Factors
from timm_width.tables import Tables

from .test_cost import toy, toy_macs


@pytest.mark.parametrize('text, limit', [
    ('macs=150M', 150_000_000),
    ('macs=150m', 150_000_000),
    ('MACs = 1.2G', 1_200_000_000),
    ('macs=1.2g', 1_200_000_000),
    ('macs=300000000', 300_000_000),
    ('macs=300000000.9', 300_000_000),
    ('macs=3e8', 300_000_000),
    ('macs=1.5K', 1_500),
    ('macs=.5k', 500),
    (' macs=29.4M ', 29_400_000),
    ('macs=0.5x', toy_macs(8, 3, 2) // 2),
    ('macs=1X', toy_macs(8, 3, 2)),
    ('macs=1.5x', toy_macs(8, 3, 2) * 3 // 2),
])
def test_budgets_of_macs_parse(text, limit):
    budget = Budget.parse(text, toy())
    assert isinstance(budget.cost, Macs) and budget.limit == limit and budget.text == text.strip()
    assert type(budget.limit) is int


@pytest.mark.parametrize('text, limit', [('params=2M', 2_000_000), ('Params=0.5x', (8 * 5 * 9 + 2 * 8 + 6) // 2)])
def test_budgets_of_params_parse(text, limit):
    budget = Budget.parse(text, toy())
    assert isinstance(budget.cost, Params) and budget.limit == limit
    assert str(budget) == f'{text} (at most {limit:,} params)'


@pytest.mark.parametrize('text, message', [
    ('150M', 'is not a budget'),
    ('', 'is not a budget'),
    ('=150M', 'is not a budget'),
    (150, 'is not a budget'),
    ('macs=', "cannot read '' as a limit"),
    ('macs=abc', "cannot read 'abc' as a limit"),
    ('macs=150T', "cannot read '150t' as a limit"),
    ('macs=150MB', "cannot read '150mb' as a limit"),
    ('macs=150Mx', "cannot read '150mx' as a limit"),
    ('macs=1=2', "cannot read '1=2' as a limit"),
    ('macs=1,2M', "cannot read '1,2m' as a limit"),
    ('macs=1e999999999', 'cannot read'),
    ('macs=' + '9' * 5000, 'cannot read'),
    ('mac=150M', "unknown cost 'mac', did you mean 'macs'"),
    ('parms=2M', "unknown cost 'parms', did you mean 'params'"),
    ('flops=2M', r"unknown cost 'flops'; known are macs \(one multiply-add is 1\), params and latency"),
    ('macs=0', 'must be positive and finite'),
    ('macs=0x', 'must be positive and finite'),
    ('macs=-5M', 'must be positive and finite'),
    ('macs=nan', 'must be positive and finite'),
    ('macs=NaNx', 'must be positive and finite'),
    ('macs=inf', 'must be positive and finite'),
    ('macs=-InfinityM', 'must be positive and finite'),
    ('macs=0.5', 'less than one'),
    ('macs=1e-9x', 'less than one'),
    ('macs=5ms', "a limit of macs ends in k, m, g or x, not in 'ms'"),
])
def test_malformed_budgets_are_refused_with_the_forms(text, message):
    with pytest.raises(BudgetError, match=message) as error:
        Budget.parse(text, toy())
    assert all(form in str(error.value) for form in ('macs=150M', 'macs=1.2G', 'macs=300000000', 'params=2M', 'macs=0.5x'))


def test_a_budget_is_met_up_to_and_including_its_limit():
    space = toy()
    limit = toy_macs(4, 3, 2)
    assert Budget.parse(f'macs={limit}', space).met({'a': 4})
    assert not Budget.parse(f'macs={limit - 1}', space).met({'a': 4})
    assert Budget.parse(f'macs={limit - 1}', space).met({'a': 4}, ['b.1'])
    assert not Budget.parse(f'macs={limit}', space).met({'a': torch.tensor(4.1)})
    assert Budget.parse('macs=1x', space).met()


def test_feasible_budgets_lie_between_the_smallest_and_the_largest_network():
    space = toy()
    low, high = toy_macs(2, 1, 1), toy_macs(8, 3, 2)
    for limit in (low, high, (low + high) // 2):
        Budget.parse(f'macs={limit}', space).check_feasible()
    with pytest.raises(BudgetError, match=f"budget 'macs={low - 1}' is {low - 1:,} MACs, below the smallest network's {low:,}"
                                          f'.*between {low:,} MACs and {high:,}'):
        Budget.parse(f'macs={low - 1}', space).check_feasible()
    with pytest.raises(BudgetError, match=f"{high + 1:,} MACs, above the largest network's {high:,}"):
        Budget.parse(f'macs={high + 1}', space).check_feasible()


def test_feasibility_can_be_asked_for_other_extremes():
    space = toy()
    budget = Budget.parse(f'macs={toy_macs(12, 3, 2)}', space)
    budget.check_feasible(largest_widths={'a': 12})
    with pytest.raises(BudgetError, match='below the smallest'):
        budget.check_feasible(smallest_widths={'a': 14}, largest_widths={'a': 16})


# -- latency -----------------------------------------------------------------------------------------------------------------


def latency():
    """2 ms at the base width 8 of 'a', half of it at 4."""
    return Tables(toy(), 'ms per image', Factors({'a': (4, 8, 16)}, 0., {'a': np.array([1., 2., 4.])}))


@pytest.mark.parametrize('text, limit', [
    ('latency=1.5ms', 1.5), ('latency=1500us', 1.5), ('latency=0.0015s', 1.5), ('latency=0.5x', 1.), ('Latency = 2MS', 2.)])
def test_a_latency_budget_is_in_milliseconds(text, limit):
    budget = Budget.parse(text, toy(), latency())
    assert budget.limit == pytest.approx(limit)


def test_a_latency_budget_is_met_by_interpolated_latency():
    budget = Budget.parse('latency=1.5ms', toy(), latency())
    assert budget.met({'a': 4}) and budget.met({'a': 6}) and not budget.met({'a': 8})
    assert str(budget) == 'latency=1.5ms (at most 1.5 ms per image)'
    with pytest.raises(BudgetError, match="'latency=0.5ms' is 0.5 ms per image, below the smallest network's 1 ms per image; "
                                          'for toy at the widths allowed, give a limit between 1 ms per image and 4 ms'):
        Budget.parse('latency=0.5ms', toy(), latency()).check_feasible({'a': 4}, {'a': 16})


@pytest.mark.parametrize('text, message', [
    ('latency=5', 'say the unit'), ('latency=5M', 'ends in us, ms, s or x'), ('latency=0ms', 'must be positive')])
def test_malformed_latency_budgets_are_refused(text, message):
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text, toy(), latency())


def test_a_latency_budget_without_a_model_says_how_to_get_one():
    with pytest.raises(BudgetError, match='a latency budget needs a latency model: --latency-model FILE, or --latency-model measure'):
        Budget.parse('latency=0.5ms', toy())
