"""From the timings of blocks to a latency model: nothing is fitted, but tables are put together, and tried on whole networks."""
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Optional

import numpy as np

from .. import __version__
from ..data import UsageError
from ..factors import Factors
from ..space import WidthSpace
from ..tables import Tables
from .block_bundle import BlockTable, read_blocks
from .blocks import add_up
from .fit import DRIFT, Fit, check_statistic, milliseconds, speed_of
from .model import SUFFIX, UNIT, LatencyModel, space_fingerprint, validate
from .runner.manifest import Manifest
from .runner.results import Results

__all__ = ['LEAST_NETWORKS', 'fit_blocks']

LEAST_NETWORKS = 2  # whole networks to validate on


def fit_blocks(manifest: Manifest, results: Results, space: WidthSpace, statistic: str = 'median', steady: bool = True) -> Fit:
    """Puts the tables of blocks together.

    Widths that were not measured lie on straight lines between those that were. What the whole first network takes beyond its
    blocks is the constant.

    Args:
        manifest: The bundle.
        results: Its timings.
        space: Its width space.
        statistic: As in `fit.fit_results`.
        steady: As in `fit.fit_results`.

    Raises:
        UsageError: The smallest or the largest widths of a block were not measured, or too few whole networks.
    """
    check_statistic(statistic)
    grid, blocks, held, (first, *networks) = read_blocks(manifest, space)
    speed, notes = speed_of(results, statistic) if steady else None, []
    if speed is not None and (drift := np.ptp([speed(row) for row in results.rows])) > DRIFT:
        notes.append(f'the machine drifted by {drift:.0%} while it measured; timings are brought to its usual speed')
    if count := sum(row['disturbed'] for row in results.rows):
        notes.append(f'{count} of {len(results.rows)} timings were disturbed by other load')
    ms = {row['index']: milliseconds(row, statistic, speed) for row in results.rows}
    wanted = {int(i) for table in blocks.values() for i in table.configurations.flat}
    if missing := len(wanted - set(ms)):
        notes.append(f'{missing} of {len(wanted)} widths of blocks were not measured: they lie on lines between the others')
    levels = _levels(blocks, ms)
    kept = {g: levels.get(g, grid[g]) for g in grid}
    tables = {name: (t.groups, _values(t, kept, ms)) for name, t in blocks.items()}
    if first.configuration not in ms:
        raise UsageError('the first network was not measured, from which the time outside of the blocks follows: measure again')
    total, parts = add_up(kept, tables, 0.)
    rest = ms[first.configuration] - Tables(space, UNIT, total, parts)(first.widths, first.skips)
    total = Factors(total.grid, total.constant + rest, total.unary, total.pairwise)
    if rest < 0:
        notes.append(f'measured alone, the blocks of the first network take {-rest:.4g} ms more than the whole: that is taken off')
    cost = Tables(space, UNIT, total, parts)
    tried = [n for n in networks if n.configuration in ms]
    if len(tried) < LEAST_NETWORKS:
        raise UsageError(f'{len(tried)} whole networks were measured, and at least {LEAST_NETWORKS} are needed to validate on: '
                         'measure more')
    measured = np.array([ms[n.configuration] for n in tried])
    predicted = np.array([cost(n.widths, n.skips) for n in tried])
    between, errors = [h for h in held if h.configuration in ms], {}
    if between:
        error = np.array([cost.of(h.block, h.widths) / ms[h.configuration] - 1 for h in between])
        errors = {'entries': len(error), 'mean': float(np.abs(error).mean()), 'worst': float(np.abs(error).max())}
        notes.append(f"between the widths measured, {errors['entries']} others of blocks are predicted within {errors['mean']:.1%} "
                     f"on average, {errors['worst']:.1%} at worst (noise of the timings included)")
    cells = sum(t[1].size for t in tables.values())
    about = {'kind': 'blocks', 'blocks': list(blocks), 'networks': len(wanted & set(ms)), 'unknowns': cells, 'statistic': statistic,
             'steady': speed is not None, 'interpolation': errors, 'notes': notes, 'loop': results.header['loop'],
             'host': results.header['host'], 'versions': {**manifest.data.get('versions', {}), 'timm_width': __version__}}
    model = LatencyModel(
        space.architecture.removesuffix(SUFFIX), tuple(space.input_size), space_fingerprint(space), manifest.batch,
        results.header['precision'], results.header['backend'], total, validate(predicted, measured), about, parts)
    return Fit(model, [n.widths for n in tried], measured, predicted, notes)


def _levels(blocks: Mapping[str, BlockTable], ms: Mapping[int, float]) -> dict[str, tuple[int, ...]]:
    """The widths of each group at which all blocks that it is in were measured.

    Raises:
        UsageError: Those at an end of the grid were not.
    """
    found: dict[str, set[int]] = {}
    for name, table in blocks.items():
        done = {point for point, i in zip(product(*table.levels), table.configurations.flat) if int(i) in ms}
        levels = [list(step) for step in table.levels]
        while missing := [point for point in product(*levels) if point not in done]:
            inside = Counter((d, w) for point in missing for d, w in enumerate(point) if w not in (levels[d][0], levels[d][-1]))
            if not inside:
                raise UsageError(f"the block '{name}' was not measured at its smallest and largest widths: measure more")
            (d, width), _ = inside.most_common(1)[0]
            levels[d].remove(width)
        for group, step in zip(table.groups, levels):
            found[group] = found.get(group, set(step)) & set(step)
    return {group: tuple(sorted(widths)) for group, widths in found.items()}


def _values(table: BlockTable, kept: Mapping[str, Sequence[int]], ms: Mapping[int, float]) -> np.ndarray:
    """Milliseconds of a block at the widths that are kept."""
    places: list[Optional[list[int]]] = [[step.index(w) for w in kept[g]] for g, step in zip(table.groups, table.levels)]
    at = table.configurations[np.ix_(*places)] if places else table.configurations
    return np.vectorize(lambda i: ms[int(i)], otypes=[float])(at)
