"""latency.measure: the right network is timed, at the right size, next to the others, and is not changed by it."""
import json
import sys

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

import timm_width
from timm_width import cli, latency, output, report
from timm_width.data import UsageError
from timm_width.latency import Measurement, measure, measure_many
from timm_width.latency import measure as measure_function
from timm_width.latency.measure import BACKEND_NAMES, check_backend, describe, usual_batch
from timm_width.latency.runner.backends import BACKENDS
from timm_width.latency.runner.errors import RunnerError
from timm_width.onnx_file import write_onnx

from .onnx_files import conv_file
from .test_config import resized

pytest.importorskip('onnxruntime', reason="needs the extra 'onnx'")
module = sys.modules['timm_width.latency.measure']

QUICK = {'runs': 3, 'seconds': 0, 'attempts': 1}


class Tiny(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.Linear(channels, 2)
        self.seen = []

    def forward(self, x):
        self.seen.append((tuple(x.shape), self.training, x.dtype))
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def test_the_function_is_not_hidden_by_its_module():
    assert latency.measure is measure_function and callable(latency.measure) and timm_width.latency is latency


@pytest.mark.parametrize('backend', ['torch', 'onnxruntime'])
def test_a_measurement_says_all_that_repeats_it(backend):
    model = timm.create_model('test_resnet')
    found = measure(model, (3, 32, 32), backend, batch=2, threads=1, **QUICK)
    assert 0 < found.ms == found.batch_ms / 2 == found.timing.ms and found.timing.runs == 3
    assert (found.precision, found.batch, found.input_size) == ('fp32', 2, (3, 32, 32))
    assert found.backend['precision'] == found.precision
    assert found.backend['backend'] == backend and found.backend['threads'] == 1 and found.backend['device'] and found.backend['python']
    assert found.loop == {'warmup': 3, 'runs': 3, 'seconds': 0, 'max_spread': 0.1, 'attempts': 1}
    assert Measurement.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert f'{found.ms:.3f} ms' in str(found) and 'batch 2' in str(found) and found.backend['device'] in str(found)
    assert ('disturbed' in str(found)) == found.disturbed


@pytest.mark.parametrize('backend', ['torch', 'onnxruntime'])
@pytest.mark.parametrize('training', [False, True])
def test_the_model_stays_as_it_is(backend, training):
    """Its mode, its weights, its running statistics, its branches, and torch's threads."""
    model = timm.create_model('mobileone_s0').train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, threads = [m.training for m in model.modules()], torch.get_num_threads()
    measure(model, (3, 32, 32), backend, threads=threads + 1, **QUICK)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(v, after[k]) for k, v in before.items())
    assert [m.training for m in model.modules()] == modes and torch.get_num_threads() == threads


def test_what_runs_is_the_deployed_form_in_evaluation_mode(monkeypatch):
    seen = []
    monkeypatch.setattr(module, '_call', lambda network, *a: seen.append(network) or (lambda: 1.))
    model = timm.create_model('mobileone_s0').train()
    measure(model, (3, 32, 32), **QUICK)
    deployed = reparameterize_model(model)
    assert list(seen[0].state_dict()) == list(deployed.state_dict()) != list(model.state_dict()) and not seen[0].training


def test_it_runs_on_images_of_that_size(monkeypatch):
    model = Tiny()
    monkeypatch.setattr(module, '_network', lambda model, device: model.eval())
    measure(model, (3, 16, 24), batch=5, warmup=2, **QUICK)
    assert set(model.seen) == {((5, 3, 16, 24), False, torch.float32)} and len(model.seen) == 1 + 2 + 3
    with pytest.raises(UsageError, match='cannot run on images of'):
        measure(model, (4, 16, 24), **QUICK)


def test_the_size_and_the_batch_are_the_models_own_by_default():
    found = measure(timm.create_model('test_resnet'), **QUICK)
    assert (found.input_size, found.batch) == ((3, 160, 160), 1) and usual_batch('cuda:0') == 16


def test_networks_take_turns_and_a_slower_one_is_slower():
    models = {'narrow': Tiny(4), 'wide': Tiny(256)}
    for backend in ('torch', 'onnxruntime'):
        found = measure_many(models, (3, 32, 32), backend, threads=1, runs=5, seconds=0.002)
        assert list(found) == list(models) and found['wide'].ms > 1.5 * found['narrow'].ms
    assert measure_many({}) == {}


def test_searched_models_are_exported_and_checked(monkeypatch):
    """ONNX Runtime's outputs are torch's; if they were not, there would be no time."""
    model = resized('test_efficientnet', 'narrow', num_classes=10)
    assert measure(model, (3, 32, 32), 'onnxruntime', precision='fp16', **QUICK).precision == 'fp16'
    export = module._export

    def wrong(*args):
        content, (images, output) = export(*args)
        return content, (images, output + 1)

    monkeypatch.setattr(module, '_export', wrong)
    with pytest.raises(RunnerError, match='a wrong network'):
        measure(model, (3, 32, 32), 'onnxruntime', **QUICK)


def test_onnx_files_are_measured_as_they_are(tmp_path):
    """At their size and batch, in their precision, by ONNX Runtime by default; with the weights that lie beside them."""
    file = tmp_path / 'm.onnx'
    file.write_bytes(conv_file(3, half=True))
    found = measure(file, **QUICK)
    assert (found.batch, found.input_size, found.precision, found.backend['backend']) == (3, (3, 8, 8), 'fp16', 'onnxruntime')
    file.write_bytes(conv_file(None))
    assert measure(str(file), batch=7, **QUICK).batch == 7 and measure(file, **QUICK).batch == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('timm_width.onnx_file.MAX_BYTES', 0)
        write_onnx(Tiny().eval(), torch.randn(2, 3, 16, 16), file)
    assert (tmp_path / 'm.onnx.data').exists() and measure(file, **QUICK).batch == 2


@pytest.mark.parametrize('content, says', [
    (None, 'is no ONNX file that can be read'), (b'', 'not a complete ONNX file'), (b'something else', 'not a complete ONNX file'),
    (conv_file(1)[:-40], 'not a complete ONNX file'), (conv_file(1, size='H'), 'only the batch may be')])
def test_broken_onnx_files(content, says, tmp_path):
    file = tmp_path / 'm.onnx'
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=says) as e:
        measure(file, **QUICK)
    assert 'm.onnx' in str(e.value) and len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize('options, says', [
    ({'backend': 'onnxrutime'}, "unknown backend 'onnxrutime'; did you mean 'onnxruntime'"), ({'backend': 'torch_compile'}, "'torch-compile'"),
    ({'batch': 0}, 'batch must be a whole number of at least 1'), ({'batch': 1.5}, 'batch must be'), ({'batch': 10 ** 12}, 'must fit'),
    ({'input': (3, 32)}, r'input must be \(channels, height, width\)'), ({'input': (3, 0, 32)}, 'input must be'), ({'input': 'abc'}, 'input must be'),
    ({'input': (1, 32, 32)}, r'cannot run on images of \(1, 32, 32\)'), ({'preset': 'aows-cpus'}, "did you mean 'aows-cpu'"),
    ({'precision': 'fp16'}, "fp16 on CUDA only, not on 'cpu'"), ({'precision': 'bf16'}, "fp32 or fp16, not 'bf16'"),
    ({'device': 'cud'}, "device 'cud' cannot be used"), ({'device': 'cuda:x', 'backend': 'trtexec'}, 'which GPU'), ({'threads': 0}, 'threads must be'), ({'runs': 0}, 'runs must be'),
    ({'level': 3}, "unknown option of torch 'level'"), ({'backend': 'onnxruntime', 'levl': 3}, "did you mean 'level'"),
    ({'backend': 'onnxruntime', 'device': 'cuda'}, "onnxruntime does not compute on 'cuda'"),
    ({'backend': 'onnxruntime', 'precision': 'int8'}, 'int8 needs a quantized ONNX file')])
def test_wrong_arguments(options, says):
    with pytest.raises(cli.ERRORS, match=says) as e:
        measure(Tiny(), **{'input': (3, 32, 32), **QUICK, **options})
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize('given, says', [
    (([Tiny()],), 'as a dict of name -> network, not as list'), (({'a': 3},), 'not int'), (({'a': Tiny()}, 32), 'input must be')])
def test_what_is_no_network_is_refused(given, says):
    with pytest.raises(UsageError, match=says):
        measure_many(*given)


def test_files_and_models_do_not_mix(tmp_path):
    file = tmp_path / 'm.onnx'
    file.write_bytes(conv_file(1))
    with pytest.raises(UsageError, match='is no torch model: torch cannot run it'):
        measure(file, backend='torch')
    with pytest.raises(UsageError, match=r'takes images of \(3, 8, 8\), not \(3, 32, 32\)'):
        measure(file, (3, 32, 32))


@pytest.mark.parametrize('preset, batch', [('aows-cpu', 1), ('aows-gpu', 16)])
def test_presets_are_what_is_done(preset, batch, monkeypatch):
    """And what is said besides goes before them."""
    seen = {}
    monkeypatch.setattr(module, 'time_calls', lambda calls, **options: seen.update(options) or {'model': None})
    if preset == 'aows-gpu' and not torch.cuda.is_available():
        with pytest.raises(UsageError, match="device 'cuda' cannot be used here"):
            measure(Tiny(), (3, 16, 16), preset=preset)
    measure(Tiny(), (3, 16, 16), preset=preset, device='cpu')
    assert seen == {'warmup': 10, 'runs': 60, 'seconds': 0, 'batch': batch, 'max_spread': 0.1, 'attempts': 3}
    assert measure(Tiny(), (3, 16, 16), preset=preset, device='cpu', batch=3, runs=7).batch == 3 and (seen['runs'], seen['warmup']) == (7, 10)


@pytest.mark.parametrize('device, number', [('cuda', None), ('cuda:0', 0), ('cuda:3', 3)])
def test_the_number_of_the_gpu_reaches_the_backend(device, number, monkeypatch):
    """The same for what is measured, what is described, and what is checked before."""
    seen = []

    class Opened:
        def __init__(self, name, **options):
            seen.append(options.get('device'))

        def loop(self, given):
            return given

        def describe(self):
            return {}

        def measure_all(self, *args, **loop):
            return {}

    monkeypatch.setattr(module, 'open_backend', Opened)
    measure_many({'a': Tiny()}, (3, 8, 8), 'onnxruntime-cuda', device=device)
    check_backend('tensorrt', device=device)
    describe('trtexec', device=device)
    check_backend('onnxruntime', device=device)
    assert seen == [number] * 3 + [None]


def test_what_is_not_installed_is_known_before_hours_of_training(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorrt', None)
    with pytest.raises(RunnerError, match='pip install tensorrt'):
        check_backend('tensorrt')
    check_backend('torch')
    check_backend('onnxruntime', 'fp16')
    with pytest.raises(UsageError, match='on CUDA only'):
        check_backend('torch', 'fp16')


def test_a_broken_measurement_is_refused():
    said = measure(Tiny(), (3, 16, 16), **QUICK).to_json()
    for change in ({'timing': {**said['timing'], 'batch_ms': float('nan')}}, {'timing': None}, {'batch': None}, {'input_size': 3}):
        with pytest.raises(ValueError):
            Measurement.from_json({**said, **change})
    with pytest.raises(UsageError, match='not a measurement'):
        Measurement.from_json({k: v for k, v in said.items() if k != 'backend'})


def test_train_prints_the_base_beside_and_marks_what_was_disturbed(monkeypatch, capsys):
    model = resized('test_resnet', 'narrow', num_classes=5)
    args = type('Args', (), {'latency_backend': 'onnxruntime', 'latency_precision': None, 'latency_batch': 2, 'device': 'cpu'})
    monkeypatch.setattr(output, 'measure_many', lambda *a: measure_many(*a, runs=4, seconds=0, attempts=1, max_spread=0))
    output._time(model, args, {'input_size': (3, 32, 32)})
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith('latency (onnxruntime, fp32, batch 2, ') and describe('torch')['device'] in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ['test_resnet_width', 'test_resnet'] and '100.0%' in lines[2]
    assert all('±' in line and 'disturbed' in line for line in lines[1:])


def test_searchs_table_shows_the_spread_and_marks_what_was_disturbed(capsys):
    rows = [{'network': n, 'budget': '', 'macs': 1e6, 'params': 1e6, 'latency_ms': ms, 'latency_spread': spread}
            for n, ms, spread in (('base', 4., 0.1), ('found', 3.56, 0.02))]
    report.print_table(rows, 'cpu')
    assert '3.560 ±2%  89.0%' in (out := capsys.readouterr().out) and '*' not in out
    rows[0]['latency_spread'] = 0.11
    report.print_table(rows, 'cpu')
    assert '4.000 ±11%* 100.0%' in (out := capsys.readouterr().out) and '(* was measured several times' in out


@pytest.mark.slow
def test_compiled_networks_are_measured():
    found = measure_many({'a': Tiny(4), 'b': Tiny(8)}, (3, 16, 16), 'torch-compile', **QUICK)
    assert all(m.ms > 0 and m.backend['backend'] == 'torch-compile' for m in found.values())


@pytest.mark.gpu
@pytest.mark.parametrize('backend, precision', [('torch', 'fp16'), ('torch', 'fp32'), ('onnxruntime-cuda', 'fp16')])
def test_on_a_gpu(backend, precision):
    found = measure(timm.create_model('test_resnet'), backend=backend, precision=precision, device='cuda')
    assert found.batch == 16 and found.ms > 0 and 'tf32' in found.backend or backend != 'torch'


def test_all_backends_of_the_runner_can_be_named():
    assert set(BACKENDS) < set(BACKEND_NAMES) and len(set(BACKEND_NAMES)) == len(BACKEND_NAMES)
