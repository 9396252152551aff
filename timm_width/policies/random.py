"""The random baseline: draw networks that fill the budget, train each briefly, take the best."""
from dataclasses import dataclass

import numpy as np

from .base import Choice, Evaluate, Policy, PolicyError, fill_budget, option

__all__ = ['Random']

TRIES = 100  # draws for one sample before the best of them will do


class Random(Policy):
    """Random networks just within the budget; the one that scores best on the holdout.

    The baseline Random of "Locally free weight sharing for network width search" (CafeNet, Su et al., ICLR 2021, section 4):
    20 random networks under the budget are trained for 50 epochs, and the best continues.

    What differs: the brief training is as long as `--search-epochs` says, and the best is trained again from scratch, as the
    networks it is compared with are. Theirs are only said to be under the budget; ours are scaled to fill it.
    """

    @dataclass(frozen=True)
    class Options:
        samples: int = option(20, 'networks to draw and train')
        tolerance: float = option(0.05, 'how far below the budget a network may stay, as a share of it')

        def __post_init__(self):
            if self.samples < 1:
                raise PolicyError(f'random.samples must be at least 1, not {self.samples}')
            if not 0 <= self.tolerance < 1:
                raise PolicyError(f'random.tolerance must be from 0 to below 1, not {self.tolerance}')

    @property
    def evaluations(self) -> int:
        return self.options.samples

    def choose(self, evaluate: Evaluate) -> Choice:
        scored = [(evaluate(widths), widths) for widths in self.samples()]
        return Choice(max(scored, key=lambda s: s[0])[1])

    def samples(self) -> list[dict[str, int]]:
        """Different networks within the budget; fewer than asked for where the grid does not hold as many."""
        rng = np.random.default_rng(self.seed)
        found: list[dict[str, int]] = []
        while len(found) < self.options.samples:
            drawn = []
            for _ in range(TRIES):
                widths = self._draw(rng)
                if widths not in found:
                    drawn.append(widths)
                    if self.budget.cost(widths) >= (1 - self.options.tolerance) * self.budget.limit:
                        break
            if not drawn:
                break
            found.append(max(drawn, key=self.budget.cost))
        return found

    def _draw(self, rng: np.random.Generator) -> dict[str, int]:
        """A ratio per group, drawn evenly from its grid's range, and all of them scaled to the budget."""
        shape = {name: rng.uniform(widths[0], widths[-1]) / self.space[name].size for name, widths in self.grid.items()}
        return fill_budget(self.space, self.budget, self.grid, shape)
