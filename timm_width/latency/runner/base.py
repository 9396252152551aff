"""What all backends share: what an ONNX file says about itself, inputs to run it on, checks of what comes out, and the machine."""
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from .errors import RunnerError
from .timing import BRIEF, LOOP, Timing, time_calls

__all__ = [
    'PRECISIONS', 'Backend', 'Check', 'Graph', 'as_runner_error', 'check_device', 'check_outputs', 'cpu_name', 'first_line',
    'gpu_name', 'inspect', 'make_inputs', 'usable_cpus',
]

PRECISIONS = ('fp32', 'fp16', 'int8')
# how far an output may be from the expected one, as a share of the largest: TF32 and float16 have 11 bits
TOLERANCE = {'fp32': 1e-2, 'fp16': 5e-2, 'int8': 0.5}
SEED = 0

Check = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Graph:
    """What an ONNX file says about itself.

    Args:
        inputs: Name -> (shape, type); None for a dimension that may be anything.
        precision: That of its weights; int8, if values are quantized in the graph.
    """
    inputs: Mapping[str, tuple[tuple[Optional[int], ...], np.dtype]]
    precision: str

    def at(self, batch: Optional[int]) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs for a batch, by default that of the file.

        Raises:
            RunnerError: The file runs other batches only, or leaves more open than the batch.
        """
        found = {}
        for name, (shape, _) in self.inputs.items():
            if not shape or None in shape[1:]:
                raise RunnerError(f"the ONNX file leaves the shape of '{name}' open: {shape}; only the batch may be")
            if shape[0] is None and batch is None:
                raise RunnerError('the ONNX file runs any batch: say which one to measure')
            if shape[0] is not None and batch is not None and shape[0] != batch:
                raise RunnerError(f"the ONNX file runs batches of {shape[0]}, not {batch}: export it for that, or for any batch")
            found[name] = (batch if shape[0] is None else shape[0], *shape[1:])
        return found


class Backend:
    """Something that runs ONNX files.

    Args:
        name: What it is called.
        precision: In what it computes.
        threads: Of the CPU, where it computes there; None: all that this process may use.

    Attributes:
        precisions: In what it can compute.
        gpu: Whether it computes on a GPU, whose number is then `device`.
        defaults: The options of its timing loop.
        brief: Those that are others where thousands of networks are measured.

    Raises:
        RunnerError: It is not installed (the message says what to install), or does not offer that.
    """
    precisions: tuple[str, ...] = PRECISIONS
    gpu = False
    device = 0
    defaults: Mapping[str, Any] = LOOP
    brief: Mapping[str, Any] = BRIEF

    def __init__(self, name: str, precision: str = 'fp32', threads: Optional[int] = None):
        if precision not in self.precisions:
            raise RunnerError(f"{name} measures {' or '.join(self.precisions)}, not {precision!r}")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise RunnerError(f'threads must be a whole number of at least 1, not {threads!r}')
        self.name, self.precision, self.threads = name, precision, threads

    def describe(self) -> dict[str, Any]:
        """Everything that a measurement needs to be repeated: device, driver, versions, flags. It can be written as JSON."""
        device = gpu_name(self.device) if self.gpu else {'device': cpu_name()}
        return {'backend': self.name, 'precision': self.precision, **device, 'system': platform.platform(),
                'python': platform.python_version()}

    def loop(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options of its timing loop: those given, its own for the others.

        Raises:
            RunnerError: It has no such option.
        """
        if wrong := [name for name in given if name not in self.defaults]:
            raise RunnerError(f"{self.name} has no '{wrong[0]}' of the timing loop: there are {', '.join(self.defaults)}")
        return {**self.defaults, **given}

    def prepare(self, model: bytes, batch: Optional[int] = None, check: Optional[Check] = None) -> AbstractContextManager:
        """Loads a file for as long as the context lasts.

        Args:
            model: An ONNX file.
            batch: Images per call; None: the file's.
            check: Images, and what the first output must be on them. It must be finite in any case.

        Returns:
            A context manager, whose value is a call for `time_calls`.

        Raises:
            RunnerError: The file cannot be run, or computes something else.
        """
        raise NotImplementedError

    def measure(self, model: bytes, batch: Optional[int] = None, check: Optional[Check] = None, **loop: Any) -> Timing:
        """Times a file.

        Args:
            model: An ONNX file.
            batch: Images per call; None: the file's.
            check: As in `prepare`.
            **loop: Options of `time_calls`.

        Raises:
            RunnerError: The file cannot be run, or computes something else, or an option makes no sense.
        """
        return self.measure_all({'model': model}, batch, None if check is None else {'model': check}, **loop)['model']

    def measure_all(
            self,
            models: Mapping[str, bytes],
            batch: Optional[int] = None,
            checks: Optional[Mapping[str, Check]] = None,
            **loop: Any,
    ) -> dict[str, Timing]:
        """Times files next to one another, as `measure` does one."""
        batch = batch or max((shape[0] for m in models.values() for shape in inspect(m).at(None).values()), default=1)
        with ExitStack() as stack:
            calls = {name: stack.enter_context(self.prepare(model, batch, (checks or {}).get(name)))
                     for name, model in models.items()}
            return time_calls(calls, batch=batch, **self.loop(loop))


def inspect(model: bytes) -> Graph:
    """Reads an ONNX file.

    Raises:
        RunnerError: It is not one, or not all of one; it takes inputs other than float32 or float16.
    """
    try:
        import onnx
    except ImportError:
        raise RunnerError('onnx is not installed: pip install onnx') from None
    try:
        proto = onnx.load_model_from_string(model)
    except Exception as e:  # of protobuf, whose errors depend on its implementation
        raise RunnerError(f'this is not a complete ONNX file ({len(model)} bytes): {first_line(e)}') from e
    graph = proto.graph
    weights = {t.name for t in graph.initializer}
    given = [v for v in graph.input if v.name not in weights]
    if not graph.node or not graph.output or not given or not proto.opset_import:
        raise RunnerError(f'this is not a complete ONNX file ({len(model)} bytes): it has no nodes, inputs, outputs or versions')
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in graph.initializer):
        raise RunnerError('the ONNX file has its weights in another file: save it in one')
    types = {onnx.TensorProto.FLOAT: np.dtype(np.float32), onnx.TensorProto.FLOAT16: np.dtype(np.float16)}
    inputs = {}
    for value in given:
        tensor = value.type.tensor_type
        if tensor.elem_type not in types:
            raise RunnerError(f"input '{value.name}' of the ONNX file must be float32 or float16")
        shape = tuple(d.dim_value if d.HasField('dim_value') and d.dim_value > 0 else None for d in tensor.shape.dim)
        inputs[value.name] = shape, types[tensor.elem_type]
    sizes = {kind: sum(int(np.prod(t.dims)) for t in graph.initializer if t.data_type == kind) for kind in types}
    half = sizes[onnx.TensorProto.FLOAT16] > sizes[onnx.TensorProto.FLOAT]
    quantized = any(node.op_type == 'DequantizeLinear' for node in graph.node)
    return Graph(inputs, 'int8' if quantized else 'fp16' if half else 'fp32')


def make_inputs(graph: Graph, shapes: Mapping[str, Sequence[int]], check: Optional[Check] = None) -> dict[str, np.ndarray]:
    """Images to run a file on: those to check it with, or random ones, always the same."""
    random = np.random.default_rng(SEED)
    found = {name: random.standard_normal(shape, dtype=np.float32).astype(graph.inputs[name][1]) for name, shape in shapes.items()}
    if check is not None:
        (name, shape), *others = shapes.items()
        if others or tuple(shape) != check[0].shape:
            raise RunnerError(f"the ONNX file takes {dict(shapes)}, and the images to check it with are {check[0].shape}")
        found[name] = np.ascontiguousarray(check[0], dtype=graph.inputs[name][1])
    return found


def check_outputs(outputs: Sequence[np.ndarray], precision: str, check: Optional[Check] = None) -> None:
    """Refuses outputs that are not finite, and a first output that is not the expected one.

    Raises:
        RunnerError: They are, or it is not.
    """
    if not outputs or not all(np.isfinite(y).all() for y in outputs):
        raise RunnerError('the outputs are not finite: the file, or this precision, does not work here')
    if check is None:
        return
    found, wanted = np.asarray(outputs[0], np.float64), np.asarray(check[1], np.float64)
    if found.shape != wanted.shape:
        raise RunnerError(f'the output has shape {found.shape}, and should have {wanted.shape}')
    difference = np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-6)
    if not difference <= TOLERANCE[precision]:
        raise RunnerError(f'the output differs from the expected one by {difference:.1e} of the largest value, more than '
                          f'{TOLERANCE[precision]} ({precision}): the time of a wrong network is worth nothing')


def cpu_name() -> str:
    """The name of the processor."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    found = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(found, '') or platform.processor() or platform.machine()


def gpu_name(index: int = 0) -> dict[str, str]:
    """Name and driver of a GPU, from nvidia-smi; `unknown` where that is not there (Jetson), or does not know it.

    Args:
        index: CUDA's number of it: CUDA_VISIBLE_DEVICES, if set, says which cards are counted, by their numbers or UUIDs.
    """
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    wanted = str(index) if visible is None else (visible.split(',') + [''] * index)[index].strip()
    program = shutil.which('nvidia-smi')
    if program and wanted:
        query = [program, '--query-gpu=index,uuid,name,driver_version', '--format=csv,noheader']
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        rows = [line.split(', ') for line in done.stdout.splitlines()] if done is not None and not done.returncode else []
        for number, uuid, name, driver in (row for row in rows if len(row) == 4):
            if wanted == number or wanted.startswith('GPU-') and uuid.startswith(wanted):  # CUDA takes the beginning of a UUID
                return {'device': name, 'driver': driver}
    return {'device': 'unknown GPU', 'driver': 'unknown'}


def check_device(device: Any) -> int:
    """A number of a GPU.

    Raises:
        RunnerError: It is none.
    """
    if isinstance(device, bool) or not isinstance(device, int) or device < 0:
        raise RunnerError(f'device must be the number of a GPU, 0 or more, not {device!r}')
    return device


def usable_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def first_line(error: BaseException) -> str:
    """What an error says first, or what it is called if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def as_runner_error(what: str) -> Iterator[None]:
    """Turns whatever a library raises into one line."""
    try:
        yield
    except RunnerError:
        raise
    except Exception as e:  # onnxruntime's and pybind's errors share no class but this
        raise RunnerError(f'{what}: {first_line(e)}') from e

