"""The results file: one JSON object per line, each written when it is known, so that a killed run loses nothing.

The first line is the header: what was measured and on what.

    {"format": 1, "manifest": fingerprint, "architecture": name, "configurations": how many, "batch": n, "precision": "fp32",
     "backend": {what Backend.describe says}, "loop": {options of the timing loop}, "host": {system, processor, versions}}

Every other line is one of

    {"index": i, "use": "train", "ms": per image, "batch_ms": ..., and the rest of `Timing.to_json`}
                                                         configuration i, measured
    {"index": i, "use": "train", "error": "why"}         it failed, and will not be tried again
    {"again": i, "ms": ..., "batch_ms": ..., ...}        configuration i, which was disturbed, once more; the calmer timing counts
    {"reference": n, "ms": ..., "batch_ms": ..., ...}    configuration 0 again, when n were done: shows how much the machine drifts
    {"retry": i}                                         a run goes on with configuration i
    {"stopped": i}                                       a run ended in good order (by hand, at its --limit, because the device
                                                         failed) before configuration i; one that was killed says nothing

A last line that was cut off by a kill is left out; anything else that is wrong is an error.
"""
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

from .errors import RunnerError
from .manifest import USES, Manifest, load_json
from .timing import MAX_MS, Timing

__all__ = ['FORMAT', 'Results', 'scan_results']

FORMAT = 1
MAX_BYTES = 2 ** 31


class Results(NamedTuple):
    """All that a results file says.

    Attributes:
        header: Its first line.
        rows: Configurations that were measured, in the order of the file. In these and in references, 'position' counts the timings
            of the file.
        failed: Those that failed, with 'error'.
        references: Measurements of configuration 0 on the way.
        died: Configuration -> how often a run was killed at it, before the last one that is in the file.
        size: Bytes up to the end of the last whole line.
        stopped: The last run ended in good order.
        again: How many timings were of configurations that had been measured before.
    """
    header: Mapping[str, Any]
    rows: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    references: list[dict[str, Any]]
    died: dict[int, int]
    size: int
    stopped: bool = False
    again: int = 0


def scan_results(path: Path, manifest: Optional[Manifest] = None) -> Results:
    """Reads and checks all of a results file.

    Raises:
        RunnerError: It cannot be read, is of another bundle, or a line is not what it may be: no time, or one that is not finite
            and positive, a configuration twice or one that there is not.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RunnerError(f"'{path}' is larger than any results file")
        text = path.read_bytes()
    except OSError as e:
        raise RunnerError(f"'{path}' cannot be read: {e.strerror or e}") from None
    end = text.rfind(b'\n') + 1
    first, *lines = text[:end].splitlines() or [b'']
    if not end:
        raise RunnerError(f"'{path}' is no results file, or nothing of it is left")
    header = _header(load_json(first, f"line 1 of '{path}'"), path, manifest)
    found = Results(header, [], [], [], {}, end)
    seen: set[int] = set()
    for number, line in enumerate(lines, 2):
        where = f"line {number} of '{path}'"
        try:
            row = load_json(line, 'it')
            _row(row, found, seen, manifest)
            found = found._replace(stopped='stopped' in row, again=found.again + ('again' in row))
        except RunnerError as e:
            raise RunnerError(f'{where}: {e}') from None
    return found


def _header(header: Any, path: Path, manifest: Optional[Manifest]) -> dict[str, Any]:
    if not isinstance(header, dict) or 'manifest' not in header:
        raise RunnerError(f"'{path}' does not begin as a results file does")
    if header.get('format') != FORMAT:
        raise RunnerError(f"'{path}' has format {str(header.get('format'))[:20]!r}, and this program reads {FORMAT}")
    for key in ('configurations', 'batch'):
        if type(header.get(key)) is not int or header[key] < 1:
            raise RunnerError(f"'{path}': {key} must be a whole number of at least 1")
    kinds = {'manifest': str, 'precision': str, 'architecture': str, 'backend': dict, 'host': dict, 'loop': dict}
    for key, kind in kinds.items():
        if not isinstance(header.get(key), kind):
            raise RunnerError(f"'{path}': the header has no right {key}")
    if manifest is not None and header['manifest'] != manifest.fingerprint:
        raise RunnerError(f"'{path}' has the results of another bundle: {header['architecture'][:60]}, {header['manifest'][:40]}, "
                          f"and not {manifest.data['architecture']}, {manifest.fingerprint}")
    if manifest is not None and (header['configurations'], header['batch']) != (len(manifest.configurations), manifest.batch):
        raise RunnerError(f"'{path}' does not have the batch or the number of configurations of its bundle")
    return header


def _row(row: Any, found: Results, seen: set[int], manifest: Optional[Manifest]) -> None:
    if not isinstance(row, dict):
        raise RunnerError('it must be a JSON object')
    count = found.header['configurations']
    position = {'position': len(found.rows) + len(found.references) + found.again}
    if 'reference' in row:
        if type(row['reference']) is not int or not 0 <= row['reference'] <= count:
            raise RunnerError(f"reference must say how many of {count} were done, not {str(row['reference'])[:20]}")
        found.references.append(_timed(row, ('reference',), found.header) | position)
        return
    index = next((row[k] for k in ('retry', 'stopped', 'again', 'index') if k in row), None)
    if type(index) is not int or not 0 <= index < count:
        raise RunnerError(f'there is no configuration {str(index)[:20]} among {count}')
    if 'retry' in row or 'stopped' in row:
        if 'stopped' in row:
            found.died[index] = 0
        elif not found.stopped:
            found.died[index] = found.died.get(index, 0) + 1
        return
    if 'again' in row:
        at = next((k for k, r in enumerate(found.rows) if r['index'] == index and r['disturbed']), None)
        if at is None:
            raise RunnerError(f'configuration {index} was measured again, and was not disturbed before')
        row = _timed(row, ('again',), found.header)
        if row['spread'] < found.rows[at]['spread']:
            found.rows[at] = {**{k: v for k, v in row.items() if k != 'again'}, **{k: found.rows[at][k] for k in ('index', 'use')},
                              **position}
        return
    if index in seen:
        raise RunnerError(f'configuration {index} is there twice')
    seen.add(index)
    if row.get('use') not in USES or manifest is not None and row['use'] != manifest.configurations[index].use:
        raise RunnerError(f"configuration {index} is not for {str(row.get('use'))[:20]!r}")
    if 'error' in row:
        if not isinstance(row['error'], str):
            raise RunnerError(f'configuration {index} failed without a reason')
        found.failed.append(row)
    else:
        found.rows.append(_timed(row, ('index', 'use'), found.header) | position)


def _timed(row: dict[str, Any], keys: tuple[str, ...], header: Mapping[str, Any]) -> dict[str, Any]:
    """The row, if its timing is one."""
    timing = Timing.from_json({k: v for k, v in row.items() if k not in keys})
    ms = row.get('ms')
    if isinstance(ms, bool) or not isinstance(ms, (int, float)) or not 0 < ms <= MAX_MS or not math.isclose(
            ms, timing.ms, rel_tol=1e-6):
        raise RunnerError(f'ms must be batch_ms divided by the batch, {timing.ms:.6g}, not {str(ms)[:40]}')
    if timing.batch != header['batch']:
        raise RunnerError(f"it was measured at batch {timing.batch}, and the file is for {header['batch']}")
    return row
