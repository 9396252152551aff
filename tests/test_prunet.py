"""prunet: GPUNet-1 as one of its settings, what it is rebuilt from, what timm promises of a model, and what is refused."""
import json

import pytest
import timm
import torch
from timm.models import save_for_hf

import timm_width
from timm_width.config import ArgumentError
from timm_width.cost import Params
from timm_width.laws import commutation_faults, cost_faults, permutation_error, random_widths, randomise
from timm_width.models.prunet import prunet_blocks
from timm_width.models.prunet_space import PrunetError, base_layers, table1, table5

REDUCED = {'width': 0.25, 'depth': 0.5}
LAYERS = [{'stage': 2, 'kernel': 5, 'se': True, 'hidden': 24}, {'stage': 3, 'kernel': 3, 'hidden': 64},
          {'stage': 3, 'kernel': 5, 'hidden': 8}, {'stage': 4, 'kernel': 3, 'hidden': 48, 'se': False},
          {'stage': 5, 'kernel': 3, 'hidden': 200}, {'stage': 6, 'kernel': 5, 'hidden': 288, 'se': True},
          {'stage': 6, 'kernel': 3, 'hidden': 8}]  # without stage 1, and with layers that are shallower or deeper than the base

torch.set_num_threads(1)


def build(layers=LAYERS, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model('prunet', layers=layers, **{**REDUCED, **kwargs}).eval()


def image(size=64, channels=3, batch=2):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model, x):
    return model(x)


# -- GPUNet-1 ------------------------------------------------------------------------------------------------------------------


def test_gpunet_1_is_a_setting_of_it():
    """Of `layers` written out, and of none: weights load both ways, logits are equal."""
    base = randomise(timm.create_model('gpunet_1')).eval()
    layers = json.loads(json.dumps(base_layers(table1())))
    for model in (timm.create_model('prunet'), timm.create_model('prunet', layers=layers)):
        model.load_state_dict(base.state_dict(), strict=True)
        base.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(run(model.eval(), image()), run(base, image()))




def test_the_base_in_other_spaces():
    with torch.device('meta'):
        half, table_5 = timm.create_model('prunet', width=0.5), timm.create_model('prunet', space='table5')
    assert [s[0].conv_pwl.out_channels for s in half.blocks[1:]] == [32, 48, 80, 144, 224]
    assert {m.kernel_size for m in table_5.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1} == {(3, 3)}
    assert table_5.blocks[5][3].conv_pw.out_channels == 8 * 448 and not [n for n, _ in table_5.named_modules() if n.endswith('.se.gate')]


# -- layers --------------------------------------------------------------------------------------------------------------------


def test_layers_that_are_not_listed_are_not_there():
    """Each listed one is there as it says."""
    model = build()
    assert [len(stage) for stage in model.blocks] == [1, 2, 1, 1, 2]
    said = [(b.conv_exp if hasattr(b, 'conv_exp') else b.conv_dw) for stage in model.blocks for b in stage]
    assert [(c.out_channels, c.kernel_size[0]) for c in said] == [(layer['hidden'], layer['kernel']) for layer in LAYERS]
    squeezed = [hasattr(b.se, 'conv_reduce') for stage in model.blocks for b in stage]
    assert squeezed == [layer.get('se', False) for layer in LAYERS]
    assert [c.stride[0] for c in said] == [2, 2, 1, 2, 1, 2, 1]
    assert model.blocks[0][0].se.conv_reduce.out_channels == 2  # a quarter of the input, whatever the hidden width
    info = timm.create_model('prunet', layers=LAYERS, features_only=True, **REDUCED).feature_info
    assert info.reduction() == [2, 4, 8, 16, 32] and info.channels() == [8, 16, 24, 72, 112]


def test_activations_can_be_chosen():
    layers = base_layers(table5())
    layers[1]['act'] = 'silu'
    with torch.device('meta'):
        model = timm.create_model('prunet', space='table5', layers=layers)
    assert [type(b.bn1.act).__name__ for b in model.blocks[1]] == ['SiLU', 'ReLU']


def test_what_the_blocks_say_is_what_is_built():
    blocks = prunet_blocks(timm_width.models.prunet_space.get_space(None, **REDUCED), LAYERS)
    model = build(num_classes=0)
    inside = sum(p.numel() for p in model.blocks.parameters())
    assert sum(b.costs((1, 1))[1] for stage in blocks for b in stage) == inside


# -- rebuilding ----------------------------------------------------------------------------------------------------------------


SPACE = {'stem': 16, 'stem_act': 'relu', 'head': 64, 'granularity': 8, 'stages': [
    {'type': 'conv', 'filters': 16, 'stride': 1, 'depth': 2, 'kernels': {'relu': [3, 5]}},
    {'type': 'irb', 'filters': 24, 'stride': 2, 'depth': 2, 'kernels': {'silu': [3, 5], 'relu': [3]}}]}


@pytest.mark.parametrize('args', [
    {}, REDUCED, {**REDUCED, 'layers': LAYERS, 'num_classes': 7, 'in_chans': 1},
    {'space': SPACE}, {'space': SPACE, 'layers': [{'stage': 2, 'kernel': 7, 'hidden': 40, 'act': 'relu'}]}])
@pytest.mark.parametrize('ours', [False, True])
def test_a_config_rebuilds_it(args, ours, tmp_path):
    """timm's save_for_hf and our save write an architecture 'prunet' whose model_args are enough."""
    model, x = timm.create_model('prunet', **args).eval(), image(channels=args.get('in_chans', 3))
    if ours:
        timm_width.save(model, tmp_path, {'policy': 'prunode'})
    else:
        save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'prunet' and args.items() <= config['model_args'].items()
    assert not {'widths', 'skips'} & set(config['model_args'])
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(run(again, x), run(model, x))
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=5, features_only=False).eval()
    assert run(other, x).shape == (2, 5)
    levels = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True).eval()
    assert [y.shape[1] for y in run(levels, x)] == levels.feature_info.channels()


def test_it_has_widths(tmp_path):
    """prunet_width: searched, then narrowed; a config keeps both."""
    space = timm_width.trace(build(), (3, 64, 64))
    widths = {'blocks.0.0.conv_exp': 16, 'conv_head': 100}
    model = timm.create_model('prunet_width', layers=LAYERS, widths=widths, **REDUCED).eval()
    assert model.blocks[0][0].conv_exp.out_channels == 16 and sum(p.numel() for p in model.parameters()) == Params(space)(widths)
    timm_width.save(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(run(again, image()), run(model, image()))
    resized = timm_width.resize(build(), space, widths)
    timm_width.save(resized, tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == 'prunet_width'


def test_laws():
    model = randomise(build()).double()
    space = timm_width.trace(model, (3, 64, 64))
    widths = random_widths(space, 1)
    assert not commutation_faults(model, space, widths) and not cost_faults(model, space, widths)
    assert permutation_error(model, space) < 1e-9
    assert set(space.frozen) == {'classifier'}
    assert {b.name for b in space.blocks} == {'blocks.1.1', 'blocks.4.1'}  # the second layers of stages 3 and 6


# -- what timm promises of a model -----------------------------------------------------------------------------------------------


def test_heads_and_levels():
    model, x = build(), image()
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, 2, 2)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        assert torch.equal(model.forward_head(features), model(x))
        last, levels = model.forward_intermediates(x)
        assert torch.equal(last, features) and [y.shape[1] for y in levels] == [i['num_chs'] for i in model.feature_info]
    model.reset_classifier(5)
    assert run(model, x).shape == (2, 5)
    model.reset_classifier(0, '')
    assert run(model, x).shape == features.shape
    picked = build(features_only=True, out_indices=(1, -1))
    assert [y.shape[1] for y in run(picked, x)] == picked.feature_info.channels() == [16, 112]


def test_meta_script_export_and_gradients():
    model, x = build(drop_path_rate=0.1), image()
    y = run(model, x)
    assert torch.equal(torch.jit.script(model)(x), y)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), y, atol=1e-5)
    model.set_grad_checkpointing()
    assert torch.allclose(run(model, x), y, atol=1e-5)
    model.set_grad_checkpointing(False)
    model.train()(x).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.device('meta'):
        meta = build()
    assert all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])
    assert build(device='meta', dtype=torch.float64).conv_head.weight.dtype == torch.float64
    assert run(build(output_stride=16), x).shape == (2, 1000)


# -- what is refused -------------------------------------------------------------------------------------------------------------


def changed(at, **entries):
    layers = [dict(layer) for layer in LAYERS]
    layers[at].update(entries)
    return layers


@pytest.mark.parametrize('layers, said', [
    ([], 'a list of 1 to 512'), ('x', 'a list of 1 to 512'), ({'stage': 1}, 'a list of 1 to 512'), (7, 'not int'),
    (LAYERS * 200, 'not 1400 entries'), ([5], 'layer 1 must be a dict'), ([{}], "not stage 'None'"),
    (changed(0, stage=7), "from 1 to 6, in order, not stage '7'"), (changed(3, stage=2), 'layer 4 must be a dict whose stage is a whole number from 3'),
    (changed(0, stage=True), 'in order'), (changed(0, kernel=4), 'layer 1 (stage 2): kernel must be an odd number'),
    (changed(0, kernel=10 ** 9 + 1), 'kernel must be'), (changed(0, kernel='3'), 'kernel must be'), (changed(0, kernel=float('inf')), 'kernel must be'),
    (changed(0, hidden=10 ** 9), 'a multiple of 8 from 8 to 64 (8 times its input of 8 channels)'), (changed(0, hidden=12), 'a multiple of 8'),
    (changed(0, hidden=None), "not 'None'"), (changed(0, hidden=[8]), 'hidden must be'), (changed(0, hidden=0), 'hidden must be'),
    (changed(0, se='no'), 'se must be false or true'), (changed(0, act='relu'), 'act must be one of silu'), (changed(0, act=[]), 'act must be'),
    (changed(0, hiden=8), "unknown entry 'hiden', did you mean 'hidden'"), ([{'stage': 1, 'kernel': 3, 'hidden': 8}], "unknown entry 'hidden'"),
    (LAYERS[:-2], 'stage 6 changes the size or the channels of its input, so at least one layer must be there'),
    (LAYERS[1:], 'stage 2 changes'),
])
def test_refused_layers(layers, said):
    with pytest.raises(PrunetError) as caught:
        timm.create_model('prunet', layers=layers, **REDUCED)
    assert said in str(caught.value) and len(str(caught.value)) < 3000


def test_all_faults_at_once():
    layers = changed(0, kernel=2)
    layers[3]['hidden'] = 7
    with pytest.raises(PrunetError, match='(?s)layer 1 .*kernel.*layer 4 .*hidden'):
        timm.create_model('prunet', layers=layers, **REDUCED)


def test_too_large_is_refused_before_it_is_built():
    space = {'max_expansion': 32, 'stages': [
        {'type': 'fused', 'filters': 4096, 'stride': 1, 'depth': 64, 'base_depth': 64, 'base_expansion': 32, 'kernels': {'relu': [11]}}]}
    with pytest.raises(PrunetError, match='parameters, more than the'):
        timm.create_model('prunet', space=space)


@pytest.mark.parametrize('args, said', [
    ({'layer': LAYERS}, "unknown argument 'layer', did you mean 'layers'"), ({'network': 'x'}, "unknown argument 'network'"),
    ({'stages': []}, "unknown argument 'stages'"), ({'block_args': []}, "unknown argument 'block_args'"), ({'model_cfg': 1}, 'unknown argument')])
def test_refused_arguments(args, said):
    with pytest.raises(ArgumentError) as caught:
        timm.create_model('prunet', **args)
    assert said in str(caught.value)


@pytest.mark.parametrize('args', [{'num_classes': 10 ** 9}, {'device': 'cuda'}, {'features_only': True}, {'in_chans': -1}])
def test_a_config_is_not_trusted(args, tmp_path):
    save_for_hf(build(), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    config['model_args'].update(args)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(timm_width.ConfigError):
        timm.create_model(f'local-dir:{tmp_path}')
