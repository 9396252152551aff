"""Where a training starts: the model that the flags of train ask for, and the weights that it begins with."""
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from timm.models import clean_state_dict, load_state_dict
from torch import nn

from .config import SUFFIX, ConfigError, Spec, digest, is_ours, load_spec, networks_in
from .data import UsageError, first_line
from .engine import create, model_arguments, say
from .models import register
from .models.published import find
from .recover import widths_from
from .resize import resize
from .space import WidthError
from .trace import trace

__all__ = ['build_model', 'load_start', 'provenance_of', 'weights_of', 'widths_of']

NOT_OF_BASE = ('widths', 'skips', 'shapes', 'format', 'importance', 'num_classes', 'in_chans', 'pretrained_cfg')
MODEL_FILES = ('model.safetensors', 'pytorch_model.bin')


def widths_of(args: Namespace) -> Optional[Spec]:
    """What --widths names.

    Raises:
        UsageError: It is of another model.
    """
    if not args.widths:
        return None
    try:
        spec = _only_network(args.widths)
    except ConfigError as e:
        raise UsageError(f'--widths: {e}') from None
    base = spec.architecture.removesuffix(SUFFIX)
    if args.model.partition('.')[0] != base:
        raise UsageError(f"--widths '{args.widths}' are those of {base}, and --model is '{args.model}': give --model {base}")
    return spec


def _only_network(path: str) -> Spec:
    """What a config says, or the one config of a folder."""
    folder = Path(path.removeprefix('local-dir:'))
    found = networks_in(folder, strict=False) if folder.is_dir() else {}
    networks = {(s.architecture, tuple(sorted(s.widths.items())), s.skips, str(s.model_args)) for s in found.values()}
    if len(networks) > 1 or found and folder not in found:
        named = ', '.join(f"{at / 'config.json' if at == folder else at} ({spec.provenance.get('budget', 'of no budget')})"
                          for at, spec in list(found.items())[:8])
        raise UsageError(f"--widths '{path}' holds {len(found)} networks{', ' * bool(named)}{named}: give one of them"
                         if len(found) > 1 else f"--widths '{path}' has no config.json: give {named}")
    return load_spec(path)


def build_model(args: Namespace, num_classes: Optional[int]) -> nn.Module:
    """The model, at its widths, with the weights of --pretrained or --initial-checkpoint.

    Args:
        args: The flags.
        num_classes: Outputs of its classifier; None for as many as it has.
    """
    spec, name, wanted = widths_of(args), args.model, model_arguments(args)
    wanted = {'drop_rate': args.drop, **wanted}
    if spec is not None:
        base, dot, tag = name.partition('.')
        stored = {k: v for k, v in spec.model_args.items() if k not in ('num_classes', 'in_chans')}
        wanted = {**stored, **wanted, 'shapes': spec.shapes}
        if spec.architecture.endswith(SUFFIX):
            name = register(base) + dot + tag
            wanted |= {'widths': dict(spec.widths), 'skips': list(spec.skips)}
        if args.importance and args.pretrained:
            wanted['importance'] = args.importance
    inputs = {k: getattr(args, k) for k in ('in_chans', 'img_size', 'input_size')}
    model = create(name, num_classes, args.pretrained, inputs=inputs, **wanted)
    if args.head_init_scale is not None:
        with torch.no_grad():
            model.get_classifier().weight.mul_(args.head_init_scale)
            model.get_classifier().bias.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        nn.init.constant_(model.get_classifier().bias, args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    return model


def load_start(model: nn.Module, args: Namespace) -> None:
    """Loads what --inherit or --finetune-from names into a model.

    Raises:
        UsageError: It is missing, or does not fit the model.
    """
    if args.finetune_from:
        _load(model, _weights(_file_of(args.finetune_from), '--finetune-from')[0], '--finetune-from', args.finetune_from)
    if args.inherit:
        _load(model, _cut(model, args), '--inherit', args.inherit)


def _cut(model: nn.Module, args: Namespace) -> dict[str, torch.Tensor]:
    """The weights of a shared network, or of the base, at the widths of the model; the channels that its search found best."""
    weights, shared = _weights(_file_of(args.inherit), '--inherit')
    keep = _channels(args, weights) if shared and not args.importance else {}
    base = (model.pretrained_cfg.get('architecture') or args.model).removesuffix(SUFFIX)
    built = dict(getattr(model, '_model_args', {}))
    widths, skips = built.get('widths') or {}, tuple(built.get('skips') or ())
    named = {k: v for k, v in built.items() if k not in NOT_OF_BASE}
    try:
        source = timm.create_model(
            base, num_classes=_classes(model, weights) or model.num_classes, in_chans=getattr(model, 'in_chans', 3), **named)
        space = trace(source)
        sizes = {name: space[name].size for name in space.searchable}
        resize(source, space, widths_from(weights, space))
        source.load_state_dict(weights)
        space = trace(source)
        if not keep:
            resize(source, space, {**sizes, **widths}, skips, importance=args.importance)
    except (WidthError, RuntimeError, TypeError) as e:
        raise UsageError(f"--inherit '{args.inherit}' is no checkpoint of {base}: {_two_lines(e)}") from None
    if keep:
        try:
            resize(source, space, {**sizes, **widths}, skips, keep=keep)
        except (WidthError, TypeError, ValueError) as e:
            raise UsageError(f"'channels' in the config of {_config_flag(args)}: {_two_lines(e)}") from None
    which = f'the most important channels by {args.importance}' if args.importance else 'the first channels'
    if keep:
        budget = str(provenance_of(args).get('budget') or 'its budget')[:80]
        which = f'the channels that won for {budget} (not the first ones in {len(keep)} of {len(sizes)} groups)'
    say(args, f"--inherit: {which}, of {'the network that a search shared' if shared else 'a checkpoint'}, '{args.inherit}'")
    return source.state_dict()


def _channels(args: Namespace, weights: Mapping[str, torch.Tensor]) -> Mapping[str, Sequence[int]]:
    """The channels that the search found best, of the shared network that it scored; none, if these are the first ones.

    Raises:
        UsageError: They are of another shared network: that of another stage, of a baseline, or of another search.
    """
    said = provenance_of(args).get('channels')
    if said is None:
        return {}
    if not isinstance(said, Mapping) or not isinstance(said.get('kept'), Mapping) or not isinstance(said.get('of'), str):
        raise UsageError(f"'channels' in the config of {_config_flag(args)}: it must be a dict of 'of', the digest of a shared "
                         "network, 'file', and 'kept', group name -> indices")
    if (found := digest(weights)) == said['of']:
        return said['kept']
    if said['kept']:
        raise UsageError(f"--inherit '{args.inherit}' is not the shared network that the channels of {_config_flag(args)} are of "
                         f"({found}, not {said['of'][:80]}): give {str(said.get('file', ''))[:200]} of that search, or "
                         '--importance to choose other channels')
    say(args, f"note: --inherit '{args.inherit}' is not the shared network that these widths were found on: that is "
              f"{str(said.get('file', ''))[:200]} of that search")
    return {}


def _config_flag(args: Namespace) -> str:
    return f'--widths {args.widths}' if args.widths else f'--model {args.model}'


def _two_lines(e: Exception) -> str:
    return ' '.join(line.strip() for line in str(e).splitlines()[:2])


def _classifiers(model: nn.Module) -> Sequence[str]:
    found = model.pretrained_cfg.get('classifier') or ()
    return (found,) if isinstance(found, str) else tuple(found)


def _classes(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Optional[int]:
    """Classes of the model that the weights are of."""
    for name in _classifiers(model):
        if f'{name}.weight' in weights:
            return len(weights[f'{name}.weight'])
    return None


def _load(model: nn.Module, weights: Mapping[str, torch.Tensor], flag: str, path: str) -> None:
    """Loads weights, but for a classifier of another number of classes."""
    own = model.state_dict()
    other = [k for k in own if k.rpartition('.')[0] in _classifiers(model) and (
        k not in weights or weights[k].shape != own[k].shape)]
    try:
        missing, unknown = model.load_state_dict({k: v for k, v in weights.items() if k not in other}, strict=False)
    except RuntimeError as e:
        raise UsageError(f"{flag} '{path}' has weights of other shapes than the model (leave out --model to take a folder's own): "
                         f"{str(e).splitlines()[1].strip() if len(str(e).splitlines()) > 1 else e}") from None
    missing = [k for k in missing if k not in other]
    if other and not missing and not unknown:
        print(f"{flag}: the classifier is new, as '{path}' has another number of classes", flush=True)
    if missing or unknown:
        raise UsageError(f"{flag} '{path}' has weights of another model: " + '; '.join(
            f"{what} {', '.join(names[:3])}" for what, names in (('there is no', missing), ('unknown are', unknown)) if names))


def _file_of(path: str) -> Path:
    """A checkpoint, or the weights of a saved model."""
    found = Path(path.removeprefix('local-dir:'))
    if found.is_dir():
        found = next((found / name for name in MODEL_FILES if (found / name).is_file()), found)
    return found


def _weights(path: Path, flag: str) -> tuple[dict[str, torch.Tensor], bool]:
    """A state dict: averaged weights before others; of a search's shared network, the model in it. And whether it is such a one."""
    if not path.is_file():
        raise UsageError(f"{flag} '{path}' is " + ('a folder without weights' if path.is_dir() else 'not there'))
    try:
        found = torch.load(path, map_location='cpu', weights_only=True)
    except Exception:  # timm's hold a Namespace, others are no pickles: timm reads them
        found = None
    if isinstance(found, dict) and 'network' in found:
        return {k.removeprefix('model.'): v for k, v in (found.get('ema') or found['network']).items()}, True
    try:
        return clean_state_dict(load_state_dict(str(path), use_ema=True)), False
    except Exception as e:  # unpickling fails in many ways
        reason = first_line(e)
        raise UsageError(f"{flag} '{path}' cannot be read: {reason}") from None


def provenance_of(args: Namespace) -> dict[str, Any]:
    """What is known of how the widths were found."""
    spec = widths_of(args)
    if spec is not None:
        return dict(spec.provenance)
    if (network := find(*args.model.partition('.')[::2])) is not None:
        return dict(network.provenance)
    source, _, path = args.model.partition(':')
    if source == 'local-dir':
        config = json.loads((Path(path) / 'config.json').read_text(encoding='utf-8'))
        if is_ours(config['architecture']):
            return dict(load_spec(path).provenance)
    return {}


def weights_of(args: Namespace) -> dict[str, Optional[str]]:
    """Whose published weights a training begins with: their licence is that of the result, too.

    Returns:
        `{'inherited': 'resnet50.a1_in1k'}`; None in it for random weights; nothing where the flags do not tell, as with a file.
    """
    if args.initial_checkpoint or args.pretrained_path or args.pretrained_cfg_overlay or any(
            getattr(args, flag, None) for flag in ('inherit', 'finetune_from')):
        return {}
    if not args.pretrained:
        return {'inherited': None}
    cfg = None if ':' in args.model else timm.get_pretrained_cfg(args.model)
    if cfg is None or not cfg.has_weights:
        return {}
    return {'inherited': f"{args.model.partition('.')[0].removesuffix(SUFFIX)}{'.' * bool(cfg.tag)}{cfg.tag or ''}"}
