"""Searches the widths of a timm model for a budget, trains what was found, and sets it beside the base and the uniform width.

    python search.py --model mobilenetv2_050 --dataset digits --policy random --budget macs=0.5x --output runs/x

The policy chooses on the holdout, a part of the training images; the found model then trains on all of them. The validation
images are read once, for the table at the end. --output becomes a folder for timm.create_model('local-dir:FOLDER',
pretrained=True) with config.json, model.safetensors, args.yaml and summary.csv. Costs are those of one image at --img-size.
"""
import csv
import dataclasses
import fnmatch
import math
import platform
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import policies
from .config import SUFFIX, load_spec, save
from .cost import Budget, Macs, Params
from .data import DEFAULTS, Splits, UsageError, View, loader, open_splits, split_holdout
from .engine import RANGES, Parser, add_arguments, check_arguments, create, data_config, fit, top1, write_args
from .models import register, supported
from .policies.base import Choice, Grid, uniform_widths
from .resize import resize
from .space import MAX_GROWTH, WidthSpace, nearest
from .trace import trace

__all__ = ['Problem', 'choose', 'main', 'make_grid', 'prepare', 'search']

RESULTS = ('config.json', 'model.safetensors', 'args.yaml', 'summary.csv')
SEARCH_RANGES = {**RANGES, 'search_epochs': (1, None), 'width_divisor': (1, None), 'width_min': (0, MAX_GROWTH),
                 'width_max': (0, MAX_GROWTH)}
# where a search differs from timm's train.py: three trainings and many brief ones should end the same day
SEARCH_DEFAULTS = {'epochs': 20, 'warmup_epochs': 2, 'batch_size': 64, 'sched_on_updates': True}


def parse(argv: Optional[Sequence[str]] = None) -> tuple[Namespace, type[policies.Policy]]:
    """Reads the flags; those of the policy, and defaults for the dataset, come with the names given."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument('--policy')
    first.add_argument('--dataset')
    known, _ = first.parse_known_args(argv)

    parser = Parser(prog='timm-width search', description=__doc__, allow_abbrev=False)
    group = parser.add_argument_group('search')
    group.add_argument('--policy', required=True, metavar='NAME',
                       help=f"one of {', '.join(policies.names())}; --policy NAME --help shows its options")
    group.add_argument('--budget', required=True, metavar='COST=LIMIT',
                       help='macs=150M, params=2M, or a ratio of the base: macs=0.5x')
    group.add_argument('--search-epochs', type=int, default=3, metavar='N', help='length of each brief training')
    group.add_argument('--search-holdout', type=float, default=0.1, metavar='SHARE',
                       help='part of the training images on which the policy chooses')
    group.add_argument('--width-divisor', type=int, default=8, metavar='N', help='step of the widths')
    group.add_argument('--width-min', type=float, default=0.1, metavar='RATIO', help='least share of a base width')
    group.add_argument('--width-max', type=float, default=1., metavar='RATIO', help='most of a base width')
    group.add_argument('--fix', action='append', default=[], metavar='PATTERN',
                       help="groups that keep their width, as in 'conv_*'")
    add_arguments(parser)
    policy = policies.load(known.policy) if known.policy else policies.Policy
    if known.policy:
        policies.add_options(parser, known.policy, policy)
    parser.set_defaults(**SEARCH_DEFAULTS, **DEFAULTS.get(known.dataset, {}))
    return parser.parse_args(argv), policy


def make_grid(space: WidthSpace, divisor: int, low: float, high: float, fix: Sequence[str] = ()) -> Grid:
    """Lists the widths that a search may choose.

    Args:
        space: The width space of the model.
        divisor: Widths are multiples of it, and of the group's unit; where that is more than the base width, of the unit alone.
        low: Smallest ratio of the base width, but at least one step is kept.
        high: Largest ratio of the base width.
        fix: Patterns of the groups that keep their base width, and are left out.

    Returns:
        Group -> widths, ascending; the base width is always among them if its ratio is allowed.

    Raises:
        UsageError: A pattern fits no group, or nothing is left to search.
    """
    if low > high:
        raise UsageError(f'--width-min {low:g} is more than --width-max {high:g}')
    fixed = set()
    for pattern in fix:
        found = fnmatch.filter(space.searchable, pattern)
        if not found:
            raise UsageError(f"--fix '{pattern}' fits no searchable group of {space.architecture}"
                             f'{nearest(pattern, space.searchable)}')
        fixed.update(found)
    grid = {}
    for name, group in space.searchable.items():
        step = math.lcm(group.unit, divisor)
        step = group.unit if step > group.size else step
        first = max(math.ceil(low * group.size / step - 1e-9), 1)  # 0.1 * 240 may be a little more than 24
        widths = {*range(first * step, math.floor(high * group.size + 1e-9) + 1, step)}
        widths |= {group.size} if low <= 1 <= high or not widths else set()
        if name not in fixed:
            grid[name] = tuple(sorted(widths))
    if not grid:
        raise UsageError(f'{space.architecture} has no searchable group'
                         + (': --fix keeps them all' if fixed else f': {next(iter(space.frozen.values()), "no convolution")}'))
    return grid


@dataclass(frozen=True)
class Problem:
    """What is searched: the images, the model's space, the widths to choose from and the budget."""
    args: Namespace
    splits: Splits
    space: WidthSpace
    grid: Grid
    budget: Budget
    config: Mapping[str, Any]  # timm's data config

    def model(self, choice: Choice) -> nn.Module:
        """The model at some widths, always from the same initial weights."""
        random_seed(self.args.seed)
        return resize(create(self.args.model, self.args.num_classes, self.args.pretrained), self.space, *choice)

    def batches(self, images: View, training: bool) -> DataLoader:
        return loader(images, self.args, self.config, training)

    def costs(self, choice: Choice) -> dict[str, int]:
        return {'macs': Macs(self.space)(*choice), 'params': Params(self.space)(*choice)}


def prepare(args: Namespace) -> Problem:
    """Opens the images, builds and traces the model, and checks that the budget can be met, before anything is trained."""
    check_arguments(args, SEARCH_RANGES)
    if not 0 < args.search_holdout < 1:
        raise UsageError(f'--search-holdout must be between 0 and 1, not {args.search_holdout:g}')
    splits = open_splits(args)
    random_seed(args.seed)
    model = create(args.model, args.num_classes, args.pretrained)
    config = data_config(args, model)
    space = trace(model, config['input_size'])
    grid = make_grid(space, args.width_divisor, args.width_min, args.width_max, args.fix)
    register(space.architecture)  # what is saved must have a name that timm can build
    budget = Budget.parse(args.budget, space)
    budget.check_feasible({name: w[0] for name, w in grid.items()}, {name: w[-1] for name, w in grid.items()})
    return Problem(args, splits, space, grid, budget, config)


def choose(problem: Problem, policy: policies.Policy) -> Choice:
    """Lets a policy choose. It sees scores on the holdout; candidates train on the rest of the training images."""
    args = problem.args
    kept, held = split_holdout(problem.splits.targets, args.search_holdout, args.seed)
    if not len(held) or not len(kept):
        raise UsageError(f'--search-holdout {args.search_holdout:g} of {len(kept) + len(held)} training images leaves nothing: '
                         'every class needs two or more')
    print(f'{problem.space.architecture}: {len(problem.grid)} groups to search, {problem.budget}; {len(kept)} images train '
          f'candidates, {len(held)} score them', flush=True)
    training = problem.batches(View(problem.splits.train, kept), training=True)
    holdout = problem.batches(View(problem.splits.train, held), training=False)
    scores: list[float] = []
    with tqdm(total=policy.evaluations, desc=f'search ({args.policy})', unit='net', disable=None) as bar:
        def evaluate(widths: Mapping[str, int], skips: Sequence[str] = ()) -> float:
            choice = Choice(widths, tuple(skips))
            scores.append(top1(fit(problem.model(choice), training, args, args.search_epochs, 'candidate'), holdout, args))
            bar.update()
            bar.write(f"candidate {len(scores)}: {problem.costs(choice)['macs'] / 1e6:.2f}M MACs, "
                      f'{scores[-1]:.2f} % on the holdout')
            sys.stdout.flush()
            return scores[-1]

        found = policy.choose(evaluate)
    if not problem.budget.met(*found):
        raise UsageError(f'policy {args.policy} answered with a network over the budget {problem.budget}')
    return found


def search(args: Namespace, policy: type[policies.Policy]) -> list[dict[str, Any]]:
    """Runs a whole search: choose on the holdout, save, train, compare.

    Args:
        args: The flags.
        policy: The class that chooses; its options are among the flags.

    Returns:
        The rows of the final table: base, uniform and found.
    """
    options = policies.read_options(args, args.policy, policy)
    problem = prepare(args)
    space, grid, budget = problem.space, problem.grid, problem.budget
    found = choose(problem, policy(space, budget, grid, options, args.seed))
    uniform = Choice(uniform_widths(space, budget, grid))

    output = Path(args.output)
    for name in RESULTS:
        (output / name).unlink(missing_ok=True)
    provenance = _provenance(args, options, grid, problem.costs(found))
    save(problem.model(found), output, provenance, weights=args.pretrained)
    write_args(args, output)

    training = problem.batches(View(problem.splits.train), training=True)
    validation = problem.batches(View(problem.splits.validation), training=False)

    def row(name: str, network: nn.Module, choice: Choice) -> dict[str, Any]:
        print(f'training {name} for {args.epochs} epochs', flush=True)
        fit(network, training, args, args.epochs, name)
        return {'network': name, **problem.costs(choice), 'top1': round(top1(network, validation, args), 2)}

    random_seed(args.seed)
    network = create(f'local-dir:{output}', args.num_classes, args.pretrained)
    found_row = row('found', network, found)
    save(network, output, provenance)  # before the baselines, which may be interrupted
    uniform_row = dict(found_row, network='uniform') if uniform == found else row('uniform', problem.model(uniform), uniform)
    base = Choice({})
    base_row = row('base', problem.model(base), base)
    save(network, output, {**provenance, 'baseline': {'base': base_row, 'uniform': uniform_row}, 'top1': found_row['top1']})
    rows = [base_row, uniform_row, found_row]
    _write_table(rows, output / 'summary.csv')
    return rows


def _provenance(args: Namespace, options: Any, grid: Grid, costs: Mapping[str, int]) -> dict[str, Any]:
    return {
        'policy': args.policy, 'options': dataclasses.asdict(options), 'seed': args.seed, 'budget': args.budget,
        'grid': {name: list(widths) for name, widths in grid.items()}, 'baseline': {},
        'versions': {'timm': timm.__version__, 'torch': torch.__version__, 'python': platform.python_version()},
        'costs': costs}


def _write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the final table; a cost is followed by its share of the base's."""
    base = rows[0]
    print(f"\n{'network':<10}{'MACs':>18}{'params':>18}{'top-1 %':>10}")
    for r in rows:
        macs, params = (f'{r[c] / 1e6:.2f}M {r[c] / base[c]:6.1%}' for c in ('macs', 'params'))
        print(f"{r['network']:<10}{macs:>18}{params:>18}{r['top1']:>10.2f}")


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Parses, searches, and prints the table."""
    args, policy = parse(argv)
    rows = search(args, policy)
    print_table(rows)
    base = load_spec(args.output).architecture.removesuffix(SUFFIX)
    ready = 'import timm_width' if base in supported() else f"import timm_width; timm_width.register('{base}')"
    print(f"\nThe found model: {ready}; timm.create_model('local-dir:{args.output}', pretrained=True)")
