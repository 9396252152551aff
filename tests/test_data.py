"""Datasets that timm names, and how images get into batches."""
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from timm_width import cli, data, search

CLASSES = 3
CONFIG = {'input_size': (3, 32, 32), 'interpolation': 'bilinear', 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'crop_pct': 1.,
          'crop_mode': 'center'}


def write_mnist(root, count=48):
    """A data set in MNIST's own files: a bright square whose place is the class."""
    raw = root / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, n in (('train', count), ('t10k', 12)):
        targets = np.arange(n) % CLASSES
        images = rng.integers(0, 60, (n, 28, 28), dtype=np.uint8)
        for image, t in zip(images, targets):
            image[8 * t:8 * t + 8] = 255
        (raw / f'{prefix}-images-idx3-ubyte').write_bytes(struct.pack('>IIII', 2051, n, 28, 28) + images.tobytes())
        (raw / f'{prefix}-labels-idx1-ubyte').write_bytes(struct.pack('>II', 2049, n) + targets.astype(np.uint8).tobytes())


def arguments(*more):
    return search.parse(['--policy', 'uniform', '--budget', 'macs=0.5x', '--model', 'test_resnet', '--output', 'x', '--img-size', '32',
                         '-j', '0', '--device', 'cpu', *more])[0]


def test_a_torchvision_dataset_by_name(tmp_path):
    """Grey images become RGB, and the classes come without reading an image."""
    write_mnist(tmp_path)
    args = arguments('--dataset', 'torch/mnist', '--data-dir', str(tmp_path), '-vb', '8')
    splits = data.open_splits(args)
    assert (len(splits.train), len(splits.validation), args.num_classes) == (48, 12, CLASSES)
    assert (splits.targets == np.arange(48) % CLASSES).all()
    images, targets = next(iter(data.loader(data.View(splits.train), args, CONFIG, training=False)))
    assert images.shape == (8, 3, 32, 32) and targets.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert torch.equal(images[:, 0], images[:, 1])


def test_a_search_on_a_dataset_by_name(tmp_path, capsys):
    write_mnist(tmp_path)
    assert cli.main(['search', '--policy', 'uniform', '--budget', 'macs=0.5x', '--model', 'test_resnet', '--img-size', '32', '-j', '0',
                     '--dataset', 'torch/mnist', '--data-dir', str(tmp_path), '-b', '8', '--epochs', '1', '--device', 'cpu',
                     '--output', str(tmp_path / 'run')]) == 0
    assert 'found' in capsys.readouterr().out


@pytest.mark.parametrize('name, says', [
    ('torch/mnist', "split 'train', cannot be opened: RuntimeError: Dataset not found"),
    ('torch/nonesuch', 'Unknown torchvision dataset nonesuch'),
    ('nonesuch/x', 'cannot be opened'),
])
def test_a_dataset_that_cannot_be_opened_is_one_message(name, says, tmp_path, capsys):
    assert cli.main(['search', '--policy', 'uniform', '--budget', 'macs=0.5x', '--model', 'test_resnet', '--dataset', name,
                     '--data-dir', str(tmp_path), '--output', str(tmp_path / 'run')]) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_proxy_keeps_the_share_of_the_classes_it_names():
    """Of each class the same fraction, and none of the others."""
    targets = np.arange(600) % 6
    kept = data.shrink(targets, np.arange(60, 600), 0.25, [1, 4], seed=0)
    assert set(targets[kept]) == {1, 4} and (kept >= 60).all() and (np.diff(kept) > 0).all()
    assert np.bincount(targets[kept])[[1, 4]].tolist() == [22, 22]  # of 90 each
    assert (kept == data.shrink(targets, np.arange(60, 600), 0.25, [1, 4], seed=0)).all()


@pytest.mark.parametrize('world', [1, 2, 3])
def test_processes_share_a_scored_view_without_padding(world):
    """Each image is scored once, by one process."""
    images = [(Image.new('RGB', (32, 32)), i) for i in range(10)]
    seen = []
    for rank in range(world):
        args = arguments('-b', '2')
        args.world_size, args.rank = world, rank
        for _, targets in data.loader(data.View(images, [9, 2, 4, 7, 5]), args, CONFIG, training=False):
            seen += targets.tolist()
    assert sorted(seen) == [2, 4, 5, 7, 9]
