"""timm_width.latency.terms: a network's layers as terms of a sum, which share unknowns where they are alike."""
import random
from functools import cache

import numpy as np
import pytest
import timm
import torch

from timm_width.cost import CostError, Macs
from timm_width.grids import make_grid, squeezes
from timm_width.latency.model import fit_unknowns, predict, validate
from timm_width.latency.terms import Unknowns, find_terms
from timm_width.trace import trace

MODELS = {'mobilenetv1_100': 64, 'mobilenetv2_035': 64, 'resnet10t': 64, 'efficientnet_b0': 64, 'convnext_zepto_rms': 64,
          'regnety_002': 64, 'repvgg_a0': 64, 'ghostnet_050': 64}


@cache
def problem(name: str, rule: str = 'aows', size: int = 64):
    with torch.device('meta'):
        model = timm.create_model(name)
    space = trace(model, (3, size, size))
    return space, make_grid(space, rule, squeezes=squeezes(model, space))


def draw(grid, count, seed=0):
    rng = random.Random(seed)
    return [{name: rng.choice(widths) for name, widths in grid.items()} for _ in range(count)]


def test_mobilenet_v1_has_the_unknowns_of_the_paper():
    """1,612 that are shared, of 2,396 entries in the tables of 15 layers."""
    unknowns = Unknowns(*problem('mobilenetv1_100', size=224))
    assert unknowns.count == 1612 and sum(index.size for index in unknowns.index) == 2396 and len(unknowns.terms) == 15
    alike = [t for t in unknowns.terms if t.layers[-1] in [f'blocks.3.{i}.conv_pw' for i in range(1, 6)]]
    assert len({t.kind for t in alike}) == 1 and len(alike) == 5
    assert unknowns.terms[1].layers == ('blocks.0.0.conv_dw', 'blocks.0.0.conv_pw')  # a depthwise layer goes with its pointwise


@pytest.mark.parametrize('name', MODELS)
def test_every_layer_is_in_one_term_that_holds_all_its_groups(name):
    space, grid = problem(name)
    where = {layer: term for term in find_terms(space, grid) for layer in term.layers}
    assert sum(len(t.layers) for t in find_terms(space, grid)) == len(space.sites)
    for site in space.sites:
        groups = {space.groups[g].name for axis in site.factors if not isinstance(axis, int) for g, _ in axis} & set(grid)
        assert groups <= set(where[site.name].groups)


@pytest.mark.parametrize('name', MODELS)
def test_the_rows_times_the_unknowns_are_the_sum_of_the_tables(name):
    space, grid = problem(name)
    unknowns = Unknowns(space, grid)
    values = np.random.default_rng(0).random(unknowns.count)
    networks = draw(grid, 20)
    assert np.allclose(unknowns.rows(networks) @ values, predict(unknowns.factors(values), networks), rtol=1e-12)
    assert (unknowns.rows(networks).sum(1) == len(unknowns.terms)).all()


@pytest.mark.parametrize('name', MODELS)
def test_a_latency_that_is_a_sum_over_layers_is_found(name):
    """MACs are such a sum: predicted for unseen networks, although what the layers share was found from the timings alone."""
    space, grid = problem(name, '0.5,1,1.5')
    macs, unknowns = Macs(space), Unknowns(space, grid)
    seen, unseen = draw(grid, 40 + 4 * unknowns.count), draw(grid, 50, seed=1)
    values = fit_unknowns(unknowns, seen, [macs(w) / 1e6 for w in seen], smoothness=1e-3, prior=0)
    assert validate(predict(unknowns.factors(values), unseen), [macs(w) / 1e6 for w in unseen]).nrmse < 2e-3


def test_layers_alike_share_and_others_do_not():
    """Equal widths of equal kinds are one unknown; nothing else is."""
    unknowns = Unknowns(*problem('mobilenetv2_035'))
    seen = {}
    for term, index in zip(unknowns.terms, unknowns.index):
        for place, i in np.ndenumerate(index):
            widths = tuple(unknowns.grid[g][k] for g, k in zip(term.groups, place))
            assert seen.setdefault(i, (term.kind, widths)) == (term.kind, widths)
    assert len(set(seen.values())) == len(seen) == unknowns.count


def test_steps_join_neighbours_that_differ_in_one_coordinate():
    unknowns = Unknowns(*problem('mobilenetv1_100'))
    about = {}
    for term, index in zip(unknowns.terms, unknowns.index):
        for place, i in np.ndenumerate(index):
            about[i] = (term.form, term.size, *(unknowns.grid[g][k] for g, k in zip(term.groups, place)))
    rows = unknowns.steps.tocoo()
    small, large = np.zeros(unknowns.steps.shape[0], int), np.zeros(unknowns.steps.shape[0], int)
    small[rows.row[rows.data == 1]], large[rows.row[rows.data == -1]] = rows.col[rows.data == 1], rows.col[rows.data == -1]
    sizes = 0
    for a, b in zip(small, large):
        differ = [k for k, (x, y) in enumerate(zip(about[a], about[b])) if x != y]
        assert len(differ) == 1 and differ[0] > 0 and about[a][differ[0]] < about[b][differ[0]]
        sizes += differ == [1]
    assert sizes > 0  # images of another size count, too
    along = {(about[a][:3], about[a][3]) for a in about if len(about[a]) == 4}
    lines = len({head for head, _ in along})
    assert len(along) - lines == sum(1 for a, b in zip(small, large) if len(about[a]) == 4 and about[a][3] != about[b][3])


def test_groups_outside_the_grid_are_constant():
    space, grid = problem('mobilenetv2_035')
    one = dict([next(iter(grid.items()))])
    terms = find_terms(space, one)
    assert {t.groups for t in terms} == {(), tuple(one)}
    assert sum(len(t.layers) for t in terms) == len(space.sites)


def test_a_layer_over_three_searched_groups_is_refused():
    with pytest.raises(CostError, match=r'densenet121: the latency of .* depends on 3 searched groups.*keep the width'):
        find_terms(*problem('densenet121'))
