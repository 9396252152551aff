"""The five laws over the smallest model of every conv family, as one table.

    python -m tests.benchmarks.laws_table [--pattern 'res*'] [--large 40]

0 commutation: faults at half, 1.5x and random widths. 1 permutation: largest relative change of the output in float64, on the
base and at random widths. 2 slicing: whether the supernet equals the resized model bit for bit. 3 cost: whether MACs and
parameters equal those counted. 4 rebuilding: whether the saved folder gives equal logits (in this process; tests/test_config.py
does it in a fresh one). Models above --large million parameters skip what computes with weights.
"""
import argparse
import copy
import fnmatch
import statistics
import tempfile
import time
import warnings

import timm
import torch

import timm_width
from tests.families import SHRINKABLE, smallest_of_each_family
from timm_width.laws import (
    commutation_faults,
    cost_faults,
    permutation_error,
    random_widths,
    randomise,
    randomised_output,
)


def laws(name: str, large: float) -> dict:
    """One row of the table."""
    with torch.device('meta'):
        meta = timm.create_model(name).eval()
    space = timm_width.trace(meta)
    tries = [space.scaled(0.5), space.scaled(1.5), random_widths(space, 1)]
    row = {
        'model': name, 'share': space.searchable_share, 'half': space.half_macs,
        '0': sum(len(commutation_faults(meta, space, w)) for w in tries),
        '3': sum(len(cost_faults(meta, space, w)) for w in tries), '1': None, '2': None, '4': None}
    if sum(p.numel() for p in meta.parameters()) > large * 1e6:
        return row
    torch.manual_seed(0)
    model = randomise(timm.create_model(name).eval())
    size = space.input_size
    try:
        small = timm_width.trace(model, (size[0], SHRINKABLE, SHRINKABLE))
    except timm_width.TraceError:  # one resolution only
        small = timm_width.trace(model, size)
    narrow = random_widths(small, 2, 0.3, 1.0)
    resized = timm_width.resize(copy.deepcopy(model), small, narrow)
    x = torch.randn(2, *small.input_size)
    with torch.no_grad():
        net = timm_width.Supernet(model, small)
        a, b = net(x, narrow), resized(x)
        a, b = (a, b) if isinstance(a, torch.Tensor) else (a[0], b[0])
        row['2'] = torch.equal(a, b)
    with tempfile.TemporaryDirectory() as folder:
        timm_width.save(resized, folder)
        rebuilt = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    row['4'] = torch.equal(*(randomised_output(m, small.input_size) for m in (resized, rebuilt)))
    double = resized.double()
    row['1'] = max(permutation_error(model.double(), small),
                   permutation_error(double, timm_width.trace(double, small.input_size)))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pattern', default='*')
    parser.add_argument('--large', type=float, default=40, metavar='M')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    rows, start = [], time.time()
    print(f'{"family":18} {"model":26} {"share":>6} {"half":>6}  0  {"1":>8} {"2":>5}  3 {"4":>5}')
    for family, name in smallest_of_each_family().items():
        if not fnmatch.fnmatch(name, args.pattern):
            continue
        r = laws(name, args.large)
        rows.append(r)
        error = '-' if r['1'] is None else f'{r["1"]:.0e}'
        print(f'{family:18} {name:26} {r["share"]:6.4f} {r["half"]:6.3f} {r["0"]:2} {error:>9} '
              f'{str(r["2"] if r["2"] is not None else "-"):>5} {r["3"]:2} {str(r["4"] if r["4"] is not None else "-"):>5}', flush=True)
    pure = [r for r in rows if timm_width.supported()[r['model']]['pure']]
    print(f'\n{len(rows)} families in {time.time() - start:.0f} s; mean share {statistics.mean(r["share"] for r in rows):.4f}')
    if pure:
        print(f'{len(pure)} pure: mean share {statistics.mean(r["share"] for r in pure):.4f}, half_macs median '
              f'{statistics.median(r["half"] for r in pure):.3f}, largest {max(r["half"] for r in pure):.3f}')


if __name__ == '__main__':
    main()
