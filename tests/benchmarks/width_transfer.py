"""Accuracy against the search cost that a proxy saves (Figures 3 to 6 of "Width Transfer", 2021): a CSV and a picture.

    python tests/benchmarks/width_transfer.py --output runs/curve --proxies width=0.5 depth=1 width=0.707,resolution=160,data=0.1 -- \
        --model resnet18 --dataset torch/cifar10 --data-dir data --img-size 32 --policy dmcp --budget macs=0.5x \
        --search-epochs 10 --epochs 30

What stands behind `--` are flags of `timm-width search`. It searches directly and on each proxy, one folder each, trains what was
found and, beside the direct search, the uniform widths; under the same seeds. A folder that is there is gone on with: after a kill,
or when there is a proxy more, the same command does only what is left. The cosines are between the multipliers found directly and
those carried over.
"""
import argparse
import csv
import re
import sys
from pathlib import Path
from typing import Any

from timm_width import cli
from timm_width.extrapolation import saved
from timm_width.plots import plot_curve
from timm_width.report import write_table
from timm_width.transfer import compare, read_source

DIRECT = 'direct'


def run(folder: Path, proxy: str, flags: list[str]) -> dict[str, dict[str, Any]]:
    """Network -> its row of the final table, of one search."""
    if not (folder / 'summary.csv').is_file():
        begun = (folder / 'args.yaml').is_file()
        more = ['--resume', str(folder)] if begun else [
            *flags, '--proxy', proxy, '--output', str(folder), '--baselines', *([] if proxy else ['uniform'])]
        if code := cli.main(['search', *more]):
            sys.exit(code)
    with (folder / 'summary.csv').open() as file:
        return {row['network']: row for row in csv.DictReader(file)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--proxies', nargs='+', required=True)
    parser.add_argument('flags', nargs=argparse.REMAINDER)
    args = parser.parse_args()
    flags = [f for f in args.flags if f != '--']
    names = {'': DIRECT, **{proxy: re.sub(r'[^\w.]+', '-', proxy) for proxy in args.proxies}}
    tables = {proxy: run(args.output / name, proxy, flags) for proxy, name in names.items()}
    direct = tables['']['found']
    found = {proxy: read_source(str(args.output / name)) for proxy, name in names.items()}
    _, alike, _ = compare({proxy: source.found for proxy, source in found.items()}, found[''].found.space)
    rows = []
    for i, (proxy, table) in enumerate(tables.items()):
        row = table['found']
        rows.append({
            'proxy': proxy or DIRECT, 'search_macs': int(row['search_macs']), 'macs': int(row['macs']),
            'saved': round(saved(int(row['search_macs']), int(direct['search_macs'])), 4), 'cosine': round(alike[0][i], 4),
            'top1': float(row['top1']), 'top1_std': row['top1_std']})
    uniform = tables['']['uniform']
    rows.append({'proxy': 'uniform', 'search_macs': 0, 'macs': int(uniform['macs']), 'saved': '', 'cosine': round(alike[0][-1], 4),
                 'top1': float(uniform['top1']), 'top1_std': uniform['top1_std']})
    write_table(rows, args.output / 'curve.csv')
    points = [(r['saved'], r['top1'], float(r['top1_std'] or 0), r['proxy']) for r in rows[:-1]]
    plot_curve(points, float(direct['top1']), float(uniform['top1'])).savefig(args.output / 'curve.png', dpi=150, bbox_inches='tight')
    for r in rows:
        print(f"{r['proxy']:<40}{r['search_macs']:>12.4g} MACs{r['saved'] if r['saved'] == '' else format(r['saved'], '.1%'):>8}"
              f"{r['cosine']:>8.3f}{r['top1']:>8.2f}")
    print(args.output / 'curve.png')


if __name__ == '__main__':
    main()
