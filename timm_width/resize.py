"""resize(model, space, widths): gives a model other widths, in place, by cutting and growing its tensors.

Parameters, buffers, the sizes that modules keep in Python (bindings) and timm's metadata follow; no forward pass is run.
"""
import copy
from typing import Callable, Mapping, Optional, Sequence

import numpy as np
import torch
from torch import nn

from .config import record
from .space import Axis, WidthError, WidthSpace

__all__ = ['IMPORTANCE', 'apply_bindings', 'feature_info', 'importance_scores', 'replace_tensors', 'resize']

IMPORTANCE = ('l1', 'l2', 'bn')
Keep = Mapping[str, Sequence[int]]


def resize(
        model: nn.Module,
        space: WidthSpace,
        widths: Mapping[str, int],
        skips: Sequence[str] = (),
        *,
        keep: Optional[Keep] = None,
        importance: Optional[str] = None,
        fresh: Optional[Callable[[], nn.Module]] = None,
) -> nn.Module:
    """Changes the widths of a model in place.

    Narrower groups keep their first channels, those given by `keep`, or the most important ones. Wider groups get new
    channels behind the old ones, whose values are drawn from a freshly initialised base model, tensor by tensor.

    Args:
        model: The model that `space` was traced from, at the space's base widths.
        space: Its width space.
        widths: Group -> channels; groups left out stay.
        skips: Residual blocks to leave out.
        keep: Group -> indices of the steps (ids) to keep, ascending; for a group of unit 1 these are channels.
        importance: Keep the most important channels by 'l1' or 'l2' norm of the producers' weights, or 'bn' scale.
        fresh: Builds a new base model, where a group grows; by default timm builds it from the model's own arguments.

    Returns:
        The same model.

    Raises:
        WidthError: The widths or skips do not fit the space, or the model is not the one traced.
    """
    space.check(widths, skips)
    _check_model(model, space)
    if importance is not None and importance not in IMPORTANCE:
        raise WidthError(f"importance must be one of {', '.join(IMPORTANCE)}, not {importance!r}")
    steps = space.steps(widths)
    kept = _kept_steps(model, space, steps, keep or {}, importance)
    grown = [i for i, g in enumerate(space.groups) if steps[i] > g.steps]
    source = None
    if grown and not any(p.is_meta for p in model.parameters()):
        source = _tensors(fresh() if fresh is not None else _fresh_model(model))

    places = {}  # axis -> (indices to take, where they go, new length)

    def place(axis: Axis):
        if axis not in places:
            places[axis] = axis_places(space, axis, kept, steps)
        return places[axis]

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        axes = space.tensors[name].axes if name in space.tensors else ()
        if not any(a is not None and any(kept[g] is not None or steps[g] != space.groups[g].steps for g, _ in a) for a in axes):
            return tensor
        drawn = space.tensors[name].is_param
        return _resized(tensor, [None if a is None else place(a) for a in axes], source and source.get(name), drawn)

    with torch.no_grad():
        replace_tensors(model, cut)
    apply_bindings(model, space, steps)
    for name in sorted(skips):
        parent, _, leaf = name.rpartition('.')
        if not any(name.startswith(s + '.') for s in skips):
            model.get_submodule(parent)._modules[leaf] = nn.Identity()
    record(model, {n: w for n, w in widths.items() if w != space[n].size}, skips)
    return model


def axis_places(space: WidthSpace, axis: Axis, kept: Sequence, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """For one axis: indices taken from the old tensor, their places in the new one, and the new length."""
    take, put, old, new = [], [], 0, 0
    for g, r in axis:
        n = space.groups[g].steps
        k = np.arange(min(n, steps[g])) if kept[g] is None else kept[g]
        take.append((old + k[:, None] * r + np.arange(r)).reshape(-1))
        put.append(new + np.arange(len(k) * r))
        old, new = old + n * r, new + int(steps[g]) * r
    return np.concatenate(take), np.concatenate(put), new


def _resized(tensor: torch.Tensor, places: list, fresh: Optional[torch.Tensor], drawn: bool) -> torch.Tensor:
    shape = [s if p is None else p[2] for s, p in zip(tensor.shape, places)]
    if tensor.is_meta:
        return tensor.new_empty(shape)
    out, last = tensor, tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    for d, p in enumerate(places):
        if p is not None and len(p[0]) != out.shape[d] or p is not None and not (p[0] == np.arange(len(p[0]))).all():
            out = out.index_select(d, torch.as_tensor(p[0], device=tensor.device))
    if any(p is not None and p[2] > len(p[0]) for p in places):
        pool = (tensor if fresh is None else fresh).to(tensor)
        if drawn:  # any element of a fresh parameter is as good a sample of the initialisation as any other
            new = pool.reshape(-1)[torch.randint(pool.numel(), shape).to(pool.device)]
        else:  # a buffer may have a pattern (a blurring filter): new channels are whole channels of the fresh one
            new = pool
            for d, s in enumerate(shape):
                new = new.index_select(d, (torch.arange(s) % pool.shape[d]).to(pool.device))
        at = []
        for d, (s, p) in enumerate(zip(out.shape, places)):
            where = torch.arange(s) if p is None else torch.as_tensor(p[1])
            at.append(where.to(new.device).reshape([-1 if k == d else 1 for k in range(out.ndim)]))
        new[tuple(at)] = out
        out = new
    return out.contiguous(memory_format=torch.channels_last) if last else out.clone() if out is tensor else out


def replace_tensors(model: nn.Module, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Replaces every parameter and buffer by change(name, tensor), shared ones once; unchanged objects stay."""
    names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
    done: dict[int, torch.Tensor] = {}
    for module in list(model.modules()):
        for held in (module._parameters, module._buffers):
            for leaf, t in list(held.items()):
                if t is None:
                    continue
                if id(t) not in done:
                    new = change(names[id(t)], t)
                    if new is not t and held is module._parameters:
                        new = nn.Parameter(new, requires_grad=t.requires_grad)
                    done[id(t)] = (t, new)  # the old tensor is kept so that its id stays taken
                held[leaf] = done[id(t)][1]


def apply_bindings(model: nn.Module, space: WidthSpace, steps: Sequence[int]) -> None:
    """Sets the sizes that modules and timm's metadata keep in Python, for `steps` ids per group."""
    modules = dict(model.named_modules())
    for b in space.bindings:
        if b.module not in modules:
            continue  # inside a block that was left out
        value = space.length(b.axis, steps) * b.mul // b.div
        module = modules[b.module]
        if b.attribute == 'feature_info':
            feature_info(module)[b.key[0]][b.key[1]] = value
        else:
            setattr(module, b.attribute, _with_entry(getattr(module, b.attribute), b.key, value))
    for name, unit in space.unit_rules.items():
        if name in modules:
            modules[name].width_unit = unit  # a later trace must cut these groups in the same way


def _with_entry(held, key: tuple, value: int):
    if not key:
        return value
    return type(held)(value if k == key[0] else v for k, v in enumerate(held))


def feature_info(model: nn.Module) -> list:
    """The model's feature_info as a list of dicts (shared with the model, so it can be changed in place)."""
    info = getattr(model, 'feature_info', None)
    info = getattr(info, 'info', info)
    return [i for i in info if isinstance(i, dict)] if isinstance(info, (list, tuple)) else []


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _check_model(model: nn.Module, space: WidthSpace) -> None:
    have = {n: tuple(t.shape) for n, t in _tensors(model).items()}
    for name, t in space.tensors.items():
        if have.get(name) != t.shape:
            raise WidthError(f"the model is not the one that was traced: '{name}' is {have.get(name, 'missing')}, "
                             f'expected {t.shape}; trace it again')


def _fresh_model(model: nn.Module) -> nn.Module:
    """A newly initialised model like this one, on the CPU."""
    import timm

    name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture', '')
    if name and timm.is_model(name):
        return timm.create_model(name, **{k: v for k, v in getattr(model, '_model_args', {}).items() if k != 'pretrained'})
    new = copy.deepcopy(model).cpu()
    for m in new.modules():
        if hasattr(m, 'reset_parameters'):
            m.reset_parameters()
    return new


# -- which channels to keep ------------------------------------------------------------------------------------------------


def _kept_steps(model, space: WidthSpace, steps: np.ndarray, keep: Keep, importance: Optional[str]) -> list:
    """Per group: ascending indices of the ids to keep, or None for the first ones."""
    out: list[Optional[np.ndarray]] = [None] * len(space.groups)
    faults = []
    for name, index in keep.items():
        group = space[name]
        try:
            k = np.asarray(index)
        except ValueError:  # ragged
            k = np.zeros((0, 0))
        n = steps[space.index[name]]
        if k.ndim != 1 or k.dtype.kind not in 'iu' or len(k) != min(n, group.steps) or (np.diff(k) <= 0).any() or (
                len(k) and (k[0] < 0 or k[-1] >= group.steps)):
            faults.append(f"'{name}': keep must be {min(n, group.steps)} ascending indices below {group.steps}")
        elif group.ordered and (k != np.arange(len(k))).any():
            faults.append(f"'{name}' is ordered: only its first channels can be kept")
        else:
            out[space.index[name]] = k.astype(np.int64)
    if faults:
        raise WidthError(f'{space.architecture}: ' + '\n  '.join(faults))
    if importance is not None and not any(p.is_meta for p in model.parameters()):  # on meta, only shapes matter
        scores = importance_scores(model, space, importance)
        for i, g in enumerate(space.groups):
            if steps[i] < g.steps and out[i] is None and not g.ordered:
                best = torch.topk(scores[g.name], int(steps[i])).indices
                out[i] = np.sort(best.cpu().numpy())
    return out


def importance_scores(model: nn.Module, space: WidthSpace, criterion: str) -> dict[str, torch.Tensor]:
    """Scores every id of every group, larger is more important.

    'l1' and 'l2' are norms of the weights that produce the channels (dimension 0 of convolutions and linears, 1 of transposed
    convolutions), 'bn' is the absolute scale of the normalisations over them; each tensor's scores are divided by their mean,
    then averaged over the tensors and over the channels of an id. A group without such a tensor falls back on all that hold it.
    """
    tensors = _tensors(model)
    modules = dict(model.named_modules())
    out = {}
    for i, group in enumerate(space.groups):
        found, rest = [], []
        for name, dim in group.axes:
            module = modules.get(name.rpartition('.')[0])
            t = tensors[name].detach().float()
            if not space.tensors[name].is_param:
                continue
            moved = t.movedim(dim, 0).reshape(t.shape[dim], -1)
            if t.ndim == 1:
                is_scale = name.endswith('weight') and 'norm' in type(module).__name__.lower()
                score = t.abs()
            else:
                is_scale = False
                score = moved.abs().sum(1) if criterion == 'l1' else moved.norm(dim=1)
            score = _per_id(space, space.tensors[name].axes[dim], i, score)
            produces = t.ndim > 1 and dim == (1 if getattr(module, 'transposed', False) else 0)
            wanted = is_scale if criterion == 'bn' else produces
            (found if wanted else rest).append(score / score.mean().clamp_min(1e-12))
        chosen = found or rest
        out[group.name] = torch.stack(chosen).mean(0) if chosen else torch.zeros(group.steps)
    return out


def _per_id(space: WidthSpace, axis: Axis, group: int, score: torch.Tensor) -> torch.Tensor:
    parts, at = [], 0
    for g, r in axis:
        n = space.groups[g].steps * r
        if g == group:
            parts.append(score[at:at + n].reshape(-1, r).mean(1))
        at += n
    return torch.stack(parts).mean(0)
