"""What CafeNet's assignments cost: a training step, and the score of a width, at r = 1 and 2 over r = 0.

    python tests/benchmarks/bench_cafenet.py [--model mobilenetv2_100] [--size 32] [--batch 64] [--rounds 20] [--device cuda]

A step is what the policy does with a batch, and SGD with momentum; `held` keeps the winner's forward pass (the default), `again` runs
it a second time, as the paper says. A score is of a network of the grid on --batches batches, each after a recalibration on as many.
All variants take turns, on the same widths and images of each round; figures are medians of the ratios of a round.
Bars, for k = 3 and 10 candidates: (3 + k) / 3 and 5 %, 2.10 and 4.55; for a score at r = 1, 3.15.
"""
import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import timm
import torch
from torch.nn import functional as F
from tqdm import tqdm

from timm_width.budget import Budget
from timm_width.factors import random_widths
from timm_width.grids import make_grid, squeezes
from timm_width.holdout import Holdout, Journal
from timm_width.policies import load
from timm_width.trace import meta_copy, trace

BARS = {(1, True): 2.10, (2, True): 4.55, (1, False): 2.10, (2, False): 4.55}
SCORE_BAR = 3.15
WARMUP = 3


class Step:
    """A batch, as a train_step sees it."""

    progress = 0.

    def __init__(self, network, images, targets, seed):
        self.network, self.images, self.targets, self.rng = network, images, targets, np.random.default_rng(seed)

    def forward(self, *args, **kwargs):
        return self.network(self.images, *args, **kwargs)

    def loss(self, logits):
        return F.cross_entropy(logits, self.targets)

    def backward(self, loss):
        loss.backward()

    def gather(self, tensor):
        return tensor


def clock_of(device: str, kind: str) -> Callable[[], float]:
    def now() -> float:
        if device != 'cpu':
            torch.cuda.synchronize()
        return time.perf_counter() if kind == 'wall' else time.process_time()
    return now


def ratios(times: dict) -> dict:
    """Medians over the rounds of each variant's time over that of the first."""
    first = next(iter(times))
    return {k: (statistics.median(t), statistics.median(a / b for a, b in zip(t, times[first]))) for k, t in times.items()}


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='mobilenetv2_100')
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--batches', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--clock', choices=['wall', 'cpu'], default='wall')
    args = parser.parse_args()
    now, rng = clock_of(args.device, args.clock), torch.Generator().manual_seed(0)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(args.batch, 3, args.size, args.size, generator=rng)
        return x.to(args.device), torch.randint(10, (args.batch,), generator=rng).to(args.device)

    model = timm.create_model(args.model, num_classes=10)
    space = trace(meta_copy(model), (3, args.size, args.size))
    grid = make_grid(space, 'flops', squeezes=squeezes(model, space))
    budgets = [Budget.parse('macs=0.5x', space)]
    policy = load('cafenet')
    variants = {key: policy(space, budgets, grid, policy.Options(r=key[0], reuse=key[1])) for key in ((0, True), *BARS)}
    network = policy(space, budgets, grid).prepare(model.to(args.device), space).train()
    for v in variants.values():
        v.network = network
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    steps = {key: [] for key in variants}
    for i in range(args.rounds + WARMUP):
        x, y = batch()
        for key in list(variants)[::-1 if i % 2 else 1]:
            start = now()
            optimizer.zero_grad()
            variants[key].train_step(Step(network, x, y, i))
            optimizer.step()
            if i >= WARMUP:
                steps[key].append(now() - start)

    flags = SimpleNamespace(device=args.device, amp=False, amp_dtype='float16', channels_last=False, seed=0)
    held, training = ([batch() for _ in range(args.batches)] for _ in range(2))
    scores = {r: [] for r in (0, 1, 2)}
    with TemporaryDirectory() as folder:

        evaluate = Holdout(flags, network, training, held, None, Journal(Path(folder) / 'scores.jsonl', flags), tqdm(disable=True))
        for i in range(args.rounds // 2 + WARMUP):
            widths = random_widths(grid, np.random.default_rng(i))
            for r in sorted(scores, reverse=bool(i % 2)):
                evaluate.journal.known.clear()
                candidates = variants[r, True].candidates(widths, np.random.default_rng(i))
                start = now()
                for c in candidates:
                    evaluate(c, statistics='recalibrated')
                if i >= WARMUP:
                    scores[r].append(now() - start)

    print(f'{args.model} at {args.size} pixels, batch {args.batch}, {args.device}, {args.clock} clock, {args.rounds} rounds, '
          f'{torch.get_num_threads()} threads')
    fine = True
    for (r, reuse), (seconds, ratio) in ratios(steps).items():
        bar = BARS.get((r, reuse))
        fine &= bar is None or ratio <= bar
        print(f"step, r = {r}{'' if r == 0 else ', held ' if reuse else ', again'}{1e3 * seconds:>10.1f} ms{ratio:>8.2f}" + (
            f'   bar {bar:.2f}' if bar else ''))
    for r, (seconds, ratio) in ratios(scores).items():
        fine &= r != 1 or ratio <= SCORE_BAR
        print(f'score, r = {r}{1e3 * seconds:>16.1f} ms{ratio:>8.2f}' + (f'   bar {SCORE_BAR:.2f}' if r == 1 else ''))
    if args.device != 'cpu':
        print(f'peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB')
    return fine


if __name__ == '__main__':
    sys.exit(not main())
