"""What Prunode costs: a block by its number of possible widths, and an epoch of a search as blocks go.

    python tests/benchmarks/bench_prunode.py [--rounds 15] [--epochs 14] [--size 64] [--batch 16] [--device cuda] [--only block]

`block`: a training step (forward, backward, SGD) of one inverted residual block of 1,792 hidden channels with squeeze-and-excitation,
plain and as a prunode of 4, 32 and 448 widths; a step of the architecture, too. All take turns; ratios are medians of the rounds'.
Peak memory of a step is what lives at once beyond what lives before it: on a GPU what its allocator says, on a CPU the storages of all
tensors that operations give (a dispatch mode counts them, and weak references their ends; what operations need inside is not counted);
`saved` is what the forward pass keeps for the backward pass (saved_tensors_hooks, each storage once, without parameters).
`curve`: epochs (four batches for the weights, one for the architecture) of a reduced supernet of Table 1 with all of its blocks, and
with ever fewer of them, drawn at random; all take turns.
`table3`: searches by the rows of Table 3, each --epochs long with the paper's schedule, on random images: what every epoch takes.
Times are of the processor's clock, or of the wall's on a GPU. Bars: 5 % between numbers of widths, 2.2x a plain block, 0.6x.
"""
import argparse
import statistics
import sys
import time
import weakref
from collections.abc import Callable

import numpy as np
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_width.budget import Budget
from timm_width.mixture import Prunode as Block
from timm_width.models import gpunet
from timm_width.policies import load
from timm_width.twins import trace_twin, twin_grid

LEVELS = (4, 32, 448)
CHANNELS, MAP = 224, 9
SAME, TWICE, HALF = 1.05, 2.2, 0.6
WARMUP = 2
ROWS = {  # of Table 3: space, options
    'FBNet': ('fbnet', {'widths': False, 'threshold': 'none', 'skip': 'candidate'}),
    '1st opt (prunodes)': ('table1', {'threshold': 'none', 'skip': 'candidate'}),
    '2nd opt (blocks go)': ('fbnet', {'widths': False, 't_initial': 0.11, 'skip': 'candidate'}),
    '3rd opt (late skips)': ('fbnet', {'widths': False, 'threshold': 'none', 'skip': 'late'}),
    'all': ('table1', {}),
}


class Step:
    """A batch, as a train_step sees it."""
    last = True

    def __init__(self, network, images, targets, epoch=1, epochs=2, progress=0.5, architecture=False, seed=0):
        self.network, self.images, self.targets, self.rng = network, images, targets, np.random.default_rng(seed)
        self.epoch, self.epochs, self.progress, self.for_architecture = epoch, epochs, progress, architecture

    def forward(self):
        return self.network(self.images)

    def loss(self, logits):
        return F.cross_entropy(logits, self.targets)

    def backward(self, loss):
        loss.backward()

    def gather(self, tensor):
        return tensor


def clock_of(device: str) -> Callable[[], float]:
    def now() -> float:
        if device == 'cpu':
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()
    return now


def saved(run: Callable[[], torch.Tensor], parameters) -> int:
    """Bytes that a forward pass keeps for its backward pass, but for parameters."""
    own, found = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            found[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    del out
    return sum(found.values())


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operations have made and that live; and the most of them."""

    def __init__(self):
        super().__init__()
        self.bytes, self.most, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (s := t.untyped_storage()).data_ptr() not in before and s not in self.known:
                self.known.add(s)
                self.bytes += s.nbytes()
                weakref.finalize(s, self.release, s.nbytes())
        self.most = max(self.most, self.bytes)
        return out

    def release(self, count: int) -> None:
        self.bytes -= count


def peak(step: Callable[[], None], device: str) -> int:
    """Bytes that live at once in a step, beyond what lives before it."""
    if device != 'cpu':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with Live() as live:
        step()
    return live.most


def blocks(args: argparse.Namespace) -> bool:
    """A plain block, and prunodes of the same one."""
    now, hidden = clock_of(args.device), 8 * CHANNELS

    def block() -> nn.Module:
        torch.manual_seed(0)
        return gpunet.Block('irb', CHANNELS, CHANNELS, 1, 3, hidden, True, 'relu').module(norm_layer=nn.BatchNorm2d).to(args.device)

    nets = {'plain': block()}
    for n in LEVELS:
        widths = [{'g': hidden * (i + 1) // n} for i in range(n)]
        nets[n] = Block(block(), widths, {'bn1': [('g', 1, hidden, 1)], 'bn2': [('g', 1, hidden, 1)]})
        nets[n].masks.small, nets[n].masks.large = n // 2, n - 1
    x = torch.randn(args.batch, CHANNELS, MAP, MAP, device=args.device)
    optimizers = {k: torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9) for k, net in nets.items()}

    def weights(key) -> None:
        optimizers[key].zero_grad()
        nets[key](x).square().mean().backward()
        optimizers[key].step()

    def architecture(key) -> None:
        net = nets[key]
        share = torch.tensor(0., requires_grad=True)
        net.shares = torch.stack([torch.sigmoid(-share), torch.sigmoid(share)]).to(x.device)
        torch.autograd.grad(net(x).square().mean(), share)
        net.shares = None

    times: dict = {}
    for i in range(args.rounds + WARMUP):
        for key in list(nets)[::-1 if i % 2 else 1]:
            for name, step in ('weights', weights), ('architecture', architecture):
                if key == 'plain' and name != 'weights':
                    continue
                start = now()
                step(key)
                if i >= WARMUP:
                    times.setdefault((name, key), []).append(now() - start)
    kept = {key: saved(lambda net=net: net(x), net.parameters()) for key, net in nets.items()}
    peaks = {key: peak(lambda key=key: weights(key), args.device) for key in nets}
    print(f'block of {CHANNELS} and {hidden} hidden channels, {MAP}x{MAP}, batch {args.batch}')
    print(f"{'widths':>8}{'peak MiB':>10}{'saved MiB':>11}{'ms':>9}{'x plain':>9}{'x 4 widths':>12}{'architecture ms':>17}")
    fine = True
    for key in nets:
        own, arch = times['weights', key], times.get(('architecture', key))
        ratio, same = (statistics.median(a / b for a, b in zip(own, times['weights', other])) for other in ('plain', LEVELS[0]))
        fine &= key == 'plain' or ratio <= TWICE and max(same, 1 / same, peaks[key] / peaks[LEVELS[0]]) <= SAME
        print(f'{key:>8}{peaks[key] / 2 ** 20:>10.2f}{kept[key] / 2 ** 20:>11.2f}{1e3 * statistics.median(own):>9.1f}{ratio:>9.2f}{same:>12.3f}'
              + (f'{1e3 * statistics.median(arch):>17.1f}' if arch else ''))
    return fine


def supernet(space: str, size: int, device: str, options: dict):
    """A policy and its network, of a reduced space."""
    torch.manual_seed(0)
    model = timm.create_model('prunet_search', num_classes=10, space=space, width=0.25, depth=0.5)
    traced = trace_twin(model, (3, size, size))
    policy = load('prunode')
    policy = policy(traced, [Budget.parse('macs', traced)], twin_grid(model), policy.Options(**options))
    return policy, policy.prepare(model, traced).to(device).train()


def images(args: argparse.Namespace, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(args.batch, 3, args.size, args.size, generator=rng).to(args.device),
            torch.randint(10, (args.batch,), generator=rng).to(args.device))


def epoch(policy, network, optimizer, args: argparse.Namespace, number: int, epochs: int, batches: int = 5) -> None:
    """Of five batches one trains the architecture."""
    for i in range(batches):
        x, y = images(args, number * batches + i)
        optimizer.zero_grad()
        architecture = i >= 0.8 * batches
        policy.train_step(Step(network, x, y, number, epochs, (number + i / batches) / epochs, architecture, number * batches + i))
        if not architecture:
            optimizer.step()


def curve(args: argparse.Namespace) -> bool:
    """Epochs of networks of which ever more blocks went."""
    now, shares, nets = clock_of(args.device), (1., 0.75, 0.5, 0.25), {}
    for share in shares:
        policy, network = supernet('table1', args.size, args.device, {'arch_lr': 0.})
        rng, gone = np.random.default_rng(0), 0
        total = sum(len(m.candidates) for m in policy.mixtures)
        while gone < round((1 - share) * total):
            m = policy.mixtures[rng.integers(len(policy.mixtures))]
            if len(m.candidates) > 1:
                m.remove(m.left[rng.integers(len(m.candidates))])
                gone += 1
        nets[share] = policy, network, torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    times: dict = {share: [] for share in shares}
    for i in range(args.rounds // 2 + WARMUP):
        for share in shares[::-1 if i % 2 else 1]:
            start = now()
            epoch(*nets[share], args, 1, 2)
            if i >= WARMUP:
                times[share].append(now() - start)
    print('\nsupernet of Table 1, a quarter of the width and half the depth: epochs by the share of blocks left')
    print(f"{'blocks':>8}{'seconds':>10}{'x all':>8}{'peak MiB':>10}{'x all':>8}")
    fine, whole = True, None
    for share in shares:
        policy, network, optimizer = nets[share]
        bytes_ = peak(lambda: epoch(policy, network, optimizer, args, 1, 2, 1), args.device)  # noqa: B023
        whole = whole or bytes_
        ratio = statistics.median(a / b for a, b in zip(times[share], times[1.]))
        fine &= share > 0.5 or ratio <= HALF
        print(f'{sum(len(m.candidates) for m in policy.mixtures):>8}{statistics.median(times[share]):>10.2f}{ratio:>8.2f}'
              f'{bytes_ / 2 ** 20:>10.1f}{bytes_ / whole:>8.2f}')
    return fine


def table3(args: argparse.Namespace) -> None:
    """Searches by the rows of Table 3: they take turns, an epoch each."""
    now, runs = clock_of(args.device), {}
    for name, (space, options) in ROWS.items():
        policy, network = supernet(space, args.size, args.device, {'arch_lr': 0.3, **options})
        runs[name] = policy, network, torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9), [], []
    for number in range(args.epochs):
        for policy, network, optimizer, seconds, left in runs.values():
            left.append(sum(len(m.candidates) + m.skip for m in policy.mixtures))
            start = now()
            epoch(policy, network, optimizer, args, number, args.epochs, 10)
            policy.epoch_end(number)
            seconds.append(now() - start)
    first = sum(runs['FBNet'][3])
    print(f'\nrows of Table 3, {args.epochs} epochs: seconds of every epoch, with the candidates left before it; all, over that of FBNet')
    for name, (_, _, _, seconds, left) in runs.items():
        print(f'{name:<22}' + ' '.join(f'{s:.2f}({n})' for s, n in zip(seconds, left)) + f'  {sum(seconds):.1f} s {sum(seconds) / first:.2f}')


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--epochs', type=int, default=14)
    parser.add_argument('--size', type=int, default=64)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--only', choices=['block', 'curve', 'table3'])
    args = parser.parse_args()
    torch.set_num_threads(1)
    fine = True
    for name, part in ('block', blocks), ('curve', curve), ('table3', table3):
        if args.only in (None, name):
            fine &= part(args) is not False
    return fine


if __name__ == '__main__':
    sys.exit(not main())
