"""Seconds that a trace takes, its checks included, over the smallest model of every conv family, next to Torch-Pruning.

    pip install torch-pruning    # for this comparison only
    python tests/benchmarks/bench_trace.py [--repeats 3] [--limit 20]

Torch-Pruning's time is that of building its DependencyGraph, enumerating all groups and pruning half of each group's channels
(its defaults, the classifier ignored); a model that it fails on or does not finish within --limit seconds counts as failed, and
ratios are over the models that it does finish. Both run in this process, one after the other, on one thread.
"""
import argparse
import signal
import statistics
import time
import warnings

import timm
import torch

import timm_width
from tests.families import smallest_of_each_family


class Late(Exception):
    """Torch-Pruning took too long."""


def torch_pruning_seconds(model: torch.nn.Module, size: tuple, limit: int) -> float:
    """Seconds of group finding and pruning with Torch-Pruning's defaults."""
    import torch_pruning as tp

    def late(*args):
        raise Late

    signal.signal(signal.SIGALRM, late)
    signal.alarm(limit)
    try:
        start = time.perf_counter()
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=torch.randn(1, *size))
        ignored = [model.get_classifier()]
        for group in list(graph.get_all_groups(ignored_layers=ignored)):
            channels = len(group[0].idxs)
            again = graph.get_pruning_group(group[0].dep.target.module, group[0].dep.handler, list(range(channels // 2)))
            if graph.check_pruning_group(again):
                again.prune()
        return time.perf_counter() - start
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--limit', type=int, default=20, help='seconds for Torch-Pruning on one model')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    try:
        import torch_pruning
        other = torch_pruning.__version__
    except ImportError:
        other = None
    ours, theirs, both = [], [], []
    print(f'{"model":26} {"trace":>8} {"Torch-Pruning":>14}')
    for name in smallest_of_each_family().values():
        model = timm.create_model(name).eval()
        size = model.pretrained_cfg['input_size']
        timm_width.trace(model)
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            timm_width.trace(model)
            seconds.append(time.perf_counter() - start)
        ours.append(statistics.median(seconds))
        text = '-'
        if other:
            try:
                taken = torch_pruning_seconds(model, size, args.limit)
                theirs.append(taken)
                both.append((ours[-1], taken))
                text = f'{taken:.3f}'
            except Late:
                text = f'> {args.limit}'
            except Exception as e:
                text = type(e).__name__
        print(f'{name:26} {ours[-1]:8.3f} {text:>14}', flush=True)
    print(f'\n{len(ours)} models: median {statistics.median(ours):.3f} s, largest {max(ours):.3f} s')
    if both:
        a, b = statistics.median(x for x, _ in both), statistics.median(y for _, y in both)
        print(f'Torch-Pruning {other} finishes {len(both)}: median {b:.3f} s there, ours {a:.3f} s, ratio {b / a:.2f}')


if __name__ == '__main__':
    main()
