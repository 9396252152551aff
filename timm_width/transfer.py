"""timm-width transfer: widths found on one network, for a deeper, wider or otherwise larger one; and how alike widths are.

    timm-width transfer runs/small/config.json --to resnet34 --match macs --output runs/resnet34
    timm-width transfer --compare runs/a runs/b runs/b/search/proxies/* --to resnet18 --output runs/alike

The first writes a config of `<MODEL>_width` with the same shape and the cost asked for: multipliers (found width / width before, of
the network that was searched) are given to the blocks that MODEL has in addition, and scaled by one factor to the cost. Both
networks must have the same stages, of blocks of the same layers. Squeezes of squeeze-excite keep their width unless the config
changes them. The second prints the cosines between the multipliers of several configs and the uniform ones, and draws them, with
the average widths and their standard deviation (Table 1, Figures A1 and A2 of "Width Transfer", 2021; see extrapolation.py).
"""
import csv
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from timm.data import resolve_data_config
from torch import nn

from .arguments import Parser, check_output
from .budget import Budget
from .config import SUFFIX, Spec, load_spec, save
from .cost import Macs, Params
from .data import UsageError
from .engine import create
from .extrapolation import DEPTHS, TOLERANCE, Found, Matched, cosines, extrapolate, match, multipliers, width_vector
from .grids import squeezes
from .latency.model import LatencyModel
from .models import register
from .plots import plot_average, plot_similarity
from .space import WidthSpace
from .trace import trace

__all__ = ['Source', 'compare', 'main', 'read_source', 'transfer']

KEPT = ('policy', 'options', 'seed', 'budget', 'search', 'projection')  # of the provenance of what is carried over
UNIFORM = 'uniform'


@dataclass(frozen=True)
class Source:
    """A config whose widths are carried over.

    Attributes:
        spec: What it says.
        found: Its widths.
        num_classes: Of its network.
        squeezes: Whether its squeezes are other than before.
    """
    spec: Spec
    found: Found
    num_classes: Optional[int]
    squeezes: bool


def parse(argv: Optional[Sequence[str]] = None) -> Namespace:
    """Reads the flags."""
    parser = Parser(prog='timm-width transfer', description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add('configs', nargs='+', metavar='CONFIG', help='config.json of a searched network, or its folder')
    add('--to', metavar='MODEL', help="a timm model by name (default: the config's base, for what was found on a projection of it)")
    add('--match', default='macs', metavar='COST', help="what the result costs: macs, params or latency, as much as MODEL's own; "
        'or a limit as in macs=300M, macs=0.5x, latency=0.5ms (default: macs)')
    add('--latency-model', metavar='FILE', help='of `timm-width latency fit`, for MODEL')
    add('--depth', choices=DEPTHS, default=DEPTHS[0], metavar='HOW', help=f"what further blocks get: {' or '.join(DEPTHS)}")
    add('--width-divisor', type=int, default=1, metavar='N', help='widths are multiples of it (default: 1)')
    add('--num-classes', type=int, metavar='N', help="of MODEL (default: the config's)")
    add('--img-size', type=int, metavar='N', help="side of the images that cost is counted for (default: MODEL's)")
    add('--output', metavar='FOLDER', help='where to write')
    add('--overwrite', action='store_true', help='replace what is in --output')
    add('--compare', action='store_true', help='compare the configs instead, carried over to MODEL')
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Parses, carries over or compares."""
    args = parse(argv)
    for name in ('width_divisor', 'num_classes', 'img_size'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    sources = [read_source(path) for path in args.configs]
    model, space = _target(args, sources[0])
    if args.compare:
        _compare(args, sources, model, space)
        return
    if len(sources) > 1:
        raise UsageError(f'{len(sources)} configs: give one, or --compare')
    if not args.output:
        raise UsageError('--output FOLDER says where to write the config')
    check_output(Path(args.output), args.overwrite)
    found, budget = transfer(args, sources[0], model, space)
    folder = Path(args.output)
    whole = create(space.architecture + SUFFIX, model.num_classes, widths={
        n: w for n, w in found.widths.items() if w != space[n].size}, skips=list(found.skips))
    spec = sources[0].spec
    source = {'architecture': spec.architecture, 'shapes': spec.shapes,
              **{k: spec.provenance[k] for k in KEPT if k in spec.provenance}}
    costs = {'macs': Macs(space)(found.widths, found.skips), 'params': Params(space)(found.widths, found.skips)}
    save(whole, folder, {'policy': 'transfer', 'budget': str(budget.text), 'costs': costs, 'transfer': {
        'source': source, 'depth': args.depth, 'alpha': found.alpha, 'img_size': space.input_size[1]}}, False)
    show = budget.cost.show
    for name, kept in ('macs', Macs(space)), ('params', Params(space)):
        print(f'{name}: {costs[name] / 1e6:.2f}M, {costs[name] / kept():.1%} of {space.architecture}')
    print(f'alpha is {found.alpha:.4f}; {budget.text}: {show(found.cost)} for {show(found.limit)}, {found.away:.2%} less')
    if found.away > TOLERANCE:
        print('(no rounding of the widths comes closer)')
    print(f"The network: import timm_width; timm.create_model('local-dir:{folder}')")


def read_source(path: str) -> Source:
    """Reads a config, and what its network was before it was searched.

    Raises:
        ConfigError, UsageError: It cannot be read.
        WidthError: Its widths, or those before, do not fit its network.
    """
    spec = load_spec(path)
    if not spec.architecture.endswith(SUFFIX):
        raise UsageError(f"{path}: '{spec.architecture}' is not a model with widths: there is nothing to carry over")
    base = spec.architecture.removesuffix(SUFFIX)
    register(base)
    built = dict(spec.model_args)
    classes = built.pop('num_classes', None)
    with torch.device('meta'):
        model = create(base, classes, **built)
    space = trace(model)
    before = spec.provenance.get('projection', {})
    widths, skips = (before.get('widths', {}), before.get('skips', [])) if isinstance(before, dict) else (None, None)
    if not isinstance(widths, dict) or not isinstance(skips, list):
        raise UsageError(f"{path}: its 'projection' does not say what its network was before: widths and skips")
    space.check(widths, skips)
    found = Found(space, spec.widths, widths, tuple(skips), tuple(s for s in spec.skips if s not in skips))
    ratios = multipliers(found)
    return Source(spec, found, classes, any(ratios[n] != 1 for n in squeezes(model, space)))


def _target(args: Namespace, source: Source) -> tuple[nn.Module, WidthSpace]:
    name = args.to or source.spec.architecture.removesuffix(SUFFIX)
    if ':' in name or name.endswith(SUFFIX):
        raise UsageError(f"--to '{name}': give a timm model by name, such as resnet34")
    with torch.device('meta'):
        model = create(name, args.num_classes or source.num_classes)
        size = resolve_data_config({'img_size': args.img_size} if args.img_size else {}, model=model)['input_size']
    register(name)
    return model, trace(model, (getattr(model, 'in_chans', 3), *size[1:]))


def transfer(args: Namespace, source: Source, model: nn.Module, space: WidthSpace) -> tuple[Matched, Budget]:
    """Carries widths over to a model, at the cost that --match asks for.

    Raises:
        TransferError: The networks do not correspond, or cannot cost that little.
        BudgetError, LatencyError: --match cannot be read, or the latency model is of another network.
    """
    latency = LatencyModel.load(args.latency_model).cost(space) if args.latency_model else None
    text = args.match if '=' in args.match else f'{args.match}=1x'
    budget = Budget.parse(text, space, latency)
    ratios, skips = extrapolate(source.found, space, args.depth)
    fixed = () if source.squeezes else squeezes(model, space)
    return match(budget.cost, budget.limit, ratios, skips, args.width_divisor, fixed), budget


# -- comparison ------------------------------------------------------------------------------------------------------------


def compare(found: Mapping[str, Found], space: WidthSpace, depth: str = DEPTHS[0]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """How alike widths are, all carried over to one network at its own MACs.

    Args:
        found: Name -> widths.
        space: The width space of the network.
        depth: One of DEPTHS.

    Returns:
        The names, with UNIFORM behind them; the cosines between every two (names, names); and the widths (names but UNIFORM,
        searchable groups).
    """
    ratios = {name: extrapolate(one, space, depth) for name, one in found.items()}
    vectors = [width_vector(space, of_group) for of_group, _ in ratios.values()]
    macs = Macs(space)
    widths = [match(macs, macs(), *each).widths for each in ratios.values()]
    alike = cosines([*vectors, width_vector(space, {})])
    return [*ratios, UNIFORM], alike, np.array([[each[n] for n in space.searchable] for each in widths])


def _compare(args: Namespace, sources: Sequence[Source], model: nn.Module, space: WidthSpace) -> None:
    names, alike, widths = compare(dict(zip(_names(args.configs), [s.found for s in sources])), space, args.depth)
    wide = max(map(len, names)) + 2
    print(f'cosines between the multipliers of {space.architecture}\'s layers')
    for i, name in enumerate(names):
        print(f'{i + 1:>3} {name:<{wide}}' + ''.join(f'{c:7.3f}' for c in alike[i]))
    print(f"\n{'widths':<{wide + 20}}{'base':>7}{'mean':>9}{'std':>8}")
    spread = widths.std(0, ddof=1) if len(widths) > 1 else np.zeros(widths.shape[1])
    for name, group, mean, std in zip(space.searchable, space.searchable.values(), widths.mean(0), spread):
        print(f'{name:<{wide + 20}}{group.size:>7}{mean:>9.1f}{std:>8.1f}')
    if args.output:
        folder = Path(args.output)
        pictures = {'similarity': plot_similarity(names, alike), 'widths': plot_average(space.base_widths, widths)}
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / 'similarity.csv').open('w', newline='') as file:
            csv.writer(file).writerows([['', *names], *([n, *map(float, row)] for n, row in zip(names, alike))])
        for name, figure in pictures.items():
            figure.savefig(folder / f'{name}.png', dpi=150, bbox_inches='tight')
            print(folder / f'{name}.png')


def _names(paths: Sequence[str]) -> list[str]:
    """Short names of configs: their folders', with as many of the folders around them as tell them apart."""
    parts = [[p for p in Path(path.removeprefix('local-dir:')).parts if p != 'config.json'] for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ['/'.join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError('--compare: one config is given twice')
