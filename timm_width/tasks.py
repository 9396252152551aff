"""The task of a training: classification, labels or distillation, as timm's train.py makes them."""
import logging
from argparse import Namespace
from typing import Any, Optional

import torch
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.task.distillation import DistillationTeacher
from torch import nn
from torch.nn import functional as F

from .data import UsageError
from .engine import create
from .losses import criterion_kwargs

__all__ = ['make_task']

_logger = logging.getLogger(__name__)


class Teacher(DistillationTeacher):
    """A teacher that sees the student's images at a size of its own."""

    def __init__(self, model: nn.Module, image_size: Optional[int], device: torch.device, dtype: Optional[torch.dtype]):
        super().__init__(model.to(device, dtype), device=device, dtype=dtype)
        self.image_size = image_size

    def normalize_input(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        images = super().normalize_input(input, *args, **kwargs)
        if self.image_size is None or self.image_size == images.shape[-1] == images.shape[-2]:
            return images
        return F.interpolate(images, size=(self.image_size, self.image_size), mode='bicubic', antialias=True)


def make_task(model: nn.Module, args: Namespace) -> TrainingTask:
    """The task that --task and --kd-model-name ask for.

    Raises:
        UsageError: The loss or the distillation does not fit the model.
    """
    device = torch.device(args.device)
    common = {'device': device, 'dtype': getattr(torch, args.model_dtype) if args.model_dtype else None, 'verbose': False}
    try:
        common['criterion_kwargs'] = criterion_kwargs(args, args.num_classes)
        common['criterion_kwargs'].pop('multi_label')  # the task knows
        if args.kd_model_name:
            return _distillation(model, args, device, common)
        if args.task == 'multilabel':
            return MultiLabelClassificationTask(model, threshold=args.multilabel_threshold, **common)
        return ClassificationTask(model, **common)
    except (ValueError, AssertionError, RuntimeError, OSError) as e:
        raise e if isinstance(e, UsageError) else UsageError(str(e)) from e


def _distillation(model: nn.Module, args: Namespace, device: torch.device, common: dict[str, Any]) -> TrainingTask:
    teacher = create(args.kd_model_name, model.num_classes, True, in_chans=model.in_chans)
    stored = getattr(teacher, 'pretrained_cfg', {}).get('num_classes')
    if stored not in (None, model.num_classes):
        _logger.warning(f"--kd-model-name '{args.kd_model_name}' has {stored} classes and the student {model.num_classes}: the "
                        "teacher's classifier is a new, random one")
    size = args.teacher_img_size
    common.update(student_model=model, teacher_model=Teacher(teacher, size, device, common['dtype']),
                  distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    if args.kd_distill_type == 'logit':
        return LogitDistillationTask(loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common)
    if args.kd_distill_type == 'feature':
        return FeatureDistillationTask(
            student_feature_dim=args.kd_student_feature_dim, teacher_feature_dim=args.kd_teacher_feature_dim, **common)
    return TokenDistillationTask(distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common)
