"""AOWS: a network trained at random widths, the error of each width from it, and the least sum of these within a budget."""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..budget import Budget
from ..cost import CostError
from ..elimination import Elimination, SolveError, draw
from ..factors import Factors
from ..gating import unlike_slices
from ..moving import MovingMeans
from ..solve import ROUNDING, Lagrangian, Solution, exact, is_whole
from ..space import WidthSpace
from ..supernet import Supernet
from .base import Choice, Evaluate, Policy, PolicyError, Step, first_within, greedy_path, greedy_scores, option

__all__ = ['AOWS', 'OWS', 'Greedy']

EPOCHS = 20  # of the published schedule, which is stretched to --search-epochs
UNIFORM = 5  # epochs before sampling adapts
TEMPERATURES = {5: 1., 6: 1e-2, 10: 1e-3, 20: 5e-4}  # supplement, section B; log-linear between
WINDOW = 100_000
WINDOW_HELP = 'errors of each width that are averaged, the last ones; 0: as many as each gets in an epoch, 100,000 at most'


class _OneShot(Policy):
    """The training that the three share.

    Each batch runs the network three times, and the gradients are summed: (a) the largest widths learn from the labels; (b) the
    smallest and (c) random ones from the softmax of (a). In (c) every image has widths of its own: its channels above them are
    multiplied by 0.
    """

    default_grid = 'aows'
    search_epochs = EPOCHS
    mixup = False

    @dataclass(frozen=True)
    class Options:
        strict: bool = option(False, 'refuse a network of which some groups cannot be masked, instead of keeping their base width')

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def free(self) -> list[str]:
        """Groups with a choice."""
        return [name for name, widths in self.grid.items() if len(widths) > 1]

    def prepare(self, model: nn.Module, space: WidthSpace) -> Supernet:
        """The shared network. Groups whose masks are not worth a narrower layer keep their base width from here on.

        Raises:
            PolicyError: There are such groups and --<policy>.strict was given, the network cannot have their base width, or there
                are no others.
            BudgetError: The budgets cannot be met without them.
        """
        network = Supernet(model, space)
        fixed = [name for name in self.grid if name in network.ungated]
        fixed += unlike_slices(network, {name: w for name, w in self.grid.items() if name not in fixed})
        self.keep_base_widths(fixed, 'there, channels set to 0 for single images are not as good as gone (no normalisation of each '
                              'channel alone, or an activation with f(0) != 0)', self.options.strict)
        return network

    def train_step(self, step: Step) -> None:
        teacher = step.forward(self.largest)  # (a)
        step.backward(step.loss(teacher))
        teacher = teacher.detach()
        step.backward(step.distill(step.forward(self.smallest), teacher))  # (b), by slices: all that learns is as with masks
        paths = self.paths(step)
        masked = step.forward(self.largest, gates=self.gates(paths, teacher.device))  # (c)
        step.backward(step.distill(masked, teacher))
        with torch.no_grad():
            self.learn(step, paths, error(masked, step.targets) - error(teacher, step.targets))

    def paths(self, step: Step) -> np.ndarray:
        """Places in the grid for every image of a batch, (groups with a choice, N); all equally likely."""
        return np.stack([step.image_rng.integers(len(self.grid[name]), size=len(step.images)) for name in self.free])

    def gates(self, paths: np.ndarray, device: torch.device) -> dict[str, torch.Tensor]:
        """Rows of ones up to each image's width, and zeros."""
        gates = {}
        for name, row in zip(self.free, paths):
            unit = self.space[name].unit
            steps = torch.from_numpy(np.array(self.grid[name])[row] // unit).to(device)
            gates[name] = (torch.arange(self.grid[name][-1] // unit, device=device) < steps[:, None]).float()
        return gates

    def learn(self, step: Step, paths: np.ndarray, increase: torch.Tensor) -> None:
        """Takes note of how much larger the error of each image is at its widths than at the largest: (N,)."""


def error(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each image; where an image has several labels, the mean of their binary ones."""
    if targets.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction='none').mean(1)
    return F.cross_entropy(logits.float(), targets, reduction='none')


# -- greedy ----------------------------------------------------------------------------------------------------------------


class Greedy(_OneShot):
    """The greedy baseline of AOWS: from the largest network, drop one step of the grid at a time where the error grows least.

    "AOWS: Adaptive and Optimal Network Width Search With Latency Constraints" (Berman, Pishchulin, Xu, Blaschko and Medioni, CVPR
    2020), section 7 and Table D.2. It is AutoSlim's slimming of the network that is trained as for OWS: see there.

    What differs: the paper does not say how two steps are compared. By default by the error alone, as AutoSlim does, on held-out
    images and with the batch norms' statistics of the batch; or, with `score` ratio, by the error per cost saved.
    """

    free_options = ('score', 'batches')

    @dataclass(frozen=True)
    class Options(_OneShot.Options):
        score: str = option('error', 'what a step should have least of: error (its increase), or ratio (that, per cost saved)')
        batches: int = option(1, 'batches of the holdout on which steps are compared; 0: all')

        def __post_init__(self):
            if self.score not in ('error', 'ratio'):
                raise PolicyError(f"greedy.score must be error or ratio, not '{self.score}'")
            if self.batches < 0:
                raise PolicyError(f'greedy.batches must be at least 0, not {self.batches}')

    @property
    def evaluations(self) -> int:
        if self.options.score == 'error':
            return greedy_scores(self.grid)
        return len(self.budgets) * (greedy_scores(self.grid) + sum(len(w) - 1 for w in self.grid.values()))  # and of each step

    def choose(self, evaluate: Evaluate) -> list[Choice]:
        def score(widths: Mapping[str, int]) -> tuple[float, float]:
            return evaluate(widths, batches=self.options.batches or None).rank

        if self.options.score == 'error':
            return first_within(greedy_path(self.grid, self.largest, lambda _, slimmer: max(slimmer, key=score)), self.budgets)

        def cheapest(budget: Budget, widths: Mapping[str, int], slimmer: Sequence[Mapping[str, int]]) -> Mapping[str, int]:
            spent, before = budget.cost(widths), score(widths)

            def ratio(candidate: Mapping[str, int]) -> tuple[float, ...]:
                saved = spent - budget.cost(candidate)
                lost = np.subtract(before, score(candidate))
                return tuple(lost / saved) if saved > 0 else (math.inf,)

            return min(slimmer, key=ratio)

        paths = [greedy_path(self.grid, self.largest, partial(cheapest, budget)) for budget in self.budgets]
        return [first_within(path, [budget])[0] for path, budget in zip(paths, self.budgets)]


# -- OWS -------------------------------------------------------------------------------------------------------------------


class _Limited(NamedTuple):
    """A budget as a solver sees it."""
    budget: Budget
    cost: Factors
    limit: float
    lagrangian: Optional[Lagrangian]  # None where only the exact solver is to be used


class OWS(_OneShot):
    """Optimal width search: a network trained at uniformly random widths, then the least estimated error within each budget.

    "AOWS: Adaptive and Optimal Network Width Search With Latency Constraints" (Berman, Pishchulin, Xu, Blaschko and Medioni, CVPR
    2020); there, sections 3 to 6. Implemented from the paper's supplement and the authors' released code:

    - Training: of each batch, (a) the largest network learns from the labels, (b) the smallest and (c) random ones from the softmax
      of (a). In (c) each image draws a width for every layer, each width equally likely; the channels above it are set to 0
      behind the normalisation, so the statistics of batch norms are those of all channels, mixed over the images.
    - Error: for an image whose path has n widths, (cross-entropy of (c) - cross-entropy of (a)) / n, by the label, counts for
      each of these widths; Delta_i(c) is the mean of the last `window` = 100,000 of width c of layer i.
    - Inference: min sum_i Delta_i(c_i) such that the cost, a sum over pairs of neighbours, is within the budget: by Lagrangian
      relaxation, bisecting the multiplier gamma from [0, 10] (the end doubled until it meets the budget, then halved 12 times),
      each step solved by the Viterbi algorithm. A new budget takes no new training.
    - The grid (Table D.1): base widths times 14 ratios from 0.2 to 1.5, rounded to multiples of 8. 20 epochs.

    What differs: any cost and any network, since Viterbi is variable elimination here, which takes residual networks, too. Costs
    are scaled to a limit of 0.04, the milliseconds of the authors' example, so that the bisection is the same in any unit.
    `solver` exact closes the duality gap of the relaxation. A 0 is put before the activation, theirs behind it: the same, as
    f(0) = 0 is asked for. The smallest network (b) runs on slices, theirs on masks: the gradients are the same. A width seen less
    than `seen` times has the error of its neighbours; theirs has 0. Theirs counts an error the other way round, and maximises.
    Theirs estimates by the last epoch in the paper, by the window in the code. Groups that cannot be masked (no normalisation of
    each channel alone, or an activation with f(0) != 0) keep their base width. Optimiser and schedule are those of the flags;
    theirs: SGD with momentum 0.9, weight decay 1e-5, batches of 512, a constant learning rate of 0.1 per 256 images.
    """

    free_options = ('solver', 'seconds')

    @dataclass(frozen=True)
    class Options(_OneShot.Options):
        window: int = option(WINDOW, WINDOW_HELP)
        seen: int = option(10, 'errors of a width that make an estimate; one of fewer is interpolated from its neighbours')
        solver: str = option('lagrangian', 'lagrangian (as published, optimal up to the gap that is reported) or exact')
        seconds: float = option(300., 'most seconds of the exact solver, for each budget')

        def __post_init__(self):
            for name, low in ('window', 0), ('seen', 1):
                if getattr(self, name) < low:
                    raise PolicyError(f'ows.{name} and aows.{name} must be at least {low}, not {getattr(self, name)}')
            if self.solver not in ('lagrangian', 'exact'):
                raise PolicyError(f"ows.solver and aows.solver must be lagrangian or exact, not '{self.solver}'")
            if not self.seconds > 0:
                raise PolicyError(f'ows.seconds and aows.seconds must be more than 0, not {self.seconds:g}')

    samples = False  # whether training needs the Gibbs distribution

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._start()

    def prepare(self, model: nn.Module, space: WidthSpace) -> Supernet:
        network = super().prepare(model, space)
        self._start()
        self.limits()  # refused now, or never
        return network

    def _start(self) -> None:
        self.estimates = MovingMeans([len(self.grid[name]) for name in self.free], self.options.window or WINDOW)
        self._images = 0  # of the first epoch
        self._limits: list[_Limited] = []

    def learn(self, step: Step, paths: np.ndarray, increase: torch.Tensor) -> None:
        everywhere = step.gather(torch.from_numpy(paths.T).to(increase.device)), step.gather(increase / len(paths))
        paths, values = (t.cpu().numpy() for t in everywhere)
        self.estimates.add(paths.T, values)
        self._images += len(values)

    def epoch_end(self, epoch: int) -> None:
        if epoch == 0 and self.options.window == 0:
            share = self._images // max(len(widths) for widths in self.grid.values())
            self.estimates.shorten(min(max(share, self.options.seen), WINDOW))

    def errors(self) -> Factors:
        """Delta: the estimated share of each width in the increase of the error over that of the largest network."""
        return Factors(self.grid, 0., dict(zip(self.free, self.estimates.means(self.options.seen))))

    def limits(self) -> list[_Limited]:
        """The budgets, as tables over the grid.

        Raises:
            PolicyError: The cost has no such tables, or the network is not one that variable elimination can work with.
        """
        if not self._limits:
            try:
                for budget in self.budgets:
                    cost = budget.cost.factors(self.grid)
                    limit = budget.limit if is_whole(cost) else budget.limit * (1 - 2 * ROUNDING)  # met however it is summed
                    wanted = self.samples or self.options.solver == 'lagrangian'
                    self._limits.append(_Limited(budget, cost, limit, Lagrangian(Elimination(
                        self.grid, cost.pairwise), cost, limit) if wanted else None))
            except (SolveError, CostError) as e:
                self._limits = []
                other = f', or --{self.name}.solver exact' if isinstance(e, SolveError) and not self.samples else ''
                raise PolicyError(f'{self.name}: {self.space.architecture}: {e}{other}') from e
        return self._limits

    def state_dict(self) -> dict[str, Any]:
        return self.estimates.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.estimates.load_state_dict(state)

    def choose(self, evaluate: Evaluate) -> list[Choice]:
        errors = self.errors()
        return [Choice(dict(self._answer(limited, errors).widths)) for limited in self.limits()]

    def _answer(self, limited: _Limited, errors: Factors) -> Solution:
        budget, cost, limit, lagrangian = limited
        try:
            found = relaxed = None if lagrangian is None else lagrangian.solve(errors)
            said = '' if relaxed is None else f'at most {relaxed.gap:.3g} above the least (duality gap)'
            if self.options.solver == 'exact':
                found = exact(errors, cost, limit, self.options.seconds)
                said = 'the least' + (f' ({relaxed.objective - found.objective:.3g} below the relaxation)' if relaxed else '')
        except SolveError as e:
            raise PolicyError(f'{self.name}: {budget.text}: {e}') from e
        self.notes.append(f'{budget.text}: {budget.cost.show(found.cost)}; cross-entropy estimated at {found.objective:+.4g} over '
                          f'that of the largest network, {said}')
        return found


class AOWS(OWS):
    """Adaptive optimal width search: OWS whose random widths come ever closer to those that are best within the budget.

    The training of OWS, to which `paths` adds, after the fifth of 20 epochs and before every iteration (section 6 of the paper and
    supplement B): estimate the errors anew, find gamma anew, and draw from

        p(c) ~ exp(-(sum_i Delta_i(c_i) + gamma * cost(c)) / T),

    with T from 1 at epoch 5 to 1e-2 at epoch 6, 1e-3 at epoch 10 and 5e-4 at epoch 20, log-linear between; stretched to
    --search-epochs. By default every layer draws from its marginal alone, as the authors' code does; `sampling` joint draws
    whole networks. With several budgets, updates take turns.

    What differs from the authors' code: see OWS. Estimates compare widths that were not sampled equally often, nor at the same
    time, nor beside the same neighbours; only the window corrects for that. Theirs, 100,000, is about an epoch's share of each
    width on ImageNet (1.28 million images, 14 widths); on fewer images, an epoch's share is the default here, too.
    """

    learns_budget = True
    samples = True

    @dataclass(frozen=True)
    class Options(OWS.Options):
        window: int = option(0, WINDOW_HELP)
        sampling: str = option('marginal', 'marginal (each group for itself, as the authors) or joint')

        def __post_init__(self):
            super().__post_init__()
            if self.sampling not in ('marginal', 'joint'):
                raise PolicyError(f"aows.sampling must be marginal or joint, not '{self.sampling}'")

    def paths(self, step: Step) -> np.ndarray:
        epoch = EPOCHS * step.progress
        if epoch < UNIFORM:
            return super().paths(step)
        return self.gibbs(step.update % len(self.budgets), temperature(epoch), step.image_rng, len(step.images))

    def gibbs(self, turn: int, temperature: float, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draws places in the grid, (groups with a choice, count), for one of the budgets at a temperature."""
        errors, lagrangian = self.errors(), self.limits()[turn].lagrangian
        plan, energies = lagrangian.plan, lagrangian.energies(errors, lagrangian.solve(errors).gamma) / temperature
        if self.options.sampling == 'joint':
            drawn = plan.sample(energies, rng, count)
        else:
            drawn = np.stack([draw(q, rng.random(count)) for q in plan.marginals(energies)])
        return drawn[[plan.names.index(name) for name in self.free]]


def temperature(epoch: float) -> float:
    """The temperature of the published schedule, of 20 epochs."""
    return math.exp(np.interp(epoch, list(TEMPERATURES), np.log(list(TEMPERATURES.values()))))
