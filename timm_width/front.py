"""What the networks of a search's table are worth: accuracy, or search loss, against cost.

Figures 5 to 7 of "Tiered Pruning for Efficient Differentiable Inference-Aware Neural Architecture Search" (PRUNET, 2022), for any
policies.
"""
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .data import UsageError
from .report import METRICS

__all__ = ['plot_front', 'read_table']

COSTS = {'predicted_ms': 'predicted ms per image', 'macs': 'MACs, M', 'params': 'parameters, M'}
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#F0E442')  # told apart by all (Okabe, Ito)
MARKERS = 'os^Dv<>Pp*Xh'
MAX_BYTES = 16 << 20


def read_table(folder: Path) -> list[dict[str, str]]:
    """The rows of a folder's summary.csv; none without one.

    Raises:
        UsageError: It is no such table.
    """
    path = folder / 'summary.csv'
    if not path.is_file():
        return []
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"'{path}' is larger than the table of a search")
    try:
        with path.open(newline='', encoding='utf-8') as file:
            rows = [{k: v or '' for k, v in row.items() if isinstance(k, str)} for row in csv.DictReader(file)]
    except (csv.Error, UnicodeDecodeError) as e:
        raise UsageError(f"'{path}' is not the table of a search: {e}") from None
    if rows and not {'network', 'macs'} <= rows[0].keys():
        raise UsageError(f"'{path}' is not the table of a search: it has no columns 'network' and 'macs'")
    return rows


def plot_front(figure: Any, rows: Sequence[Mapping[str, str]], what: str) -> bool:
    """Draws a column against what networks cost, a colour for each policy.

    Args:
        figure: A matplotlib figure.
        rows: What `read_table` gives.
        what: 'top1', 'map' or 'search_loss'.

    Returns:
        Whether there was anything to draw.
    """
    cost = next((c for c in COSTS if c in rows[0] and all(_number(row.get(c, '')) for row in rows)), None) if rows else None
    drawn = [row for row in rows if _number(row.get(what, ''))] if cost else []
    if not drawn:
        return False
    axes, scale = figure.subplots(), 1 if cost == 'predicted_ms' else 1e-6
    for i, name in enumerate(dict.fromkeys(row['network'] for row in drawn)):
        own = sorted(((float(row[cost]) * scale, row) for row in drawn if row['network'] == name), key=lambda pair: pair[0])
        x, y = [c for c, _ in own], [float(row[what]) for _, row in own]
        std = [float(row[f'{what}_std']) if _number(row.get(f'{what}_std', '')) else 0. for _, row in own]
        axes.errorbar(x, y, yerr=std if any(std) else None, label=name, capsize=3, marker=MARKERS[i % len(MARKERS)],
                      color=COLOURS[i % len(COLOURS)], linestyle='-' if len(own) > 1 else 'none')
    axes.set_xlabel(COSTS[cost])
    axes.set_ylabel('search loss' if what == 'search_loss' else f'{METRICS[what]}, %')
    axes.grid(alpha=0.3)
    axes.legend(loc='center left', bbox_to_anchor=(1.02, 0.5), frameon=False)
    return True


def _number(text: str) -> bool:
    try:
        return float(text) == float(text) and abs(float(text)) < float('inf')
    except ValueError:
        return False
