"""A test suite for policies, ours and anybody's: what every policy owes those who use it.

    from timm_width.conformance import PolicyConformance

    class TestMine(PolicyConformance):
        policy = Mine

In a file that pytest collects, this runs all of it on a small network and random images, and on a planted problem whose best
answer is known. Each test states one law; override a class attribute to adapt it, and no test.
"""
import math
import numbers
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import nn

from .arguments import Parser, add_arguments
from .budget import Budget
from .cost import Macs, Params, Polynomial
from .data import TwoParts
from .engine import Training, batch_statistics
from .policies.base import Choice, Policy, Score, fill_budget
from .space import WidthSpace
from .trace import trace

__all__ = ['PlantedProblem', 'PolicyConformance']


class _Net(nn.Module):
    """A small residual net with batch norm: groups inside its blocks, one of them depthwise, and one that the additions tie."""

    def __init__(self, blocks: int = 1):
        super().__init__()
        self.stem = _layer(3, 16, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(_layer(16, 32, 1), _layer(32, 32, 3, groups=32), nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16))
            for _ in range(blocks))
        self.last = nn.Sequential(_layer(16, 24, 3, stride=2), _layer(24, 24, 3))
        self.head = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.last(x).mean((2, 3)))


def _layer(inputs: int, outputs: int, kernel: int, **kwargs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **kwargs)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class _Table(Polynomial):
    """A cost that is no count: every term has a factor of its own, as a measured latency has."""

    def __init__(self, space: WidthSpace):
        sites = enumerate(space.sites)
        super().__init__(space, 'ns', [(s.name, s.positions * (3 + 5 * i % 7), s.factors) for i, s in sites])


def _width(width: Union[int, Sequence[int]]) -> int:
    """Channels of a group of unit 1, given by their number or one by one."""
    return width if isinstance(width, numbers.Integral) else len(width)


class PlantedProblem:
    """`evaluate` from a known function: each group gains by its width, with a worth of its own and diminishing returns.

    The accuracy is 100 (1 - sum_g worth_g exp(-3 width_g / largest_g)) with worths that sum to 1, and the loss falls with it.
    The best answer within a budget is found by enumerating the grid.
    """

    def __init__(self, grid: Mapping[str, Sequence[int]], seed: int = 0):
        self.grid = grid
        worth = np.random.default_rng(seed).dirichlet(np.full(len(grid), 0.5))
        self.worth = dict(zip(grid, worth.tolist()))
        self.asked = 0

    def top1(self, widths: Mapping[str, Union[int, Sequence[int]]]) -> float:
        return 100 * (1 - sum(w * np.exp(-3 * _width(widths[g]) / self.grid[g][-1]) for g, w in self.worth.items()))

    def __call__(
            self,
            widths: Mapping[str, Union[int, Sequence[int]]],
            skips: Sequence[str] = (),
            batches: Optional[int] = None,
            statistics: str = 'batch',
    ) -> Score:
        self.asked += 1
        top1 = self.top1(widths)
        return Score(top1, 5 - top1 / 25)

    def alone(self, widths: Mapping[str, int], skips: Sequence[str] = ()) -> Score:
        return self(widths, skips)

    def best(self, budget: Budget) -> float:
        """The accuracy of the best network within a budget."""
        names = list(self.grid)
        choices = np.stack(np.meshgrid(*(np.arange(len(self.grid[n])) for n in names), indexing='ij'), -1).reshape(-1, len(names))
        accuracy = sum(-100 * self.worth[n] * np.exp(-3 * np.array(self.grid[n])[choices[:, i]] / self.grid[n][-1])
                       for i, n in enumerate(names))
        for row in choices[np.argsort(-accuracy, kind='stable')]:
            widths = {n: self.grid[n][k] for n, k in zip(names, row)}
            if budget.met(widths):
                return self.top1(widths)
        raise ValueError('no network meets the budget')


class PolicyConformance:
    """The suite; a subclass names a policy.

    Attributes:
        policy: The class under test.
        network: What builds the small network, from a number of blocks.
        options: What its Options are given.
        epochs: Length of the trainings.
        regret: Points of accuracy that its answer to the planted problem may be below the best; None for a policy that asks for
            no scores.
        beats_random: Whether its answer must be better than the best of as many random networks as it asks scores of; if not,
            better than their average is enough.
    """

    policy: type[Policy] = Policy
    network: Callable[..., nn.Module] = _Net
    options: Mapping[str, Any] = {}
    epochs: int = 2
    regret: Optional[float] = 3.0
    beats_random: bool = True

    # -- what the tests work with ------------------------------------------------------------------------------

    @classmethod
    def space(cls, blocks: int = 1) -> WidthSpace:
        return trace(cls.network(blocks), (3, 16, 16))

    @staticmethod
    def grid(space: WidthSpace) -> dict[str, tuple[int, ...]]:
        return {name: tuple(range(4, g.size + 1, 4)) for name, g in space.searchable.items()}

    def make(self, budgets: Sequence[Budget], seed: int = 0) -> Policy:
        space = budgets[0].cost.space
        return self.policy(space, budgets, self.grid(space), self.policy.Options(**self.options), seed)

    @staticmethod
    def arguments() -> Namespace:
        parser = Parser()
        add_arguments(parser)
        return parser.parse_args(['-b', '8', '--device', 'cpu', '--lr', '0.05', '--warmup-epochs', '0'])

    @staticmethod
    def images(seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        rng = torch.Generator().manual_seed(seed)
        return [(torch.randn(8, 3, 16, 16, generator=rng), torch.randint(4, (8,), generator=rng)) for _ in range(4)]

    def training(self, policy: Policy) -> Training:
        torch.manual_seed(0)
        model, images = self.network(), self.images()
        aside = math.ceil(policy.architecture_share * len(images))
        parts = [torch.utils.data.DataLoader(part, batch_size=None) for part in (images[aside:], images[:aside]) if part]
        batches = TwoParts(*parts) if aside else parts[0]
        return Training(policy.prepare(model, trace(model, (3, 16, 16))), batches, self.arguments(), self.epochs,
                        train_step=policy.train_step, parameters=list(policy.parameters()))

    def trained(self, policy: Policy, checkpoint: Optional[Path] = None, kill_after: Optional[int] = None) -> nn.Module:
        """The policy's network after its training, which raises _Killed after so many epochs, if that is asked for."""
        def after_epoch(training: Training, loss: float, lr: float) -> None:
            policy.epoch_end(training.epoch - 1)
            if kill_after is not None and training.epoch > kill_after:
                raise _Killed

        return self.training(policy).run(checkpoint, after_epoch, policy)

    def answer(self, budgets: Sequence[Budget], seed: int = 0) -> list[Choice]:
        """Trains, if it does; and chooses by its network's scores."""
        policy = self.make(budgets, seed)
        if not policy.trains():
            return list(policy.choose(PlantedProblem(self.grid(policy.space))))
        return list(policy.choose(_OnImages(self.trained(policy), self.images(1))))

    # -- laws --------------------------------------------------------------------------------------------------

    def test_options_have_defaults_and_become_flags(self):
        assert isinstance(self.policy.Options(), self.policy.Options)
        assert self.policy.__doc__ and self.policy.search_epochs >= 1

    def test_answers_meet_their_budgets_and_lie_on_the_grid(self):
        space = self.space()
        budgets = [Budget.parse(text, space) for text in ('macs=0.6x', 'macs=0.3x', 'params=0.5x')]
        found = self.answer(budgets)
        assert len(found) == len(budgets)
        grid = self.grid(space)
        for choice, budget in zip(found, budgets):
            widths, skips = choice
            space.check(widths, skips)
            assert budget.met(widths, skips) and all(widths[g] in grid[g] for g in grid if g in widths or not skips)
            for g, kept in getattr(choice, 'channels', {}).items():
                steps = list(kept)
                assert len(steps) * space[g].unit == widths[g] and steps == sorted({*steps})
                assert 0 <= steps[0] and (steps[-1] + 1) * space[g].unit <= grid[g][-1]

    def test_the_same_seed_gives_the_same_answer(self):
        budgets = [Budget.parse('macs=0.5x', self.space())]
        assert self.answer(budgets, seed=3) == self.answer(budgets, seed=3)

    def test_a_resumed_search_gives_the_answer_of_the_unbroken_one(self, tmp_path):
        """The same weights, bit for bit, and the same answer, from new objects that only the checkpoint tells of the old ones."""
        if not self.policy.trains():
            return
        budgets = [Budget.parse('macs=0.5x', self.space())]
        unbroken = self.make(budgets)
        network = self.trained(unbroken)
        try:
            self.trained(self.make(budgets), tmp_path / 'x.pth.tar', kill_after=self.epochs - 1)
        except _Killed:
            pass
        resumed = self.make(budgets)
        again = self.trained(resumed, tmp_path / 'x.pth.tar')
        for name, t in network.state_dict().items():
            assert torch.equal(t, again.state_dict()[name]), name
        images = self.images(1)
        assert unbroken.choose(_OnImages(network, images)) == resumed.choose(_OnImages(again, images))

    def test_it_works_with_any_cost(self):
        space = self.space()
        for cost in (Macs(space), Params(space), _Table(space)):
            budget = Budget(cost, int(cost() * 0.5), 'half')
            [(widths, skips)] = self.make([budget]).choose(PlantedProblem(self.grid(space)))
            assert budget.met(widths, skips)

    def test_planted_optimum_is_found_within_the_regret(self):
        if self.regret is None:
            return
        space = self.space()
        grid, budget = self.grid(space), Budget.parse('macs=0.5x', space)
        for seed in range(5):
            problem = PlantedProblem(grid, seed)
            [(widths, _)] = self.make([budget], seed).choose(problem)
            found, best = problem.top1(widths), problem.best(budget)
            assert best - found <= self.regret, f'problem {seed}: {found:.2f}, the best is {best:.2f}'

    def test_better_than_random_at_equal_evaluations(self):
        """On average over planted problems of seven groups."""
        if self.regret is None:
            return
        space = self.space(blocks=5)
        grid, budget = self.grid(space), Budget.parse('macs=0.5x', space)
        ahead = []
        for seed in range(5):
            problem = PlantedProblem(grid, seed)
            [(widths, _)] = self.make([budget], seed).choose(problem)
            rng = np.random.default_rng(seed)
            drawn = (fill_budget(space, budget, grid, {n: rng.uniform(0.1, 1) for n in grid}) for _ in range(problem.asked))
            chance = (max if self.beats_random else np.mean)([problem.top1(w) for w in drawn])
            ahead.append(problem.top1(widths) - chance)
        assert np.mean(ahead) > 0, f'ahead by {np.round(ahead, 2)}'


class _Killed(Exception):
    pass


class _OnImages:
    """`evaluate` on images in memory."""

    def __init__(self, network: nn.Module, images: Sequence[tuple[torch.Tensor, torch.Tensor]]):
        self.network, self.images = network, images

    def __call__(
            self,
            widths: Mapping[str, Union[int, Sequence[int]]],
            skips: Sequence[str] = (),
            batches: Optional[int] = None,
            statistics: str = 'batch',
    ) -> Score:
        right = loss = 0.
        with torch.no_grad(), batch_statistics(self.network):
            for x, y in self.images[:batches]:
                logits = self.network(x, widths, skips=skips)
                right += (logits.argmax(1) == y).float().mean().item()
                loss += nn.functional.cross_entropy(logits, y).item()
        return Score(100 * right / len(self.images[:batches]), loss / len(self.images[:batches]))

    def alone(self, widths: Mapping[str, int], skips: Sequence[str] = ()) -> Score:
        return self(widths, skips)
