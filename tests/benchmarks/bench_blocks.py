"""How long a latency table of all of PRUNET's search space takes: `python tests/benchmarks/bench_blocks.py --threads 1`.

Of each stage of Table 1, some kinds of blocks are exported, as `timm-width latency measure prunet --blocks` does, and some of
their widths measured by ONNX Runtime on the CPU. What the whole takes is an estimate from that: each stage's mean, times its number
of kinds and entries.
"""
import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from timm_width.latency.block_bundle import BLOCK_SAMPLES
from timm_width.latency.bundle import Order, write_networks
from timm_width.latency.onnx_graph import settle
from timm_width.latency.plan import make_plan
from timm_width.latency.runner.backends import open_backend
from timm_width.latency.runner.main import REFERENCE
from timm_width.latency.runner.onnx_widths import SlicedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--img-size', type=int, default=288)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--kinds', type=int, default=1, help='of each stage')
    parser.add_argument('--entries', type=int, default=6, help='of each kind')
    parser.add_argument('--knots', type=int, help='widths of each block')
    args = parser.parse_args()
    start = time.perf_counter()
    order = Order('prunet', grid='', blocks=[], knots=args.knots, img_size=args.img_size)
    plan = make_plan(order, 1, exportable=True)
    table = sum(len(t['configurations']) for t in plan.tables)
    print(f'planned in {time.perf_counter() - start:.0f} s: {len(plan.tables)} blocks with {table} entries, of which '
          f'{len(plan.configurations) - 2} of {len(plan.parts) - 2} kinds are measured (others are alike); then whole networks')
    backend, rng = open_backend('onnxruntime', threads=args.threads), np.random.default_rng(0)
    stage_of = {i: p.name.split('.')[1] if p.name != 'network' else p.name for i, p in enumerate(plan.parts)}
    kinds, entries = Counter(stage_of.values()), Counter(stage_of[part] for _, part, _ in plan.configurations)
    exporting, measuring = {}, {}
    for stage in kinds:
        parts = [i for i, s in stage_of.items() if s == stage]
        exported, cut, loaded, timed, ms, attempts = [], [], [], [], [], []
        for i in parts[:1] if stage == 'network' else rng.permutation(parts)[:args.kinds]:
            part = plan.parts[i]
            begin = time.perf_counter()
            with tempfile.TemporaryDirectory() as name:
                module, images = part.make({}), torch.randn(1, *part.input_size)
                settle(module, images)
                recipe, files, _ = write_networks(order, module, part.space, part.grid, plan.rows_of(i), images, Path(name), 'p')
                file = (Path(name) / files[0]['file']).read_bytes()
            exported.append(time.perf_counter() - begin)
            sliced, rows = SlicedModel(file, recipe) if recipe else None, plan.rows_of(i)
            for k in rng.permutation(len(rows))[:args.entries]:
                begin = time.perf_counter()
                model = sliced.at(rows[k][1]) if sliced else file
                cut.append(time.perf_counter() - begin)
                found = backend.measure(model, 1, **backend.brief)
                timed.append(time.perf_counter() - begin)
                begin = time.perf_counter()
                with backend.prepare(model, 1):
                    loaded.append(time.perf_counter() - begin)
                ms.append(found.ms)
                attempts.append(found.attempts)
        exporting[stage], measuring[stage] = np.mean(exported), np.mean(timed)
        print(f'{stage:>8}: {kinds[stage]:3} kinds, {entries[stage]:4} entries; export {np.mean(exported):.1f} s a kind; {len(ms)} '
              f'measured: {np.mean(ms):.2f} ms, {np.mean(timed):.2f} s each ({1000 * np.mean(cut):.1f} ms cut, '
              f'{1000 * np.mean(loaded):.0f} ms load and first run, {np.mean(attempts):.1f} attempts)', flush=True)
    blocks = [stage for stage in kinds if stage != 'network']
    count = sum(entries[s] for s in blocks)
    seconds = sum(entries[s] * measuring[s] for s in blocks)
    writing = sum(kinds[s] * exporting[s] for s in blocks) + (BLOCK_SAMPLES + 1) * exporting['network']
    others = (BLOCK_SAMPLES + 1 + count // REFERENCE) * measuring['network']
    print(f'{count / seconds:.2f} entries measured per second, or {table / seconds:.2f} of the table\n'
          f'estimate for the whole: {seconds / 60:.0f} min for {count} entries, {others / 60:.0f} min for whole networks (one every '
          f'{REFERENCE} entries shows how the machine drifts), {writing / 60:.0f} min to export; '
          f'{(seconds + others + writing) / 60:.0f} min in all')


if __name__ == '__main__':
    main()
