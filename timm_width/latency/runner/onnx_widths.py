"""Makes the ONNX graph of a network at any widths from its graph at the largest ones, by slicing: no torch, no export.

A *recipe* (JSON, written by `timm_width.latency.onnx_recipe`) says what depends on widths:

    groups    [[name, steps, unit], ...]         steps: of the file; unit: channels of the width per step
    axes      [[[group, channels per step], ...], ...]    a dimension is the concatenation of its pieces; the first steps of each
                                                 piece are kept (groups are indices, as axes are below)
    tensors   {initializer: [axis or null, ...]}          one entry per dimension
    counting  [initializer]                      of these tensors, those that hold 0, 1, 2, ... at any widths (they are indices)
    numbers   [[node, input, position, axis, mul, div]]   the integer initializer that only this node reads there: its element
                                                 `position` is length(axis) * mul // div
    attributes [[node, name, position, axis, mul, div]]   the same of an integer attribute (position null) or of a list of them

The file is read once; per network, initializers are sliced and written behind the serialised rest of the graph. Files and
recipes are untrusted: a recipe that does not say of the file what the file says is refused, and so are widths outside it.
"""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np

from .errors import RunnerError

__all__ = ['SlicedModel', 'counts', 'load_proto']

# field numbers of onnx.proto
MODEL_GRAPH, GRAPH_INITIALIZER, TENSOR_RAW = 7, 5, 9


class SlicedModel:
    """A network at the largest widths that becomes itself at others.

    Args:
        model: The ONNX file, or its bytes.
        recipe: What depends on widths.

    Raises:
        RunnerError: The file cannot be read, or the recipe is not one of this file.
    """

    def __init__(self, model: Union[bytes, str, Path], recipe: Mapping[str, Any]):
        from onnx import numpy_helper

        proto = load_proto(model)
        try:
            arrays = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        except (ValueError, TypeError, KeyError) as e:
            raise RunnerError(f'the ONNX file has broken weights: {e}') from None
        if len(arrays) != len(proto.graph.initializer):
            raise RunnerError('the ONNX file has two weights of one name')
        self._groups, self._units, self._axes = _read_groups(recipe)
        self._most = list(self._groups.values())
        written = {t.name: t.SerializeToString() for t in proto.graph.initializer}
        self._heads = {t.name: type(t)(name=t.name, data_type=t.data_type).SerializeToString() for t in proto.graph.initializer}
        del proto.graph.initializer[:]
        del proto.graph.value_info[:]
        self._graph = proto.graph
        bare = type(proto)()
        bare.CopyFrom(proto)
        bare.ClearField('graph')
        self._model = bare.SerializeToString()
        self._tensors = self._read_tensors(recipe, arrays)
        self._counting = self._read_counting(recipe, arrays)
        self._numbers = self._read_numbers(recipe, arrays)
        self._attributes = self._read_attributes(recipe)
        varying = {*self._tensors, *(name for name, *_ in self._numbers)}
        self._arrays = {name: arrays[name] for name in varying}
        self._fixed = b''.join(_tagged(GRAPH_INITIALIZER, len(t)) + t for name, t in written.items() if name not in varying)

    @property
    def largest(self) -> dict[str, int]:
        """Group -> width of the file."""
        return {name: steps * unit for (name, steps), unit in zip(self._groups.items(), self._units)}

    def at(self, widths: Mapping[str, int]) -> bytes:
        """The ONNX file at widths.

        Args:
            widths: Group -> channels; groups left out keep their largest width.

        Raises:
            RunnerError: A width is outside the file.
        """
        steps = self._steps(widths)
        lengths = self._lengths(steps)
        for attribute, at, axis, mul, div in self._attributes:
            value = lengths[axis] * mul // div
            if at is None:
                attribute.i = value
            else:
                attribute.ints[at] = value
        parts = [self._fixed]
        for name, axes in self._tensors.items():
            array = self._arrays[name]
            for d, axis in enumerate(axes):
                if axis is not None and lengths[axis] != array.shape[d]:
                    array = self._cut(array, d, axis, steps)
            if name in self._counting:
                array = np.arange(array.size, dtype=array.dtype).reshape(array.shape)
            parts += self._field(name, array)
        numbers = {name: self._arrays[name].copy() for name, *_ in self._numbers}
        for name, at, axis, mul, div in self._numbers:
            numbers[name].flat[at] = lengths[axis] * mul // div
        for name, array in numbers.items():
            parts += self._field(name, array)
        graph = self._graph.SerializeToString()
        size = len(graph) + sum(map(len, parts))
        return b''.join([self._model, _tagged(MODEL_GRAPH, size), graph, *parts])

    def _steps(self, widths: Mapping[str, int]) -> list[int]:
        steps = self._most.copy()
        index = {name: i for i, name in enumerate(self._groups)}
        for name, width in widths.items():
            if name not in index:
                raise RunnerError(f'the recipe has no group {str(name)[:80]!r}')
            i = index[name]
            if type(width) is not int or not 0 < width <= self._most[i] * self._units[i] or width % self._units[i]:
                raise RunnerError(f"'{name}': the width must be a multiple of {self._units[i]} up to "
                                  f'{self._most[i] * self._units[i]}, not {str(width)[:40]}')
            steps[i] = width // self._units[i]
        return steps

    def _lengths(self, steps: Sequence[int]) -> list[int]:
        return [sum(steps[g] * r for g, r in axis) for axis in self._axes]

    def _cut(self, array: np.ndarray, dim: int, axis: int, steps: Sequence[int]) -> np.ndarray:
        """The first steps of every piece of one dimension: a view where there is one piece."""
        before, parts, start = (slice(None),) * dim, [], 0
        for g, r in self._axes[axis]:
            parts.append(array[(*before, slice(start, start + steps[g] * r))])
            start += self._most[g] * r
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=dim)

    def _field(self, name: str, array: np.ndarray) -> list:
        """The initializer as a field of the graph, in pieces whose lengths add up to it."""
        dims = b''.join(b'\x08' + _varint(n) for n in array.shape)
        head = dims + self._heads[name] + _tagged(TENSOR_RAW, array.nbytes)
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        return [_tagged(GRAPH_INITIALIZER, len(head) + array.nbytes) + head, raw]

    # -- reading a recipe: everything it says of the file must be so ------------------------------------------------------

    def _read_tensors(self, recipe: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, tuple]:
        tensors, full = {}, self._lengths(self._most)
        for name, axes in _mapping(recipe, 'tensors').items():
            if name not in arrays:
                raise RunnerError(f'the recipe slices {str(name)[:80]!r}, which the ONNX file does not have')
            array = arrays[name]
            if not isinstance(axes, list) or len(axes) != array.ndim:
                raise RunnerError(f"the recipe must say one axis for each of the {array.ndim} dimensions of '{name}'")
            for d, axis in enumerate(axes):
                if axis is None:
                    continue
                if full[self._axis(axis)] != array.shape[d]:
                    raise RunnerError(f"dimension {d} of '{name}' has {array.shape[d]} channels; the recipe says {full[axis]}")
            tensors[name] = tuple(axes)
        return tensors

    def _read_counting(self, recipe: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> set[str]:
        names = recipe.get('counting')
        if not isinstance(names, list) or not all(isinstance(n, str) and n in self._tensors and counts(arrays[n]) for n in names):
            raise RunnerError("'counting' of the recipe must list tensors of the recipe that hold 0, 1, 2, ...")
        return set(names)

    def _read_numbers(self, recipe: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[tuple]:
        numbers = []
        for row in _rows(recipe, 'numbers', 6):
            node, given, at, *expression = row
            inputs = self._node(node).input
            name = inputs[given] if type(given) is int and 0 <= given < len(inputs) else None
            if name not in arrays or arrays[name].dtype not in (np.int64, np.int32) or name in self._tensors:
                raise RunnerError(f'the recipe sets a number that the ONNX file does not have: {row}')
            readers = sum(list(n.input).count(name) for n in self._graph.node)
            if readers != 1 or type(at) is not int or not 0 <= at < arrays[name].size:
                raise RunnerError(f'the recipe sets a number that is not one: {row}')
            self._agree(int(arrays[name].flat[at]), expression, row)
            numbers.append((name, at, *expression))
        return numbers

    def _read_attributes(self, recipe: Mapping[str, Any]) -> list[tuple]:
        attributes = []
        for row in _rows(recipe, 'attributes', 6):
            node, name, at, *expression = row
            found = next((a for a in self._node(node).attribute if a.name == name), None)
            if found is None or found.type != (found.INT if at is None else found.INTS):
                raise RunnerError(f'the recipe sets an attribute that the ONNX file does not have: {row}')
            if at is not None and (type(at) is not int or not 0 <= at < len(found.ints)):
                raise RunnerError(f'the recipe sets an attribute that is not there: {row}')
            self._agree(found.i if at is None else found.ints[at], expression, row)
            attributes.append((found, at, *expression))
        return attributes

    def _agree(self, value: int, expression: Sequence, row: Sequence) -> None:
        axis, mul, div = expression
        if type(mul) is not int or type(div) is not int or not (0 < mul < 2 ** 31 and 0 < div < 2 ** 31):
            raise RunnerError(f'the recipe has a wrong factor: {row}')
        says = self._lengths(self._most)[self._axis(axis)] * mul // div
        if says != value:
            raise RunnerError(f'the ONNX file says {value} where the recipe says {says}: {row}')

    def _axis(self, axis: Any) -> int:
        if type(axis) is not int or not 0 <= axis < len(self._axes):
            raise RunnerError(f'the recipe has no axis {str(axis)[:40]}')
        return axis

    def _node(self, index: Any) -> Any:
        if type(index) is not int or not 0 <= index < len(self._graph.node):
            raise RunnerError(f'the ONNX file has no node {str(index)[:40]}')
        return self._graph.node[index]


def counts(array: np.ndarray) -> bool:
    """Whether an array holds 0, 1, 2, ... in order."""
    return array.dtype in (np.int64, np.int32) and np.array_equal(array.reshape(-1), np.arange(array.size))


def load_proto(model: Union[bytes, str, Path]) -> Any:
    """Reads an ONNX file whose weights are inside.

    Raises:
        RunnerError: It cannot be read.
    """
    try:
        import onnx
    except ImportError:
        raise RunnerError('this needs the package onnx: pip install onnx') from None
    what = 'the ONNX file' if isinstance(model, bytes) else f"'{model}'"
    try:
        proto = onnx.ModelProto.FromString(model if isinstance(model, bytes) else Path(model).read_bytes())
    except OSError as e:
        raise RunnerError(f'{what} cannot be read: {e.strerror or e}') from None
    except Exception:  # protobuf's error differs by its version
        raise RunnerError(f'{what} is no ONNX file, or is cut off') from None
    if not proto.graph.node:
        raise RunnerError(f'{what} holds no network')
    if any(t.external_data or t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer):
        raise RunnerError(f'{what} keeps its weights in other files')
    return proto


def _read_groups(recipe: Any) -> tuple[dict[str, int], list[int], list[list]]:
    if not isinstance(recipe, Mapping):
        raise RunnerError('the recipe is not a JSON object')
    groups, units, axes = {}, [], []
    for row in _rows(recipe, 'groups', 3):
        name, steps, unit = row
        if not isinstance(name, str) or name in groups or not all(type(n) is int and 0 < n < 2 ** 31 for n in (steps, unit)):
            raise RunnerError(f'the recipe has a wrong group: {str(row)[:80]}')
        groups[name] = steps
        units.append(unit)
    for axis in _rows(recipe, 'axes'):
        if not axis or not all(isinstance(p, list) and len(p) == 2 and all(type(n) is int for n in p)
                               and 0 <= p[0] < len(groups) and 0 < p[1] < 2 ** 31 for p in axis):
            raise RunnerError(f'the recipe has a wrong axis: {str(axis)[:80]}')
        axes.append(axis)
    return groups, units, axes


def _rows(recipe: Mapping[str, Any], key: str, length: int = 0) -> list[list]:
    rows = recipe.get(key)
    if not isinstance(rows, list) or not all(isinstance(r, list) and (not length or len(r) == length) for r in rows):
        raise RunnerError(f"'{key}' of the recipe is not a list of lists" + f' of {length}' * bool(length))
    return rows


def _mapping(recipe: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(recipe.get(key), Mapping):
        raise RunnerError(f"'{key}' of the recipe is not a JSON object")
    return recipe[key]


def _tagged(field: int, length: int) -> bytes:
    """What stands before the bytes of a protobuf field that has a length."""
    return _varint(field << 3 | 2) + _varint(length)


def _varint(n: int) -> bytes:
    """An unsigned number as protobuf writes it."""
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)
