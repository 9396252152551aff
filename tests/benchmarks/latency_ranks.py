"""Holds a latency model against networks of nearly equal MACs, which it has not seen, exported afresh and timed side by side.

    timm-width latency measure mobilenetv1_100 --grid aows --backend onnxruntime --threads 1 --img-size 128 --out mbv1.json
    python tests/benchmarks/latency_ranks.py mbv1.json [--networks 20] [--ratio 0.5]

Draws random widths of the model's grid whose MACs are within 2 % of a share of the base's, and times the resized models by the
backend of the latency model: as files of their own (torch.onnx), not cut from another. MACs can say next to nothing about these; the
rank correlation is of what the latency model predicts with what was measured. Prints also how the base does.
"""
import argparse
import copy

import numpy as np
import timm
from scipy.stats import spearmanr

from timm_width import Macs, resize, trace
from timm_width.latency import measure_many
from timm_width.latency.model import LatencyModel, space_fingerprint

BAND = 0.02


def draw(macs: Macs, grid: dict, limit: float, count: int, rng: np.random.Generator) -> list[dict[str, int]]:
    """Random widths whose MACs are within BAND of a limit."""
    found = []
    while len(found) < count:
        tilt = rng.uniform(-1, 1, len(grid))
        for level in np.linspace(-1.5, 1.5, 61):  # tilted towards narrow or wide, until the MACs fit
            p = np.clip((np.tanh(level + tilt) + 1) / 2 + rng.normal(0, 0.1, len(grid)), 0, 1)
            widths = {n: w[round(q * (len(w) - 1))] for (n, w), q in zip(grid.items(), p)}
            if abs(macs(widths) / limit - 1) < BAND:
                found.append(widths)
                break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='a latency model')
    parser.add_argument('--networks', type=int, default=20)
    parser.add_argument('--ratio', type=float, default=0.5, help="share of the base's MACs")
    parser.add_argument('--num-classes', type=int, default=1000)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    known = LatencyModel.load(args.model)
    base = timm.create_model(known.architecture, num_classes=args.num_classes, exportable=True).eval()
    space = trace(timm.create_model(known.architecture, num_classes=args.num_classes), known.input_size)
    if space_fingerprint(space) != known.space:
        raise SystemExit('the latency model is of another network: check --num-classes')
    cost, macs = known.cost(space), Macs(space)
    rng = np.random.default_rng(args.seed)
    networks = {str(i): w for i, w in enumerate(draw(macs, known.tables.grid, args.ratio * macs(), args.networks, rng))}
    networks['base'] = {}
    modules = {name: resize(copy.deepcopy(base), space, widths) for name, widths in networks.items()}
    told = known.backend
    found = measure_many(modules, known.input_size, told['backend'], known.precision, known.batch, threads=told.get('threads'))
    measured = np.array([found[n].ms for n in networks if n != 'base'])
    predicted = np.array([cost(w) for n, w in networks.items() if n != 'base'])
    counts = np.array([macs(w) for n, w in networks.items() if n != 'base'])
    error = predicted / measured - 1
    print(f'{known}')
    print(f"{args.networks} networks of {counts.min() / 1e6:.2f} to {counts.max() / 1e6:.2f}M MACs, {measured.min():.3f} to {measured.max():.3f} ms, "
          f"spread {np.median([found[n].spread for n in networks]):.1%}, disturbed {sum(found[n].disturbed for n in networks)}")
    print(f'rank correlation with what was measured: predicted {spearmanr(predicted, measured).statistic:.3f}, '
          f'MACs {spearmanr(counts, measured).statistic:.3f}; predicted / measured - 1: mean {error.mean():+.1%}, '
          f'standard deviation {error.std():.1%}; base predicted {cost():.3f}, measured {found["base"].ms:.3f} ms')


if __name__ == '__main__':
    main()
