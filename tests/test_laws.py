"""The laws over the smallest model of every conv family in timm: commutation (0), permutation (1) and cost (3).

Laws 0 and 3 run on the meta device at the model's own resolution; law 1 runs for real, in float64, at 96 pixels where the model
takes that. What the laws catch is the subject of test_mutation.py.
"""
import statistics
from dataclasses import replace
from functools import cache

import pytest
import timm
import torch

from timm_width.laws import commutation_faults, cost_faults, permutation_error, random_widths, randomise
from timm_width.models import supported
from timm_width.resize import resize
from timm_width.space import WidthSpace
from timm_width.trace import meta_copy, trace

from .families import SHRINKABLE, smallest_of_each_family

NAMES = list(smallest_of_each_family().values())
LARGE = 40e6  # parameters; beyond it law 1 takes many seconds
LONG = 120  # convolutions and products; beyond it three laws 0 take many seconds
TOLERANCE = 1e-6  # of law 1; what is right is below 1e-10, what is wrong is above 1e-3
# groups that cannot shrink: in NextViT, conv-groups tie channels side by side, and its heads of fixed number those 32 apart
ONE_STEP = {'nextvit_small'}


@cache
def on_meta(name: str):
    """The model on the meta device, and its space."""
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    return model, trace(model)


@pytest.mark.parametrize('name', NAMES)
def test_law_0_the_trace_of_the_resized_model_is_the_resized_trace(name):
    """At half, at 1.5x and at random widths from 0.3x to 1.5x; only at those for the longest models."""
    model, space = on_meta(name)
    tried = {'random': random_widths(space, 1)}
    if len(space.sites) <= LONG:
        tried |= {'half': space.scaled(0.5), '1.5x': space.scaled(1.5)}
    found = {k: commutation_faults(model, space, w)[:3] for k, w in tried.items()}
    assert not any(found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_law_0_at_more_widths(name):
    model, space = on_meta(name)
    tried = {'half': space.scaled(0.5), '1.5x': space.scaled(1.5), 'quarter': space.scaled(0.25), 'double': space.scaled(2.),
             'one step more': {n: g.size + g.unit for n, g in space.searchable.items()},
             'every second': {n: g.unit * max(g.steps // 2, 1) for n, g in list(space.searchable.items())[::2]},
             **{seed: random_widths(space, seed, 0.3, 2) for seed in (2, 3)}}
    found = {k: (commutation_faults(model, space, w) + cost_faults(model, space, w))[:3] for k, w in tried.items()}
    assert not any(found.values()), found


@pytest.mark.parametrize('name', NAMES)
def test_law_3_macs_and_parameters_of_the_table_are_those_counted(name):
    model, space = on_meta(name)
    assert not cost_faults(model, space, random_widths(space, 2))


def at_widths(space: WidthSpace, widths: dict) -> WidthSpace:
    """The table at other widths: law 0 says that it is the trace of the resized model."""
    steps = space.steps(widths)
    return replace(space, groups=tuple(replace(g, steps=int(s)) for g, s in zip(space.groups, steps)))


@pytest.mark.parametrize('name', [
    pytest.param(n, marks=pytest.mark.slow) if supported()[n]['params'] > LARGE else n for n in NAMES])
def test_law_1_permuting_any_group_everywhere_leaves_the_output(name):
    """On the base, then on the model at random widths."""
    torch.manual_seed(0)
    model = randomise(timm.create_model(name).eval().double())
    space = replace(on_meta(name)[1], input_size=(model.in_chans, SHRINKABLE, SHRINKABLE))
    try:
        with torch.inference_mode():
            meta_copy(model)(torch.empty(1, *space.input_size, device='meta'))
    except (RuntimeError, AssertionError, ValueError):  # a model of one resolution
        space = on_meta(name)[1]
    assert permutation_error(model, space) < TOLERANCE
    widths = random_widths(space, 2, high=1)
    assert permutation_error(resize(model, space, widths), at_widths(space, widths), seed=1) < TOLERANCE


@pytest.mark.parametrize('name', NAMES)
def test_frozen_groups_say_why(name):
    _, space = on_meta(name)
    assert all(reason.strip() for reason in space.frozen.values())
    assert space.searchable and not set(space.searchable) & set(space.frozen)


@pytest.mark.parametrize('name', NAMES)
def test_searchable_groups_can_shrink(name):
    """A group whose channels are all tied together counts as searchable, and is not."""
    one_step = [n for n, g in on_meta(name)[1].searchable.items() if g.steps == 1]
    assert not one_step or name in ONE_STEP


# -- what is searchable --------------------------------------------------------------------------------------------------------


def rows(pure: bool = False) -> dict:
    return {n: supported()[n] for n in NAMES if supported()[n]['pure'] or not pure}


def test_families_are_many():
    assert len(NAMES) >= 66
    assert len(rows(pure=True)) >= 40


def test_most_parameters_are_searchable():
    assert statistics.mean(r['share'] for r in rows().values()) >= 0.97
    assert statistics.mean(r['share'] for r in rows(pure=True).values()) >= 0.99


def test_half_widths_leave_a_third_of_the_macs_of_pure_conv_nets():
    halves = {n: r['half_macs'] for n, r in rows(pure=True).items()}
    assert statistics.median(halves.values()) <= 0.32
    assert not {n: h for n, h in halves.items() if h > 0.40}


@pytest.mark.parametrize('name', NAMES)
def test_the_table_of_supported_models_is_what_a_trace_says(name):
    model, space = on_meta(name)
    row = supported()[name]
    assert row['params'] == sum(p.numel() for p in model.parameters())
    assert row['share'] == pytest.approx(space.searchable_share, abs=1e-3)
    assert row['half_macs'] == pytest.approx(space.half_macs, abs=1e-3)
