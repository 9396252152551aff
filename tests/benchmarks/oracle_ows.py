"""OWS against a table of true answers: ../shared/oracle, all 16,384 widths of one MobileNet, each trained on CIFAR-10.

    python tests/benchmarks/oracle_ows.py [--nets 300] [--seeds 20]

From the accuracies of random networks of the table, each width of each position gets the mean error of the networks that have it, as
OWS gets it from the images of its training. What OWS then answers at 25, 50 and 75 % of the MACs is looked up in the table: its regret
is by how many points of accuracy the best network within the budget is better. Beside it are the uniform network, and the best within
the budget of the same random networks, whose accuracies are known. `fit` solves for the sum of one number per width of each position
by least squares instead, and `all` is that of the whole table: as good as a sum can be. Means over seeds, with standard deviations.
"""
import argparse
from collections.abc import Mapping, Sequence

import numpy as np

from timm_width.budget import Budget
from timm_width.cost import Macs
from timm_width.elimination import Elimination
from timm_width.factors import Factors
from timm_width.policies.base import Grid, uniform_widths
from timm_width.solve import Lagrangian, exact

try:
    from .oracle import BUDGETS, Oracle
except ImportError:  # run as a script
    from oracle import BUDGETS, Oracle


def means(grid: Grid, keys: Sequence[str], wrong: np.ndarray) -> Factors:
    """The mean error of the networks with each width of each position, less that of all; 0 where there is none."""
    levels = np.array([[int(c) - 1 for c in key] for key in keys])
    return Factors(grid, 0., {g: np.array([
        wrong[levels[:, i] == k].mean() - wrong.mean() if (levels[:, i] == k).any() else 0. for k in range(len(w))])
        for i, (g, w) in enumerate(grid.items())})


def fit(grid: Grid, keys: Sequence[str], wrong: np.ndarray) -> Factors:
    """The errors as a sum of one number per width of each position, by least squares."""
    levels = np.array([[int(c) - 1 for c in key] for key in keys])
    rows = np.concatenate([np.eye(len(w))[levels[:, i]] for i, w in enumerate(grid.values())], 1)
    found = np.linalg.lstsq(rows, wrong - wrong.mean(), rcond=None)[0]
    ends = np.cumsum([len(w) for w in grid.values()])
    return Factors(grid, 0., dict(zip(grid, np.split(found, ends[:-1]))))


def regrets(oracle: Oracle, count: int, seed: int) -> dict[str, list[float]]:
    """What each way misses of the best accuracy, within each budget."""
    grid = oracle.grid
    keys = np.random.default_rng(seed).choice(sorted(oracle.table), count, replace=False).tolist()
    wrong = np.array([100 - oracle.table[key][0] for key in keys])
    cost = Macs(oracle.space).factors(grid)
    plan, errors, fitted = Elimination(grid, cost.pairwise), means(grid, keys, wrong), fit(grid, keys, wrong)
    every = sorted(oracle.table)
    whole = fit(grid, every, np.array([100 - oracle.table[key][0] for key in every]))
    found: dict[str, list[float]] = {}
    for budget in (Budget.parse(text, oracle.space) for text in BUDGETS):
        best = oracle.top1(oracle.best(budget))

        def add(name: str, widths: Mapping[str, int], budget: Budget = budget, best: float = best) -> None:
            if not budget.met(widths):
                raise AssertionError(f'{name} is over {budget}')
            found.setdefault(name, []).append(best - oracle.top1(widths))

        add('uniform', uniform_widths(oracle.space, budget, grid))
        within = [key for key in keys if oracle.table[key][1] <= budget.limit]
        add(f'best of {count} random', oracle.widths(max(within, key=lambda key: oracle.table[key][0])))
        lagrangian = Lagrangian(plan, cost, budget.limit)
        for name, objective in (('ows', errors), ('ows, fit', fitted), ('(ows, all)', whole)):
            add(name, lagrangian.solve(objective).widths)
            add(f'{name}, exact', exact(objective, cost, budget.limit).widths)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--nets', type=int, default=300)
    parser.add_argument('--seeds', type=int, default=20)
    own = parser.parse_args()
    oracle = Oracle.open()
    several = [regrets(oracle, own.nets, seed) for seed in range(own.seeds)]
    print(f"{'regret, in points of top-1':<28}" + ''.join(f'{text:>18}' for text in BUDGETS))
    for name in several[0]:
        values = np.array([found[name] for found in several])
        print(f'{name:<28}' + ''.join(f'{m:>10.3f} ± {s:.3f}' for m, s in zip(values.mean(0), values.std(0))))


if __name__ == '__main__':
    main()
