"""PRUNET's search spaces: their sizes, their reductions, and what is refused of one that is not trusted."""
import json
from fractions import Fraction

import pytest

from timm_width.models.prunet_space import PrunetError, SearchSpace, base_layers, get_space, reduced, space_size, table1, table5

COUNTED = (2, 2, 3, 2, 5, 5)  # the depths whose size the paper states


def digits(n: int) -> str:
    """Four of them, exactly."""
    power = len(str(n)) - 1
    return f'{float(round(Fraction(n, 10 ** power), 3)):.3f}e{power}'


@pytest.mark.parametrize('space, args, want', [
    (table1(COUNTED), {}, '1.707e39'),  # section 3.1
    (table1(COUNTED), {'skips': 'none'}, '7.108e38'),  # Table 3
    (table1(COUNTED), {'skips': 'none', 'widths': 2}, '9.007e15'),  # the FBNet space of section 3.1
    (table1(COUNTED, expansions=(3, 6)), {'skips': 'none'}, '9.007e15'),
    (table1(COUNTED, expansions=(3, 6)), {'skips': 'all'}, '1.501e17'),  # Table 3's baseline of nine candidates
    (table1(), {}, '1.110e41'),  # one layer more than GPUNet-1 has
    (table1((2, 3, 3, 2, 5, 6)), {}, '4.982e43'),  # Table 1 as printed
])
def test_sizes(space, args, want):
    assert digits(space_size(space, **args)) == want


def test_sizes_are_the_papers_products():
    """Section 3.1's factors, and Table 5's: three kernels of a convolution, five blocks of the others."""
    assert space_size(table1(COUNTED)) == 3**2 * 24 * 65 * 64 * 97**2 * 96 * 161 * 160 * 289**4 * 288 * 449**4
    assert space_size(table1(COUNTED), widths=2) // 9**12 == 3**2 * 8**5
    assert space_size(table5()) == 4**2 * 5 * 6 * 5 * 6**2 * 5 * 6 * 5 * 6**4 * 5 * 6**5


def test_a_size_by_counting():
    """A space of 2 stages: every choice of every layer is written out."""
    space = get_space({'stem': 8, 'granularity': 16, 'max_expansion': 4, 'stages': [
        {'type': 'conv', 'filters': 8, 'stride': 1, 'depth': 1, 'kernels': {'relu': [3, 5]}},
        {'type': 'irb', 'filters': 16, 'stride': 2, 'depth': 2, 'kernels': {'relu': [3], 'silu': [5]}, 'se': [True]}]})
    choices = []
    for number, _, c_in, stride in space.layers():
        stage = space.stages[number - 1]
        widths = [0] if stage.type == 'conv' else space.widths(c_in)
        choices.append([(*k, w) for k in stage.kinds for w in widths] + ['skip'] * (stride == 1 and c_in == stage.filters))
    assert [len(set(c)) for c in choices] == [3, 4, 9]  # conv: k3, k5, skip; irb: 2 kinds x {16, 32}; 2 kinds x {16..64}, skip
    assert space_size(space) == 3 * 4 * 9


@pytest.mark.parametrize('space', [table1(), table5(), table1(expansions=(3, 6)), reduced(table1(), 0.25, 0.5)])
def test_a_space_survives_json(space):
    assert get_space(json.loads(json.dumps(space.to_dict()))) == space


def test_names_and_the_default():
    assert get_space() == get_space('table1') == table1() and get_space('table5') == table5()
    assert isinstance(get_space({'stages': table1().to_dict()['stages']}), SearchSpace)


@pytest.mark.parametrize('width, depth', [(1., 1.), (0.5, 1.), (0.25, 0.5), (0.1, 0.1), (2., 2.)])
def test_reductions(width, depth):
    """GPUNet-1 of a reduced space is in it, and the search has the paper's one layer more per stage."""
    space = reduced(table1(), width, depth)
    assert all(n % 8 == 0 for n in (space.stem, space.head, space.granularity, *(s.filters for s in space.stages)))
    assert [s.depth - s.base_depth for s in space.stages] == [1] * 6
    inputs = {(number, i): c_in for number, i, c_in, _ in space.layers()}
    at: dict[int, int] = {}
    for layer in base_layers(space):
        stage = layer['stage']
        at[stage] = at.get(stage, -1) + 1
        assert 'hidden' not in layer or layer['hidden'] in space.widths(inputs[stage, at[stage]])
        assert layer['kernel'] in next(iter(space.stages[stage - 1].kernels.values()))
    assert {s: n + 1 for s, n in at.items()} == {i: s.base_depth for i, s in enumerate(space.stages, 1)}


def test_a_reduction_by_nothing_is_the_space():
    assert reduced(table1()) == table1()
    assert reduced(table1(), 0.5).stem == 16 and reduced(table1(), 0.5).granularity == 16  # 24 / 2 to a multiple of 8


STAGE = {'type': 'irb', 'filters': 16, 'stride': 2, 'depth': 1, 'kernels': {'relu': [3]}}


@pytest.mark.parametrize('space, said', [
    ('tabel1', "unknown space 'tabel1', did you mean 'table1'"), ('', 'unknown space'), (5, 'a name or a dict'), ([], 'a name or a dict'),
    (table1(), 'to_dict()'), ({}, 'stages must be'), ({'stages': []}, 'stages must be'), ({'stages': 'x'}, 'stages must be'),
    ({'stages': [STAGE] * 1000}, 'stages must be'), ({'stages': [5]}, 'stage 1 must be a dict, not int'),
    ({'stages': [STAGE], 'stem': 10 ** 9}, 'stem must be'), ({'stages': [STAGE], 'stem': 12}, 'a multiple of 8'),
    ({'stages': [STAGE], 'granularity': True}, 'granularity must be'), ({'stages': [STAGE], 'granularty': 8}, "did you mean 'granularity'"),
    ({'stages': [STAGE], 'expansions': [0]}, 'expansions must be'), ({'stages': [STAGE], 'expansions': [[3]]}, 'expansions must be'),
    ({'stages': [STAGE], 'expansions': [float('nan')]}, 'expansions must be'), ({'stages': [STAGE], 'stem_act': 'eval'}, 'stem_act must be'),
    ({'stages': [{**STAGE, 'type': 'lstm'}]}, 'type must be one of conv, fused, irb'), ({'stages': [{**STAGE, 'stride': 3}]}, 'stride must be'),
    ({'stages': [{**STAGE, 'filters': 0}]}, 'filters must be'), ({'stages': [{**STAGE, 'depth': 10 ** 6}]}, 'depth must be'),
    ({'stages': [{**STAGE, 'depth': 2.}]}, 'depth must be'), ({'stages': [{**STAGE, 'base_depth': 2}]}, 'base_depth must be'),
    ({'stages': [{**STAGE, 'kernels': {}}]}, 'kernels must be'), ({'stages': [{**STAGE, 'kernels': {'relu': [4]}}]}, 'kernels must be'),
    ({'stages': [{**STAGE, 'kernels': {'relu': [3, 3]}}]}, 'kernels must be'), ({'stages': [{**STAGE, 'kernels': [3]}]}, 'kernels must be'),
    ({'stages': [{**STAGE, 'se': []}]}, 'se must be'), ({'stages': [{**STAGE, 'se': [1, 0]}]}, 'se must be'),
    ({'stages': [{**STAGE, 'filter': 1}]}, "did you mean 'filters'"), ({'stages': [{'type': 'irb'}]}, 'it is missing'),
])
def test_refused(space, said):
    with pytest.raises(PrunetError) as caught:
        get_space(space)
    assert said in str(caught.value) and len(str(caught.value)) < 3000


@pytest.mark.parametrize('args', [{'width': 0}, {'width': -1}, {'width': 'x'}, {'depth': True}, {'depth': float('nan')}, {'width': 100}])
def test_refused_reductions(args):
    with pytest.raises(PrunetError, match=f'{next(iter(args))} must be a number above 0'):
        get_space('table1', **args)


def test_refused_skips():
    with pytest.raises(PrunetError, match="'residual', 'none' or 'all'"):
        space_size(table1(), skips='some')
