"""Latency models: fitted to timings of whole networks, checked on held-out ones, kept in a JSON file.

The fit is the least-squares problem of AOWS (section 4): with M the counts of the unknowns x in the networks that
were timed, y their milliseconds per image, and D the neighbouring unknowns (see `terms.Unknowns`),

    minimise |M x - y|^2 + K |t|^2   subject to x >= 0, t >= 0, D x <= t

where t = max(D x, 0) at the optimum: a smooth function of x >= 0 alone, which is what scipy is given. Ours is a further term,
P |x - x0|^2, with x0 the best non-negative fit that is bilinear in the widths of each kind of layer: on timings with 1 to 3 % of
noise it reaches with 2,500 networks the error that the published problem (P = 0) has with 8,000.
"""
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
from scipy import optimize, sparse

from ..factors import Factors, Grid
from ..space import WidthSpace, nearest
from ..tables import Tables
from .runner.base import PRECISIONS
from .runner.manifest import load_json
from .terms import Unknowns

__all__ = ['LatencyError', 'LatencyModel', 'Validation', 'fit_unknowns', 'predict', 'space_fingerprint', 'validate']

FORMAT = 1
SMOOTHNESS = 100.  # K of the authors
PRIOR = 10.  # P
UNIT = 'ms per image'
SUFFIX = '_width'
MAX_BYTES = 1 << 28  # of a file
MAX_WIDTHS = 10_000  # of a group
MAX_OWN = 2  # groups of a block
TOLERABLE = 0.1  # NRMSE; a fit on a calm machine has half of it or less


class LatencyError(ValueError):
    """A latency model that cannot be read, or that is not for the network at hand."""


# -- fitting -----------------------------------------------------------------------------------------------------------------


def fit_unknowns(
        unknowns: Unknowns,
        networks: Sequence[Mapping[str, int]],
        ms: Sequence[float],
        smoothness: float = SMOOTHNESS,
        prior: float = PRIOR,
) -> np.ndarray:
    """Solves the least-squares problem above, with the milliseconds as multiples of their mean.

    Args:
        unknowns: What is to be found.
        networks: Widths of the networks that were timed.
        ms: Their milliseconds per image.
        smoothness: K.
        prior: P.

    Returns:
        A value for each unknown, at least 0.
    """
    matrix, scale = unknowns.rows(networks), float(np.mean(ms))
    y, features = np.asarray(ms) / scale, unknowns.features()
    x0 = features @ optimize.nnls((matrix @ features).toarray(), y)[0]
    return scale * _minimise(matrix, y, unknowns.steps, smoothness, prior, x0)


def _minimise(
        matrix: sparse.csr_matrix,
        y: np.ndarray,
        steps: sparse.csr_matrix,
        smoothness: float,
        prior: float,
        x0: np.ndarray,
) -> np.ndarray:
    transposed, back = matrix.T.tocsr(), steps.T.tocsr()

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        residual, broken, away = matrix @ x - y, np.maximum(steps @ x, 0), x - x0
        return (residual @ residual + smoothness * (broken @ broken) + prior * (away @ away),
                2 * (transposed @ residual + smoothness * (back @ broken) + prior * away))

    options = {'maxiter': 20_000, 'maxfun': 25_000, 'maxcor': 30, 'ftol': 1e-12, 'gtol': 1e-9}
    return optimize.minimize(objective, x0, jac=True, method='L-BFGS-B', bounds=[(0, None)] * len(x0), options=options).x


@dataclass(frozen=True)
class Validation:
    """How well a model predicts networks that it was not fitted to.

    Attributes:
        networks: How many.
        nrmse: Root of the mean squared error, over the mean of what was measured.
        worst: Largest error of one network, over what was measured of it.
        rank_correlation: Spearman's, of predicted and measured.
    """
    networks: int
    nrmse: float
    worst: float
    rank_correlation: float

    @property
    def warning(self) -> str:
        """What to say of a model that predicts badly; empty for a good one."""
        if self.nrmse <= TOLERABLE:
            return ''
        return f'predicts badly (NRMSE {100 * self.nrmse:.0f} %): do not rely on it, but measure more, on a calmer machine'

    def __str__(self) -> str:
        return (f'on {self.networks} held-out networks NRMSE {100 * self.nrmse:.2f} %, worst error {100 * self.worst:.1f} %, '
                f'rank correlation {self.rank_correlation:.3f}')


def predict(tables: Factors, networks: Sequence[Mapping[str, int]]) -> np.ndarray:
    """Milliseconds per image of networks on the grid."""
    return np.array([tables(widths) for widths in networks], dtype=float)


def validate(predicted: Sequence[float], measured: Sequence[float]) -> Validation:
    """Compares predictions with measurements of the same networks, two or more."""
    from scipy.stats import spearmanr  # takes a second to import, which every command would wait for

    p, m = np.asarray(predicted, dtype=float), np.asarray(measured, dtype=float)
    error = p - m
    constant = np.ptp(p) == 0 or np.ptp(m) == 0  # no ranks
    return Validation(len(m), float(np.sqrt(np.mean(error ** 2)) / m.mean()), float(np.max(np.abs(error) / m)),
                      0. if constant else float(spearmanr(p, m).statistic))


# -- the file ----------------------------------------------------------------------------------------------------------------


def space_fingerprint(space: WidthSpace) -> str:
    """That of a space, whatever of `NAME` and `NAME_width` its model is called."""
    return dataclasses.replace(space, architecture=space.architecture.removesuffix(SUFFIX)).fingerprint


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds per image as a function of widths, for one model, image size, batch and device.

    Attributes:
        architecture: Name of the timm model.
        input_size: (channels, height, width) of its images.
        space: Fingerprint of its width space.
        batch: Images per run.
        precision: That of the network: fp32, fp16 or int8.
        backend: What ran it, and where: names, versions, device.
        tables: Tables over the grid of what was measured.
        validation: How well it predicts.
        about: How it was made; nothing reads it.
        blocks: Module -> its part of the sum, where blocks were measured alone: these can be left out.
    """
    architecture: str
    input_size: tuple[int, ...]
    space: str
    batch: int
    precision: str
    backend: Mapping[str, Any]
    tables: Factors
    validation: Validation
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    blocks: Mapping[str, Factors] = dataclasses.field(default_factory=dict)

    def cost(self, space: WidthSpace) -> Tables:
        """The latency of the networks of a space.

        Raises:
            LatencyError: It is not the space that was measured.
        """
        name = space.architecture.removesuffix(SUFFIX)
        if name != self.architecture:
            raise LatencyError(f'the latency model is one of {self.architecture}, not of {name}')
        if tuple(space.input_size) != self.input_size:
            shown = ['x'.join(map(str, size)) for size in (self.input_size, space.input_size)]
            raise LatencyError(f'the latency model of {name} is for images of {shown[0]}, not of {shown[1]}')
        unknown = [group for group in self.tables.grid if group not in space]
        if unknown:
            raise LatencyError(f"the latency model has a group '{unknown[0]}', which {name} does not have"
                               f'{nearest(unknown[0], space.searchable)}')
        if space_fingerprint(space) != self.space:
            raise LatencyError(f'the latency model is for a {name} that is built otherwise (another number of classes, say, or '
                               'another version of timm): export, measure and fit again')
        return Tables(space, UNIT, self.tables, self.blocks)

    def save(self, path: Union[str, Path]) -> None:
        """Writes the file, beside and then over what is there."""
        path = Path(path)
        beside = path.with_name(f'.{path.name}.saving')
        beside.write_text(json.dumps(self.to_json(), indent=1))
        os.replace(beside, path)

    def to_json(self) -> dict[str, Any]:
        """What the file says."""
        found = {
            'timm_width_latency_model': FORMAT, 'unit': UNIT, 'architecture': self.architecture,
            'input_size': list(self.input_size), 'space': self.space, 'batch': self.batch, 'precision': self.precision,
            'backend': dict(self.backend),
            'validation': dataclasses.asdict(self.validation), 'about': dict(self.about),
            'grid': {name: list(widths) for name, widths in self.tables.grid.items()}, **_written(self.tables)}
        return {**found, 'blocks': {name: _written(part) for name, part in self.blocks.items()}} if self.blocks else found

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'LatencyModel':
        """Reads a file that `save` has written.

        Raises:
            LatencyError: There is none, or it is not one.
        """
        try:
            if Path(path).stat().st_size > MAX_BYTES:
                raise LatencyError(f"'{path}' is no latency model: it has more than {MAX_BYTES >> 20} MB")
            found = load_json(Path(path).read_bytes(), 'it')
        except FileNotFoundError:
            raise LatencyError(f"latency model '{path}': there is no such file; timm-width latency fit makes one") from None
        except (OSError, ValueError) as e:
            raise LatencyError(f"'{path}' is no latency model: {str(e).splitlines()[0]}") from None
        try:
            return cls._from_json(found)
        except LatencyError as e:
            raise LatencyError(f"'{path}': {e}") from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise LatencyError(f"'{path}' is no latency model, or a broken one ({type(e).__name__}: {e}); timm-width latency fit "
                               'makes them') from None

    @classmethod
    def _from_json(cls, found: Mapping[str, Any]) -> 'LatencyModel':
        if found['timm_width_latency_model'] != FORMAT:
            raise LatencyError(f"format {found['timm_width_latency_model']!r} is not the one that is known, {FORMAT}")
        grid: Grid = {}
        for name, widths in found['grid'].items():
            if not 0 < len(widths) <= MAX_WIDTHS or not all(isinstance(w, int) for w in widths) or list(
                    widths) != sorted(set(widths)) or widths[0] < 1:
                raise ValueError(f"the grid of '{name}' is not of ascending widths")
            grid[name] = tuple(widths)
        tables, blocks = _factors(found, grid), {}
        for name, part in found.get('blocks', {}).items():
            own = {*part['unary'], *(g for a, b, _ in part['pairwise'] for g in (a, b))}
            if set(part) != {'constant', 'unary', 'pairwise'} or not own <= set(grid) or len(own) > MAX_OWN:
                raise ValueError(f"the tables of the block '{name[:80]}'")
            blocks[name] = _factors(part, {g: widths for g, widths in grid.items() if g in own})
        batch = found['batch']
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f'batch {batch!r}')
        if found['precision'] not in PRECISIONS:
            raise ValueError(f"precision {found['precision']!r}")
        threads = found['backend'].get('threads')
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ValueError(f'threads {threads!r}')
        size = tuple(int(n) for n in found['input_size'])
        validation = Validation(**found['validation'])
        _numbers(list(dataclasses.astuple(validation)))
        return cls(str(found['architecture']), size, str(found['space']), batch, str(found['precision']), dict(found['backend']),
                   tables, validation, dict(found['about']), blocks)

    def __str__(self) -> str:
        where = ', '.join(str(self.backend[k]) for k in ('backend', 'device') if self.backend.get(k))
        return (f"{self.architecture} at {'x'.join(map(str, self.input_size))}, batch {self.batch}, {self.precision} ({where}): "
                f'{self.validation}')


def _written(tables: Factors) -> dict[str, Any]:
    return {'constant': float(tables.constant), 'unary': {name: _rounded(table) for name, table in tables.unary.items()},
            'pairwise': [[*pair, _rounded(table)] for pair, table in tables.pairwise.items()]}


def _factors(found: Mapping[str, Any], grid: Grid) -> Factors:
    """What `_written` wrote, over a grid."""
    pairwise = {(a, b): _numbers(t) for a, b, t in found['pairwise']}
    if len(pairwise) < len(found['pairwise']):
        raise ValueError('two tables for the same groups')
    unary = {name: _numbers(t) for name, t in found['unary'].items()}
    return Factors(grid, _numbers(found['constant']).item(), unary, pairwise)


def _rounded(table: np.ndarray) -> list:
    """Numbers of nine digits, far below what a measurement says."""
    return np.vectorize(lambda v: float(f'{v:.9g}'), otypes=[float])(table).tolist()


def _numbers(values: Any) -> np.ndarray:
    """Finite numbers.

    Raises:
        ValueError: They are not.
    """
    table = np.array(values)
    if table.dtype.kind not in 'if':
        raise ValueError('a table with values that are no numbers')
    table = table.astype(np.float64)
    if not np.isfinite(table).all():
        raise ValueError('a table with values that are not finite')
    return table
