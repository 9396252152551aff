"""`timm-width latency COMMAND`: measured latency of a network at many widths."""
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

import torch
from timm.utils import ParseKwargs

from ..arguments import Parser
from ..data import UsageError
from ..grids import GRIDS
from ..space import nearest
from ..twins import has_twin
from .block_bundle import BLOCK_SAMPLES, export_blocks
from .block_fit import fit_blocks
from .build import DRAWN, Device, build_block_model, build_latency_model
from .bundle import Order, export_bundle
from .fit import STATISTICS, Fit, fit_results, plot, space_of
from .measure import BACKEND_NAMES, TORCH
from .model import PRIOR, SMOOTHNESS
from .runner.manifest import PARTS, read_manifest
from .runner.results import scan_results
from .sampling import LEAST_SAMPLES, networks_to_time

__all__ = ['main']

BLOCK_GRID = 'prunode'  # of GRIDS

EXPORT = """Writes a folder that measures the latency of a network at many widths on another machine.

    timm-width latency export mobilenetv1_100 --grid aows --samples 8000 --batch 64 --fp16 --out bundle

Copy the folder there: `python bundle/run.py --backend tensorrt` needs Python 3.10, numpy, onnx and one of onnxruntime, tensorrt or
the program trtexec, and nothing else; it can be stopped and goes on where it was. The weights are random: latency does not depend
on them. With --blocks, the bundle measures blocks alone: see `timm-width latency measure --help`.
"""


MEASURE = """Makes a latency model of a network on this machine: writes a bundle, measures it, and fits.

    timm-width latency measure mobilenetv1_100 --grid aows --backend onnxruntime --img-size 128 --out model.json

It measures 400 networks, twice as many, and so on, until the error on networks held out stops falling; stop it whenever you like,
and the same command goes on. `search.py --latency-model model.json` takes the file.

    timm-width latency measure prunet --blocks --knots 6 --backend onnxruntime --out blocks.json

With --blocks, each block is measured alone at each of its widths, and a whole network once for the rest: what prunode needs. Of
prunet, that is all blocks that a layer may be. --samples whole networks (default 20) say how well that adds up.
"""
FIT = """Fits a latency model to the results of a bundle, and says how well it predicts networks held out.

    timm-width latency fit bundle --out model.json

`search.py --latency-model model.json` takes the file. Beside it, model.png shows the networks held out, if matplotlib is there.
"""


def _parser(name: str, description: str) -> Parser:
    return Parser(prog=f'timm-width latency {name}', description=description, allow_abbrev=False)


def _add_network(parser: Parser, purpose: str) -> None:
    """The flags that say which networks to measure."""
    add = parser.add_argument
    add('model', metavar='MODEL', help="a timm model, or 'local-dir:FOLDER'")
    add('--grid', metavar='NAME', help='widths to measure: ratios as in 0.25,0.5,1 or ' + '; '.join(
        f'{name} ({rule.help}, {rule.low:g} to {rule.high:g})' for name, rule in GRIDS.items()))
    add('--samples', type=int, metavar='N',
        help=f'{purpose}; with --blocks, whole networks to validate on (default {BLOCK_SAMPLES})')
    add('--blocks', nargs='*', metavar='PATTERN', help="measure blocks alone: the modules named, as in 'layer?.?', or by default "
        'those that have hidden channels of their own or can be left out; of prunet, all that a layer may be')
    add('--knots', type=int, metavar='N', help='widths of each block to measure, 2 or more, and lines between them (default: all)')
    add('--width-min', type=float, metavar='RATIO', help="least share of a base width (default: the grid's)")
    add('--width-max', type=float, metavar='RATIO', help="most of a base width (default: the grid's)")
    add('--width-divisor', type=int, metavar='N', help="step of the widths (default: the grid's, mostly 8)")
    add('--fix', action='extend', nargs='+', default=[], metavar='PATTERN', help="groups that keep their width, as in 'conv_*'")
    add('--search-se', action='store_true', help='vary the squeezes of squeeze-excite, too')
    add('--img-size', type=int, metavar='N', help="side of the images (default: the model's)")
    add('--batch', type=int, default=1, metavar='N', help='images per call')
    add('--fp16', action='store_true', help='float16 weights and activations')
    add('--num-classes', type=int, metavar='N', help='outputs of the model')
    add('--in-chans', type=int, metavar='N', help='channels of the images')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='further arguments of the model')
    add('--seed', type=int, default=0, metavar='N', help='of the weights and the choice of networks')
    add('--max-files', type=int, default=200, metavar='N',
        help='most networks to export one by one, where one file does not follow its widths')


def _order(args: Namespace, precision: str) -> Order:
    for name, least in ('samples', 1), ('seed', 0), ('knots', 2):
        if (value := getattr(args, name)) is not None and value < least:
            raise UsageError(f'--{name} must be at least {least}, not {value}')
    if args.knots and args.blocks is None:
        raise UsageError('--knots is for --blocks: whole networks are measured at all widths of the grid')
    if args.blocks is not None and args.samples is None:
        args.samples = BLOCK_SAMPLES
    grid = args.grid or (None if args.blocks is None else '' if has_twin(args.model) else BLOCK_GRID)
    if grid is None:
        raise UsageError(f"--grid is missing: say which widths to measure: ratios as in 0.25,0.5,1 or {', '.join(GRIDS)}")
    return Order(args.model, grid, args.width_min, args.width_max, args.width_divisor, args.fix, args.search_se, args.img_size,
                 args.batch, precision, args.num_classes, args.in_chans, args.model_kwargs, args.seed, args.max_files, args.blocks,
                 args.knots)


def export(argv: Sequence[str]) -> None:
    """Writes a bundle, and prints what was written."""
    parser = _parser('export', EXPORT)
    _add_network(parser, 'networks to measure')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder to write')
    parser.add_argument('--overwrite', action='store_true', help='replace the bundle in DIR')
    args = parser.parse_args(argv)
    order = _order(args, 'fp16' if args.fp16 else 'fp32')
    if args.blocks is not None:
        print(export_blocks(order, Path(args.out), args.samples, args.overwrite))
        return
    if args.samples is None:
        raise UsageError('--samples is missing: say how many networks to measure')
    draw = partial(networks_to_time, samples=args.samples, seed=args.seed)
    print(export_bundle(order, Path(args.out), draw, args.overwrite))


def measure(argv: Sequence[str]) -> None:
    """Writes a bundle, measures it here, fits, and prints how well the model predicts."""
    parser = _parser('measure', MEASURE)
    _add_network(parser, f'most networks to measure, {LEAST_SAMPLES} or more (default {DRAWN}); fewer are, if more would not help')
    add = parser.add_argument
    add('--backend', required=True, choices=BACKEND_NAMES, metavar='NAME',
        help=f"what runs the networks: {', '.join(BACKEND_NAMES)}")
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME', help='of torch')
    add('--threads', type=int, metavar='N', help='of a CPU (default: all)')
    add('--bundle', metavar='DIR', help='folder for the networks and their times (default: beside FILE)')
    _add_file(parser)
    args = parser.parse_args(argv)
    out = _file(args)
    ours = args.backend in TORCH
    order = _order(args, 'fp16' if args.fp16 and not ours else 'fp32')
    device = Device(args.backend, 'fp16' if args.fp16 else 'fp32', args.threads, args.device if ours else None)
    folder = Path(args.bundle) if args.bundle else out.with_suffix('.bundle')
    if args.blocks is not None:
        _save(build_block_model(order, device, folder, args.samples), out)
        return
    _save(build_latency_model(order, device, DRAWN if args.samples is None else args.samples, folder), out)


def fit(argv: Sequence[str]) -> None:
    """Fits a latency model to the results of a bundle."""
    parser = _parser('fit', FIT)
    add = parser.add_argument
    add('bundle', metavar='DIR', help='the bundle, with the results that its run.py has written')
    add('--results', metavar='FILE', help='the results, if they are elsewhere (default: results.jsonl in DIR)')
    add('--statistic', default='median', metavar='NAME', help=f"which time of a network counts: {', '.join(STATISTICS)}")
    add('--smoothness', type=float, default=SMOOTHNESS, metavar='K', help='weight of monotonicity (%(default)g, as in AOWS)')
    add('--prior', type=float, default=PRIOR, metavar='P',
        help='weight of what is bilinear in the widths (%(default)g; 0: the fit of AOWS, which needs more networks)')
    add('--as-timed', action='store_true',
        help="leave timings as they are; by default, the drift of the machine's speed is taken out")
    _add_file(parser)
    args = parser.parse_args(argv)
    out, folder = _file(args), Path(args.bundle)
    manifest = read_manifest(folder)
    results = scan_results(Path(args.results) if args.results else folder / 'results.jsonl', manifest)
    if manifest.data['format'] == PARTS:
        _save(fit_blocks(manifest, results, space_of(manifest), args.statistic, steady=not args.as_timed), out)
        return
    _save(fit_results(manifest, results, space_of(manifest), args.statistic, args.smoothness, args.prior,
                      steady=not args.as_timed), out)


def _add_file(parser: Parser) -> None:
    parser.add_argument('--out', required=True, metavar='FILE', help='latency model to write, NAME.json')
    parser.add_argument('--overwrite', action='store_true', help='replace FILE if it exists')


def _file(args: Namespace) -> Path:
    """The file to write, if it can be."""
    out = Path(args.out)
    if out.suffix != '.json' or out.is_dir():
        raise UsageError(f"--out must be a file whose name ends in .json, not '{out}'")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out '{out}': there is no folder '{out.parent}'")
    if out.exists() and not args.overwrite:
        raise UsageError(f"'{out}' exists: give another --out, or --overwrite")
    return out


def _save(fit: Fit, out: Path) -> None:
    """Writes the model and its plot, and prints what it is worth."""
    fit.model.save(out)
    for note in fit.notes:
        print(f'note: {note}')
    if fit.model.validation.warning:
        print(f'warning: the model {fit.model.validation.warning}')
    print(f"{out}: {fit.model}; {fit.model.about['networks']} measurements, {fit.model.about['unknowns']} unknowns")
    if find_spec('matplotlib'):
        plot(fit, out.with_suffix('.png'))
        print(f"{out.with_suffix('.png')}: the networks held out")
    else:
        print("(no plot: pip install 'timm-width[plot]')")


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {  # name -> (function, what --help says)
    'export': (export, 'write a bundle: networks at many widths, and a program that measures them without torch'),
    'fit': (fit, 'fit a latency model to what a bundle has measured'),
    'measure': (measure, 'make a latency model on this machine: export, measure and fit'),
}
USAGE = 'usage: timm-width latency COMMAND ...\n\n' + '\n'.join(f'  {name:<8} {text}' for name, (_, text) in COMMANDS.items()) + (
    '\n\n  timm-width latency COMMAND --help lists the flags of a command')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Runs a command.

    Raises:
        UsageError: There is no such command, or it cannot be done.
    """
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ['']
    if name in ('-h', '--help', 'help'):
        print(USAGE)
        return
    if name not in COMMANDS:
        what = f"unknown command '{name}'{nearest(name, COMMANDS)}" if name else 'no command given'
        raise UsageError(f"{what}; there are {', '.join(COMMANDS)}")
    COMMANDS[name][0](rest)
