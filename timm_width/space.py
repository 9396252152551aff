"""The width space of a model: which channels live and die together, as a plain value without modules.

Everything here is immutable data made by `timm_width.trace`. A *group* has `steps` ids of `unit` channels each. An *axis* of a
tensor is a tuple of pieces `(group index, channels per id)`: the axis is the concatenation of its pieces, and each id of a piece
is that many neighbouring channels. A dimension that carries no channels has no axis (None).
"""
import difflib
import hashlib
import math
import numbers
from dataclasses import dataclass, field
from functools import cached_property
from typing import Iterable, Iterator, Mapping, Optional, Sequence, Union

import numpy as np

__all__ = [
    'Axis', 'Binding', 'Block', 'Group', 'MAX_GROWTH', 'Site', 'TensorAxes', 'WidthError', 'WidthSpace',
]

MAX_GROWTH = 4  # a width may reach this multiple of its base width
MAX_FAULTS = 20  # faults listed in one message

Axis = tuple[tuple[int, int], ...]
Widths = Mapping[str, int]


class WidthError(ValueError):
    """Widths, skips or a config that do not fit the model they are meant for."""


@dataclass(frozen=True)
class Group:
    """Channels that one width governs.

    Attributes:
        name: First conv or linear that produces the channels, or the first parameter that holds them.
        steps: Number of ids, each of which is kept or dropped as a whole.
        unit: Channels of the producer per id.
        frozen: Why the width may not change; None for a searchable group.
        ordered: Whether an operation depends on the order of the channels, so that only a prefix may be kept.
        axes: Where the group occurs, as (tensor name, dimension).
    """
    name: str
    steps: int
    unit: int
    frozen: Optional[str] = None
    ordered: bool = False
    axes: tuple[tuple[str, int], ...] = ()

    @property
    def size(self) -> int:
        """Base width in channels of the producer."""
        return self.steps * self.unit


@dataclass(frozen=True)
class TensorAxes:
    """Shape and axes of one parameter or buffer."""
    shape: tuple[int, ...]
    axes: tuple[Optional[Axis], ...]
    is_param: bool


@dataclass(frozen=True)
class Site:
    """One convolution, linear layer or matrix product.

    Its MACs are `positions` times the product of the lengths of `factors`; an int in `factors` is a fixed length.

    Attributes:
        name: Module that owns the weight, or that ran the product.
        kind: 'conv', 'linear' or 'matmul'.
        positions: Fixed multiplicity: output positions x kernel elements (input positions for a transposed convolution).
        factors: Axes whose lengths multiply.
        output_size: Spatial size (or sequence length) of the output.
        inputs: Axis of the input channels (None where they are not searchable ids).
        outputs: Axis of the output channels.
        input_size: Spatial size (or sequence length) of the input.
    """
    name: str
    kind: str
    positions: int
    factors: tuple[Union[int, Axis], ...]
    output_size: tuple[int, ...]
    inputs: Optional[Axis] = None
    outputs: Optional[Axis] = None
    input_size: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """A residual block that can be left out, because its output is its input plus something."""
    name: str


@dataclass(frozen=True)
class Binding:
    """A size that a module keeps in Python: `module.attribute[key] = length(axis) * mul // div`."""
    module: str
    attribute: str
    axis: Axis
    mul: int = 1
    div: int = 1
    key: tuple[Union[int, str], ...] = ()


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns ", did you mean 'x'?" for the choice that is closest to name, or an empty string."""
    found = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.5)
    return f", did you mean '{found[0]}'?" if found else ''


@dataclass(frozen=True)
class WidthSpace:
    """Groups, axes, sites, bindings and skippable blocks of one model at its base widths.

    Equality and `fingerprint` cover all of it; two models with equal spaces resize alike.
    """
    architecture: str
    input_size: tuple[int, ...]
    groups: tuple[Group, ...]
    tensors: Mapping[str, TensorAxes] = field(repr=False)
    sites: tuple[Site, ...] = field(repr=False)
    blocks: tuple[Block, ...] = field(repr=False)
    bindings: tuple[Binding, ...] = field(repr=False)
    unit_rules: Mapping[str, bool] = field(default_factory=dict, repr=False)
    deployed_sites: Optional[tuple[Site, ...]] = field(default=None, repr=False)

    @cached_property
    def index(self) -> dict[str, int]:
        """Group name -> position in `groups`."""
        return {g.name: i for i, g in enumerate(self.groups)}

    @cached_property
    def searchable(self) -> dict[str, Group]:
        """The groups whose width may change, by name."""
        return {g.name: g for g in self.groups if g.frozen is None}

    @cached_property
    def frozen(self) -> dict[str, str]:
        """Group name -> why its width may not change."""
        return {g.name: g.frozen for g in self.groups if g.frozen is not None}

    @property
    def base_widths(self) -> dict[str, int]:
        """Every searchable group at its base width."""
        return {n: g.size for n, g in self.searchable.items()}

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __getitem__(self, name: str) -> Group:
        if name not in self.index:
            raise WidthError(f"unknown group '{name}'{nearest(name, self.index)}")
        return self.groups[self.index[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.index

    def __iter__(self) -> Iterator[str]:
        """Names of all groups."""
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.groups)

    # -- widths ------------------------------------------------------------------------------------------------

    def faults(self, widths: Widths, skips: Sequence[str] = ()) -> list[str]:
        """Lists all that is wrong with widths and skips, in words; empty when they can be built."""
        if not isinstance(widths, Mapping):
            return [f'widths must be a dict of group name -> channels, not {type(widths).__name__}: {str(widths)[:60]!r}'
                    + (' (read a file with timm_width.load_spec)' if isinstance(widths, str) else '')]
        found = []
        for name, width in widths.items():
            if not isinstance(name, str) or name not in self.index:
                found.append(f"unknown group {str(name)[:80]!r}{self._hint(name)}")
                continue
            group = self[name]
            if isinstance(width, bool) or not isinstance(width, numbers.Integral):
                found.append(f"'{name}': width must be a whole number, not {str(width)[:40]!r}")
            elif width == group.size:
                continue
            elif group.frozen is not None:
                found.append(f"'{name}' is frozen at {group.size} ({group.frozen}), not {str(width)[:40]}")
            elif not 0 < width <= MAX_GROWTH * group.size:
                found.append(f"'{name}': width {str(width)[:40]} is outside {group.unit}..{MAX_GROWTH * group.size}")
            elif width % group.unit:
                low = max(width - width % group.unit, group.unit)
                found.append(f"'{name}': width {width} is not a multiple of {group.unit}"
                             f' (nearest: {low} or {width - width % group.unit + group.unit})')
        if isinstance(skips, (str, Mapping)) or not isinstance(skips, Sequence):
            return found + [f'skips must be a list of block names, not {type(skips).__name__}']
        known = {b.name for b in self.blocks}
        for name in skips:
            if not isinstance(name, str) or name not in known:
                found.append(f"block {str(name)[:80]!r} cannot be skipped{nearest(name, known)}")
        return found

    def _hint(self, name: object) -> str:
        """For an unknown group: the one that a layer of that name belongs to, or the nearest name."""
        axis = next((s.outputs for s in self.sites if s.name == name and s.outputs), ())
        if axis:
            return f": the channels of that layer are those of {' and '.join(repr(self.groups[g].name) for g, _ in axis[:4])}"
        return nearest(name, self.searchable)

    def check(self, widths: Widths, skips: Sequence[str] = ()) -> None:
        """Raises WidthError with every fault of widths and skips at once."""
        found = self.faults(widths, skips)
        if found:
            more = f'\n  and {len(found) - MAX_FAULTS} more' if len(found) > MAX_FAULTS else ''
            raise WidthError(f'{self.architecture}: ' + '\n  '.join(found[:MAX_FAULTS]) + more)

    def steps(self, widths: Widths) -> np.ndarray:
        """Ids kept per group at widths; groups left out keep their base."""
        out = self._base_steps.copy()
        for name, width in widths.items():
            i = self.index[name]
            out[i] = width // self.groups[i].unit
        return out

    @cached_property
    def _base_steps(self) -> np.ndarray:
        return np.array([g.steps for g in self.groups], dtype=np.int64)

    @staticmethod
    def length(axis: Axis, steps: Sequence[int]) -> int:
        """Channels of an axis when `steps[g]` ids of each group are kept."""
        return int(sum(int(steps[g]) * r for g, r in axis))

    def shapes(self, widths: Widths, params_only: bool = False) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer at widths."""
        steps = self.steps(widths)
        return {
            name: tuple(s if a is None else self.length(a, steps) for s, a in zip(t.shape, t.axes))
            for name, t in self.tensors.items() if t.is_param or not params_only}

    def scaled(self, ratio: float, divisor: int = 1, minimum: int = 1) -> dict[str, int]:
        """Every searchable group at `ratio` of its base width, rounded to units and, where possible, to divisor.

        Args:
            ratio: Multiple of the base width.
            divisor: Widths are rounded to the nearest multiple of it (and of the unit).
            minimum: Smallest width in channels.

        Returns:
            Widths between one step and MAX_GROWTH times the base.
        """
        return {n: self.rounded(g, ratio * g.size, divisor, minimum) for n, g in self.searchable.items()}

    @staticmethod
    def rounded(group: Group, width: float, divisor: int = 1, minimum: int = 1) -> int:
        """Rounds a width to the nearest one allowed: a multiple of the unit and of divisor, at least one step of either."""
        step = math.lcm(group.unit, divisor)
        if step > group.size:
            step = group.unit
        low = max(-(-minimum // step), 1)
        high = MAX_GROWTH * group.size // step
        return step * min(max(math.floor(width / step + 0.5), low), high)

    # -- summary -----------------------------------------------------------------------------------------------

    def macs(self, widths: Optional[Widths] = None) -> int:
        """Exact MACs of one image (the polynomial form, with skips and gradients, is `timm_width.Macs`)."""
        steps = self.steps(widths or {})
        return sum(
            s.positions * math.prod(f if isinstance(f, int) else self.length(f, steps) for f in s.factors)
            for s in self.sites)

    @cached_property
    def searchable_share(self) -> float:
        """Parameters with at least one searchable axis, over all parameters."""
        free = {i for i, g in enumerate(self.groups) if g.frozen is None}
        total = found = 0
        for t in self.tensors.values():
            if t.is_param:
                n = math.prod(t.shape)
                total += n
                found += n if any(a is not None and any(g in free for g, _ in a) for a in t.axes) else 0
        return found / max(total, 1)

    @cached_property
    def half_macs(self) -> float:
        """MACs with every searchable group at half, over base MACs."""
        return self.macs(self.scaled(0.5)) / max(self.macs(), 1)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the whole space, 'sha256:' and 16 hexadecimal digits."""
        text = repr((self.architecture, self.input_size, self.groups, sorted(self.tensors.items()), self.sites, self.blocks,
                     self.bindings, sorted(self.unit_rules.items()), self.deployed_sites))
        return 'sha256:' + hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        macs = self.macs() or 1
        share = np.zeros(len(self.groups))
        for s in self.sites:
            n = s.positions * math.prod(f if isinstance(f, int) else self.length(f, self._base_steps) for f in s.factors)
            touched = {g for f in s.factors if not isinstance(f, int) for g, _ in f}
            for g in touched:
                share[g] += n / macs
        rows = [('group', 'width', 'unit', 'layers', 'MACs %', '')]
        for g, s in zip(self.groups, share):
            layers = len({t.rsplit('.', 1)[0] for t, _ in g.axes})
            note = f'frozen: {g.frozen}' if g.frozen is not None else 'ordered' if g.ordered else ''
            rows.append((g.name, str(g.size), str(g.unit), str(layers), f'{100 * s:.1f}', note))
        w = [max(len(r[i]) for r in rows) for i in range(5)]
        lines = ['  '.join([r[0].ljust(w[0])] + [r[i].rjust(w[i]) for i in range(1, 5)] + [r[5]]).rstrip() for r in rows]
        size = 'x'.join(map(str, self.input_size))
        head = (f'{self.architecture} at {size}: {len(self.searchable)} searchable groups, {len(self.frozen)} frozen, '
                f'{len(self.blocks)} blocks that can be skipped')
        foot = (f'{100 * self.searchable_share:.1f} % of the parameters are searchable; all groups at half leave '
                f'{100 * self.half_macs:.1f} % of {macs / 1e6:.2f}M MACs')
        return '\n'.join([head, *lines, foot])
