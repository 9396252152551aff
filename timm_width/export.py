"""Exports a saved model to a file that runs without torch, after checking the file against torch.

    timm-width export runs/x --onnx

The file takes float32 images, normalised as its metadata says (input_size, mean, std, interpolation, crop_pct; architecture, shapes
and versions are there too), as 'input', and gives float32 logits as 'output'. Re-parameterisable models are exported in their
deployed form. With --fp16, weights and activations in the file are float16 (TensorRT 11 takes the precision from there); input
and output stay float32, so that the same program runs either file. Before anything is written, ONNX Runtime runs the file on
random images: no logit may differ from torch's by more than 0.0001 (--fp16: 0.02) of the largest one.
"""
import json
import logging
import os
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Optional

import numpy as np
import timm
import torch
from timm.data import resolve_data_config
from timm.utils import random_seed
from timm.utils.model import reparameterize_model
from torch import nn

from . import __version__
from .arguments import Parser
from .config import fingerprint
from .data import UsageError, first_line
from .engine import create

__all__ = ['export', 'main']

TOLERANCE = {'float32': 1e-4, 'float16': 2e-2}  # of the largest logit, so the top class agrees where it leads by twice that
MAX_BYTES = 2 ** 31 - 2 ** 27  # of a protobuf file, with room for the graph; larger weights lie beside it in FILE.data
WEIGHTS = ('*.safetensors', '*.bin', '*.pth', '*.pt')
SEED = 0


def parse(argv: Optional[Sequence[str]] = None) -> Namespace:
    """Reads the flags."""
    parser = Parser(prog='timm-width export', description=__doc__, allow_abbrev=False)
    parser.add_argument('folder', metavar='FOLDER', help='a saved model: config.json and weights')
    parser.add_argument('--onnx', action='store_true', required=True, help='write an ONNX file')
    parser.add_argument('--fp16', action='store_true', help='float16 weights and activations')
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument('--batch', type=int, default=1, metavar='N', help='images per run')
    batch.add_argument('--dynamic', action='store_true', help='any number of images per run')
    parser.add_argument('--img-size', type=int, metavar='N', help="side of the images (default: the config's)")
    parser.add_argument('--no-weights', action='store_true', help='random weights (to measure speed), not those of FOLDER')
    parser.add_argument('--output', metavar='FILE', help='file to write, NAME.onnx (default: FOLDER/model.onnx)')
    parser.add_argument('--overwrite', action='store_true', help='replace FILE if it exists')
    return parser.parse_args(argv)


def export(args: Namespace) -> str:
    """Writes the file that the flags ask for, if it computes what torch does.

    Returns:
        A line that says what was written.

    Raises:
        UsageError: Something cannot be worked with, or the file does not compute the same; then nothing is written.
    """
    output = _check(args)
    model = _load(Path(args.folder), not args.no_weights)
    data = resolve_data_config({'img_size': args.img_size} if args.img_size else {}, model=model)
    precision = 'float16' if args.fp16 else 'float32'
    sizes = (1, 3) if args.dynamic else (args.batch,) * 2
    generator = torch.Generator().manual_seed(SEED)
    images = [torch.randn(n, *data['input_size'], generator=generator) for n in sizes]
    try:
        with torch.inference_mode():
            expected = [model(x) for x in images]
    except (RuntimeError, AssertionError, ValueError) as e:
        raise UsageError(f"the model cannot run on images of {data['input_size']}: {first_line(e)}") from e
    if not all(y.isfinite().all() for y in expected):
        raise UsageError('the outputs of the model are not finite: its weights are broken')
    metadata = _metadata(model, data, precision, args.no_weights)

    with _beside(output) as folder:
        written = folder / 'float32' / output.name
        opset = _write(reparameterize_model(model), images[-1], args.dynamic, written, metadata)
        if args.fp16:
            written = _halve(written, folder / 'float16' / output.name, images[0])
        difference = max(_relative(_run(written, x)[0], y.numpy()) for x, y in zip(images, expected))
        if not difference <= TOLERANCE[precision]:  # nor if it is NaN
            raise UsageError(f'the {precision} file does not compute what torch does: outputs differ by {difference:.1e} of the '
                             f'largest, more than {TOLERANCE[precision]}; nothing was written')
        files = [f for f in (_data(written), written) if f.exists()]  # the model after its data
        size = sum(f.stat().st_size for f in files)
        for file in files:
            os.replace(file, output.with_name(file.name))
        if len(files) == 1:
            _data(output).unlink(missing_ok=True)  # of the file that was replaced
    shape = 'x'.join(map(str, ('N' if args.dynamic else args.batch, *data['input_size'])))
    return (f"{output}: {size / 1e6:.1f} MB, opset {opset}, {precision}, input {shape}{', random weights' * args.no_weights}, "
            f'largest difference from torch {difference:.1e} of the largest output')


def _check(args: Namespace) -> Path:
    """Refuses what would fail later; returns the file to write."""
    for name in ('batch', 'img_size'):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    folder = Path(args.folder)
    if not (folder / 'config.json').is_file():
        raise UsageError(f"'{folder}' is not a folder with a config.json")
    if not args.no_weights and not any(any(folder.glob(w)) for w in WEIGHTS):
        raise UsageError(f"'{folder}' has no weights: train them first, or export random ones with --no-weights")
    output = Path(args.output) if args.output else folder / 'model.onnx'
    if output.suffix != '.onnx' or output.is_dir():  # with --overwrite, this keeps the weights safe
        raise UsageError(f"--output must be a file whose name ends in .onnx, not '{output}'")
    if not output.parent.is_dir():
        raise UsageError(f"--output '{output}': there is no folder '{output.parent}'")
    for file in (output, _data(output)):
        if file.exists() and not args.overwrite:
            raise UsageError(f"'{file}' exists: give another --output, or --overwrite")
    for name in ('onnx', 'onnxscript', 'onnxruntime', 'onnx_ir'):
        try:
            import_module(name)
        except ImportError:
            raise UsageError(f"export needs {name}: pip install 'timm-width[onnx]'") from None
    return output


def _load(folder: Path, pretrained: bool) -> nn.Module:
    random_seed(SEED)
    return create(f'local-dir:{folder}', None, pretrained, exportable=True).eval()


def _metadata(model: nn.Module, data: dict[str, Any], precision: str, random: bool) -> dict[str, str]:
    versions = {'timm_width': __version__, 'timm': timm.__version__, 'torch': torch.__version__}
    facts = {key: data[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')}
    facts |= {'architecture': model.pretrained_cfg['architecture'], 'shapes': fingerprint(model), 'precision': precision,
              'weights': 'random' if random else 'saved', 'versions': versions}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A temporary folder on the disk of the output."""
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix='.exporting-') as folder:
            for precision in TOLERANCE:
                (Path(folder) / precision).mkdir()
            yield Path(folder)
    except OSError as e:
        raise UsageError(f"'{output}' cannot be written: {first_line(e)}") from e


def _write(model: nn.Module, images: torch.Tensor, dynamic: bool, path: Path, metadata: dict[str, str]) -> int:
    """Exports in float32; returns the opset."""
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of the exporter, about its own future
            program = torch.onnx.export(
                model, (images,), dynamo=True, verbose=False, input_names=['input'], output_names=['output'],
                dynamic_shapes=({0: 'batch'},) if dynamic else None)
    except Exception as e:  # anything: torch.export runs the model's code
        hint = '; try --batch N instead of --dynamic' if dynamic else ''
        raise UsageError(f'torch cannot export this model to ONNX{hint}: {first_line(e)}') from e
    program.model.metadata_props.update(metadata)
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.save(path, external_data=sum(t.nbytes for t in model.state_dict().values()) > MAX_BYTES)
    return program.model.opset_imports['']


def _halve(path: Path, output: Path, images: torch.Tensor) -> Path:
    """Converts a float32 file, in which batch norms are folded already, to float16 inside."""
    import onnx
    import onnx_ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    proto = onnx.load(path, load_external_data=False)
    del proto.graph.value_info[:]  # the exporter lists initializers there, which the converter takes for activations
    onnx.save(proto, path)
    # ONNX Runtime's CPU kernels compute float16 files in float32: running the converted file would not show an overflow
    names = [name for node in proto.graph.node if node.op_type != 'Constant' for name in node.output if name]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    probe, limit = path.with_name(path.name + '.probe'), np.finfo(np.float16).max
    onnx.save(proto, probe)
    for name, value in zip(names, _run(probe, images)):
        most = np.abs(value[np.isfinite(value)]).max(initial=0) if value.dtype == np.float32 else 0
        if most > limit:
            raise UsageError(f"--fp16: '{name}' reaches {most:.3g}, and float16 ends at {limit:.0f}: export without --fp16")
    try:
        half = onnx_ir.from_proto(convert_float_to_float16(str(path), keep_io_types=True))
        half.graph.sort()  # the converter puts its casts at the end
        size = sum(t.nbytes for v in half.graph.initializers.values() if (t := v.const_value) is not None)
        onnx_ir.save(half, output, external_data=_data(output).name if size > MAX_BYTES else None)
    except Exception as e:  # anything: these two packages have no errors of their own
        raise UsageError(f'--fp16: the file cannot be converted: {first_line(e)}') from e
    return output


def _run(path: Path, images: torch.Tensor) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        return session.run(None, {'input': images.numpy()})
    except Exception as e:  # its errors share no class but this
        raise UsageError(f'ONNX Runtime cannot run the exported file: {first_line(e)}; nothing was written') from e


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:
        return float('inf')
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6))


def _data(path: Path) -> Path:
    """Where the weights of a file lie that are too large for it."""
    return path.with_name(path.name + '.data')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Parses, exports, and prints what was written."""
    print(export(parse(argv)))
