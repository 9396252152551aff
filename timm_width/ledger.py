"""The ledger of one labelled run: a model's meta copy runs once while every tensor's channel ids are kept.

Unions are collected as edges and solved once, by `trace.py`; `rules.py` says how each operation moves ids.
"""
import copy
import logging
from contextlib import contextmanager
from typing import Optional

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .bindings import SizeWatcher, tag_sizes
from .resize import feature_info
from .rules import RULES, is_ids, tensors_in

__all__ = ['Ledger', 'composite', 'execute', 'meta_copy', 'restore', 'run', 'snapshot']

_logger = logging.getLogger(__name__)

RESIDUAL = frozenset('add relu dropout silu gelu hardswish'.split())  # what a block's sum may pass before it leaves the block
SHAPE_KEPT = frozenset('relu relu6 gelu silu hardswish hardsigmoid hardtanh sigmoid tanh leaky_relu elu mish dropout'.split())
BROADCAST = frozenset('add sub mul div'.split())



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
        self.outputs: dict[str, list] = {}  # module -> (label, shape) of its outputs
        self.inputs: dict[str, list] = {}  # module -> id axes of its (first) input
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

    def site(self, kind, positions, factors, size, inputs, outputs, weight, input_size=None) -> None:
        name = self.names.get(id(weight), '') if weight is not None else ''
        owner = name.rsplit('.', 1)[0] if name else self.stack[-1]
        if owner and outputs is not None and is_ids(outputs) and kind != 'matmul':
            self.producers.append((owner, outputs))
        before = size if input_size is None else input_size
        self.sites.append((owner, kind, positions, factors, tuple(size), inputs, outputs, tuple(before)))

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

    def _by_rule(self, fn, name: str, tensors: list, outs: list, out, args, kwargs) -> list:
        """Labels of the outputs by a rule; where it does not know this form of the operation, all that it touches is frozen."""
        try:
            label = fn(self, out, *args, **kwargs)
            label = [list(lab) for lab in label] if isinstance(out, (list, tuple)) else [list(label)]
            if len(label) == len(outs) and all(
                    len(lab) == o.ndim and all(not is_ids(e) or len(e) == s for e, s in zip(lab, o.shape))
                    for lab, o in zip(label, outs)):
                return label
        except (TypeError, IndexError, ValueError, AttributeError, KeyError) as e:
            _logger.debug('rule for aten.%s: %r', name, e)
        for x in tensors:
            for entry in self.label(x):
                if is_ids(entry):
                    self.freeze(entry, f'a form of aten.{name} that its rule does not know,')
        return [[None] * o.ndim for o in outs]

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
            label = self._by_rule(fn, name, tensors, outs, out, args, kwargs or {})
        for o, lab in zip(outs, label):
            if name[-1] == '_' and o is args[0]:
                for before, e in zip(self.label(o), lab):
                    if isinstance(before, str) and is_ids(e):  # perhaps through a view: the tensor itself would not know
                        self.freeze(e, 'a write into a tensor of constants')
            self.labels[id(o)] = lab
            self.keep.append(o)
        if plain in RESIDUAL and isinstance(out, torch.Tensor):
            self.sums.setdefault(id(out), []).append((len(self.ops), plain == 'add', [id(x) for x in tensors]))
        self.ops.append((name, self.stack[-1], label, [tuple(o.shape) for o in outs],
                         [e for x in labelled for e in self.labels[id(x)] if is_ids(e)]))


def execute(func, args, kwargs):
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


def composite(func) -> bool:
    """Whether an operation without a rule is made of others, which may have one."""
    name = func._schema.name.split('::')[1]
    return name not in RULES and name.rstrip('_') not in RULES and func._can_decompose()


class _Recorder(TorchDispatchMode):
    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if composite(func):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        out = execute(func, args, kwargs)
        self.ledger.record(func, out, args, kwargs)
        return out


@contextmanager
def _module_stack(ledger: Ledger):
    """Keeps the path of the running module, the inputs and outputs of all modules, and the residual blocks."""
    path = {m: n for n, m in ledger.modules.items()}
    entered: list[int] = []  # operations run before each module on the stack

    def enter(module, args):
        name = path.get(module, ledger.stack[-1])
        ledger.stack.append(name)
        entered.append(len(ledger.ops))
        if args and isinstance(args[0], torch.Tensor):
            ledger.inputs[name] = [e for e in ledger.label(args[0]) if is_ids(e)]

    def leave(module, args, kwargs, out):
        name, since = ledger.stack.pop(), entered.pop()
        outs = out if isinstance(out, (list, tuple)) else [out]
        ledger.outputs[name] = [(ledger.label(o), tuple(o.shape)) for o in outs if isinstance(o, torch.Tensor)]
        if (name and len(args) == 1 and not kwargs and isinstance(out, torch.Tensor) and isinstance(args[0], torch.Tensor)
                and out.shape == args[0].shape and not any(b.startswith(name + '.') for b in ledger.blocks)
                and _reaches(ledger.sums, id(out), id(args[0]), since)):
            ledger.blocks.append(name)

    handles = [nn.modules.module.register_module_forward_pre_hook(enter),
               nn.modules.module.register_module_forward_hook(leave, with_kwargs=True)]
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


def run(meta: nn.Module, size: tuple) -> Ledger:
    """Runs a model on the meta device for one image of `size` and returns the ledger."""
    ledger = Ledger(meta)
    x = torch.empty(1, *size, device='meta')
    ledger.start(x)
    watcher = SizeWatcher(ledger)
    tag_sizes(meta)
    with _module_stack(ledger), torch.device('meta'), _Recorder(ledger), _forward_features(ledger), watcher:
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


def snapshot(model: nn.Module) -> list:
    """What modules keep in plain attributes, to undo what a run caches there (attention biases, position embeddings)."""
    return [(m, {k: dict(v) if type(v) is dict else v for k, v in m.__dict__.items() if k[0] != '_'}) for m in model.modules()]


def restore(kept: list) -> None:
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
