"""Grids: the tables of the papers, and what every rule must hold."""
import dataclasses
import json
import math
from functools import cache
from pathlib import Path

import pytest
import timm

import timm_width
from timm_width.data import UsageError
from timm_width.grids import GRIDS, make_grid, squeezes
from timm_width.space import MAX_GROWTH
from timm_width.trace import meta_copy

from .test_published_widths import group_widths, layers

FACTS = Path(__file__).resolve().parents[2] / 'shared' / 'facts' / 'published_widths.json'


@cache
def traced(name, **kwargs):
    model = meta_copy(timm.create_model(name, **kwargs))
    return model, timm_width.trace(model, (3, 64, 64))


def space(name, **kwargs):
    return traced(name, **kwargs)[1]


def sized(*sizes, unit=1):
    """A space whose groups have these base widths: a grid asks for nothing else."""
    one = next(iter(space('mobilenetv1_100').searchable.values()))
    groups = tuple(dataclasses.replace(one, name=f'g{i}', steps=size // unit, unit=unit) for i, size in enumerate(sizes))
    return dataclasses.replace(space('mobilenetv1_100'), groups=groups)


def one(size, *args, unit=1, **kwargs):
    return make_grid(sized(size, unit=unit), *args, **kwargs)['g0']


# -- the papers' tables ------------------------------------------------------------------------------------------------------


def test_aows_is_table_d1_of_its_supplement():
    """MobileNet-v1: |C_i| = 6, 11, then 14 twelve times (facts/ALGORITHMS.md 1.1), and the two rows that are printed there."""
    grid = make_grid(space('mobilenetv1_100'), 'aows')
    assert [len(w) for w in grid.values()] == [6, 11] + [14] * 12
    assert math.prod(len(w) for w in grid.values()) == 3741798216769536
    assert grid['conv_stem'] == (8, 16, 24, 32, 40, 48)
    assert list(grid.values())[-1] == (208, 304, 408, 512, 616, 720, 816, 920, 1024, 1128, 1232, 1328, 1432, 1536)


def test_dmcp_counts_down_in_tenths_of_the_base_width():
    """Section 3.3 of DMCP: 64 channels in 10 groups of 6 from 64 down; MobileNetV2 starts at 1.5 times the base width."""
    assert one(64, 'dmcp') == tuple(range(10, 65, 6))
    assert one(32, 'dmcp', high=1.5) == tuple(range(6, 49, 3))
    assert one(100, 'dmcp:0.25') == (25, 50, 75, 100)


@pytest.mark.skipif(not FACTS.exists(), reason=f'needs {FACTS}, which is not part of the repository')
def test_published_autoslim_networks_lie_on_the_autoslim_grid():
    """All three published MobileNetV2 sit on steps of max(8, 8 * floor(C / 96)) below C = 1.5 times the base width.

    The two hidden widths that expand 24 channels start at six times 40 there, which is what 36 are rounded to.
    """
    entries = [e for e in json.loads(FACTS.read_text())['entries'] if (e['method'], e['arch']) == ('AutoSlim', 'mobilenet_v2')]
    assert len(entries) == 3
    model, s = traced('mobilenetv2_100')
    grid = make_grid(s, 'autoslim')
    for name, widths in grid.items():
        largest = 8 * int(1.5 * s[name].size / 8 + 0.5)
        step = max(8, 8 * (largest // 96))
        assert widths == tuple(w for w in range(largest, 0, -step) if w >= 0.15 * s[name].size)[::-1], name
    expand = make_grid(s, 'autoslim', high=6 * 40 / 144)
    grid.update({name: expand[name] for name in ('blocks.1.1.conv_pw', 'blocks.2.0.conv_pw')})
    for entry in entries:
        found = group_widths(s, layers(entry, model))
        assert found.keys() == grid.keys()
        assert not [name for name, w in found.items() if w not in grid[name]]


def test_bins_are_equal_parts_of_the_largest_width():
    """Section 3.2 of CafeNet, and its number after a colon."""
    assert one(160, 'bins') == tuple(range(16, 161, 16))
    assert one(64, 'bins:4') == (16, 32, 48, 64)
    assert one(64, 'bins:4', high=2.) == (32, 64, 96, 128)
    assert one(64, 'bins:4', low=0.5) == (32, 48, 64)


# -- ratios and multiples ----------------------------------------------------------------------------------------------------


def test_ratios_are_rounded_to_the_divisor():
    assert one(64, '0.25,0.5,1') == (16, 32, 64)
    assert one(64, '1, 0.3 ,0.3') == (16, 64)  # 19.2 channels; twice the same is once
    assert one(24, '0.1,1.5') == (8, 32)  # at least one step; 36 is 4.5 steps, half to even
    assert one(24, '0.1,1.5', divisor=1) == (2, 36)


def test_multiples_hold_the_base_width_where_the_range_does():
    assert one(24, low=0.25, high=1.5) == (8, 16, 24, 32)
    assert one(20) == (8, 16, 20)
    assert one(20, high=0.9) == (8, 16)
    assert one(20, low=1.1, high=2.) == (24, 32, 40)
    assert one(240, low=0.1, divisor=24)[0] == 24  # 0.1 * 240 is a little more than 24


def test_widths_never_exceed_what_a_group_may_grow_to():
    assert one(20, '4', divisor=8) == (MAX_GROWTH * 20,)
    assert one(18, '4', divisor=8) == (72,)
    assert one(17, '4', divisor=8) == (64,)


@pytest.mark.parametrize('kind, high', [*((kind, high) for kind in GRIDS for high in (1., 1.5)), ('0.3,0.7,1', None)])
@pytest.mark.parametrize('name', ['mobilenetv2_100', 'regnetx_002', 'resnext26ts'])
def test_every_grid_is_ascending_in_whole_units_and_its_widths_are_valid(name, kind, high):
    s = space(name)
    grid = make_grid(s, kind, high=high)
    assert grid.keys() == s.searchable.keys()
    for group, widths in grid.items():
        assert list(widths) == sorted(set(widths)) and widths
        assert all(w % s[group].unit == 0 and 0 < w <= (high or 1) * s[group].size + 8 for w in widths)
    for ends in (0, -1):
        assert not s.faults({group: widths[ends] for group, widths in grid.items()})


def test_grouped_convolutions_keep_their_group_size():
    """The step is the least common multiple of the unit and the divisor, or the unit where that is more than the group has."""
    assert one(96, divisor=8, unit=24) == (24, 48, 72, 96)
    assert one(96, divisor=8, unit=12) == (24, 48, 72, 96)
    assert one(36, divisor=8, unit=12) == (24, 36)  # and the base
    assert one(60, divisor=8, unit=20) == (40, 60)
    assert one(20, divisor=8, unit=20) == (20,)
    units = {g.unit for g in space('regnetx_002').searchable.values()}
    assert units == {1, 8}
    grid = make_grid(space('regnetx_002'), divisor=12)
    name, group = next((n, g) for n, g in space('regnetx_002').searchable.items() if g.unit == 8)
    assert group.size >= 24 and [w for w in grid[name] if w != group.size] == list(range(24, group.size, 24))


# -- what is left out --------------------------------------------------------------------------------------------------------


def test_squeezes_of_efficientnet_b0_are_left_out():
    """One squeeze-excite in each of its 16 blocks."""
    model, s = traced('efficientnet_b0')
    found = squeezes(model, s)
    assert found == {n for n in s.searchable if n.endswith('.se.conv_reduce')} and len(found) == 16
    assert make_grid(s, squeezes=found).keys() == s.searchable.keys() - found
    assert make_grid(s).keys() == s.searchable.keys()


@pytest.mark.parametrize('name', ['seresnet18', 'legacy_seresnet18', 'mobilenetv3_small_100', 'regnety_002', 'ese_vovnet19b_slim',
                                  'rexnet_100', 'ghostnet_100', 'hardcorenas_a', 'repvit_m1', 'gernet_s'])
def test_squeezes_are_the_groups_made_inside_squeeze_excites(name):
    """Checked by name: every searchable group with an se, or attn, in its path, and nothing else."""
    model, s = traced(name)
    by_name = {n for n in s.searchable if {'se', 'se_module', 'attn'} & set(n.split('.'))}
    assert squeezes(model, s) == by_name
    assert bool(by_name) == (name not in ('gernet_s', 'ese_vovnet19b_slim'))


def test_fix_leaves_groups_out():
    s = space('mobilenetv2_100')
    grid = make_grid(s, '1', fix=['blocks.*'])
    assert set(grid) == {'conv_stem', 'conv_head'}
    assert set(make_grid(s, fix=['conv_head', 'blocks.[1-6]*'])) == {'conv_stem', 'blocks.0.0.conv_pw'}


@pytest.mark.parametrize('kwargs, says', [
    ({'kind': 'aosw'}, "did you mean 'aows'"),
    ({'kind': 'aows:0'}, 'the number of aows must be a whole number of 1 or more, as in aows:14'),
    ({'kind': 'aows:2.5'}, 'whole number of 1 or more'),
    ({'kind': 'aows:x'}, 'whole number of 1 or more'),
    ({'kind': 'dmcp:2'}, 'a share above 0, to 1'),
    ({'kind': '0.5,,1'}, 'is not a grid'),
    ({'kind': '0,1'}, 'is not a grid'),
    ({'kind': '0.5,4.5'}, 'is not a grid'),
    ({'kind': 'nan'}, 'is not a grid'),
    ({'kind': ''}, 'is not a grid'),
    ({'kind': 'bins:inf'}, 'whole number of 1 or more'),
    ({'low': 0.9, 'high': 0.5}, '--width-min 0.9 and --width-max 0.5'),
    ({'high': 5.}, 'from 0 to 4'),
    ({'low': 0., 'high': 0.}, '--width-max 0'),
    ({'low': math.nan}, '--width-min nan'),
    ({'kind': '0.5,1', 'high': 1.}, 'leave out --width-min'),
    ({'low': 1.01, 'high': 1.02, 'kind': 'bins'}, 'leaves no width'),
    ({'fix': ['no.such']}, "--fix 'no.such'"),
    ({'fix': ['*']}, '--fix keeps them all'),
])
def test_bad_grids_say_why(kwargs, says):
    with pytest.raises(UsageError, match=says):
        make_grid(space('mobilenetv2_100'), **kwargs)


def test_model_without_a_searchable_group_says_why():
    s = space('mobilenetv2_100')
    frozen = tuple(dataclasses.replace(g, frozen='aten.odd, for which there is no rule') for g in s.groups)
    with pytest.raises(UsageError, match='no searchable group: aten.odd'):
        make_grid(dataclasses.replace(s, groups=frozen))
