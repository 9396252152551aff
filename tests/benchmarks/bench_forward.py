"""A resized resnet50 next to the one that timm builds natively with `channels=`: the same modules, and the forward ratio.

    python tests/benchmarks/bench_forward.py [--repeats 30] [--threads 2]

Also prints what `import timm_width` adds to `import timm`, in fresh processes. Ratios and differences are of one run.
"""
import argparse
import statistics
import subprocess
import sys
import time

import timm
import torch

import timm_width

CHANNELS = (32, 64, 128, 256)


def resized() -> torch.nn.Module:
    """resnet50 with every block's inner width, and the stage outputs, at half."""
    model = timm.create_model('resnet50').eval()
    space = timm_width.trace(model)
    widths = {n: g.size // 2 for n, g in space.searchable.items() if n.startswith('layer')}
    return timm_width.resize(model, space, widths)


def seconds(model: torch.nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        model(x)
    return time.perf_counter() - start


def import_seconds(statement: str) -> float:
    code = f'import time; import timm; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)'
    return min(float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)
               for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=30)
    parser.add_argument('--threads', type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    a, b = resized(), timm.create_model('resnet50', channels=CHANNELS).eval()
    shapes = [[(n, t.shape, t.stride()) for n, t in m.state_dict().items()] for m in (a, b)]
    print('shapes and strides equal:', shapes[0] == shapes[1])
    print('modules equal:', repr(a) == repr(b))
    x = torch.randn(8, 3, 224, 224)
    pairs = [(seconds(a, x), seconds(b, x)) for _ in range(args.repeats)][3:]
    print(f'forward, resized over native: {statistics.median(p / q for p, q in pairs):.3f}')
    print(f'import timm_width adds {import_seconds("import timm_width"):.3f} s to import timm (best of 3)')


if __name__ == '__main__':
    main()
