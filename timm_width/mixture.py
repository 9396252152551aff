"""Layers that are still several blocks, and blocks that are still two widths: what Prunode trains.

A `Mixture` takes the place of a layer of the model. It adds up the outputs of its candidates by their weights; each is a `Prunode`,
which runs one block with a small and a large mask. Who trains them sets the weights before each pass and the masks after each step.
"""
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
from torch import nn

from .factors import Grid
from .ledger import meta_copy
from .masking import Masks
from .space import WidthSpace
from .supernet import Supernet

__all__ = ['Layer', 'Mixture', 'Prunode', 'build_layers', 'find_layers']

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
FORWARDS = {c.forward for c in CONTAINERS}  # of those that are nothing but containers


@dataclass(frozen=True)
class Layer:
    """Part of a network that one of several blocks is chosen for.

    Attributes:
        path: Its module.
        blocks: Module of each candidate -> the groups that are its own, whose widths are chosen together.
        residual: Whether it can be left out.
        alone: Whether the module is itself its only candidate.
    """
    path: str
    blocks: Mapping[str, tuple[str, ...]]
    residual: bool
    alone: bool = True


def find_layers(model: nn.Module, space: WidthSpace, names: Sequence[str]) -> list[Layer]:
    """The layers of a model: those that have `candidates`, and the blocks that have groups of their own or can be left out.

    A group is a block's own, if all layers that it governs are in it. A block is the innermost module of which that is true, but
    for containers; of blocks within blocks the outermost. Blocks that give anything but one tensor are left out.

    Args:
        model: The model.
        space: Its width space.
        names: The groups that may be searched.
    """
    modules = dict(model.named_modules())
    mixed = [path for path, m in modules.items() if isinstance(getattr(m, 'candidates', None), CONTAINERS)]
    blocks: dict[str, list[str]] = {f'{path}.candidates.{n}': [] for path in mixed for n in modules[path].candidates._modules}
    owners = {name: _owner(space, name, modules) for name in names}
    removable = [b.name for b in space.blocks]
    for path in sorted(_giving_one(model, space, {*owners.values(), *removable} - {''}), key=lambda p: p.count('.')):
        if not any(_inside(path, outer) for outer in blocks):
            blocks.setdefault(path, [])
    for name, path in owners.items():
        if (block := next((b for b in blocks if path == b or _inside(path, b)), None)) is not None:
            blocks[block].append(name)
    found = [Layer(path, {b: tuple(own) for b, own in blocks.items() if _inside(b, path)}, modules[path].residual, False)
             for path in mixed]
    found += [Layer(path, {path: tuple(own)}, path in removable) for path, own in blocks.items()
              if not any(_inside(path, m) for m in mixed) and (own or path in removable)]
    order = {path: i for i, path in enumerate(modules)}
    return sorted(found, key=lambda layer: order[layer.path])


def _inside(path: str, outer: str) -> bool:
    return path.startswith(f'{outer}.')


def _owner(space: WidthSpace, name: str, modules: Mapping[str, nn.Module]) -> str:
    """The innermost module, but for containers, that holds all tensors of a group."""
    index = space.index[name]
    owners = [tensor.split('.')[:-1] for tensor, t in space.tensors.items() if any(
        a is not None and any(g == index for g, _ in a) for a in t.axes)]
    shared = []
    for parts in zip(*owners):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    while shared and isinstance(m := modules['.'.join(shared)], CONTAINERS) and type(m).forward in FORWARDS:
        shared.pop()
    return '.'.join(shared)


@torch.no_grad()
def _giving_one(model: nn.Module, space: WidthSpace, paths: Collection[str]) -> list[str]:
    """The modules of a model that give one tensor."""
    tried, one = meta_copy(model).eval(), dict.fromkeys(paths, True)

    def look(path: str, module: nn.Module, given: tuple, out: Any) -> None:
        one[path] &= isinstance(out, torch.Tensor)

    for path in paths:
        tried.get_submodule(path).register_forward_hook(partial(look, path))
    tried(torch.zeros(1, *space.input_size, device='meta'))
    return [path for path in paths if one[path]]


class Prunode(nn.Module):
    """A block that runs at two widths, with shared weights (section 3.2.1).

    Masks are on hidden channels alone: they multiply what the normalisations inside the block give, before the activations,
    which must leave 0 at 0. So a masked block gives what the narrower block would.

    Args:
        block: The block.
        widths: Its widths, ascending, the last of them its own: group -> channels of each. One alone for a block of fixed width.
        norms: Normalisation, by its name in the block -> (group, channels per step, steps, repeats of a step) along its channels.

    Attributes:
        masks: Where Algorithm 1 is; None for a block of fixed width.
        shares: Gumbel-softmax coefficients of the small and the large mask; outside of training one half each.
    """

    def __init__(
            self,
            block: nn.Module,
            widths: Sequence[Mapping[str, int]],
            norms: Mapping[str, Sequence[tuple[str, int, int, int]]],
    ):
        super().__init__()
        self.block, self.widths, self.norms = block, tuple(widths), dict(norms)
        self.masks = Masks(len(self.widths)) if len(self.widths) > 1 else None
        self.shares: Optional[torch.Tensor] = None
        self._factors: dict[tuple, dict[str, torch.Tensor]] = {}

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that it runs at, from 1: two, or one."""
        return (len(self.widths),) if self.masks is None else (self.masks.small, self.masks.large)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.masks is None:
            return self.block(x, *args, **kwargs)
        small, large = (self.masked(level, x, *args, **kwargs) for level in self.levels)
        shares = x.new_full((2,), 0.5) if self.shares is None else self.shares
        return shares[0].to(small.dtype) * small + shares[1].to(large.dtype) * large

    def masked(self, level: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The block's output at one of its widths, which takes as long at each."""
        if self.widths[level - 1] == self.widths[-1]:
            return self.block(x, *args, **kwargs)
        masked = {}
        for name, factor in self._ones_and_zeros(level).items():
            norm = self.block.get_submodule(name)
            masked |= {f'{name}.{leaf}': getattr(norm, leaf) * factor for leaf in ('weight', 'bias')
                       if getattr(norm, leaf, None) is not None}
        return torch.func.functional_call(self.block, masked, (x, *args), kwargs)

    def _ones_and_zeros(self, level: int) -> dict[str, torch.Tensor]:
        """Of every normalisation, factors of its scale and shift."""
        scales = {name: self.block.get_submodule(name).weight for name in self.norms}
        key = level, *((w.device, w.dtype) for w in scales.values())
        if key not in self._factors:
            self._factors = {k: v for k, v in self._factors.items() if k[0] in self.levels}
            self._factors[key] = {name: self._factor(w, self.norms[name], self.widths[level - 1]) for name, w in scales.items()}
        return self._factors[key]

    @staticmethod
    def _factor(scale: torch.Tensor, pieces: Sequence[tuple[str, int, int, int]], widths: Mapping[str, int]) -> torch.Tensor:
        found, start = torch.ones_like(scale, requires_grad=False), 0
        for group, unit, steps, repeat in pieces:
            end = start + steps * repeat
            found[start + widths.get(group, steps * unit) // unit * repeat:end] = 0
            start = end
        return found


class Mixture(nn.Module):
    """A layer of several candidates: x_{l+1} = sum_i a_i B_i(x_l) (eq. 3).

    Args:
        candidates: Its blocks.
        residual: Whether it can be left out.
        path: Its name in the model.

    Attributes:
        candidates: Those left, by their number.
        skip: Whether the skip connection is one of them, and the last.
        scales: What the outputs of the skip connection and of the block beside it are multiplied by: phi and lambda.
        weights: Coefficient of each candidate left, and of the skip connection; outside of training all are equal.
    """

    def __init__(self, candidates: Sequence[Prunode], residual: bool, path: str):
        super().__init__()
        self.candidates = nn.ModuleDict({str(i): c for i, c in enumerate(candidates)})
        self.residual, self.path = residual, path
        self.skip, self.scales = False, (1., 1.)
        self.weights: Optional[torch.Tensor] = None

    @property
    def left(self) -> list[int]:
        """Numbers of the candidates left."""
        return [int(i) for i in self.candidates]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        blocks = list(self.candidates.values())
        count = len(blocks) + self.skip
        if count == 1:
            return blocks[0](x, *args, **kwargs) if blocks else x
        weights = x.new_full((count,), 1 / count) if self.weights is None else self.weights
        phi, block_scale = self.scales if self.skip else (1., 1.)
        total = None
        for weight, block in zip(weights, blocks):
            out = block(x, *args, **kwargs)
            out = (block_scale * weight).to(out.dtype) * out
            total = out if total is None else total + out
        return total + (phi * weights[-1]).to(x.dtype) * x if self.skip else total

    def remove(self, number: int) -> None:
        """Leaves out a candidate for good."""
        del self.candidates[str(number)]


def build_layers(model: nn.Module, space: WidthSpace, layers: Sequence[Layer], grid: Grid, masks: bool = True) -> list[Mixture]:
    """Puts mixtures into a model, in the place of its layers.

    Args:
        model: The model, at the grid's largest widths; it is changed.
        space: Its width space.
        layers: What `find_layers` found.
        grid: Group -> widths, ascending.
        masks: Whether widths are searched; if not, blocks keep their largest.

    Returns:
        The mixtures, in the order of the layers.
    """
    axes = Supernet(model, space).norm_axes
    found = []
    for layer in layers:
        candidates = []
        for path, groups in layer.blocks.items():
            norms = {norm[len(path) + 1:]: [(space.groups[g].name, space.groups[g].unit, space.groups[g].steps, repeat)
                                            for g, repeat in axis]
                     for norm, axis in axes.items() if _inside(norm, path) and any(space.groups[g].name in groups for g, _ in axis)}
            widths = _levels({g: grid[g] for g in groups}) if masks else [{g: grid[g][-1] for g in groups}]
            candidates.append(Prunode(model.get_submodule(path), widths, norms))
        mixture = Mixture(candidates, layer.residual, layer.path)
        parent, _, leaf = layer.path.rpartition('.')
        model.get_submodule(parent)._modules[leaf] = mixture
        found.append(mixture)
    return found


def _levels(grid: Grid) -> list[dict[str, int]]:
    """The widths of one block: as many as its group of most widths has; the others go along."""
    count = max((len(levels) for levels in grid.values()), default=1)
    shares = [i / count for i in range(1, count + 1)]
    return [{name: levels[max(round(share * len(levels)), 1) - 1] for name, levels in grid.items()} for share in shares]
