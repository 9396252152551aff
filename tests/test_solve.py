"""Minima, partition functions, marginals, samples and answers under a limit, held against the enumeration of all networks."""
import itertools
import math
import time

import numpy as np
import pytest
import scipy.stats
import timm

import timm_width
from timm_width.cost import Macs
from timm_width.elimination import Elimination, SolveError
from timm_width.factors import Factors
from timm_width.grids import make_grid
from timm_width.solve import FIRST, LIMIT, STEPS, Lagrangian, exact
from timm_width.trace import meta_copy

GRAPHS = {  # a pair: two groups whose widths meet in one layer
    'one group': [[3], []],
    'no pair': [[3, 2], []],
    'chain': [[3, 2, 4, 3, 2], [(0, 1), (1, 2), (2, 3), (3, 4)]],
    'two chains': [[3, 2, 3, 2], [(0, 1), (2, 3)]],
    # a stream that two blocks read and add to, each with widths of its own, then a head
    'residual': [[3, 3, 2, 3, 3, 2], [(0, 1), (1, 2), (0, 2), (0, 3), (3, 4), (0, 4), (0, 5)]],
    'cycle': [[2, 3, 3, 2, 3], [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)]],
    'all with all': [[2, 3, 2, 3], list(itertools.combinations(range(4), 2))],
}
SEEDS = range(4)  # the odd ones have an objective with a pair


def grid_of(sizes):
    return {f'g{i}': tuple(range(8, 8 * n + 1, 8)) for i, n in enumerate(sizes)}


def problem(name, seed, whole=True):
    """A random objective, that falls with widths, and a random cost, that grows with them."""
    sizes, edges = GRAPHS[name]
    grid, rng = grid_of(sizes), np.random.default_rng([seed, len(sizes), len(edges)])
    pairs = [(f'g{a}', f'g{b}') for a, b in edges]

    def cost(*shape):
        table = rng.integers(1, 20, shape) * math.prod(shape)
        for axis in range(len(shape)):
            table = table.cumsum(axis)
        return table if whole else table * 1e-3

    objective = Factors(grid, 0.5, {g: np.sort(rng.exponential(0.05, len(w)))[::-1] for g, w in grid.items()},
                        {pairs[0]: rng.normal(0, 0.01, [sizes[i] for i in edges[0]])} if seed % 2 and pairs else {})
    return objective, Factors(grid, 7, {'g0': cost(sizes[0])}, {p: cost(*(len(grid[g]) for g in p)) for p in pairs})


def networks(grid):
    return [dict(zip(grid, widths)) for widths in itertools.product(*grid.values())]


def each(test):
    return pytest.mark.parametrize('name', GRAPHS)(pytest.mark.parametrize('seed', SEEDS)(test))


def states(plan, widths):
    return np.array([[plan.grid[g].index(widths[g])] for g in plan.names])


def plan_of(*factors):
    return Elimination(factors[0].grid, {pair for f in factors for pair in f.pairwise})


# -- elimination -------------------------------------------------------------------------------------------------------------


@each
def test_minima_and_sums_are_those_of_the_enumeration(name, seed):
    """Several energies at once, each as if alone."""
    objective, cost = problem(name, seed)
    plan = plan_of(objective, cost)
    weights = [0, 1e-4, 1e-3, 1]
    energies = np.stack([plan.flatten(objective) + w * plan.flatten(cost) for w in weights], 1)
    found = plan.minimise(energies)
    for k, w in enumerate(weights):
        def energy(widths, w=w):
            return objective(widths) - objective.constant + w * (cost(widths) - cost.constant)

        best = min(networks(objective.grid), key=energy)
        assert energy(plan.widths(found[:, k])) == pytest.approx(energy(best), rel=1e-12, abs=1e-12)
        assert plan.total(energies[:, k], states(plan, best)) == pytest.approx(energy(best), rel=1e-12, abs=1e-12)
        assert np.array_equal(plan.minimise(energies[:, k])[:, 0], found[:, k])


@each
def test_partition_functions_and_marginals_are_those_of_the_enumeration(name, seed):
    """At temperatures from hot to nearly frozen."""
    objective, _ = problem(name, seed)
    plan = plan_of(*problem(name, seed))
    temperatures = np.array([1, 0.05, 1e-3])
    energies = plan.flatten(objective)[:, None] / temperatures
    everything = networks(objective.grid)
    values = np.array([objective(w) - objective.constant for w in everything])
    logs = scipy.special.logsumexp(-values[:, None] / temperatures, axis=0)
    np.testing.assert_allclose(plan.log_partition(energies), logs, rtol=1e-10, atol=1e-10)
    p = np.exp(-values[:, None] / temperatures - logs)
    for group, marginal in zip(plan.names, plan.marginals(energies)):
        want = [p[[w[group] == width for w in everything]].sum(0) for width in objective.grid[group]]
        np.testing.assert_allclose(marginal, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize('name', GRAPHS)
def test_samples_come_as_often_as_their_probability_says(name):
    """Chi-square over all networks; a seed that fails one in ten thousand, and energies that rule networks out."""
    objective, _ = problem(name, 1)
    plan = plan_of(*problem(name, 1))
    energies = plan.flatten(objective) / 0.05
    energies[0] = 1e4  # no network has the first width of the first group
    everything = networks(objective.grid)
    p = np.exp([-plan.total(energies, states(plan, w))[0] for w in everything])
    p /= p.sum()
    drawn = plan.sample(energies, np.random.default_rng(0), 20_000)
    number = np.ravel_multi_index(list(drawn), [len(w) for w in objective.grid.values()])
    counts = np.bincount(number, minlength=len(p))
    assert not counts[p < 1e-100].any()
    often = p * counts.sum() > 5
    expected = [*(p[often] * counts.sum()), *[rest for rest in [p[~often].sum() * counts.sum()] if rest > 5]]
    observed = [*counts[often], *([counts[~often].sum()] if len(expected) > often.sum() else [])]
    statistic = ((np.array(observed) - expected) ** 2 / expected).sum()
    assert scipy.stats.chi2.sf(statistic, max(len(expected) - 1, 1)) > 1e-4
    assert len(set(number.tolist())) > 1


def test_a_graph_too_dense_is_refused_at_once():
    """densenet121: every concatenation ties all layers before it; the message says what would help."""
    space = timm_width.trace(meta_copy(timm.create_model('densenet121')), (3, 64, 64))
    grid = make_grid(space, 'aows')
    cost = Macs(space).factors(grid)
    start = time.perf_counter()
    with pytest.raises(SolveError, match=r'table over \d+ groups of .* cells.* \(--grid\), or fix groups \(--fix\)'):
        Elimination(grid, cost.pairwise)
    assert time.perf_counter() - start < 5
    Elimination({g: w[-1:] for g, w in grid.items()}, cost.pairwise)  # of one width each, anything goes


def test_tables_that_were_not_planned_for_are_refused():
    objective, cost = problem('chain', 1)
    with pytest.raises(ValueError, match="no table of 'g0' and 'g1'"):
        Elimination(objective.grid, []).flatten(cost)


@pytest.mark.parametrize('model, most', [('resnet50', 14 ** 3), ('mobilenetv2_100', 14 ** 3), ('efficientnet_b0', 14 ** 4), ('regnetx_002', 14 ** 3)])
def test_residual_networks_have_a_small_treewidth(model, most):
    """On the grid of AOWS, no table is larger than over so many groups."""
    space = timm_width.trace(meta_copy(timm.create_model(model)), (3, 64, 64))
    grid = make_grid(space, 'aows')
    Elimination(grid, Macs(space).factors(grid).pairwise, max_cells=most)


# -- under a limit -----------------------------------------------------------------------------------------------------------


def sequential(objective, cost, limit):
    """The bisection as published, gamma by gamma, each by enumeration; costs scaled to a limit of 0.04."""
    everything = networks(cost.grid)
    values, costs = np.array([objective(w) for w in everything]), np.array([cost(w) for w in everything])

    def best(gamma):
        return int((values + gamma * costs * LIMIT / limit).argmin())

    low, high = 0., FIRST
    while costs[best(high)] > limit:
        high *= 2
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if costs[best(middle)] > limit else (low, middle)
    return everything[best(high)], high * LIMIT / limit


@each
@pytest.mark.parametrize('whole', [True, False])
def test_lagrangian_is_feasible_and_optimal_for_its_gamma_and_the_gap_holds(name, seed, whole):
    objective, cost = problem(name, seed, whole)
    everything = networks(cost.grid)
    costs = sorted(cost(w) for w in everything)
    plan = plan_of(objective, cost)
    for limit in (costs[0], costs[len(costs) // 5], costs[len(costs) // 2], costs[-1]):
        found = Lagrangian(plan, cost, limit).solve(objective)
        assert found.cost == pytest.approx(cost(found.widths), rel=1e-12) and found.cost <= limit * (1 if whole else 1 + 1e-9)
        assert found.objective == pytest.approx(objective(found.widths), rel=1e-12)
        least = min(objective(w) + found.gamma * cost(w) for w in everything)
        assert objective(found.widths) + found.gamma * cost(found.widths) == pytest.approx(least, rel=1e-12)
        best = min(objective(w) for w in everything if cost(w) <= limit * (1 + 1e-12))
        assert found.bound <= best + 1e-12 and 0 <= found.gap and found.objective <= best + found.gap + 1e-12


@each
def test_several_multipliers_at_once_give_the_answer_of_one_after_the_other(name, seed):
    """Whatever the batch, and whatever was solved before; doubling the upper end, too, where the cost is a small part of the limit."""
    objective, cost = problem(name, seed)
    values = [cost(w) for w in networks(cost.grid)]
    plan = plan_of(objective, cost)
    for limit in (int(np.quantile(values, 0.3)), min(values)):
        for scale in (1, 1e4):
            scaled = Factors(cost.grid, 0, {g: t * scale for g, t in objective.unary.items()},
                             {g: t * scale for g, t in objective.pairwise.items()})
            widths, gamma = sequential(scaled, cost, limit)
            solvers = [Lagrangian(plan, cost, limit, batch) for batch in (1, 3, 16)]
            found = [s.solve(scaled) for s in solvers]
            for other in (1, 0.99, 1e-3, 1e5):  # what is solved next begins where this one ended
                solvers[2].solve(Factors(cost.grid, 0, {g: t * other + (g == 'g0') * t for g, t in scaled.unary.items()}))
                found.append(solvers[2].solve(scaled))
            assert all(f == found[0] for f in found)
            assert found[0].widths == widths and found[0].gamma == pytest.approx(gamma, rel=1e-12)


def test_the_unit_of_a_cost_does_not_matter():
    """Thousandths of it, a thousand times as many: the same network, the multiplier per unit a thousand times as small."""
    objective, cost = problem('residual', 0)
    limit = int(np.quantile([cost(w) for w in networks(cost.grid)], 0.4))
    larger = Factors(cost.grid, cost.constant * 1024, {g: t * 1024 for g, t in cost.unary.items()},
                     {g: t * 1024 for g, t in cost.pairwise.items()})
    a, b = (Lagrangian(plan_of(objective, c), c, n).solve(objective) for c, n in ((cost, limit), (larger, 1024 * limit)))
    assert a.widths == b.widths and a.gamma == pytest.approx(1024 * b.gamma) and b.cost == 1024 * a.cost


@each
@pytest.mark.parametrize('whole', [True, False])
def test_exact_answers_are_the_best(name, seed, whole):
    objective, cost = problem(name, seed, whole)
    everything = networks(cost.grid)
    costs = sorted(cost(w) for w in everything)
    for limit in (costs[0], costs[len(costs) // 5], costs[len(costs) // 2], costs[-1]):
        found = exact(objective, cost, limit)
        best = min(objective(w) for w in everything if cost(w) <= limit)
        assert found.cost == cost(found.widths) <= limit * (1 if whole else 1 + 1e-9) and found.objective == objective(found.widths)
        assert found.objective == pytest.approx(best, rel=1e-9) and found.gap == 0


def test_exact_answers_hold_integers_to_the_last_unit():
    """The best network is over the limit by one in 10^12, which no solver in floats can see: it is cut off."""
    grid = grid_of([2, 2])
    objective = Factors(grid, 0., {'g0': np.array([1., 0.]), 'g1': np.array([0.5, 0.])})
    cost = Factors(grid, 0, {'g0': np.array([10 ** 12, 2 * 10 ** 12]), 'g1': np.array([10 ** 12, 2 * 10 ** 12])})
    assert exact(objective, cost, 4 * 10 ** 12).widths == {'g0': 16, 'g1': 16}
    assert exact(objective, cost, 4 * 10 ** 12 - 1).widths == {'g0': 16, 'g1': 8}
    for solution in (exact(objective, cost, 3 * 10 ** 12 - 1), Lagrangian(plan_of(cost), cost, 3 * 10 ** 12 - 1).solve(objective)):
        assert solution.widths == {'g0': 8, 'g1': 8}


def test_costs_beyond_64_bits_are_exact():
    grid = grid_of([2, 2])
    huge = 2 ** 70
    cost = Factors(grid, 1, {'g0': np.array([huge, 2 * huge], dtype=object)}, {('g0', 'g1'): np.array([[0, 1], [0, 1]], dtype=object)})
    objective = Factors(grid, 0., {'g0': np.array([1., 0.]), 'g1': np.array([1., 0.])})
    for limit, cost_found in ((2 * huge + 2, 2 * huge + 2), (2 * huge + 1, huge + 2)):
        found = Lagrangian(plan_of(cost), cost, limit).solve(objective)
        assert found.cost == cost_found == cost(found.widths)
        assert type(found.cost) is int


@pytest.mark.parametrize('solve', [lambda o, c, n: Lagrangian(plan_of(o, c), c, n).solve(o), exact], ids=['lagrangian', 'exact'])
def test_no_network_within_the_limit_is_one_clear_error(solve):
    objective, cost = problem('residual', 0)
    least = min(cost(w) for w in networks(cost.grid))
    assert solve(objective, cost, least).cost == least
    with pytest.raises(SolveError, match=f'no network of the grid costs at most {least - 1:,}'):
        solve(objective, cost, least - 1)


def test_exact_says_when_its_time_is_over():
    objective, cost = problem('all with all', 1)
    with pytest.raises(SolveError, match='within 1e-09 s: give more time'):
        exact(objective, cost, int(np.median([cost(w) for w in networks(cost.grid)])), seconds=1e-9)


def test_exact_works_on_the_graph_that_elimination_refuses():
    """densenet121 with two widths a group: nothing within the budget is better by any single change."""
    space = timm_width.trace(meta_copy(timm.create_model('densenet121')), (3, 64, 64))
    grid, macs = make_grid(space, '0.5,1'), Macs(space)
    cost = macs.factors(grid)
    with pytest.raises(SolveError):
        Elimination(grid, cost.pairwise)
    rng = np.random.default_rng(0)
    objective = Factors(grid, 0., {g: np.array([rng.exponential(), 0]) for g in grid})
    limit = int(0.6 * macs())
    found = exact(objective, cost, limit)
    assert macs(found.widths) == found.cost <= limit
    for g, widths in grid.items():
        other = {**found.widths, g: widths[widths[0] == found.widths[g]]}
        assert macs(other) > limit or objective(other) >= found.objective


def test_on_the_full_grid_of_mobilenet_v1():
    """Table D.1: the exact answer is within what the relaxation bounds, and the steps are as many as published."""
    assert STEPS == 2 ** 12 and FIRST == 10
    space = timm_width.trace(meta_copy(timm.create_model('mobilenetv1_100')), (3, 96, 96))
    grid, macs = make_grid(space, 'aows'), Macs(space)
    assert math.prod(len(w) for w in grid.values()) == 3741798216769536
    rng = np.random.default_rng(0)
    objective = Factors(grid, 0., {g: 0.1 * rng.random() * np.exp(-3 * np.array(w) / w[-1]) for g, w in grid.items()})
    cost = macs.factors(grid)
    limit = int(0.5 * macs())
    relaxed = Lagrangian(plan_of(cost), cost, limit).solve(objective)
    best = exact(objective, cost, limit)
    assert relaxed.bound - 1e-9 <= best.objective <= relaxed.objective + 1e-12
    assert macs(relaxed.widths) == relaxed.cost <= limit and macs(best.widths) == best.cost <= limit
