"""What to measure for tables of blocks, and the bundle that holds it.

A block is exported once, at its largest widths, and cut to the others; blocks that are alike are measured once. Whole networks are
measured, too: the first one says what a network takes beyond its blocks, and how the machine drifts; the others, how well it all
adds up. A model with a twin (twins.py) is measured with all candidates of its layers.
"""
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any, Optional

import numpy as np
import torch
from timm.data import resolve_data_config
from timm.utils import random_seed
from torch import nn

from ..data import UsageError
from ..factors import Grid, random_widths
from ..resize import resize
from ..space import WidthSpace
from ..trace import trace
from ..twins import base_choice, has_twin, plain_arguments, random_choice, trace_twin, twin_block, twin_grid, twin_name
from .blocks import block_inputs, find_blocks, knots, refinement
from .bundle import Network, Order, build_network, check_images, describe_order, make_network
from .runner.manifest import Manifest
from .terms import Term

__all__ = ['HELD', 'Part', 'Parts', 'Plan', 'make_plan']

HELD = 2  # widths between the knots of a block at which the interpolation is tried


@dataclass(frozen=True, eq=False)
class Part:
    """Something that is measured by itself, at some points of a grid: a block, or a whole network.

    Attributes:
        name: What it is, for messages.
        input_size: (channels, height, width) of what it is given.
        make: Builds it, ready to run, at widths of its own groups; those left out are the largest.
        grid: Own group -> widths, ascending.
        space: Of the largest, if there is a grid.
    """
    name: str
    input_size: tuple[int, ...]
    make: Callable[[Mapping[str, int]], nn.Module]
    grid: Grid = field(default_factory=dict)
    space: Optional[WidthSpace] = None


@dataclass
class Plan:
    """What to measure, in the order to measure it.

    Attributes:
        order: What was asked for; its model is the twin's name, if there is one.
        network: The model, its space, and the grid of the blocks' groups.
        parts: What is measured.
        configurations: (use, part, widths of the part's groups).
        tables: As a manifest has them: block, groups, their knots, and the configuration of every point.
        held: Blocks at widths between knots, and the configurations that these are.
        networks: Whole networks, and the configurations that these are; the first is the one of the rest.
    """
    order: Order
    network: Network
    parts: list[Part] = field(default_factory=list)
    configurations: list[tuple[str, int, tuple[int, ...]]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    held: list[dict[str, Any]] = field(default_factory=list)
    networks: list[dict[str, Any]] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it, but for files."""
        rows = [{'use': use, 'part': part, 'widths': list(widths)} for use, part, widths in self.configurations]
        return {**describe_order(self.order, self.network), 'tables': self.tables, 'held': self.held, 'networks': self.networks,
                'configurations': rows}

    def rows_of(self, part: int) -> list[tuple[str, dict[str, int]]]:
        """Use and widths of a part's configurations."""
        return [(use, dict(zip(self.parts[part].grid, widths))) for use, p, widths in self.configurations if p == part]


@dataclass(frozen=True)
class Parts(Manifest):
    """A bundle without files, whose parts torch builds when they are measured."""
    plan: Plan

    def network(self, index: int) -> tuple[nn.Module, tuple[int, ...]]:
        configuration = self.configurations[index]
        part = self.plan.parts[configuration.part]
        return part.make(configuration.widths), part.input_size


class _Model:
    """A model as it is: its blocks, and whole networks of other widths.

    Args:
        order: What to build.
        exportable: Whether it will be exported.
    """

    def __init__(self, order: Order, exportable: bool):
        network = make_network(order)
        self.order = order
        self.blocks, grid = find_blocks(network.model, network.space, network.grid, order.blocks)
        if grid and all(len(widths) == 1 for widths in grid.values()):
            raise UsageError('no block has several widths to measure')
        self.network = network._replace(grid=grid)
        largest = {name: widths[-1] for name, widths in grid.items()}
        self.largest = resize(build_network(order, exportable=exportable), network.space, largest).eval()

    @cached_property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return block_inputs(self.largest, self.network.space.input_size, self.blocks)

    def block(self, name: str) -> nn.Module:
        return copy.deepcopy(self.largest.get_submodule(name))

    def alone(self, name: str, widths: Mapping[str, int]) -> tuple[nn.Module, tuple[int, ...]]:
        """A block whose widths are not its own alone, cut out of the network at these widths, and the shape of its input."""
        whole = resize(copy.deepcopy(self.largest), self.space, widths)
        return whole.get_submodule(name), block_inputs(whole, self.space.input_size, [name])[name]

    @cached_property
    def space(self) -> WidthSpace:
        """Of the largest network."""
        return trace(self.largest, self.network.space.input_size)

    def networks(self, count: int, rng: np.random.Generator) -> list[tuple[Part, dict[str, int], dict[str, int], list[str]]]:
        """Whole networks: the part, its widths, and the widths and skips that a latency model knows it by."""
        size, grid, space = tuple(self.network.space.input_size), self.network.grid, self.space

        def make(widths: Mapping[str, int]) -> nn.Module:
            return resize(copy.deepcopy(self.largest), space, widths)

        part = Part('network', size, make, grid, space)
        steps = {name: knots(widths, self.order.knots) for name, widths in grid.items()}
        middle = {name: widths[len(widths) // 2] for name, widths in steps.items()}
        found = [middle, *(random_widths(grid, rng) for _ in range(count))]
        return [(part, widths, widths, []) for widths in found]


class _Twin:
    """A model with a twin: all candidates of its layers, and whole networks of other candidates."""

    def __init__(self, order: Order, exportable: bool):
        for flag in ('grid', 'blocks', 'fix', 'width_min', 'width_max', 'width_divisor'):
            if getattr(order, flag):
                raise UsageError(f"--{flag.replace('_', '-')} has no meaning for {order.model}: all blocks that a layer may be are "
                                 'measured, at all of their widths')
        self.plain, self.exportable = order, exportable
        self.order = replace(order, model=twin_name(order.model))
        with torch.device('meta'):
            self.twin = build_network(self.order).eval()
        data = resolve_data_config({'img_size': order.img_size} if order.img_size else {}, model=self.twin)
        size = (order.in_chans or data['input_size'][0], *data['input_size'][1:])
        check_images(order.batch, *size)
        space, grid = trace_twin(self.twin, size), twin_grid(self.twin)
        self.blocks, _ = find_blocks(self.twin, space, grid)
        self.network = Network(self.twin, space, grid)

    @cached_property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return block_inputs(self.twin, self.network.space.input_size, self.blocks)

    def block(self, name: str) -> nn.Module:
        return twin_block(self.twin, name)

    def networks(self, count: int, rng: np.random.Generator) -> list[tuple[Part, dict[str, int], dict[str, int], list[str]]]:
        choices = [base_choice(self.twin), *(random_choice(self.twin, self.network.grid, rng) for _ in range(count))]
        found = []
        for choice in choices:
            def make(widths: Mapping[str, int], choice=choice) -> nn.Module:
                arguments = {**self.order.model_args, **plain_arguments(self.twin, choice)}
                return build_network(replace(self.plain, model_args=arguments), exportable=self.exportable)

            found.append((Part('network', tuple(self.network.space.input_size), make), {}, dict(choice.widths), list(choice.skips)))
        return found


def make_plan(order: Order, samples: int, exportable: bool) -> Plan:
    """Decides what to measure.

    Args:
        order: The network; its `blocks` are not None.
        samples: Whole networks to measure besides the first.
        exportable: Whether it will be exported.

    Raises:
        UsageError: It cannot be built, or there is nothing to measure alone.
        CostError: As `blocks.find_blocks`.
    """
    random_seed(order.seed)
    source: Any = (_Twin if has_twin(order.model) else _Model)(order, exportable)
    plan, rng = Plan(source.order, source.network), np.random.default_rng(order.seed)
    wanted: dict[tuple[int, tuple[int, ...]], tuple[int, str]] = {}  # (part, widths) -> (round in which it is due, use)

    def add(part: int, widths: Sequence[int], due: int, use: str = 'train') -> tuple[int, tuple[int, ...]]:
        key = part, tuple(widths)
        wanted[key] = min(wanted.get(key, (due, use)), (due, use))
        return key

    for i, (part, own, widths, skips) in enumerate(source.networks(samples, rng)):
        if part not in plan.parts:
            plan.parts.append(part)
        key = add(plan.parts.index(part), own.values(), -1 if not i else 1, 'valid' if i else 'train')
        plan.networks.append({'widths': widths, 'skips': skips, 'configuration': key})
    known: dict[tuple, tuple[list, list]] = {}
    for name, term in source.blocks.items():
        levels = [plan.network.grid[g] for g in term.groups]
        block, shape = source.network.model.get_submodule(name), source.inputs[name]
        kind = type(block), repr(block), shape, term.kind, *map(tuple, levels)
        if kind not in known:
            at = _points(source, name, term, levels, plan.parts)
            steps = [knots(widths, order.knots) for widths in levels]
            rounds = [dict(zip(widths, refinement(len(widths)))) for widths in steps]
            points = [add(*at(point), max((r[w] for r, w in zip(rounds, point)), default=0) + 3 * any(
                r[w] for r, w in zip(rounds, point))) for point in product(*steps)]
            between = [p for p in product(*levels) if any(w not in step for w, step in zip(p, steps))]
            chosen = sorted(rng.choice(len(between), min(HELD, len(between)), replace=False)) if between else []
            known[kind] = points, [(between[i], add(*at(between[i]), 2, 'valid')) for i in chosen]
            plan.held += [{'block': name, 'widths': dict(zip(term.groups, point)), 'configuration': key}
                          for point, key in known[kind][1]]
        steps = [list(knots(widths, order.knots)) for widths in levels]
        plan.tables.append({'block': name, 'groups': list(term.groups), 'levels': steps, 'configurations': known[kind][0]})
    keys = sorted(wanted, key=lambda key: (wanted[key][0], *key))
    number = {key: i for i, key in enumerate(keys)}
    plan.configurations = [(wanted[key][1], *key) for key in keys]
    for table in plan.tables:
        table['configurations'] = [number[key] for key in table['configurations']]
    for entry in (*plan.held, *plan.networks):
        entry['configuration'] = number[entry['configuration']]
    return plan


def _points(
        source: Any,
        name: str,
        term: Term,
        levels: Sequence[Sequence[int]],
        parts: list[Part],
) -> Callable[[Sequence[int]], tuple[int, Sequence[int]]]:
    """Adds a block to the parts, and returns what says which part it is at some widths, and of what own widths."""
    shape, inner = source.inputs[name], [group.removeprefix(f'{name}.') for group in term.groups]
    space = trace(source.block(name), shape) if term.groups else None
    if space is None or all(g in space.searchable and space[g].size == widths[-1] for g, widths in zip(inner, levels)):
        def make(widths: Mapping[str, int]) -> nn.Module:
            block = source.block(name).eval()
            return block if space is None else resize(block, space, widths)

        number = len(parts)
        parts.append(Part(name, shape, make, dict(zip(inner, levels)), space))
        return lambda point: (number, point)
    places: dict[tuple[int, ...], int] = {}

    def at(point: Sequence[int]) -> tuple[int, Sequence[int]]:
        """Widths that are not the block's alone: each of them is something else to measure."""
        if point not in places:
            widths = dict(zip(term.groups, point))
            places[point] = len(parts)
            parts.append(Part(name, source.alone(name, widths)[1], lambda _: source.alone(name, widths)[0]))
        return places[point], ()

    return at
