"""Width Transfer: widths found on a small network, for a larger one.

"Width Transfer: On the (In)variance of Width Optimization" (anonymous, 2021), section 3.3: E(w) = alpha M_dim(w). What is carried
over are multipliers, found width / width of the same network before it was optimised; M_dim gives them to the blocks that the
larger network has in addition, and alpha scales them all to its cost. Widths are then alpha w_i F_i, with F_i the larger network's
own.

- stack-last: further blocks of a stage get the multipliers of its last block.
- stack-average: the first block of a stage keeps its own; all others get the average of the others. Ours: where the stage has no
  other, they get those of the first block; and a stage with as many blocks as before keeps all of its multipliers.

From one or two blocks in a stage both give the same. Channels that residual additions tie are one group, and have one multiplier.
"""
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Optional, Union

import numpy as np

from .cost import Cost
from .positions import Stages
from .space import MAX_GROWTH, WidthError, WidthSpace
from .tables import Tables

__all__ = ['DEPTHS', 'TOLERANCE', 'Found', 'Matched', 'TransferError', 'cosine', 'cosines', 'extrapolate', 'match', 'multipliers',
           'overhead', 'project', 'saved', 'width_vector']

DEPTHS = ('stack-average', 'stack-last')
TOLERANCE = 0.005  # of the cost that is to be matched
SHOWN = 6  # names in a message
BISECTIONS = 60  # halvings of alpha: below the distance of any two roundings


class TransferError(ValueError):
    """Widths that cannot be carried over."""


@dataclass(frozen=True)
class Found:
    """Widths that were found on a network.

    Attributes:
        space: Its width space.
        widths: Group -> channels; groups left out are at their base.
        base: Group -> channels before it was optimised, of those that a projection has changed.
        left_out: Blocks that the projection has left out.
        skips: Blocks that are left out because the search found so.
    """
    space: WidthSpace
    widths: Mapping[str, int]
    base: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    skips: tuple[str, ...] = ()


def multipliers(found: Found) -> dict[str, float]:
    """Group -> found width over the width before, for all groups."""
    space = found.space
    space.check(found.widths, (*found.left_out, *found.skips))
    space.check(found.base)
    return {g.name: found.widths.get(g.name, g.size) / found.base.get(g.name, g.size) for g in space.groups}


# -- to a smaller network --------------------------------------------------------------------------------------------------


def project(space: WidthSpace, width: float = 1., depth: Optional[str] = None) -> tuple[dict[str, int], tuple[str, ...]]:
    """A narrower and shallower network (section 3.3).

    Args:
        space: The width space of the network.
        width: Factor of all widths (but what the classifier puts out).
        depth: At most so many blocks in a stage ('2'), or this share of them, rounded up ('0.5x'); the last ones go.

    Returns:
        Its widths, of all searchable groups, and the blocks left out.

    Raises:
        TransferError: A block that is to go cannot be left out.
    """
    skips: list[str] = []
    if depth is not None:
        removable = {b.name for b in space.blocks}
        for stage, blocks in Stages(space).blocks.items():
            left = math.ceil(len(blocks) * float(depth[:-1]) - 1e-9) if depth.endswith('x') else int(depth)
            for block in blocks[max(left, 1):]:
                if block not in removable:
                    raise TransferError(f"depth={depth}: {space.architecture} cannot do without '{block}', one of {len(blocks)} "
                                        f"blocks in the stage '{stage}': only residual blocks can be left out")
                skips.append(block)
    gone = tuple(f'{b}.' for b in skips)
    return {n: w for n, w in space.scaled(width).items() if not n.startswith(gone)}, tuple(skips)


def overhead(width: float = 1., depth: float = 1., resolution: float = 1., data: float = 1.) -> Fraction:
    """What a search costs, but for a constant: MACs grow with the width squared, the depth and the resolution squared."""
    width, depth, resolution, data = (Fraction(str(x)) for x in (width, depth, resolution, data))
    return width ** 2 * depth * resolution ** 2 * data


def saved(proxy: Union[int, Fraction], direct: Union[int, Fraction]) -> float:
    """Share of the cost of a direct search that a proxy saves."""
    return float(1 - Fraction(proxy) / Fraction(direct))


# -- to a larger network ---------------------------------------------------------------------------------------------------


def extrapolate(found: Found, space: WidthSpace, depth: str = DEPTHS[0]) -> tuple[dict[str, float], tuple[str, ...]]:
    """M_dim: the multipliers of another network.

    Args:
        found: What was found.
        space: The width space of the other network.
        depth: One of DEPTHS.

    Returns:
        Group -> multiplier, of its searchable groups; and its blocks that are left out: those at the place of one that was found
        to be.

    Raises:
        TransferError: The stages of the networks do not correspond.
    """
    old, new = Stages(found.space, found.left_out), Stages(space)
    of_group = multipliers(found)
    same = _same_stages(old, new, found.space.architecture, space.architecture)
    known: dict[tuple[str, str, str], float] = {}  # (stage, block, place) -> multiplier
    for layer in old.layers.values():
        if not _inside(f'{layer.block}.', found.skips):
            known.setdefault((layer.stage, layer.block, layer.place), of_group[layer.group])
    result, removable, skips = {}, {b.name for b in space.blocks}, []
    for stage, blocks in new.blocks.items():
        for block, theirs in zip(blocks, old.blocks[same[stage]]):
            if theirs in found.skips:
                if block not in removable:
                    raise TransferError(f"'{theirs}' of {found.space.architecture} is left out, and {space.architecture} cannot do "
                                        f"without '{block}'")
                skips.append(block)
    outside = dict(zip(new.outside, new.outside if all(('', '', n) in known for n in new.outside) else old.outside))
    if any(name not in outside or ('', '', outside[name]) not in known for name in new.outside):
        raise TransferError(f'the layers outside of stages do not correspond: {_listed(new.outside)} of {space.architecture}, '
                            f'and {_listed(old.outside)} of {found.space.architecture}')
    for name in space.searchable:
        layer = new.layers[name]
        if not layer.stage:
            result[name] = known['', '', outside[name]]
        elif layer.block not in skips:
            stage = same[layer.stage]
            of_block = {b: w for b in old.blocks[stage] if (w := known.get((stage, b, layer.place))) is not None}
            average = depth == 'stack-average' and len(new.blocks[layer.stage]) != len(old.blocks[stage])
            result[name] = _stacked(of_block, old.blocks[stage], new.blocks[layer.stage].index(layer.block), average)
            if math.isnan(result[name]):
                raise TransferError(f"'{name}' of {space.architecture} corresponds to no layer of {found.space.architecture}")
    return result, tuple(skips)


def _stacked(of_block: Mapping[str, float], blocks: Sequence[str], at: int, average: bool) -> float:
    """A block's multiplier of one of its layers, from those of a stage that may be shorter.

    Args:
        of_block: Block -> multiplier of that layer, of those that have one.
        blocks: All blocks of the stage.
        at: Number of the block, from 0.
        average: Whether blocks behind the first have the average of those behind the first.

    Returns:
        nan if no block has the layer.
    """
    values = list(of_block.values())
    further = [w for b, w in of_block.items() if b != blocks[0]]
    if average and at and further:
        return float(np.mean(further))
    own = of_block.get(blocks[min(at, len(blocks) - 1)])
    return own if own is not None else values[-1 if at else 0] if values else math.nan


def _same_stages(old: Stages, new: Stages, old_name: str, new_name: str) -> dict[str, str]:
    """Stage of the new network -> that of the old one: of the same name, or else of the same number."""
    names = list(old.blocks) if set(old.blocks) != set(new.blocks) else list(new.blocks)
    if len(old.blocks) != len(new.blocks):
        raise TransferError(f'{old_name} has {len(old.blocks)} stages ({_listed(old.blocks)}), {new_name} has '
                            f'{len(new.blocks)} ({_listed(new.blocks)}): they must correspond')
    same = dict(zip(new.blocks, names))
    for stage, other in same.items():
        if new.places[stage] != old.places[other]:
            a, b = _listed(sorted(old.places[other])), _listed(sorted(new.places[stage]))
            raise TransferError(f"the blocks do not correspond: in the stage '{other}', those of {old_name} have the layers {a}; "
                                f'those of {new_name} have {b}')
    return same


def _listed(names: Collection[str]) -> str:
    return ', '.join([*names][:SHOWN]) + (f' and {len(names) - SHOWN} more' if len(names) > SHOWN else '') if names else 'none'


def _inside(path: str, blocks: Collection[str]) -> bool:
    return any(path.startswith(f'{block}.') for block in blocks)


@dataclass(frozen=True)
class Matched:
    """Widths of some cost.

    Attributes:
        widths: Group -> channels, of all searchable groups.
        skips: Blocks left out.
        alpha: The factor of their multipliers.
        cost: What they cost.
        limit: What they were to cost.
    """
    widths: dict[str, int]
    skips: tuple[str, ...]
    alpha: float
    cost: float
    limit: float

    @property
    def away(self) -> float:
        """How far the cost is below the limit, as a share of it."""
        return 1 - self.cost / self.limit


def match(
        cost: Cost,
        limit: float,
        ratios: Mapping[str, float],
        skips: Sequence[str] = (),
        divisor: int = 1,
        fixed: Collection[str] = (),
) -> Matched:
    """Scales multipliers by the largest alpha whose widths cost no more than the limit.

    Where several widths are rounded up at one alpha, as many are as the limit allows.

    Widths are rounded to the nearest multiple of their unit and of the divisor, are at least one such step, and at most MAX_GROWTH
    times the base; of a measured cost, they lie within what was measured.

    Args:
        cost: What is matched.
        limit: What it is to be.
        ratios: Group -> multiplier; groups left out have 1.
        skips: Blocks to leave out.
        divisor: What widths are a multiple of, where they are that wide.
        fixed: Groups that keep their base width.

    Raises:
        TransferError: No alpha meets the limit.
    """
    space = cost.space
    measured = cost.tables.grid if isinstance(cost, Tables) else None

    def widths(alpha: float) -> dict[str, int]:
        found = {}
        for name, group in space.searchable.items():
            if name in fixed or measured is not None and name not in measured:
                continue
            found[name] = space.rounded(group, min(alpha * ratios.get(name, 1.), MAX_GROWTH) * group.size, divisor)
            if measured is not None:
                found[name] = min(max(found[name], measured[name][0]), measured[name][-1])
        return found

    low, high = 0., MAX_GROWTH / min([*ratios.values(), 1.])
    try:
        if cost(widths(low), skips) > limit:
            raise TransferError(f'{space.architecture} cannot cost as little as {cost.show(limit)}: with all widths at their '
                                f'least it costs {cost.show(cost(widths(low), skips))}')
        if cost(widths(high), skips) <= limit:
            low = high
        for _ in range(BISECTIONS if low < high else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(widths(middle), skips) <= limit else (low, middle)
        result = widths(low)
        for name, width in widths(high).items() if low < high else ():  # those whose next rounding is at the same alpha
            if cost({**result, name: width}, skips) <= limit:
                result[name] = width
        base = {name: space[name].size for name in fixed if name in space.searchable}
        return Matched({**base, **result}, tuple(skips), low, cost(result, skips), limit)
    except WidthError as e:
        raise TransferError(f'what {space.architecture} costs is not known at these widths: {e}') from e


# -- how alike widths are --------------------------------------------------------------------------------------------------


def width_vector(space: WidthSpace, ratios: Mapping[str, float]) -> np.ndarray:
    """The paper's w: a multiplier for every layer, so that one that governs several layers counts as often.

    Depthwise convolutions, whose width is that of the layer before, are none, nor are layers whose width cannot change.
    """
    base, found = space.steps({}), []
    for site in space.sites:
        if site.outputs and site.outputs != site.inputs and any(space.groups[g].name in space.searchable for g, _ in site.outputs):
            lengths = np.array([base[g] * r for g, r in site.outputs], dtype=np.float64)
            found.append(lengths @ [ratios.get(space.groups[g].name, 1.) for g, _ in site.outputs] / lengths.sum())
    return np.array(found)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Cosine of the angle between two vectors of multipliers (Table 1, Figure A2)."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def cosines(vectors: Sequence[Sequence[float]]) -> np.ndarray:
    """Those of every two of several vectors."""
    return np.array([[cosine(a, b) for b in vectors] for a in vectors])
