"""A search on a smaller network: what a policy finds there is carried over to the network that was asked for (Width Transfer).

The smaller network is a timm model like any other, `<base>_width` with `widths=` and `skips=`, and its search a search like any
other: its grid is made by the same rule, and a budget is the same share of its own cost. What is found on it is saved as a config
that says what the network was before, so that `timm-width transfer` can carry it over to yet another.
"""
import dataclasses
import fnmatch
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .budget import Budget
from .choosing import Answer
from .config import SUFFIX, save
from .cost import Macs
from .data import Splits, UsageError
from .engine import is_primary
from .extrapolation import TOLERANCE, Found, extrapolate, match, project, saved
from .models import register
from .policies.base import Choice
from .problem import Problem, Proxy, learning_problem, make_problem, parse_proxy
from .tables import Tables

__all__ = ['Projection', 'is_projected', 'project_problems', 'saving']


@dataclass(frozen=True)
class Projection:
    """A problem and the one on a smaller network that it is solved by.

    Attributes:
        whole: What was asked for.
        part: That of the smaller network.
        skips: Blocks that the smaller network does not have.
    """
    whole: Problem
    part: Problem
    skips: tuple[str, ...]

    def of(self, whole: Problem) -> 'Projection':
        """The same for other budgets.

        Raises:
            BudgetError: The smaller network cannot be as small as they ask for.
        """
        budgets = tuple(_share(b, self.part) for b in whole.budgets)
        ends = [{n: widths[i] for n, widths in self.part.grid.items()} for i in (0, -1)]
        for budget in budgets:
            budget.check_feasible(*ends)
        return dataclasses.replace(self, whole=whole, part=dataclasses.replace(self.part, budgets=budgets))

    def carry_over(self, answer: Answer, number: int, name: str, said: Mapping[str, Any]) -> Answer:
        """The network that was asked for, with the multipliers of one that was found; that one is saved.

        Args:
            answer: What was found on the smaller network.
            number: Of its budget.
            name: What its folder is called.
            said: What its config is to say of how it was found.

        Raises:
            TransferError: No such network costs what the budget allows.
        """
        args, space, small = self.whole.args, self.whole.space, self.part.space
        budget = self.whole.budgets[number]
        limit, cost = budget.limit, budget.cost
        if math.isinf(limit):  # the policy has weighed the cost: as large a share of it
            limit = cost() * self.part.budgets[number].cost(*answer.choice) / self.part.budgets[number].cost()
        ratios, skips = extrapolate(Found(small, answer.choice.widths, skips=answer.choice.skips), space, args.transfer_depth)
        fixed = [n for n in space.searchable if n not in self.whole.grid]
        found = match(cost, limit, ratios, skips, args.width_divisor or 1, fixed)
        folder = Path(args.output) / 'search' / 'proxies' / name
        projection = {**dataclasses.asdict(parse_proxy(args.proxy)), 'widths': small.base_widths, 'skips': list(self.skips)}
        if is_primary(args):
            save(self.part.model(answer.choice, args.seed), folder, {**said, 'projection': projection}, False, self.part.config)
        told = {'from': str(folder.relative_to(args.output)), 'depth': args.transfer_depth, 'alpha': found.alpha, 'notes': []}
        if found.away > TOLERANCE:
            told['notes'] = [f'the widths carried over cost {found.away:.1%} less than {budget}: no rounding comes closer']
        widths = {n: found.widths[n] for n in found.widths if found.widths[n] != space[n].size or n in self.whole.grid}
        return Answer(Choice(widths, found.skips), self.whole.grid, {}, answer.macs, told)


def is_projected(args: Namespace) -> bool:
    """Whether --proxy asks for another network."""
    proxy = parse_proxy(args.proxy)
    return (proxy.width, proxy.depth) != (Proxy.width, Proxy.depth)


def project_problems(problems: Mapping[str, Problem], rules: Mapping[str, str]) -> dict[str, Projection]:
    """The problems on the smaller network that --proxy asks for.

    Args:
        problems: Those of `set_budgets`.
        rules: Policy -> the grid that it chooses from, as for `make_problem`.

    Raises:
        UsageError: There is no such network, or its cost cannot be told.
        TransferError: A block that is to go cannot be left out.
        BudgetError: It cannot be as small as the budgets ask for.
    """
    first = next(iter(problems.values()))
    args, space, proxy = first.args, first.space, parse_proxy(first.args.proxy)
    if any(p.twin for p in problems.values()):
        raise UsageError(f'--proxy width= and depth= have no meaning for the blocks of {args.model}')
    if any(isinstance(b.cost, Tables) for b in first.budgets):
        raise UsageError(f'--proxy {args.proxy}: the latency of the smaller network is not known: search for a budget of macs or '
                         'params, and match the latency of the result: timm-width transfer CONFIG --to MODEL --match latency=0.5ms')
    if ':' in args.model:
        raise UsageError(f"--proxy width= and depth= work on models by name, not on '{args.model}'")
    widths, skips = project(space, proxy.width, proxy.depth)
    register(space.architecture)
    base, dot, tag = args.model.partition('.')
    given = args.model_kwargs
    kwargs = {**given, 'widths': {**given.get('widths', {}), **widths}, 'skips': [*given.get('skips', ()), *skips]}
    there = [n for n in space.searchable if n in widths]
    smaller = Namespace(**{**vars(args), 'model': base.removesuffix(SUFFIX) + SUFFIX + dot + tag, 'model_kwargs': kwargs,
                           'width_max': None if args.supernet_macs else args.width_max,
                           'fix': [pattern for pattern in args.fix if fnmatch.filter(there, pattern)]})
    splits = Splits(first.train.images, first.held.images, first.targets, args.num_classes)
    parts = make_problem(smaller, {name: rules[name] for name in problems}, (), splits)
    return {name: Projection(problems[name], part, skips).of(problems[name]) for name, part in parts.items()}


def _share(budget: Budget, part: Problem) -> Budget:
    """The same share of the smaller network's cost."""
    cost = type(budget.cost)(part.space)
    limit = budget.limit if math.isinf(budget.limit) else cost() * budget.limit // budget.cost()
    return dataclasses.replace(budget, cost=cost, limit=limit)


def saving(whole: Problem, learning: Problem) -> float:
    """Share of the MACs of a search that --proxy saves: those of the base networks for all images of an epoch are compared."""
    direct = Namespace(**{**vars(whole.args), 'proxy': ''})
    images = len(learning_problem(dataclasses.replace(whole, args=direct)).train)
    return saved(Macs(learning.space)() * len(learning.train), Macs(whole.space)() * images)
