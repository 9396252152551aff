"""Trains a timm model, plain or searched, with timm's data, optimisers and schedules.

    python train.py --model local-dir:runs/x --dataset digits --epochs 20 --output runs/y

Flags that timm's train.py has too mean the same. This is a first form. Not there yet: the rest of timm's flags (mixup, EMA,
gradient accumulation, channels-last, torch.compile, distillation, -c YAML files, ...), checkpoints and --resume, several
processes. --output is the folder itself, with config.json, model.safetensors, args.yaml and one row per epoch in summary.csv.
"""
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from timm.models import save_for_hf
from timm.utils import random_seed, update_summary

from .arguments import Parser, add_arguments, check_arguments, check_output, write_args
from .config import SUFFIX, load_spec, save
from .data import DEFAULTS, View, loader, open_splits
from .engine import Training, create, data_config, top1

__all__ = ['main', 'train']

RESULTS = ('config.json', 'model.safetensors', 'args.yaml', 'summary.csv')


def parse(argv: Optional[Sequence[str]] = None) -> Namespace:
    """Reads the flags; an embedded dataset brings defaults of its own."""
    first = Parser(add_help=False)
    first.add_argument('--dataset')
    known, _ = first.parse_known_args(argv)
    parser = Parser(prog='timm-width train', description=__doc__)
    add_arguments(parser)
    parser.add_argument('--output', required=True, metavar='FOLDER', help='new or empty folder for the results')
    parser.add_argument('--overwrite', action='store_true', help='replace the results of an earlier run in --output')
    parser.set_defaults(**DEFAULTS.get(known.dataset, {}))
    return parser.parse_args(argv)


def train(args: Namespace) -> float:
    """Runs a training.

    Returns:
        Top-1 accuracy on the validation images after the last epoch.
    """
    check_arguments(args)
    check_output(Path(args.output), args.overwrite, args.model)
    splits = open_splits(args)
    random_seed(args.seed)
    model = create(args.model, args.num_classes, args.pretrained)
    if args.model.startswith('local-dir:') and not args.pretrained:
        print(f"training from random weights; --pretrained goes on from those in '{args.model.partition(':')[2]}'", flush=True)
    if 0 < args.epochs <= args.warmup_epochs:
        print(f'all {args.epochs} epochs are warm-up: --warmup-epochs is {args.warmup_epochs}', flush=True)
    config = data_config(args, model)
    batches = loader(View(splits.train), args, config, training=True)
    validation = loader(View(splits.validation), args, config, training=False)

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        (output / name).unlink(missing_ok=True)
    write_args(args, output)
    accuracy = 0.

    def after_epoch(training: Training, loss: float, lr: float) -> None:
        nonlocal accuracy
        accuracy, epoch = top1(training.result, validation, args), training.epoch - 1
        update_summary(epoch, {'loss': loss}, {'top1': accuracy}, output / 'summary.csv', lr=lr)
        print(f'epoch {epoch}: loss {loss:.4f}, top-1 {accuracy:.2f} %', flush=True)

    model = Training(model, batches, args, args.epochs, args.model).run(after_epoch=after_epoch)
    if model.pretrained_cfg['architecture'].endswith(SUFFIX):
        source, _, path = args.model.partition(':')
        save(model, output, load_spec(path).provenance if source == 'local-dir' else None, data_config=config)
    else:
        save_for_hf(model, output, safe_serialization=True, data_config=config)
    return accuracy


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Parses and trains."""
    train(parse(argv))
