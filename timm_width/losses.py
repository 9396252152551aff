"""The loss that the flags ask for: --task, --loss, the weights of classes, and the old names of all these."""
from argparse import Namespace
from collections.abc import Container
from typing import Any, Optional

import torch
from timm.loss import create_classification_loss, load_class_stats, resolve_class_weights

from .data import UsageError, mixes

__all__ = ['criterion_kwargs', 'resolve_loss']


def resolve_loss(args: Namespace, given: Container[str]) -> None:
    """Old names become new ones, and what cannot be is refused.

    Args:
        args: The flags, which are changed.
        given: Those that were said.

    Raises:
        UsageError: With the reason.
    """
    for old, name in ('bce_loss', 'bce'), ('jsd_loss', 'jsd'):
        if getattr(args, old, False):
            if args.loss not in (None, name):
                raise UsageError(f"--{old.replace('_', '-')} and --loss {args.loss} say different things")
            args.loss = name
    if args.bce_pos_weight is not None and args.loss_pos_weight is None:
        args.loss_pos_weight = str(args.bce_pos_weight)
    if args.target_format is not None and args.task != 'multilabel':
        raise UsageError('--target-format is for --task multilabel')
    if args.target_format not in (None, 'indices', 'multihot'):
        raise UsageError(f"--target-format must be indices or multihot, not '{args.target_format}'")
    if args.task == 'multilabel' and 'smoothing' not in given:
        args.smoothing = 0.
    if args.loss == 'jsd' and getattr(args, 'aug_splits', 0) < 2:
        raise UsageError('--loss jsd needs --aug-splits of 2 or more, which train has')
    try:
        create_classification_loss(**criterion_kwargs(args, None))
    except (ValueError, TypeError, OSError, AssertionError) as e:
        raise UsageError(f'the loss: {e}') from None


def criterion_kwargs(args: Namespace, num_classes: Optional[int]) -> dict[str, Any]:
    """What timm's create_classification_loss is told.

    Args:
        args: The flags.
        num_classes: Classes that weights are for, if known.

    Raises:
        ValueError: Weights are of another number of classes, or cannot be read.
    """
    stats, power = load_class_stats(args.class_stats), 1. if args.loss_weight_power is None else args.loss_weight_power
    weights = {kind: resolve_class_weights(getattr(args, f'loss_{kind}'), kind, stats, power)
               for kind in ('class_weight', 'pos_weight')}
    for kind, w in weights.items():
        if isinstance(w, torch.Tensor) and num_classes is not None and len(w) != num_classes:
            raise ValueError(f"--loss-{kind.replace('_', '-')} has {len(w)} entries but the model has {num_classes} classes")
    found: dict[str, Any] = {
        'loss_type': args.loss, 'multi_label': args.task == 'multilabel', 'smoothing': args.smoothing, 'soft_targets': mixes(args),
        'bce_target_thresh': args.bce_target_thresh, 'bce_sum': args.bce_sum, **weights}
    found.update({k: v for k, v in (('poly_gamma', args.poly_gamma), ('poly_epsilon', args.poly_epsilon)) if v is not None})
    if args.loss == 'jsd':
        found['jsd_splits'] = args.aug_splits
    if args.loss == 'db' and stats is not None:
        found['class_counts'], found['num_samples'] = stats
    return found
