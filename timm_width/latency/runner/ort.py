"""ONNX Runtime: on the CPU, on CUDA, and its TensorRT provider.

A file is run in the precision that it has; only the TensorRT provider can choose float16 kernels for a float32 file.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

from .base import Backend, Check, as_runner_error, check_device, check_outputs, inspect, make_inputs, usable_cpus
from .errors import RunnerError

__all__ = ['OnnxRuntime']

PROVIDERS = {
    'onnxruntime': 'CPUExecutionProvider',
    'onnxruntime-cuda': 'CUDAExecutionProvider',
    'onnxruntime-tensorrt': 'TensorrtExecutionProvider',
}


class OnnxRuntime(Backend):
    """ONNX Runtime.

    Args:
        name: A key of PROVIDERS.
        precision: As in `Backend`.
        threads: As in `Backend`.
        device: Number of the GPU, by default 0; not for the CPU.
        level: The TensorRT provider's builder optimisation level, 0 to 5; None: its default.
        timing_cache: Folder of its timing cache; None: none.

    Raises:
        RunnerError: It is not installed, or was built without that provider; an option is not for this provider.
    """

    def __init__(
            self,
            name: str,
            precision: str = 'fp32',
            threads: Optional[int] = None,
            device: Optional[int] = None,
            level: Optional[int] = None,
            timing_cache: Optional[str] = None,
    ):
        super().__init__(name, precision, threads)
        self.provider, self.gpu = PROVIDERS[name], name != 'onnxruntime'
        if device is not None and not self.gpu:
            raise RunnerError(f"{name} computes on the CPU: device is for {', '.join(n for n in PROVIDERS if n != name)}")
        self.device = check_device(device or 0)
        self.tensorrt = name == 'onnxruntime-tensorrt'
        if not self.tensorrt and (level is not None or timing_cache is not None):
            raise RunnerError(f'level and timing_cache are for TensorRT, not for {name}')
        package = 'onnxruntime-gpu' if self.gpu else 'onnxruntime'
        try:
            import onnxruntime
        except ImportError:
            raise RunnerError(f'onnxruntime is not installed: pip install {package}') from None
        self.runtime = onnxruntime
        if self.provider not in onnxruntime.get_available_providers():
            raise RunnerError(f'the installed onnxruntime has no {self.provider}: pip uninstall onnxruntime, then '
                              f'pip install {package}')
        if self.gpu and hasattr(onnxruntime, 'preload_dlls'):
            onnxruntime.preload_dlls()  # CUDA and cuDNN of pip packages, which are on no path
        self.options: dict[str, str] = {'device_id': str(self.device)} if self.gpu else {}
        if self.tensorrt:
            self.options |= {'trt_fp16_enable': str(precision == 'fp16'), 'trt_int8_enable': str(precision == 'int8')}
            if level is not None:
                self.options['trt_builder_optimization_level'] = str(level)
            if timing_cache is not None:
                self.options |= {'trt_timing_cache_enable': 'True', 'trt_timing_cache_path': str(timing_cache)}
        self.threads = self.threads or usable_cpus()

    def describe(self) -> dict[str, Any]:
        """As `Backend.describe`."""
        return {**super().describe(), 'onnxruntime': self.runtime.__version__, 'provider': self.provider,
                'options': dict(self.options), 'threads': self.threads}

    @contextmanager
    def prepare(self, model: bytes, batch: Optional[int] = None, check: Optional[Check] = None) -> Iterator[Any]:
        """As `Backend.prepare`."""
        graph = inspect(model)
        if graph.precision != self.precision and not (self.tensorrt and (graph.precision, self.precision) == ('fp32', 'fp16')):
            raise RunnerError(f'{self.name} computes in the precision of the file, and this one is {graph.precision}, not '
                              f"{self.precision}: export it in {self.precision}, or ask for {graph.precision}")
        inputs = make_inputs(graph, graph.at(batch), check)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = self.threads, 1, 4
        session = self._open(model, options)
        with as_runner_error(f'{self.name} cannot run the file'):
            outputs = session.run(None, inputs)
        check_outputs(outputs, self.precision, check)
        if self.gpu:
            yield self._on_device(session, inputs)
            return
        names = [o.name for o in session.get_outputs()]

        def call() -> None:
            session.run(names, inputs)

        yield call

    def _open(self, model: bytes, options: Any) -> Any:
        """A session that computes where it should, or not at all: ONNX Runtime would run on the CPU what a provider lacks."""
        providers = [(self.provider, self.options)]
        if self.tensorrt:
            providers.append(('CUDAExecutionProvider', {'device_id': str(self.device)}))
        if self.gpu:
            options.add_session_config_entry('session.disable_cpu_ep_fallback', '1')
        with as_runner_error(f'{self.name} cannot run the file'):
            try:
                session = self.runtime.InferenceSession(model, options, providers=providers, enable_fallback=0)
                placed = self.provider in session.get_providers()
            except Exception as e:  # pybind's errors share no class but this
                if 'CPU EP' not in str(e):
                    raise
                placed = False
        if not placed:
            raise RunnerError(f'{self.provider} cannot be loaded, or lacks an operation of the file, so that ONNX Runtime would '
                              'compute on the CPU: it needs the CUDA and cuDNN (and TensorRT) versions that onnxruntime.ai '
                              'names for its version, and a file for a fixed batch')
        return session

    def _on_device(self, session: Any, inputs: dict) -> Any:
        """A call whose inputs and outputs stay on the GPU: copies are no part of a network's latency."""
        binding = session.io_binding()
        held = {name: self.runtime.OrtValue.ortvalue_from_numpy(x, 'cuda', self.device) for name, x in inputs.items()}
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            binding.bind_output(output.name, 'cuda', self.device)

        def call(held: dict = held) -> None:  # holds what is bound
            session.run_with_iobinding(binding)  # returns when the GPU is done

        return call
