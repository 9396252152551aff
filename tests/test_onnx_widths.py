"""The slice of an ONNX file is the fresh export of the resized model: nodes, attributes, and every weight bit for bit."""
import copy
import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from timm_width.grids import make_grid, squeezes
from timm_width.resize import resize
from timm_width.trace import trace

onnx = pytest.importorskip('onnx', reason="needs the extra 'onnx'")
ort = pytest.importorskip('onnxruntime', reason="needs the extra 'onnx'")
pytest.importorskip('onnxscript', reason="needs the extra 'onnx'")

from timm_width.latency.onnx_graph import RecipeError, export_bytes, settle  # noqa: E402
from timm_width.latency.onnx_recipe import find_recipe, verify  # noqa: E402
from timm_width.latency.runner.errors import RunnerError  # noqa: E402
from timm_width.latency.runner.onnx_widths import SlicedModel  # noqa: E402

LIGHT = ['test_efficientnet', 'test_convnext']  # squeeze-excite and depthwise; layer scale, layer norms, indices
NETS = [*LIGHT, *(pytest.param(n, marks=pytest.mark.slow) for n in (
    'mobilenetv1_100', 'mobilenetv2_035', 'regnety_002', 'efficientnet_b0', 'densenet121', 'res2net50_26w_4s', 'cs3darknet_s', 'skresnet18',
    'poolformerv2_s12', 'mobileone_s0', 'resnet18', 'ghostnet_100'))]
SIZE = (3, 48, 48)


@cache
def cut(name: str, precision: str = 'fp32') -> SimpleNamespace:
    """A model at the largest widths of a small grid, its file and its recipe."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, exportable=True).eval()
    space = trace(model, SIZE)
    grid = make_grid(space, 'aows:5', None, None, 4, (), squeezes(model, space))
    largest = resize(model, space, {n: w[-1] for n, w in grid.items()})
    own, images = trace(largest, SIZE), torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))
    settle(largest, images)
    file, recipe = find_recipe(largest, own, grid, images, precision)
    return SimpleNamespace(model=largest, space=own, grid=grid, images=images, file=file, recipe=json.loads(json.dumps(recipe)))


def draw(grid, seed):
    rng = np.random.default_rng(seed)
    return {name: int(rng.choice(widths)) for name, widths in grid.items()}


def fresh(c, widths, precision='fp32'):
    return export_bytes(resize(copy.deepcopy(c.model), c.space, widths), c.images, precision)


def told(file: bytes):
    """Operations, in order, and weights, with values named by where they are made or first read: exporters number them."""
    graph = onnx.load_model_from_string(file).graph
    names, nodes = {v.name: v.name for v in graph.input}, []
    for i, node in enumerate(graph.node):
        read = [names.setdefault(x, f'read {i}.{k}') for k, x in enumerate(node.input)]
        names.update({y: f'made {i}.{k}' for k, y in enumerate(node.output)})
        nodes.append((node.op_type, node.domain, read, len(node.output), sorted(a.SerializeToString() for a in node.attribute)))
    return nodes, [names[v.name] for v in graph.output], {
        names[t.name]: (t.data_type, tuple(t.dims), onnx.numpy_helper.to_array(t).tobytes()) for t in graph.initializer}


def run(file: bytes, images):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(file, options, providers=['CPUExecutionProvider']).run(None, {'input': images.numpy()})[0]


@pytest.mark.parametrize('name', NETS)
def test_a_slice_is_the_fresh_export_of_the_resized_model(name):
    c = cut(name)
    sliced = SlicedModel(c.file, c.recipe)
    for widths in (draw(c.grid, 101), *[{n: w[0] for n, w in c.grid.items()}][name in LIGHT:]):
        found, wanted = sliced.at(widths), fresh(c, widths)
        onnx.checker.check_model(onnx.load_model_from_string(found), full_check=True)
        assert told(found) == told(wanted)
        a, b = run(found, c.images), run(wanted, c.images)
        assert a.tobytes() == b.tobytes() and np.isfinite(a).all() and np.ptp(a) > 0
        with torch.inference_mode():
            y = resize(copy.deepcopy(c.model), c.space, widths)(c.images).numpy()
        assert np.abs(a - y).max() <= 1e-4 * np.abs(y).max()


def test_slices_do_not_depend_on_what_was_sliced_before():
    c = cut('test_efficientnet')
    sliced = SlicedModel(c.file, c.recipe)
    smallest, some = {n: w[0] for n, w in c.grid.items()}, draw(c.grid, 5)
    first = sliced.at(some)
    assert len(sliced.at(smallest)) < len(first)
    assert sliced.at(some) == first == SlicedModel(c.file, c.recipe).at(some)
    assert told(sliced.at({})) == told(sliced.at(sliced.largest)) == told(c.file)


def test_float16_files_are_sliced_alike():
    c = cut('test_efficientnet', 'fp16')
    widths = draw(c.grid, 7)
    found = SlicedModel(c.file, c.recipe).at(widths)
    assert told(found) == told(fresh(c, widths, 'fp16'))
    kinds = {t.data_type for t in onnx.load_model_from_string(found).graph.initializer if len(t.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize('single', [True, False])
def test_groups_of_a_single_width_may_be_named_at_it(single):
    """A grid lists them, too; at any other width they would be what the file is not."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=5, exportable=True).eval()
    space, images = trace(model, SIZE), torch.randn(2, *SIZE)
    grid = make_grid(space, '0.75,1')
    fixed = [n for n, w in grid.items() if len(w) == 1]
    assert fixed and len(fixed) < len(grid)
    file, recipe = find_recipe(settle(model, images), space, grid, images)
    sliced = SlicedModel(file, recipe)
    if single:
        widths = {n: w[0] for n, w in grid.items()}
        assert set(sliced.largest) == {'', *grid} and told(sliced.at(widths)) == told(export_bytes(resize(model, space, widths), images))
    else:
        with pytest.raises(RunnerError, match='must be a multiple of'):
            sliced.at({fixed[0]: grid[fixed[0]][0] - space[fixed[0]].unit})


def without(recipe, kind, at):
    """The recipe without one of the things that it knows."""
    broken = copy.deepcopy(recipe)
    if kind == 'tensors':
        name, d = at
        broken['tensors'][name][d] = None
    else:
        del broken[kind][at]
    return broken


def test_whatever_is_left_out_of_a_recipe_the_probe_sees():
    c = cut('test_efficientnet')
    assert c.recipe['numbers'] and c.recipe['attributes'] and len(c.recipe['tensors']) > 20
    widths = {n: w[0] for n, w in c.grid.items()}
    expected = fresh(c, widths)
    verify(c.file, c.recipe, widths, expected)
    omissions = [('tensors', (n, d)) for n, axes in c.recipe['tensors'].items() for d, a in enumerate(axes) if a is not None]
    omissions += [(kind, i) for kind in ('numbers', 'attributes') for i in range(len(c.recipe[kind]))]
    for kind, at in omissions:
        with pytest.raises(RecipeError):
            verify(c.file, without(c.recipe, kind, at), widths, expected)


class Standardised(nn.Module):
    """Its weights depend on the widths of the layer before."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

    def forward(self, x):
        w = self.second.weight
        x = F.conv2d(self.first(x), w - w.mean((1, 2, 3), keepdim=True)).mean((2, 3))
        return self.head(x)


def test_a_net_that_cannot_be_sliced_is_refused():
    model = Standardised().eval()
    space = trace(model, SIZE)
    assert space.searchable
    with pytest.raises(RecipeError, match='not a part of itself|depend on|operation'):
        find_recipe(settle(model, torch.randn(2, *SIZE)), space, make_grid(space, '0.5,1', divisor=1), torch.randn(2, *SIZE))


def test_settled_tensors_differ():
    """Equal ones would be merged, and then not be cut one by one."""
    model = settle(timm.create_model('test_convnext').eval(), torch.randn(2, *SIZE))
    seen = [t.numpy().tobytes() for t in model.state_dict().values() if t.is_floating_point()]
    assert len(set(seen)) == len(seen) and all(t.isfinite().all() for t in model.state_dict().values())


@pytest.mark.parametrize('width', [0, -8, 10 ** 12, 3, 8., True, '8', None, float('nan')])
def test_widths_outside_the_file_are_refused(width):
    c = cut('test_efficientnet')
    sliced = SlicedModel(c.file, c.recipe)
    name = next(n for n, s, u in c.recipe['groups'] if n)
    if width == 3:  # not a multiple of the unit
        recipe = copy.deepcopy(c.recipe)
        group = next(g for g in recipe['groups'] if g[0] == name)
        group[2] = 2
        sliced = SlicedModel(c.file, recipe)
    with pytest.raises(RunnerError, match='must be a multiple of'):
        sliced.at({name: width})
    with pytest.raises(RunnerError, match='no group'):
        sliced.at({'nothing': 8})


def broken_recipes():
    def edit(change):
        def apply(recipe):
            recipe = copy.deepcopy(recipe)
            change(recipe)
            return recipe
        return apply

    def first(recipe):
        return recipe['tensors'][next(iter(recipe['tensors']))]

    return {
        'no object': lambda r: [],
        'nothing': lambda r: {},
        'groups': edit(lambda r: r.update(groups=5)),
        'huge group': edit(lambda r: r['groups'][1].__setitem__(1, 10 ** 12)),
        'larger group': edit(lambda r: r['groups'][1].__setitem__(1, r['groups'][1][1] + 1)),
        'group of no unit': edit(lambda r: r['groups'][1].__setitem__(2, 0)),
        'group twice': edit(lambda r: r['groups'].append(r['groups'][1])),
        'axis of no group': edit(lambda r: r['axes'][0].__setitem__(0, [10 ** 6, 1])),
        'axis of negative group': edit(lambda r: r['axes'][0].__setitem__(0, [-1, 1])),
        'axis of text': edit(lambda r: r['axes'].__setitem__(0, 'x')),
        'empty axis': edit(lambda r: r['axes'].__setitem__(0, [])),
        'no such axis': edit(lambda r: first(r).__setitem__(0, 10 ** 9)),
        'negative axis': edit(lambda r: first(r).__setitem__(0, -1)),
        'axis true': edit(lambda r: first(r).__setitem__(0, True)),
        'axis elsewhere': edit(lambda r: first(r).reverse()),
        'too few dimensions': edit(lambda r: first(r).pop()),
        'no such tensor': edit(lambda r: r['tensors'].update(nothing=[None])),
        'no such node': edit(lambda r: r['numbers'][0].__setitem__(0, 10 ** 9)),
        'negative node': edit(lambda r: r['attributes'][0].__setitem__(0, -1)),
        'no such input': edit(lambda r: r['numbers'][0].__setitem__(1, 7)),
        'a weight as a number': edit(lambda r: r['numbers'][0].__setitem__(slice(0, 2), [0, 1])),
        'no such element': edit(lambda r: r['numbers'][0].__setitem__(2, 99)),
        'no such attribute': edit(lambda r: r['attributes'][0].__setitem__(1, 'nothing')),
        'other attribute': edit(lambda r: r['attributes'][0].__setitem__(1, 'strides')),
        'division by zero': edit(lambda r: r['numbers'][0].__setitem__(5, 0)),
        'other factor': edit(lambda r: r['attributes'][0].__setitem__(4, 3)),
        'huge factor': edit(lambda r: r['attributes'][0].__setitem__(4, 10 ** 30)),
        'short row': edit(lambda r: r['numbers'][0].pop()),
    }


@pytest.mark.parametrize('fault', broken_recipes())
def test_a_recipe_that_does_not_fit_the_file_is_refused(fault):
    c = cut('test_efficientnet')
    broken = broken_recipes()[fault](c.recipe)
    assert broken != c.recipe
    with pytest.raises(RunnerError) as e:
        SlicedModel(c.file, broken)
    assert '\n' not in str(e.value)


def test_a_broken_file_is_refused(tmp_path):
    c = cut('test_efficientnet')
    for file in (b'', b'no ONNX file', c.file[:len(c.file) // 2], c.file[:100]):
        with pytest.raises(RunnerError):
            SlicedModel(file, c.recipe)
    with pytest.raises(RunnerError, match='cannot be read'):
        SlicedModel(tmp_path / 'none.onnx', c.recipe)
    proto = onnx.load_model_from_string(c.file)
    weight = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
    weight.raw_data = weight.raw_data[:8]
    with pytest.raises(RunnerError, match='broken weights'):
        SlicedModel(proto.SerializeToString(), c.recipe)
    proto = onnx.load_model_from_string(c.file)
    proto.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    proto.graph.initializer[0].external_data.add(key='location', value='/etc/passwd')
    with pytest.raises(RunnerError, match='other files'):
        SlicedModel(proto.SerializeToString(), c.recipe)
