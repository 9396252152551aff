"""What the wheel carries."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ('pyproject.toml', 'README.md', 'timm_width', 'hub')
BUILD = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel built without isolation, from a copy, so that the checkout stays as it is."""
    copy = tmp_path_factory.mktemp('source')
    for name in SOURCES:
        put = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        put(ROOT / name, copy / name)
    (copy / 'dist').mkdir()
    subprocess.run([sys.executable, '-c', BUILD], cwd=copy, check=True, capture_output=True)
    return next((copy / 'dist').glob('*.whl'))


def test_wheel_holds_the_package_its_tables_and_the_hub(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / 'timm_width').rglob('*') if p.suffix in ('.py', '.json', '.yaml')}
    assert sources <= names
    hub = {'timm_width/_hub/' + p.relative_to(ROOT / 'hub').as_posix() for p in (ROOT / 'hub').rglob('*') if p.is_file()}
    assert hub and hub <= names
    assert not [n for n in names if n.startswith(('tests', 'search', 'train', 'hub'))]


def test_wheel_has_the_entry_points(wheel):
    archive = zipfile.ZipFile(wheel)
    said = archive.read(next(n for n in archive.namelist() if n.endswith('entry_points.txt'))).decode()
    assert 'timm-width = timm_width.cli:main' in said
    assert '[timm_width.policies]' in said and 'random = timm_width.policies.random:Random' in said


def test_the_wheel_has_the_published_networks(wheel, tmp_path):
    """Where nothing of the checkout is: by name, in the list, and as folders."""
    zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
    run = ("import timm, timm_width, pathlib; assert 'site' in timm_width.__file__; n = timm_width.list_configs()[0].name; "
           "hub = pathlib.Path(timm_width.__file__).parent / '_hub'; assert (hub / n / 'README.md').is_file(); "
           "a, b = (timm.create_model(m, device='meta') for m in (n, f'local-dir:{hub / n}')); "
           "assert a._model_args['shapes'] == b._model_args['shapes']; "
           "assert {p.parent.name for p in hub.glob('*/config.json')} == {c.name for c in timm_width.list_configs()}; print(n)")
    done = subprocess.run([sys.executable, '-c', run], cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path / 'site')},
                          capture_output=True, text=True, check=False)
    assert done.stdout == 'mobilenetv1_100_width.aows_trt\n', done.stderr


@pytest.mark.slow
def test_installed_wheel_searches_outside_the_checkout(wheel, image_folder, tmp_path):
    """Unpacked where nothing of the checkout is, with this environment's dependencies."""
    zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
    run = ('import sys, timm_width; assert "site" in timm_width.__file__; '
           'from timm_width.cli import main; sys.exit(main(sys.argv[1:]))')
    done = subprocess.run(
        [sys.executable, '-c', run, 'search', '--model', 'test_resnet', '--data-dir', image_folder, '--policy', 'random',
         '--random.samples', '1', '--budget', 'macs=0.5x', '--epochs', '1', '--search-epochs', '1', '-b', '8', '-j', '0',
         '--img-size', '32', '--device', 'cpu', '--output', 'x'],
        cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path / 'site')}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'x' / 'model.safetensors').is_file()
