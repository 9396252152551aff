"""`<base>_width` through timm.create_model: everything that the base accepts, at other widths."""
import copy
import math

import pytest
import timm
import torch
from timm.models import register_model
from torch import nn

import timm_width
from timm_width.laws import random_widths, randomise

TINY = ['test_resnet', 'test_efficientnet', 'test_byobnet', 'test_convnext', 'test_nfnet']
FAMILIES = [
    *TINY, 'mobilenetv2_035', 'mobilenetv3_small_050', 'regnetx_002', 'densenet121', 'ghostnet_050', 'cs3darknet_focus_s']
SMALL = 'test_resnet'

torch.set_num_threads(1)


@pytest.fixture(scope='module', autouse=True)
def registered():
    for name in FAMILIES:
        timm_width.register(name)


_spaces = {}


def space_of(name):
    if name not in _spaces:
        with torch.device('meta'):
            _spaces[name] = timm_width.trace(timm.create_model(name))
    return _spaces[name]


def build(name=SMALL, seed=1, ratio=None, **kwargs):
    """`<name>_width` at random widths (or all at one ratio) and these widths."""
    space = space_of(name)
    high = 1.5 if name in TINY else 1  # growing builds a fresh base too
    widths = random_widths(space, seed, high=high) if ratio is None else space.scaled(ratio)
    return timm.create_model(f'{name}_width', widths=widths, **kwargs).eval(), widths


def image(size=64, channels=3, batch=1, seed=0):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def shapes(model):
    return {n: tuple(t.shape) for n, t in model.state_dict().items()}


@torch.no_grad()
def run(model, *args):
    return model(*args)


# -- what timm promises of a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', FAMILIES)
def test_head_and_sizes(name):
    """num_features, head_hidden_size, forward_head, reset_classifier: timm's own promises, at random widths."""
    model, widths = build(name)
    x = image()
    with torch.no_grad():
        features = model.forward_features(x)
        dim = -1 if getattr(model, 'output_fmt', 'NCHW') == 'NHWC' else 1
        want = space_of(name).shapes(widths)
        assert all(want[n] == s for n, s in shapes(model).items())
        assert features.shape[dim] == model.num_features
        assert model.forward_head(features).shape == (1, 1000)
        assert model.forward_head(features, pre_logits=True).shape[1] == model.head_hidden_size
        assert torch.equal(model.forward_head(features), model(x))
        model.reset_classifier(5)
        assert model(x).shape == (1, 5)
        model.reset_classifier(0)
        assert model(x).shape == (1, model.head_hidden_size)
    for key in ('classifier', 'first_conv'):
        names = model.pretrained_cfg[key]
        for layer in (names,) if isinstance(names, str) else names:
            assert key == 'classifier' or f'{layer}.weight' in model.state_dict()


@pytest.mark.parametrize('name', FAMILIES)
def test_features_only(name):
    space = space_of(name)
    model, widths = build(name, features_only=True)
    outs = run(model, image(64))
    assert model.feature_info.channels() == [o.shape[1] for o in outs]
    assert model.feature_info.reduction() == [64 // o.shape[-1] for o in outs]
    with torch.device('meta'):
        ours = timm.create_model(f'{name}_width', features_only=True)
        base = timm.create_model(name, features_only=True)
    assert ours.feature_info.channels() == base.feature_info.channels()
    assert ours.feature_info.reduction() == base.feature_info.reduction()
    assert widths != space.base_widths


@pytest.mark.slow
def test_features_only_over_all_families():
    """Levels as the base's, channels and sizes as announced, at half; on the meta device."""
    from .families import smallest_of_each_family

    faults = {}
    for name in smallest_of_each_family().values():
        with torch.device('meta'):
            base = timm.create_model(name, features_only=True)
            model = timm.create_model(f'{name}_width', widths=space_of(name).scaled(0.5), features_only=True).eval()
            outs = model(torch.empty(1, *space_of(name).input_size))
        info = model.feature_info
        dim = -1 if getattr(model, 'output_fmt', 'NCHW') == 'NHWC' else 1
        if info.channels() != [o.shape[dim] for o in outs]:
            faults[name] = f'{info.channels()} announced, {[tuple(o.shape) for o in outs]} given'
        if info.reduction() != base.feature_info.reduction():
            faults[name] = f'reductions {info.reduction()}, the base has {base.feature_info.reduction()}'
    assert not faults


def test_features_only_options():
    full, widths = build(features_only=True)
    levels = full.feature_info.channels()
    picked, _ = build(features_only=True, out_indices=(1, 3))
    assert picked.feature_info.channels() == [levels[1], levels[3]]
    assert [o.shape[1] for o in run(picked, image())] == [levels[1], levels[3]]
    last, _ = build(features_only=True, out_indices=[-1])
    assert last.feature_info.channels() == levels[-1:]
    listed, _ = build(features_only=True, feature_cls='list', out_indices=(1, 2))
    assert [o.shape[1] for o in run(listed, image())] == listed.feature_info.channels() == levels[1:3]
    gray, _ = build(features_only=True, in_chans=1)
    assert [o.shape[1] for o in run(gray, image(channels=1))] == levels
    with torch.device('meta'):
        assert build(features_only=True)[0].feature_info.channels() == levels


def test_forward_intermediates():
    model, _ = build('mobilenetv2_035')
    with torch.no_grad():
        final, levels = model.forward_intermediates(image())
    assert [f.shape[1] for f in levels] == [i['num_chs'] for i in model.feature_info]
    assert final.shape[1] == model.num_features


@pytest.mark.parametrize('args, size', [
    (dict(num_classes=0), 'head_hidden_size'), (dict(num_classes=7), 7), (dict(in_chans=1), 1000),
    (dict(in_chans=5, num_classes=2), 2), (dict(drop_rate=0.2, drop_path_rate=0.1), 1000), (dict(global_pool='max'), 1000)])
@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_convnext'])
def test_arguments_of_the_base(name, args, size):
    model, _ = build(name, **args)
    out = run(model, image(channels=args.get('in_chans', 3)))
    assert out.shape == (1, getattr(model, size) if isinstance(size, str) else size)
    assert model.num_classes == args.get('num_classes', 1000)
    assert run(model.train(), image(channels=args.get('in_chans', 3), batch=2)).shape[0] == 2


def test_drop_path_and_pool_reach_the_model():
    model, _ = build('test_resnet', drop_path_rate=0.3)
    assert any(getattr(m, 'drop_prob', 0) for m in model.modules() if type(m).__name__ == 'DropPath')
    model, _ = build('test_resnet', global_pool='', num_classes=0)
    assert run(model, image()).ndim == 4


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_byobnet', 'test_nfnet', 'regnetx_002'])
def test_backward_reaches_every_parameter(name):
    model, _ = build(name, num_classes=3)
    model.train()
    model(image(batch=2)).mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradient_checkpointing():
    model, _ = build('test_resnet')
    x, y = image(), run(model, image())
    model.set_grad_checkpointing()
    assert torch.allclose(model(x), y, atol=1e-5)


# -- where and how it is built ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('ratio', [0.5, 1.5])
def test_meta_device(ratio):
    real, _ = build(ratio=ratio)
    with torch.device('meta'):
        first, _ = build(ratio=ratio)
    second, _ = build(ratio=ratio, device='meta')
    for model in (first, second):
        assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
        assert shapes(model) == shapes(real)
    second.to_empty(device='cpu').load_state_dict(real.state_dict())
    assert torch.equal(run(second, image()), run(real, image()))


@pytest.mark.parametrize('ratio', [0.5, 1.5])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_dtype(dtype, ratio):
    model, _ = build(ratio=ratio, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert run(model, image().to(dtype)).dtype == dtype


def test_grown_channels_are_initialised():
    """A grown model is neither zero nor undefined where it is new, and is trained as any other."""
    model, _ = build(ratio=1.5)
    for n, t in model.state_dict().items():
        assert torch.isfinite(t.float()).all(), n
    for n, p in model.named_parameters():
        if p.ndim == 4:
            old = tuple(slice(s) for s in space_of(SMALL).tensors[n].shape)
            new = torch.ones_like(p, dtype=torch.bool)
            new[old] = False
            if new.any():
                assert 0.5 < p[new].std() / p[~new].std() < 2, n


def test_copies_and_state_dicts(tmp_path):
    model, widths = build()
    y = run(model, image())
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, image()), y)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    other, _ = build()
    other.load_state_dict(torch.load(tmp_path / 'w.pth', weights_only=True), strict=True)
    assert torch.equal(run(other, image()), y)
    assert (tmp_path / 'w.pth').stat().st_size < 1.5 * sum(4 * t.numel() for t in model.state_dict().values()) + 100_000


def test_checkpoint_path(tmp_path):
    model, widths = build()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model_best.pth.tar')
    again = timm.create_model(f'{SMALL}_width', widths=widths, checkpoint_path=str(tmp_path / 'model_best.pth.tar')).eval()
    assert torch.equal(run(again, image()), run(model, image()))
    with pytest.raises(RuntimeError, match='size mismatch'):
        timm.create_model(f'{SMALL}_width', checkpoint_path=str(tmp_path / 'model_best.pth.tar'))


# -- weights and tags -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """The base with weights in a file: (model, file)."""
    base = randomise(timm.create_model(SMALL)).eval()
    path = tmp_path_factory.mktemp('base') / 'base.pth'
    torch.save(base.state_dict(), path)
    return base, str(path)


def test_pretrained_loads_the_base(weights):
    base, path = weights
    model = timm.create_model(f'{SMALL}_width', pretrained=True, pretrained_cfg_overlay=dict(file=path)).eval()
    assert torch.equal(run(model, image()), run(base, image()))


@pytest.mark.parametrize('importance', [None, 'l1', 'l2', 'bn'])
def test_pretrained_is_sliced(weights, importance):
    """pretrained=True with widths: the base's weights, then resize."""
    base, path = weights
    widths = space_of(SMALL).scaled(0.6)
    model = timm.create_model(
        f'{SMALL}_width', widths=widths, importance=importance, pretrained=True, pretrained_cfg_overlay=dict(file=path)).eval()
    want = timm_width.resize(copy.deepcopy(base), space_of(SMALL), widths, importance=importance)
    assert torch.equal(run(model, image()), run(want, image()))


def test_pretrained_with_other_classes_and_channels(weights):
    base, path = weights
    widths = space_of(SMALL).scaled(0.6)
    model = timm.create_model(f'{SMALL}_width', widths=widths, num_classes=7, in_chans=1, pretrained=True,
                              pretrained_cfg_overlay=dict(file=path)).eval()
    want = timm_width.resize(copy.deepcopy(base), space_of(SMALL), widths)
    ours, theirs = model.state_dict(), want.state_dict()
    first, head = model.pretrained_cfg['first_conv'], model.pretrained_cfg['classifier']
    assert run(model, image(channels=1)).shape == (1, 7)
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items() if not n.startswith((first + '.', head + '.')))
    assert torch.allclose(ours[first + '.weight'], theirs[first + '.weight'].sum(1, keepdim=True), atol=1e-6)


def test_pretrained_features_only(weights):
    base, path = weights
    model = timm.create_model(
        f'{SMALL}_width', features_only=True, pretrained=True, pretrained_cfg_overlay=dict(file=path)).eval()
    with torch.no_grad():
        want = base.forward_intermediates(image(), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(run(model, image()), want))


def test_importance_that_does_not_exist():
    with pytest.raises(timm_width.WidthError, match="importance must be one of l1, l2, bn, not 'l3'"):
        build(importance='l3')


def test_tags():
    with torch.device('meta'):
        model = timm.create_model('resnet50_width.a1_in1k', widths={'layer1.0.conv1': 32})
    cfg, base = model.pretrained_cfg, timm.get_pretrained_cfg('resnet50.a1_in1k').to_dict()
    assert cfg['architecture'] == 'resnet50_width' and cfg['tag'] == 'a1_in1k'
    assert {k: v for k, v in cfg.items() if k != 'architecture'} == {k: v for k, v in base.items() if k != 'architecture'}
    ours, theirs = timm.get_pretrained_cfg('resnet50_width'), timm.get_pretrained_cfg('resnet50')
    assert ours.tag == theirs.tag and ours.hf_hub_id == theirs.hf_hub_id
    assert timm.list_pretrained('resnet50_width*') == [n.replace('resnet50', 'resnet50_width')
                                                      for n in timm.list_pretrained('resnet50.*')]
    with pytest.raises(RuntimeError, match='nonsense'):
        timm.create_model('resnet50_width.nonsense', device='meta')


def test_a_tag_without_weights_says_so(caplog):
    base = next(n for n in ('mobilenetv2_035', 'resnet18', 'cs3darknet_focus_s')
                if not timm.get_pretrained_cfg(n).has_weights)
    with caplog.at_level('WARNING'):
        try:
            timm.create_model(f'{base}_width', pretrained=True)
        except RuntimeError as e:
            assert 'pretrained' in str(e).lower()
            return
    assert 'pretrained' in caplog.text.lower()


@pytest.mark.parametrize('name', FAMILIES)
def test_data_config_is_the_bases(name):
    with torch.device('meta'):
        model = timm.create_model(f'{name}_width', widths=space_of(name).scaled(0.5))
        base = timm.create_model(name)
    assert timm.data.resolve_model_data_config(model) == timm.data.resolve_model_data_config(base)


# -- the registry -----------------------------------------------------------------------------------------------------------


def test_listed_under_one_module():
    ours = timm.list_models('*_width')
    assert set(ours) == set(timm.list_models(module='width_nets'))
    assert {f'{n}_width' for n in timm_width.supported() if timm.is_model(n)} <= set(ours)
    assert not [n for n in timm.list_models(module='resnet') if n.endswith('_width')]
    assert all(timm_width.is_supported(n.removesuffix('_width')) for n in ours)


def test_register():
    """Any other model of timm: a plain ViT's MLPs have widths too."""
    name = timm_width.register('test_vit')
    assert name == 'test_vit_width' and timm.is_model(name) and timm_width.is_supported('test_vit')
    assert timm_width.register('test_vit') == timm_width.register('test_vit_width') == name
    with torch.device('meta'):
        space = timm_width.trace(timm.create_model('test_vit'))
    model = timm.create_model(name, widths=space.scaled(0.5)).eval()
    assert run(model, image(model.pretrained_cfg['input_size'][-1])).shape == (1, 1000)


@pytest.mark.parametrize('name', ['resnet5O', '', 'nonsense', 'no/such/file', '../x', 'a' * 5000, None, 7, ['resnet18'],
                                  'resnet5O_width', '_width', '.a1_in1k'])
def test_register_junk(name):
    before = timm.list_models()
    with pytest.raises(timm_width.WidthError) as caught:
        timm_width.register(name)
    assert len(str(caught.value)) < 1000
    assert timm.list_models() == before


def test_register_takes_the_architecture_of_a_tag():
    assert timm_width.register('resnet18.a1_in1k') == 'resnet18_width'


def test_register_offers_the_nearest_name():
    with pytest.raises(timm_width.WidthError, match="did you mean 'resnet50'"):
        timm_width.register('resnet5O')


def test_register_refuses_a_model_without_widths():
    class Flat(nn.Module):
        num_classes, num_features = 10, 3

        def __init__(self, **kwargs):
            super().__init__()
            self.fc = nn.Linear(3, 10)

        def forward(self, x):
            return self.fc(x.mean((2, 3)))

    def flat_for_a_test(pretrained=False, **kwargs):
        return Flat()

    register_model(flat_for_a_test)
    with pytest.raises(timm_width.WidthError, match='no searchable group'):
        timm_width.register('flat_for_a_test')
    assert not timm.is_model('flat_for_a_test_width')


def test_importing_registers_the_supported_names():
    missing = [n for n in timm_width.supported() if timm.is_model(n) and not timm.is_model(f'{n}_width')]
    assert not missing


# -- searched again ---------------------------------------------------------------------------------------------------------


def test_a_width_model_is_searched_again(tmp_path):
    """Resize, trace, resize: names stay those of the base, and the record is of both."""
    space = space_of(SMALL)
    model, first = build(seed=3)
    again = timm_width.trace(model)
    assert [g.name for g in again.groups] == [g.name for g in space.groups]
    assert {n: g.size for n, g in again.searchable.items()} == first
    second = random_widths(again, 4)
    timm_width.resize(model, again, second)
    assert model._model_args['widths'] == {**first, **second}
    timm_width.save(model, tmp_path)
    rebuilt = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(run(rebuilt, image()), run(model, image()))
    # the same in one step
    direct = timm.create_model(f'{SMALL}_width', widths={n: again.rounded(space[n], w) for n, w in second.items()})
    assert shapes(direct) == shapes(model)


def test_back_to_the_base_widths():
    model, _ = build(ratio=0.5)
    timm_width.resize(model, timm_width.trace(model), space_of(SMALL).base_widths)
    assert shapes(model) == shapes(timm.create_model(SMALL))
    again = timm.create_model(f'{SMALL}_width', **{k: model._model_args[k] for k in ('widths', 'skips', 'format', 'shapes')})
    assert shapes(again) == shapes(model)


def test_skips():
    space = space_of('resnet18')
    names = [b.name for b in space.blocks]
    assert names
    model = timm.create_model('resnet18_width', widths=space.scaled(0.25), skips=names[:2]).eval()
    assert all(isinstance(model.get_submodule(n), nn.Identity) for n in names[:2])
    assert run(model, image()).shape == (1, 1000)
    features = timm.create_model('resnet18_width', widths=space.scaled(0.25), skips=names[:2], features_only=True).eval()
    assert [o.shape[1] for o in run(features, image())] == features.feature_info.channels()
    again = timm_width.trace(model)
    assert not {b.name for b in again.blocks} & set(names[:2])


# -- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('args, said', [
    (dict(width={}), "unknown argument 'width', did you mean 'widths'"),
    (dict(skip=()), "unknown argument 'skip', did you mean 'skips'"),
    (dict(nonsense=1), "unknown argument 'nonsense'"),
    (dict(widths={'layer1.0.conv9': 8}), "unknown group 'layer1.0.conv9', did you mean 'layer1.0.conv"),
    (dict(widths=[8, 8]), 'widths must be a dict'),
    (dict(widths='a.json'), 'load_spec'),
    (dict(skips='layer1.0'), 'skips must be a list'),
    (dict(skips=['layer9']), "block 'layer9' cannot be skipped"),
    (dict(format=2), 'newer'), (dict(format='1'), 'format must be'), (dict(format=True), 'format must be'),
    (dict(shapes=7), 'shapes must be'), (dict(shapes='sha256:0', widths={'layer1.0.conv1': 8}), 'other shapes'),
])
def test_refused(args, said):
    with pytest.raises(timm_width.WidthError) as caught:
        timm.create_model(f'{SMALL}_width', **args)
    assert said in str(caught.value)
    assert 'test_resnet' in str(caught.value)  # which model


@pytest.mark.parametrize('width, said', [
    (0, 'outside'), (-8, 'outside'), (8.0, 'whole number'), (True, 'whole number'), ('8', 'whole number'),
    (None, 'whole number'), (10 ** 9, 'outside'), (math.inf, 'whole number'), (math.nan, 'whole number'), ([8], 'whole number'),
])
def test_refused_widths(width, said):
    with pytest.raises(timm_width.WidthError) as caught:
        timm.create_model(f'{SMALL}_width', widths={'layer1.0.conv1': width})
    assert said in str(caught.value) and 'layer1.0.conv1' in str(caught.value)


def test_all_faults_at_once():
    with pytest.raises(timm_width.WidthError) as caught:
        timm.create_model(f'{SMALL}_width', widths={'layer1.0.conv1': 0, 'layer1.O.conv2': 8}, skips=['x'])
    assert all(s in str(caught.value) for s in ("'layer1.0.conv1'", "'layer1.O.conv2'", "'x'"))


def test_multiple_of_the_unit():
    group = next(g for g in space_of('regnetx_002').searchable.values() if g.unit > 1)
    said = f'not a multiple of {group.unit} .nearest: {group.unit} or {2 * group.unit}'
    with pytest.raises(timm_width.WidthError, match=said):
        timm.create_model('regnetx_002_width', widths={group.name: group.unit + 1})


def test_numpy_and_torch_integers_are_widths():
    import numpy as np

    model = timm.create_model(f'{SMALL}_width', widths={'layer1.0.conv1': np.int64(8)})
    assert model.layer1[0].conv1.out_channels == 8
    assert type(model.layer1[0].conv1.out_channels) is int
