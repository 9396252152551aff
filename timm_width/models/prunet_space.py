"""What PRUNET's search may choose: Tables 1 and 5 of the paper as data, smaller ones of the same form, and their sizes.

"Tiered pruning for efficient differentiable inference-aware neural architecture search" (PRUNET). A space is a stem, stages, and a
1x1 convolution with a classifier. Each layer of a stage chooses a block (kernel, squeeze-and-excitation, activation) and the width
inside it, or is left out where its output has the shape of its input.
"""
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Optional

from ..space import WidthError, nearest
from .gpunet import DIVISOR, Block

__all__ = ['PrunetError', 'SPACES', 'SearchSpace', 'Stage', 'base_layers', 'fbnet', 'get_space', 'reduced', 'space_size', 'table1',
           'table5']

TYPES = ('conv', 'fused', 'irb')
ACTIVATIONS = ('relu', 'silu', 'relu6', 'hard_swish', 'gelu')
MAX_KERNEL, MAX_CHANNELS, MAX_STAGES, MAX_DEPTH, MAX_EXPANSION = 11, 4096, 32, 64, 32
MAX_SCALE = 4.  # of a reduction (or an enlargement)


class PrunetError(WidthError):
    """Layers or a space that no PRUNET can be built from."""


@dataclass(frozen=True)
class Stage:
    """Layers of one type and width.

    Attributes:
        type: 'conv', 'fused' or 'irb', as of a `Block`.
        filters: Output channels of every layer.
        stride: Of the first layer; that of the others is 1.
        depth: Layers, at most.
        kernels: Activation -> the kernel sizes offered with it; the first activation is the stage's own.
        se: Whether squeeze-and-excitation is there, as offered.
        base_depth: Layers of GPUNet-1, all of the smallest kernel and the first activation.
        base_expansion: Their hidden width over their input channels.
        base_se: Whether they have squeeze-and-excitation.
    """
    type: str
    filters: int
    stride: int
    depth: int
    kernels: Mapping[str, tuple[int, ...]]
    se: tuple[bool, ...] = (False, True)
    base_depth: int = 1
    base_expansion: float = 4
    base_se: bool = False

    @property
    def kinds(self) -> list[tuple[str, int, bool]]:
        """(activation, kernel, SE) of every block that is offered."""
        se = (False,) if self.type == 'conv' else self.se
        return [(act, kernel, s) for act, kernels in self.kernels.items() for kernel in kernels for s in se]


@dataclass(frozen=True)
class SearchSpace:
    """Stages between a stem and a head; a value.

    Attributes:
        stages: From the stem on; layers name them by number, the first being 1.
        stem: Channels of the 3x3 convolution of stride 2 that comes first.
        stem_act: Its activation.
        head: Channels of the last 1x1 convolution.
        granularity: Hidden widths are multiples of it.
        max_expansion: The largest hidden width, in input channels of the layer.
        expansions: The hidden widths, if only some are offered, in input channels of the layer.
    """
    stages: tuple[Stage, ...]
    stem: int = 24
    stem_act: str = 'silu'
    head: int = 1280
    granularity: int = 32
    max_expansion: int = 8
    expansions: Optional[tuple[float, ...]] = field(default=None)

    def layers(self) -> Iterator[tuple[int, int, int, int]]:
        """(stage number, index in the stage, input channels, stride) of every layer, if none is left out."""
        channels = self.stem
        for number, stage in enumerate(self.stages, 1):
            for i in range(stage.depth):
                yield number, i, channels, 1 if i else stage.stride
                channels = stage.filters

    def largest(self, c_in: int) -> int:
        """The largest hidden width of a layer of c_in input channels."""
        return self.hidden(c_in, self.max_expansion if self.expansions is None else max(self.expansions))

    def hidden(self, c_in: int, expansion: float) -> int:
        """An expansion as a hidden width: the nearest multiple of the granularity (of 8, where widths are not free)."""
        unit = self.granularity if self.expansions is None else DIVISOR
        most = max(int(self.max_expansion * c_in) // unit, 1)
        return unit * min(max(math.floor(expansion * c_in / unit + 0.5), 1), most)

    def widths(self, c_in: int) -> tuple[int, ...]:
        """The hidden widths of a layer of c_in input channels, ascending."""
        if self.expansions is not None:
            return tuple(sorted({self.hidden(c_in, e) for e in self.expansions}))
        return tuple(range(self.granularity, self.largest(c_in) + 1, self.granularity))

    def block(self, stage: int, c_in: int, stride: int, kernel: int, act: str, se: bool = False, hidden: int = 0) -> Block:
        """A block of a stage, named by its number."""
        found = self.stages[stage - 1]
        return Block(found.type, c_in, found.filters, stride, kernel, 0 if found.type == 'conv' else hidden, se, act)

    def to_dict(self) -> dict[str, Any]:
        """The space as JSON takes it, without what is at its default; `get_space` reads it."""
        return {'stages': [_differing(s) for s in self.stages], **{k: v for k, v in _differing(self).items() if k != 'stages'}}


def _differing(value: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults, or have none, tuples as lists."""
    found = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
    return {k: list(v) if isinstance(v, tuple) else {a: list(b) for a, b in v.items()} if isinstance(v, Mapping) else v
            for k, v in found.items()}


# -- the paper's -------------------------------------------------------------------------------------------------------------------

# type, filters, stride, activation, then of GPUNet-1: layers, expansion, SE
GPUNET_1 = (
    ('conv', 24, 1, 'relu', 1, 1, False),
    ('fused', 64, 2, 'silu', 2, 4, False),
    ('fused', 96, 2, 'silu', 2, 4, False),
    ('irb', 160, 2, 'silu', 1, 2, True),
    ('irb', 288, 1, 'relu', 4, 5, False),
    ('irb', 448, 2, 'relu', 4, 4, True),
)


def table1(depths: Sequence[int] = (2, 3, 3, 2, 5, 5), expansions: Optional[Sequence[float]] = None) -> SearchSpace:
    """The space of Table 1: two kernels, with and without SE, hidden widths in steps of 32 up to 8 times the input.

    Args:
        depths: Layers of the stages. The text says one more than GPUNet-1 has, which is the default; Table 1 prints
            (2, 3, 3, 2, 5, 6), and the size that it states, 1.7e39, is that of (2, 2, 3, 2, 5, 5).
        expansions: Offer only these hidden widths: (3, 6) is the FBNet space that Table 3 compares with.
    """
    return SearchSpace(tuple(
        Stage(type_, filters, stride, depth, {act: (3, 5)}, base_depth=layers, base_expansion=expansion, base_se=se)
        for depth, (type_, filters, stride, act, layers, expansion, se) in zip(depths, GPUNET_1, strict=True)),
        expansions=None if expansions is None else tuple(expansions))


def table5(depths: Sequence[int] = (2, 2, 3, 2, 5, 6)) -> SearchSpace:
    """The space of Table 5: hidden widths of 8 times the input, no SE, and kernels that differ with the activation.

    The table's stem has a stride of 1; ours has 2, as GPUNet-1 and Table 1.
    """
    early, late = {'relu': (3, 5), 'silu': (3, 5, 7)}, {'relu': (3, 5, 7), 'silu': (3, 5)}
    kernels = ({'relu': (3, 5, 7)}, early, early, early, late, late)
    return SearchSpace(tuple(
        Stage(type_, filters, stride, depth, offered, (False,), layers, 1 if type_ == 'conv' else 8)
        for depth, offered, (type_, filters, stride, _, layers, _, _) in zip(depths, kernels, GPUNET_1, strict=True)),
        expansions=(8,))


def fbnet() -> SearchSpace:
    """The FBNet space of Table 3, of 2^2 * 8^17 networks: two expansions of each block."""
    return table1((2, 2, 3, 2, 5, 5), expansions=(3, 6))


SPACES = {'table1': table1, 'table5': table5, 'fbnet': fbnet}


def reduced(space: SearchSpace, width: float = 1., depth: float = 1.) -> SearchSpace:
    """A space with fewer channels and layers, for experiments on small computers.

    Args:
        space: The space.
        width: Multiplies stem, filters, head and granularity; they are rounded to multiples of 8.
        depth: Multiplies the layers of GPUNet-1; what the search may have beyond them stays.
    """
    for name, value in (('width', width), ('depth', depth)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value <= MAX_SCALE:
            raise PrunetError(f'{name} must be a number above 0 and up to {MAX_SCALE:g}, not {str(value)[:40]!r}')

    def channels(n: int) -> int:
        return n if width == 1 else DIVISOR * max(math.floor(width * n / DIVISOR + 0.5), 1)

    def stage(s: Stage) -> Stage:
        layers = max(math.floor(depth * s.base_depth + 0.5), 1)
        return replace(s, filters=channels(s.filters), base_depth=layers, depth=layers + s.depth - s.base_depth)

    return replace(space, stages=tuple(map(stage, space.stages)), stem=channels(space.stem), head=channels(space.head),
                   granularity=channels(space.granularity))


def base_layers(space: SearchSpace) -> list[dict[str, Any]]:
    """GPUNet-1's layers in a space, as `prunet` takes them."""
    found, channels = [], space.stem
    for number, stage in enumerate(space.stages, 1):
        act, kernels = next(iter(stage.kernels.items()))
        for _ in range(stage.base_depth):
            layer: dict[str, Any] = {'stage': number, 'kernel': min(kernels)}
            if stage.type != 'conv':
                layer.update(se=stage.base_se, hidden=space.hidden(channels, stage.base_expansion))
            if len(stage.kernels) > 1:
                layer['act'] = act
            found.append(layer)
            channels = stage.filters
    return found


def space_size(space: SearchSpace, skips: str = 'residual', widths: Optional[int] = None) -> int:
    """The number of networks in a space.

    Args:
        space: The space.
        skips: Layers that may be left out: 'residual' (those whose output has the shape of their input), 'none' or 'all'.
        widths: Hidden widths per block, if not those of the space.
    """
    if skips not in ('residual', 'none', 'all'):
        raise PrunetError(f"skips must be 'residual', 'none' or 'all', not {str(skips)[:40]!r}")
    total = 1
    for number, _, c_in, stride in space.layers():
        stage = space.stages[number - 1]
        each = 1 if stage.type == 'conv' else len(space.widths(c_in)) if widths is None else widths
        may_skip = skips == 'all' or skips == 'residual' and stride == 1 and c_in == stage.filters
        total *= len(stage.kinds) * each + may_skip
    return total


# -- reading -----------------------------------------------------------------------------------------------------------------------


def get_space(space: Any = None, width: float = 1., depth: float = 1.) -> SearchSpace:
    """A space from what a caller or a config says of it; nothing in it is trusted.

    Args:
        space: 'table1' (the default), 'table5', 'fbnet', or a dict as of `SearchSpace.to_dict`.
        width: See `reduced`.
        depth: See `reduced`.

    Raises:
        PrunetError: With every fault found.
    """
    space = 'table1' if space is None else space
    if isinstance(space, str):
        if space not in SPACES:
            raise PrunetError(f"unknown space {space[:40]!r}{nearest(space[:40], SPACES)}; there are {', '.join(SPACES)}")
        found = SPACES[space]()
    elif isinstance(space, Mapping):
        found = _read_space(space)
    else:
        hint = ': give its to_dict()' if isinstance(space, SearchSpace) else ''
        raise PrunetError(f'space must be a name or a dict, not {type(space).__name__}{hint}')
    return reduced(found, width, depth)


class _Reader:
    """Takes typed entries from a dict and collects what is wrong with them."""

    def __init__(self, given: Any, where: str, faults: list[str]):
        self.given, self.where, self.faults = dict(given) if isinstance(given, Mapping) else {}, where, faults
        self.read: list[str] = []
        if not isinstance(given, Mapping):
            faults.append(f'{where} must be a dict, not {type(given).__name__}')

    def take(self, key: str, right: str, valid: Any, default: Any = None) -> Any:
        self.read.append(key)
        if key not in self.given and default is not None:
            return default
        value = self.given.get(key)
        if valid(value):
            return value
        shown = f', not {str(value)[:40]!r}' if key in self.given else ': it is missing'
        self.faults.append(f"{self.where}: {key} must be {right}{shown}")
        return default

    def whole(self, key: str, most: int, default: Optional[int] = None, unit: int = 1) -> int:
        right = f'a whole number from {unit} to {most}' + (f', a multiple of {unit}' if unit > 1 else '')
        return self.take(key, right, lambda v: is_whole(v, unit, most) and v % unit == 0, default) or unit

    def done(self) -> None:
        for key in self.given:
            if key not in self.read:
                self.faults.append(f'{self.where}: unknown entry {str(key)[:40]!r}{nearest(str(key)[:40], self.read)}')


def is_whole(value: Any, least: int, most: int) -> bool:
    """Whether a value is an int (and no bool) within bounds."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any, most: float) -> bool:
    """Whether a value is a number above 0 up to `most`."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < value <= most


def is_list(value: Any, most: int, valid: Any) -> bool:
    """Whether a value is a list of 1 to `most` different entries that are valid."""
    return isinstance(value, (list, tuple)) and 0 < len(value) <= most and all(map(valid, value)) and len(set(value)) == len(value)


def is_kernel(value: Any) -> bool:
    """Whether a value is an odd size within bounds."""
    return is_whole(value, 1, MAX_KERNEL) and value % 2 == 1


def _read_stage(given: Any, where: str, faults: list[str]) -> Optional[Stage]:
    before, of = len(faults), _Reader(given, where, faults)
    if len(faults) > before:
        return None
    se = tuple(of.take('se', 'a list of false and true', lambda v: is_list(v, 2, lambda s: isinstance(s, bool)), (False, True)))
    said = dict(
        type=of.take('type', f"one of {', '.join(TYPES)}", lambda v: isinstance(v, str) and v in TYPES),
        filters=of.whole('filters', MAX_CHANNELS, unit=DIVISOR),
        stride=of.take('stride', '1 or 2', lambda v: is_whole(v, 1, 2)),
        depth=of.whole('depth', MAX_DEPTH),
        kernels=of.take(
            'kernels', f"a dict of activation ({', '.join(ACTIVATIONS)}) -> odd kernel sizes up to {MAX_KERNEL}",
            lambda v: isinstance(v, Mapping) and v and all(a in ACTIVATIONS and is_list(k, 6, is_kernel) for a, k in v.items())),
        se=se,
        base_depth=of.take('base_depth', 'a whole number from 1 to depth',
                           lambda v: is_whole(v, 1, MAX_DEPTH) and is_whole(of.given.get('depth'), v, MAX_DEPTH), 1),
        base_expansion=of.take('base_expansion', f'a number above 0, up to {MAX_EXPANSION}',
                               lambda v: is_number(v, MAX_EXPANSION), 4),
        base_se=of.take('base_se', 'one of se', lambda v: isinstance(v, bool) and v in se, False not in se))
    of.done()
    if len(faults) > before:
        return None
    return Stage(**{**said, 'kernels': {a: tuple(k) for a, k in said['kernels'].items()}})


def _read_space(given: Mapping) -> SearchSpace:
    faults: list[str] = []
    of = _Reader(given, 'space', faults)
    stages = of.take('stages', f'a list of 1 to {MAX_STAGES} stages',
                     lambda v: isinstance(v, (list, tuple)) and 0 < len(v) <= MAX_STAGES) or ()
    said = dict(
        stem=of.whole('stem', MAX_CHANNELS, 24, DIVISOR), head=of.whole('head', MAX_CHANNELS, 1280, DIVISOR),
        stem_act=of.take('stem_act', f"one of {', '.join(ACTIVATIONS)}",
                         lambda v: isinstance(v, str) and v in ACTIVATIONS, 'silu'),
        granularity=of.whole('granularity', MAX_CHANNELS, 32, DIVISOR),
        max_expansion=of.whole('max_expansion', MAX_EXPANSION, 8))
    expansions = of.take('expansions', f'a list of different numbers above 0, up to {MAX_EXPANSION}',
                         lambda v: v is None or is_list(v, MAX_EXPANSION, lambda e: is_number(e, MAX_EXPANSION)))
    of.done()
    found = [_read_stage(s, f'space: stage {i}', faults) for i, s in enumerate(stages, 1)]
    if faults:
        raise PrunetError('\n  '.join(faults[:20]))
    return SearchSpace(tuple(found), expansions=None if expansions is None else tuple(expansions), **said)
