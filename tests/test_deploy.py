"""Resized models leave Python: ONNX, torch.export, TorchScript, and re-parameterised."""
import pytest
import timm
import torch
from timm.utils.model import reparameterize_model

import timm_width

from .test_config import LIGHT, NETS, image, resized, run

BATCH = 2
NO_SCRIPT = ('densenet121', 'hrnet_w18_small')  # timm's own base does not script them either (its tests leave them out)
slow = pytest.mark.slow


def light(names):
    """All of NETS, those outside `names` marked slow."""
    return [n if n in names else pytest.param(n, marks=slow) for n in dict.fromkeys([*names, *NETS])]


def images():
    return image().repeat(BATCH, 1, 1, 1)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-6))


def onnx_run(path, x):
    ort = pytest.importorskip('onnxruntime')
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dynamo', [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize('name', light(LIGHT))
def test_onnx(name, dynamo, tmp_path):
    pytest.importorskip('onnx')
    model = resized(name, 'narrow', skips=1, exportable=True)
    args = dict(external_data=False, verbose=False) if dynamo else {}
    torch.onnx.export(model, (images(),), str(tmp_path / 'm.onnx'), dynamo=dynamo, **args)
    assert relative(onnx_run(tmp_path / 'm.onnx', images()), run(model, images())) < 1e-4


@pytest.mark.filterwarnings('ignore')
def test_timms_own_onnx_export(tmp_path):
    """timm.utils.onnx, by way of torch.export, with a dynamic batch; grown channels too."""
    pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    from timm.utils.onnx import onnx_export

    model = resized('test_resnet', '1.5x')
    onnx_export(model, str(tmp_path / 'm.onnx'), input_size=(3, 64, 64), batch_size=BATCH, use_dynamo=True)
    x = torch.cat([images(), image()])
    assert relative(onnx_run(tmp_path / 'm.onnx', x), run(model, x)) < 1e-4


@pytest.mark.parametrize('name', light(['ghostnet_100', 'fasternet_t0', 'convnext_atto', 'test_nfnet']))
def test_torch_export(name):
    model = resized(name, 'narrow', skips=1)
    program = torch.export.export(model, (images(),))
    assert relative(run(program.module(), images()), run(model, images())) < 1e-5


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', light(['mobilenetv2_100', 'convnext_atto', 'cs3darknet_focus_s']))
def test_torchscript(name):
    if name in NO_SCRIPT:
        pytest.skip('timm does not script it')
    model = resized(name, 'narrow', scriptable=True)
    assert relative(run(torch.jit.script(model), images()), run(model, images())) < 1e-5
    assert relative(run(torch.jit.trace(model, images()), images()), run(model, images())) < 1e-5


@pytest.mark.parametrize('name', ['mobileone_s0', pytest.param('repvgg_a0', marks=slow), pytest.param('fastvit_t8', marks=slow),
                                  pytest.param('repghostnet_050', marks=slow), pytest.param('repvit_m1', marks=slow)])
def test_reparameterised(name):
    """The deployed form of a resized model is as wide as the model and computes the same."""
    model = resized(name, 'narrow')
    x = image(256) if name == 'fastvit_t8' else image()
    y = run(model, x)
    deployed = reparameterize_model(model)
    assert sum(p.numel() for p in deployed.parameters()) < sum(p.numel() for p in model.parameters())
    assert relative(run(deployed, x), y) < 1e-3


@pytest.mark.filterwarnings('ignore')
def test_a_searched_folder_is_exported(tmp_path):
    """What a user does: save, load from the folder, export."""
    pytest.importorskip('onnx')
    model = resized('test_efficientnet', 'half')
    timm_width.save(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, exportable=True).eval()
    torch.onnx.export(again, (images(),), str(tmp_path / 'm.onnx'), dynamo=False)
    assert relative(onnx_run(tmp_path / 'm.onnx', images()), run(model, images())) < 1e-4


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet'])
def test_feature_graph(name):
    """torchvision's graph extraction, as timm's own fx tests use it."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = resized(name, 'narrow')
    nodes = get_graph_node_names(model)[1]
    extractor = create_feature_extractor(model, [nodes[-1]])
    assert torch.equal(run(extractor)[nodes[-1]], run(model))
