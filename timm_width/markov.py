"""Widths as Markov chains: each group grows from its least width step by step, and stops at the first step that fails.

A group with widths w_0 < w_1 < ... < w_K has a transition p_k for every step: the probability to go on from w_{k-1} to w_k.
It reaches w_k with the marginal q_k = p_1 p_2 ... p_k, so that

    P(width = w_k) = q_k - q_{k+1}    and    E[width] = w_0 + sum_k (w_k - w_{k-1}) q_k,

with q_0 = 1 and q_{K+1} = 0, whether the steps are equal or not. The groups' chains are independent.
"""
import math
from collections.abc import Mapping
from typing import Union

import numpy as np
import torch
from torch import nn

from .cost import Cost
from .factors import Grid

__all__ = ['TRANSITIONS', 'Chains']

BISECTIONS = 40
SURE = 1e-3  # `spread` leaves every transition at least so far from 0 and 1, where its gradient would vanish

# how p follows from alpha, and alpha from p
TRANSITIONS = {
    'sigmoid': (torch.sigmoid, lambda p: math.log(p / (1 - p))),
    'exp': (lambda alpha: torch.exp(-alpha), lambda p: -math.log(p)),  # alpha >= 0: see `Chains.clamp`
}


class Chains:
    """One chain for each group of a grid; what is computed from them is differentiable in `alpha`, in float64 and on the CPU.

    Args:
        grid: Group -> widths, ascending. A group of one width has no transition.
        transition: A name of TRANSITIONS.

    Attributes:
        alpha: (transitions,) of all groups, one group after another; at first 0.
    """

    def __init__(self, grid: Grid, transition: str = 'sigmoid'):
        self.grid, self.transition = grid, transition
        self._sizes = {name: len(widths) - 1 for name, widths in grid.items()}
        self.alpha = nn.Parameter(torch.zeros(sum(self._sizes.values()), dtype=torch.float64))

    def transitions(self) -> dict[str, torch.Tensor]:
        """Group -> p, (steps of its grid,)."""
        p = TRANSITIONS[self.transition][0](self.alpha)
        return dict(zip(self._sizes, p.split([*self._sizes.values()])))

    def marginals(self) -> dict[str, torch.Tensor]:
        """Group -> q, (steps of its grid,), descending."""
        return {name: p.cumprod(0) for name, p in self.transitions().items()}

    def distributions(self) -> dict[str, tuple[tuple[int, ...], torch.Tensor]]:
        """Group -> its widths and their probabilities, as `Cost.expectation` takes them."""
        found = {}
        for name, q in self.marginals().items():
            reached = torch.cat([q.new_ones(1), q, q.new_zeros(1)])
            found[name] = tuple(self.grid[name]), reached[:-1] - reached[1:]
        return found

    def expected_widths(self) -> dict[str, torch.Tensor]:
        """Group -> E[width], a tensor without dimensions."""
        return {name: p @ torch.tensor(widths, dtype=p.dtype) for name, (widths, p) in self.distributions().items()}

    def expected(self, cost: Cost) -> torch.Tensor:
        """E[cost], exact for every cost: a table over two groups has p_a^T F p_b, a group squared its second moment."""
        return cost.expectation(self.distributions())

    def gates(self, units: Mapping[str, int], device: Union[None, str, torch.device] = None) -> dict[str, torch.Tensor]:
        """The marginal of every channel, for groups that have a choice.

        Args:
            units: Group -> channels of a step (id) of the shared network.
            device: Where to have them.

        Returns:
            Group -> (steps of the shared network at the group's largest width,): 1 up to the least width, then q_k up to w_k.
        """
        rows = {}
        for name, q in self.marginals().items():
            if len(q):
                counts = np.diff(self.grid[name], prepend=0) // units[name]
                level = np.repeat(np.arange(len(counts)), counts)
                rows[name] = torch.cat([q.new_ones(1), q])[torch.from_numpy(level)]
        if not rows:
            return {}
        moved = torch.cat([*rows.values()]).float().to(device)  # at once: one copy to the device
        return dict(zip(rows, moved.split([len(row) for row in rows.values()])))

    @torch.no_grad()
    def sample(self, rng: np.random.Generator, count: int) -> list[dict[str, int]]:
        """Runs all chains `count` times: group -> width, of each run."""
        columns = {}
        for name, p in self.transitions().items():
            went_on = rng.random((count, len(p))) < p.numpy()
            columns[name] = np.array(self.grid[name])[np.cumprod(went_on, axis=1).sum(1)].tolist()
        return [dict(zip(columns, row)) for row in zip(*columns.values())]

    @torch.no_grad()
    def spread(self, cost: Cost, limit: float) -> None:
        """Sets all transitions to the one probability at which the expected cost is a limit, or as near to that as it gets."""
        low, high = SURE, 1 - SURE
        for _ in range(BISECTIONS):
            self.alpha.fill_(TRANSITIONS[self.transition][1]((low + high) / 2))
            low, high = (low, (low + high) / 2) if self.expected(cost) > limit else ((low + high) / 2, high)

    @torch.no_grad()
    def clamp(self) -> None:
        """Brings alpha back to where its transitions are probabilities."""
        if self.transition == 'exp':
            self.alpha.clamp_(min=0)
