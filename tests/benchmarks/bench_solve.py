"""Times what AOWS solves and draws before every iteration, next to a plain Python Viterbi and to the iteration's training.

    OMP_NUM_THREADS=2 python tests/benchmarks/bench_solve.py [--steps 2] [--batch 64] [--size 96]

MobileNet-v1 on its full grid (Table D.1: 14 groups of up to 14 widths), at half of its MACs; errors from a random policy state. Each
figure is the least of several repetitions. `first` is the bisection of a new solver, `next` its mean over 20 iterations, between which
the errors of one batch came in. Both give the answer of the plain bisection, gamma by gamma over nested lists, which is checked.
"""
import argparse
import time
from collections.abc import Callable

import numpy as np
import timm
import torch

from timm_width.budget import Budget
from timm_width.conformance import PolicyConformance
from timm_width.engine import Step, Training
from timm_width.factors import Factors
from timm_width.grids import make_grid
from timm_width.policies.aows import AOWS
from timm_width.resize import resize
from timm_width.solve import FIRST, LIMIT, exact
from timm_width.trace import meta_copy, trace

MODEL = 'mobilenetv1_100'


def plain(errors: Factors, cost: Factors, limit: int) -> tuple[dict[str, int], float, int]:
    """The published bisection with a Viterbi algorithm of nested loops over lists: widths, gamma, and the number of passes."""
    names = list(cost.grid)
    scale = LIMIT / limit
    unary = [errors.unary[g].tolist() for g in names]
    single = [(cost.unary[g] * scale).tolist() if g in cost.unary else [0.] * len(cost.grid[g]) for g in names]
    pairs = [(cost.pairwise[pair] * scale).tolist() for pair in zip(names, names[1:])]
    room = (limit - cost.constant) * scale

    def viterbi(gamma: float) -> tuple[list[int], float]:
        best, back = [u + gamma * c for u, c in zip(unary[0], single[0])], []
        for i in range(1, len(names)):
            table, found, pointers = pairs[i - 1], [], []
            for k in range(len(unary[i])):
                least, at = float('inf'), 0
                for j in range(len(best)):
                    value = best[j] + gamma * table[j][k]
                    if value < least:
                        least, at = value, j
                found.append(least + unary[i][k] + gamma * single[i][k])
                pointers.append(at)
            best = found
            back.append(pointers)
        path = [best.index(min(best))]
        for pointers in reversed(back):
            path.append(pointers[path[-1]])
        path.reverse()
        return path, sum(single[i][k] for i, k in enumerate(path)) + sum(
            pairs[i][path[i]][path[i + 1]] for i in range(len(pairs)))

    low, high, passes = 0., FIRST, 1
    path, spent = viterbi(high)
    while spent > room:
        high, passes = 2 * high, passes + 1
        path, spent = viterbi(high)
    for _ in range(12):
        middle, passes = (low + high) / 2, passes + 1
        found, spent = viterbi(middle)
        if spent > room:
            low = middle
        else:
            high, path = middle, found
    return {g: cost.grid[g][k] for g, k in zip(names, path)}, high * scale, passes


def least(run: Callable[[], object], repeats: int = 7, times: int = 20) -> float:
    """Seconds of one call, the least over repeats."""
    run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(times):
            run()
        found.append((time.perf_counter() - start) / times)
    return min(found)


def training_step(policy: AOWS, size: int, batch: int, steps: int) -> float:
    """Seconds of one iteration's forward and backward passes and its update, the least of several."""
    model = resize(timm.create_model(MODEL), policy.space, policy.largest)
    space = trace(model, (3, size, size))
    args = PolicyConformance.arguments()
    args.num_classes = 1000
    images = [(torch.randn(batch, 3, size, size), torch.randint(1000, (batch,)))] * (steps + 1)
    seconds = []

    def train_step(step: Step) -> None:
        seconds.append(time.perf_counter())
        policy.train_step(step)

    network = policy.prepare(model, space)
    Training(network, torch.utils.data.DataLoader(images, batch_size=None), args, 1, train_step=train_step).run()
    seconds.append(time.perf_counter())
    return min(np.diff(seconds)[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=2, help='training steps to time')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--size', type=int, default=96)
    own = parser.parse_args()
    space = trace(meta_copy(timm.create_model(MODEL)), (3, own.size, own.size))
    budget, grid = Budget.parse('macs=0.5x', space), make_grid(space, 'aows')
    policy, rng = AOWS(space, [budget], grid), np.random.default_rng(0)
    worth = rng.exponential(0.1, (len(grid), 1))

    def paths() -> np.ndarray:
        return np.stack([rng.integers(len(w), size=own.batch) for w in grid.values()])

    def see() -> None:
        drawn = paths()
        ratios = np.stack([np.array(w)[p] / w[-1] for p, w in zip(drawn, grid.values())])
        policy.estimates.add(drawn, (worth * np.exp(-3 * ratios)).mean(0) + 0.02 * rng.standard_normal(own.batch))

    for _ in range(200):
        see()
    limited = policy.limits()[0]
    several = [policy.errors()]  # as before one iteration after the other
    for _ in range(20):
        see()
        several.append(policy.errors())
    errors = several[-1]
    answer = limited.lagrangian.solve(errors)
    widths, gamma, passes = plain(errors, limited.cost, budget.limit)
    if answer.widths != widths or abs(answer.gamma / gamma - 1) > 1e-12 or [limited.lagrangian.solve(e) for e in several][-1] != answer:
        raise AssertionError('the answers differ')
    slow = least(lambda: plain(errors, limited.cost, budget.limit), times=5)

    def first() -> None:
        limited.lagrangian._last = None
        limited.lagrangian.solve(errors)

    def following() -> None:
        for e in several:
            limited.lagrangian.solve(e)

    times = {'bisection, first': least(first), 'bisection, next': least(following, times=2) / len(several)}
    print(f'{MODEL}, {len(grid)} groups, {sum(map(len, grid.values()))} widths, {passes} multipliers\n')
    print(f"{'':<34}{'us':>10}{'times':>8}\n{'bisection, plain Python Viterbi':<34}{1e6 * slow:>10.0f}{1:>8.1f}")
    for name, seconds in times.items():
        print(f'{name:<34}{1e6 * seconds:>10.0f}{slow / seconds:>8.1f}')
    closed = exact(errors, limited.cost, budget.limit)
    print(f"{'exact (MILP)':<34}{1e6 * least(lambda: exact(errors, limited.cost, budget.limit), 2, 1):>10.0f}   duality gap of the "
          f'bisection: {answer.objective - closed.objective:.2g} of {closed.objective:.3g}; bound {answer.gap:.2g}')
    print()
    total = {}
    for sampling in ('marginal', 'joint'):
        policy.options = AOWS.Options(sampling=sampling)
        total[sampling] = least(lambda: policy.gibbs(0, 1e-3, rng, own.batch))
        print(f"{f'iteration: errors, solve, {sampling}':<34}{1e6 * total[sampling]:>10.0f}")
    drawn = paths()
    print(f"{'iteration: taking note of errors':<34}{1e6 * least(lambda: policy.estimates.add(drawn, rng.standard_normal(own.batch))):>10.0f}")
    if not own.steps:
        return
    step = training_step(policy, own.size, own.batch, own.steps)
    print(f"{f'training step, {own.batch} images, {own.size} px':<34}{1e6 * step:>10.0f}   {torch.get_num_threads()} threads")
    print(f"\nsolve and sampling are {100 * max(total.values()) / step:.3f} % of a training step, bar 1 %")


if __name__ == '__main__':
    main()
