"""NVIDIA's program trtexec as a backend.

What counts is its "GPU Compute Time", as in the papers that used it: without copies to and from the GPU.
"""
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Optional

from .base import Backend, Check, check_device, first_line, inspect
from .errors import RunnerError
from .timing import LOOP, Timing, middle_of
from .trtexec_log import GPU, parse_json, parse_log

__all__ = ['Trtexec', 'command']


def command(
        onnx: str,
        precision: str = 'fp32',
        *,
        program: str = 'trtexec',
        load: Optional[str] = None,
        save: Optional[str] = None,
        times: Optional[str] = None,
        shapes: Optional[Mapping[str, Sequence[int]]] = None,
        device: int = 0,
        level: Optional[int] = None,
        timing_cache: Optional[str] = None,
        cuda_graph: bool = False,
        iterations: Optional[int] = None,
        duration: Optional[int] = None,
) -> list[str]:
    """A command line of trtexec.

    Args:
        onnx: File to build an engine of; not read where there is `load`.
        precision: 'fp32', or what else the builder may choose: 'fp16', 'int8' (TensorRT 7 to 10).
        program: The program.
        load: Engine to load.
        save: File to save the engine to.
        times: JSON file for the time of each query.
        shapes: Input -> shape, for files that leave the batch open.
        device: Number of the GPU.
        level: Builder optimisation level, 0 to 5 (TensorRT 8.6 and later).
        timing_cache: File of the timing cache, read and written (TensorRT 8.0 and later).
        cuda_graph: Launch the network as a CUDA graph.
        iterations: Queries at least; None: its default, 10.
        duration: Seconds at least; None: its default, 3.
    """
    found = [program, f'--loadEngine={load}' if load else f'--onnx={onnx}', f'--device={device}']
    if not load:
        found += [f'--{precision}'] if precision != 'fp32' else []
        found += [f'--builderOptimizationLevel={level}'] if level is not None else []
        found += [f'--timingCacheFile={timing_cache}'] if timing_cache else []
        found += [f'--saveEngine={save}'] if save else []
    if shapes:
        found.append('--shapes=' + ','.join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items()))
    found += ['--useCudaGraph'] if cuda_graph else []
    found += [f'--exportTimes={times}'] if times else []
    found += [f'--iterations={iterations}'] if iterations is not None else []
    found += [f'--duration={duration}'] if duration is not None else []
    return found


class Trtexec(Backend):
    """The program trtexec. It cannot compare outputs, and networks do not take turns.

    Args:
        name: 'trtexec'.
        precision: As in `Backend`; where the program has no --fp16 (TensorRT 11), the file must be float16 itself.
        threads: None.
        program: Its name or path.
        device: As in `command`.
        level: As in `command`.
        timing_cache: As in `command`.
        cuda_graph: As in `command`.
        engines: How many engines to build: the middle one counts, `Timing.builds` has all.
        timeout: Seconds that a build and its run may take.

    Raises:
        RunnerError: The program is not there, or is too old or too new for an option.
    """
    gpu = True
    # its own 10 iterations in 3 s; its warm-up of 200 ms stays
    defaults = {**{k: v for k, v in LOOP.items() if k != 'warmup'}, 'runs': 10, 'seconds': 0.3}
    brief: Mapping[str, Any] = {}

    def __init__(
            self,
            name: str = 'trtexec',
            precision: str = 'fp32',
            threads: Optional[int] = None,
            program: str = 'trtexec',
            device: int = 0,
            level: Optional[int] = None,
            timing_cache: Optional[str] = None,
            cuda_graph: bool = False,
            engines: int = 1,
            timeout: float = 3600,
    ):
        super().__init__(name, precision, threads)
        found = shutil.which(program)
        if not found:
            raise RunnerError(f"the program '{program}' is not on the PATH: it comes with TensorRT (in its folder bin, and in "
                              "NVIDIA's TensorRT containers)")
        if engines < 1 or engines > 1 and timing_cache:
            raise RunnerError('engines must be at least 1; several with a timing cache would all choose the same kernels')
        self.program, self.engines, self.timeout = found, engines, timeout
        self.device = check_device(device)
        self.given = {'device': device, 'level': level, 'timing_cache': timing_cache, 'cuda_graph': cuda_graph}
        said = self._call([found, '--help'])
        self.known = set(re.findall(r'--\w+', said))
        self.version = next((run.version for run in parse_log(said) if run.version), None)
        self.flag = precision == 'fp32' or f'--{precision}' in self.known
        if self.known:
            line = command('x', precision if self.flag else 'fp32', times='x', save='x', iterations=1, duration=1, **self.given)
            if missing := [o for o in (a.partition('=')[0] for a in line[1:]) if o not in self.known]:
                raise RunnerError(f"{found} of TensorRT {self.version or 'unknown'} has no {missing[0]}")

    def describe(self) -> dict[str, Any]:
        """As `Backend.describe`."""
        line = command('FILE', self.precision if self.flag else 'fp32', **self.given)
        return {**super().describe(), 'tensorrt': self.version or 'unknown', 'command': ' '.join(line), 'engines': self.engines,
                'measures': f'median {GPU}'}

    def measure_all(
            self,
            models: Mapping[str, bytes],
            batch: Optional[int] = None,
            checks: Optional[Mapping[str, Check]] = None,
            **loop: Any,
    ) -> dict[str, Timing]:
        """As `Backend.measure_all`, but one after the other; `runs` is the least number of them, `runs * seconds` how long."""
        loop = self.loop(loop)
        return {name: self._measure(model, batch, **loop) for name, model in models.items()}

    def _measure(self, model: bytes, batch: Optional[int], runs: int, seconds: float, max_spread: float, attempts: int) -> Timing:
        graph = inspect(model)
        shapes = graph.at(batch)
        if not self.flag and graph.precision != self.precision:
            raise RunnerError(f'TensorRT {self.version} computes in the precision of the file, and this one is {graph.precision}: '
                              f'export it in {self.precision}')
        if self.precision == 'fp32' and graph.precision != 'fp32':
            raise RunnerError(f'the file is {graph.precision}: ask for {graph.precision}, not fp32')
        still_open = any(shape[0] is None for shape, _ in graph.inputs.values())
        timings = []
        with tempfile.TemporaryDirectory(prefix='trtexec-') as folder:
            files = {kind: str(Path(folder) / f'model.{kind}') for kind in ('onnx', 'engine', 'json')}
            Path(files['onnx']).write_bytes(model)
            for _ in range(self.engines):
                best: Optional[Timing] = None
                made = 0
                while made < attempts and (best is None or best.disturbed):
                    engine = {'load': files['engine']} if made else {'save': files['engine']}  # the same engine again
                    found = self._run(command(
                        files['onnx'], self.precision if self.flag else 'fp32', program=self.program, times=files['json'],
                        shapes=shapes if still_open else None, iterations=runs, duration=math.ceil(runs * seconds),
                        **engine, **self.given), files['json'], next(iter(shapes.values()))[0], max_spread)
                    made += 1
                    best = found if best is None or found.spread < best.spread else best
                timings.append(replace(best, attempts=made))
        return middle_of(timings)

    def _run(self, line: Sequence[str], times: str, batch: int, max_spread: float) -> Timing:
        """Runs it once: the median that it prints, the rest of the times that it wrote."""
        log = parse_log(self._call(line))
        if len(log) != 1:
            raise RunnerError(f'trtexec printed {len(log)} runs instead of one')
        told = log[0].gpu_ms
        if log[0].status != 'PASSED':
            raise RunnerError('trtexec ended before it was done')
        try:
            (kind, samples), = parse_json(Path(times).read_text())
        except (OSError, ValueError) as e:
            raise RunnerError(f'trtexec wrote no times: {first_line(e)}') from e
        if kind != 'times':
            raise RunnerError(f'trtexec wrote {kind} instead of times')
        if abs(median(samples) / told - 1) > 0.01:  # TensorRT 7 counts the warm-up, too; later ones agree to all digits
            raise RunnerError(f'trtexec printed a median {GPU} of {told} ms, and wrote times with {median(samples)} ms')
        return Timing(**{**vars(Timing.of(samples, batch, max_spread)), 'batch_ms': told})

    def _call(self, line: Sequence[str]) -> str:
        try:
            done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=self.timeout, errors='replace')
        except subprocess.TimeoutExpired:
            raise RunnerError(f'trtexec was stopped after {self.timeout} s: raise timeout, or lower level') from None
        except OSError as e:
            raise RunnerError(f"'{line[0]}' cannot be run: {e.strerror or e}") from e
        if done.returncode:
            reason = next((run.errors[0] for run in parse_log(done.stdout) if run.errors), None)
            lines = done.stdout.strip().splitlines()
            raise RunnerError(f'trtexec failed (exit code {done.returncode}): {reason or (lines or ["it said nothing"])[-1][:300]}')
        return done.stdout
