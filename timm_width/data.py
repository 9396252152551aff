"""The images that a search trains on: scikit-learn's digits, embedded, or what timm's create_dataset reads.

Images are RGB everywhere; grey ones are repeated to three channels, so that every model and every pretrained weight fits.
"""
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, MultiLabelTarget, create_dataset, create_loader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .space import nearest

__all__ = [
    'DEFAULTS', 'SYNONYMS', 'Splits', 'TwoParts', 'UsageError', 'View', 'default_classes', 'find_splits', 'first_line', 'loader',
    'mixes', 'open_splits', 'shrink', 'split_holdout',
]

SYNONYMS = ('train', 'training'), ('validation', 'val', 'valid', 'eval', 'evaluation')  # folders that timm reads as one split
SPLIT_SEED = 0  # of the digits' own split, which is part of the dataset: the same images whatever --seed is

# per embedded dataset: defaults of timm's flags that suit its images. A flipped digit is another sign, its edges carry meaning.
DEFAULTS: dict[str, dict[str, Any]] = {
    'digits': {'img_size': 32, 'hflip': 0., 'scale': [0.7, 1.], 'ratio': [0.8, 1.25], 'color_jitter': 0., 'crop_pct': 1.,
               'workers': 0},
}


# of --task multilabel: even, prime, above four, with a loop, a multiple of three
DIGIT_LABELS = np.array(
    [[d % 2 == 0, d in (2, 3, 5, 7), d > 4, d in (0, 6, 8, 9), d % 3 == 0] for d in range(10)], dtype=np.float32)


def default_classes(args: Namespace) -> Optional[int]:
    """Classes of an embedded dataset: those of other datasets are for --num-classes or the model to say."""
    return None if args.dataset not in DEFAULTS else DIGIT_LABELS.shape[1] if args.task == 'multilabel' else len(DIGIT_LABELS)


class UsageError(ValueError):
    """Something that the user gave cannot be worked with."""


def first_line(error: BaseException) -> str:
    """What an error says first, or what it is called if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Splits:
    """The images of both splits, undecorated, and the classes (or rows of labels) of the training images."""
    train: Dataset
    validation: Dataset
    targets: np.ndarray
    num_classes: int


class View(Dataset):
    """Some images of a dataset under a transform of their own, which timm's create_loader sets.

    Args:
        images: The dataset.
        indices: Which of its images; by default all.
        classes: Class -> the class that it is called here; by default its own.
        mode: What images are converted to.
    """

    def __init__(
            self,
            images: Dataset,
            indices: Optional[Sequence[int]] = None,
            classes: Optional[Mapping[int, int]] = None,
            mode: str = 'RGB',
    ):
        self.images, self.classes, self.mode, self.transform = images, classes, mode, None
        self.indices = np.arange(len(images)) if indices is None else np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.images[self.indices[index]]
        if isinstance(image, Image.Image) and image.mode != self.mode:
            image = image.convert(self.mode)
        return image if self.transform is None else self.transform(image), self.classes[target] if self.classes else target


class Digits(Dataset):
    """Handwritten digits of 8x8 pixels, with a class each or a row of labels."""

    def __init__(self, pixels: np.ndarray, targets: np.ndarray):
        self.pixels, self.targets = pixels, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        target = self.targets[index]
        image = Image.fromarray(self.pixels[index]).convert('RGB')
        return image, torch.from_numpy(target) if self.targets.ndim == 2 else int(target)


def open_splits(args: Namespace) -> Splits:
    """Finds the training and the validation images that `--dataset` or `--data-dir` name; sets args.num_classes if it is not.

    Raises:
        UsageError: They are not there, or cannot be trained on.
    """
    splits = find_splits(args)
    args.num_classes = args.num_classes or splits.num_classes
    if args.num_classes < splits.num_classes or args.task == 'multilabel' and args.num_classes != splits.num_classes:
        what = 'less than' if args.num_classes < splits.num_classes else 'not'
        raise UsageError(f'--num-classes {args.num_classes} is {what} the {splits.num_classes} classes of the images')
    return splits


def find_splits(args: Namespace) -> Splits:
    """Finds the training and the validation images, whatever --num-classes says."""
    if args.dataset in DEFAULTS:
        if args.data_dir:
            raise UsageError(f'--dataset {args.dataset} is embedded and reads no folder: leave out --dataset or --data-dir')
        return _digits(args.task == 'multilabel')
    if '/' in args.dataset:
        return _named(args)
    if args.task == 'multilabel' and not args.dataset:
        raise UsageError('--task multilabel needs a --dataset that has labels: images in folders have one class each')
    if args.dataset:
        raise UsageError(f"unknown dataset '{args.dataset}'{nearest(args.dataset, DEFAULTS)}; embedded is {', '.join(DEFAULTS)}, "
                         "timm's are torch/NAME and hfds/OWNER/NAME; folders of images are read from --data-dir FOLDER")
    if not args.data_dir:
        raise UsageError('no images: give --dataset digits, or --data-dir FOLDER with the subfolders train/ and val/')
    return _folder(args)


def _named(args: Namespace) -> Splits:
    """A dataset that timm finds by name."""
    given = {'--class-map': args.class_map, '--input-img-mode': args.input_img_mode, '--input-key': args.input_key,
             '--target-key': args.target_key}
    unused = [flag for flag, value in given.items() if value]
    if unused and args.dataset.lower().startswith('torch/'):
        raise UsageError(f"{', '.join(unused)} cannot be used with --dataset {args.dataset}: torchvision's datasets have none")

    multi, further = args.task == 'multilabel', {}
    if multi:
        if not args.num_classes:
            raise UsageError('--task multilabel needs --num-classes: the number of labels')
        further['target_transform'] = MultiLabelTarget(args.num_classes, dense=args.target_format == 'multihot')

    def read(split: str) -> Dataset:
        try:
            found = create_dataset(
                args.dataset, args.data_dir, split=split, download=args.dataset_download, class_map=args.class_map or None,
                input_img_mode=args.input_img_mode or 'RGB', input_key=args.input_key, target_key=args.target_key,
                trust_remote_code=args.dataset_trust_remote_code, **further) if not args.dataset.lower().startswith('torch/') else (
                create_dataset(args.dataset, args.data_dir, split=split, download=args.dataset_download, **further))
        except (AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as e:
            reason = (str(e).strip().splitlines() or [''])[0]
            raise UsageError(f"--dataset {args.dataset}, split '{split}', cannot be opened: {type(e).__name__}: {reason}") from e
        if isinstance(found, IterableDataset):
            raise UsageError(f'--dataset {args.dataset} can only be read from start to end, so no part of it can be held out: '
                             'give it as hfds/..., torch/... or a folder')
        return found

    train, validation = read(args.train_split), read(args.val_split)
    if multi:  # what they are decides nothing
        return Splits(train, validation, np.zeros((len(train), args.num_classes), np.float32), args.num_classes)
    targets = _targets(train)
    return Splits(train, validation, targets, int(targets.max()) + 1)


def _targets(images: Dataset) -> np.ndarray:
    """The class of every image, without reading the images where the dataset says it."""
    reader = getattr(images, 'reader', None)
    if reader is not None and hasattr(reader, 'label_key'):  # Hugging Face
        found = reader.dataset[reader.label_key]
    else:
        found = next((t for t in (getattr(images, name, None) for name in ('targets', 'labels', '_labels')) if t is not None), None)
    if found is None or len(found) != len(images):
        found = [images[i][1] for i in range(len(images))]
    return np.asarray(found, dtype=np.int64)


def _digits(labels: bool) -> Splits:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError("--dataset digits needs scikit-learn: pip install 'timm-width[demo]'") from None
    data = load_digits()
    pixels = (data.images * (255 / 16)).astype(np.uint8)
    train, validation = split_holdout(data.target, 0.2, SPLIT_SEED)
    targets = DIGIT_LABELS[data.target] if labels else data.target
    return Splits(Digits(pixels[train], targets[train]), Digits(pixels[validation], targets[validation]), targets[train],
                  targets.shape[1] if labels else len(data.target_names))


def _folder(args: Namespace) -> Splits:
    root = Path(args.data_dir)
    if not root.is_dir():
        raise UsageError(f"--data-dir '{root}' {'is not a folder' if root.exists() else 'does not exist'}")
    train = _read(args, args.train_split)
    classes = train.reader.class_to_idx
    if len(classes) < 2:
        raise UsageError(f"{train.reader.root} has one class ('{next(iter(classes))}'), a classifier needs two or more: "
                         'put the images of each class into a subfolder of its own')
    first = train.reader.samples[0][0]
    try:
        Image.open(first).load()
    except OSError as e:
        raise UsageError(f"'{first}' cannot be read as an image: {e}") from None
    validation = _read(args, args.val_split)
    unknown = sorted(set(validation.reader.class_to_idx) - set(classes))
    if unknown:
        raise UsageError(f"{validation.reader.root} has classes that {train.reader.root} has not: {', '.join(unknown[:5])}")
    if validation.reader.class_to_idx != classes:  # some class has no validation image
        validation = _read(args, args.val_split, classes)
    return Splits(train, validation, np.array([t for _, t in train.reader.samples]), len(classes))


def _read(args: Namespace, split: str, classes: Optional[dict[str, int]] = None) -> Dataset:
    root = Path(args.data_dir)
    names = next((names for names in SYNONYMS if split in names), (split,))
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        wanted = ' or '.join(f'{n}/' for n in names[:2])
        raise UsageError(f"--data-dir '{root}' has no folder {wanted}: expected train/CLASS/IMAGE and val/CLASS/IMAGE")
    try:
        return create_dataset('', root=str(folder), search_split=False, class_map=classes or args.class_map or None,
                              input_img_mode=args.input_img_mode or 'RGB')
    except (RuntimeError, OSError, AssertionError) as e:  # timm found no image, no class map
        raise UsageError(str(e)) from None


def split_holdout(targets: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sets aside a fraction of every class, at least one image of each class that has two; of images with labels, any.

    Args:
        targets: Class of every image, or a row of labels.
        fraction: Share of the images to set aside.
        seed: Seed of the draw.

    Returns:
        Indices of the images that stay and of those set aside, each ascending.
    """
    rng = np.random.default_rng(seed)
    if targets.ndim == 2:
        held = np.sort(rng.permutation(len(targets))[:round(fraction * len(targets))])
        return np.setdiff1d(np.arange(len(targets)), held), held
    aside = []
    for c in np.unique(targets):
        of_class = rng.permutation(np.flatnonzero(targets == c))
        aside.append(of_class[:min(max(round(fraction * len(of_class)), 1), len(of_class) - 1)])
    held = np.sort(np.concatenate(aside))
    return np.setdiff1d(np.arange(len(targets)), held), held


def shrink(targets: np.ndarray, indices: np.ndarray, fraction: float, classes: Sequence[int], seed: int) -> np.ndarray:
    """Some of some images: those of the classes given, and of each the same fraction, at least one.

    Args:
        targets: Class of every image.
        indices: The images to choose from.
        fraction: Share to keep.
        classes: The classes to keep.
        seed: Seed of the draw.

    Returns:
        Indices of the images kept, ascending.
    """
    rng = np.random.default_rng(seed)
    kept = []
    for c in classes:
        of_class = indices[targets[indices] == c]
        kept.append(rng.permutation(of_class)[:max(round(fraction * len(of_class)), 1)])
    return np.sort(np.concatenate(kept))


def loader(view: View, args: Namespace, config: Mapping[str, Any], training: bool) -> DataLoader:
    """Batches of a view by timm's loader, augmented (and mixed) when training.

    With several processes, each gets its share of every training batch, and its share of a view that is scored.

    Args:
        view: The images.
        args: timm's flags for loading and augmentation.
        config: timm's data config of the model.
        training: Whether to shuffle and augment.
    """
    world, rank = getattr(args, 'world_size', 1), getattr(args, 'rank', 0)
    if training:
        size, collate = min(args.batch_size, len(view) // world), None
        if mixes(args):
            size -= size % 2  # images are mixed in pairs
            collate = FastCollateMixup(
                mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
                switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
                num_classes=args.num_classes, multi_label=args.task == 'multilabel')
        if size < 1:
            raise UsageError(f'{len(view)} training images are too few for {world} processes')
    else:  # each process scores every so manyth image: none twice, as a sampler that pads would
        view = View(view.images, view.indices[rank::world], view.classes, view.mode)
        size, collate = min(args.validation_batch_size or args.batch_size, max(len(view), 1)), None
    return create_loader(
        view, config['input_size'], size, is_training=training, no_aug=args.no_aug, scale=args.scale, ratio=args.ratio,
        train_crop_mode=args.train_crop_mode, hflip=args.hflip, vflip=args.vflip, color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob, grayscale_prob=args.grayscale_prob or 0.,
        gaussian_blur_prob=args.gaussian_blur_prob or 0., auto_augment=args.aa, re_prob=args.reprob if training else 0.,
        re_mode=args.remode, re_count=args.recount, re_split=args.resplit,
        interpolation=training and not args.no_aug and args.train_interpolation or config['interpolation'],
        mean=config['mean'], std=config['std'], crop_pct=config['crop_pct'], crop_mode=config['crop_mode'],
        num_workers=args.workers, device=torch.device(args.device), collate_fn=collate, distributed=training and world > 1,
        pin_memory=args.pin_mem, worker_seeding=args.worker_seeding,
        persistent_workers=False)  # new ones every epoch: their seeds then follow from the random state that a resume restores


class TwoParts:
    """Batches of some images, and after them those of others: an epoch that trains two things.

    Attributes:
        second: Whether the batch that came last is of the second part.
    """

    def __init__(self, first: DataLoader, second: DataLoader):
        self.parts, self.second = (first, second), False
        self.sampler, self.dataset = self, first.dataset

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def ends(self) -> tuple[int, int]:
        """Numbers of batches after which a part is over."""
        return len(self.parts[0]), len(self)

    def __iter__(self) -> Iterator[Any]:
        for i, part in enumerate(self.parts):
            for batch in part:
                self.second = bool(i)
                yield batch

    def set_epoch(self, epoch: int) -> None:
        for part in self.parts:
            if hasattr(part.sampler, 'set_epoch'):
                part.sampler.set_epoch(epoch)

    @property
    def seed(self) -> int:
        """Of the order of several processes."""
        return getattr(self.parts[0].sampler, 'seed', 0)

    @seed.setter
    def seed(self, seed: int) -> None:
        for part in self.parts:
            part.sampler.seed = seed

    @property
    def mixup_enabled(self) -> bool:
        """Whether images are mixed."""
        return self.parts[0].mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        for part in self.parts:
            part.mixup_enabled = enabled


def mixes(args: Namespace) -> bool:
    """Whether the flags ask for mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
