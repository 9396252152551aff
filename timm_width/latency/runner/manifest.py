"""Reads what a bundle holds: manifest.json, and the network of each configuration.

manifest.json is a JSON object:

    format          1, or 2 where several things are measured: see below
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

In format 2, which blocks that are measured alone need, there are `parts` in the place of files and recipe: a list of
{"input_size", "grid", "files", "recipe"}, each as above, but a grid may be empty. A configuration is of one part, {"use", "part",
"widths"}, its widths in the order of the part's grid. What the parts are is said by `tables`, `held` and `networks`, which only the
fit reads (../block_fit.py).

Bundles come from elsewhere, so everything is checked before it is used.
"""
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import RunnerError
from .onnx_widths import SlicedModel, load_proto

__all__ = ['FILE_PRECISIONS', 'FORMAT', 'MAX_INPUT', 'PARTS', 'USES', 'Configuration', 'Manifest', 'load_json', 'read_manifest']

FORMAT, PARTS = 1, 2
NAME = 'manifest.json'
USES = ('train', 'valid')
FILE_PRECISIONS = ('fp32', 'fp16')  # in which models are exported
MAX_INPUT = 2 ** 31  # numbers in a batch of images
MAX_CONFIGURATIONS = 10 ** 6
MAX_MANIFEST = 2 ** 28  # bytes
OPEN = 4  # files that are held, ready to be cut


@dataclass(frozen=True)
class Configuration:
    """One network: what it is for, its widths, the part that it is of, and its number among those of that part."""
    use: str
    widths: Mapping[str, int]
    part: int = 0
    number: int = 0


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

    @property
    def parts(self) -> list[Mapping[str, Any]]:
        """What is measured: in format 1, the network alone."""
        return self.data['parts'] if self.data['format'] == PARTS else [self.data]

    def network(self, index: int) -> bytes:
        """The ONNX file of a configuration.

        Raises:
            RunnerError: Its file is missing, broken or another one.
        """
        configuration = self.configurations[index]
        part = self.parts[configuration.part]
        if part['recipe'] is None:
            return self._file(part, configuration.number)
        held = self._sliced
        sliced = held.pop(configuration.part, None) or SlicedModel(self._file(part, 0), part['recipe'])
        held[configuration.part] = sliced
        while len(held) > OPEN:  # the one that was asked for longest ago
            del held[next(iter(held))]
        return sliced.at(configuration.widths)

    @cached_property
    def _sliced(self) -> dict[int, SlicedModel]:
        return {}

    def _file(self, part: Mapping[str, Any], number: int) -> bytes:
        if not part['files']:
            raise RunnerError(f"'{self.folder}' holds no networks: they were measured by torch, where they were built")
        entry = part['files'][number]
        path = self.folder / entry['file']
        try:
            found = path.read_bytes()
        except OSError as e:
            raise RunnerError(f"'{path}' cannot be read: {e.strerror or e}") from None
        if hashlib.sha256(found).hexdigest() != entry['sha256']:
            raise RunnerError(f"'{path}' ({len(found)} bytes) is not that of this bundle, or not all of it: copy the bundle again")
        shape = [d.dim_value for d in load_proto(found).graph.input[0].type.tensor_type.shape.dim]
        if shape != [self.batch, *part['input_size']]:
            raise RunnerError(f"'{path}' takes images of {shape}, and {NAME} says {[self.batch, *part['input_size']]}")
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
    if data.get('format') not in (FORMAT, PARTS) or isinstance(data['format'], bool):
        raise RunnerError(f"its format is {str(data.get('format'))[:20]!r}, and this program reads {FORMAT} and {PARTS}: they must "
                          'be of the same version of timm_width')
    several = data['format'] == PARTS
    wanted = ('architecture', 'model', 'num_classes', 'model_args', 'input_size',
              'batch', 'precision', 'grid', 'space', 'configurations', *(('parts',) if several else ('files', 'recipe')))
    if missing := [k for k in wanted if k not in data]:
        raise RunnerError(f"it lacks {', '.join(missing)}")
    if not _whole(data['batch']):
        raise RunnerError('batch must be a number, whole and at least 1')
    if data['precision'] not in FILE_PRECISIONS:
        raise RunnerError(f"precision must be one of {', '.join(FILE_PRECISIONS)}, not {str(data['precision'])[:20]!r}")
    if not all(isinstance(data[k], str) for k in ('architecture', 'model', 'space')):
        raise RunnerError('architecture, model and space must be text')
    if not _whole(data['num_classes']) or not all(isinstance(data.get(k, {}), dict) for k in ('model_args', 'versions')):
        raise RunnerError('num_classes must be a whole number of at least 1, model_args and versions must be JSON objects')
    rows, parts = data['configurations'], data['parts'] if several else [data]
    if not isinstance(rows, list) or not 0 < len(rows) <= MAX_CONFIGURATIONS:
        raise RunnerError('configurations must be a list that is not empty')
    if not isinstance(parts, list) or not 0 < len(parts) <= len(rows):
        raise RunnerError('parts must be a list that is not empty, and not longer than the configurations')
    _check_inputs(data['grid'], data['input_size'], data['batch'], True)
    for part in parts if several else ():
        if not isinstance(part, dict) or any(k not in part for k in ('input_size', 'grid', 'files', 'recipe')):
            raise RunnerError('a part must have input_size, grid, files and recipe')
        _check_inputs(part['grid'], part['input_size'], data['batch'], False)
    allowed = [[set(w) for w in part['grid'].values()] for part in parts]
    counts = [0] * len(parts)
    configurations = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or row.get('use') not in USES or not isinstance(row.get('widths'), list):
            raise RunnerError(f"configuration {i} must have a use ({' or '.join(USES)}) and widths")
        part = row.get('part') if several else 0
        if type(part) is not int or not 0 <= part < len(parts):
            raise RunnerError(f'configuration {i} must say its part, from 0 to {len(parts) - 1}')
        widths = row['widths']
        if len(widths) != len(allowed[part]) or not all(_whole(w) and w in a for w, a in zip(widths, allowed[part])):
            raise RunnerError(f'configuration {i} is not on the grid')
        configurations.append(Configuration(row['use'], dict(zip(parts[part]['grid'], widths)), part, counts[part]))
        counts[part] += 1
    for part, count in zip(parts, counts):
        files, sliced = part['files'], part['recipe'] is not None
        if not isinstance(files, list) or len(files) not in ((1,) if sliced else (0, count)) or not all(map(_entry, files)):
            raise RunnerError('files must name one ONNX file, or without a recipe one per configuration (or none), and its sha256')
    return tuple(configurations)


def _check_inputs(grid: Any, size: Any, batch: int, some: bool) -> None:
    """Of the network, or of a part: its grid, and what it is given."""
    if not isinstance(size, list) or len(size) != 3 or not all(map(_whole, size)):
        raise RunnerError('input_size must be [channels, height, width], whole and at least 1')
    if size[0] * size[1] * size[2] * batch > MAX_INPUT:
        raise RunnerError(f'{batch} images of {size} are too many')
    if not isinstance(grid, dict) or some and not grid or not all(
            isinstance(w, list) and w and all(map(_whole, w)) and w == sorted(set(w)) for w in grid.values()):
        raise RunnerError('grid must give each group its widths, ascending')


def _entry(file: Any) -> bool:
    """Whether this names a file inside the bundle."""
    return (isinstance(file, dict) and isinstance(file.get('file'), str) and isinstance(file.get('sha256'), str)
            and re.fullmatch(r'(networks/)?[A-Za-z0-9_-]+\.onnx', file['file']) is not None)


def _whole(n: Any) -> bool:
    return type(n) is int and 0 < n < MAX_INPUT
