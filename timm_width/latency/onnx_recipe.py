"""What in a network's ONNX file depends on its widths: the recipe by which `runner.onnx_widths` slices the file.

The file is exported at the largest widths. Initializers that hold a parameter have its axes (batch norms are folded into the
convolution before them: the weight keeps its name, the new bias is called after it). What else depends on widths is found by
*probing*: fresh exports of the resized model are compared with the file, and whatever differs - another initializer, an element of
an integer constant, an attribute - must be the length (or the first part) of one axis of the width space, or a multiple of it, in
all of them. At the end the sliced file must equal each fresh export: every node, attribute and constant, and every weight bit for
bit.
"""
import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Optional

import numpy as np
import torch
from torch import nn

from ..resize import resize
from ..space import Axis, WidthSpace
from .onnx_graph import Graph, RecipeError, attributes, export_bytes
from .runner.onnx_widths import SlicedModel, counts

__all__ = ['find_recipe', 'verify']

MAX_PROBES = 5
FIXED = ''  # the group of all channels that no width governs
Grid = Mapping[str, Sequence[int]]


def find_recipe(
        model: nn.Module,
        space: WidthSpace,
        grid: Grid,
        images: torch.Tensor,
        precision: str = 'fp32',
        seed: int = 0,
) -> tuple[bytes, dict[str, Any]]:
    """Exports a model and finds out what depends on its widths.

    Args:
        model: At the grid's largest widths, settled, in evaluation mode; it is not changed.
        space: Its width space.
        grid: Group -> widths that will be asked for; other groups stay.
        images: Example images (N, C, H, W).
        precision: 'fp32' or 'fp16'.
        seed: Of the widths that are probed.

    Returns:
        The ONNX file, and its recipe.

    Raises:
        RecipeError: Slicing would not give what a fresh export gives.
        UsageError: The model cannot be exported.
    """
    wrong = [name for name, widths in grid.items() if name not in space.searchable or widths[-1] != space[name].size]
    if wrong:
        raise RecipeError(f"'{wrong[0]}' is not free at the largest widths of the grid")
    file = export_bytes(model, images, precision)
    base = Graph(file)
    rng = np.random.default_rng(seed)
    probes: list[_Probe] = []
    for count in range(MAX_PROBES):
        widths = {name: _probe_width(space[name], w, count, rng) for name, w in grid.items()}
        if count and widths == probes[-1].widths:
            break  # a grid of one width each
        resized = resize(copy.deepcopy(model), space, widths)
        exported = export_bytes(resized, images, precision, check=False)
        probes.append(_Probe(widths, space.steps(widths), Graph(exported)))
        probes[-1].pair(base)
        if count == 0:
            continue
        found = _Finder(space, grid, base, probes, _named_axes(model, space))
        if not found.ambiguous:
            break
    recipe = found.recipe
    if found.ambiguous:
        raise RecipeError(f'{found.ambiguous[0]} follows several widths equally well')
    for probe in probes:
        verify(file, recipe, probe.widths, probe.graph.file)
    return file, recipe


def verify(file: bytes, recipe: Mapping[str, Any], widths: Mapping[str, int], fresh: bytes) -> None:
    """Checks that a slice is what a fresh export of the resized model is.

    Raises:
        RecipeError: It is not: with the first difference.
    """
    sliced, expected = Graph(SlicedModel(file, recipe).at(widths)), Graph(fresh)
    names = sliced.match(expected)
    for name, other in names.items():
        a, b = sliced.arrays[name], expected.arrays[other]
        if a.shape != b.shape or a.dtype != b.dtype or a.tobytes() != b.tobytes():
            raise RecipeError(f"'{name}' sliced is not what a fresh export has ({_told(a)} and {_told(b)})")
    for i, (a, b) in enumerate(zip(sliced.nodes, expected.nodes)):
        if attributes(a) != attributes(b):
            raise RecipeError(f'operation {i}, {a.op_type}, has {attributes(a)} where a fresh export has {attributes(b)}')


def _probe_width(group: Any, widths: Sequence[int], count: int, rng: np.random.Generator) -> int:
    """Every second probe is off the grid, where two groups hardly ever have the same width; all differ from the largest."""
    if len(widths) == 1:
        return widths[0]
    if count % 2:
        return int(rng.choice(widths[:-1]))
    return group.unit * int(rng.integers(widths[0] // group.unit, group.steps))


def _named_axes(model: nn.Module, space: WidthSpace) -> dict[str, tuple]:
    """Initializer -> the axes of the parameter that it holds; None where two parameters would claim it."""
    out = {name: t.axes for name, t in space.tensors.items()}
    for name, t in space.tensors.items():
        if name.endswith('.weight') and t.axes:
            out.setdefault(f'{name}_bias', t.axes[:1])
    return out


@dataclass
class _Probe:
    """A fresh export at other widths."""
    widths: Mapping[str, int]
    steps: np.ndarray
    graph: Graph
    names: dict[str, str] = field(default_factory=dict)  # initializer of the base -> of this one

    def pair(self, base: Graph) -> None:
        self.names = base.match(self.graph)

    def array(self, name: str) -> np.ndarray:
        return self.graph.arrays[self.names[name]]


class _Finder:
    """Explains all differences between a file and its probes by axes of the space."""

    def __init__(self, space: WidthSpace, grid: Grid, base: Graph, probes: Sequence[_Probe], named: Mapping[str, tuple]):
        self.space, self.base, self.probes = space, base, probes
        free = [name for name in grid if len(grid[name]) > 1]
        self.index = {space.index[name]: i + 1 for i, name in enumerate(free)}
        fixed = [name for name in grid if len(grid[name]) == 1]  # which may be named, at their only width
        self.groups = [[FIXED, 1, 1], *([name, space[name].steps, space[name].unit] for name in free),
                       *([name, 1, space[name].size] for name in fixed)]
        self.ambiguous: list[str] = []
        whole = {a for t in space.tensors.values() for a in t.axes if a}
        whole |= {f for s in space.sites for f in s.factors if not isinstance(f, int)} | {b.axis for b in space.bindings}
        self.axes = sorted({self.pieces(a) for a in whole} - {None})
        parts = {a[:n] for a in self.axes for n in range(1, len(a))} | {(p,) for a in self.axes for p in a}
        parts = {a for a in parts if any(g for g, _ in a)}
        self.lengths = {a: self.length(a) for a in dict.fromkeys((*self.axes, *sorted(parts)))}
        self.used: dict[Axis, int] = {}
        self.tensors: dict[str, list] = {}
        self.counting: list[str] = []
        self.numbers: list[list] = []
        self.attributes: list[list] = []
        self.find_tensors(named)
        self.find_attributes()

    @property
    def recipe(self) -> dict[str, Any]:
        return {'groups': self.groups, 'axes': [[list(p) for p in a] for a in self.used], 'tensors': self.tensors,
                'counting': self.counting, 'numbers': self.numbers, 'attributes': self.attributes}

    def pieces(self, axis: Axis) -> Optional[Axis]:
        """The axis on the recipe's groups, what is fixed in one piece; None where all is."""
        out: list[tuple[int, int]] = []
        for g, r in axis:
            if g in self.index:
                out.append((self.index[g], r))
            elif out and out[-1][0] == 0:
                out[-1] = (0, out[-1][1] + self.space.groups[g].steps * r)
            else:
                out.append((0, self.space.groups[g].steps * r))
        return tuple(out) if any(g for g, _ in out) else None

    def length(self, axis: Axis) -> tuple[int, ...]:
        """Its length in the base and in each probe."""
        back = {i: g for g, i in self.index.items()}
        all_steps = [[g.steps for g in self.space.groups], *(p.steps for p in self.probes)]
        return tuple(sum(r * (int(steps[back[g]]) if g else 1) for g, r in axis) for steps in all_steps)

    def use(self, axis: Optional[Axis]) -> Optional[int]:
        return None if axis is None else self.used.setdefault(axis, len(self.used))

    def find_tensors(self, named: Mapping[str, tuple]) -> None:
        readers = {x: (i, k) for i, node in enumerate(self.base.nodes) for k, x in enumerate(node.input)}
        for name, array in self.base.arrays.items():
            if name not in readers:
                continue
            others = [p.array(name) for p in self.probes]
            if any(o.ndim != array.ndim or o.dtype != array.dtype for o in others):
                raise RecipeError(f"'{name}' has another form at other widths")
            same = all(o.shape == array.shape for o in others)
            if same and all(o.tobytes() == array.tobytes() for o in others):
                continue
            if same and array.dtype.kind == 'i' and array.size <= 64:
                self.find_numbers(readers[name], name, array, others)
            elif same:
                raise RecipeError(f"the values of '{name}' depend on the widths of other layers")
            else:
                axes = self.find_axes(name, array, others, named.get(name))
                self.tensors[name] = [self.use(a) for a in axes]
                if all(map(counts, (array, *others))):
                    self.counting.append(name)

    def find_axes(self, name: str, array: np.ndarray, others: Sequence[np.ndarray], named: Optional[tuple]) -> tuple:
        lengths = list(zip(array.shape, *(o.shape for o in others)))
        told = None if named is None or len(named) != array.ndim else tuple(
            None if a is None else self.pieces(a) for a in named)
        if told and all(self.lengths[a] == n if a else len(set(n)) == 1 for a, n in zip(told, lengths)) and self.fits(
                told, array, others):
            return told
        choices = [[None] if len(set(n)) == 1 else [a for a in self.axes if self.lengths[a] == n] for n in lengths]
        found = [axes for axes in itertools.product(*choices) if self.fits(axes, array, others)]
        if not found:
            raise RecipeError(f"'{name}' ({_told(array)}, {_told(others[0])} at other widths) is not a part of itself "
                              'that the width space knows')
        if len(found) > 1:
            self.ambiguous.append(f"'{name}'")
        return found[0]

    def fits(self, axes: Sequence[Optional[Axis]], array: np.ndarray, others: Sequence[np.ndarray]) -> bool:
        if all(map(counts, (array, *others))):  # the values say nothing about the axes
            return True
        return all(self.cut(array, axes, probe.steps).tobytes() == other.tobytes() for probe, other in zip(self.probes, others))

    def cut(self, array: np.ndarray, axes: Sequence[Optional[Axis]], steps: np.ndarray) -> np.ndarray:
        back = {i: g for g, i in self.index.items()}
        for d, axis in enumerate(axes):
            if axis is None:
                continue
            keep, start = [], 0
            for g, r in axis:
                n, most = (int(steps[back[g]]), self.space.groups[back[g]].steps) if g else (1, 1)
                keep.append(np.arange(start, start + n * r))
                start += most * r
            array = array.take(np.concatenate(keep), axis=d)
        return array

    def find_numbers(self, reader: tuple[int, int], name: str, array: np.ndarray, others: Sequence[np.ndarray]) -> None:
        node, k = reader
        for at, values in enumerate(zip(array.flat, *(o.flat for o in others))):
            if len(set(values)) > 1:
                what = f'number {at} of input {k} of operation {node}, {self.base.nodes[node].op_type}'
                self.numbers.append([node, k, at, *self.expression(tuple(map(int, values)), what)])

    def find_attributes(self) -> None:
        for i, node in enumerate(self.base.nodes):
            found = [attributes(n) for n in (node, *(p.graph.nodes[i] for p in self.probes))]
            for key in found[0]:
                values = [f.get(key) for f in found]
                if all(v == values[0] for v in values):
                    continue
                what = f"'{key}' of operation {i}, {node.op_type},"
                if all(type(v) is int for v in values):
                    self.attributes.append([i, key, None, *self.expression(tuple(values), what)])
                elif all(type(v) is list and len(v) == len(values[0]) and all(type(n) is int for n in v) for v in values):
                    self.attributes += [[i, key, at, *self.expression(tuple(n), what)]
                                        for at, n in enumerate(zip(*values)) if len(set(n)) > 1]
                else:
                    raise RecipeError(f'{what} is {values[0]!r}, and {values[1]!r} at other widths')

    def expression(self, values: tuple[int, ...], what: str) -> tuple[int, int, int]:
        """(axis, mul, div) of a number that has these values in the base and in the probes."""
        found: dict[tuple, tuple] = {}  # the same number as a sum over groups -> how it is written
        for axis, mul, div in self.candidates(values):
            weights: dict[int, Fraction] = {}
            for g, r in axis:
                weights[g] = weights.get(g, 0) + Fraction(r * mul, div)
            found.setdefault(tuple(sorted(weights.items())), (axis, mul, div))
        if not found:
            told = ', '.join(map(str, values))
            raise RecipeError(f'{what} is {told} at the probed widths, which is no length that the width space knows')
        if len(found) > 1:
            self.ambiguous.append(what)
        axis, mul, div = next(iter(found.values()))
        return self.use(axis), mul, div

    def candidates(self, values: tuple[int, ...]) -> Iterator[tuple[Axis, int, int]]:
        for axis, lengths in self.lengths.items():
            ratio = Fraction(values[0], lengths[0])
            if ratio > 0 and all(n * ratio == v for n, v in zip(lengths, values)):
                yield axis, ratio.numerator, ratio.denominator


def _told(array: np.ndarray) -> str:
    return 'x'.join(map(str, array.shape)) or 'one number'
