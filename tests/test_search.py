"""Searches from the command line to the saved model: what is written, what the policy may see, what is refused."""
import ast
import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import timm_width
from timm_width import cli, data, policies, search
from timm_width.cost import Budget, Macs, Params
from timm_width.policies.base import Choice, Policy, uniform_widths

MODEL = 'test_resnet'
SHORT = ['--epochs', '1', '--search-epochs', '1', '--warmup-epochs', '0', '--device', 'cpu', '--img-size', '32', '-j', '0']


def command(images, output, *more):
    """A search of seconds on the images, a folder or the name of a dataset."""
    where = ['--dataset', images] if images == 'digits' else ['--data-dir', str(images), '-b', '8']
    return ['search', '--model', MODEL, *where, '--policy', 'random', '--random.samples', '2', '--budget', 'macs=0.5x',
            '--width-divisor', '4', *SHORT, '--output', str(output), *more]


def rows(folder):
    with (folder / 'summary.csv').open() as file:
        return {row['network']: row for row in csv.DictReader(file)}


@pytest.fixture(scope='module')
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs') / 'new' / 'digits'
    assert cli.main(command('digits', folder)) == 0
    return folder


def test_digits_gives_a_model_that_timm_rebuilds(digits_run):
    assert {f.name for f in digits_run.iterdir()} == {'config.json', 'model.safetensors', 'args.yaml', 'summary.csv'}
    model = timm.create_model(f'local-dir:{digits_run}', pretrained=True)
    space = timm_width.trace(model, (3, 32, 32))
    found = rows(digits_run)
    assert list(found) == ['base', 'uniform', 'found']
    assert int(found['found']['macs']) == Macs(space)()
    assert int(found['found']['params']) == Params(space)() == sum(p.numel() for p in model.parameters())
    base = timm_width.trace(timm.create_model(MODEL, num_classes=10), (3, 32, 32))
    budget = Budget.parse('macs=0.5x', base)
    spec = timm_width.load_spec(digits_run)
    assert budget.met(spec.widths) and Macs(base)(spec.widths) == Macs(space)()
    assert int(found['uniform']['macs']) <= budget.limit and int(found['base']['macs']) == Macs(base)()


def test_saved_weights_have_the_accuracy_of_the_table(digits_run):
    args, _ = search.parse(command('digits', digits_run)[1:])
    model = timm.create_model(f'local-dir:{digits_run}', pretrained=True)
    view = data.View(data.open_splits(args).validation)
    batches = data.loader(view, args, search.data_config(args, model), training=False)
    assert round(search.top1(model, batches, args), 2) == float(rows(digits_run)['found']['top1'])


def test_provenance_says_how_it_was_found(digits_run):
    said = json.loads((digits_run / 'config.json').read_text())['timm_width']
    assert (said['policy'], said['options']['samples'], said['budget'], said['seed']) == ('random', 2, 'macs=0.5x', 42)
    assert said['costs']['macs'] == int(rows(digits_run)['found']['macs'])
    assert said['baseline']['uniform']['top1'] == float(rows(digits_run)['uniform']['top1'])


def test_searched_model_trains(digits_run, tmp_path, capsys):
    output = tmp_path / 'trained'
    assert cli.main(['train', '--model', f'local-dir:{digits_run}', '--dataset', 'digits', *SHORT[:2], *SHORT[4:],
                     '--output', str(output)]) == 0
    assert 'top-1' in capsys.readouterr().out
    spec, old = timm_width.load_spec(output), timm_width.load_spec(digits_run)
    assert (spec.widths, spec.provenance) == (old.widths, old.provenance)
    timm.create_model(f'local-dir:{output}', pretrained=True)


def test_plain_model_trains(image_folder, tmp_path):
    assert cli.main(['train', '--model', MODEL, '--data-dir', str(image_folder), '-b', '8', '--epochs', '2', *SHORT[4:],
                     '--output', str(tmp_path / 'x')]) == 0
    assert json.loads((tmp_path / 'x' / 'config.json').read_text())['architecture'] == MODEL
    with (tmp_path / 'x' / 'summary.csv').open() as file:
        assert [row['epoch'] for row in csv.DictReader(file)] == ['0', '1']


def test_same_seed_same_table_another_seed_another_network(image_folder, tmp_path, capsys):
    tables = []
    for name, seed in (('a', '1'), ('b', '1'), ('c', '2')):
        assert cli.main(command(image_folder, tmp_path / name, '--seed', seed)) == 0
        tables.append(capsys.readouterr().out.split('network')[1].split('The found')[0])
    assert tables[0] == tables[1]
    widths = [timm_width.load_spec(tmp_path / name).widths for name in 'abc']
    assert widths[0] == widths[1] != widths[2]


def test_uniform_policy_is_the_uniform_row(image_folder, tmp_path):
    assert cli.main(command(image_folder, tmp_path / 'x', '--policy', 'uniform')) == 2  # an option of another policy
    arguments = [a for a in command(image_folder, tmp_path / 'x') if a not in ('--random.samples', '2')]
    arguments[arguments.index('random')] = 'uniform'
    assert cli.main(arguments) == 0
    found = rows(tmp_path / 'x')
    assert dict(found['found'], network='') == dict(found['uniform'], network='')


def test_overwrite_replaces_the_results_and_nothing_else(image_folder, tmp_path):
    folder = tmp_path / 'x'
    folder.mkdir()
    (folder / 'notes.txt').write_text('mine')
    (folder / 'config.json').write_text('old')
    assert cli.main(command(image_folder, folder)) == 2
    assert (folder / 'config.json').read_text() == 'old'
    assert cli.main(command(image_folder, folder, '--overwrite')) == 0
    assert (folder / 'notes.txt').read_text() == 'mine' and timm_width.load_spec(folder).widths


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


def test_choose_reads_training_images_only_and_candidates_never_train_on_the_holdout(image_folder, tmp_path, monkeypatch):
    args, _ = search.parse(command(image_folder, tmp_path / 'x', '--search-holdout', '0.25')[1:])
    splits = data.open_splits(args)
    watched = data.Splits(Watched(splits.train), Watched(splits.validation), splits.targets, splits.num_classes)
    monkeypatch.setattr(search, 'open_splits', lambda args: watched)
    kept, held = data.split_holdout(splits.targets, 0.25, args.seed)
    fit, top1, log = search.fit, search.top1, []

    def seen(what, function):
        def wrapped(*a):
            watched.train.read.clear()
            out = function(*a)
            log.append((what, set(watched.train.read)))
            return out
        return wrapped

    monkeypatch.setattr(search, 'fit', seen('fit', fit))
    monkeypatch.setattr(search, 'top1', seen('top1', top1))

    class Chooser(Policy):
        def choose(self, evaluate):
            evaluate(choice := uniform_widths(self.space, self.budget, self.grid))
            assert not watched.validation.read
            return Choice(choice)

    args.policy = 'mine'
    search.search(args, Chooser)
    (_, trained), (_, scored), (_, final) = log[:3]
    assert trained <= set(kept) and scored == set(held) and final & set(held)
    assert len(watched.validation.read) == len(splits.validation)


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


def test_digits_splits_are_the_same_for_every_seed(tmp_path):
    splits = [data.open_splits(search.parse(command('digits', tmp_path, '--seed', s)[1:])[0]) for s in '12']
    assert len(splits[0].train) + len(splits[0].validation) == 1797
    assert (splits[0].targets == splits[1].targets).all()
    assert np.bincount(splits[0].validation.targets).min() >= 34


# -- policies and grids ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def space():
    return timm_width.trace(timm.create_model('mobilenetv2_100'), (3, 96, 96))


@pytest.mark.parametrize('budget', ['macs=0.5x', 'params=0.6x', 'macs=0.9x'])
@pytest.mark.parametrize('name', ['uniform', 'random'])
def test_policies_answer_on_the_grid_within_the_budget(space, name, budget):
    grid, budget = search.make_grid(space, 8, 0.1, 1.5, ['conv_head']), Budget.parse(budget, space)
    scores = []

    def evaluate(widths, skips=()):
        scores.append((sum(w * hash(g) % 97 for g, w in sorted(widths.items())), dict(widths)))
        return scores[-1][0]

    answers = [policies.load(name)(space, budget, grid, seed=seed).choose(evaluate) for seed in (1, 1, 2)]
    for widths, skips in answers:
        assert not skips and set(widths) == set(grid)
        assert all(w in grid[g] for g, w in widths.items()) and budget.met(widths)
    assert answers[0] == answers[1] and (name == 'uniform' or answers[0] != answers[2])
    if name == 'random':
        assert len(scores) == 60
        assert all(0.95 * budget.limit <= budget.cost(w) <= budget.limit for _, w in scores)
        assert answers[0].widths == max(scores[:20], key=lambda s: s[0])[1]


def test_uniform_is_the_largest_factor(space):
    grid, budget = search.make_grid(space, 8, 0.1, 1., ()), Budget.parse('macs=0.5x', space)
    widths = uniform_widths(space, budget, grid)
    ratios = [w / space[g].size for g, w in widths.items() if space[g].size >= 64]
    assert max(ratios) - min(ratios) < 0.2
    more = {g: grid[g][min(grid[g].index(w) + 1, len(grid[g]) - 1)] for g, w in widths.items()}
    assert not budget.met(more)


def test_random_draws_what_a_small_grid_holds(space):
    name = next(iter(search.make_grid(space, 8, 0.1, 1.)))
    grid = {name: search.make_grid(space, 1, 0.1, 1.)[name][-3:]}
    policy = policies.load('random')(space, Budget.parse('macs=1x', space), grid)
    assert len(policy.samples()) < 20


def test_grid(space):
    grid = search.make_grid(space, 8, 0.25, 1.5, ['blocks.*'])
    assert set(grid) == {'conv_stem', 'conv_head'} and grid['conv_stem'] == (8, 16, 24, 32, 40, 48)
    assert all(space[g].size in w for g, w in search.make_grid(space, 48, 0.2, 1.).items())


def test_model_without_a_searchable_group_says_why(space):
    frozen = [dataclasses.replace(g, frozen='aten.odd, for which there is no rule') for g in space.groups]
    with pytest.raises(data.UsageError, match='no searchable group: aten.odd'):
        search.make_grid(dataclasses.replace(space, groups=tuple(frozen)), 8, 0.1, 1.)


def test_policies_know_neither_timm_nor_the_engine_nor_one_another():
    for path in Path(policies.__path__[0]).glob('*.py'):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        names |= {'.' * n.level + (n.module or '') for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not [n for n in names if n.split('.')[0] in ('timm', 'torchvision')]
        assert {n for n in names if n.startswith('.')} <= {'.base', '..cost', '..space'}, path


def test_policies_are_found_without_entry_points(monkeypatch):
    monkeypatch.setattr(policies, 'entry_points', lambda **_: [])
    assert policies.names() == ['random', 'uniform']
    assert policies.load('uniform').__name__ == 'Uniform'


# -- bad input ---------------------------------------------------------------------------------------------------------------

WRONG = {
    'model': (['--model', 'test_resnett'], "did you mean 'test_resnet'"),
    'model tag': (['--model', 'resnet18.no_such_tag', '--pretrained'], 'no_such_tag'),
    'model folder': (['--model', 'local-dir:/nowhere'], 'config.json'),
    'policy': (['--policy', 'randon'], "did you mean 'random'"),
    'budget text': (['--budget', 'half'], 'not a budget'),
    'budget low': (['--budget', 'macs=10'], 'below the smallest'),
    'budget high': (['--budget', 'macs=1.01x'], 'above the largest'),
    'no group': (['--fix', '*'], 'no searchable group'),
    'fix': (['--fix', 'no.such'], "--fix 'no.such'"),
    'dataset': (['--dataset', 'digit', '--data-dir', ''], "did you mean 'digits'"),
    'dataset and folder': (['--dataset', 'digits'], 'reads no folder'),
    'no data': (['--data-dir', ''], 'no images'),
    'data missing': (['--data-dir', '/nowhere'], 'does not exist'),
    'epochs': (['--epochs', '-1'], '--epochs must be at least 1, not -1'),
    'search epochs': (['--search-epochs', '0'], '--search-epochs must be at least 1'),
    'epochs text': (['--epochs', 'many'], "invalid int value: 'many'"),
    'holdout 0': (['--search-holdout', '0'], 'between 0 and 1'),
    'holdout 1': (['--search-holdout', '1'], 'between 0 and 1'),
    'holdout nan': (['--search-holdout', 'nan'], 'between 0 and 1'),
    'lr': (['--lr', 'nan'], '--lr must be at least 0'),
    'width range': (['--width-min', '0.9', '--width-max', '0.5'], '--width-min 0.9 is more than --width-max 0.5'),
    'classes': (['--num-classes', '2'], '3 classes'),
    'device': (['--device', 'tpu9'], "--device 'tpu9'"),
    'optimiser': (['--opt', 'nonesuch'], 'nonesuch'),
    'schedule': (['--sched', 'nonesuch'], 'nonesuch'),
    'scale': (['--scale', '0.9', '0.1'], '--scale'),
    'option': (['--random.samples', '0'], 'random.samples must be at least 1'),
    'flag': (['--no-such-flag'], 'unrecognized arguments: --no-such-flag'),
}


def refused(arguments, capsys, says):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert says in err and 'Traceback' not in err and len(err.strip().splitlines()) == 1, err
    assert not out


@pytest.mark.parametrize('name', WRONG)
def test_bad_input_is_one_message_and_leaves_nothing(name, image_folder, tmp_path, capsys):
    more, says = WRONG[name]
    refused(command(image_folder, tmp_path / 'runs' / 'x', *more), capsys, says)
    assert not any(tmp_path.iterdir())


def empty(root):
    shutil.rmtree(root)
    root.mkdir()


def one_class(root):
    for name in ('blue', 'green'):
        shutil.rmtree(root / 'train' / name)


def no_images(root):
    for file in (root / 'train').rglob('*.png'):
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
    args, _ = search.parse(command(tmp_path / 'images', tmp_path / 'x')[1:])
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


def test_interrupted_choice_leaves_nothing(image_folder, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, 'fit', interrupted)
    assert cli.main(command(image_folder, tmp_path / 'runs' / 'x')) == 130
    assert not any(tmp_path.iterdir()) and 'interrupted' in capsys.readouterr().err
