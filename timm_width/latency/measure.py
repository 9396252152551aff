"""Times networks next to one another on this machine."""
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

__all__ = ['describe_device', 'latencies']

ROUNDS = 5


@torch.inference_mode()
def latencies(
        networks: Mapping[str, nn.Module],
        input_size: Sequence[int],
        batch: int = 1,
        device: str = 'cpu',
        seconds: float = 0.2,
) -> dict[str, float]:
    """Milliseconds per image of each network in evaluation mode: the median of rounds in which all of them take turns.

    Args:
        networks: Name -> network.
        input_size: (channels, height, width).
        batch: Images per call.
        device: Where to run.
        seconds: Least time for each network in each round.
    """
    images = torch.randn(batch, *input_size, device=device)
    calls = {}
    for name, network in networks.items():
        network.to(device).eval()
        calls[name] = Timer('network(images)', globals={'network': network, 'images': images}, num_threads=torch.get_num_threads())
        calls[name].timeit(2)
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, timer in calls.items():
            rounds[name].append(timer.blocked_autorange(min_run_time=seconds).median)
    return {name: 1000 * statistics.median(times) / batch for name, times in rounds.items()}


def describe_device(device: str) -> dict[str, Any]:
    """What a measured time is worth nothing without."""
    cuda = 'cuda' in device
    return {'device': torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
            'threads': torch.get_num_threads(), 'torch': torch.__version__}
