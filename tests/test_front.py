"""timm-width plot: accuracy and search loss against cost, from the table of a search."""
import pytest

from timm_width.data import UsageError
from timm_width.front import plot_front, read_table

TABLE = """network,budget,macs,params,top1,top1_std,search_loss
base,,4000000,1000000,90.5,0.5,
found,macs alpha=0.2,3000000,900000,91.0,0.4,2.5
found,macs alpha=1,1000000,300000,88.0,,3.5
uniform,macs alpha=1,1000000,300000,85.0,1.0,
"""


def drawn(figure):
    axes = figure.axes[0]
    return {c.get_label(): [tuple(p) for p in c.lines[0].get_xydata()] for c in axes.containers}


@pytest.fixture
def figure():
    return pytest.importorskip('matplotlib.figure').Figure()


def test_every_network_is_where_its_cost_and_accuracy_say(tmp_path, figure):
    (tmp_path / 'summary.csv').write_text(TABLE)
    assert plot_front(figure, read_table(tmp_path), 'top1')
    assert drawn(figure) == {'base': [(4, 90.5)], 'found': [(1, 88), (3, 91)], 'uniform': [(1, 85)]}
    assert 'MACs' in figure.axes[0].get_xlabel() and figure.axes[0].get_ylabel() == 'top-1, %'


def test_search_losses_are_those_of_what_was_found(tmp_path, figure):
    (tmp_path / 'summary.csv').write_text(TABLE)
    assert plot_front(figure, read_table(tmp_path), 'search_loss')
    assert drawn(figure) == {'found': [(1, 3.5), (3, 2.5)]}


def test_without_a_table_or_the_column_nothing_is_drawn(tmp_path, figure):
    assert read_table(tmp_path) == [] and not plot_front(figure, [], 'top1')
    (tmp_path / 'summary.csv').write_text('network,macs\nbase,1\n')
    assert not plot_front(figure, read_table(tmp_path), 'top1') and not figure.axes


@pytest.mark.parametrize('text', ['a,b\n1,2\n', 'network\nbase\n'])
def test_another_table_is_refused(tmp_path, text):
    (tmp_path / 'summary.csv').write_text(text)
    with pytest.raises(UsageError, match='not the table of a search'):
        read_table(tmp_path)
