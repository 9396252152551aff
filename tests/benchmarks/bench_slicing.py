"""Seconds per configuration of slicing an ONNX file, next to torch.onnx.export of the resized model.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_slicing.py [--model mobilenetv1_100] [--grid aows] [--img-size 224] [--exports 5]

Both give the bytes of a file that can be run: slicing cuts and serialises, the export is the call of torch.onnx.export(dynamo=True)
alone, on a model that is resized already. Widths are drawn uniformly from the grid, the same for both; medians are compared.
"""
import argparse
import copy
import statistics
import sys
import time

import numpy as np
import timm
import torch

from timm_width.grids import make_grid, squeezes
from timm_width.latency.onnx_graph import settle
from timm_width.latency.onnx_recipe import find_recipe
from timm_width.latency.runner.onnx_widths import SlicedModel
from timm_width.resize import resize
from timm_width.trace import trace

BAR = 100


def main() -> int:
    """Prints both times and their ratio; the exit code is 1 below the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--model', default='mobilenetv1_100')
    parser.add_argument('--grid', default='aows')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--exports', type=int, default=5)
    parser.add_argument('--slices', type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(0)
    size = (3, args.img_size, args.img_size)
    model = timm.create_model(args.model, exportable=True).eval()
    space = trace(model, size)
    grid = make_grid(space, args.grid, squeezes=squeezes(model, space))
    largest = resize(model, space, {n: w[-1] for n, w in grid.items()})
    images = torch.randn(1, *size)
    settle(largest, images)
    space = trace(largest, size)
    start = time.perf_counter()
    file, recipe = find_recipe(largest, space, grid, images)
    probing = time.perf_counter() - start
    start = time.perf_counter()
    sliced = SlicedModel(file, recipe)
    opening = time.perf_counter() - start
    rng = np.random.default_rng(0)
    draws = [{n: int(rng.choice(w)) for n, w in grid.items()} for _ in range(args.slices)]
    slicing, sizes = [], []
    for widths in draws:
        start = time.perf_counter()
        sizes.append(len(sliced.at(widths)))
        slicing.append(time.perf_counter() - start)
    exporting = []
    for widths in draws[:args.exports]:
        resized = resize(copy.deepcopy(largest), space, widths)
        start = time.perf_counter()
        torch.onnx.export(resized, (images,), dynamo=True, verbose=False)
        exporting.append(time.perf_counter() - start)
    a, b = statistics.median(slicing), statistics.median(exporting)
    print(f'{args.model}, {args.grid}, {args.img_size} px: export {b:.2f} s, slice {1000 * a:.2f} ms ({statistics.median(sizes) / 1e6:.1f} MB; '
          f'slowest {1000 * max(slicing):.1f} ms), {b / a:.0f} times faster (bar {BAR}); once: probing {probing:.1f} s, opening {1000 * opening:.0f} ms')
    return int(b / a < BAR)


if __name__ == '__main__':
    sys.exit(main())
