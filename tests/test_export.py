"""What `timm-width export` writes computes what the saved model does; what it cannot write, it refuses and leaves no file."""
import json
import os
import shutil
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.utils.model import reparameterize_model

import timm_width
from timm_width import cli, export, onnx_file

from .test_config import resized

onnx = pytest.importorskip('onnx', reason="needs the extra 'onnx'")
ort = pytest.importorskip('onnxruntime', reason="needs the extra 'onnx'")
pytest.importorskip('onnxscript', reason="needs the extra 'onnx'")

SIZE = ['--img-size', '64']


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Name -> a folder with that model at narrow widths."""
    root = tmp_path_factory.mktemp('saved')

    def folder(name):
        if not (root / name).exists():
            torch.manual_seed(0)
            timm_width.save(resized(name, 'narrow', num_classes=10), root / name)
        return root / name

    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved('test_resnet'), tmp_path / 'model')


def images(count, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def run(path, x):
    session = ort.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {'input': x.numpy()})[0])


@torch.inference_mode()
def expected(folder, x):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(x)


def relative(found, wanted):
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


def refused(capsys, *arguments):
    """The one line that an export which is refused says."""
    assert cli.main(['export', *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and err.startswith('timm-width export: ')
    return err


@pytest.mark.parametrize('name, flags, counts', [
    ('test_resnet', ['--batch', '2'], [2]), ('test_efficientnet', ['--dynamic'], [1, 5])])
def test_the_file_computes_what_the_saved_model_does(name, flags, counts, saved, tmp_path, capsys):
    file = tmp_path / 'm.onnx'
    assert cli.main(['export', str(saved(name)), '--onnx', *SIZE, *flags, '--output', str(file)]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 and str(file) in out and 'float32' in out and 'opset' in out
    onnx.checker.check_model(str(file), full_check=True)
    assert [f.name for f in tmp_path.iterdir()] == ['m.onnx']
    for count in counts:
        assert relative(run(file, images(count)), expected(saved(name), images(count))) < 1e-4


def test_reparameterised_models_are_deployed(saved, tmp_path):
    """One convolution for all branches of a block, no batch norm, and the same outputs."""
    file, folder = tmp_path / 'm.onnx', saved('mobileone_s0')
    assert cli.main(['export', str(folder), '--onnx', *SIZE, '--dynamic', '--output', str(file)]) == 0
    kinds = [n.op_type for n in onnx.load(file).graph.node]
    deployed = reparameterize_model(timm.create_model(f'local-dir:{folder}'))
    assert kinds.count('Conv') == sum(isinstance(m, torch.nn.Conv2d) for m in deployed.modules())
    assert 'BatchNormalization' not in kinds
    assert relative(run(file, images(4)), expected(folder, images(4))) < 1e-4


def test_fp16(folder):
    """float16 inside, float32 outside, sorted, about half as large; the top class is the same where it leads clearly."""
    assert cli.main(['export', str(folder), '--onnx', '--fp16', '--dynamic', *SIZE]) == 0
    graph = onnx.load(folder / 'model.onnx').graph
    onnx.checker.check_model(str(folder / 'model.onnx'), full_check=True)
    assert {t.data_type for t in graph.initializer} <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    assert (folder / 'model.onnx').stat().st_size < 0.7 * (folder / 'model.safetensors').stat().st_size
    found, wanted = run(folder / 'model.onnx', images(8)), expected(folder, images(8))
    assert 0 < relative(found, wanted) < export.TOLERANCE['float16']
    first, second = wanted.topk(2).values.unbind(1)
    clear = first - second > 0.01 * wanted.abs().max()
    assert clear.any() and torch.equal(found.argmax(1)[clear], wanted.argmax(1)[clear])


def test_the_file_says_what_it_is_and_nothing_of_this_machine(folder):
    """At the size, and with the preprocessing, of the config."""
    assert cli.main(['export', str(folder), '--onnx']) == 0
    metadata = ort.InferenceSession(str(folder / 'model.onnx')).get_modelmeta().custom_metadata_map
    config = json.loads((folder / 'config.json').read_text())
    cfg = config['pretrained_cfg']
    assert metadata['architecture'] == 'test_resnet_width' and metadata['interpolation'] == cfg['interpolation']
    assert metadata['shapes'] == config['model_args']['shapes'] and metadata['precision'] == 'float32'
    assert {k: json.loads(metadata[k]) for k in ('input_size', 'mean', 'std', 'crop_pct')} == {
        k: cfg[k] for k in ('input_size', 'mean', 'std', 'crop_pct')}
    assert json.loads(metadata['versions'])['timm'] == timm.__version__
    content = (folder / 'model.onnx').read_bytes()
    assert b'.py' not in content and os.fsencode(sys.prefix) not in content


@pytest.mark.parametrize('flags', [[], ['--fp16']])
def test_weights_too_large_for_one_file_lie_beside_it(flags, folder, monkeypatch, capsys):
    """And go when a file that needs none replaces it."""
    wanted = expected(folder, images(1))
    with monkeypatch.context() as m:
        m.setattr(onnx_file, 'MAX_BYTES', 0)
        assert cli.main(['export', str(folder), '--onnx', *SIZE, *flags]) == 0
    assert (folder / 'model.onnx').stat().st_size < 3e4 < (folder / 'model.onnx.data').stat().st_size
    assert relative(run(folder / 'model.onnx', images(1)), wanted) < export.TOLERANCE['float16' if flags else 'float32']
    (folder / 'model.onnx').unlink()
    capsys.readouterr()
    assert 'model.onnx.data' in refused(capsys, folder, '--onnx', *SIZE)
    assert cli.main(['export', str(folder), '--onnx', *SIZE, '--overwrite']) == 0
    assert {f.name for f in folder.iterdir()} == {'config.json', 'model.safetensors', 'model.onnx'}


def test_a_folder_without_weights(folder, capsys):
    """Random weights only for those who ask for them; the file and the line say so."""
    (folder / 'model.safetensors').unlink()
    assert '--no-weights' in refused(capsys, folder, '--onnx')
    assert cli.main(['export', str(folder), '--onnx', *SIZE, '--no-weights']) == 0
    assert 'random weights' in capsys.readouterr().out
    assert {p.key: p.value for p in onnx.load(folder / 'model.onnx').metadata_props}['weights'] == 'random'


@pytest.mark.parametrize('arguments, says', [
    (['gone', '--onnx'], "'gone' is not a folder with a config.json"),
    (['.', '--onnx'], 'is not a folder with a config.json'),
    (['model'], '--onnx'),
    (['model', '--onnx', '--batch', '0'], '--batch must be at least 1, not 0'),
    (['model', '--onnx', '--batch', '2', '--dynamic'], 'not allowed with'),
    (['model', '--onnx', '--img-size', '-3'], '--img-size must be at least 1, not -3'),
    (['model', '--onnx', '--output', 'model'], 'ends in .onnx'),
    (['model', '--onnx', '--output', 'model/model.safetensors', '--overwrite'], 'ends in .onnx'),
    (['model', '--onnx', '--output', 'gone/m.onnx'], "there is no folder 'gone'"),
    (['model', '--onnx', '--tensorrt'], '--tensorrt'),
])
def test_wrong_arguments(arguments, says, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    assert says in refused(capsys, *arguments)
    assert sorted(f.name for f in folder.iterdir()) == ['config.json', 'model.safetensors']


def test_an_existing_file_is_replaced_only_on_request(folder, capsys):
    (folder / 'model.onnx').write_text('mine')
    assert '--overwrite' in refused(capsys, folder, '--onnx', *SIZE)
    assert (folder / 'model.onnx').read_text() == 'mine'
    assert cli.main(['export', str(folder), '--onnx', *SIZE, '--overwrite']) == 0
    onnx.checker.check_model(str(folder / 'model.onnx'))


def change(folder, how):
    """Breaks a saved model; returns what the message must say."""
    file = folder / 'model.safetensors'
    if how == 'config':
        (folder / 'config.json').write_text('{')
        return 'not a JSON file'
    if how == 'cut':
        os.truncate(file, 3000)
        return 'cannot be built: SafetensorError'
    weights = load_file(file)
    if how == 'shape':
        weights['fc.weight'] = weights['fc.weight'][:, 1:].contiguous()
    elif how == 'nan':
        weights['fc.bias'][0] = float('nan')
    else:  # a tensor within the model that float16 cannot hold, though the output is small
        weights['conv1.0.weight'] *= 1e7
        weights['conv1.3.weight'] *= 1e-7
        weights['conv1.1.running_mean'] *= 1e7
        weights['conv1.1.bias'] *= 1e7
        weights['conv1.1.running_var'][:] = 1
    save_file(weights, file)
    return {'shape': 'cannot be built', 'nan': 'not finite', 'overflow': 'float16 ends at 65504'}[how]


@pytest.mark.parametrize('how', ['config', 'cut', 'shape', 'nan', 'overflow'])
def test_a_broken_model_is_refused(how, folder, capsys):
    says = change(folder, how)
    assert says in refused(capsys, folder, '--onnx', *SIZE, '--fp16')
    assert sorted(f.name for f in folder.iterdir()) == ['config.json', 'model.safetensors']


def test_an_overflow_is_looked_for_in_little_memory(folder, tmp_path, monkeypatch):
    """In every activation, once, but never in more of them at a time than PROBE_BYTES hold, or in a single larger one."""
    net, seen, limit = timm.create_model('test_resnet').eval(), [], 10 ** 5
    onnx_file.write_onnx(net, torch.randn(2, 3, 64, 64), tmp_path / 'm.onnx')
    run_onnx = onnx_file.run_onnx
    monkeypatch.setattr(onnx_file, 'PROBE_BYTES', limit)
    monkeypatch.setattr(onnx_file, 'run_onnx', lambda *args: seen.append([v.nbytes for v in run_onnx(*args)]) or run_onnx(*args))
    onnx_file.check_range(tmp_path / 'm.onnx', torch.randn(2, 3, 64, 64).numpy())
    computed = [n for node in onnx.load(tmp_path / 'm.onnx').graph.node if node.op_type != 'Constant' for n in node.output]
    assert sum(map(len, seen)) == len(computed) and max(map(len, seen)) > 1
    assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in seen)


def test_a_file_that_computes_something_else_is_not_written(folder, monkeypatch, capsys):
    """Not in place of an older one either."""
    (folder / 'model.onnx').write_text('older')

    def wrong(model):
        with torch.no_grad():
            model.fc.bias[0] += 0.5
        return model

    monkeypatch.setattr(export, 'reparameterize_model', wrong)
    assert 'does not compute what torch does' in refused(capsys, folder, '--onnx', *SIZE, '--overwrite')
    assert (folder / 'model.onnx').read_text() == 'older'
    assert sorted(f.name for f in folder.iterdir()) == ['config.json', 'model.onnx', 'model.safetensors']


@pytest.mark.parametrize('package', ['onnx', 'onnxscript', 'onnxruntime', 'onnx_ir'])
def test_a_missing_package_is_named(package, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    err = refused(capsys, folder, '--onnx')
    assert package in err and "pip install 'timm-width[onnx]'" in err


def test_what_the_exporter_cannot_do_is_one_line(folder, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise torch.onnx.OnnxExporterError('first\nsecond')

    monkeypatch.setattr(torch.onnx, 'export', fails)
    err = refused(capsys, folder, '--onnx', *SIZE, '--dynamic')
    assert 'first' in err and '--batch' in err
    assert sorted(f.name for f in folder.iterdir()) == ['config.json', 'model.safetensors']
