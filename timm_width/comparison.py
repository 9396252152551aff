"""The networks that a search sets side by side: timed, trained under the same seeds, and those that were found saved."""
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from .budget import Budget
from .choosing import after_epoch, folder_name
from .config import fingerprint, load_spec, networks_in, save
from .engine import Training, is_primary, of_primary, say, top1
from .holdout import Journal
from .policies.base import Choice
from .problem import Problem
from .report import METRICS, metric_name
from .target import Target

__all__ = ['Entry', 'budget_folder', 'save_found', 'times', 'train_all']


@dataclass(frozen=True)
class Entry:
    """A network of the final table.

    Attributes:
        name: What the table calls it.
        choice: Its widths.
        problem: What it is a network of.
        budget: What it was chosen for.
        folder: Where it is saved, if it is what a policy found.
        provenance: How it was found.
    """
    name: str
    choice: Choice
    problem: Problem
    budget: Optional[Budget] = None
    folder: Optional[Path] = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.name}{f' ({self.budget.text})' if self.budget else ''}"

    def model(self, seed: int) -> nn.Module:
        """The network; the same seed gives the same initial weights."""
        return self.problem.model(self.choice, seed)

    def is_like(self, other: 'Entry') -> bool:
        """Whether both are the same network."""
        return self.choice == other.choice and self.problem.space == other.problem.space


def budget_folder(output: Path, budgets: Sequence[str], budget: str) -> Path:
    """Where what was found for a budget is saved: where it is already; or the folder itself, if it is for a single one."""
    there = {path: str(spec.provenance.get('budget')) for path, spec in networks_in(output, depth=1, strict=False).items()}
    there = {path: text for path, text in there.items() if path in (output, output / folder_name(text))}
    if there.get(output) == budget or len(budgets) == 1 and not there:
        return output
    return output / folder_name(budget)


def save_found(entries: Sequence[Entry], args: Namespace) -> None:
    """Saves what was found, before it is trained, unless it is saved already."""
    for e in entries:
        if e.folder is not None:
            network = e.model(args.seed)
            if not _is_saved(e.folder, network):
                save(network, e.folder, e.provenance, args.pretrained, e.problem.config)


def _is_saved(folder: Path, network: nn.Module) -> bool:
    """Whether the folder holds that network, of the run that goes on."""
    return (folder / 'config.json').is_file() and load_spec(folder).shapes == fingerprint(network)


def _is_trained(folder: Path, epochs: int) -> bool:
    """Whether what the folder holds has been trained, for so long."""
    return (folder / 'config.json').is_file() and load_spec(folder).provenance.get('train') == {'epochs': epochs}


def times(entries: Sequence[Entry], target: Target, args: Namespace) -> list[tuple[float, float]]:
    """Milliseconds per image of every network on this machine, and how far the measured times lie apart (`Timing.spread`)."""
    if not is_primary(args):
        return [(0., 0.)] * len(entries)
    names = [json.dumps([e.problem.space.architecture, {n: w for n, w in e.choice.widths.items() if w != e.problem.space[n].size},
                         e.choice.skips], sort_keys=True) for e in entries]
    networks = {name: e.model(args.seed) for name, e in zip(names, entries)}  # what is the same, once
    say(args, f'timing {len(networks)} networks')
    found = target.measure(networks, entries[0].problem.space.input_size)
    return [(round(found[name].ms, 4), round(found[name].spread, 4)) for name in names]


def train_all(entries: Sequence[Entry], rows: Sequence[dict[str, Any]], args: Namespace) -> None:
    """Trains every network under every seed; adds their accuracy to the rows, and saves what was found under the first seed."""
    problem, state = entries[0].problem, Path(args.output) / 'search'
    metric = metric_name(args)
    journal = Journal(state / 'results.jsonl', args)
    trained = of_primary(args, [e.folder is not None and _is_trained(e.folder, args.epochs) for e in entries])
    training, validation = problem.training_batches(), problem.held_batches()
    scores: dict[int, list[float]] = {i: [] for i in range(len(entries))}

    def train(entry: Entry, seed: int) -> float:
        title = f'{entry.title}, seed {seed}'
        say(args, f'training {title}, for {args.epochs} epochs')
        checkpoint = state / f"{title.replace(' ', '-')}-{args.epochs}.pth.tar"
        warmup = min(args.warmup_epochs, args.epochs / 5)
        result = Training(entry.model(seed), training, args, args.epochs, title, warmup, seed=seed).run(
            checkpoint, after_epoch(args, title))
        found = top1(result, validation, args)
        if is_primary(args):
            if entry.folder is not None and seed == args.seed:
                save(result, entry.folder, {**entry.provenance, 'train': {'epochs': args.epochs}}, data_config=problem.config)
            checkpoint.unlink(missing_ok=True)
        return found

    order = sorted(range(len(entries)), key=lambda i: entries[i].folder is None)  # the baselines may be interrupted
    for seed in range(args.seed, args.seed + args.seeds):
        for at, i in enumerate(order):
            e = entries[i]
            twin = next((j for j in order[:at] if entries[j].is_like(e)), None)
            if twin is not None and e.folder is None:
                scores[i].append(scores[twin][-1])
                continue
            saves = e.folder is not None and seed == args.seed  # known already is no reason to end without its weights
            anew = saves and not trained[i]
            key = [e.title if saves else '', *e.choice, seed, args.epochs]
            scores[i].append(journal.recall(key, partial(train, e, seed), anew))
    for i, row in enumerate(rows):
        found = torch.tensor(scores[i], dtype=torch.float64)
        row[metric] = round(found.mean().item(), 2)
        row[f'{metric}_std'] = round(found.std().item(), 2) if args.seeds > 1 else ''
    for e, row in zip(entries, rows):
        if e.folder is not None and is_primary(args):
            beside = [r for other, r in zip(entries, rows) if other.folder is None and r['budget'] in ('', e.budget.text)]
            _add_results(e.folder / 'config.json', row, beside)


def _add_results(path: Path, row: Mapping[str, Any], beside: Sequence[Mapping[str, Any]]) -> None:
    """Writes the final table into a config's provenance, where `baseline` is empty so far."""
    config = json.loads(path.read_text())
    said = config['timm_width']
    said['baseline'] = {other['network']: other for other in beside}
    said.update({k: row[k] for k in METRICS if k in row})
    saving = path.with_name('.config.json.saving')
    saving.write_text(json.dumps(config, indent=2))
    saving.replace(path)
