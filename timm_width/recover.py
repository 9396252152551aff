"""widths_from(state_dict, base): the widths of a model that something else pruned, read from the shapes of its tensors.

Every axis of every tensor is an equation: its length is the sum of its groups' steps times the channels that a step takes
there. Axes of one group are solved first, then those in which one unknown group is left.
"""
from collections.abc import Mapping, Sequence
from typing import Any, Union

import timm
import torch
from torch import nn

from .config import SUFFIX
from .space import MAX_FAULTS, Group, TensorAxes, WidthError, WidthSpace, nearest
from .trace import trace

__all__ = ['widths_from']

MAX_NAMES = 8  # names listed in one fault
FREE_SIZES = ('weight', 'bias')  # dimensions without channels of other tensors (position tables) follow the resolution


def widths_from(
        source: Union[nn.Module, Mapping[str, torch.Tensor]],
        base: Union[str, nn.Module, WidthSpace],
        skips: Sequence[str] = (),
) -> dict[str, int]:
    """Recovers the widths of a model from its shapes.

    The number of classes and of input channels may differ from the base's, and the classifier may be missing.

    Args:
        source: State dict of the pruned model, or the model.
        base: What it was pruned from: name of a timm model, the model, or its width space.
        skips: Residual blocks that were left out of it.

    Returns:
        Widths of the groups that differ from the base: `timm.create_model('<base>_width', widths=..., skips=skips)` has the
        shapes of the source.

    Raises:
        WidthError: No widths of the base give these shapes; all reasons are listed.
    """
    space = _space(base)
    space.check({}, skips)
    shapes = _shapes(source)
    equations = _Equations(space, shapes, skips)
    faults = equations.missing() + equations.solve()
    widths = {g.name: equations.steps[i] * g.unit for i, g in enumerate(space.groups)
              if g.frozen is None and equations.steps.get(i, g.steps) != g.steps}
    faults += space.faults(widths)
    if faults:
        more = f'\n  and {len(faults) - MAX_FAULTS} more' if len(faults) > MAX_FAULTS else ''
        raise WidthError(f'these are not the shapes of a resized {space.architecture}:\n  '
                         + '\n  '.join(faults[:MAX_FAULTS]) + more)
    return widths


def _space(base: Any) -> WidthSpace:
    if isinstance(base, WidthSpace):
        return base
    if isinstance(base, nn.Module):
        return trace(base)
    if not isinstance(base, str):
        raise WidthError(f'base must be the name of a timm model, a model or a WidthSpace, not {type(base).__name__}')
    if ':' not in base and not timm.is_model(base):
        raise WidthError(f"timm has no model '{base}'{nearest(base, timm.list_models())}")
    with torch.device('meta'):
        return trace(timm.create_model(base))


def _shapes(source: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(source, nn.Module):
        return {n: tuple(t.shape) for n, t in [*source.named_parameters(), *source.named_buffers()]}
    if not isinstance(source, Mapping):
        raise WidthError(f'expected a state dict or a model, not {type(source).__name__}')
    other = [n for n, t in source.items() if not isinstance(n, str) or not hasattr(t, 'shape')]
    if other or not source:
        inside = [n for n in other if isinstance(source[n], Mapping)]
        hint = f' (did you mean its {inside[0]!r}?)' if inside else ''
        raise WidthError(f"not a state dict: {_listed(other) or 'it is empty'}{' are not tensors' if other else ''}{hint}")
    wrapped = all(n.startswith('module.') for n in source)  # by DistributedDataParallel
    return {n.removeprefix('module.') if wrapped else n: tuple(t.shape) for n, t in source.items()}


def _listed(names: Sequence) -> str:
    more = f' and {len(names) - MAX_NAMES} more' if len(names) > MAX_NAMES else ''
    return ', '.join(str(n)[:80] for n in names[:MAX_NAMES]) + more


def _layers(space: WidthSpace, key: str) -> tuple[str, ...]:
    """Layers that timm's config of the architecture names under 'first_conv' or 'classifier'."""
    name = space.architecture.removesuffix(SUFFIX)
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    names = getattr(cfg, key, None) or ()
    return (names,) if isinstance(names, str) else tuple(names)


class _Equations:
    """The equations of one state dict: `steps` is what they say so far, `by` the tensor that said it."""

    def __init__(self, space: WidthSpace, shapes: dict[str, tuple[int, ...]], skips: Sequence[str]):
        self.space, self.shapes = space, shapes
        self.skipped = tuple(s + '.' for s in skips)
        self.tensors = {n: t for n, t in space.tensors.items() if not n.startswith(self.skipped or ('\0',))}
        self.first = _layers(space, 'first_conv') or tuple(s.name for s in space.sites[:1])
        self.outputs = {i for i, g in enumerate(space.groups) if self._is_output(g)}
        self.steps = {i: g.steps for i, g in enumerate(space.groups) if g.frozen is not None and i not in self.outputs}
        self.by = {i: f'it is frozen ({space.groups[i].frozen})' for i in self.steps}
        self.bad: set[int] = set()  # groups already reported

    def _is_output(self, group: Group) -> bool:
        """Whether a group is the classes: frozen as the network's output, and on nothing but a classifier."""
        modules = {name.rpartition('.')[0] for name, dim in group.axes}
        heads = set(_layers(self.space, 'classifier'))
        return ((group.frozen or '').startswith('network output') and all(dim == 0 for _, dim in group.axes)
                and (modules <= heads if heads else len(modules) == 1))

    def _holds_output(self, t: TensorAxes) -> bool:
        return any(g in self.outputs for a in t.axes for g, _ in a or ())

    def missing(self) -> list[str]:
        """Faults of names."""
        names = [n for n, t in self.tensors.items() if t.is_param and n not in self.shapes and not self._holds_output(t)]
        faults = []
        for block in self.space.blocks:
            inside = [n for n, t in self.tensors.items() if t.is_param and n.startswith(block.name + '.')]
            if inside and not any(n in self.shapes for n in inside):
                faults.append(f"all of block '{block.name}' is missing (left out? then say so: skips=['{block.name}'])")
                names = [n for n in names if n not in inside]
        if names:
            faults.append(f'missing: {_listed(names)}')
        others = [n for n in self.shapes if n not in self.tensors]
        if others:
            faults.append(f'unexpected: {_listed(others)}')
        return faults

    def solve(self) -> list[str]:
        """Solves the equations as far as they go; returns what is wrong with them."""
        faults, single, sums = [], [], []
        for name, t in self.tensors.items():
            shape = self.shapes.get(name)
            if shape is None:
                continue
            if len(shape) != len(t.shape):
                faults.append(f"'{name}' has shape {shape}, {t.shape} was expected")
                continue
            for dim, (n, size, axis) in enumerate(zip(shape, t.shape, t.axes)):
                if axis is None:
                    if n != size and self._fixed(name, t, dim):
                        faults.append(f"'{name}' has size {n} along dimension {dim}, which is fixed at {size}")
                    continue
                terms: dict[int, int] = {}
                for g, r in axis:
                    terms[g] = terms.get(g, 0) + r
                (single if len(terms) == 1 else sums).append((name, dim, n, terms))
        for equation in single:
            faults += self._settle(*equation)
        while sums:
            ready = [e for e in sums if sum(g not in self.steps for g in e[3]) <= 1]
            if not ready:
                break
            faults += self._settle(*ready[0])
            sums.remove(ready[0])
        seen = {g for name in self.shapes if name in self.tensors for a in self.tensors[name].axes for g, _ in a or ()}
        left = [g.name for i, g in enumerate(self.space.groups)
                if i in seen and i not in self.steps and i not in self.bad | self.outputs]
        if left:
            faults.append(f'left undetermined by the shapes: {_listed(left)}')
        return faults

    def _fixed(self, name: str, t: TensorAxes, dim: int) -> bool:
        owner, _, leaf = name.rpartition('.')
        if dim == 1 and owner in self.first:
            return False  # in_chans
        return t.is_param and (leaf in FREE_SIZES or len(t.shape) < 2)

    def _settle(self, name: str, dim: int, n: int, terms: dict[int, int]) -> list[str]:
        """Takes one equation with at most one unknown group into account."""
        if any(g in self.bad for g in terms):
            return []
        groups = self.space.groups
        rest = n - sum(c * self.steps[g] for g, c in terms.items() if g in self.steps)
        unknown = [g for g in terms if g not in self.steps]
        if not unknown:
            if rest == 0:
                return []
            self.bad.update(terms)
            if len(terms) > 1:
                parts = ' + '.join(f"{c * self.steps[g]} ('{groups[g].name}')" for g, c in terms.items())
                return [f"'{name}' has {n} channels along dimension {dim}, but its groups have {parts}"]
            (g, c), = terms.items()
            return [f"'{groups[g].name}': {n / c * groups[g].unit:g} channels by '{name}' (dimension {dim}), "
                    f'but {self.steps[g] * groups[g].unit}: {self.by[g]}']
        g = unknown[0]
        if rest <= 0 or rest % terms[g]:
            self.bad.add(g)
            what = f'{n} channels' if len(terms) == 1 else f'{rest} channels of {n}'
            return [f"'{groups[g].name}': {what} of '{name}' (dimension {dim}), not a multiple of {terms[g]}"]
        self.steps[g], self.by[g] = rest // terms[g], f"by '{name}' (dimension {dim})"
        return []
