"""trace(): what it leaves alone, what it accepts, and what it finds in the networks of the papers."""
import copy
import json
import os
import random
import subprocess
import sys
import time
from functools import cache

import numpy as np
import pytest
import timm
import torch
from torch import nn

import timm_width
from timm_width.laws import random_widths
from timm_width.resize import resize
from timm_width.space import WidthError, WidthSpace
from timm_width.trace import TraceError, meta_copy, trace

# groups free to change: an fx union-find over sums, squeeze-excites and depthwise convolutions gave the same numbers (the
# classifier's output, which is frozen, is not counted; efficientnet_b0 has 24 and 16 squeezes)
PUBLISHED = {
    'mobilenetv1_100': 14, 'mobilenetv2_100': 25, 'efficientnet_b0': 40, 'resnet18': 12, 'resnet34': 20, 'resnet50': 37,
    'vgg16_bn': 15, 'regnetx_002': 18, 'regnety_002': 31, 'mobilenetv3_large_100': 30, 'mobilenetv3_small_100': 27,
    'mnasnet_100': 25, 'fbnetv3_b': 54,
}
VARIED = ('resnet10t', 'mobilenetv3_small_050', 'convnext_zepto_rms', 'cs3darknet_focus_s')


@cache
def on_meta(name: str, **kwargs):
    with torch.device('meta'):
        return timm.create_model(name, **kwargs)


@cache
def space_of(name: str) -> WidthSpace:
    return trace(on_meta(name))


# -- the model is left alone -------------------------------------------------------------------------------------------------


def plain_state(model: nn.Module) -> dict:
    """Everything a module keeps, by path: plain attributes by value, tensors and hooks by identity."""
    state = {}
    for path, m in model.named_modules():
        for k, v in m.__dict__.items():
            if isinstance(v, (int, float, str, bool, tuple, list, type(None))):
                state[path, k] = (type(v), repr(v))
            elif isinstance(v, dict):
                state[path, k] = [(j, id(w)) for j, w in v.items()]
            else:
                state[path, k] = id(v)
    return state


@pytest.mark.parametrize('name', [*VARIED, 'efficientformer_l1', 'mobilevit_xxs', 'densenet121', 'mvitv2_tiny'])
@pytest.mark.parametrize('training', [False, True])
def test_trace_leaves_the_model_as_it_was(name, training):
    """Also what modules cache in dicts (attention biases) and in lists, hooks, flags, gradients, and random states."""
    torch.manual_seed(0)
    model = timm.create_model(name).train(training)
    model.get_submodule(next(n for n, _ in model.named_children())).eval()  # mixed flags
    some = next(model.parameters())
    some.requires_grad_(False)
    calls = []
    for m in model.modules():
        m.register_forward_hook(lambda *_: calls.append(1))
    values = {n: (id(t), t.data_ptr(), t._version, t.dtype, t.device, t.stride(), t.requires_grad, t.grad)
              for n, t in [*model.named_parameters(), *model.named_buffers()]}
    state, flags = plain_state(model), [m.training for m in model.modules()]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    hooks = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)

    trace(model)

    assert {n: (id(t), t.data_ptr(), t._version, t.dtype, t.device, t.stride(), t.requires_grad, t.grad)
            for n, t in [*model.named_parameters(), *model.named_buffers()]} == values
    assert plain_state(model) == state and [m.training for m in model.modules()] == flags
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2] and torch.equal(torch.get_rng_state(), before[2])
    assert hooks == (len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks))
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32 and torch.empty(0).device.type == 'cpu'


def test_trace_leaves_the_model_as_it_was_also_when_it_fails():
    model = timm.create_model('vgg11')
    state = plain_state(model)
    hooks = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)
    with pytest.raises(TraceError):
        trace(model, (3, 8, 8))
    assert plain_state(model) == state
    assert hooks == (len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks))
    assert torch.is_grad_enabled() and torch.empty(0).device.type == 'cpu'
    assert len(trace(model, (3, 224, 224)).searchable) == 10


def test_the_traced_model_s_hooks_do_not_run_twice_nor_change_the_space():
    """A user's hook on the model must not make the trace wrong (it is copied with the model)."""
    model = timm.create_model('resnet18')
    want = trace(model)
    seen = []
    model.layer1.register_forward_hook(lambda m, a, out: seen.append(out.device.type))
    assert trace(model) == want
    assert set(seen) <= {'meta'}


# -- kinds of models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', VARIED)
def test_device_dtype_mode_and_memory_format_do_not_matter(name):
    want = space_of(name)
    model = timm.create_model(name)
    assert trace(model) == want
    assert trace(model.train()) == want
    assert trace(model.to(memory_format=torch.channels_last)) == want
    assert trace(model.half()) == want
    assert trace(model.bfloat16().eval()) == want
    assert trace(model.double()) == want
    assert trace(copy.deepcopy(model).to('meta').half()) == want


def test_a_model_under_no_grad_and_inference_mode():
    with torch.no_grad():
        assert trace(on_meta('resnet18')) == space_of('resnet18')
    with torch.inference_mode():
        assert trace(on_meta('resnet18')) == space_of('resnet18')


def test_a_compiled_or_wrapped_module_traces_as_itself():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = timm.create_model('resnet18')

        def forward(self, x):
            return {'logits': self.net(x)}

    space = trace(Wrapped(), (3, 64, 64))
    assert set(space.searchable) == {f'net.{n}' for n in space_of('resnet18').searchable}
    assert space.frozen == {'net.fc': 'network output'}


@pytest.mark.parametrize('name', VARIED)
def test_no_classifier_and_one_input_channel_give_the_same_names(name):
    want = space_of(name)
    assert trace(on_meta(name, in_chans=1)).base_widths == want.base_widths
    assert trace(on_meta(name, num_classes=7)).base_widths == want.base_widths
    assert trace(on_meta(name, num_classes=0)).base_widths == want.base_widths


def test_the_features_of_a_network_without_classifier_are_searchable():
    assert not trace(on_meta('resnet18', num_classes=0)).frozen


@pytest.mark.parametrize('name', VARIED)
def test_the_resolution_changes_sites_only(name):
    at96 = trace(on_meta(name), (3, 96, 96))
    assert at96.base_widths == space_of(name).base_widths and at96.input_size == (3, 96, 96)
    assert {n: t.axes for n, t in at96.tensors.items()} == {n: t.axes for n, t in space_of(name).tensors.items()}
    assert at96.macs() < space_of(name).macs()


def test_the_input_size_is_the_model_s_own_by_default():
    assert space_of('resnet18').input_size == (3, *timm.get_pretrained_cfg('resnet18').input_size[1:])
    assert trace(on_meta('resnet18', in_chans=4)).input_size[0] == 4


def test_drop_path_dropout_and_global_pool_do_not_matter():
    assert trace(on_meta('convnext_zepto_rms', drop_path_rate=0.3, drop_rate=0.2)) == space_of('convnext_zepto_rms')
    assert trace(on_meta('resnet18', global_pool='max')).base_widths == space_of('resnet18').base_widths


# -- what it finds ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_numbers_of_groups(name):
    space = space_of(name)
    assert len(space.searchable) == PUBLISHED[name]
    assert list(space.frozen.values()) == ['network output']


def test_names_and_sizes_of_resnet50():
    space, want = space_of('resnet50'), {'conv1': 64}
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], 1):
        for k in range(blocks):
            want[f'layer{stage}.{k}.conv1'] = want[f'layer{stage}.{k}.conv2'] = width
            if k == 0:  # the trunk of a stage is named by the first convolution that produces it
                want[f'layer{stage}.0.conv3'] = 4 * width
    assert space.base_widths == want
    assert list(space.groups[0].axes)[:2] == [('conv1.weight', 0), ('bn1.weight', 0)]


def test_axes_of_a_trunk_of_resnet18():
    axes = dict.fromkeys(n for n, _ in space_of('resnet18')['conv1'].axes)
    assert {n for n in axes if n.endswith('weight')} == {
        'conv1.weight', 'bn1.weight', 'layer1.0.conv1.weight', 'layer1.0.conv2.weight', 'layer1.0.bn2.weight',
        'layer1.1.conv1.weight', 'layer1.1.conv2.weight', 'layer1.1.bn2.weight', 'layer2.0.conv1.weight',
        'layer2.0.downsample.0.weight'}


def test_one_convolution_that_feeds_several_groups_numbers_them_in_channel_order():
    """A dual-path block splits one convolution's output into the residual trunk and the first part of the dense one."""
    space, name = space_of('dpn48b'), 'features.conv2_1.c1x1_w_s1.conv'
    assert {n: g.size for n, g in space.searchable.items() if n.startswith(name)} == {f'{name}:1': 64, f'{name}:2': 32}
    assert [space.groups[g].name for g, _ in space.tensors[f'{name}.weight'].axes[0]] == [f'{name}:1', f'{name}:2']


def test_units_are_the_sizes_of_conv_groups():
    assert {g.unit for n, g in space_of('regnetx_002').searchable.items() if n.endswith('conv1.conv')} == {8}
    assert space_of('mobilenetv2_100')['blocks.1.0.conv_pw'].unit == 1
    assert all(g.size % g.unit == 0 and g.steps * g.unit == g.size for n in PUBLISHED for g in space_of(n).groups)


def test_channel_attention_by_convolution_is_ordered():
    ordered = [n for n, g in trace(on_meta('ecaresnet26t')).searchable.items() if g.ordered]
    assert ordered and all('conv3' in n or 'conv1' in n for n in ordered)


def test_output_sizes_of_sites():
    sites = {s.name: s for s in space_of('resnet50').sites}
    side = space_of('resnet50').input_size[1]
    assert sites['conv1'].output_size == (side // 2,) * 2
    assert sites['layer1.0.conv1'].output_size == (side // 4,) * 2
    assert sites['layer4.2.conv3'].output_size == (side // 32,) * 2
    assert sites['fc'].kind == 'linear' and sites['fc'].output_size == ()
    assert len(sites) == 54 and sum(s.kind == 'conv' for s in sites.values()) == 53


def test_blocks_that_can_be_skipped():
    assert [b.name for b in space_of('resnet18').blocks] == [
        'layer1.0', 'layer1.1', 'layer2.1', 'layer3.1', 'layer4.1']  # the others change the size
    assert [b.name for b in space_of('mobilenetv2_100').blocks] == [
        'blocks.1.1', 'blocks.2.1', 'blocks.2.2', 'blocks.3.1', 'blocks.3.2', 'blocks.3.3', 'blocks.4.1', 'blocks.4.2',
        'blocks.5.1', 'blocks.5.2']
    assert len(space_of('convnext_zepto_rms').blocks) == 10
    assert not space_of('vgg16_bn').blocks and not space_of('mobilenetv1_100').blocks


@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv2_100', 'convnext_zepto_rms'])
def test_skipping_each_block_leaves_a_model_that_runs(name):
    space = space_of(name)
    base = sum(p.numel() for p in on_meta(name).parameters())
    for block in space.blocks:
        model = resize(meta_copy(on_meta(name)), space, space.scaled(0.5), [block.name])
        assert model(torch.empty(2, 3, 96, 96, device='meta')).shape == (2, 1000)
        assert sum(p.numel() for p in model.parameters()) < base
        assert not list(model.get_submodule(block.name).parameters())
        assert block.name not in {b.name for b in trace(model).blocks}


def test_a_block_adds_its_input_to_something():
    """No activation, pooling or identity counts, nor a sum with another tensor than the input."""
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act, self.pool = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AvgPool2d(3, 1, 1)

        def forward(self, x):
            return self.act(self.pool(self.a(x) + self.b(x)))

    class Residual(Other):
        def forward(self, x):
            return self.act(x + self.b(self.act(self.a(x))))

    class Scaled(Other):
        def forward(self, x):
            return 0.5 * (x + self.a(x))  # left out, its input would be halved

    net = nn.Sequential(nn.Conv2d(3, 8, 1), Other(), Residual(), Scaled(), nn.Identity(), nn.Conv2d(8, 2, 1))
    assert [b.name for b in trace(net, (3, 8, 8)).blocks] == ['2']


def test_searchable_share_and_half_macs():
    space = space_of('resnet18')
    params = {n: p.numel() for n, p in on_meta('resnet18').named_parameters()}
    assert space.searchable_share == pytest.approx(1 - params['fc.bias'] / sum(params.values()))
    assert space.half_macs == pytest.approx(space.macs({n: w // 2 for n, w in space.base_widths.items()}) / space.macs())
    assert 0.25 < space.half_macs < 0.27


# -- the value ---------------------------------------------------------------------------------------------------------------------


def test_print_is_a_table_with_every_group():
    for name in ('resnet18', 'halonet_h1', 'ecaresnet26t'):
        space = trace(on_meta(name))
        lines = str(space).splitlines()
        assert lines[0].startswith(f'{name} at 3x') and f'{len(space.searchable)} searchable' in lines[0]
        assert lines[1].split()[:5] == ['group', 'width', 'unit', 'layers', 'MACs']
        assert len(lines) == len(space.groups) + 3
        for line, group in zip(lines[2:], space.groups):
            cells = line.split()
            assert cells[:3] == [group.name, str(group.size), str(group.unit)]
            assert (f'frozen: {group.frozen}' in line) == (group.frozen is not None)
            assert ('ordered' in line) or not group.ordered or group.frozen
        assert '% of the parameters are searchable' in lines[-1]


def test_equal_models_have_equal_spaces():
    a, b = trace(timm.create_model('resnet18')), trace(timm.create_model('resnet18'))
    assert a == b and a.fingerprint == b.fingerprint
    assert trace(on_meta('resnet34')) != a and trace(on_meta('resnet18'), (3, 64, 64)) != a
    assert trace(on_meta('resnet18', num_classes=10)).fingerprint != a.fingerprint


def test_a_space_holds_no_modules_and_survives_a_copy():
    space = space_of('cs3darknet_focus_s')
    assert copy.deepcopy(space) == space

    def parts(x):
        yield x
        for y in (x.__dict__.values() if hasattr(x, '__dataclass_fields__') else x.values() if isinstance(x, dict)
                  else x if isinstance(x, (tuple, list)) else ()):
            yield from parts(y)

    assert not [x for x in parts(space) if isinstance(x, (nn.Module, torch.Tensor, list)) or callable(x)]


def test_the_fingerprint_is_the_same_in_every_process():
    code = ('import torch, timm, json; from timm_width import trace\n'
            'with torch.device("meta"): models = [timm.create_model(n) for n in ("resnet18", "mobilevit_xxs", "ghostnet_050")]\n'
            'print(json.dumps([trace(m).fingerprint for m in models]))')
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                           env={**os.environ, 'PYTHONHASHSEED': '1'}).stdout
    want = [space_of(n).fingerprint for n in ('resnet18', 'mobilevit_xxs', 'ghostnet_050')]
    assert json.loads(found.splitlines()[-1]) == want
    assert all(w.startswith('sha256:') and len(w) == 23 for w in want)


@pytest.mark.parametrize('name', VARIED)
def test_a_resized_model_has_the_same_names_at_its_new_sizes(name):
    space = space_of(name)
    widths = random_widths(space, 4)
    again = trace(resize(meta_copy(on_meta(name)), space, widths))
    assert again.base_widths == widths
    twice = trace(resize(resize(meta_copy(on_meta(name)), space, widths), again, space.base_widths))
    assert twice.base_widths == space.base_widths
    assert {n: t.shape for n, t in twice.tensors.items()} == {n: t.shape for n, t in space.tensors.items()}


def test_groups_by_name():
    space = space_of('resnet18')
    assert space['layer1.0.conv1'].size == 64 and space.groups[space.index['fc']].name == 'fc'
    with pytest.raises(WidthError, match="unknown group 'layer1.0.conv', did you mean 'layer1.0.conv1'"):
        space['layer1.0.conv']


def test_scaled_widths_respect_units_divisors_and_bounds():
    space = space_of('regnetx_002')
    for ratio in (0.01, 0.3, 1, 1.7, 100):
        widths = space.scaled(ratio, divisor=4)
        assert not space.faults(widths)
        assert all(w % g.unit == 0 and g.unit <= w <= 4 * g.size for w, g in zip(widths.values(), space.searchable.values()))
    assert space_of('resnet18').scaled(0.5) == {n: w // 2 for n, w in space_of('resnet18').base_widths.items()}
    assert set(space_of('resnet18').scaled(0.3, divisor=8).values()) == {16, 40, 80, 152}
    assert min(space_of('resnet18').scaled(0.01, minimum=5).values()) == 5


# -- errors ------------------------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_run_at_the_size_is_one_clear_error():
    with pytest.raises(TraceError) as error:
        trace(on_meta('vgg11'), (3, 8, 8))
    assert str(error.value).startswith('vgg11 does not run on an image of 3x8x8: ') and '\n' not in str(error.value)
    with pytest.raises(TraceError, match='resnet18 does not run on an image of 1x64x64'):
        trace(on_meta('resnet18'), (1, 64, 64))
    with pytest.raises(TraceError) as error:
        trace(nn.Sequential(Picky()), (3, 8, 8))
    assert str(error.value) == 'Sequential does not run on an image of 3x8x8: ValueError: (1, 3, 8, 8) is not to my taste'


class Picky(nn.Module):
    def forward(self, x):
        raise ValueError(f'{tuple(x.shape)} is not to my taste\nand here is why')


@pytest.mark.parametrize('size', [(3, 64), (64, 64), 64, (3, 0, 64), (3, -1, 64), 'x', (3, 64, 64, 64), (3, 2.5, 64)])
def test_an_odd_input_size_is_one_clear_error(size):
    with pytest.raises(ValueError) as error:
        trace(on_meta('resnet18'), size)
    assert '\n' not in str(error.value)


def test_a_model_without_parameters_has_no_groups():
    space = trace(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), (3, 8, 8))
    assert not space.searchable and not space.blocks and space.searchable_share == 0


def test_trace_is_exported():
    assert timm_width.trace is trace and timm_width.TraceError is TraceError


# -- speed -------------------------------------------------------------------------------------------------------------------------


def test_trace_of_resnet50_takes_less_than_two_seconds():
    model = on_meta('resnet50')
    best = float('inf')
    for _ in range(3):
        start = time.process_time()
        trace(model)
        best = min(best, time.process_time() - start)
    assert best < 2, f'{best:.2f} s'
