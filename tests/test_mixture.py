"""Layers of several candidates: a masked block is the narrower block, and a layer is the weighted sum of those left."""
import copy

import pytest
import timm
import torch
from torch import nn

from timm_width.mixture import Mixture, Prunode, build_layers, find_layers
from timm_width.resize import resize
from timm_width.trace import trace


class _Both(nn.Module):
    residual = False

    def __init__(self):
        super().__init__()
        self.candidates = nn.ModuleDict({k: _Hidden(int(k[1])) for k in ('k1', 'k3')})

    def forward(self, x):
        return sum(c(x) for c in self.candidates.values())


class _Hidden(nn.Module):
    def __init__(self, kernel: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, 8, 3), _Both(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.stem(x)).mean((2, 3)))


def prepared(name: str, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.5, 0.5)
            nn.init.uniform_(m.running_mean, -0.5, 0.5)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model, trace(model, (3, 32, 32))


def grid_of(space, layers):
    return {g: tuple(sorted({max(space[g].size * k // 4 // space[g].unit, 1) * space[g].unit for k in range(1, 5)}))
            for layer in layers for groups in layer.blocks.values() for g in groups}


@pytest.mark.parametrize('name, path, groups, residual', [
    ('resnet18', 'layer1.0', ('layer1.0.conv1',), True), ('resnet50', 'layer2.1', ('layer2.1.conv1', 'layer2.1.conv2'), True),
    ('mobilenetv2_050', 'blocks.2.0', ('blocks.2.0.conv_pw',), False), ('resnet18', 'layer2.0', ('layer2.0.conv1',), False),
    ('efficientnet_b0', 'blocks.2.1', ('blocks.2.1.conv_pw',), True), ('regnetx_002', 's3.b2', ('s3.b2.conv1.conv',), True),
])
def test_a_layer_is_a_block_with_the_groups_that_are_its_own(name, path, groups, residual):
    with torch.device('meta'):
        model = timm.create_model(name)
        space = trace(model)
    squeezes = [g for g in space.searchable if '.se.' in g]
    found = {layer.path: layer for layer in find_layers(model, space, [g for g in space.searchable if g not in squeezes])}
    assert set(groups) <= set(found[path].blocks[path]) and found[path].residual == residual and found[path].alone
    for layer in found.values():
        for own in layer.blocks.values():
            for g in own:  # nothing outside of the block has channels of it
                i = space.index[g]
                assert all(t.startswith(layer.path + '.') for t, axes in space.tensors.items()
                           if any(a is not None and i in [k for k, _ in a] for a in axes.axes))


def test_candidates_are_found_where_a_module_has_some():
    model = _Net()
    space = trace(model, (3, 8, 8))
    [layer] = find_layers(model, space, list(space.searchable))
    assert not layer.alone and not layer.residual
    assert layer.blocks == {'layer.candidates.k1': ('layer.candidates.k1.conv1',), 'layer.candidates.k3': ('layer.candidates.k3.conv1',)}


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'mobilenetv2_050', 'efficientnet_b0', 'test_efficientnet'])
@pytest.mark.parametrize('train', [False, True])
def test_a_masked_block_is_the_narrower_block(name, train):
    """All blocks at their small mask give what the model resized to these widths gives."""
    model, space = prepared(name)
    layers = find_layers(model, space, [g for g in space.searchable if '.se.' not in g])
    grid = grid_of(space, layers)
    narrow, x = copy.deepcopy(model), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    mixtures = build_layers(model, space, layers, grid)
    widths = {}
    for m in mixtures:
        [prunode] = m.candidates.values()
        if prunode.masks is None:
            continue
        prunode.masks.small = 2
        prunode.shares = torch.tensor([1., 0.], dtype=torch.float64)
        widths |= prunode.widths[1]
    resize(narrow, space, widths)
    model.train(train), narrow.train(train)
    for m in (model, narrow):
        for d in m.modules():
            if hasattr(d, 'drop_prob'):
                d.drop_prob = 0.
    with torch.no_grad():
        torch.testing.assert_close(model(x), narrow(x), rtol=1e-9, atol=1e-9)


def test_training_leaves_masked_channels_without_gradient():
    block = _Hidden(3)
    prunode = Prunode(block, [{'g': 4}, {'g': 8}, {'g': 12}, {'g': 16}], {'bn1': [('g', 1, 16, 1)]})
    prunode.masks.small, prunode.masks.large = 1, 2
    prunode(torch.randn(2, 8, 5, 5)).square().sum().backward()
    assert block.conv2.weight.grad[:, 8:].abs().max() == 0 and block.conv2.weight.grad[:, :8].abs().min() > 0


def test_a_layer_is_the_weighted_sum_of_what_is_left():
    candidates = [Prunode(_Hidden(k), [{}], {}) for k in (1, 3, 1)]
    layer, x = Mixture(candidates, True, 'layer').eval(), torch.randn(2, 8, 5, 5)
    out = [c(x) for c in candidates]
    layer.weights = torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close(layer(x), 0.2 * out[0] + 0.3 * out[1] + 0.5 * out[2])
    layer.remove(1)
    assert layer.left == [0, 2]
    layer.remove(0)
    torch.testing.assert_close(layer(x), out[2])  # alone, it has no weight
    layer.skip, layer.scales, layer.weights = True, (1.1, 0.4), torch.tensor([0.6, 0.4])
    torch.testing.assert_close(layer(x), 0.6 * 0.4 * out[2] + 0.4 * 1.1 * x)  # 3.2.3
    layer.skip = False
    torch.testing.assert_close(layer(x), out[2])
    layer.skip = True
    layer.remove(2)
    assert layer(x) is x


def test_the_model_with_all_candidates_whole_is_the_model():
    model, space = prepared('resnet18')
    model.eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = model(x)
    layers = find_layers(model, space, list(space.searchable))
    for m in build_layers(model, space, layers, grid_of(space, layers)):
        for c in m.candidates.values():
            c.shares = torch.tensor([0., 1.], dtype=torch.float64)
    torch.testing.assert_close(model(x), before)
    assert isinstance(model.layer1[0], Mixture)  # in the place of the blocks
