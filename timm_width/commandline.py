"""The command line of train, read as timm's train.py reads its own: -c YAML, then flags; and what follows from them.

A YAML file holds flags by their names in Python (`batch_size: 64`); flags on the command line go before it. args.yaml of a run is
such a file, and those in recipes/ are found by name.
"""
import logging
import os
from argparse import SUPPRESS, Action, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from timm.utils import ParseKwargs

from .arguments import (
    OWN,
    TRAIN_RANGES,
    Parser,
    add_arguments,
    add_own_arguments,
    add_train_arguments,
    check_arguments,
    check_output,
    flags_given,
)
from .data import DEFAULTS, UsageError
from .latency.measure import check_backend
from .losses import resolve_loss
from .space import nearest

__all__ = ['make_parser', 'parse', 'said']

RECIPES = Path(__file__).parent / 'recipes'

_logger = logging.getLogger(__name__)
_locks: list[Any] = []  # held until this process ends


def make_parser(description: str = '') -> Parser:
    """The parser of all flags of train but -c."""
    parser = Parser(prog='timm-width train', description=description)
    parser.add_argument('-c', '--config', default=SUPPRESS, metavar='FILE',
                        help='YAML file of flags, for those that are not given here; or one of ours: '
                             + ', '.join(sorted(p.stem for p in RECIPES.glob('*.yaml'))))
    add_arguments(parser)
    add_train_arguments(parser)
    add_own_arguments(parser)
    return parser


def parse(argv: Optional[Sequence[str]] = None, description: str = '') -> tuple[Namespace, str]:
    """Reads a command line.

    Args:
        argv: The command line, by default that of this process.
        description: What --help says first.

    Returns:
        The flags, and the text of args.yaml.

    Raises:
        UsageError: Something in it cannot be meant.
    """
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument('-c', '--config', default='')
    first.add_argument('--sweep-locks', nargs='+')  # timm's sweep.py gives these two; they are no flags of a training
    first.add_argument('--sweep-attempt', nargs=2)
    known, rest = first.parse_known_args(argv)
    named = Parser(add_help=False, allow_abbrev=False)
    named.add_argument('--dataset')
    dataset = named.parse_known_args(rest)[0].dataset
    if known.sweep_locks or known.sweep_attempt:
        _join_sweep(known.sweep_locks or [], *known.sweep_attempt or ('', ''))
    parser = make_parser(description)
    config = _read_config(known.config, parser) if known.config else {}
    parser.set_defaults(**DEFAULTS.get(dataset or config.get('dataset'), {}))
    parser.set_defaults(**config)
    given = flags_given(parser, rest)
    args = parser.parse_args(rest)
    text = yaml.safe_dump(vars(said(args)), default_flow_style=False)  # as given: -c reads it again
    _resolve(args, given | set(config))
    if 'device' not in given and args.device == 'cuda' and not torch.cuda.is_available():
        if os.environ.get('RANK', '0') == '0':
            print('there is no CUDA device here: training on the CPU (--device says otherwise)', flush=True)
        args.device = 'cpu'
    check_arguments(args, TRAIN_RANGES)
    return args, text


def said(args: Namespace) -> Namespace:
    """The flags without those of ours that were left alone: what is written down."""
    return Namespace(**{k: v for k, v in vars(args).items() if k not in OWN or v is not None})


# -- YAML ------------------------------------------------------------------------------------------------------------------


def _read_config(path: str, parser: Parser) -> dict[str, Any]:
    """The flags of a YAML file, each as the parser would give it."""
    shipped = RECIPES / f'{path}.yaml'
    try:
        found = yaml.safe_load((shipped if shipped.is_file() and not Path(path).exists() else Path(path)).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UsageError(f"--config '{path}' cannot be read: {' '.join(str(e).split())}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UsageError(f"--config '{path}' must hold flags as in `batch_size: 64`, not a {type(found).__name__}")
    actions = {a.dest: a for a in parser._actions if a.dest not in ('help', 'config')}
    values = {}
    for key, value in found.items():
        if key in actions:
            values[key] = _converted(key, value, actions[key], parser)
        else:
            _logger.warning(f"--config '{path}': '{key}' is no flag{nearest(str(key), actions)}; it is left out")
    return values


def _converted(key: str, value: Any, action: Action, parser: Parser) -> Any:
    """A YAML value as the flag's own type would make it."""
    def wrong(wanted: str):
        return parser.error(f'--config: {key} must be {wanted}, not {value!r}')

    def one(item: Any) -> Any:
        made = item
        if action.type in (int, float):
            if isinstance(item, bool) or not isinstance(item, (int, float, str)):
                wrong('a number')
            try:
                made = action.type(item)
            except (ValueError, OverflowError):
                wrong('a number')
            if action.type is int and not isinstance(item, str) and made != item:
                wrong('a whole number')
        elif isinstance(item, (list, dict)):
            wrong('one value')
        elif not isinstance(item, str):
            made = str(item)
        if action.choices is not None and made not in action.choices:
            wrong(f"one of {', '.join(map(str, action.choices))}")
        return made

    if value is None and (action.default is None or action.nargs in ('*', '+')):
        return action.default
    if isinstance(action, ParseKwargs):
        return value if isinstance(value, dict) else wrong('a mapping')
    if action.nargs == 0:
        return value if isinstance(value, bool) else wrong('true or false')
    if value is None:
        wrong('given')
    if action.nargs in ('*', '+') or isinstance(action.nargs, int):
        if not isinstance(value, (list, tuple)) or isinstance(action.nargs, int) and len(value) != action.nargs:
            wrong('a list' if not isinstance(action.nargs, int) else f'a list of {action.nargs}')
        return [one(v) for v in value]
    return one(value)


# -- what follows from the flags -------------------------------------------------------------------------------------------


def _resolve(args: Namespace, given: set[str]) -> None:
    """Old names become new ones, and what depends on other flags is set or refused."""
    if args.data and not args.data_dir:
        args.data_dir = args.data
    if args.drop_connect is not None and args.drop_path is None:
        args.drop_path = args.drop_connect
    resolve_loss(args, given)
    if args.task == 'multilabel':
        if 'eval_metric' not in given:
            args.eval_metric = 'map'
        if args.kd_model_name:
            raise UsageError('--kd-model-name distils a classification: leave out --task multilabel')
    if args.aug_splits == 1:
        raise UsageError('--aug-splits 1 is no split: give 2 or more')
    if args.split_bn and args.aug_splits < 2 and not args.resplit:
        raise UsageError('--split-bn needs --aug-splits of 2 or more, or --resplit')
    if args.amp and args.model_dtype:
        raise UsageError('--amp and --model-dtype exclude one another')
    if args.model_dtype and not isinstance(getattr(torch, args.model_dtype, None), torch.dtype):
        raise UsageError(f"--model-dtype '{args.model_dtype}' is no type: bfloat16, float16 or float32")
    if args.resume == 'auto' and not args.experiment:
        raise UsageError('--resume auto needs --experiment: the folder that it goes on in')
    if args.importance and not args.inherit and not (args.widths and args.pretrained):
        raise UsageError('--importance ranks the channels of weights that are cut: it needs --inherit, '
                         'or --widths with --pretrained')
    if args.finetune_from and 'model' not in given and (Path(args.finetune_from) / 'config.json').is_file():
        args.model = f'local-dir:{args.finetune_from}'
    ours = [f for f in ('save_pretrained', 'push_to_hub', 'latency_backend', 'kd_model_name') if getattr(args, f)]
    if args.torchscript and ours:
        raise UsageError(f"--torchscript does not go with --{ours[0].replace('_', '-')}")
    if args.latency_backend:
        check_backend(args.latency_backend, args.latency_precision or 'fp32', args.device)  # before the training, not after it
    elif args.latency_precision or args.latency_batch:
        raise UsageError('--latency-precision and --latency-batch need --latency-backend')
    if args.save_pretrained:
        check_output(Path(args.save_pretrained), True, args.model, '--save-pretrained')
    if args.inherit and args.finetune_from:
        raise UsageError('--inherit and --finetune-from both say where weights come from')


def _join_sweep(paths: Sequence[str], attempt: str, name: str) -> None:
    """Shares the locks of timm's sweep.py while this process lives, and stops if the sweep has given up on it.

    Raises:
        UsageError: This attempt is not the one that the sweep waits for.
    """
    import fcntl
    for path in paths:
        _locks.append(open(path))  # noqa: SIM115 (held until this process ends)
        fcntl.flock(_locks[-1], fcntl.LOCK_SH)
    if attempt:
        live = Path(attempt).read_text().strip() if Path(attempt).is_file() else ''
        if live != name:
            raise UsageError(f"--sweep-attempt {name} is {'retired' if not live else f'not the live one, {live}'}")
