"""prunet: the network that PRUNET's search puts out, one block per layer, as a timm model.

    timm.create_model('prunet', layers=[{'stage': 1, 'kernel': 3}, {'stage': 2, 'kernel': 5, 'se': True, 'hidden': 96}, ...])

A layer that is not listed is not there. What the stages are (type, stride, activation, output channels) is said by the space, see
prunet_space.py; `width` and `depth` reduce it. Without `layers`, it is GPUNet-1 in that space.
"""
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from timm.models import generate_default_cfgs, register_model

from ..config import FORMAT, ArgumentError, check_args, check_shapes, check_stored_args
from ..space import nearest
from .gpunet import Block, GPUNet, create_network, default_cfg
from .prunet_space import DIVISOR, MAX_KERNEL, PrunetError, SearchSpace, base_layers, get_space, is_kernel, is_whole

__all__ = ['check_arguments', 'prunet_blocks']

NAME = 'prunet'
MAX_LAYERS = 512
MAX_PARAMS = 500_000_000
ARGUMENTS = (  # of timm's EfficientNets and their builder
    'num_classes', 'in_chans', 'drop_rate', 'drop_path_rate', 'global_pool', 'output_stride', 'pad_type', 'norm_layer', 'aa_layer',
    'bn_eps', 'bn_momentum', 'features_only', 'out_indices', 'feature_cls', 'device', 'dtype',
    'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir', 'pretrained_model_args')
KEYS = ('stage', 'kernel', 'se', 'hidden', 'act')


def prunet_blocks(space: SearchSpace, layers: Sequence[Mapping[str, Any]]) -> list[list[Block]]:
    """The blocks of layers, stage by stage; stages without layers are not there.

    Args:
        space: The stages.
        layers: One dict per layer that is present, in order: `stage`, its number from 1; `kernel`; `hidden`, the width inside the
            block, and `se`, whether it has squeeze-and-excitation (not where the stage's type is 'conv'); `act`, where it is not
            the stage's first activation.

    Raises:
        PrunetError: With every fault found.
    """
    if isinstance(layers, (str, Mapping)) or not isinstance(layers, Sequence) or not 0 < len(layers) <= MAX_LAYERS:
        what = f'{len(layers)} entries' if isinstance(layers, (list, tuple)) else type(layers).__name__
        raise PrunetError(f'layers must be a list of 1 to {MAX_LAYERS} dicts, one per layer, not {what}')
    faults: list[str] = []
    stages: list[list[Block]] = [[] for _ in space.stages]
    channels, now = space.stem, 0
    for i, layer in enumerate(layers, 1):
        number = layer.get('stage') if isinstance(layer, Mapping) else None
        if not is_whole(number, max(now, 1), len(stages)):
            said = f'stage {str(number)[:40]!r}' if isinstance(layer, Mapping) else f'a {type(layer).__name__}'
            faults.append(f'layer {i} must be a dict whose stage is a whole number from {max(now, 1)} to {len(stages)}, in order, '
                          f'not {said}')
            break  # what follows depends on it
        stage, first = space.stages[number - 1], number != now
        found = _layer_faults(space, number, channels, layer)
        faults += [f'layer {i} (stage {number}): {f}' for f in found]
        if not found:
            stages[number - 1].append(space.block(
                number, channels, stage.stride if first else 1, int(layer['kernel']), layer.get('act', next(iter(stage.kernels))),
                layer.get('se', False), int(layer.get('hidden', 0))))
        channels, now = stage.filters, number
    if not faults:
        channels = space.stem
        for number, (stage, blocks) in enumerate(zip(space.stages, stages), 1):
            if not blocks and (stage.stride > 1 or stage.filters != channels):
                faults.append(f'stage {number} changes the size or the channels of its input, so at least one layer must be there')
            channels = stage.filters
    if faults:
        raise PrunetError(f'{NAME}: ' + '\n  '.join(faults[:20]))
    params = sum(b.costs((1, 1))[1] for blocks in stages for b in blocks) + channels * space.head
    if params > MAX_PARAMS:
        raise PrunetError(f'{NAME}: these layers have {params:,} parameters, more than the {MAX_PARAMS:,} that are allowed')
    return [blocks for blocks in stages if blocks]


def _layer_faults(space: SearchSpace, number: int, c_in: int, layer: Mapping[str, Any]) -> list[str]:
    stage, most = space.stages[number - 1], DIVISOR * max(space.max_expansion * c_in // DIVISOR, 1)
    keys = [k for k in KEYS if stage.type != 'conv' or k not in ('se', 'hidden')]
    faults = [f'unknown entry {str(k)[:40]!r}{nearest(str(k)[:40], keys)}' for k in layer if k not in keys]
    if not is_kernel(layer.get('kernel')):
        faults.append(f"kernel must be an odd number from 1 to {MAX_KERNEL}, not {str(layer.get('kernel'))[:40]!r}")
    hidden = layer.get('hidden')
    if stage.type != 'conv' and not (is_whole(hidden, DIVISOR, most) and hidden % DIVISOR == 0):
        faults.append(f'hidden must be a multiple of {DIVISOR} from {DIVISOR} to {most} ({space.max_expansion} times its input of '
                      f'{c_in} channels), not {str(hidden)[:40]!r}')
    if not isinstance(layer.get('se', False), bool):
        faults.append(f"se must be false or true, not {str(layer['se'])[:40]!r}")
    if 'act' in layer and not (isinstance(layer['act'], str) and layer['act'] in stage.kernels):
        faults.append(f"act must be one of {', '.join(stage.kernels)}, not {str(layer['act'])[:40]!r}")
    return faults


def check_arguments(name: str, given: Mapping[str, Any], own: Sequence[str], others: Sequence[str]) -> None:
    """Refuses what an entry point does not take, and what a config may not say.

    Args:
        name: The model.
        given: The arguments besides its own.
        own: Those that it takes itself.
        others: Those that it hands on.

    Raises:
        ConfigError: An argument is unknown, or out of bounds in a config.
    """
    for key in given:
        if key not in others:
            raise ArgumentError(f"{name}: unknown argument '{key[:40]}'{nearest(key[:40], (*own, *others))}")
    check_stored_args(name, given.get('pretrained_model_args') or {})


default_cfgs = generate_default_cfgs({
    f'{NAME}.untrained': {**default_cfg(288, (1, 2, 2, 2, 1, 2)), 'paper_ids': None,
                          'paper_name': 'Tiered Pruning for Efficient Differentiable Inference-Aware Neural Architecture Search'}})


@register_model
def prunet(
        pretrained: bool = False,
        layers: Optional[Sequence[Mapping[str, Any]]] = None,
        space: Any = None,
        width: float = 1.,
        depth: float = 1.,
        format: int = FORMAT,
        shapes: Optional[str] = None,
        **kwargs: Any,
) -> GPUNet:
    """PRUNET of given layers, by default those of GPUNet-1 (see `prunet_blocks` and `prunet_space.get_space`)."""
    check_args(NAME, None, (), format, shapes)
    check_arguments(NAME, kwargs, ('layers', 'space', 'width', 'depth'), ARGUMENTS)
    found = get_space(space, width, depth)
    blocks = prunet_blocks(found, base_layers(found) if layers is None else layers)
    model = create_network(NAME, pretrained, blocks, num_features=found.head, stem_act=found.stem_act, **kwargs)
    if not kwargs.get('features_only'):
        check_shapes(model, NAME, shapes)
    return model
