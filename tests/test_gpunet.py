"""GPUNet: the tables, the published sizes, the laws, and what timm promises of a model."""
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import timm
import torch

import timm_width
from timm_width.cost import Macs, Params
from timm_width.laws import commutation_faults, cost_faults, permutation_error, random_widths, randomise
from timm_width.models.gpunet import OURS, Block, gpunet_blocks

FACTS = Path(__file__).resolve().parents[2] / 'shared' / 'facts' / 'gpunet.json'
# parameters in millions; GMACs where the release pads its fused blocks as we do, which P0 and P1 have none of
SIZES = {'gpunet_0': (11.885, None), 'gpunet_1': (12.704, None), 'gpunet_2': (25.799, None),
         'gpunet_p0': (22.815, 1.870), 'gpunet_p1': (39.906, 3.242)}
PUBLISHED_GMACS = {'gpunet_0': 3.25, 'gpunet_1': 3.3, 'gpunet_2': 8.38}
SMALL = 64  # pixels

torch.set_num_threads(1)


@cache
def on_meta(name):
    """The model on the meta device, and its space."""
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    return model, timm_width.trace(model)


@pytest.mark.parametrize('name', SIZES)
def test_parameters_and_macs_are_those_counted(name):
    params, gmacs = SIZES[name]
    space = on_meta(name)[1]
    assert round(Params(space)() / 1e6, 3) == params
    assert gmacs is None or round(Macs(space)() / 1e9, 3) == gmacs


@pytest.mark.parametrize('name', PUBLISHED_GMACS)
def test_macs_are_the_published_ones_up_to_the_padding(name):
    assert Macs(on_meta(name)[1])() / 1e9 == pytest.approx(PUBLISHED_GMACS[name], rel=0.04)


@pytest.mark.skipif(not FACTS.is_file(), reason='needs ../shared/facts/gpunet.json')
@pytest.mark.parametrize('name', OURS)
def test_the_table_is_the_releases(name):
    """Every layer; of D1 and D2 the table of facts has the rounded hidden widths, as ours, and D2's larger stem as its head."""
    said = json.loads(FACTS.read_text())['GPUNet-' + name.removeprefix('gpunet_').upper()]
    want = [(b['type'], b['c_in'], b['c_out'], b['stride'], b['kernel'], b.get('c_mid', 0), b.get('se', False),
             b['act'].replace('swish', 'silu')) for b in said['layers'] if b['type'] in ('conv', 'irb', 'fused_irb')]
    got = [(b.type.replace('fused', 'fused_irb'), b.c_in, b.c_out, b.stride, b.kernel, b.hidden, b.se, b.act)
           for stage in gpunet_blocks(name) for b in stage]
    assert got[2 if name == 'gpunet_d2' else 0:] == want
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.input_size == (3, said['resolution'], said['resolution'])


@pytest.mark.parametrize('name', OURS)
def test_what_the_blocks_say_of_themselves_is_so(name):
    """Hidden widths survive timm's rounding, strides none of timm's dilation, and costs are those counted in the network."""
    model, space = on_meta(name)
    size = tuple(-(-s // 2) for s in space.input_size[1:])
    for i, stage in enumerate(gpunet_blocks(name)):
        for j, block in enumerate(stage):
            at = f'blocks.{i}.{j}'
            built = model.get_submodule(at)
            conv = built.conv if block.type == 'conv' else built.conv_exp if block.type == 'fused' else built.conv_dw
            assert (conv.kernel_size[0], conv.stride[0], conv.dilation) == (block.kernel, block.stride, (1, 1))
            assert conv.padding == (block.kernel // 2,) * 2
            assert block.type == 'conv' or conv.out_channels == block.hidden
            sites = replace(space, sites=tuple(s for s in space.sites if s.name.startswith(at + '.')))
            assert block.costs(size) == (sites.macs(), sum(p.numel() for p in built.parameters()))
            size = block.output_size(size)


@pytest.mark.parametrize('name, stem, rest', [('gpunet_1', 'SiLU', 'ReLU'), ('gpunet_p0', 'ReLU', 'ReLU')])
def test_activations_and_norms(name, stem, rest):
    model = on_meta(name)[0]
    assert type(model.bn1.act).__name__ == stem and type(model.bn2.act).__name__ == rest
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}
    other = timm.create_model(name, bn_eps=1e-4, bn_momentum=0.05, device='meta')
    assert {(m.eps, m.momentum) for m in other.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {(1e-4, 0.05)}


@pytest.mark.parametrize('name', OURS)
def test_what_timm_promises(name):
    """Metadata against what comes out, on the meta device: sizes, heads, levels."""
    with torch.device('meta'):
        model = timm.create_model(name).eval()
        x = torch.empty(1, *model.pretrained_cfg['input_size'])
        features = model.forward_features(x)
        assert features.shape[1:] == (model.num_features, *model.pretrained_cfg['pool_size'])
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        assert model.forward_head(features).shape == (1, 1000)
        assert model.get_classifier().out_features == 1000
        levels = timm.create_model(name, features_only=True).eval()
        found = levels(x)
        assert levels.feature_info.channels() == [y.shape[1] for y in found]
        assert levels.feature_info.reduction() == [2 ** (i + 1) for i in range(len(found))]
        model.reset_classifier(5)
        assert model(x).shape == (1, 5)
        model.reset_classifier(0)
        assert model(x).shape == (1, model.head_hidden_size)
        assert timm.create_model(name, num_classes=3, in_chans=1)(x[:, :1].expand(2, -1, -1, -1)).shape == (2, 3)
    assert {model.pretrained_cfg['classifier'], model.pretrained_cfg['first_conv']} <= set(dict(on_meta(name)[0].named_modules()))


@pytest.mark.parametrize('name', ['gpunet_1', 'gpunet_d1'])
def test_it_runs_trains_and_exports(name):
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=3, drop_path_rate=0.1), torch.randn(2, 3, SMALL, SMALL)
    model.train()(x).mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        y = model(x)
        assert torch.equal(torch.jit.script(model)(x), y)
        assert torch.allclose(torch.export.export(model, (x,)).module()(x), y, atol=1e-5)
        model.set_grad_checkpointing()
        assert torch.allclose(model(x), y, atol=1e-5)
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert len(groups) > 10


@pytest.mark.parametrize('name', ['gpunet_0', 'gpunet_1', 'gpunet_p1', 'gpunet_d1'])
def test_laws_on_meta(name):
    """Laws 0 and 3 at the model's own resolution; nothing but the classifier is frozen."""
    model, space = on_meta(name)
    widths = random_widths(space, 1)
    assert not commutation_faults(model, space, widths) and not cost_faults(model, space, widths)
    assert set(space.frozen) == {'classifier'}


def test_law_1_permutation():
    torch.manual_seed(0)
    model = randomise(timm.create_model('gpunet_1')).double().eval()
    assert permutation_error(model, timm_width.trace(model, (3, SMALL, SMALL))) < 1e-9


@pytest.mark.parametrize('name', OURS)
def test_width_twins(name):
    space = on_meta(name)[1]
    with torch.device('meta'):
        model = timm.create_model(f'{name}_width', widths=space.scaled(0.5), num_classes=7)
        assert model.eval()(torch.empty(1, 3, SMALL, SMALL)).shape == (1, 7)
    assert sum(p.numel() for p in model.parameters()) < 0.4 * Params(space)()


@pytest.mark.parametrize('block', [
    Block('conv', 8, 16, 2, 5), Block('fused', 8, 16, 2, 3, 24), Block('fused', 16, 16, 1, 5, 40, True, 'silu'),
    Block('irb', 8, 16, 2, 5, 24, True), Block('irb', 16, 16, 1, 3, 96)])
@pytest.mark.parametrize('size', [(9, 9), (10, 7)])
def test_a_block_by_itself(block, size):
    """Its costs and output size are those of timm's module."""
    module = block.module().eval()
    space = timm_width.trace(module, (block.c_in, *size))
    assert block.costs(size) == (Macs(space)(), Params(space)())
    assert module(torch.randn(1, block.c_in, *size)).shape == (1, block.c_out, *block.output_size(size))
    assert block.residual == (block.stride == 1 and block.c_in == block.c_out)
