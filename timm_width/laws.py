"""The laws that make a model supported, as functions: tests, `make_supported.py` and third parties run the same ones.

0 commutation, 1 permutation, 3 cost; law 2 (slicing) and law 4 (rebuilding) need a supernet and a folder, and stand in the tests.
"""
import copy
import math
from collections.abc import Mapping, Sequence
from typing import Optional

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .resize import axis_places, replace_tensors, resize
from .space import WidthSpace
from .trace import meta_copy, trace

__all__ = [
    'commutation_faults', 'cost_faults', 'permutation_error', 'permuted', 'random_widths', 'randomise', 'randomised_output',
]


def random_widths(space: WidthSpace, seed: int, low: float = 0.3, high: float = 1.5) -> dict[str, int]:
    """Every searchable group at a ratio of its own, drawn uniformly."""
    rng = np.random.default_rng(seed)
    return {n: space.rounded(g, g.size * rng.uniform(low, high)) for n, g in space.searchable.items()}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives norms, scales and tensors that are constant at initialisation random values: fresh ones hide wrong groups."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if not t.is_floating_point():
                continue
            if 'running_var' in name or t.ndim <= 1 and not name.endswith(('bias', 'running_mean')):
                t.copy_(torch.rand(t.shape, generator=generator, dtype=t.dtype) + 0.5)
            elif t.ndim <= 1:
                t.copy_(0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype))
            elif (t == t.reshape(-1)[0]).all():
                t.copy_(0.05 * torch.randn(t.shape, generator=generator, dtype=t.dtype))
    return model


def commutation_faults(model: nn.Module, space: WidthSpace, widths: Mapping[str, int]) -> list[str]:
    """Law 0: the trace of the resized model is the resized trace (same groups, shapes and sites)."""
    resized = resize(meta_copy(model), space, widths)
    again = trace(resized, space.input_size)
    faults = []
    want = [(g.name, widths.get(g.name, g.size), g.unit, g.ordered) for g in space.groups]
    got = [(g.name, g.size, g.unit, g.ordered) for g in again.groups]
    faults += [f'group {w} became {g}' for w, g in zip(want, got) if w != g]
    if len(want) != len(got):
        faults.append(f'{len(want)} groups became {len(got)}')
    shapes = {n: tuple(t.shape) for n, t in [*resized.named_parameters(), *resized.named_buffers()]}
    faults += [f'{n}: {s} was expected, {shapes.get(n)} found' for n, s in space.shapes(widths).items() if shapes.get(n) != s]
    if [(s.name, s.kind, s.output_size) for s in space.sites] != [(s.name, s.kind, s.output_size) for s in again.sites]:
        faults.append('other sites')
    return faults


def cost_faults(model: nn.Module, space: WidthSpace, widths: Mapping[str, int]) -> list[str]:
    """Law 3: MACs and parameters from the table are those counted on the resized model (on the meta device)."""
    resized = resize(meta_copy(model).eval(), space, widths)
    faults = []
    with torch.inference_mode(), torch.device('meta'), FlopCounterMode(display=False) as counter:
        resized(torch.empty(1, *space.input_size))
    if 2 * space.macs(widths) != counter.get_total_flops():
        faults.append(f'{space.macs(widths)} MACs in the table, {counter.get_total_flops() / 2:g} counted')
    params = sum(p.numel() for p in resized.parameters())
    table = sum(math.prod(s) for s in space.shapes(widths, params_only=True).values())
    if table != params:
        faults.append(f'{table} parameters in the table, {params} counted')
    return faults


def permuted(model: nn.Module, space: WidthSpace, seed: int, only: Optional[Sequence[str]] = None) -> nn.Module:
    """A copy of the model with the channels of every searchable, unordered group (or only some) in another order."""
    rng = np.random.default_rng(seed)
    order = [rng.permutation(g.steps) if g.frozen is None and not g.ordered and (only is None or g.name in only)
             else np.arange(g.steps) for g in space.groups]
    steps = np.array([g.steps for g in space.groups])

    def shuffle(name: str, t: torch.Tensor) -> torch.Tensor:
        for dim, axis in enumerate(space.tensors[name].axes):
            if axis is not None:
                t = t.index_select(dim, torch.as_tensor(axis_places(space, axis, order, steps)[0]))
        return t.clone()

    out = copy.deepcopy(model)
    with torch.no_grad():
        replace_tensors(out, shuffle)
    return out


def randomised_output(model: nn.Module, size: Sequence[int], seed: int = 0) -> torch.Tensor:
    """The model's (first) output for a random image."""
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        out = model(x.to(next(model.parameters()).dtype))
    return out if isinstance(out, torch.Tensor) else out[0]


def permutation_error(model: nn.Module, space: WidthSpace, seed: int = 0) -> float:
    """Law 1: the largest change of the output, relative to its largest value, when all groups are permuted.

    The model should be in float64 and eval mode, with `randomise`d norms.
    """
    y = randomised_output(model, space.input_size)
    z = randomised_output(permuted(model, space, seed), space.input_size)
    return float((y - z).abs().max() / y.abs().max().clamp_min(1e-30))
