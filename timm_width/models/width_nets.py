"""`<base>_width`: every supported timm conv net, with `widths=` and `skips=`.

An entry point builds the base as timm does, with timm's own arguments, and resizes it. The names come from `supported.json`,
which `make_supported.py` writes by running the laws over timm's registry. Published widths (`published.py`) are tags of them.
"""
import inspect
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from timm.models import build_model_with_cfg, get_pretrained_cfg, is_model, model_entrypoint, register_model
from timm.models._pretrained import DefaultCfg
from timm.models._registry import _model_pretrained_cfgs, _model_with_tags, split_model_name_tag
from torch import nn

from ..config import FORMAT, SUFFIX, ArgumentError, ConfigError, check_args, check_shapes, check_stored_args, unknown_argument
from ..resize import IMPORTANCE, resize
from ..space import WidthError, nearest
from ..trace import trace
from . import gpunet, prunet, published, vgg

__all__ = ['BASES', 'is_supported', 'register', 'supported']

default_cfgs: dict[str, DefaultCfg] = {}  # read by register_model
OWN_ARGS = ('widths', 'skips', 'format', 'shapes', 'importance')
SOURCES = ('hf-hub', 'local-dir')
BUILDER_ARGS = {*inspect.signature(build_model_with_cfg).parameters, 'pruned'} - {'kwargs', 'pretrained_model_args'}


@lru_cache
def supported() -> dict[str, dict]:
    """Base name -> {'family', 'share', 'half_macs', ...}, for the models registered on import."""
    return json.loads((Path(__file__).parent / 'supported.json').read_text())


def is_supported(base: str) -> bool:
    """Whether `<base>_width` is registered."""
    return is_model(base + SUFFIX)


def register(base: str) -> str:
    """Registers `<base>_width` for a model that timm knows, with the base's pretrained tags.

    Args:
        base: Any registered model name.

    Returns:
        The new name.

    Raises:
        WidthError: timm does not know the model, or no width of it can change.
    """
    if not isinstance(base, str) or not is_model(base):
        shown = str(base)[:80]
        raise WidthError(f"timm has no model '{shown}'{nearest(shown, timm.list_models())}")
    base = split_model_name_tag(base)[0]
    if base.endswith(SUFFIX):
        return base
    name = base + SUFFIX
    if not is_model(name):
        with torch.device('meta'):
            space = trace(timm.create_model(base))
        if not space.searchable:
            reason = next(iter(space.frozen.values()), 'it has no channels')
            raise WidthError(f"'{base}' has no searchable group: {reason}")
        _register(base)
    return name


def _register(base: str) -> None:
    name = base + SUFFIX

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build(base, name, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f'{base} with `widths=` (group -> channels) and `skips=` (residual blocks left out).'
    # (the public get_arch_pretrained_cfgs copies deeply, which for all models takes longer than the rest of the import)
    tags = {split_model_name_tag(k)[1]: _model_pretrained_cfgs[k] for k in _model_with_tags[base]}
    cfg = DefaultCfg(is_pretrained=any(c.has_weights for c in tags.values()))
    tags |= {own.tag: own.pretrained_cfg(_model_pretrained_cfgs[base]) for own in published.tags().get(name, ())}
    cfg.tags.extend(tags)
    cfg.cfgs.update(tags)
    default_cfgs[name] = cfg
    register_model(entry)


@lru_cache
def _feature_levels(base: str) -> tuple[int, ...]:
    """Levels that the base gives by default as `features_only`."""
    with torch.device('meta'):
        return tuple(timm.create_model(base, features_only=True).feature_info.out_indices)


def _build(
        base: str,
        name: str,
        pretrained: bool,
        /,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[dict] = None,
        cache_dir: Optional[str] = None,
        widths: Optional[Mapping[str, int]] = None,
        skips: Sequence[str] = (),
        format: int = FORMAT,
        shapes: Optional[str] = None,
        importance: Optional[str] = None,
        **kwargs: Any,
) -> nn.Module:
    check_args(name, widths, skips, format, shapes)
    check_stored_args(name, kwargs.get('pretrained_model_args') or {})
    if importance is not None and importance not in IMPORTANCE:
        raise WidthError(f"{name}: importance must be one of {', '.join(IMPORTANCE)}, not {str(importance)[:40]!r}")
    if importance is not None and not pretrained:
        raise WidthError(f"{name}: importance='{importance}' ranks the channels of pretrained weights: it needs pretrained=True")
    for key in kwargs:
        if key in BUILDER_ARGS:  # of timm's builder: an entry point sets these, never a caller or a config
            raise ArgumentError(f"{name}: unknown argument '{key}'")
    if (own := published.find(name, pretrained_cfg)) is not None:
        if isinstance(pretrained_cfg, str):  # a tag that the base does not have
            pretrained_cfg = get_pretrained_cfg(own.name)
        _check_published(own, base, pretrained, pretrained_cfg, pretrained_cfg_overlay, skips)
    cfg = pretrained_cfg if isinstance(pretrained_cfg, dict) else getattr(pretrained_cfg, '__dict__', {})
    own_weights = cfg.get('source') in SOURCES  # from a folder or the Hub: already resized; else the base's
    feature_cfg: dict[str, Any] = {'feature_cls': 'getter'}
    if kwargs.get('features_only') and 'out_indices' not in kwargs:
        feature_cfg['out_indices'] = _feature_levels(base)
    source = dict(pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay, cache_dir=cache_dir)
    create = model_entrypoint(base)

    def build(**build_args: Any) -> nn.Module:
        try:
            model = create(pretrained=pretrained and not own_weights, **source, **build_args)
        except TypeError as e:
            raise unknown_argument(name, e, OWN_ARGS) or e from None
        model.pretrained_cfg = dict(model.pretrained_cfg, architecture=name)
        model._model_args = {}
        if widths or skips or own:
            space = trace(model)
            wanted = own.widths(model, space) if own else widths or {}
            if own and widths is not None and {**{n: space[n].size for n in space.searchable}, **widths} != wanted:
                raise ConfigError(f"{own.name} is widths by itself: leave widths= out, or give them to '{name}' without the tag")
            fresh_args = {k: v for k, v in build_args.items() if k not in ('device', 'dtype')}
            resize(model, space, wanted, skips, importance=importance, fresh=lambda: create(**fresh_args))
        check_shapes(model, name, shapes or (own.shapes if own else None))
        return model

    return build_model_with_cfg(
        build, name, pretrained and own_weights, feature_cfg=feature_cfg, pretrained_strict=True, **source, **kwargs)


def _check_published(
        own: published.Published,
        base: str,
        pretrained: bool,
        cfg: Any,
        overlay: Optional[Mapping[str, Any]],
        skips: Sequence[str],
) -> None:
    """Refuses to leave blocks out of a published network, and to load weights of it that nobody published."""
    if skips:
        raise ConfigError(f"{own.name} is a network by itself: give skips= to '{own.model}' without the tag, with widths=")
    said = {**(cfg if isinstance(cfg, Mapping) else vars(cfg)), **(overlay or {})}
    if pretrained and not any(said.get(key) for key in published.LOCATIONS):
        raise ConfigError(
            f"{own.name}: widths were published and no weights: leave pretrained=True out and train it, or give the widths to "
            f"'{own.model}' with pretrained=True, which cuts the weights of {base} to them")


BASES = tuple(b for b in dict.fromkeys((*supported(), *vgg.OURS, *gpunet.OURS, prunet.NAME)) if is_model(b))
for _base in BASES:
    _register(_base)
