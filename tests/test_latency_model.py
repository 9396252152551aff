"""timm_width.latency.model: the fit solves its least-squares problem, and the file says what it is for."""
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from scipy import optimize, sparse

from timm_width.factors import Factors
from timm_width.latency.model import (
    LatencyError,
    LatencyModel,
    Validation,
    _minimise,
    fit_unknowns,
    predict,
    space_fingerprint,
    validate,
)
from timm_width.latency.terms import Unknowns
from timm_width.trace import trace

from .test_terms import draw, problem


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('smoothness', [0., 1., 100.])
def test_the_fit_solves_the_published_problem(seed, smoothness):
    """Its value is that of the constrained problem, with t as variables of their own, by another solver."""
    rng = np.random.default_rng(seed)
    matrix, y = rng.integers(0, 3, (30, 8)).astype(float), 1 + rng.random(30)
    steps = np.zeros((7, 8))
    steps[np.arange(7), np.arange(7)], steps[np.arange(7), np.arange(1, 8)] = 1, -1

    def value(z):
        return ((matrix @ z[:8] - y) ** 2).sum() + smoothness * (z[8:] ** 2).sum()

    found = _minimise(sparse.csr_matrix(matrix), y, sparse.csr_matrix(steps), smoothness, 0., np.full(8, .2))
    known = optimize.minimize(
        value, np.full(15, .5), method='SLSQP', bounds=[(0, None)] * 15, options={'maxiter': 2000, 'ftol': 1e-12},
        constraints={'type': 'ineq', 'fun': lambda z: z[8:] - steps @ z[:8]})
    assert known.success and (found >= 0).all()
    assert value(np.concatenate([found, np.maximum(steps @ found, 0)])) == pytest.approx(known.fun, rel=1e-5, abs=1e-7)


def test_smoothness_makes_the_unknowns_monotone():
    space, grid = problem('resnet10t', '0.5,0.75,1')
    unknowns, rng = Unknowns(space, grid), np.random.default_rng(0)
    networks = draw(grid, 200)
    ms = [1 + rng.random() for _ in networks]  # nothing but noise
    broken = [(np.maximum(unknowns.steps @ fit_unknowns(unknowns, networks, ms, k, prior=0), 0) ** 2).sum() for k in (0., 10., 1000.)]
    assert broken[0] > 2 * broken[1] > 20 * broken[2]


def test_the_prior_helps_where_networks_are_few():
    """On a latency that steps with every 32 channels, with 2 % of noise."""
    space, grid = problem('mobilenetv1_100')
    unknowns, rng = Unknowns(space, grid), np.random.default_rng(0)
    true = np.empty(unknowns.count)
    for term, index in zip(unknowns.terms, unknowns.index):
        a, b = [np.array(grid[g], dtype=float) for g in (*term.groups, *term.groups)[:2]]
        true[index] = term.size * (np.multiply.outer(a, b) + 9 * a[:, None] + 50 * np.ceil(b / 32)) if index.ndim == 2 else term.size * a
    seen, unseen = draw(grid, 600), draw(grid, 100, seed=1)
    ms = (unknowns.rows(seen) @ true) * (1 + 0.02 * rng.standard_normal(len(seen)))
    error = {p: validate(unknowns.rows(unseen) @ fit_unknowns(unknowns, seen, ms, prior=p), unknowns.rows(unseen) @ true).nrmse
             for p in (0., 10.)}
    assert error[10.] < 0.7 * error[0.] and error[10.] < 0.03


def test_validation_says_what_is_measured():
    found = validate([1., 2., 3.], [1., 2., 5.])
    assert found.networks == 3 and found.rank_correlation == pytest.approx(1)
    assert found.nrmse == pytest.approx((4 / 3) ** .5 / (8 / 3)) and found.worst == pytest.approx(.4)


# -- the file ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def space():
    with torch.device('meta'):
        return trace(timm.create_model('test_resnet'), (3, 32, 32))


@pytest.fixture
def model(space):
    rng = np.random.default_rng(0)
    names = list(space.searchable)
    grid = {n: (8, space[n].size) if space[n].size > 8 else (space[n].size,) for n in names}
    shape = {n: len(w) for n, w in grid.items()}
    tables = Factors(grid, .1, {n: rng.random(shape[n]) for n in names[:2]},
                     {(a, b): rng.random((shape[a], shape[b])) for a, b in zip(names, names[1:])})
    return LatencyModel('test_resnet', (3, 32, 32), space_fingerprint(space), 4, 'fp32', {'backend': 'onnxruntime', 'device': 'a CPU'},
                        tables, Validation(20, .02, .1, .99), {'samples': 100})


def test_what_is_saved_is_loaded(model, space, tmp_path):
    model.save(tmp_path / 'm.json')
    loaded = LatencyModel.load(tmp_path / 'm.json')
    assert replace(loaded, tables=None) == replace(model, tables=None)
    rng = random.Random(0)
    for _ in range(10):
        widths = {n: rng.choice(levels) for n, levels in model.tables.grid.items()}
        assert loaded.cost(space)(widths) == pytest.approx(model.cost(space)(widths), rel=1e-8)
    assert [p.name for p in tmp_path.iterdir()] == ['m.json']
    assert 'NRMSE 2.00 %' in str(loaded) and 'batch 4' in str(loaded)


def test_the_registered_name_of_the_model_is_as_good(model, space):
    assert model.cost(replace(space, architecture='test_resnet_width'))() == model.cost(space)()


@pytest.mark.parametrize('change, message', [
    (dict(architecture='resnet18'), 'is one of resnet18, not of test_resnet'),
    (dict(input_size=(3, 64, 64)), 'is for images of 3x64x64, not of 3x32x32'),
    (dict(space='sha256:0'), 'that is built otherwise'),
    (dict(tables=Factors({'sten': (8,)})), "has a group 'sten', which test_resnet does not have"),
])
def test_a_model_of_another_network_is_refused(model, space, change, message):
    with pytest.raises(LatencyError, match=message):
        replace(model, **change).cost(space)


@pytest.mark.parametrize('path, value, message', [
    (('timm_width_latency_model',), 2, 'format 2 is not the one'),
    (('constant',), float('nan'), 'NaN is no number'),
    (('constant',), 10 ** 400, 'no latency model'),
    (('constant',), True, 'no latency model'),
    (('precision',), 'fp8', "precision 'fp8'"),
    (('backend', 'threads'), 'x', "threads 'x'"),
    (('validation', 'nrmse'), 'x', 'are no numbers'),
    (('constant',), None, 'no latency model'),
    (('grid', 'stem.conv1'), [8, 8], 'not of ascending widths'),
    (('grid', 'stem.conv1'), [], 'not of ascending widths'),
    (('grid', 'stem.conv1'), ['8'], 'not of ascending widths'),
    (('unary', 'stem.conv1'), [1., 2., 3.], 'has shape'),
    (('unary', 'stem.conv1'), [1., 'x'], 'no latency model'),
    (('pairwise', 0), ['stem.conv1', 'nothing', [[1.]]], 'no latency model'),
    (('batch',), 0, 'batch 0'),
    (('batch',), None, 'batch None'),
    (('validation',), {'nrmse': 1}, 'no latency model'),
    (('backend',), 3, 'no latency model'),
])
def test_a_broken_file_is_refused_in_one_line(model, tmp_path, path, value, message):
    model.save(tmp_path / 'm.json')
    found = json.loads((tmp_path / 'm.json').read_text())
    if path[0] in ('grid', 'unary') and path[-1] not in found[path[0]]:
        path = (path[0], next(iter(found[path[0]])))
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / 'm.json').write_text(json.dumps(found))
    with pytest.raises(LatencyError, match=message) as error:
        LatencyModel.load(tmp_path / 'm.json')
    assert 'm.json' in str(error.value) and '\n' not in str(error.value)


@pytest.fixture
def of_blocks(model):
    pair, *_ = model.tables.pairwise
    part = Factors({g: model.tables.grid[g] for g in pair}, .01, {}, {pair: model.tables.pairwise[pair]})
    return replace(model, blocks={'layer1.0': part, 'layer2.0': Factors({}, .02)})


def test_blocks_are_saved_and_can_be_left_out(of_blocks, space, tmp_path):
    of_blocks.save(tmp_path / 'm.json')
    cost = LatencyModel.load(tmp_path / 'm.json').cost(space)
    assert cost.of('layer2.0') == .02 and list(cost.blocks) == ['layer1.0', 'layer2.0']
    for block in set(cost.blocks) & {b.name for b in space.blocks}:
        assert cost({}, [block]) == pytest.approx(cost() - of_blocks.cost(space).of(block), rel=1e-8)
    assert {b.name for b in space.blocks} & set(cost.blocks)


@pytest.mark.parametrize('block', [
    {'constant': 1., 'unary': {'nothing': [1.]}, 'pairwise': []}, {'constant': 1., 'unary': {}}, 3, {'constant': 'x', 'unary': {}, 'pairwise': []},
    {'constant': 1., 'unary': {'stem.conv1': [1., 2., 3.]}, 'pairwise': []}, {'constant': 1., 'unary': {}, 'pairwise': [], 'more': 1},
    {'constant': float('inf'), 'unary': {}, 'pairwise': []},
], ids=str)
def test_broken_blocks_are_refused_in_one_line(of_blocks, block, tmp_path):
    of_blocks.save(tmp_path / 'm.json')
    found = json.loads((tmp_path / 'm.json').read_text())
    (tmp_path / 'm.json').write_text(json.dumps({**found, 'blocks': {'layer1.0': block}}))
    with pytest.raises(LatencyError, match='is no latency model') as error:
        LatencyModel.load(tmp_path / 'm.json')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text', ['', '{', '[]', '3', '{"a": 1}', '\x00\x01', '[' * 200_000])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / 'm.json').write_text(text)
    with pytest.raises(LatencyError, match='is no latency model'):
        LatencyModel.load(tmp_path / 'm.json')
    with pytest.raises(LatencyError, match='there is no such file'):
        LatencyModel.load(tmp_path / 'n.json')


def test_predictions_are_those_of_the_tables(model):
    networks = draw(model.tables.grid, 5)
    assert predict(model.tables, networks).tolist() == [model.tables(w) for w in networks]
