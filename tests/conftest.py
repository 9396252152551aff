"""Flags and fixtures of all tests."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch is imported: pytest-xdist runs one process per core

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

SKIPPED = {'slow': '--run-slow', 'gpu': '--run-gpu'}  # marker -> the flag that runs it


def pytest_addoption(parser):
    for marker, flag in SKIPPED.items():
        parser.addoption(flag, action='store_true', help=f'run the tests marked {marker}')


def pytest_collection_modifyitems(config, items):
    for item in items:
        for marker, flag in SKIPPED.items():
            if item.get_closest_marker(marker) and not config.getoption(flag):
                item.add_marker(pytest.mark.skip(reason=f'{marker}: run with {flag}'))


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    """Three classes of small images that differ in colour: 12 to train and 4 to validate of each."""
    root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for split, count in (('train', 12), ('val', 4)):
        for c, name in enumerate(('blue', 'green', 'red')):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (24, 24, 3))
                pixels[..., 2 - c] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')
    return root
