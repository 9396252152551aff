"""The random baseline: draw networks that fill the budget, train each briefly, take the best."""
from dataclasses import dataclass

import numpy as np

from ..budget import Budget
from .base import Choice, Evaluate, Policy, PolicyError, fill_budget, option

__all__ = ['Random']

TRIES = 100  # draws for one sample before the best of them will do


class Random(Policy):
    """Random networks just within the budget; the one that scores best on the holdout.

    The baseline Random of "Locally free weight sharing for network width search" (CafeNet, Su et al., ICLR 2021, section 4):
    20 random networks under the budget are trained for 50 epochs (`--search-epochs`), and the best continues.

    What differs: the best is trained again from scratch, as the networks it is compared with are. Theirs are only said to be
    under the budget; ours are scaled to fill it.
    """

    @dataclass(frozen=True)
    class Options:
        samples: int = option(20, 'networks to draw and train, for each budget')
        tolerance: float = option(0.05, 'how far below the budget a network may stay, as a share of it')

        def __post_init__(self):
            if self.samples < 1:
                raise PolicyError(f'random.samples must be at least 1, not {self.samples}')
            if not 0 <= self.tolerance < 1:
                raise PolicyError(f'random.tolerance must be from 0 to below 1, not {self.tolerance}')

    @property
    def evaluations(self) -> int:
        return self.options.samples * len(self.budgets)

    def choose(self, evaluate: Evaluate) -> list[Choice]:
        return [Choice(max(self.samples(budget), key=lambda widths: evaluate.alone(widths).rank)) for budget in self.budgets]

    def samples(self, budget: Budget) -> list[dict[str, int]]:
        """Different networks within a budget; fewer than asked for where the grid does not hold as many."""
        rng = np.random.default_rng(self.seed)
        found: list[dict[str, int]] = []
        while len(found) < self.options.samples:
            drawn = []
            for _ in range(TRIES):
                widths = self._draw(budget, rng)
                if widths not in found:
                    drawn.append(widths)
                    if budget.cost(widths) >= (1 - self.options.tolerance) * budget.limit:
                        break
            if not drawn:
                break
            found.append(max(drawn, key=budget.cost))
        return found

    def _draw(self, budget: Budget, rng: np.random.Generator) -> dict[str, int]:
        """A ratio per group, drawn evenly from its grid's range, and all of them scaled to the budget."""
        shape = {name: rng.uniform(widths[0], widths[-1]) / self.space[name].size for name, widths in self.grid.items()}
        return fill_budget(self.space, budget, self.grid, shape)
