"""resize(): what a resized model is, which channels stay, what new ones hold, what follows, and what is refused."""
import copy
from functools import cache

import numpy as np
import pytest
import timm
import torch
from torch import nn

from timm_width.laws import random_widths, randomise
from timm_width.resize import feature_info, importance_scores, resize
from timm_width.space import WidthError
from timm_width.trace import meta_copy, trace

from .families import smallest_of_each_family


class Small(nn.Module):
    """Two convolutions with batch norm, then a linear layer: groups 'a' of 6 and 'b' of 4 channels."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.b, self.bnorm = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.bnorm(self.b(self.norm(self.a(x)).relu())).relu().mean((2, 3)))


SIZE = (3, 8, 8)


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Small().eval(), seed)


@cache
def on_meta(name: str):
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    return model, trace(model)


def values(model) -> dict:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


# -- as timm would build it ------------------------------------------------------------------------------------------------------

NATIVE = {
    'resnet50': dict(channels=(48, 96, 200, 384)),
    'resnet18': dict(channels=(64, 56, 96, 320)),
    'convnext_atto': dict(dims=(24, 48, 96, 200)),
    'densenet121': dict(growth_rate=16),
}


@pytest.mark.parametrize('name', NATIVE)
def test_a_resized_model_is_the_one_that_timm_builds_at_these_widths(name):
    """Same modules with the same settings, same shapes and strides, same metadata, and with its weights the same outputs."""
    torch.manual_seed(0)
    native = randomise(timm.create_model(name, **NATIVE[name]).eval())
    space = on_meta(name)[1]
    shapes = {n: t.shape[0] for n, t in native.named_parameters() if t.ndim > 1}
    widths = {n: shapes[f'{n}.weight'] for n in space.searchable}
    assert len(set(widths.items()) - set(space.base_widths.items())) > len(widths) // 3
    resized = resize(timm.create_model(name).eval(), space, widths)

    ours, theirs = dict(resized.named_modules()), dict(native.named_modules())
    assert list(ours) == list(theirs)
    for path, m in ours.items():
        assert type(m) is type(theirs[path]) and m.extra_repr() == theirs[path].extra_repr(), path
        assert m.training == theirs[path].training
    assert {n: (t.shape, t.stride(), t.dtype) for n, t in resized.state_dict().items()} == {
        n: (t.shape, t.stride(), t.dtype) for n, t in native.state_dict().items()}
    assert feature_info(resized) == feature_info(native)
    for attribute in ('num_features', 'head_hidden_size', 'num_classes', 'in_chans'):
        assert getattr(resized, attribute) == getattr(native, attribute), attribute

    resized.load_state_dict(native.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(resized(x), native(x))


def test_resize_changes_and_returns_the_model_itself():
    net = small()
    assert resize(net, trace(net, SIZE), {'a': 3}) is net
    assert net.a.weight.shape == (3, 3, 3, 3) and net.norm.num_features == 3 and net.b.in_channels == 3


def test_base_widths_change_nothing():
    net = small()
    before, tensors = values(net), [id(p) for p in net.parameters()]
    space = trace(net, SIZE)
    resize(net, space, {})
    resize(net, space, space.base_widths)
    assert [id(p) for p in net.parameters()] == tensors
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())


def test_tensors_without_a_changed_axis_stay_the_same_objects():
    net = small()
    kept = net.b.bias, net.out.weight, net.bnorm.running_mean
    changed = net.a.weight, net.b.weight
    resize(net, trace(net, SIZE), {'a': 3})
    assert kept == (net.b.bias, net.out.weight, net.bnorm.running_mean) and all(a is b for a, b in zip(
        kept, (net.b.bias, net.out.weight, net.bnorm.running_mean)))
    assert net.a.weight is not changed[0] and net.b.weight is not changed[1]


def test_smaller_tensors_do_not_hold_on_to_larger_ones():
    net = resize(small(), trace(small(), SIZE), {'a': 2, 'b': 3})
    for n, t in net.state_dict().items():
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size(), n


# -- which channels stay -----------------------------------------------------------------------------------------------------


def cut_by_hand(net, a, b) -> dict:
    """The state of `Small` with channels a and b kept, in order."""
    s = values(net)
    out = {'a.weight': s['a.weight'][a], 'b.weight': s['b.weight'][b][:, a], 'b.bias': s['b.bias'][b],
           'out.weight': s['out.weight'][:, b], 'out.bias': s['out.bias']}
    for norm, k in (('norm', a), ('bnorm', b)):
        out |= {f'{norm}.{n}': s[f'{norm}.{n}'][k] for n in ('weight', 'bias', 'running_mean', 'running_var')}
        out[f'{norm}.num_batches_tracked'] = s[f'{norm}.num_batches_tracked']
    return out


def assert_state(net, want: dict) -> None:
    got = net.state_dict()
    assert set(got) == set(want)
    for n, v in want.items():
        assert torch.equal(got[n], v), n


def test_the_first_channels_stay_by_default():
    net = small()
    want = cut_by_hand(net, [0, 1, 2, 3], [0, 1])
    assert_state(resize(net, trace(net, SIZE), {'a': 4, 'b': 2}), want)


@pytest.mark.parametrize('index', [[0, 2, 5], (1, 2, 3), np.array([3, 4, 5]), torch.tensor([0, 1, 4])], ids=str)
def test_given_channels_stay(index):
    net = small()
    want = cut_by_hand(net, list(map(int, index)), [0, 1, 2, 3])
    assert_state(resize(net, trace(net, SIZE), {'a': 3}, keep={'a': index}), want)


def test_kept_steps_of_a_unit_keep_all_their_channels():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 2, 1))
    want = net[0].weight[[2, 3, 6, 7]], net[1].weight[[2, 3, 6, 7]], net[2].weight[:, [2, 3, 6, 7]]
    space = trace(net, SIZE)
    resize(net, space, {'0': 4}, keep={'0': [1, 3]})
    assert torch.equal(net[0].weight, want[0]) and torch.equal(net[1].weight, want[1]) and torch.equal(net[2].weight, want[2])
    assert net[1].groups == 2


@pytest.mark.parametrize('criterion', ['l1', 'l2', 'bn'])
@pytest.mark.parametrize('seed', range(3))
def test_the_most_important_channels_stay(criterion, seed):
    """l1 and l2: norms of the convolution's filters; bn: absolute scales. The order of the channels stays."""
    net = small(seed)
    with torch.no_grad():
        net.norm.weight.mul_(torch.tensor([1., -1, 1, -1, 1, -1]))
    score = {
        'l1': lambda conv, norm: conv.weight.abs().sum((1, 2, 3)),
        'l2': lambda conv, norm: conv.weight.square().sum((1, 2, 3)).sqrt(),
        'bn': lambda conv, norm: norm.weight.abs(),
    }[criterion]
    a = sorted(score(net.a, net.norm).sort(descending=True).indices[:3].tolist())
    b = sorted(score(net.b, net.bnorm).sort(descending=True).indices[:2].tolist())
    assert (a, b) != ([0, 1, 2], [0, 1])
    want = cut_by_hand(net, a, b)
    assert_state(resize(net, trace(net, SIZE), {'a': 3, 'b': 2}, importance=criterion), want)


def test_importance_of_channels_with_several_producers_is_the_mean_of_relative_scores():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = (nn.Conv2d(*c, 1, bias=False) for c in ((3, 4), (3, 4), (4, 2)))

        def forward(self, x):
            return self.out(self.a(x) + self.b(x))

    net = Sum()
    with torch.no_grad():
        net.a.weight.copy_(torch.tensor([100., 300, 200, 400]).view(4, 1, 1, 1).expand(4, 3, 1, 1))
        net.b.weight.copy_(torch.tensor([9., 1, 1, 1]).view(4, 1, 1, 1).expand(4, 3, 1, 1))
    scores = importance_scores(net, trace(net, SIZE), 'l1')['a']
    assert torch.allclose(scores, torch.tensor([0.4 + 3, 1.2 + 1 / 3, 0.8 + 1 / 3, 1.6 + 1 / 3]) / 2)


def test_given_channels_go_before_importance():
    net = small()
    want = values(net)['a.weight'][[0, 1, 2]]
    resize(net, trace(net, SIZE), {'a': 3, 'b': 2}, keep={'a': [0, 1, 2]}, importance='l2')
    assert torch.equal(net.a.weight, want)


def test_importance_by_an_unknown_name_is_refused():
    with pytest.raises(WidthError, match="importance must be one of l1, l2, bn, not 'taylor'"):
        resize(small(), trace(small(), SIZE), {'a': 3}, importance='taylor')


@pytest.mark.parametrize('index', [
    [0, 1], [0, 1, 2, 3], [2, 1, 0], [0, 0, 1], [-1, 0, 1], [4, 5, 6], [0., 1., 2.], [[0, 1, 2]], 'abc', [True, False, True],
], ids=str)
def test_channels_that_do_not_fit_are_refused(index):
    net = small()
    before = values(net)
    with pytest.raises(WidthError, match="'a': keep must be 3 ascending indices below 6"):
        resize(net, trace(net, SIZE), {'a': 3}, keep={'a': index})
    assert_state(net, before)


def test_channels_of_an_unknown_group_are_refused():
    with pytest.raises(WidthError, match="unknown group 'c'"):
        resize(small(), trace(small(), SIZE), {'a': 3}, keep={'c': [0]})


# -- growth ------------------------------------------------------------------------------------------------------------------


def grown(name: str, seed: int, ratio: float = 2.):
    torch.manual_seed(seed)
    model = timm.create_model(name)
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point():
                t.mul_(3).add_(0.25)  # trained: the old values are not the initialisation
    before, space = values(model), trace(model)
    torch.manual_seed(seed + 1)
    return before, resize(model, space, space.scaled(ratio)), space


GROWN = ('resnet10t', 'mobilenetv3_small_050', 'convnext_zepto_rms')


@pytest.mark.parametrize('name', GROWN)
def test_old_channels_keep_their_values_and_new_ones_are_initialised_as_the_base(name):
    before, model, space = grown(name, 0)
    torch.manual_seed(7)
    fresh = timm.create_model(name).state_dict()
    checked = 0
    for n, t in model.state_dict().items():
        old = before[n]
        if t.shape == old.shape:
            assert torch.equal(t, old), n
            continue
        axes = space.tensors[n].axes
        # within these nets every axis is one group: the old channels are the first ones
        assert all(a is None or len(a) == 1 for a in axes)
        assert all(s == o or s == 2 * o for s, o in zip(t.shape, old.shape)), n
        assert torch.equal(t[tuple(slice(s) for s in old.shape)], old), f'{n}: old values changed'
        new = torch.ones(t.shape, dtype=torch.bool)
        new[tuple(slice(s) for s in old.shape)] = False
        first = fresh[n].reshape(-1)[0]
        if (fresh[n] == first).all():
            assert (t[new] == first).all(), f'{n}: constant at initialisation'
        elif min(t[new].numel(), fresh[n].numel()) > 2000:
            assert t[new].std() == pytest.approx(float(fresh[n].std()), rel=0.1), n
            assert t[new].mean() == pytest.approx(float(fresh[n].mean()), abs=0.1 * float(fresh[n].std())), n
            checked += 1
    assert checked > 5


def test_new_channels_are_no_copies():
    """Of each other, nor of old ones: they would stay equal in training."""
    _, model, _ = grown('resnet10t', 0)
    for n, p in model.named_parameters():
        if p.ndim > 1 and p[0].numel() > 1:
            rows = p.flatten(1)
            assert len(torch.unique(rows, dim=0)) == len(rows), n
            columns = p.transpose(0, 1).flatten(1)
            assert len(torch.unique(columns, dim=0)) == len(columns), n


def test_growth_follows_the_seed():
    a, b, c = (grown('resnet10t', 0)[1].state_dict() for _ in range(2)), None, None
    a, b = list(a)
    assert all(torch.equal(v, b[n]) for n, v in a.items())
    torch.manual_seed(0)
    model = timm.create_model('resnet10t')
    space = trace(model)
    torch.manual_seed(99)
    c = resize(model, space, space.scaled(2)).state_dict()
    assert not torch.equal(a['layer1.0.conv1.weight'], c['layer1.0.conv1.weight'])


def test_growth_draws_from_the_model_that_is_given():
    net, fives = small(), Small().requires_grad_(False)
    for p in fives.parameters():
        p.fill_(5)
    resize(net, trace(net, SIZE), {'a': 9}, fresh=lambda: fives)
    assert (net.a.weight[6:] == 5).all() and (net.b.weight[:, 6:] == 5).all() and (net.norm.weight[6:] == 5).all()
    assert not (net.a.weight[:6] == 5).any()


def test_a_module_that_timm_does_not_know_grows_by_its_own_initialisation():
    net = small()
    space = trace(net, SIZE)
    resize(net, space, {'a': 24})
    assert (net.norm.weight[6:] == 1).all() and (net.norm.bias[6:] == 0).all() and (net.norm.running_var[6:] == 1).all()
    assert 0.1 < net.a.weight[6:].std() / nn.Conv2d(3, 24, 3).weight.std() < 1.2
    assert net.a.weight[6:].abs().max() <= 27 ** -0.5


def test_growth_of_one_group_and_shrinking_of_another():
    net = small()
    before = values(net)
    resize(net, trace(net, SIZE), {'a': 8, 'b': 2}, keep={'b': [1, 3]})
    assert torch.equal(net.b.weight[:, :6], before['b.weight'][[1, 3]]) and net.b.weight.shape == (2, 8, 1, 1)
    assert torch.equal(net.out.weight, before['out.weight'][:, [1, 3]])


def test_growth_in_the_middle_of_a_cat_stays_beside_its_own_channels():
    net = timm.create_model('densenet121')
    space, first = trace(net), 'features.conv0'
    before = values(net)
    resize(net, space, {first: 70})
    w, old = net.features.denseblock1.denselayer2.conv1.weight, before['features.denseblock1.denselayer2.conv1.weight']
    assert w.shape[1] == old.shape[1] + 6
    assert torch.equal(w[:, :64], old[:, :64]) and torch.equal(w[:, 70:], old[:, 64:])


def test_a_new_classifier_s_weights_grow_too():
    """The head that reset_classifier put there is not in the model that timm builds from the model's arguments: its own
    values are the sample then."""
    model = timm.create_model('resnet10t', num_classes=0)
    model.reset_classifier(5)
    space = trace(model)
    trunk = next(n for n, g in space.searchable.items() if ('fc.weight', 1) in g.axes)
    resize(model, space, {trunk: 520})
    assert model.fc.weight.shape == (5, 520) and torch.isfinite(model.fc.weight).all()


def test_growth_on_meta_needs_no_weights():
    model, space = on_meta('resnet18')
    resized = resize(meta_copy(model), space, space.scaled(1.5), fresh=lambda: pytest.fail('built a model'))
    assert resized(torch.empty(1, 3, 64, 64, device='meta')).shape == (1, 1000)


# -- what else follows, and what stays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('ratio', [0.5, 1.5])
def test_channels_last_stays(ratio):
    model = timm.create_model('resnet10t').to(memory_format=torch.channels_last)
    resize(model, trace(model), trace(model).scaled(ratio))
    for n, p in model.named_parameters():
        if p.ndim == 4:
            assert p.is_contiguous(memory_format=torch.channels_last), n
    plain = timm.create_model('resnet10t')
    resize(plain, trace(plain), trace(plain).scaled(ratio))
    assert all(p.is_contiguous() for p in plain.parameters())


@pytest.mark.parametrize('ratio', [0.5, 1.5])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_stays(dtype, ratio):
    net = small().to(dtype)
    space = trace(net, SIZE)
    resize(net, space, space.scaled(ratio))
    assert {t.dtype for t in net.state_dict().values()} == {dtype, torch.int64}


@pytest.mark.parametrize('ratio', [0.5, 1.5])
def test_requires_grad_and_modes_stay(ratio):
    net = small()
    net.a.weight.requires_grad_(False)
    net.norm.bias.requires_grad_(False)
    net.train()
    net.bnorm.eval()
    space = trace(net, SIZE)
    resize(net, space, space.scaled(ratio))
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ['a.weight', 'norm.bias']
    assert net.training and net.norm.training and not net.bnorm.training
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in net.parameters())
    net(torch.randn(2, *SIZE)).sum().backward()
    assert net.b.weight.grad.shape == net.b.weight.shape


@pytest.mark.parametrize('ratio', [0.5, 1.5])
def test_tied_parameters_stay_tied(ratio):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.out = (nn.Conv2d(*c, 1) for c in ((3, 4), (4, 4), (4, 4), (4, 2)))
            self.b.weight, self.again = self.a.weight, self.a

        def forward(self, x):
            return self.out(self.again(self.b(self.a(self.stem(x)).relu()).relu()))

    net = Tied()
    space = trace(net, SIZE)
    resize(net, space, space.scaled(ratio))
    assert net.a.weight is net.b.weight and net.again is net.a
    assert net(torch.randn(1, *SIZE)).shape == (1, 2, 8, 8)


def test_hooks_stay():
    net, calls = small(), []
    space = trace(net, SIZE)
    net.a.register_forward_hook(lambda *_: calls.append(1))
    resize(net, space, {'a': 2})(torch.randn(1, *SIZE))
    assert calls == [1]


def test_a_state_dict_loads_into_another_resized_copy():
    model, space = timm.create_model('resnet10t'), trace(timm.create_model('resnet10t'))
    widths = random_widths(space, 3)
    a, b = resize(copy.deepcopy(model), space, widths), resize(timm.create_model('resnet10t'), space, widths)
    b.load_state_dict(a.state_dict())


def test_resizing_in_two_steps_is_resizing_at_once():
    torch.manual_seed(0)
    model = timm.create_model('resnet10t').eval()
    space = trace(model)
    at_once = resize(copy.deepcopy(model), space, space.scaled(0.25))
    half = resize(copy.deepcopy(model), space, space.scaled(0.5))
    twice = resize(half, trace(half), space.scaled(0.25))
    assert all(torch.equal(v, twice.state_dict()[n]) for n, v in at_once.state_dict().items())


# -- skipped blocks ------------------------------------------------------------------------------------------------------------


def test_a_skipped_block_passes_its_input_on():
    torch.manual_seed(0)
    model = randomise(timm.create_model('resnet18').eval())
    space, x = trace(model), torch.randn(1, 3, 64, 64)
    without = copy.deepcopy(model)
    without.layer2[1].forward = lambda x: x
    skipped = resize(copy.deepcopy(model), space, {}, ['layer2.1'])
    with torch.no_grad():
        assert torch.equal(skipped(x), without(x)) and not torch.equal(skipped(x), model(x))
    assert not [n for n in skipped.state_dict() if n.startswith('layer2.1.')]
    assert set(skipped.state_dict()) == {n for n in model.state_dict() if not n.startswith('layer2.1.')}


def test_all_blocks_can_be_skipped_at_other_widths():
    model, space = on_meta('mobilenetv2_035')
    skips = [b.name for b in space.blocks]
    resized = resize(meta_copy(model), space, random_widths(space, 0), skips)
    assert resized(torch.empty(1, 3, 96, 96, device='meta')).shape == (1, 1000)
    assert not trace(resized).blocks


# -- timm's metadata -----------------------------------------------------------------------------------------------------------

NAMES = list(smallest_of_each_family().values())


def promises(model, size) -> dict:
    """What timm's models promise about themselves, and whether this one keeps it."""
    kept: dict = {}
    x, seen = torch.empty(1, *size, device='meta'), {}

    def look(k: int):
        def hook(module, args, out):
            seen[k] = out.shape if isinstance(out, torch.Tensor) else None
        return hook

    hooks = [model.get_submodule(i['module']).register_forward_hook(look(k))
             for k, i in enumerate(feature_info(model)) if i.get('module') in dict(model.named_modules())]
    with torch.inference_mode(), torch.device('meta'):
        features = model.forward_features(x)
        for h in hooks:
            h.remove()
        if isinstance(features, torch.Tensor):
            kept['num_features'] = model.num_features in features.shape[1:]
        for k, shape in seen.items():
            if shape is not None:
                kept[f'feature_info {k}'] = feature_info(model)[k]['num_chs'] in shape[1:]
        kept['logits'] = tuple(model.forward_head(features).shape) == (1, model.num_classes)
        try:
            kept['head_hidden_size'] = model.forward_head(features, pre_logits=True).shape[-1] == model.head_hidden_size
        except (TypeError, AttributeError):
            pass
        try:
            outs = model.forward_intermediates(x, intermediates_only=True)
            if len(outs) == len(feature_info(model)):
                kept['intermediates'] = [i['num_chs'] for i in feature_info(model)] == [o.shape[1] for o in outs]
        except (TypeError, AttributeError, AssertionError):
            pass
        for classes in (7, 0):
            model.reset_classifier(classes)
            shape = tuple(model.forward_head(features).shape)
            kept[f'reset_classifier({classes})'] = (
                shape == (1, 7) and model.num_classes == 7 if classes else shape[-1] in (model.head_hidden_size, model.num_features))
    return kept


@pytest.mark.parametrize('name', NAMES)
def test_metadata_and_classifiers_follow_in_every_family(name):
    """Whatever the base promises about its widths holds at random widths too."""
    model, space = on_meta(name)
    held = promises(resize(meta_copy(model), space, random_widths(space, 5)), space.input_size)
    assert held['logits'] and held['reset_classifier(7)'] and held['reset_classifier(0)']
    if not all(held.values()):
        base = promises(meta_copy(model), space.input_size)
        assert not {k for k, ok in base.items() if ok and not held[k]}


# -- refusals --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('widths, message', [
    ({'layer1.0.conv': 32}, "unknown group 'layer1.0.conv', did you mean 'layer1.0.conv1'?"),
    ({'nothing like it': 32}, "unknown group 'nothing like it'"),
    ({3: 32}, "unknown group '3'"),
    ({'conv1': 0}, "'conv1': width 0 is outside 1..256"),
    ({'conv1': -3}, "'conv1': width -3 is outside 1..256"),
    ({'conv1': 257}, "'conv1': width 257 is outside 1..256"),
    ({'conv1': 10 ** 30}, "'conv1': width 1" + '0' * 30 + ' is outside 1..256'),
    ({'conv1': 32.}, "'conv1': width must be a whole number, not '32.0'"),
    ({'conv1': 32.5}, "'conv1': width must be a whole number, not '32.5'"),
    ({'conv1': True}, "'conv1': width must be a whole number, not 'True'"),
    ({'conv1': '32'}, "'conv1': width must be a whole number, not '32'"),
    ({'conv1': None}, "'conv1': width must be a whole number, not 'None'"),
    ({'conv1': float('nan')}, "'conv1': width must be a whole number, not 'nan'"),
    ({'conv1': [32]}, "'conv1': width must be a whole number, not '[32]'"),
    ({'fc': 10}, "'fc' is frozen at 1000 (network output), not 10"),
    ('widths.json', 'widths must be a dict of group name -> channels, not str'),
    (None, 'widths must be a dict of group name -> channels, not NoneType'),
    ([('conv1', 32)], 'widths must be a dict of group name -> channels, not list'),
])
def test_a_width_that_cannot_be_is_refused(widths, message):
    model, space = on_meta('resnet18')
    before = {n: t for n, t in model.state_dict(keep_vars=True).items()}
    with pytest.raises(WidthError) as error:
        resize(model, space, widths)
    assert str(error.value).startswith(f'resnet18: {message}') and '\n' not in str(error.value)
    assert all(t is before[n] for n, t in model.state_dict(keep_vars=True).items())


def test_a_width_between_the_steps_of_a_unit_is_refused_with_the_nearest():
    model, space = on_meta('regnetx_002')
    name, group = next((n, g) for n, g in space.searchable.items() if g.unit == 8 and g.size > 24)
    with pytest.raises(WidthError, match=rf"'{name}': width 20 is not a multiple of 8 \(nearest: 16 or 24\)"):
        resize(model, space, {name: 20})
    with pytest.raises(WidthError, match='not a multiple of 8'):
        resize(model, space, {name: 3})


@pytest.mark.parametrize('skips, message', [
    (['layer2.0'], "block 'layer2.0' cannot be skipped, did you mean 'layer1.0'?"),
    (['nowhere'], "block 'nowhere' cannot be skipped"),
    ([7], "block '7' cannot be skipped"),
    ('layer1.0', 'skips must be a list of block names, not str'),
    ({'layer1.0': True}, 'skips must be a list of block names, not dict'),
    (3, 'skips must be a list of block names, not int'),
])
def test_a_block_that_cannot_be_skipped_is_refused(skips, message):
    model, space = on_meta('resnet18')
    with pytest.raises(WidthError) as error:
        resize(model, space, {}, skips)
    assert message[:40] in str(error.value) and 'resnet18' in str(error.value)


def test_all_faults_are_in_one_message_and_nothing_has_changed():
    net = small()
    space, before = trace(net, SIZE), values(net)
    sizes = net.a.out_channels, net.norm.num_features
    with pytest.raises(WidthError) as error:
        resize(net, space, {'a': 0, 'b': 2.5, 'c': 3, 'out': 1}, ['d'], keep={'a': [9]}, importance='x')
    for part in ("'a': width 0", "'b': width must be a whole number", "unknown group 'c'", "'out' is frozen", "block 'd'"):
        assert str(error.value).count(part) == 1
    assert_state(net, before)
    assert (net.a.out_channels, net.norm.num_features) == sizes


def test_many_faults_are_counted_but_not_all_listed():
    model, space = on_meta('resnet50')
    with pytest.raises(WidthError) as error:
        resize(model, space, {f'x{k}': 1 for k in range(1000)})
    assert 'and 980 more' in str(error.value) and len(str(error.value)) < 3000


@pytest.mark.parametrize('change', [
    lambda net: setattr(net, 'a', nn.Conv2d(3, 7, 3)), lambda net: delattr(net, 'norm'),
    lambda net: resize(net, trace(net, SIZE), {'a': 3}),
], ids=['other shape', 'missing', 'resized'])
def test_a_model_that_changed_since_the_trace_is_refused(change):
    net = small()
    space = trace(net, SIZE)
    change(net)
    before = values(net)
    with pytest.raises(WidthError, match='the model is not the one that was traced.*trace it again'):
        resize(net, space, {'b': 2})
    assert_state(net, before)


def test_the_space_of_another_model_is_refused():
    with pytest.raises(WidthError, match='not the one that was traced'):
        resize(timm.create_model('resnet10t'), on_meta('resnet18')[1], {'conv1': 32})


def test_a_fresh_model_that_fails_leaves_the_model_as_it_was():
    def fail():
        raise MemoryError

    net = small()
    before = values(net)
    with pytest.raises(MemoryError):
        resize(net, trace(net, SIZE), {'a': 12, 'b': 2}, fresh=fail)
    assert_state(net, before)


def test_numpy_whole_numbers_are_widths():
    assert resize(small(), trace(small(), SIZE), {'a': np.int64(3)}).a.out_channels == 3


def test_grown_buffers_keep_their_pattern():
    """A blurring filter is the same for every channel, the new ones too."""
    model = timm.create_model('resnetblur18')
    space = trace(model)
    resize(model, space, space.scaled(1.5))
    filters = [m.filt for m in model.modules() if type(m).__name__ == 'BlurPool2d']
    assert filters and all((f == f[:1]).all() for f in filters)
