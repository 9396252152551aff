"""The program timm-width and the scripts of a checkout."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_width import __version__, cli

ROOT = Path(__file__).parent.parent


def test_help_lists_the_commands(capsys):
    assert cli.main(['--help']) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


def test_version(capsys):
    assert cli.main(['--version']) == 0
    assert capsys.readouterr().out.strip() == f'timm-width {__version__}'


@pytest.mark.parametrize('arguments, says', [
    (['serch'], "unknown command 'serch', did you mean 'search'"), ([], 'no command given'), (['--bogus'], "'--bogus'")])
def test_unknown_command(arguments, says, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert says in err and not out and len(err.splitlines()) == 1


@pytest.mark.parametrize('command, policy, says', [
    ('search', [], '--search-holdout'), ('search', ['--policy', 'random'], '--random.samples'), ('train', [], '--epochs')])
def test_help_of_a_command(command, policy, says, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([command, *policy, '--help'])
    assert e.value.code == 0 and says in capsys.readouterr().out


@pytest.mark.parametrize('script', ['search', 'train'])
def test_scripts_of_a_checkout(script, tmp_path):
    """In a process of its own: exit code 2, one line, no trace, nothing written."""
    done = subprocess.run(
        [sys.executable, ROOT / f'{script}.py', '--output', 'x', *(['--policy', 'random', '--budget', 'macs=0.5x'] if
         script == 'search' else []), '--dataset', 'digits', '--model', 'resnet1B'],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)}, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"timm-width {script}: unknown model 'resnet1B', did you mean")
    assert len(done.stderr.splitlines()) == 1 and not any(tmp_path.iterdir())
