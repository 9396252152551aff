"""The flags of a search: the policies', those that it shares with training, and those of the search that --resume goes on with."""
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
import yaml

from . import policies
from .arguments import RANGES, Parser, add_arguments, check_arguments, check_output, flags_given
from .data import DEFAULTS, UsageError, mixes
from .extrapolation import DEPTHS
from .grids import GRIDS
from .latency.sampling import LEAST_SAMPLES
from .losses import resolve_loss
from .problem import BASE, parse_proxy
from .space import MAX_GROWTH
from .target import add_target_arguments

__all__ = ['check_search_arguments', 'parse', 'parse_sweep', 'policy_names', 'read_args']

SEARCH_RANGES = {**RANGES, 'epochs': (0, None), 'search_epochs': (1, None), 'seeds': (1, None), 'width_divisor': (1, None),
                 'width_min': (0, MAX_GROWTH), 'width_max': (0, MAX_GROWTH), 'latency_batch': (1, None),
                 'latency_threads': (1, None), 'latency_samples': (LEAST_SAMPLES, None), 'supernet_macs': (1, None)}
# where a search differs from timm's train.py: several trainings and brief ones should end the same day
SEARCH_DEFAULTS = {'epochs': 50, 'batch_size': 64, 'validation_batch_size': 512, 'sched_on_updates': True,
                   'train_interpolation': '', 'device': 'cuda' if torch.cuda.is_available() else 'cpu'}
BASELINES = [BASE, 'uniform']
# what may be another when a search goes on: nothing that decides what the policy has learned so far
FREE = ('budget', 'sweep', 'baselines', 'seeds', 'epochs', 'workers', 'device', 'output', 'resume', 'overwrite', 'pin_mem',
        'latency_model', 'latency_backend', 'latency_precision', 'latency_batch', 'latency_threads', 'latency_samples')


def parse(
        argv: Optional[Sequence[str]] = None,
        description: Optional[str] = None,
) -> tuple[Namespace, dict[str, type[policies.Policy]]]:
    """Reads the flags; those of the policies, and defaults for the dataset, come with the names given.

    Returns:
        The flags, and the policies that they name: the searching one first.
    """
    first = Parser(add_help=False, allow_abbrev=False)
    for flag in ('--policy', '--dataset', '--resume'):
        first.add_argument(flag)
    first.add_argument('--baselines', nargs='*')
    known, _ = first.parse_known_args(argv)
    earlier = read_args(known.resume) if known.resume else {}
    if earlier:
        earlier['budget'] = _budgets(earlier)
    for name, default in ('policy', None), ('dataset', None), ('baselines', BASELINES):
        given = getattr(known, name)
        setattr(known, name, earlier.get(name, default) if given is None or given == '' else given)

    parser = Parser(prog='timm-width search', description=description, allow_abbrev=False)
    group = parser.add_argument_group('search')
    group.add_argument('--policy', required=not known.policy, metavar='NAME',
                       help=f"one of {', '.join(policies.names())}, or a file of yours; --policy NAME --help shows its options; "
                            'several with commas between them are compared')
    group.add_argument('--budget', required=not earlier, nargs='+', metavar='COST=LIMIT',
                       help='macs=150M, params=2M, latency=0.5ms (per image), or a ratio of the base: macs=0.5x; one network is '
                            'found for each; for a policy that weighs costs itself, the name alone will do')
    group.add_argument('--sweep', nargs='+', default=[], metavar='OPTION=VALUES',
                       help='try several values of options, as in alpha=0.2,0.4 lam=0.4,0.85, from one shared beginning: a '
                            'network for each value of the first, with those of the others that have the best search loss')
    searching = policy_names(known.policy or '')
    length = policies.load(searching[0]).search_epochs if len(searching) == 1 else policies.Policy.search_epochs
    usual = length if searching else "the paper's"
    group.add_argument('--search-epochs', type=int, metavar='N',
                       help=f"length of the policy's own training, after which it scores networks (default: {usual})")
    group.add_argument('--search-holdout', type=float, default=0.1, metavar='SHARE',
                       help='part of the training images on which the policy chooses')
    group.add_argument('--proxy', default='', metavar='HOW',
                       help='a cheaper search: width=0.5,depth=1,resolution=96,data=0.1,classes=100, any of them; a narrower or '
                            'shallower network (depth: blocks in a stage at most, or a share as in 0.5x) is searched for the same '
                            'share of its own cost, and what is found is carried over; else, costs stay those of the real thing')
    group.add_argument('--transfer-depth', choices=DEPTHS, default=DEPTHS[0], metavar='HOW',
                       help=f"what blocks get that --proxy depth= left out: {' or '.join(DEPTHS)}")
    group.add_argument('--grid', metavar='NAME', help='widths that the policy may choose: ratios as in 0.25,0.5,1 or ' + '; '.join(
        f'{name} ({rule.help}, {rule.low:g} to {rule.high:g})' for name, rule in GRIDS.items()) + " (default: the policy's)")
    group.add_argument('--width-min', type=float, metavar='RATIO', help="least share of a base width (default: the grid's)")
    group.add_argument('--width-max', type=float, metavar='RATIO', help="most of a base width (default: the grid's)")
    group.add_argument('--supernet-macs', type=float, metavar='RATIO',
                       help='instead of --width-max: the one share of all base widths that has so many times the base MACs')
    group.add_argument('--width-divisor', type=int, metavar='N', help="step of the widths (default: the grid's, mostly 8)")
    group.add_argument('--fix', action='extend', nargs='+', default=[], metavar='PATTERN',
                       help="groups that keep their width, as in 'conv_*'")
    group.add_argument('--search-se', action='store_true', help='search the squeezes of squeeze-excite, too')
    group.add_argument('--baselines', nargs='*', default=BASELINES, metavar='NAME',
                       help=f"what to set the found network beside: {BASE}, and any policies; or nothing")
    group.add_argument('--seeds', type=int, default=1, metavar='N',
                       help='train every network of the table N times, and report mean and standard deviation')
    add_target_arguments(parser.add_argument_group('latency'))
    add_arguments(parser)
    parser.add_argument('--no-sched-on-updates', dest='sched_on_updates', action='store_false', help='the opposite')
    group = parser.add_argument_group('output')
    group.add_argument('--output', required=not known.resume, metavar='FOLDER', help='new or empty folder for the results')
    group.add_argument('--overwrite', action='store_true', help='replace the results of an earlier run in --output')
    group.add_argument('--resume', metavar='FOLDER', help='go on with the search in that folder; flags come from there, and '
                       '--baselines, --seeds and --epochs may be others; another --budget comes to those there')
    found = {}
    for name in dict.fromkeys([*(searching or [None]), *known.baselines]):
        label = policies.label(name) if name else BASE
        if name and (label in found or name != BASE and label == BASE):
            raise UsageError(f"--policy and --baselines name two policies '{label}': give '{name}' another name")
        if label != BASE:
            found[label] = policies.load(name)
            policies.add_options(parser, label, found[label])
    parser.elsewhere = {f'--{name}.{option}': name for name in policies.names() if name not in found
                        for option in policies.option_names(name)}
    parser.set_defaults(**SEARCH_DEFAULTS, **DEFAULTS.get(known.dataset, {}))
    parser.set_defaults(**earlier)
    args = parser.parse_args(argv)
    resolve_loss(args, flags_given(parser, argv) | set(earlier))
    args.fix = list(dict.fromkeys(args.fix))  # one that is said again on --resume is no other
    if known.resume:
        args.output = known.resume
        if not args.sweep:  # further budgets come to those there: their rows stay in the table
            args.budget = earlier['budget'] + [text for text in args.budget if text not in earlier['budget']]
        free = {*FREE, *(f'{name}.{option}' for name, policy in found.items() for option in policy.free_options)}
        changed = [k for k, v in earlier.items() if k not in free and vars(args).get(k) != v]
        if changed:
            raise UsageError(f"--resume '{known.resume}': the search there was run with " + ', '.join(
                f"--{k.replace('_', '-')} {earlier[k]}" for k in changed) + '; another needs another --output')
        learned = [name for name in (*policy_names(earlier['policy']), *earlier.get('baselines', ())) if name != BASE and
                   policies.label(name) in found and found[policies.label(name)].learns_budget]
        if learned and (args.budget != earlier['budget'] or args.latency_model != earlier.get('latency_model')):
            model = f" by --latency-model {earlier['latency_model']}" if earlier.get('latency_model') else ''
            raise UsageError(f"--resume '{known.resume}': {policies.label(learned[0])} learned for the budgets there, "
                             f"{' '.join(earlier['budget'])}{model}, and knows nothing of others: they need "
                             'another --output')
    elif args.search_epochs is None:
        args.search_epochs = length
    return args, found


def _budgets(earlier: Mapping[str, Any]) -> list[str]:
    """The budgets in an args.yaml; the first version wrote one text."""
    found = earlier.get('budget') or []
    return [found] if isinstance(found, str) else list(map(str, found)) if isinstance(found, list) else []


def policy_names(policy: str) -> list[str]:
    """The names in --policy, in their order."""
    return list(dict.fromkeys(name.strip() for name in policy.split(',') if name.strip()))


def parse_sweep(texts: Sequence[str]) -> dict[str, list[float]]:
    """Reads ['alpha=0.2,0.4', 'lam=0.4,0.85'].

    Raises:
        UsageError: With what would be right.
    """
    found: dict[str, list[float]] = {}
    for text in texts:
        name, _, values = text.partition('=')
        try:
            found[name] = list(dict.fromkeys(float(f'{float(v):g}') for v in values.split(',')))  # as files are named
        except ValueError:
            raise UsageError(f"--sweep '{text}' is not a sweep: write an option and its values, as in alpha=0.2,0.4") from None
    return found


def read_args(folder: str) -> dict[str, Any]:
    path = Path(folder) / 'args.yaml'
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as e:
        reason = '' if isinstance(e, FileNotFoundError) else f': {str(e).splitlines()[0]}'
        raise UsageError(f"--resume '{folder}': no search was begun there, it has no args.yaml{reason}") from None
    if not isinstance(found, dict) or 'policy' not in found:
        raise UsageError(f"--resume '{folder}': its args.yaml is not that of a search")
    return found


def check_search_arguments(args: Namespace, found: Mapping[str, type[policies.Policy]]) -> None:
    check_arguments(args, SEARCH_RANGES)
    parse_proxy(args.proxy)
    if not 0 < args.search_holdout < 1:
        raise UsageError(f'--search-holdout must be between 0 and 1, not {args.search_holdout:g}')
    if len(set(args.budget)) < len(args.budget):
        raise UsageError(f"--budget {' '.join(args.budget)} names one twice")
    parse_sweep(args.sweep)
    for name, policy in found.items():
        if args.model_ema and policy.shrinks:
            raise UsageError(f'--model-ema cannot be used with the policy {name}: it removes parts of the network as it trains')
        if mixes(args) and policy.trains() and not policy.mixup:
            raise UsageError(f'--mixup and --cutmix cannot be used with the policy {name}: it needs the class of every image')
    if not args.resume:
        check_output(Path(args.output), args.overwrite, args.model)
