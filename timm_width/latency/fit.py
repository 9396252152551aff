"""From the timings of a bundle to a latency model."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Optional

import numpy as np
import torch
from scipy.ndimage import median_filter

from .. import __version__
from ..data import UsageError
from ..engine import create
from ..space import WidthSpace
from ..trace import trace
from ..twins import is_twin, trace_twin
from .model import PRIOR, SMOOTHNESS, SUFFIX, LatencyModel, fit_unknowns, predict, space_fingerprint, validate
from .runner.manifest import Manifest
from .runner.results import Results
from .sampling import LEAST_VALID
from .terms import Unknowns

__all__ = ['STATISTICS', 'Fit', 'check_statistic', 'fit_results', 'milliseconds', 'plot', 'space_of', 'speed_of']

STATISTICS = ('median', 'minimum', 'p20')  # of a network's samples
NEIGHBOURS = 5  # measurements of the first network, whose median counts
DRIFT = 0.03  # of the machine's speed, that is worth a word
LEAST = 10  # networks to fit to
NOT_ITS_OWN = {'pretrained', 'checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay', 'name', 'num_classes', 'inputs'}


Speed = Callable[[Mapping[str, Any]], float]


@dataclass(frozen=True)
class Fit:
    """A latency model, and what it was found from.

    Attributes:
        model: It.
        networks: Widths of the held-out networks.
        measured: Their milliseconds per image.
        predicted: What the model says of them.
        notes: What a user should know of the timings, a line each.
    """
    model: LatencyModel
    networks: Sequence[Mapping[str, int]]
    measured: np.ndarray
    predicted: np.ndarray
    notes: Sequence[str]


def space_of(manifest: Manifest) -> WidthSpace:
    """The width space of the network of a bundle, built anew.

    Raises:
        UsageError: It cannot be built, or is another one than when the bundle was made; or the bundle wants files to be fetched or
            loaded for it, which one that comes from elsewhere must not.
    """
    data = manifest.data
    wrong = [data['model'][:80]] if data['model'].partition(':')[0].lower() in ('hf-hub', 'hf_hub') else []
    if wrong := wrong + [key for key in data['model_args'] if key in NOT_ITS_OWN]:
        raise UsageError(f"'{manifest.folder}' asks for {', '.join(wrong)}: nothing is fetched or loaded for a bundle")
    if is_twin(data['model']):
        with torch.device('meta'):
            space = trace_twin(create(data['model'], data['num_classes'], **data['model_args']), data['input_size'])
    else:
        space = trace(create(data['model'], data['num_classes'], **data['model_args']), data['input_size'])
    if space.fingerprint != data['space']:
        versions = ', '.join(f'{name} {version}' for name, version in data.get('versions', {}).items())
        raise UsageError(f"'{manifest.folder}' was made of a {data['architecture']} that is built otherwise now (it was made with "
                         f'{versions or "other versions"}): export and measure again')
    return space


def check_statistic(statistic: str) -> None:
    """Raises UsageError for what is not in STATISTICS."""
    if statistic not in STATISTICS:
        raise UsageError(f"--statistic must be one of {', '.join(STATISTICS)}, not '{statistic}'")


def fit_results(
        manifest: Manifest,
        results: Results,
        space: WidthSpace,
        statistic: str = 'median',
        smoothness: float = SMOOTHNESS,
        prior: float = PRIOR,
        steady: bool = True,
) -> Fit:
    """Fits a latency model to the networks measured to train, and validates it on those held out.

    Timings that other load disturbed are left out, where enough are left. As a machine's speed drifts (clocks, heat, neighbours),
    all are brought to one speed by the first network, which is timed again and again.

    Args:
        manifest: The bundle.
        results: Its timings.
        space: Its width space.
        statistic: Which of a network's samples counts: their 'median', 'minimum' or 20th percentile, 'p20'.
        smoothness: K of `fit_unknowns`.
        prior: P of `fit_unknowns`.
        steady: Whether to bring timings to one speed.

    Raises:
        UsageError: Too few networks were measured.
    """
    check_statistic(statistic)
    for flag, value in ('--smoothness', smoothness), ('--prior', prior):
        if not 0 <= value < float('inf'):
            raise UsageError(f'{flag} must be at least 0, not {value:g}')
    train, valid, notes = _split(results.rows)
    speed = speed_of(results, statistic) if steady else None
    if speed is not None and (drift := np.ptp([speed(row) for row in results.rows])) > DRIFT:
        notes.append(f'the machine drifted by {drift:.0%} while it measured; timings are brought to its usual speed')
    for rows, least, what in (train, LEAST, 'to fit to'), (valid, LEAST_VALID, 'to validate on'):
        if len(rows) < least:
            raise UsageError(f'{len(rows)} networks were measured {what}, and at least {least} are needed: measure more')
    unknowns = Unknowns(space, {name: tuple(widths) for name, widths in manifest.data['grid'].items()})
    start = perf_counter()
    widths = [manifest.configurations[row['index']].widths for row in train]
    ms = [milliseconds(row, statistic, speed) for row in train]
    tables = unknowns.factors(fit_unknowns(unknowns, widths, ms, smoothness, prior))
    seconds = perf_counter() - start
    if unseen := int((unknowns.rows(widths).sum(0).A1 == 0).sum()):
        notes.append(f'{unseen} of {unknowns.count} unknowns occur in no network measured so far: they follow from the others')
    measured = np.array([milliseconds(row, statistic, speed) for row in valid])
    held = [manifest.configurations[row['index']].widths for row in valid]
    predicted = predict(tables, held)
    validation = validate(predicted, measured)
    about = {
        'kind': 'pairwise', 'networks': len(train), 'unknowns': unknowns.count, 'statistic': statistic, 'smoothness': smoothness,
        'prior': prior, 'steady': speed is not None, 'seconds': round(seconds, 3),
        'spread': median(row['spread'] for row in train), 'notes': notes,
        'loop': results.header['loop'], 'host': results.header['host'],
        'versions': {**manifest.data.get('versions', {}), 'timm_width': __version__}}
    model = LatencyModel(
        space.architecture.removesuffix(SUFFIX), tuple(space.input_size), space_fingerprint(space), manifest.batch,
        results.header['precision'], results.header['backend'], tables, validation, about)
    return Fit(model, held, measured, predicted, notes)


def _split(rows: Sequence[Mapping[str, Any]]) -> tuple[list, list, list[str]]:
    """Rows to fit to, rows to validate on, and what to say of them."""
    found, disturbed, left_out = {}, 0, 0
    for use, least in ('train', LEAST), ('valid', LEAST_VALID):
        every = [row for row in rows if row['use'] == use]
        calm = [row for row in every if not row['disturbed']]
        found[use] = calm if len(calm) >= max(least, len(every) / 2) else every
        disturbed += len(every) - len(calm)
        left_out += len(every) - len(found[use])
    notes = [f'{disturbed} of {len(rows)} timings were disturbed by other load; {left_out} of them are left out'
             + (', the others used, being so many: measure again on a calmer machine' if left_out < disturbed else '')]
    return found['train'], found['valid'], notes if disturbed else []


def milliseconds(row: Mapping[str, Any], statistic: str, speed: Optional[Speed] = None) -> float:
    """Milliseconds per image, at a speed of 1."""
    ms = row['batch_ms'] if statistic == 'median' else row['minimum'] if statistic == 'minimum' else row['percentiles']['20']
    return ms / row['batch'] / (1 if speed is None else speed(row))


def speed_of(results: Results, statistic: str) -> Optional[Speed]:
    """How long the machine took when a row was measured, as a multiple of what it usually took.

    By the first configuration: medians of neighbouring measurements of it, as these have noise of their own, and between them
    straight lines. None, if there are too few.
    """
    found = sorted((*(row for row in results.rows if row['index'] == 0), *results.references), key=lambda row: row['position'])
    if len(found) < NEIGHBOURS:
        return None
    at = [row['position'] for row in found]
    ms = median_filter(np.array([milliseconds(row, statistic) for row in found]), NEIGHBOURS, mode='nearest')
    return lambda row: float(np.interp(row['position'], at, ms / np.median(ms)))


def plot(fit: Fit, path: Path) -> None:
    """Draws the held-out networks, measured against predicted.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("a plot needs matplotlib: pip install 'timm-width[plot]'") from None
    figure = Figure(figsize=(5, 5), layout='constrained')
    axes = figure.add_subplot()
    ends = [min(fit.measured.min(), fit.predicted.min()), max(fit.measured.max(), fit.predicted.max())]
    axes.plot(ends, ends, color='0.7', linewidth=1)
    axes.scatter(fit.predicted, fit.measured, s=10)
    axes.set(xlabel='predicted ms per image', ylabel='measured ms per image',
             title=f'{fit.model.architecture}, {fit.model.backend.get("backend", "")}, batch {fit.model.batch}, '
                   f'{fit.model.precision}\nNRMSE {100 * fit.model.validation.nrmse:.2f} % on {len(fit.measured)} held out')
    figure.savefig(path, dpi=150)
