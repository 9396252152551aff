"""Models whose layers are chosen from several blocks: `prunet` has a twin, `prunet_search`, with all candidates of every layer.

A network of the twin is written as any other: widths of the hidden groups, and as skips the candidates that are not there. A layer
that is left out has none. `plain_arguments` says what model that is.
"""
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Optional

import numpy as np
import timm
from torch import nn

from .cost import Cost
from .factors import Factors, Grid, sum_terms
from .policies.base import Choice
from .space import Block, WidthError, WidthSpace
from .tables import Tables
from .trace import trace

__all__ = [
    'base_choice', 'ends', 'has_twin', 'is_twin', 'plain_arguments', 'plain_tables', 'random_choice', 'trace_twin', 'twin_block',
    'twin_grid', 'twin_name',
]

SUFFIX = '_search'


def twin_name(name: str) -> str:
    """What the model with all candidates is called."""
    return f'{name}{SUFFIX}'


def has_twin(name: str) -> bool:
    """Whether layers of a model can be chosen from several blocks."""
    return timm.is_model(twin_name(name))


def is_twin(name: str) -> bool:
    """Whether a model is a twin."""
    return name.endswith(SUFFIX) and has_twin(name.removesuffix(SUFFIX))


def trace_twin(twin: nn.Module, input_size: Sequence[int]) -> WidthSpace:
    """The width space of a twin, of which every candidate can be left out."""
    space = trace(twin, tuple(input_size))
    return replace(space, blocks=tuple(Block(path) for paths in _candidates(twin).values() for path in paths.values()))


def twin_grid(twin: nn.Module) -> Grid:
    """Hidden group -> its widths; what blocks give to one another keeps its width."""
    return {group: tuple(twin.hidden_widths(layer, name)) for layer, paths in _candidates(twin).items() for name in paths
            if (group := twin.hidden_group(layer, name))}


def plain_arguments(twin: nn.Module, choice: Choice) -> dict[str, Any]:
    """The arguments of the model that has one candidate, or none, in each layer.

    Raises:
        WidthError: The choice leaves several candidates in a layer, or none where one must be.
    """
    found: dict[str, Any] = {}
    for layer, paths in _candidates(twin).items():
        left = [name for name, path in paths.items() if path not in choice.skips]
        if len(left) > 1:
            raise WidthError(f"'{layer}' has {len(left)} blocks left: {', '.join(left)}")
        found[layer] = (left[0], choice.widths.get(twin.hidden_group(layer, left[0]))) if left else None
    return twin.chosen(found)


def twin_block(twin: nn.Module, path: str) -> nn.Module:
    """A candidate by itself, new; the twin may be on the meta device."""
    layer, _, name = path.partition('.candidates.')
    return twin.offers[layer][name].module().eval()


def base_choice(twin: nn.Module) -> Choice:
    """The network of the plain model without arguments, at the nearest hidden widths that there are."""
    return _choice(twin, twin.base())


def random_choice(twin: nn.Module, grid: Grid, rng: np.random.Generator) -> Choice:
    """Draws a candidate, or none where that may be, for every layer, and its hidden width."""
    found = {}
    for layer, paths in _candidates(twin).items():
        names = [*paths, *([None] if all(block.residual for block in twin.offers[layer].values()) else [])]
        name = names[rng.integers(len(names))]
        group = name and twin.hidden_group(layer, name)
        found[layer] = name and (name, int(rng.choice(grid[group])) if group else None)
    return _choice(twin, found)


def _choice(twin: nn.Module, found: Mapping[str, Optional[tuple[str, Optional[int]]]]) -> Choice:
    widths, skips = {}, []
    for layer, paths in _candidates(twin).items():
        chosen, width = found[layer] or (None, None)
        skips += [path for name, path in paths.items() if name != chosen]
        if width is not None:
            widths[twin.hidden_group(layer, chosen)] = width
    return Choice(widths, tuple(skips))


def plain_tables(twin: nn.Module, tables: Tables, plain: WidthSpace) -> Tables:
    """What was measured of a twin's blocks, as a cost of the plain model without arguments.

    Args:
        twin: The twin; it may be on the meta device.
        tables: Of its space, and of every candidate.
        plain: The width space of the plain model.

    Raises:
        WidthError: The tables are not of every candidate.
    """
    rest, blocks = tables() - sum(tables.of(block.name) for block in tables.space.blocks), {}
    skips = base_choice(twin).skips
    for path in (block.name for block in tables.space.blocks if block.name not in skips):
        layer, _, name = path.partition('.candidates.')
        part = tables.blocks[path].tables
        new = {group: group.replace(f'.candidates.{name}', '') for group in part.grid}
        blocks[layer] = Factors({new[g]: widths for g, widths in part.grid.items()}, part.constant,
                                {new[g]: table for g, table in part.unary.items()},
                                {(new[a], new[b]): table for (a, b), table in part.pairwise.items()})
    grid = {g: widths for part in blocks.values() for g, widths in part.grid.items()}
    terms = [((g,), table) for part in blocks.values() for g, table in part.unary.items()]
    terms += [(pair, table) for part in blocks.values() for pair, table in part.pairwise.items()]
    constant = rest + sum(float(part.constant) for part in blocks.values())
    return Tables(plain, tables.unit, sum_terms(grid, terms, constant), blocks)


def ends(twin: nn.Module, grid: Grid, cost: Cost) -> tuple[Choice, Choice]:
    """The cheapest and the dearest network."""
    found = []
    for first in (True, False):
        widths, skips = {}, []
        for layer, paths in _candidates(twin).items():
            each = {}
            for name, path in paths.items():
                group = twin.hidden_group(layer, name)
                own = {group: grid[group][0 if first else -1]} if group else {}
                each[name] = cost.of(path, own), own
            best = (min if first else max)(each, key=lambda n: each[n][0])
            left_out = first and all(block.residual for block in twin.offers[layer].values())
            skips += [path for name, path in paths.items() if left_out or name != best]
            widths |= {} if left_out else each[best][1]
        found.append(Choice(widths, tuple(skips)))
    return found[0], found[1]


def _candidates(twin: nn.Module) -> dict[str, dict[str, str]]:
    """Layer -> candidate -> its module."""
    return {layer: {name: f'{layer}.candidates.{name}' for name in offered} for layer, offered in twin.offers.items()}
