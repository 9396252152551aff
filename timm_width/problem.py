"""What a search works on: the images, the model's width space, the grid and the budgets; and the cheaper proxy it may learn on."""
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import numpy as np
import torch
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader

from .budget import Budget, BudgetError
from .cost import Cost, Macs, Params
from .data import TwoParts, UsageError, View, loader, open_splits, shrink, split_holdout
from .engine import create, data_config, make_optimizer, model_arguments
from .factors import Factors
from .grids import growth, make_grid, squeezes
from .models import register
from .policies.base import Choice, Grid
from .resize import resize
from .space import MAX_GROWTH, WidthError, WidthSpace
from .tables import Tables
from .target import MEASURE, Target
from .trace import trace
from .twins import ends, has_twin, plain_arguments, trace_twin, twin_grid, twin_name

BASE = 'base'

__all__ = ['BASE', 'Problem', 'Proxy', 'learning_problem', 'make_problem', 'parse_proxy', 'set_budgets']


@dataclass(frozen=True)
class Proxy:
    """How a search is made cheaper than the training that follows: smaller images, fewer of them, of fewer classes."""
    resolution: Optional[int] = None
    data: float = 1.
    classes: Optional[int] = None


@dataclass(frozen=True)
class Problem:
    """What is searched, or what a policy learns on.

    Attributes:
        args: The flags; --width-max is what --supernet-macs comes to.
        train: Images to train on.
        held: Images that training never sees: the validation images, or while a policy learns, its holdout.
        targets: Class of every image of the training split.
        space: The width space at these image sizes.
        grid: Group -> widths to choose from.
        budgets: What the answers must meet; set by `set_budgets`.
        config: timm's data config of the model.
        latency: What a latency model predicts, if there is one.
        twin: Name of the model with all blocks that a layer may be, if `space` is that model's (see twins.py).
    """
    args: Namespace
    train: View
    held: View
    targets: np.ndarray
    space: WidthSpace
    grid: Grid
    budgets: tuple[Budget, ...]
    config: Mapping[str, Any]
    latency: Optional[Cost] = None
    twin: str = ''

    def model(self, choice: Choice, seed: int) -> nn.Module:
        """The model at some widths; the same seed gives the same initial weights."""
        if self.twin:
            with torch.device('meta'):
                arguments = plain_arguments(twin_model(self.args), choice)
            random_seed(seed)
            args = self.args
            return create(args.model, args.num_classes, args.pretrained, **{**model_arguments(args), **arguments})
        random_seed(seed)
        return resize(base_model(self.args), self.space, *choice)

    def largest(self, seed: int) -> tuple[nn.Module, WidthSpace]:
        """The model at the grid's largest widths, from which all others are cut, and its own width space."""
        return self.traced({name: widths[-1] for name, widths in self.grid.items()}, seed)

    def traced(self, widths: Mapping[str, int], seed: int) -> tuple[nn.Module, WidthSpace]:
        """The model at some widths, and its own width space; of a twin, all of it."""
        if self.twin:
            random_seed(seed)
            return twin_model(self.args), self.space
        model = self.model(Choice(widths), seed)
        return model, trace(model, self.space.input_size)

    def training_batches(self, aside: float = 0.) -> Union[DataLoader, TwoParts]:
        """Batches to train on; a share of the images, if it is not 0, comes last in every epoch."""
        if not aside:
            return loader(self.train, self.args, self.config, training=True)
        parts = split_holdout(self.targets[self.train.indices], aside, self.args.seed)
        return TwoParts(*(loader(View(self.train.images, self.train.indices[part], self.train.classes), self.args, self.config,
                                 training=True) for part in parts))

    def held_batches(self) -> DataLoader:
        return loader(self.held, self.args, self.config, training=False)

    def costs(self, choice: Choice) -> dict[str, Any]:
        """MACs and parameters; and the latency predicted, empty where the latency model says nothing of such a network."""
        found: dict[str, Any] = {'macs': Macs(self.space)(*choice), 'params': Params(self.space)(*choice)}
        if self.latency is not None:
            try:
                found['predicted_ms'] = round(self.latency(*choice), 6)
            except WidthError:
                found['predicted_ms'] = ''
        return found


def base_model(args: Namespace) -> nn.Module:
    """The model that the flags ask for."""
    return create(args.model, args.num_classes, args.pretrained, **model_arguments(args))


def twin_model(args: Namespace) -> nn.Module:
    """The model with all blocks that a layer of the one that the flags ask for may be."""
    unknown = ('drop_path_rate', 'checkpoint_path', 'pretrained_cfg_overlay')
    known = {k: v for k, v in model_arguments(args).items() if k not in unknown}
    return create(twin_name(args.model), args.num_classes, **known)


def parse_proxy(text: str) -> Proxy:
    """Reads 'resolution=96,data=0.1,classes=100', any of them.

    Raises:
        UsageError: With what would be right.
    """
    wrong = UsageError(f"--proxy '{text}' is not a proxy: give any of resolution=PIXELS, data=SHARE (above 0, to 1), "
                       'classes=NUMBER (2 or more), with commas between them')
    given: dict[str, Any] = {}
    for part in text.split(',') if text else ():
        name, _, value = part.strip().partition('=')
        try:
            given[name] = {'resolution': int, 'data': float, 'classes': int}[name](value)
        except (KeyError, ValueError):
            raise wrong from None
    proxy = Proxy(**given)
    if not 0 < proxy.data <= 1 or (1 if proxy.resolution is None else proxy.resolution) < 1 or (
            2 if proxy.classes is None else proxy.classes) < 2:
        raise wrong
    return proxy


def make_problem(args: Namespace, rules: Mapping[str, str], of_blocks: Collection[str] = ()) -> dict[str, Problem]:
    """Opens the images, builds and traces the model, before anything is trained. `set_budgets` comes next.

    Args:
        args: The flags.
        rules: Policy -> the grid that it chooses from; the searching policy first, whose range the others share.
        of_blocks: The policies that choose among the blocks of layers, where the model has several.

    Returns:
        Policy -> its problem, without budgets. They differ by their grids, and by whether they are of blocks; if any is, BASE is
        the one of the model itself.

    Raises:
        UsageError: A flag, the images or the model cannot be worked with.
    """
    splits = open_splits(args)
    random_seed(args.seed)
    model = base_model(args)
    config = data_config(args, model)
    make_optimizer(model, args, max(args.epochs, 1), 1)  # refuses flags that are wrong, before anything is written
    space = trace(model, config['input_size'])
    fixed = () if args.search_se else squeezes(model, space)
    if args.supernet_macs:
        if args.width_max is not None:
            raise UsageError('--width-max and --supernet-macs both say how wide the largest network is: give one')
        args = Namespace(**{**vars(args), 'width_max': growth(space, args.supernet_macs, args.fix, fixed)})  # not the caller's
    grids: dict[str, Grid] = {}
    low, high = args.width_min, args.width_max
    for policy, rule in rules.items():
        grids[policy] = make_grid(space, rule, low, high, args.width_divisor, args.fix, fixed)
        if len(grids) == 1:
            low = min(widths[0] / space[name].size for name, widths in grids[policy].items())
            high = max(widths[-1] / space[name].size for name, widths in grids[policy].items())
    register(space.architecture)  # what is saved must have a name that timm can build
    found = {policy: Problem(args, View(splits.train), View(splits.validation), splits.targets, space, grid, (), config)
             for policy, grid in grids.items()}
    if has_twin(args.model) and any(policy in of_blocks for policy in found):
        for flag in ('grid', 'width_divisor', 'width_min', 'width_max', 'supernet_macs', 'fix'):
            if getattr(args, flag):
                raise UsageError(f"--{flag.replace('_', '-')} has no meaning for the blocks of {args.model}: its space says their "
                                 'widths (--model-kwargs width=0.5, say)')
        with torch.device('meta'):
            twin = twin_model(args)
            whole = trace_twin(twin, config['input_size'])
        wide = {policy: make_grid(space, rule, high=MAX_GROWTH, fix=args.fix, squeezes=fixed) for policy, rule in rules.items()}
        found = {policy: replace(p, grid=wide[policy]) for policy, p in found.items()}  # what is found may be larger than the base
        first = next(iter(found.values()))
        of_twin = replace(first, space=whole, grid=twin_grid(twin), twin=twin_name(args.model))
        found = {BASE: first, **{policy: of_twin if policy in of_blocks else p for policy, p in found.items()}}
    return found


def set_budgets(problems: Mapping[str, Problem], target: Target) -> dict[str, Problem]:
    """Adds the budgets that the flags ask for, and checks that they can be met.

    Args:
        problems: Those of `make_problem`.
        target: What latency is counted by. Where its model is still to be made, its budgets are only read.

    Raises:
        BudgetError: A budget cannot be read or met.
        LatencyError, UsageError: The latency model is of another network or grid.
    """
    first = next(iter(problems.values()))
    args, space = first.args, first.space
    latency = target.cost(space)
    pending = latency is None and args.latency_model == MEASURE
    budgets = tuple(Budget.parse(text, space, Tables(space, 'ms per image', Factors({}, 1.)) if pending else latency)
                    for text in args.budget)
    found = {}
    for policy, problem in problems.items():
        if problem.twin:
            found[policy] = _twin_budgets(problem, budgets, target)
            continue
        grid = problem.grid if problem is first else target.clip(problem.grid)
        for budget in budgets:
            if pending and isinstance(budget.cost, Tables) or policy == BASE:  # which is what it is
                continue
            ends = [{name: widths[i] for name, widths in grid.items()} for i in (0, -1)]
            try:
                budget.check_feasible(*ends)
            except BudgetError as e:
                raise BudgetError(f'{policy}: {e}' if len(problems) > 1 else str(e)) from None
            except WidthError as e:
                raise UsageError(f'--latency-model {args.latency_model}: {e}; search the grid that was measured, or measure '
                                 'this one') from e
        found[policy] = replace(problem, grid=grid, budgets=budgets, latency=latency)
    return found


def _twin_budgets(problem: Problem, budgets: Sequence[Budget], target: Target) -> Problem:
    """The same limits for networks of the twin."""
    latency = target.cost(problem.space)
    with torch.device('meta'):
        twin = twin_model(problem.args)
    own = tuple(b.of(problem.space, latency) for b in budgets)
    for budget in own:
        small, large = ends(twin, problem.grid, budget.cost)
        budget.check_feasible(small.widths, large.widths, small.skips, large.skips)
    return replace(problem, budgets=own, latency=latency)


def learning_problem(problem: Problem) -> Problem:
    """The problem on which a policy learns: without the validation images, and as small as --proxy says.

    Raises:
        UsageError: Nothing is left to train on or to hold out.
    """
    args, targets = problem.args, problem.targets
    proxy = parse_proxy(args.proxy)
    kept, held = split_holdout(targets, args.search_holdout, args.seed)
    if not len(held) or not len(kept):
        raise UsageError(f'--search-holdout {args.search_holdout:g} of {len(targets)} training images leaves nothing: '
                         'every class needs two or more')
    held = np.random.default_rng(args.seed).permutation(held)  # so that its first batches are of all classes
    if proxy == Proxy():
        return replace(problem, train=View(problem.train.images, kept), held=View(problem.train.images, held))
    if targets.ndim == 2:
        if proxy.classes:
            raise UsageError('--proxy classes= is for images with one class each')
        kept = np.sort(np.random.default_rng(args.seed).permutation(kept)[:max(round(proxy.data * len(kept)), 1)])
    present = np.arange(args.num_classes) if targets.ndim == 2 else np.unique(targets)
    if (proxy.classes or 0) > len(present):
        raise UsageError(f'--proxy classes={proxy.classes} is more than the {len(present)} classes of the images')
    classes = present if proxy.classes is None else np.sort(np.random.default_rng(args.seed).permutation(present)[:proxy.classes])
    names = None if proxy.classes is None else {int(c): i for i, c in enumerate(classes)}
    if targets.ndim == 1:
        kept = shrink(targets, kept, proxy.data, classes, args.seed)
        held = held[np.isin(targets[held], classes)]
    smaller = Namespace(**vars(args))
    smaller.img_size, smaller.num_classes = proxy.resolution or args.img_size, proxy.classes or args.num_classes
    model = twin_model(smaller) if problem.twin else base_model(smaller)
    config = data_config(smaller, model)
    return replace(
        problem, args=smaller, train=View(problem.train.images, kept, names), held=View(problem.train.images, held, names),
        space=(trace_twin if problem.twin else trace)(model, config['input_size']), config=config)
