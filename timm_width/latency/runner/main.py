"""Measures the configurations of a bundle, in order, on this machine; needs no torch.

Each result is written when it is known: stop whenever you like (Ctrl-C) and run the same command again to go on. The order is such
that what is measured by then can be used. Where configurations fail, the others go on; those that other load disturbed are timed
once more at the end. runner/results.py says what the file holds.
"""
import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO, Optional

from .backends import BACKENDS, open_backend
from .base import Backend, cpu_name, first_line
from .errors import RunnerError
from .manifest import Manifest, read_manifest
from .results import FORMAT, Results, scan_results
from .timing import BRIEF, LOOP

__all__ = ['main', 'measure_bundle']

REFERENCE = 25  # configurations between two measurements of the first one
GIVE_UP = 5  # when so many in a row fail, it may be the device
BEGINNING = b'{"format": '  # of a results file
SAY = 10  # seconds between two lines of progress in a log
DEVICE = ('device', 'level', 'timing_cache', 'cuda_graph', 'engines', 'program')


def make_parser() -> argparse.ArgumentParser:
    """The flags of run.py."""
    parser = argparse.ArgumentParser(prog='run.py', description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--backend', required=True, choices=BACKENDS, help='what runs the networks')
    add('--fp16', action='store_true', help='let the backend compute a float32 bundle in float16 (TensorRT before 11)')
    add('--threads', type=int, metavar='N', help='of the CPU (default: all that this process may use)')
    add('--results', metavar='FILE', help='file to write or to go on with (default: results.jsonl beside run.py)')
    add('--limit', type=int, metavar='N', help='stop when N configurations are done, those of earlier runs included')
    add('--warmup', type=int, metavar='N', help='calls before anything is measured (not of trtexec: 200 ms)')
    add('--runs', type=int, metavar='N', help='samples of each network, of which the median counts')
    add('--seconds', type=float, metavar='S', help=f"about how long a sample lasts (default: {BRIEF['seconds']}; trtexec: its own)")
    add('--device', type=int, metavar='N', help='number of the GPU, as nvidia-smi counts')
    add('--level', type=int, metavar='N', help="TensorRT's builder optimisation level, 0 to 5")
    add('--timing-cache', metavar='PATH', help="TensorRT's timing cache, to be read and written")
    add('--cuda-graph', action='store_true', default=None, help='launch networks as CUDA graphs')
    add('--engines', type=int, metavar='N', help='engines to build of each network: the middle one counts')
    add('--program', metavar='FILE', help='the program trtexec, if it is not on the PATH')
    return parser


def main(argv: Optional[Sequence[str]] = None, folder: Optional[Path] = None) -> int:
    """Runs a command line.

    Args:
        argv: The flags, by default those of this process.
        folder: The bundle, by default the folder in which this package lies.

    Returns:
        The exit code: 0; 2 for what the user can mend, 130 after Ctrl-C.
    """
    args = make_parser().parse_args(argv)
    folder = folder or Path(__file__).resolve().parents[1]
    results = Path(args.results) if args.results else folder / 'results.jsonl'
    try:
        manifest = read_manifest(folder)
        if args.limit is not None and args.limit < 1:
            raise RunnerError(f'--limit must be at least 1, not {args.limit}')
        precision = 'fp16' if args.fp16 else manifest.precision
        options = {k: getattr(args, k) for k in DEVICE if getattr(args, k) is not None}
        os.environ.setdefault('CUDA_DEVICE_ORDER', 'PCI_BUS_ID')  # that of nvidia-smi
        backend = open_backend(args.backend, precision=precision, threads=args.threads, **options)
        loop = backend.loop({**backend.brief, **{k: getattr(args, k) for k in LOOP if getattr(args, k, None) is not None}})
        print(measure_bundle(manifest, backend, results, loop, args.limit))
    except RunnerError as e:
        print(f'run.py: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nrun.py: stopped; what was measured is in '{results}'. The same command goes on from there.", file=sys.stderr)
        return 130
    return 0


def measure_bundle(
        manifest: Manifest,
        backend: Backend,
        results: Path,
        loop: Optional[Mapping[str, Any]] = None,
        limit: Optional[int] = None,
) -> str:
    """Measures what is not measured yet, and appends it to a results file.

    Args:
        manifest: The bundle.
        backend: What runs the networks.
        results: The file (see results.py), new or of an earlier run.
        loop: Options of the timing loop.
        limit: Stop when this many configurations are done.

    Returns:
        A line that says what is in the file.

    Raises:
        RunnerError: The file is of another bundle, backend or precision, or is in use; or everything fails, from the beginning or
            from some configuration on. What failed then is not written, and is tried again by the next call.
    """
    loop = dict(loop or {})
    header = {'format': FORMAT, 'manifest': manifest.fingerprint, 'architecture': manifest.data['architecture'],
              'configurations': len(manifest.configurations), 'batch': manifest.batch, 'precision': backend.precision,
              'backend': backend.describe(), 'loop': loop, 'host': host()}
    header = json.loads(json.dumps(header))  # as it will be read back
    manifest.network(0)  # a bundle that is broken is refused before anything is written
    with _opened(results, header, manifest) as (file, found):
        done = {row['index'] for row in (*found.rows, *found.failed)}
        left = [i for i in range(len(manifest.configurations)) if i not in done]
        run = _Run(manifest, backend, loop, file, found)
        run.run(left, max((limit or 10 ** 9) - len(done), 0))
        run.again()
        return run.summary(results)


class _Run:
    """Measures configurations one by one, into an open file."""

    def __init__(self, manifest: Manifest, backend: Backend, loop: Mapping[str, Any], file: BinaryIO, found: Results):
        self.manifest, self.backend, self.loop, self.file, self.found = manifest, backend, loop, file, found
        self.unsure: list[dict[str, Any]] = []  # what failed since something was measured: the network may be wrong, or the device

    def write(self, row: Mapping[str, Any]) -> None:
        try:
            self.file.write(json.dumps(row, allow_nan=False).encode() + b'\n')
            self.file.flush()
        except OSError as e:
            raise RunnerError(f"'{self.file.name}' cannot be written: {e.strerror or e}") from None

    def time(self, index: int) -> dict[str, Any]:
        return self.backend.measure(self.manifest.network(index), self.manifest.batch, **self.loop).to_json()

    def run(self, left: Sequence[int], count: int) -> None:
        """Measures the first of those that are left; where it ends in good order with something left, it says so in the file."""
        todo = left[:count]
        if not todo:
            return
        try:
            if self.found.rows:
                todo = self.resume(todo)
            self.measure(todo)
        except (KeyboardInterrupt, RunnerError):
            self.stop(left)
            raise
        self.stop(left)

    def stop(self, left: Sequence[int]) -> None:
        done = {row['index'] for row in (*self.found.rows, *self.found.failed)}
        if left := [i for i in left if i not in done]:
            self.write({'stopped': left[0]})

    def resume(self, todo: Sequence[int]) -> Sequence[int]:
        """Goes on after an earlier run; a configuration at which the program was killed twice is given up."""
        first = todo[0]
        if not self.found.stopped and self.found.died.get(first, 0):
            self.keep([{**self.row(first), 'error': 'the program was killed at this configuration, twice'}])
            todo = todo[1:]
        if todo:
            self.write({'retry': todo[0]})
        self.reference()
        return todo

    def row(self, index: int) -> dict[str, Any]:
        return {'index': index, 'use': self.manifest.configurations[index].use}

    def keep(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes configurations that were measured or failed."""
        for row in rows:
            self.write(row)
            (self.found.failed if 'error' in row else self.found.rows).append(row)

    def reference(self) -> None:
        """Measures the first configuration again, if it could be measured at all."""
        if any(row['index'] == 0 for row in self.found.rows):
            try:
                row = {'reference': len(self.found.rows) + len(self.found.failed), **self.time(0)}
            except Exception as e:  # as in `one`
                print(f'the first configuration fails now: {first_line(e)}', file=sys.stderr)
                return
            self.write(row)
            self.found.references.append(row)

    def one(self, index: int) -> None:
        """Measures a configuration. That it failed is written when something works after it."""
        row = self.row(index)
        try:
            row |= self.time(index)
        except Exception as e:  # anything: one network that this backend cannot run must not cost the others
            self.unsure.append({**row, 'error': first_line(e)[:500]})
            return
        self.keep([*self.unsure, row])
        self.unsure = []

    def check(self) -> None:
        """Whether the device still works, after failures: a network that was measured once is measured again.

        Raises:
            RunnerError: It does not, or nothing was ever measured.
        """
        if not self.found.rows:
            raise RunnerError(f'the first {len(self.unsure)} configurations all failed, so nothing was measured; the last one '
                              f"with: {self.unsure[-1]['error']}")
        again = self.found.rows[0]['index']
        try:
            self.time(again)
        except Exception as e:  # as in `one`
            raise RunnerError(f'the last {len(self.unsure)} configurations failed, and so does {again}, which '
                              f'was measured before: {first_line(e)}. Run the same command again when the device works') from e
        self.keep(self.unsure)
        self.unsure = []

    def measure(self, todo: Sequence[int]) -> None:
        progress = _Progress(len(todo), len(self.manifest.configurations))
        try:
            for k, index in enumerate(todo):
                if k and k % REFERENCE == 0:
                    self.reference()
                self.one(index)
                if len(self.unsure) >= GIVE_UP:
                    self.check()
                progress.say(k + 1, self.found)
            if self.unsure:
                self.check()
        finally:
            progress.end()

    def again(self) -> None:
        """Times once more what other load disturbed; the calmer timing counts."""
        disturbed = [k for k, row in enumerate(self.found.rows) if row['disturbed']]
        if not disturbed:
            return
        print(f'{len(disturbed)} were disturbed by other load, and are timed once more', file=sys.stderr)
        progress = _Progress(len(disturbed), len(self.manifest.configurations))
        try:
            self.reference()
            for done, k in enumerate(disturbed, 1):
                row = self.found.rows[k]
                found = self.time(row['index'])
                self.write({'again': row['index'], **found})
                if found['spread'] < row['spread']:
                    self.found.rows[k] = {**row, **found}
                if done % REFERENCE == 0 or done == len(disturbed):
                    self.reference()
                progress.say(done, self.found)
        except RunnerError as e:
            print(f'that failed, and what was measured counts: {first_line(e)}', file=sys.stderr)
        finally:
            progress.end()

    def summary(self, results: Path) -> str:
        rows, count = self.found.rows, len(self.manifest.configurations)
        text = f"'{results}': {len(rows)} of {count} configurations measured"
        if self.found.failed:
            text += f", {len(self.found.failed)} failed (the first: {self.found.failed[0]['error']})"
        if disturbed := sum(row['disturbed'] for row in rows):
            text += f', {disturbed} disturbed by other load'
        again = [row['ms'] for row in (*(r for r in rows if r['index'] == 0), *self.found.references)]
        if len(again) > 1:
            text += f'; the first one, {len(again)} times, varied by {(max(again) - min(again)) / median(again):.1%}'
        return text


class _Progress:
    """Tells on stderr how far it is: in place on a terminal, now and then in a log."""

    def __init__(self, todo: int, count: int):
        self.todo, self.count, self.start = todo, count, time.monotonic()
        self.last, self.inline = self.start, sys.stderr.isatty()

    def say(self, done: int, found: Results) -> None:
        now = time.monotonic()
        if not self.inline and now - self.last < SAY and done < self.todo:
            return
        self.last = now
        left = (now - self.start) / done * (self.todo - done)
        latest = f"{found.rows[-1]['ms']:.4g} ms per image" if found.rows else 'none measured'
        failed = f', {len(found.failed)} failed' if found.failed else ''
        text = f'{len(found.rows) + len(found.failed)}/{self.count} ({latest}{failed}), {_clock(left)} left'
        print(f'\r{text:<70}' if self.inline else text, end='' if self.inline else '\n', file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.inline and self.todo:
            print(file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02}:{seconds:02}'


def host() -> dict[str, Any]:
    """The machine and the versions of what runs on it."""
    versions = {}
    for name in ('numpy', 'onnx'):
        if find_spec(name):
            versions[name] = import_module(name).__version__
    return {'system': platform.platform(), 'processor': cpu_name(), 'cores': os.cpu_count(), 'python': platform.python_version(),
            **versions}


@contextmanager
def _opened(path: Path, header: Mapping[str, Any], manifest: Manifest) -> Iterator[tuple[BinaryIO, Results]]:
    """The results file, locked, behind its last whole line; a new one with its header."""
    try:
        file = open(path, 'a+b')
    except OSError as e:
        raise RunnerError(f"'{path}' cannot be written: {e.strerror or e}") from None
    with file:
        _lock(file, path)
        found = None
        file.seek(0)
        start = file.read(2 ** 20)
        if b'\n' in start:
            found = scan_results(path, manifest)
            if found.rows:
                _same(found.header, header, path)
            file.truncate(found.size)
        elif not start.startswith(BEGINNING[:len(start)]):  # else a header that was cut off
            raise RunnerError(f"'{path}' is no results file: give another --results")
        if found is None or not found.rows:  # what failed may have been mended
            file.truncate(0)
            file.write(json.dumps(header).encode() + b'\n')
            file.flush()
            found = Results(header, [], [], [], {}, file.tell())
        yield file, found


def _same(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """Refuses to mix measurements of different things."""
    flat = [{**header, **{f'backend.{k}': v for k, v in header['backend'].items()}, 'backend': None, 'host': None}
            for header in (old, new)]
    for key in sorted({*flat[0], *flat[1]}):
        was, now = (h.get(key) for h in flat)
        if was != now:
            raise RunnerError(f"'{path}' was begun with {key} {str(was)[:80]}, and this is {str(now)[:80]}: give another --results")


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RunnerError(f"another run is writing '{path}'") from None
