"""Reads what a bundle holds: manifest.json, and the network of each configuration.

manifest.json is a JSON object:

    format          1
    architecture    the network's name
    model, num_classes, model_args     what timm builds it of: a name, a number, and a JSON object of further arguments
    seed, versions  of its random weights, and of the packages that wrote it (may be left out)
    input_size      [channels, height, width]
    batch           images per call
    precision       'fp32' or 'fp16': that of the file
    grid            {group: [widths, ascending]}
    space           fingerprint of the width space
    configurations  [{"use": "train" or "valid", "widths": [one per group, in the order of the grid]}], in the order to measure them
    files           [{"file": name, "sha256": digest}]: model.onnx at the largest widths; or, where there is no recipe, one file per
                    configuration; or none, where torch measures the networks where they are built
    recipe          what `onnx_widths` slices model.onnx by, or null

Bundles come from elsewhere, so everything is checked before it is used.
"""
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from .errors import RunnerError
from .onnx_widths import SlicedModel, load_proto

__all__ = ['FILE_PRECISIONS', 'FORMAT', 'MAX_INPUT', 'USES', 'Configuration', 'Manifest', 'load_json', 'read_manifest']

FORMAT = 1
NAME = 'manifest.json'
USES = ('train', 'valid')
FILE_PRECISIONS = ('fp32', 'fp16')  # in which models are exported
MAX_INPUT = 2 ** 31  # numbers in a batch of images
MAX_CONFIGURATIONS = 10 ** 6
MAX_MANIFEST = 2 ** 28  # bytes


@dataclass(frozen=True)
class Configuration:
    """One network: what it is for, and its widths."""
    use: str
    widths: Mapping[str, int]


@dataclass(frozen=True)
class Manifest:
    """A bundle.

    Attributes:
        folder: Where it lies.
        fingerprint: Of all that manifest.json says: results carry it.
        data: manifest.json, checked.
        configurations: The networks, in order.
    """
    folder: Path
    fingerprint: str
    data: Mapping[str, Any]
    configurations: tuple[Configuration, ...]

    @property
    def batch(self) -> int:
        return self.data['batch']

    @property
    def precision(self) -> str:
        """That of the files."""
        return self.data['precision']

    def network(self, index: int) -> bytes:
        """The ONNX file of a configuration.

        Raises:
            RunnerError: Its file is missing, broken or another one.
        """
        if self._sliced is not None:
            return self._sliced.at(self.configurations[index].widths)
        return self._file(index)

    @cached_property
    def _sliced(self) -> Optional[SlicedModel]:
        return None if self.data['recipe'] is None else SlicedModel(self._file(0), self.data['recipe'])

    def _file(self, index: int) -> bytes:
        if not self.data['files']:
            raise RunnerError(f"'{self.folder}' holds no networks: they were measured by torch, where they were built")
        entry = self.data['files'][index]
        path = self.folder / entry['file']
        try:
            found = path.read_bytes()
        except OSError as e:
            raise RunnerError(f"'{path}' cannot be read: {e.strerror or e}") from None
        if hashlib.sha256(found).hexdigest() != entry['sha256']:
            raise RunnerError(f"'{path}' ({len(found)} bytes) is not that of this bundle, or not all of it: copy the bundle again")
        shape = [d.dim_value for d in load_proto(found).graph.input[0].type.tensor_type.shape.dim]
        if shape != [self.batch, *self.data['input_size']]:
            raise RunnerError(f"'{path}' takes images of {shape}, and {NAME} says {[self.batch, *self.data['input_size']]}")
        return found


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks manifest.json of a bundle.

    Raises:
        RunnerError: It is missing, or something in it is wrong.
    """
    path = folder / NAME
    try:
        if path.stat().st_size > MAX_MANIFEST:
            raise RunnerError(f"'{path}' is larger than any manifest")
        text = path.read_bytes()
    except OSError as e:
        raise RunnerError(f"'{path}' cannot be read: {e.strerror or e}") from None
    data = load_json(text, f"'{path}'")
    try:
        configurations = _check(data)
    except RunnerError as e:
        raise RunnerError(f"'{path}': {e}") from None
    return Manifest(folder, 'sha256:' + hashlib.sha256(text).hexdigest()[:16], data, configurations)


def load_json(text: bytes, what: str) -> Any:
    """JSON as the standard has it: no NaN, no key twice.

    Raises:
        RunnerError: It is not.
    """
    def wrong(value: str):
        raise ValueError(f'{value} is no number')

    def once(pairs: list) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise ValueError('a key appears twice')
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=wrong, object_pairs_hook=once)
    except (ValueError, RecursionError) as e:  # a UnicodeDecodeError is a ValueError
        raise RunnerError(f"{what} is not JSON: {str(e).splitlines()[0] if str(e) else 'too deep'}") from None


def _check(data: Any) -> tuple[Configuration, ...]:
    if not isinstance(data, dict):
        raise RunnerError('it must be a JSON object')
    if data.get('format') != FORMAT:
        raise RunnerError(f"its format is {str(data.get('format'))[:20]!r}, and this program reads {FORMAT}: they must be "
                          'of the same version of timm_width')
    wanted = ('architecture', 'model', 'num_classes', 'model_args', 'input_size',
              'batch', 'precision', 'grid', 'space', 'configurations', 'files', 'recipe')
    if missing := [k for k in wanted if k not in data]:
        raise RunnerError(f"it lacks {', '.join(missing)}")
    size, batch = data['input_size'], data['batch']
    if not isinstance(size, list) or len(size) != 3 or not all(_whole(n) for n in (*size, batch)):
        raise RunnerError('input_size must be [channels, height, width] and batch a number, whole and at least 1')
    if size[0] * size[1] * size[2] * batch > MAX_INPUT:
        raise RunnerError(f'{batch} images of {size} are too many')
    if data['precision'] not in FILE_PRECISIONS:
        raise RunnerError(f"precision must be one of {', '.join(FILE_PRECISIONS)}, not {str(data['precision'])[:20]!r}")
    if not all(isinstance(data[k], str) for k in ('architecture', 'model', 'space')):
        raise RunnerError('architecture, model and space must be text')
    if not _whole(data['num_classes']) or not all(isinstance(data.get(k, {}), dict) for k in ('model_args', 'versions')):
        raise RunnerError('num_classes must be a whole number of at least 1, model_args and versions must be JSON objects')
    grid = data['grid']
    if not isinstance(grid, dict) or not grid or not all(
            isinstance(w, list) and w and all(map(_whole, w)) and w == sorted(set(w)) for w in grid.values()):
        raise RunnerError('grid must give each group its widths, ascending')
    rows = data['configurations']
    if not isinstance(rows, list) or not 0 < len(rows) <= MAX_CONFIGURATIONS:
        raise RunnerError('configurations must be a list that is not empty')
    allowed = [set(w) for w in grid.values()]
    configurations = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or row.get('use') not in USES or not isinstance(row.get('widths'), list):
            raise RunnerError(f"configuration {i} must have a use ({' or '.join(USES)}) and widths")
        widths = row['widths']
        if len(widths) != len(grid) or not all(_whole(w) and w in a for w, a in zip(widths, allowed)):
            raise RunnerError(f'configuration {i} is not on the grid')
        configurations.append(Configuration(row['use'], dict(zip(grid, widths))))
    files, sliced = data['files'], data['recipe'] is not None
    if not isinstance(files, list) or len(files) not in ((1,) if sliced else (0, len(rows))) or not all(map(_entry, files)):
        raise RunnerError('files must name one ONNX file, or without a recipe one per configuration (or none), and its sha256')
    return tuple(configurations)


def _entry(file: Any) -> bool:
    """Whether this names a file inside the bundle."""
    return (isinstance(file, dict) and isinstance(file.get('file'), str) and isinstance(file.get('sha256'), str)
            and re.fullmatch(r'(networks/)?[A-Za-z0-9_-]+\.onnx', file['file']) is not None)


def _whole(n: Any) -> bool:
    return type(n) is int and 0 < n < MAX_INPUT
