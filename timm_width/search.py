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
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from torch import nn

from . import policies, search_flags
from .arguments import write_args
from .budget import Budget
from .choosing import Answer, after_epoch, choose, folder_name
from .config import SUFFIX, fingerprint, load_spec, save
from .cost import Macs
from .data import UsageError
from .engine import Training, is_primary, of_primary, say, start_processes, top1, wait_for_all
from .holdout import Journal
from .models import supported
from .policies.base import Choice
from .problem import Problem, learning_problem, make_problem, set_budgets
from .report import METRICS, metric_name, print_table, write_table
from .search_flags import BASE, check_search_arguments, read_args
from .target import Target, build_target, check_kept, check_measurable, find_target, keep_model, needs_measuring

__all__ = ['main', 'parse', 'search']


def parse(argv: Optional[Sequence[str]] = None) -> tuple[Namespace, dict[str, type[policies.Policy]]]:
    """Reads the flags (see `search_flags.parse`)."""
    return search_flags.parse(argv, __doc__)


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
    check_search_arguments(args, found)
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
    chosen: dict[str, list[Answer]] = {}
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
        budgets = read_args(str(output)).get('budget')
    except UsageError:
        return []
    texts = [text for text in budgets if isinstance(text, str)] if isinstance(budgets, list) else []
    return [folder_name(text) for text in texts if re.fullmatch(r'\s*\w+\s*=[\s\w.]+', text)]


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
    return output / folder_name(budget)


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
            checkpoint, after_epoch(args, title))
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
                answer: Answer) -> dict[str, Any]:
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
