"""DMCP: every group's width as a Markov chain whose transitions are learned, along with a shared network, within a budget."""
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..budget import Budget
from ..markov import TRANSITIONS, Chains
from ..space import WidthSpace
from ..supernet import Supernet
from .base import Choice, Evaluate, Grid, Policy, PolicyError, Step, option, random_widths

__all__ = ['DMCP', 'budget_loss', 'nearest_within']

DEAD_ZONE = 0.05  # share of the budget below which nothing pulls
LEAST = 0.99  # share of the budget that an answer uses, if there is such a network near enough
TRIES = 2000  # draws for one sample
LOSS_SCALE = 2. ** 10  # gradients in float16 would vanish without; exact in all other types

Widths = dict[str, int]


class DMCP(Policy):
    """Differentiable Markov channel pruning.

    "DMCP: Differentiable Markov Channel Pruning for Neural Networks" (Guo, Wang, Li and Yan, CVPR 2020), and what is known of
    the authors' released code. In words:

    - Chains: a group goes on from one width of its grid to the next with the probability p_k = sigmoid(alpha_k), and so reaches
      the k-th with the marginal q_k = p_1 ... p_k. Its expected width is w_0 + sum_k (w_k - w_(k-1)) q_k. `transition` exp is the
      variant p_k = exp(-alpha_k), alpha_k >= 0.
    - Weights: each batch runs the largest network, which learns from the labels, the smallest and two random ones, which learn from
      the largest one's softmax. Random widths are uniform; in the second half of the training, each network is drawn from the
      chains instead with a probability that rises.
    - Chains learn in the second half of the training, after the weights' gradients of every batch: the network runs at its largest
      widths with its channels multiplied by their marginals, and alpha (nothing else) is stepped by SGD (Nesterov momentum 0.9, no
      weight decay, learning rate from 0.5 to 0.1 by a cosine) along the loss plus 0.1 times the `budget_loss` of the expected cost.
    - Answer: the expected widths, moved to the grid; or with `result` sampled, 5 networks drawn from the chains until their
      cost is within 1 % of the budget, of which the best on the holdout is taken.
    - The grid is theirs, from 0.1 to 1.0 times the base width in steps of 0.1; --width-max 1.5 is what they use for MobileNetV2.

    What differs. The expected cost is that of any cost, and the true mean: the authors' code puts expected widths into the formula
    of the cost, which is the same for products of two groups, but not where a group meets itself (a convolution between layers
    that a residual addition ties). Their loss counts in millions and may become negative; ours is the same up to a constant, so
    its gradient is theirs in any unit. The budget is an upper limit: answers have 99 to 100 % of it, theirs 99 to 101 %.
    Expected widths are moved to the nearest of the grid, and from there step by step to the budget; theirs are rounded to whole
    channels. Of a stage that additions tie, alpha is one, as there.

    Two defaults are not theirs, since 40 epochs of ImageNet are about 25,000 updates of the chains (of 1,024 images), and other
    searches far fewer. The probability of a uniform draw falls to `uniform` = 0.78 at the end, whatever the length, which is what
    their factor of 0.9999 for every 10 of these updates comes to. And chains start, by `initial` budget, with one transition for
    all, at which their expected cost is on the budget. With `initial` zero, theirs, alpha is 0 and each transition 0.5: that is
    little more than the smallest network, and takes long to leave (in 1,000 updates of MobileNetV2, the budget loss alone brings
    what is expected from 19 % to 33 % of 150M MACs). Some hundred updates leave all transitions near to where they start, which
    the note on the answer shows: raise `lr` then.

    Gates act on the outputs of normalisations; in their MobileNetV2, on those of the ReLU6 behind. Groups without a normalisation
    keep their base width. Of several budgets, each has chains of its own, an update in every batch, and its turn to draw networks;
    the weights are shared. An update of the chains sees the weights before the update of this batch, theirs after it. Under
    --grad-accum-steps every batch updates the chains. Optimiser and schedule of the weights are those of the flags.
    """

    default_grid = 'dmcp'
    search_epochs = 40
    learns_budget = True
    free_options = ('result', 'samples')

    @dataclass(frozen=True)
    class Options:
        passes: int = option(4, 'networks trained on each batch: the largest, the smallest, the others random')
        start: float = option(0.5, 'share of the training after which the chains learn, too')
        uniform: float = option(0.78, 'probability of a uniform draw at the end of the training, instead of one from the chains')
        transition: str = option('sigmoid', 'transitions as a function of their parameters: sigmoid, or exp (of minus them)')
        initial: str = option('budget', 'where chains start: budget (their expected cost is on it) or zero (as published)')
        lr: float = option(0.5, 'learning rate of the chains, at first')
        lr_min: float = option(0.1, 'and at the end')
        weight: float = option(0.1, 'weight of the budget loss')
        result: str = option('expected', 'the answer: expected (widths, on the grid) or sampled (the best of some on the holdout)')
        samples: int = option(5, 'networks drawn for --dmcp.result sampled')
        strict: bool = option(False, 'refuse a network of which groups have no normalisation, instead of keeping their base width')

        def __post_init__(self):
            for name, low in ('passes', 2), ('samples', 1):
                if getattr(self, name) < low:
                    raise PolicyError(f'dmcp.{name} must be at least {low}, not {getattr(self, name)}')
            for name, known in ('transition', [*TRANSITIONS]), ('initial', ['budget', 'zero']), ('result', ['expected', 'sampled']):
                if getattr(self, name) not in known:
                    raise PolicyError(f"dmcp.{name} must be {' or '.join(known)}, not '{getattr(self, name)}'")
            if not 0 <= self.start < 1:
                raise PolicyError(f'dmcp.start must be from 0 to below 1, not {self.start:g}')
            if not 0 < self.uniform <= 1:
                raise PolicyError(f'dmcp.uniform must be above 0, to 1, not {self.uniform:g}')
            for name in 'lr', 'lr_min', 'weight':
                if not 0 <= getattr(self, name) < math.inf:
                    raise PolicyError(f'dmcp.{name} must be at least 0, not {getattr(self, name):g}')

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._start()

    def prepare(self, model: nn.Module, space: WidthSpace) -> Supernet:
        """The shared network. Groups that no normalisation governs keep their base width from here on (see `keep_base_widths`)."""
        network = Supernet(model, space)
        self.keep_base_widths([name for name in self.grid if name in network.ungated],
                              'no normalisation governs them, on which a gate could act', self.options.strict)
        self._start()
        return network

    def _start(self) -> None:
        if all(len(widths) == 1 for widths in self.grid.values()):
            raise PolicyError(f'dmcp: every group of {self.space.architecture} has one width to choose from: give another --grid')
        self.chains = [Chains(self.grid, self.options.transition) for _ in self.budgets]
        if self.options.initial == 'budget':
            for chains, budget in zip(self.chains, self.budgets):
                chains.spread(budget.cost, budget.limit * (1 - DEAD_ZONE / 2))
        self.optimizer = torch.optim.SGD([c.alpha for c in self.chains], self.options.lr, momentum=0.9, nesterov=True)

    # -- training ----------------------------------------------------------------------------------------------

    def train_step(self, step: Step) -> None:
        teacher = step.forward(self.largest)
        step.backward(step.loss(teacher))
        teacher = teacher.detach()
        for widths in (self.smallest, *self.scheduled(step)):
            step.backward(step.distill(step.forward(widths), teacher))
        if step.progress >= self.options.start:
            self.learn(step)

    def scheduled(self, step: Step) -> Iterator[Widths]:
        """The random networks of a batch: each a uniform draw with the probability P, else one from the chains."""
        number = self.options.passes - 2
        for i in range(number):
            if step.rng.random() < self.options.uniform ** self._learned(step):  # P
                yield random_widths(self.grid, step.rng)
            else:
                turn = (step.update * number + i) % len(self.chains)
                yield self.chains[turn].sample(step.rng, 1)[0]

    def learn(self, step: Step) -> None:
        """One update of the chains of every budget. Neither weights and their gradients nor running statistics change."""
        units = {name: self.space[name].unit for name in self.grid}
        for chains, budget in zip(self.chains, self.budgets):
            gates = chains.gates(units, step.images.device)
            loss = step.loss(step.forward(self.largest, gates=gates, statistics={}))
            gradient, = torch.autograd.grad(loss * LOSS_SCALE, chains.alpha)
            gradient = step.gather((gradient / LOSS_SCALE).float().to(loss.device)[None]).mean(0)  # of all processes
            pull, = torch.autograd.grad(budget_loss(chains.expected(budget.cost), budget.limit), chains.alpha)
            chains.alpha.grad = gradient.to(pull) + self.options.weight * pull
        if all(c.alpha.grad.isfinite().all() for c in self.chains):  # float16 may overflow in one batch
            for group in self.optimizer.param_groups:
                high, low = self.options.lr, self.options.lr_min
                group['lr'] = low + (high - low) * (1 + math.cos(math.pi * self._learned(step))) / 2
            self.optimizer.step()
            for chains in self.chains:
                chains.clamp()

    def _learned(self, step: Step) -> float:
        """Share of the chains' training that is done."""
        return max(step.progress - self.options.start, 0.) / (1 - self.options.start)

    def state_dict(self) -> dict[str, Any]:
        return {'alpha': [c.alpha.detach().clone() for c in self.chains], 'optimizer': self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if [a.shape for a in state['alpha']] != [c.alpha.shape for c in self.chains]:
            raise PolicyError('dmcp: its chains are those of another grid, or of other budgets')
        for chains, alpha in zip(self.chains, state['alpha']):
            chains.alpha.data.copy_(alpha)
        self.optimizer.load_state_dict(state['optimizer'])

    # -- answers -----------------------------------------------------------------------------------------------

    @property
    def evaluations(self) -> int:
        return self.options.samples * len(self.budgets) if self.options.result == 'sampled' else 0

    @torch.no_grad()
    def choose(self, evaluate: Evaluate) -> list[Choice]:
        answers = []
        for chains, budget in zip(self.chains, self.budgets):
            show, limit = budget.cost.show, budget.limit
            expected = chains.expected(budget.cost).item()
            p = torch.cat([*chains.transitions().values()])
            said = (f'{budget.text}: {show(type(limit)(expected))} expected ({100 * expected / limit:.1f} % of the budget), '
                    f'transitions {p.min():.2f} to {p.max():.2f}')
            if self.options.result == 'sampled':
                drawn, told = self._sampled(chains, budget)
                found = max(drawn, key=lambda widths: evaluate(widths, statistics='recalibrated').rank) if drawn[1:] else drawn[0]
                said += f'; {told}'
            else:
                found = nearest_within(budget, self.grid, {name: w.item() for name, w in chains.expected_widths().items()})
            cost = budget.cost(found)
            self.notes.append(f'{said}; the network has {show(cost)} ({100 * cost / limit:.1f} %)' + (
                '' if cost >= LEAST * limit else ': none of the grid that is near to it has 99 %'))
            answers.append(Choice(found))
        return answers

    def _sampled(self, chains: Chains, budget: Budget) -> tuple[list[Widths], str]:
        """Different networks of the chains with 99 to 100 % of a budget, and what there is to say of them."""
        number, found, spare = self.options.samples, [], []
        for widths in chains.sample(np.random.default_rng(self.seed), TRIES * number):
            cost = budget.cost(widths)
            if LEAST * budget.limit <= cost <= budget.limit:
                found.append(widths)
                if len(found) == number:
                    break
            else:
                spare.append((abs(budget.limit - cost), widths))
        if not found:
            nearest = min(spare, key=lambda entry: entry[0])[1]
            return [nearest_within(budget, self.grid, nearest)], (
                f'none of {len(spare)} networks drawn has 99 to 100 % of the budget: the nearest was moved there')
        few = '' if len(found) == number else f', as no more of {len(spare) + len(found)} drawn have 99 to 100 % of the budget'
        return list({tuple(widths.items()): widths for widths in found}.values()), f'the best of {len(found)} sampled{few}'


def budget_loss(expected: torch.Tensor, limit: float) -> torch.Tensor:
    """The log of how far an expected cost E is from a budget T, in widths of the dead zone; 0 in the zone, 0.95 T <= E < T.

    Below it, log((T - E) / 0.05 T), above it, log((E - 0.95 T) / 0.05 T): never negative, and continuous. The authors' code has
    log(r |E - T|) and log(r |E - 0.95 T|) in millions, with r = 0.1 far away and else 1: another constant, the same gradient.
    """
    share = expected / limit
    if share < 1 - DEAD_ZONE:
        return torch.log((1 - share) / DEAD_ZONE)
    return share * 0 if share < 1 else torch.log((share - 1 + DEAD_ZONE) / DEAD_ZONE)


def nearest_within(budget: Budget, grid: Grid, wanted: Mapping[str, float]) -> Widths:
    """A network of the grid near to some widths, with 99 to 100 % of a budget if there is one.

    Every width goes to the nearest of its grid. Then, one step of the grid at a time: while over the budget, the group that is
    the furthest above what is wanted shrinks; while below 99 % of it, of the groups whose next width fits, the one that is the
    furthest below grows; where none fits, one group grows and another shrinks, in the way that strays least.

    Args:
        budget: What to meet; the smallest network of the grid must.
        grid: Group -> widths, ascending.
        wanted: Group -> width, which may be between those of the grid.
    """
    place = {name: float(np.interp(wanted[name], levels, np.arange(len(levels)))) for name, levels in grid.items()}
    at = {name: math.ceil(p - 0.5) for name, p in place.items()}

    def cost(steps: Mapping[str, int]) -> float:
        return budget.cost({name: grid[name][i + steps.get(name, 0)] for name, i in at.items()})

    def move(steps: Mapping[str, int]) -> None:
        for name, step in steps.items():
            at[name] += step

    def strays(steps: Mapping[str, int]) -> float:
        """By how much the sum of squared distances grows, in steps of the grid."""
        return sum((at[n] + s - place[n]) ** 2 - (at[n] - place[n]) ** 2 for n, s in steps.items())

    while (now := cost({})) > budget.limit:
        move(min(({name: -1} for name, i in at.items() if i > 0), key=strays))
    while now < LEAST * budget.limit:
        up = [{name: 1} for name, i in at.items() if i + 1 < len(grid[name])]
        down = [{name: -1} for name, i in at.items() if i > 0]
        fit = [steps for steps in up if now < cost(steps) <= budget.limit]
        if fit:
            move(min(fit, key=strays))
        else:
            swaps = [{**u, **d} for u in up for d in down if u.keys() != d.keys()]
            costs = [cost(steps) for steps in swaps]
            better = [(max(LEAST * budget.limit - c, 0), strays(s), i) for i, (s, c) in enumerate(zip(swaps, costs))
                      if now < c <= budget.limit]
            if not better:
                break
            move(swaps[min(better)[2]])
        now = cost({})
    return {name: grid[name][i] for name, i in at.items()}
