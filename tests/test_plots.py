"""Pictures of a search: they show what the files say, and refuse files that say nothing."""
import json

import numpy as np
import pytest
import timm

import timm_width
from timm_width import cli, plots
from timm_width.config import Spec
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


def test_a_network_beside_those_of_budgets_is_drawn_with_them(folder):
    """Of a search that went on with further budgets."""
    spec = timm_width.load_spec(folder / 'macs-0.5x')
    model = timm.create_model(f'{MODEL}_width', widths={n: w + 1 for n, w in spec.widths.items()})
    timm_width.save(model, folder, {'budget': 'macs=0.6x'}, weights=False)
    assert list(plots._specs(folder)) == ['macs=0.6x', 'macs=0.3x', 'macs=0.5x']
    assert len(plots._specs(folder / 'macs-0.5x')) == 1


def test_a_networks_score_is_that_of_its_best_assignment(folder):
    assert sorted(read_scores(folder / 'search' / 'cafenet.scores.jsonl')['']) == [40., 60.]


def test_indices_count_steps_and_widths_count_channels(tmp_path):
    path = tmp_path / 'x.scores.jsonl'
    path.write_text(''.join(json.dumps([json.dumps(['shared', {'a': a}, [], None, 'batch']), [top1, 1.]]) + '\n'
                            for a, top1 in ((16, 50.), ([[0, 1], [2, 1]], 60.), (24, 40.))))
    assert read_scores(path, {'a': 8}) == {'': [60., 40.]}
    assert read_scores(path) == {'': [50., 60., 40.]}  # two steps of one channel are another width


def test_figures_show_ratios_bins_and_scores(folder):
    specs = {s: timm_width.load_spec(folder / f'macs-{s}') for s in ('0.5x', '0.3x')}
    base = timm_width.trace(timm.create_model(MODEL)).base_widths
    [axes] = plot_ratios(specs, base).axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [spec.widths[n] / base[n] for spec in specs.values() for n in base]
    above, below = plot_bins({'x': {'a': (2, 4, 6, 9), 'b': (5,)}, 'y': {'a': (2, 4, 6, 9), 'b': (5,)}}).axes
    bins, last = (points.get_offsets().tolist() for points in above.collections)
    assert [y for _, y in bins] == [2] and [y for _, y in last] == [3, 5] and [b.get_height() for b in below.patches] == [4, 1]
    assert len(plot_bins({'x': {'a': (2, 4)}, 'y': {'a': (1, 4)}}).axes[0].collections) == 4
    plot_scores({'x': [1., 1.]})


def test_groups_that_were_searched_are_shown_at_their_base_width():
    [axes] = plot_ratios({'x': Spec('a_width', {'b': 2})}, {'a': 4, 'b': 4, 'c': 4}, {'a', 'b'}).axes
    assert [bar.get_height() for bar in axes.patches] == [1, 0.5]


def test_scores_count_for_the_lowest_budget_that_they_are_within(folder):
    space = timm_width.trace(timm.create_model(MODEL))
    within = plots._budget_of(folder, plots._specs(folder), space)
    assert within({}, ()) == 'over macs=0.5x' and within(space.scaled(0.3), ()) == 'macs=0.3x'
    assert within({n: g.size * 5 // 8 for n, g in space.searchable.items()}, ()) == 'macs=0.5x' and within({'no': 1}, ()) == ''


@pytest.mark.parametrize('images', [7, 143, 1000, 50_000])
def test_bars_take_in_equally_many_of_the_accuracies_that_there_are(images):
    """All of them seen once: all bars but the last are of one height."""
    right = range(images // 3, images // 3 + min(images // 2, 500))
    scores = [100 * k / images for k in right]
    bars = np.histogram(scores, plots._edges(scores))[0].tolist()
    assert sum(bars) == len(right) and len(bars) <= 40 and len(set(bars[:-1])) <= 1


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
