"""Each union left out of a rule turns the laws red: what they would miss, no other test would find.

Twice: with the trace's own check of law 0 switched off, so that wrong groups reach the laws, and with it on, when the groups that
do not fit end up frozen and the bars on what is searchable fall.
"""
import importlib
from functools import cache

import pytest
import timm
import torch

from timm_width.laws import commutation_faults, cost_faults, permutation_error, random_widths, randomise
from timm_width.rules import RULES, is_ids
from timm_width.trace import meta_copy, trace

SIZE = (3, 64, 64)


class Deaf:
    """A ledger that hears nothing of unions."""

    def __init__(self, ledger):
        self.ledger = ledger

    def __getattr__(self, name):
        return getattr(self.ledger, name)

    def unite(self, a, b):
        pass


def no_unite(rule):
    return lambda t, out, *args, **kwargs: rule(Deaf(t), out, *args, **kwargs)


def grouped_no_unite(rule):
    """Only where there are several conv-groups: the others keep their unions."""
    def mutated(t, out, x, weight, *args, **kwargs):
        grouped = weight.shape[1] != x.shape[1]
        return rule(Deaf(t) if grouped else t, out, x, weight, *args, **kwargs)
    return mutated


def fresh_output(rule):
    """The output's channels are new ones, tied to nothing."""
    def mutated(t, out, *args, **kwargs):
        return [t.new(len(e)) if is_ids(e) else e for e in rule(t, out, *args, **kwargs)]
    return mutated


def reversed_output(rule):
    """The parts of a concatenation in the wrong order."""
    def mutated(t, out, tensors, dim=0):
        return rule(t, out, list(tensors)[::-1], dim)
    return mutated


def shifted_output(rule):
    """The output's channels one place off."""
    def mutated(t, out, *args, **kwargs):
        return [e[list(range(1, len(e))) + [0]] if is_ids(e) else e for e in rule(t, out, *args, **kwargs)]
    return mutated


MUTATIONS = {
    'cat: fresh ids (densenet)': ('densenet121', ('cat', 'concat'), fresh_output),
    'cat: fresh ids (ghostnet)': ('ghostnet_050', ('cat', 'concat'), fresh_output),
    'cat: parts in the wrong order': ('densenet121', ('cat', 'concat'), reversed_output),
    'residual add': ('resnet10t', ('add',), no_unite),
    'residual add (mobilenetv2)': ('mobilenetv2_035', ('add',), no_unite),
    'squeeze-excite multiply': ('mobilenetv3_small_050', ('mul',), no_unite),
    'batch norm': ('resnet10t', ('batch_norm',), no_unite),
    'depthwise convolution': ('mobilenetv2_035', ('conv2d', 'convolution'), grouped_no_unite),
    'grouped convolution': ('regnetx_002', ('conv2d', 'convolution'), grouped_no_unite),
    'convolution': ('resnet10t', ('conv2d', 'convolution'), no_unite),
    'linear': ('convnext_zepto_rms', ('linear',), no_unite),
    'layer scale': ('convnext_zepto_rms', ('mul',), no_unite),
    'activation: channels one place off': ('resnet10t', ('relu',), shifted_output),
    'pooling: channels one place off': ('resnet10t', ('max_pool2d', 'avg_pool2d'), shifted_output),
}


@cache
def healthy(name: str):
    """The model in float64 with random norms, its space, and the error of law 1, all without a mutation."""
    torch.manual_seed(0)
    model = randomise(timm.create_model(name).eval().double())
    space = trace(model, SIZE)
    return model, space, permutation_error(model, space)


def mutate(monkeypatch, names, mutation) -> None:
    found = [n for n in names if n in RULES]
    assert found
    for n in found:
        monkeypatch.setitem(RULES, n, mutation(RULES[n]))


def objections(model, space):
    """What the laws say of a space, one after the other: the error of law 1 where it is not rounding, then faults."""
    try:
        error = permutation_error(model, space)
        if not error < 1e-3:
            yield f'law 1: {error:.1e}'
    except (RuntimeError, IndexError, ValueError) as e:
        yield f'law 1: {e}'
    for widths in (space.scaled(0.5), random_widths(space, 1)):
        for law in (commutation_faults, cost_faults):
            try:
                yield from law(meta_copy(model), space, widths)
            except (RuntimeError, IndexError, ValueError) as e:  # the resized model does not even run
                yield f'{law.__name__}: {e}'


@pytest.mark.parametrize('name', sorted({m[0] for m in MUTATIONS.values()}))
def test_without_a_mutation_the_laws_are_content(name):
    model, space, error = healthy(name)
    assert error < 1e-9 and space.searchable_share > 0.97
    assert not list(objections(model, space))


@pytest.mark.parametrize('case', MUTATIONS)
def test_the_laws_catch_a_union_left_out(case, monkeypatch):
    """The trace takes the wrong groups at their word."""
    name, names, mutation = MUTATIONS[case]
    model, right, _ = healthy(name)
    mutate(monkeypatch, names, mutation)
    monkeypatch.setattr(importlib.import_module('timm_width.trace'), 'deviations', lambda *args: [])
    wrong = trace(model, SIZE)
    assert wrong.searchable and wrong.tensors != right.tensors
    assert next(objections(model, wrong), None)


@pytest.mark.parametrize('case', MUTATIONS)
def test_with_its_own_check_a_trace_of_wrong_groups_freezes_or_is_caught(case, monkeypatch):
    """What the check of law 0 cannot see, law 1 must; what it sees costs searchable parameters."""
    name, names, mutation = MUTATIONS[case]
    model, right, _ = healthy(name)
    mutate(monkeypatch, names, mutation)
    wrong = trace(model, SIZE)
    error = permutation_error(model, wrong)
    assert error > 1e-3 or wrong.searchable_share < 0.97 or wrong.half_macs > 0.4, (error, wrong.searchable_share)
    assert wrong != right


def test_law_1_alone_sees_channels_in_the_wrong_order(monkeypatch):
    """Shapes agree, so neither law 0 nor law 3 can."""
    name, names, mutation = MUTATIONS['activation: channels one place off']
    model, right, _ = healthy(name)
    mutate(monkeypatch, names, mutation)
    wrong = trace(model, SIZE)
    widths = random_widths(wrong, 0)
    assert wrong.searchable_share > 0.97 and not cost_faults(meta_copy(model), wrong, widths)
    assert permutation_error(model, wrong) > 1e-3
