"""Searches the widths of a timm model for budgets, trains what was found, and sets it beside the base and the uniform width.

    python search.py --model resnet18 --data-dir flowers --policy autoslim --budget macs=0.5x --output runs/x

The policy learns on the training images but for the holdout, on which it chooses; the found model then trains on all of them.
The validation images are read once, for the table at the end. --output becomes a folder for
timm.create_model('local-dir:FOLDER', pretrained=True), with config.json and model.safetensors; with several budgets it holds one
such folder for each. Beside them are args.yaml, summary.csv (the table) and search/ (what --resume goes on from). Costs are those
of one image at --img-size. A warm-up is at most a fifth of its training. Runs under torchrun, too.
"""
import dataclasses
import math
import platform
import re
import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import timm
import torch

from . import policies, search_flags
from .arguments import write_args
from .budget import Budget
from .choosing import Answer, check_begun, choose, choose_sweep, folder_name, point_text, sweep_points
from .comparison import Entry, budget_folder, save_found, times, train_all
from .config import SUFFIX, UNSUFFIXED, load_spec
from .cost import Macs
from .data import UsageError
from .engine import is_primary, say, start_processes, wait_for_all
from .grids import single_widths
from .models import supported
from .policies.base import Choice
from .problem import BASE, Problem, learning_problem, make_problem, set_budgets
from .projection import Projection, is_projected, project_problems, saving
from .report import print_table, write_table
from .search_flags import check_search_arguments, parse_sweep, policy_names, read_args
from .start import weights_of
from .target import Target, build_target, check_kept, check_measurable, find_target, keep_model, needs_measuring

__all__ = ['main', 'parse', 'search']


def parse(argv: Optional[Sequence[str]] = None) -> tuple[Namespace, dict[str, type[policies.Policy]]]:
    """Reads the flags (see `search_flags.parse`)."""
    return search_flags.parse(argv, __doc__)


def search(
        args: Namespace,
        found: Mapping[str, type[policies.Policy]],
) -> tuple[list[dict[str, Any]], list[Entry], Target]:
    """Runs a whole search: choose on the holdout, save, train, compare.

    Args:
        args: The flags.
        found: The policies that the flags name.

    Returns:
        The rows of the final table, the networks that they are of, and what measured their latency.
    """
    check_search_arguments(args, found)
    names = [policies.label(name) for name in policy_names(args.policy)]
    # --grid is for the policies that search; a baseline on a coarse grid could not fill the budget
    settled = {name: policy.settle(policies.read_options(args, name, policy), args.grid or '' if name in names else '')
               for name, policy in found.items()}
    options, rules = ({name: pair[i] for name, pair in settled.items()} for i in (0, 1))
    before = vars(args).get('world_size')
    start_processes(args)
    if args.resume and before not in (None, args.world_size):  # their number decides learning rates
        raise UsageError(f"--resume '{args.output}': the search there ran in {before} processes, not {args.world_size}")
    target = find_target(args)
    plain = make_problem(args, rules, [label for label, policy in found.items() if policy.chooses_blocks])
    problems = set_budgets(plain, target)
    problem, output = problems[names[0]], Path(args.output)
    _check_open(args, names, found, problem.budgets)
    for point in sweep_points(parse_sweep(args.sweep)):
        dataclasses.replace(options[names[0]], **point)  # refuses values that are wrong
    projections = project_problems(problems, rules) if is_projected(args) else {}
    learning = learning_problem(projections[names[0]].part if projections else problem)
    measuring = needs_measuring(args)
    if measuring:
        check_measurable(problem.args, target, problem.space, rules[names[0]])
    check_kept(args, target, [label for label, policy in found.items() if policy.learns_budget])
    for name in () if measuring or args.sweep else names:
        p = problems[name]
        check_begun(p, name, found[name](p.space, p.budgets, p.grid, options[name], args.seed))
    if is_primary(args):
        _prepare_output(args, output)
        keep_model(args, target)
    wait_for_all(args)
    if measuring:
        target = build_target(problem.args, target, problem.space, rules[names[0]])
        problems = set_budgets(plain, target)
        problem = problems[names[0]]
        learning = dataclasses.replace(learning, budgets=problem.budgets, latency=problem.latency)
    single = '' if problem.twin else single_widths(problem.rule, problem.grid)
    say(args, f'{problem.space.architecture}: {len(problem.grid)} of {len(problem.space.searchable)} groups to search{single}; '
               f'{len(learning.train)} images train, {len(learning.held)} score; ' + ', '.join(map(str, problem.budgets)))
    if args.supernet_macs:
        macs, largest = Macs(problem.space), {n: widths[-1] for n, widths in problem.grid.items()}
        say(args, f'the largest network has {macs(largest) / macs():.4f}x the base MACs: all widths searched are '
                  f'{problem.args.width_max:.4f}x, rounded')
    try:
        return *_run(args, problems, projections, learning, found, options, names, target), target
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; --resume '{output}' goes on") from None


def _check_open(
        args: Namespace,
        names: Sequence[str],
        found: Mapping[str, type[policies.Policy]],
        budgets: Sequence[Budget],
) -> None:
    """Budgets without a limit, and sweeps, are for a policy that knows what to do with them."""
    sweep, policy = parse_sweep(args.sweep), found[names[0]]
    for budget in budgets:
        if math.isinf(budget.limit) and (len(names) > 1 or not policy.weighs_cost):
            raise UsageError(f"--budget {budget.text} has no limit, and {', '.join(names)} needs one: write "
                             f'--budget {budget.text}=0.5x')
    if sweep and (len(names) > 1 or not policy.sweeps):
        raise UsageError(f"--sweep {' '.join(args.sweep)}: {', '.join(names)} cannot share the beginning of a training")
    if unknown := [name for name in sweep if name not in policy.sweeps]:
        raise UsageError(f"--sweep: {names[0]} sweeps {', '.join(policy.sweeps)}, not '{unknown[0]}'")
    if late := [name for name in [*sweep][1:] if name in policy.incomparable]:
        raise UsageError(f'--sweep: {late[0]} decides what a search loss is, and of all options but the first those values win '
                         f'that have the least: write {late[0]}=... first, and no other such option beside it')
    if sweep and (len(budgets) > 1 or math.isfinite(budgets[0].limit)):
        raise UsageError('--sweep finds a network for each value: give one --budget without a limit, as in --budget '
                         f"{budgets[0].text.partition('=')[0]}")


def _run(
        args: Namespace,
        problems: Mapping[str, Problem],
        projections: Mapping[str, Projection],
        learning: Problem,
        found: Mapping[str, type[policies.Policy]],
        options: Mapping[str, Any],
        names: Sequence[str],
        target: Target,
) -> tuple[list[dict[str, Any]], list[Entry]]:
    """The search, once it has a folder to write to."""
    output = Path(args.output)

    def choose(problem: Problem, name: str) -> list[_Chosen]:
        return _choose(args, problem, projections.get(name), learning, name, found[name], options[name])

    chosen = {name: choose(problems[name], name) for name in names}
    budgets = [c.budget for c in chosen[names[0]]]
    baselines = {}
    for name in dict.fromkeys(map(policies.label, args.baselines)):
        if name in names and len(names) == 1:
            baselines[name] = chosen[name]
        elif name != BASE and name not in names:
            baselines[name] = choose(_within(args, problems[name], name, budgets), name)
    entries = []
    if BASE in args.baselines:
        entries.append(Entry(BASE, Choice({}), problems.get(BASE, problems[names[0]])))
    for i, budget in enumerate(budgets):
        entries += [Entry(name, c.answer.choice, problems[name], budget) for name, answers in baselines.items()
                    for c in answers if c.budget.text == budget.text]
        for name in names:
            folder = budget_folder(output / name if len(names) > 1 else output, [b.text for b in budgets], budget.text)
            choice = chosen[name][i].answer.choice
            entries.append(Entry(name if len(names) > 1 else 'found', choice, problems[name], budget, folder))
    rows = [{'network': e.name, 'budget': e.budget.text if e.budget else '', **e.problem.costs(e.choice)} for e in entries]
    for row, (ms, spread) in zip(rows, times(entries, target, args)):
        row['latency_ms'], row['latency_spread'] = ms, spread
    told = {(name, c.budget.text): c for name, several in {**baselines, **chosen}.items() for c in several}
    for i, e in enumerate(entries):
        name = names[0] if e.name == 'found' else e.name
        rows[i]['search_macs'] = '' if e.budget is None else told[name, e.budget.text].answer.macs
        if e.folder is None:
            continue
        c = told[name, e.budget.text]
        entries[i] = dataclasses.replace(e, provenance=_provenance(e.problem, name, c.options, rows[i], target, c.answer))
        if not math.isnan(c.search_loss):
            for row in rows:
                row.setdefault('search_loss', '')
            rows[i]['search_loss'] = round(c.search_loss, 4)
    if is_primary(args):
        save_found(entries, args)
    if args.epochs:
        train_all(entries, rows, args)
    if is_primary(args):
        write_table(rows, output / 'summary.csv')
    return rows, entries


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """What a policy chose for a budget; whose limit, if there was none, is the network's cost."""
    budget: Budget
    answer: Answer
    options: Any
    search_loss: float


def _within(args: Namespace, problem: Problem, name: str, budgets: Sequence[Budget]) -> Problem:
    """A baseline's problem, with those of the budgets that it can meet: what a policy found may be smaller than all it has."""
    own = [b.of(problem.space, problem.latency) for b in budgets]
    smallest = {group: widths[0] for group, widths in problem.grid.items()}
    for budget in own:
        if not budget.met(smallest):
            say(args, f'{name}: no network is as small as {budget}')
    return dataclasses.replace(problem, budgets=tuple(b for b in own if b.met(smallest)))


def _choose(
        args: Namespace,
        problem: Problem,
        projection: Optional[Projection],
        learning: Problem,
        name: str,
        policy: type[policies.Policy],
        options: Any,
) -> list[_Chosen]:
    """What a policy chooses for each budget of the problem; of a sweep, for each value of its first option."""
    if not problem.budgets:
        return []
    whole = problem
    if projection is not None and (
            policy.trains() or policy(problem.space, problem.budgets, problem.grid, options, args.seed).evaluations):
        projection = projection.of(whole)
        problem = projection.part
    else:
        projection = None  # nothing that is learned can be cheaper
    if (problem.twin, problem.args.model_kwargs) != (learning.twin, learning.args.model_kwargs):
        learning = learning_problem(problem)
    learning = dataclasses.replace(learning, grid=problem.grid, budgets=problem.budgets, latency=problem.latency)

    def make(point: Mapping[str, float]) -> policies.Policy:
        return policy(problem.space, problem.budgets, problem.grid, dataclasses.replace(options, **point), args.seed)

    def chosen(number: int, answer: Answer, search_loss: float, point: Mapping[str, float] = {}) -> _Chosen:
        budget, own = whole.budgets[number], dataclasses.replace(options, **point)
        text = f'{budget.text} {point_text(point)}'.strip()
        if projection is not None:
            answer = projection.carry_over(answer, number, folder_name(f'{name} {text}'), {
                'policy': name, 'options': dataclasses.asdict(own), 'seed': args.seed, 'budget': text,
                'search': _search_said(args, answer)})
            for note in answer.transfer['notes']:
                say(args, f'{name}: {note}')
        if math.isinf(budget.limit):
            budget = Budget(budget.cost, budget.cost(*answer.choice), text)
        return _Chosen(budget, answer, own, search_loss)

    if (sweep := parse_sweep(args.sweep)) and policy.sweeps:
        found = [chosen(0, answer, loss, point) for point, answer, loss in choose_sweep(learning, name, make, sweep)]
    else:
        one = make({})
        answers = choose(learning, name, one)
        if len(answers) != len(whole.budgets):
            raise policies.PolicyError(f'{name} gave {len(answers)} networks for {len(whole.budgets)} budgets')
        found = [chosen(i, answer, one.search_loss) for i, answer in enumerate(answers)]
    if macs := max(c.answer.macs for c in found):
        less = f', {saving(whole, learning):.1%} less than without --proxy {args.proxy}' if args.proxy else ''
        say(args, f'{name}: the search took {macs:.4g} MACs{less}')
    return found


def _search_said(args: Namespace, answer: Answer) -> dict[str, Any]:
    return {'epochs': args.search_epochs, 'holdout': args.search_holdout, 'proxy': args.proxy, 'macs': answer.macs}


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
    """The folders of budgets and policies that an earlier search left; whatever its args.yaml says, nothing else."""
    try:
        earlier = read_args(str(output))
        points = sweep_points(parse_sweep([str(text) for text in earlier.get('sweep') or []]))
    except UsageError:
        return []
    budgets = earlier.get('budget')
    texts = [text for text in budgets if isinstance(text, str)] if isinstance(budgets, list) else []
    found = [f'{text} {point_text(point)}'.strip() for text in texts for point in points]
    found = [folder_name(text) for text in found if re.fullmatch(r'\s*(macs|params|latency)[\s=\w.-]*', text)]
    several = policy_names(str(earlier['policy']))
    return found + [name for name in several if len(several) > 1 and re.fullmatch(r'\w+', name)]


def _provenance(problem: Problem, name: str, options: Any, row: Mapping[str, Any], target: Target,
                answer: Answer) -> dict[str, Any]:
    args = problem.args
    costs = {'macs': row['macs'], 'params': row['params'], 'latency_ms': {
        **target.describe(), 'ms': row['latency_ms'], 'spread': row['latency_spread']}}
    if row.get('predicted_ms', '') != '':
        costs['latency_ms'] |= {'predicted': row['predicted_ms'], 'model': target.told()}
    kept = {n: list(steps) for n, steps in answer.choice.channels.items()}
    channels = {'channels': {**answer.source, 'kept': kept}} if answer.source else {}  # what train --inherit takes
    return {
        'policy': name, 'options': dataclasses.asdict(options), 'seed': args.seed,
        'budget': row['budget'], 'grid': {'rule': problem.rule, **{name: list(widths) for name, widths in answer.grid.items()}},
        'search': _search_said(args, answer), 'baseline': {},
        'data': args.dataset or Path(args.data_dir or '').resolve().name, **weights_of(args),
        'versions': {'timm': timm.__version__, 'torch': torch.__version__, 'python': platform.python_version()}, 'costs': costs,
        **channels, **({'transfer': dict(answer.transfer)} if answer.transfer else {})}


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Parses, searches, and prints the table."""
    args, found = parse(argv)
    rows, entries, target = search(args, found)
    if not is_primary(args):
        return
    print_table(rows, str(target))
    if target.model is not None:
        print(f'(predicted by a latency model of {target.model})')
    if target.elsewhere:
        print(f'({target.elsewhere}: measured and predicted times do not compare)')
    trained = ', pretrained=True' if args.epochs or args.pretrained else ''
    print()
    for path in (e.folder for e in entries if e.folder is not None):
        base = load_spec(path).architecture.removesuffix(SUFFIX)
        ready = 'import timm_width' if base in (*supported(), *UNSUFFIXED) else f"import timm_width; timm_width.register('{base}')"
        print(f"The found model: {ready}; timm.create_model('local-dir:{path}'{trained})")
    if args.seeds > 1 and args.epochs:
        print(f'(its weights are those of seed {args.seed})')
