"""What a search times networks by: this machine, or the latency model of another."""
from argparse import Namespace, _ArgumentGroup
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Optional

from torch import nn

from .data import UsageError
from .engine import model_arguments, say
from .factors import Grid
from .latency.build import Device, build_latency_model, check_begun
from .latency.bundle import Order, check_packages
from .latency.measure import BACKEND_NAMES, TORCH, Measurement, check_backend, describe, measure_many, usual_batch
from .latency.model import LatencyModel
from .latency.runner.errors import RunnerError
from .space import WidthSpace
from .tables import Tables

__all__ = [
    'MEASURE', 'Target', 'add_target_arguments', 'block_command', 'build_target', 'check_kept', 'check_measurable', 'find_target',
    'keep_model', 'needs_measuring',
]

MEASURE = 'measure'
FILE = 'latency.json'  # in --output
CANNOT = 'this machine cannot run'


def add_target_arguments(group: _ArgumentGroup) -> None:
    """Adds the flags of a search that concern latency."""
    add = group.add_argument
    add('--latency-model', metavar='FILE', help='what latency= budgets are counted by: a file of `timm-width latency fit`, or '
        f"'{MEASURE}': make one first, on this machine")
    add('--latency-backend', choices=BACKEND_NAMES, metavar='NAME',
        help=f"what networks are timed by: {', '.join(BACKEND_NAMES)} (default: the latency model's, or torch)")
    add('--latency-precision', choices=('fp32', 'fp16'), metavar='NAME', help='fp32 or fp16 (default: as --latency-batch, or fp32)')
    add('--latency-batch', type=int, metavar='N',
        help="images per call (default: the latency model's, or 1 on a CPU and 16 on a GPU)")
    add('--latency-threads', type=int, metavar='N', help="threads of a CPU (default: the latency model's, or all)")
    add('--latency-samples', type=int, default=2000, metavar='N',
        help=f'networks that --latency-model {MEASURE} measures at most')


@dataclass(frozen=True)
class Target:
    """How networks are timed on this machine, and a latency model if there is one.

    Attributes:
        backend: A name of `latency.measure.BACKEND_NAMES`.
        precision: 'fp32' or 'fp16'.
        batch: Images per call.
        threads: Of a CPU; None: all.
        device: Of torch.
        model: The latency model.
        elsewhere: Why this machine is not the one of the latency model; empty if it is.
    """
    backend: str
    precision: str
    batch: int
    threads: Optional[int]
    device: Optional[str]
    model: Optional[LatencyModel] = None
    elsewhere: str = ''

    def cost(self, space: WidthSpace) -> Optional[Tables]:
        """What latency budgets count, if there is a model.

        Raises:
            LatencyError: The model is of another network.
        """
        return None if self.model is None else self.model.cost(space)

    def measure(self, networks: Mapping[str, nn.Module], input_size: tuple[int, ...]) -> dict[str, Measurement]:
        """Times networks next to one another."""
        return measure_many(networks, input_size, self.backend, self.precision, self.batch, self.device, threads=self.threads)

    def describe(self) -> dict[str, Any]:
        """What a time measured here is worth nothing without."""
        return {**describe(self.backend, self.precision, self.device or 'cpu', self.threads), 'batch': self.batch}

    def told(self) -> dict[str, Any]:
        """What the provenance of a network says of the latency model."""
        return {'backend': dict(self.model.backend), 'batch': self.model.batch, 'precision': self.model.precision,
                'validation': asdict(self.model.validation)}

    def __str__(self) -> str:
        return f"{self.backend}{f' on {self.device}' if self.device else ''}, {self.precision}, batch {self.batch}"

    def clip(self, grid: Grid, latency: Optional[Tables]) -> Grid:
        """The part of a grid where the latency model says something; groups of which nothing is left keep their base width."""
        if self.model is None or latency is None:
            return grid
        found = {}
        for name, widths in grid.items():
            measured = latency.tables.grid.get(name)
            if measured and (inside := tuple(w for w in widths if measured[0] <= w <= measured[-1])):
                found[name] = inside
        return found


def find_target(args: Namespace) -> Target:
    """What the flags say, and what the latency model says where they do not.

    Raises:
        UsageError: They contradict one another, or this machine cannot do what they ask for.
        LatencyError: The file is no latency model.
        RunnerError: A backend that the flags ask for is not installed.
    """
    if args.latency_model == MEASURE and getattr(args, 'world_size', 1) > 1:
        raise UsageError(f'--latency-model {MEASURE} works in one process: make a latency model first, with `timm-width latency '
                         'measure`, and give its file')
    path = _file(args)
    model = LatencyModel.load(path) if path else None
    wanted: dict[str, Any] = {'backend': None, 'precision': None, 'batch': None, 'threads': None}
    for name in wanted:
        wanted[name] = given = getattr(args, f'latency_{name}')
        if model is not None:
            own = _of_model(model, name)
            if given is not None and own is not None and given != own:
                raise UsageError(f"--latency-{name} {given}: the latency model '{path}' is for {name} {own}")
            wanted[name] = own if given is None else given
    backend, precision = wanted['backend'] or 'torch', wanted['precision'] or 'fp32'
    device = args.device if backend in TORCH else None
    batch = wanted['batch'] or usual_batch(device or ('cpu' if backend == 'onnxruntime' else 'cuda'))
    target = Target(backend, precision, batch, wanted['threads'], device, model)
    if model is not None and (note := model.validation.warning):
        say(args, f"note: the latency model '{path}' {note}")
    if model is None or path == _built(args):
        check_backend(backend, precision, args.device)
        return target
    if args.latency_backend:
        check_backend(backend, precision, args.device)
    elsewhere = _elsewhere(target, args)
    if elsewhere:
        say(args, f'note: {elsewhere}')
    if elsewhere.startswith(CANNOT):
        return Target('torch', 'fp32', batch, args.latency_threads, args.device, model, elsewhere)
    return replace(target, elsewhere=elsewhere)


def _file(args: Namespace) -> Optional[Path]:
    """The latency model to read: that of the flag, or the one that an earlier part of this search has made."""
    if args.latency_model == MEASURE:
        return _built(args) if args.resume and _built(args).is_file() else None
    return Path(args.latency_model) if args.latency_model else None


def _built(args: Namespace) -> Path:
    return Path(args.output) / FILE


def _of_model(model: LatencyModel, name: str) -> Any:
    return getattr(model, name) if name in ('batch', 'precision') else model.backend.get(name)


def _elsewhere(target: Target, args: Namespace) -> str:
    """Why this machine is not that of the latency model."""
    theirs = target.model.backend.get('device', 'an unknown device')
    if target.backend not in BACKEND_NAMES:
        return f"{CANNOT} '{target.backend}', by which the latency model was made on {theirs}"
    try:
        check_backend(target.backend, target.precision, args.device)
        ours = describe(target.backend, target.precision, args.device)['device']
    except (UsageError, RunnerError) as e:
        return f'{CANNOT} {target.backend}, by which the latency model was made on {theirs}: {e}'
    return '' if ours == theirs else f'the latency model was made on {theirs}, and this is {ours}'


def block_command(args: Namespace, space: WidthSpace) -> str:
    """The command that measures the blocks of the model that the flags name."""
    flags = {'--model-kwargs': [f'{k}={v}' for k, v in args.model_kwargs.items()], '--num-classes': [args.num_classes or ''],
             '--img-size': [space.input_size[1]], '--grid': [args.grid or ''], '--fix': args.fix,
             '--backend': [args.latency_backend or 'onnxruntime']}
    said = ' '.join(f"{flag} {' '.join(map(str, values))}" for flag, values in flags.items() if any(values))
    return f'timm-width latency measure {args.model} {said} --blocks --out blocks.json'


def needs_measuring(args: Namespace) -> bool:
    """Whether a latency model is still to be made."""
    return args.latency_model == MEASURE and _file(args) is None


def check_measurable(args: Namespace, target: Target, space: WidthSpace, rule: str) -> None:
    """Raises UsageError where `build_target` could not make a latency model: before anything is written."""
    size = space.input_size
    if size[1] != size[2]:
        raise UsageError(f'--latency-model {MEASURE} measures square images, not {size}')
    check_packages(target.backend)
    check_begun(*_order(args, target, space, rule), args.latency_samples, _bundle(args))


def _bundle(args: Namespace) -> Path:
    return Path(args.output) / 'search' / 'latency'


def _order(args: Namespace, target: Target, space: WidthSpace, rule: str) -> tuple[Order, Device]:
    half = target.precision == 'fp16' and target.backend not in TORCH
    arguments = {k: v for k, v in model_arguments(args).items() if k not in ('checkpoint_path', 'pretrained_cfg_overlay')}
    order = Order(args.model, rule, args.width_min, args.width_max, args.width_divisor, args.fix, args.search_se,
                  space.input_size[1], target.batch, 'fp16' if half else 'fp32', args.num_classes, None, arguments, args.seed)
    return order, Device(target.backend, target.precision, target.threads, target.device)


def build_target(args: Namespace, target: Target, space: WidthSpace, rule: str) -> Target:
    """Makes the latency model that --latency-model measure asks for, in --output."""
    say(args, f'measuring latency: {target}, at most {args.latency_samples} networks')
    fit = build_latency_model(*_order(args, target, space, rule), args.latency_samples, _bundle(args), lambda text: say(args, text))
    for note in fit.notes:
        say(args, f'note: {note}')
    fit.model.save(_built(args))
    return replace(target, model=LatencyModel.load(_built(args)))


def check_kept(args: Namespace, target: Target, learned: Sequence[str]) -> None:
    """Refuses to go on by another latency model than the one by which policies have learned.

    Args:
        args: The flags.
        target: What latency is counted by.
        learned: The policies.

    Raises:
        UsageError: It is another one.
    """
    if target.model is None or not learned or not args.resume or not _built(args).is_file():
        return
    if LatencyModel.load(_built(args)).to_json() != target.model.to_json():
        raise UsageError(f"--resume '{args.resume}': {learned[0]} was trained by the latency model in '{_built(args)}', and "
                         f"'{args.latency_model}' is another: it needs another --output")


def keep_model(args: Namespace, target: Target) -> None:
    """Copies the latency model into --output, so that what was searched by it is known."""
    if target.model is not None:
        target.model.save(_built(args))
