"""The supernet: one model that runs at any of its narrower widths, all of them with the same weights.

`Supernet(model, space)(x, widths)` gives what the model resized to `widths` gives, bit for bit, without building it. During
a call, the model's parameters and buffers are exchanged for slices of themselves (`torch.func.functional_call`), the sizes its
modules keep in Python (the space's bindings) for those of the slices, and skipped blocks for the identity. Between calls the
model is the plain timm model.

What is cut where depends on the widths alone. It is worked out once per widths and kept as a `_Plan`, which holds names and
numbers but neither modules nor tensors of the model: copying the supernet or loading weights leaves it valid.
"""
import itertools
import numbers
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence, Union

import numpy as np
import torch
from torch import nn

from .space import Axis, WidthError, WidthSpace, nearest

__all__ = ['Supernet', 'recalibrate']

MAX_RUNS = 16  # a selection in more runs is taken by index
MAX_PLANS = 64  # a search at fixed widths needs few, one that draws them anew gains from none
NORMS = ('_BatchNorm', 'LayerNorm', 'GroupNorm', 'RmsNorm', 'SimpleNorm')  # how their classes, or bases of them, are named
CHANNELS_LAST_NORMS = ('LayerNorm', 'RmsNorm', 'SimpleNorm')  # unless '2d' is in their name, too

Width = Union[int, Sequence[int], np.ndarray, torch.Tensor]
Runs = tuple[tuple[int, int], ...]  # (start, length) of each
Cuts = tuple[tuple[int, Union[Runs, torch.Tensor]], ...]  # per dimension: the runs kept, or the indices of all that is


# -- slices ----------------------------------------------------------------------------------------------------------------


def _take(full: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """The part of a tensor that cuts keep; a view, where each cut is one run."""
    for dim, kept in cuts:
        if isinstance(kept, torch.Tensor):
            full = full.index_select(dim, kept)
        elif len(kept) == 1:
            full = full.narrow(dim, *kept[0])
        else:
            full = torch.cat([full.narrow(dim, *run) for run in kept], dim)
    return full


def _put(full: torch.Tensor, part: torch.Tensor, cuts: Cuts) -> None:
    """Writes a part to where `_take` takes it from."""
    if not cuts:
        full.copy_(part)
        return
    (dim, kept), rest = cuts[0], cuts[1:]
    if isinstance(kept, torch.Tensor):
        if rest:
            inner = full.index_select(dim, kept)
            _put(inner, part, rest)
            part = inner
        full.index_copy_(dim, kept, part)
        return
    at = 0
    for start, length in kept:
        _put(full.narrow(dim, start, length), part.narrow(dim, at, length), rest)
        at += length


def _take_dense(full: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """`_take` laid out as a tensor of its own.

    A convolution would copy a view with gaps in any case, and sums over one (of weights that are standardised) run in another
    order than over the resized model's.
    """
    last = full.ndim == 4 and not full.is_contiguous() and full.is_contiguous(memory_format=torch.channels_last)
    return _take(full, cuts).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class _TakeDense(torch.autograd.Function):
    """`_take_dense` whose backward fills one gradient of full size; autograd's own fills one for each run of each dimension."""

    @staticmethod
    def forward(ctx, full: torch.Tensor, cuts: Cuts) -> torch.Tensor:
        ctx.full, ctx.cuts = full, cuts  # for its layout alone: not saved, so that a changed value is no fault
        return _take_dense(full, cuts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        out = torch.zeros_like(ctx.full)
        _put(out, grad, ctx.cuts)
        return out, None


def _is_view(cuts: Cuts) -> bool:
    return all(not isinstance(kept, torch.Tensor) and len(kept) == 1 for _, kept in cuts)


def _runs(index: np.ndarray) -> Runs:
    """Runs of neighbours in ascending indices."""
    start = np.flatnonzero(np.diff(index, prepend=-2) != 1)
    return tuple(zip(index[start].tolist(), np.diff(start, append=len(index)).tolist()))


def _index(runs: Runs, device: Optional[torch.device] = None) -> torch.Tensor:
    return torch.tensor([i for start, length in runs for i in range(start, start + length)], device=device)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What to exchange for one call.

    Attributes:
        steps: Ids kept per group.
        kept: Their runs, for the groups of which not all are.
        params: Parameter -> its cuts.
        buffers: Buffer -> its cuts.
        settings: Attributes to set, as (module, attribute, value).
    """
    steps: tuple[int, ...]
    kept: Mapping[int, Runs]
    params: Mapping[str, Cuts]
    buffers: Mapping[str, Cuts]
    settings: tuple[tuple[str, str, Any], ...]


_ABSENT = object()


@contextmanager
def _set(modules: Mapping[str, nn.Module], settings: Iterable[tuple[str, str, Any]]) -> Iterator[None]:
    """Sets attributes of modules for a while; in their dicts, since nn.Module.__setattr__ takes many times as long."""
    undo = []
    try:
        for path, attribute, value in settings:
            held = modules[path].__dict__
            undo.append((held, attribute, held.get(attribute, _ABSENT)))
            held[attribute] = value
        yield
    finally:
        for held, attribute, value in reversed(undo):
            if value is _ABSENT:
                del held[attribute]
            else:
                held[attribute] = value


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _inside(name: str, blocks: Sequence[str]) -> bool:
    return any(name.startswith(block + '.') for block in blocks)


# -- the supernet ----------------------------------------------------------------------------------------------------------


class Supernet(nn.Module):
    """A model that runs at any widths up to its own, with shared weights.

    The model stays what it was, as the submodule `model`; parameters, buffers and hooks are its own. A parameter's gradient has
    its full size, with zeros where the widths left it out.

    Running statistics of batch norms: in training mode those of the channels kept are updated, unless gradients are disabled;
    a candidate that is only looked at leaves no trace.

    Args:
        model: The model that `space` was traced from, at the space's base widths.
        space: Its width space.

    Attributes:
        norms: Group -> the normalisations that govern it, on which its gate acts.
        norm_axes: Normalisation -> the axis of its vectors.
        ungated: Searchable groups that have none.

    Raises:
        WidthError: The model is not the one traced.
    """

    def __init__(self, model: nn.Module, space: WidthSpace):
        super().__init__()
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        have = {n: tuple(t.shape) for n, t in named}
        for name, t in space.tensors.items():
            if have.get(name) != t.shape:
                raise WidthError(f"the model is not the one that was traced: '{name}' is {have.get(name, 'missing')}, "
                                 f'expected {t.shape}; trace it again')
        self.model = model
        self.space = space
        modules = dict(model.named_modules())
        self.norm_axes: dict[str, Axis] = {}
        for name, t in space.tensors.items():
            owner, _, leaf = name.rpartition('.')
            if leaf == 'weight' and t.is_param and len(t.shape) == 1 and t.axes[0] is not None and _is_norm(modules[owner]):
                self.norm_axes[owner] = t.axes[0]
        norms: dict[str, dict[str, None]] = {}
        for norm, axis in self.norm_axes.items():
            for g, _ in axis:
                norms.setdefault(space.groups[g].name, {})[norm] = None
        self.norms = {group: tuple(found) for group, found in norms.items()}
        self.ungated = tuple(name for name in space.searchable if name not in norms)
        first: dict[int, str] = {}
        self._tied: dict[str, list[str]] = {}  # tensor -> its names in further modules; the space knows it by its first name
        for name, t in named:
            if first.setdefault(id(t), name) != name and name.rpartition('.')[0] in modules:
                self._tied.setdefault(first[id(t)], []).append(name)
        self._plans: dict[tuple, _Plan] = {}

    def forward(
            self,
            x: torch.Tensor,
            widths: Optional[Mapping[str, Width]] = None,
            gates: Optional[Mapping[str, torch.Tensor]] = None,
            skips: Sequence[str] = (),
            statistics: Optional[dict[str, tuple[torch.Tensor, Cuts]]] = None,
    ) -> torch.Tensor:
        """Runs the model at widths.

        Args:
            x: Images.
            widths: Group -> number of channels, the first ones; or the ascending indices of the steps (ids) to keep, which for
                a group of unit 1 are channels. Groups left out have their base width.
            gates: Group -> factors of the outputs of the normalisations that govern it, before their activations: one per step
                of the group, or per step kept; or a row of them for each image.
            skips: Residual blocks to leave out.
            statistics: An empty dict, for the running statistics that this call would update in training mode: the model's stay
                as they are, until `keep` is given the dict.

        Returns:
            The model's output.

        Raises:
            WidthError: Widths, gates or skips do not fit the model.
        """
        plan = self._plan({} if widths is None else widths, skips)
        if statistics is None:
            return self._run(x, plan, gates or {}, skips, keep_statistics=torch.is_grad_enabled())
        return self._run(x, plan, gates or {}, skips, False, statistics)

    def keep(self, statistics: Mapping[str, tuple[torch.Tensor, Cuts]]) -> None:
        """Takes over the running statistics that a call put into a dict."""
        modules = dict(self.model.named_modules())
        for name, (buffer, cuts) in statistics.items():
            _put(_tensor(modules, name).data, buffer, cuts)

    def extra_repr(self) -> str:
        return f'{len(self.space.searchable)} searchable groups, {len(self.space.blocks)} blocks that can be skipped'

    # -- plans -------------------------------------------------------------------------------------------------

    def _plan(self, widths: Mapping[str, Width], skips: Sequence[str]) -> _Plan:
        """The plan for widths and skips, checked when it is made and kept for the next call."""
        if not isinstance(widths, Mapping):
            self.space.check(widths)
        if any(isinstance(w, bool) for w in widths.values()):  # True would pass for the 1 of an earlier plan
            self.space.check({n: w for n, w in widths.items() if isinstance(w, bool)})
        chosen = {name: w if isinstance(w, numbers.Integral) else _as_index(name, w) for name, w in widths.items()}
        device = next((p.device for p in self.model.parameters()), None)
        key = (frozenset((n, w.tobytes() if isinstance(w, np.ndarray) else w) for n, w in chosen.items()), tuple(skips), device)
        plan = self._plans.pop(key, None) or self._new_plan(chosen, skips, device)
        self._plans[key] = plan  # the last is the one used last
        if len(self._plans) > MAX_PLANS:
            del self._plans[next(iter(self._plans))]
        return plan

    def _new_plan(self, chosen: Mapping[str, Union[int, np.ndarray]], skips: Sequence[str], device) -> _Plan:
        space = self.space
        kept = self._kept(chosen, skips)
        steps = tuple(sum(n for _, n in kept[i]) if i in kept else g.steps for i, g in enumerate(space.groups))
        places: dict[Axis, Optional[Runs]] = {}
        indices: dict[Axis, torch.Tensor] = {}

        def place(axis: Axis, few: int) -> Union[None, Runs, torch.Tensor]:
            if axis not in places:
                places[axis] = self._places(axis, kept) if any(g in kept for g, _ in axis) else None
            runs = places[axis]
            if runs is None or len(runs) <= few:
                return runs
            if axis not in indices:
                indices[axis] = _index(runs, device)
            return indices[axis]

        params, buffers = {}, {}
        for name, t in space.tensors.items():
            if _inside(name, skips):
                continue
            few = 1 if len(t.shape) == 1 else MAX_RUNS  # of a vector, an index takes less time than even two runs
            cuts = tuple((d, p) for d, a in enumerate(t.axes) if a is not None and (p := place(a, few)) is not None)
            if cuts:
                (params if t.is_param else buffers)[name] = cuts
        settings = [*self._settings(steps, skips), *((block, 'forward', _same) for block in skips)]
        return _Plan(steps, kept, params, buffers, tuple(settings))

    def _kept(self, chosen: Mapping[str, Union[int, np.ndarray]], skips: Sequence[str]) -> dict[int, Runs]:
        """Runs of the ids kept, for the groups that are not whole; raises WidthError with all faults at once."""
        space = self.space
        sizes, kept, faults = {}, {}, []
        for name, w in chosen.items():
            group = space.groups[space.index[name]] if name in space.index else None
            is_index = isinstance(w, np.ndarray)
            sizes[name] = len(w) * (group.unit if group else 1) if is_index else w
            if group is None:
                continue
            if is_index and len(w) and ((np.diff(w) <= 0).any() or w[0] < 0 or w[-1] >= group.steps):
                faults.append(f"'{name}': indices must be ascending and below {group.steps}")
                del sizes[name]
            elif group.frozen is None and sizes[name] > group.size:
                faults.append(f"'{name}': width {w} is above the base width {group.size}; grow the model first, by resize")
                del sizes[name]
            elif sizes[name] != group.size:
                runs = _runs(w) if is_index else ((0, int(w) // group.unit),)
                if group.ordered and any(start > 0 for start, _ in runs):
                    faults.append(f"'{name}' is ordered: only its first channels can be kept")
                kept[space.index[name]] = runs
        _refuse(space, [*faults, *space.faults(sizes, skips)])
        return kept

    def _places(self, axis: Axis, kept: Mapping[int, Runs]) -> Runs:
        """Runs of an axis that are kept; neighbours joined."""
        runs, at = [], 0
        for g, repeat in axis:
            steps = self.space.groups[g].steps
            for start, length in kept.get(g, ((0, steps),)):
                start, length = at + start * repeat, length * repeat
                if runs and sum(runs[-1]) == start:
                    start, before = runs.pop()
                    length += before
                runs.append((start, length))
            at += steps * repeat
        return tuple(runs)

    def _settings(self, steps: Sequence[int], skips: Sequence[str]) -> list[tuple[str, str, Any]]:
        """The sizes in Python that differ from those of the base."""
        modules = dict(self.model.named_modules())
        lengths: dict[Axis, int] = {}
        out: dict[tuple[str, str], Any] = {}
        for b in self.space.bindings:
            if b.attribute == 'feature_info' or _inside(b.module + '.', skips):
                continue  # no forward reads them
            if b.axis not in lengths:
                lengths[b.axis] = self.space.length(b.axis, steps)
            value = lengths[b.axis] * b.mul // b.div
            base = modules[b.module].__dict__[b.attribute]
            held = out.get((b.module, b.attribute), base)
            if b.key:
                value = type(held)(value if k == b.key[0] else v for k, v in enumerate(held))
            if value != base:
                out[b.module, b.attribute] = value
        return [(module, attribute, value) for (module, attribute), value in out.items()]

    # -- calls -------------------------------------------------------------------------------------------------

    def _run(
            self,
            x: torch.Tensor,
            plan: _Plan,
            gates: Mapping[str, torch.Tensor],
            skips: Sequence[str],
            keep_statistics: bool,
            statistics: Optional[dict[str, tuple[torch.Tensor, Cuts]]] = None,
    ) -> torch.Tensor:
        modules = dict(self.model.named_modules())
        training = [name for name, m in modules.items() if m.training]
        tensors = self._slices(modules, plan)
        rows = self._gate(modules, plan, tensors, gates, skips, len(x)) if gates else {}
        changed = tensors or rows or plan.settings
        if changed and torch.is_grad_enabled() and any(m.__dict__.get('grad_checkpointing') for m in modules.values()):
            raise RuntimeError('gradient checkpointing runs layers once more after the call, when they are whole again: switch '
                               'it off with model.set_grad_checkpointing(False)')
        if training and not keep_statistics:
            for path in training:
                for leaf, buffer in modules[path]._buffers.items():
                    if buffer is not None:
                        name = f'{path}.{leaf}' if path else leaf
                        tensors[name] = tensors.get(name, buffer).clone()
                        if statistics is not None:
                            statistics[name] = tensors[name], plan.buffers.get(name, ())
        for name, others in self._tied.items():
            if name in tensors:
                tensors.update(dict.fromkeys(others, tensors[name]))
        with _set(modules, plan.settings), _hooks(modules, rows):
            if not tensors:
                return self.model(x)
            out = torch.func.functional_call(self.model, tensors, (x,), tie_weights=False)
        if training and keep_statistics:
            for name, cuts in plan.buffers.items():
                if not _is_view(cuts):
                    # by .data: no backward reads what is written here, so one that is yet to come must not mind
                    _put(_tensor(modules, name).data, tensors[name], cuts)
        return out

    @staticmethod
    def _slices(modules: Mapping[str, nn.Module], plan: _Plan) -> dict[str, torch.Tensor]:
        """Parameters and buffers at the widths of a plan."""
        take = _TakeDense.apply if torch.is_grad_enabled() else _take_dense
        out = {}
        for name, cuts in plan.params.items():
            p = _tensor(modules, name)
            out[name] = take(p, cuts) if p.ndim > 1 else _take(p, cuts)  # for vectors, autograd's own is the faster
        for name, cuts in plan.buffers.items():
            out[name] = _take(_tensor(modules, name), cuts)
        return out

    # -- gates -------------------------------------------------------------------------------------------------

    def _gate(
            self,
            modules: Mapping[str, nn.Module],
            plan: _Plan,
            tensors: dict[str, torch.Tensor],
            gates: Mapping[str, torch.Tensor],
            skips: Sequence[str],
            batch: int,
    ) -> dict[str, torch.Tensor]:
        """Scales normalisations, in `tensors`, by the gates that are vectors; returns the rows per image for the others."""
        factors = self._checked_gates(plan, gates, batch)
        rows = {}
        for norm in {norm: None for name in gates for norm in self.norms[name] if not _inside(norm, skips)}:
            parts = [(factors.get(g), plan.steps[g], repeat) for g, repeat in self.norm_axes[norm]]
            per_image = any(f is not None and f.ndim == 2 for f, _, _ in parts)
            weight = _tensor(modules, f'{norm}.weight')
            full = []
            for factor, steps, repeat in parts:
                if factor is None:
                    factor = weight.new_ones(steps)
                if per_image and factor.ndim == 1:
                    factor = factor.expand(batch, -1)
                full.append(factor.to(weight).repeat_interleave(repeat, -1) if repeat > 1 else factor.to(weight))
            factor = full[0] if len(full) == 1 else torch.cat(full, -1)
            if per_image:
                rows[norm] = factor
                continue
            for leaf in ('weight', 'bias'):
                name = f'{norm}.{leaf}'
                if modules[norm]._parameters.get(leaf) is not None:
                    tensors[name] = tensors.get(name, _tensor(modules, name)) * factor
        return rows

    def _checked_gates(self, plan: _Plan, gates: Mapping[str, torch.Tensor], batch: int) -> dict[int, torch.Tensor]:
        """Group index -> factors of the steps kept."""
        out, faults = {}, []
        for name, gate in gates.items():
            if name not in self.norms:
                faults.append(f"'{name}' cannot be gated: no normalisation governs it" if name in self.space.index else
                              f"unknown group {str(name)[:80]!r}{nearest(name, self.norms)}")
                continue
            g = self.space.index[name]
            group, kept = self.space.groups[g], plan.steps[g]
            if not isinstance(gate, torch.Tensor) or gate.ndim not in (1, 2) or gate.shape[-1] not in (group.steps, kept) or (
                    gate.ndim == 2 and gate.shape[0] != batch):
                lengths = f'{group.steps} or {kept}' if kept != group.steps else str(kept)
                given = tuple(gate.shape) if isinstance(gate, torch.Tensor) else type(gate).__name__
                faults.append(f"'{name}': a gate is a tensor of {lengths} factors, or such a row for each of {batch} images, "
                              f'not {given}')
            elif g in plan.kept and gate.shape[-1] == group.steps:
                runs = plan.kept[g]
                many = len(runs) > MAX_RUNS
                out[g] = _take(gate, ((gate.ndim - 1, _index(runs, gate.device) if many else runs),))
            else:
                out[g] = gate
        _refuse(self.space, faults)
        return out


def _as_index(name: str, width: Any) -> np.ndarray:
    index = width.detach().cpu().numpy() if isinstance(width, torch.Tensor) else np.asarray(width)
    if index.ndim != 1 or index.dtype.kind not in 'iu':
        raise WidthError(f"'{name}': a width is a whole number of channels or a vector of indices, not {str(width)[:40]!r}")
    return index.astype(np.int64, copy=False)


def _refuse(space: WidthSpace, faults: Sequence[str]) -> None:
    if faults:
        raise WidthError(f'{space.architecture}: ' + '\n  '.join(faults))


def _tensor(modules: Mapping[str, nn.Module], name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition('.')
    module = modules[owner]
    return module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]


# -- normalisations --------------------------------------------------------------------------------------------------------


def _is_norm(module: nn.Module) -> bool:
    return any(cls.__name__.startswith(NORMS) for cls in type(module).__mro__)


def _channel_dim(norm: nn.Module, ndim: int) -> int:
    last = any(cls.__name__.startswith(CHANNELS_LAST_NORMS) for cls in type(norm).__mro__) and '2d' not in type(norm).__name__
    return ndim - 1 if last else 1


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], rows: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Multiplies the outputs of normalisations by a row for each image.

    Where the activation is part of the normalisation's module, it is a submodule, `act`, whose input is the norm's output.
    """
    handles = []
    try:
        for name, row in rows.items():
            norm = modules[name]
            act = norm._modules.get('act')
            if act is not None:
                handles.append(act.register_forward_pre_hook(partial(_gate_input, norm, row)))
            else:
                handles.append(norm.register_forward_hook(partial(_gate_output, norm, row)))
        yield
    finally:
        for h in handles:
            h.remove()


def _gated(norm: nn.Module, row: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    shape = [1] * x.ndim
    shape[0], shape[_channel_dim(norm, x.ndim)] = row.shape
    return x * row.to(x.dtype).reshape(shape)


def _gate_input(norm: nn.Module, row: torch.Tensor, act: nn.Module, args: tuple) -> torch.Tensor:
    return _gated(norm, row, args[0])


def _gate_output(norm: nn.Module, row: torch.Tensor, module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
    return _gated(norm, row, out)


@torch.no_grad()
def recalibrate(
        model: nn.Module,
        loader: Iterable,
        batches: int = 20,
        widths: Optional[Mapping[str, Width]] = None,
        device: Union[None, str, torch.device] = None,
        skips: Sequence[str] = (),
) -> None:
    """Estimates the running statistics of all batch norms anew, as averages over batches.

    All else runs in evaluation mode. Of a supernet at widths, only the statistics of the channels kept change.

    Args:
        model: A supernet or any other model.
        loader: Images, or tuples that begin with them.
        batches: Largest number of batches to use.
        widths: Widths of a supernet.
        device: Where to run; by default where the model is.
        skips: Blocks of a supernet to leave out.

    Raises:
        ValueError: There is no batch.
        WidthError: The widths do not fit the model.
    """
    net = model if isinstance(model, Supernet) else None
    if net is None and (widths or skips):
        raise WidthError(f'only a Supernet has widths and skips, not {type(model).__name__}')
    plan = net._plan({} if widths is None else widths, skips) if net is not None else None
    found = itertools.islice(iter(loader), max(batches, 0))
    first = next(found, None)
    if first is None:
        raise ValueError('recalibrate needs at least one batch')
    if device is None:
        device = next((p.device for p in model.parameters()), None)
    norms = {n: m for n, m in (net.model if net is not None else model).named_modules()
             if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None and not _inside(n, skips)}
    before = {m: [b.clone() for b in m.buffers(recurse=False)] for m in norms.values()}
    modes = [(m, m.training) for m in model.modules()]
    momenta = [(m, m.momentum) for m in norms.values()]
    done = False
    try:
        model.eval()
        for name, norm in norms.items():
            norm.training = True  # its submodules (a dropout, an activation) stay in evaluation mode
            norm.momentum = None
            norm.num_batches_tracked.zero_()
            for leaf, value in ('running_mean', 0.0), ('running_var', 1.0):
                buffer, cuts = getattr(norm, leaf), plan.buffers.get(f'{name}.{leaf}', ()) if plan is not None else ()
                _put(buffer, torch.full_like(_take(buffer, cuts), value), cuts)
        for batch in itertools.chain([first], found):
            x = (batch[0] if isinstance(batch, (tuple, list)) else batch).to(device)
            if net is not None:
                net._run(x, plan, {}, skips, keep_statistics=True)
            else:
                model(x)
        done = True
    finally:
        for norm, buffers in before.items():
            if not done or not norm.num_batches_tracked:  # it has not run: no estimate is no reason to forget the old one
                for now, then in zip(norm.buffers(recurse=False), buffers):
                    now.copy_(then)
        for m, mode in modes:
            m.training = mode
        for m, momentum in momenta:
            m.momentum = momentum
