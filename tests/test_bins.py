"""FLOPs-sensitive bins: the published ratios, what bins must hold, and supernets of a given cost."""
import math

import pytest
import timm

import timm_width
from timm_width.bins import bin_grid, bin_sizes, sensitivities, space_size
from timm_width.cost import Macs
from timm_width.data import UsageError
from timm_width.grids import growth, make_grid, squeezes
from timm_width.trace import meta_copy


@pytest.fixture(scope='module')
def mobilenet():
    return timm_width.trace(meta_copy(timm.create_model('mobilenetv2_100')))


@pytest.fixture(scope='module')
def epsilon(mobilenet):
    return sensitivities(mobilenet, {}, mobilenet.searchable)


def test_mobilenetv2_has_25_merged_variables_of_the_published_sensitivities(mobilenet, epsilon):
    """facts/ALGORITHMS.md 8E: max / epsilon is 2.54 at the stem, 1.03, 1.00 at the first 24 channels, 99.27 at the last layer."""
    ratios = [max(epsilon.values()) / e for e in epsilon.values()]
    assert len(ratios) == 25
    assert [round(r, 2) for r in (*ratios[:2], ratios[3], ratios[-1])] == [2.54, 1.03, 1.00, 99.27]
    assert list(bin_sizes(epsilon).values())[:5] == [2, 1, 5, 1, 9]


def test_a_sensitivity_is_what_one_channel_costs(mobilenet, epsilon):
    """Eq. 7, where no layer goes from a group to itself: the MACs less those with one channel less."""
    macs = Macs(mobilenet)
    for name, e in epsilon.items():
        assert macs() - macs({name: mobilenet[name].size - 1}) == e


def test_sensitivities_follow_the_widths_around(mobilenet):
    """FLOPs(1, n) is linear in n: next to a layer of half the width it is half as much."""
    name, after = 'blocks.6.0.conv_pwl', 'conv_head'
    whole, half = (sensitivities(mobilenet, {after: n}, [name])[name] for n in (1280, 640))
    assert whole - half == 640 * 7 * 7


@pytest.mark.parametrize('beta', [0.5, 1, 2, 4, 8])
def test_bins_are_beta_times_the_ratio_rounded_down_and_at_least_one(beta, mobilenet, epsilon):
    sizes = bin_sizes(epsilon, beta)
    for name, e in epsilon.items():
        assert sizes[name] == max(int(beta * max(epsilon.values()) / e), 1)
    grid = bin_grid(mobilenet, mobilenet.base_widths, beta)
    for name, widths in grid.items():
        n, b = mobilenet[name].size, sizes[name]
        assert widths[-1] == n and len(widths) == max(n // b, 1)
        assert all(w == b * (i + 1) for i, w in enumerate(widths[:-1]))
        assert b <= widths[-1] - (widths[-2] if len(widths) > 1 else 0) or n < b  # the last bin takes in what is left over


@pytest.mark.parametrize('beta, published', [(1, 1.5e27), (2, 2.0e19)])
def test_sizes_of_the_space_are_those_of_table_17_within_a_decade(beta, published, mobilenet):
    assert abs(math.log10(space_size(bin_grid(mobilenet, mobilenet.base_widths, beta)) / published)) < 1


def test_the_grid_flops_is_of_bins():
    model = meta_copy(timm.create_model('efficientnet_b0'))
    space = timm_width.trace(model)
    fixed = squeezes(model, space)
    grid = make_grid(space, 'flops:0.5', high=1.2, squeezes=fixed, fix=['conv_head'])
    assert not grid.keys() & {*fixed, 'conv_head'}
    assert grid == bin_grid(space, {name: int(1.2 * space[name].size + 0.5) for name in grid}, 0.5)
    low = make_grid(space, 'flops', low=0.5, squeezes=fixed)
    assert all(w[0] >= 0.5 * space[name].size and w[-1] == space[name].size for name, w in low.items())
    eights = make_grid(space, 'flops', divisor=8, squeezes=fixed)
    assert all(w % 8 == 0 for widths in eights.values() for w in widths)


def test_bins_are_whole_units_of_grouped_convolutions():
    space = timm_width.trace(meta_copy(timm.create_model('regnetx_002')))
    grid = make_grid(space, 'flops')
    assert any(g.unit > 1 for g in space.searchable.values())
    assert all(w % space[name].unit == 0 for name, widths in grid.items() for w in widths)


@pytest.mark.parametrize('kind', ['flops:0', 'flops:-1', 'flops:inf', 'flops:x', 'bins:0.5', 'dmcp:2'])
def test_numbers_that_a_rule_cannot_have_are_refused(kind, mobilenet):
    with pytest.raises(UsageError, match='is not a grid|the number of .* must be'):
        make_grid(mobilenet, kind)


def test_a_supernet_of_so_many_macs_is_grown_by_one_factor():
    """Table 2: the 1.0x EfficientNet-B0 is searched from 1.5x MACs, squeeze-excite fixed."""
    model = meta_copy(timm.create_model('efficientnet_b0'))
    space = timm_width.trace(model)
    fixed = squeezes(model, space)
    factor = growth(space, 1.5, squeezes=fixed)
    largest = {name: w[-1] for name, w in make_grid(space, 'flops', high=factor, squeezes=fixed).items()}
    assert 1.49 < Macs(space)(largest) / Macs(space)() <= 1.5
    assert growth(space, 1., squeezes=fixed) < 1.05
    for wrong in (0.9, 1000.):
        with pytest.raises(UsageError, match='--supernet-macs'):
            growth(space, wrong)
    with pytest.raises(UsageError, match='leave out .*--supernet-macs'):
        make_grid(space, '0.5,1', high=factor)
