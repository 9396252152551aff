"""timm-width transfer, and searches on a projection: what is written, what it costs, what is refused."""
import csv
import json
from functools import partial

import pytest
import timm

import timm_width
from timm_width import cli, target, transfer
from timm_width.cost import Macs, Params
from timm_width.data import UsageError
from timm_width.extrapolation import TOLERANCE, Found, extrapolate
from timm_width.problem import Proxy, parse_proxy

SEARCH = ['search', '--model', 'resnet18', '--policy', 'random', '--random.samples', '2', '--budget', 'macs=0.5x', '--search-epochs', '1',
          '--epochs', '0', '--warmup-epochs', '0', '--device', 'cpu', '--img-size', '32', '-j', '0', '-b', '8', '--grid', '0.25,0.5,1']


@pytest.fixture(scope='module', autouse=True)
def quick():
    """Times that are measured, but not for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, 'measure_many', partial(target.measure_many, seconds=1e-4, attempts=1))
        yield


def said(folder):
    return json.loads((folder / 'config.json').read_text())['timm_width']


def rows(folder):
    with (folder / 'summary.csv').open() as file:
        return {row['network']: row for row in csv.DictReader(file)}


# -- searches ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def projected(image_folder, tmp_path_factory):
    """A search on a network of a quarter of the widths, with one block in each stage, on half of the images."""
    folder = tmp_path_factory.mktemp('runs') / 'x'
    assert cli.main([*SEARCH, '--data-dir', str(image_folder), '--proxy', 'width=0.25,depth=1,data=0.5', '--output', str(folder)]) == 0
    return folder


def test_what_is_found_on_a_projection_is_carried_over(projected):
    small = projected / 'search' / 'proxies' / 'random-macs-0.5x'
    told, spec = said(small), timm_width.load_spec(small)
    assert (told['projection']['width'], told['projection']['depth'], told['projection']['data']) == (0.25, '1', 0.5)
    assert spec.architecture == 'resnet18_width' and spec.skips == tuple(f'layer{i}.1' for i in (1, 2, 3, 4))
    base = told['projection']['widths']
    assert base['conv1'] == 16 and all(spec.widths[n] / w in (0.25, 0.5, 1) for n, w in base.items())
    space = timm_width.trace(timm.create_model('resnet18', num_classes=3), (3, 32, 32))
    macs = Macs(space)
    assert macs(spec.widths, spec.skips) <= macs(base, spec.skips) / 2
    found = timm_width.load_spec(projected)
    assert not found.skips and macs() / 2 * (1 - TOLERANCE) < macs(found.widths) <= macs() / 2
    alpha = said(projected)['transfer']['alpha']
    ratios, _ = extrapolate(Found(space, spec.widths, base, spec.skips), space)
    assert all(abs(found.widths.get(n, g.size) - alpha * ratios[n] * g.size) <= 1 for n, g in space.searchable.items())
    model = timm.create_model(f'local-dir:{projected}')
    assert Macs(timm_width.trace(model, (3, 32, 32)))() == macs(found.widths)


def test_its_macs_are_those_of_the_passes_that_were_run(projected, capsys, image_folder, tmp_path):
    """Two candidates, each with one epoch of 16 or 15 images of 36, 33 of which train, and a score on the 3 that are held out."""
    row = rows(projected)
    assert row['base']['search_macs'] == '' and row['uniform']['search_macs'] == '0'
    lines = [json.loads(line) for line in (projected / 'search' / 'random.scores.jsonl').read_text().splitlines()]
    assert int(row['found']['search_macs']) == sum(macs for _, (_, _, macs) in lines) == said(projected)['search']['macs'] > 0
    small = timm_width.load_spec(projected / 'search' / 'proxies' / 'random-macs-0.5x')
    space = timm_width.trace(timm.create_model('resnet18', num_classes=3), (3, 32, 32))
    for key, (_, _, macs) in lines:
        _, widths, _ = json.loads(key)
        each = Macs(space)({**said(projected / 'search' / 'proxies' / 'random-macs-0.5x')['projection']['widths'], **widths}, small.skips)
        assert macs % each == 0 and macs // each in range(3 * 8, 3 * 20 + 12)
    assert cli.main(['search', '--resume', str(projected)]) == 0
    out = capsys.readouterr().out
    assert rows(projected)['found']['search_macs'] == row['found']['search_macs']
    assert 'random: the search took' in out and '% less than without --proxy width=0.25,depth=1,data=0.5' in out


REFUSED = {
    'width=0': '--proxy', 'width=2': '--proxy', 'width=nan': '--proxy', 'depth=0': '--proxy', 'depth=1.5': '--proxy', 'depth=0x': '--proxy',
    'depth=-1': '--proxy', 'depth=2x': '--proxy', 'depth=x': '--proxy', 'depth=': '--proxy', 'colour=3': '--proxy'}


@pytest.mark.parametrize('text', REFUSED)
def test_a_proxy_that_is_none(text):
    with pytest.raises(UsageError, match='is not a proxy'):
        parse_proxy(text)


def test_a_proxy_of_all_parts():
    assert parse_proxy('width=0.707,depth=1,resolution=160,data=0.1,classes=10') == Proxy(0.707, '1', 160, 0.1, 10)
    assert parse_proxy('depth=0.5x').depth == '0.5x' and parse_proxy('') == Proxy()


def test_projections_that_cannot_be_are_refused_before_anything_is_written(image_folder, tmp_path, capsys):
    output = ['--data-dir', str(image_folder), '--output', str(tmp_path / 'x')]
    for more, words in ((['--model', 'vgg11', '--proxy', 'depth=1'], "cannot do without 'features"),
                        (['--grid', '0.5,1', '--budget', 'macs=0.01x', '--proxy', 'width=0.5'], 'below the smallest')):
        assert cli.main([*SEARCH, *output, *more]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / 'x').exists()


# -- the command -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp('small')
    widths = {'conv1': 24, 'layer2.1.conv1': 200, 'layer4.0.conv2': 700, 'layer4.1.conv1': 333}
    timm_width.save(timm.create_model('resnet18_width', widths=widths, num_classes=7), folder, {'policy': 'mine'}, weights=False)
    return folder


@pytest.mark.parametrize('match, share', [('macs', 1), ('params', 1), ('macs=0.5x', 0.5), ('macs=1.2G', None)])
def test_a_config_for_a_deeper_network(small, tmp_path, match, share, capsys):
    folder = tmp_path / 'x'
    assert cli.main(['transfer', str(small), '--to', 'resnet34', '--match', match, '--output', str(folder)]) == 0
    model = timm.create_model(f'local-dir:{folder}')
    assert model.num_classes == 7
    cost = Params if match == 'params' else Macs
    limit = share * cost(timm_width.trace(timm.create_model('resnet34', num_classes=7)))() if share else 1.2e9
    assert limit * (1 - TOLERANCE) < cost(timm_width.trace(model))() <= limit
    widths, told = timm_width.load_spec(folder).widths, said(folder)
    assert abs(widths['layer2.1.conv1'] - widths['layer2.3.conv1']) <= 1 and 'layer4.2.conv1' in widths
    assert told['transfer']['source'] == {'architecture': 'resnet18_width', 'shapes': timm_width.load_spec(small).shapes, 'policy': 'mine'}
    assert told['costs']['macs'] == Macs(timm_width.trace(model))()
    assert cli.main(['transfer', str(small), '--to', 'resnet34', '--output', str(folder)]) == 2
    assert 'not empty' in capsys.readouterr().err


def test_to_the_same_model_at_its_own_cost_the_widths_stay(small, tmp_path):
    spec = timm_width.load_spec(small)
    cost = Macs(timm_width.trace(timm.create_model('resnet18', num_classes=7)))(spec.widths)
    assert cli.main(['transfer', str(small / 'config.json'), '--match', f'macs={cost}', '--output', str(tmp_path / 'x')]) == 0
    assert timm_width.load_spec(tmp_path / 'x').widths == spec.widths


def test_squeezes_keep_their_width_unless_the_config_changes_them(tmp_path):
    for name, widths, kept in (('a', {'conv_stem': 16}, True), ('b', {'blocks.1.0.se.conv_reduce': 2}, False)):
        timm_width.save(timm.create_model('efficientnet_b0_width', widths=widths), tmp_path / name, weights=False)
        assert cli.main(['transfer', str(tmp_path / name), '--to', 'efficientnet_b1', '--match', 'macs=0.5x', '--img-size', '64',
                         '--output', str(tmp_path / f'{name}1')]) == 0
        found = timm_width.load_spec(tmp_path / f'{name}1').widths
        assert kept == (not [n for n in found if '.se.' in n])


def config(folder, **changes):
    """A config whose text is tampered with."""
    found = json.loads((folder / 'config.json').read_text())
    for path, value in changes.items():
        found[path] = value
    return found


HOSTILE = {
    'projection is a list': ({'projection': [1]}, "its 'projection' does not say"),
    'projection widths': ({'projection': {'widths': 3}}, "its 'projection' does not say"),
    'projection of zero': ({'projection': {'widths': {'conv1': 0}}}, 'outside 1..256'),
    'projection of text': ({'projection': {'widths': {'conv1': '8'}}}, 'must be a whole number'),
    'projection of huge width': ({'projection': {'widths': {'conv1': 10 ** 30}}}, 'outside 1..256'),
    'projection of no group': ({'projection': {'widths': {'__class__': 8}}}, 'unknown group'),
    'projection skips': ({'projection': {'skips': ['fc']}}, 'cannot be skipped'),
    'projection skips of no name': ({'projection': {'skips': [[]]}}, 'cannot be skipped'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_configs_that_lie_are_refused(name, small, tmp_path, capsys):
    told, words = HOSTILE[name]
    (tmp_path / 'config.json').write_text(json.dumps(config(small, timm_width=told)))
    assert cli.main(['transfer', str(tmp_path), '--to', 'resnet34', '--output', str(tmp_path / 'x')]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / 'x').exists()


@pytest.mark.parametrize('flags, words', [
    (['--to', 'resnet50'], 'the blocks do not correspond'), (['--to', 'resnet35'], "unknown model 'resnet35'"),
    (['--to', 'local-dir:/nowhere'], 'a timm model by name'), (['--match', 'beauty'], "unknown cost 'beauty'"),
    (['--match', 'latency'], 'needs a latency model'), (['--match', 'macs=3'], 'cannot cost as little as 3 MACs'),
    (['--match', 'macs=0.5x', '--img-size', '0'], '--img-size must be at least 1'), (['--width-divisor', '0'], 'must be at least 1')])
def test_what_cannot_be_is_one_line(flags, words, small, tmp_path, capsys):
    assert cli.main(['transfer', str(small), '--output', str(tmp_path / 'x'), *flags]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith('timm-width transfer: ') and not (tmp_path / 'x').exists()


def test_comparison(small, projected, tmp_path, capsys):
    """All carried over to one network, at its MACs; a config is like itself, and the uniform widths like nothing that was searched."""
    pytest.importorskip('matplotlib')
    paths = [small, projected, projected / 'search' / 'proxies' / 'random-macs-0.5x']
    assert cli.main(['transfer', '--compare', *map(str, paths), '--to', 'resnet34', '--output', str(tmp_path / 'x')]) == 0
    out = capsys.readouterr().out
    with (tmp_path / 'x' / 'similarity.csv').open() as file:
        head, *table = csv.reader(file)
    matrix = [[float(c) for c in row[1:]] for row in table]
    assert len(head) == 5 and head[-1] == 'uniform' and 'cosines' in out and 'layer4.2.conv1' in out
    assert all(matrix[i][i] == pytest.approx(1) and matrix[i][k] == pytest.approx(matrix[k][i]) for i in range(4) for k in range(4))
    assert matrix[1][2] > 0.99 > matrix[1][3]  # what was found on the projection, and what was made of it
    assert {f.name for f in (tmp_path / 'x').iterdir()} == {'similarity.csv', 'similarity.png', 'widths.png'}
    assert cli.main(['transfer', '--compare', str(small), str(small)]) == 2 and 'given twice' in capsys.readouterr().err


def test_average_widths_have_the_macs_of_the_network(small):
    space = timm_width.trace(timm.create_model('resnet34'))
    names, alike, widths = transfer.compare({'a': transfer.read_source(str(small)).found}, space)
    assert names == ['a', 'uniform'] and alike.shape == (2, 2) and widths.shape == (1, len(space.searchable))
    cost = Macs(space)({n: int(w) for n, w in zip(space.searchable, widths[0])})
    assert 0 <= 1 - cost / space.macs() < TOLERANCE


