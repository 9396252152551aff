"""timm-width plot FOLDER: pictures of what a search found, beside its results.

    timm-width plot runs/cafenet [--output FOLDER] [--format png]

For a folder of `timm-width search`, or one of several budgets in it:

- ratios: for every group, what the found network keeps of the base width, all budgets beside one another;
- bins: for every group, how many widths the search chose from, and how many channels lie between two of them;
- scores: how the scores of the networks that it compared are distributed.

Figures 4, 5 and 6 of "Locally free weight sharing for network width search" (CafeNet, Su et al., ICLR 2021). Needs matplotlib.
"""
import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import timm

from .config import SUFFIX, ConfigError, Spec, load_spec
from .data import UsageError
from .models import register
from .space import WidthSpace
from .trace import meta_copy, trace

__all__ = ['main', 'plot_average', 'plot_bins', 'plot_curve', 'plot_ratios', 'plot_scores', 'plot_similarity', 'read_scores']

FORMATS = ('png', 'svg', 'pdf')
BINS = 40  # of the histogram
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
    grid, space = _grid(first), _space(first)
    units = {group.name: group.unit for group in space.groups}
    scores = {file.name.removesuffix('.scores.jsonl'): found for file in sorted((args.folder / 'search').glob('*.scores.jsonl'))
              if (found := read_scores(file, units))}
    _pyplot()
    output = args.folder if args.output is None else args.output
    output.mkdir(parents=True, exist_ok=True)
    pictures = {'ratios': plot_ratios(specs, space.base_widths)}
    if grid:
        pictures['bins'] = plot_bins(grid)
    if scores:
        pictures['scores'] = plot_scores(scores)
    for name, figure in pictures.items():
        path = output / f'{name}.{args.format}'
        figure.savefig(path, dpi=150, bbox_inches='tight')
        print(path)


# -- what a folder holds ---------------------------------------------------------------------------------------------------


def _specs(folder: Path) -> dict[str, Spec]:
    """Budget -> what was found for it."""
    paths = [folder] if (folder / 'config.json').is_file() else sorted(p.parent for p in folder.glob('*/config.json'))
    try:
        specs = [load_spec(path) for path in paths]
    except ConfigError as e:
        raise UsageError(str(e)) from None
    if not specs:
        raise UsageError(f"'{folder}' is not the folder of a search: neither it nor a folder in it has a config.json")
    return {str(spec.provenance.get('budget') or path.name): spec for path, spec in zip(paths, specs)}


def _space(spec: Spec) -> WidthSpace:
    name = spec.architecture.removesuffix(SUFFIX)
    register(name)
    size = (timm.get_pretrained_cfg(name) or timm.create_model(name).pretrained_cfg).input_size
    model = meta_copy(timm.create_model(name, **{k: v for k, v in spec.model_args.items() if k != 'pretrained_cfg'}))
    return trace(model, size)


def _grid(spec: Spec) -> dict[str, list[int]]:
    """The grid in the provenance, which nothing else has checked."""
    found = spec.provenance.get('grid')
    found = {k: v for k, v in found.items() if k != 'rule'} if isinstance(found, dict) else {}
    if not all(isinstance(v, list) and v and all(type(w) is int and w > 0 for w in v) for v in found.values()):
        raise UsageError("the config's 'grid' does not hold lists of widths")
    return found


def read_scores(path: Path, units: Mapping[str, int] = {}) -> list[float]:
    """The accuracies of the networks in a journal of scores: of each widths' several assignments the best.

    Args:
        path: The journal.
        units: Group -> channels of one of its steps (ids), which the journal's runs of indices count; 1 where there is none.

    Raises:
        UsageError: It is not such a journal.
    """
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f'{path} is too large for scores (at most {MAX_BYTES >> 20} MiB)')
    best: dict[str, float] = {}
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
    for line in lines if lines and lines[-1].endswith('\n') else lines[:-1]:  # a kill may have cut the last
        try:
            key, (top1, _, *_) = json.loads(line)
            kind, widths, *rest = json.loads(key)
            widths = {n: units.get(n, 1) * sum(length for _, length in w) if isinstance(w, list) else w for n, w in widths.items()}
            name = json.dumps([kind, widths, rest], sort_keys=True)
            best[name] = max(best.get(name, float(top1)), float(top1))
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise UsageError(f'{path} is not a journal of scores: {line.strip()[:60]!r}') from None
    return list(best.values())


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


def plot_ratios(specs: Mapping[str, Spec], base: Mapping[str, int]) -> Any:
    """Figure 4: the share of the base width that each group keeps, for every budget.

    Args:
        specs: Budget -> what was found.
        base: Group -> base width.

    Returns:
        A matplotlib figure.
    """
    names = [n for n in base if any(n in spec.widths for spec in specs.values())] or list(base)
    figure = _pyplot()(figsize=(max(6., 0.28 * len(names)), 4))
    axes = figure.subplots()
    wide = 0.8 / len(specs)
    for i, (budget, spec) in enumerate(specs.items()):
        ratios = [spec.widths.get(n, base[n]) / base[n] for n in names]
        axes.bar([k - 0.4 + (i + 0.5) * wide for k in range(len(names))], ratios, wide, label=budget)
    axes.axhline(1, color='grey', linewidth=0.5)
    _named(axes, names)
    axes.set_ylabel('share of the base width')
    axes.legend()
    return figure


def plot_bins(grid: Mapping[str, Sequence[int]]) -> Any:
    """Figure 5: the channels of a bin, and the number of bins, of each group of a grid; a matplotlib figure."""
    figure = _pyplot()(figsize=(max(6., 0.28 * len(grid)), 5))
    above, below = figure.subplots(2, sharex=True)
    sizes = [statistics.median(b - a for a, b in zip((0, *widths), widths)) for widths in grid.values()]
    above.bar(range(len(grid)), sizes)
    above.set_ylabel('channels of a bin')
    below.bar(range(len(grid)), [len(widths) for widths in grid.values()])
    below.set_ylabel('bins')
    _named(below, list(grid))
    return figure


def plot_scores(scores: Mapping[str, Sequence[float]]) -> Any:
    """Figure 6: histograms of the accuracies that searches have seen, in one range; a matplotlib figure.

    Args:
        scores: Name of a search -> accuracies in percent.
    """
    figure = _pyplot()(figsize=(6, 4))
    axes = figure.subplots()
    every = [s for found in scores.values() for s in found]
    low, high = min(every), max(every)
    for name, found in scores.items():
        axes.hist(found, BINS, range=(low, high if high > low else low + 1), alpha=0.5,
                  label=f'{name}: {statistics.mean(found):.2f} on average')
    axes.set_xlabel('accuracy on the holdout, %')
    axes.set_ylabel('networks')
    axes.legend()
    return figure


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
