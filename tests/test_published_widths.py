"""Published networks: their widths mapped onto the spaces of timm's models, what they cost, and that timm builds them by name."""
import json
import math
from argparse import Namespace
from decimal import Decimal
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from timm.models import resolve_model_input_args
from torch.utils.flop_counter import FlopCounterMode

import timm_width
from timm_width.config import fingerprint
from timm_width.cost import Macs, Params
from timm_width.models.published import citation, conv_names, find, group_widths, prunets
from timm_width.policies import names
from timm_width.start import provenance_of
from timm_width.trace import meta_copy, trace

FACTS = Path(__file__).resolve().parents[2] / 'shared' / 'facts' / 'published_widths.json'
ENTRIES = json.loads(FACTS.read_text(), parse_float=Decimal)['entries'] if FACTS.exists() else []
MODELS = {
    'mobilenet_v1': 'mobilenetv1_100', 'mobilenet_v2': 'mobilenetv2_100', 'mnasnet': 'mnasnet_100', 'resnet50': 'resnet50'}
SHORTCUTS = {'AutoSlim': 'before', 'BCNet': 'behind'}  # where the lists of ResNets put those of a stage
NETWORKS = {n.name: n for n in timm_width.list_configs()}
TAGGED = [name for name, n in NETWORKS.items() if n.tag]
AOWS = 'mobilenetv1_100_width.aows_trt'

# The list counts no expansion where hidden and input widths are equal (16 and 16 here). mmrazor's model, from which the vector
# comes (DMCP_MBV2_100M.json, unit 'backbone.layer2.1.conv.0.conv'), has that convolution: it costs 85.425M MACs, not 84.622M.
UNCOUNTED = {('DMCP', 'mobilenet_v2'): ('blocks.1.1.conv_pw', 'blocks.1.1.bn1')}

with_facts = pytest.mark.skipif(not ENTRIES, reason=f'needs {FACTS}, which is not part of the repository')


@cache
def traced(arch: str):
    model = meta_copy(timm.create_model(MODELS[arch]))
    return model, trace(model, (3, 224, 224))


def flat(entry: dict) -> list[int]:
    """The vector of an entry; DMCP's of a ResNet is nested."""
    found = entry['widths']
    if entry['method'] == 'DMCP' and entry['arch'] == 'resnet50':
        found = [found[0], *(w for stage in found[1] for block in stage for w in block)]
    return found


def layers(entry: dict, model) -> list[tuple[str, int]]:
    """(conv, output channels) for every number of a published vector, in its order."""
    shortcut = SHORTCUTS.get(entry['method'], '') if entry['arch'] == 'resnet50' else ''
    return list(zip(conv_names(model, shortcut), flat(entry), strict=True))


def as_printed(value: int, listed: Decimal) -> Decimal:
    """Millions, to the digits that the list prints."""
    return (Decimal(value) / 10 ** 6).quantize(listed)


@with_facts
@pytest.mark.parametrize('entry', ENTRIES, ids=lambda e: f"{e['method']}-{e['arch']}-{e['label']}")
def test_published_widths_cost_what_is_listed(entry):
    """One vector maps one to one onto the groups, and its MACs and parameters agree to the printed precision."""
    model, space = traced(entry['arch'])
    widths = {}
    if entry['widths'] is not None:
        widths = group_widths(space, list(zip(conv_names(model, SHORTCUTS.get(entry['method'], '')), flat(entry), strict=True)))
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


@with_facts
def test_the_table_has_the_vectors_and_claims_of_the_list():
    """Every result of a search, in the list's order; not the baselines, the ends of AOWS's grid, and the example of its README."""
    found = [e for e in ENTRIES if e['method'] in ('AOWS-D.2', 'AutoSlim', 'DMCP', 'BCNet')]
    assert len(found) == len(TAGGED) == 3 + 13 + 2 + 8
    for e in found:
        n, = (NETWORKS[name] for name in TAGGED if list(NETWORKS[name].vector) == flat(e))
        assert n.model == MODELS[e['arch']] + '_width' and n.shortcut == (SHORTCUTS.get(e['method'], '') if 'resnet' in n.name else '')
        published = e['published']
        top1 = published.get('top1') or ('top1_err' in published and 100 - published['top1_err']) or None
        assert n.top1 == (None if top1 is None else pytest.approx(float(top1)))


@pytest.mark.parametrize('arch, searchable', [('mobilenet_v1', 14), ('mobilenet_v2', 25), ('mnasnet', 25), ('resnet50', 37)])
def test_the_groups_are_those_that_the_papers_search(arch, searchable):
    """14 outputs of MobileNet-v1 (AOWS), 25 merged variables of MobileNetV2 (CafeNet), stem, stages and mids of ResNet-50."""
    _, space = traced(arch)
    assert len(space.searchable) == searchable


def test_a_vector_of_another_network_is_refused():
    model, space = traced('mobilenet_v1')
    with pytest.raises(timm_width.ConfigError, match='is 35 widths, and this version of timm builds 14'):
        NETWORKS['mobilenetv2_100_width.autoslim_207m'].widths(model, space)
    found = list(zip(conv_names(model), NETWORKS[AOWS].vector))
    with pytest.raises(timm_width.ConfigError, match='there are no widths for blocks.4.1.conv_pw'):
        group_widths(space, found[:-1])
    with pytest.raises(timm_width.ConfigError, match='tied to conv_stem, whose width is 8, not 9'):
        group_widths(space, [*found, ('conv_stem', 9)])


# -- by name ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', NETWORKS)
def test_timm_builds_it_and_it_costs_what_the_table_says(name):
    """Counted by torch on the network itself."""
    network = NETWORKS[name]
    model = timm.create_model(name, device='meta').eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert model(torch.empty(1, *model.pretrained_cfg['input_size'], device='meta')).shape == (1, 1000)
    assert counter.get_total_flops() == 2 * network.macs
    assert sum(p.numel() for p in model.parameters()) == network.params and fingerprint(model) == network.shapes
    if network.claimed_macs_M is not None:  # DMCP's small network is another matter: its card says so
        assert network.macs / 1e6 == pytest.approx(network.claimed_macs_M, rel=0.2 if 'dmcp_100m' in name else 0.065)


def test_names_are_unique_and_timm_lists_them():
    assert len(timm_width.list_configs()) == len(NETWORKS) == 33
    assert set(TAGGED) <= set(timm.list_models('*_width*', include_tags=True))
    assert {n for n in NETWORKS if n not in TAGGED} == set(timm.list_models('gpunet_??')) | set(timm.list_models('gpunet_?'))
    for name in TAGGED:
        base = name.partition('.')[0].removesuffix('_width')
        assert not timm.is_model_pretrained(name) and NETWORKS[name].tag not in {c.tag for c in timm.models.get_arch_pretrained_cfgs(base).values()}
        assert timm.get_pretrained_cfg(name.partition('.')[0]).tag == timm.get_pretrained_cfg(base).tag  # the default is the base's


def test_list_configs():
    found = timm_width.list_configs('*autoslim*')
    assert len(found) == 13 and {n.method for n in found} == {'AutoSlim'}
    assert all(n.macs and n.params and n.top1 for n in found)
    assert "name='resnet50_width.autoslim_570m', method='AutoSlim', macs=570004736, params=7417104, top1=72.2" in str(found)
    assert timm_width.list_configs('nothing') == []


@pytest.mark.parametrize('name', [AOWS, 'resnet50_width.bcnet_575m'])
def test_a_tag_is_its_widths(name):
    """The same network as the base at these widths, and its parts."""
    base, _, tag = name.partition('.')
    plain = timm.create_model(base.removesuffix('_width'), device='meta')
    widths = NETWORKS[name].widths(plain, trace(plain, (3, 224, 224)))
    model, given = (timm.create_model(n, num_classes=5, in_chans=1, device='meta', **more) for n, more in (
        (name, {}), (base, {'widths': widths})))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in given.state_dict().items()}
    filled = {**model._model_args, 'widths': {**trace(plain, (3, 224, 224)).scaled(1), **model._model_args['widths']}}
    assert filled == given._model_args
    assert model.pretrained_cfg['tag'] == tag and model.pretrained_cfg['architecture'] == base
    assert model.num_features == given.num_features and model.feature_info == given.feature_info
    levels = timm.create_model(name, features_only=True, device='meta')
    assert levels.feature_info.channels() == [y.shape[1] for y in levels.eval()(torch.empty(1, 3, 64, 64, device='meta'))]


@pytest.mark.parametrize('given', ['tag', 'string', 'dict', 'object', 'resolved'])
def test_the_ways_to_name_a_tag(given):
    model, _, tag = AOWS.partition('.')
    cfg = timm.get_pretrained_cfg(AOWS)
    named = {'tag': {'model_name': AOWS}, 'string': {'model_name': model, 'pretrained_cfg': tag},
             'dict': {'model_name': model, 'pretrained_cfg': cfg.to_dict()}, 'object': {'model_name': model, 'pretrained_cfg': cfg},
             'resolved': resolve_model_input_args(AOWS, {})}[given]
    found = timm.create_model(device='meta', **named)
    assert fingerprint(found) == NETWORKS[AOWS].shapes and found.pretrained_cfg['mean'] == (0.485, 0.456, 0.406)


def test_its_own_arguments_rebuild_it_and_others_are_refused():
    model = timm.create_model(AOWS, device='meta')
    cfg, args = model.pretrained_cfg, model._model_args
    assert fingerprint(timm.create_model(cfg['architecture'], pretrained_cfg=cfg, device='meta', **args)) == NETWORKS[AOWS].shapes
    with pytest.raises(timm_width.ConfigError, match=f"{AOWS} is widths by itself: leave widths= out, or give them to 'mobilenetv1_100_width'"):
        timm.create_model(AOWS, device='meta', widths={**args['widths'], 'conv_stem': 16})
    for widths in ({}, {'nothing': 3}):
        with pytest.raises(timm_width.ConfigError, match='is widths by itself'):
            timm.create_model(AOWS, device='meta', widths=widths)
    with pytest.raises(timm_width.ConfigError, match="give skips= to 'resnet50_width' without the tag"):
        timm.create_model('resnet50_width.dmcp_2g', device='meta', skips=['layer1.1'])


def test_there_are_no_weights_and_that_is_said():
    with pytest.raises(timm_width.ConfigError, match=f"{AOWS}: widths were published and no weights: .* cuts the weights of mobilenetv1_100 to them"):
        timm.create_model(AOWS, pretrained=True)
    with pytest.raises(RuntimeError, match='No pretrained weights exist for gpunet_0'):
        timm.create_model('gpunet_0', pretrained=True)


def test_weights_of_ones_own_are_cut_to_the_widths(tmp_path):
    """Those that pretrained_cfg_overlay names, as for any registered model."""
    torch.manual_seed(0)
    base = timm.create_model('mobilenetv1_100')
    torch.save(base.state_dict(), tmp_path / 'base.pth')
    model = timm.create_model(AOWS, pretrained=True, pretrained_cfg_overlay={'file': str(tmp_path / 'base.pth')})
    assert torch.equal(model.conv_stem.weight, base.conv_stem.weight[:8])


def test_a_saved_one_keeps_its_widths_whatever_its_tag_says(tmp_path):
    """Also when it was cut further."""
    model = timm.create_model(AOWS, num_classes=3)
    timm_width.resize(model, trace(model), {'blocks.2.0.conv_pw': 40})
    timm_width.save(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert again.pretrained_cfg['tag'] == 'aows_trt' and again.blocks[2][0].conv_pw.out_channels == 40
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_training_one_keeps_where_its_widths_are_from():
    """And not what others claim of theirs."""
    assert provenance_of(Namespace(model=AOWS, widths=None)) == {
        'method': 'AOWS', 'source': "Table D.2 of the paper's supplement (https://arxiv.org/abs/2005.10481)"}
    assert provenance_of(Namespace(model='mobilenetv1_100_width.ra4_e3600_r224_in1k', widths=None)) == {}


def test_find():
    assert find('mobilenetv1_100_width', 'aows_trt') is NETWORKS[AOWS]
    assert find('mobilenetv1_100_width', {'tag': 'aows_trt', 'source': 'local-dir'}) is None
    for cfg in (None, '', 'ra4_e3600_r224_in1k', {}, {'tag': None}, timm.get_pretrained_cfg('resnet50')):
        assert find('mobilenetv1_100_width', cfg) is None


def test_citations_and_references():
    cited = {p: citation(p) for p in names()}
    assert {p for p, text in cited.items() if not text} == {'uniform', 'random'}
    assert cited['greedy'] == cited['aows'] == citation(NETWORKS[AOWS].paper) and '2005.10481' in cited['aows']
    assert citation('nothing') == citation('') == ''
    assert [r['name'] for r in prunets()] == [f'PRUNET-{i}' for i in range(7)]
    for key in ('ms', 'top1', 'top1_distilled', 'params_M', 'macs_G'):  # each is larger, slower and better than the one before
        assert sorted({r[key] for r in prunets()}) == [r[key] for r in prunets()]
