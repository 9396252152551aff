"""Times networks next to one another on this machine."""
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ['describe_device', 'latencies', 'usual_batch']

ROUNDS = 15


@torch.inference_mode()
def latencies(
        networks: Mapping[str, nn.Module],
        input_size: Sequence[int],
        batch: int = 1,
        device: str = 'cpu',
        seconds: float = 0.05,
) -> dict[str, float]:
    """Milliseconds per image of each network in evaluation mode: the median of rounds in which all of them take turns.

    Args:
        networks: Name -> network.
        input_size: (channels, height, width).
        batch: Images per call.
        device: Where to run.
        seconds: About how long each network runs in each round.
    """
    images = torch.randn(batch, *input_size, device=device)
    calls = {}
    for name, network in networks.items():
        network.to(device).eval()
        once = min(_seconds(network, images, 1) for _ in range(3))  # warm-up, too
        calls[name] = max(int(seconds / once), 1)
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, count in calls.items():
            rounds[name].append(_seconds(networks[name], images, count) / count)
    return {name: 1000 * statistics.median(times) / batch for name, times in rounds.items()}


def _seconds(network: nn.Module, images: torch.Tensor, count: int) -> float:
    wait = torch.cuda.synchronize if images.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(count):
        network(images)
    wait()
    return time.perf_counter() - start


def usual_batch(device: str) -> int:
    """Images per timed call: those of AOWS (appendix C)."""
    return 16 if 'cuda' in device else 1


def describe_device(device: str) -> dict[str, Any]:
    """What a measured time is worth nothing without."""
    name = torch.cuda.get_device_name(device) if 'cuda' in device else _processor()
    return {'device': name, 'threads': torch.get_num_threads(), 'precision': 'float32', 'torch': torch.__version__}


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    found = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(found, '') or platform.processor() or platform.machine()
