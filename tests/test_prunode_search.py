"""Searches by Prunode from the command line: sweeps, what they save, and the twin of all blocks that they learn on."""
import csv
import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_width
from timm_width import cli, engine, target
from timm_width.cost import Macs, Params
from timm_width.mixture import build_layers, find_layers
from timm_width.policies.base import Choice
from timm_width.policies.prunode import Prunode
from timm_width.problem import Budget
from timm_width.resize import resize
from timm_width.trace import trace
from timm_width.twins import ends, plain_arguments, trace_twin, twin_grid

from .test_prunet_search import random_choice
from .test_prunode import Planted

torch.set_num_threads(1)

SPACE = {  # two layers of a convolution, three of an inverted residual
    'stages': [{'type': 'conv', 'filters': 8, 'stride': 1, 'depth': 2, 'kernels': {'relu': [3, 5]}},
               {'type': 'irb', 'filters': 16, 'stride': 2, 'depth': 3, 'kernels': {'silu': [3, 5]}}],
    'stem': 8, 'head': 32, 'granularity': 8, 'max_expansion': 4}
SHORT = ['--epochs', '0', '--search-epochs', '4', '--img-size', '32', '-j', '0', '-b', '16', '--device', 'cpu', '--proxy', 'data=0.06',
         '--lr', '0.05', '--baselines', 'base', 'uniform']


def command(output, *more, model='prunet', policy='prunode', budget=('macs',)):
    kwargs = ['--model-kwargs', f'space={SPACE}'] if model == 'prunet' else []
    options = ['--prunode.arch_lr', '0.5'] if policy == 'prunode' else []
    return ['search', '--model', model, *kwargs, '--dataset', 'digits', '--policy', policy, '--budget', *budget, *SHORT, *options,
            '--output', str(output), *more]


SWEEP = ['--sweep', 'alpha=0.1,30', 'lam=0.4,0.85']


def rows(folder):
    with (folder / 'summary.csv').open() as file:
        return list(csv.DictReader(file))


def said(folder):
    return json.loads((folder / 'config.json').read_text())['timm_width']


@pytest.fixture(scope='module', autouse=True)
def quick():
    """Times that are measured, but not for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, 'measure_many', partial(target.measure_many, seconds=1e-4, attempts=1))
        yield


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs') / 'sweep'
    assert cli.main(command(folder, *SWEEP)) == 0
    return folder


@pytest.fixture(scope='module')
def found(swept):
    """The folders of the networks found, one for each alpha."""
    return sorted(p.parent for p in swept.glob('*/config.json'))


# -- sweeps ------------------------------------------------------------------------------------------------------------------


def test_a_sweep_finds_a_network_for_each_alpha(swept, found):
    """Of those of the other options, the one with the least search loss; a larger alpha finds a smaller network."""
    small, large = (said(f) for f in sorted(found, key=lambda f: -said(f)['options']['alpha']))
    assert (large['options']['alpha'], small['options']['alpha']) == (0.1, 30)
    assert small['costs']['macs'] < large['costs']['macs']
    for about in (small, large):
        alpha, lam = about['options']['alpha'], about['options']['lam']
        assert about['budget'] == f'macs alpha={alpha:g} lam={lam:g}'
        losses = {x: torch.load(swept / 'search' / f'prunode.alpha-{alpha:g}-lam-{x:g}.pth.tar')['extra']['search_loss']
                  for x in (0.4, 0.85)}
        [row] = [r for r in rows(swept) if (r['network'], r['budget']) == ('found', about['budget'])]
        assert losses[lam] == min(losses.values()) and float(row['search_loss']) == round(losses[lam], 4)
    assert all(r['search_loss'] == '' for r in rows(swept) if r['network'] != 'found')


def test_the_uniform_network_costs_as_much_where_there_is_one(swept):
    """What a search leaves out, no uniform width makes up for."""
    by = {(r['network'], r['budget'].partition(' ')[2].partition(' ')[0]): int(r['macs']) for r in rows(swept)}
    assert 0.8 * by['found', 'alpha=0.1'] < by['uniform', 'alpha=0.1'] <= by['found', 'alpha=0.1']
    assert ('uniform', 'alpha=30') not in by and by['found', 'alpha=30'] < by['base', '']


CHILD = """
import sys, timm, timm_width, torch
from safetensors.torch import load_file
for folder in sys.argv[1:]:
    model = timm.create_model(f'local-dir:{folder}').eval()
    model.load_state_dict(load_file(f'{folder}/weights.safetensors'))
    torch.manual_seed(0)
    with torch.no_grad():
        print(','.join(f'{v:.9g}' for v in model(torch.randn(2, 3, 32, 32)).flatten().tolist()))
"""


def test_configs_rebuild_the_networks_in_a_fresh_process(found):
    """With the logits of the saved models, and the costs that the table says."""
    from safetensors.torch import save_file
    expected = []
    for i, folder in enumerate(found):
        torch.manual_seed(i)
        model = timm.create_model(f'local-dir:{folder}').eval()
        save_file(model.state_dict(), folder / 'weights.safetensors')
        torch.manual_seed(0)
        with torch.no_grad():
            expected.append(model(torch.randn(2, 3, 32, 32)).flatten().tolist())
        costs, space = said(folder)['costs'], trace(model, (3, 32, 32))
        assert (costs['macs'], costs['params']) == (Macs(space)(), Params(space)())
        spec = timm_width.load_spec(folder)
        assert spec.architecture == 'prunet' and spec.shapes and set(spec.model_args) >= {'layers', 'space'}
    done = subprocess.run([sys.executable, '-c', CHILD, *map(str, found)], capture_output=True, text=True,
                          cwd=Path(timm_width.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert [[float(v) for v in line.split(',')] for line in done.stdout.split()] == [pytest.approx(e, rel=1e-6) for e in expected]


def test_a_network_found_trains(found, tmp_path, capsys):
    """By its widths, and from its folder; a shared network of mixtures has no weights for it."""
    flags = ['--dataset', 'digits', '--epochs', '1', '-b', '64', '--img-size', '32', '-j', '0', '--device', 'cpu', '--num-classes', '10',
             '--output', str(tmp_path)]
    small = min(found, key=lambda f: said(f)['costs']['macs'])
    assert cli.main(['train', '--model', 'prunet', '--widths', str(small), '--save-pretrained', str(tmp_path / 'a'), *flags]) == 0
    assert timm_width.load_spec(tmp_path / 'a').shapes == timm_width.load_spec(small).shapes
    weights = load_file(tmp_path / 'a' / 'model.safetensors')
    assert weights.keys() == timm.create_model(f'local-dir:{small}').state_dict().keys()
    capsys.readouterr()
    shared = next((small.parent / 'search').glob('prunode.alpha*'))
    for model in (['--model', 'prunet', '--widths', str(small)], ['--model', f'local-dir:{small}']):
        assert cli.main(['train', *model, '--inherit', str(shared), *flags]) == 2
        assert capsys.readouterr().err.count('\n') == 1


@cache
def point(folder):
    """A checkpoint: the network's weights, and what the policy knows."""
    state = torch.load(folder)
    return state['network'], state['extra']


def same(a, b):
    (weights, policy), (others, other) = point(a), point(b)
    return (weights.keys() == others.keys() and all(torch.equal(t, others[k]) for k, t in weights.items())
            and torch.equal(policy['theta'], other['theta']) and policy['layers'] == other['layers'])


def test_a_point_of_a_sweep_is_the_search_without_one(swept, tmp_path):
    """Bit for bit: what the points share does not depend on their options."""
    assert cli.main(command(tmp_path / 'x', '--prunode.alpha', '30', '--prunode.lam', '0.85', '--baselines', 'base')) == 0
    assert same(tmp_path / 'x' / 'search' / 'prunode.pth.tar', swept / 'search' / 'prunode.alpha-30-lam-0.85.pth.tar')
    assert timm_width.load_spec(tmp_path / 'x').provenance['budget'] == 'macs'


@pytest.mark.parametrize('saves', [1, 6])
def test_a_killed_sweep_goes_on(saves, swept, found, tmp_path, monkeypatch, capsys):
    """In its shared beginning, and in the middle of a later point: the same networks, bit for bit."""
    count, save = iter(range(saves)), engine.Training._save

    def killed(self, *args):
        save(self, *args)
        if next(count, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.Training, '_save', killed)
    if saves == 1:  # the warm-up is one epoch: before anything was saved
        next(count)
    assert cli.main(command(tmp_path / 'x', *SWEEP, '--baselines', 'base')) == 130
    monkeypatch.setattr(engine.Training, '_save', save)
    assert '--resume' in capsys.readouterr().err
    assert cli.main(['search', '--resume', str(tmp_path / 'x')]) == 0
    for file in (swept / 'search').glob('*.pth.tar'):
        assert same(file, tmp_path / 'x' / 'search' / file.name)
    for folder in found:
        assert said(folder)['options'] == said(tmp_path / 'x' / folder.name)['options']
        assert timm_width.load_spec(folder).model_args == timm_width.load_spec(tmp_path / 'x' / folder.name).model_args


# -- other models ------------------------------------------------------------------------------------------------------------


def test_any_model_is_searched_within_a_budget(tmp_path):
    """Its hidden widths, and the blocks that can be left out; a limit is filled by one factor."""
    assert cli.main(command(tmp_path / 'x', '--grid', 'multiples', '--width-divisor', '4', model='test_resnet',
                            budget=('macs=0.4x', 'params=0.5x'))) == 0
    base = trace(timm.create_model('test_resnet', num_classes=10), (3, 32, 32))
    for text in ('macs=0.4x', 'params=0.5x'):
        folder = tmp_path / 'x' / text.replace('=', '-')
        spec, budget = timm_width.load_spec(folder), Budget.parse(text, base)
        assert spec.architecture == 'test_resnet_width' and budget.met(spec.widths, spec.skips)
        assert budget.cost(spec.widths, spec.skips) > 0.8 * budget.limit
        model = timm.create_model(f'local-dir:{folder}')
        assert sum(p.numel() for p in model.parameters()) == said(folder)['costs']['params']


def test_the_baseline_of_table_3(tmp_path):
    """FBNet: several expansions of each block, all to the end, and the skip connection among them."""
    space = {**SPACE, 'expansions': [2, 4]}
    assert cli.main([*command(tmp_path / 'x', '--no-prunode.widths', '--prunode.threshold', 'none', '--prunode.skip', 'candidate'),
                     '--model-kwargs', f'space={space}']) == 0
    state = torch.load(tmp_path / 'x' / 'search' / 'prunode.pth.tar')['extra']
    assert [len(m['left']) + m['skip'] for m in state['layers']] == [3, 3, 8, 9, 9]
    layers = timm_width.load_spec(tmp_path / 'x').model_args['layers']
    assert all(layer.get('hidden', 16) in (16, 32, 64) for layer in layers)


# -- the twin ----------------------------------------------------------------------------------------------------------------


@cache
def twin():
    torch.manual_seed(0)
    model = timm.create_model('prunet_search', num_classes=10, space=SPACE).eval()
    return model, trace_twin(model, (3, 40, 32))


def choice_of(model, picked):
    """A choice as the policies make it, from layer -> (candidate, hidden width) or None."""
    widths, skips = {}, []
    for layer, offered in model.offers.items():
        skips += [f'{layer}.candidates.{c}' for c in offered if picked[layer] is None or c != picked[layer][0]]
        if picked[layer] is not None and (group := model.hidden_group(layer, picked[layer][0])):
            widths[group] = picked[layer][1]
    return Choice(widths, tuple(skips))


@pytest.mark.parametrize('seed', range(4))
def test_the_cost_of_a_choice_is_that_of_the_network_built(seed):
    model, space = twin()
    choice = choice_of(model, random_choice(model, np.random.default_rng(seed)))
    built = timm.create_model('prunet', num_classes=10, **plain_arguments(model, choice))
    own = trace(built, (3, 40, 32))
    assert Macs(space)(*choice) == Macs(own)() and Params(space)(*choice) == Params(own)() == sum(p.numel() for p in built.parameters())


def test_the_ends_are_the_cheapest_and_the_dearest():
    model, space = twin()
    small, large = ends(model, twin_grid(model), Macs(space))
    macs = [Macs(space)(*choice_of(model, random_choice(model, np.random.default_rng(s)))) for s in range(20)]
    assert Macs(space)(*small) <= min(macs) and max(macs) <= Macs(space)(*large)
    layers = plain_arguments(model, small)['layers']
    assert [(layer['stage'], layer.get('hidden')) for layer in layers] == [(2, 8)]  # what can be left out is


def test_masked_candidates_are_the_narrower_ones():
    """With and without squeeze-and-excitation, whose squeeze does not see what is masked."""
    model, space = (timm.create_model('prunet_search', num_classes=10, space=SPACE).double().eval(), twin()[1])
    for p in [*model.parameters(), *model.buffers()]:
        if p.ndim == 1:
            torch.nn.init.uniform_(p.data, 0.5, 1.5)
    grid, x = twin_grid(model), torch.randn(2, 3, 40, 32, dtype=torch.float64)
    narrow = resize(timm.create_model('prunet_search', num_classes=10, space=SPACE).double().eval(), space, {g: w[1] for g, w in grid.items()})
    for name, t in narrow.state_dict().items():
        t.copy_(model.state_dict()[name][tuple(slice(0, n) for n in t.shape)])
    with torch.no_grad():
        expected = narrow(x)
        for m in build_layers(model, space, find_layers(model, space, list(grid)), grid):
            m.weights = torch.ones(len(m.candidates), dtype=torch.float64)
            for c in m.candidates.values():
                if c.masks is not None:
                    c.masks.small, c.shares = 2, torch.tensor([1., 0.], dtype=torch.float64)
        torch.testing.assert_close(model(x), expected)


def test_a_planted_prunet_is_found():
    """One kernel, squeeze-and-excitation, half of the largest hidden width."""
    model, space = timm.create_model('prunet_search', num_classes=10, space=SPACE), twin()[1]
    policy = Prunode(space, [Budget.parse('macs', space)], twin_grid(model), Prunode.Options(alpha=0.01))
    policy.prepare(model, space)
    best = [next(i for i, name in enumerate(offered) if name in ('k5', 'k5_se') and (name == 'k5_se' or 'k5_se' not in offered))
            for offered in model.offers.values()]

    def lost(layer, number, share):
        return 0.3 * (number != best[layer]) + 2 * (share - 0.5) ** 2 * (layer > 1)

    for update in range(400):
        policy.train_step(Planted(policy, lost, update, 400))
        if update % 20 == 19:
            policy.epoch_end(update // 20)
    [choice] = policy.choose(None)
    layers = plain_arguments(twin()[0], choice)['layers']
    assert [layer['kernel'] for layer in layers] == [5] * 5
    for layer, c_in in zip(layers[2:], (8, 16, 16)):
        assert layer['se'] and abs(layer['hidden'] - 2 * c_in) <= 8
    assert all('hidden' not in layer for layer in layers[:2])


# -- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('arguments, message', [
    (['--sweep', 'alpha=0.1,x'], 'is not a sweep: write an option and its values'),
    (['--sweep', 'tau=1,2'], "prunode sweeps alpha, beta, lam, phi, t_final, arch_lr, mask_lr, not 'tau'"),
    (['--sweep', 'alpha=0.1,-1'], 'prunode.alpha must be 0 or more, not -1'),
    (['--sweep', 'lam=0.4,0.85', 'alpha=1,2'], 'write alpha=... first'),
    (['--sweep', 'alpha=1,2', 'beta=0.5,1'], 'write beta=... first, and no other such option beside it'),
    (['--sweep', 'alpha=1,2', '--budget', 'macs=0.9x'], '--sweep finds a network for each value: give one --budget without a limit'),
    (['--sweep', 'alpha=1,2', '--budget', 'macs', 'params'], 'give one --budget without a limit'),
    (['--budget', 'macs', 'params'], 'weighs one cost, and macs params are several'),
    (['--budget', 'latency'], 'a latency budget needs a latency model'),
    (['--model-ema'], '--model-ema cannot be used with the policy prunode: it removes parts of the network'),
    (['--grid', '0.5,1'], '--grid has no meaning for the blocks of prunet'),
    (['--prunode.threshold', 'square'], "prunode.threshold must be linear, constant, none, not 'square'"),
    (['--prunode.t_initial', '0.3'], 'prunode.t_initial 0.3 is above 1/4'),
    (['--grad-checkpointing'], '--grad-checkpointing'),
    (['--budget', 'macs=0.001x'], 'give a limit between'),
    (['--budget', 'macs=0.5x'], "budget 'macs=0.5x' is"),  # of uniform, whose smallest is larger
])
def test_what_cannot_work_is_one_line(arguments, message, tmp_path, capsys):
    given = command(tmp_path / 'x', *arguments)
    try:
        assert cli.main(given) == 2
    except SystemExit as e:  # an unknown flag
        assert e.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and len([line for line in error if 'error' in line or 'search:' in line]) == 1


@pytest.mark.parametrize('policy', ['autoslim', 'uniform', 'dmcp', 'prunode,uniform'])
def test_budgets_without_a_limit_are_for_a_policy_that_weighs_costs(policy, tmp_path, capsys):
    assert cli.main(command(tmp_path / 'x', policy=policy, model='test_resnet')) == 2
    error = capsys.readouterr().err
    assert 'has no limit, and' in error and '--budget macs=0.5x' in error and error.count('\n') == 1
    assert not (tmp_path / 'x').exists()
    assert cli.main(command(tmp_path / 'x', '--sweep', 'alpha=1,2', policy=policy, model='test_resnet', budget=('macs=0.5x',))) == 2
    assert 'cannot share the beginning of a training' in capsys.readouterr().err or policy == 'prunode,uniform'
