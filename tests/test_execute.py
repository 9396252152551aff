"""timm-width exec: a script runs as python runs it, with the width models known."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_width import cli

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys
import beside                                       # what lies beside a script is found
import timm

def main():
    print(__name__, sys.argv[1:], timm.is_model('resnet18_width'), beside.WORD)
    if '--build' in sys.argv:
        timm.create_model('test_resnet_width', widths={'conv9': 1})
    sys.exit({'--code': 7, '--text': 'a reason', '--fine': None}.get(sys.argv[1], 0))

if __name__ == '__main__':
    main()
"""
SPAWNS = """
import torch
from torch.utils.data import DataLoader, Dataset

class Squares(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return i * i

if __name__ == '__main__':
    print(torch.cat(list(DataLoader(Squares(), 2, num_workers=1, multiprocessing_context='spawn'))).tolist())
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'beside.py').write_text("WORD = 'here'\n")
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    return str(path)


def test_a_script_gets_its_arguments_and_the_models(script, capsys):
    before = sys.argv, sys.path[:]
    with pytest.raises(SystemExit) as e:
        cli.main(['exec', script, '--fine', '--help', '-x', ''])
    assert e.value.code is None
    assert capsys.readouterr().out == "__main__ ['--fine', '--help', '-x', ''] True here\n"
    assert (sys.argv, sys.path) == before


@pytest.mark.parametrize('flag, code', [('--code', 7), ('--text', 'a reason')])
def test_exit_codes_pass_through(flag, code, script):
    with pytest.raises(SystemExit) as e:
        cli.main(['exec', script, flag])
    assert e.value.code == code


def test_a_script_that_ends_by_itself_is_fine_and_its_own_errors_are_its_own(tmp_path):
    (tmp_path / 'fine.py').write_text('x = 1\n')
    (tmp_path / 'wrong.py').write_text("raise KeyError('mine')\n")
    assert cli.main(['exec', str(tmp_path / 'fine.py')]) == 0
    with pytest.raises(KeyError, match='mine'):
        cli.main(['exec', str(tmp_path / 'wrong.py')])


def test_errors_of_ours_stay_one_message(script, capsys):
    assert cli.main(['exec', script, '--build']) == 2
    err = capsys.readouterr().err
    assert err.startswith('timm-width exec: ') and "unknown group 'conv9'" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize('args, says', [
    ([], 'no script given'), (['nowhere.py'], "there is no script 'nowhere.py'"), (['--flag', 'x.py'], 'the first argument must be a script')])
def test_without_a_script(args, says, capsys):
    assert cli.main(['exec', *args]) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1


def test_help_is_ours_before_the_script(capsys):
    assert cli.main(['exec', '--help']) == 0
    assert 'timm-width exec SCRIPT' in capsys.readouterr().out


def test_spawned_workers_and_the_exit_code_of_the_process(tmp_path):
    """As a user calls it: workers of a DataLoader that are spawned find the script's classes."""
    (tmp_path / 'spawns.py').write_text(SPAWNS)
    done = subprocess.run([sys.executable, '-m', 'timm_width', 'exec', 'spawns.py'], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)}, check=False)
    assert (done.returncode, done.stdout) == (0, '[0, 1, 4, 9]\n'), done.stderr
