"""The uniform baseline: one factor for all groups."""
from .base import Choice, Evaluate, Policy, uniform_widths

__all__ = ['Uniform']


class Uniform(Policy):
    """Every group at one ratio of its base width, the largest that meets the budget, rounded to the grid.

    The width multiplier of MobileNets (Howard et al., 2017), and the baseline Uniform of "Locally free weight sharing for
    network width search" (CafeNet, Su et al., ICLR 2021, section 4); the factor is found by bisection. Trains nothing.
    """

    def choose(self, evaluate: Evaluate) -> list[Choice]:
        return [Choice(uniform_widths(self.space, budget, self.grid)) for budget in self.budgets]
