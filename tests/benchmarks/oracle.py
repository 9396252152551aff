"""Holds a search against a table of true answers: ../shared/oracle, all 16,384 widths of one MobileNet, each trained on CIFAR-10.

    python ../shared/data/get_cifar10.py /tmp/cifar --per-class 2000 500
    python tests/benchmarks/oracle.py --data-dir /tmp/cifar --output runs/oracle [--per-class 300] [--json FILE]

All further flags are those of `timm-width search` (--search-epochs, --search-holdout, -b, --lr, --autoslim.batches, --seed, ...).
The same command goes on where a killed one was: after the last epoch, after the last score. Other flags need another --output.

A supernet of the table's network is trained by the engine with AutoSlim's step, on images of --resolution pixels (the MACs are
those of 32x32). It then scores --nets random widths on a holdout of the training images, and three policies choose at 25, 50
and 75 % of the MACs: uniform; autoslim, on the supernet's scores; and random, whose networks each train alone, which here is the
table's accuracy plus noise of the table's own standard deviation over trainings. What they choose is then looked up in the table.

Taus are Kendall's tau-b. 'in band' counts only the pairs of networks that cost about the same: each one's MACs within 3 % of the
other's. '±' is the standard deviation over 200 bootstrap draws of the networks. Rows in brackets are for comparison: random's
networks scored by the supernet, greedy slimming by the truth, and the mean and the best of the table's networks at that cost.
The last table says how much a level more at one position adds, in standard deviations: where the supernet and the truth differ.
"""
import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from tqdm import tqdm

from timm_width import search
from timm_width.budget import Budget
from timm_width.engine import Training
from timm_width.grids import make_grid
from timm_width.holdout import Holdout, Journal
from timm_width.policies import load, read_options
from timm_width.policies.base import Choice, Grid, Policy, Score, random_widths
from timm_width.problem import Problem, learning_problem, make_problem, set_budgets
from timm_width.space import WidthSpace
from timm_width.target import find_target
from timm_width.trace import trace

FILE = Path(__file__).resolve().parents[3] / 'shared' / 'oracle' / 'mobilenet_width_cifar10.json'
# the group that each position of the table's keys governs
POSITIONS = ('conv_stem', 'blocks.0.0.conv_pw', 'blocks.0.1.conv_pw', 'blocks.1.0.conv_pw', 'blocks.1.0.conv_pwl',
             'blocks.1.1.conv_pw', 'conv_head')
LEVELS = 4
GRID = '0.25,0.5,0.75,1'
BUDGETS = ('macs=0.25x', 'macs=0.5x', 'macs=0.75x')
NOISE = 0.153  # median standard deviation of the table's accuracies over three trainings, in percent
BAND = 0.03
DRAWS = 200  # of the bootstrap
SEEDS = 20  # of the random policy, whose single answer is a matter of luck
# a short training on small images; any may be given on the command line
FLAGS = ('--epochs', '0', '--search-epochs', '5', '-b', '64', '-vb', '250', '--lr', '0.05', '--weight-decay', '5e-4', '--smoothing', '0',
         '--warmup-epochs', '1', '--scale', '0.6', '1', '--ratio', '0.8', '1.25', '--color-jitter', '0', '--crop-pct', '1', '-j', '0',
         '--channels-last', '--autoslim.batches', '0', '--device', 'cpu')


# -- the network and its table ---------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs({'oracle_mobilenet.untrained': {
    'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (8, 8), 'crop_pct': 1., 'interpolation': 'bicubic',
    'mean': (0.491, 0.482, 0.447), 'std': (0.247, 0.243, 0.262), 'first_conv': 'conv_stem', 'classifier': 'classifier'}})


@register_model
def oracle_mobilenet(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """Channel-Bench-Macro's MobileNet at full width, of timm's inverted residual blocks."""
    blocks = decode_arch_def([['ir_r2_k3_s1_e6_c128'], ['ir_r1_k3_s2_e6_c256', 'ir_r1_k3_s1_e6_c256']])
    return build_model_with_cfg(EfficientNet, 'oracle_mobilenet', pretrained, block_args=blocks, **{
        'num_classes': 10, 'stem_size': 128, 'num_features': 1024, **kwargs})


@dataclass(frozen=True)
class Oracle:
    """The table, in terms of widths.

    Attributes:
        table: Key -> mean top-1 in percent, MACs, params.
        space: The width space of the network at 32x32.
    """
    table: Mapping[str, Sequence]
    space: WidthSpace

    @classmethod
    def open(cls) -> 'Oracle':
        return cls(json.loads(FILE.read_text()), trace(timm.create_model('oracle_mobilenet'), (3, 32, 32)))

    @property
    def grid(self) -> Grid:
        return make_grid(self.space, GRID)

    def widths(self, key: str) -> dict[str, int]:
        return {name: self.space[name].size * int(level) // LEVELS for name, level in zip(POSITIONS, key, strict=True)}

    def key(self, widths: Mapping[str, int]) -> str:
        """The key of widths that lie on the table's levels."""
        levels = [LEVELS * widths.get(name, self.space[name].size) / self.space[name].size for name in POSITIONS]
        if any(level not in range(1, LEVELS + 1) for level in levels):
            raise ValueError(f'{dict(widths)} is not in the table')
        return ''.join(str(int(level)) for level in levels)

    def top1(self, widths: Mapping[str, int]) -> float:
        return self.table[self.key(widths)][0]

    def average(self, budget: Budget, tolerance: float) -> float:
        """Mean accuracy of all networks that fill a budget on MACs to within that share of it: what a blind choice gets."""
        return float(np.mean([row[0] for row in self.table.values() if (1 - tolerance) * budget.limit <= row[1] <= budget.limit]))

    def best(self, budget: Budget) -> dict[str, int]:
        """The most accurate network within a budget on MACs."""
        within = (key for key, row in self.table.items() if row[1] <= budget.limit)
        return self.widths(max(within, key=lambda key: self.table[key][0]))


class Truth:
    """Answers a policy (see `policies.base.Evaluate`) from the table.

    Args:
        oracle: The table.
        noise: Standard deviation of what is added to an accuracy, the same for the same widths.
        seed: Seed of the noise.
    """

    def __init__(self, oracle: Oracle, noise: float = 0., seed: int = 0):
        self.oracle, self.noise, self.seed = oracle, noise, seed

    def __call__(
            self,
            widths: Mapping[str, int],
            skips: Sequence[str] = (),
            batches: Optional[int] = None,
            statistics: str = 'batch',
    ) -> Score:
        return self.alone(widths, skips)

    def alone(self, widths: Mapping[str, int], skips: Sequence[str] = ()) -> Score:
        key = self.oracle.key(widths)
        top1 = self.oracle.table[key][0] + self.noise * np.random.default_rng([self.seed, int(key)]).standard_normal()
        return Score(top1, 1 - top1 / 100)


# -- rank correlation ------------------------------------------------------------------------------------------------------


def kendall(x: Sequence[float], y: Sequence[float], pairs: Optional[np.ndarray] = None) -> float:
    """Kendall's tau-b over some pairs: concordant less discordant ones, over the geometric mean of those untied in x and in y.

    Args:
        x: A number per network.
        y: Another.
        pairs: (2, n) indices; by default all pairs.
    """
    a, b = np.triu_indices(len(x), 1) if pairs is None else pairs
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    dx, dy = np.sign(x[a] - x[b]), np.sign(y[a] - y[b])
    untied = math.sqrt((dx ** 2).sum() * (dy ** 2).sum())
    return float((dx * dy).sum() / untied) if untied else math.nan


def in_band(costs: Sequence[int], share: float = BAND) -> np.ndarray:
    """The pairs (2, n) of which each costs as much as the other, give or take that share of it."""
    costs = np.asarray(costs, dtype=float)
    a, b = np.triu_indices(len(costs), 1)
    near = np.abs(costs[a] - costs[b]) <= share * np.minimum(costs[a], costs[b])
    return np.stack([a[near], b[near]])


def spread(x: Sequence[float], y: Sequence[float], pairs: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> float:
    """Standard deviation of tau over bootstrap draws of the networks; no network is paired with itself.

    Args:
        x: A number per network.
        y: Another.
        pairs: The pairs to count among some networks, given by their indices.
        seed: Seed of the draws.
    """
    rng, x, y, taus = np.random.default_rng(seed), np.asarray(x), np.asarray(y), []
    for _ in range(DRAWS):
        drawn = rng.integers(len(x), size=len(x))
        a, b = pairs(drawn)
        taus.append(kendall(x[drawn], y[drawn], np.stack([a, b])[:, drawn[a] != drawn[b]]))
    return float(np.nanstd(taus))  # a draw without any pair that counts has no tau


def correlations(oracle: Oracle, nets: Sequence[Mapping[str, int]], scores: Sequence[Score], seed: int) -> list[dict[str, Any]]:
    """Tau with the truth, over all pairs and over those that cost about the same, of the scores and of what they should beat."""
    rows = [oracle.table[oracle.key(widths)] for widths in nets]
    truth, macs, params = (np.array(column) for column in zip(*rows))
    alone = Truth(oracle, NOISE, seed)
    predictors = {
        'supernet, accuracy': [s.top1 for s in scores], 'supernet, loss': [-s.loss for s in scores], 'MACs': macs, 'params': params,
        '(one training alone)': [alone(widths).top1 for widths in nets]}
    kinds = {'all': lambda drawn: np.stack(np.triu_indices(len(drawn), 1)), 'band': lambda drawn: in_band(macs[drawn])}
    every, found = np.arange(len(nets)), []
    for name, x in predictors.items():
        row: dict[str, Any] = {'predictor': name}
        for kind, pairs in kinds.items():
            row |= {kind: kendall(x, truth, pairs(every)), f'{kind}_std': spread(x, truth, pairs), f'{kind}_pairs': pairs(every).shape[1]}
        found.append(row)
    return found


def effects(keys: Sequence[str], y: Sequence[float]) -> list[float]:
    """What one level more at each position of the keys adds to y, by least squares, in standard deviations of y."""
    levels, y = np.array([[int(c) for c in key] for key in keys], dtype=float), np.asarray(y)
    levels, y = levels - levels.mean(0), (y - y.mean()) / y.std()
    return np.linalg.lstsq(levels, y, rcond=None)[0].tolist()


# -- the search ------------------------------------------------------------------------------------------------------------


def train_supernet(problem: Problem, policy: Policy) -> tuple[Holdout, dict[str, float]]:
    """Trains the shared network as `timm-width search` does, and returns what scores it, and how the training went."""
    args, output = problem.args, Path(problem.args.output)
    batches = problem.training_batches()
    model, space = problem.traced(policy.start, args.seed)
    warmup = min(args.warmup_epochs, args.search_epochs / 5)
    training = Training(policy.prepare(model, space), batches, args, args.search_epochs, 'supernet', warmup, policy.train_step)
    start, said = (time.perf_counter(), time.process_time()), {}

    def after_epoch(training: Training, loss: float, lr: float) -> None:
        said.update(loss=loss, minutes=(time.perf_counter() - start[0]) / 60, cpu_minutes=(time.process_time() - start[1]) / 60)
        print(f"supernet: epoch {training.epoch} of {training.epochs}, {training.updates} updates, loss of the full network {loss:.3f}, "
              f"{said['minutes']:.1f} min ({said['cpu_minutes']:.1f} of CPU)", flush=True)

    network = training.run(output / 'supernet.pth.tar', after_epoch, policy)
    bar = tqdm(desc='score', unit='net', disable=None)

    def refuse(choice: Choice) -> torch.nn.Module:
        raise NotImplementedError('networks of their own are looked up')

    journal = Journal(output / 'scores.jsonl', args)
    said |= {'train_images': len(problem.train), 'holdout_images': len(problem.held), 'updates': training.updates}
    return Holdout(args, network, batches, problem.held_batches(), refuse, journal, bar), said


def choices(oracle: Oracle, policies: Mapping[str, Policy], evaluate: Holdout, seed: int) -> Iterator[dict[str, Any]]:
    """What each policy finds within each budget, and what the table says of it.

    Args:
        oracle: The table.
        policies: uniform, random and autoslim.
        evaluate: Scores of the supernet.
        seed: Seed of the noise that networks trained alone have.
    """
    autoslim, random = policies['autoslim'], policies['random']
    several = [type(random)(oracle.space, random.budgets, random.grid, random.options, s).choose(Truth(oracle, NOISE, s))
               for s in range(SEEDS)]
    found = {
        'uniform': policies['uniform'].choose(evaluate), 'random': random.choose(Truth(oracle, NOISE, seed)),
        'autoslim': autoslim.choose(evaluate),
        '(random on the supernet)': [Choice(max(random.samples(b), key=lambda w: evaluate(w).rank)) for b in random.budgets],
        '(autoslim on the truth)': autoslim.choose(Truth(oracle)), '(best)': [Choice(oracle.best(b)) for b in autoslim.budgets]}
    for i, budget in enumerate(autoslim.budgets):
        best = oracle.top1(oracle.best(budget))
        for name, answer in found.items():
            key = oracle.key(answer[i].widths)
            top1, macs, params = oracle.table[key]
            if not budget.met(*answer[i]) or macs > budget.limit:
                raise AssertionError(f'{name} answered {key}, which is over {budget}')
            row = {'budget': budget.text, 'network': name, 'key': key, 'macs': macs, 'params': params, 'top1': top1,
                   'regret': best - top1}
            if name == 'random':
                again = [oracle.top1(answer[i].widths) for answer in several]
                row['note'] = f'over {SEEDS} seeds {np.mean(again):.3f} ± {np.std(again):.3f}'
            if name == '(best)':
                row['note'] = f'mean of all at 95 to 100 % of the budget {oracle.average(budget, 0.05):.3f}'
            yield row


def print_results(
        ranks: Sequence[Mapping[str, Any]],
        found: Sequence[Mapping[str, Any]],
        full: int,
        effect: Mapping[str, Sequence[float]],
) -> None:
    """Prints the tables.

    Args:
        ranks: Those of `correlations`.
        found: Those of `choices`.
        full: MACs of the full network.
        effect: Predictor -> `effects`.
    """
    every, near = f"all {ranks[0]['all_pairs']:,} pairs", f"{ranks[0]['band_pairs']:,} pairs in band"
    print(f"\n{'tau with the truth':<24}{every:>20}{near:>22}")
    for row in ranks:
        every, near = (f"{row[kind]:.3f} ± {row[f'{kind}_std']:.3f}" for kind in ('all', 'band'))
        print(f"{row['predictor']:<24}{every:>20}{near:>22}")
    print(f"\n{'':<12}{'network':<26}{'key':<10}{'MACs %':>8}{'params':>12}{'top-1 %':>9}{'regret':>9}")
    for budget, rows in itertools.groupby(found, key=lambda row: row['budget']):
        for i, row in enumerate(rows):
            print(f"{'' if i else budget:<12}{row['network']:<26}{row['key']:<10}{100 * row['macs'] / full:>8.1f}{row['params']:>12,}"
                  f"{row['top1']:>9.3f}{row['regret']:>9.3f}   {row.get('note', '')}".rstrip())
    print(f"\n{'effect of a level':<24}" + ''.join(f'{i:>7}' for i in range(len(POSITIONS))))
    for name, values in effect.items():
        print(f'{name:<24}' + ''.join(f'{v:>7.2f}' for v in values))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--per-class', type=int, default=300, help='images per class to train on, before the holdout is taken away')
    parser.add_argument('--resolution', type=int, default=16, help='side of the images')
    parser.add_argument('--nets', type=int, default=200, help='random widths to score')
    parser.add_argument('--json', type=Path, help='file for all figures')
    own, rest = parser.parse_known_args()

    argv = ['--policy', 'autoslim', '--baselines', 'uniform', 'random', '--model', 'oracle_mobilenet', '--img-size', '32',
            '--grid', GRID, '--budget', *BUDGETS, *FLAGS, *rest]
    args, classes = search.parse(argv)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    problem = set_budgets(make_problem(args, {'autoslim': GRID}), find_target(args))['autoslim']
    share = own.per_class / np.bincount(problem.targets).max()
    args.proxy = f'resolution={own.resolution},data={min(share, 1):g}'
    learning = learning_problem(problem)
    oracle = Oracle(json.loads(FILE.read_text()), problem.space)
    policies = {name: load(name)(problem.space, problem.budgets, problem.grid, read_options(args, name, policy), args.seed)
                for name, policy in classes.items()}

    evaluate, said = train_supernet(learning, policies['autoslim'])
    nets = draw(oracle, own.nets, args.seed)
    scores = [evaluate(widths) for widths in nets]
    ranks = correlations(oracle, nets, scores, args.seed)
    found = list(choices(oracle, policies, evaluate, args.seed))
    evaluate.bar.close()
    largest = evaluate(problem.space.base_widths)
    print(f"{said['train_images']} images of {own.resolution} pixels, {said['updates']} updates of {args.batch_size}; on "
          f"{said['holdout_images']} held out the full network has {largest.top1:.2f} % in the supernet")
    rows = [{'key': oracle.key(w), 'top1': s.top1, 'loss': s.loss, 'truth': oracle.top1(w)} for w, s in zip(nets, scores)]
    effect = {'truth': effects([row['key'] for row in rows], [row['truth'] for row in rows]),
              'supernet, accuracy': effects([row['key'] for row in rows], [row['top1'] for row in rows])}
    print_results(ranks, found, oracle.table['4444444'][1], effect)
    if own.json:
        own.json.write_text(json.dumps({
            'command': argv, 'per_class': own.per_class, 'proxy': args.proxy, 'torch': torch.__version__, 'timm': timm.__version__,
            'training': said, 'full_network': largest.top1, 'correlations': ranks, 'found': found, 'effects': effect,
            'scores': rows}, indent=1))


def draw(oracle: Oracle, number: int, seed: int) -> list[dict[str, int]]:
    """Different random networks, every level of every position equally likely."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < number:
        widths = random_widths(oracle.grid, rng)
        found[oracle.key(widths)] = widths
    return list(found.values())


if __name__ == '__main__':
    main()
