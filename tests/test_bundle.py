"""A bundle runs without torch and without us, loses nothing when it is killed, and refuses what is broken."""
import ast
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from timm_width import cli
from timm_width.latency import runner

onnx = pytest.importorskip('onnx', reason="needs the extra 'onnx'")
pytest.importorskip('onnxruntime', reason="needs the extra 'onnx'")
pytest.importorskip('onnxscript', reason="needs the extra 'onnx'")

from timm_width.latency import onnx_graph  # noqa: E402
from timm_width.latency.onnx_graph import RecipeError  # noqa: E402
from timm_width.latency.runner.backends import open_backend  # noqa: E402
from timm_width.latency.runner.errors import RunnerError  # noqa: E402
from timm_width.latency.runner.main import GIVE_UP, REFERENCE, main, measure_bundle  # noqa: E402
from timm_width.latency.runner.manifest import read_manifest  # noqa: E402
from timm_width.latency.runner.results import scan_results  # noqa: E402
from timm_width.latency.runner.timing import Timing  # noqa: E402

SAMPLES = 12
EXPORT = ['latency', 'export', 'test_resnet', '--grid', '0.5,1', '--width-divisor', '4', '--img-size', '32', '--num-classes', '5']
QUICK = ['--backend', 'onnxruntime', '--threads', '1', '--runs', '2', '--seconds', '0']
# what a target has: no torch, nothing of ours, nothing of the packages that an export needs
ISOLATED = """
import runpy, sys
for name in ('torch', 'torchvision', 'timm', 'timm_width', 'scipy', 'onnx_ir', 'onnxscript', 'tqdm', 'safetensors', 'yaml'):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp('bundles') / 'bundle'
    assert cli.main([*EXPORT, '--samples', str(SAMPLES), '--out', str(out)]) == 0
    return out


@pytest.fixture
def bundle(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / 'bundle')


def command(bundle, *flags):
    return [sys.executable, '-I', '-c', ISOLATED, str(bundle / 'run.py'), *QUICK, *flags]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(path):
    return [row['index'] for row in lines(path)[1:] if 'index' in row]


# -- the bundle ------------------------------------------------------------------------------------------------------------


def test_what_is_in_a_bundle(exported):
    assert sorted(p.name for p in exported.iterdir()) == ['manifest.json', 'model.onnx', 'run.py', 'runner']
    here = Path(runner.__file__).parent
    assert {p.name for p in (exported / 'runner').iterdir()} == {p.name for p in here.glob('*.py')}
    assert all(p.read_bytes() == (here / p.name).read_bytes() for p in (exported / 'runner').iterdir())
    data = json.loads((exported / 'manifest.json').read_text())
    assert (data['architecture'], data['input_size'], data['num_classes'], data['batch'], data['precision']) == (
        'test_resnet', [3, 32, 32], 5, 1, 'fp32')
    manifest = read_manifest(exported)
    assert len(manifest.configurations) == SAMPLES and {c.use for c in manifest.configurations} == {'train', 'valid'}
    assert all(w in data['grid'][name] for c in manifest.configurations for name, w in c.widths.items())
    assert str(exported.parent) not in (exported / 'manifest.json').read_text()  # nor any path of this machine
    assert b'site-packages' not in (exported / 'model.onnx').read_bytes()


def test_the_runner_runs_alone_and_measures_each_configuration_once(bundle):
    done = subprocess.run(command(bundle), capture_output=True, text=True, cwd='/')
    assert done.returncode == 0, done.stderr
    assert f'{SAMPLES} of {SAMPLES} configurations measured' in done.stdout
    assert f'{SAMPLES}/{SAMPLES} (' in done.stderr and 'left' in done.stderr
    found = scan_results(bundle / 'results.jsonl', read_manifest(bundle))
    header, rows = found.header, found.rows
    assert [row['index'] for row in rows] == list(range(SAMPLES))
    assert all(row['ms'] > 0 and row['use'] == c.use for row, c in zip(rows, read_manifest(bundle).configurations))
    assert header['backend']['threads'] == 1 and header['batch'] == 1 and header['host']['numpy']
    before = (bundle / 'results.jsonl').read_bytes()
    again = subprocess.run(command(bundle), capture_output=True, text=True, cwd='/')
    assert again.returncode == 0 and (bundle / 'results.jsonl').read_bytes() == before


def test_a_killed_run_goes_on_where_it_was(bundle):
    results = bundle / 'results.jsonl'
    process = subprocess.Popen([*command(bundle), '--seconds', '0.2'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not results.exists() or len(results.read_bytes().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = measured(results)
    assert 0 < len(killed) < SAMPLES
    with open(results, 'ab') as file:
        file.write(b'{"index": 7, "use": "tra')
    assert [r['index'] for r in scan_results(results).rows] == killed  # stopping early is fine, as is a line that was cut off
    done = subprocess.run([*command(bundle), '--seconds', '0.2', '--limit', '8'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert measured(results) == list(range(8))
    assert [row['retry'] for row in lines(results) if 'retry' in row] == [len(killed)]
    assert sum('reference' in row for row in lines(results)) == 1


def test_ctrl_c_says_how_to_go_on(bundle):
    results = bundle / 'results.jsonl'
    process = subprocess.Popen([*command(bundle), '--seconds', '0.5'], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))  # a job in the background ignores it
    deadline = time.monotonic() + 60
    while not results.exists() or len(results.read_bytes().splitlines()) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and 'goes on from there' in told and 'Traceback' not in told
    assert lines(results)[-1] == {'stopped': len(measured(results))}


def test_float16(tmp_path):
    out = tmp_path / 'half'
    assert cli.main([*EXPORT, '--samples', '2', '--fp16', '--batch', '2', '--out', str(out)]) == 0
    assert main(QUICK, out) == 0
    found = scan_results(out / 'results.jsonl')
    rows = found.rows
    assert found.header['precision'] == 'fp16' and len(rows) == 2 and rows[0]['batch'] == 2
    assert rows[0]['ms'] == pytest.approx(rows[0]['batch_ms'] / 2)


def test_of_a_float16_bundle_only_the_largest_network_is_tried_for_overflows(tmp_path, monkeypatch):
    """On a few images; the narrower ones are parts of it."""
    tried = []
    monkeypatch.setattr(onnx_graph, 'check_range', lambda path, images: tried.append(len(images)))
    assert cli.main([*EXPORT, '--samples', '2', '--fp16', '--batch', '64', '--out', str(tmp_path / 'half')]) == 0
    assert tried == [onnx_graph.FEW]


def test_a_grid_with_groups_of_one_width(tmp_path):
    out = tmp_path / 'b'
    flags = ['latency', 'export', 'test_resnet', '--grid', '0.75,1', '--img-size', '32', '--num-classes', '5', '--samples', '3']
    assert cli.main([*flags, '--out', str(out)]) == 0
    grid = read_manifest(out).data['grid']
    assert {len(w) for w in grid.values()} == {1, 2} and not (out / 'networks').exists()
    assert main(QUICK, out) == 0 and len(scan_results(out / 'results.jsonl').rows) == 3


def test_a_net_that_cannot_be_cut_is_exported_file_by_file(tmp_path, capsys, monkeypatch):
    def refuse(*args):
        raise RecipeError('weights depend on other layers')

    monkeypatch.setattr('timm_width.latency.bundle.find_recipe', refuse)
    export = [*EXPORT, '--out', str(tmp_path / 'b')]
    assert cli.main([*export, '--samples', '3', '--max-files', '2']) == 2
    assert 'cannot be cut from one ONNX file (weights depend' in capsys.readouterr().err and not (tmp_path / 'b').exists()
    assert cli.main([*export, '--samples', '2']) == 0
    assert 'exported one by one (weights depend' in capsys.readouterr().out
    assert len(list((tmp_path / 'b' / 'networks').iterdir())) == 2
    assert main(QUICK, tmp_path / 'b') == 0
    assert len(scan_results(tmp_path / 'b' / 'results.jsonl').rows) == 2


@pytest.mark.parametrize('flags, said', [
    (['--samples', '0'], '--samples must be at least 1'),
    (['--samples', '2', '--batch', '0'], '--batch must be at least 1'),
    (['--samples', '2', '--batch', '1000000000'], '--batch 1000000000: that many images'),
    (['--samples', '2', '--img-size', '100000'], 'too large'),
    (['--samples', '2', '--num-classes', '0'], '--num-classes must be at least 1'),
    (['--samples', '2', '--grid', '1'], 'nothing to compare'),
    (['--samples', '2', '--grid', 'nothing'], 'is not a grid'),
    (['--samples', '2', '--fix', 'nothing'], 'fits no searchable group'),
    (['--samples', 'many'], 'invalid int value'),
    (['--samples', '2', '--sample', '2'], 'unrecognized'),
])
def test_wrong_flags_are_one_line(tmp_path, capsys, flags, said):
    assert cli.main([*EXPORT, *flags, '--out', str(tmp_path / 'b')]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count('\n') == 1 and not (tmp_path / 'b').exists()


def test_nothing_of_the_users_is_replaced(bundle, tmp_path, capsys):
    again = [*EXPORT, '--samples', '2', '--out']
    before = {p: p.read_bytes() for p in bundle.rglob('*') if p.is_file()}
    assert cli.main([*again, str(bundle)]) == 2 and '--overwrite' in capsys.readouterr().err
    (bundle / 'results.jsonl').write_text('{}\n')
    assert cli.main([*again, str(bundle), '--overwrite']) == 2 and 'would be lost' in capsys.readouterr().err
    (bundle / 'results.jsonl').unlink()
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.tex').write_text('x')
    assert cli.main([*again, str(tmp_path / 'mine'), '--overwrite']) == 2 and 'is not a bundle' in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in bundle.rglob('*') if p.is_file()}
    assert cli.main([*again, str(bundle), '--overwrite']) == 0
    assert len(read_manifest(bundle).configurations) == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]


@pytest.mark.parametrize('line', [[], ['nothing'], ['exprt']])
def test_the_commands_of_latency(line, capsys):
    assert cli.main(['latency', *line]) == 2
    assert 'there are export' in capsys.readouterr().err
    assert cli.main(['latency', '--help']) == 0 and 'export' in capsys.readouterr().out


# -- the loop, on a machine that is made up ----------------------------------------------------------------------------------


class Fake:
    """A backend that takes as long as the network is large, and fails where it is told to."""

    def __init__(self, fails=(), name='fake', precision='fp32', stop=None):
        self.fails, self.name, self.precision, self.stop, self.calls = set(fails), name, precision, stop, 0

    def describe(self):
        return {'backend': self.name, 'device': 'x'}

    def measure(self, model, batch, **loop):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        if self.calls - 1 in self.fails:
            raise RuntimeError(f'cannot run call {self.calls - 1}\nand more')
        return Timing.of([len(model) * 1e-6] * 3, batch)


def test_configurations_that_fail_do_not_cost_the_others(bundle):
    results = bundle / 'r.jsonl'
    said = measure_bundle(read_manifest(bundle), Fake(fails=(0, 3)), results)
    assert f'{SAMPLES - 2} of {SAMPLES} configurations measured, 2 failed (the first: cannot run call 0)' in said
    found = scan_results(results)
    assert [row['index'] for row in found.failed] == [0, 3]
    assert [row['index'] for row in scan_results(results).rows] == [i for i in range(SAMPLES) if i not in (0, 3)]
    backend = Fake()
    measure_bundle(read_manifest(bundle), backend, results)
    assert backend.calls == 0  # they are not tried again


def test_if_the_first_all_fail_it_stops_and_may_begin_again(bundle):
    results, backend = bundle / 'r.jsonl', Fake(fails=range(100))
    with pytest.raises(RunnerError, match=f'the first {GIVE_UP} configurations all failed.*cannot run call {GIVE_UP - 1}'):
        measure_bundle(read_manifest(bundle), backend, results)
    assert backend.calls == GIVE_UP
    assert not any('index' in row for row in lines(results))
    measure_bundle(read_manifest(bundle), Fake(name='mended'), results)
    assert measured(results) == list(range(SAMPLES)) and lines(results)[0]['backend']['backend'] == 'mended'


def test_the_first_configuration_is_measured_now_and_then(bundle, monkeypatch):
    monkeypatch.setattr('timm_width.latency.runner.main.REFERENCE', 5)
    said = measure_bundle(read_manifest(bundle), Fake(), bundle / 'r.jsonl')
    assert [row['reference'] for row in lines(bundle / 'r.jsonl') if 'reference' in row] == [5, 10]
    assert 'the first one, 3 times, varied by 0.0%' in said and REFERENCE == 25


def test_what_other_load_disturbed_is_timed_once_more_and_the_calmer_timing_counts(bundle):
    """In the file, all that was measured stays; a reader sees the calmer timing, at its own place in time."""
    results, manifest = bundle / 'r.jsonl', read_manifest(bundle)

    class Disturbed(Fake):
        spreads = {2: 0.5, 5: 0.3}  # call -> spread

        def measure(self, *args, **kwargs):
            call, timing = self.calls, super().measure(*args, **kwargs)
            spread = {**self.spreads, SAMPLES + 1: 0.02, SAMPLES + 2: 0.4}.get(call, 0.)  # after the reference: 2 calm, 5 worse
            return replace(timing, spread=spread, disturbed=spread > 0.1)

    said = measure_bundle(manifest, Disturbed(), results)
    assert [row['again'] for row in lines(results) if 'again' in row] == [2, 5] and '1 disturbed by other load' in said
    found = scan_results(results, manifest)
    assert {row['index']: row['spread'] for row in found.rows if row['spread']} == {2: 0.02, 5: 0.3}
    assert [row['position'] for row in found.rows] == [k if k != 2 else SAMPLES + 1 for k in range(SAMPLES)]
    assert [row['position'] for row in found.references] == [SAMPLES, SAMPLES + 3]
    measure_bundle(manifest, Fake(), results)  # and again, by the next call
    assert not [row for row in scan_results(results, manifest).rows if row['disturbed']]


def test_a_configuration_that_kills_the_program_twice_is_given_up(bundle):
    results, manifest = bundle / 'r.jsonl', read_manifest(bundle)

    class Crash(BaseException):
        """What no runner can catch."""

    class Deadly(Fake):
        def measure(self, model, batch, **loop):
            if model == manifest.network(4):
                raise Crash
            return super().measure(model, batch, **loop)

    for _ in range(2):
        with pytest.raises(Crash):
            measure_bundle(manifest, Deadly(), results)
    assert measured(results) == [0, 1, 2, 3]
    measure_bundle(manifest, Deadly(), results)
    assert sorted(measured(results)) == list(range(SAMPLES))
    assert [row['index'] for row in scan_results(results).failed] == [4]
    assert 'killed' in scan_results(results).failed[0]['error']


def test_the_death_of_the_device_costs_no_configuration(bundle):
    """After five in a row, a network that was measured is tried: it fails, so nothing is said of the five, and the next run has them."""
    results, manifest = bundle / 'r.jsonl', read_manifest(bundle)
    backend = Fake(fails=range(3, 100))
    with pytest.raises(RunnerError, match=f'the last {GIVE_UP} configurations failed, and so does 0.*cannot run call 8'):
        measure_bundle(manifest, backend, results)
    assert backend.calls == 3 + GIVE_UP + 1 and measured(results) == [0, 1, 2] and lines(results)[-1] == {'stopped': 3}
    with pytest.raises(RunnerError, match='the last 1 configurations failed'):
        measure_bundle(manifest, Fake(fails=range(100)), results, limit=4)
    measure_bundle(manifest, Fake(), results)
    found = scan_results(results)
    assert [row['index'] for row in found.rows] == list(range(SAMPLES)) and not found.failed


@pytest.mark.parametrize('first, last', [(3, 10), (9, 12), (11, 12)])
def test_many_networks_that_fail_in_a_row_are_failed_if_the_device_works(bundle, first, last):
    """Also the last ones, after which no other is measured."""
    manifest, results = read_manifest(bundle), bundle / 'r.jsonl'
    bad = [manifest.network(i) for i in range(first, last)]

    class Limited(Fake):
        def measure(self, model, batch, **loop):
            if model in bad:
                raise RuntimeError('too wide')
            return super().measure(model, batch, **loop)

    measure_bundle(manifest, Limited(), results)
    found = scan_results(results)
    assert [row['index'] for row in found.failed] == [*range(first, last)] and len(found.rows) == SAMPLES - (last - first)


def test_a_run_that_ended_in_good_order_counts_as_no_kill(bundle):
    """A configuration that kills the program is given up after two kills, however many runs were ended before it."""
    results, manifest = bundle / 'r.jsonl', read_manifest(bundle)

    class Crash(BaseException):
        """What no runner can catch."""

    class Deadly(Fake):
        def measure(self, model, batch, **loop):
            if model == manifest.network(4):
                raise Crash
            return super().measure(model, batch, **loop)

    for limit in (2, 4):
        measure_bundle(manifest, Fake(), results, limit=limit)
        assert lines(results)[-1] == {'stopped': limit}
    for _ in range(2):
        with pytest.raises(Crash):
            measure_bundle(manifest, Deadly(), results)
        assert not scan_results(results).failed
    measure_bundle(manifest, Deadly(), results)
    assert [row['index'] for row in scan_results(results).failed] == [4]
    measure_bundle(manifest, Deadly(), results)
    assert sorted(measured(results)) == list(range(SAMPLES))


def test_a_run_stopped_by_hand_twice_gives_nothing_up(bundle):
    results, manifest = bundle / 'r.jsonl', read_manifest(bundle)
    for stop in (4, 2, 2, 1, 1, 1):  # in the later ones, the first call is the reference
        with pytest.raises(KeyboardInterrupt):
            measure_bundle(manifest, Fake(stop=stop), results)
    measure_bundle(manifest, Fake(), results)
    assert measured(results) == list(range(SAMPLES)) and not scan_results(results).failed


@pytest.mark.parametrize('other, said', [
    ({'name': 'other'}, 'backend.backend fake, and this is other'),
    ({'precision': 'fp16'}, 'precision fp32, and this is fp16'),
])
def test_measurements_of_different_things_are_not_mixed(bundle, other, said):
    results, manifest = bundle / 'r.jsonl', read_manifest(bundle)
    measure_bundle(manifest, Fake(), results, limit=2)
    before = results.read_bytes()
    with pytest.raises(RunnerError, match=said):
        measure_bundle(manifest, Fake(**other), results)
    with pytest.raises(RunnerError, match='loop .*give another --results'):
        measure_bundle(manifest, Fake(), results, {'runs': 7})
    edit(bundle, lambda d: d.update(seed=1))
    with pytest.raises(RunnerError, match='another bundle'):
        measure_bundle(read_manifest(bundle), Fake(), results)
    assert results.read_bytes() == before


def test_a_file_that_is_no_results_file_is_left_alone(bundle):
    for text in (b'my notes', b'my notes\n', b'{"a": 1}\n'):
        (bundle / 'notes').write_bytes(text)
        with pytest.raises(RunnerError):
            measure_bundle(read_manifest(bundle), Fake(), bundle / 'notes')
        assert (bundle / 'notes').read_bytes() == text
    (bundle / 'cut').write_bytes(b'{"format": 1, "mani')  # a header that was cut off
    measure_bundle(read_manifest(bundle), Fake(), bundle / 'cut')
    assert measured(bundle / 'cut') == list(range(SAMPLES))


def test_two_runs_do_not_write_one_file(bundle):
    fcntl = pytest.importorskip('fcntl')
    with open(bundle / 'r.jsonl', 'ab') as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunnerError, match='another run'):
            measure_bundle(read_manifest(bundle), Fake(), bundle / 'r.jsonl')


# -- what is broken ----------------------------------------------------------------------------------------------------------


def edit(bundle, change):
    path = bundle / 'manifest.json'
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


MANIFESTS = {
    'format': lambda d: d.update(format=2),
    'no grid': lambda d: d.pop('grid'),
    'empty grid': lambda d: d.update(grid={}),
    'grid not ascending': lambda d: d['grid'].update({next(iter(d['grid'])): [8, 4]}),
    'huge batch': lambda d: d.update(batch=10 ** 9),
    'no model': lambda d: d.pop('model'),
    'model of a number': lambda d: d.update(model=5),
    'no classes': lambda d: d.pop('num_classes'),
    'classes of nothing': lambda d: d.update(num_classes=None),
    'no class': lambda d: d.update(num_classes=0),
    'no arguments': lambda d: d.pop('model_args'),
    'arguments of a list': lambda d: d.update(model_args=[]),
    'versions of a list': lambda d: d.update(versions=['1']),
    'batch of text': lambda d: d.update(batch='1'),
    'input size': lambda d: d.update(input_size=[3, 32]),
    'precision': lambda d: d.update(precision='int4'),
    'no configurations': lambda d: d.update(configurations=[]),
    'use': lambda d: d['configurations'][3].update(use='test'),
    'off the grid': lambda d: d['configurations'][3]['widths'].__setitem__(0, 10 ** 12),
    'too few widths': lambda d: d['configurations'][3]['widths'].pop(),
    'a path outside': lambda d: d['files'][0].update(file='../../secret.onnx'),
    'an absolute path': lambda d: d['files'][0].update(file='/model.onnx'),
    'no digest': lambda d: d['files'][0].pop('sha256'),
    'no recipe': lambda d: d.update(recipe=None),
}


@pytest.mark.parametrize('fault', MANIFESTS)
def test_broken_manifests_are_refused(bundle, fault, capsys):
    edit(bundle, MANIFESTS[fault])
    with pytest.raises(RunnerError, match='manifest.json'):
        read_manifest(bundle)
    assert main(QUICK, bundle) == 2
    error = capsys.readouterr().err
    assert error.startswith('run.py: ') and error.count('\n') == 1 and not (bundle / 'results.jsonl').exists()


@pytest.mark.parametrize('text', [b'', b'{', b'[]', b'\xff\xfe', b'[' * 100000, b'{"format": NaN}', b'{"format": 1, "format": 1}'])
def test_what_is_no_json_is_refused(bundle, text):
    (bundle / 'manifest.json').write_bytes(text)
    with pytest.raises(RunnerError, match='manifest.json'):
        read_manifest(bundle)


def test_broken_networks_are_refused_before_anything_is_written(bundle, capsys):
    model = (bundle / 'model.onnx').read_bytes()
    for broken in (model[:-100], model + b'x', b''):
        (bundle / 'model.onnx').write_bytes(broken)
        assert main(QUICK, bundle) == 2 and 'not that of this bundle' in capsys.readouterr().err
    (bundle / 'model.onnx').unlink()
    assert main(QUICK, bundle) == 2 and 'cannot be read' in capsys.readouterr().err
    (bundle / 'model.onnx').write_bytes(model)
    edit(bundle, lambda d: d.update(input_size=[3, 64, 64]))
    assert main(QUICK, bundle) == 2 and 'takes images of' in capsys.readouterr().err
    edit(bundle, lambda d: d.update(input_size=[3, 32, 32]))
    edit(bundle, lambda d: d['recipe']['groups'][1].__setitem__(1, 10 ** 12))
    assert main(QUICK, bundle) == 2 and 'recipe' in capsys.readouterr().err
    assert not (bundle / 'results.jsonl').exists()


def row(**changes):
    return {'index': 1, 'use': 'train', **Timing.of([1., 1., 1.]).to_json(), **changes}


ROWS = {
    'no time': [{'index': 1, 'use': 'train'}],
    'no ms': [{k: v for k, v in row().items() if k != 'ms'}],
    'NaN': [row(ms=float('nan'))],
    'infinite': [row(batch_ms=float('inf'))],
    'negative': [row(batch_ms=-1., ms=-1.)],
    'zero': [row(batch_ms=0., ms=0.)],
    'text': [row(ms='1')],
    'huge': [row(ms=10 ** 400)],
    'huge time': [row(batch_ms=10 ** 400)],
    'huge batch': [row(batch=10 ** 400)],
    'no percentiles': [row(percentiles={})],
    'another ms': [row(ms=2.)],
    'another batch': [row(batch=2, ms=.5)],
    'twice': [row(), row()],
    'measured and failed': [row(), {'index': 1, 'use': 'train', 'error': 'x'}],
    'unknown': [row(index=SAMPLES)],
    'negative index': [row(index=-1)],
    'no index': [{k: v for k, v in row().items() if k != 'index'}],
    'index of text': [row(index='1')],
    'index true': [row(index=True)],
    'use': [row(use='test')],
    'error without a reason': [{'index': 1, 'use': 'train', 'error': None}],
    'a list': [[1]],
    'a broken reference': [{'reference': 1, 'ms': 1.}],
    'a reference of text': [{'reference': '1', **Timing.of([1., 1., 1.]).to_json()}],
    'a reference of more than there are': [{'reference': 99, **Timing.of([1., 1., 1.]).to_json()}],
    'unknown retry': [{'retry': 10 ** 9}],
}


@pytest.mark.parametrize('fault', ROWS)
def test_broken_results_are_refused(bundle, fault):
    results, manifest = bundle / 'r.jsonl', read_manifest(bundle)
    measure_bundle(manifest, Fake(), results, limit=1)
    assert len(scan_results(results, manifest).rows) == 1
    before = len(lines(results))
    with open(results, 'a') as file:
        file.writelines(json.dumps(r) + '\n' for r in ROWS[fault])
    for check in (manifest, None):
        with pytest.raises(RunnerError, match=f"line {before + len(ROWS[fault])} of '"):
            scan_results(results, check)


def test_results_of_another_bundle_or_of_nothing_are_refused(bundle):
    results, manifest = bundle / 'r.jsonl', read_manifest(bundle)
    with pytest.raises(RunnerError, match='cannot be read'):
        scan_results(results)
    measure_bundle(manifest, Fake(), results, limit=3)
    text = results.read_bytes()
    whole = text.splitlines(keepends=True)
    for broken in (b'', text[:20], b''.join(whole[1:]), whole[0] + whole[1][:-20] + b'\n' + whole[2], b'\0' * 50 + b'\n'):
        results.write_bytes(broken)
        with pytest.raises(RunnerError):
            scan_results(results)
    header = json.loads(whole[0])
    for change in ({'format': 2}, {'configurations': 0}, {'batch': '1'}, {'backend': None}):
        results.write_bytes(json.dumps({**header, **change}).encode() + b'\n' + b''.join(whole[1:]))
        with pytest.raises(RunnerError):
            scan_results(results)
    results.write_bytes(text)
    edit(bundle, lambda d: d.update(architecture='other'))
    with pytest.raises(RunnerError, match='another bundle'):
        scan_results(results, read_manifest(bundle))


def test_backends_that_are_not_there_are_named(bundle, capsys):
    assert main(['--backend', 'onnxruntime', '--limit', '0'], bundle) == 2
    assert '--limit' in capsys.readouterr().err
    assert main(['--backend', 'onnxruntime', '--device', '0'], bundle) == 2
    assert 'onnxruntime computes on the CPU: device is for onnxruntime-cuda' in capsys.readouterr().err
    assert main(['--backend', 'trtexec', '--program', 'no_such_program'], bundle) == 2
    assert 'no_such_program' in capsys.readouterr().err
    with pytest.raises(RunnerError):
        open_backend('nothing')


def test_run_py_is_python_of_old():
    """So that an old Python says which one is needed."""
    from timm_width.latency.bundle import RUN
    ast.parse(RUN, feature_version=(3, 4))
