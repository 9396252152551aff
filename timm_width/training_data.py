"""The images of a training, as timm's train.py reads them: datasets, and loaders with all that its flags say."""
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    Mixup,
    MultiLabelTarget,
    NaFlexMixup,
    create_dataset,
    create_loader,
    create_naflex_loader,
)
from timm.utils import unwrap_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .data import DEFAULTS, SYNONYMS, UsageError, View, find_splits, first_line, mixes

__all__ = ['open_datasets', 'make_loaders']

FAILURES = (AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError, AttributeError)


def open_datasets(args: Namespace, channels: int) -> tuple[Dataset, Optional[Dataset]]:
    """The training images, and the validation images unless --val-split is empty.

    Args:
        args: The flags; args.num_classes must be set.
        channels: What the model takes.

    Raises:
        UsageError: They are not there, or not what the other flags say.
    """
    mode = args.input_img_mode or ('RGB' if channels == 3 else 'L')
    if args.dataset in DEFAULTS:
        splits = find_splits(args)
        if args.num_classes < splits.num_classes or args.task == 'multilabel' and args.num_classes != splits.num_classes:
            raise UsageError(f'the images have {splits.num_classes} classes, the model {args.num_classes}: '
                             f'give --num-classes {splits.num_classes}')
        return View(splits.train, mode=mode), View(splits.validation, mode=mode) if args.val_split else None
    if not args.data_dir and '/' not in args.dataset:
        raise UsageError('no images: give --dataset digits, --dataset torch/NAME or the like, or --data-dir FOLDER')
    train = _open(args, mode, args.train_split, training=True)
    _check_classes(args, train)
    if args.task == 'multilabel' and '/' not in args.dataset:
        raise UsageError('--task multilabel needs images with several labels each: hfds/OWNER/NAME with its --target-key, or the '
                         '--dataset digits; a folder of images gives each one class')
    if not args.val_split:
        return train, None
    if '/' not in args.dataset and _has_split(args.data_dir, args.train_split) and not _has_split(args.data_dir, args.val_split):
        raise UsageError(f"--data-dir '{args.data_dir}' has no folder {args.val_split}/ (or val/, ...) beside the training images: "
                         "name it with --val-split, or say --val-split ''")
    validation = _open(args, mode, args.val_split)
    ours, theirs = (getattr(getattr(d, 'reader', None), 'class_to_idx', None) for d in (train, validation))
    if not args.dataset and not args.class_map and ours != theirs:  # some class has no validation image, or is new there
        unknown = sorted(set(theirs) - set(ours))
        if unknown:
            raise UsageError(f"the validation images have classes that the training images have not: {', '.join(unknown[:5])}")
        validation = _open(args, mode, args.val_split, class_map=ours)
    return train, validation


def _open(args: Namespace, mode: str, split: str, training: bool = False, class_map: Any = None) -> Dataset:
    further = {}
    if args.task == 'multilabel':
        further['target_transform'] = MultiLabelTarget(args.num_classes, dense=args.target_format == 'multihot')
    size = args.batch_size if training else args.validation_batch_size or args.batch_size
    if training:
        further.update(seed=args.seed, repeats=args.epoch_repeats)
    if not args.dataset.lower().startswith('torch/'):
        further.update(input_img_mode=mode, input_key=args.input_key, target_key=args.target_key,
                       trust_remote_code=args.dataset_trust_remote_code)
    try:
        return create_dataset(
            args.dataset, root=args.data_dir, split=split, is_training=training, class_map=class_map or args.class_map,
            download=args.dataset_download, batch_size=size,
            num_samples=args.train_num_samples if training else args.val_num_samples, **further)
    except FAILURES as e:
        what = f'--dataset {args.dataset}' if args.dataset else f"--data-dir '{args.data_dir}'"
        reason = first_line(e)
        if args.data_dir and not Path(args.data_dir).exists():
            reason = f"there is no folder '{args.data_dir}'"
        raise UsageError(f"{what}, split '{split}', cannot be opened: {reason}") from e


def _check_classes(args: Namespace, images: Dataset) -> None:
    classes = getattr(getattr(images, 'reader', None), 'class_to_idx', None)
    if not args.dataset and classes and args.task != 'multilabel' and len(classes) > args.num_classes:
        raise UsageError(f'the images have {len(classes)} classes, the model {args.num_classes}: give --num-classes {len(classes)}')


def _has_split(root: str, split: str) -> bool:
    names = next((names for names in SYNONYMS if split in names), (split,))
    return any((Path(root) / name).is_dir() for name in names)


# -- loaders ---------------------------------------------------------------------------------------------------------------


def make_loaders(
        args: Namespace,
        config: Mapping[str, Any],
        train: Dataset,
        validation: Optional[Dataset],
        model: nn.Module,
) -> tuple[DataLoader, Optional[DataLoader], Optional[Mixup]]:
    """timm's loaders.

    Args:
        args: The flags.
        config: timm's data config of the model.
        train: Training images.
        validation: Validation images, if there are any.
        model: The model.

    Returns:
        Batches to train on and to validate on, and what mixes a batch if the loader does not.

    Raises:
        UsageError: The flags do not go together, or ask for larger batches than there are images.
    """
    prefetch = not args.no_prefetcher
    if prefetch and args.aug_splits and mixes(args) and not args.naflex_loader:
        raise UsageError('--mixup and --cutmix of --aug-splits need --no-prefetcher')
    if mixes(args) and args.batch_size % 2:
        raise UsageError(f'images are mixed in pairs: --batch-size {args.batch_size} must be even')
    mixing = {'mixup_alpha': args.mixup, 'cutmix_alpha': args.cutmix, 'cutmix_minmax': args.cutmix_minmax, 'prob': args.mixup_prob,
              'switch_prob': args.mixup_switch_prob, 'mode': args.mixup_mode, 'label_smoothing': args.smoothing,
              'num_classes': args.num_classes, 'multi_label': args.task == 'multilabel'}
    mixup = None
    if args.naflex_loader:
        mixing.pop('cutmix_minmax'), mixing.pop('mode')
        mixup = NaFlexMixup(**mixing, mixup_off_epoch=args.mixup_off_epoch) if mixes(args) else None
    elif mixes(args) and not prefetch:
        mixup = Mixup(**mixing)
    collate = FastCollateMixup(**mixing) if mixes(args) and prefetch and not args.naflex_loader else None
    if args.aug_splits > 1:
        train = AugMixDataset(train, num_splits=args.aug_splits)

    common = {'mean': config['mean'], 'std': config['std'], 'num_workers': args.workers, 'distributed': args.distributed,
              'pin_memory': args.pin_mem, 'img_dtype': getattr(torch, args.model_dtype or 'float32'),
              'device': torch.device(args.device), 'use_prefetcher': prefetch, 'worker_seeding': args.worker_seeding}
    interpolation = config['interpolation'] if args.no_aug or not args.train_interpolation else args.train_interpolation
    augmented = {
        'is_training': True, 'no_aug': args.no_aug, 're_prob': args.reprob, 're_mode': args.remode, 're_count': args.recount,
        're_split': args.resplit, 'train_crop_mode': args.train_crop_mode, 'scale': args.scale, 'ratio': args.ratio,
        'hflip': args.hflip, 'vflip': args.vflip, 'color_jitter': args.color_jitter, 'color_jitter_prob': args.color_jitter_prob,
        'grayscale_prob': args.grayscale_prob or 0., 'gaussian_blur_prob': args.gaussian_blur_prob or 0., 'auto_augment': args.aa,
        'num_aug_repeats': args.aug_repeats, 'num_aug_splits': args.aug_splits, 'interpolation': interpolation}
    plain = {'is_training': False, 'interpolation': config['interpolation'], 'crop_pct': config['crop_pct'],
             'batch_size': args.validation_batch_size or args.batch_size}
    reading = dict(common)
    if args.distributed and any(kind in args.dataset for kind in ('tfds', 'wds')):
        reading['num_workers'] = min(2, args.workers)  # that each process reads as many
    try:
        if args.naflex_loader:
            patch_size = _patch_size(model)
            patches = {'channels': config['input_size'][0],
                       'patchify_channels_last': not args.naflex_patchify_channels_first, 'max_seq_len': args.naflex_max_seq_len,
                       'rank': args.rank, 'world_size': args.world_size, 'seed': args.seed}
            training = create_naflex_loader(
                train, train_seq_lens=tuple(args.naflex_train_seq_lens), patch_size=None if args.naflex_patch_sizes else patch_size,
                patch_size_choices=args.naflex_patch_sizes,
                patch_size_choice_probs=args.naflex_patch_size_probs, mixup_fn=mixup, batch_size=args.batch_size,
                **patches, **common, **augmented)
            held = validation and create_naflex_loader(validation, patch_size=patch_size, **patches, **reading, **plain)
            return training, held, None
        training = create_loader(
            train, config['input_size'], args.batch_size, collate_fn=collate, use_multi_epochs_loader=args.use_multi_epochs_loader,
            **common, **augmented, **_schedule(args, config))
        held = validation and create_loader(validation, config['input_size'], **reading, **plain)
    except FAILURES as e:
        raise UsageError(f"the images cannot be loaded so: {first_line(e)}") from e
    if not isinstance(train, IterableDataset) and not len(training):
        raise UsageError(f'{len(train)} training images are less than a batch of {args.batch_size}'
                         + f' in each of {args.world_size} processes' * args.distributed + ': give a smaller --batch-size')
    return training, held, mixup


def _schedule(args: Namespace, config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of images and batches that change from batch to batch."""
    if args.train_img_sizes is None and args.train_batches_per_epoch is None:
        return {}
    return {'input_size_choices': args.train_img_sizes or [config['input_size']], 'batch_size_choices': args.train_batch_sizes,
            'batch_choice_weights': args.train_size_probs, 'batch_choice_seed': args.seed,
            'batch_choice_schedule': args.train_size_schedule, 'batch_schedule_epochs': args.epochs,
            'batch_schedule_spread': args.train_size_schedule_spread, 'batch_schedule_random_mix': args.train_size_random_mix,
            'num_batches': args.train_batches_per_epoch}


def _patch_size(model: nn.Module) -> Any:
    """Sides of the patches that a NaFlex model is made for."""
    found = getattr(getattr(unwrap_model(model), 'embeds', None), 'patch_size', None)
    if found is None:
        raise ValueError('--naflex-loader needs a NaFlex model')
    return found
