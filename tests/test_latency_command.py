"""`timm-width latency fit` and `measure`, and searches under a latency budget: from timings to a network that is as fast as said."""
import csv
import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml

import timm_width
from timm_width import cli, target
from timm_width.cost import Macs
from timm_width.data import UsageError
from timm_width.grids import make_grid
from timm_width.latency import build
from timm_width.latency.blocks import add_up
from timm_width.latency.bundle import Order, export_bundle
from timm_width.latency.fit import fit_results, space_of
from timm_width.latency.model import LatencyModel, Validation, space_fingerprint
from timm_width.latency.plan import make_plan
from timm_width.latency.runner.base import Backend
from timm_width.latency.runner.manifest import read_manifest
from timm_width.latency.runner.results import Results
from timm_width.latency.sampling import networks_to_time
from timm_width.trace import trace

MODEL, SIZE, CLASSES = 'test_resnet', 32, 3
GRID = '0.5,0.75,1,1.25'
ORDER = Order(MODEL, GRID, img_size=SIZE, num_classes=CLASSES)
QUICK = {'warmup': 1, 'runs': 2, 'seconds': 0., 'max_spread': 10.}


def milliseconds(space, grid, widths) -> float:
    """A latency that adds up, and stays the same: no clock is asked."""
    return sum((i + 1) * w / space[n].size for i, (n, w) in enumerate(widths.items())) / 100


def row(index: int, use: str, ms: float, **more) -> dict:
    return {'index': index, 'position': index, 'use': use, 'ms': ms, 'batch_ms': ms, 'batch': 1, 'runs': 5, 'mean': 1.2 * ms, 'minimum': 0.9 * ms,
            'spread': 0.02, 'disturbed': False, 'attempts': 1,
            'percentiles': {k: f * ms for k, f in zip(('5', '20', '50', '80', '95', '99'), (.9, .95, 1, 1.1, 1.2, 1.3))}, **more}


@pytest.fixture(scope='module')
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('bundle') / 'b'
    export_bundle(ORDER, folder, partial(networks_to_time, samples=120, seed=0))
    return folder


@pytest.fixture(scope='module')
def measured(bundle):
    """The bundle, and results of it that are as `milliseconds` says."""
    manifest = read_manifest(bundle)
    with torch.device('meta'):
        space = trace(timm.create_model(MODEL, num_classes=CLASSES), (3, SIZE, SIZE))
    rows = [row(i, c.use, milliseconds(space, manifest.data['grid'], c.widths)) for i, c in enumerate(manifest.configurations)]
    header = {'format': 1, 'manifest': manifest.fingerprint, 'architecture': MODEL, 'configurations': len(rows), 'batch': 1,
              'precision': 'fp32', 'backend': {'backend': 'onnxruntime', 'device': 'a CPU of nowhere', 'threads': 1}, 'loop': {},
              'host': {}}
    lines = [{k: v for k, v in r.items() if k != 'position'} for r in rows]
    (bundle / 'results.jsonl').write_text('\n'.join(map(json.dumps, [header, *lines])) + '\n')
    return manifest, Results(header, rows, [], [], {}, 0), space


# -- fit ---------------------------------------------------------------------------------------------------------------------


def test_fit_finds_a_latency_that_adds_up_and_writes_it(measured, bundle, tmp_path, capsys):
    manifest, _, space = measured
    assert cli.main(['latency', 'fit', str(bundle), '--out', str(tmp_path / 'm.json'), '--prior', '0', '--smoothness', '0']) == 0
    said = capsys.readouterr().out
    model = LatencyModel.load(tmp_path / 'm.json')
    assert model.validation.networks == 12 and model.validation.nrmse < 1e-3 and 'NRMSE' in said
    cost = model.cost(space)
    for use, widths in networks_to_time(space, model.tables.grid, 30, seed=9):
        assert cost(widths) == pytest.approx(milliseconds(space, None, widths), rel=2e-2), use
    assert model.backend['device'] == 'a CPU of nowhere' and model.about['networks'] == 108
    pytest.importorskip('matplotlib')
    assert (tmp_path / 'm.png').stat().st_size > 5000


@pytest.mark.parametrize('statistic, factor', [('median', 1), ('minimum', .9), ('p20', .95)])
def test_the_statistic_is_what_is_fitted(measured, statistic, factor):
    manifest, results, space = measured
    usual, fit = (fit_results(manifest, results, space, s) for s in ('median', statistic))
    assert fit.measured == pytest.approx(factor * usual.measured)
    assert fit.predicted == pytest.approx(factor * usual.predicted, rel=1e-3)


def test_disturbed_timings_are_left_out_and_said(measured):
    manifest, results, space = measured
    rows = [dict(r, ms=50., disturbed=True) if r['index'] % 12 == 0 else r for r in results.rows]
    fit = fit_results(manifest, results._replace(rows=rows), space)
    assert fit.notes[0] == '10 of 120 timings were disturbed by other load; 10 of them are left out'
    assert fit.model.validation.nrmse < 0.05 and fit.model.about['notes'] == fit.notes
    rows = [dict(r, disturbed=True) for r in results.rows]
    assert '0 of them are left out, the others used, being so many' in fit_results(manifest, results._replace(rows=rows), space).notes[0]
    rows = [dict(r, disturbed=r['use'] == 'valid' and r['index'] < 90) for r in results.rows]  # too few others to validate on
    assert fit_results(manifest, results._replace(rows=rows), space).model.validation.networks == 12


def test_the_drift_of_the_machine_is_taken_out(measured):
    """It slows down by half; the first network, timed again and again, says so."""
    manifest, results, space = measured

    def slow(r, at):
        return dict(r, **{k: r[k] * (1 + at / 240) for k in ('ms', 'batch_ms', 'minimum', 'mean')})

    rows = [slow(r, r['index']) for r in results.rows]
    again = [dict(slow(results.rows[0], at), reference=at, position=at) for at in range(10, 120, 10)]
    fits = [fit_results(manifest, results._replace(rows=rows, references=refs), space, steady=steady)
            for refs, steady in (([], True), (again, False), (again, True))]
    assert fits[0].model.validation.nrmse == fits[1].model.validation.nrmse > 3 * fits[2].model.validation.nrmse
    assert fits[2].model.validation.nrmse < 0.03 and 'the machine drifted by' in fits[2].notes[0] and not fits[1].notes


def test_stopping_early_is_no_loss_but_of_accuracy(measured):
    manifest, results, space = measured
    fit = fit_results(manifest, results._replace(rows=results.rows[:60]), space)
    assert fit.model.validation.networks == 6 and fit.model.validation.nrmse < 0.05


@pytest.mark.parametrize('count, message', [(8, 'networks were measured to fit to, and at least 10'), (40, 'to validate on, and at least 5')])
def test_too_few_timings_are_refused(measured, count, message, bundle, tmp_path, capsys):
    lines = (bundle / 'results.jsonl').read_text().splitlines(keepends=True)[:count]
    (tmp_path / 'few.jsonl').write_text(''.join(lines))
    assert cli.main(['latency', 'fit', str(bundle), '--results', str(tmp_path / 'few.jsonl'), '--out', str(tmp_path / 'm.json')]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / 'm.json').exists()


@pytest.mark.parametrize('change', [
    {'model': 'hf-hub:timm/resnet18.a1_in1k'}, {'model': 'HF_HUB:timm/resnet18.a1_in1k'}, {'model_args': {'pretrained': True}},
    {'model_args': {'checkpoint_path': '/etc/passwd'}}, {'model_args': {'pretrained_cfg': {'url': 'x'}}},
    {'model_args': {'pretrained_cfg_overlay': {'file': 'x'}}}, {'model_args': {'num_classes': 3}}, {'model_args': {'inputs': 3}}])
def test_a_bundle_from_elsewhere_makes_nothing_be_fetched(measured, bundle, change, monkeypatch):
    """Nor built: it is refused before."""
    manifest = read_manifest(bundle)
    assert space_of(manifest).fingerprint == measured[2].fingerprint
    monkeypatch.setattr('timm_width.latency.fit.create', lambda *args, **kwargs: pytest.fail('it was built'))
    with pytest.raises(UsageError, match='nothing is fetched or loaded for a bundle'):
        space_of(replace(manifest, data={**manifest.data, **change}))


@pytest.mark.parametrize('change, message', [
    ({'ms': float('nan')}, 'NaN'), ({'ms': -1.}, 'ms must be'), ({'ms': None}, ''), ({'batch_ms': 0.}, 'above zero'),
])
def test_results_with_times_that_cannot_be_are_refused(measured, bundle, tmp_path, capsys, change, message):
    lines = (bundle / 'results.jsonl').read_text().splitlines()
    lines[3] = json.dumps({**json.loads(lines[3]), **change})
    (tmp_path / 'bad.jsonl').write_text('\n'.join(lines) + '\n')
    assert cli.main(['latency', 'fit', str(bundle), '--results', str(tmp_path / 'bad.jsonl'), '--out', str(tmp_path / 'm.json')]) == 2
    err = capsys.readouterr().err
    assert 'line 4' in err and message in err and err.count('\n') == 1


@pytest.mark.parametrize('flags, message', [
    (['--out', 'm.txt'], 'ends in .json'), (['--out', 'no/where.json'], "there is no folder 'no'"),
    (['--statistic', 'mode', '--out', 'm.json'], 'must be one of median'), (['--prior', '-1', '--out', 'm.json'], '--prior must be'),
])
def test_wrong_flags_of_fit_are_refused(measured, bundle, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['latency', 'fit', str(bundle), *flags]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


# -- measure -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Times that are measured, but not for long."""
    monkeypatch.setattr(build, 'BRIEF', QUICK)
    for backend in (build._Torch, Backend):
        monkeypatch.setattr(backend, 'brief', QUICK)
    monkeypatch.setattr(build, 'FIRST', 60)
    monkeypatch.setattr(build, 'DRAWN', 80)
    monkeypatch.setattr(build, 'BLOCK_SAMPLES', 3)
    monkeypatch.setattr(target, 'measure_many', partial(target.measure_many, **QUICK))


@pytest.mark.parametrize('backend', ['onnxruntime', 'torch'])
def test_measure_does_the_three_steps_and_goes_on_after_a_kill(quick, tmp_path, capsys, monkeypatch, backend):
    command = ['latency', 'measure', MODEL, '--grid', GRID, '--samples', '70', '--backend', backend, '--threads', '1',
               '--img-size', str(SIZE), '--num-classes', '3', '--device', 'cpu', '--out', str(tmp_path / 'm.json')]
    fit = build.fit_results

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, 'fit_results', killed)
    assert cli.main(command) == 130 and not (tmp_path / 'm.json').exists()
    before = (tmp_path / 'm.bundle' / 'results.jsonl').read_text().splitlines()
    assert (tmp_path / 'm.bundle' / 'model.onnx').exists() == (backend != 'torch')  # which needs neither files nor onnx
    monkeypatch.setattr(build, 'fit_results', fit)
    assert cli.main(command) == 0
    after = (tmp_path / 'm.bundle' / 'results.jsonl').read_text().splitlines()
    assert after[:len(before)] == before and len(before) > 60
    model = LatencyModel.load(tmp_path / 'm.json')
    assert model.backend['backend'] == backend and model.backend['threads'] == 1 and model.batch == 1
    assert model.cost(trace(timm.create_model(MODEL, num_classes=3), (3, SIZE, SIZE)))() > 0
    assert cli.main(command) == 2 and 'exists: give another --out' in capsys.readouterr().err
    for flag, value, what in ('seed', '1', 'seed'), ('num-classes', '4', 'num_classes'), ('grid', '0.5,1', 'grid'), ('samples', '90', 'samples'):
        assert cli.main([*command, '--overwrite', f'--{flag}', value]) == 2
        assert f'holds networks of another {what}' in capsys.readouterr().err
    assert cli.main([*command, '--overwrite', '--threads', '2']) == 2
    assert 'holds networks measured with threads 1, and not 2' in capsys.readouterr().err
    assert cli.main([*command, '--overwrite', '--samples', '76']) == 0  # measures more
    more = (tmp_path / 'm.bundle' / 'results.jsonl').read_text().splitlines()
    assert more[:len(after)] == after and len(more) >= len(after) + 6


def test_measuring_ends_when_more_does_not_help(monkeypatch, tmp_path, bundle, measured):
    """Stages of 10, 20, 40, ...: with timings that add up, the second is as good as the first."""
    manifest, _, space = measured
    asked = []

    class Known:
        precision, brief = 'fp32', {}

        def describe(self):
            return {'backend': 'onnxruntime', 'device': 'a CPU of nowhere', 'threads': 1}

    def measure_bundle(bundle, backend, results, loop, limit):
        asked.append(limit)

    monkeypatch.setattr(build, 'FIRST', 60)
    monkeypatch.setattr(build, 'open_backend', lambda *a, **k: Known())
    monkeypatch.setattr(build, 'measure_bundle', measure_bundle)
    monkeypatch.setattr(build, 'check_begun', lambda *a: None)
    monkeypatch.setattr(build, 'scan_results', lambda path, manifest: measured[1]._replace(rows=measured[1].rows[:asked[-1]]))
    said = []
    fit = build.build_latency_model(ORDER, build.Device('onnxruntime'), 120, bundle, said.append)
    assert asked == [60, 120] and len(said) == 2 and fit.model.validation.nrmse < 0.05


def test_blocks_are_measured_alone(quick, tmp_path, capsys):
    command = ['latency', 'measure', 'resnet10t', '--grid', '0.5,1', '--fix', 'conv1*', 'layer?.0.conv2', 'layer[12]*', '--backend', 'torch',
               '--threads', '1', '--img-size', '32', '--device', 'cpu', '--samples', '3', '--blocks', 'layer[34].0', '--out', str(tmp_path / 'm.json')]
    assert cli.main(command) == 0
    model = LatencyModel.load(tmp_path / 'm.json')
    assert list(model.tables.unary) == ['layer3.0.conv1', 'layer4.0.conv1'] and model.about['kind'] == 'blocks'
    assert list(model.blocks) == ['layer3.0', 'layer4.0'] and model.about['networks'] == 4
    assert model.validation.networks == 3 and 'NRMSE' in capsys.readouterr().out


# -- search ------------------------------------------------------------------------------------------------------------------


def search(images, output, *more, policy='ows', epochs='1'):
    return ['search', '--model', MODEL, '--data-dir', str(images), '-b', '8', '--policy', policy, '--grid', GRID, '--epochs', '0',
            '--search-epochs', epochs, '--warmup-epochs', '0', '--device', 'cpu', '--img-size', str(SIZE), '-j', '0',
            '--output', str(output), *more]


@pytest.fixture(scope='module')
def model_file(measured, tmp_path_factory) -> Path:
    manifest, results, space = measured
    path = tmp_path_factory.mktemp('model') / 'm.json'
    fit_results(manifest, results, space).model.save(path)
    return path


def table(folder):
    with (folder / 'summary.csv').open() as file:
        return {r['network'] + r['budget']: r for r in csv.DictReader(file)}


@pytest.mark.parametrize('policy', ['ows', 'aows', 'uniform'])
def test_a_search_under_a_latency_budget(quick, image_folder, model_file, measured, tmp_path, capsys, policy):
    """Predicted within the budget, predicted and measured in table and config."""
    budgets = ['latency=0.6x', 'latency=0.4ms', 'macs=0.7x']
    assert cli.main(search(image_folder, tmp_path / 'x', '--latency-model', str(model_file), '--budget', *budgets, policy=policy)) == 0
    cost = LatencyModel.load(model_file).cost(measured[2])
    rows = table(tmp_path / 'x')
    limits = {'latency=0.6x': 0.6 * cost(), 'latency=0.4ms': 0.4}
    for text, limit in limits.items():
        spec = timm_width.load_spec(tmp_path / 'x' / text.replace('=', '-'))
        assert cost(spec.widths) <= limit
        assert float(rows[f'found{text}']['predicted_ms']) == pytest.approx(cost(spec.widths), abs=1e-6)
        assert spec.provenance['costs']['latency_ms']['predicted'] == float(rows[f'found{text}']['predicted_ms'])
        assert spec.provenance['costs']['latency_ms']['model']['validation']['networks'] == 12
    assert all(float(r['latency_ms']) > 0 and float(r['predicted_ms']) > 0 for r in rows.values())
    out = capsys.readouterr().out
    assert 'predicted ms' in out and 'predicted by a latency model of test_resnet' in out
    assert 'the latency model was made on a CPU of nowhere' in out  # and this is another


def test_ows_answers_for_a_new_budget_without_training(quick, image_folder, model_file, tmp_path, monkeypatch):
    assert cli.main(search(image_folder, tmp_path / 'x', '--budget', 'macs=0.6x')) == 0
    monkeypatch.setattr('timm_width.engine.Training._run_epoch', None)  # it is not called
    assert cli.main(['search', '--resume', str(tmp_path / 'x'), '--budget', 'latency=0.5x', '--latency-model', str(model_file)]) == 0
    assert float(table(tmp_path / 'x')['foundlatency=0.5x']['predicted_ms']) > 0


def test_a_search_can_make_its_latency_model_first(quick, image_folder, tmp_path, capsys):
    flags = ['--latency-model', 'measure', '--latency-backend', 'onnxruntime', '--latency-threads', '1', '--latency-samples', '60',
             '--budget', 'latency=0.9x']
    assert cli.main(search(image_folder, tmp_path / 'x', *flags)) == 0
    model = LatencyModel.load(tmp_path / 'x' / 'latency.json')
    assert model.backend['backend'] == 'onnxruntime' and model.architecture == MODEL
    out = capsys.readouterr().out
    assert 'measuring latency: onnxruntime' in out and '(ms measured here: onnxruntime, fp32, batch 1' in out
    saved = (tmp_path / 'x' / 'latency.json').read_bytes()
    assert cli.main(['search', '--resume', str(tmp_path / 'x'), '--budget', 'latency=0.8x']) == 0  # and keeps it
    assert (tmp_path / 'x' / 'latency.json').read_bytes() == saved
    assert yaml.safe_load((tmp_path / 'x' / 'args.yaml').read_text())['latency_model'] == 'measure'


def block_model(name: str, path: Path, **arguments) -> Path:
    """A latency model of blocks, that counts MACs."""
    plan = make_plan(Order(name, grid='prunode' if name != 'prunet' else '', blocks=[], img_size=SIZE, num_classes=CLASSES,
                           model_args=arguments), 2, False)
    space, macs = plan.network.space, Macs(plan.network.space)
    grid = plan.network.grid
    tables = {t['block']: (t['groups'], np.array([macs.of(t['block'], dict(zip(t['groups'], p))) / 1e6 for p in itertools.product(
        *t['levels'])]).reshape([len(step) for step in t['levels']])) for t in plan.tables}
    total, blocks = add_up(grid, tables, macs() / 1e6 - sum(macs.of(name) for name in tables) / 1e6)
    LatencyModel(space.architecture, space.input_size, space_fingerprint(space), 1, 'fp32', {'backend': 'torch', 'device': 'a CPU of nowhere'},
                 total, Validation(3, .01, .01, 1.), {}, blocks).save(path)
    return path


BLOCKS = {'prunet': {'space': {'stem': 8, 'head': 16, 'granularity': 8, 'stages': [
    {'type': 'conv', 'filters': 8, 'stride': 2, 'depth': 1, 'kernels': {'relu': [3, 5]}},
    {'type': 'irb', 'filters': 16, 'stride': 2, 'depth': 3, 'base_depth': 2, 'kernels': {'relu': [3, 5]}}]}}, MODEL: {}}


@pytest.mark.parametrize('name', BLOCKS)
def test_blocks_are_searched_by_their_own_latency(quick, image_folder, name, tmp_path, capsys):
    """Of any model, and of one whose layers are several blocks; what is predicted is what was measured of the blocks left."""
    path = block_model(name, tmp_path / 'm.json', **BLOCKS[name])
    flags = ['search', '--model', name, '--data-dir', str(image_folder), '-b', '8', '--policy', 'prunode', '--epochs', '0', '--search-epochs', '3',
             '--device', 'cpu', '--img-size', str(SIZE), '-j', '0', '--budget', 'latency', '--latency-model', str(path), '--output',
             str(tmp_path / 'x'), '--baselines', 'base', '--num-classes', str(CLASSES),
             *(['--model-kwargs', f"space={BLOCKS[name]['space']}"] if name == 'prunet' else [])]
    assert cli.main(flags) == 0, capsys.readouterr().err
    rows = table(tmp_path / 'x')
    for row in rows.values():
        assert float(row['predicted_ms']) == pytest.approx(float(row['macs']) / 1e6, rel=1e-4)
    assert timm.create_model(f"local-dir:{tmp_path / 'x'}") is not None


def test_blocks_cannot_be_weighed_by_whole_networks(quick, image_folder, model_file, tmp_path, capsys):
    """The line says the command that makes what is needed."""
    blocks = block_model(MODEL, tmp_path / 'm.json')
    for model, path, message in ((MODEL, model_file, 'it was fitted to whole networks'), (MODEL, 'measure', 'that measures whole networks'),
                                 ('prunet', blocks, f'it is one of {MODEL}, not of all blocks of prunet')):
        flags = search(image_folder, tmp_path / 'x', '--budget', 'latency', '--latency-model', str(path), policy='prunode')
        flags[2] = model
        del flags[flags.index('--grid'):flags.index('--grid') + 2]
        assert cli.main([*flags, '--num-classes', str(CLASSES)]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count('\n') == 1 and not (tmp_path / 'x').exists()
        assert f'timm-width latency measure {model} --num-classes 3 --img-size 32 --backend onnxruntime --blocks' in err


REFUSED = {
    'no model': (['--budget', 'latency=0.5ms'], 'needs a latency model'),
    'no file': (['--budget', 'latency=0.5ms', '--latency-model', 'nothing.json'], 'there is no such file'),
    'too fast': (['--budget', 'latency=0.01ms', '--latency-model', 'FILE'], "below the smallest network's"),
    'too slow': (['--budget', 'latency=9s', '--latency-model', 'FILE'], "above the largest network's"),
    'no unit': (['--budget', 'latency=5', '--latency-model', 'FILE'], 'say the unit'),
    'batch': (['--budget', 'latency=0.5x', '--latency-model', 'FILE', '--latency-batch', '16'], "--latency-batch 16: the latency model 'FILE' is for batch 1"),
    'backend': (['--budget', 'latency=0.5x', '--latency-model', 'FILE', '--latency-backend', 'torch'], 'is for backend onnxruntime'),
    'image size': (['--budget', 'latency=0.5x', '--latency-model', 'FILE', '--img-size', '64'], 'is for images of 3x32x32, not of 3x64x64'),
    'model': (['--budget', 'latency=0.5x', '--latency-model', 'FILE', '--model', 'test_resnet2'], "unknown model|is one of test_resnet"),
    'another': (['--budget', 'latency=0.5x', '--latency-model', 'FILE', '--model', 'test_efficientnet'], 'is one of test_resnet, not of test_efficientnet'),
    'grid': (['--budget', 'latency=0.5x', '--latency-model', 'FILE', '--grid', '0.25,1'], 'where nothing was measured; search the grid that was measured'),
    'not here': (['--budget', 'latency=0.5x', '--latency-model', 'TRT', '--latency-backend', 'tensorrt'], 'tensorrt is not installed'),
    'tensorrt': (['--budget', 'macs=0.5x', '--latency-backend', 'tensorrt'], 'tensorrt is not installed'),
    'samples': (['--budget', 'latency=0.5x', '--latency-model', 'measure', '--latency-samples', '3'], '--latency-samples must be'),
    'pending': (['--budget', 'latency=5', '--latency-model', 'measure'], 'say the unit'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_is_refused_in_one_line(name, image_folder, model_file, tmp_path, capsys):
    flags, message = REFUSED[name]
    found = json.loads(model_file.read_text())
    (tmp_path / 'trt.json').write_text(json.dumps({**found, 'backend': {**found['backend'], 'backend': 'tensorrt'}}))
    flags = [{'FILE': str(model_file), 'TRT': str(tmp_path / 'trt.json')}.get(f, f) for f in flags]
    if name in ('tensorrt', 'not here'):
        try:
            import tensorrt  # noqa: F401
            pytest.skip('tensorrt is installed')
        except ImportError:
            pass
    assert cli.main(search(image_folder, tmp_path / 'x', *flags)) == 2
    err = capsys.readouterr().err
    assert any(part in err for part in message.replace('FILE', str(model_file)).split('|')) and err.count('\n') == 1
    assert not (tmp_path / 'x').exists()


def test_a_model_of_a_backend_that_is_not_here_still_counts(quick, image_folder, model_file, tmp_path, capsys):
    """Made by TensorRT elsewhere: the budget holds, and the table says that what was measured here is something else."""
    found = json.loads(model_file.read_text())
    found['backend'] |= {'backend': 'trtexec', 'device': 'a GPU of nowhere'}
    (tmp_path / 'm.json').write_text(json.dumps(found))
    assert cli.main(search(image_folder, tmp_path / 'x', '--budget', 'latency=0.5x', '--latency-model', str(tmp_path / 'm.json'))) == 0
    out = capsys.readouterr().out
    assert "this machine cannot run trtexec, by which the latency model was made on a GPU of nowhere" in out
    assert '(ms measured here: torch on cpu, fp32, batch 1' in out


def test_a_policy_that_learned_under_a_budget_takes_no_other_latency_model(quick, image_folder, model_file, tmp_path, capsys):
    flags = ['--budget', 'latency=0.5x', '--latency-model']
    assert cli.main(search(image_folder, tmp_path / 'x', *flags, str(model_file), policy='aows')) == 0
    other = tmp_path / 'other.json'
    other.write_bytes(model_file.read_bytes())
    assert cli.main(['search', '--resume', str(tmp_path / 'x'), *flags, str(other)]) == 2
    assert 'aows' in capsys.readouterr().err


def test_a_policy_that_learned_by_a_model_notices_that_its_file_has_changed(quick, image_folder, model_file, tmp_path, capsys):
    path = tmp_path / 'm.json'
    path.write_bytes(model_file.read_bytes())
    flags = ['--budget', 'latency=0.5x', '--latency-model', str(path)]
    assert cli.main(search(image_folder, tmp_path / 'x', *flags, policy='aows')) == 0
    assert LatencyModel.load(tmp_path / 'x' / 'latency.json').to_json() == LatencyModel.load(path).to_json()
    assert cli.main(['search', '--resume', str(tmp_path / 'x')]) == 0
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, 'constant': found['constant'] + 0.01}))
    capsys.readouterr()
    assert cli.main(['search', '--resume', str(tmp_path / 'x')]) == 2
    assert 'was trained by the latency model in' in capsys.readouterr().err


def test_a_base_that_was_not_measured_has_no_prediction(quick, image_folder, measured, tmp_path, capsys):
    manifest, results, space = measured
    whole = fit_results(manifest, results, space).model
    grid = make_grid(space, '0.5,0.75')
    replace(whole, tables=whole.cost(space).factors(grid)).save(tmp_path / 'm.json')
    flags = ['--latency-model', str(tmp_path / 'm.json'), '--grid', '0.5,0.75', '--budget']
    assert cli.main(search(image_folder, tmp_path / 'x', *flags, 'latency=0.5x')) == 2
    assert 'the latency model knows no base network' in capsys.readouterr().err
    limit = whole.cost(space)({n: w[-1] for n, w in grid.items()})
    assert cli.main(search(image_folder, tmp_path / 'x', *flags, f'latency={limit:.4f}ms', '--baselines', 'base')) == 0
    assert table(tmp_path / 'x')['base']['predicted_ms'] == ''


def test_numbers_of_a_model_are_those_of_its_tables(model_file, measured):
    model, space = LatencyModel.load(model_file), measured[2]
    rng = np.random.default_rng(0)
    for _ in range(5):
        widths = {n: int(rng.choice(w)) for n, w in model.tables.grid.items()}
        assert model.cost(space)(widths) == pytest.approx(model.tables(widths))
