"""widths_from: widths read back from shapes, of our own models and of those that timm ships pruned."""
import pytest
import timm
import torch

import timm_width
from timm_width.laws import random_widths
from timm_width.recover import widths_from

NETS = ['resnet18', 'mobilenetv2_035', 'densenet121', 'regnetx_002', 'cs3darknet_focus_s', 'ghostnet_050', 'convnext_atto']
PRUNED = {  # timm's pruned models and what they were pruned from
    'ecaresnet50d_pruned': 'ecaresnet50d', 'efficientnet_b1_pruned': 'tf_efficientnet_b1',
    'ecaresnet101d_pruned': 'ecaresnet101d', 'efficientnet_b2_pruned': 'tf_efficientnet_b2',
    'efficientnet_b3_pruned': 'tf_efficientnet_b3',  # (they pad as TensorFlow does)
}


def space_of(name):
    with torch.device('meta'):
        return timm_width.trace(timm.create_model(name))


def tensors(shapes):
    return {n: torch.empty(s, device='meta') for n, s in shapes.items()}


def changed(space, widths):
    return {n: w for n, w in widths.items() if w != space[n].size}


@pytest.fixture(scope='module')
def space():
    return space_of('test_resnet')


@pytest.fixture(scope='module')
def mobile():
    return space_of('mobilenetv2_035')


@pytest.mark.parametrize('name', NETS)
def test_round_trip(name):
    space = space_of(name)
    for seed in range(3):
        widths = random_widths(space, seed)
        assert widths_from(tensors(space.shapes(widths)), space) == changed(space, widths)
    assert widths_from(tensors(space.shapes({})), space) == {}


@pytest.mark.slow
def test_round_trip_over_all_families():
    from .families import smallest_of_each_family

    faults = {}
    for name in smallest_of_each_family().values():
        space = space_of(name)
        widths = random_widths(space, 1)
        try:
            if widths_from(tensors(space.shapes(widths)), space) != changed(space, widths):
                faults[name] = 'other widths'
        except timm_width.WidthError as e:
            faults[name] = str(e)
    assert not faults


@pytest.mark.parametrize('pruned', [
    n if n in ('ecaresnet50d_pruned', 'efficientnet_b1_pruned') else pytest.param(n, marks=pytest.mark.slow) for n in PRUNED])
def test_timms_pruned_models(pruned):
    """The widths that timm keeps as a list of shapes, as widths of the base."""
    base = PRUNED[pruned]
    theirs = timm.create_model(pruned).eval()
    widths = widths_from(theirs.state_dict(), base)
    assert widths
    timm_width.register(base)
    ours = timm.create_model(f'{base}_width', widths=widths).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    assert ours.num_features == theirs.num_features
    assert [i['num_chs'] for i in ours.feature_info] == [i['num_chs'] for i in theirs.feature_info]


def test_sources_and_bases(mobile):
    """A model or its state dict; a name, a model or a space."""
    widths = random_widths(mobile, 5)
    model = timm.create_model('mobilenetv2_035_width', widths=widths)
    want = changed(mobile, widths)
    assert widths_from(model, 'mobilenetv2_035') == want
    assert widths_from(model.state_dict(), 'mobilenetv2_035') == want
    assert widths_from(model.state_dict(), 'mobilenetv2_035_width') == want
    assert widths_from(model, timm.create_model('mobilenetv2_035')) == want
    assert widths_from(model, mobile) == want
    shapes_only = {n: t.numpy() for n, t in model.state_dict().items()}
    assert widths_from(shapes_only, mobile) == want


def test_classes_and_input_channels_may_differ(mobile):
    widths = random_widths(mobile, 6)
    for args in (dict(num_classes=7), dict(in_chans=1), dict(num_classes=0, in_chans=4)):
        model = timm.create_model('mobilenetv2_035_width', widths=widths, **args)
        assert widths_from(model.state_dict(), mobile) == changed(mobile, widths), args


def test_pruned_by_hand():
    """What Torch-Pruning leaves behind: an ordinary module whose layers were cut one by one."""
    model = timm.create_model('test_resnet').eval()
    space = timm_width.trace(model)
    block = model.layer1[0]
    keep = torch.tensor([1, 2, 5])
    old = block.conv1
    block.conv1 = torch.nn.Conv2d(old.in_channels, 3, 3, padding=1, bias=False)
    block.conv1.weight.data = old.weight.data[keep]
    for name in ('weight', 'bias'):
        getattr(block.bn1, name).data = getattr(block.bn1, name).data[keep]
    block.bn1.running_mean, block.bn1.running_var = block.bn1.running_mean[keep], block.bn1.running_var[keep]
    block.conv2.weight.data = block.conv2.weight.data[:, keep]
    widths = widths_from(model, space)
    assert widths == {'layer1.0.conv1': 3}
    timm_width.register('test_resnet')
    again = timm.create_model('test_resnet_width', widths=widths).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_skipped_blocks():
    space = space_of('resnet18')
    widths = {n: max(space[n].size // 2, 1) for n in list(space.searchable)[:4]}
    model = timm.create_model('resnet18_width', widths=widths, skips=['layer1.1', 'layer3.1'])
    inside = {n: w for n, w in widths.items() if not n.startswith(('layer1.1.', 'layer3.1.'))}
    assert widths_from(model, space, skips=['layer1.1', 'layer3.1']) == inside
    with pytest.raises(timm_width.WidthError, match=r"block 'layer3.1' is missing .*skips=\['layer3.1'\]"):
        widths_from(model, space, skips=['layer1.1'])
    with pytest.raises(timm_width.WidthError, match='cannot be skipped'):
        widths_from(model, space, skips=['layer1.7'])


# -- what is refused -------------------------------------------------------------------------------------------------------


def broken(space, **shapes):
    """State dict of the base with other shapes (None: left out); '__' stands for a dot."""
    out = space.shapes({})
    for name, shape in shapes.items():
        name = name.replace('__', '.')
        out.pop(name, None)
        if shape is not None:
            out[name] = shape
    return tensors(out)


def refusal(source, base, **kwargs):
    with pytest.raises(timm_width.WidthError) as caught:
        widths_from(source, base, **kwargs)
    return str(caught.value)


def test_contradiction_names_both_tensors(space):
    size = space['layer1.0.conv1'].size
    kernel = space.tensors['layer1.0.conv1.weight'].shape[1:]
    said = refusal(broken(space, layer1__0__conv1__weight=(size - 4, *kernel)), space)
    assert "'layer1.0.conv1'" in said and 'layer1.0.conv1.weight' in said and 'layer1.0.bn1' in said
    assert str(size) in said and str(size - 4) in said


def test_contradiction_in_a_sum():
    space = space_of('densenet121')
    name = 'features.denseblock1.denselayer2.conv1.weight'
    out, size, *kernel = space.tensors[name].shape
    source = tensors(space.shapes({}))
    source[name] = torch.empty(out, size + 1, *kernel, device='meta')
    said = refusal(source, space)
    assert name in said and str(size + 1) in said


def test_names_missing_and_unexpected(space):
    source = broken(space, layer1__0__bn1__weight=None)
    source['total_ops'] = torch.zeros(1)
    said = refusal(source, space)
    assert 'missing: layer1.0.bn1.weight' in said and 'unexpected: total_ops' in said


def test_not_a_multiple_of_the_unit():
    space = space_of('regnetx_002')
    group = next(g for g in space.searchable.values() if g.unit > 1)
    source = {n: s for n, s in space.shapes({}).items()}
    for name, dim in group.axes:
        axis = space.tensors[name].axes[dim]
        if len(axis) == 1 and axis[0][1] == group.unit:
            source[name] = tuple(s - 1 if d == dim else s for d, s in enumerate(source[name]))
    said = refusal(tensors(source), space)
    assert f"'{group.name}'" in said and f'not a multiple of {group.unit}' in said


def test_fixed_sizes(space):
    name = 'layer1.0.conv1.weight'
    o, i, *_ = space.tensors[name].shape
    assert "fixed at 3" in refusal(broken(space, layer1__0__conv1__weight=(o, i, 5, 5)), space)
    assert 'was expected' in refusal(broken(space, layer1__0__conv1__weight=(o, i)), space)


def test_frozen_group():
    space = space_of('mobilenetv2_035')
    object.__setattr__(space, 'groups', tuple(
        type(g)(g.name, g.steps, g.unit, 'a test', g.ordered, g.axes) if g.name == 'conv_stem' else g for g in space.groups))
    source = tensors(space.shapes({}))
    w = source['conv_stem.weight'].shape
    source['conv_stem.weight'] = torch.empty(w[0] - 1, *w[1:], device='meta')
    said = refusal(source, space)
    assert "'conv_stem'" in said and 'frozen (a test)' in said


def test_all_faults_in_one_message(space):
    size = space['layer1.0.conv1'].size
    kernel = space.tensors['layer1.0.conv1.weight'].shape[1:]
    source = broken(space, layer1__0__conv1__weight=(size - 4, *kernel), layer2__0__bn1__weight=None)
    source['junk'] = torch.zeros(1)
    said = refusal(source, space)
    assert all(part in said for part in ("'layer1.0.conv1'", 'layer2.0.bn1.weight', 'junk'))


def test_beyond_growth(space):
    group = space['layer1.0.conv1']
    with pytest.raises(timm_width.WidthError, match='outside'):
        widths_from(tensors(space.shapes({group.name: 5 * group.size})), space)


@pytest.mark.parametrize('source', ['x.pt', None, [], {}, {'state_dict': {}}, {'a': 1}, {1: torch.zeros(1)}])
def test_not_a_state_dict(source, space):
    assert 'state dict' in refusal(source, space)


def test_base_that_does_not_exist():
    assert "did you mean 'resnet50'" in refusal({'a': torch.zeros(1)}, 'resnet5O')
    assert 'must be the name' in refusal({'a': torch.zeros(1)}, 7)


def test_another_architecture():
    with pytest.raises(timm_width.WidthError) as caught:
        widths_from(timm.create_model('test_efficientnet', ), 'test_resnet')
    assert len(str(caught.value)) < 10_000
