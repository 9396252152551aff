"""TensorRT's Python API, as 8.6, 10 and 11 share it; memory, streams and graphs by cuda-python.

11 has strongly typed networks only: the file says the precision. Before, the builder may choose what a flag allows.
"""
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Optional

import numpy as np

from .base import Backend, Check, Graph, as_runner_error, check_device, check_outputs, inspect, make_inputs
from .errors import RunnerError
from .timing import Timing, middle_of, time_calls

__all__ = ['TensorRT']


class TensorRT(Backend):
    """TensorRT's Python API; what is timed is the GPU's work, between two events.

    Args:
        name: 'tensorrt'.
        precision: As in `Backend`; int8 needs a file with quantization nodes.
        threads: None.
        device: Number of the GPU.
        level: Builder optimisation level, 0 to 5; None: TensorRT's default.
        timing_cache: File of kernel timings, which is read if it exists, and written after each build; None: none.
        cuda_graph: Launch the network as a CUDA graph.
        engines: How many engines to build of each file: the middle one counts, `Timing.builds` has all.

    Raises:
        RunnerError: tensorrt or cuda-python is not installed, or it has no such option.
    """
    gpu = True

    def __init__(
            self,
            name: str = 'tensorrt',
            precision: str = 'fp32',
            threads: Optional[int] = None,
            device: int = 0,
            level: Optional[int] = None,
            timing_cache: Optional[str] = None,
            cuda_graph: bool = False,
            engines: int = 1,
    ):
        super().__init__(name, precision, threads)
        try:
            import tensorrt
        except ImportError:
            raise RunnerError('tensorrt is not installed: pip install tensorrt (or use the backend trtexec)') from None
        try:
            from cuda.bindings import runtime
        except ImportError:
            try:
                from cuda import cudart as runtime  # before 12.8
            except ImportError:
                raise RunnerError('cuda-python is not installed: pip install cuda-python') from None
        if engines < 1 or engines > 1 and timing_cache:
            raise RunnerError('engines must be at least 1; several with a timing cache would all choose the same kernels')
        if level is not None and not 0 <= level <= 5:
            raise RunnerError(f'level is a builder optimisation level, 0 to 5, not {level!r}')
        self.trt, self.cuda, self.device = tensorrt, runtime, check_device(device)
        self.level, self.cuda_graph, self.engines = level, cuda_graph, engines
        self.timing_cache = Path(timing_cache) if timing_cache else None
        self.major = int(tensorrt.__version__.split('.')[0])
        self.typed = self.major >= 11
        self.flag = None if precision == 'fp32' or self.typed else getattr(tensorrt.BuilderFlag, precision.upper(), None)
        self.logger = tensorrt.Logger(tensorrt.Logger.ERROR)

    def describe(self) -> dict[str, Any]:
        """As `Backend.describe`."""
        error, version = self.cuda.cudaRuntimeGetVersion()
        return {**super().describe(), 'tensorrt': self.trt.__version__, 'cuda': None if int(error) else version,
                'level': self.level, 'timing_cache': str(self.timing_cache) if self.timing_cache else None,
                'cuda_graph': self.cuda_graph, 'engines': self.engines, 'strongly_typed': self.typed,
                'tf32': True}  # TensorRT's default

    def measure_all(
            self,
            models: Mapping[str, bytes],
            batch: Optional[int] = None,
            checks: Optional[Mapping[str, Check]] = None,
            **loop: Any,
    ) -> dict[str, Timing]:
        """As `Backend.measure_all`; the engines of one file take turns, too."""
        if self.engines == 1:
            return super().measure_all(models, batch, checks, **loop)
        found = {}
        for name, model in models.items():
            size = batch or next(iter(inspect(model).at(None).values()))[0]
            with ExitStack() as stack:
                calls = {str(i): stack.enter_context(self.prepare(model, batch, (checks or {}).get(name)))
                         for i in range(self.engines)}
                found[name] = middle_of(list(time_calls(calls, batch=size, **self.loop(loop)).values()))
        return found

    @contextmanager
    def prepare(self, model: bytes, batch: Optional[int] = None, check: Optional[Check] = None) -> Iterator[Any]:
        """As `Backend.prepare`: builds an engine."""
        graph = inspect(model)
        if graph.precision != self.precision and (
                self.flag is None or self.precision == 'int8' or graph.precision == 'int8'):
            raise RunnerError(f'TensorRT {self.trt.__version__} needs a file in {self.precision} for that, and this one is '
                              f'{graph.precision}: export it in {self.precision}, or ask for {graph.precision}')
        inputs = make_inputs(graph, graph.at(batch), check)
        with ExitStack() as stack:
            with as_runner_error('TensorRT cannot run the file'):
                stack.callback(self.cuda.cudaSetDevice, self._do(self.cuda.cudaGetDevice()))
                self._do(self.cuda.cudaSetDevice(self.device))
                engine = self.trt.Runtime(self.logger).deserialize_cuda_engine(self._build(model, graph, inputs))
                if engine is None:
                    raise RunnerError('TensorRT cannot load the engine that it built')
                call, outputs = self._load(engine, graph, inputs, stack)
            check_outputs(outputs, self.precision, check)
            yield call

    def _build(self, model: bytes, graph: Graph, inputs: Mapping[str, np.ndarray]) -> Any:
        trt = self.trt
        builder = trt.Builder(self.logger)
        old = self.major < 10  # later there is nothing but the explicit batch
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH) if old else 0)
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse(model):
            reasons = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
            raise RunnerError(f"TensorRT cannot read the file: {(reasons or ['it does not say why'])[0]}")
        config = builder.create_builder_config()
        if self.level is not None:
            config.builder_optimization_level = self.level
        if self.flag is not None:
            config.set_flag(self.flag)
        if any(shape[0] is None for shape, _ in graph.inputs.values()):
            profile = builder.create_optimization_profile()
            for name, x in inputs.items():
                profile.set_shape(name, x.shape, x.shape, x.shape)
            config.add_optimization_profile(profile)
        if self.timing_cache:
            before = self.timing_cache.read_bytes() if self.timing_cache.exists() else b''
            cache = config.create_timing_cache(before)
            if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
                raise RunnerError(f"'{self.timing_cache}' is no timing cache of this TensorRT and GPU: remove it, or give another")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RunnerError('TensorRT cannot build an engine of the file; what it printed above says why')
        if self.timing_cache:
            beside = self.timing_cache.with_name(f'.{self.timing_cache.name}.saving')
            beside.write_bytes(memoryview(config.get_timing_cache().serialize()))
            os.replace(beside, self.timing_cache)
        return plan

    def _load(self, engine: Any, graph: Graph, inputs: Mapping[str, np.ndarray], stack: ExitStack) -> tuple[Any, list[np.ndarray]]:
        """A call that runs an engine and returns the milliseconds of the GPU, and the outputs of its first run."""
        trt, cuda, do = self.trt, self.cuda, self._do
        stream = do(cuda.cudaStreamCreate())
        stack.callback(cuda.cudaStreamDestroy, stream)
        context = engine.create_execution_context()
        if context is None:
            raise RunnerError('TensorRT cannot make room for the engine on the GPU')
        arrays, outputs = dict(inputs), {}
        for name in inputs:
            if graph.inputs[name][0][0] is None:
                context.set_input_shape(name, inputs[name].shape)
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
                outputs[name] = np.empty(tuple(context.get_tensor_shape(name)), trt.nptype(engine.get_tensor_dtype(name)))
                arrays[name] = outputs[name]
        addresses = {}
        for name, array in arrays.items():
            addresses[name] = do(cuda.cudaMalloc(max(array.nbytes, 1)))
            stack.callback(cuda.cudaFree, addresses[name])
            context.set_tensor_address(name, int(addresses[name]))
        for name, array in inputs.items():
            do(cuda.cudaMemcpy(addresses[name], array.ctypes.data, array.nbytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice))

        def launch() -> None:
            if not context.execute_async_v3(int(stream)):
                raise RunnerError('TensorRT cannot run the engine; what it printed above says why')

        launch()  # before a graph is captured, TensorRT must have run once
        do(cuda.cudaStreamSynchronize(stream))
        if self.cuda_graph:
            do(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
            launch()
            captured = do(cuda.cudaStreamEndCapture(stream))
            stack.callback(cuda.cudaGraphDestroy, captured)
            ready = do(cuda.cudaGraphInstantiate(captured, 0))
            stack.callback(cuda.cudaGraphExecDestroy, ready)

            def launch() -> None:
                do(cuda.cudaGraphLaunch(ready, stream))

            launch()
            do(cuda.cudaStreamSynchronize(stream))
        for name, array in outputs.items():
            do(cuda.cudaMemcpy(array.ctypes.data, addresses[name], array.nbytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost))
        first, last = do(cuda.cudaEventCreate()), do(cuda.cudaEventCreate())
        stack.callback(cuda.cudaEventDestroy, first)
        stack.callback(cuda.cudaEventDestroy, last)

        def call() -> float:
            do(cuda.cudaEventRecord(first, stream))
            launch()
            do(cuda.cudaEventRecord(last, stream))
            do(cuda.cudaEventSynchronize(last))
            return float(do(cuda.cudaEventElapsedTime(first, last)))

        return call, list(outputs.values())

    def _do(self, result: tuple) -> Any:
        """What a function of the CUDA runtime gives besides its error code."""
        error, *found = result
        if int(error):
            raise RunnerError(f'CUDA: {getattr(error, "name", error)}')
        return found[0] if found else None
