"""What a search costs in MACs: those of every pass that its networks run."""
from collections.abc import Mapping, Sequence
from typing import Any, Optional
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .cost import Macs
from .supernet import Supernet

__all__ = ['BACKWARD', 'Meter']

BACKWARD = 2  # forward passes that a backward pass costs as much as: it has two products for each, by weights and by images


class Meter:
    """Counts the MACs of passes: those of one forward pass for every image, and where gradients are recorded thrice as many.

    A supernet's pass costs what `Macs` says of the widths at which it runs. Any other network's are counted by torch in its first
    pass, and again whenever it has lost or gained parameters.

    Attributes:
        macs: What was counted.
    """

    def __init__(self) -> None:
        self.macs = 0
        self._cost: Optional[Macs] = None
        self._counted: WeakKeyDictionary[nn.Module, dict[tuple, int]] = WeakKeyDictionary()

    def __call__(self, network: nn.Module, images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs a network on images, which counts."""
        times = len(images) * (1 + BACKWARD * torch.is_grad_enabled())
        if isinstance(network, Supernet):
            found = network(images, *args, **kwargs)  # which says what is wrong with widths
            self.add(times, network, *args, **kwargs)
            return found
        counted = self._counted.setdefault(network, {})
        key = sum(p.numel() for p in network.parameters()), tuple(images.shape[1:])
        if key in counted and not args and not kwargs:
            self.macs += times * counted[key]
            return network(images, *args, **kwargs)
        with FlopCounterMode(display=False) as counter:
            found = network(images, *args, **kwargs)
        macs = counter.get_total_flops() // 2 // max(len(images), 1)
        if not args and not kwargs:  # what it is called with may decide
            counted[key] = macs
        self.macs += times * macs
        return found

    def add(
            self,
            images: int,
            network: Supernet,
            widths: Optional[Mapping[str, Any]] = None,
            gates: Any = None,
            skips: Sequence[str] = (),
            statistics: Any = None,
    ) -> None:
        """Counts a forward pass of some images, called as `Supernet.forward` is."""
        if self._cost is None or self._cost.space is not network.space:
            self._cost = Macs(network.space)
        self.macs += images * self._cost({n: _width(network, n, w) for n, w in (widths or {}).items()}, skips)


def _width(network: Supernet, name: str, kept: Any) -> int:
    return len(kept) * network.space[name].unit if hasattr(kept, '__len__') else int(kept)
