"""Pictures of a search: they show what the files say, and refuse files that say nothing."""
import json

import pytest
import timm

import timm_width
from timm_width import cli
from timm_width.plots import plot_bins, plot_ratios, plot_scores, read_scores

pytest.importorskip('matplotlib')
MODEL = 'test_resnet'


@pytest.fixture
def folder(tmp_path):
    """Of two budgets, as a search leaves it."""
    space = timm_width.trace(timm.create_model(MODEL))
    grid = {name: [g.size // 2, g.size] for name, g in space.searchable.items()}
    for budget, ratio in ('macs=0.5x', 0.5), ('macs=0.3x', 0.25):
        model = timm.create_model(f'{MODEL}_width', widths=space.scaled(ratio))
        timm_width.save(model, tmp_path / budget.replace('=', '-'), {'budget': budget, 'grid': {'rule': 'flops', **grid}}, weights=False)
    (tmp_path / 'search').mkdir()
    lines = [(['shared', {'a': 4, 'b': 2}, [], None, 'batch'], 50.), (['shared', {'a': [[0, 3], [4, 1]], 'b': 2}, [], None, 'batch'], 60.),
             (['shared', {'a': 3, 'b': 2}, [], None, 'batch'], 40.)]
    (tmp_path / 'search' / 'cafenet.scores.jsonl').write_text(
        ''.join(json.dumps([json.dumps(key), [top1, 1.]]) + '\n' for key, top1 in lines) + '["cut')
    return tmp_path


def test_the_command_writes_the_three_pictures(folder, capsys):
    assert cli.main(['plot', str(folder), '--format', 'svg', '--output', str(folder / 'pictures')]) == 0
    assert {p.name for p in (folder / 'pictures').iterdir()} == {'ratios.svg', 'bins.svg', 'scores.svg'}
    assert capsys.readouterr().out.count('.svg') == 3
    assert cli.main(['plot', str(folder / 'macs-0.5x')]) == 0
    assert {p.name for p in (folder / 'macs-0.5x').glob('*.png')} == {'ratios.png', 'bins.png'}


def test_a_networks_score_is_that_of_its_best_assignment(folder):
    assert sorted(read_scores(folder / 'search' / 'cafenet.scores.jsonl')) == [40., 60.]


def test_indices_count_steps_and_widths_count_channels(tmp_path):
    path = tmp_path / 'x.scores.jsonl'
    path.write_text(''.join(json.dumps([json.dumps(['shared', {'a': a}, [], None, 'batch']), [top1, 1.]]) + '\n'
                            for a, top1 in ((16, 50.), ([[0, 1], [2, 1]], 60.), (24, 40.))))
    assert read_scores(path, {'a': 8}) == [60., 40.]
    assert read_scores(path) == [50., 60., 40.]  # two steps of one channel are another width


def test_figures_show_ratios_bins_and_scores(folder):
    specs = {s: timm_width.load_spec(folder / f'macs-{s}') for s in ('0.5x', '0.3x')}
    base = timm_width.trace(timm.create_model(MODEL)).base_widths
    [axes] = plot_ratios(specs, base).axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [spec.widths[n] / base[n] for spec in specs.values() for n in base]
    sizes, numbers = ([bar.get_height() for bar in axes.patches] for axes in plot_bins({'a': (2, 4, 6, 9), 'b': (5,)}).axes)
    assert sizes == [2, 5] and numbers == [4, 1]
    [axes] = plot_scores({'x': [1., 2., 2.], 'y': [3.]}).axes
    assert sum(bar.get_height() for bar in axes.patches) == 4
    plot_scores({'x': [1., 1.]})


@pytest.mark.parametrize('text', ['nonsense\n', '[1, 2]\n', '["[]", [1, 2]]\n', '["[1, 2]", [1, 2]]\n'])
def test_files_that_are_no_scores_are_refused(text, folder, capsys):
    (folder / 'search' / 'cafenet.scores.jsonl').write_text(text)
    assert cli.main(['plot', str(folder)]) == 2
    assert 'is not a journal of scores' in capsys.readouterr().err


def test_other_folders_are_refused(folder, capsys):
    assert cli.main(['plot', str(folder / 'search')]) == 2
    assert 'is not the folder of a search' in capsys.readouterr().err
    config = json.loads((folder / 'macs-0.5x' / 'config.json').read_text())
    config['timm_width']['grid'] = {'a': 'x'}
    (folder / 'macs-0.5x' / 'config.json').write_text(json.dumps(config))
    assert cli.main(['plot', str(folder / 'macs-0.5x')]) == 2
    assert 'lists of widths' in capsys.readouterr().err
