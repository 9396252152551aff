"""VGG for images of 32 pixels, as CIFAR-10 is used with: the convolutions of VGG-19 with batch norm, and one linear layer."""
from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

__all__ = ['OURS', 'VGGSmall']

OURS = ('vgg19_bn_cifar',)  # bases registered here

# convolutions of 3x3, per stage; a maximum over 2x2 ends each stage
VGG19 = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))


class VGGSmall(nn.Module):
    """Stages of 3x3 convolutions, each with batch norm and ReLU; a linear classifier on the pooled last one.

    The VGGNet of "Locally free weight sharing for network width search" (CafeNet, Su et al., ICLR 2021), section 4.2: 20 M
    parameters and 399 M MACs at 32 pixels.

    Args:
        num_classes: Outputs of the classifier.
        in_chans: Channels of the images.
        stages: (width, convolutions) of each stage.
        global_pool: How the last stage is pooled.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
            self,
            num_classes: int = 10,
            in_chans: int = 3,
            stages: tuple[tuple[int, int], ...] = VGG19,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
    ):
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        layers: list[nn.Module] = []
        self.feature_info = []
        chs, reduction = in_chans, 1
        for width, depth in stages:
            for _ in range(depth):
                layers += [nn.Conv2d(chs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                chs = width
            self.feature_info.append({'num_chs': chs, 'reduction': reduction, 'module': f'features.{len(layers) - 1}'})
            layers.append(nn.MaxPool2d(2))
            reduction *= 2
        self.features = nn.Sequential(*layers)
        self.num_features = self.head_hidden_size = chs
        self.head = ClassifierHead(chs, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {'stem': r'^features\.0', 'blocks': r'^features\.(\d+)'}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable, 'gradient checkpointing not supported'

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Union[None, int, Sequence[int]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[list[torch.Tensor], tuple[torch.Tensor, list[torch.Tensor]]]:
        """The outputs of stages, before they are pooled (see timm's models, whose arguments these are)."""
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take, most = feature_take_indices(len(self.feature_info), indices)
        ends = [int(info['module'].rpartition('.')[2]) for info in self.feature_info]
        found, layers = [], self.features[:ends[most] + 1] if stop_early and not torch.jit.is_scripting() else self.features
        for i, layer in enumerate(layers):
            x = layer(x)
            if i in ends and ends.index(i) in take:
                found.append(x)
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
            self,
            indices: Union[int, Sequence[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Takes away what intermediates do not need."""
        take, most = feature_take_indices(len(self.feature_info), indices)
        self.features = self.features[:int(self.feature_info[most]['module'].rpartition('.')[2]) + 1]
        if prune_head:
            self.reset_classifier(0, '')
        return take

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs({'vgg19_bn_cifar.untrained': {
    'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (1, 1), 'crop_pct': 1., 'interpolation': 'bicubic',
    'mean': (0.491, 0.482, 0.447), 'std': (0.247, 0.243, 0.262), 'first_conv': 'features.0', 'classifier': 'head.fc'}})


@register_model
def vgg19_bn_cifar(pretrained: bool = False, **kwargs: Any) -> VGGSmall:
    """VGG-19 with batch norm and a linear head, for 32-pixel images."""
    return build_model_with_cfg(VGGSmall, 'vgg19_bn_cifar', pretrained, feature_cfg={'feature_cls': 'getter'}, **kwargs)
