"""trace(model) -> WidthSpace: one labelled run on the meta device, then the check of law 0.

The model is never run, moved or changed: a copy whose tensors live on the meta device is. A `Ledger` keeps the label of every
tensor while `rules.py` says how operations move ids; unions are collected as edges and solved once at the end.
"""
import copy
import logging
import math
from contextlib import contextmanager
from typing import Optional, Sequence

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .bindings import SizeWatcher, metadata, recipes, tag_sizes
from .resize import apply_bindings, feature_info, replace_tensors
from .rules import RULES, is_ids, tensors_in
from .space import Axis, Binding, Block, Group, Site, TensorAxes, WidthSpace

__all__ = ['TraceError', 'meta_copy', 'trace']

_logger = logging.getLogger(__name__)

MAX_CHECKS = 24  # rounds of law 0 before all that still deviates is frozen at once
GOLDEN = 0.6180339887  # its multiples fill an interval evenly
SHATTERED = 32  # a producer whose channels fall into more single-id groups than this is frozen


def meta_copy(model: nn.Module) -> nn.Module:
    """Copies a module with every parameter and buffer replaced by an empty one on the meta device, floats as float32."""
    memo = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device='meta', dtype=torch.float32), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device='meta', dtype=torch.float32 if b.is_floating_point() else b.dtype)
    return copy.deepcopy(model, memo)


class Ledger:
    """Labels of all tensors of one run, the edges between ids, and what became of them."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.count = 0
        self.labels: dict[int, list] = {}
        self.keep: list = []  # tensors, so that no id() is used twice
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []
        self.frozen: list[tuple[np.ndarray, str]] = []
        self.ordered: list[np.ndarray] = []
        self.sites: list = []
        self.producers: list[tuple[str, np.ndarray]] = []
        self.names: dict[int, str] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.stack: list[str] = ['']
        self.ops: list[tuple] = []  # (name, module, output labels, output shapes, touched ids)
        self.outputs: dict[str, list] = {}  # module -> (label, shape) of its outputs, for the modules asked for
        self.inputs: dict[str, list] = {}  # head module -> id axes of its input
        self.blocks: list[str] = []
        self.sums: dict[int, list] = {}  # id of a sum or an activation -> (operation, whether a sum, ids of its operands)
        self.unit_rules: dict[str, bool] = {}
        self.modules = dict(model.named_modules())

    def channels(self, name: str) -> list:
        """Id axes of what a module put out: of each tensor, and of several tensors together along dimension 1."""
        found = self.outputs.get(name, ())
        out = [e for label, _ in found for e in label if is_ids(e)]
        if len(found) > 1 and all(len(label) > 1 and is_ids(label[1]) for label, _ in found):
            out.append(np.concatenate([label[1] for label, _ in found]))
        return out

    # what rules use

    def label(self, x: torch.Tensor) -> list:
        found = self.labels.get(id(x))
        return found if found is not None else [None] * x.ndim

    def new(self, n: int) -> np.ndarray:
        self.count += n
        return np.arange(self.count - n, self.count)

    def fixed(self, n: int, reason: str) -> np.ndarray:
        ids = self.new(n)
        self.freeze(ids, reason)
        return ids

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        if a is not b:
            self.edges.append((a.reshape(-1), b.reshape(-1)))

    def freeze(self, ids: np.ndarray, reason: str) -> None:
        where = self.stack[-1]
        self.frozen.append((ids.reshape(-1), f'{reason} in {where}' if where else reason))

    def order(self, ids: np.ndarray) -> None:
        self.ordered.append(ids)

    def site(self, kind, positions, factors, size, inputs, outputs, weight) -> None:
        name = self.names.get(id(weight), '') if weight is not None else ''
        owner = name.rsplit('.', 1)[0] if name else self.stack[-1]
        if outputs is not None and is_ids(outputs) and kind != 'matmul':
            self.producers.append((owner, outputs))
        self.sites.append((owner, kind, positions, factors, tuple(size), inputs, outputs))

    def _owner(self, weight) -> str:
        """Module that holds a weight, or that is running (a weight may be standardised on the way)."""
        return self.names.get(id(weight), '').rpartition('.')[0] or self.stack[-1]

    def unit_rule(self, weight) -> Optional[bool]:
        """Whether an earlier resize took the groups of this convolution or norm as units; None if it is at base."""
        return getattr(self.modules.get(self._owner(weight)), 'width_unit', None)

    def note_unit_rule(self, weight, unit: bool) -> None:
        self.unit_rules[self._owner(weight)] = unit

    # the run

    def start(self, x: torch.Tensor) -> None:
        convs = {n for n, m in self.modules.items() if isinstance(m, nn.modules.conv._ConvNd)}
        for name, p in [*self.model.named_parameters(), *self.model.named_buffers()]:
            owner, _, leaf = name.rpartition('.')
            rank = min(p.ndim, 2) if leaf == 'weight' and owner in convs else p.ndim
            if p.is_floating_point():
                self.labels[id(p)] = [self.new(s) if s > 0 and d < rank and (s > 1 or rank <= 2) else None
                                      for d, s in enumerate(p.shape)]
            self.names[id(p)] = name
            self.tensors[name] = p
        self.labels[id(x)] = [None, self.fixed(x.shape[1], 'network input'), *[None] * (x.ndim - 2)]
        self.keep.append(x)

    def record(self, func, out, args, kwargs) -> None:
        tensors = tensors_in(args) + (tensors_in(kwargs.values()) if kwargs else [])
        outs = list(out) if isinstance(out, (list, tuple)) else [out]
        outs = [o for o in outs if isinstance(o, torch.Tensor)]
        name = func._schema.name.split('::')[1]
        plain = name.rstrip('_') or name
        fn = RULES.get(name) or RULES.get(plain)
        labelled = [x for x in tensors if id(x) in self.labels]
        if not labelled and not (fn and not tensors):
            label = [[None] * o.ndim for o in outs]
        elif fn is None:
            for x in tensors:
                for e in self.label(x):
                    if is_ids(e):
                        self.freeze(e, f'aten.{name}, for which there is no rule,')
            label = [[None] * o.ndim for o in outs]
        else:
            label = fn(self, out, *args, **(kwargs or {}))
            label = list(label) if isinstance(out, (list, tuple)) else [list(label)]
        for o, lab in zip(outs, label):
            for e, s in zip(lab, o.shape):
                assert not is_ids(e) or len(e) == s, (name, e.shape, o.shape)
            self.labels[id(o)] = lab
            self.keep.append(o)
        if plain in RESIDUAL and isinstance(out, torch.Tensor):
            self.sums.setdefault(id(out), []).append((len(self.ops), plain == 'add', [id(x) for x in tensors]))
        self.ops.append((name, self.stack[-1], label, [tuple(o.shape) for o in outs],
                         [e for x in labelled for e in self.labels[id(x)] if is_ids(e)]))


RESIDUAL = frozenset('add relu dropout silu gelu hardswish'.split())  # what a block's sum may pass before it leaves the block
SHAPE_KEPT = frozenset('relu relu6 gelu silu hardswish hardsigmoid hardtanh sigmoid tanh leaky_relu elu mish dropout'.split())
BROADCAST = frozenset('add sub mul div'.split())


def _execute(func, args, kwargs):
    """Runs an operation on meta tensors; the commonest ones by shape alone, since their meta kernels take most of the time."""
    name, inplace = func._schema.name[6:], False
    if name[-1] == '_' and name[-2] != '_':
        name, inplace = name[:-1], True
    x = args[0] if args else None
    if name in SHAPE_KEPT and isinstance(x, torch.Tensor):
        return x if inplace else torch.empty_like(x)
    if name == 'batch_norm' and not args[5]:
        if any(v is not None and v.shape[0] != x.shape[1] for v in args[1:5]):
            raise RuntimeError(f'batch norm of {x.shape[1]} channels with a vector of another length')
        return torch.empty_like(x)
    if name in BROADCAST and isinstance(x, torch.Tensor) and len(args) > 1:
        y = args[1]
        if not isinstance(y, torch.Tensor) or x.dtype == y.dtype and x.shape == torch.broadcast_shapes(x.shape, y.shape):
            if x.is_floating_point() and len(args) == 2:
                return x if inplace else torch.empty_like(x)
    return func(*args, **(kwargs or {}))


def _composite(func) -> bool:
    """Whether an operation without a rule is made of others, which may have one."""
    name = func._schema.name.split('::')[1]
    return name not in RULES and name.rstrip('_') not in RULES and func._can_decompose()


class _Recorder(TorchDispatchMode):
    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _composite(func):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        out = _execute(func, args, kwargs)
        self.ledger.record(func, out, args, kwargs)
        return out


class _Checker(TorchDispatchMode):
    """Compares each output with the shape predicted; where they differ, notes it and goes on with the prediction."""

    def __init__(self, predicted: list):
        super().__init__()
        self.predicted = predicted
        self.at = 0
        self.deviations: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _composite(func):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        called = func._schema.name.split('::')[1]
        at = self.at
        while at < len(self.predicted) - 1 and self.predicted[at][0] != called and not self.predicted[at][2]:
            at += 1  # operations on constants may be cached by the first run
        name, shapes, _ = self.predicted[at] if at < len(self.predicted) else ('the end', (), True)
        if called != name:
            self.deviations.append((min(at, len(self.predicted) - 1), f'{called} runs instead of {name}'))
            raise _Astray
        self.at = at + 1
        fault = None
        try:
            out = _execute(func, args, kwargs)
            outs = [o for o in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(o, torch.Tensor)]
            got = [tuple(o.shape) for o in outs]
            if not _agree(got, shapes):
                fault = f'{name} gives {got} where {shapes} was expected'
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as e:
            fault, out = f'{name}: {str(e).splitlines()[0][:120]}', ()
        if fault:
            self.deviations.append((at, fault))
            new = [torch.empty([abs(n) for n in s], device='meta') for s in shapes]
            out = tuple(new) if isinstance(out, (list, tuple)) and len(shapes) != 1 else new[0] if new else out
        return out


def _agree(got: list, predicted: list) -> bool:
    """Whether shapes are those predicted; a negative size stands for any (equal values along that dimension)."""
    return got == predicted or len(got) == len(predicted) and all(
        len(a) == len(b) and all(n == m or m < 0 for n, m in zip(a, b)) for a, b in zip(got, predicted))


class _Astray(Exception):
    """The resized model does not run the operations of the base."""


@contextmanager
def _module_stack(ledger: Ledger, wanted: set):
    """Keeps the path of the running module, the outputs of wanted modules, and the residual blocks."""
    path = {m: n for n, m in ledger.modules.items()}
    entered: list[int] = []  # operations run before each module on the stack

    def enter(module, args):
        name = path.get(module, ledger.stack[-1])
        ledger.stack.append(name)
        entered.append(len(ledger.ops))
        if 'head' in name.rpartition('.')[2] and args and isinstance(args[0], torch.Tensor):
            ledger.inputs[name] = [e for e in ledger.label(args[0]) if is_ids(e)]

    def leave(module, args, out):
        name, since = ledger.stack.pop(), entered.pop()
        if name in wanted:
            outs = out if isinstance(out, (list, tuple)) else [out]
            ledger.outputs[name] = [(ledger.label(o), tuple(o.shape)) for o in outs if isinstance(o, torch.Tensor)]
        if (name and len(args) == 1 and isinstance(out, torch.Tensor) and isinstance(args[0], torch.Tensor)
                and out.shape == args[0].shape and not any(b.startswith(name + '.') for b in ledger.blocks)
                and _reaches(ledger.sums, id(out), id(args[0]), since)):
            ledger.blocks.append(name)

    handles = [nn.modules.module.register_module_forward_pre_hook(enter),
               nn.modules.module.register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def _reaches(sums: dict, start: int, goal: int, since: int) -> bool:
    """Whether a tensor is another one plus something, up to activations, by operations run since a point."""
    todo, seen = [(start, False)], {(start, False)}
    while todo:
        at, added = todo.pop()
        for op, is_sum, operands in sums.get(at, ()):
            for x in operands if op >= since else ():
                state = (x, added or is_sum)
                if x == goal and state[1]:
                    return True
                if state not in seen:
                    seen.add(state)
                    todo.append(state)
    return False


class TraceError(ValueError):
    """A model that cannot be traced."""


def _name(model: nn.Module) -> str:
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__


def trace(model: nn.Module, input_size: Optional[Sequence[int]] = None) -> WidthSpace:
    """Finds the width groups of a model.

    Args:
        model: A timm model (or any module of one image input); it is neither run nor changed.
        input_size: (channels, height, width); by default the model's own.

    Returns:
        The space. Groups that cannot be resized are in it, frozen, with the reason.
    """
    size = _input_size(model, input_size)
    with torch.inference_mode():
        meta = meta_copy(model).eval()
        kept = _snapshot(meta)
        try:
            ledger = _run(meta, size)
        except Exception as e:
            where = 'x'.join(map(str, size))
            raise TraceError(f'{_name(model)} does not run on an image of {where}: {type(e).__name__}: '
                             f"{str(e).strip().splitlines()[0] if str(e).strip() else ''}") from e
        _restore(kept)
        return _Solver(ledger, model, size).space()


def _input_size(model, input_size) -> tuple[int, ...]:
    if input_size is None:
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        input_size = cfg.get('input_size', (3, 224, 224))
        in_chans = getattr(model, 'in_chans', None) or input_size[0]
        input_size = (in_chans, *input_size[1:])
    return tuple(int(s) for s in input_size)


def _run(meta: nn.Module, size: tuple) -> Ledger:
    ledger = Ledger(meta)
    x = torch.empty(1, *size, device='meta')
    ledger.start(x)
    watcher = SizeWatcher(ledger)
    tag_sizes(meta)
    wanted = {str(i.get('module', '')) for i in feature_info(meta)}
    with _module_stack(ledger, wanted), torch.device('meta'), _Recorder(ledger), _forward_features(ledger), watcher:
        out = meta(x)
        _intermediates(ledger, x)
    ledger.recipes = watcher.solve()
    outs = tensors_in([out] if isinstance(out, torch.Tensor) else list(out.values()) if isinstance(out, dict) else out)
    if getattr(meta, 'num_classes', None) != 0:
        ledger.stack = ['']
        for o in outs:
            for e in ledger.label(o):
                if is_ids(e):
                    ledger.freeze(e, 'network output')
    ledger.outputs['#output'] = [(ledger.label(o), tuple(o.shape)) for o in outs]
    return ledger


def _intermediates(ledger: Ledger, x: torch.Tensor) -> None:
    """Runs forward_intermediates for the entries of feature_info that name no module that ran whole."""
    meta, info = ledger.model, feature_info(ledger.model)
    missing = [k for k, i in enumerate(info)
               if not any(len(e) == i.get('num_chs') for e in ledger.channels(str(i.get('module', ''))))]
    if not missing or not hasattr(meta, 'forward_intermediates'):
        return
    kept = [list(held) for held in (ledger.ops, ledger.sites, ledger.producers, ledger.blocks)]
    try:
        found = meta.forward_intermediates(x, intermediates_only=True)
    except (RuntimeError, ValueError, TypeError, AssertionError) as e:
        _logger.debug('forward_intermediates of %s: %s', type(meta).__name__, e)
        found = []
    ledger.ops, ledger.sites, ledger.producers, ledger.blocks = kept
    if len(found) == len(info):
        for k in missing:
            ledger.outputs[f'#intermediate.{k}'] = [(ledger.label(o), tuple(o.shape)) for o in tensors_in([found[k]])]


@contextmanager
def _forward_features(ledger: Ledger):
    """Notes the label of what forward_features returns, as module name '#features'."""
    meta = ledger.model
    inner = getattr(meta, 'forward_features', None)
    if inner is None:
        yield
        return

    def noted(*args, **kwargs):
        out = inner(*args, **kwargs)
        ledger.outputs['#features'] = [(ledger.label(o), tuple(o.shape)) for o in tensors_in([out])]
        return out

    meta.forward_features = noted
    try:
        yield
    finally:
        del meta.forward_features


def _snapshot(model: nn.Module) -> list:
    """What modules keep in plain attributes, to undo what a run caches there (attention biases, position embeddings)."""
    return [(m, {k: dict(v) if type(v) is dict else v for k, v in m.__dict__.items() if k[0] != '_'}) for m in model.modules()]


def _restore(kept: list) -> None:
    for module, attributes in kept:
        for k in [k for k in module.__dict__ if k[0] != '_' and k not in attributes]:
            del module.__dict__[k]
        for k, v in attributes.items():
            now = module.__dict__.get(k)
            if type(v) is dict and now != v:
                now.clear()
                now.update(v)
            elif now is not v and type(v) is not dict:
                module.__dict__[k] = v


class _Solver:
    """Turns a ledger into a space: solves the unions, finds the segments, freezes what law 0 refuses."""

    def __init__(self, ledger: Ledger, model: nn.Module, size: tuple):
        self.ledger, self.model, self.size = ledger, model, size
        n = max(ledger.count, 1)
        if ledger.edges:
            a, b = (np.concatenate(z) for z in zip(*ledger.edges))
        else:
            a = b = np.zeros(0, dtype=np.int64)
        _, root = connected_components(coo_matrix((np.ones(len(a), bool), (a, b)), shape=(n, n)), directed=False)
        self.root = root.astype(np.int64)
        self.n = int(self.root.max()) + 1
        self._axes: dict[int, tuple] = {}  # id(array) -> runs
        self._by_runs: dict[bytes, tuple] = {}
        self.arrays: list = []

    def runs(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Components along an axis with collapsed repeats: (components, repeat counts)."""
        key = id(ids)
        found = self._axes.get(key)
        if found is None:
            r = self.root[ids]
            digest = r.tobytes()
            found = self._by_runs.get(digest)
            if found is None:
                start = np.flatnonzero(np.concatenate(([True], r[1:] != r[:-1])))
                found = (r[start], np.diff(np.append(start, len(r))))
                self._by_runs[digest] = found
            self._axes[key] = found
            self.arrays.append(ids)
        return found

    def space(self) -> WidthSpace:
        led = self.ledger
        self.recipes = recipes(led.model, led.unit_rules) + led.recipes + metadata(led.model, led)
        for name, p in led.tensors.items():
            for e in led.label(p):
                if is_ids(e):
                    self.runs(e)
        for _, _, label, _, _ in led.ops:
            for lab in label:
                for e in lab:
                    if is_ids(e):
                        self.runs(e)
        self._segments()
        self._names()
        reasons = self._frozen()
        return self._checked(reasons)

    def _segments(self) -> None:
        """SURGERY 1: two ids share a segment iff they occur equally often and side by side wherever they occur."""
        n = self.n
        nxt, prv = np.full(n, -2), np.full(n, -2)  # -2 unseen, -1 none or several
        link_ok = np.ones(n, bool)

        def note(table, at, value):
            """Keeps in table the one value seen at each index, -1 where several were seen."""
            order = np.argsort(at, kind='stable')
            at, value = at[order], value[order]
            first = np.flatnonzero(np.concatenate(([True], at[1:] != at[:-1])))
            low, high = np.minimum.reduceat(value, first), np.maximum.reduceat(value, first)
            table[at[first]] = np.where(low == high, low, -1)

        froms, tos, counts_from, counts_to = [], [], [], []
        for comps, counts in self._by_runs.values():
            froms.append(np.concatenate(([-1], comps)))
            tos.append(np.concatenate((comps, [-1])))
            counts_from.append(np.concatenate(([0], counts)))
            counts_to.append(np.concatenate((counts, [0])))
        f, t, cf, ct = (np.concatenate(z) for z in (froms, tos, counts_from, counts_to))
        bad = cf != ct
        note(nxt, f[f >= 0], np.where(bad, -1, t)[f >= 0])
        note(prv, t[t >= 0], np.where(bad, -1, f)[t >= 0])
        linked = (nxt >= 0) & (prv[np.maximum(nxt, 0)] == np.arange(n)) & (nxt != np.arange(n)) & link_ok
        a = np.flatnonzero(linked)
        _, seg = connected_components(coo_matrix((np.ones(len(a), bool), (a, nxt[a])), shape=(n, n)), directed=False)
        self.seg = seg.astype(np.int64)
        self.steps = np.bincount(self.seg)
        # position of each component in its segment: follow the links from the heads
        self.pos = np.zeros(n, dtype=np.int64)
        has_prev = np.zeros(n, bool)
        has_prev[nxt[a]] = True
        at = np.flatnonzero(linked & ~has_prev)
        k = 0
        while len(at):
            self.pos[at] = k
            at, k = nxt[at[linked[at]]], k + 1
        self.linked = linked

    def axis(self, ids: np.ndarray) -> Axis:
        """Pieces of an axis, in order."""
        comps, counts = self.runs(ids)
        seg = self.seg[comps]
        # a new piece starts where the segment changes or begins again
        start = np.flatnonzero(np.concatenate(([True], (seg[1:] != seg[:-1]) | (self.pos[comps[1:]] == 0))))
        return tuple((int(seg[s]), int(counts[s])) for s in start)

    def _names(self) -> None:
        """Names each segment by the first conv or linear that produces it, else by the first parameter that holds it."""
        led, self.name, self.unit = self.ledger, {}, {}
        for owner, ids in led.producers:
            axis = self.axis(ids)
            order = list(dict.fromkeys(g for g, _ in axis))
            for k, g in enumerate(order):
                if g not in self.name:
                    self.name[g] = owner if len(order) == 1 else f'{owner}:{k + 1}'
                    self.unit[g] = sum(r for h, r in axis if h == g)
            if len(order) > SHATTERED:
                led.frozen.append((ids, 'its channels are used in several orders'))
        self.produced = set(self.name)
        for name, p in led.tensors.items():
            for d, e in enumerate(led.label(p)):
                if is_ids(e):
                    axis = self.axis(e)
                    for g, _ in axis:
                        if g not in self.name:
                            base, taken = f'{name}' if p.ndim == 1 else f'{name}[{d}]', set(self.name.values())
                            self.name[g] = base if base not in taken else f'{base}:{len(taken)}'
                            self.unit[g] = sum(r for h, r in axis if h == g)

    def _frozen(self) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for ids, reason in self.ledger.frozen:
            for g in np.unique(self.seg[self.root[ids]]):
                reasons.setdefault(int(g), reason)
        for g in self.name:
            if self.steps[g] == 1 and self.unit[g] == 1:
                reasons.setdefault(g, 'a single channel')
        return reasons

    def build(self, reasons: dict[int, str]) -> WidthSpace:
        """The space with these groups frozen; segments that nothing produces and that are frozen are not channels."""
        led = self.ledger
        keep = {g: None for g in self.name if g in self.produced or g not in reasons}
        for comps, _ in self._by_runs.values():  # a fixed stretch beside channels, in a concatenation
            segs = np.unique(self.seg[comps])
            if len(segs) > 1 and any(int(g) in keep and int(g) not in reasons for g in segs):
                keep.update((int(g), None) for g in segs)
        index = {g: i for i, g in enumerate(keep)}
        for g in keep:
            self.name.setdefault(g, f'fixed:{index[g]}')
            self.unit.setdefault(g, 1)
        fixed: dict = {}

        def axis(ids) -> Optional[Axis]:
            if not is_ids(ids):
                return None
            got = fixed.get(id(ids))
            if got is None:
                pieces = self.axis(ids)
                got = tuple((index[g], r) for g, r in pieces) if all(g in index for g, _ in pieces) else ()
                fixed[id(ids)] = got
            return got or None

        where: dict[int, list] = {i: [] for i in range(len(keep))}
        tensors = {}
        params = {n for n, _ in led.model.named_parameters()}
        for name, p in led.tensors.items():
            axes = tuple(axis(e) for e in led.label(p))
            tensors[name] = TensorAxes(tuple(p.shape), axes, name in params)
            for d, a in enumerate(axes):
                for g in {g for g, _ in a or ()}:
                    where[g].append((name, d))
        ordered = {index.get(int(g)) for ids in led.ordered for g in np.unique(self.seg[self.root[ids]])}
        groups = tuple(
            Group(self.name[g], int(self.steps[g]), self.unit[g], reasons.get(g), i in ordered, tuple(where[i]))
            for i, g in enumerate(keep))

        def sites(found):
            out = []
            for owner, kind, positions, factors, size, inputs, outputs in found:
                free = []
                for e in factors:
                    a = axis(e)
                    if a is None:
                        positions *= len(e)
                    else:
                        free.append(a)
                out.append(Site(owner, kind, positions, tuple(free), size, axis(inputs), axis(outputs)))
            return tuple(out)

        blocks = tuple(Block(n) for n in led.blocks)
        space = WidthSpace(
            _name(self.model), self.size, groups, tensors, sites(led.sites), blocks, ())
        bindings = []
        for r in self.recipes:
            a = axis(r.ids) if r.ids is not None else tensors[r.tensor].axes[r.dim] if r.tensor in tensors else None
            if a:
                bindings.append(Binding(r.module, r.attribute, a, r.mul, r.div, r.key))
        object.__setattr__(space, 'bindings', tuple(bindings))
        object.__setattr__(space, 'unit_rules', dict(led.unit_rules))
        self._axis_of = axis
        return space

    def _checked(self, reasons: dict[int, str]) -> WidthSpace:
        """Law 0 at widths below and above the base: the resized model runs the same operations with the predicted shapes.

        Every group gets a ratio of its own: equal ratios would hide sizes that the model's code ties together.
        """
        for attempt in range(MAX_CHECKS):
            space = self.build(reasons)
            if not space.searchable:
                break
            found = self._deviations(space, 0.3, 0.8) + self._deviations(space, 1.1, 1.6)
            if not found:
                break
            if not self._freeze(found, reasons, everything=attempt > MAX_CHECKS // 2):
                for g in self.name:
                    reasons.setdefault(g, f'law 0: {found[0][1]}')
        return self.build(reasons) if space.searchable and found else space

    def _deviations(self, space: WidthSpace, low: float, high: float) -> list[tuple[int, str]]:
        meta = self.ledger.model
        widths = {n: space.rounded(g, g.size * (low + (high - low) * (k * GOLDEN % 1)))
                  for k, (n, g) in enumerate(space.searchable.items())}
        steps, shapes = space.steps(widths), space.shapes(widths)
        replace_tensors(meta, lambda name, t: t.new_empty(shapes[name]))
        apply_bindings(meta, space, steps)
        lengths: dict[int, int] = {}

        def size(e, s):
            if not is_ids(e):
                return -s if isinstance(e, str) else s
            n = lengths.get(id(e))
            if n is None:
                a = self._axis_of(e)
                n = lengths[id(e)] = s if a is None else space.length(a, steps)
            return n

        predicted = [(name, [tuple(map(size, lab, sh)) for lab, sh in zip(label, shapes)], bool(touched))
                     for name, _, label, shapes, touched in self.ledger.ops]
        checker = _Checker(predicted)
        x = torch.empty(1, *self.size, device='meta')
        kept = _snapshot(meta)
        try:
            with torch.device('meta'), checker:
                meta(x)
        except _Astray:
            pass
        except Exception as e:  # the model's own code refused the sizes
            checker.deviations.append((min(checker.at, len(predicted) - 1), f'{type(e).__name__}: {str(e)[:120]}'))
        _restore(kept)
        return checker.deviations

    def _freeze(self, found: list, reasons: dict[int, str], everything: bool) -> bool:
        """Freezes the groups on the axes of the operations that deviate, or of the modules around them."""
        led, new = self.ledger, False
        for at, fault in found:
            name, module, label, _, touched = led.ops[at]
            ids = touched + [e for lab in label for e in lab if is_ids(e)]
            prefix = module
            while True:
                groups = {int(g) for e in ids for g in np.unique(self.seg[self.root[e]])} - set(reasons)
                if groups or prefix is None:
                    break
                ids = [e for n, m, lab, _, t in led.ops if m == prefix or m.startswith(prefix + '.') or not prefix
                       for e in t]
                prefix = prefix.rpartition('.')[0] if prefix else None
            for g in groups:
                reasons[g] = f'law 0: {fault} in {module}'
                new = True
        return new
