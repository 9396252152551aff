"""Makes a latency model on this machine: writes a bundle, measures it and fits, in stages, until more would not help."""
import copy
import json
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
from .block_bundle import BLOCK_SAMPLES, check_same, export_blocks, write_plan
from .block_fit import LEAST_NETWORKS, fit_blocks
from .bundle import Order, describe_order, export_bundle, make_network, plan_bundle
from .fit import Fit, fit_results, space_of
from .measure import TORCH, check_backend, describe, measure
from .model import predict, validate
from .plan import Parts, make_plan
from .runner.backends import open_backend
from .runner.main import measure_bundle
from .runner.manifest import Manifest, read_manifest
from .runner.results import scan_results
from .runner.timing import BRIEF, Timing
from .sampling import LEAST_SAMPLES, networks_to_time

__all__ = ['Device', 'build_block_model', 'build_latency_model', 'check_begun']

DRAWN = 8000  # networks, of which as many are measured as are asked for: as many as the authors of AOWS measured
FIRST = 400  # networks of the first stage; each stage has twice as many
BETTER = 0.95  # a stage that leaves more of the validation error than this was the last


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
    check_begun(order, device, samples, folder)
    backend: Any = _Torch(device) if device.backend in TORCH else open_backend(
        device.backend, precision=device.precision, threads=device.threads)
    if not (folder / 'manifest.json').is_file():
        write = plan_bundle if device.backend in TORCH else export_bundle
        write(order, folder, partial(networks_to_time, samples=max(samples, DRAWN), seed=order.seed))
    manifest, space = read_manifest(folder), make_network(order).space
    if device.backend in TORCH:
        manifest = _Networks(manifest.folder, manifest.fingerprint, manifest.data, manifest.configurations, space)
    results, best, count = folder / 'results.jsonl', None, min(FIRST, samples)
    while True:
        measure_bundle(manifest, backend, results, backend.brief, count)
        fit = fit_results(manifest, scan_results(results, manifest), space)
        say(f"{count} networks measured: {fit.model.validation}; {fit.model.about['unknowns']} unknowns")
        if best is not None:
            before = validate(predict(best.model.tables, fit.networks), fit.measured).nrmse  # on the same networks
            if fit.model.validation.nrmse > BETTER * before:
                return fit if fit.model.validation.nrmse <= before else best
        if count >= samples:
            return fit
        best, count = fit, min(2 * count, samples)


def build_block_model(
        order: Order,
        device: Device,
        folder: Path,
        samples: int = BLOCK_SAMPLES,
        say: Callable[[str], None] = print,
) -> Fit:
    """Measures each block of a network alone at its widths (see plan.py), and whole networks to see how well that adds up.

    What a killed call had measured is not measured again.

    Args:
        order: The network, its grid, blocks and knots.
        device: What to time by.
        folder: For the bundle and its results; new, or that of an earlier call for the same.
        samples: How many whole networks to measure.
        say: Told how far it is.

    Raises:
        UsageError, CostError: As `plan.make_plan`; or the folder holds something else.
        RunnerError: The backend is not there, or cannot run the blocks.
    """
    if samples < LEAST_NETWORKS:
        raise UsageError(f'--samples must be at least {LEAST_NETWORKS} whole networks to validate on, not {samples}')
    ours = device.backend in TORCH
    check_backend(device.backend, device.precision, device.device or 'cpu')
    backend: Any = _Torch(device) if ours else open_backend(device.backend, precision=device.precision, threads=device.threads)
    begun = (folder / 'manifest.json').is_file()
    if not begun and not ours:
        say(export_blocks(order, folder, samples, say=say).splitlines()[0])
    plan = make_plan(order, samples, not ours) if begun or ours else None
    if begun:
        check_same(read_manifest(folder), plan, ours)
    elif ours:
        write_plan(plan, folder)
    manifest = read_manifest(folder)
    space = plan.network.space if plan else space_of(manifest)
    if ours:
        manifest = Parts(manifest.folder, manifest.fingerprint, manifest.data, manifest.configurations, plan)
    results = folder / 'results.jsonl'
    say(measure_bundle(manifest, backend, results, backend.brief))
    return fit_blocks(manifest, scan_results(results, manifest), space)


def check_begun(order: Order, device: Device, samples: int, folder: Path) -> None:
    """Checks that networks can be measured, and that those in the folder, if there are any, are the ones that are asked for.

    Args:
        order: The network and its grid.
        device: What to time by.
        samples: Most networks to measure.
        folder: Where the bundle and its results are, or will be.

    Raises:
        UsageError: Something given makes no sense, or the folder holds something else.
        RunnerError: The backend is not there, or what the folder holds is broken.
    """
    if samples < LEAST_SAMPLES:
        raise UsageError(f'{samples} networks are too few to fit to and to validate on: measure at least {LEAST_SAMPLES}')
    check_backend(device.backend, device.precision, device.device or 'cpu')
    if not (folder / 'manifest.json').is_file():
        return
    manifest, results = read_manifest(folder), folder / 'results.jsonl'
    _check_same(manifest, order, samples)
    if (device.backend in TORCH) == bool(manifest.data['files']):
        raise UsageError(f"'{folder}' was not written for {device.backend}: remove that folder, or keep to what it was written for")
    if results.is_file() and results.stat().st_size:
        begun, now = scan_results(results, manifest).header['backend'], describe(
            device.backend, device.precision, device.device or 'cpu', device.threads)
        for name in ('backend', 'precision', 'threads', 'device'):
            if begun.get(name) != now.get(name):
                raise UsageError(f"'{folder}' holds networks measured with {name} {begun.get(name)}, and not {now.get(name)}: "
                                 'remove that folder, or keep to what was measured')


def _check_same(manifest: Manifest, order: Order, samples: int) -> None:
    """Refuses a bundle that was written for something else."""
    network = make_network(order)
    wanted = json.loads(json.dumps(describe_order(order, network)))
    have = {name: manifest.data.get(name) for name in wanted}
    if len(manifest.configurations) < samples:
        wanted['samples'], have['samples'] = samples, len(manifest.configurations)
    for name, value in wanted.items():
        if have[name] != value:
            raise UsageError(f"'{manifest.folder}' holds networks of another {name} ({_short(have[name])}, not {_short(value)}): "
                             'remove that folder, or keep to what was measured')


def _short(value: Any) -> str:
    return str(value) if len(str(value)) < 60 else f'{str(value)[:60]}...'


class _Torch:
    """PyTorch in the place of a backend of the runner: it times modules, not files."""
    brief = BRIEF

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
