"""Latency tables by block: each block is measured alone at its widths, and a whole network once for the rest.

This is the lookup table of Prunode (section 3.2 of "Tiered Pruning for Efficient Differentiable Inference-Aware Neural Architecture
Search") and of many searches before it. It needs far fewer measurements than a model fitted to whole networks, says what a network
costs without some of its blocks, and leaves out what blocks do to one another.
"""
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Optional

import numpy as np
import torch
from torch import nn

from ..cost import CostError
from ..data import UsageError
from ..factors import Factors, Grid, sum_terms
from ..mixture import find_layers
from ..space import WidthSpace, nearest
from .terms import Term, make_term, scope_of

__all__ = ['add_up', 'block_inputs', 'find_blocks', 'knots', 'refinement']

Table = tuple[Sequence[str], np.ndarray]  # groups, and milliseconds with a dimension for each


def find_blocks(
        model: nn.Module,
        space: WidthSpace,
        grid: Grid,
        patterns: Optional[Sequence[str]] = None,
) -> tuple[dict[str, Term], Grid]:
    """The blocks to measure.

    Args:
        model: The model.
        space: Its width space.
        grid: Group -> widths.
        patterns: Names of modules, as in 'layer*.?'; by default the blocks that Prunode weighs (`mixture.find_layers`): those that
            have groups of their own, and those that can be left out.

    Returns:
        Name -> its layers, with the groups of the grid on which they depend; and the grid, by default without the groups that no
        block has for its own.

    Raises:
        UsageError: A pattern fits no module with a layer, or blocks lie in one another, or there are none.
        CostError: A block depends on more than two groups of the grid, or a group of the grid changes more than the blocks.
    """
    names: dict[str, None] = {}
    if patterns:
        modules = {site.name.rsplit('.', k)[0]: None for site in space.sites for k in range(site.name.count('.') + 1)}
        for pattern in patterns:
            if not (found := fnmatch.filter(modules, pattern)):
                raise UsageError(f"--blocks '{pattern}' fits no module of {space.architecture} with layers"
                                 f'{nearest(pattern, modules)}')
            names |= dict.fromkeys(found)
    else:
        owned = {path: groups for layer in find_layers(model, space, list(grid)) for path, groups in layer.blocks.items()}
        names, own = dict.fromkeys(owned), {g for groups in owned.values() for g in groups}
        grid = {name: widths for name, widths in grid.items() if name in own}
        if not names:
            raise UsageError(f'{space.architecture} has no block with hidden channels of its own, nor one that can be left out: '
                             "say which modules to measure, as in --blocks 'blocks.*.?'")
    for name in names:
        if outer := next((other for other in names if name.startswith(other + '.')), None):
            raise UsageError(f"--blocks: '{name}' lies inside '{outer}': name one of them")
    blocks, left = {}, list(space.sites)
    for name in names:
        sites = [s for s in left if f'{s.name}.'.startswith(name + '.')]
        left = [s for s in left if s not in sites]
        scope = frozenset().union(*(scope_of(space, grid, s) for s in sites))
        if len(scope) > 2:
            raise CostError(f"{space.architecture}: the block '{name}' depends on {len(scope)} searched groups "
                            f"({', '.join(sorted(scope))}), and a table is over two: keep the width of the others (--fix)")
        blocks[name] = make_term(space, grid, scope, sites) if sites else Term((), (), (), (), 0)
    for site in left:
        if scope := scope_of(space, grid, site):
            raise CostError(f"{space.architecture}: the width of '{min(scope)}' changes the layer '{site.name}', which is in no "
                            "block: keep it with --fix, or name the layer's module with --blocks, too")
    return blocks, grid


@torch.inference_mode()
def block_inputs(network: nn.Module, input_size: Sequence[int], names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of what blocks are given, without the batch: block -> (channels, height, width).

    Args:
        network: In evaluation mode; it may be on the meta device.
        input_size: Of an image.
        names: The blocks.

    Raises:
        UsageError: A block does not run once, on one image-like tensor: it cannot be measured alone.
    """
    seen: dict[str, list] = {name: [] for name in names}
    hooks = [network.get_submodule(name).register_forward_pre_hook(lambda _, inputs, to=to: to.append(inputs))
             for name, to in seen.items()]
    device = next((p.device for p in network.parameters()), None)
    network(torch.zeros(1, *input_size, device=device))
    for hook in hooks:
        hook.remove()
    for name, inputs in seen.items():
        if len(inputs) != 1 or len(inputs[0]) != 1 or not isinstance(inputs[0][0], torch.Tensor):
            raise UsageError(f"'{name}' cannot be measured alone: it runs {len(inputs)} times, on "
                             f'{len(inputs[0]) if inputs else 0} inputs')
        if inputs[0][0].ndim != 4:
            raise UsageError(f"'{name}' cannot be measured alone: its input is no image, but of shape {tuple(inputs[0][0].shape)}")
    return {name: tuple(inputs[0][0].shape[1:]) for name, inputs in seen.items()}


def knots(widths: Sequence[int], count: Optional[int]) -> tuple[int, ...]:
    """Widths to measure of many, evenly spread, both ends among them; all of them, if no count is given."""
    if count is None or count >= len(widths):
        return tuple(widths)
    return tuple(widths[i] for i in sorted({round(i) for i in np.linspace(0, len(widths) - 1, max(count, 2))}))


def refinement(count: int) -> list[int]:
    """When each of several points on a line is due, if each round halves the gaps: 0 for both ends, 1 for the middle, and so on."""
    found, gaps = [0] * count, [(0, count - 1)]
    level = 0
    while gaps:
        level, halves = level + 1, []
        for low, high in gaps:
            if high - low > 1:
                middle = (low + high) // 2
                found[middle] = level
                halves += [(low, middle), (middle, high)]
        gaps = halves
    return found


def add_up(grid: Grid, tables: Mapping[str, Table], rest: float) -> tuple[Factors, dict[str, Factors]]:
    """The latency of networks, as the sum of blocks measured alone.

    Args:
        grid: Group -> widths of the tables, ascending.
        tables: Block -> what was measured.
        rest: Of the whole, without blocks; less than 0, where blocks that run alone take longer.

    Returns:
        The sum over the grid, and the part of each block over its own groups.
    """
    parts = {}
    for name, (groups, table) in tables.items():
        own = {g: grid[g] for g in grid if g in groups}
        parts[name] = sum_terms(own, [(groups, np.asarray(table, dtype=np.float64))], 0.)
    return sum_terms(grid, tables.values(), rest), parts
