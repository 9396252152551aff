"""Latency tables by block: each block is measured alone at each of its widths, and the rest of the network once.

This is the lookup table of Prunode (section 3.2 of "Tiered Pruning for Efficient Differentiable Inference-Aware Neural Architecture
Search") and of many searches before it. It needs far fewer measurements than a model fitted to whole networks, and leaves out what
blocks do to one another.
"""
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import product

import numpy as np
import torch
from torch import nn

from ..cost import CostError
from ..data import UsageError
from ..factors import Factors, Grid, sum_terms
from ..resize import resize
from ..space import WidthSpace, nearest
from .terms import Term, make_term, scope_of

__all__ = ['block_tables', 'find_blocks']

Milliseconds = Callable[[nn.Module, tuple[int, ...]], float]  # of a module on an input of (channels, height, width)


def find_blocks(space: WidthSpace, grid: Grid, patterns: Sequence[str] = ()) -> dict[str, Term]:
    """The blocks to measure.

    Args:
        space: The width space.
        grid: Group -> widths.
        patterns: Names of modules, as in 'layer*.?'; by default the residual blocks that `space.blocks` has.

    Returns:
        Name -> its layers, with the groups of the grid on which they depend.

    Raises:
        UsageError: A pattern fits no module with a layer, or blocks lie in one another.
        CostError: A block depends on more than two groups of the grid, or a group of the grid changes more than the blocks.
    """
    modules = {site.name.rsplit('.', k)[0]: None for site in space.sites for k in range(site.name.count('.') + 1)}
    names = dict.fromkeys(b.name for b in space.blocks if not patterns)
    for pattern in patterns:
        if not (found := fnmatch.filter(modules, pattern)):
            raise UsageError(f"--blocks '{pattern}' fits no module of {space.architecture} with layers{nearest(pattern, modules)}")
        names |= dict.fromkeys(found)
    if not names:
        raise UsageError(f"{space.architecture} has no residual block: say which modules to measure, as in --blocks 'blocks.*.?'")
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
        blocks[name] = make_term(space, grid, scope, sites)
    for site in left:
        if scope := scope_of(space, grid, site):
            raise CostError(f"{space.architecture}: the width of '{min(scope)}' changes the layer '{site.name}', which is in no "
                            "block: keep it with --fix, or name the layer's module with --blocks, too")
    return blocks


def block_tables(model: nn.Module, space: WidthSpace, grid: Grid, blocks: Mapping[str, Term], measure: Milliseconds) -> Factors:
    """Measures every block at all of its widths; blocks that are alike, once.

    Args:
        model: The model at its base widths; it is not changed.
        space: Its width space.
        grid: Group -> widths.
        blocks: What `find_blocks` returns.
        measure: Times a module.

    Returns:
        Milliseconds over the grid. The constant is what the whole network takes beyond its blocks, all at their base widths: less
        than 0, where blocks that run alone take longer.
    """
    known: dict[tuple, float] = {}

    def milliseconds(name: str, widths: Mapping[str, int]) -> float:
        term = blocks[name]
        module, shape = _alone(model, space, name, widths)
        key = (type(module), shape, term.kind, *(widths.get(g, space[g].size) for g in term.groups))
        if key not in known:
            known[key] = measure(module, shape)
        return known[key]

    rest = measure(model, space.input_size) - sum(milliseconds(name, {}) for name in blocks)
    terms = []
    for name, term in blocks.items():
        groups = tuple(g for g in grid if g in term.groups)
        levels = [grid[g] for g in groups]
        table = np.array([milliseconds(name, dict(zip(groups, point))) for point in product(*levels)])
        terms.append((groups, table.reshape([len(level) for level in levels])))
    return sum_terms(grid, terms, rest)


@torch.inference_mode()
def _alone(model: nn.Module, space: WidthSpace, name: str, widths: Mapping[str, int]) -> tuple[nn.Module, tuple[int, ...]]:
    """A block of the model at some widths, and the shape of its input without the batch."""
    network = resize(deepcopy(model), space, widths).eval()
    block, seen = network.get_submodule(name), []
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    device = next((p.device for p in network.parameters()), None)
    network(torch.zeros(1, *space.input_size, device=device))
    hook.remove()
    if len(seen) != 1 or len(seen[0]) != 1 or not isinstance(seen[0][0], torch.Tensor):
        raise UsageError(f"'{name}' cannot be measured alone: it runs {len(seen)} times, on {len(seen[0]) if seen else 0} inputs")
    return block, tuple(seen[0][0].shape[1:])
