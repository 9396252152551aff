"""timm_width.latency.blocks: tables of blocks that are measured alone."""
import fnmatch
import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_width.cost import CostError, Macs
from timm_width.data import UsageError
from timm_width.factors import Factors
from timm_width.latency.blocks import block_tables, find_blocks
from timm_width.trace import trace

SHARED = Path(__file__).resolve().parents[2] / 'shared' / 'oracle'


def flops(module, shape) -> float:
    """A latency that adds up: MACs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(torch.zeros(1, *shape))
    return counter.get_total_flops() / 2


@cache
def problem(name: str, *groups: str):
    """A model, its space, and a grid of the groups that patterns name."""
    model = timm.create_model(name).eval()
    space = trace(model, (3, 32, 32))
    chosen = [g for g in space.searchable if not groups or any(fnmatch.fnmatch(g, p) for p in groups)]
    return model, space, {g: tuple(space.rounded(space[g], r * space[g].size, 8) for r in (0.5, 1, 1.5)) for g in chosen}


def networks(grid, count=10):
    rng = random.Random(0)
    return [{g: rng.choice(w) for g, w in grid.items()} for _ in range(count)]


CASES = {
    'one group in a block': ('resnet18', ('layer?.?.conv1',), ['layer?.?']),
    'residual blocks': ('resnet18', ('layer?.1.conv1',), []),
    'two groups in a block': ('resnet10t', ('layer4.0.conv?',), ['layer4.0', 'fc']),
    'inverted residuals': ('mobilenetv2_035', ('blocks.[1-5].[0-9].conv_pw',), ['blocks.[1-6].?']),
}


@pytest.mark.parametrize('case', CASES)
def test_a_latency_that_adds_up_is_measured_exactly(case):
    """MACs in the place of milliseconds."""
    name, groups, patterns = CASES[case]
    model, space, grid = problem(name, *groups)
    assert grid
    before = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    tables = block_tables(model, space, grid, find_blocks(space, grid, patterns), flops)
    for widths in networks(grid):
        assert tables(widths) == pytest.approx(Macs(space)(widths))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == before


def test_blocks_that_are_alike_are_measured_once():
    model, space, _ = problem('resnet18')
    asked = []

    def count(module, shape):
        asked.append(module)
        return flops(module, shape)

    grid = {'layer1.0.conv1': (32, 64), 'layer1.1.conv1': (32, 64)}
    block_tables(model, space, grid, find_blocks(space, grid, ['layer1.?']), count)
    assert len(asked) == 3  # the network, and one block at 32 and at 64


@pytest.mark.parametrize('patterns, message', [
    (['layer9.?'], "'layer9.\\?' fits no module"),
    (['layer1', 'layer1.0'], "'layer1.0' lies inside 'layer1'"),
])
def test_patterns_that_name_no_blocks_are_refused(patterns, message):
    _, space, grid = problem('resnet18')
    with pytest.raises(UsageError, match=message):
        find_blocks(space, grid, patterns)


def test_groups_that_blocks_do_not_hold_are_refused():
    _, space, grid = problem('resnet18')
    with pytest.raises(CostError, match="the width of 'layer1.0.conv1' changes the layer 'layer1.0.conv1', which is in no block"):
        find_blocks(space, {'layer1.0.conv1': (32, 64)}, ['layer1.1'])
    with pytest.raises(CostError, match=r"the block 'layer2' depends on \d+ searched groups"):
        find_blocks(space, grid, ['layer2'])
    with pytest.raises(UsageError, match='has no residual block'):
        find_blocks(*problem('vgg11')[1:])


@pytest.mark.parametrize('device', ['cpu', 'gpu'])
def test_published_tables_of_blocks_become_a_cost(device):
    """TF-NAS's: one table for each block by its hidden width, which grow with it, and a constant."""
    path = SHARED / f'tfnas_block_latency_{device}.json'
    if not path.is_file():
        pytest.skip(f'{path.name} is not there')
    found = json.loads(path.read_text())
    blocks = {name: table for name, table in found.items() if isinstance(table, dict) and name.startswith('MBInvertedResBlock')}
    assert len(blocks) > 10
    grid = {name: tuple(sorted(map(int, table))) for name, table in blocks.items()}
    unary = {name: np.array([max(table[str(w)], 0) for w in grid[name]]) for name, table in blocks.items()}
    factors = Factors(grid, 1., unary)
    low, high = ({n: w[i] for n, w in grid.items()} for i in (0, -1))
    assert factors(low) < factors(high) and all((np.diff(t) >= 0).all() for t in unary.values())
