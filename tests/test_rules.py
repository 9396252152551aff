"""How operations move channel ids, on small modules whose groups are worked out by hand and confirmed by brute force.

For every free group of every module here, in float64: permuting it wherever the trace says it occurs leaves the output unchanged,
permuting it at any smaller set of places does not (so nothing is missing, and nothing is united without need), and dropping
one of its steps is what zeroing that step's parameters is.
"""
import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_width.laws import commutation_faults, cost_faults, permutation_error, random_widths
from timm_width.resize import replace_tensors, resize
from timm_width.space import WidthError
from timm_width.trace import meta_copy, trace

CHANGE, SAME = 1e-6, 1e-11  # relative to the largest output
MAX_SUBSETS = 1 << 9


class Net(nn.Module):
    """A module whose forward is a function of it and the image; `parts` are its modules, parameters and plain attributes."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def filled(net: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 and eval mode, with every parameter and statistic random."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double().eval()
    with torch.no_grad():
        for name, t in [*net.named_parameters(), *net.named_buffers()]:
            if 'running_var' in name:
                t.copy_(torch.rand(t.shape, generator=generator, dtype=t.dtype) + 0.5)
            elif t.is_floating_point() and not name.startswith('constant'):
                t.copy_(torch.randn(t.shape, generator=generator, dtype=t.dtype))
    return net


def run(net, size) -> torch.Tensor:
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    with torch.no_grad():
        return net(x)


def difference(a, b) -> float:
    return float((a - b).abs().max() / a.abs().max())


def places(space, group: int, axis) -> np.ndarray:
    """Positions of a group's steps along an axis: one row per step."""
    found, at = [], 0
    for g, r in axis:
        n = space.groups[g].steps * r
        if g == group:
            found.append(at + np.arange(n).reshape(-1, r))
        at += n
    return np.concatenate(found, 1)


def permuted_at(net, space, name: str, where, order) -> nn.Module:
    """A copy with the group's steps in another order at some of its places, given as (tensor, dimension)."""
    group = space.index[name]

    def change(tensor: str, t: torch.Tensor) -> torch.Tensor:
        for d in [d for n, d in where if n == tensor]:
            at = places(space, group, space.tensors[tensor].axes[d])
            index = np.arange(t.shape[d])
            index[at.reshape(-1)] = at[order].reshape(-1)
            t = t.index_select(d, torch.as_tensor(index))
        return t.clone()

    out = copy.deepcopy(net)
    with torch.no_grad():
        replace_tensors(out, change)
    return out


def zeroed(net, space, name: str, step: int) -> nn.Module:
    """A copy with the parameters of one step of a group zeroed (statistics stay)."""
    group = space.index[name]
    out = copy.deepcopy(net)
    with torch.no_grad():
        for tensor, t in out.named_parameters():
            for d, axis in enumerate(space.tensors[tensor].axes):
                if axis is not None and any(g == group for g, _ in axis):
                    t.index_fill_(d, torch.as_tensor(places(space, group, axis)[step]), 0)
    return out


def derangement(n: int) -> np.ndarray:
    return np.roll(np.arange(n), 1)


def check(net, want, size=(3, 6, 6), frozen=None, ordered=(), minimal=True, zero=True):
    """States what the trace of a module must find, and confirms it by brute force.

    Args:
        net: Ends in a layer called 'out', whose output is the network's.
        want: Free group -> base width, or (base width, unit).
        size: Image size.
        frozen: Group -> part of the reason.
        ordered: Names of the groups of which only a prefix may be kept.
        minimal: Whether permuting a free group at fewer places must change the output; False where sizes in Python, and
            not the computation, tie channels together.
        zero: Whether dropping a step equals zeroing its parameters; False where a mean over channels is taken.

    Returns:
        The space, for what else the test says.
    """
    net = filled(net)
    space = trace(net, size)
    assert {n: (g.size, g.unit) for n, g in space.searchable.items()} == {
        n: w if isinstance(w, tuple) else (w, 1) for n, w in want.items()}
    reasons = {n: r for n, r in space.frozen.items() if r != 'network output'}
    assert set(reasons) == set(frozen or {}), reasons
    for name, part in (frozen or {}).items():
        assert part in reasons[name], reasons[name]
    assert {n for n, g in space.searchable.items() if g.ordered} == set(ordered)

    y = run(net, size)
    for name, group in space.searchable.items():
        if group.steps == 1:
            continue
        order = derangement(group.steps)
        change = difference(y, run(permuted_at(net, space, name, group.axes, order), size))
        if group.ordered:
            assert change > CHANGE, f'{name} is ordered without need'
            continue
        assert change < SAME, f'{name}: permuting it everywhere changes the output by {change:.1e}'
        if minimal:
            assert 2 ** len(group.axes) <= MAX_SUBSETS, 'a smaller example would do'
            for k in range(1, len(group.axes)):
                for some in itertools.combinations(group.axes, k):
                    change = difference(y, run(permuted_at(net, space, name, some, order), size))
                    assert change > CHANGE, f'{name}: permuting it only at {some} leaves the output as it is'
    for name, group in space.searchable.items():
        if zero and group.steps > 1:
            for step in [group.steps - 1] if group.ordered else range(group.steps):
                kept = [i for i in range(group.steps) if i != step]
                resized = resize(copy.deepcopy(net), space, {name: group.size - group.unit}, keep={name: kept})
                assert difference(run(resized, size), run(zeroed(net, space, name, step), size)) < SAME, (name, step)
    works_at_all_widths(net, space, size, y.shape)
    return space


def reasons_on(space, tensor: str, dim: int = 0) -> list:
    """Why each group on an axis is frozen; '' for a free one."""
    return [space.groups[g].frozen or '' for g, _ in space.tensors[tensor].axes[dim]]


def works_at_all_widths(net, space, size, shape):
    """Each group alone at one step, one step less and more, and at twice its width; then all at random widths; runs for real."""
    tried = [{n: w} for n, g in space.searchable.items()
             for w in {g.unit, max(g.size - g.unit, g.unit), g.size + g.unit, 2 * g.size}]
    for widths in [*tried, *(random_widths(space, seed, 0.2, 2) for seed in range(4))]:
        resized = resize(copy.deepcopy(net), space, widths, fresh=lambda: net)
        assert run(resized, size).shape == shape, widths
        assert {n: tuple(t.shape) for n, t in [*resized.named_parameters(), *resized.named_buffers()]} == space.shapes(widths)
    for seed in range(2) if space.searchable else ():
        widths = random_widths(space, seed, 0.2, 2)
        assert not commutation_faults(meta_copy(net), space, widths)
        assert not cost_faults(meta_copy(net), space, widths)


def conv(i, o, k=1, **kwargs):
    return nn.Conv2d(i, o, k, padding=kwargs.pop('padding', k // 2), **kwargs)


def plain(i, o):
    return nn.Conv2d(i, o, 1, bias=False)


# -- unions ----------------------------------------------------------------------------------------------------------------


def test_a_chain_has_one_group_per_layer():
    check(Net(lambda s, x: s.out(s.b(s.a(x).relu()).relu()), a=conv(3, 4, 3), b=conv(4, 5), out=plain(5, 2)), {'a': 4, 'b': 5})


def test_batch_norm_belongs_to_the_layer_before_it():
    net = Net(lambda s, x: s.out(s.bn(s.a(x)).relu()), a=plain(3, 4), bn=nn.BatchNorm2d(4), out=plain(4, 2))
    space = check(net, {'a': 4})
    assert {n for n, _ in space['a'].axes} == {
        'a.weight', 'bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var', 'out.weight'}


def test_batch_norm_before_the_activation_of_two_branches_ties_them():
    net = Net(lambda s, x: s.out(s.bn(s.a(x)) * s.bn(s.b(x))), a=plain(3, 4), b=plain(3, 4), bn=nn.BatchNorm2d(4), out=plain(4, 2))
    check(net, {'a': 4})


def test_residual_add_unites_the_trunk():
    def forward(s, x):
        x = s.stem(x)
        return s.out((x + s.b(s.a(x).relu())).relu())
    check(Net(forward, stem=plain(3, 4), a=plain(4, 6), b=conv(6, 4), out=plain(4, 2)), {'stem': 4, 'a': 6})


@pytest.mark.parametrize('join', [
    lambda a, b: a + b, lambda a, b: a.add_(b), lambda a, b: torch.maximum(a, b), lambda a, b: a * b.sigmoid(),
    lambda a, b: torch.where(a > 0, a, b), lambda a, b: torch.lerp(a, b, 0.3), lambda a, b: torch.addcmul(a, a, b),
    lambda a, b: sum((a, b)), lambda a, b: torch.stack((a, b)).sum(0), lambda a, b: torch.stack((a, b), -1).amax(-1),
    lambda a, b: torch.stack((a, b), 1).mean(1),
], ids=['add', 'add_', 'maximum', 'mul', 'where', 'lerp', 'addcmul', 'sum', 'stack', 'stack last', 'stack next'])
def test_element_wise_joins_unite(join):
    check(Net(lambda s, x: s.out(join(s.a(x), s.b(x))), a=plain(3, 4), b=plain(3, 4), out=plain(4, 2)), {'a': 4}, zero=False)


def test_cat_keeps_its_parts_apart():
    net = Net(lambda s, x: s.out(torch.cat([s.a(x), s.b(x)], 1)), a=plain(3, 4), b=plain(3, 5), out=plain(9, 2))
    space = check(net, {'a': 4, 'b': 5})
    assert space.tensors['out.weight'].axes[1] == ((space.index['a'], 1), (space.index['b'], 1))


def test_cat_with_the_image_keeps_the_image_whole():
    net = Net(lambda s, x: s.out(torch.cat([x, s.a(x)], 1)), a=plain(3, 4), out=plain(7, 2))
    space = trace(net, (3, 6, 6))
    assert set(space.searchable) == {'a'} and 'network input' in space.frozen.values()
    works_at_all_widths(filled(net), space, (3, 6, 6), (2, 2, 6, 6))


def test_cat_of_a_tensor_with_itself_counts_twice():
    net = Net(lambda s, x: (lambda y: s.out(torch.cat([y, y.relu()], 1)))(s.a(x)), a=plain(3, 4), out=plain(8, 2))
    space = check(net, {'a': 4})
    assert space.tensors['out.weight'].axes[1] == ((0, 1), (0, 1))


def test_dense_block_grows_by_cat():
    def forward(s, x):
        x = s.stem(x)
        x = torch.cat([x, s.a(x).relu()], 1)
        x = torch.cat([x, s.b(x).relu()], 1)
        return s.out(s.bn(x).relu())
    net = Net(forward, stem=plain(3, 3), a=plain(3, 2), b=plain(5, 4), bn=nn.BatchNorm2d(9), out=plain(9, 2))
    check(net, {'stem': 3, 'a': 2, 'b': 4})


def test_adding_to_a_cat_cuts_the_other_branch_alike():
    """b is added to cat(a, c): its channels are a's, then c's, and it has no width of its own."""
    net = Net(lambda s, x: s.out(torch.cat([s.a(x), s.c(x)], 1) + s.b(x)),
              a=plain(3, 2), c=plain(3, 3), b=plain(3, 5), out=plain(5, 2))
    space = check(net, {'a': 2, 'c': 3})
    assert space.tensors['b.weight'].axes[0] == ((0, 1), (1, 1))


def test_squeeze_excite_ties_the_gate_and_frees_the_squeeze():
    def forward(s, x):
        x = s.a(x).relu()
        return s.out(x * s.excite(s.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid())
    check(Net(forward, a=plain(3, 4), squeeze=conv(4, 3), excite=plain(3, 4), out=plain(4, 2)), {'a': 4, 'squeeze': 3})


def test_squeeze_excite_by_linears_and_views():
    def forward(s, x):
        x = s.a(x)
        b, c, _, _ = x.shape
        return s.out(x * s.excite(s.squeeze(x.mean((2, 3)))).view(b, c, 1, 1))
    check(Net(forward, a=plain(3, 4), squeeze=nn.Linear(4, 3), excite=nn.Linear(3, 4, bias=False), out=plain(4, 2)),
          {'a': 4, 'squeeze': 3})


def test_layer_scale_and_positions_are_channels():
    net = Net(lambda s, x: s.out(s.a(x) * s.scale.view(1, -1, 1, 1) + s.shift),
              a=plain(3, 4), scale=nn.Parameter(torch.ones(4)), shift=nn.Parameter(torch.ones(1, 4, 6, 6)), out=plain(4, 2))
    space = check(net, {'a': 4})
    assert ('scale', 0) in space['a'].axes and ('shift', 1) in space['a'].axes


def test_prelu_with_a_slope_per_channel_and_with_one():
    check(Net(lambda s, x: s.out(s.act(s.a(x))), a=plain(3, 4), act=nn.PReLU(4), out=plain(4, 2)), {'a': 4})
    check(Net(lambda s, x: s.out(s.act(s.a(x))), a=plain(3, 4), act=nn.PReLU(), out=plain(4, 2)), {'a': 4})


def test_a_layer_used_twice_ties_what_it_reads():
    net = Net(lambda s, x: s.out(s.shared(s.a(x)) - s.shared(s.b(x)).relu()),
              a=plain(3, 4), b=plain(3, 4), shared=plain(4, 3), out=plain(3, 2))
    check(net, {'a': 4, 'shared': 3})


def test_tied_weights_are_one_tensor():
    net = Net(lambda s, x: s.out(s.b(s.a(s.stem(x)).relu()).relu()),
              stem=plain(3, 4), a=plain(4, 4), b=plain(4, 4), out=plain(4, 2))
    net.b.weight = net.a.weight
    space = check(net, {'stem': 4})
    resized = resize(net, space, {'stem': 3})
    assert resized.a.weight is resized.b.weight and resized.a.weight.shape == (3, 3, 1, 1)


def test_tied_transposed_product():
    """An autoencoder that reads with the weight it writes with."""
    net = Net(lambda s, x: s.out(F.linear(s.a(x.mean((2, 3))).relu(), s.a.weight.t())),
              a=nn.Linear(3, 5, bias=False), out=nn.Linear(3, 2))
    space = check(net, {'a': 5})
    assert space['a'].axes == (('a.weight', 0),)


# -- convolutions ------------------------------------------------------------------------------------------------------------


def test_depthwise_belongs_to_its_input():
    net = Net(lambda s, x: s.out(s.dw(s.a(x)).relu()), a=plain(3, 4), dw=conv(4, 4, 3, groups=4), out=plain(4, 2))
    space = check(net, {'a': 4})
    assert resize(net, space, {'a': 3}).dw.groups == 3


def test_depthwise_multiplier_repeats_each_channel():
    net = Net(lambda s, x: s.out(s.dw(s.a(x)).relu()), a=plain(3, 4), dw=conv(4, 8, 3, groups=4), out=plain(8, 2))
    space = check(net, {'a': 4})
    assert space.tensors['dw.weight'].axes[0] == ((0, 2),)
    resized = resize(net, space, {'a': 3})
    assert (resized.dw.groups, resized.dw.in_channels, resized.dw.out_channels) == (3, 3, 6)


def test_grouped_convolution_keeps_the_size_of_its_groups():
    net = Net(lambda s, x: s.out(s.g(s.a(x)).relu()), a=plain(3, 8), g=conv(8, 12, 3, groups=4), out=plain(12, 2))
    space = check(net, {'a': (8, 2)})
    resized = resize(net, space, {'a': 6})
    assert (resized.g.groups, resized.g.in_channels, resized.g.out_channels) == (3, 6, 9)


def test_grouped_convolutions_of_two_group_sizes_share_the_larger_unit():
    net = Net(lambda s, x: s.out(s.h(s.g(s.a(x)).relu())),
              a=plain(3, 12), g=conv(12, 12, 3, groups=6), h=conv(12, 12, 1, groups=3), out=plain(12, 2))
    check(net, {'a': (12, 4)})


def test_a_few_large_groups_shrink_position_by_position():
    net = Net(lambda s, x: s.out(s.g(s.a(x)).relu()), a=plain(3, 32), g=conv(32, 8, groups=2), out=plain(8, 2))
    space = check(net, {'a': (32, 2), 'g': (8, 2)})
    resized = resize(net, space, {'a': 30, 'g': 6})
    assert (resized.g.groups, resized.g.in_channels, tuple(resized.g.weight.shape)) == (2, 30, (6, 15, 1, 1))


def test_groups_over_a_cat_whose_parts_they_straddle():
    """Conv-groups of 2 over 3 + 5 channels: the second one holds the last of a and the first of b."""
    net = Net(lambda s, x: s.out(s.g(torch.cat([s.a(x), s.b(x)], 1))),
              a=plain(3, 3), b=plain(3, 5), g=conv(8, 8, groups=8 // 2), out=plain(8, 2))
    space = trace(filled(net), (3, 6, 6))
    works_at_all_widths(filled(net), space, (3, 6, 6), (2, 2, 6, 6))
    y = run(net, (3, 6, 6))
    for name, group in space.searchable.items():
        change = difference(y, run(permuted_at(net, space, name, group.axes, derangement(group.steps)), (3, 6, 6)))
        assert change < SAME or group.steps == 1, name


def test_depthwise_over_a_cat():
    net = Net(lambda s, x: s.out(s.dw(torch.cat([s.a(x), s.b(x)], 1))),
              a=plain(3, 3), b=plain(3, 5), dw=conv(8, 8, 3, groups=8), out=plain(8, 2))
    space = check(net, {'a': 3, 'b': 5})
    assert resize(net, space, {'a': 1, 'b': 4}).dw.groups == 5


def test_transposed_convolution_has_its_axes_the_other_way_round():
    net = Net(lambda s, x: s.out(s.up(s.a(x)).relu()), a=plain(3, 4), up=nn.ConvTranspose2d(4, 5, 2, stride=2), out=plain(5, 2))
    space = check(net, {'a': 4, 'up': 5})
    assert ('up.weight', 0) in space['a'].axes and ('up.weight', 1) in space['up'].axes


def test_grouped_transposed_convolution_is_frozen_whole():
    net = Net(lambda s, x: s.out(s.up(s.a(x))), a=plain(3, 4), up=nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2), out=plain(4, 2))
    check(net, {}, frozen={'a': 'a grouped convolution over an axis that carries no channels'})


def test_convolutions_in_one_and_three_dimensions():
    net = Net(lambda s, x: s.out(s.b(s.a(x.flatten(2)).relu()).unsqueeze(-1)),
              a=nn.Conv1d(3, 4, 3), b=nn.Conv1d(4, 5, 1, bias=False), out=plain(5, 2))
    check(net, {'a': 4, 'b': 5})
    net = Net(lambda s, x: s.out(s.b(s.a(x.unsqueeze(2)).relu()).squeeze(2)),
              a=nn.Conv3d(3, 4, 1), b=nn.Conv3d(4, 5, 1, bias=False), out=plain(5, 2))
    check(net, {'a': 4, 'b': 5})


class Standardised(nn.Conv2d):
    """As in timm's ScaledStdConv2d: the weight is normalised on the way, with a gain per channel."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        w = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) * self.gain
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def test_a_standardised_weight_is_still_the_layer_s():
    net = Net(lambda s, x: s.out(s.a(x).relu()), a=Standardised(3, 4, 3), out=plain(4, 2))
    assert ('a.gain', 0) in check(net, {'a': 4})['a'].axes


def test_a_filter_expanded_to_the_channels_follows_them():
    """As in BlurPool: one fixed filter, a depthwise convolution with as many groups as the input has channels."""
    def forward(s, x):
        x = s.a(x)
        return s.out(F.conv2d(x, s.constant.expand(x.shape[1], 1, 3, 3), groups=x.shape[1]))
    net = Net(forward, a=plain(3, 4), out=plain(4, 2))
    net.register_buffer('constant', torch.rand(1, 1, 3, 3, dtype=torch.float64))
    check(net, {'a': 4})


def test_channels_along_a_spatial_axis_of_a_convolution_are_not_lost():
    """Channels as positions: with a kernel of one any order will do, with a wider one only a prefix."""
    for k, ordered in (1, ()), (3, ('a',)):
        net = Net(lambda s, x: s.out(s.b(s.a(x).mean(3).transpose(1, 2)).transpose(1, 2)),
                  a=nn.Conv2d(3, 5, 1, bias=False), b=nn.Conv1d(6, 6, k, padding=k // 2, bias=False),
                  out=nn.Conv1d(5, 2, 1, bias=False))
        check(net, {'a': 5}, ordered=ordered)


def test_a_strided_convolution_over_channels_freezes_them():
    net = Net(lambda s, x: s.out(s.b(s.a(x).mean((2, 3)).unsqueeze(1)).flatten(1)),
              a=plain(3, 8), b=nn.Conv1d(1, 1, 2, stride=2, bias=False), out=nn.Linear(4, 2))
    space = trace(net, (3, 6, 6))
    assert 'number of positions' in space.frozen['a'] and not space.searchable


# -- rearrangements ---------------------------------------------------------------------------------------------------------


def test_even_chunks_shrink_together():
    def forward(s, x):
        a, b = s.a(x).chunk(2, 1)
        return s.out(a * b.sigmoid())
    space = check(Net(forward, a=plain(3, 8), out=plain(4, 2)), {'a': (8, 2)}, zero=False)
    assert space.tensors['a.weight'].axes[0] == ((0, 1), (0, 1))


@pytest.mark.parametrize('halves', [
    lambda s, x: x.chunk(2, 1), lambda s, x: x.split(x.shape[1] // 2, 1), lambda s, x: x.split([x.shape[1] // 2] * 2, 1),
    lambda s, x: (x[:, :x.shape[1] // 2], x[:, x.shape[1] // 2:]), lambda s, x: x.tensor_split(2, 1),
    lambda s, x: x.split(s.width, 1), lambda s, x: torch.split(x, [s.width, s.width], dim=1),
    lambda s, x: (x[:, :s.width], x[:, s.width:]), lambda s, x: (x.narrow(1, 0, s.width), x.narrow(1, s.width, s.width)),
    lambda s, x: x.unflatten(1, (2, -1)).unbind(1), lambda s, x: x.view(x.shape[0], 2, s.width, *x.shape[2:]).unbind(1),
    lambda s, x: x.reshape(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).transpose(0, 1),
], ids=['chunk', 'split n', 'split list', 'slices', 'tensor_split', 'split width', 'split widths', 'slices width', 'narrow width',
        'unflatten', 'view width', 'reshape'])
def test_two_halves_that_meet_again_shrink_together(halves):
    """However the code takes the halves apart, and wherever it keeps their length."""
    def forward(s, x):
        a, b = halves(s, s.a(x))
        return s.out(a * b.tanh())
    check(Net(forward, a=plain(3, 8), width=4, out=plain(4, 2)), {'a': (8, 2)}, zero=False)


def test_unequal_split_by_sizes_in_a_tuple_is_a_cut():
    def forward(s, x):
        a, b = s.a(x).split(s.sizes, 1)
        return s.out(torch.cat([s.b(a), s.c(b)], 1))
    net = Net(forward, a=plain(3, 7), b=plain(3, 2), c=plain(4, 3), sizes=(3, 4), out=plain(5, 2))
    space = check(net, {'a:1': 3, 'a:2': 4, 'b': 2, 'c': 3})
    resized = resize(net, space, {'a:1': 2, 'a:2': 6})
    assert resized.sizes == (2, 6) and resized.a.out_channels == 8
    assert space.tensors['a.weight'].axes[0] == ((0, 1), (1, 1))


def test_unequal_split_by_literal_sizes_is_frozen():
    def forward(s, x):
        a, b = s.a(x).split([3, 4], 1)
        return s.out(torch.cat([s.b(a), s.c(b)], 1))
    net = Net(forward, a=plain(3, 7), b=plain(3, 2), c=plain(4, 3), out=plain(5, 2))
    check(net, {'b': 2, 'c': 3}, frozen={'a:1': 'law 0', 'a:2': 'law 0'})


def test_a_part_that_passes_by_and_a_rest_that_is_computed():
    """As in partial convolutions: the first `width` channels are convolved, the rest is passed on."""
    def forward(s, x):
        x = s.a(x)
        return s.out(torch.cat([s.b(x[:, :s.width]), x[:, s.width:]], 1))
    net = Net(forward, a=plain(3, 7), b=plain(3, 3), width=3, out=plain(7, 2))
    space = check(net, {'a:1': 3, 'a:2': 4, 'b': 3})
    resized = resize(net, space, {'a:1': 5})
    assert resized.width == 5 and resized.b.in_channels == 5 and resized.a.out_channels == 9


def test_a_partial_residual_cuts_the_longer_branch():
    """As in RexNet: the input is added to the first channels of the output."""
    def forward(s, x):
        x = s.a(x)
        y = s.b(x)
        return s.out(torch.cat([y[:, :s.width] + x, y[:, s.width:]], 1))
    space = check(Net(forward, a=plain(3, 4), b=plain(4, 6), width=4, out=plain(6, 2)), {'a': 4, 'b:2': 2})
    assert space.tensors['b.weight'].axes[0] == ((0, 1), (1, 1))


def test_a_negative_slice_end_without_a_size_is_frozen_or_follows():
    net = Net(lambda s, x: s.out(s.a(x)[:, :-2]), a=plain(3, 6), out=plain(4, 2))
    space = trace(net, (3, 6, 6))
    works_at_all_widths(filled(net), space, (3, 6, 6), (2, 2, 6, 6))


def test_a_stride_over_channels_freezes_them():
    net = Net(lambda s, x: s.out(s.a(x)[:, ::2]), a=plain(3, 6), out=plain(3, 2))
    space = trace(net, (3, 6, 6))
    assert not space.searchable and all('with a stride' in r for r in reasons_on(space, 'a.weight'))


def test_channels_last_norm_between_permutes():
    net = Net(lambda s, x: s.out(s.norm(s.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
              a=plain(3, 4), norm=nn.LayerNorm(4), out=plain(4, 2))
    space = check(net, {'a': 4}, zero=False)
    assert ('norm.weight', 0) in space['a'].axes
    assert resize(net, space, {'a': 3}).norm.normalized_shape == (3,)


def test_tokens_and_back():
    def forward(s, x):
        x = s.a(x)
        b, c, h, w = x.shape
        x = x + s.fc2(s.fc1(x.flatten(2).transpose(1, 2)).relu()).transpose(1, 2).reshape(b, c, h, w)
        return s.out(x)
    net = Net(forward, a=plain(3, 4), fc1=nn.Linear(4, 5), fc2=nn.Linear(5, 4, bias=False), out=plain(4, 2))
    check(net, {'a': 4, 'fc1': 5})


def test_flatten_with_positions_repeats_each_channel():
    net = Net(lambda s, x: s.out(F.adaptive_avg_pool2d(s.a(x), 2).flatten(1)), a=plain(3, 5), out=nn.Linear(20, 2))
    space = check(net, {'a': 5})
    assert space.tensors['out.weight'].axes[1] == ((0, 4),)


def test_flatten_channels_last_repeats_the_whole_axis():
    net = Net(lambda s, x: s.out(F.adaptive_avg_pool2d(s.a(x), 2).permute(0, 2, 3, 1).flatten(1)),
              a=plain(3, 5), out=nn.Linear(20, 2))
    space = check(net, {'a': 5})
    assert space.tensors['out.weight'].axes[1] == ((0, 1),) * 4


def test_flatten_of_a_cat_repeats_each_part():
    net = Net(lambda s, x: s.out(F.adaptive_avg_pool2d(torch.cat([s.a(x), s.b(x)], 1), 2).flatten(1)),
              a=plain(3, 2), b=plain(3, 3), out=nn.Linear(20, 2))
    space = check(net, {'a': 2, 'b': 3})
    assert space.tensors['out.weight'].axes[1] == ((0, 4), (1, 4))


def test_space_to_depth_repeats_the_channels():
    """As in CSPDarkNet's Focus."""
    net = Net(lambda s, x: (lambda y: s.out(torch.cat([y[..., ::2, ::2], y[..., 1::2, ::2]], 1)))(s.a(x)),
              a=plain(3, 4), out=plain(8, 2))
    assert check(net, {'a': 4}).tensors['out.weight'].axes[1] == ((0, 1), (0, 1))


def test_channel_shuffle_by_views():
    """As in ShuffleNet: 2 x 3 channels become 3 x 2, so a step is one channel of either half."""
    def forward(s, x):
        x = s.a(x)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, -1, h, w)
        return s.out(x)
    space = check(Net(forward, a=plain(3, 6), out=plain(6, 2)), {'a': (6, 2)})
    assert space.tensors['a.weight'].axes[0] == ((0, 1), (0, 1)) and space.tensors['out.weight'].axes[1] == ((0, 2),)


def test_a_view_that_mixes_channels_and_positions_is_never_wrong():
    net = filled(Net(lambda s, x: (lambda y: s.out(y.reshape(y.shape[0], 6, 4, 6)))(s.a(x)), a=plain(3, 4), out=plain(6, 2)))
    space = trace(net, (3, 6, 6))
    works_at_all_widths(net, space, (3, 6, 6), (2, 2, 4, 6))
    y = run(net, (3, 6, 6))
    for name, group in space.searchable.items():
        assert group.steps == 1 or difference(
            y, run(permuted_at(net, space, name, group.axes, derangement(group.steps)), (3, 6, 6))) < SAME


def test_a_view_over_two_channel_axes_freezes_both():
    """An outer product flattened, as in bilinear pooling."""
    def forward(s, x):
        a, b = s.a(x).flatten(2), s.b(x).flatten(2)
        return s.out((a @ b.transpose(1, 2)).flatten(1))
    net = Net(forward, a=plain(3, 3), b=plain(3, 4), out=nn.Linear(12, 2))
    check(net, {}, frozen={'a': 'two channel axes', 'b': 'two channel axes'})


def test_repeat_and_repeat_interleave_are_pieces():
    net = Net(lambda s, x: s.out(s.a(x).repeat(1, 2, 1, 1)), a=plain(3, 4), out=plain(8, 2))
    assert check(net, {'a': 4}).tensors['out.weight'].axes[1] == ((0, 1), (0, 1))
    net = Net(lambda s, x: s.out(s.a(x).repeat_interleave(2, 1)), a=plain(3, 4), out=plain(8, 2))
    assert check(net, {'a': 4}).tensors['out.weight'].axes[1] == ((0, 2),)


def test_padding_positions_is_free_and_padding_channels_is_frozen():
    check(Net(lambda s, x: s.out(F.pad(s.a(x), (1, 1, 0, 2))), a=plain(3, 4), out=plain(4, 2)), {'a': 4})
    net = Net(lambda s, x: s.out(F.pad(s.a(x), (0, 0, 0, 0, 0, 2)) + s.b(x)), a=plain(3, 4), b=plain(3, 6), out=plain(6, 2))
    check(net, {}, frozen={'a': 'padding along the channels', 'b': 'no channels'})


def test_one_channel_expanded_over_all():
    """A spatial gate: its one channel stays, the channels that it meets are free."""
    net = Net(lambda s, x: s.out(s.a(x) * s.gate(x).expand(-1, 4, -1, -1).sigmoid()), a=plain(3, 4), gate=plain(3, 1), out=plain(4, 2))
    space = trace(net, (3, 6, 6))
    assert 'gate' in space.frozen
    net = Net(lambda s, x: (lambda y: s.out(y * s.gate(y).sigmoid()))(s.a(x)), a=plain(3, 4), gate=plain(4, 1), out=plain(4, 2))
    check(net, {'a': 4}, frozen={'gate': 'one channel'})


def test_moved_axes_and_squeezes():
    net = Net(lambda s, x: s.out(s.a(x).movedim(1, -1).unsqueeze(1).squeeze(1).movedim(-1, 1).swapaxes(2, 3)),
              a=plain(3, 4), out=plain(4, 2))
    check(net, {'a': 4})


# -- norms and reductions ---------------------------------------------------------------------------------------------------


def test_group_norm_keeps_the_size_of_its_groups():
    net = Net(lambda s, x: s.out(s.norm(s.a(x))), a=plain(3, 6), norm=nn.GroupNorm(3, 6), out=plain(6, 2))
    space = check(net, {'a': (6, 2)})
    resized = resize(net, space, {'a': 4})
    assert (resized.norm.num_groups, resized.norm.num_channels) == (2, 4)


def test_group_norm_over_all_channels_frees_each():
    net = Net(lambda s, x: s.out(s.norm(s.a(x))), a=plain(3, 6), norm=nn.GroupNorm(1, 6), out=plain(6, 2))
    assert resize(net, check(net, {'a': 6}, zero=False), {'a': 5}).norm.num_groups == 1


def test_instance_norm():
    net = Net(lambda s, x: s.out(F.instance_norm(s.a(x), weight=s.scale, bias=s.shift)), a=plain(3, 4),
              scale=nn.Parameter(torch.ones(4)), shift=nn.Parameter(torch.ones(4)), out=plain(4, 2))
    check(net, {'a': 4})


def test_reductions_over_channels_leave_them_free():
    """As in spatial attention: mean and maximum over the channels."""
    def forward(s, x):
        x = s.a(x)
        return s.out(x * s.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid())
    check(Net(forward, a=plain(3, 4), gate=plain(2, 1), out=plain(4, 2)), {'a': 4}, frozen={'gate': 'one channel'}, zero=False)


def test_softmax_over_channels_leaves_them_free():
    check(Net(lambda s, x: s.out(s.a(x).softmax(1)), a=plain(3, 4), out=plain(4, 2)), {'a': 4}, zero=False)


def test_l2_normalisation_over_channels_leaves_them_free():
    check(Net(lambda s, x: s.out(F.normalize(s.a(x), dim=1)), a=plain(3, 4), out=plain(4, 2)), {'a': 4}, zero=False)


@pytest.mark.parametrize('operation', [
    lambda x: x.cumsum(1), lambda x: x.flip(1), lambda x: x.roll(1, 1),
], ids=['cumsum', 'flip', 'roll'])
def test_operations_in_the_order_of_channels_freeze_them(operation):
    net = Net(lambda s, x: s.out(operation(s.a(x))), a=plain(3, 4), out=plain(4, 2))
    check(net, {}, frozen={'a': 'order of its channels'})


@pytest.mark.parametrize('operation, channels, reason', [
    (lambda x: F.pixel_shuffle(x, 2), 2, 'aten.pixel_shuffle, for which there is no rule'),
    (lambda x: F.channel_shuffle(x, 2), 8, 'aten.channel_shuffle, for which there is no rule'),
    (lambda x: torch.fft.rfft2(x).real, 8, 'for which there is no rule'),
    (lambda x: x * x.max(1, keepdim=True)[0], 8, 'aten.max, for which there is no rule'),
    (lambda x: x.sort(1)[0], 8, 'aten.sort, for which there is no rule'),
    (lambda x: x.topk(3, 1)[0], 3, 'aten.topk, for which there is no rule'),
    (lambda x: x[:, torch.tensor([2, 0, 1, 4], device=x.device)], 4, 'picked by index'),
    (lambda x: x.index_select(1, torch.tensor([2, 0, 1], device=x.device)), 3, 'picked by index'),
    (lambda x: x.gather(1, torch.zeros_like(x[:, :3], dtype=torch.int64)), 3, 'picked by index'),
    (lambda x: x.select(1, 3).unsqueeze(1), 1, 'one channel taken out'),
    (lambda x: x[:, 3, None], 1, 'one channel taken out'),
    (lambda x: torch.stack(x.unbind(1)[1:4], 1), 3, 'one by one'),
    (lambda x: x * torch.arange(8., device=x.device, dtype=x.dtype).view(1, 8, 1, 1), 8, 'no channels'),
    (lambda x: x + x.transpose(1, 2), 8, 'no channels'),
    (lambda x: x @ torch.ones(8, 8, device=x.device, dtype=x.dtype).triu(), 8, ''),
    (lambda x: F.max_pool3d(x, (2, 1, 1)), 4, 'along the channels'),
    (lambda x: x.unfold(1, 2, 2).flatten(-2)[:, :, :, :8], 4, 'sliding window'),
], ids=['pixel_shuffle', 'channel_shuffle', 'fft', 'max', 'sort', 'topk', 'index', 'index_select', 'gather', 'select', 'int index', 'unbind',
        'arange', 'positions', 'matmul', 'pool', 'unfold'])
def test_what_no_rule_can_follow_freezes_the_whole_group(operation, channels, reason):
    """The group of a is tied to that of b by a sum, and b's is frozen with it: never one axis of a group alone."""
    net = filled(Net(lambda s, x: s.out(operation(s.a(x) + s.c(s.b(x)))), a=plain(3, 8), b=plain(3, 5), c=plain(5, 8),
                     out=plain(channels, 2)))
    size = (3, 8, 8)
    space = trace(net, size)
    if not reason:  # an operation on positions only
        assert set(space.searchable) == {'a', 'b'}
    else:
        assert set(space.searchable) == {'b'}, space
        assert all(reason in r for r in reasons_on(space, 'a.weight') + reasons_on(space, 'c.weight')), space
        assert space.tensors['a.weight'].axes[0] == space.tensors['c.weight'].axes[0]
    works_at_all_widths(net, space, size, run(net, size).shape)


def test_single_channels_are_frozen():
    net = Net(lambda s, x: s.out(s.a(x)), a=plain(3, 1), out=plain(1, 2))
    check(net, {}, frozen={'a': 'a single channel'})


# -- attention ----------------------------------------------------------------------------------------------------------------


def attention(s, x):
    """As timm writes it: the width of a head is C // heads, C read from the shape."""
    x = s.a(x).flatten(2).transpose(1, 2)
    b, n, c = x.shape
    q, k, v = s.qkv(x).reshape(b, n, 3, s.heads, c // s.heads).permute(2, 0, 3, 1, 4).unbind(0)
    x = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v
    return s.out(x.transpose(1, 2).reshape(b, n, c))


def test_attention_ties_heads_and_trunk_by_the_code_s_own_arithmetic():
    net = Net(attention, a=plain(3, 8), qkv=nn.Linear(8, 24, bias=False), heads=2, out=nn.Linear(8, 2))
    space = check(net, {'a': (8, 2)}, minimal=False)
    assert space.tensors['qkv.weight'].axes[0] == ((0, 1),) * 6 and space.tensors['qkv.weight'].axes[1] == ((0, 1),) * 2
    assert resize(net, space, {'a': 6}).heads == 2


def test_attention_with_the_width_of_a_head_in_python_frees_it():
    def forward(s, x):
        x = s.a(x).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        q, k, v = s.qkv(x).reshape(b, n, 3, 2, s.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v
        return s.out(x.transpose(1, 2).reshape(b, n, -1))
    net = Net(forward, a=plain(3, 5), qkv=nn.Linear(5, 24, bias=False), head_dim=4, out=nn.Linear(8, 2))
    space = check(net, {'a': 5, 'qkv': (24, 6)})
    assert resize(net, space, {'qkv': 18}).head_dim == 3


def test_separate_queries_and_values_have_widths_of_their_own():
    """A non-local block: queries and keys share one width, values have another."""
    def forward(s, x):
        b, _, h, w = x.shape
        q, k, v = s.q(x).flatten(2), s.k(x).flatten(2), s.v(x).flatten(2)
        x = v @ (q.transpose(1, 2) @ k * 0.1).softmax(-1).transpose(1, 2)
        return s.out(x.reshape(b, -1, h, w))
    net = Net(forward, q=plain(3, 4), k=plain(3, 4), v=plain(3, 5), out=plain(5, 2))
    check(net, {'q': 4, 'v': 5})


def test_scaled_dot_product_attention_unites_queries_with_keys():
    def forward(s, x):
        q, k, v = (p(x).flatten(2).transpose(1, 2) for p in (s.q, s.k, s.v))
        return s.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))
    net = Net(forward, q=plain(3, 4), k=plain(3, 4), v=plain(3, 5), out=nn.Conv1d(5, 2, 1))
    check(net, {'q': 4, 'v': 5}, zero=False)


def test_attention_over_channels_is_free_of_their_order():
    """As in XCiT: the attention matrix is channels by channels, so a channel is a row, a column and a value at once."""
    def forward(s, x):
        q, k, v = s.q(x).flatten(2), s.k(x).flatten(2), s.v(x).flatten(2)
        return s.out((q @ k.transpose(1, 2) * 0.1).softmax(-1) @ v)
    check(Net(forward, q=plain(3, 4), k=plain(3, 5), v=plain(3, 5), out=nn.Conv1d(4, 2, 1)), {'q': 4, 'k': 5}, zero=False)


def test_einsum_is_a_product():
    net = Net(lambda s, x: s.out(torch.einsum('bchw,bdhw->bcd', s.a(x), s.b(x)).mean(1)), a=plain(3, 8), b=plain(3, 9),
              out=nn.Linear(9, 2))
    space = trace(filled(net), (3, 6, 6))
    assert set(space.searchable) == {'a', 'b'} and ('out.weight', 1) in space['b'].axes


# -- sizes kept in Python -------------------------------------------------------------------------------------------------------


def test_a_shape_tuple_in_a_view_follows():
    net = Net(lambda s, x: s.out(s.a(x) * s.scale.view(s.shape)),
              a=plain(3, 4), scale=nn.Parameter(torch.ones(4)), shape=(4, 1, 1), out=plain(4, 2))
    space = check(net, {'a': 4})
    assert resize(net, space, {'a': 3}).shape == (3, 1, 1)


def test_a_list_stays_a_list():
    def forward(s, x):
        a, b = s.a(x).split(s.sizes, 1)
        return s.out(torch.cat([s.b(a), b], 1))
    net = Net(forward, a=plain(3, 7), b=plain(3, 2), sizes=[3, 4], out=plain(6, 2))
    assert resize(net, check(net, {'a:1': 3, 'a:2': 4, 'b': 2}), {'a:2': 5}).sizes == [3, 5]


def test_a_multiple_of_an_attribute_is_a_size():
    """As in CrossStage: the split size is expand // 2, the convolution's width is expand."""
    def forward(s, x):
        a, b = s.a(x).split(s.expand // 2, 1)
        return s.out(torch.cat([s.b(a), b], 1))
    net = Net(forward, a=plain(3, 8), b=plain(4, 3), expand=8, out=plain(7, 2))
    assert resize(net, check(net, {'a': (8, 2), 'b': 3}), {'a': 6}).expand == 6


def test_two_attributes_with_the_same_value_are_told_apart():
    def forward(s, x):
        a, b = s.a(x).split((s.first, s.second), 1)
        return s.out(torch.cat([s.b(a), b], 1))
    net = Net(forward, a=plain(3, 8), b=plain(4, 3), first=4, second=4, kernel=4, out=plain(7, 2))
    space = trace(filled(net), (3, 6, 6))
    resized = resize(net, space, {n: g.size // 2 for n, g in space.searchable.items() if n.startswith('a')})
    assert resized.kernel == 4 and resized.first + resized.second == resized.a.out_channels == 4
    assert run(resized, (3, 6, 6)).shape == (2, 2, 6, 6)


def test_an_equal_number_that_is_no_width_stays():
    """A stride, a count of heads or a pooling size that happens to equal a width."""
    net = Net(lambda s, x: s.out(F.max_pool2d(s.a(x), s.window, 1)), a=plain(3, 4), window=4, out=plain(4, 2))
    space = check(net, {'a': 4})
    assert resize(net, space, {'a': 2}).window == 4


def test_a_size_shared_by_two_axes_ties_them():
    """One attribute cannot follow two widths: they become one."""
    def forward(s, x):
        a, b = s.a(x), s.b(x)
        return s.out(torch.cat([s.c(a[:, :s.width]), s.d(b[:, :s.width])], 1)) + s.out2(a[:, s.width:]) + s.out2(b[:, s.width:])
    net = Net(forward, a=plain(3, 5), b=plain(3, 5), c=plain(3, 2), d=plain(3, 2), width=3, out=plain(4, 2), out2=plain(2, 2))
    space = trace(filled(net), (3, 6, 6))
    works_at_all_widths(filled(net), space, (3, 6, 6), (2, 2, 6, 6))
    first = space.tensors['a.weight'].axes[0][0]
    assert first == space.tensors['b.weight'].axes[0][0]
    if space.groups[first[0]].frozen is None:
        assert resize(net, space, {space.groups[first[0]].name: 2}).width == 2


def test_branches_of_the_model_that_depend_on_a_width_are_frozen():
    """The code takes another path at another width: law 0 sees it, the widths behind it stay."""
    def forward(s, x):
        y = s.a(x)
        return s.out(s.b(y) if y.shape[1] == 4 else s.c(y))
    net = Net(forward, a=plain(3, 4), b=nn.Sequential(plain(4, 5), nn.ReLU()), c=plain(4, 5), out=plain(5, 2))
    space = trace(filled(net), (3, 6, 6))
    assert 'a' in space.frozen and 'law 0' in space.frozen['a']


# -- names -------------------------------------------------------------------------------------------------------------------


def test_groups_are_named_by_their_first_producer():
    net = Net(lambda s, x: s.out(s.late(x) + s.early(x)), early=plain(3, 4), late=plain(3, 4), out=plain(4, 2))
    assert set(trace(net, (3, 6, 6)).searchable) == {'late'}


def test_channels_that_no_layer_produces_are_named_by_their_parameter():
    net = Net(lambda s, x: s.out(s.mixer(x).relu().transpose(1, 3) @ s.table),
              mixer=plain(3, 4), table=nn.Parameter(torch.ones(4, 5)), out=nn.Identity())
    space = trace(filled(net), (3, 6, 6))
    assert 'mixer' in space.searchable and ('table', 0) in space['mixer'].axes


def test_keep_of_an_ordered_group_must_be_a_prefix():
    def forward(s, x):
        x = s.a(x)
        return s.out(x * s.eca(x.mean((2, 3)).unsqueeze(1)).sigmoid().view(x.shape[0], -1, 1, 1))
    net = Net(forward, a=plain(3, 5), eca=nn.Conv1d(1, 1, 3, padding=1, bias=False), out=plain(5, 2))
    space = check(net, {'a': 5}, frozen={'eca': 'one channel'}, ordered=('a',), zero=False)
    with pytest.raises(WidthError, match="'a' is ordered: only its first channels"):
        resize(net, space, {'a': 2}, keep={'a': [1, 2]})
    resized = resize(copy.deepcopy(net), space, {'a': 2}, importance='l1')
    assert torch.equal(resized.a.weight, net.a.weight[:2])


# -- random networks ------------------------------------------------------------------------------------------------------------


class RandomNet(nn.Module):
    """A network of random operations on random earlier tensors; half of the sizes that it needs are kept in Python."""

    def __init__(self, seed: int, length: int = 9):
        super().__init__()
        self.rng = np.random.default_rng(seed)
        self.layers = nn.ModuleList()
        self.plan: list = []
        self.shapes = [(3, 8)]  # channels and height of every tensor so far
        self.used = {0}
        self.add('conv', 0)
        while len(self.plan) < length:
            kind = self.pick(sorted(n[4:] for n in dir(type(self)) if n.startswith('run_')))
            at = int(self.rng.integers(1, len(self.shapes)))
            self.add(kind, at)
        self.out = nn.Linear(sum(c for k, (c, _) in enumerate(self.shapes) if k not in self.used), 2)

    def pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def add(self, kind: str, at: int) -> None:
        getattr(self, f'add_{kind}', lambda at: self.note(kind, [at], None, self.shapes[at]))(at)

    def note(self, kind, inputs, layer, *shapes, size=None) -> None:
        if layer is None:
            layer = nn.Module()
        if size is not None:
            layer.kept = size
        self.layers.append(layer)
        self.plan.append((kind, tuple(inputs)))
        self.used.update(inputs)
        self.shapes += shapes

    def forward(self, x):
        tensors = [x]
        for (kind, inputs), layer in zip(self.plan, self.layers):
            out = getattr(self, f'run_{kind}')(layer, *[tensors[k] for k in inputs])
            tensors += out if isinstance(out, (tuple, list)) else [out]
        return self.out(torch.cat([t.mean((2, 3)) for k, t in enumerate(tensors) if k not in self.used], 1))

    def mates(self, at: int, same_channels: bool) -> list:
        c, h = self.shapes[at]
        return [k for k, (d, i) in enumerate(self.shapes) if k > 0 and i == h and (d == c or not same_channels)]

    def add_conv(self, at):
        c, h = self.shapes[at]
        groups = self.pick([g for g in (1, 1, 2, 4, c) if c % g == 0]) if at else 1
        out = groups * self.pick([n for n in (1, 2, 3, 4, 6, 8, 12) if 3 < groups * n < 25])
        k, stride = self.pick([1, 3]), self.pick([1, 1, 1, 2 if h > 2 else 1])
        layer = nn.Conv2d(c, out, k, stride, k // 2, groups=groups, bias=bool(self.rng.integers(2)))
        self.note('conv', [at], layer, (out, -(-h // stride)))

    def run_conv(self, layer, x):
        return layer(x)

    def add_up(self, at):
        c, h = self.shapes[at]
        if h < 8:
            self.note('up', [at], nn.ConvTranspose2d(c, 6, 2, 2), (6, 2 * h))

    def run_up(self, layer, x):
        return layer(x)

    def add_norm(self, at):
        c, h = self.shapes[at]
        groups = self.pick([g for g in (1, 2, 4) if c % g == 0])
        self.note('norm', [at], self.pick([nn.BatchNorm2d(c), nn.GroupNorm(groups, c)]), (c, h))

    def run_norm(self, layer, x):
        return layer(x)

    def add_layer_norm(self, at):
        self.note('layer_norm', [at], nn.LayerNorm(self.shapes[at][0]), self.shapes[at])

    def run_layer_norm(self, layer, x):
        return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def run_relu(self, layer, x):
        return x.relu()

    def run_softmax(self, layer, x):
        return x.softmax(1)

    def add_sum(self, at):
        self.note('sum', [at, self.pick(self.mates(at, True))], None, self.shapes[at])

    def run_sum(self, layer, x, y):
        return x + y.sigmoid()

    def add_cat(self, at):
        other = self.pick(self.mates(at, False))
        c, d = self.shapes[at][0], self.shapes[other][0]
        if c + d < 25:
            self.note('cat', [at, other], None, (c + d, self.shapes[at][1]))

    def run_cat(self, layer, x, y):
        return torch.cat([x, y], 1)

    def add_gate(self, at):
        c = self.shapes[at][0]
        self.note('gate', [at], nn.Sequential(nn.Linear(c, 3), nn.ReLU(), nn.Linear(3, c), nn.Sigmoid()), self.shapes[at])

    def run_gate(self, layer, x):
        return x * layer(x.mean((2, 3))).view(*x.shape[:2], 1, 1)

    def add_chunk(self, at):
        c, h = self.shapes[at]
        if c % 2 == 0 and c > 5:
            self.note('chunk', [at], None, (c // 2, h), (c // 2, h))

    def run_chunk(self, layer, x):
        return x.chunk(2, 1)

    def add_split(self, at):
        c, h = self.shapes[at]
        if c > 5:
            self.note('split', [at], None, (2, h), (c - 2, h), size=(2, c - 2))

    def run_split(self, layer, x):
        return x.split(layer.kept, 1)

    def add_slice(self, at):
        c, h = self.shapes[at]
        if c > 5:
            self.note('slice', [at], None, (c - 2, h), (2, h), size=c - 2)

    def run_slice(self, layer, x):
        return x[:, :layer.kept], x[:, layer.kept:]

    def add_shuffle(self, at):
        if self.shapes[at][0] % 2 == 0:
            self.note('shuffle', [at], None, self.shapes[at])

    def run_shuffle(self, layer, x):
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, -1, h, w)

    def add_repeat(self, at):
        c, h = self.shapes[at]
        if c < 13:
            self.note('repeat', [at], None, (2 * c, h))

    def run_repeat(self, layer, x):
        return x.repeat_interleave(2, 1)

    def add_tokens(self, at):
        c = self.shapes[at][0]
        self.note('tokens', [at], nn.Sequential(nn.Linear(c, 5), nn.GELU(), nn.Linear(5, c)), self.shapes[at])

    def run_tokens(self, layer, x):
        y = x.flatten(2).transpose(1, 2)
        return (y + layer(y)).transpose(1, 2).reshape(x.shape)

    def add_attention(self, at):
        c, h = self.shapes[at]
        if c % 2 == 0 and h <= 8:
            self.note('attention', [at], nn.Linear(c, 3 * c), (c, h))

    def run_attention(self, layer, x):
        b, c, h, w = x.shape
        q, k, v = layer(x.flatten(2).transpose(1, 2)).reshape(b, h * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(b, h * w, c).transpose(1, 2).reshape(b, c, h, w)

    def add_neighbours(self, at):
        self.note('neighbours', [at], nn.Conv1d(1, 1, 3, padding=1), self.shapes[at])

    def run_neighbours(self, layer, x):
        return x * layer(x.mean((2, 3)).unsqueeze(1)).sigmoid().transpose(1, 2).unsqueeze(-1)

    def add_reverse(self, at):
        if self.rng.uniform() < 0.1:  # freezes all that it touches
            self.note('reverse', [at], None, self.shapes[at])

    def run_reverse(self, layer, x):
        return x.flip(1)

    def run_spread(self, layer, x):
        return x * x.mean(1, keepdim=True) - x.amax(1, keepdim=True)


def laws_hold(seed: int) -> None:
    """Checks laws 0, 1 and 3 on a random network.

    A group has two steps at least: with one, the code's views have sizes of one, which cannot be told from other ones.
    """
    torch.manual_seed(seed)
    size = (3, 8, 8)
    net = filled(RandomNet(seed), seed)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    space = trace(net, size)
    shape = run(net, size).shape
    for k in range(3):
        widths = {n: max(w, 2 * space[n].unit) for n, w in random_widths(space, k, 0.3, 2).items()
                  if space[n].steps > 1} if k else {}
        resized = resize(copy.deepcopy(net), space, widths, fresh=lambda: net)
        assert run(resized, size).shape == shape, widths
        again = trace(resized, size)
        error = permutation_error(resized, again)
        assert error < 1e-9, f'permuting changes the output by {error:.1e} at {widths}'
        if widths:
            faults = commutation_faults(meta_copy(net), space, widths) + cost_faults(meta_copy(net), space, widths)
            assert not faults, f'{faults} at {widths}'


@pytest.mark.parametrize('seed', range(30))
def test_random_networks_obey_the_laws(seed):
    laws_hold(seed)


@pytest.mark.slow
@pytest.mark.parametrize('start', range(1000, 2000, 100))
def test_many_random_networks_obey_the_laws(start):
    for seed in range(start, start + 100):
        laws_hold(seed)


def test_random_networks_are_mostly_searchable():
    """Otherwise the test above could pass by freezing."""
    shares = [trace(RandomNet(seed), (3, 8, 8)).searchable_share for seed in range(30)]
    assert np.mean(shares) > 0.6 and np.median(shares) > 0.8, shares
