"""AutoSlim: a slimmable network trained at many widths, then slimmed greedily."""
from collections.abc import Mapping
from dataclasses import dataclass

from .base import Choice, Evaluate, Policy, PolicyError, Step, first_within, greedy_path, greedy_scores, option, random_widths

__all__ = ['AutoSlim']


class AutoSlim(Policy):
    """Universally slimmable training by the sandwich rule with in-place distillation, then greedy slimming.

    "AutoSlim: Towards One-Shot Architecture Search for Channel Numbers" (Yu and Huang, 2019), trained as in "Universally
    Slimmable Networks and Improved Training Techniques" (Yu and Huang, ICCV 2019). There are no numbered equations; in words:

    - Sandwich rule: each batch runs the largest network, the smallest and `passes - 2` random ones. The largest learns from
      the labels, the others from the largest one's softmax (temperature 1). Widths are leading slices of shared weights.
    - Random networks are non-uniform: each group draws its own width.
    - Greedy slimming: from the largest network on, try to take one group of channels (one step of the grid) from each layer
      in turn, and keep the one that hurts accuracy least, until every budget has been met. Batch norms use the statistics
      of the batch. Layers that residual additions or depthwise convolutions tie are one group, so they are slimmed together.

    The default grid is theirs: from 0.15 to 1.5 times the base width, in steps of one twelfth of the largest width.

    What differs: the accuracy is that of the first `batches` batches of the holdout (theirs: one batch of 50,000 ImageNet
    training images set aside), and where it ties, which it often does on one batch, the lower loss wins; theirs takes the
    first layer. A random width is a uniform draw from the grid; theirs draws a multiplier and rounds it. Optimiser and schedule
    are those of the flags; theirs: linear decay of the learning rate, batches of 1024 and more, weight decay 1e-4 but not on
    norms, biases and depthwise convolutions.
    """

    default_grid = 'autoslim'

    @dataclass(frozen=True)
    class Options:
        passes: int = option(4, 'networks trained on each batch: the largest, the smallest, the others random')
        batches: int = option(1, 'batches of the holdout on which slimming compares; 0: all')
        statistics: str = option('batch', 'statistics of batch norms while slimming: batch, recalibrated or running')

        def __post_init__(self):
            if self.passes < 2:
                raise PolicyError(f'autoslim.passes must be at least 2, the largest and the smallest, not {self.passes}')
            if self.batches < 0:
                raise PolicyError(f'autoslim.batches must be at least 0, not {self.batches}')
            if self.statistics not in ('batch', 'recalibrated', 'running'):
                raise PolicyError(f"autoslim.statistics must be batch, recalibrated or running, not '{self.statistics}'")

    def train_step(self, step: Step) -> None:
        teacher = step.forward(self.largest)
        step.backward(step.loss(teacher))
        teacher = teacher.detach()
        randoms = (random_widths(self.grid, step.rng) for _ in range(self.options.passes - 2))
        for widths in (self.smallest, *randoms):
            step.backward(step.distill(step.forward(widths), teacher))

    @property
    def evaluations(self) -> int:
        return greedy_scores(self.grid)

    def choose(self, evaluate: Evaluate) -> list[Choice]:
        def rank(widths: Mapping[str, int]) -> tuple[float, float]:
            return evaluate(widths, batches=self.options.batches or None, statistics=self.options.statistics).rank

        return first_within(greedy_path(self.grid, self.largest, lambda _, slimmer: max(slimmer, key=rank)), self.budgets)
