"""Costs and searches held against a table of true answers (../shared/oracle); see benchmarks/oracle.py, which trains a supernet."""
import json

import numpy as np
import pytest
import scipy.stats

from timm_width.budget import Budget
from timm_width.cost import Macs, Params
from timm_width.policies import load
from timm_width.policies.base import Score

from .benchmarks import oracle as bench

needs_table = pytest.mark.skipif(not bench.FILE.is_file(), reason=f'the table of true answers is missing: {bench.FILE}')


@pytest.fixture(scope='module')
def oracle():
    return bench.Oracle.open()


@pytest.fixture(scope='module')
def budgets(oracle):
    return [Budget.parse(text, oracle.space) for text in bench.BUDGETS]


def regrets(oracle, budgets, name, evaluate, seed=0, **options):
    """By how much the best network of each budget beats what a policy finds, in percent."""
    policy = load(name)
    found = policy(oracle.space, budgets, oracle.grid, policy.Options(**options), seed).choose(evaluate)
    assert len(found) == len(budgets)
    for choice, budget in zip(found, budgets):
        assert budget.met(*choice) and oracle.table[oracle.key(choice.widths)][1] <= budget.limit
    return [oracle.top1(oracle.best(b)) - oracle.top1(c.widths) for b, c in zip(budgets, found)]


# -- the network is the table's --------------------------------------------------------------------------------------------


@needs_table
def test_the_groups_are_the_positions_of_the_table(oracle):
    assert tuple(oracle.space.searchable) == bench.POSITIONS
    assert [oracle.space[name].size for name in bench.POSITIONS] == [128, 768, 768, 768, 256, 1536, 1024]
    assert list(oracle.space.frozen) == ['classifier']
    assert oracle.grid['conv_stem'] == (32, 64, 96, 128) and oracle.grid['blocks.1.1.conv_pw'] == (384, 768, 1152, 1536)


@needs_table
def test_costs_of_all_networks_are_those_of_the_table(oracle):
    macs, params = Macs(oracle.space), Params(oracle.space)
    assert (macs(), params()) == (211_281_920, 1_804_170)
    keys = [f'{level}' * 7 for level in range(1, 5)]
    keys += np.random.default_rng(0).choice(sorted(oracle.table), 1000, replace=False).tolist()
    for key in keys:
        widths = oracle.widths(key)
        assert oracle.key(widths) == key
        assert [macs(widths), params(widths)] == oracle.table[key][1:], key


@needs_table
def test_the_best_of_the_table(oracle):
    assert len(oracle.table) == 4 ** 7
    half = oracle.best(Budget.parse('macs=0.5x', oracle.space))
    assert (oracle.key(half), round(oracle.top1(half), 3)) == ('2344241', 91.713)
    whole = oracle.best(Budget.parse('macs=1x', oracle.space))
    assert (oracle.key(whole), round(oracle.top1(whole), 3)) == ('4444342', 91.887)


@needs_table
def test_widths_off_the_grid_are_not_in_the_table(oracle):
    with pytest.raises(ValueError, match='not in the table'):
        oracle.key({'conv_stem': 48})


# -- policies that are told the truth --------------------------------------------------------------------------------------
# In percent of top-1; one training of one network has a standard deviation of 0.153.


@needs_table
def test_uniform(oracle, budgets):
    # on this grid the uniform network of 25 % is 1111111, with 6.8 %: 2222222 has 25.7 %
    assert regrets(oracle, budgets, 'uniform', None) == pytest.approx([1.937, 0.890, 0.523], abs=1e-3)


@needs_table
def test_autoslim_slims_greedily(oracle, budgets):
    policy = load('autoslim')(oracle.space, budgets, oracle.grid)
    for budget, choice in zip(budgets, policy.choose(bench.Truth(oracle))):
        key = '4444444'  # the same by hand
        while oracle.table[key][1] > budget.limit:
            slimmer = [f'{key[:i]}{int(key[i]) - 1}{key[i + 1:]}' for i in range(7) if key[i] > '1']
            key = max(slimmer, key=lambda k: oracle.table[k][0])
        assert oracle.key(choice.widths) == key


@needs_table
def test_autoslim_comes_near_the_best(oracle, budgets):
    asked = []

    class Asked(bench.Truth):
        def __call__(self, widths, skips=(), batches=None, statistics='batch'):
            asked.append(oracle.key(widths))
            return super().__call__(widths)

    found = regrets(oracle, budgets, 'autoslim', Asked(oracle))
    assert found == pytest.approx([0.173, 0.473, 0.197], abs=1e-3)
    assert all(a < b / 1.5 for a, b in zip(found, regrets(oracle, budgets, 'uniform', None)))
    assert len(asked) <= 7 * 21  # greedy: at most 7 candidates for each of at most 21 steps, of 16,384 networks


@needs_table
def test_autoslim_follows_the_scores(oracle, budgets):
    class Upside(bench.Truth):
        def alone(self, widths, skips=()):
            return Score(-super().alone(widths).top1, 0.)

    told_wrong = regrets(oracle, budgets, 'autoslim', Upside(oracle))
    assert told_wrong == pytest.approx([1.443, 0.830, 0.507], abs=1e-3)  # told the truth: 0.173, 0.473, 0.197


@needs_table
@pytest.mark.parametrize('noise', [0., bench.NOISE])
def test_random_finds_what_20_trainings_can(oracle, budgets, noise):
    found = [regrets(oracle, budgets, 'random', bench.Truth(oracle, noise, seed), seed) for seed in range(10)]
    uniform = regrets(oracle, budgets, 'uniform', None)
    assert np.all(np.max(found, axis=0) <= uniform)
    assert np.all(np.mean(found, axis=0) < 0.4), np.mean(found, axis=0)
    few = [regrets(oracle, budgets, 'random', bench.Truth(oracle, noise, seed), seed, samples=3) for seed in range(10)]
    assert np.all(np.mean(found, axis=0) < np.mean(few, axis=0))


@needs_table
def test_random_is_the_best_of_its_samples(oracle, budgets):
    policy = load('random')(oracle.space, budgets, oracle.grid, seed=3)
    truth = bench.Truth(oracle, bench.NOISE)
    for budget, choice in zip(budgets, policy.choose(truth)):
        samples = policy.samples(budget)
        assert len(samples) == len({oracle.key(w) for w in samples}) == 20
        assert truth.alone(choice.widths).top1 == max(truth.alone(w).top1 for w in samples)


@needs_table
def test_noise_has_the_size_said_and_stays(oracle):
    nets = bench.draw(oracle, 500, 0)
    assert len({oracle.key(w) for w in nets}) == 500
    errors = [bench.Truth(oracle, bench.NOISE, 1).alone(w).top1 - oracle.top1(w) for w in nets]
    assert np.std(errors) == pytest.approx(bench.NOISE, rel=0.1) and abs(np.mean(errors)) < 0.03
    assert errors == [bench.Truth(oracle, bench.NOISE, 1).alone(w).top1 - oracle.top1(w) for w in nets]


# -- rank correlation ------------------------------------------------------------------------------------------------------


def test_kendall_by_hand():
    # pairs of (1, 2, 3, 4) and (1, 3, 2, 4): 5 agree, 1 does not
    assert bench.kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert bench.kendall([1, 2, 3], [6, 5, 4]) == -1
    # one pair is tied in x, so 5 count there and 6 in y: 5 agree
    assert bench.kendall([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / 30 ** 0.5)
    assert np.isnan(bench.kendall([1, 1], [1, 2]))
    assert bench.kendall([1, 2, 3, 4], [1, 3, 2, 4], np.array([[0, 1], [1, 2]])) == 0


def test_kendall_is_scipys():
    rng = np.random.default_rng(0)
    for high in (5, 1000):
        x, y = rng.integers(high, size=(2, 60))
        assert bench.kendall(x, y) == pytest.approx(scipy.stats.kendalltau(x, y).statistic)


def test_band_by_hand():
    # 100 and 103 are within 3 % of each other, 103 and 106.1 are not (3 % of 103 is 3.09); equal costs are
    assert bench.in_band([100, 103, 106.1, 200, 200], 0.03).T.tolist() == [[0, 1], [3, 4]]


def test_spread_shrinks_with_more_networks():
    rng, spreads = np.random.default_rng(0), []
    for n in (20, 200):
        x = rng.standard_normal(n)
        y = x + rng.standard_normal(n)
        spreads.append(bench.spread(x, y, lambda drawn: np.stack(np.triu_indices(len(drawn), 1))))
    assert 0.07 < spreads[0] < 0.25 and spreads[1] < spreads[0] / 2


def test_effects_by_hand():
    keys = [f'{a}{b}' for a in range(1, 5) for b in range(1, 5)]
    y = np.array([3 * int(k[0]) - int(k[1]) for k in keys])
    assert bench.effects(keys, y) == pytest.approx([3 / y.std(), -1 / y.std()])


@needs_table
def test_correlations_of_the_truth_and_of_macs(oracle):
    nets = bench.draw(oracle, 200, 42)
    rows = {r['predictor']: r for r in bench.correlations(oracle, nets, [bench.Truth(oracle).alone(w) for w in nets], 0)}
    assert rows['supernet, accuracy']['all'] == rows['supernet, loss']['band'] == pytest.approx(1)
    assert rows['MACs']['all_pairs'] == 199 * 100
    macs, truth = ([oracle.table[oracle.key(w)][i] for w in nets] for i in (1, 0))
    assert rows['MACs']['all'] == pytest.approx(scipy.stats.kendalltau(macs, truth).statistic)
    assert abs(rows['MACs']['band']) < 0.15 < 0.4 < rows['MACs']['all']  # within a band MACs say next to nothing
    json.dumps(list(rows.values()))
