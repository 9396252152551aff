"""GPUNet: networks found for the latency of GPUs, of timm's own blocks; and the network class that PRUNET shares with them.

"GPUNet: searching the deployable convolution neural networks for GPUs" (Wang et al., CVPR 2022); P0 and P1 are public results of
PRUNET's search, D1 and D2 were distilled. Convolutions are padded symmetrically: the release pads its fused blocks of stride 2 not
at all, which costs 1.7 to 3.8 % fewer MACs (0, 1 and 2) and as many parameters. In the release the hidden widths of D1 are not
rounded to multiples of 8 (99 for 96 here); those of all others are the same.
"""
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

from timm.layers import create_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import EfficientNetBuilder, resolve_bn_args
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn

__all__ = ['Block', 'GPUNet', 'OURS', 'create_network', 'default_cfg', 'gpunet_blocks']

BN_EPS = 1e-3
SE_RATIO = 0.25  # squeeze channels over the block's input channels
DIVISOR = 8  # timm's blocks round hidden widths to it


@dataclass(frozen=True)
class Block:
    """One layer of a network, as timm builds it.

    Attributes:
        type: 'conv' (convolution, norm, activation), 'fused' (EdgeResidual) or 'irb' (InvertedResidual).
        c_in: Input channels.
        c_out: Output channels.
        stride: Of the k x k convolution.
        kernel: Its size.
        hidden: Channels inside the block, a multiple of 8; 0 for 'conv'.
        se: Whether squeeze-and-excitation follows the k x k convolution.
        act: timm's name of the activation.
    """
    type: str
    c_in: int
    c_out: int
    stride: int
    kernel: int
    hidden: int = 0
    se: bool = False
    act: str = 'relu'

    @property
    def residual(self) -> bool:
        """Whether output and input are of one shape, so that the layer may be left out."""
        return self.stride == 1 and self.c_in == self.c_out

    def arguments(self) -> dict[str, Any]:
        """What timm's EfficientNetBuilder is told of the block."""
        said = {'out_chs': self.c_out, 'stride': self.stride, 'act_layer': self.act}
        if self.type == 'conv':
            return {'block_type': 'cn', 'kernel_size': self.kernel, **said}
        kernel = {'fused': 'exp_kernel_size', 'irb': 'dw_kernel_size'}[self.type]
        return {'block_type': {'fused': 'er', 'irb': 'ir'}[self.type], kernel: self.kernel, 'exp_ratio': self.hidden / self.c_in,
                'se_ratio': SE_RATIO * self.se, **said}

    def module(self, norm_layer: Any = None, device: Any = None, dtype: Any = None) -> nn.Module:
        """The block by itself, initialised as torch's layers are."""
        norm_layer = norm_layer or partial(nn.BatchNorm2d, eps=BN_EPS)
        builder = EfficientNetBuilder(
            round_chs_fn=_as_is, norm_layer=norm_layer, se_layer=SqueezeExcite, device=device, dtype=dtype)
        return builder(self.c_in, [[self.arguments()]])[0][0]

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Pixels of the output for an input of (height, width)."""
        return tuple(-(-s // self.stride) for s in size)

    def costs(self, size: Sequence[int]) -> tuple[int, int]:
        """MACs of one image, and parameters.

        Args:
            size: (height, width) of the input.
        """
        before, after = math.prod(size), math.prod(self.output_size(size))
        area, i, h, o = self.kernel ** 2, self.c_in, self.hidden, self.c_out
        if self.type == 'conv':
            return area * i * o * after, area * i * o + 2 * o
        if self.type == 'fused':
            macs, params = area * i * h * after, area * i * h + 2 * h
        else:
            macs, params = i * h * before + area * h * after, i * h + area * h + 4 * h
        if self.se:
            squeezed = round(SE_RATIO * i)
            macs, params = macs + 2 * h * squeezed, params + 2 * h * squeezed + squeezed + h
        return macs + h * o * after, params + h * o + 2 * o


class GPUNet(EfficientNet):
    """timm's EfficientNet of given blocks, whose stem may have another activation than the rest.

    Args:
        stages: The blocks, stage by stage.
        num_features: Channels of the last 1x1 convolution.
        stem_act: Activation of the stem; that of the last convolution is ReLU.
        **kwargs: Further arguments of EfficientNet.
    """

    def __init__(self, stages: Sequence[Sequence[Block]], num_features: int = 1280, stem_act: str = 'silu', **kwargs: Any):
        kwargs = {'output_stride': 64, **kwargs}  # the most that any of them has: no stride becomes a dilation
        super().__init__([[b.arguments() for b in blocks] for blocks in stages], num_features=num_features, act_layer='relu',
                         stem_size=stages[0][0].c_in, fix_stem=True, round_chs_fn=_as_is, **kwargs)
        self.bn1.act = create_act_layer(stem_act, inplace=True)


def _as_is(channels: int) -> int:
    return channels


def create_network(
        name: str,
        pretrained: bool,
        stages: Sequence[Sequence[Block]],
        network: Any = GPUNet,
        bn_eps: Optional[float] = None,
        **kwargs: Any,
) -> nn.Module:
    """Builds a network of blocks in timm's manner.

    Args:
        name: Registered name.
        pretrained: Whether to load weights.
        stages: The blocks, stage by stage.
        network: The class, or a function, that is given `stages`.
        bn_eps: Of batch norms; 1e-3 by default.
        **kwargs: Further arguments of the class and of timm's builder.
    """
    norm_layer = kwargs.pop('norm_layer', None) or partial(nn.BatchNorm2d, eps=bn_eps or BN_EPS, **resolve_bn_args(kwargs))
    levels = 1 + sum(b.stride > 1 for blocks in stages for b in blocks)
    return build_model_with_cfg(
        network, name, pretrained, feature_cfg={'feature_cls': 'getter', 'out_indices': tuple(range(levels))},
        stages=stages, norm_layer=norm_layer, **kwargs)


# -- the tables ------------------------------------------------------------------------------------------------------------------

# pixels, stem channels, stem activation, channels of the last convolution, stages;
# a stage: type, filters, stride, activation, SE, (kernel, hidden width) of each layer
_Table = tuple[int, int, str, int, Sequence[tuple[str, int, int, str, bool, Sequence[tuple[int, int]]]]]
NETWORKS: dict[str, _Table] = {
    'gpunet_0': (320, 32, 'silu', 1280, (
        ('conv', 32, 1, 'relu', False, [(3, 0)] * 2),
        ('fused', 32, 2, 'relu', False, [(3, 160)] * 2),
        ('fused', 64, 2, 'relu', False, [(3, 160)] + [(3, 320)] * 2),
        ('irb', 256, 2, 'silu', False, [(3, 320)] + [(3, 1280)] * 2),
        ('irb', 704, 2, 'relu', True, [(3, 1280), (3, 3520)]))),
    'gpunet_1': (288, 24, 'silu', 1280, (
        ('conv', 24, 1, 'relu', False, [(3, 0)]),
        ('fused', 64, 2, 'silu', False, [(3, 96), (3, 256)]),
        ('fused', 96, 2, 'silu', False, [(3, 256), (3, 384)]),
        ('irb', 160, 2, 'silu', True, [(3, 192)]),
        ('irb', 288, 1, 'relu', False, [(3, 800)] + [(3, 1440)] * 3),
        ('irb', 448, 2, 'relu', True, [(3, 1152)] + [(3, 1792)] * 3))),
    'gpunet_2': (384, 32, 'silu', 1280, (
        ('conv', 32, 1, 'relu', False, [(3, 0)] * 3),
        ('fused', 32, 2, 'silu', True, [(5, 192)]),
        ('fused', 112, 2, 'silu', False, [(3, 96)] + [(3, 336)] * 2),
        ('irb', 144, 2, 'silu', False, [(3, 672)] + [(3, 864)] * 5),
        ('irb', 160, 1, 'relu', False, [(5, 432)] + [(5, 480)] * 3),
        ('irb', 224, 2, 'silu', True, [(3, 480)] + [(3, 672)] * 7),
        ('irb', 832, 1, 'relu', False, [(5, 448)] + [(5, 1664)] * 6))),
    'gpunet_p0': (224, 32, 'relu', 1984, (
        ('conv', 32, 1, 'relu', False, [(3, 0)] * 2),
        ('conv', 64, 2, 'relu', False, [(3, 0)]),
        ('irb', 96, 2, 'relu', False, [(3, 512), (3, 736), (3, 736)]),
        ('irb', 256, 2, 'relu', False, [(3, 736), (5, 1088), (3, 1216)]),
        ('irb', 704, 2, 'relu', False, [(3, 2048), (5, 2688), (3, 2368), (3, 1792)]),
        ('irb', 704, 2, 'relu', False, [(3, 4032)]))),
    'gpunet_p1': (224, 32, 'relu', 1984, (
        ('conv', 32, 1, 'relu', False, [(3, 0)] * 2),
        ('conv', 64, 2, 'relu', False, [(5, 0)]),
        ('irb', 64, 1, 'relu', False, [(3, 512)] * 2),
        ('irb', 96, 2, 'relu', False, [(5, 512), (5, 768)]),
        ('irb', 256, 2, 'relu', False, [(5, 768), (5, 1920), (3, 2016)]),
        ('irb', 704, 2, 'relu', False, [(5, 2016), (5, 5632), (3, 5216), (5, 5632)]),
        ('irb', 704, 2, 'relu', False, [(5, 5600)]))),
    'gpunet_d1': (456, 33, 'relu', 1984, (
        ('irb', 33, 1, 'relu', False, [(3, 32)]),
        ('irb', 44, 2, 'relu', False, [(3, 96), (5, 176), (3, 136)]),
        ('irb', 67, 2, 'relu', False, [(5, 176), (5, 272), (3, 400), (5, 200)]),
        ('irb', 134, 2, 'relu', False, [(7, 400), (5, 808), (3, 400), (5, 536)]),
        ('irb', 190, 1, 'relu', False, [(3, 808), (5, 1144), (7, 1144), (3, 760)]),
        ('irb', 268, 2, 'relu', False, [(3, 1144), (3, 1608), (5, 1608), (3, 808), (3, 808), (3, 808)]))),
    'gpunet_d2': (528, 48, 'relu', 1984, (
        ('conv', 48, 1, 'relu', False, [(3, 0)] * 2),
        ('irb', 48, 1, 'relu', False, [(3, 48)]),
        ('irb', 64, 2, 'relu', False, [(3, 144), (5, 256), (3, 192)]),
        ('irb', 96, 2, 'relu', False, [(5, 256), (5, 384), (3, 576), (5, 288)]),
        ('irb', 192, 2, 'relu', False, [(7, 576), (5, 1152), (3, 576), (5, 768), (5, 768)]),
        ('irb', 272, 1, 'relu', False, [(3, 1152), (5, 1632), (7, 1632), (5, 1632), (3, 1088)]),
        ('irb', 384, 2, 'relu', False, [(3, 1632), (3, 2304), (5, 2304), (3, 1152), (3, 1152), (3, 1152), (3, 1152)]))),
}
OURS = tuple(NETWORKS)  # bases registered here
DISTILLED = ('gpunet_d1', 'gpunet_d2')
DISTILLED_FEATURES = 1152  # channels of their last convolution before the pooling; one more 1x1 convolution follows it


def gpunet_blocks(name: str) -> list[list[Block]]:
    """The blocks of a GPUNet, stage by stage."""
    _, channels, _, _, stages = NETWORKS[name]
    found = []
    for type_, filters, stride, act, se, layers in stages:
        found.append([Block(type_, filters if i else channels, filters, 1 if i else stride, kernel, hidden, se, act)
                      for i, (kernel, hidden) in enumerate(layers)])
        channels = filters
    return found


def _distilled(stages: Sequence[Sequence[Block]], num_features: int, **kwargs: Any) -> MobileNetV3:
    """D1 and D2: a second 1x1 convolution follows the pooling, as in MobileNetV3."""
    last = Block('conv', stages[-1][-1].c_out, DISTILLED_FEATURES, 1, 1)
    return MobileNetV3([[b.arguments() for b in blocks] for blocks in [*stages, [last]]], num_features=num_features,
                       head_bias=False, stem_size=stages[0][0].c_in, fix_stem=True, round_chs_fn=_as_is, **kwargs)


def _gpunet(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    _, _, stem_act, num_features, _ = NETWORKS[name]
    if name in DISTILLED:
        kwargs = {'network': _distilled, 'bn_eps': 1e-5, **kwargs}
    else:
        kwargs['stem_act'] = stem_act
    return create_network(name, pretrained, gpunet_blocks(name), num_features=num_features, **kwargs)


def default_cfg(size: int, strides: Iterable[int]) -> dict[str, Any]:
    """timm's settings of a network for images of `size` pixels, without weights."""
    left = -(-size // 2)
    for stride in strides:
        left = -(-left // stride)
    return {
        'num_classes': 1000, 'input_size': (3, size, size), 'pool_size': (left, left), 'crop_pct': 1., 'interpolation': 'bicubic',
        'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225), 'first_conv': 'conv_stem', 'classifier': 'classifier',
        'paper_ids': 'arXiv:2205.00841', 'paper_name': 'GPUNet: Searching the Deployable Convolution Neural Networks for GPUs'}


default_cfgs = generate_default_cfgs({
    f'{name}.untrained': default_cfg(size, (s[2] for s in stages)) for name, (size, _, _, _, stages) in NETWORKS.items()})


@register_model
def gpunet_0(pretrained: bool = False, **kwargs: Any) -> GPUNet:
    """GPUNet-0, for 320 pixels: 11.9 M parameters."""
    return _gpunet('gpunet_0', pretrained, **kwargs)


@register_model
def gpunet_1(pretrained: bool = False, **kwargs: Any) -> GPUNet:
    """GPUNet-1, for 288 pixels: 12.7 M parameters; the network that PRUNET's search starts from."""
    return _gpunet('gpunet_1', pretrained, **kwargs)


@register_model
def gpunet_2(pretrained: bool = False, **kwargs: Any) -> GPUNet:
    """GPUNet-2, for 384 pixels: 25.8 M parameters."""
    return _gpunet('gpunet_2', pretrained, **kwargs)


@register_model
def gpunet_p0(pretrained: bool = False, **kwargs: Any) -> GPUNet:
    """GPUNet-P0, for 224 pixels: 22.8 M parameters; hidden widths found by Prunode."""
    return _gpunet('gpunet_p0', pretrained, **kwargs)


@register_model
def gpunet_p1(pretrained: bool = False, **kwargs: Any) -> GPUNet:
    """GPUNet-P1, for 224 pixels: 39.9 M parameters; hidden widths found by Prunode."""
    return _gpunet('gpunet_p1', pretrained, **kwargs)


@register_model
def gpunet_d1(pretrained: bool = False, **kwargs: Any) -> MobileNetV3:
    """GPUNet-D1, for 456 pixels."""
    return _gpunet('gpunet_d1', pretrained, **kwargs)


@register_model
def gpunet_d2(pretrained: bool = False, **kwargs: Any) -> MobileNetV3:
    """GPUNet-D2, for 528 pixels."""
    return _gpunet('gpunet_d2', pretrained, **kwargs)
