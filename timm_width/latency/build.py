"""Makes a latency model on this machine: writes a bundle, measures it and fits, in stages, until more would not help."""
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Optional

from torch import nn

from ..data import UsageError
from ..engine import create
from ..resize import resize
from ..space import WidthSpace
from .bundle import Order, export_bundle
from .fit import Fit, fit_results, space_of
from .measure import TORCH, describe, measure
from .model import predict, validate
from .runner.backends import open_backend
from .runner.main import measure_bundle
from .runner.manifest import Manifest, read_manifest
from .runner.results import scan_results
from .runner.timing import Timing
from .sampling import networks_to_time

__all__ = ['Device', 'build_latency_model']

FIRST = 400  # networks of the first stage; each stage has twice as many
BETTER = 0.95  # a stage that leaves more of the validation error than this was the last
SECONDS = 0.01  # of a sample: thousands of networks are measured


@dataclass(frozen=True)
class Device:
    """What networks are timed by.

    Attributes:
        backend: A name of `measure.BACKEND_NAMES`.
        precision: 'fp32' or 'fp16'.
        threads: Of the CPU.
        device: Of torch: 'cpu', 'cuda'.
    """
    backend: str
    precision: str = 'fp32'
    threads: Optional[int] = None
    device: Optional[str] = None


def build_latency_model(
        order: Order,
        device: Device,
        samples: int,
        folder: Path,
        say: Callable[[str], None] = print,
) -> Fit:
    """Measures networks of a grid and fits a latency model to them. What a killed call had measured is not measured again.

    Args:
        order: The network and its grid.
        device: What to time by.
        samples: Most networks to measure. Fewer are, if the error on those held out stops falling before.
        folder: For the bundle and its results; new, or that of an earlier call for the same.
        say: Told a line after each stage.

    Raises:
        UsageError: Something given makes no sense, or the folder holds something else.
        RunnerError: The backend is not there, or cannot run the networks.
    """
    if samples < 1:
        raise UsageError(f'--latency-samples must be at least 1, not {samples}')
    backend: Any = _Torch(device) if device.backend in TORCH else open_backend(
        device.backend, precision=device.precision, threads=device.threads)
    if not (folder / 'manifest.json').is_file():
        export_bundle(order, folder, partial(networks_to_time, samples=samples, seed=order.seed))
    manifest = read_manifest(folder)
    _check_same(manifest, order, samples)
    space = space_of(manifest)
    if device.backend in TORCH:
        manifest = _Networks(manifest.folder, manifest.fingerprint, manifest.data, manifest.configurations, space)
    results, best, count = folder / 'results.jsonl', None, min(FIRST, samples)
    while True:
        measure_bundle(manifest, backend, results, {} if device.backend == 'trtexec' else {'seconds': SECONDS}, count)
        fit = fit_results(manifest, scan_results(results, manifest), space)
        say(f"{count} networks measured: {fit.model.validation}; {fit.model.about['unknowns']} unknowns")
        if best is not None:
            before = validate(predict(best.model.tables, fit.networks), fit.measured).nrmse  # on the same networks
            if fit.model.validation.nrmse > BETTER * before:
                return fit if fit.model.validation.nrmse <= before else best
        if count >= samples:
            return fit
        best, count = fit, min(2 * count, samples)


def _check_same(manifest: Manifest, order: Order, samples: int) -> None:
    """Refuses a bundle that was written for something else."""
    wanted = {'model': order.model, 'batch': order.batch, 'precision': order.precision, 'seed': order.seed}
    for name, value in wanted.items():
        if manifest.data.get(name) != value:
            raise UsageError(f"'{manifest.folder}' holds a bundle with {name} {manifest.data.get(name)!r}, not {value!r}: "
                             'give another folder')
    if len(manifest.configurations) != samples:
        raise UsageError(f"'{manifest.folder}' holds a bundle of {len(manifest.configurations)} networks, not {samples}: "
                         'give another folder')


class _Torch:
    """PyTorch in the place of a backend of the runner: it times modules, not files."""

    def __init__(self, device: Device):
        self.device, self.precision = device, device.precision

    def describe(self) -> dict[str, Any]:
        d = self.device
        return describe(d.backend, d.precision, d.device or 'cpu', d.threads)

    def measure(self, model: tuple[nn.Module, tuple[int, ...]], batch: int, **loop: Any) -> Timing:
        d = self.device
        return measure(*model, d.backend, d.precision, batch, d.device, threads=d.threads, **loop).timing


@dataclass(frozen=True)
class _Networks(Manifest):
    """A bundle whose networks are torch modules."""
    space: WidthSpace

    def network(self, index: int) -> tuple[nn.Module, tuple[int, ...]]:
        model = resize(copy.deepcopy(self._model), self.space, self.configurations[index].widths)
        return model, tuple(self.data['input_size'])

    @cached_property
    def _model(self) -> nn.Module:
        return create(self.data['model'], self.data['num_classes'], **self.data['model_args'])
