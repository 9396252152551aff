"""CafeNet against a table of true answers: ../shared/oracle, all 16,384 widths of one MobileNet, each trained on CIFAR-10.

    python ../shared/data/get_cifar10.py /tmp/cifar [--per-class 2000 500]
    python tests/benchmarks/oracle_cafenet.py --data-dir /tmp/cifar --output runs/oracle-cafenet [--offsets 0 1] [--json FILE]

On a GPU, with all images and at their own size:

    python tests/benchmarks/oracle_cafenet.py --data-dir /tmp/cifar --output runs/oracle-cafenet --per-class 5000 --resolution 32 \
        --search-epochs 30 -b 128 --lr 0.1 --device cuda --amp -j 8 --seeds 5

All further flags are those of `timm-width search --policy cafenet` (--search-epochs, -b, --lr, --cafenet.iterations, --seed, ...). The
same command goes on where a killed one was: after the last epoch, after the last score.

For each offset r and each of --supernets seeds, a supernet is trained by CafeNet's step on images of --resolution pixels. It scores
--nets random widths on a holdout of the training images, a width by the best of its assignments; Kendall's taus with the truth are over
all pairs, and over those of MACs within 3 % (see oracle.py). Then CafeNet-E searches it at 25, 50 and 75 % of the MACs under --seeds
seeds, and CafeNet-R with as many networks (--search-by); their answers are looked up in the table. '(random, by the truth)' is the best in the table
of as many random networks, and '(best)' the best of the table within the budget. '±' is the standard deviation over searches and
supernets; of a tau with one supernet, over 200 bootstrap draws of the networks.
"""
import argparse
import dataclasses
import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from timm_width import search
from timm_width.holdout import Holdout
from timm_width.policies import load, read_options
from timm_width.policies.base import Policy, Score, uniform_widths
from timm_width.problem import Problem, learning_problem, make_problem, set_budgets
from timm_width.target import find_target

try:
    from .oracle import BUDGETS, FILE, FLAGS, GRID, Oracle, correlations, draw, train_supernet
except ImportError:  # run as a script
    from oracle import BUDGETS, FILE, FLAGS, GRID, Oracle, correlations, draw, train_supernet

OWN = [flag for i, flag in enumerate(FLAGS) if not any(f.startswith('--autoslim.') for f in FLAGS[max(i - 1, 0):i + 1])]


class BestOf:
    """Scores a width by the best of its assignments, eq. 13."""

    def __init__(self, policy: Policy, evaluate: Holdout):
        self.policy, self.evaluate = policy, evaluate

    def __call__(self, widths: Mapping[str, int]) -> Score:
        candidates = self.policy.candidates(widths, np.random.default_rng(0))
        statistics = self.policy.options.statistics
        return max((self.evaluate(c, statistics=statistics) for c in candidates), key=lambda s: s.rank)


def searches(oracle: Oracle, policy: Policy, evaluate: Holdout, by: Sequence[str], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The true accuracies of what searches of one supernet find."""
    options = policy.options
    number = options.population * options.iterations
    for seed in seeds:
        for search_by in by:
            name = {'evolutionary': 'CafeNet-E', 'random': 'CafeNet-R'}[search_by]
            changed = dataclasses.replace(options, search=search_by, samples=number)
            one = type(policy)(oracle.space, policy.budgets, policy.grid, changed, seed)
            for budget, choice in zip(policy.budgets, one.choose(evaluate)):
                if not budget.met(*choice):
                    raise AssertionError(f'{name} is over {budget}')
                yield {'r': options.r, 'network': name, 'seed': seed, **_row(oracle, budget, choice.widths)}


def references(oracle: Oracle, policy: Policy, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """What needs no supernet."""
    number = policy.options.population * policy.options.iterations
    for budget in policy.budgets:
        yield {'r': '', 'network': 'uniform', 'seed': '', **_row(oracle, budget, uniform_widths(oracle.space, budget, policy.grid))}
        for seed in seeds:
            one = type(policy)(oracle.space, [budget], policy.grid, dataclasses.replace(policy.options, search='random', samples=number),
                               seed)
            drawn = one.by_samples(lambda widths: (oracle.top1(widths), 0.))[0]
            yield {'r': '', 'network': '(random, by the truth)', 'seed': seed, **_row(oracle, budget, drawn)}
        yield {'r': '', 'network': '(best)', 'seed': '', **_row(oracle, budget, oracle.best(budget))}


def _row(oracle: Oracle, budget: Any, widths: Mapping[str, int]) -> dict[str, Any]:
    key = oracle.key(widths)
    top1, macs, params = oracle.table[key]
    return {'budget': budget.text, 'key': key, 'top1': top1, 'macs': macs, 'params': params,
            'regret': oracle.top1(oracle.best(budget)) - top1}


def print_results(ranks: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], found: Sequence[Mapping[str, Any]], full: int) -> None:
    """Prints the tables.

    Args:
        ranks: Name of a kind of supernet -> `correlations` of each supernet.
        found: Rows of `searches` and `references`.
        full: MACs of the full network.
    """
    print(f"\n{'tau with the truth':<32}{'all pairs':>18}{'pairs in band':>18}")
    shown = set()
    for name, several in ranks.items():
        for rows in zip(*several):
            of_scores = rows[0]['predictor'].startswith('supernet')
            title = rows[0]['predictor'].replace('supernet', name) if of_scores else rows[0]['predictor']
            if title in shown:
                continue
            shown.add(title)
            texts = []
            for kind in ('all', 'band'):
                values = [row[kind] for row in rows]
                texts.append(f"{np.mean(values):.3f} ± {np.std(values) if len(rows) > 1 and of_scores else rows[0][f'{kind}_std']:.3f}")
            print(f'{title:<32}{texts[0]:>18}{texts[1]:>18}')
    print(f"\n{'':<12}{'network':<26}{'MACs %':>8}{'top-1 %':>18}{'regret':>18}")
    for text in dict.fromkeys(row['budget'] for row in found):
        rows = [row for row in found if row['budget'] == text]
        for name in dict.fromkeys((row['network'], row['r']) for row in rows):
            same = [row for row in rows if (row['network'], row['r']) == name]
            top1, regret = (f'{np.mean(v):.3f} ± {np.std(v):.3f}' for v in ([row[k] for row in same] for k in ('top1', 'regret')))
            label = name[0] + (f', r = {name[1]}' if name[1] != '' else '')
            print(f"{text:<12}{label:<26}{100 * np.mean([row['macs'] for row in same]) / full:>8.1f}{top1:>18}{regret:>18}")
            text = ''


def supernet(problem: Problem, classes: Mapping[str, type[Policy]], args: Namespace, r: int, output: Path) -> tuple[Policy, Holdout, dict]:
    """Trains one; returns its policy, what scores it, and how the training went."""
    args = Namespace(**{**vars(args), 'output': str(output / f'r{r}-seed{args.seed}'), 'cafenet.r': r})
    Path(args.output).mkdir(parents=True, exist_ok=True)
    policy = classes['cafenet'](problem.space, problem.budgets, problem.grid, read_options(args, 'cafenet', classes['cafenet']), args.seed)
    evaluate, said = train_supernet(learning_problem(dataclasses.replace(problem, args=args)), policy)
    return policy, evaluate, said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--per-class', type=int, default=300, help='images per class to train on, before the holdout is taken away')
    parser.add_argument('--resolution', type=int, default=16, help='side of the images')
    parser.add_argument('--nets', type=int, default=200, help='random widths to score')
    parser.add_argument('--offsets', type=int, nargs='+', default=[0, 1], metavar='R', help='supernets to compare')
    parser.add_argument('--supernets', type=int, default=1, help='seeds under which each is trained')
    parser.add_argument('--seeds', type=int, default=5, help='seeds under which each is searched')
    parser.add_argument('--search-by', nargs='+', default=['evolutionary', 'random'], choices=['evolutionary', 'random'],
                        help='CafeNet-E, CafeNet-R')
    parser.add_argument('--json', type=Path, help='file for all figures')
    own, rest = parser.parse_known_args()

    argv = ['--policy', 'cafenet', '--baselines', 'uniform', '--model', 'oracle_mobilenet', '--img-size', '32',
            '--grid', GRID, '--budget', *BUDGETS, *OWN, *rest]
    args, _ = search.parse(argv)
    output = Path(args.output)
    problem = set_budgets(make_problem(args, {'cafenet': GRID}), find_target(args))['cafenet']
    share = own.per_class / np.bincount(problem.targets).max()
    args.proxy = f'resolution={own.resolution},data={min(share, 1):g}'
    oracle = Oracle(json.loads(FILE.read_text()), problem.space)
    nets = draw(oracle, own.nets, args.seed)
    ranks: dict[str, list] = {}
    found, trainings = [], []
    for seed in range(args.seed, args.seed + own.supernets):
        for r in own.offsets:
            flags = Namespace(**{**vars(args), 'seed': seed})
            policy, evaluate, said = supernet(problem, {'cafenet': load('cafenet')}, flags, r, output)
            score = BestOf(policy, evaluate)
            ranks.setdefault(f'r = {r}', []).append(correlations(oracle, nets, [score(widths) for widths in nets], seed))
            found += searches(oracle, policy, evaluate, own.search_by, range(own.seeds))
            trainings.append({'r': r, 'seed': seed, **said, 'full_network': score(problem.space.base_widths).top1})
            evaluate.bar.close()
            print(f'r = {r}, seed {seed}: {trainings[-1]}', flush=True)
    found += references(oracle, policy, range(own.seeds))
    print_results(ranks, found, oracle.table['4444444'][1])
    if own.json:
        own.json.write_text(json.dumps({
            'command': argv, 'per_class': own.per_class, 'proxy': args.proxy, 'torch': torch.__version__, 'timm': timm.__version__,
            'training': trainings, 'correlations': ranks, 'found': found}, indent=1))


if __name__ == '__main__':
    main()
