"""Writes a model as an ONNX file, and runs one: what `timm-width export`, bundles and measurements share."""
import logging
import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import nn

from .data import UsageError, first_line

__all__ = ['check_range', 'data_of', 'halve', 'run_onnx', 'write_onnx']

PROBE_BYTES = 2 ** 28  # of activations that are held at once
MAX_BYTES = 2 ** 31 - 2 ** 27  # of a protobuf file, with room for the graph; larger weights lie beside it in FILE.data


def write_onnx(
        model: nn.Module,
        images: torch.Tensor,
        path: Path,
        dynamic: bool = False,
        metadata: Optional[Mapping[str, str]] = None,
) -> int:
    """Exports a model in float32, as it is: 'input' -> 'output', batch norms folded into the convolutions before them.

    Args:
        model: In evaluation mode; in its deployed form, if it has one.
        images: Example images (N, C, H, W); N is the file's batch unless it is dynamic.
        path: File to write; weights too large for one file lie in `data_of(path)`.
        dynamic: Any number of images per run (the example should have several).
        metadata: What the file says about itself.

    Returns:
        The opset.

    Raises:
        UsageError: torch cannot export it.
    """
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of the exporter, about its own future
            program = torch.onnx.export(
                model, (images,), dynamo=True, verbose=False, input_names=['input'], output_names=['output'],
                dynamic_shapes=({0: 'batch'},) if dynamic else None)
    except Exception as e:  # anything: torch.export runs the model's code
        hint = '; a fixed batch (--batch N) may work where a dynamic one does not' if dynamic else ''
        raise UsageError(f'torch cannot export this model to ONNX{hint}: {first_line(e)}') from e
    program.model.metadata_props.update(metadata or {})
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.save(path, external_data=sum(t.nbytes for t in model.state_dict().values()) > MAX_BYTES)
    return program.model.opset_imports['']


def halve(path: Path, output: Path) -> Path:
    """Converts a float32 file, in which batch norms are folded already, to float16 inside; input and output stay float32.

    Args:
        path: What `write_onnx` wrote.
        output: File to write, in another folder.

    Returns:
        `output`.

    Raises:
        UsageError: The file cannot be converted.
    """
    import onnx
    import onnx_ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    proto = onnx.load(path, load_external_data=False)
    del proto.graph.value_info[:]  # the exporter lists initializers there, which the converter takes for activations
    onnx.save(proto, path)
    try:
        half = onnx_ir.from_proto(convert_float_to_float16(str(path), keep_io_types=True))
        half.graph.sort()  # the converter puts its casts at the end
        size = sum(t.nbytes for v in half.graph.initializers.values() if (t := v.const_value) is not None)
        onnx_ir.save(half, output, external_data=data_of(output).name if size > MAX_BYTES else None)
    except Exception as e:  # anything: these two packages have no errors of their own
        raise UsageError(f'float16: the file cannot be converted: {first_line(e)}') from e
    return output


def check_range(path: Path, images: np.ndarray) -> None:
    """Refuses a network whose activations go beyond float16.

    ONNX Runtime's CPU kernels compute float16 files in float32: running the converted file would not show an overflow.

    Args:
        path: What `write_onnx` wrote; a file is written beside it.
        images: Images to run it on, float32.

    Raises:
        UsageError: They do, or the file cannot be run.
    """
    import onnx

    proto = onnx.load(path, load_external_data=False)
    probe, limit = path.with_name(path.name + '.probe'), np.finfo(np.float16).max
    for names in _groups(proto, len(images)):
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        onnx.save(proto, probe)
        for name, value in zip(names, run_onnx(probe, images)):
            most = np.abs(value[np.isfinite(value)]).max(initial=0) if value.dtype == np.float32 else 0
            if most > limit:
                raise UsageError(f"float16: '{name}' reaches {most:.3g}, and float16 ends at {limit:.0f}: export in float32")


def _groups(proto: Any, batch: int) -> list[list[str]]:
    """What the nodes of a file compute, in groups of up to PROBE_BYTES: all activations at once may be more than the memory."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(proto).graph
    values = (*graph.value_info, *graph.output)
    known = {v.name: v.type.tensor_type.shape.dim for v in values if v.type.tensor_type.HasField('shape')}
    groups: list[list[str]] = [[]]
    room = PROBE_BYTES
    for name in (x for node in proto.graph.node if node.op_type != 'Constant' for x in node.output if x):
        size = 4 * prod(d.dim_value or batch for d in known[name]) if name in known else PROBE_BYTES
        if groups[-1] and size > room:
            groups.append([])
            room = PROBE_BYTES
        groups[-1].append(name)
        room -= size
    return groups


def run_onnx(path: Path, images: np.ndarray) -> list[np.ndarray]:
    """The outputs of a file on images, by ONNX Runtime on the CPU.

    Raises:
        UsageError: It cannot be run.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        return session.run(None, {'input': images})
    except Exception as e:  # its errors share no class but this
        raise UsageError(f'ONNX Runtime cannot run the exported file: {first_line(e)}') from e


def data_of(path: Path) -> Path:
    """Where the weights of a file lie that are too large for it."""
    return path.with_name(path.name + '.data')
