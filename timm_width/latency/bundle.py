"""Writes a bundle: a folder that measures the latency of a network at many widths on a machine without torch.

    manifest.json   what to measure (runner/manifest.py says what it holds)
    model.onnx      the network at the grid's largest widths, random weights; the others are cut from it
    networks/       instead, where the network cannot be cut so: one file per configuration
    run.py, runner/ the program, which needs Python 3.10, numpy, onnx and one of onnxruntime, tensorrt or trtexec
"""
import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from timm.data import resolve_data_config
from timm.utils import random_seed
from torch import nn

from .. import __version__
from ..arguments import check_output
from ..data import UsageError, first_line
from ..engine import create
from ..grids import make_grid, squeezes
from ..resize import resize
from ..space import WidthSpace
from ..trace import trace
from .measure import TORCH
from .onnx_graph import RecipeError, export_bytes, settle
from .onnx_recipe import find_recipe
from .runner.manifest import FILE_PRECISIONS, FORMAT, MAX_INPUT, USES, read_manifest

__all__ = [
    'Network', 'Order', 'beside', 'build_network', 'check_images', 'check_order', 'check_packages', 'describe_order',
    'export_bundle', 'make_network', 'plan_bundle', 'write_manifest', 'write_networks', 'write_runner',
]

RUN = '''"""Measures this bundle: python run.py --backend onnxruntime (or tensorrt, trtexec, ...: --help lists them)."""
import sys
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit('run.py needs Python 3.10 or newer')
sys.path.insert(0, str(Path(__file__).resolve().parent))

from runner.main import main  # noqa: E402

sys.exit(main())
'''
Grid = Mapping[str, Sequence[int]]
Draw = Callable[[WidthSpace, Grid], Sequence[tuple[str, Mapping[str, int]]]]


@dataclass(frozen=True)
class Order:
    """What a bundle is to hold.

    Attributes:
        model: A timm model.
        grid: Rule of the widths (`grids.GRIDS`).
        width_min: As in `grids.make_grid`; so are width_max, width_divisor and fix.
        search_se: Whether the squeezes of squeeze-excite vary.
        img_size: Side of the images; by default the model's own.
        batch: Images per call.
        precision: 'fp32' or 'fp16'.
        num_classes: By default the model's own.
        in_chans: By default the model's own.
        model_args: Further arguments of the model.
        seed: Of the random weights.
        max_files: Most configurations that are exported one by one, where the network cannot be cut.
        blocks: Patterns of the modules to measure alone (see plan.py); none of them, for the usual ones. None: whole networks.
        knots: How many widths of each block to measure; None: all.
    """
    model: str
    grid: str = 'multiples'
    width_min: Optional[float] = None
    width_max: Optional[float] = None
    width_divisor: Optional[int] = None
    fix: Sequence[str] = ()
    search_se: bool = False
    img_size: Optional[int] = None
    batch: int = 1
    precision: str = 'fp32'
    num_classes: Optional[int] = None
    in_chans: Optional[int] = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    max_files: int = 200
    blocks: Optional[Sequence[str]] = None
    knots: Optional[int] = None


class Network(NamedTuple):
    """The network of an order at its base widths, its width space and grid."""
    model: nn.Module
    space: WidthSpace
    grid: Grid


def build_network(order: Order, **kwargs: Any) -> nn.Module:
    """The network of an order at its base widths, with random weights."""
    random_seed(order.seed)
    return create(order.model, order.num_classes, **_arguments(order), **kwargs).eval()


def _arguments(order: Order) -> dict[str, Any]:
    return {**order.model_args, **({} if order.in_chans is None else {'in_chans': order.in_chans})}


def make_network(order: Order) -> Network:
    """Builds what is to be measured.

    Raises:
        UsageError: It cannot be built, or there is nothing to compare.
    """
    model = build_network(order)
    data = resolve_data_config({'img_size': order.img_size} if order.img_size else {}, model=model)
    size = (getattr(model, 'in_chans', data['input_size'][0]), *data['input_size'][1:])
    if not getattr(model, 'num_classes', 1):
        raise UsageError('--num-classes must be at least 1: a bundle needs an output that does not depend on widths')
    space = trace(model, size)
    grid = make_grid(space, order.grid, order.width_min, order.width_max, order.width_divisor, order.fix,
                     () if order.search_se else squeezes(model, space))
    if all(len(widths) == 1 for widths in grid.values()):
        raise UsageError(f'--grid {order.grid} leaves one width for each group: there is nothing to compare')
    return Network(model, space, grid)


def describe_order(order: Order, network: Network) -> dict[str, Any]:
    """What a manifest says of an order, but for the files."""
    model, space, grid = network
    return {'architecture': space.architecture, 'model': order.model, 'model_args': _arguments(order),
            'num_classes': model.num_classes, 'input_size': list(space.input_size), 'batch': order.batch,
            'precision': order.precision, 'seed': order.seed, 'space': space.fingerprint,
            'grid': {name: list(widths) for name, widths in grid.items()}}


def plan_bundle(order: Order, out: Path, draw: Draw) -> None:
    """Writes the manifest of a bundle alone: enough for torch, which measures the networks where they are built.

    Args:
        order: What it is to hold.
        out: The folder.
        draw: Chooses the configurations.

    Raises:
        UsageError: Something cannot be worked with; then nothing is written.
    """
    check_order(order, out, False)
    network = make_network(order)
    with beside(out) as folder:
        write_manifest(folder, _describe(order, network, _configurations(order, network, draw), [], None))


def export_bundle(order: Order, out: Path, draw: Draw, overwrite: bool = False) -> str:
    """Writes a bundle, whole or not at all.

    Args:
        order: What it is to hold.
        out: The folder.
        draw: Chooses the configurations, each (use, widths) with use 'train' or 'valid', in the order to measure them.
        overwrite: Whether a bundle that is there may be replaced.

    Returns:
        A line that says what was written.

    Raises:
        UsageError: Something cannot be worked with; then nothing is written.
    """
    check_packages()
    check_order(order, out, overwrite)
    network = make_network(order)
    _, space, grid = network  # of which a search has the space; the exported one has other activations
    size = space.input_size
    configurations = _configurations(order, network, draw)
    images = torch.randn(order.batch, *size, generator=torch.Generator().manual_seed(order.seed))
    largest = resize(build_network(order, exportable=True), space, {name: widths[-1] for name, widths in grid.items()})
    try:
        settle(largest, images[:4])
    except (RuntimeError, ValueError, AssertionError) as e:
        raise UsageError(f'the model cannot run on images of {size}: {first_line(e)}') from e
    own = trace(largest, size)
    with beside(out) as folder:
        recipe, files, why = write_networks(order, largest, own, grid, configurations, images, folder)
        write_manifest(folder, _describe(order, network, configurations, files, recipe))
        write_runner(folder)
    total = sum(f.stat().st_size for f in out.rglob('*.onnx'))
    how = f'exported one by one ({why})' if why else 'cut from one file'
    return (f'{out}: {space.architecture}, {len(configurations)} configurations of {len(grid)} groups, {how}, '
            f"{total / 1e6:.1f} MB, {order.precision}, input {'x'.join(map(str, (order.batch, *size)))}\n"
            f'copy it to the target, and there: python {out.name}/run.py --backend onnxruntime')


def _configurations(order: Order, network: Network, draw: Draw) -> list[tuple[str, dict[str, int]]]:
    """The networks to measure, checked."""
    _, space, grid = network
    check_images(order.batch, *space.input_size)
    configurations = [(use, {name: widths.get(name) for name in grid}) for use, widths in draw(space, grid)]
    for use, widths in configurations:
        if use not in USES or any(w not in grid[name] for name, w in widths.items()):
            raise UsageError(f'a drawn configuration is not on the grid, or neither to train nor to validate: {use} {widths}')
    if not configurations:
        raise UsageError('there must be at least one configuration')
    return configurations


def _describe(
        order: Order,
        network: Network,
        configurations: Sequence[tuple[str, Mapping[str, int]]],
        files: Sequence[Mapping[str, str]],
        recipe: Optional[Mapping[str, Any]],
) -> dict[str, Any]:
    """A manifest of whole networks."""
    return {'format': FORMAT, **describe_order(order, network), 'files': files, 'recipe': recipe,
            'configurations': [{'use': use, 'widths': list(widths.values())} for use, widths in configurations]}


def write_manifest(folder: Path, data: Mapping[str, Any]) -> None:
    """Writes a manifest, with the versions of what made it, and reads it as the target will."""
    packages = ('timm', 'torch', *(['onnx'] if any(folder.rglob('*.onnx')) else []))
    data = {**data, 'versions': {'timm_width': __version__, **{name: import_module(name).__version__ for name in packages}}}
    text = ',\n'.join(f'{json.dumps(key)}: {json.dumps(value)}' for key, value in data.items())
    (folder / 'manifest.json').write_text('{\n' + text + '\n}\n', encoding='utf-8')
    read_manifest(folder)


def write_runner(folder: Path) -> None:
    """Writes the program that measures a bundle."""
    (folder / 'run.py').write_text(RUN, encoding='utf-8')
    shutil.copytree(Path(__file__).parent / 'runner', folder / 'runner', ignore=shutil.ignore_patterns('__pycache__'))


def write_networks(
        order: Order,
        largest: nn.Module,
        space: Optional[WidthSpace],
        grid: Grid,
        configurations: Sequence[tuple[str, Mapping[str, int]]],
        images: torch.Tensor,
        folder: Path,
        name: str = '',
) -> tuple[Optional[dict[str, Any]], list[dict[str, str]], str]:
    """Writes the ONNX files of a network.

    Args:
        order: Its precision, seed and bounds.
        largest: The network at the grid's largest widths, settled.
        space: Its width space, if there is a grid.
        grid: Group -> widths.
        configurations: What will be measured.
        images: Examples.
        folder: The bundle's.
        name: What the files are called, if there are several networks.

    Returns:
        The recipe, what was written, and why there is no recipe.
    """
    why = ''
    if grid:
        try:
            model, recipe = find_recipe(largest, space, grid, images, order.precision, order.seed)
            return recipe, [_write(folder, f'networks/{name}.onnx' if name else 'model.onnx', model)], ''
        except RecipeError as e:
            why = str(e)
    if len(configurations) > order.max_files:
        raise UsageError(f'{name or space.architecture} cannot be cut from one ONNX file ({why}), and {len(configurations)} '
                         'configurations would be exported one by one, in seconds each: give '
                         f'--samples {order.max_files} or a larger --max-files')
    files = []
    for i, (_, widths) in enumerate(configurations):
        network = resize(copy.deepcopy(largest), space, widths) if grid else largest
        model = export_bytes(network, images, order.precision, check=not grid)
        files.append(_write(folder, f"networks/{name}{'-' * bool(name)}{i:05}.onnx", model))
    return None, files, why


def _write(folder: Path, name: str, model: bytes) -> dict[str, str]:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(model)
    return {'file': name, 'sha256': hashlib.sha256(model).hexdigest()}


def check_order(order: Order, out: Path, overwrite: bool) -> None:
    """Refuses what would fail later."""
    for name in ('batch', 'img_size', 'num_classes', 'in_chans', 'width_divisor', 'max_files'):
        if (value := getattr(order, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if order.precision not in FILE_PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(FILE_PRECISIONS)}, not '{order.precision}'")
    check_images(order.batch, order.in_chans or 1, order.img_size or 1, order.img_size or 1)
    check_output(out, overwrite, order.model, '--out')
    if out.is_dir() and any(out.iterdir()) and not (out / 'manifest.json').is_file():
        raise UsageError(f"--out '{out}' is not a bundle, and is not replaced: give another folder")
    if measured := sorted(out.glob('*.jsonl')):
        raise UsageError(f"--out '{out}' holds measurements ({measured[0].name}), which would be lost: give another folder")
    try:
        json.dumps(dict(order.model_args))
    except (TypeError, ValueError):
        raise UsageError(f'--model-kwargs {dict(order.model_args)} cannot be written as JSON') from None


def check_packages(backend: str = 'onnxruntime') -> None:
    """Raises UsageError where a package is missing that a bundle for a backend needs; torch needs none."""
    for name in ('onnx', 'onnxscript', 'onnxruntime', 'onnx_ir') if backend not in TORCH else ():
        try:
            import_module(name)
        except ImportError:
            raise UsageError(f"a bundle needs {name}: pip install 'timm-width[onnx]'") from None


def check_images(batch: int, *size: int) -> None:
    """Raises UsageError for more images than may be run at once."""
    if batch * prod(size) > MAX_INPUT:
        raise UsageError(f"--batch {batch}: that many images of {'x'.join(map(str, size))} are too large: give fewer")


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` in the end, if nothing went wrong."""
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix='.exporting-') as name:
            new, old = Path(name) / 'new', Path(name) / 'old'
            new.mkdir()
            yield new
            if out.exists():
                os.replace(out, old)
            try:
                os.replace(new, out)
            except OSError:
                if old.exists():
                    os.replace(old, out)
                raise
    except OSError as e:
        raise UsageError(f"--out '{out}' cannot be written: {first_line(e)}") from e
