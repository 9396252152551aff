"""Grids: which widths a search may choose for each group. The published rules by name, any list of ratios, or plain multiples.

All rules count in steps: `--width-divisor` (8 by default, because that is what makes real devices fast) and the group's unit at
once, or the unit alone where the divisor is more than the group has. Every grid is ascending and holds at least one step.
"""
import fnmatch
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, Optional

import numpy as np
from torch import nn

from .bins import bin_grid
from .cost import Macs
from .data import UsageError
from .policies.base import Grid
from .space import MAX_GROWTH, Group, WidthSpace, nearest

__all__ = ['GRIDS', 'finer', 'growth', 'make_grid', 'single_widths', 'squeezes']

DIVISOR = 8
SQUEEZE = re.compile('SEModule|SEWithNorm|SqueezeExcit|BlockESE|GatherExcite')  # classes of squeeze-excite in timm


class _Rule(NamedTuple):
    """A published rule: widths from (base, step, low, high, number), and what these are if nobody says."""
    widths: Optional[Callable[[int, int, float, float, float], Iterable[int]]]  # None: those of a group depend on the others
    low: float
    high: float
    number: float
    help: str
    divisor: int = DIVISOR
    number_is: str = 'a whole number'


def _multiples(base: int, step: int, low: float, high: float, number: float) -> list[int]:
    """Every multiple of the step, and the base itself."""
    first = max(math.ceil(low * base / step - 1e-9), 1)  # 0.1 * 240 may be a little more than 24
    widths = [*range(first * step, math.floor(high * base + 1e-9) + 1, step)]
    return [*widths, base] if low <= 1 <= high or not widths else widths


def _aows(base: int, step: int, low: float, high: float, number: float) -> list[int]:
    """Evenly spaced ratios, rounded half to even: Table D.1 of AOWS for 14 of them."""
    return [step * max(round(r * base / step), 1) for r in np.linspace(low, high, int(number)).tolist()]


def _autoslim(base: int, step: int, low: float, high: float, number: float) -> list[int]:
    """Down from the largest width in steps of its twelfth, rounded down."""
    largest = max(math.floor(high * base / step + 0.5), 1)
    group = max(largest // int(number), 1)
    return [step * n for n in range(largest, max(math.ceil(low * base / step - 1e-9), 1) - 1, -group)]


def _dmcp(base: int, step: int, low: float, high: float, number: float) -> list[int]:
    """Down from the largest width, in groups of `number` times the base width, rounded down: section 3.3 of DMCP."""
    largest = max(math.floor(high * base / step + 0.5), 1)
    group = max(int(number * largest / high + 1e-9), 1)
    count = min(int((high - low) / number + 1e-4), (largest - 1) // group)
    return [step * (largest - k * group) for k in range(count + 1)]


def _bins(base: int, step: int, low: float, high: float, number: float) -> list[int]:
    """Equal parts of the largest width: the even partition that section 3.2 of CafeNet starts from."""
    parts = (step * max(round(high * base * i / number / step), 1) for i in range(1, int(number) + 1))
    return [w for w in parts if w >= low * base]


GRIDS: dict[str, _Rule] = {
    'multiples': _Rule(_multiples, 0.1, 1.0, 0, 'all multiples of --width-divisor'),
    'all': _Rule(_multiples, 0.0, MAX_GROWTH, 0, 'every width; --width-divisor is 1', 1),
    'aows': _Rule(_aows, 0.2, 1.5, 14, '14 even ratios'),
    'autoslim': _Rule(_autoslim, 0.15, 1.5, 12, 'down in 12ths of the largest width'),
    'dmcp': _Rule(_dmcp, 0.1, 1.0, 0.1, 'down in tenths of the base width; --width-divisor is 1', 1, 'a share'),
    'prunode': _Rule(_multiples, 0.0, 1.0, 0, 'all multiples of --width-divisor, which is 32', 32),
    'bins': _Rule(_bins, 0.0, 1.0, 10, '10 equal parts of the largest width'),
    'flops': _Rule(None, 0.0, 1.0, 1, 'bins of about the same MACs; flops:BETA for bins of BETA channels or more, 1 by default, '
                   'below 1 for smaller ones; --width-divisor is 1', 1, 'a number'),
}
_NUMBERS: dict[str, Callable[[float], bool]] = {
    'a whole number': lambda n: n >= 1 and n.is_integer(), 'a share': lambda n: 0 < n <= 1, 'a number': lambda n: 0 < n < math.inf}
_BOUNDS = {'a whole number': ' of 1 or more', 'a share': ' above 0, to 1', 'a number': ' above 0'}


def make_grid(
        space: WidthSpace,
        kind: str = 'multiples',
        low: Optional[float] = None,
        high: Optional[float] = None,
        divisor: Optional[int] = None,
        fix: Sequence[str] = (),
        squeezes: Collection[str] = (),
) -> Grid:
    """Lists the widths that a search may choose.

    Args:
        space: The width space of the model.
        kind: A name of GRIDS, with its number after a colon if another is wanted ('aows:10'), or a list of ratios ('0.25,0.5,1').
        low: Smallest ratio of the base width, though at least one step is kept; by default the rule's own.
        high: Largest ratio of the base width; by default the rule's own.
        divisor: Step of the widths; by default 8, or what the rule says. Of the rule 'flops', that of its bins.
        fix: Patterns of the groups that keep their base width, and are left out.
        squeezes: Further groups that are left out.

    Returns:
        Group -> widths, ascending.

    Raises:
        UsageError: There is no such rule, a pattern fits no group, or nothing is left to search.
    """
    rule, number, ratios = _parse(kind)
    if ratios is not None and (low is not None or high is not None):
        raise UsageError(f'--grid {kind} says all the ratios: leave out --width-min, --width-max and --supernet-macs')
    divisor = divisor or rule.divisor
    low = rule.low if low is None else low
    high = rule.high if high is None else high
    if not 0 <= low <= high <= MAX_GROWTH or high == 0:
        raise UsageError(f'--width-min {low:g} and --width-max {high:g} must be from 0 to {MAX_GROWTH}, the smaller first')
    fixed = {*squeezes, *_fixed(space, fix)}
    groups = {name: group for name, group in space.searchable.items() if name not in fixed}
    steps = {name: _step(group, divisor) for name, group in groups.items()}
    bins: Grid = {}
    if rule.widths is None and groups:
        largest = {name: g.unit * max(math.floor(high * g.steps + 0.5), 1) for name, g in groups.items()}
        bins = bin_grid(space, largest, number, steps)
    grid = {}
    for name, group in groups.items():
        step = steps[name]
        if bins:
            widths = (w for w in bins[name] if w >= low * group.size)
        elif ratios is None:
            widths = rule.widths(group.size, step, low, high, number)
        else:
            widths = (step * max(round(r * group.size / step), 1) for r in ratios)
        grid[name] = tuple(sorted({min(w, MAX_GROWTH * group.size // step * step) for w in widths} if not bins else widths))
        if not grid[name]:
            raise UsageError(f"--grid {kind} from {low:g} to {high:g} leaves no width for '{name}' of {group.size} channels")
    if not grid:
        raise UsageError(f'{space.architecture} has no searchable group'
                         + (': --fix keeps them all' if fixed else f': {next(iter(space.frozen.values()), "no convolution")}'))
    return grid


def _parse(kind: str) -> tuple[_Rule, float, Optional[list[float]]]:
    name, _, number = kind.strip().partition(':')
    try:
        if name in GRIDS:
            given = float(number) if number else GRIDS[name].number
            if number and not _NUMBERS[GRIDS[name].number_is](given):
                raise ValueError
            return GRIDS[name], given, None
        ratios = [float(r) for r in kind.split(',')]
        if not all(0 < r <= MAX_GROWTH for r in ratios):
            raise ValueError
        return GRIDS['multiples'], 0, ratios
    except ValueError:
        if name in GRIDS:
            is_a, usual = GRIDS[name].number_is, GRIDS[name].number
            wanted = f'the number of {name} must be {is_a}{_BOUNDS[is_a]}, as in {name}:{usual:g}'
            raise UsageError(f"--grid '{kind}': {wanted if usual else f'{name} takes no number'}") from None
        raise UsageError(f"--grid '{kind}' is not a grid{nearest(name, GRIDS)}: give one of {', '.join(GRIDS)} (aows:10, dmcp:0.05 "
                         f"or flops:0.5 for another number), or ratios from above 0 to {MAX_GROWTH}, as in 0.25,0.5,1") from None


def finer(kind: str) -> str:
    """What to do where the smallest network of a grid is too large: the end of a sentence."""
    rule, number, _ = _parse(kind)
    if rule.widths is None:
        return (f'. That is the smallest of the bins of flops:{number:g} (in a search of several stages, of the first): a smaller '
                'beta has smaller bins')
    return f'. That is the smallest of the grid {kind}: a finer one, a smaller --width-min or --width-divisor has smaller ones'


def single_widths(kind: str, grid: Grid) -> str:
    """Says which groups have a single width on a grid, in brackets; empty if none has."""
    names = [name for name, widths in grid.items() if len(widths) == 1]
    if not names:
        return ''
    shown = ', '.join(names[:3]) + ', ...' * (len(names) > 3)
    help = '; a smaller beta splits them' if _parse(kind)[0].widths is None else ''
    return f" ({len(names)} {'has' if len(names) == 1 else 'have'} a single width on the grid {kind}: {shown}{help})"


def _step(group: Group, divisor: int) -> int:
    step = math.lcm(group.unit, divisor)
    return group.unit if step > group.size else step


def _fixed(space: WidthSpace, patterns: Sequence[str]) -> set[str]:
    fixed = set()
    for pattern in patterns:
        found = fnmatch.filter(space.searchable, pattern)
        if not found:
            raise UsageError(f"--fix '{pattern}' fits no searchable group of {space.architecture}"
                             f'{nearest(pattern, space.searchable)}')
        fixed.update(found)
    return fixed


def growth(space: WidthSpace, macs: float, fix: Sequence[str] = (), squeezes: Collection[str] = ()) -> float:
    """The one factor of all widths that are searched at which a network has some multiple of the base MACs.

    Section 4.1 of CafeNet searches the 1.0x EfficientNet-B0 in a supernet of 1.5x MACs "from uniform width scaling".

    Args:
        space: The width space of the model.
        macs: The multiple, at least 1.
        fix: As for `make_grid`.
        squeezes: As for `make_grid`.

    Raises:
        UsageError: The multiple is below 1, or more than widths may grow.
    """
    cost, fixed = Macs(space), {*squeezes, *_fixed(space, fix)}
    groups = [g for name, g in space.searchable.items() if name not in fixed]

    def times(factor: float) -> float:
        return cost({g.name: g.unit * max(math.floor(factor * g.steps + 0.5), 1) for g in groups}) / cost()

    if not 1 <= macs <= times(MAX_GROWTH):
        raise UsageError(f'--supernet-macs {macs:g} must be from 1 to {times(MAX_GROWTH):.4g}: widths grow to {MAX_GROWTH} times')
    low, high = 1., float(MAX_GROWTH)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if times(middle) <= macs else (low, middle)
    return low


def squeezes(model: nn.Module, space: WidthSpace) -> set[str]:
    """The searchable groups inside squeeze-excite modules: the widths that the pooled channels are squeezed to."""
    modules = tuple(f'{path}.' for path, m in model.named_modules() if SQUEEZE.search(type(m).__name__))
    return {name for name in space.searchable if name.startswith(modules)}
