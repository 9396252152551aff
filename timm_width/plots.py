"""timm-width plot FOLDER: pictures of what a search found, beside its results.

    timm-width plot runs/cafenet [--output FOLDER] [--format png]

For a folder of `timm-width search` with all the networks in it, or that of one of its budgets:

- ratios: for every group that was searched, what the found network keeps of the base width, all budgets beside one another;
- bins: for every group, how many widths the search chose from, and how many channels each of them has more than the one before;
- front, search_loss: accuracy, and the policy's own loss, of all networks of the table against what they cost (front.py);
- scores: how the scores of the networks that it compared are distributed; each counts for the lowest budget that it is within
  (those of later stages have a journal for each budget).

Figures 4, 5 and 6 of "Locally free weight sharing for network width search" (CafeNet, Su et al., ICLR 2021). Needs matplotlib.
"""
import argparse
import json
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Optional

import timm

from .budget import Budget, BudgetError
from .choosing import folder_name
from .config import SUFFIX, ConfigError, Spec, networks_in
from .cost import CostError
from .data import UsageError
from .front import plot_front, read_table
from .latency.model import LatencyError, LatencyModel
from .models import register
from .report import METRICS
from .space import WidthError, WidthSpace
from .trace import meta_copy, trace

__all__ = ['main', 'plot_average', 'plot_bins', 'plot_curve', 'plot_ratios', 'plot_scores', 'plot_similarity', 'read_scores']

FORMATS = ('png', 'svg', 'pdf')
BINS = 40  # of the histogram, at most
EXACT = 1e-6  # percent; what two accuracies may differ by that are the same
MAX_BYTES = 256 << 20  # of a file of scores


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Parses, reads, and writes the pictures that the folder has something for."""
    parser = argparse.ArgumentParser(
        prog='timm-width plot', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('folder', type=Path, help='of a search')
    parser.add_argument('--output', type=Path, metavar='FOLDER', help='where to write (default: the folder itself)')
    parser.add_argument('--format', choices=FORMATS, default='png')
    args = parser.parse_args(argv)
    specs = _specs(args.folder)
    first = next(iter(specs.values()))
    grids = {name: grid for name, spec in specs.items() if (grid := _grid(spec))}
    space = _space(first)
    units = {group.name: group.unit for group in space.groups}
    within = _budget_of(args.folder, specs, space)
    scores: dict[str, list[float]] = {}
    for file in sorted((args.folder / 'search').glob('*.scores.jsonl')):
        name = file.name.removesuffix('.scores.jsonl')
        if any(f".{folder_name(str(spec.provenance.get('budget')))}." in file.name for spec in specs.values()):
            scores[name] = read_scores(file, units).get('', [])  # of a later stage, for one budget
            continue
        for budget, found in sorted(read_scores(file, units, within).items()):  # as the budgets of the other pictures
            scores[f'{name}, {budget}' if budget else name] = found
    _pyplot()
    output = args.folder if args.output is None else args.output
    output.mkdir(parents=True, exist_ok=True)
    pictures = {'ratios': plot_ratios(specs, space.base_widths, {n for grid in grids.values() for n in grid})}
    if grids:
        pictures['bins'] = plot_bins(grids)
    if any(scores.values()):
        pictures['scores'] = plot_scores({name: found for name, found in scores.items() if found})
    rows = read_table(args.folder)
    for name, what in ('front', next((m for m in METRICS if rows and m in rows[0]), '')), ('search_loss', 'search_loss'):
        figure = _pyplot()(figsize=(6, 4))
        if plot_front(figure, rows, what):
            pictures[name] = figure
    for name, figure in pictures.items():
        path = output / f'{name}.{args.format}'
        figure.savefig(path, dpi=150, bbox_inches='tight')
        print(path)


# -- what a folder holds ---------------------------------------------------------------------------------------------------


def _specs(folder: Path) -> dict[str, Spec]:
    """What was found, by its budget; where this is not enough, by its policy or folder, too."""
    try:
        found = networks_in(folder)
    except ConfigError as e:
        raise UsageError(str(e)) from None
    if not found:
        raise UsageError(f"'{folder}' is not the folder of a search: neither it nor a folder in it has a config.json")
    several = len({spec.provenance.get('policy') for spec in found.values()}) > 1
    specs: dict[str, Spec] = {}
    for path, spec in found.items():
        name = str(spec.provenance.get('budget') or path.name)[:80]
        name = f"{spec.provenance.get('policy')}, {name}"[:80] if several else name
        if name in specs and (specs[name].widths, specs[name].skips) == (spec.widths, spec.skips):
            continue  # the same, saved twice
        specs[f'{name} ({path.name})' if name in specs else name] = spec
    return specs


def _budget_of(folder: Path, specs: Mapping[str, Spec], space: WidthSpace) -> Callable[[Mapping[str, int], Sequence[str]], str]:
    """Widths, skips -> the lowest budget that such a network is within; '' where the budgets cannot be told."""
    texts = list(dict.fromkeys(str(spec.provenance.get('budget')) for spec in specs.values()))
    model = folder / 'latency.json'
    try:
        latency = LatencyModel.load(model).cost(space) if model.is_file() else None
        budgets = sorted((Budget.parse(text, space, latency) for text in texts), key=lambda b: b.limit)
    except (BudgetError, LatencyError):
        return lambda widths, skips: ''
    if len({type(b.cost) for b in budgets}) > 1 or not math.isfinite(budgets[-1].limit):
        return lambda widths, skips: ''

    def found(widths: Mapping[str, int], skips: Sequence[str]) -> str:
        try:
            cost = budgets[0].cost(widths, skips)
        except (WidthError, CostError):
            return ''
        return next((b.text for b in budgets if cost <= b.limit), f'over {budgets[-1].text}')
    return found


def _space(spec: Spec) -> WidthSpace:
    name = spec.architecture.removesuffix(SUFFIX)
    register(name)
    cfg = timm.get_pretrained_cfg(name) or timm.create_model(name).pretrained_cfg
    model = meta_copy(timm.create_model(name, **{k: v for k, v in spec.model_args.items() if k != 'pretrained_cfg'}))
    return trace(model, spec.input_size or cfg.input_size)


def _grid(spec: Spec) -> dict[str, list[int]]:
    """The grid in the provenance, which nothing else has checked."""
    found = spec.provenance.get('grid')
    found = {k: v for k, v in found.items() if k != 'rule'} if isinstance(found, dict) else {}
    if not all(isinstance(v, list) and v and all(type(w) is int and w > 0 for w in v) for v in found.values()):
        raise UsageError("the config's 'grid' does not hold lists of widths")
    return found


def read_scores(
        path: Path,
        units: Mapping[str, int] = {},
        within: Callable[[Mapping[str, int], Sequence[str]], str] = lambda widths, skips: '',
) -> dict[str, list[float]]:
    """The accuracies of the networks in a journal of scores: of each widths' several sets of channels the best.

    Args:
        path: The journal.
        units: Group -> channels of one of its steps (ids), which the journal's runs of indices count; 1 where there is none.
        within: Widths, skips -> the budget that such a network counts for.

    Returns:
        Budget -> accuracies in percent.

    Raises:
        UsageError: It is not such a journal.
    """
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f'{path} is too large for scores (at most {MAX_BYTES >> 20} MiB)')
    best: dict[str, dict[str, float]] = {}
    budget: dict[str, str] = {}
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
    for line in lines if lines and lines[-1].endswith('\n') else lines[:-1]:  # a kill may have cut the last
        try:
            key, (top1, _, *_) = json.loads(line)
            kind, widths, *rest = json.loads(key)
            widths = {n: units.get(n, 1) * sum(length for _, length in w) if isinstance(w, list) else w for n, w in widths.items()}
            name = json.dumps([kind, widths, rest], sort_keys=True)
            if name not in budget:
                budget[name] = within(widths, tuple(rest[0]))
            found = best.setdefault(budget[name], {})
            found[name] = max(found.get(name, float(top1)), float(top1))
        except (ValueError, TypeError, AttributeError, IndexError, RecursionError):
            raise UsageError(f'{path} is not a journal of scores: {line.strip()[:60]!r}') from None
    return {text: list(found.values()) for text, found in best.items()}


# -- pictures --------------------------------------------------------------------------------------------------------------


def _pyplot() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError('plot needs matplotlib: pip install timm-width[plot]') from None
    return Figure


def _named(axes: Any, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set_xlim(-0.7, len(names) - 0.3)


def _legend(axes: Any) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(loc='lower left', bbox_to_anchor=(0, 1.01), ncols=min(len(axes.get_legend_handles_labels()[1]), 3), fontsize=7,
                frameon=False, borderaxespad=0)


def plot_ratios(specs: Mapping[str, Spec], base: Mapping[str, int], searched: Collection[str] = ()) -> Any:
    """Figure 4: the share of the base width that each group keeps, for every budget.

    Args:
        specs: Budget -> what was found.
        base: Group -> base width.
        searched: Groups to show, also if all networks keep their base width.

    Returns:
        A matplotlib figure.
    """
    names = [n for n in base if n in searched or any(n in spec.widths for spec in specs.values())] or list(base)
    figure = _pyplot()(figsize=(max(6., 0.28 * len(names)), 4))
    axes = figure.subplots()
    wide = 0.8 / len(specs)
    for i, (budget, spec) in enumerate(specs.items()):
        ratios = [spec.widths.get(n, base[n]) / base[n] for n in names]
        axes.bar([k - 0.4 + (i + 0.5) * wide for k in range(len(names))], ratios, wide, label=budget)
    axes.axhline(1, color='grey', linewidth=0.5)
    _named(axes, names)
    axes.set_ylabel('share of the base width')
    _legend(axes)
    return figure


def plot_bins(grids: Mapping[str, Mapping[str, Sequence[int]]]) -> Any:
    """Figure 5: the channels of every bin, and the number of bins, of each group.

    Args:
        grids: Budget -> group -> widths, ascending. Where all are the same, one is drawn.

    Returns:
        A matplotlib figure.
    """
    if all(grid == next(iter(grids.values())) for grid in grids.values()):
        grids = {'': next(iter(grids.values()))}
    names = list(dict.fromkeys(n for grid in grids.values() for n in grid))
    figure = _pyplot()(figsize=(max(6., 0.28 * len(names)), 6))
    above, below = figure.subplots(2, sharex=True)
    wide = 0.8 / len(grids)
    for i, (budget, grid) in enumerate(grids.items()):
        at = {n: k - 0.4 + (i + 0.5) * wide for k, n in enumerate(names) if n in grid}
        label = f'{budget}: ' * bool(budget)
        sizes = {n: [b - a for a, b in zip((0, *grid[n]), grid[n])] for n in at}
        below.bar(list(at.values()), [len(grid[n]) for n in at], wide, color=f'C{i}', label=budget)
        usual = [(at[n], size) for n, found in sizes.items() for size in dict.fromkeys(found[:-1])]
        above.scatter(*zip(*usual) if usual else ([], []), s=14, color=f'C{i}', label=f'{label}bins')
        above.scatter(list(at.values()), [found[-1] for found in sizes.values()], s=22, facecolors='none', edgecolors=f'C{i}',
                      label=f'{label}the last bin')
    above.set_yscale('log', base=2)
    above.yaxis.set_major_formatter('{x:g}')
    above.grid(axis='y', linewidth=0.3)
    above.set_ylabel('channels of a bin')
    below.set_ylabel('bins')
    _legend(above)
    _named(below, names)
    return figure


def plot_scores(scores: Mapping[str, Sequence[float]]) -> Any:
    """Figure 6: histograms of the accuracies that searches have seen, in one range; a matplotlib figure.

    Accuracies are multiples of one image's share of the holdout: a bar takes in as many of them as every other.

    Args:
        scores: Name of a search and its budget -> accuracies in percent.
    """
    figure = _pyplot()(figsize=(6, 4))
    axes = figure.subplots()
    edges = _edges([s for found in scores.values() for s in found])
    for i, (name, found) in enumerate(scores.items()):
        label = f'{name}: {len(found):,} networks, {statistics.mean(found):.2f} % on average'
        axes.hist(found, edges, histtype='stepfilled', facecolor=(f'C{i % 10}', 0.3), edgecolor=f'C{i % 10}', label=label)
    axes.set_xlabel('accuracy on the holdout, %')
    axes.set_ylabel('networks')
    axes.legend(loc='lower left', bbox_to_anchor=(0, 1.01), fontsize=7, frameon=False, borderaxespad=0)
    return figure


def _edges(scores: Sequence[float]) -> list[float]:
    """Of at most BINS bars, each around equally many of the values that accuracies on that holdout can have."""
    values = sorted(set(scores))
    step = reduce(_common, (b - a for a, b in zip(values, values[1:]) if b - a > EXACT), 0.) or 1.
    count = round((values[-1] - values[0]) / step) + 1
    width = -(-count // BINS) * step
    return [values[0] - step / 2 + width * i for i in range(math.ceil(count * step / width - EXACT) + 1)]


def _common(a: float, b: float) -> float:
    """Greatest common divisor of two differences of accuracies."""
    while b > EXACT:
        a, b = b, a % b
        if a - b < EXACT:  # a multiple, but for rounding
            b = 0.
    return a


def plot_similarity(names: Sequence[str], cosines: Any) -> Any:
    """Figure A2 of "Width Transfer" (2021): cosines between every two of several widths; a matplotlib figure.

    Args:
        names: What they are called.
        cosines: (len(names), len(names)).
    """
    size = max(4., 0.45 * len(names) + 2)
    figure = _pyplot()(figsize=(size, size))
    axes = figure.subplots()
    picture = axes.imshow(cosines, vmin=min(0.5, float(min(map(min, cosines)))), vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    for i, row in enumerate(cosines):
        for j, value in enumerate(row):
            axes.text(j, i, f'{value:.2f}', ha='center', va='center', fontsize=7, color='white' if value < 0.8 else 'black')
    figure.colorbar(picture, label='cosine')
    return figure


def plot_average(base: Mapping[str, int], widths: Any) -> Any:
    """Figure A1 of "Width Transfer" (2021): average widths, with their standard deviation; a matplotlib figure.

    Args:
        base: Group -> base width.
        widths: A row for each network, with a width for each group.
    """
    columns = list(zip(*widths))
    mean = [statistics.mean(map(float, c)) for c in columns]
    std = [statistics.stdev(map(float, c)) if len(c) > 1 else 0. for c in columns]
    figure = _pyplot()(figsize=(max(6., 0.28 * len(base)), 4))
    axes = figure.subplots()
    at = range(len(base))
    axes.plot(at, mean, label='average')
    axes.fill_between(at, [m - s for m, s in zip(mean, std)], [m + s for m, s in zip(mean, std)], alpha=0.3)
    axes.plot(at, list(base.values()), color='grey', linestyle='--', label='base')
    _named(axes, list(base))
    axes.set_ylabel('channels')
    axes.legend()
    return figure


def plot_curve(points: Sequence[tuple[float, float, float, str]], direct: float, uniform: float) -> Any:
    """Figures 3 to 6 of "Width Transfer" (2021): accuracy against the search cost that a proxy saves; a matplotlib figure.

    Args:
        points: Of each proxy: the share saved, the top-1 accuracy of what was carried over and its standard deviation, its name.
        direct: Accuracy of what was found without a proxy.
        uniform: That of the uniform width.
    """
    figure = _pyplot()(figsize=(6, 4))
    axes = figure.subplots()
    points = sorted(points)
    saved, top1, std = ([100 * p[0] for p in points], [p[1] for p in points], [p[2] for p in points])
    axes.errorbar(saved, top1, yerr=std if any(std) else None, marker='o', capsize=3, label='carried over')
    for x, y, (_, _, _, name) in zip(saved, top1, points):
        axes.annotate(name, (x, y), textcoords='offset points', xytext=(4, 4), fontsize=7)
    axes.axhline(direct, color='black', linestyle='--', label='direct')
    axes.axhline(uniform, color='grey', linestyle=':', label='uniform')
    axes.set_xlabel('search cost saved, %')
    axes.set_ylabel('top-1, %')
    axes.legend()
    return figure
