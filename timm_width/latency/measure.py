"""Measures networks on this machine: torch, and through an ONNX file every backend of the runner, by one timing loop.

    timm_width.latency.measure(model, backend='onnxruntime', batch=1).ms
"""
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import timm
import torch
from timm.data import resolve_data_config
from timm.utils.model import reparameterize_model
from torch import nn

from ..data import UsageError, first_line
from ..onnx_file import check_range, halve, write_onnx
from .runner.backends import BACKENDS, open_backend, unknown
from .runner.base import check_outputs, cpu_name, inspect
from .runner.manifest import FILE_PRECISIONS, MAX_INPUT
from .runner.timing import LOOP, PRESETS, Timing, time_calls

__all__ = [
    'BACKEND_NAMES', 'TORCH', 'Measurement', 'check_backend', 'describe', 'measure', 'measure_many', 'usual_batch',
]

TORCH = ('torch', 'torch-compile')
BACKEND_NAMES = (*TORCH, *BACKENDS)
ON_CPU = ('onnxruntime',)
SEED = 0

Model = Union[nn.Module, str, Path]


@dataclass(frozen=True, repr=False)
class Measurement:
    """What was measured, and everything to measure it again.

    Args:
        timing: The times.
        backend: Name, device, driver, versions and flags of what ran the network.
        precision: In what it computed.
        batch: Images per call.
        input_size: (channels, height, width).
        loop: Options of the timing loop.
    """
    timing: Timing
    backend: Mapping[str, Any]
    precision: str
    batch: int
    input_size: tuple[int, ...]
    loop: Mapping[str, Any]

    @property
    def ms(self) -> float:
        """Median milliseconds per image."""
        return self.timing.ms

    @property
    def batch_ms(self) -> float:
        """Median milliseconds per batch."""
        return self.timing.batch_ms

    @property
    def spread(self) -> float:
        """Distance of the samples' quartiles, as a share of the median."""
        return self.timing.spread

    @property
    def disturbed(self) -> bool:
        """Whether the samples lie too far apart, however often they were taken."""
        return self.timing.disturbed

    def __str__(self) -> str:
        return (f"{self.ms:.3f} ms ±{self.spread:.0%} per image{' (disturbed)' * self.disturbed}, {self.backend['backend']}, "
                f"{self.precision}, batch {self.batch}, {self.backend['device']}")

    def __repr__(self) -> str:
        return f'<{self}>'

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {**asdict(self), 'timing': self.timing.to_json(), 'input_size': list(self.input_size)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> 'Measurement':
        """Of what a file says.

        Raises:
            UsageError: Something is missing or is not what it should be.
        """
        try:
            return cls(Timing.from_json(found['timing']), dict(found['backend']), str(found['precision']), int(found['batch']),
                       tuple(int(n) for n in found['input_size']), dict(found['loop']))
        except (KeyError, TypeError, OverflowError) as e:
            raise UsageError(f'not a measurement: {first_line(e)}') from e


def measure(
        model: Model,
        input: Optional[Sequence[int]] = None,
        backend: Optional[str] = None,
        precision: Optional[str] = None,
        batch: Optional[int] = None,
        device: Optional[str] = None,
        preset: Optional[str] = None,
        threads: Optional[int] = None,
        **options: Any,
) -> Measurement:
    """Measures the latency of a network.

    Args:
        model: A model, which is not changed (re-parameterisable ones are measured in their deployed form), or an ONNX file.
        input: (channels, height, width); by default the model's own.
        backend: One of BACKEND_NAMES; by default the preset's, or 'torch' ('onnxruntime' for a file).
        precision: 'fp32', 'fp16', or 'int8' of a quantized file; by default the preset's, or 'fp32' (the file's).
        batch: Images per call; by default the preset's, or that of the file, or `usual_batch`.
        device: Of torch: 'cpu', 'cuda' and so on; by default where the model is. Other backends say it by their names;
            'cuda:1' says which GPU.
        preset: A key of PRESETS: what a paper measured.
        threads: Of the CPU; by default all of torch's, and for ONNX Runtime all that this process may use.
        **options: Those of `time_calls` (warmup, runs, seconds, max_spread, attempts), and of the backend's class.

    Raises:
        UsageError: Something given makes no sense, or the model cannot be run.
        RunnerError: The backend is not known, not installed, or cannot run the model.
    """
    return measure_many({'model': model}, input, backend, precision, batch, device, preset, threads, **options)['model']


def measure_many(
        models: Mapping[str, Model],
        input: Optional[Sequence[int]] = None,
        backend: Optional[str] = None,
        precision: Optional[str] = None,
        batch: Optional[int] = None,
        device: Optional[str] = None,
        preset: Optional[str] = None,
        threads: Optional[int] = None,
        **options: Any,
) -> dict[str, Measurement]:
    """Measures networks next to one another: they take turns (but for trtexec), so that other load meets all alike.

    Args:
        models: Name -> network; all take the same input. The others are as in `measure`.
        input: As in `measure`; by default that of the first.
        backend: As in `measure`.
        precision: As in `measure`.
        batch: As in `measure`.
        device: As in `measure`.
        preset: As in `measure`.
        threads: As in `measure`.
        **options: As in `measure`.

    Raises:
        UsageError: As in `measure`.
        RunnerError: As in `measure`.
    """
    if not isinstance(models, Mapping):
        raise UsageError(f'networks are given as a dict of name -> network, not as {type(models).__name__}')
    if not models:
        return {}
    if wrong := next((m for m in models.values() if not isinstance(m, (nn.Module, str, Path))), None):
        raise UsageError(f'a network is a torch module or an ONNX file, not {type(wrong).__name__}')
    if preset is not None and preset not in PRESETS:
        raise UsageError(unknown('preset', preset, PRESETS))
    chosen = dict(PRESETS[preset]) if preset else {}
    first = next(iter(models.values()))
    backend = backend or chosen.get('backend') or ('torch' if isinstance(first, nn.Module) else 'onnxruntime')
    if backend not in BACKEND_NAMES:
        raise UsageError(unknown('backend', backend, BACKEND_NAMES))
    loop = {k: options.pop(k, chosen.get(k)) for k in LOOP if k in options or k in chosen}
    files = {name: _read(model) for name, model in models.items() if not isinstance(model, nn.Module)}
    precision = precision or chosen.get('precision') or (inspect(files[next(iter(files))]).precision if files else 'fp32')
    batch = chosen.get('batch') if batch is None else batch
    device = chosen.get('device') if device is None and backend in TORCH else device
    size = _input_size(models, files, input)
    if batch is None:
        own = {shape[0] for model in files.values() for shape, _ in inspect(model).inputs.values()} - {None}
        batch = own.pop() if len(own) == 1 else usual_batch(_where(backend, device, first))
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1 or batch * int(np.prod(size)) > MAX_INPUT:
        raise UsageError(f'batch must be a whole number of at least 1, and its images must fit: {batch!r} of {size}')
    if backend in TORCH:
        timings, told, loop = _by_torch(models, size, backend, precision, batch, device, threads, loop, options)
    else:
        timings, told, loop = _by_onnx(models, files, size, backend, precision, batch, device, threads, loop, options)
    return {name: Measurement(timing, told, precision, batch, size, loop) for name, timing in timings.items()}


def check_backend(name: str, precision: str = 'fp32', device: str = 'cpu') -> None:
    """Raises what `measure` would, where a backend is not installed or cannot compute so: before hours of training."""
    if name in TORCH:
        _check_torch(name, precision, device)
    else:
        open_backend(name, precision=precision, **_number(name, device))


def describe(backend: str, precision: str = 'fp32', device: str = 'cpu', threads: Optional[int] = None) -> dict[str, Any]:
    """What a time is worth nothing without: device, versions, flags.

    Args:
        backend: One of BACKEND_NAMES.
        precision: 'fp32', 'fp16' or 'int8'.
        device: As in `measure`.
        threads: Of the CPU.

    Raises:
        UsageError, RunnerError: As `check_backend`.
    """
    if backend not in TORCH:
        return open_backend(backend, precision=precision, threads=threads, **_number(backend, device)).describe()
    with _threads(threads):
        name = torch.cuda.get_device_name(device) if 'cuda' in device else cpu_name()
        told = {'backend': backend, 'precision': precision, 'device': name, 'threads': torch.get_num_threads(),
                'torch': torch.__version__, 'timm': timm.__version__, 'python': platform.python_version(),
                'system': platform.platform()}
    if 'cuda' in device:
        told |= {'cuda': torch.version.cuda, 'cudnn': torch.backends.cudnn.version(), 'tf32': torch.backends.cudnn.allow_tf32,
                 'cudnn_benchmark': torch.backends.cudnn.benchmark}
    return told


def usual_batch(device: str) -> int:
    """Images per timed call: those of AOWS (appendix C)."""
    return 16 if 'cuda' in device else 1


def _number(backend: str, device: Optional[str]) -> dict[str, int]:
    """The option of a backend of the runner that says which GPU, if `device` does: 'cuda:1'."""
    kind, _, number = str(device).partition(':')
    if backend in ON_CPU or kind != 'cuda' or not number:
        return {}
    if not number.isdecimal():
        raise UsageError(f"device '{device}' cannot be used here: say cuda or, as in cuda:1, which GPU")
    return {'device': int(number)}


def _where(backend: str, device: Optional[str], model: Model) -> str:
    """'cpu' or 'cuda...': where a backend computes."""
    if backend not in TORCH:
        return 'cpu' if backend in ON_CPU else 'cuda'
    if device is not None:
        return str(device)
    return str(next((p.device for p in model.parameters()), 'cpu')) if isinstance(model, nn.Module) else 'cpu'


def _read(path: Union[str, Path]) -> bytes:
    """An ONNX file, with the weights that may lie beside it."""
    try:
        content = Path(path).read_bytes()
    except OSError as e:
        raise UsageError(f"'{path}' is no ONNX file that can be read ({e.strerror or e}); give models as modules, by "
                         'timm.create_model') from e
    try:
        inspect(content)
    except ValueError as e:
        if 'another file' not in str(e):
            raise UsageError(f"'{path}': {e}") from e
        import onnx
        try:
            content = onnx.load(str(path)).SerializeToString()
        except Exception as e:  # of protobuf, of the file system, of onnx's own checks
            raise UsageError(f"'{path}': {first_line(e)}") from e
    return content


def _input_size(models: Mapping[str, Model], files: Mapping[str, bytes], given: Optional[Sequence[int]]) -> tuple[int, ...]:
    size = None if given is None else tuple(given) if isinstance(given, Sequence) else (given,)
    if size is not None and (len(size) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size)):
        raise UsageError(f'input must be (channels, height, width), whole numbers of at least 1, not {given!r}')
    for name, content in files.items():
        for shape, _ in inspect(content).inputs.values():
            if None in shape[1:]:
                raise UsageError(f"'{models[name]}' leaves its input open: {shape}; only the batch may be")
            if size is not None and shape[1:] != size:
                raise UsageError(f"'{models[name]}' takes images of {shape[1:]}, not {size}")
            size = shape[1:]
    if size is None:
        size = tuple(resolve_data_config({}, model=next(iter(models.values())), verbose=False)['input_size'])
    return size


def _network(model: nn.Module, device: str) -> nn.Module:
    """A copy in its deployed form, ready to run."""
    try:
        return reparameterize_model(model).float().to(device).eval()  # a copy
    except Exception as e:  # of torch.cuda, or of a fusion of the model's own
        raise UsageError(f"the model cannot be brought to '{device}': {first_line(e)}") from e


def _check_torch(name: str, precision: str, device: str) -> None:
    if precision not in FILE_PRECISIONS:
        raise UsageError(f'{name} measures fp32 or fp16, not {precision!r}')
    try:
        torch.empty(0, device=device)
    except Exception as e:
        raise UsageError(f"device '{device}' cannot be used here: {first_line(e)}") from e
    if precision == 'fp16' and 'cuda' not in device:
        raise UsageError(f"{name} measures fp16 on CUDA only, not on '{device}': ask for fp32")


def _by_torch(
        models: Mapping[str, Model],
        size: tuple[int, ...],
        backend: str,
        precision: str,
        batch: int,
        device: Optional[str],
        threads: Optional[int],
        loop: Mapping[str, Any],
        options: Mapping[str, Any],
) -> tuple[dict[str, Timing], dict[str, Any], dict[str, Any]]:
    if wrong := [name for name, model in models.items() if not isinstance(model, nn.Module)]:
        raise UsageError(f"'{models[wrong[0]]}' is no torch model: {backend} cannot run it; {', '.join(BACKENDS)} can")
    if options:
        raise UsageError(unknown(f'option of {backend}', next(iter(options)), LOOP))
    device = _where(backend, device, next(iter(models.values())))
    _check_torch(backend, precision, device)
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(batch, *size, generator=generator).to(device)
    if precision == 'fp16':
        images = images.half()
    cuda = images.is_cuda
    with _threads(threads), torch.inference_mode():
        calls = {}
        for name, model in models.items():
            network = _network(model, device)
            if precision == 'fp16':
                network.half()
            if backend == 'torch-compile':  # the whole graph: where torch gives up it would go on uncompiled
                network = torch.compile(network, fullgraph=True, dynamic=False)
            calls[name] = _call(network, images, cuda)
            _run(calls[name], size)
        loop = {**LOOP, **loop}
        return time_calls(calls, batch=batch, **loop), describe(backend, precision, device), loop


def _call(network: nn.Module, images: torch.Tensor, cuda: bool) -> Any:
    def call() -> None:
        network(images)
        if cuda:
            torch.cuda.synchronize(images.device)

    return call


def _run(call: Any, size: tuple[int, ...]) -> None:
    """The first run, which is compiled, or fails."""
    try:
        call()
    except Exception as e:  # anything: it runs the model's code, and compilers
        raise UsageError(f'the model cannot run on images of {size}: {first_line(e)}') from e


@contextmanager
def _threads(count: Optional[int]) -> Iterator[None]:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise UsageError(f'threads must be a whole number of at least 1, not {count!r}')
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)


def _by_onnx(
        models: Mapping[str, Model],
        files: Mapping[str, bytes],
        size: tuple[int, ...],
        backend: str,
        precision: str,
        batch: int,
        device: Optional[str],
        threads: Optional[int],
        loop: Mapping[str, Any],
        options: Mapping[str, Any],
) -> tuple[dict[str, Timing], dict[str, Any], dict[str, Any]]:
    if device is not None and ('cuda' in str(device)) != (_where(backend, None, '') == 'cuda'):
        raise UsageError(f"{backend} does not compute on '{device}': its name says where; there are {', '.join(BACKENDS)}")
    opened = open_backend(backend, precision=precision, threads=threads, **_number(backend, device), **options)
    loop = opened.loop(loop)
    if precision not in FILE_PRECISIONS and len(files) < len(models):
        raise UsageError(f'{precision} needs a quantized ONNX file; models are exported in fp32 or fp16')
    contents, checks = {}, {}
    for name, model in models.items():
        if name in files:
            contents[name] = files[name]
        else:
            contents[name], checks[name] = _export(model, size, batch, precision)
    return opened.measure_all(contents, batch, checks, **loop), opened.describe(), loop


def _export(model: nn.Module, size: tuple[int, ...], batch: int, precision: str) -> tuple[bytes, tuple[np.ndarray, np.ndarray]]:
    """An ONNX file of a model, and what it must compute."""
    network = _network(model, 'cpu')
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(SEED))
    expected: list[Any] = []
    with torch.inference_mode():
        _run(lambda: expected.append(network(images)), size)
    if not isinstance(expected[0], torch.Tensor):
        raise UsageError('the model has several outputs: it cannot be exported')
    check_outputs([expected[0].numpy()], 'fp32')
    with tempfile.TemporaryDirectory(prefix='timm-width-') as folder:
        written = Path(folder) / 'float32' / 'model.onnx'
        written.parent.mkdir()
        write_onnx(network, images, written)
        if precision == 'fp16':
            (Path(folder) / 'float16').mkdir()
            check_range(written, images.numpy())
            written = halve(written, Path(folder) / 'float16' / 'model.onnx')
        return _read(written), (images.numpy(), expected[0].numpy())
