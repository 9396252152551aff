"""trtexec: every log and JSON file of ../shared/trtexec is parsed to the right numbers, or refused with the reason."""
import json
import os
import re
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from timm_width.latency import measure
from timm_width.latency.runner import trtexec
from timm_width.latency.runner.backends import open_backend
from timm_width.latency.runner.errors import RunnerError
from timm_width.latency.runner.trtexec import command
from timm_width.latency.runner.trtexec_log import GPU, parse_json, parse_log

from .onnx_files import conv_file

FIXTURES = Path(__file__).resolve().parents[2] / 'shared' / 'trtexec'
here = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f'{FIXTURES} is not here')

# read off the files by hand: version, status, median and 99th percentile of GPU compute, queries per second, device
LOGS = {
    'trt8003_fp32_onnx_mnist.log': ('8.0.3', 'PASSED', 0.152588, 0.157715, 6168.97, 'NVIDIA GeForce GTX 1070'),
    'trt8401_fp32_onnx_mnist.log': ('8.4.1', 'PASSED', 0.154663, 0.353271, 5858.16, 'NVIDIA GeForce GTX 1070'),
    'trt8401_loadEngine.log': ('8.4.1', 'PASSED', 0.15564, 0.382935, 6207.5, 'NVIDIA GeForce GTX 1070'),
    'trt101401_onnx_mnist.log': ('10.14.1', 'PASSED', 0.0285645, 0.0368652, 23188.6, 'NVIDIA RTX 6000 Ada Generation'),
    'trt101601_onnx_mnist_FULL.log': ('10.16.1', 'PASSED', 0.0361328, 0.041748, 15374.3, 'NVIDIA H100 PCIe'),
    'trt10_alexnet_fp16_doc_excerpts.log': (None, None, 0.499023, 0.503418, 1995.29, 'NVIDIA GeForce RTX 3060 Laptop GPU'),
    'trt8x_gpunet_readme_excerpt.log': (None, None, 0.564209, 0.570312, None, None),
    'trt8x_no_timestamp_prefix_excerpt.log': (None, None, 34.4187, 37.0945, None, None),
}
JETSON = [  # batch, median, 99th percentile, queries per second, queries in its times.json, and their median
    (1, 3.03919, 3.41711, 318.785, 1013, 3.03979), (4, 6.51056, 7.60083, 595.253, 477, 6.51135),
    (8, 11.0895, 12.8194, 700.443, 282, 11.08985), (16, 21.8337, 26.8062, 717.65, 146, 21.8284),
    (32, 37.782, 60.0398, 775.89, 80, 37.7268), (64, 72.633, 87.292, 848.189, 45, 72.6307), (128, 247.036, 270.469, 508.664, 15, 246.482)]
REFUSED = {
    'trt100300_FAILED_unknown_option.log': ('10.3.0', 'FAILED', 'Unknown option: --workspace 2048'),
    'trt101300_FAILED_missing_onnx.log': ('10.13.0', 'FAILED', 'Input file cannot be found, or is not a regular file: models/mc3'),
    'trt101601_dumpProfile_no_summary.log': ('10.16.1', 'PASSED', 'network timing is not reported'),
    'trt101601_skipInference_dumpLayerInfo.log': ('10.16.1', 'PASSED', '--skipInference is added'),
    'trt8600_build_skipInference.log': ('8.6.0', 'PASSED', '--skipInference is added'),
}
JSONS = {
    'trt7_jetson_times.json': 'times', 'trt7_jetson_profile.json': 'profile', 'trt101601_exportLayerInfo.json': 'layers',
    **{f'trt10_{net}_fp16_{kind}.json': what for net in ('alexnet', 'resnet18')
       for kind, what in (('times_first500', 'times'), ('profile', 'profile'), ('layerinfo', 'layers'))},
}
NO_JSON = ('trt10_alexnet_fp16_summary_metadata.json', 'trt10_resnet18_fp16_summary_metadata.json', 'MANIFEST.json')


def text(name):
    return (FIXTURES / name).read_text()


@here
def test_all_files_are_tested():
    known = {*LOGS, *REFUSED, *JSONS, *NO_JSON, 'trt7_jetson_resnet50_int8_multi.log', 'trt101601_help.txt', 'README.md'}
    assert {f.name for f in FIXTURES.iterdir()} == known


# -- logs --------------------------------------------------------------------------------------------------------------------

@here
@pytest.mark.parametrize('name', LOGS)
def test_logs(name):
    run, = parse_log(text(name))
    version, status, middle, high, qps, device = LOGS[name]
    assert (run.version, run.status, run.throughput, run.device) == (version, status, qps, device)
    assert run.gpu_ms == middle == run.statistics[GPU]['median'] and run.statistics[GPU]['percentile(99%)'] == high


@here
def test_all_statistics_of_a_summary():
    run, = parse_log(text('trt101601_onnx_mnist_FULL.log'))
    assert set(run.statistics) == {'Latency', 'Enqueue Time', 'H2D Latency', GPU, 'D2H Latency'}
    assert run.statistics[GPU] == {'min': 0.0331421, 'max': 0.140381, 'mean': 0.0359588, 'median': 0.0361328, 'percentile(90%)': 0.0368652,
                                   'percentile(95%)': 0.0371094, 'percentile(99%)': 0.041748}
    assert run.statistics['Latency']['mean'] == 0.0441053 and run.precision == 'FP32' and run.command.startswith('trtexec --onnx=')
    old, = parse_log(text('trt8003_fp32_onnx_mnist.log'))
    assert old.statistics['End-to-End Host Latency']['median'] == 0.289062 and set(old.statistics) == {*run.statistics, 'End-to-End Host Latency'}


@here
def test_logs_of_tensorrt_7_hold_several_runs():
    """One statistic a line, and "end to end" beside some."""
    runs = parse_log(text('trt7_jetson_resnet50_int8_multi.log'))
    found = [(r.batch, r.gpu_ms, r.statistics[GPU]['percentile(99%)'], r.throughput) for r in runs]
    assert found == [row[:4] for row in JETSON]
    assert all((r.version, r.status, r.precision) == (None, 'PASSED', 'FP32+INT8') for r in runs)
    assert runs[0].statistics['Latency'] == {'min': 3.05505, 'max': 5.60945, 'mean': 3.1141, 'median': 3.09796, 'percentile(99%)': 3.4563}
    assert runs[0].statistics['Enqueue Time'] == {'min': 3.02222, 'max': 5.35538, 'median': 3.05493}


@here
@pytest.mark.parametrize('name', REFUSED)
def test_logs_without_a_time_say_why(name):
    version, status, says = REFUSED[name]
    run, = parse_log(text(name))
    assert (run.version, run.status) == (version, status)
    with pytest.raises(RunnerError, match=re.escape(says)):
        _ = run.gpu_ms


@here
@pytest.mark.parametrize('name, count, first, last', [
    ('trt101601_dumpProfile_no_summary.log', 15, ('__mye59_0_myl0_0', 31.40, 0.0017, 0.0018, 2.1), ('__myl_Cast_myl5_7', 65.52, 0.0036, 0.0036, 4.3)),
    ('trt10_alexnet_fp16_doc_excerpts.log', 14, (
        'Reformatting CopyNode for Input Tensor 0 to /features/features.0/Conv + /features/features.1/Relu', 135.15, 0.0093, 0.0092, 1.8),
     ('/classifier/classifier_6/Gemm_myl9_4', 448.27, 0.0307, 0.0307, 5.9))])
def test_tables_of_layers(name, count, first, last):
    run, = parse_log(text(name))
    assert (len(run.layers), run.layers[0], run.layers[-1]) == (count, first, last)


def test_tables_of_layers_before_tensorrt_10_begin_with_the_layer():
    """As the facts describe it: no fixture has one."""
    run, = parse_log('\n'.join(f'[04/07/2022-19:40:17] [I] {line}' for line in (
        '=== Profile (100 iterations ) ===', '               Layer   Time (ms)   Avg. Time (ms)   Median Time (ms)   Time %',
        '   conv1 + relu 2        12.50           0.1250             0.1240     62.5',
        '               fc         7.50           0.0750             0.0740     37.5',
        '            Total        20.00           0.2000             0.1980    100.0')))
    assert run.layers == [('conv1 + relu 2', 12.5, 0.125, 0.124, 62.5), ('fc', 7.5, 0.075, 0.074, 37.5)]


LINE = '[04/07/2022-19:40:17] [I] GPU Compute Time: min = 1 ms, max = 2.5e+01 ms, mean = 3 ms, median = {} ms, percentile(99%) = 4 ms'
BEGIN = '&&&& RUNNING TensorRT.trtexec [TensorRT v8401] # trtexec\n'
END = '\n&&&& {} TensorRT.trtexec [TensorRT v8401] # trtexec\n'


@pytest.mark.parametrize('log, says', [
    (BEGIN, 'its log ends before'), (BEGIN + LINE.format(0) + END.format('PASSED'), 'no measurement'), ('', None),
    (BEGIN + LINE.format(2) + END.format('FAILED'), 'does not say why'),
    (BEGIN + '[04/07/2022-19:40:17] [E] out of memory\n', 'out of memory'),
    (BEGIN + '[04/07/2022-19:40:17] [V] GPU Compute Time: the GPU latency to execute the kernels\n' + END.format('PASSED'), 'printed no'),
    (BEGIN + LINE.format(2).replace('[I]', '[V]') + END.format('PASSED'), 'printed no')])
def test_logs_that_say_nothing_useful(log, says):
    runs = parse_log(log)
    assert (says is None) == (not runs)
    for run in runs:
        with pytest.raises(RunnerError, match=says):
            _ = run.gpu_ms


@pytest.mark.parametrize('value', ['1e999', '-1'])
def test_numbers_that_are_no_times(value):
    with pytest.raises(RunnerError, match='no time'):
        parse_log(LINE.format(value))


def test_other_lines_around():
    """What a shell prints before, scientific notation, and two summaries, which are ambiguous."""
    run, = parse_log('some warning\n' + BEGIN + '[04/07/2022-19:40:17] [I] Throughput: 2.5e+06 qps\n' + LINE.format(2) + END.format('PASSED') + 'bye')
    assert run.gpu_ms == 2 and run.statistics[GPU]['max'] == 25 and run.throughput == 2.5e6 and run.status == 'PASSED'
    with pytest.raises(RunnerError, match='two summaries'):
        parse_log(LINE.format(2) + '\n' + LINE.format(3))


# -- JSON --------------------------------------------------------------------------------------------------------------------

@here
@pytest.mark.parametrize('name', JSONS)
def test_json_files(name):
    assert {kind for kind, _ in parse_json(text(name))} == {JSONS[name]}


@here
def test_times():
    """The median of TensorRT 7's includes the warm-up, so that it differs a little from the printed one."""
    found = parse_json(text('trt7_jetson_times.json'))
    assert [(len(v), pytest.approx(median(v), rel=1e-6)) for _, v in found] == [row[4:] for row in JETSON]
    assert all(median(v) == pytest.approx(row[1], rel=0.01) for (_, v), row in zip(found, JETSON))
    for name, first, middle in (('alexnet', 0.497559, 0.497559), ('resnet18', 0.27832, 0.276367)):
        (_, values), = parse_json(text(f'trt10_{name}_fp16_times_first500.json'))
        assert (len(values), values[0], median(values)) == (500, first, middle)


@here
def test_profiles_and_layers():
    (_, (count, rows)), = parse_json(text('trt10_alexnet_fp16_profile.json'))
    assert count == 14590 and len(rows) == 14 and rows[1] == (
        '/features/features.0/Conv + /features/features.1/Relu', 355.08, 0.0243372, 0.024576, 4.643)
    assert sum(r[4] for r in rows) == pytest.approx(100, abs=0.01)
    old = parse_json(text('trt7_jetson_profile.json'))
    assert [c for _, (c, _) in old] == [row[4] for row in JETSON] and {r[3] for _, (_, rs) in old for r in rs} == {None}
    assert old[0][1][1][0] == ('conv1 + conv1_relu + pool1 input reformatter 0', 53.3021, 0.0526181, None, 1.73547)
    (_, layers), = parse_json(text('trt101601_exportLayerInfo.json'))
    assert len(layers) == 9 and layers[0]['Name'] == 'node_conv2d + node_relu'


@here
@pytest.mark.parametrize('name', NO_JSON)
def test_what_trtexec_did_not_write(name):
    with pytest.raises(RunnerError, match='neither times nor a profile nor layers'):
        parse_json(text(name))


@pytest.mark.parametrize('content', [
    '', '{', '[{"computeMs": 1}]', '[{"computeMs": NaN, "latencyMs": 1}]', '[{"computeMs": "x", "latencyMs": 1}]', '[1, 2]', '[]',
    '[{"count": 3}, {"name": "a"}]', '[{"computeMs": 1, "latencyMs": 1}] [', '[' * 100_000, '[{"computeMs": -1, "latencyMs": 1}]'])
def test_broken_json(content):
    with pytest.raises(RunnerError, match='no time|not a JSON file that trtexec writes'):
        parse_json(content)


# -- command line ------------------------------------------------------------------------------------------------------------

@here
def test_every_option_exists():
    known = set(re.findall(r'^  (--\w+)', text('trt101601_help.txt'), re.MULTILINE))
    lines = [command('m.onnx', precision, save='e', times='t', shapes={'x': (1, 3, 8, 8)}, level=3, timing_cache='c', cuda_graph=True,
                     iterations=5, duration=1)
             for precision in ('fp32', 'fp16', 'int8')] + [command('m.onnx', load='e')]
    passed = {a.partition('=')[0] for line in lines for a in line[1:]}
    assert len(known) > 80 and passed <= known and {'--fp16', '--int8', '--loadEngine', '--exportTimes', '--timingCacheFile'} <= passed
    source = Path(trtexec.__file__).read_text()
    assert {o for o in re.findall(r'--[a-zA-Z]\w+', source) if o not in ('--help',)} <= known


def test_command_lines():
    assert command('m.onnx') == ['trtexec', '--onnx=m.onnx', '--device=0']
    assert command('m.onnx', iterations=7, duration=2)[-2:] == ['--iterations=7', '--duration=2']
    line = command('m.onnx', 'fp16', save='e', shapes={'a': (2, 3, 8, 8)}, level=0, cuda_graph=True)
    assert {'--fp16', '--saveEngine=e', '--shapes=a:2x3x8x8', '--builderOptimizationLevel=0', '--useCudaGraph'} < set(line)
    assert not {'--onnx=m.onnx', '--fp16'} & set(command('m.onnx', 'fp16', load='e'))


# -- the whole path, through a program that prints a log and writes times ------------------------------------------------------

FAKE = '''#!{python}
import json, sys, pathlib
here = pathlib.Path(__file__).parent
if '--help' in sys.argv:
    print((here / 'help').read_text())
    sys.exit()
with (here / 'calls').open('a') as file:
    print(' '.join(sys.argv[1:]), file=file)
options = dict(a.split('=') for a in sys.argv[1:] if '=' in a)
if '--saveEngine' in options:
    assert pathlib.Path(options['--onnx']).read_bytes()
    pathlib.Path(options['--saveEngine']).write_text('engine')
else:
    assert pathlib.Path(options['--loadEngine']).read_text() == 'engine'
queue = json.loads((here / 'queue').read_text())
log, times, code = queue.pop(0) if len(queue) > 1 else queue[0]
(here / 'queue').write_text(json.dumps(queue))
if times:
    pathlib.Path(options['--exportTimes']).write_text(json.dumps([{{'computeMs': t, 'latencyMs': t}} for t in times]))
print(log)
sys.exit(code)
'''
STEADY = [0.0361328 + 0.00001 * k for k in range(-10, 11)]
SHAKY = [0.0361328 + 0.001 * k for k in range(-10, 11)]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a fake trtexec on the PATH; returns what sets its answers and what gives its calls."""
    file = tmp_path / 'bin' / 'trtexec'
    file.parent.mkdir()
    file.write_text(FAKE.format(python=sys.executable))
    file.chmod(0o755)
    monkeypatch.setenv('PATH', f'{file.parent}{os.pathsep}{os.environ["PATH"]}')

    def answers(*queue, options=None):
        known = text('trt101601_help.txt') if options is None else '\n'.join(options)
        (file.parent / 'help').write_text(known)
        (file.parent / 'queue').write_text(json.dumps(queue))
        (file.parent / 'calls').write_text('')
        return lambda: (file.parent / 'calls').read_text().splitlines()

    return answers


@here
def test_measure_runs_the_program(program):
    calls = program((text('trt101601_onnx_mnist_FULL.log'), STEADY, 0))
    backend = open_backend('trtexec', precision='fp16', level=2)
    found = backend.measure(conv_file(4), 4, runs=10, seconds=0.3)
    assert found.batch_ms == 0.0361328 and found.ms == 0.0361328 / 4 and found.runs == 21 and not found.disturbed
    line, = calls()
    assert '--fp16' in line and '--builderOptimizationLevel=2' in line and '--duration=3' in line and '--shapes' not in line
    told = json.loads(json.dumps(backend.describe()))
    assert told['tensorrt'] == '10.16.1' and '--fp16' in told['command'] and told['measures'] == 'median GPU Compute Time'


@here
def test_a_file_for_any_batch_gets_its_shape(program):
    calls = program((text('trt101601_onnx_mnist_FULL.log'), STEADY, 0))
    open_backend('trtexec').measure(conv_file(None), 3)
    assert '--shapes=input:3x3x8x8' in calls()[0]


@here
def test_by_default_it_runs_as_long_as_by_itself_and_what_ran_is_recorded(program, tmp_path):
    """10 iterations in 3 s, not the loop of the other backends; no warm-up of calls, which it does not have."""
    calls = program((text('trt101601_onnx_mnist_FULL.log'), STEADY, 0))
    file = tmp_path / 'm.onnx'
    file.write_bytes(conv_file(1))
    for options, runs, duration in (({}, 10, 3), ({'preset': 'prunet', 'precision': 'fp32'}, 10, 3), ({'runs': 20, 'seconds': 0.1}, 20, 2)):
        found = measure(file, backend='trtexec', **options)
        assert f'--iterations={runs} --duration={duration}' in calls()[-1] and '--warmUp' not in calls()[-1]
        assert found.loop == {'runs': runs, 'seconds': pytest.approx(duration / runs), 'max_spread': 0.1, 'attempts': 3}
        assert '--iterations' not in found.backend['command']
    with pytest.raises(RunnerError, match="trtexec has no 'warmup' of the timing loop: there are runs, seconds"):
        measure(file, backend='trtexec', warmup=3)


@here
def test_the_gpu_is_the_one_asked_for(program, monkeypatch):
    calls = program((text('trt101601_onnx_mnist_FULL.log'), STEADY, 0))
    monkeypatch.setattr('timm_width.latency.runner.base.gpu_name', lambda index: {'device': f'number {index}'})
    backend = open_backend('trtexec', device=2)
    backend.measure(conv_file(1))
    assert '--device=2' in calls()[0] and backend.describe()['device'] == 'number 2'


@here
def test_what_is_disturbed_is_run_again_on_the_same_engine(program):
    log = text('trt101601_onnx_mnist_FULL.log')
    calls = program((log, SHAKY, 0), (log, STEADY, 0))
    found = open_backend('trtexec').measure(conv_file(1))
    assert found.attempts == 2 and not found.disturbed
    assert ['--saveEngine' in c for c in calls()] == [True, False] and '--loadEngine' in calls()[1]
    program((log, SHAKY, 0))
    found = open_backend('trtexec').measure(conv_file(1), attempts=2)
    assert found.attempts == 2 and found.disturbed


@here
def test_of_several_engines_the_middle_one_counts(program):
    log = text('trt101601_onnx_mnist_FULL.log')
    queue = [(log.replace('median = 0.0361328', f'median = {0.0361328 * f:.6f}'), [t * f for t in STEADY], 0) for f in (3, 1, 2)]
    calls = program(*queue)
    found = open_backend('trtexec', engines=3).measure(conv_file(1))
    assert found.batch_ms == pytest.approx(2 * 0.0361328, rel=1e-4) and np.allclose(found.builds, [0.0361328 * f for f in (1, 2, 3)], rtol=1e-4)
    assert len(calls()) == 3 and all('--saveEngine' in c for c in calls())


@here
@pytest.mark.parametrize('log, times, code, says', [
    ('trt101300_FAILED_missing_onnx.log', STEADY, 1, 'exit code 1.*cannot be found'),
    ('trt101601_dumpProfile_no_summary.log', STEADY, 0, 'network timing is not reported'),
    ('trt101601_skipInference_dumpLayerInfo.log', STEADY, 0, '--skipInference is added'),
    ('trt101601_onnx_mnist_FULL.log', None, 0, 'wrote no times'),
    ('trt101601_onnx_mnist_FULL.log', [1.] * 5, 0, 'printed a median GPU Compute Time of 0.0361328 ms, and wrote times with 1.0'),
    ('trt8x_no_timestamp_prefix_excerpt.log', [34.4187], 0, 'ended before'),
    ('trt7_jetson_resnet50_int8_multi.log', STEADY, 0, '7 runs instead of one'),
    ('trt101601_onnx_mnist_FULL.log', STEADY, -9, 'exit code')])
def test_what_goes_wrong_is_said(log, times, code, says, program):
    program((text(log), times, code))
    with pytest.raises(RunnerError, match=says):
        open_backend('trtexec').measure(conv_file(1))


@here
def test_tensorrt_11_has_no_precision_flags(program):
    """Then the file says the precision: float32 cannot be measured as float16."""
    log, known = text('trt101601_onnx_mnist_FULL.log'), text('trt101601_help.txt')
    calls = program((log, STEADY, 0), options=[line for line in known.splitlines() if not re.match(r'  --(fp16|int8|best)', line) and 'Note: --fp16' not in line])
    backend = open_backend('trtexec', precision='fp16')
    with pytest.raises(RunnerError, match='computes in the precision of the file, and this one is fp32: export it in fp16'):
        backend.measure(conv_file(1))
    backend.measure(conv_file(1, half=True))
    assert len(calls()) == 1 and '--fp16' not in calls()[0]


@here
@pytest.mark.parametrize('options, says', [
    ({'level': 5}, 'has no --builderOptimizationLevel'), ({'engines': 0}, 'engines'), ({'engines': 2, 'timing_cache': 'x'}, 'same kernels'),
    ({'precision': 'fp8'}, 'fp32 or fp16 or int8'), ({'lvel': 1}, "did you mean 'level'")])
def test_wrong_options(options, says, program):
    program((), options=['--onnx', '--device', '--exportTimes', '--saveEngine', '--iterations', '--duration', '--timingCacheFile'])
    with pytest.raises(RunnerError, match=says):
        open_backend('trtexec', **options)


def test_no_program(monkeypatch):
    monkeypatch.setenv('PATH', '')
    with pytest.raises(RunnerError, match="'trtexec' is not on the PATH"):
        open_backend('trtexec')


@here
def test_a_program_that_never_ends_is_stopped(program, monkeypatch):
    program((text('trt101601_onnx_mnist_FULL.log'), STEADY, 0))
    backend = open_backend('trtexec', timeout=60)
    backend.timeout = 0.001
    with pytest.raises(RunnerError, match='stopped after 0.001 s'):
        backend.measure(conv_file(1))
