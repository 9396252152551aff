"""trace(model) -> WidthSpace: one labelled run on the meta device, the unions solved, then the check of law 0.

The model is never run, moved or changed: a copy whose tensors live on the meta device is.
"""
import numbers
from typing import Optional, Sequence

import numpy as np
import torch
from torch import nn

from .bindings import metadata, recipes
from .check import deviations
from .deployed import deployed_sites
from .ledger import Ledger, meta_copy, restore, run, snapshot
from .resize import apply_bindings, replace_tensors
from .rules import is_ids
from .space import Axis, Binding, Block, Group, Site, TensorAxes, WidthSpace

__all__ = ['TraceError', 'meta_copy', 'trace']

MAX_CHECKS = 24  # rounds of law 0 before everything is frozen
GOLDEN = 0.6180339887  # its multiples fill an interval evenly
SHATTERED = 32  # a producer whose channels fall into more groups than this is frozen


class TraceError(ValueError):
    """A model that cannot be traced."""


def _name(model: nn.Module) -> str:
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__


def trace(model: nn.Module, input_size: Optional[Sequence[int]] = None, deployed: bool = False) -> WidthSpace:
    """Finds the width groups of a model.

    Args:
        model: A timm model (or any module of one image input); it is neither run nor changed.
        input_size: (channels, height, width); by default the model's own.
        deployed: Also follow a re-parameterisable model (RepVGG, MobileOne, FastViT) into its fused form, for
            `Macs(space, deployed=True)`; the fusion of a large model takes seconds.

    Returns:
        The space. Groups that cannot be resized are in it, frozen, with the reason.
    """
    if not isinstance(model, torch.nn.Module):
        raise TraceError(f'trace takes a model, as from timm.create_model, not {type(model).__name__} {str(model)[:40]!r}')
    size = _input_size(model, input_size)
    with torch.inference_mode():
        meta = meta_copy(model).eval()
        kept = snapshot(meta)
        try:
            ledger = run(meta, size)
        except Exception as e:
            where = 'x'.join(map(str, size))
            raise TraceError(f'{_name(model)} does not run on an image of {where}: {type(e).__name__}: '
                             f"{str(e).strip().splitlines()[0] if str(e).strip() else ''}") from e
        restore(kept)
        return _Solver(ledger, model, size, deployed).space()


def _input_size(model, input_size) -> tuple[int, ...]:
    if input_size is None:
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        input_size = cfg.get('input_size', (3, 224, 224))
        in_chans = getattr(model, 'in_chans', None) or input_size[0]
        input_size = (in_chans, *input_size[1:])
    if isinstance(input_size, str) or not isinstance(input_size, Sequence) or not all(
            isinstance(s, numbers.Integral) and s > 0 for s in input_size):
        raise TraceError(f'input_size must be (channels, height, width), not {input_size!r}')
    return tuple(int(s) for s in input_size)


def _components(ledger: Ledger) -> np.ndarray:
    """Solves the unions: the component of every id."""
    if ledger.edges:
        a, b = (np.concatenate(z) for z in zip(*ledger.edges, strict=True))
    else:
        a = b = np.zeros(0, dtype=np.int64)
    return _connected(a, b, max(ledger.count, 1))


def _connected(a: np.ndarray, b: np.ndarray, n: int) -> np.ndarray:
    """The connected component of each of n nodes, for edges a - b."""
    from scipy.sparse import coo_matrix  # slow to import, and not needed to register the models
    from scipy.sparse.csgraph import connected_components

    return connected_components(coo_matrix((np.ones(len(a), bool), (a, b)), shape=(n, n)), directed=False)[1].astype(np.int64)


class _Solver:
    """Turns a ledger into a space: solves the unions, finds the segments, freezes what law 0 refuses."""

    def __init__(self, ledger: Ledger, model: nn.Module, size: tuple, deployed: bool):
        self.ledger, self.model, self.size = ledger, model, size
        self.want_deployed = deployed
        self.root = _components(ledger)
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
        # what the run itself said of a size comes last, and so wins
        self.recipes = recipes(led.model, led.unit_rules) + metadata(led.model, led) + led.recipes
        for p in led.tensors.values():
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
        self.deployed = deployed_sites(led.model, self.size, led, _components) if self.want_deployed else None
        reasons = self._frozen()
        return self._checked(reasons)

    def _segments(self) -> None:
        """SURGERY 1: two ids share a segment iff they occur equally often and side by side wherever they occur."""
        n = self.n
        nxt, prv = np.full(n, -2), np.full(n, -2)  # -2 unseen, -1 none or several

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
        linked = (nxt >= 0) & (prv[np.maximum(nxt, 0)] == np.arange(n)) & (nxt != np.arange(n))
        a = np.flatnonzero(linked)
        self.seg = _connected(a, nxt[a], n)
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
        params = {n for n, _ in self.ledger.model.named_parameters()}
        data = [e for n, p in self.ledger.tensors.items() if n not in params for e in self.ledger.label(p) if is_ids(e)]
        held = {int(g) for e in data for g in np.unique(self.seg[self.root[e]])}
        for g in self.name:
            if g in held and g not in self.produced:
                reasons.setdefault(g, 'fixed data in a buffer')
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
            for owner, kind, positions, factors, size, inputs, outputs, before in found:
                free = []
                for e in factors:
                    a = axis(e)
                    if a is None:
                        positions *= len(e)
                    else:
                        free.append(a)
                out.append(Site(owner, kind, positions, tuple(free), size, axis(inputs), axis(outputs), before))
            return tuple(out)

        blocks = tuple(Block(n) for n in led.blocks)
        space = WidthSpace(
            _name(self.model), self.size, groups, tensors, sites(led.sites), blocks, (),
            deployed_sites=sites(self.deployed) if self.deployed else None)
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
        found: list[tuple[int, str]] = []
        for _ in range(MAX_CHECKS):
            space = self.build(reasons)
            found = self._deviations(space, 0.3, 0.8) + self._deviations(space, 1.1, 1.6) if space.searchable else []
            if not found:
                return space
            if not self._freeze(found, reasons):
                break
        for g in self.name:
            reasons.setdefault(g, f'law 0: {found[0][1]}')
        return self.build(reasons)

    def _deviations(self, space: WidthSpace, low: float, high: float) -> list[tuple[int, str]]:
        meta = self.ledger.model
        widths = {n: space.rounded(g, g.size * (low + (high - low) * (k * GOLDEN % 1)))
                  for k, (n, g) in enumerate(space.searchable.items())}
        for n, g in space.searchable.items():
            if widths[n] == g.size:  # few steps: every group must change
                widths[n] = max(g.size + (g.unit if low > 1 else -g.unit), g.unit)
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
        return deviations(meta, self.size, predicted)

    def _freeze(self, found: list, reasons: dict[int, str]) -> bool:
        """Freezes the groups on the axes of the operations that deviate, or of the modules around them."""
        led, new, before = self.ledger, False, set(reasons)
        for at, fault in found:
            name, module, label, _, touched = led.ops[at]
            ids = touched + [e for lab in label for e in lab if is_ids(e)]
            prefix = module
            while True:
                groups = {int(g) for e in ids for g in np.unique(self.seg[self.root[e]])} - before
                if groups or prefix is None:
                    break
                ids = [e for n, m, lab, _, t in led.ops if m == prefix or m.startswith(prefix + '.') or not prefix
                       for e in t]
                prefix = prefix.rpartition('.')[0] if prefix else None
            for g in groups:
                reasons.setdefault(g, f'law 0: {fault} in {module}')
                new = True
        return new
