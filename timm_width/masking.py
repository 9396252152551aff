"""Which two widths of a block are compared: Algorithm 1 of "Tiered Pruning for Efficient Differentiable Inference-Aware Neural
Architecture Search" (Kierat et al., 2022)."""
from dataclasses import dataclass

__all__ = ['Masks']

SLACK = 0.8  # the algorithm's c: how far below 1 the small mask is kept, in distances
MAX_DISTANCE = 0.6
MOMENTUM = 0.4
MAX_WEIGHT = 1.  # in the lower corner: odds of 3 to 1


@dataclass
class Masks:
    """The small and the large mask of one block, as shares of its channels, and as numbers of its steps.

    `levels` are the widths possible: with channels in steps of 32, as published, a width of c channels is level c / 32.

    Attributes:
        levels: Number of widths, 2 or more.
        s, l: Shares of the channels in the small and the large mask.
        update: The running sum of the weight.
        small, large: Levels in the small and the large mask, from 1 to `levels`; small < large.
    """
    levels: int
    s: float = 0.5
    l: float = 1.  # noqa: E741 (the paper's name)
    update: float = 0.
    small: int = 0
    large: int = 0

    def __post_init__(self):
        if self.levels < 2:
            raise ValueError(f'masks need 2 widths or more to compare, not {self.levels}')
        if not self.small:
            self._round()

    @property
    def converged(self) -> bool:
        """Whether the masks are next to one another: they move no more, and the weight decides between them."""
        return (self.l - self.s) * self.levels <= 1

    def step(self, weight: float, progress: float, rate: float = 1.) -> float:
        """The procedure update_masks, after each step of the architecture weight.

        The printed algorithm leaves the body of `else` empty; its comment asks that s not be negative. There the weight is not
        reset, and what speaks for the small mask adds up; here, up to MAX_WEIGHT: steps of Adam would take it to where the
        softmax has no slope, and a best width of a tenth of the channels would be missed for good (measured).

        Args:
            weight: The architecture weight of the large mask less that of the small one.
            progress: Share of the architecture's training that is done.
            rate: Factor of the steps that the masks make.

        Returns:
            What the weight is to be set to.
        """
        if self.converged:
            return weight
        self.update = self.update * MOMENTUM + rate * weight
        distance = MAX_DISTANCE * (1 - progress) ** 2
        self.s += self.update
        reset = self.s > 0
        self.s = min(self.s, 1 - SLACK * distance) if reset else 0.
        self.l = self.s + distance
        self._round()
        return 0. if reset else max(weight, -MAX_WEIGHT)

    def _round(self) -> None:
        self.small = min(max(round(self.s * self.levels), 1), self.levels - 1)
        self.large = min(max(round(self.l * self.levels), self.small + 1), self.levels)
