"""timm_width.cost: law 3 on timm models, and exactness of evaluation, gradients, expectations and factors."""
import copy
import itertools
import random
import time
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_width.cost import CostError, Macs, Params
from timm_width.resize import resize
from timm_width.space import Block, Group, Site, TensorAxes, WidthError, WidthSpace
from timm_width.trace import meta_copy, trace

MODELS = {
    'resnet10t': 96,
    'mobilenetv2_035': 96,
    'regnetx_002': 96,
    'densenet121': 64,
    'ghostnet_050': 96,
    'cs3darknet_focus_s': 96,
    'convnext_zepto_rms': 96,
    'mobilevit_xxs': 96,
    'dpn48b': 96,
}
SLOW_TO_EXPAND = ('densenet121', 'hrnet_w18_small', 'nasnetalarge')  # many groups in one concatenation, or many sites


@cache
def traced(name: str, size: int):
    """The model on the meta device, and its space."""
    with torch.device('meta'):
        model = timm.create_model(name)
    model = meta_copy(model).eval()
    return model, trace(model, (3, size, size))


def random_widths(space: WidthSpace, seed: int) -> dict:
    rng = random.Random(seed)
    return {n: space.rounded(g, g.size * rng.uniform(0.2, 1.5)) for n, g in space.searchable.items()}


def counted(model: torch.nn.Module, input_size) -> tuple[int, int]:
    """MACs by torch's flop counter, and parameters."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *input_size, device='meta'))
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2, sum(p.numel() for p in model.parameters())


A, B, C, F = range(4)


def toy(extra=()) -> WidthSpace:
    """Groups of unit 2, 1, 1 and a frozen one; squares, sums and repeats of groups; blocks 'b.1' and 'b.10'."""
    groups = (
        Group('a', 4, 2), Group('b', 3, 1), Group('c', 2, 1), Group('f', 5, 1, frozen='network input'))
    sites = (
        Site('stem', 'conv', 9, (((F, 1),), ((A, 2),)), (4, 4)),
        Site('b.1', 'conv', 7, (((A, 2),), ((A, 2),)), (4, 4)),
        Site('b.1.inner', 'conv', 5, (((A, 2), (B, 1), (F, 1), (A, 2)), ((B, 3),)), (4, 4)),
        Site('b.10', 'conv', 3, (((B, 1), (C, 1)), ((B, 1), (C, 1))), (4, 4)),
        Site('head', 'linear', 1, (11, ((C, 4),)), (1,)),
        *extra)
    tensors = {
        'stem.weight': TensorAxes((8, 5, 3, 3), (((A, 2),), ((F, 1),), None, None), True),
        'b.1.scale': TensorAxes((8,), (((A, 2),),), True),
        'b.1.shift': TensorAxes((8,), (((A, 2),),), True),
        'b.1.mean': TensorAxes((8,), (((A, 2),),), False),
        'token': TensorAxes((1, 6), (None, None), True),
    }
    return WidthSpace('toy', (5, 4, 4), groups, tensors, sites, (Block('b.1'), Block('b.10')), ())


def toy_macs(a, b, c, skips=()):
    """The MACs of `toy` written out."""
    out = 9 * 5 * a + 11 * 4 * c
    if 'b.1' not in skips:
        out += 7 * a * a + 5 * (2 * a + b + 5) * 3 * b
    if 'b.10' not in skips:
        out += 3 * (b + c) ** 2
    return out


TOY_WIDTHS = [dict(a=a, b=b, c=c) for a, b, c in itertools.product((2, 4, 8, 12), (1, 3, 4), (1, 2, 5))]
TOY_SKIPS = [(), ('b.1',), ('b.10',), ('b.1', 'b.10')]


# -- law 3 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name', MODELS)
def test_law_3_macs_and_params_equal_those_counted_on_the_resized_model(name, seed):
    model, space = traced(name, MODELS[name])
    widths = random_widths(space, seed)
    resized = resize(copy.deepcopy(model), space, widths)
    assert (Macs(space)(widths), Params(space)(widths)) == counted(resized, space.input_size)


@pytest.mark.parametrize('name', MODELS)
def test_law_3_holds_at_base_widths(name):
    model, space = traced(name, MODELS[name])
    assert (Macs(space)(), Params(space)()) == counted(model, space.input_size)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name', ['resnet10t', 'mobilenetv2_035', 'mobilevit_xxs'])
def test_law_3_holds_with_blocks_left_out(name, seed):
    model, space = traced(name, MODELS[name])
    widths = random_widths(space, seed)
    blocks = [b.name for b in space.blocks]
    skips = random.Random(seed).sample(blocks, max(1, len(blocks) // (seed + 1)))
    resized = resize(copy.deepcopy(model), space, widths, skips)
    assert (Macs(space)(widths, skips), Params(space)(widths, skips)) == counted(resized, space.input_size)


@pytest.mark.parametrize('name', SLOW_TO_EXPAND)
def test_costs_are_quick_to_build(name):
    _, space = traced(name, 64)
    start = time.process_time()
    Macs(space), Params(space)
    assert time.process_time() - start < 0.3


# -- evaluation --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('skips', TOY_SKIPS, ids=str)
def test_cost_of_ints_is_the_exact_int(skips):
    macs = Macs(toy())
    for widths in TOY_WIDTHS:
        got = macs(widths, skips)
        assert type(got) is int and got == toy_macs(**widths, skips=skips)


def test_params_count_parameters_without_buffers_and_skip_by_module_path():
    params = Params(toy())
    assert params() == 8 * 5 * 9 + 2 * 8 + 6
    assert params({'a': 4}) == 4 * 5 * 9 + 2 * 4 + 6
    assert params({'a': 4}, ['b.1']) == 4 * 5 * 9 + 6
    assert params({'a': 4}, ['b.10']) == params({'a': 4})


def test_groups_left_out_are_at_base_and_numpy_ints_are_ints():
    macs = Macs(toy())
    assert macs({'b': np.int64(4)}) == toy_macs(8, 4, 2)
    assert macs({'b': 4, 'f': 5}) == toy_macs(8, 4, 2)


def test_cost_equals_the_space_s_own_count():
    _, space = traced('dpn48b', 96)
    for seed in range(3):
        widths = random_widths(space, seed)
        assert Macs(space)(widths) == space.macs(widths)


def test_totals_beyond_int64_stay_exact():
    space = toy(extra=[Site('huge', 'conv', 2 ** 61 + 1, (((A, 2),), ((C, 1),)), (1,))])
    widths = dict(a=32, b=1, c=8)
    assert Macs(space)(widths) == toy_macs(**widths) + (2 ** 61 + 1) * 32 * 8
    assert Macs(space)(widths, ['b.1', 'b.10']) == toy_macs(**widths, skips=('b.1', 'b.10')) + (2 ** 61 + 1) * 32 * 8
    assert Macs(space)({'a': torch.tensor(32.), 'c': 8}).item() == pytest.approx((2 ** 61 + 1) * 32 * 8)


@pytest.mark.parametrize('widths, skips, message', [
    ({'a': 3}, (), 'not a multiple of 2'),
    ({'z': 3}, (), "unknown group 'z'"),
    ({'f': 4}, (), 'frozen at 5'),
    ({'a': 2.5}, (), 'whole number'),
    ({'a': 2}, ['b.2'], 'cannot be skipped'),
    ({'a': torch.tensor(2.5), 'z': 1}, (), "unknown group 'z'"),
    ({'a': torch.tensor(2.5)}, ['b.2'], 'cannot be skipped'),
    ({'a': torch.tensor([2.5])}, (), r'not of shape \(1,\)'),
    ({'a': torch.tensor(2.5), 'b': 'x'}, (), 'must be a number or a tensor'),
    ({'a': torch.tensor(2.5), 'f': 4}, (), 'frozen at 5'),
    ('a=2', (), 'must be a dict'),
])
def test_unfit_widths_and_skips_are_refused(widths, skips, message):
    with pytest.raises(WidthError, match=message):
        Macs(toy())(widths, skips)


# -- gradients ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('skips', TOY_SKIPS, ids=str)
def test_cost_of_tensors_is_the_same_polynomial_at_fractions(skips):
    macs = Macs(toy())
    for widths in TOY_WIDTHS:
        at = {n: w + 0.3 for n, w in widths.items()}
        got = macs({**at, 'a': torch.tensor(at['a'], dtype=torch.float64), 'f': 5}, skips)
        assert got.shape == () and got.dtype == torch.float64
        assert got.item() == pytest.approx(toy_macs(**at, skips=skips), rel=1e-12)


def test_cost_of_whole_tensors_equals_that_of_ints():
    _, space = traced('mobilenetv2_035', 96)
    macs, params = Macs(space), Params(space)
    for seed in range(2):
        widths = random_widths(space, seed)
        tensors = {n: torch.tensor(w) for n, w in widths.items()}
        skips = [space.blocks[0].name]
        assert macs(tensors, skips).item() == macs(widths, skips)
        assert params(tensors).item() == params(widths)


def test_gradient_in_the_widths_equals_finite_differences():
    macs = Macs(toy())
    free = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (4.2, 1.7, 1.1)]
    assert torch.autograd.gradcheck(lambda *w: macs(dict(zip('abc', w)), ['b.10']), free)
    assert torch.autograd.gradgradcheck(lambda *w: macs(dict(zip('abc', w))), free)


def test_gradient_reaches_float32_widths_of_a_real_model():
    _, space = traced('densenet121', 64)
    macs, name = Macs(space), 'features.conv0'
    width = torch.tensor(40., requires_grad=True)
    macs({name: width}).backward()
    up, down = macs({name: 41}), macs({name: 39})
    assert width.grad.item() == pytest.approx((up - down) / 2)  # exact for a quadratic


# -- expectation -------------------------------------------------------------------------------------------------------------

DISTRIBUTIONS = {
    'a': ((2, 4, 8, 10), (0.1, 0.4, 0.3, 0.2)),
    'b': ((1, 3, 4), (0.5, 0.25, 0.25)),
    'c': ((1, 2), (0.9, 0.1)),
}
CUBIC = Site('cubic', 'matmul', 2, (((A, 1),), ((A, 1),), ((B, 1), (A, 1)), ((C, 1),)), (4,))


def enumerated(cost, distributions, skips=()):
    """The expected cost by enumeration."""
    total = 0.
    for drawn in itertools.product(*(zip(*d) for d in distributions.values())):
        p = np.prod([p for _, p in drawn])
        total += p * cost(dict(zip(distributions, (w for w, _ in drawn))), skips)
    return total


@pytest.mark.parametrize('groups', ['abc', 'a', 'bc', ''])
@pytest.mark.parametrize('skips', TOY_SKIPS, ids=str)
@pytest.mark.parametrize('extra', [(), (CUBIC,)], ids=['quadratic', 'degree 4'])
def test_expectation_equals_enumeration(groups, skips, extra):
    """Also where one group occurs up to three times in a monomial, and with groups left out at base."""
    macs = Macs(toy(extra))
    given = {n: DISTRIBUTIONS[n] for n in groups}
    got = macs.expectation(given, skips)
    assert isinstance(got, float)
    assert got == pytest.approx(enumerated(macs, given, skips), rel=1e-12)


def test_expectation_of_sure_widths_is_the_cost():
    _, space = traced('densenet121', 64)
    widths = random_widths(space, 0)
    macs = Macs(space)
    assert macs.expectation({n: ((w,), (1.,)) for n, w in widths.items()}) == macs(widths)


def test_expectation_is_differentiable_in_the_probabilities():
    macs = Macs(toy((CUBIC,)))
    logits = [torch.tensor(p, dtype=torch.float64).log().requires_grad_() for _, p in DISTRIBUTIONS.values()]

    def expected(*logits):
        return macs.expectation({n: (w, z.softmax(0)) for (n, (w, _)), z in zip(DISTRIBUTIONS.items(), logits)})

    assert expected(*logits).item() == pytest.approx(enumerated(macs, DISTRIBUTIONS), rel=1e-12)
    assert torch.autograd.gradcheck(expected, logits)


@pytest.mark.parametrize('distributions, message', [
    ({'z': ((1,), (1.,))}, "unknown group 'z'"),
    ({'a': ((3, 4), (.5, .5))}, 'not a multiple of 2'),
    ({'a': ((2, 4), (1.,))}, r'2 widths need as many probabilities, not shape \(1,\)'),
    ({'a': ((2, 4), (.5, .6))}, 'sum to 1.1'),
    ({'a': ((2, 4), (1.5, -.5))}, 'the least is -0.5'),
    ({'a': ((2, 4), (float('nan'), 1.))}, 'sum to nan'),
    ({'a': (2, 4, 8)}, r'a distribution is \(widths, their probabilities\)'),
    ({'a': ((), ())}, r'a distribution is \(widths, their probabilities\)'),
    ([1], 'must be a dict'),
])
def test_unfit_distributions_are_refused(distributions, message):
    with pytest.raises(WidthError, match=message):
        Macs(toy()).expectation(distributions)


# -- factors -----------------------------------------------------------------------------------------------------------------


def some_grid(space, names=None, count=3):
    """A few widths for each group: below, at and above the base."""
    return {n: tuple(g.unit * k for k in sorted({max(g.steps // 2, 1), g.steps, g.steps + 1})[:count])
            for n, g in space.searchable.items() if names is None or n in names}


@pytest.mark.parametrize('skips', TOY_SKIPS, ids=str)
@pytest.mark.parametrize('names', [None, ['a'], ['b', 'c'], []], ids=str)
def test_factors_sum_to_the_cost(skips, names):
    """At every point of the grid, exactly; groups outside the grid are at their base."""
    space = toy()
    grid = some_grid(space, names)
    for cost in (Macs(space), Params(space)):
        factors = cost.factors(grid, skips)
        for point in itertools.product(*grid.values()):
            widths = dict(zip(grid, point))
            found = factors(widths)
            assert found == cost(widths, skips) and isinstance(found, int)


@pytest.mark.parametrize('name', MODELS)
def test_factors_sum_to_the_cost_of_real_models(name):
    _, space = traced(name, MODELS[name])
    skips = [b.name for b in space.blocks][:2]
    grid, rng = some_grid(space), random.Random(0)
    for cost in (Macs(space), Params(space)):
        factors = cost.factors(grid, skips)
        for _ in range(3):
            widths = {n: rng.choice(levels) for n, levels in grid.items()}
            assert factors(widths) == cost(widths, skips)


def test_factors_refuse_terms_over_three_groups_of_the_grid():
    space = toy([Site('attn', 'matmul', 1, (((A, 1),), ((B, 1),), ((C, 1),)), (4,))])
    with pytest.raises(CostError, match=r"toy: MACs of 'attn' have a term over 3 groups \(a x b x c\).*keep the width of one"):
        Macs(space).factors(some_grid(space))
    grid = some_grid(space, ['a', 'b'])
    assert Macs(space).factors(grid)({'a': 4, 'b': 1}) == Macs(space)({'a': 4, 'b': 1})


def test_factors_hold_powers_of_a_group():
    space = toy([Site('b.1.attn', 'matmul', 1, (((A, 1),), ((A, 1),), ((B, 1),)), (4,))])
    grid = some_grid(space)
    for point in itertools.product(*grid.values()):
        widths = dict(zip(grid, point))
        assert Macs(space).factors(grid)(widths) == Macs(space)(widths)


def test_factors_refuse_widths_outside_their_grid():
    factors = Macs(toy()).factors({'a': (4, 8)})
    with pytest.raises(ValueError, match=r"'a': 6 is not on the grid \(4, 8\)"):
        factors({'a': 6})
    with pytest.raises(ValueError, match="'a': nothing"):
        factors({})


# -- deployed form -------------------------------------------------------------------------------------------------------------


def test_deployed_macs_count_the_deployed_sites():
    space = toy()
    space = replace(space, deployed_sites=space.sites[:1])
    assert Macs(space, deployed=True)({'a': 4}) == 9 * 5 * 4
    assert Macs(space)({'a': 4}) == toy_macs(4, 3, 2)


def test_a_model_without_a_deployed_form_says_so():
    with pytest.raises(ValueError, match='toy has no deployed form'):
        Macs(toy(), deployed=True)
