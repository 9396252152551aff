"""Searches the widths of a timm model for budgets, trains what was found, and sets it beside the base and the uniform width.

    python search.py --model resnet18 --data-dir flowers --policy autoslim --budget macs=0.5x --output runs/x

The policy learns on the training images but for the holdout, on which it chooses; the found model then trains on all of them.
The validation images are read once, for the table at the end. --output becomes a folder for
timm.create_model('local-dir:FOLDER', pretrained=True), with config.json and model.safetensors; with several budgets it holds one
such folder for each. Beside them are args.yaml, summary.csv (the table) and search/ (what --resume goes on from). Costs are those
of one image at --img-size. A warm-up is at most a fifth of its training. Runs under torchrun, too.
"""
import dataclasses
import json
import platform
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import timm
import torch
import yaml
from torch import nn
from tqdm import tqdm

from . import policies
from .arguments import RANGES, Parser, add_arguments, check_arguments, check_output, flags_given, write_args
from .budget import Budget
from .config import SUFFIX, digest, fingerprint, load_spec, save
from .cost import Macs
from .data import DEFAULTS, UsageError, mixes
from .engine import Training, is_primary, of_primary, say, start_processes, top1, wait_for_all
from .grids import GRIDS
from .holdout import Holdout, Journal
from .latency.sampling import LEAST_SAMPLES
from .losses import resolve_loss
from .models import supported
from .policies.base import Choice, Grid
from .problem import Problem, learning_problem, make_problem, parse_proxy, set_budgets
from .report import METRICS, metric_name, print_table, write_table
from .space import MAX_GROWTH
from .target import (
    Target,
    add_target_arguments,
    build_target,
    check_kept,
    check_measurable,
    find_target,
    keep_model,
    needs_measuring,
)

__all__ = ['main', 'parse', 'search']

SEARCH_RANGES = {**RANGES, 'epochs': (0, None), 'search_epochs': (1, None), 'seeds': (1, None), 'width_divisor': (1, None),
                 'width_min': (0, MAX_GROWTH), 'width_max': (0, MAX_GROWTH), 'latency_batch': (1, None),
                 'latency_threads': (1, None), 'latency_samples': (LEAST_SAMPLES, None), 'supernet_macs': (1, None)}
# where a search differs from timm's train.py: several trainings and brief ones should end the same day
SEARCH_DEFAULTS = {'epochs': 50, 'batch_size': 64, 'validation_batch_size': 512, 'sched_on_updates': True,
                   'train_interpolation': '', 'device': 'cuda' if torch.cuda.is_available() else 'cpu'}
BASE = 'base'
BASELINES = [BASE, 'uniform']
# what may be another when a search goes on: nothing that decides what the policy has learned so far
FREE = ('budget', 'baselines', 'seeds', 'epochs', 'workers', 'device', 'output', 'resume', 'overwrite', 'pin_mem', 'latency_model',
        'latency_backend', 'latency_precision', 'latency_batch', 'latency_threads', 'latency_samples')


# -- the command line ------------------------------------------------------------------------------------------------------


def parse(argv: Optional[Sequence[str]] = None) -> tuple[Namespace, dict[str, type[policies.Policy]]]:
    """Reads the flags; those of the policies, and defaults for the dataset, come with the names given.

    Returns:
        The flags, and the policies that they name: the searching one first.
    """
    first = Parser(add_help=False, allow_abbrev=False)
    for flag in ('--policy', '--dataset', '--resume'):
        first.add_argument(flag)
    first.add_argument('--baselines', nargs='+')
    known, _ = first.parse_known_args(argv)
    earlier = _read_args(known.resume) if known.resume else {}
    for name, default in ('policy', None), ('dataset', None), ('baselines', BASELINES):
        setattr(known, name, getattr(known, name) or earlier.get(name, default))

    parser = Parser(prog='timm-width search', description=__doc__, allow_abbrev=False)
    group = parser.add_argument_group('search')
    group.add_argument('--policy', required=not known.policy, metavar='NAME',
                       help=f"one of {', '.join(policies.names())}, or a file of yours; --policy NAME --help shows its options")
    group.add_argument('--budget', required=not earlier, nargs='+', metavar='COST=LIMIT',
                       help='macs=150M, params=2M, latency=0.5ms (per image), or a ratio of the base: macs=0.5x; one network is '
                            'found for each')
    length = policies.load(known.policy).search_epochs if known.policy else "the paper's"
    group.add_argument('--search-epochs', type=int, metavar='N', help=f"length of the policy's own training (default: {length})")
    group.add_argument('--search-holdout', type=float, default=0.1, metavar='SHARE',
                       help='part of the training images on which the policy chooses')
    group.add_argument('--proxy', default='', metavar='HOW',
                       help='a cheaper search: resolution=96,data=0.1,classes=100, any of them; costs stay those of the real thing')
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
    group.add_argument('--baselines', nargs='+', default=BASELINES, metavar='NAME',
                       help=f"what to set the found network beside: {BASE}, and any policies")
    group.add_argument('--seeds', type=int, default=1, metavar='N',
                       help='train every network of the table N times, and report mean and standard deviation')
    add_target_arguments(parser.add_argument_group('latency'))
    add_arguments(parser)
    parser.add_argument('--no-sched-on-updates', dest='sched_on_updates', action='store_false', help='the opposite')
    group = parser.add_argument_group('output')
    group.add_argument('--output', required=not known.resume, metavar='FOLDER', help='new or empty folder for the results')
    group.add_argument('--overwrite', action='store_true', help='replace the results of an earlier run in --output')
    group.add_argument('--resume', metavar='FOLDER', help='go on with the search in that folder; flags come from there, and '
                       '--budget, --baselines, --seeds and --epochs may be others')
    found = {}
    for name in dict.fromkeys([known.policy, *known.baselines]):
        label = policies.label(name) if name else BASE
        if name and (label in found or name != BASE and label == BASE):
            raise UsageError(f"--policy and --baselines name two policies '{label}': give '{name}' another name")
        if label != BASE:
            found[label] = policies.load(name)
            policies.add_options(parser, label, found[label])
    parser.set_defaults(**SEARCH_DEFAULTS, **DEFAULTS.get(known.dataset, {}))
    parser.set_defaults(**earlier)
    args = parser.parse_args(argv)
    resolve_loss(args, flags_given(parser, argv) | set(earlier))
    args.fix = list(dict.fromkeys(args.fix))  # one that is said again on --resume is no other
    if known.resume:
        args.output = known.resume
        free = {*FREE, *(f'{name}.{option}' for name, policy in found.items() for option in policy.free_options)}
        changed = [k for k, v in earlier.items() if k not in free and vars(args).get(k) != v]
        if changed:
            raise UsageError(f"--resume '{known.resume}': the search there was run with " + ', '.join(
                f"--{k.replace('_', '-')} {earlier[k]}" for k in changed) + '; another needs another --output')
        learned = [name for name in (earlier['policy'], *earlier.get('baselines', ())) if name != BASE and
                   policies.label(name) in found and found[policies.label(name)].learns_budget]
        if learned and any(getattr(args, k) != earlier.get(k) for k in ('budget', 'latency_model')):
            model = f" by --latency-model {earlier['latency_model']}" if earlier.get('latency_model') else ''
            raise UsageError(f"--resume '{known.resume}': {policies.label(learned[0])} learned for the budgets there, "
                             f"{' '.join(map(str, earlier.get('budget', ())))}{model}, and knows nothing of others: they need "
                             'another --output')
    elif args.search_epochs is None:
        args.search_epochs = found[policies.label(known.policy)].search_epochs
    return args, found


def _read_args(folder: str) -> dict[str, Any]:
    path = Path(folder) / 'args.yaml'
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as e:
        reason = '' if isinstance(e, FileNotFoundError) else f': {str(e).splitlines()[0]}'
        raise UsageError(f"--resume '{folder}': no search was begun there, it has no args.yaml{reason}") from None
    if not isinstance(found, dict) or 'policy' not in found:
        raise UsageError(f"--resume '{folder}': its args.yaml is not that of a search")
    return found


def _check(args: Namespace, found: Mapping[str, type[policies.Policy]]) -> None:
    check_arguments(args, SEARCH_RANGES)
    parse_proxy(args.proxy)
    if not 0 < args.search_holdout < 1:
        raise UsageError(f'--search-holdout must be between 0 and 1, not {args.search_holdout:g}')
    if len(set(args.budget)) < len(args.budget):
        raise UsageError(f"--budget {' '.join(args.budget)} names one twice")
    for name, policy in found.items():
        if mixes(args) and policy.trains() and not policy.mixup:
            raise UsageError(f'--mixup and --cutmix cannot be used with the policy {name}: it needs the class of every image')
    if not args.resume:
        check_output(Path(args.output), args.overwrite, args.model)


# -- one policy ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What was chosen for a budget.

    Attributes:
        choice: The network.
        grid: What it was chosen from: of several stages, that of the last.
        source: The shared network whose channels it is made of, if these are not the first ones: its digest, `of`, and its
            `file` in the folder of the search.
    """
    choice: Choice
    grid: Grid
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)


def choose(problem: Problem, name: str, policy: policies.Policy) -> list[_Answer]:
    """Lets a policy learn and choose, on a problem without validation images; and those that follow it.

    Args:
        problem: What it learns on.
        name: What it is called.
        policy: It.

    Returns:
        One network for each budget of the problem.
    """
    found = _choose_once(problem, name, policy)
    for i, after in enumerate(policy.following([answer.choice for answer in found])):
        label, stage = f'{name}.{_folder_name(after.budgets[0].text)}', 2
        while after is not None:
            part = dataclasses.replace(problem, grid=after.grid, budgets=tuple(after.budgets))
            [found[i]] = _choose_once(part, f'{label}.{stage}', after)
            after, stage = next(iter(after.following([found[i].choice])), None), stage + 1
    return found


def _choose_once(problem: Problem, name: str, policy: policies.Policy) -> list[_Answer]:
    args, state = problem.args, Path(problem.args.output) / 'search'
    warmup = min(args.warmup_epochs, args.search_epochs / 5)
    training, held = problem.training_batches(), problem.held_batches()
    network, source = None, {}
    if policy.trains():
        model, space = problem.largest(args.seed)
        shared = policy.prepare(model, space)
        _say_notes(args, name, policy)
        trained = Training(shared, training, args, args.search_epochs, f'search ({name})', warmup, policy.train_step,
                           list(policy.parameters()))
        network = trained.run(state / f'{name}.pth.tar', _after_epoch(args, name, policy), policy)
        weights = {n.removeprefix('model.'): t for n, t in network.state_dict().items()}
        source = {'of': digest(weights), 'file': f'{state.name}/{name}.pth.tar'}

    def train(choice: Choice) -> nn.Module:
        return Training(problem.model(choice, args.seed), training, args, args.search_epochs, 'candidate', warmup).run()

    about = policy.evaluations
    if about and not sys.stderr.isatty():
        say(args, f'{name}: choosing by about {about} scores')
    # where there is no terminal, a line a minute instead of a bar
    slow = {} if sys.stderr.isatty() else {'mininterval': 60, 'ascii': True, 'bar_format': '{desc}: {n_fmt} scores, {elapsed}\n'}
    with tqdm(total=about, desc=f'choose ({name})', unit='net', disable=not is_primary(args) or not about, **slow) as bar:
        found = policy.choose(Holdout(args, network, training, held, train, Journal(state / f'{name}.scores.jsonl', args), bar))
    _say_notes(args, name, policy)
    choices = [_checked(problem, name, c) for c in found]
    for choice, budget in zip(choices, policy.goals, strict=True):
        if not budget.met(*choice):
            raise policies.PolicyError(f'policy {name} answered with a network over the budget {budget}')
    return [_Answer(choice, problem.grid, source if choice.channels else {}) for choice in choices]


def _checked(problem: Problem, name: str, found: Choice) -> Choice:
    """An answer in Python's own numbers, which JSON holds; with as many channels as its widths say."""
    widths, skips = found
    channels = {n: tuple(int(i) for i in kept) for n, kept in getattr(found, 'channels', {}).items()}
    choice = Choice({n: int(w) for n, w in widths.items()}, tuple(skips), channels)
    for n, kept in choice.channels.items():
        if len(kept) * problem.space[n].unit != choice.widths.get(n, problem.space[n].size):
            raise policies.PolicyError(f"policy {name} answered with {len(kept)} steps of '{n}' (of {problem.space[n].unit} "
                                       f'channels each), whose width is {choice.widths.get(n, problem.space[n].size)}')
    return choice


def _say_notes(args: Namespace, name: str, policy: policies.Policy) -> None:
    while policy.notes:
        say(args, f'{name}: {policy.notes.pop(0)}')


def _after_epoch(args: Namespace, name: str, policy: Optional[policies.Policy] = None) -> Callable[[Training, float, float], None]:
    def after_epoch(training: Training, loss: float, lr: float) -> None:
        if policy is not None:
            policy.epoch_end(training.epoch - 1)
        if is_primary(args) and not sys.stdout.isatty():
            print(f'{name}: epoch {training.epoch} of {training.epochs}, loss {loss:.3f}', flush=True)
    return after_epoch


# -- the whole search ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A network of the final table."""
    name: str
    choice: Choice
    budget: Optional[Budget] = None


def search(args: Namespace, found: Mapping[str, type[policies.Policy]]) -> tuple[list[dict[str, Any]], Target]:
    """Runs a whole search: choose on the holdout, save, train, compare.

    Args:
        args: The flags.
        found: The policies that the flags name.

    Returns:
        The rows of the final table, and what measured their latency.
    """
    _check(args, found)
    options = {name: policies.read_options(args, name, policy) for name, policy in found.items()}
    before = vars(args).get('world_size')
    start_processes(args)
    if args.resume and before not in (None, args.world_size):  # their number decides learning rates
        raise UsageError(f"--resume '{args.output}': the search there ran in {before} processes, not {args.world_size}")
    name = policies.label(args.policy)
    # --grid is for the policy that searches; a baseline on a coarse grid could not fill the budget
    rules = {label: label == name and args.grid or policy.default_grid for label, policy in found.items()}
    target = find_target(args)
    plain = make_problem(args, rules)
    problems = set_budgets(plain, target)
    problem, output = problems[name], Path(args.output)
    learning = learning_problem(problem)
    measuring = needs_measuring(args)
    if measuring:
        check_measurable(problem.args, target, problem.space, rules[name])
    check_kept(args, target, [label for label, policy in found.items() if policy.learns_budget])
    if is_primary(args):
        _prepare_output(args, output)
        keep_model(args, target)
    wait_for_all(args)
    if measuring:
        target = build_target(problem.args, target, problem.space, rules[name])
        problems = set_budgets(plain, target)
        problem = problems[name]
        learning = dataclasses.replace(learning, budgets=problem.budgets, latency=problem.latency)
    say(args, f'{problem.space.architecture}: {len(problem.grid)} of {len(problem.space.searchable)} groups to search; '
               f'{len(learning.train)} images train, {len(learning.held)} score; ' + ', '.join(map(str, problem.budgets)))
    if args.supernet_macs:
        macs, largest = Macs(problem.space), {n: widths[-1] for n, widths in problem.grid.items()}
        say(args, f'the largest network has {macs(largest) / macs():.4f}x the base MACs: all widths searched are '
                  f'{problem.args.width_max:.4f}x, rounded')
    try:
        return _run(args, problems, learning, found, options, name, target), target
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; --resume '{output}' goes on") from None


def _run(
        args: Namespace,
        problems: Mapping[str, Problem],
        learning: Problem,
        found: Mapping[str, type[policies.Policy]],
        options: Mapping[str, Any],
        name: str,
        target: Target,
) -> list[dict[str, Any]]:
    """The search, once it has a folder to write to."""
    problem, output = problems[name], Path(args.output)
    chosen: dict[str, list[_Answer]] = {}
    for policy in dict.fromkeys([name, *(b for b in map(policies.label, args.baselines) if b != BASE)]):
        grid = problems[policy].grid
        chosen[policy] = choose(dataclasses.replace(learning, grid=grid), policy, found[policy](
            problem.space, problem.budgets, grid, options[policy], args.seed))
    entries = list(_entries(args, problem, name, {policy: [a.choice for a in answers] for policy, answers in chosen.items()}))
    rows = [{'network': e.name, 'budget': e.budget.text if e.budget else '', **problem.costs(e.choice)} for e in entries]
    for row, (ms, spread) in zip(rows, _times(problem, entries, target)):
        row['latency_ms'], row['latency_spread'] = ms, spread
    rule, of_found = args.grid or found[name].default_grid, [row for e, row in zip(entries, rows) if e.name == 'found']
    provenance = {row['budget']: _provenance(problem, rule, options[name], row, target, answer)
                  for row, answer in zip(of_found, chosen[name], strict=True)}
    if is_primary(args):
        for e in entries:
            if e.name != 'found':
                continue
            network = problem.model(e.choice, args.seed)
            if not _is_saved(_folder(args, e), network):
                save(network, _folder(args, e), provenance[e.budget.text], args.pretrained, problem.config)
    if args.epochs:
        _train_all(problem, entries, rows, provenance)
    if is_primary(args):
        write_table(rows, output / 'summary.csv')
    return rows


def _prepare_output(args: Namespace, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for name in _earlier_folders(output):
            shutil.rmtree(output / name, ignore_errors=True)
        for name in ('config.json', 'model.safetensors', 'args.yaml', 'summary.csv', 'latency.json'):
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(output / 'search', ignore_errors=True)
    write_args(args, output)


def _earlier_folders(output: Path) -> list[str]:
    """The folders of several budgets that an earlier search left; whatever its args.yaml says, nothing else."""
    try:
        budgets = _read_args(str(output)).get('budget')
    except UsageError:
        return []
    texts = [text for text in budgets if isinstance(text, str)] if isinstance(budgets, list) else []
    return [_folder_name(text) for text in texts if re.fullmatch(r'\s*\w+\s*=[\s\w.]+', text)]


def _entries(args: Namespace, problem: Problem, name: str, chosen: Mapping[str, Sequence[Choice]]) -> Iterator[_Entry]:
    """Base, then for every budget its baselines and what was found."""
    if BASE in args.baselines:
        yield _Entry(BASE, Choice({}))
    for i, budget in enumerate(problem.budgets):
        for baseline in map(policies.label, args.baselines):
            if baseline != BASE:
                yield _Entry(baseline, chosen[baseline][i], budget)
        yield _Entry('found', chosen[name][i], budget)


def _folder(args: Namespace, entry: _Entry) -> Path:
    """Where a found network is saved: --output itself, or a folder for each of several budgets."""
    return _budget_folder(args, entry.budget.text)


def _budget_folder(args: Namespace, budget: str) -> Path:
    """--output itself for a single budget, unless that holds the network of another one, which is not replaced."""
    output = Path(args.output)
    if len(args.budget) == 1 and (
            not (output / 'config.json').is_file() or load_spec(output).provenance.get('budget') == budget):
        return output
    return output / _folder_name(budget)


def _folder_name(budget: str) -> str:
    return re.sub(r'[^\w.]+', '-', budget)


def _is_saved(folder: Path, network: nn.Module) -> bool:
    """Whether the folder holds that network, of the run that goes on."""
    return (folder / 'config.json').is_file() and load_spec(folder).shapes == fingerprint(network)


def _is_trained(folder: Path, epochs: int) -> bool:
    """Whether what the folder holds has been trained, for so long."""
    return (folder / 'config.json').is_file() and load_spec(folder).provenance.get('train') == {'epochs': epochs}


def _times(problem: Problem, entries: Sequence[_Entry], target: Target) -> list[tuple[float, float]]:
    """Milliseconds per image of every network on this machine, and how far the measured times lie apart (`Timing.spread`)."""
    args = problem.args
    if not is_primary(args):
        return [(0., 0.)] * len(entries)
    names = [json.dumps([{n: w for n, w in e.choice.widths.items() if w != problem.space[n].size}, e.choice.skips], sort_keys=True)
             for e in entries]
    networks = {name: problem.model(e.choice, args.seed) for name, e in zip(names, entries)}  # what is the same, once
    times = target.measure(networks, problem.space.input_size)
    return [(round(times[name].ms, 4), round(times[name].spread, 4)) for name in names]


def _train_all(
        problem: Problem,
        entries: Sequence[_Entry],
        rows: Sequence[dict[str, Any]],
        provenance: Mapping[str, dict],
) -> None:
    """Trains every network under every seed; adds their accuracy to the rows, and saves what was found under the first seed."""
    args, state = problem.args, Path(problem.args.output) / 'search'
    metric = metric_name(args)
    journal = Journal(state / 'results.jsonl', args)
    trained = of_primary(args, [e.name == 'found' and _is_trained(_folder(args, e), args.epochs) for e in entries])
    training, validation = problem.training_batches(), problem.held_batches()
    scores: dict[int, list[float]] = {i: [] for i in range(len(entries))}

    def train(entry: _Entry, seed: int) -> float:
        title = f"{entry.name}{f' ({entry.budget.text})' if entry.budget else ''}, seed {seed}"
        say(args, f'training {title}, for {args.epochs} epochs')
        checkpoint = state / f"{title.replace(' ', '-')}-{args.epochs}.pth.tar"
        warmup = min(args.warmup_epochs, args.epochs / 5)
        result = Training(problem.model(entry.choice, seed), training, args, args.epochs, title, warmup, seed=seed).run(
            checkpoint, _after_epoch(args, title))
        found = top1(result, validation, args)
        if is_primary(args):
            if entry.name == 'found' and seed == args.seed:
                said = {**provenance[entry.budget.text], 'train': {'epochs': args.epochs}}
                save(result, _folder(args, entry), said, data_config=problem.config)
            checkpoint.unlink(missing_ok=True)
        return found

    order = sorted(range(len(entries)), key=lambda i: entries[i].name != 'found')  # the baselines may be interrupted
    for seed in range(args.seed, args.seed + args.seeds):
        for at, i in enumerate(order):
            e = entries[i]
            twin = next((j for j in order[:at] if entries[j].choice == e.choice), None)
            if twin is not None and e.name != 'found':
                scores[i].append(scores[twin][-1])
                continue
            saves = e.name == 'found' and seed == args.seed  # known already is no reason to end without its weights
            anew = saves and not trained[i]
            key = [e.budget.text if saves else '', *e.choice, seed, args.epochs]
            scores[i].append(journal.recall(key, partial(train, e, seed), anew))
    for i, row in enumerate(rows):
        found = torch.tensor(scores[i], dtype=torch.float64)
        row[metric] = round(found.mean().item(), 2)
        row[f'{metric}_std'] = round(found.std().item(), 2) if args.seeds > 1 else ''
    for e in entries:
        if e.name == 'found' and is_primary(args):
            path = _folder(args, e) / 'config.json'
            _add_results(path, [row for row in rows if row['budget'] in ('', e.budget.text)])


def _add_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the final table into a config's provenance, where `baseline` is empty so far."""
    config = json.loads(path.read_text())
    said = config['timm_width']
    said['baseline'] = {row['network']: row for row in rows if row['network'] != 'found'}
    said.update({k: rows[-1][k] for k in METRICS if k in rows[-1]})
    beside = path.with_name('.config.json.saving')
    beside.write_text(json.dumps(config, indent=2))
    beside.replace(path)


def _provenance(problem: Problem, rule: str, options: Any, row: Mapping[str, Any], target: Target,
                answer: _Answer) -> dict[str, Any]:
    args = problem.args
    costs = {'macs': row['macs'], 'params': row['params'], 'latency_ms': {
        **target.describe(), 'ms': row['latency_ms'], 'spread': row['latency_spread']}}
    if row.get('predicted_ms', '') != '':
        costs['latency_ms'] |= {'predicted': row['predicted_ms'], 'model': target.told()}
    kept = {n: list(steps) for n, steps in answer.choice.channels.items()}
    channels = {'channels': {**answer.source, 'kept': kept}} if kept else {}  # what train --inherit cuts from the shared network
    return {
        'policy': policies.label(args.policy), 'options': dataclasses.asdict(options), 'seed': args.seed,
        'budget': row['budget'], 'grid': {'rule': rule, **{name: list(widths) for name, widths in answer.grid.items()}},
        'search': {'epochs': args.search_epochs, 'holdout': args.search_holdout, 'proxy': args.proxy}, 'baseline': {},
        'versions': {'timm': timm.__version__, 'torch': torch.__version__, 'python': platform.python_version()}, 'costs': costs,
        **channels}


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Parses, searches, and prints the table."""
    args, found = parse(argv)
    rows, target = search(args, found)
    if not is_primary(args):
        return
    print_table(rows, str(target))
    if target.model is not None:
        print(f'(predicted by a latency model of {target.model})')
    if target.elsewhere:
        print(f'({target.elsewhere}: measured and predicted times do not compare)')
    trained = ', pretrained=True' if args.epochs or args.pretrained else ''
    print()
    for budget in args.budget:
        path = _budget_folder(args, budget)
        base = load_spec(path).architecture.removesuffix(SUFFIX)
        ready = 'import timm_width' if base in supported() else f"import timm_width; timm_width.register('{base}')"
        print(f"The found model: {ready}; timm.create_model('local-dir:{path}'{trained})")
    if args.seeds > 1 and args.epochs:
        print(f'(its weights are those of seed {args.seed})')
