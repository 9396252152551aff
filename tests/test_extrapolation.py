"""Width Transfer: stages of any model, what M_dim and alpha give, what a projection costs, how alike widths are."""
import dataclasses
import math
from functools import lru_cache

import numpy as np
import pytest
import timm
import torch

import timm_width
from timm_width.cost import Macs, Params
from timm_width.extrapolation import (
    DEPTHS,
    TOLERANCE,
    Found,
    TransferError,
    cosine,
    cosines,
    extrapolate,
    match,
    multipliers,
    overhead,
    project,
    saved,
    width_vector,
)
from timm_width.positions import Stages
from timm_width.space import MAX_GROWTH, WidthError


@lru_cache
def space_of(name, size=64):
    with torch.device('meta'):
        return timm_width.trace(timm.create_model(name), (3, size, size))


def random_found(name, seed=0, base=None):
    """Every group at some share of its width."""
    space, rng = space_of(name), np.random.default_rng(seed)
    return Found(space, {n: space.rounded(g, rng.uniform(0.3, 1.5) * g.size) for n, g in space.searchable.items()}, base or {})


PAIRS = [('resnet18', 'resnet34'), ('resnet26', 'resnet50'), ('mobilenetv2_100', 'mobilenetv2_110d'), ('resnet34', 'resnet18'),
         ('mobilenetv2_100', 'mobilenetv2_120d'), ('efficientnet_b0', 'efficientnet_b1'), ('vgg11', 'vgg16'), ('resnet18', 'resnet18'),
         ('regnetx_002', 'regnetx_004'), ('densenet121', 'densenet169'), ('convnext_atto', 'convnext_pico'), ('repvgg_a0', 'repvgg_b0'),
         ('rexnet_100', 'rexnet_130'), ('mobilenetv1_100', 'mobilenetv1_125'), ('nf_regnet_b0', 'nf_regnet_b1')]


@pytest.mark.parametrize('depth', DEPTHS)
@pytest.mark.parametrize('small, large', PAIRS)
def test_unoptimised_widths_give_the_unoptimised_network(small, large, depth):
    """M_dim of all ones is all ones, and alpha makes the base of it."""
    space = space_of(large)
    ratios, skips = extrapolate(Found(space_of(small), {}), space, depth)
    assert set(ratios) == set(space.searchable) and set(ratios.values()) == {1} and not skips
    assert match(Macs(space), space.macs(), ratios).widths == space.base_widths


STAGES = {
    'resnet18': {'layer1': 2, 'layer2': 2, 'layer3': 2, 'layer4': 2},
    'mobilenetv2_100': {f'blocks.{i}': n for i, n in enumerate((1, 2, 3, 4, 3, 3, 1))},
    'regnetx_002': {'s1.b': 1, 's2.b': 1, 's3.b': 4, 's4.b': 7},
    'densenet121': {f'features.denseblock{i}.denselayer': n for i, n in enumerate((6, 12, 24, 16), 1)},
    'vgg16': {f'features, part {i}': n for i, n in enumerate((2, 2, 3, 3, 3), 1)},
    'convnext_atto': {f'stages.{i}.blocks': n for i, n in enumerate((2, 2, 6, 2))},
}


@pytest.mark.parametrize('name', STAGES)
def test_stages_and_their_blocks_are_those_of_the_papers(name):
    assert {stage: len(blocks) for stage, blocks in Stages(space_of(name)).blocks.items()} == STAGES[name]


def test_what_is_outside_of_stages():
    assert Stages(space_of('resnet26d')).outside == ['conv1.0', 'conv1.3', 'conv1.6']
    assert Stages(space_of('mobilenetv2_100')).outside == ['conv_stem', 'conv_head']


# -- M_dim -----------------------------------------------------------------------------------------------------------------


def test_the_same_network_keeps_its_widths():
    for name in ('resnet34', 'mobilenetv2_100', 'vgg16'):
        found = random_found(name)
        for depth in DEPTHS:
            ratios, _ = extrapolate(found, found.space, depth)
            assert ratios == {n: multipliers(found)[n] for n in found.space.searchable}
            macs = Macs(found.space)
            assert match(macs, macs(found.widths), ratios).widths == found.widths


@pytest.mark.parametrize('small, large', [('resnet18', 'resnet34'), ('resnet26', 'resnet50')])
def test_both_extrapolations_agree_where_stages_have_two_blocks(small, large):
    found = random_found(small)
    average, last = (extrapolate(found, space_of(large), depth) for depth in DEPTHS)
    assert average == last


def test_stack_average_and_stack_last_by_hand():
    """From resnet50 (3, 4, 6, 3) to resnet101 (3, 4, 23, 3) one stage grows."""
    small, large = space_of('resnet50'), space_of('resnet101')
    found = random_found('resnet50')
    w = multipliers(found)
    average, last = (extrapolate(found, large, depth)[0] for depth in DEPTHS)
    for conv in ('conv1', 'conv2'):
        mean = np.mean([w[f'layer3.{b}.{conv}'] for b in range(1, 6)])
        for b in range(1, 23):
            assert average[f'layer3.{b}.{conv}'] == mean
            assert last[f'layer3.{b}.{conv}'] == w[f'layer3.{min(b, 5)}.{conv}']
    others = [n for n in large.searchable if not n.startswith('layer3.') or n.startswith('layer3.0.')]
    assert all(average[n] == last[n] == w[n] for n in others) and len(others) == len(small.searchable) - 10


def test_a_stage_of_one_block_gives_its_own_multipliers():
    """The first stage of efficientnet_b1 has two blocks, that of b0 one; what residual additions tie has one multiplier."""
    found = random_found('efficientnet_b0')
    for depth in DEPTHS:
        ratios, _ = extrapolate(found, space_of('efficientnet_b1'), depth)
        assert ratios['blocks.0.1.se.conv_reduce'] == multipliers(found)['blocks.0.0.se.conv_reduce']
        assert ratios['blocks.0.0.conv_pw'] == multipliers(found)['blocks.0.0.conv_pw'] and 'blocks.0.1.conv_pw' not in ratios


def test_multipliers_are_against_the_widths_of_the_projection():
    """So a width projection needs no other treatment: what was not changed there has a multiplier of 1."""
    space = space_of('resnet18')
    widths, _ = project(space, 0.312)
    found = Found(space, widths, widths)
    assert set(multipliers(found).values()) == {1}
    half = {n: max(w // 2, 1) for n, w in widths.items()}
    ratios, _ = extrapolate(Found(space, half, widths), space)
    assert ratios == {n: half[n] / widths[n] for n in space.searchable}


def test_skips_that_were_found_stay_and_those_of_the_projection_do_not():
    small, large = space_of('resnet18'), space_of('resnet34')
    found = Found(small, {'layer2.0.conv1': 64}, left_out=('layer1.1', 'layer2.1'), skips=('layer3.1',))
    ratios, skips = extrapolate(found, large)
    assert skips == ('layer3.1',) and 'layer3.1.conv1' not in ratios
    assert [ratios[f'layer2.{b}.conv1'] for b in range(4)] == [0.5] * 4
    with pytest.raises(TransferError, match="cannot do without 'layer3.1'"):
        extrapolate(found, dataclasses.replace(large, blocks=()))


WRONG = {('resnet18', 'resnet50'): "the stage 'layer1', those of resnet18 have the layers conv1, conv2; those of resnet50 have conv1, conv2",
         ('resnet50', 'resnet18'): 'downsample.0', ('mobilenetv2_100', 'efficientnet_b0'): 'se.conv_reduce',
         ('vgg11', 'resnet18'): 'vgg11 has 5 stages', ('mobilenetv1_100', 'mobilenetv1_100h'): 'outside of stages'}


@pytest.mark.parametrize('pair', WRONG)
def test_networks_that_do_not_correspond_are_refused(pair):
    with pytest.raises(TransferError, match=WRONG[pair]):
        extrapolate(Found(space_of(pair[0]), {}), space_of(pair[1]))


def test_widths_that_do_not_fit_their_network_are_refused():
    space = space_of('resnet18')
    for found in (Found(space, {'nothing': 3}), Found(space, {'conv1': 0}), Found(space, {}, {'conv1': 10 ** 9}),
                  Found(space, {}, {}, ('layer2.0',)), Found(space, {}, skips=('fc',))):
        with pytest.raises(WidthError):
            extrapolate(found, space_of('resnet34'))


# -- alpha -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('cost', [Macs, Params])
@pytest.mark.parametrize('share', [0.3, 1, 1.7])
@pytest.mark.parametrize('small, large', [('resnet18', 'resnet34'), ('mobilenetv2_100', 'mobilenetv2_120d')])
def test_costs_are_matched_within_half_a_percent(small, large, share, cost):
    space = space_of(large)
    cost, (ratios, _) = cost(space), extrapolate(random_found(small, seed=3), space)
    found = match(cost, share * cost(), ratios)
    space.check(found.widths)
    assert found.cost == cost(found.widths) and 0 <= found.away < TOLERANCE


def test_widths_are_rounded_to_the_divisor_and_clipped():
    space = space_of('resnet34')
    ratios = {n: 1. for n in space.searchable} | {'layer4.2.conv1': 40., 'layer1.0.conv1': 1e-9}
    found = match(Macs(space), space.macs(), ratios, divisor=8)
    assert found.widths['layer4.2.conv1'] == MAX_GROWTH * 512 and found.widths['layer1.0.conv1'] == 8
    assert all(w % 8 == 0 for w in found.widths.values()) and found.cost <= space.macs()
    assert match(Macs(space), 1e18, ratios).widths == {n: MAX_GROWTH * g.size for n, g in space.searchable.items()}


def test_fixed_groups_keep_their_width_and_a_limit_below_all_is_refused():
    space = space_of('resnet34')
    found = match(Macs(space), space.macs() // 2, {}, fixed=['conv1'])
    assert found.widths['conv1'] == 64 and found.widths['layer4.0.conv1'] < 512
    with pytest.raises(TransferError, match='with all widths at their least it costs'):
        match(Macs(space), 10, {})


# -- projections and overhead ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('depth, left', [('1', (1, 1, 1, 1)), ('2', (2, 2, 2, 2)), ('9', (3, 4, 6, 3)), ('0.5x', (2, 2, 3, 2)),
                                         ('0.25x', (1, 1, 2, 1)), ('1x', (3, 4, 6, 3))])
def test_depth_keeps_the_first_blocks_of_each_stage(depth, left):
    widths, skips = project(space_of('resnet34'), 0.5, depth)
    assert skips == tuple(f'layer{i}.{b}' for i, (n, all_of) in enumerate(zip(left, (3, 4, 6, 3)), 1) for b in range(n, all_of))
    assert widths['conv1'] == 32 and not [n for n in widths if n.startswith(tuple(f'{s}.' for s in skips))]


def test_depth_is_refused_where_blocks_must_stay():
    with pytest.raises(TransferError, match="cannot do without 'features"):
        project(space_of('vgg16'), depth='1')


def test_a_projection_is_a_real_timm_model():
    """Built by name, traced, resized: its groups have the names of the whole network's."""
    space = space_of('mobilenetv2_100')
    widths, skips = project(space, 0.5, '1')
    with torch.device('meta'):
        model = timm.create_model('mobilenetv2_100_width', widths=widths, skips=skips)
    small = timm_width.trace(model, (3, 64, 64))
    assert small.base_widths == widths and set(small.searchable) <= set(space.searchable)
    assert small.macs() == Macs(space)(widths, skips)
    ratios, found = extrapolate(Found(small, {}), space)
    assert set(ratios) == set(space.searchable) and set(ratios.values()) == {1} and not found


def test_320_times_less():
    """Section 4.5: (0.707, 1, 160, 10 %) against (1.414, 2, 320, 100 %)."""
    assert overhead(1.414, 2, 320, 1) / overhead(0.707, 1, 160, 0.1) == 320


@pytest.mark.parametrize('width, percent', [(0.312, 96.8), (0.5, 91.7), (0.707, 83.3), (1, 66.7), (1.732, 0)])
def test_savings_of_width(width, percent):
    assert round(100 * saved(overhead(width), overhead(1.732)), 1) == percent


@pytest.mark.parametrize('proxy, direct, percent', [
    ({'depth': 1}, {'depth': 4}, 75), ({'resolution': 64}, {'resolution': 320}, 96), ({'resolution': 160}, {'resolution': 320}, 75),
    ({'data': 0.05}, {}, 95), ({'data': 0.1}, {}, 90)])
def test_savings_of_depth_resolution_and_data(proxy, direct, percent):
    assert math.isclose(100 * saved(overhead(**proxy), overhead(**direct)), percent)


def test_the_closed_form_is_that_of_the_counted_macs_but_for_layers_that_grow_linearly():
    """Stem, classifier and depthwise convolutions have one searched width, so they grow by the factor, not by its square."""
    for name, most in ('resnet34', 0.02), ('mobilenetv2_100', 0.12):
        space = space_of(name, 128)
        for width in 0.312, 0.5, 0.707:
            counted = Macs(space)(space.scaled(width)) / space.macs()
            linear = sum(s.positions * math.prod(f if isinstance(f, int) else space.length(f, space.steps({})) for f in s.factors)
                         for s in space.sites if sum(not isinstance(f, int) for f in s.factors) < 2) / space.macs()
            assert counted == pytest.approx(overhead(width) * (1 - linear) + width * linear, rel=0.02)
            assert 0 < counted - overhead(width) < most
    whole, quarter = space_of('resnet34', 128).macs(), space_of('resnet34', 64).macs()
    assert whole / quarter == pytest.approx(4, rel=0.002)


# -- how alike widths are ----------------------------------------------------------------------------------------------------


def test_cosines():
    space = space_of('resnet18')
    ones = width_vector(space, {})
    assert len(ones) == 20 and set(ones) == {1}  # 17 convolutions of 3x3 and 3 of shortcuts; not the classifier
    doubled = width_vector(space, dict.fromkeys(space.searchable, 2.))
    other = width_vector(space, multipliers(random_found('resnet18')))
    assert cosine(ones, doubled) == pytest.approx(1) and 0.5 < cosine(ones, other) < 1
    assert cosine([1, 0], [0, 2]) == 0 and cosine([3, 4], [4, 3]) == pytest.approx(24 / 25)
    found = cosines([ones, doubled, other])
    assert np.allclose(found, found.T) and np.allclose(np.diag(found), 1) and found[0, 2] == pytest.approx(found[1, 2])


def test_a_depthwise_convolution_has_no_multiplier_of_its_own():
    space = space_of('mobilenetv1_100')
    assert len(width_vector(space, {})) == 14  # the stem and 13 pointwise convolutions
