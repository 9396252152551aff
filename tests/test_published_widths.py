"""Published width vectors, mapped onto the spaces of timm's models, cost what is listed (facts/ALGORITHMS.md, 1 to 5)."""
import json
import math
from decimal import Decimal
from functools import cache
from pathlib import Path

import pytest
import timm
from timm.models._efficientnet_blocks import InvertedResidual

from timm_width.cost import Macs, Params
from timm_width.space import WidthSpace
from timm_width.trace import meta_copy, trace

FACTS = Path(__file__).resolve().parents[2] / 'shared' / 'facts' / 'published_widths.json'
ENTRIES = json.loads(FACTS.read_text(), parse_float=Decimal)['entries'] if FACTS.exists() else []
MODELS = {
    'mobilenet_v1': 'mobilenetv1_100', 'mobilenet_v2': 'mobilenetv2_100', 'mnasnet': 'mnasnet_100', 'resnet50': 'resnet50'}

# The list counts no expansion where hidden and input widths are equal (16 and 16 here). mmrazor's model, from which the vector
# comes (DMCP_MBV2_100M.json, unit 'backbone.layer2.1.conv.0.conv'), has that convolution: it costs 85.425M MACs, not 84.622M.
UNCOUNTED = {('DMCP', 'mobilenet_v2'): ('blocks.1.1.conv_pw', 'blocks.1.1.bn1')}

pytestmark = pytest.mark.skipif(not ENTRIES, reason=f'needs {FACTS}, which is not part of the repository')


@cache
def traced(arch: str):
    model = meta_copy(timm.create_model(MODELS[arch]))
    return model, trace(model, (3, 224, 224))


def layers(entry: dict, model) -> list[tuple[str, int]]:
    """(conv, output channels) for every number of a published vector, in its order."""
    arch, widths = entry['arch'], entry['widths']
    if arch == 'resnet50':
        return resnet_layers(entry['method'], model, widths)
    blocks = [(f'blocks.{i}.{j}', b) for i, stage in enumerate(model.blocks) for j, b in enumerate(stage)]
    names = ['conv_stem']
    for name, block in blocks:
        names += [f'{name}.conv_pw', f'{name}.conv_pwl'] if isinstance(block, InvertedResidual) else [f'{name}.conv_pw']
    if arch != 'mobilenet_v1':
        names.append('conv_head')
    return list(zip(names, widths, strict=True))


def resnet_layers(method: str, model, widths: list) -> list[tuple[str, int]]:
    """Stem, then three convs per block; AutoSlim puts a stage's shortcut before its first block, BCNet behind it."""
    stem, *rest = widths
    if method == 'DMCP':  # nested, without the shortcuts
        rest = [w for stage in rest[0] for block in stage for w in block]
    names = ['conv1']
    for stage in ('layer1', 'layer2', 'layer3', 'layer4'):
        shortcut = f'{stage}.0.downsample.0'
        for j in range(len(getattr(model, stage))):
            names += [shortcut] if method == 'AutoSlim' and j == 0 else []
            names += [f'{stage}.{j}.conv{k}' for k in (1, 2, 3)]
            names += [shortcut] if method == 'BCNet' and j == 0 else []
    return list(zip(names, [stem, *rest], strict=True))


def group_widths(space: WidthSpace, found: list[tuple[str, int]]) -> dict[str, int]:
    """Widths per group, from those of the convs; convs of one group must agree, and every searchable group must be given."""
    widths: dict[str, int] = {}
    for conv, width in found:
        (group, repeat), = space.tensors[f'{conv}.weight'].axes[0]
        assert repeat == space.groups[group].unit == 1
        name = space.groups[group].name
        assert widths.setdefault(name, width) == width, f'{conv} is tied to {name}'
    assert widths.keys() == space.searchable.keys()
    return widths


def as_printed(value: int, listed: Decimal) -> Decimal:
    """Millions, to the digits that the list prints."""
    return (Decimal(value) / 10 ** 6).quantize(listed)


@pytest.mark.parametrize('entry', ENTRIES, ids=lambda e: f"{e['method']}-{e['arch']}-{e['label']}")
def test_published_widths_cost_what_is_listed(entry):
    """One vector maps one to one onto the groups, and its MACs and parameters agree to the printed precision."""
    model, space = traced(entry['arch'])
    widths = {} if entry['widths'] is None else group_widths(space, layers(entry, model))
    macs, params = Macs(space)(widths), Params(space)(widths)
    conv, norm = UNCOUNTED.get((entry['method'], entry['arch']), (None, None))
    if conv is not None:
        steps, shapes = space.steps(widths), space.shapes(widths, params_only=True)
        site, = (s for s in space.sites if s.name == conv)
        inputs, outputs = (space.length(axis, steps) for axis in (site.inputs, site.outputs))
        assert inputs == outputs
        macs -= site.positions * inputs * outputs
        params -= sum(math.prod(shape) for name, shape in shapes.items() if name.rpartition('.')[0] in (conv, norm))
    assert as_printed(macs, entry['macs_M']) == entry['macs_M']
    assert as_printed(params, entry['params_M']) == entry['params_M']


@pytest.mark.parametrize('arch, searchable', [('mobilenet_v1', 14), ('mobilenet_v2', 25), ('mnasnet', 25), ('resnet50', 37)])
def test_the_groups_are_those_that_the_papers_search(arch, searchable):
    """14 outputs of MobileNet-v1 (AOWS), 25 merged variables of MobileNetV2 (CafeNet), stem, stages and mids of ResNet-50."""
    _, space = traced(arch)
    assert len(space.searchable) == searchable
