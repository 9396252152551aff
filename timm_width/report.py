"""The final table of a search."""
import csv
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .latency.runner.timing import MAX_SPREAD

__all__ = ['METRICS', 'metric_name', 'print_table', 'write_table']

METRICS = {'top1': 'top-1', 'map': 'mAP'}  # name in files -> in print


def metric_name(args: Namespace) -> str:
    """What networks are compared by."""
    return 'map' if args.task == 'multilabel' else 'top1'


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes rows as CSV, beside and then over what is there."""
    beside = path.with_name(f'.{path.name}.saving')
    with beside.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def print_table(rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Prints rows; a cost is followed by its share of the first row's.

    Args:
        rows: What `write_table` takes.
        where: What the latency was measured on.
    """
    base = rows[0]
    several = len({row['budget'] for row in rows} - {''}) > 1
    names = [f"{r['network']} {r['budget']}" if several and r['budget'] else r['network'] for r in rows]
    wide = max(10, *(len(name) + 2 for name in names))
    metric = next((m for m in METRICS if m in base), None)
    shown = f'{METRICS[metric]} %' if metric else ''
    predicts = 'predicted_ms' in base
    head = f"{'predicted ms':>14}" * predicts
    print(f"\n{'network':<{wide}}{'MACs':>18}{'params':>18}{head}{'ms per image':>24}{shown:>16}")
    for name, r in zip(names, rows):
        macs, params = (f'{r[c] / 1e6:.2f}M {r[c] / base[c]:6.1%}' for c in ('macs', 'params'))
        mark = '*' if r['latency_spread'] > MAX_SPREAD else ''
        ms = f"{r['latency_ms']:.3f} ±{r['latency_spread']:.0%}{mark} {r['latency_ms'] / base['latency_ms']:6.1%}"
        spread = f" ± {r[f'{metric}_std']:.2f}" if r.get(f'{metric}_std', '') != '' else ''
        predicted = f"{r['predicted_ms'] if r['predicted_ms'] == '' else format(r['predicted_ms'], '.4g'):>14}" if predicts else ''
        print(f'{name:<{wide}}{macs:>18}{params:>18}{predicted}{ms:>24}' + (f'{r[metric]:.2f}{spread}'.rjust(16) if metric else ''))
    print(f'(ms measured here: {where}; median ± the distance of the quartiles)')
    if any(r['latency_spread'] > MAX_SPREAD for r in rows):
        print('(* was measured several times, and stayed disturbed by other load on this machine: do not rely on it)')
