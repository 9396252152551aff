"""A resized model as timm's own config.json: what goes in, what is accepted, and how it is written.

`model_args` of the config rebuild the model: `widths`, `skips`, the `format` number and `shapes`, a fingerprint. Configs come
from the Hub, so everything is checked before anything is built: no code, no pickle, bounds on size, depth, names and numbers.
"""
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import timm
import torch
from torch import nn

from .space import WidthError, nearest

__all__ = [
    'FORMAT', 'SUFFIX', 'UNSUFFIXED', 'ArgumentError', 'ConfigError', 'Spec', 'check_args', 'check_config', 'check_shapes',
    'check_stored_args', 'digest', 'fingerprint', 'is_ours', 'load_spec', 'networks_in', 'read_config', 'record', 'save',
    'unknown_argument',
]

FORMAT = 1
SUFFIX = '_width'
UNSUFFIXED = ('prunet',)  # architectures whose own arguments say what a search found; at other widths they are `<name>_width`, too
MAX_BYTES = 4 << 20
MAX_GROUPS = 20_000
MAX_SIDE = 8192  # of images
MODEL_ARGS = ('widths', 'skips', 'format', 'shapes')
NOT_STORED = ('device', 'dtype', 'features_only', 'out_indices', 'feature_cls')  # for the caller alone to say
STORED_BOUNDS = {'num_classes': (0, 1_000_000), 'in_chans': (1, 4096), 'drop_rate': (0, 1), 'drop_path_rate': (0, 1)}


def is_ours(architecture: str) -> bool:
    """Whether a config of this architecture says what a search found."""
    return architecture.endswith(SUFFIX) or architecture in UNSUFFIXED


class ConfigError(WidthError):
    """A config that this version cannot or will not read."""


class ArgumentError(ConfigError, TypeError):
    """An argument that the model does not have; timm's own models raise TypeError then."""


@dataclass(frozen=True)
class Spec:
    """What a search returns and a config stores: an architecture and its widths.

    Attributes:
        architecture: Registered name, as in 'resnet50_width'.
        widths: Group -> channels; groups left out are at base.
        skips: Residual blocks left out.
        model_args: Other arguments of the architecture, such as in_chans.
        provenance: How the widths were found; nothing reads it at load.
        shapes: Fingerprint of the model that these widths must give, if known.
        input_size: Channels, height and width of the images that it was searched for, if known.
    """
    architecture: str
    widths: Mapping[str, int]
    skips: tuple[str, ...] = ()
    model_args: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    shapes: Optional[str] = None
    input_size: Optional[tuple[int, int, int]] = None


def check_args(name: str, widths: Any, skips: Any, format: Any, shapes: Any) -> None:
    """Checks the types and bounds of a config's own model_args; the space checks the rest.

    Raises:
        ConfigError: With every fault found.
    """
    faults = []
    if isinstance(format, bool) or not isinstance(format, int) or format < 1:
        faults.append(f'format must be a whole number from 1, not {str(format)[:40]!r}')
    elif format > FORMAT:
        faults.append(f'format {format} is newer than this version of timm_width reads (up to {FORMAT}): upgrade timm_width')
    if widths is not None and not isinstance(widths, Mapping):
        hint = ' (to read a file, use timm_width.load_spec(path).widths)' if isinstance(widths, str) else ''
        faults.append(f'widths must be a dict of group name -> channels, not {type(widths).__name__}{hint}')
    elif widths is not None and len(widths) > MAX_GROUPS:
        faults.append(f'widths has {len(widths)} entries, more than the {MAX_GROUPS} that are allowed')
    if isinstance(skips, (str, Mapping)) or not isinstance(skips, Sequence) or len(skips) > MAX_GROUPS:
        faults.append(f'skips must be a list of block names, not {type(skips).__name__}')
    if shapes is not None and (not isinstance(shapes, str) or not shapes.startswith('sha256:') or len(shapes) > 80):
        faults.append(f"shapes must be a fingerprint 'sha256:...', not {str(shapes)[:40]!r}")
    if faults:
        raise ConfigError(f'{name}: ' + '\n  '.join(faults))


def check_stored_args(name: str, args: Mapping[str, Any]) -> None:
    """Checks what a config (not a caller) asks of a model: no device, no wrapper, numbers within bounds.

    Raises:
        ConfigError: With every fault found.
    """
    faults = [f"a config cannot set '{key}'" for key in NOT_STORED if key in args]
    for key, (least, most) in STORED_BOUNDS.items():
        value = args.get(key, least)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            faults.append(f'{key} must be from {least} to {most}, not {str(value)[:40]!r}')
    if faults:
        raise ConfigError(f'{name}: ' + '\n  '.join(faults))


def fingerprint(model: nn.Module) -> str:
    """Digest of the names and shapes of a model's parameters, without classifier and first convolution.

    What follows the image resolution (tables of positions) counts by name and rank only.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    left_out = []
    for key in ('classifier', 'first_conv'):
        names = cfg.get(key) or ()
        left_out += [str(n) for n in (names if isinstance(names, (list, tuple)) else [names])]
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if any(name.startswith(n + '.') for n in left_out):
            continue
        shape = tuple(p.shape) if name.rpartition('.')[2] in ('weight', 'bias') or p.ndim < 2 else p.ndim
        digest.update(f'{name}:{shape};'.encode())
    return 'sha256:' + digest.hexdigest()[:16]


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Digest of a state dict's names and values, without what batch norms count: that tells one shared network from another."""
    found = hashlib.sha256()
    for name, t in sorted(weights.items()):
        if not name.endswith(('.running_mean', '.running_var', '.num_batches_tracked')):
            found.update(f'{name}:{tuple(t.shape)}:{t.dtype};'.encode())
            found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return 'sha256:' + found.hexdigest()[:16]


def record(model: nn.Module, widths: Mapping[str, int], skips: Sequence[str]) -> None:
    """Notes on a timm model what it was resized to, so that timm's own save_for_hf writes a config that rebuilds it."""
    cfg = getattr(model, 'pretrained_cfg', None)
    if not cfg or not cfg.get('architecture') or not hasattr(model, '_model_args'):
        return  # not built by timm.create_model (or by an entry point of ours): what made it is not known, and save will say so
    name = cfg['architecture']
    cfg = dict(cfg, architecture=name if name.endswith(SUFFIX) else name + SUFFIX)
    model.pretrained_cfg = model.default_cfg = cfg
    old = dict(model._model_args)
    old['widths'] = {**old.get('widths', {}), **{k: int(v) for k, v in widths.items()}}
    old['skips'] = sorted({*old.get('skips', ()), *skips})
    model._model_args = {**old, 'format': FORMAT, 'shapes': fingerprint(model)}


def save(
        model: nn.Module,
        folder: Union[str, os.PathLike],
        provenance: Optional[Mapping[str, Any]] = None,
        weights: bool = True,
        data_config: Optional[Mapping[str, Any]] = None,
) -> Path:
    """Writes config.json (and model.safetensors) into a folder that timm loads by `local-dir:` and pushes to the Hub.

    Each file is written beside its place and renamed, so that a killed process leaves the old one or the new one.

    Args:
        model: A resized timm model, or any `_width` model.
        folder: Made if missing.
        provenance: How the widths were found; stored under 'timm_width'.
        weights: Whether to write the weights too.
        data_config: timm's data config (input size, mean, crop, ...) that the weights were trained with; by default the model's.

    Returns:
        Path of the config.

    Raises:
        ConfigError: The model is not a timm model that a config can rebuild.
    """
    from safetensors.torch import save_file
    from timm.models._hub import save_config_for_hf

    if isinstance(getattr(model, 'model', None), nn.Module) and not hasattr(model, 'pretrained_cfg'):
        model = model.model  # a Supernet
    name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    if not name:
        raise ConfigError(f'{type(model).__name__} is not a timm model (it has no pretrained_cfg): a config cannot rebuild it')
    if not hasattr(model, 'num_classes') or not hasattr(model, 'num_features'):
        raise ConfigError(f'{type(model).__name__} has no classifier settings (a features_only model?): save the whole model')
    if getattr(model, '_model_args', None) is None:
        raise ConfigError(f'{name} was not built by timm.create_model, so what it was built with is not known: build it so')
    name = name if name.endswith(SUFFIX) or name in UNSUFFIXED else name + SUFFIX
    if not timm.is_model(name):
        raise ConfigError(f"'{name}' is not registered: call timm_width.register('{name.removesuffix(SUFFIX)}') first")
    args = {k: v for k, v in model._model_args.items() if k not in ('importance', 'pretrained')}
    if name.endswith(SUFFIX):
        args = {**args, 'widths': dict(args.get('widths') or {}), 'skips': list(args.get('skips') or ())}
    args |= {'format': FORMAT, 'shapes': fingerprint(model)}
    provenance = dict(provenance or {})
    try:
        json.dumps(provenance)
    except (TypeError, ValueError) as e:
        raise ConfigError(f'the provenance cannot be written as JSON: {e}') from None
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"'{folder}' is a file: give a folder to save to")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix='.saving-') as beside:
            old, model._model_args = model._model_args, args
            old_cfg, model.pretrained_cfg = model.pretrained_cfg, dict(model.pretrained_cfg, architecture=name)
            try:
                save_config_for_hf(model, Path(beside) / 'config.json', model_config={'timm_width': provenance},
                                   data_config=None if data_config is None else dict(data_config))
            finally:
                model._model_args, model.pretrained_cfg = old, old_cfg
            if weights:  # copies, since safetensors takes neither shared tensors nor any layout
                tensors = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in model.state_dict().items()}
                save_file(tensors, Path(beside) / 'model.safetensors', metadata={'format': 'pt'})
                shutil.copymode(Path(beside) / 'config.json', Path(beside) / 'model.safetensors')  # safetensors says 0600
            for file in () if weights else ('model.safetensors', 'pytorch_model.bin'):  # weights of another model, now
                (folder / file).unlink(missing_ok=True)
            for file in ('model.safetensors', 'config.json') if weights else ('config.json',):  # the config last
                os.replace(Path(beside) / file, folder / file)
    except BaseException:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise
    return folder / 'config.json'


def load_spec(path: Union[str, os.PathLike]) -> Spec:
    """Reads the widths of a config.json, strictly; nothing is built.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        ConfigError: The file is missing, too large, not JSON, or says what this version does not know.
    """
    if isinstance(path, str):
        path = path.removeprefix('local-dir:')
    data, path = read_config(path)
    name = data['architecture'][:200]
    if not is_ours(name):
        raise ConfigError(f"{path}: '{name}' is not a width model: its name would end in '{SUFFIX}'")
    args = data.get('model_args', {})
    if not isinstance(args, dict):
        raise ConfigError(f'{path}: model_args must be a dict, not {type(args).__name__}')
    widths, skips = args.get('widths') or {}, args.get('skips', [])
    try:
        check_args(str(path), widths, skips, args.get('format', 1), args.get('shapes'))
        check_stored_args(str(path), args)
    except RecursionError:
        raise ConfigError(f'{path}: nested too deeply') from None
    for group, width in widths.items():
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ConfigError(f"{path}: '{group[:80]}': width must be a whole number from 1, not {str(width)[:40]!r}")
    if not all(isinstance(s, str) for s in skips):
        raise ConfigError(f'{path}: skips must be a list of block names')
    rest = {k: v for k, v in args.items() if k not in MODEL_ARGS}
    wrong = sorted(set(rest) & set(inspect.signature(timm.create_model).parameters))
    if wrong:  # checkpoint_path, say: a config names no file
        raise ConfigError(f"{path}: model_args cannot set {', '.join(wrong)}: not an argument of a model but of create_model")
    provenance = data.get('timm_width', {})
    return Spec(name, dict(widths), tuple(skips), rest, provenance if isinstance(provenance, dict) else {}, args.get('shapes'),
                _input_size(data.get('pretrained_cfg', {}).get('input_size')))


def _input_size(found: Any) -> Optional[tuple[int, int, int]]:
    """That of timm's data config, if it is one."""
    if isinstance(found, list) and len(found) == 3 and all(type(n) is int and 1 <= n <= MAX_SIDE for n in found):
        return tuple(found)
    return None


def networks_in(folder: Union[str, os.PathLike], depth: int = 2, strict: bool = True) -> dict[Path, Spec]:
    """What a search has saved in its folder: in the folder itself, and in folders in it, of budgets or policies each.

    Args:
        folder: The folder.
        depth: How far down to look.
        strict: Whether to refuse what cannot be read, instead of leaving it out.

    Returns:
        Folder -> what its config.json says, the outer ones first; without those of other models.

    Raises:
        ConfigError: One of them cannot be read, and `strict` is set.
    """
    folder, found = Path(folder), {}
    for level in range(depth + 1):
        for path in sorted(folder.glob('*/' * level + 'config.json')):
            hidden = any(part.startswith('.') for part in path.relative_to(folder).parts)  # half written
            try:
                if not hidden and path.is_file() and is_ours(read_config(path)[0]['architecture']):
                    found[path.parent] = load_spec(path)
            except ConfigError:
                if strict:
                    raise
    return found


def check_config(path: Union[str, os.PathLike]) -> None:
    """Checks any timm config.json as far as can be done without building; strictly, if it is of a width model.

    Raises:
        ConfigError: With the reason.
    """
    if is_ours(read_config(path)[0]['architecture']):
        load_spec(path)


def read_config(path: Union[str, os.PathLike]) -> tuple[dict[str, Any], Path]:
    """Reads any timm config.json, checked no further than that it is one.

    Args:
        path: The file, or the folder that holds it.

    Returns:
        What it holds, and the file.

    Raises:
        ConfigError: The file is missing, too large or no timm config.
    """
    path = Path(path)
    path = path / 'config.json' if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f'{path}: there is no such file')
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f'{path}: {path.stat().st_size} bytes is no config (at most {MAX_BYTES})')
    try:
        data = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as e:
        reason = 'nested too deeply' if isinstance(e, RecursionError) else str(e)
        raise ConfigError(f'{path}: not a JSON file: {reason}') from None
    if not isinstance(data, dict) or not isinstance(data.get('architecture'), str):
        raise ConfigError(f"{path}: not a timm config: it has no 'architecture'")
    if not isinstance(data.get('pretrained_cfg', {}), dict):
        raise ConfigError(f'{path}: pretrained_cfg must be a dict')
    return data, path


def unknown_argument(name: str, error: TypeError, known: Sequence[str]) -> Optional[ArgumentError]:
    """The clear form of a constructor's complaint about an argument that it does not know."""
    text = str(error)
    key = text.rpartition('argument')[2].strip().strip("'\"")[:80]
    if 'multiple values for' in text:
        return ArgumentError(f"{name}: argument '{key}' is set by the architecture itself")
    if 'unexpected keyword argument' not in text:
        return None
    return ArgumentError(f"{name}: unknown argument '{key}'{nearest(key, known)}")


def check_shapes(model: nn.Module, name: str, shapes: Optional[str]) -> None:
    """Refuses a model that is not the one its config was saved from."""
    if shapes is not None and (found := fingerprint(model)) != shapes:
        raise ConfigError(
            f'{name}: these widths give a model of other shapes here ({found}) than where the config was saved '
            f'({shapes}): other widths= or skips= were given beside the config, or it was edited, or written by another version of '
            'timm or timm_width')
