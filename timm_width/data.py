"""The images that a search trains on: scikit-learn's digits, embedded, or a folder of images read by timm.

Images are RGB everywhere; grey ones are repeated to three channels, so that every model and every pretrained weight fits.
"""
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader, Dataset

from .space import nearest

__all__ = ['DEFAULTS', 'Splits', 'UsageError', 'View', 'loader', 'open_splits', 'split_holdout']

TRAIN, VALIDATION = ('train', 'training'), ('validation', 'val', 'valid')  # folders that timm reads as these splits
SPLIT_SEED = 0  # of the digits' own split, which is part of the dataset: the same images whatever --seed is

# per embedded dataset: defaults of timm's flags that suit its images. A flipped digit is another sign, its edges carry meaning.
DEFAULTS: dict[str, dict[str, Any]] = {
    'digits': {'img_size': 32, 'hflip': 0., 'scale': [0.7, 1.], 'ratio': [0.8, 1.25], 'color_jitter': 0., 'crop_pct': 1.,
               'workers': 0},
}


class UsageError(ValueError):
    """Something that the user gave cannot be worked with."""


@dataclass(frozen=True)
class Splits:
    """The images of both splits, undecorated, and the classes of the training images."""
    train: Dataset
    validation: Dataset
    targets: np.ndarray
    num_classes: int


class View(Dataset):
    """Some images of a dataset under a transform of their own, which timm's create_loader sets."""

    def __init__(self, images: Dataset, indices: Optional[Sequence[int]] = None):
        self.images, self.transform = images, None
        self.indices = np.arange(len(images)) if indices is None else np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.images[self.indices[index]]
        return image if self.transform is None else self.transform(image), target


class Digits(Dataset):
    """Handwritten digits of 8x8 pixels."""

    def __init__(self, pixels: np.ndarray, targets: np.ndarray):
        self.pixels, self.targets = pixels, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert('RGB'), int(self.targets[index])


def open_splits(args: Namespace) -> Splits:
    """Finds the training and the validation images that `--dataset` or `--data-dir` name; sets args.num_classes if it is not.

    Raises:
        UsageError: They are not there, or cannot be trained on.
    """
    splits = _open(args)
    args.num_classes = args.num_classes or splits.num_classes
    if args.num_classes < splits.num_classes:
        raise UsageError(f'--num-classes {args.num_classes} is less than the {splits.num_classes} classes of the images')
    return splits


def _open(args: Namespace) -> Splits:
    if args.dataset in DEFAULTS:
        if args.data_dir:
            raise UsageError(f'--dataset {args.dataset} is embedded and reads no folder: leave out --dataset or --data-dir')
        return _digits()
    if args.dataset:
        raise UsageError(f"unknown dataset '{args.dataset}'{nearest(args.dataset, DEFAULTS)}; "
                         f"embedded is {', '.join(DEFAULTS)}, other images are read from --data-dir FOLDER")
    if not args.data_dir:
        raise UsageError('no images: give --dataset digits, or --data-dir FOLDER with the subfolders train/ and val/')
    return _folder(Path(args.data_dir))


def _digits() -> Splits:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError("--dataset digits needs scikit-learn: pip install 'timm-width[demo]'") from None
    data = load_digits()
    pixels = (data.images * (255 / 16)).astype(np.uint8)
    train, validation = split_holdout(data.target, 0.2, SPLIT_SEED)
    return Splits(Digits(pixels[train], data.target[train]), Digits(pixels[validation], data.target[validation]),
                  data.target[train], len(data.target_names))


def _folder(root: Path) -> Splits:
    if not root.is_dir():
        raise UsageError(f"--data-dir '{root}' {'is not a folder' if root.exists() else 'does not exist'}")
    train = _read(root, TRAIN)
    classes = train.reader.class_to_idx
    if len(classes) < 2:
        raise UsageError(f"{train.reader.root} has one class ('{next(iter(classes))}'), a classifier needs two or more: "
                         'put the images of each class into a subfolder of its own')
    first = train.reader.samples[0][0]
    try:
        Image.open(first).load()
    except OSError as e:
        raise UsageError(f"'{first}' cannot be read as an image: {e}") from None
    validation = _read(root, VALIDATION)
    unknown = sorted(set(validation.reader.class_to_idx) - set(classes))
    if unknown:
        raise UsageError(f"{validation.reader.root} has classes that {train.reader.root} has not: {', '.join(unknown[:5])}")
    if validation.reader.class_to_idx != classes:  # some class has no validation image
        validation = _read(root, VALIDATION, classes)
    return Splits(train, validation, np.array([t for _, t in train.reader.samples]), len(classes))


def _read(root: Path, split: Sequence[str], classes: Optional[dict[str, int]] = None) -> Dataset:
    folder = next((root / name for name in split if (root / name).is_dir()), None)
    if folder is None:
        raise UsageError(f"--data-dir '{root}' has no folder {split[0]}/: expected train/CLASS/IMAGE and val/CLASS/IMAGE")
    try:
        return create_dataset('', root=str(folder), search_split=False, class_map=classes)
    except RuntimeError as e:  # timm found no image
        raise UsageError(str(e)) from None


def split_holdout(targets: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sets aside a fraction of every class, at least one image of each class that has two.

    Args:
        targets: Class of every image.
        fraction: Share of the images to set aside.
        seed: Seed of the draw.

    Returns:
        Indices of the images that stay and of those set aside, each ascending.
    """
    rng = np.random.default_rng(seed)
    aside = []
    for c in np.unique(targets):
        of_class = rng.permutation(np.flatnonzero(targets == c))
        aside.append(of_class[:min(max(round(fraction * len(of_class)), 1), len(of_class) - 1)])
    held = np.sort(np.concatenate(aside))
    return np.setdiff1d(np.arange(len(targets)), held), held


def loader(view: View, args: Namespace, config: dict[str, Any], training: bool) -> DataLoader:
    """Batches of a view by timm's loader, augmented when training.

    Args:
        view: The images.
        args: timm's flags for loading and augmentation.
        config: timm's data config of the model.
        training: Whether to shuffle and augment.
    """
    return create_loader(
        view, config['input_size'], min(args.batch_size, len(view)), is_training=training, no_aug=args.no_aug,
        scale=args.scale, ratio=args.ratio, hflip=args.hflip, color_jitter=args.color_jitter,
        interpolation=config['interpolation'], mean=config['mean'], std=config['std'], crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'], num_workers=args.workers, device=torch.device(args.device),
        pin_memory=args.device.startswith('cuda'))
