"""Searches from the command line to the saved model: what is written, what the policy may see, what is refused, what resumes."""
import ast
import csv
import dataclasses
import itertools
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

import timm_width
from timm_width import cli, comparison, data, engine, holdout, policies, problem, search, start, target
from timm_width.budget import Budget
from timm_width.cost import Macs, Params
from timm_width.grids import make_grid
from timm_width.policies.base import Choice, Policy, Score, uniform_widths

MODEL = 'test_resnet'
SHORT = ['--epochs', '1', '--search-epochs', '1', '--warmup-epochs', '0', '--device', 'cpu', '--img-size', '32', '-j', '0']
RESULTS = {'config.json', 'model.safetensors', 'args.yaml', 'summary.csv', 'search'}
BUDGET = ['--budget', 'macs=0.5x', '--width-divisor', '4']


def command(images, output, *more, policy='random'):
    """A search of a second or two on the images, a folder or the name of a dataset."""
    where = ['--dataset', images] if images == 'digits' else ['--data-dir', str(images), '-b', '8']
    options = ['--random.samples', '2'] if policy == 'random' else []
    return ['search', '--model', MODEL, *where, '--policy', policy, *options, *BUDGET, *SHORT, '--output', str(output), *more]


def slimming(images, output, *more):
    """A search with a shared network and few scores."""
    fixed = [a for pattern in ('conv1.0', 'layer2*', 'layer3.0.conv[12]', 'layer4*') for a in ('--fix', pattern)]
    return command(images, output, '--grid', '0.25,0.5,1', *fixed, *more, policy='autoslim')


def rows(folder):
    with (folder / 'summary.csv').open() as file:
        return list(csv.DictReader(file))


def by_name(folder):
    return {row['network']: row for row in rows(folder)}


def said(folder):
    return json.loads((folder / 'config.json').read_text())['timm_width']


def without_times(folder):
    """The table, but for what no two runs measure alike."""
    return [{k: v for k, v in row.items() if not k.startswith('latency')} for row in rows(folder)]


def parsed(arguments):
    return search.parse(arguments[1:])


def base_space(size=32, classes=3):
    return timm_width.trace(timm.create_model(MODEL, num_classes=classes), (3, size, size))


@pytest.fixture(scope='module', autouse=True)
def quick():
    """Times that are measured, but not for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, 'measure_many', partial(target.measure_many, seconds=1e-4, attempts=1))
        yield


# -- what is written ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def digits_run(tmp_path_factory):
    """AutoSlim, end to end."""
    folder = tmp_path_factory.mktemp('runs') / 'new' / 'digits'
    assert cli.main(slimming('digits', folder)) == 0
    return folder


def test_autoslim_on_digits_gives_a_model_that_timm_rebuilds(digits_run):
    assert {f.name for f in digits_run.iterdir()} == RESULTS
    model = timm.create_model(f'local-dir:{digits_run}', pretrained=True)
    space = timm_width.trace(model, (3, 32, 32))
    found = by_name(digits_run)
    assert list(found) == ['base', 'uniform', 'found']
    assert int(found['found']['macs']) == Macs(space)()
    assert int(found['found']['params']) == Params(space)() == sum(p.numel() for p in model.parameters())
    base = base_space(classes=10)
    budget = Budget.parse('macs=0.5x', base)
    spec = timm_width.load_spec(digits_run)
    assert budget.met(spec.widths) and Macs(base)(spec.widths) == Macs(space)()
    assert int(found['uniform']['macs']) <= budget.limit and int(found['base']['macs']) == Macs(base)()
    assert all(float(row['latency_ms']) > 0 <= float(row['latency_spread']) and row['top1_std'] == '' for row in found.values())


def test_saved_weights_have_the_accuracy_of_the_table(digits_run):
    args, _ = parsed(slimming('digits', digits_run))
    model = timm.create_model(f'local-dir:{digits_run}', pretrained=True)
    view = data.View(data.open_splits(args).validation)
    batches = data.loader(view, args, engine.data_config(args, model), training=False)
    assert round(engine.top1(model, batches, args), 2) == float(by_name(digits_run)['found']['top1'])


def test_provenance_says_how_it_was_found(digits_run):
    found, table = said(digits_run), by_name(digits_run)
    assert (found['policy'], found['options']['passes'], found['budget'], found['seed']) == ('autoslim', 4, 'macs=0.5x', 42)
    macs = int(table['found']['search_macs'])
    assert (found['search'], found['train']) == ({'epochs': 1, 'holdout': 0.1, 'proxy': '', 'macs': macs}, {'epochs': 1})
    assert macs > 3 * 1284 * Macs(base_space(classes=10))() and table['uniform']['search_macs'] == '0'  # one pass of the largest alone
    assert found['costs']['macs'] == int(table['found']['macs'])
    assert found['costs']['latency_ms']['ms'] == float(table['found']['latency_ms']) and found['costs']['latency_ms']['device']
    assert found['top1'] == float(table['found']['top1'])
    assert {k: v['top1'] for k, v in found['baseline'].items()} == {k: float(table[k]['top1']) for k in ('base', 'uniform')}


def test_searched_model_trains(digits_run, tmp_path, capsys):
    """From the folder of a search, and from the channels of the network that it shared."""
    shared = ['--model', MODEL, '--widths', str(digits_run), '--inherit', str(digits_run / 'search' / 'autoslim.pth.tar')]
    for name, begin in {'scratch': ['--model', f'local-dir:{digits_run}'], 'inherited': shared}.items():
        output = tmp_path / name
        assert cli.main(['train', *begin, '--dataset', 'digits', *SHORT[:2], *SHORT[4:], '--output', str(tmp_path), '--experiment',
                         'x' + name, '--save-pretrained', str(output), '--num-classes', '10']) == 0
        assert 'top1' in capsys.readouterr().out
        spec, old = timm_width.load_spec(output), timm_width.load_spec(digits_run)
        trained = ('train', 'baseline', 'top1', 'inherited', 'data')  # of these weights, not of those of the search
        assert spec.widths == old.widths and spec.provenance['train'] == {'epochs': 1}
        assert {k: v for k, v in spec.provenance.items() if k not in trained} == {
            k: v for k, v in old.provenance.items() if k not in trained}
        timm.create_model(f'local-dir:{output}', pretrained=True)


def test_a_search_on_images_with_labels(tmp_path, capsys):
    """Each of several properties of the digits, true or false; networks are chosen and compared by mean average precision."""
    assert cli.main(['search', '--dataset', 'digits', '--task', 'multilabel', '--model', MODEL, '--policy', 'autoslim', *BUDGET, *SHORT,
                     '--lr', '0.1', '--baselines', 'uniform', '--proxy', 'data=0.5', '--output', str(tmp_path / 'x')]) == 0
    assert 'mAP %' in capsys.readouterr().out
    found = said(tmp_path / 'x')
    assert 50 < found['map'] <= 100 and 'top1' not in found and set(found['baseline']) == {'uniform'}
    assert timm.create_model(f'local-dir:{tmp_path}/x', pretrained=True).num_classes == 5
    assert yaml.safe_load((tmp_path / 'x' / 'args.yaml').read_text())['smoothing'] == 0
    assert cli.main(['search', '--resume', str(tmp_path / 'x'), '--epochs', '2']) == 0


def test_same_seed_same_table_another_seed_another_network(image_folder, tmp_path):
    for name, seed in (('a', '1'), ('b', '1'), ('c', '2')):
        assert cli.main(command(image_folder, tmp_path / name, '--seed', seed)) == 0
    a, b, c = (without_times(tmp_path / name) for name in 'abc')
    assert a == b != c
    widths = [timm_width.load_spec(tmp_path / name).widths for name in 'abc']
    assert widths[0] == widths[1] != widths[2]
    weights = [load_file(tmp_path / name / 'model.safetensors') for name in 'ab']
    assert all(torch.equal(w, weights[1][k]) for k, w in weights[0].items())


def test_uniform_policy_is_the_uniform_row(image_folder, tmp_path, capsys):
    refused(command(image_folder, tmp_path / 'x', '--random.samples', '2', policy='uniform'), capsys, 'random.samples')
    assert cli.main(command(image_folder, tmp_path / 'x', policy='uniform')) == 0
    found, uniform = (dict(by_name(tmp_path / 'x')[n], network='', latency_ms='', latency_spread='') for n in ('found', 'uniform'))
    assert found == uniform


def test_overwrite_replaces_the_results_and_nothing_else(image_folder, tmp_path):
    folder = tmp_path / 'x'
    (folder / 'search').mkdir(parents=True)
    (folder / 'notes.txt').write_text('mine')
    (folder / 'config.json').write_text('old')
    (folder / 'search' / 'autoslim.pth.tar').write_text('old')
    assert cli.main(slimming(image_folder, folder)) == 2
    assert (folder / 'config.json').read_text() == 'old'
    assert cli.main(slimming(image_folder, folder, '--overwrite')) == 0
    assert (folder / 'notes.txt').read_text() == 'mine' and timm_width.load_spec(folder).widths
    assert {f.name for f in folder.iterdir()} == {*RESULTS, 'notes.txt'}


ARGS_YAML = {  # what a folder may hold that is written over
    'several budgets': "policy: autoslim\nbudget: ['macs=0.5x', 'params=0.6x']\n",
    'one text': 'policy: autoslim\nbudget: macs=0.5x\n',  # as the first version wrote it
    'other folders': "policy: autoslim\nbudget: ['.', '..', '../y', '', mine, 3, null]\n",
    'no list': 'policy: autoslim\nbudget: 3\n',
    'of a training': 'model: resnet18\n',
    'junk': '{[',
}


@pytest.mark.parametrize('name', ARGS_YAML)
def test_overwrite_removes_the_folders_of_an_earlier_search_and_no_others(name, image_folder, tmp_path):
    """Whatever its args.yaml says."""
    folder = tmp_path / 'x'
    for f in ('x/macs-0.5x', 'x/params-0.6x', 'x/mine', 'y'):
        (tmp_path / f).mkdir(parents=True)
        (tmp_path / f / 'config.json').write_text('{}')
    (folder / 'args.yaml').write_text(ARGS_YAML[name])
    assert cli.main(command(image_folder, folder, '--epochs', '0', '--overwrite', policy='uniform')) == 0
    left = {f.name for f in folder.iterdir() if f.is_dir()}
    assert left - {'search'} == ({'mine'} if name == 'several budgets' else {'macs-0.5x', 'params-0.6x', 'mine'})
    assert (tmp_path / 'y' / 'config.json').exists() and (folder / 'mine' / 'config.json').exists()
    assert timm_width.load_spec(folder).widths


def test_several_budgets_give_a_folder_each(image_folder, tmp_path, capsys):
    """Each rebuilds, meets its own budget, and knows the baselines of its own budget alone."""
    texts = ['macs=0.5x', 'params=0.6x', 'macs=1.5M']
    assert cli.main(slimming(image_folder, tmp_path / 'x', '--budget', *texts)) == 0
    assert {f.name for f in (tmp_path / 'x').iterdir()} == {'macs-0.5x', 'params-0.6x', 'macs-1.5M', 'args.yaml', 'summary.csv', 'search'}
    base, table = base_space(), rows(tmp_path / 'x')
    assert [(r['network'], r['budget']) for r in table] == [('base', ''), *((n, t) for t in texts for n in ('uniform', 'found'))]
    out = capsys.readouterr().out
    found = []
    for text in texts:
        folder = tmp_path / 'x' / text.replace('=', '-')
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
        spec = timm_width.load_spec(folder)
        found.append(spec.widths)
        assert Budget.parse(text, base).met(spec.widths)
        row, = (r for r in table if (r['network'], r['budget']) == ('found', text))
        assert int(row['params']) == sum(p.numel() for p in model.parameters())
        about = said(folder)
        assert about['budget'] == text and about['top1'] == float(row['top1'])
        assert {n: r['budget'] for n, r in about['baseline'].items()} == {'base': '', 'uniform': text}
        assert f'found {text} ' in out and f'uniform {text} ' in out
    assert found[0] != found[1] != found[2] != found[0]


def test_seeds_give_mean_and_standard_deviation(image_folder, tmp_path, monkeypatch, capsys):
    """Every network is trained under every seed, from other weights; the saved ones are the first seed's."""
    answers, trained = iter([10., 20., 40., 50., 80., 20.]), []

    def fake(model, batches, args):
        trained.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(answers)

    monkeypatch.setattr(comparison, 'top1', fake)
    assert cli.main(command(image_folder, tmp_path / 'x', '--seeds', '2')) == 0
    table = by_name(tmp_path / 'x')  # what was found is trained first
    expected = {'found': (10, 50), 'base': (20, 80), 'uniform': (40, 20)}
    for name, tops in expected.items():
        assert float(table[name]['top1']) == np.mean(tops)
        assert float(table[name]['top1_std']) == round(np.std(tops, ddof=1), 2)
    assert '30.00 ± 28.28' in capsys.readouterr().out
    saved = load_file(tmp_path / 'x' / 'model.safetensors')
    assert all(torch.equal(w, trained[0][k]) for k, w in saved.items())
    assert trained[0].keys() == trained[3].keys() and not torch.equal(trained[0]['fc.weight'], trained[3]['fc.weight'])
    assert said(tmp_path / 'x')['top1'] == 30 and len(trained) == 6


@pytest.mark.parametrize('names', [['base'], ['uniform'], ['uniform', 'random', 'base']])
def test_baselines_are_what_the_found_network_is_set_beside(names, image_folder, tmp_path):
    """Base first, then the others as given; each within the budget, on the grid."""
    more = ['--random.samples', '1'] if 'random' in names else []
    assert cli.main(slimming(image_folder, tmp_path / 'x', '--baselines', *names, *more)) == 0
    table = rows(tmp_path / 'x')
    assert [r['network'] for r in table] == ['base'] * ('base' in names) + [n for n in names if n != 'base'] + ['found']
    limit = Budget.parse('macs=0.5x', base_space()).limit
    assert all(int(r['macs']) <= limit for r in table if r['network'] != 'base')
    assert said(tmp_path / 'x')['baseline'].keys() == set(names)


def test_a_policy_that_is_its_own_baseline_is_trained_once(image_folder, tmp_path):
    assert cli.main(command(image_folder, tmp_path / 'x', '--baselines', 'random')) == 0
    random, found = (dict(r, network='', latency_ms='', latency_spread='') for r in rows(tmp_path / 'x'))
    assert random == found
    lines = (tmp_path / 'x' / 'search' / 'results.jsonl').read_text().splitlines()
    assert len(lines) == 1


def test_no_epochs_give_configs_without_training(image_folder, tmp_path, monkeypatch, capsys):
    """The policy learns; nothing is trained on all images, no validation image is read, and no weights are saved."""
    monkeypatch.setattr(comparison, 'top1', None)
    assert cli.main(slimming(image_folder, tmp_path / 'x', '--epochs', '0', '--budget', 'macs=0.5x', 'macs=0.4x')) == 0
    for name in ('macs-0.5x', 'macs-0.4x'):
        assert {f.name for f in (tmp_path / 'x' / name).iterdir()} == {'config.json'}
        model = timm.create_model(f'local-dir:{tmp_path / "x" / name}')
        assert Macs(timm_width.trace(model, (3, 32, 32)))() == said(tmp_path / 'x' / name)['costs']['macs']
    table = rows(tmp_path / 'x')
    assert len(table) == 5 and all('top1' not in row and float(row['latency_ms']) > 0 for row in table)
    assert not list((tmp_path / 'x' / 'search').glob('results*'))
    out = capsys.readouterr().out
    assert 'top-1' not in out and 'pretrained=True' not in out and 'local-dir:' in out


def test_grid_flags_are_followed_and_stored(image_folder, tmp_path):
    """--grid, --width-*, --fix and --search-se decide the grid, which is in the config and on which the answer lies."""
    flags = ['--model', 'test_efficientnet', '--epochs', '0', '--grid', 'aows:5', '--width-min', '0.5', '--width-max', '1',
             '--width-divisor', '4', '--fix', 'conv_*', '--fix', 'blocks.1.*', '--budget', 'macs=0.7x']
    grids = {}
    for name, more in (('without', []), ('with', ['--search-se'])):
        assert cli.main(command(image_folder, tmp_path / name, *flags, *more, policy='uniform')) == 0
        grids[name] = said(tmp_path / name)['grid']
        assert grids[name].pop('rule') == 'aows:5'
        widths = timm_width.load_spec(tmp_path / name).widths
        assert widths and all(w in grids[name][g] for g, w in widths.items())
    space = timm_width.trace(timm.create_model('test_efficientnet', num_classes=3), (3, 32, 32))
    expected = make_grid(space, 'aows:5', 0.5, 1., 4, ['conv_*', 'blocks.1.*'])
    assert grids['with'] == {g: list(w) for g, w in expected.items()}
    squeezes = {'blocks.3.0.se.conv_reduce', 'blocks.4.0.se.conv_reduce'}
    assert grids['without'] == {g: w for g, w in grids['with'].items() if g not in squeezes}
    assert len(grids['with']) - len(grids['without']) == 2 and not [g for g in grids['with'] if g.startswith(('conv_', 'blocks.1.'))]
    assert grids['with']['blocks.0.0.conv'] == [8, 12, 16]


# -- what the policy sees ----------------------------------------------------------------------------------------------------


class Watched(torch.utils.data.Dataset):
    """A dataset that notes which images are read."""

    def __init__(self, images):
        self.images, self.read = images, set()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.read.add(int(index))
        return self.images[index]


class Sharing(Policy):
    """Trains a shared network, and asks for every kind of score."""

    def train_step(self, step):
        step.backward(step.loss(step.forward(self.largest)))

    def choose(self, evaluate):
        widths = uniform_widths(self.space, self.budgets[0], self.grid)
        for statistics in ('running', 'batch', 'recalibrated'):
            evaluate(widths, statistics=statistics)
        evaluate.alone(widths)
        return [Choice(widths)]


def test_nothing_but_the_policys_part_of_the_training_images_is_read_before_the_choice(image_folder, tmp_path, monkeypatch):
    """Networks train on what is not held out, scores are of the holdout, and the validation images wait for the table."""
    args, _ = parsed(command(image_folder, tmp_path / 'x', '--search-holdout', '0.25'))
    splits = data.open_splits(args)
    train, validation = Watched(splits.train), Watched(splits.validation)
    monkeypatch.setattr(problem, 'open_splits', lambda args: data.Splits(train, validation, splits.targets, splits.num_classes))
    kept, held = data.split_holdout(splits.targets, 0.25, args.seed)
    log = []

    def seen(what, function):
        def wrapped(*a, **k):
            train.read.clear()
            out = function(*a, **k)
            log.append((what, set(train.read), bool(validation.read)))
            return out
        return wrapped

    monkeypatch.setattr(engine.Training, '_run_epoch', seen('epoch', engine.Training._run_epoch))
    monkeypatch.setattr(holdout.Holdout, '_holdout', seen('score', holdout.Holdout._holdout))
    monkeypatch.setattr(holdout.Holdout, '_calibration_batches', seen('calibrate', holdout.Holdout._calibration_batches))
    monkeypatch.setattr(search, 'save_found', seen('chosen', search.save_found))
    args.policy = 'mine'
    search.search(args, {'mine': Sharing, 'uniform': policies.load('uniform')})
    names = [what for what, _, _ in log]
    before, after = log[:names.index('chosen')], log[names.index('chosen') + 1:]
    assert [what for what, _, _ in before] == ['epoch', 'score', 'score', 'calibrate', 'score', 'epoch', 'score']
    for what, read, validated in before:
        assert not validated
        assert read <= set(held) if what == 'score' else read <= set(kept)
    assert before[0][1] and before[1][1] == set(held) and before[3][1] and before[5][1]
    assert [what for what, _, _ in after] == ['epoch'] * 2  # found is uniform here, and trained once
    assert set.union(*(read for _, read, _ in after)) & set(held)
    assert len(validation.read) == len(splits.validation)


def test_shuffled_validation_labels_change_no_width(tmp_path, monkeypatch):
    """The search cannot see them: what it finds is the same to the last channel, only the table differs."""
    def part(args, shuffle=False):
        """Some of the digits: 300 to train."""
        splits = data.open_splits(args)
        train, images = splits.train, splits.validation
        targets = np.random.default_rng(0).permutation(images.targets) if shuffle else images.targets
        assert ((targets != images.targets).mean() > 0.8) == shuffle
        return dataclasses.replace(splits, train=data.Digits(train.pixels[:300], train.targets[:300]), targets=splits.targets[:300],
                                   validation=data.Digits(images.pixels, targets))

    for name, shuffle in (('a', False), ('b', True)):
        monkeypatch.setattr(problem, 'open_splits', partial(part, shuffle=shuffle))
        assert cli.main(slimming('digits', tmp_path / name, '--budget', 'macs=0.5x', 'macs=0.4x')) == 0
    for folder in ('macs-0.5x', 'macs-0.4x'):
        assert timm_width.load_spec(tmp_path / 'a' / folder).widths == timm_width.load_spec(tmp_path / 'b' / folder).widths
    costs, tops = ([[row[k] for k in keys] for name in 'ab' for row in rows(tmp_path / name)]
                   for keys in (('network', 'budget', 'macs', 'params'), ('top1',)))
    assert costs[:5] == costs[5:] and tops[:5] != tops[5:]


def test_proxy_makes_the_search_cheaper_and_the_costs_stay(image_folder, tmp_path, monkeypatch):
    """The policy learns on smaller images, of fewer classes, and fewer of them; it chooses within the real costs."""
    seen = {'steps': [], 'scored': [], 'costs': None}

    class Looking(Sharing):
        def prepare(self, model, space):
            seen['space'] = space
            return super().prepare(model, space)

        def train_step(self, step):
            seen['steps'].append((step.images.shape[-1], step.targets.tolist()))
            logits = step.forward(self.largest)
            seen['outputs'] = logits.shape[1]
            step.backward(step.loss(logits))

        def choose(self, evaluate):
            seen['costs'] = [b.limit for b in self.budgets], Macs(self.space)(), self.space.input_size
            return super().choose(evaluate)

    def scored(network, batches, *a, **k):
        batches = list(batches)
        seen['scored'].append([(x.shape[-1], y.tolist()) for x, y in batches])
        return engine.score(network, batches, *a, **k)

    monkeypatch.setattr(holdout, 'score', scored)
    args, _ = parsed(command(image_folder, tmp_path / 'x', '--search-holdout', '0.25', '--proxy', 'resolution=16,data=0.5,classes=2',
                             '-b', '4', '--img-size', '48', '--epochs', '0'))
    args.policy = 'mine'
    search.search(args, {'mine': Looking, 'uniform': policies.load('uniform')})
    targets = [t for _, batch in seen['steps'][:2] for t in batch]
    assert {side for side, _ in seen['steps']} == {16} and len(seen['steps']) == 2  # half of 9 of each class: 8 images
    assert set(targets) == {0, 1} and seen['outputs'] == 2 and len(targets) == 8
    for batches in seen['scored']:
        assert {side for side, _ in batches} == {16}
        assert sorted(t for _, batch in batches for t in batch) == [0] * 3 + [1] * 3  # all of the holdout
    real = base_space(48)
    assert seen['costs'] == ([Budget.parse('macs=0.5x', real).limit], Macs(real)(), (3, 48, 48))
    assert seen['space'].input_size == (3, 16, 16)
    assert said(tmp_path / 'x')['search']['proxy'] == 'resolution=16,data=0.5,classes=2'
    spec = timm_width.load_spec(tmp_path / 'x')
    assert int(by_name(tmp_path / 'x')['found']['macs']) == Macs(real)(spec.widths)
    assert timm.create_model(f'local-dir:{tmp_path / "x"}').num_classes == 3


def test_proxy_of_everything_is_no_proxy(image_folder, tmp_path):
    args, _ = parsed(command(image_folder, tmp_path / 'x', '--proxy', 'data=1,resolution=32,classes=3'))
    args.proxy, proxied = '', args.proxy
    made = problem.make_problem(args, {'random': 'multiples'})['random']
    plain = problem.learning_problem(made)
    args.proxy = proxied
    full = problem.learning_problem(made)
    for part in ('train', 'held'):
        assert sorted(getattr(plain, part).indices) == sorted(getattr(full, part).indices)
    assert plain.space == full.space


@pytest.mark.parametrize('fraction', [0.1, 0.5])
def test_holdout_is_seeded_disjoint_and_balanced(fraction):
    targets = np.random.default_rng(0).integers(0, 7, 1000)
    kept, held = data.split_holdout(targets, fraction, 3)
    assert not set(kept) & set(held) and len(kept) + len(held) == 1000
    share = np.bincount(targets[held]) / np.bincount(targets)
    assert np.abs(share - fraction).max() < 0.01
    assert (held == data.split_holdout(targets, fraction, 3)[1]).all()
    assert (held != data.split_holdout(targets, fraction, 4)[1]).any()
    assert len(data.split_holdout(np.array([0, 1, 1, 2]), fraction, 0)[1]) == 1  # one class has two images


def test_shrunk_images_are_seeded_balanced_and_at_least_one_of_each_class():
    targets = np.repeat(np.arange(5), [100, 100, 50, 10, 2])
    indices = np.flatnonzero(np.arange(len(targets)) % 2)  # half of each
    kept = data.shrink(targets, indices, 0.2, [0, 2, 4], 1)
    assert np.bincount(targets[kept]).tolist() == [10, 0, 5, 0, 1] and set(kept) <= set(indices)
    assert (kept == data.shrink(targets, indices, 0.2, [0, 2, 4], 1)).all()
    assert (kept != data.shrink(targets, indices, 0.2, [0, 2, 4], 2)).any()


def test_digits_splits_are_the_same_for_every_seed(tmp_path):
    splits = [data.open_splits(parsed(command('digits', tmp_path, '--seed', s))[0]) for s in '12']
    assert len(splits[0].train) + len(splits[0].validation) == 1797
    assert (splits[0].targets == splits[1].targets).all()
    assert np.bincount(splits[0].validation.targets).min() >= 34


# -- policies ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def space():
    return timm_width.trace(timm.create_model('mobilenetv2_100'), (3, 96, 96))


class Scores:
    """`evaluate` from a formula; notes what it was asked."""

    def __init__(self):
        self.asked = []

    def alone(self, widths, skips=()):
        self.asked.append((sum(w * sum(g.encode()) % 97 for g, w in widths.items()), dict(widths)))
        return Score(self.asked[-1][0], 0.)


@pytest.mark.parametrize('texts', [['macs=0.5x', 'macs=0.9x'], ['params=0.6x']])
@pytest.mark.parametrize('name', ['uniform', 'random'])
def test_policies_answer_on_the_grid_within_the_budgets(space, name, texts):
    grid, budgets = make_grid(space, low=0.1, high=1.5, fix=['conv_head']), [Budget.parse(t, space) for t in texts]
    answers = []
    for seed in (1, 1, 2):
        scores = Scores()
        answers.append(policies.load(name)(space, budgets, grid, seed=seed).choose(scores))
        for i, ((widths, skips), budget) in enumerate(zip(answers[-1], budgets, strict=True)):
            assert not skips and set(widths) == set(grid)
            assert all(w in grid[g] for g, w in widths.items()) and budget.met(widths)
            if name == 'random':
                asked = scores.asked[20 * i:20 * (i + 1)]
                assert all(0.95 * budget.limit <= budget.cost(w) <= budget.limit for _, w in asked)
                assert widths == max(asked, key=lambda s: s[0])[1] and len(scores.asked) == 20 * len(budgets)
    assert answers[0] == answers[1] and (name == 'uniform' or answers[0] != answers[2])


def test_uniform_is_the_largest_factor(space):
    grid, budget = make_grid(space), Budget.parse('macs=0.5x', space)
    widths = uniform_widths(space, budget, grid)
    ratios = [w / space[g].size for g, w in widths.items() if space[g].size >= 64]
    assert max(ratios) - min(ratios) < 0.2
    more = {g: grid[g][min(grid[g].index(w) + 1, len(grid[g]) - 1)] for g, w in widths.items()}
    assert not budget.met(more)


def test_random_draws_what_a_small_grid_holds(space):
    name, widths = next(iter(make_grid(space, divisor=1).items()))
    budget = Budget.parse('macs=1x', space)
    policy = policies.load('random')(space, [budget], {name: widths[-3:]})
    found = policy.samples(budget)
    assert 1 <= len(found) <= 3 and all(found.count(w) == 1 for w in found)


def test_policies_know_neither_timm_nor_the_engine_nor_one_another():
    for path in Path(policies.__path__[0]).glob('*.py'):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        names |= {'.' * n.level + (n.module or '') for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not [n for n in names if n.split('.')[0] in ('timm', 'torchvision')]
        assert {n for n in names if n.startswith('.')} <= {
            '.base', '..assignment', '..bins', '..budget', '..cost', '..elimination', '..factors', '..gating', '..markov', '..masking',
            '..mixture', '..moving', '..solve', '..space', '..stages', '..supernet'}, path


def test_policies_are_found_without_entry_points(monkeypatch):
    monkeypatch.setattr(policies, 'entry_points', lambda **_: [])
    assert set(policies.names()) == {'aows', 'autoslim', 'cafenet', 'dmcp', 'greedy', 'morphnet', 'ows', 'prunode', 'random', 'uniform'}
    assert {name: policies.load(name).__name__ for name in ('uniform', 'greedy', 'ows', 'aows')} == {
        'uniform': 'Uniform', 'greedy': 'Greedy', 'ows': 'OWS', 'aows': 'AOWS'}


MINE = '''
from dataclasses import dataclass
from timm_width.policies import Choice, Policy, option

class Mine(Policy):
    @dataclass(frozen=True)
    class Options:
        take: int = option(0, 'which width of each grid')

    def choose(self, evaluate):
        return [Choice({name: widths[self.options.take] for name, widths in self.grid.items()})] * len(self.budgets)
'''


def test_a_policy_in_a_file_of_the_users_own(image_folder, tmp_path, capsys):
    """By --policy FOLDER/NAME.py, with options of its own; as a baseline, too; and an answer over the budget is refused."""
    path = tmp_path / 'smallest.py'
    path.write_text(MINE)
    assert cli.main(command(image_folder, tmp_path / 'x', '--epochs', '0', policy=str(path))) == 0
    grid = said(tmp_path / 'x')['grid']
    assert said(tmp_path / 'x')['policy'] == 'smallest' and said(tmp_path / 'x')['options'] == {'take': 0}
    assert timm_width.load_spec(tmp_path / 'x').widths == {g: w[0] for g, w in grid.items() if g != 'rule'}
    assert cli.main(command(image_folder, tmp_path / 'y', '--epochs', '0', '--baselines', str(path), policy='uniform')) == 0
    assert [r['network'] for r in rows(tmp_path / 'y')] == ['smallest', 'found']
    assert by_name(tmp_path / 'y')['smallest']['macs'] == by_name(tmp_path / 'x')['found']['macs']
    assert cli.main(['search', '--resume', str(tmp_path / 'y')]) == 0
    capsys.readouterr()
    arguments = command(image_folder, tmp_path / 'z', '--smallest.take', '-1', policy=str(path))
    assert cli.main(arguments) == 2
    assert 'policy smallest answered with a network over the budget macs=0.5x' in capsys.readouterr().err


# -- bad input ---------------------------------------------------------------------------------------------------------------

WRONG = {
    'model': (['--model', 'test_resnett'], "did you mean 'test_resnet'"),
    'model tag': (['--model', 'resnet18.no_such_tag', '--pretrained'], 'no_such_tag'),
    'model folder': (['--model', 'local-dir:/nowhere'], 'config.json'),
    'policy': (['--policy', 'randon'], "did you mean 'random'"),
    'policy file': (['--policy', '/nowhere/mine.py'], 'no such file'),
    'baseline': (['--baselines', 'base', 'unifrom'], "did you mean 'uniform'"),
    'budget text': (['--budget', 'half'], 'not a budget'),
    'budget low': (['--budget', 'macs=10'], 'below the smallest'),
    'budget high': (['--budget', 'macs=1.01x'], 'above the largest'),
    'one of the budgets': (['--budget', 'macs=0.5x', 'params=1K'], "budget 'params=1K'"),
    'budget twice': (['--budget', 'macs=0.5x', 'macs=0.5x'], 'names one twice'),
    'grid': (['--grid', 'aosw'], "did you mean 'aows'"),
    'grid number': (['--grid', 'bins:0'], "--grid 'bins:0': the number of bins must be a whole number of 1 or more"),
    'grid number of flops': (['--grid', 'flops:0'], 'the number of flops must be a number above 0'),
    'coarse grid': (['--grid', 'flops:40', '--budget', 'macs=0.1x', '--width-divisor', '1'], 'a smaller beta has smaller bins'),
    'option of another policy': (['--aows.solver', 'exact'], '--aows.solver is an option of --policy aows, which'),
    'grid ratios': (['--grid', '0.5,big'], "--grid '0.5,big'"),
    'no group': (['--fix', '*'], 'no searchable group'),
    'fix': (['--fix', 'no.such'], "--fix 'no.such'"),
    'proxy': (['--proxy', 'half'], "--proxy 'half' is not a proxy"),
    'proxy name': (['--proxy', 'images=0.5'], 'is not a proxy'),
    'proxy number': (['--proxy', 'resolution=16.5'], 'is not a proxy'),
    'proxy data': (['--proxy', 'data=1.5'], 'is not a proxy'),
    'proxy no data': (['--proxy', 'data=0'], 'is not a proxy'),
    'proxy nan': (['--proxy', 'data=nan'], 'is not a proxy'),
    'proxy class': (['--proxy', 'classes=1'], 'is not a proxy'),
    'proxy no class': (['--proxy', 'classes=0'], 'is not a proxy'),
    'proxy classes': (['--proxy', 'classes=4'], 'more than the 3 classes'),
    'proxy resolution': (['--proxy', 'resolution=0'], 'is not a proxy'),
    'seeds': (['--seeds', '0'], '--seeds must be at least 1'),
    'dataset': (['--dataset', 'digit', '--data-dir', ''], "did you mean 'digits'"),
    'dataset and folder': (['--dataset', 'digits'], 'reads no folder'),
    'no data': (['--data-dir', ''], 'no images'),
    'data missing': (['--data-dir', '/nowhere'], 'does not exist'),
    'epochs': (['--epochs', '-1'], '--epochs must be at least 0, not -1'),
    'search epochs': (['--search-epochs', '0'], '--search-epochs must be at least 1'),
    'epochs text': (['--epochs', 'many'], "invalid int value: 'many'"),
    'holdout 0': (['--search-holdout', '0'], 'between 0 and 1'),
    'holdout 1': (['--search-holdout', '1'], 'between 0 and 1'),
    'holdout nan': (['--search-holdout', 'nan'], 'between 0 and 1'),
    'lr': (['--lr', 'nan'], '--lr must be at least 0'),
    'width range': (['--width-min', '0.9', '--width-max', '0.5'], '--width-min 0.9 and --width-max 0.5'),
    'width divisor': (['--width-divisor', '0'], '--width-divisor must be at least 1'),
    'classes': (['--num-classes', '2'], '3 classes'),
    'device': (['--device', 'tpu9'], "--device 'tpu9'"),
    'optimiser': (['--opt', 'nonesuch'], 'nonesuch'),
    'schedule': (['--sched', 'nonesuch'], 'nonesuch'),
    'plateau': (['--sched', 'plateau'], '--sched plateau'),
    'scale': (['--scale', '0.9', '0.1'], '--scale'),
    'option': (['--random.samples', '0'], 'random.samples must be at least 1'),
    'flag': (['--no-such-flag'], 'unrecognized arguments: --no-such-flag'),
    'resume': (['--resume', '/nowhere'], "--resume '/nowhere'"),
}


def refused(arguments, capsys, says):
    capsys.readouterr()
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert says in err and 'Traceback' not in err and len(err.strip().splitlines()) == 1, err
    assert not out


@pytest.mark.parametrize('name', WRONG)
def test_bad_input_is_one_message_and_leaves_nothing(name, image_folder, tmp_path, capsys):
    more, says = WRONG[name]
    refused(command(image_folder, tmp_path / 'runs' / 'x', *more), capsys, says)
    assert not any(tmp_path.iterdir())


def test_mixup_is_refused_where_the_policy_needs_classes(image_folder, tmp_path, monkeypatch, capsys):
    """By the policy that searches; one that trains no shared network, or takes soft targets, may mix."""
    monkeypatch.setattr(policies.load('autoslim'), 'mixup', False)
    for flag in ('--mixup', '--cutmix'):
        refused(slimming(image_folder, tmp_path / 'x', flag, '0.2'), capsys, 'cannot be used with the policy autoslim')
    refused(slimming(image_folder, tmp_path / 'x', '--cutmix-minmax', '0.2', '0.8'), capsys, 'cannot be used with the policy autoslim')
    refused(command(image_folder, tmp_path / 'x', '--mixup', '0.2', '--baselines', 'ows'), capsys, 'cannot be used with the policy ows')
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(search, 'times', lambda entries, target, args: [(1., 0.)] * len(entries))
    assert cli.main(slimming(image_folder, tmp_path / 'x', '--mixup', '0.2')) == 0


def empty(root):
    shutil.rmtree(root)
    root.mkdir()


def one_class(root):
    for name in ('blue', 'green'):
        shutil.rmtree(root / 'train' / name)


def no_images(root):
    for file in (root / 'train').rglob('*.png'):
        file.unlink()


def one_image_each(root):
    for folder in (root / 'train').iterdir():
        for file in sorted(folder.iterdir())[1:]:
            file.unlink()


def junk(root):
    for file in (root / 'train').rglob('*.png'):
        file.write_bytes(b'no image')


FOLDERS = {
    'junk': (junk, 'cannot be read as an image'),
    'empty': (empty, 'has no folder train/'),
    'no train': (lambda root: shutil.rmtree(root / 'train'), 'has no folder train/'),
    'no val': (lambda root: shutil.rmtree(root / 'val'), 'has no folder val'),
    'one class': (one_class, "has one class ('red')"),
    'no images': (no_images, 'Found 0 images'),
    'one image of each class': (one_image_each, 'every class needs two or more'),
    'unknown class': (lambda root: (root / 'val' / 'red').rename(root / 'val' / 'pink'), 'pink'),
}


@pytest.mark.parametrize('name', FOLDERS)
def test_bad_folders(name, image_folder, tmp_path, capsys):
    spoil, says = FOLDERS[name]
    shutil.copytree(image_folder, tmp_path / 'images')
    spoil(tmp_path / 'images')
    refused(command(tmp_path / 'images', tmp_path / 'x'), capsys, says)
    assert [f.name for f in tmp_path.iterdir()] == ['images']


def test_class_without_validation_images_keeps_its_number(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / 'images')
    shutil.rmtree(tmp_path / 'images' / 'val' / 'blue')
    args, _ = parsed(command(tmp_path / 'images', tmp_path / 'x'))
    assert {t for _, t in data.open_splits(args).validation} == {1, 2}


@pytest.mark.parametrize('taken', ['file', 'file above', 'folder'])
def test_output_in_use(taken, image_folder, tmp_path, capsys):
    target = tmp_path / 'x'
    if taken == 'folder':
        target.mkdir()
        (target / 'y').touch()
    else:
        target.touch()
    refused(command(image_folder, target / 'z' if taken == 'file above' else target), capsys, '--output')


# -- killed and resumed ------------------------------------------------------------------------------------------------------


class Events:
    """Counts what a search computes and writes, and kills it at one of these; Ctrl-C, so that nothing can catch it."""

    def __init__(self, monkeypatch):
        self.seen, self.kill = [], None
        save, recall, summary = engine.Training._save, holdout.Journal.recall, search.write_table

        def saved(training, path, extra):
            self.note('save', path.name)
            save(training, path, extra)

        def recalled(journal, key, compute, anew=False):
            def computed():
                self.note('recall', journal.path.name)
                return compute()

            return recall(journal, key, computed, anew)

        def written(*a):
            self.note('table')
            summary(*a)

        monkeypatch.setattr(engine.Training, '_save', saved)
        monkeypatch.setattr(holdout.Journal, 'recall', recalled)
        monkeypatch.setattr(search, 'write_table', written)

    def note(self, *what):
        if len(self.seen) == self.kill:
            raise KeyboardInterrupt
        self.seen.append(what)

    def run(self, arguments, kill=None):
        """Runs a command; returns its exit code and what it did."""
        self.seen, self.kill = [], kill
        return cli.main(arguments), self.seen


@pytest.fixture
def events(monkeypatch):
    return Events(monkeypatch)


CHAINS = {
    'autoslim': ('--budget', 'macs=0.5x', 'params=0.6x', '--autoslim.statistics', 'recalibrated', '--seeds', '2', '--search-epochs', '2'),
    'random': ('--baselines', 'base', 'uniform', '--epochs', '2', '--model-ema', '--mixup', '0.2'),
}


@pytest.mark.parametrize('name', CHAINS)
def test_a_search_killed_again_and_again_ends_as_the_unbroken_one(name, image_folder, tmp_path, events, capsys):
    """Killed after every few things it computes, wherever that is, and resumed: the same widths, table and weights."""
    make = slimming if name == 'autoslim' else command
    code, whole = events.run(make(image_folder, tmp_path / 'a', *CHAINS[name]))
    assert code == 0
    code, done = events.run(make(image_folder, tmp_path / 'b', *CHAINS[name]), kill=0)
    assert code == 130 and not (tmp_path / 'b' / 'summary.csv').exists()
    progress, kills = [], 1
    for step in itertools.cycle([1, 4, 2]):
        code, done = events.run(['search', '--resume', str(tmp_path / 'b')], kill=step)
        progress += done
        if code == 0:
            break
        assert code == 130
        kills += 1
        assert kills < len(whole)
    assert kills >= 4 and {what for what, *_ in progress} == {'save', 'recall', 'table'}
    assert without_times(tmp_path / 'a') == without_times(tmp_path / 'b')
    folders = [Path(text.replace('=', '-')) for text in ('macs=0.5x', 'params=0.6x')] if name == 'autoslim' else [Path()]
    for folder in folders:
        a, b = tmp_path / 'a' / folder, tmp_path / 'b' / folder
        assert timm_width.load_spec(a).widths == timm_width.load_spec(b).widths
        weights = load_file(a / 'model.safetensors'), load_file(b / 'model.safetensors')
        assert [k for k in weights[0] if not torch.equal(weights[0][k], weights[1][k])] == []
        found = said(a), said(b)
        for about in found:
            about.pop('costs')
            for row in about['baseline'].values():
                row.pop('latency_ms')
                row.pop('latency_spread')
        assert found[0] == found[1]
    assert {f.relative_to(tmp_path / 'a') for f in (tmp_path / 'a').rglob('*')} == {
        f.relative_to(tmp_path / 'b') for f in (tmp_path / 'b').rglob('*')}


@pytest.fixture(scope='module')
def finished(image_folder, tmp_path_factory):
    """A search to go on from: copy it first."""
    folder = tmp_path_factory.mktemp('runs') / 'finished'
    assert cli.main(slimming(image_folder, folder, '--baselines', 'base', 'random', '--random.samples', '1')) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'x')
    return tmp_path / 'x'


def test_a_finished_search_resumed_computes_nothing(copied, finished, events, image_folder, tmp_path):
    """Its baselines are those it was run with."""
    assert events.run(['search', '--resume', str(copied)]) == (0, [('table',)])
    again = slimming(image_folder, tmp_path / 'y', '--random.samples', '1', '--resume', str(copied))  # the whole command again
    assert events.run(again) == (0, [('table',)]) and not (tmp_path / 'y').exists()
    assert without_times(copied) == without_times(finished)
    for name in ('model.safetensors', 'search/results.jsonl', 'search/autoslim.scores.jsonl'):
        assert (copied / name).read_bytes() == (finished / name).read_bytes()


def test_resumed_there_and_back_the_weights_are_those_of_the_table(copied, finished, events):
    """With another number of epochs, and then with the first again: what is saved is what was asked for last."""
    for epochs in '2', '1':
        assert events.run(['search', '--resume', str(copied), '--epochs', epochs])[0] == 0
        assert said(copied)['train'] == {'epochs': int(epochs)}
    assert (copied / 'model.safetensors').read_bytes() == (finished / 'model.safetensors').read_bytes()
    assert timm_width.load_spec(copied).widths == timm_width.load_spec(finished).widths
    assert without_times(copied) == without_times(finished)


def test_resumed_with_further_budgets_it_keeps_what_it_has(copied, finished, events):
    """No shared network is trained again; what was found stays where it is, and its rows in the table; others get folders."""
    for text in 'macs=0.45x', 'macs=0.4x':
        code, done = events.run(['search', '--resume', str(copied), '--budget', text])
        assert code == 0 and ('save', 'autoslim.pth.tar') not in done
    assert {f.name for f in copied.iterdir()} == {*RESULTS, 'macs-0.45x', 'macs-0.4x'}
    for name in ('.', 'macs-0.45x', 'macs-0.4x'):
        timm.create_model(f'local-dir:{copied / name}', pretrained=True)
        assert said(copied / name)['budget'] == (name.replace('-', '=') if name != '.' else 'macs=0.5x')
    for name in 'config.json', 'model.safetensors':
        a, b = (timm_width.load_spec(f).widths if name == 'config.json' else (f / name).read_bytes() for f in (copied, finished))
        assert a == b
    assert yaml.safe_load((copied / 'args.yaml').read_text())['budget'] == ['macs=0.5x', 'macs=0.45x', 'macs=0.4x']
    table = without_times(copied)
    first, before = ([{k: v for k, v in row.items() if k != 'search_macs'} for row in found if row['budget'] in ('', 'macs=0.5x')]
                     for found in (table, without_times(finished)))  # what the search took, it took for all budgets
    assert first == before and len(before) == 3 and len(table) == 7
    assert events.run(['search', '--resume', str(copied)]) == (0, [('table',)]) and without_times(copied) == table


def test_a_further_budget_of_a_search_of_several_gets_a_folder_too(image_folder, tmp_path, capsys):
    run = tmp_path / 'x'
    assert cli.main(command(image_folder, run, '--budget', 'macs=0.5x', 'macs=0.4x', '--epochs', '0', policy='uniform')) == 0
    assert cli.main(['search', '--resume', str(run), '--budget', 'macs=0.6x']) == 0
    assert {f.name for f in run.iterdir()} == {'args.yaml', 'summary.csv', 'macs-0.4x', 'macs-0.5x', 'macs-0.6x'}
    assert [r['budget'] for r in rows(run) if r['network'] == 'found'] == ['macs=0.5x', 'macs=0.4x', 'macs=0.6x']
    widths = ['train', '--dataset', 'digits', '--model', MODEL, '--device', 'cpu', '--output', str(tmp_path / 'y'), '--widths']
    refused([*widths, str(run)], capsys, f'holds 3 networks, {run}/macs-0.4x (macs=0.4x), {run}/macs-0.5x (macs=0.5x), ')
    shutil.rmtree(run / 'macs-0.6x')
    shutil.move(run / 'macs-0.5x' / 'config.json', run / 'config.json')
    refused([*widths, str(run)], capsys, f'{run}/config.json (macs=0.5x), {run}/macs-0.4x (macs=0.4x): give one of them')
    args = SimpleNamespace(widths=str(run / 'config.json'), model=MODEL)
    assert start.widths_of(args).provenance['budget'] == 'macs=0.5x'


def test_resumed_with_more_seeds_epochs_or_baselines(copied, finished, events):
    """The choice stands; only what is missing in the table is trained."""
    code, done = events.run(['search', '--resume', str(copied), '--seeds', '2', '--baselines', 'base', 'uniform'])
    assert code == 0 and not [d for d in done if 'autoslim' in str(d)]
    assert list(by_name(copied)) == ['base', 'uniform', 'found']
    assert len([d for d in done if d == ('recall', 'results.jsonl')]) == 4  # uniform twice, the others under the second seed
    code, done = events.run(['search', '--resume', str(copied), '--epochs', '2'])
    assert code == 0 and len([d for d in done if d == ('recall', 'results.jsonl')]) == 6
    assert timm_width.load_spec(copied).widths == timm_width.load_spec(finished).widths
    assert yaml.safe_load((copied / 'args.yaml').read_text())['epochs'] == 2


RESUMES = {
    'another flag': (['--search-epochs', '3'], 'was run with --search-epochs 1;'),
    'another seed': (['--seed', '1'], '--seed 42;'),
    'another model': (['--model', 'test_efficientnet'], '--model test_resnet;'),
    'another policy': (['--policy', 'uniform'], '--policy autoslim'),
    'another option': (['--autoslim.passes', '3'], '--autoslim.passes 4;'),
    'another group fixed': (['--fix', 'conv1.3'], '--fix'),
    'another grid': (['--grid', 'aows', '--width-max', '1.2'], "--grid 0.25,0.5,1"),
    'bad budget': (['--budget', 'half'], 'not a budget'),
    'bad seeds': (['--seeds', '0'], '--seeds must be at least 1'),
}


@pytest.mark.parametrize('name', RESUMES)
def test_a_search_is_not_resumed_as_another(name, finished, capsys):
    """And the folder stays as it was."""
    before = {f: f.read_bytes() for f in finished.rglob('*') if f.is_file()}
    more, says = RESUMES[name]
    refused(['search', '--resume', str(finished), *more], capsys, says)
    assert before == {f: f.read_bytes() for f in finished.rglob('*') if f.is_file()}


def nothing(folder):
    folder.mkdir()


def of_train(folder):
    folder.mkdir()
    (folder / 'args.yaml').write_text(yaml.safe_dump({'model': MODEL, 'epochs': 3}))


def not_yaml(folder):
    folder.mkdir()
    (folder / 'args.yaml').write_text('a: [b\nc: {')


def a_list(folder):
    folder.mkdir()
    (folder / 'args.yaml').write_text('- policy\n')


@pytest.mark.parametrize('make', [nothing, of_train, not_yaml, a_list, Path.touch], ids=lambda m: m.__name__)
def test_a_folder_that_is_no_search_is_not_resumed(make, tmp_path, capsys):
    make(tmp_path / 'x')
    refused(['search', '--resume', str(tmp_path / 'x')], capsys, f"--resume '{tmp_path / 'x'}'")


def test_a_damaged_checkpoint_of_a_search_is_one_message(copied, capsys):
    (copied / 'search' / 'autoslim.pth.tar').write_bytes(b'junk')
    assert cli.main(['search', '--resume', str(copied)]) == 2
    err = capsys.readouterr().err
    assert 'is not a checkpoint of this training' in err and len(err.strip().splitlines()) == 1


# -- several processes -------------------------------------------------------------------------------------------------------


def test_only_the_first_of_several_processes_writes(image_folder, tmp_path, monkeypatch):
    """A process of another rank computes the same rows and leaves nothing behind."""
    def another(args):
        args.rank, args.local_rank, args.world_size, args.distributed = 1, 1, 1, False

    monkeypatch.setattr(search, 'start_processes', another)
    args, found = parsed(slimming(image_folder, tmp_path / 'x'))
    table, *_ = search.search(args, found)
    assert [row['network'] for row in table] == ['base', 'uniform', 'found'] and not any(tmp_path.iterdir())
    assert SimpleNamespace(**table[0]).top1 > 0


def test_a_baseline_fills_the_budget_though_the_policys_grid_is_coarse(tmp_path):
    """--grid is for the policy that searches; the baselines choose from multiples of the divisor, over the same range."""
    output = tmp_path / 'x'
    assert cli.main(['search', '--model', MODEL, '--dataset', 'digits', '--policy', 'autoslim', '--grid', '0.5,1.5', '--width-divisor', '4',
                     '--budget', 'macs=1.5x', '--epochs', '0', *SHORT[2:], '--output', str(output)]) == 0
    found = {row['network']: int(row['macs']) for row in csv.DictReader((output / 'summary.csv').open())}
    assert 1.3 * found['base'] < found['uniform'] <= 1.5 * found['base']
