"""The runner's backends: what they run computes what it should, and what they cannot run is refused in one line.

ONNX Runtime is the real one. TensorRT is a fake, a NumPy network behind the names of its Python API and of the CUDA runtime: it
shows the order of calls and the flags, not that TensorRT takes them.
"""
import ctypes
import enum
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from timm_width.latency.runner import ort
from timm_width.latency.runner.backends import open_backend
from timm_width.latency.runner.base import check_outputs, gpu_name, inspect, make_inputs
from timm_width.latency.runner.errors import RunnerError

from .onnx_files import conv_file

onnx = pytest.importorskip('onnx', reason="needs the extra 'onnx'")
onnxruntime = pytest.importorskip('onnxruntime', reason="needs the extra 'onnx'")

QUICK = {'runs': 3, 'seconds': 0, 'attempts': 1}


def images(batch=2):
    return np.random.default_rng(3).standard_normal((batch, 3, 8, 8), dtype=np.float32)


def expected(model, x):
    return onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider']).run(None, {'input': x})[0]


# -- files -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('batch, half', [(1, False), (4, True), (None, False)])
def test_a_file_says_what_it_takes(batch, half):
    graph = inspect(conv_file(batch, half))
    assert graph.precision == ('fp16' if half else 'fp32')
    assert graph.inputs == {'input': ((batch, 3, 8, 8), np.float32)} and graph.at(batch or 7) == {'input': (batch or 7, 3, 8, 8)}


def test_batches_that_a_file_does_not_run():
    with pytest.raises(RunnerError, match='runs batches of 1, not 4'):
        inspect(conv_file(1)).at(4)
    with pytest.raises(RunnerError, match='any batch: say which'):
        inspect(conv_file(None)).at(None)
    with pytest.raises(RunnerError, match='only the batch may be'):
        inspect(conv_file(1, size='H')).at(1)


def test_quantized_files_are_int8():
    from onnx import TensorProto, helper
    model = onnx.load_model_from_string(conv_file(1))
    model.graph.node.append(helper.make_node('DequantizeLinear', ['q', 's'], ['d']))
    assert inspect(model.SerializeToString()).precision == 'int8'
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises(RunnerError, match="'input' of the ONNX file must be float32 or float16"):
        inspect(model.SerializeToString())


@pytest.mark.parametrize('share', [0., 0.05, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize('name', ['onnxruntime', 'inspect'])
def test_a_truncated_file_is_refused(share, name):
    model = conv_file(1)
    model = model[:int(share * len(model))]
    with pytest.raises(RunnerError, match='not a complete ONNX file'):
        inspect(model) if name == 'inspect' else open_backend(name).measure(model)


def test_inputs_are_always_the_same():
    graph = inspect(conv_file(None))
    a, b = (make_inputs(graph, graph.at(2))['input'] for _ in range(2))
    assert np.array_equal(a, b) and a.std() > 0.5 and a.dtype == np.float32
    assert np.array_equal(make_inputs(graph, graph.at(2), (images(), images()))['input'], images())
    with pytest.raises(RunnerError, match='to check it with'):
        make_inputs(graph, graph.at(2), (images(3), images(3)))


@pytest.mark.parametrize('output, says', [
    (np.array([1., np.nan]), 'not finite'), (np.array([1., np.inf]), 'not finite'), (np.array([1., 2.1]), 'differs from the expected'),
    (np.ones(3), 'shape')])
def test_wrong_outputs(output, says):
    wanted = np.array([1., 2.])
    check_outputs([wanted + 1e-3], 'fp32', (wanted, wanted))
    with pytest.raises(RunnerError, match=says):
        check_outputs([output], 'fp32', (wanted, wanted))
    check_outputs([np.array([1., 2.05])], 'fp16', (wanted, wanted))


# -- GPUs --------------------------------------------------------------------------------------------------------------------

SMI = '''#!/bin/sh
echo "0, GPU-aaaa1111, NVIDIA A100, 550.1"
echo "1, GPU-bbbb2222, NVIDIA L4, 550.1"
echo "2, GPU-aacc3333, NVIDIA T4, 550.1"
'''


@pytest.mark.parametrize('visible, index, name', [
    (None, 0, 'NVIDIA A100'), (None, 2, 'NVIDIA T4'), (None, 3, None), ('1', 0, 'NVIDIA L4'), ('2,1', 0, 'NVIDIA T4'), ('2, 1', 1, 'NVIDIA L4'),
    ('1', 1, None), ('GPU-bbbb2222', 0, 'NVIDIA L4'), ('GPU-aac,GPU-aaaa1', 0, 'NVIDIA T4'), ('', 0, None), ('MIG-5', 0, None), ('-1', 0, None)])
def test_the_name_is_that_of_the_gpu_that_computes(visible, index, name, tmp_path, monkeypatch):
    (tmp_path / 'nvidia-smi').write_text(SMI)
    (tmp_path / 'nvidia-smi').chmod(0o755)
    monkeypatch.setenv('PATH', f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert gpu_name(index) == ({'device': name, 'driver': '550.1'} if name else {'device': 'unknown GPU', 'driver': 'unknown'})


@pytest.mark.parametrize('name', ['onnxruntime-cuda', 'onnxruntime-tensorrt', 'tensorrt'])
def test_backends_name_the_gpu_of_their_number(name, fake, monkeypatch):
    fake()
    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: [*ort.PROVIDERS.values()])
    monkeypatch.setattr(onnxruntime, 'preload_dlls', lambda: None, raising=False)
    monkeypatch.setattr('timm_width.latency.runner.base.gpu_name', lambda index: {'device': f'number {index}'})
    assert open_backend(name, device=3).describe()['device'] == 'number 3'
    assert open_backend(name).describe()['device'] == 'number 0'
    with pytest.raises(RunnerError, match='device must be the number of a GPU'):
        open_backend(name, device=-1)


def test_a_cpu_has_no_number():
    with pytest.raises(RunnerError, match='onnxruntime computes on the CPU: device is for onnxruntime-cuda, onnxruntime-tensorrt'):
        open_backend('onnxruntime', device=0)


# -- ONNX Runtime ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('batch, half', [(2, False), (2, True), (None, False)])
def test_onnxruntime_runs_the_file(batch, half):
    model = conv_file(batch, half)
    backend = open_backend('onnxruntime', precision='fp16' if half else 'fp32', threads=1)
    found = backend.measure(model, 2, (images(), expected(model, images())), **QUICK)
    assert found.batch == 2 and found.runs == 3 and 0 < found.ms < 1000
    told = json.loads(json.dumps(backend.describe()))
    assert told['threads'] == 1 and told['onnxruntime'] == onnxruntime.__version__ and told['device'] and told['provider'] == 'CPUExecutionProvider'
    assert told['precision'] == ('fp16' if half else 'fp32')


def test_a_file_that_computes_something_else_is_not_timed():
    with pytest.raises(RunnerError, match='the time of a wrong network is worth nothing'):
        open_backend('onnxruntime').measure(conv_file(2), 2, (images(), expected(conv_file(2), images()) + 1), **QUICK)
    with pytest.raises(RunnerError, match='not finite'):
        open_backend('onnxruntime').measure(conv_file(2, scale=np.inf), 2, **QUICK)


def test_the_batch_is_the_files_by_default():
    assert open_backend('onnxruntime').measure(conv_file(3), **QUICK).batch == 3


def test_files_of_one_call_take_turns():
    models = {'large': conv_file(1, size=64), 'small': conv_file(1)}
    found = open_backend('onnxruntime', threads=1).measure_all(models, 1, runs=5, seconds=1e-3, attempts=1)
    assert list(found) == ['large', 'small'] and found['large'].ms > found['small'].ms


def test_threads_are_those_asked_for(monkeypatch):
    seen, make = [], onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, 'InferenceSession', lambda m, options, **kwargs: seen.append(options.intra_op_num_threads) or make(
        m, options, **kwargs))
    for threads in (1, 2, None):
        open_backend('onnxruntime', threads=threads).measure(conv_file(1), **QUICK)
    assert seen == [1, 2, ort.usable_cpus()]


@pytest.mark.parametrize('half, precision', [(False, 'fp16'), (True, 'fp32'), (False, 'int8')])
def test_the_precision_is_that_of_the_file(half, precision):
    with pytest.raises(RunnerError, match=f"this one is {'fp16' if half else 'fp32'}, not {precision}: export it in {precision}"):
        open_backend('onnxruntime', precision=precision).measure(conv_file(1, half), **QUICK)


@pytest.mark.parametrize('name, package', [('onnxruntime', 'onnxruntime'), ('onnxruntime-cuda', 'onnxruntime-gpu'),
                                           ('onnxruntime-tensorrt', 'onnxruntime-gpu')])
def test_what_is_not_installed_is_named(name, package, monkeypatch):
    with monkeypatch.context() as m:
        m.setitem(sys.modules, 'onnxruntime', None)
        with pytest.raises(RunnerError, match=f'onnxruntime is not installed: pip install {package}$'):
            open_backend(name)
    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: ['AzureExecutionProvider'])
    with pytest.raises(RunnerError, match=f'has no {ort.PROVIDERS[name]}: .*pip install {package}$'):
        open_backend(name)


def test_onnxruntime_never_falls_back_to_the_cpu(monkeypatch):
    """CUDA's provider is there, cannot be loaded, and the session goes on without it: no time is given."""
    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: ['CUDAExecutionProvider', 'CPUExecutionProvider'])
    monkeypatch.setattr(onnxruntime, 'preload_dlls', lambda: None, raising=False)
    session = SimpleNamespace(get_providers=lambda: ['CPUExecutionProvider'])
    monkeypatch.setattr(onnxruntime, 'InferenceSession', lambda *a, **k: session)
    with pytest.raises(RunnerError, match='CUDAExecutionProvider cannot be loaded, .* ONNX Runtime would compute on the CPU'):
        open_backend('onnxruntime-cuda').measure(conv_file(1), **QUICK)


def test_onnxruntime_refuses_what_would_run_partly_on_the_cpu(monkeypatch):
    """For real, with a provider that is loaded and has no convolution: it stands for CUDA's with one operation that this lacks."""
    if 'AzureExecutionProvider' not in onnxruntime.get_available_providers():
        pytest.skip('this onnxruntime has no second provider')
    monkeypatch.setattr(onnxruntime, 'preload_dlls', lambda: None, raising=False)
    monkeypatch.setitem(ort.PROVIDERS, 'onnxruntime-cuda', 'AzureExecutionProvider')
    with pytest.raises(RunnerError, match='AzureExecutionProvider .* lacks an operation of the file, .* on the CPU'):
        open_backend('onnxruntime-cuda').measure(conv_file(1), **QUICK)


@pytest.mark.parametrize('name, providers', [
    ('onnxruntime', [('CPUExecutionProvider', {})]), ('onnxruntime-cuda', [('CUDAExecutionProvider', {'device_id': '1'})]),
    ('onnxruntime-tensorrt', [
        ('TensorrtExecutionProvider', {'device_id': '1', 'trt_fp16_enable': 'False', 'trt_int8_enable': 'False'}),
        ('CUDAExecutionProvider', {'device_id': '1'})])])
def test_what_tensorrts_provider_lacks_runs_on_the_same_gpu(name, providers, monkeypatch):
    """And nothing falls back, neither when a session is made nor when it runs."""
    seen = {}

    def session(model, options, **kwargs):
        seen.update(kwargs, entry=name == 'onnxruntime' or options.get_session_config_entry('session.disable_cpu_ep_fallback'))
        raise RuntimeError('seen enough')

    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: [*ort.PROVIDERS.values()])
    monkeypatch.setattr(onnxruntime, 'preload_dlls', lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, 'InferenceSession', session)
    with pytest.raises(RunnerError, match='seen enough'):
        open_backend(name, **({} if name == 'onnxruntime' else {'device': 1})).measure(conv_file(1), **QUICK)
    assert seen == {'providers': providers, 'enable_fallback': 0, 'entry': name == 'onnxruntime' or '1'}


def test_options_of_the_tensorrt_provider(monkeypatch):
    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: [*ort.PROVIDERS.values()])
    monkeypatch.setattr(onnxruntime, 'preload_dlls', lambda: None, raising=False)
    told = open_backend('onnxruntime-tensorrt', precision='fp16', level=2, timing_cache='cache').describe()['options']
    assert told == {'device_id': '0', 'trt_fp16_enable': 'True', 'trt_int8_enable': 'False', 'trt_builder_optimization_level': '2',
                    'trt_timing_cache_enable': 'True', 'trt_timing_cache_path': 'cache'}
    with pytest.raises(RunnerError, match='level and timing_cache are for TensorRT'):
        open_backend('onnxruntime-cuda', level=2)


@pytest.mark.parametrize('name, options, says', [
    ('onnxrutime', {}, "unknown backend 'onnxrutime'; did you mean 'onnxruntime'"), ('', {}, 'unknown backend'),
    ('onnxruntime', {'threds': 1}, "did you mean 'threads'"), ('onnxruntime', {'threads': 0}, 'threads must be'),
    ('onnxruntime', {'precision': 'half'}, "fp32 or fp16 or int8, not 'half'")])
def test_wrong_names(name, options, says):
    with pytest.raises(RunnerError, match=says):
        open_backend(name, **options)


# -- TensorRT, a fake --------------------------------------------------------------------------------------------------------

class Fake:
    """The names of tensorrt and of cuda.bindings.runtime that the backend uses; records what is called in `calls`."""

    def __init__(self, version='10.9.0', precisions=('FP16', 'INT8'), wrong=0., cache_fits=True, builds=(2.,)):
        self.calls, self.version, self.wrong, self.cache_fits = [], version, wrong, cache_fits
        self.flags, self.level, self.memory, self.clock, self.capturing = [], None, {}, 0., False
        self.precisions, self.live, self.cache = precisions, 0, None
        self.builds, self.device = [*builds], 5  # milliseconds of each engine, the last of all others; the GPU of others

    def modules(self):
        fake, calls = self, self.calls

        class Config:
            def __setattr__(self, name, value):
                calls.append((name, value))

            def set_flag(self, flag):
                calls.append(('set_flag', flag))

            def add_optimization_profile(self, profile):
                calls.append(('profile', profile))

            def create_timing_cache(self, content):
                calls.append(('cache', bytes(content)))
                return object()

            def set_timing_cache(self, cache, ignore_mismatch):
                return fake.cache_fits and not ignore_mismatch

            def get_timing_cache(self):
                return SimpleNamespace(serialize=lambda: bytearray(b'timings'))

        class Profile(dict):
            def set_shape(self, name, *shapes):
                self[name] = shapes

        class Builder:
            def __init__(self, logger):
                calls.append(('build', None))

            def create_network(self, flags):
                calls.append(('network', flags))
                return SimpleNamespace()

            def create_builder_config(self):
                return Config()

            def create_optimization_profile(self):
                return Profile()

            def build_serialized_network(self, network, config):
                return network.model

        class Parser:
            num_errors = 1

            def __init__(self, network, logger):
                self.network = network

            def parse(self, model):
                self.network.model = model
                return b'refuse' not in model

            def get_error(self, i):
                return SimpleNamespace(desc=lambda: 'no such operator')

        class Context:
            def __init__(self, model):
                self.model, self.shape, self.at = model, None, {}
                self.ms = fake.builds.pop(0) if len(fake.builds) > 1 else fake.builds[0]

            def set_input_shape(self, name, shape):
                self.shape = shape

            def get_tensor_shape(self, name):
                return (self.shape or inspect(self.model).inputs['input'][0])[0], 4

            def set_tensor_address(self, name, address):
                self.at[name] = address

            def execute_async_v3(self, stream):
                calls.append(('execute', fake.capturing))
                fake.clock += self.ms
                if not fake.capturing:
                    x = np.frombuffer(fake.memory[self.at['input']], np.float32).reshape(-1, 3, 8, 8)
                    fake.memory[self.at['output']][:] = (expected(self.model, x) + fake.wrong).astype(np.float32).tobytes()
                return True

        engine = lambda model: SimpleNamespace(  # noqa: E731
            num_io_tensors=2, get_tensor_name=lambda i: ('input', 'output')[i], create_execution_context=lambda: Context(model),
            get_tensor_mode=lambda n: n, get_tensor_dtype=lambda n: np.float32)
        trt = ModuleType('tensorrt')
        trt.__version__, trt.Builder, trt.OnnxParser = self.version, Builder, Parser
        trt.Logger = type('Logger', (), {'ERROR': 1, '__init__': lambda self, level: None})
        trt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=engine)
        trt.BuilderFlag = SimpleNamespace(**{p: p for p in self.precisions})
        trt.NetworkDefinitionCreationFlag = SimpleNamespace(**({'EXPLICIT_BATCH': 0} if self.version[0] == '8' else {}))
        trt.TensorIOMode, trt.nptype = SimpleNamespace(INPUT='input', OUTPUT='output'), np.dtype
        cuda = ModuleType('cuda.bindings.runtime')
        kinds = enum.IntEnum('Kind', {'cudaMemcpyHostToDevice': 1, 'cudaMemcpyDeviceToHost': 2})
        cuda.cudaMemcpyKind, cuda.cudaStreamCaptureMode = kinds, SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

        def malloc(size):
            fake.live += 1
            fake.memory[1000 + fake.live] = bytearray(size)
            return 0, 1000 + fake.live

        def memcpy(to, of, size, kind):
            if kind == 1:
                fake.memory[to][:] = ctypes.string_at(of, size)
            else:
                ctypes.memmove(to, bytes(fake.memory[of]), size)
            return (0,)

        def use(device):
            fake.device = device
            calls.append(('device', device))
            return (0,)

        def capture(on):
            fake.capturing = on
            return (0, 'graph') if not on else (0,)

        def launch(graph, stream):
            calls.append(('graph', graph))
            fake.clock += 1.
            return (0,)

        def event():
            return 0, {}

        def record(e, stream):
            e['at'] = fake.clock
            return (0,)

        for name, do in {
                'cudaMalloc': malloc, 'cudaFree': lambda p: fake.memory.pop(p) is None or (0,), 'cudaMemcpy': memcpy,
                'cudaStreamCreate': lambda: (0, 7), 'cudaStreamDestroy': lambda s: (0,), 'cudaStreamSynchronize': lambda s: (0,),
                'cudaStreamBeginCapture': lambda s, m: capture(True), 'cudaStreamEndCapture': lambda s: capture(False),
                'cudaGraphInstantiate': lambda g, f: (0, 'ready'), 'cudaGraphLaunch': launch, 'cudaGraphDestroy': lambda g: (0,),
                'cudaGraphExecDestroy': lambda g: (0,), 'cudaEventCreate': event, 'cudaEventDestroy': lambda e: (0,), 'cudaEventRecord': record,
                'cudaEventSynchronize': lambda e: (0,), 'cudaEventElapsedTime': lambda a, b: (0, b['at'] - a['at']),
                'cudaGetDevice': lambda: (0, fake.device), 'cudaSetDevice': use, 'cudaRuntimeGetVersion': lambda: (0, 12060)}.items():
            setattr(cuda, name, do)
        bindings = ModuleType('cuda.bindings')
        bindings.runtime = cuda
        return {'tensorrt': trt, 'cuda': ModuleType('cuda'), 'cuda.bindings': bindings, 'cuda.bindings.runtime': cuda}


@pytest.fixture
def fake(monkeypatch):
    def install(**options):
        found = Fake(**options)
        for name, module in found.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        return found
    return install


def names(fake):
    return [name for name, _ in fake.calls]


@pytest.mark.parametrize('version', ['8.6.0', '10.9.0', '11.0.0'])
def test_tensorrt_times_what_it_built(version, fake):
    """Events around the launch; the output is checked; what was reserved is given back; only 8 is told of the explicit batch."""
    f = fake(version=version)
    backend = open_backend('tensorrt', level=3)
    model = conv_file(2)
    found = backend.measure(model, 2, (images(), expected(model, images())), **QUICK)
    assert found.batch_ms == 2 and found.ms == 1 and not f.memory
    assert f.calls[:4] == [('device', 0), ('build', None), ('network', 1 if version[0] == '8' else 0), ('builder_optimization_level', 3)]
    told = json.loads(json.dumps(backend.describe()))
    assert (told['tensorrt'], told['cuda'], told['level'], told['engines']) == (version, 12060, 3, 1)


@pytest.mark.parametrize('half', [False, True])
def test_before_tensorrt_11_a_flag_allows_float16(half, fake):
    f = fake()
    open_backend('tensorrt', precision='fp16').measure(conv_file(1, half), **QUICK)
    assert ('set_flag', 'FP16') in f.calls


def test_in_tensorrt_11_the_file_must_be_float16(fake):
    f = fake(version='11.0.0', precisions=())
    backend = open_backend('tensorrt', precision='fp16')
    with pytest.raises(RunnerError, match='11.0.0 needs a file in fp16 for that, and this one is fp32: export it in fp16'):
        backend.measure(conv_file(1), **QUICK)
    backend.measure(conv_file(1, half=True), **QUICK)
    assert 'set_flag' not in names(f) and backend.describe()['strongly_typed']


@pytest.mark.parametrize('precision, half', [('fp32', True), ('int8', False)])
def test_other_precisions_must_be_the_files(precision, half, fake):
    fake()
    with pytest.raises(RunnerError, match=f'needs a file in {precision}'):
        open_backend('tensorrt', precision=precision).measure(conv_file(1, half), **QUICK)


def test_a_file_for_any_batch_gets_a_profile(fake):
    f = fake()
    assert open_backend('tensorrt').measure(conv_file(None), 5, **QUICK).batch == 5
    assert ('profile', {'input': ((5, 3, 8, 8),) * 3}) in f.calls


def test_cuda_graphs_are_launched(fake):
    """After a run outside; the engine is captured once, then only the graph is launched and timed."""
    f = fake()
    found = open_backend('tensorrt', cuda_graph=True).measure(conv_file(1), **QUICK)
    runs = [c for c in f.calls if c[0] in ('execute', 'graph')]
    assert found.batch_ms == 1 and runs[:3] == [('execute', False), ('execute', True), ('graph', 'ready')]
    assert {c[0] for c in runs[2:]} == {'graph'}


def test_timing_caches_are_read_and_written(fake, tmp_path):
    f = fake()
    file = tmp_path / 'cache'
    for _ in range(2):
        open_backend('tensorrt', timing_cache=str(file)).measure(conv_file(1), **QUICK)
    assert [c for c in f.calls if c[0] == 'cache'] == [('cache', b''), ('cache', b'timings')]
    assert file.read_bytes() == b'timings' and [p.name for p in tmp_path.iterdir()] == ['cache']
    fake(cache_fits=False)
    with pytest.raises(RunnerError, match='no timing cache of this TensorRT'):
        open_backend('tensorrt', timing_cache=str(file)).measure(conv_file(1), **QUICK)


def test_of_several_engines_the_middle_one_counts(fake):
    f = fake(builds=(3., 1., 2.))
    found = open_backend('tensorrt', engines=3).measure(conv_file(1), **QUICK)
    assert found.builds == (1, 2, 3) and found.batch_ms == 2 and names(f).count('build') == 3


def test_tensorrt_computes_on_the_gpu_asked_for_and_leaves_that_of_others(fake):
    f = fake()
    open_backend('tensorrt', device=3, engines=2).measure(conv_file(1), **QUICK)
    assert [c[1] for c in f.calls if c[0] == 'device'] == [3, 3, 3, 5] and f.device == 5


@pytest.mark.parametrize('version, typed', [('8.6.0', False), ('10.9.0', False), ('11.0.0', True)])
def test_in_tensorrt_11_all_networks_are_strongly_typed(version, typed, fake):
    fake(version=version)
    assert open_backend('tensorrt').describe()['strongly_typed'] is typed


@pytest.mark.parametrize('options, says', [({'engines': 2, 'timing_cache': 'x'}, 'same kernels'), ({'level': 6}, '0 to 5'), ({'engines': 0}, 'engines')])
def test_wrong_options_of_tensorrt(options, says, fake):
    fake()
    with pytest.raises(RunnerError, match=says):
        open_backend('tensorrt', **options)


def test_what_tensorrt_cannot_do_is_said(fake):
    fake(wrong=1.)
    with pytest.raises(RunnerError, match='differs from the expected one'):
        open_backend('tensorrt').measure(conv_file(2), 2, (images(), expected(conv_file(2), images())), **QUICK)
    f = fake()
    model = onnx.load_model_from_string(conv_file(1))
    model.doc_string = 'refuse'
    with pytest.raises(RunnerError, match='cannot read the file: no such operator'):
        open_backend('tensorrt').measure(model.SerializeToString(), **QUICK)
    sys.modules['cuda.bindings.runtime'].cudaMalloc = lambda size: (enum.IntEnum('E', {'cudaErrorMemoryAllocation': 2})(2), None)
    with pytest.raises(RunnerError, match='CUDA: cudaErrorMemoryAllocation'):
        open_backend('tensorrt').measure(conv_file(1), **QUICK)
    assert not f.memory


@pytest.mark.parametrize('missing, says', [('tensorrt', 'pip install tensorrt'), ('cuda', 'pip install cuda-python')])
def test_missing_packages_of_tensorrt(missing, says, fake, monkeypatch):
    fake()
    for name in [n for n in sys.modules if n.split('.')[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RunnerError, match=says):
        open_backend('tensorrt')
