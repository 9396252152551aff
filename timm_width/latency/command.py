"""`timm-width latency COMMAND`: measured latency of a network at many widths."""
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Optional

from timm.utils import ParseKwargs

from ..arguments import Parser
from ..data import UsageError
from ..grids import GRIDS
from ..space import nearest
from . import bundle

__all__ = ['main']

EXPORT = """Writes a folder that measures the latency of a network at many widths on another machine.

    timm-width latency export mobilenetv1_100 --grid aows --samples 8000 --batch 64 --fp16 --out bundle

Copy the folder there: `python bundle/run.py --backend tensorrt` needs Python 3.10, numpy, onnx and one of onnxruntime, tensorrt or
the program trtexec, and nothing else; it can be stopped and goes on where it was. The weights are random: latency does not depend
on them.
"""


def parse_export(argv: Optional[Sequence[str]] = None) -> Namespace:
    """Reads the flags of export."""
    parser = Parser(prog='timm-width latency export', description=EXPORT, allow_abbrev=False)
    add = parser.add_argument
    add('model', metavar='MODEL', help="a timm model, or 'local-dir:FOLDER'")
    add('--grid', required=True, metavar='NAME', help='widths to measure: ratios as in 0.25,0.5,1 or ' + '; '.join(
        f'{name} ({rule.help}, {rule.low:g} to {rule.high:g})' for name, rule in GRIDS.items()))
    add('--samples', type=int, required=True, metavar='N', help='configurations to measure')
    add('--out', required=True, metavar='DIR', help='folder to write')
    add('--width-min', type=float, metavar='RATIO', help="least share of a base width (default: the grid's)")
    add('--width-max', type=float, metavar='RATIO', help="most of a base width (default: the grid's)")
    add('--width-divisor', type=int, metavar='N', help="step of the widths (default: the grid's, mostly 8)")
    add('--fix', action='extend', nargs='+', default=[], metavar='PATTERN', help="groups that keep their width, as in 'conv_*'")
    add('--search-se', action='store_true', help='vary the squeezes of squeeze-excite, too')
    add('--img-size', type=int, metavar='N', help="side of the images (default: the model's)")
    add('--batch', type=int, default=1, metavar='N', help='images per call')
    add('--fp16', action='store_true', help='float16 weights and activations in the file')
    add('--num-classes', type=int, metavar='N', help='outputs of the model')
    add('--in-chans', type=int, metavar='N', help='channels of the images')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='further arguments of the model')
    add('--seed', type=int, default=0, metavar='N', help='of the weights and the choice of configurations')
    add('--max-files', type=int, default=200, metavar='N',
        help='most configurations of a network that must be exported one by one, because one file does not follow its widths')
    add('--overwrite', action='store_true', help='replace the bundle in DIR')
    return parser.parse_args(argv)


def export(argv: Optional[Sequence[str]] = None) -> None:
    """Parses, writes a bundle, and prints what was written."""
    args = parse_export(argv)
    if args.samples < 1:
        raise UsageError(f'--samples must be at least 1, not {args.samples}')
    if args.seed < 0:
        raise UsageError(f'--seed must be at least 0, not {args.seed}')
    order = bundle.Order(
        args.model, args.grid, args.width_min, args.width_max, args.width_divisor, args.fix, args.search_se, args.img_size,
        args.batch, 'float16' if args.fp16 else 'float32', args.num_classes, args.in_chans, args.model_kwargs, args.seed,
        args.max_files)
    draw = partial(bundle.draw_uniform, samples=args.samples, seed=args.seed)
    print(bundle.export_bundle(order, Path(args.out), draw, args.overwrite))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {  # name -> (function, what --help says)
    'export': (export, 'write a bundle: networks at many widths, and a program that measures them without torch'),
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
