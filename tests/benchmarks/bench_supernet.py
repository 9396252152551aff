"""Times a training step of the supernet against that of the model resized to the same widths.

    python tests/benchmarks/bench_supernet.py [--models resnet18:64 mobilenetv2_100:96] [--steps 30] [--threads 2]

A step is forward, backward and SGD with momentum. Columns: the resized model's step; the supernet's; their ratio; and the ratio
to the resized model's step plus an optimiser step over the parameters of the whole model, which any shared weights have to pay.
The three are timed in turn, round by round, so that whatever else runs on the machine slows all of them; figures are medians of
the rounds. On a machine that is busy otherwise, `--clock cpu --threads 1` counts the time that the process itself runs.
"""
import argparse
import copy
import statistics
import time
from typing import Callable

import timm
import torch
import torch.nn.functional as F

from timm_width.resize import resize
from timm_width.supernet import Supernet
from timm_width.trace import trace

RATIOS = (0.25, 0.5, 0.75, 1.0)
WARMUP = 3


def optimiser(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def training_step(run: Callable, optim: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    def step():
        optim.zero_grad()
        F.cross_entropy(run(x), y).backward()
        optim.step()
    return step


def optimiser_step(model: torch.nn.Module) -> Callable[[], None]:
    optim = optimiser(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return optim.step


def seconds(step: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    step()
    return clock() - start


def measure(name: str, size: int, batch: int, steps: int, ratio: float, clock: Callable[[], float]) -> list[tuple[float, ...]]:
    """Returns, for each round, seconds of the resized model's step, of the supernet's, and of the whole model's optimiser's."""
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    space = trace(model, (3, size, size))
    widths = space.scaled(ratio)
    x, y = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    small = resize(copy.deepcopy(model), space, widths)
    net = Supernet(model, space)
    candidates = [
        training_step(small, optimiser(small), x, y),
        training_step(lambda images: net(images, widths), optimiser(model), x, y),
    ]
    whole = optimiser_step(copy.deepcopy(model))
    rounds = []
    for k in range(WARMUP + steps):
        took, optim = [0.0, 0.0], 0.0
        for i in (0, 1) if k % 2 else (1, 0):
            optim += seconds(whole, clock) / 2  # before each of the two, so that both find the memory in the same state
            took[i] = seconds(candidates[i], clock)
        rounds.append((*took, optim))
    return rounds[WARMUP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet18:64', 'mobilenetv2_100:96'], help='name:image size')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--steps', type=int, default=30)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--clock', choices=['wall', 'cpu'], default='wall')
    args = parser.parse_args()
    clock = time.perf_counter if args.clock == 'wall' else time.process_time
    torch.set_num_threads(args.threads)
    row = '{:<24} {:>6} {:>11} {:>12} {:>7} {:>16}'
    print(row.format('model', 'widths', 'resized ms', 'supernet ms', 'ratio', 'ratio, optimiser'))
    for entry in args.models:
        name, _, size = entry.partition(':')
        for ratio in RATIOS:
            rounds = measure(name, int(size or 224), args.batch, args.steps, ratio, clock)
            small, whole, plain, fair = (statistics.median(column) for column in zip(
                *((1e3 * s, 1e3 * w, w / s, w / (s + o)) for s, w, o in rounds)))
            figures = f'{ratio:.2f}', f'{small:.1f}', f'{whole:.1f}', f'{plain:.2f}', f'{fair:.2f}'
            print(row.format(f'{name} {size} px', *figures), flush=True)


if __name__ == '__main__':
    main()
