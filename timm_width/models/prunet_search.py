"""prunet_search: the shared network of PRUNET's search space, every layer with all of its candidate blocks.

    supernet = timm.create_model('prunet_search', width=0.25, depth=0.5)
    for name, layer in supernet.stochastic_layers().items(): ...                # layer.candidates['k3_se'], layer.weights
    timm.create_model('prunet', **supernet.chosen({'blocks.0.0': ('k3', None), 'blocks.0.1': None, ...}))

A candidate is one of timm's blocks at the largest hidden width; how candidates are weighted, narrowed and removed is a policy's.
"""
import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Optional

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_builder import efficientnet_init_weights
from torch import nn

from ..space import nearest
from .gpunet import Block, GPUNet, create_network, default_cfg
from .prunet import check_arguments, prunet_blocks
from .prunet_space import PrunetError, SearchSpace, base_layers, get_space, is_whole

__all__ = ['PrunetSearch', 'StochasticLayer']

NAME = 'prunet_search'
ARGUMENTS = ('num_classes', 'in_chans', 'drop_rate', 'global_pool', 'norm_layer', 'bn_eps', 'bn_momentum', 'device', 'dtype',
             'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir', 'pretrained_model_args')

Choice = Mapping[str, Optional[tuple[str, Optional[int]]]]  # layer -> None or (candidate, hidden width)


class StochasticLayer(nn.Module):
    """Blocks of one input and output shape, one of which will stay (eq. 3: the weighted sum of their outputs).

    Attributes:
        candidates: The blocks by name: 'k3', 'k5_se', with the activation ('k3_silu') or the hidden width ('k3_h96') where several
            are offered. Entries may be deleted, and replaced by modules of the same shapes.
        blocks: What each candidate is; its hidden width is the largest.
        weights: One factor per candidate that is left, in order; None is a plain sum.
        residual: Whether input and output are of one shape, so that the layer may be left out.
    """

    def __init__(self, blocks: Mapping[str, Block], **kwargs: Any):
        super().__init__()
        self.blocks = dict(blocks)
        self.residual = all(b.residual for b in blocks.values())
        self.candidates = nn.ModuleDict({name: block.module(**kwargs) for name, block in blocks.items()})
        self.weights: Optional[torch.Tensor] = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.combine([candidate(x) for candidate in self.candidates.values()])

    def combine(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The layer's output from those of its candidates."""
        if self.weights is not None:
            outputs = [weight * y for weight, y in zip(self.weights, outputs, strict=True)]
        return reduce(operator.add, outputs)


class PrunetSearch(GPUNet):
    """GPUNet-1's stem and head around stochastic layers.

    Args:
        stages: GPUNet-1's blocks in the space, which timm's class is built with first.
        space: What every layer may choose.
        said: Arguments of `prunet` that give this space.
        **kwargs: Further arguments of EfficientNet.

    Attributes:
        space: What every layer may choose.
        offers: Layer ('blocks.STAGE.INDEX', both from 0) -> its candidates by name, also those that were deleted since.
    """

    def __init__(self, stages: Sequence[Sequence[Block]], space: SearchSpace, said: Mapping[str, Any], **kwargs: Any):
        super().__init__(stages, num_features=space.head, stem_act=space.stem_act, **kwargs)
        self.space, self.said = space, dict(said)
        shared = {k: kwargs[k] for k in ('norm_layer', 'device', 'dtype') if k in kwargs}
        self.offers = {f'blocks.{number - 1}.{i}': _candidates(space, number, c_in, stride)
                       for number, i, c_in, stride in space.layers()}
        layers: list[list[nn.Module]] = [[] for _ in space.stages]
        for name, blocks in self.offers.items():
            layers[_stage(name) - 1].append(StochasticLayer(blocks, **shared))
        self.blocks = nn.Sequential(*(nn.Sequential(*found) for found in layers))
        efficientnet_init_weights(self)

    def stochastic_layers(self) -> dict[str, StochasticLayer]:
        """The modules of the layers that choose, by name, in order; without those that were replaced by another module."""
        return {name: m for name in self.offers if isinstance(m := self.get_submodule(name), StochasticLayer)}

    def hidden_group(self, layer: str, candidate: str) -> Optional[str]:
        """Name of the width group inside a candidate, as a trace of this network says it; None for a plain convolution."""
        inner = {'conv': None, 'fused': 'conv_exp', 'irb': 'conv_pw'}[self._block(layer, candidate).type]
        return inner and f'{layer}.candidates.{candidate}.{inner}'

    def hidden_widths(self, layer: str, candidate: str) -> tuple[int, ...]:
        """Hidden widths that a candidate may have, ascending; none for a plain convolution."""
        block = self._block(layer, candidate)
        if block.type == 'conv':
            return ()
        return (block.hidden,) if self.space.expansions is not None else self.space.widths(block.c_in)

    def input_sizes(self, input_size: Optional[Sequence[int]] = None) -> dict[str, tuple[int, ...]]:
        """(height, width) of the input of every layer.

        Args:
            input_size: (channels, height, width) of the image; by default the model's.
        """
        size, found = self._after_stem(input_size), {}
        for name, blocks in self.offers.items():
            found[name] = size
            size = next(iter(blocks.values())).output_size(size)
        return found

    def costs(
            self,
            layer: str,
            candidate: Optional[str],
            hidden: Optional[int] = None,
            input_size: Optional[Sequence[int]] = None,
    ) -> tuple[int, int]:
        """MACs and parameters of one choice of a layer in the network that is built from it, exactly.

        Args:
            layer: Its name.
            candidate: The block that stays; None for a layer that is left out.
            hidden: Its hidden width; the largest by default.
            input_size: See `input_sizes`.
        """
        if candidate is None:
            return 0, 0
        return self._block(layer, candidate, hidden).costs(self.input_sizes(input_size)[layer])

    def fixed_costs(self, input_size: Optional[Sequence[int]] = None) -> tuple[int, int]:
        """MACs and parameters of what no layer chooses: stem, last convolution and classifier."""
        first, last = self._after_stem(input_size), self._after_stem(input_size)
        for blocks in self.offers.values():
            last = next(iter(blocks.values())).output_size(last)
        convs = [(Block('conv', self.conv_stem.in_channels, self.space.stem, 1, 3), first),
                 (Block('conv', self.space.stages[-1].filters, self.space.head, 1, 1), last)]
        macs, params = map(sum, zip(*(block.costs(size) for block, size in convs)))
        head = sum(p.numel() for p in self.classifier.parameters())
        return macs + self.classifier.in_features * self.num_classes if head else macs, params + head

    def chosen(self, choice: Choice) -> dict[str, Any]:
        """The arguments of `prunet` for one candidate per layer.

        Args:
            choice: Layer -> (candidate, hidden width), or None to leave it out; a hidden width of None is the largest.

        Raises:
            PrunetError: A layer is missing or unknown, or what is chosen for it is not offered.
        """
        wrong = [n for n in choice if n not in self.offers] + [n for n in self.offers if n not in choice]
        if wrong:
            raise PrunetError(f"a choice names every layer once: '{wrong[0]}' is "
                              + ('missing' if wrong[0] in self.offers else f'unknown{nearest(wrong[0], self.offers)}'))
        found = []
        for name, blocks in self.offers.items():
            if choice[name] is None:
                if not next(iter(blocks.values())).residual:
                    raise PrunetError(f"'{name}' changes the size or the channels of its input: it cannot be left out")
                continue
            block = self._block(name, *choice[name])
            said: dict[str, Any] = {'stage': _stage(name), 'kernel': block.kernel}
            if block.type != 'conv':
                said.update(se=block.se, hidden=block.hidden)
            if len(self.space.stages[_stage(name) - 1].kernels) > 1:
                said['act'] = block.act
            found.append(said)
        return {'layers': found, **self.said}

    def base(self) -> dict[str, Optional[tuple[str, Optional[int]]]]:
        """GPUNet-1 as `chosen` takes it, at the nearest hidden widths that there are."""
        found: dict[str, Optional[tuple[str, Optional[int]]]] = dict.fromkeys(self.offers)
        counts = [0] * len(self.space.stages)
        for said in base_layers(self.space):
            stage = said['stage'] - 1
            layer = f'blocks.{stage}.{counts[stage]}'
            counts[stage] += 1
            wanted = said['kernel'], said.get('se', False), said.get('act', next(iter(self.space.stages[stage].kernels)))
            fits = [name for name, b in self.offers[layer].items() if (b.kernel, b.se, b.act) == wanted]
            found[layer] = min(((name, width) for name in fits for width in self.hidden_widths(layer, name) or [None]),
                               key=lambda choice: abs((choice[1] or 0) - said.get('hidden', 0)))
        return found

    def _after_stem(self, input_size: Optional[Sequence[int]]) -> tuple[int, ...]:
        size = input_size or self.pretrained_cfg['input_size']
        return Block('conv', size[0], self.space.stem, 2, 3).output_size(size[1:])

    def _block(self, layer: str, candidate: str, hidden: Optional[int] = None) -> Block:
        """A candidate at a hidden width."""
        if layer not in self.offers:
            raise PrunetError(f"unknown layer '{layer}'{nearest(layer, self.offers)}")
        blocks = self.offers[layer]
        if candidate not in blocks:
            raise PrunetError(f"'{layer}' has no candidate '{candidate}'; it has {', '.join(blocks)}")
        block = blocks[candidate]
        if hidden is None or hidden == block.hidden:
            return block
        widths = self.hidden_widths(layer, candidate)
        if not widths:
            raise PrunetError(f"'{layer}': '{candidate}' is a plain convolution and has no hidden width, not {str(hidden)[:40]}")
        if not is_whole(hidden, 1, widths[-1]) or hidden not in widths:
            raise PrunetError(f"'{layer}': '{candidate}' has no hidden width {str(hidden)[:40]}; it has "
                              f"{', '.join(map(str, widths[:3]))}{', ...' if len(widths) > 3 else ''} up to {widths[-1]}")
        return Block(**{**vars(block), 'hidden': int(hidden)})


def _stage(layer: str) -> int:
    """Number of a layer's stage, from 1."""
    return int(layer.split('.')[1]) + 1


def _candidates(space: SearchSpace, number: int, c_in: int, stride: int) -> dict[str, Block]:
    """The blocks of a layer by name: at the largest hidden width, or at each one where only some are offered."""
    stage, found = space.stages[number - 1], {}
    for act, kernel, se in stage.kinds:
        name = f'k{kernel}' + '_se' * se + f'_{act}' * (len(stage.kernels) > 1)
        if stage.type == 'conv':
            found[name] = space.block(number, c_in, stride, kernel, act)
        elif space.expansions is None:
            found[name] = space.block(number, c_in, stride, kernel, act, se, space.largest(c_in))
        else:
            for hidden in space.widths(c_in):
                several = f'_h{hidden}' * (len(space.expansions) > 1)
                found[name + several] = space.block(number, c_in, stride, kernel, act, se, hidden)
    return found


default_cfgs = generate_default_cfgs({f'{NAME}.untrained': {**default_cfg(288, (1, 2, 2, 2, 1, 2)), 'paper_ids': None}})


@register_model
def prunet_search(
        pretrained: bool = False, space: Any = None, width: float = 1., depth: float = 1., **kwargs: Any) -> PrunetSearch:
    """The shared network of a space (see `prunet_space.get_space`)."""
    check_arguments(NAME, kwargs, ('space', 'width', 'depth'), ARGUMENTS)
    found = get_space(space, width, depth)
    said = {k: v for k, v, default in (('space', space, None), ('width', width, 1), ('depth', depth, 1)) if v != default}
    stages = prunet_blocks(found, base_layers(found))
    return create_network(NAME, pretrained, stages, PrunetSearch, space=found, said=said, **kwargs)
