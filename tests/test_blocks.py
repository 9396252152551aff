"""Tables of blocks that are measured alone: exact where a latency adds up, each kind once, interrupted and gone on with, refused
where something is missing."""
import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_width import cli
from timm_width.cost import CostError, Macs
from timm_width.data import UsageError
from timm_width.factors import Factors
from timm_width.latency import build
from timm_width.latency.block_bundle import read_blocks, write_plan
from timm_width.latency.block_fit import fit_blocks
from timm_width.latency.blocks import find_blocks, knots, refinement
from timm_width.latency.bundle import Order
from timm_width.latency.fit import space_of
from timm_width.latency.model import LatencyModel
from timm_width.latency.plan import Parts, make_plan
from timm_width.latency.runner.base import Backend
from timm_width.latency.runner.errors import RunnerError
from timm_width.latency.runner.main import measure_bundle
from timm_width.latency.runner.manifest import read_manifest
from timm_width.latency.runner.results import scan_results
from timm_width.latency.runner.timing import Timing
from timm_width.mixture import find_layers
from timm_width.policies.base import Choice
from timm_width.space import WidthError
from timm_width.trace import trace
from timm_width.twins import base_choice, plain_arguments, plain_tables, random_choice, trace_twin, twin_grid

SHARED = Path(__file__).resolve().parents[2] / 'shared' / 'oracle'
TINY = {'stem': 8, 'head': 16, 'granularity': 8, 'stages': [
    {'type': 'conv', 'filters': 8, 'stride': 1, 'depth': 1, 'kernels': {'relu': [3, 5]}},
    {'type': 'irb', 'filters': 16, 'stride': 2, 'depth': 3, 'base_depth': 2, 'kernels': {'relu': [3], 'silu': [3]}}]}
PRUNET = Order('prunet', grid='', blocks=[], img_size=32, num_classes=3, model_args={'space': TINY})


class Known(Backend):
    """Counts MACs in the place of milliseconds, and gives up after some."""
    precisions = ('fp32',)

    def __init__(self, patience: int = 10 ** 6, squared: bool = False):
        super().__init__('known')
        self.patience, self.squared, self.asked = patience, squared, 0

    def measure(self, model, batch=None, check=None, **loop) -> Timing:
        self.asked += 1
        if self.asked > self.patience:
            raise KeyboardInterrupt
        module, size = model
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.zeros(1, *size))
        ms = counter.get_total_flops() / 2e6
        return Timing.of([ms ** 2 if self.squared else ms] * 3)


@cache
def planned(order_text: str, samples: int = 4):
    return make_plan(Order(**json.loads(order_text)), samples, False)


def measured(folder: Path, order: Order, backend=None, samples: int = 4):
    """A bundle without files, and its fit by a backend that knows the answers."""
    plan = planned(json.dumps(vars(order)), samples)
    write_plan(plan, folder)
    manifest = read_manifest(folder)
    manifest = Parts(manifest.folder, manifest.fingerprint, manifest.data, manifest.configurations, plan)
    measure_bundle(manifest, backend or Known(), folder / 'results.jsonl')
    return plan, fit_blocks(manifest, scan_results(folder / 'results.jsonl', manifest), plan.network.space)


CASES = {
    'hidden groups': Order('resnet18', grid='prunode', blocks=[], knots=3, img_size=32),
    'coarse': Order('mobilenetv2_035', grid='0.5,1,1.5', blocks=[], img_size=32),
    'named blocks, two groups in one, which another reads': Order(
        'resnet10t', grid='0.5,1', fix=['conv1*', 'layer[12].*', 'layer4.0.conv2'], blocks=['layer3.0', 'layer4.0'], img_size=32),
    'two groups of a block': Order('resnet26', grid='0.5,1', blocks=[], img_size=32),
}


@pytest.mark.parametrize('case', CASES)
def test_a_latency_that_adds_up_is_measured_exactly(case, tmp_path):
    """At all widths, and without blocks that can be left out."""
    plan, fit = measured(tmp_path / 'b', CASES[case])
    assert fit.model.validation.nrmse < 1e-6 and fit.model.validation.networks == 4
    model, space, grid = plan.network
    assert set(grid) == set(fit.model.tables.grid)
    macs, cost, rng = Macs(space), fit.model.cost(space), random.Random(0)
    removable = [b.name for b in space.blocks if b.name in cost.blocks]
    for _ in range(5):
        widths = {g: rng.choice(w) for g, w in grid.items()}
        skips = [b for b in removable if rng.random() < 0.5]
        assert cost(widths, skips) == pytest.approx(macs(widths, skips) / 1e6)
        for block in list(cost.blocks)[:3]:
            assert cost.of(block, widths) == pytest.approx(macs.of(block, widths) / 1e6)


@pytest.mark.parametrize('case', ['hidden groups', 'coarse', 'two groups of a block'])
def test_all_blocks_that_prunode_weighs_are_measured(case):
    plan = planned(json.dumps(vars(CASES[case])))
    layers = find_layers(plan.network.model, plan.network.space, list(plan.network.grid))
    assert {t['block'] for t in plan.tables} == {path for layer in layers for path in layer.blocks} and len(layers) > 7
    assert {g for t in plan.tables for g in t['groups']} == set(plan.network.grid)


# -- a model whose layers are several blocks ---------------------------------------------------------------------------------


def test_all_blocks_of_a_twin_are_measured_and_add_up(tmp_path):
    plan, fit = measured(tmp_path / 'b', PRUNET)
    twin, space, grid = plan.network
    cost, rng = fit.model.cost(space), np.random.default_rng(1)
    assert fit.model.validation.nrmse < 1e-6 and fit.model.architecture == 'prunet_search'
    assert set(cost.blocks) == {f'{layer}.candidates.{name}' for layer, offered in twin.offers.items() for name in offered}
    for layer, offered in twin.offers.items():
        for name in offered:
            for hidden in twin.hidden_widths(layer, name) or [None]:
                group = twin.hidden_group(layer, name)
                widths = {group: hidden} if group else {}
                expected = twin.costs(layer, name, hidden, (3, 32, 32))[0]
                assert cost.of(f'{layer}.candidates.{name}', widths) == pytest.approx(expected / 1e6)
    for _ in range(4):
        choice = random_choice(twin, grid, rng)
        plain = timm.create_model('prunet', num_classes=3, **plain_arguments(twin, choice))
        assert cost(*choice) == pytest.approx(Macs(trace(plain, (3, 32, 32)))() / 1e6)


def test_alike_blocks_are_measured_once_and_others_not():
    """The same kernel with another activation is another block."""
    plan = planned(json.dumps(vars(PRUNET)))
    at = {t['block']: t['configurations'] for t in plan.tables}
    first, second, third = ([p for p in at if p.startswith(f'blocks.1.{i}.')] for i in range(3))
    assert [at[p] for p in second] == [at[p] for p in third] and len(second) == 4
    assert len({tuple(at[p]) for p in (*first, *second)}) == 8
    assert len(plan.configurations) == 5 + 2 + sum(len(at[p]) for p in (*first, *second))  # networks, convolutions


def test_a_base_network_costs_what_it_does_in_its_twin(tmp_path):
    plan, fit = measured(tmp_path / 'b', PRUNET)
    twin, space, grid = plan.network
    cost = fit.model.cost(space)
    base = timm.create_model('prunet', space=TINY, num_classes=3)
    plain = plain_tables(twin, cost, own := trace(base, (3, 32, 32)))
    assert plain() == pytest.approx(cost(*base_choice(twin))) == pytest.approx(Macs(own)() / 1e6)
    group = next(iter(plain.tables.grid))
    assert plain({group: 8}) == pytest.approx(Macs(own)({group: 8}) / 1e6)
    assert plain({}, ['blocks.1.1']) == pytest.approx(Macs(own)({}, ['blocks.1.1']) / 1e6)
    with pytest.raises(WidthError, match='nothing was measured'):
        plain({'conv_stem': 4})


@pytest.mark.parametrize('space', [TINY, 'table5', {**TINY, 'expansions': [3, 6]}], ids=['tiny', 'table5', 'expansions'])
def test_random_and_base_networks_of_a_twin_can_be_built(space):
    with torch.device('meta'):
        twin = timm.create_model('prunet_search', space=space)
    grid, rng, drawn = twin_grid(twin), np.random.default_rng(0), set()
    for choice in (base_choice(twin), *(random_choice(twin, grid, rng) for _ in range(10))):
        arguments = plain_arguments(twin, choice)
        drawn.add(len(arguments['layers']))
        with torch.device('meta'):
            timm.create_model('prunet', **arguments)
        assert all(width in grid[group] for group, width in choice.widths.items())
    assert len(drawn) > 1 and isinstance(choice, Choice)
    if space is TINY:
        with torch.device('meta'):
            base = timm.create_model('prunet', space=space)
        assert plain_arguments(twin, base_choice(twin))['layers'][1]['hidden'] == base.blocks[1][0].conv_pw.out_channels


# -- knots -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('count', [2, 3, 4, 7, 99, None])
def test_knots_are_spread_evenly_and_have_both_ends(count):
    widths = tuple(range(32, 32 * 25, 32))
    found = knots(widths, count)
    assert found[0] == 32 and found[-1] == widths[-1] and len(found) == min(count or 99, len(widths))
    gaps = np.diff(found)
    assert max(gaps) - min(gaps) <= 32 and knots((8,), count) == (8,)


def test_refinement_halves_the_gaps():
    assert refinement(9) == [0, 3, 2, 3, 1, 3, 2, 3, 0] and refinement(1) == [0] and refinement(2) == [0, 0]


def test_between_knots_it_is_linear_and_the_error_is_said(tmp_path):
    """MACs are linear in a hidden width: two knots say all. Their squares are not."""
    order = Order(**{**vars(PRUNET), 'knots': 2})
    plan, fit = measured(tmp_path / 'a', order)
    assert all(len(step) <= 2 for t in plan.tables for step in t['levels'])
    assert fit.model.validation.nrmse < 1e-6 and fit.model.about['interpolation']['worst'] < 1e-6
    for entry in plan.held:
        table = next(t for t in plan.tables if t['block'] == entry['block'])
        assert all(w not in step for w, step in zip(entry['widths'].values(), table['levels']))
    _, bent = measured(tmp_path / 'b', order, Known(squared=True))
    found = bent.model.about['interpolation']
    assert found['entries'] == len(plan.held) > 5 and 0.1 < found['mean'] <= found['worst']
    assert any('others of blocks are predicted within' in note for note in bent.notes)
    _, every = measured(tmp_path / 'c', PRUNET, Known(squared=True))
    assert every.model.about['interpolation'] == {}


def test_what_is_measured_by_then_can_be_used(tmp_path):
    """Ends first, then whole networks, then ever finer: stopped before the end, the others lie on lines between them."""
    plan, whole = measured(tmp_path / 'a', PRUNET)
    dues = [i for t in plan.tables for i in np.reshape(t['configurations'], -1)[[0, -1]]]
    networks = [n['configuration'] for n in plan.networks[1:]]
    assert max(dues) < min(networks) and plan.networks[0]['configuration'] == 0
    lines = (tmp_path / 'a' / 'results.jsonl').read_bytes().splitlines(keepends=True)
    manifest = read_manifest(tmp_path / 'a')

    def fit(count: int):
        (tmp_path / 'r.jsonl').write_bytes(b''.join([line for line in lines if b'"reference"' not in line][:count + 1]))
        return fit_blocks(manifest, scan_results(tmp_path / 'r.jsonl', manifest), plan.network.space)

    found = fit(max(networks) + 3)
    assert 'widths of blocks were not measured: they lie on lines' in found.notes[0] and found.model.validation.nrmse < 1e-6
    assert len(next(iter(found.model.tables.grid.values()))) < len(next(iter(whole.model.tables.grid.values())))
    with pytest.raises(UsageError, match='was not measured at its smallest and largest widths'):
        fit(max(dues) - 1)
    with pytest.raises(UsageError, match='1 whole networks were measured, and at least 2'):
        fit(min(networks) + 1)


# -- building one here -------------------------------------------------------------------------------------------------------


def test_a_killed_measurement_goes_on(tmp_path, monkeypatch):
    backends = [Known(patience=20), Known(), Known()]
    monkeypatch.setattr(build, '_Torch', lambda device: backends.pop(0))
    device, said = build.Device('torch', device='cpu', threads=1), []
    with pytest.raises(KeyboardInterrupt):
        build.build_block_model(PRUNET, device, tmp_path / 'b', 4, said.append)
    again = backends[0]
    fit = build.build_block_model(PRUNET, device, tmp_path / 'b', 4, said.append)
    count = len(planned(json.dumps(vars(PRUNET))).configurations)
    assert fit.model.validation.nrmse < 1e-6 and again.asked < count
    assert len(scan_results(tmp_path / 'b' / 'results.jsonl').rows) == count
    with pytest.raises(UsageError, match='holds networks of another'):
        build.build_block_model(Order(**{**vars(PRUNET), 'knots': 3}), device, tmp_path / 'b', 3, said.append)
    with pytest.raises(UsageError, match='--samples must be at least 2'):
        build.build_block_model(PRUNET, device, tmp_path / 'b', 1, said.append)


def test_a_bundle_of_blocks_is_measured_by_its_own_program(tmp_path, capsys):
    """One file for each kind, cut to the other widths."""
    for package in ('onnx', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(package, reason="needs the extra 'onnx'")
    from timm_width.latency.runner.main import main
    space = {**TINY, 'stages': [TINY['stages'][0], {**TINY['stages'][1], 'depth': 2, 'kernels': {'relu': [3]}, 'se': [True]}]}
    command = ['latency', 'export', 'prunet', '--model-kwargs', f'space={space}', '--num-classes', '3', '--img-size', '16', '--blocks',
               '--samples', '2', '--knots', '3', '--out', str(tmp_path / 'b')]
    assert cli.main(command) == 0
    assert '4 blocks of 7 kinds' in capsys.readouterr().out
    manifest = read_manifest(tmp_path / 'b')
    assert len(list((tmp_path / 'b').rglob('*.onnx'))) == len(manifest.parts) == len({c.part for c in manifest.configurations})
    assert main(['--backend', 'onnxruntime', '--threads', '1', '--runs', '2', '--seconds', '0'], tmp_path / 'b') == 0
    assert cli.main(['latency', 'fit', str(tmp_path / 'b'), '--out', str(tmp_path / 'm.json')]) == 0
    model = LatencyModel.load(tmp_path / 'm.json')
    with torch.device('meta'):
        space = trace_twin(timm.create_model('prunet_search', space=space, num_classes=3), (3, 16, 16))
    cost = model.cost(space)
    assert len(cost.blocks) == 4 and all(cost.of(name) > 0 for name in cost.blocks)
    assert model.validation.networks == 2 and model.about['interpolation']['entries'] > 0


# -- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('patterns, message', [
    (['layer9.?'], "'layer9.\\?' fits no module"),
    (['layer1', 'layer1.0'], "'layer1.0' lies inside 'layer1'"),
])
def test_patterns_that_name_no_blocks_are_refused(patterns, message):
    model = timm.create_model('resnet18')
    space = trace(model, (3, 32, 32))
    with pytest.raises(UsageError, match=message):
        find_blocks(model, space, {'layer1.0.conv1': (32, 64)}, patterns)


def test_groups_that_blocks_do_not_hold_are_refused():
    model = timm.create_model('resnet18')
    space = trace(model, (3, 32, 32))
    grid = {name: (g.size // 2, g.size) for name, g in space.searchable.items()}
    with pytest.raises(CostError, match="the width of 'layer1.0.conv1' changes the layer 'layer1.0.conv1', which is in no block"):
        find_blocks(model, space, {'layer1.0.conv1': (32, 64)}, ['layer1.1'])
    with pytest.raises(CostError, match=r"the block 'layer2' depends on \d+ searched groups"):
        find_blocks(model, space, grid, ['layer2'])
    vgg = timm.create_model('vgg11')
    with pytest.raises(UsageError, match='has no block with hidden channels of its own'):
        find_blocks(vgg, trace(vgg, (3, 32, 32)), {})


@pytest.mark.parametrize('flags, message', [
    (['resnet18', '--grid', '0.5,1', '--knots', '3'], '--knots is for --blocks'),
    (['resnet18'], '--grid is missing'),
    (['resnet18', '--blocks', '--knots', '1'], '--knots must be at least 2, not 1'),
    (['prunet', '--blocks', '--grid', '0.5,1'], '--grid has no meaning for prunet'),
    (['prunet', '--blocks', 'blocks.?.?'], '--blocks has no meaning for prunet'),
    (['prunet', '--blocks', '--fix', 'conv*'], '--fix has no meaning for prunet'),
    (['resnet18', '--blocks', '--samples', '1'], '--samples must be at least 2'),
])
def test_a_command_that_makes_no_sense_is_refused_in_one_line(flags, message, tmp_path, capsys):
    assert cli.main(['latency', 'measure', *flags, '--img-size', '32', '--backend', 'torch', '--device', 'cpu', '--out', str(tmp_path / 'm.json')]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1 and not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp('plan') / 'b'
    plan = planned(json.dumps(vars(PRUNET)))
    write_plan(plan, folder)
    assert space_of(read_manifest(folder)) == plan.network.space
    return json.loads((folder / 'manifest.json').read_text())


@pytest.mark.parametrize('path, value, message', [
    (('format',), 3, 'reads 1 and 2'),
    (('format',), True, 'reads 1 and 2'),
    (('parts',), [], 'parts must be a list'),
    (('parts', 0), 3, 'a part must have'),
    (('parts', 0, 'input_size'), [3, 0, 32], 'input_size'),
    (('parts', 0, 'input_size'), [3, 2 ** 20, 2 ** 20], 'too many'),
    (('parts', 5, 'grid'), {'conv_pw': [8, 8]}, 'grid must give'),
    (('parts', 0, 'files'), [{'file': '../x.onnx', 'sha256': ''}], 'files must name'),
    (('configurations', 0, 'part'), 999, 'must say its part'),
    (('configurations', 0, 'part'), True, 'must say its part'),
    (('configurations', 0, 'widths'), [8], 'is not on the grid'),
])
def test_a_broken_manifest_is_refused_by_the_target(written, path, value, message, tmp_path):
    write_changed(written, path, value, tmp_path)
    with pytest.raises(RunnerError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize('path, value, message', [
    (('tables',), None, 'no tables'),
    (('tables',), [], 'no tables, or no networks'),
    (('networks',), [], 'no tables, or no networks'),
    (('tables', 0, 'block'), 'blocks.9', 'a table of'),
    (('tables', 0, 'block'), 3, 'a table of'),
    (('tables', 3, 'groups'), ['nothing'], 'the groups of'),
    (('tables', 3, 'groups'), [['a']], 'the groups of'),
    (('tables', 3, 'levels'), [[8]], 'the widths of'),
    (('tables', 3, 'configurations'), [0], 'the places of'),
    (('tables', 3, 'configurations', 0), 10 ** 9, 'the places of'),
    (('networks', 0, 'widths'), {'a': 1}, 'the widths in networks'),
    (('networks', 0, 'skips'), ['conv_stem'], 'the skips in networks'),
    (('networks', 0, 'configuration'), -1, 'a place in networks'),
    (('held',), [{'block': 'x', 'widths': {}, 'configuration': 0}], 'a place in held'),
])
def test_a_broken_description_is_refused_by_the_fit(written, path, value, message, tmp_path):
    write_changed(written, path, value, tmp_path)
    manifest = read_manifest(tmp_path)
    with pytest.raises(UsageError, match=message) as error:
        read_blocks(manifest, planned(json.dumps(vars(PRUNET))).network.space)
    assert '\n' not in str(error.value)


def write_changed(written, path, value, folder):
    found = place = json.loads(json.dumps(written))
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / 'manifest.json').write_text(json.dumps(found))


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
