"""Exports a saved model to a file that runs without torch, after checking the file against torch.

    timm-width export runs/x --onnx

The file takes float32 images, normalised as its metadata says (input_size, mean, std, interpolation, crop_pct; architecture, shapes
and versions are there too), as 'input', and gives float32 logits as 'output'. Re-parameterisable models are exported in their
deployed form. With --fp16, weights and activations in the file are float16 (TensorRT 11 takes the precision from there); input
and output stay float32, so that the same program runs either file. Before anything is written, ONNX Runtime runs the file on
random images: no logit may differ from torch's by more than 0.0001 (--fp16: 0.02) of the largest one.
"""
import json
import os
import tempfile
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
from .onnx_file import check_range, data_of, halve, run_onnx, write_onnx

__all__ = ['export', 'main']

TOLERANCE = {'float32': 1e-4, 'float16': 2e-2}  # of the largest logit, so the top class agrees where it leads by twice that
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
        opset = write_onnx(reparameterize_model(model), images[-1], written, args.dynamic, metadata)
        if args.fp16:
            check_range(written, images[0].numpy())
            written = halve(written, folder / 'float16' / output.name)
        difference = max(_relative(run_onnx(written, x.numpy())[0], y.numpy()) for x, y in zip(images, expected))
        if not difference <= TOLERANCE[precision]:  # nor if it is NaN
            raise UsageError(f'the {precision} file does not compute what torch does: outputs differ by {difference:.1e} of the '
                             f'largest, more than {TOLERANCE[precision]}; nothing was written')
        files = [f for f in (data_of(written), written) if f.exists()]  # the model after its data
        size = sum(f.stat().st_size for f in files)
        for file in files:
            os.replace(file, output.with_name(file.name))
        if len(files) == 1:
            data_of(output).unlink(missing_ok=True)  # of the file that was replaced
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
    for file in (output, data_of(output)):
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


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:
        return float('inf')
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6))


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Parses, exports, and prints what was written."""
    print(export(parse(argv)))
