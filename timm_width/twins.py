"""Models whose layers are chosen from several blocks: `prunet` has a twin, `prunet_search`, with all candidates of every layer.

A network of the twin is written as any other: widths of the hidden groups, and as skips the candidates that are not there. A layer
that is left out has none. `plain_arguments` says what model that is.
"""
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import timm
from torch import nn

from .cost import Cost
from .factors import Grid
from .policies.base import Choice
from .space import Block, WidthError, WidthSpace
from .trace import trace

__all__ = ['ends', 'has_twin', 'plain_arguments', 'trace_twin', 'twin_grid', 'twin_name']


def twin_name(name: str) -> str:
    """What the model with all candidates is called."""
    return f'{name}_search'


def has_twin(name: str) -> bool:
    """Whether layers of a model can be chosen from several blocks."""
    return timm.is_model(twin_name(name))


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
