"""ONNX files of a model at several widths, ready to be compared: written without what only tells where they come from."""
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from timm.utils.model import reparameterize_model
from torch import nn

from ..data import UsageError
from ..onnx_file import MAX_BYTES, check_range, halve, write_onnx
from .runner.onnx_widths import load_proto

__all__ = ['Graph', 'RecipeError', 'attributes', 'export_bytes', 'settle']

FEW = 4  # images that a network is tried on


class RecipeError(UsageError):
    """A network whose ONNX file does not follow its widths by slicing."""


@torch.no_grad()
def settle(model: nn.Module, images: torch.Tensor, seed: int = 0) -> nn.Module:
    """Gives a freshly initialised model values that are as different as trained ones, in place.

    The exporter merges equal tensors (all the biases of zero, say), which then cannot be cut differently. Batch norms get the
    statistics of the images, so that activations have a common size: they would leave float16 in a deep network.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.is_floating_point():
            scale = 0.1 if p.ndim < 2 else 0.01 * p.abs().mean() if p.any() else 0.01
            p += scale * torch.randn(p.shape, generator=generator)
    norms = [m for m in model.modules() if getattr(m, 'running_var', None) is not None]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    model.eval()
    for m in norms:
        m.train()
    if norms:
        model(images if len(images) > 1 else torch.cat([images, images.flip(-1)]))
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum
        m.running_var.clamp_(min=1e-3)
    return model.eval()


def export_bytes(model: nn.Module, images: torch.Tensor, precision: str = 'fp32', check: bool = True) -> bytes:
    """The ONNX file of a model in its deployed form, without what only tells where it comes from.

    Args:
        model: In evaluation mode; it is not changed.
        images: Example images (N, C, H, W).
        precision: 'fp32', or 'fp16' for what `onnx_file.halve` makes of it.
        check: Whether to run it, for fp16, on the first FEW images, and refuse what overflows.

    Raises:
        UsageError: torch cannot export it, it overflows in float16, or it is larger than an ONNX file may be.
    """
    size = sum(t.nbytes for t in model.state_dict().values())
    if size > MAX_BYTES:
        raise UsageError(f'the weights at the largest widths take {size / 1e9:.1f} GB, more than an ONNX file holds (2 GB): '
                         'give a lower --width-max')
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / 'half').mkdir()
        file = folder / 'model.onnx'
        deployed = reparameterize_model(model)
        if precision == 'fp16' and check:
            write_onnx(deployed, images[:FEW], file)  # the batch is written into a file: large ones would take gigabytes
            check_range(file, images[:FEW].numpy())
        write_onnx(deployed, images, file)
        if precision == 'fp16':
            file = halve(file, folder / 'half' / 'model.onnx')
        return _clean(load_proto(file)).SerializeToString()


def _clean(proto: Any) -> Any:
    """Drops what does not matter or would be stale at other widths, and gives each reader of integers a copy of its own."""
    from onnx import TensorProto

    graph = proto.graph
    del graph.value_info[:]
    del proto.metadata_props[:]
    constants = [n for n in graph.node if n.op_type == 'Constant' and len(n.attribute) == 1 and n.attribute[0].name == 'value']
    for node in constants:
        graph.initializer.append(node.attribute[0].t)
        graph.initializer[-1].name = node.output[0]
        graph.node.remove(node)
    integers = {t.name: t for t in graph.initializer if t.data_type in (TensorProto.INT64, TensorProto.INT32)}
    read: set[str] = set()
    taken = {t.name for t in graph.initializer}
    for node in graph.node:
        node.doc_string = ''
        del node.metadata_props[:]
        for k, name in enumerate(node.input):
            if name in integers and name in read:
                new = next(f'{name}_{i}' for i in itertools.count(1) if f'{name}_{i}' not in taken)
                taken.add(new)
                graph.initializer.append(integers[name])
                graph.initializer[-1].name = node.input[k] = new
            read.add(name)
    return proto


class Graph:
    """An ONNX file, opened for comparison."""

    def __init__(self, file: bytes):
        from onnx import numpy_helper

        proto = load_proto(file)
        self.file = file
        self.nodes = list(proto.graph.node)
        self.arrays = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        self.inputs, self.outputs = ([v.name for v in values] for values in (proto.graph.input, proto.graph.output))
        self.shapes = [v.type.SerializeToString() for v in (*proto.graph.input, *proto.graph.output)]

    def match(self, other: 'Graph') -> dict[str, str]:
        """Pairs the initializers of two files of the same nodes and connections.

        Raises:
            RecipeError: They have other nodes or connections.
        """
        if len(self.nodes) != len(other.nodes):
            raise RecipeError(f'the graph has {len(self.nodes)} operations, and {len(other.nodes)} at other widths')
        if self.shapes != other.shapes:
            raise RecipeError('inputs or outputs have other shapes at other widths')
        names: dict[str, str] = dict(zip(self.inputs, other.inputs))
        for i, (a, b) in enumerate(zip(self.nodes, other.nodes)):
            if (a.op_type, a.domain, len(a.input), len(a.output)) != (b.op_type, b.domain, len(b.input), len(b.output)):
                raise RecipeError(f'operation {i} is {a.op_type}, and {b.op_type} at other widths')
            for x, y in zip(a.input, b.input):
                if names.setdefault(x, y) != y or (x in self.arrays) != (y in other.arrays):
                    raise RecipeError(f'operation {i}, {a.op_type}, reads other values at other widths')
            names.update(zip(a.output, b.output))
        if [names.get(x) for x in self.outputs] != other.outputs:
            raise RecipeError('the output is another value at other widths')
        return {x: names[x] for x in self.arrays if x in names}


def attributes(node: Any) -> dict[str, Any]:
    """Name -> int, list, float, string, or the bytes of what else it is."""
    from onnx import helper

    out = {}
    for a in node.attribute:
        value = helper.get_attribute_value(a)
        out[a.name] = list(value) if a.type in (a.INTS, a.FLOATS, a.STRINGS) else value if isinstance(
            value, (int, float, bytes)) else a.SerializeToString()
    return out
