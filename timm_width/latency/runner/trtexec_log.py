"""What NVIDIA's program trtexec prints and writes, of TensorRT 7 to 11: its logs and its JSON files."""
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from .base import first_line
from .errors import RunnerError

__all__ = ['GPU', 'Run', 'parse_json', 'parse_log']

GPU = 'GPU Compute Time'
NUMBER = r'[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?'
PREFIX = re.compile(r'^\s*\[[^\]]*\] \[([A-Z])\] ?')  # [date-time] [level]
BANNER = re.compile(r'^&&&& (RUNNING|PASSED|FAILED|WAIVED) TensorRT\.trtexec(?: \[TensorRT v(\d+)\])?(?: \[b\d+\])?(?: # (.*))?$')
SUMMARY = re.compile(rf'^([A-Z][\w\- ]+): (min = {NUMBER} ms, .*)$')
ENTRY = re.compile(rf'(min|max|mean|median|percentile\({NUMBER}%\)) = ({NUMBER}) ms')
OLD_ENTRY = re.compile(rf'^(min|max|mean|median|percentile): ({NUMBER}) ms(?: at ({NUMBER})%)?')  # of TensorRT 7
OLD_SECTIONS = {'Host Latency': 'Latency', 'Enqueue Time': 'Enqueue Time', 'GPU Compute': GPU}
VALUES = re.compile(rf'^(?:(?i:throughput): ({NUMBER}) qps|Selected Device: (.+)|Precision: (.+)|Batch: (\d+))$')
LAYERS_LAST = re.compile(rf'^ *({NUMBER}) +({NUMBER}) +({NUMBER}) +({NUMBER})   (.+)$')  # TensorRT 10
LAYERS_FIRST = re.compile(rf'^ *(\S.*?) +({NUMBER}) +({NUMBER})(?: +({NUMBER}))? +({NUMBER})$')  # before
REASONS = ('Skipped inference phase', 'network timing is not reported')
MAX_OUTPUT = 2 ** 27  # characters of a log that are read
TIMES = ('computeMs', 'latencyMs')


@dataclass
class Run:
    """What a log says of one run.

    Args:
        version: Of TensorRT, as in '10.16.1'; None where the log does not say (TensorRT 7).
        status: 'PASSED', 'FAILED'; None where the log ends before, or is an excerpt.
        command: The command line.
        statistics: 'GPU Compute Time' (and so on) -> 'min', 'max', 'mean', 'median', 'percentile(99%)' -> milliseconds.
        throughput: Queries per second.
        device: Name of the GPU.
        precision: What it was allowed to compute in.
        batch: Of a model with an implicit batch (TensorRT 7).
        errors: Lines of level E.
        why: What the log says about why there are no statistics.
        layers: Name, total, mean and median milliseconds (None before TensorRT 8.2), and percentage of each.
    """
    version: Optional[str] = None
    status: Optional[str] = None
    command: str = ''
    statistics: dict[str, dict[str, float]] = field(default_factory=dict)
    throughput: Optional[float] = None
    device: Optional[str] = None
    precision: Optional[str] = None
    batch: Optional[int] = None
    errors: list[str] = field(default_factory=list)
    why: str = ''
    layers: list[tuple[str, float, float, Optional[float], float]] = field(default_factory=list)

    @property
    def gpu_ms(self) -> float:
        """Median GPU compute time, in milliseconds per batch.

        Raises:
            RunnerError: The run failed, or its log has none, and why.
        """
        if self.status == 'FAILED' or self.errors and self.status != 'PASSED':
            raise RunnerError(f"trtexec failed: {self.errors[0] if self.errors else 'its log does not say why'}")
        found = self.statistics.get(GPU, {}).get('median')
        if found is None:
            raise RunnerError(f"trtexec printed no {GPU}: {self.why or 'its log ends before'}")
        if not found > 0:
            raise RunnerError(f'trtexec printed a median {GPU} of {found} ms, which is no measurement')
        return found


def parse_log(text: str) -> list[Run]:
    """Reads what trtexec printed, of one run or of several.

    Returns:
        The runs; `Run.gpu_ms` says of each what it measured, or why it did not.

    Raises:
        RunnerError: A number is out of all bounds, or a run has two summaries.
    """
    runs: list[Run] = []
    section, table = '', None
    for line in text[:MAX_OUTPUT].splitlines():
        banner = BANNER.match(line.strip())
        if banner:
            kind, version, said = banner.groups()
            if not runs or runs[-1].status or kind == 'RUNNING' and (runs[-1].command or runs[-1].statistics):
                runs.append(Run())  # else: lines of something else before the banner
            run = runs[-1]
            run.version, run.command, section, table = _version(version) or run.version, said or run.command, '', None
            run.status = None if kind == 'RUNNING' else kind
            continue
        if not runs:
            runs.append(Run())  # an excerpt, or only what followed the banner
        run = runs[-1]
        prefix = PREFIX.match(line)
        level, line = (prefix[1], line[prefix.end():].rstrip()) if prefix else ('', line.rstrip())
        if level == 'E':
            run.errors.append(line)
        elif level in ('I', ''):
            if not run.why and any(reason in line for reason in REASONS):
                run.why = line
            section, table = _read(run, line, section, table)
    return runs


def _read(run: Run, line: str, section: str, table: Optional[str]) -> tuple[str, Optional[str]]:
    """Takes a line of level I; returns the section of TensorRT 7, and the layout of the table of layers, that the next is in."""
    if summary := SUMMARY.match(line.strip()):
        name = summary[1]
        if name in run.statistics:
            raise RunnerError(f'the log has two summaries ({name}) in one run')
        run.statistics[name] = {key: _number(value) for key, value in ENTRY.findall(summary[2])}
    elif line in OLD_SECTIONS:
        return OLD_SECTIONS[line], None
    elif section and (entry := OLD_ENTRY.match(line)):
        key = f'percentile({entry[3]}%)' if entry[3] else entry[1]
        run.statistics.setdefault(section, {})[key] = _number(entry[2])
    elif 'Time (ms)' in line and 'Layer' in line or 'Time(ms)' in line and 'Layer' in line:
        return section, 'first' if line.split()[0] == 'Layer' else 'last'
    elif table and (row := (LAYERS_FIRST if table == 'first' else LAYERS_LAST).match(line)):
        cells = row.groups() if table == 'first' else (row[5], *row.groups()[:4])
        if cells[0] != 'Total':
            name, total, mean, middle, share = cells
            run.layers.append((name, _number(total), _number(mean), None if middle is None else _number(middle), _number(share)))
    elif value := VALUES.match(line):
        throughput, device, precision, batch = value.groups()
        run.throughput = _number(throughput) if throughput else run.throughput
        run.device, run.precision = device or run.device, precision or run.precision
        run.batch = int(batch) if batch else run.batch
    return section, table


def _version(digits: Optional[str]) -> Optional[str]:
    """'8401' -> '8.4.1', '101601' -> '10.16.1'."""
    if not digits:
        return None
    number = int(digits)
    major, rest = divmod(number, 10000) if number >= 100000 else divmod(number, 1000)
    return '.'.join(map(str, (major, *divmod(rest, 100))))


def _number(text: Any) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise RunnerError(f'{text} is no time')
    return value


def parse_json(text: str) -> list[tuple[str, Any]]:
    """Reads a JSON file of trtexec, which may hold several values one after the other (TensorRT 7, run by run).

    Returns:
        For each value its kind and what it says: ('times', milliseconds of GPU compute per query); ('profile', (runs, rows as
        `Run.layers` has them)); ('layers', what the engine's layers are, a dict each).

    Raises:
        RunnerError: It is no such file.
    """
    decoder, found, at = json.JSONDecoder(parse_constant=_number), [], 0
    text = text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
            found.append(_kind(value))
        except RunnerError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise RunnerError(f'this is not a JSON file that trtexec writes: {first_line(e)}') from None
        while at < len(text) and text[at].isspace():
            at += 1
    if not found:
        raise RunnerError('this is not a JSON file that trtexec writes: it is empty')
    return found


def _kind(value: Any) -> tuple[str, Any]:
    if isinstance(value, Mapping) and isinstance(value.get('Layers'), list):
        return 'layers', [{'Name': x} if isinstance(x, str) else dict(x) for x in value['Layers']]
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        if all(key in row for row in value for key in TIMES):
            return 'times', [_number(row['computeMs']) for row in value]
        if 'count' in value[0]:
            return 'profile', (int(value[0]['count']), [
                (str(r['name']), _number(r['timeMs']), _number(r['averageMs']),
                 _number(r['medianMs']) if 'medianMs' in r else None, _number(r['percentage'])) for r in value[1:]])
    raise RunnerError('this is not a JSON file that trtexec writes: neither times nor a profile nor layers')
