"""FLOPs-sensitive bins: the channels of each group in parts whose cost is about the same, everywhere in a network.

Section 3.2 of "Locally free weight sharing for network width search" (CafeNet, Su et al., ICLR 2021); equations by its numbers.
FLOPs are MACs here (one multiply-add is 1), as in the paper.
"""
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Optional, Union

import torch

from .cost import Macs
from .factors import Grid
from .space import WidthSpace

__all__ = ['bin_grid', 'bin_sizes', 'sensitivities', 'space_size']


def sensitivities(space: WidthSpace, widths: Mapping[str, int], names: Iterable[str]) -> dict[str, int]:
    """MACs of one channel of each group, eq. 7: epsilon_i = FLOPs(n_(i-1), 1) + FLOPs(1, n_(i+1)).

    A group stands for all layers that share its width, so the sum goes over every convolution and linear layer that it takes part
    in: the derivative of the MACs. In a layer from a group to itself it counts on both sides.

    Args:
        space: The width space of the model.
        widths: Group -> n; groups left out are at their base.
        names: The groups asked for.

    Returns:
        Group -> MACs of one of its steps (ids), over its unit, rounded down; of a group that costs nothing 0.
    """
    at = {name: torch.tensor(float(widths.get(name, space[name].size)), dtype=torch.float64, requires_grad=True) for name in names}
    rest = {name: w for name, w in widths.items() if name not in at}
    slopes = torch.autograd.grad(Macs(space)({**rest, **at}), list(at.values()))
    return {name: math.floor(s.item() + 1e-6) for name, s in zip(at, slopes)}


def bin_sizes(epsilon: Mapping[str, int], beta: Union[int, float] = 1) -> dict[str, int]:
    """Channels of a bin of each group, eq. 9: b_i = beta * max_j epsilon_j / epsilon_i, rounded down, at least 1.

    Args:
        epsilon: What `sensitivities` gives.
        beta: The least size of a bin, before rounding; may be below 1.
    """
    most, beta = max(epsilon.values()), Fraction(beta).limit_denominator(10 ** 6)
    return {name: max(math.floor(beta * most / e), 1) if e else max(math.floor(beta * most), 1) for name, e in epsilon.items()}


def bin_grid(
        space: WidthSpace,
        largest: Mapping[str, int],
        beta: Union[int, float] = 1,
        steps: Optional[Mapping[str, int]] = None,
        most: Optional[Mapping[str, int]] = None,
) -> Grid:
    """The widths 1, 2, ... bins. The last bin takes in what is left over, so the largest width is on the grid.

    Args:
        space: The width space of the model.
        largest: Group -> its largest width, for the groups to search.
        beta: The least size of a bin.
        steps: Group -> what bins are multiples of, but for the last one of a group; by default its unit.
        most: Group -> the largest size of its bins.

    Returns:
        Group -> widths, ascending.
    """
    sizes, grid = bin_sizes(sensitivities(space, largest, largest), beta), {}
    for name, last in largest.items():
        step = space[name].unit if steps is None else steps[name]
        size = max(min(sizes[name], (most or {}).get(name, last)) // step, 1) * step
        grid[name] = (*(size * i for i in range(1, last // size)), last)
    return grid


def space_size(grid: Grid) -> int:
    """Number of networks: the product of the numbers of bins, a term of eq. 14."""
    return math.prod(map(len, grid.values()))
