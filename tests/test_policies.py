"""The policies that ship here, by the suite that all policies are held to."""
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm

import timm_width
from timm_width import choosing, cli, policies
from timm_width.conformance import PolicyConformance


def test_a_choice_keeps_its_channels():
    choice = policies.Choice({'a': 2}, (), {'a': (0, 3)})
    assert choice == policies.Choice({'a': 2}) == ({'a': 2}, ()) and policies.Choice({'a': 2}).channels == {}
    assert choice._replace(skips=('b',)).channels == {'a': (0, 3)} and choice._replace(widths={'a': 1}).channels == {}
    assert policies.Choice._make(choice).channels == {}


def test_a_greedy_path_compares_as_many_networks_as_is_said():
    """At most, and where it slims all groups in turn so many."""
    grid = {'a': (1, 2, 3), 'b': (1, 2, 3, 4), 'c': (5,)}
    for in_turn in True, False:
        compared = []

        def best(_, slimmer, compared=compared, in_turn=in_turn):
            compared.extend(slimmer)
            return max(slimmer, key=lambda w: (min(w['a'], w['b']) if in_turn else w['a'], w['b']))

        assert len(list(policies.greedy_path(grid, {'a': 3, 'b': 4, 'c': 5}, best))) == 6
        assert (len(compared) == policies.greedy_scores(grid)) == in_turn and len(compared) <= 9


def test_an_answer_has_as_many_channels_as_its_widths_say():
    """Groups of unit 8 are kept by steps; numbers of NumPy are not what JSON holds."""
    space = timm_width.trace(timm.create_model('regnetx_002'))
    name = next(n for n, g in space.searchable.items() if g.unit == 8)
    problem = SimpleNamespace(space=space)
    found = choosing._checked(problem, 'mine', policies.Choice({name: np.int64(16)}, (), {name: np.array([0, 2])}))
    assert json.loads(json.dumps([found.widths, found.channels])) == [{name: 16}, {name: [0, 2]}]
    for wrong in [0], [0, 1, 2]:
        with pytest.raises(policies.PolicyError, match=f"mine answered with {len(wrong)} steps of '{name}'"):
            choosing._checked(problem, 'mine', policies.Choice({name: 16}, (), {name: wrong}))


class TestUniform(PolicyConformance):
    policy = policies.load('uniform')
    regret = None  # it asks for no scores


class TestRandom(PolicyConformance):
    policy = policies.load('random')
    regret = 12.
    beats_random = False  # it is the best of as many


class TestAutoSlim(PolicyConformance):
    policy = policies.load('autoslim')
    # greedy slimming weighs what a step costs in accuracy, never what it saves: with scores free of noise and few groups, the
    # best of as many random networks is 2.1 points ahead of it on these problems
    beats_random = False


class TestGreedy(PolicyConformance):
    policy = policies.load('greedy')
    beats_random = False  # as AutoSlim


class TestGreedyByRatio(PolicyConformance):
    policy = policies.load('greedy')
    options = {'score': 'ratio'}


class TestOWS(PolicyConformance):
    policy = policies.load('ows')
    regret = None  # it asks for no scores


class TestAOWS(PolicyConformance):
    policy = policies.load('aows')
    options = {'sampling': 'joint', 'seen': 2}
    epochs = 3
    regret = None  # it asks for no scores


class TestCafeNet(PolicyConformance):
    policy = policies.load('cafenet')
    options = {'population': 10, 'iterations': 8, 'batches': 1}
    beats_random = False  # three scores for each network, which on the planted problem are all the same


class TestCafeNetOfTheFixedPattern(PolicyConformance):
    policy = policies.load('cafenet')
    options = {'r': 0, 'population': 20, 'iterations': 15, 'batches': 1}


class TestCafeNetBySamples(PolicyConformance):
    policy = policies.load('cafenet')
    options = {'search': 'random', 'samples': 40, 'candidates': 'random', 'reuse': False, 'batches': 1}
    regret = 6.
    beats_random = False  # it is the best of as many


class TestCafeNetGreedily(PolicyConformance):
    policy = policies.load('cafenet')
    options = {'search': 'greedy', 'r': 2, 'candidates': 'coordinate', 'explore': 0.5, 'batches': 1}
    beats_random = False  # as AutoSlim


def readme_policy(folder: Path) -> Path:
    """The file that the README shows."""
    text = (Path(__file__).parents[1] / 'README.md').read_text()
    code = next(block for block in re.findall(r'```python\n(.*?)```', text, re.S) if block.startswith('# one_shot.py'))
    (folder / 'one_shot.py').write_text(code)
    return folder / 'one_shot.py'


class TestReadmePolicy(PolicyConformance):
    policy = policies.load(str(readme_policy(Path(tempfile.mkdtemp()))))
    regret = 6.
    beats_random = False  # it is the best of as many


def test_a_policy_in_a_file_of_the_users_own(tmp_path, capsys):
    file = readme_policy(tmp_path)
    assert cli.main(['search', '--policy', str(file), '--one_shot.samples', '3', '--model', 'test_resnet', '--dataset', 'digits',
                     '--budget', 'macs=0.5x', '--search-epochs', '1', '--epochs', '0', '--device', 'cpu',
                     '--output', str(tmp_path / 'x')]) == 0
    said = timm_width.load_spec(tmp_path / 'x').provenance
    assert said['policy'] == 'one_shot' and said['options'] == {'samples': 3}
    assert 'found' in capsys.readouterr().out


def test_a_file_may_have_a_policy_and_what_it_is_made_from(tmp_path):
    """A class whose name begins with _ is none."""
    (tmp_path / 'mine.py').write_text(
        'from timm_width.policies.uniform import Uniform\nclass _Common(Uniform):\n    pass\nclass Mine(_Common):\n    pass')
    assert policies.load(str(tmp_path / 'mine.py')).__name__ == 'Mine'


WRONG = {
    'missing': (None, 'there is no such file'),
    'broken': ('import nothing_of_that_name', "No module named 'nothing_of_that_name'"),
    'empty': ('x = 1', 'defines 0 subclasses of timm_width.policies.Policy'),
    'two': ('from timm_width.policies.uniform import Uniform\nclass A(Uniform):\n    pass\nclass B(Uniform):\n    pass', 'defines 2 subclasses'),
    'abstract': ('from timm_width.policies import Policy\nclass Mine(Policy):\n    pass', 'Mine has no choose'),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_file_that_is_no_policy_is_refused(name, tmp_path, capsys):
    code, says = WRONG[name]
    if code is not None:
        (tmp_path / 'mine.py').write_text(code)
    assert cli.main(['search', '--policy', str(tmp_path / 'mine.py'), '--model', 'test_resnet', '--dataset', 'digits',
                     '--budget', 'macs=0.5x', '--output', str(tmp_path / 'x')]) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / 'x').exists()
