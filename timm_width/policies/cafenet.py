"""CafeNet: a shared network in which each width may be made of several sets of channels, and is as good as the best of them."""
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
from torch import nn

from ..assignment import assignments, channels
from ..bins import space_size
from ..budget import Budget
from ..space import WidthSpace
from ..stages import are_finest, first_bins, stage_budgets, stage_grid
from ..supernet import Supernet
from .base import (
    Choice,
    Evaluate,
    Grid,
    Policy,
    PolicyError,
    Score,
    Step,
    fill_budget,
    first_within,
    greedy_path,
    greedy_scores,
    option,
    random_widths,
)

__all__ = ['CafeNet']

TRIES = 100  # draws of one network before there are taken to be no more
PARENTS = 10
MUTATION = 0.1  # of each width; in a network of few groups more, so that a mutant has MUTATED new widths on average:
MUTATED = 2  # at the edge of the budget, one width can only grow where another shrinks

Widths = dict[str, int]
Network = dict[str, Union[int, np.ndarray]]  # a width each, made of its first channels or of the steps of those indices
Best = Callable[[Mapping[str, int]], tuple[float, float]]  # the rank of a network


class CafeNet(Policy):
    """Locally free weight sharing: min-min training, max-max search, FLOPs-sensitive bins.

    "Locally free weight sharing for network width search" (CafeNet, Su et al., ICLR 2021). There is no released code. Equations:

    - Bins (6 to 9): the grid `flops`. Channels come and go in bins of about the same MACs, of `beta` channels or more.
    - Assignments (5): a width of c bins keeps the bins 1 to c - r - 1, and r + 1 bins out of the zone from c - r to c + r.
    - Min-min (11, 12): for each batch a network is drawn, every width of the grid equally likely; of its assignments the one with
      the least loss learns. In the first `explore` (the paper's lambda) of the updates, one at random learns instead.
    - Max-max (13): a network is as good on the holdout as the best of its assignments. The best network within the budget is
      looked for by `search`: CafeNet-E (population 40, 50 iterations), CafeNet-R (2,000 networks) or greedily (Table 9).
    - Stages (10): with several, each but the last is searched at a budget between the cost of the first shared network and the
      one asked for, in equal steps; what it finds is the largest network of the next, whose `beta` is smaller by `alpha`.
      No bin becomes larger than in the stage before, or the least width: so every budget that could be met still can. How much
      smaller bins become depends on what is found, so budgets must be met on the grid of the first stage already.

    What the paper leaves open, and how it is done here. A network of L layers has up to 3^L combinations of assignments at r = 1,
    but the times of Table 8 fit 1, 3, 10 and 35 forward passes for r = 0 to 3: so a network has that many candidates. By default,
    `tied`, candidate a takes the assignment a of every layer (of a layer that has fewer, counted round); `random` draws those of
    each layer, `coordinate` draws another than the first for one layer. The first candidate is always the fixed pattern, all first
    channels. Groups whose channels have an order keep to it. Near its ends a zone is clipped, as in Figure 1. The last bin
    takes in the channels left over; an assignment keeps exactly as many channels as its width has, so costs do not depend on it.
    Evolution has the operators of BCNetV2, by the same authors: of the best 10, half the children are mutants (each width drawn
    anew with probability 0.1, or 2 of them on average), half crossed (each width from either parent), all unseen and at `least` 0.8
    to 1 of the budget;
    the first of the 50 iterations is random, so that CafeNet-E scores 2,000 networks, as CafeNet-R does. Each stage trains a new
    network, as in Algorithm 1, and searches it, as section 3.3 says (Algorithm 1 searches the last alone). Optimiser and schedule
    are those of the flags; theirs: SGD with momentum 0.9, a cosine from 0.1, 300 epochs, for networks trained alone.

    The winner's forward pass need not run twice: with `reuse`, all candidates run with gradients, of which those of the best so far
    are held: two forward passes in memory instead of one. Running statistics are those of the winner alone, either way. All
    candidates of a batch draw the same dropout. Under --grad-accum-steps, every batch of an update has a winner of its own.
    """

    default_grid = 'flops'
    free_options = ('search', 'samples', 'population', 'iterations', 'least', 'statistics', 'batches')

    @dataclass(frozen=True)
    class Options:
        r: int = option(1, 'offset of the free channels, in bins: 0 (the fixed pattern) to 3')
        candidates: str = option('tied', 'how the sets of channels of layers make one of the network: tied (the same choice '
                                 'in every layer), random (another in each) or coordinate (the first ones but in one layer)')
        explore: float = option(0., 'share of the training in which a random set of channels learns, not the best one (lambda)')
        reuse: bool = option(True, 'hold the forward pass of the best set, instead of running it again: faster, more memory')
        search: str = option('evolutionary', 'evolutionary (CafeNet-E), random (CafeNet-R) or greedy')
        samples: int = option(2000, 'networks of the random search')
        population: int = option(40, 'networks of an iteration of the evolutionary search')
        iterations: int = option(50, 'iterations of the evolutionary search')
        least: float = option(0.8, 'share of the budget that a network must use')
        statistics: str = option('recalibrated', 'statistics of batch norms while searching: recalibrated, batch or running')
        batches: int = option(0, 'batches of the holdout on which networks are compared; 0: all')
        stages: int = option(1, 'number of stages')
        alpha: float = option(2., 'with several stages: by how much the bins of a stage are smaller than those of the one before; '
                              'above 1')
        beta: Optional[float] = option(None, 'least size of a bin in channels, in the first stage; may be below 1 (default: that '
                                       'of --grid flops:BETA, or 1)')

        def __post_init__(self):
            if self.r not in range(4):
                raise PolicyError(f'cafenet.r must be 0, 1, 2 or 3, not {self.r}')
            for name, known in ('candidates', CANDIDATES), ('search', SEARCHES):
                if getattr(self, name) not in known:
                    raise PolicyError(f"cafenet.{name} must be {', '.join(known)}, not '{getattr(self, name)}'")
            if self.statistics not in ('recalibrated', 'batch', 'running'):
                raise PolicyError(f"cafenet.statistics must be recalibrated, batch or running, not '{self.statistics}'")
            for name, low in ('samples', 1), ('population', 2), ('iterations', 1), ('batches', 0), ('stages', 1):
                if getattr(self, name) < low:
                    raise PolicyError(f'cafenet.{name} must be at least {low}, not {getattr(self, name)}')
            for name in 'explore', 'least':
                if not 0 <= getattr(self, name) <= 1:
                    raise PolicyError(f'cafenet.{name} must be from 0 to 1, not {getattr(self, name):g}')
            if not 1 < self.alpha < math.inf:
                raise PolicyError(f'cafenet.alpha must be above 1, not {self.alpha:g}: bins become smaller from stage to stage')
            if self.beta is not None and not 0 < self.beta < math.inf:
                raise PolicyError(f'cafenet.beta must be above 0, not {self.beta:g}')
            if self.stages == 1 and self.alpha != 2:
                raise PolicyError(f'cafenet.alpha {self.alpha:g} is for several stages: give cafenet.stages, or leave it out')

        @property
        def of_bins(self) -> str:
            """Those given that are for bins of about the same MACs alone."""
            given = {'stages': self.stages > 1 and self.stages, 'beta': self.beta}
            return ' with '.join(f'cafenet.{name} {value:g}' for name, value in given.items() if value)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stage, self.beta = 1, self.options.beta or 1.
        self.whole = [b.cost(self.largest) for b in self.budgets]
        self.network: Optional[Supernet] = None
        self.bins: dict[str, int] = {}  # their sizes
        self.floor: dict[str, int] = {}  # least widths that were asked for
        if self.options.stages > 1 or self.options.beta is not None:
            bins = first_bins(self.space, self.grid, self.beta)
            if bins is None:
                raise PolicyError(f'{self.options.of_bins} needs --grid flops:{self.beta:g}, and no --width-divisor')
            self.bins, self.floor = bins, {name: w[0] for name, w in self.grid.items() if w[0] > bins[name]}

    def prepare(self, model: nn.Module, space: WidthSpace) -> Supernet:
        self.network = Supernet(model, space)
        digits = sum(math.log10(len(levels)) for levels in self.grid.values())  # their product may be more than a float holds
        self.notes.append(f'stage {self.stage} of {self.options.stages}: 10^{digits:.1f} networks, each of up to {self.count} sets '
                          f'of channels; the search after this training takes up to {self.evaluations:,} scores')
        if self.stage < self.options.stages and are_finest(self.space, self.bins):
            self.notes.append(f'all bins of stage {self.stage} are of one channel: those of later stages cannot be smaller, only '
                              'their budgets are (give fewer cafenet.stages, a smaller cafenet.alpha or a larger cafenet.beta)')
        return self.network

    @classmethod
    def settle(cls, options: 'CafeNet.Options', rule: str) -> tuple['CafeNet.Options', str]:
        """The size of bins, from the option or from the grid."""
        name, _, text = (rule or cls.default_grid).partition(':')
        if name != 'flops':
            if options.of_bins:
                raise PolicyError(f'{options.of_bins} is for bins of about the same MACs, --grid flops or '
                                  f'flops:BETA, and --grid is {rule}')
            return options, rule
        try:
            number = float(text or 1)
        except ValueError:
            return options, rule  # no grid, which is refused where grids are made
        if rule and options.beta is not None and number != options.beta:
            raise PolicyError(f'--grid {rule} says that the least bin has {number:g} channels, and cafenet.beta {options.beta:g}: '
                              'give one of them')
        if options.beta is not None:
            return options, f'flops:{options.beta:g}'
        return (replace(options, beta=number) if options.stages > 1 and number > 0 else options), rule or cls.default_grid

    def state_dict(self) -> dict[str, Any]:
        """What its training depends on: the grid; in several stages, the search that decides the grid of the next, too."""
        options = {k: v for k, v in asdict(self.options).items() if k in self.free_options} if self.options.stages > 1 else {}
        return {'grid': {name: list(widths) for name, widths in self.grid.items()}, 'options': options}

    def check_state(self, state: Mapping[str, Any]) -> None:
        own = self.state_dict()
        if other := [k for k in own['options'] if state['options'].get(k) != own['options'][k]]:
            raise PolicyError('in several stages, what a search finds is trained next: it was begun with ' + ', '.join(
                f"cafenet.{k} {state['options'].get(k)}" for k in other))
        names = sorted({*own['grid'], *state['grid']})
        if other := [n for n in names if own['grid'].get(n) != state['grid'].get(n)]:
            raise PolicyError(f"stage {self.stage} was begun on another grid, of '{other[0]}' and {len(other) - 1} other groups: "
                              'for another budget, or with another latency model')

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_state(state)

    # -- assignments -------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Candidates of a network, k: 1, 3, 10 or 35."""
        return math.comb(2 * self.options.r + 1, self.options.r + 1)

    def candidates(self, widths: Mapping[str, int], rng: np.random.Generator) -> list[Network]:
        """S_c: the networks of some widths that are compared, all different; the fixed pattern first."""
        free = []
        for name, levels in self.grid.items():
            r = 0 if self.space[name].ordered else self.options.r
            free.append(assignments(levels.index(widths[name]) + 1, len(levels), r))
        picks = CANDIDATES[self.options.candidates](np.array([len(f) for f in free]), self.count, rng)
        return [self._network(widths, free, pick) for pick in dict.fromkeys(map(tuple, picks.tolist()))]

    def _network(self, widths: Mapping[str, int], free: Sequence[Sequence[Sequence[int]]], pick: Sequence[int]) -> Network:
        found: Network = dict(widths)
        for (name, levels), bins, a in zip(self.grid.items(), free, pick):
            unit = self.space[name].unit
            if (kept := channels(bins[a], [w // unit for w in levels])) is not None:
                found[name] = kept
        return found

    # -- training: min-min -------------------------------------------------------------------------------------

    def train_step(self, step: Step) -> None:
        widths = random_widths(self.grid, step.rng)  # c ~ U(C)
        networks = self.candidates(widths, step.rng)
        if step.progress < self.options.explore:
            networks = [networks[step.rng.integers(len(networks))]]
        if len(networks) == 1:
            step.backward(step.loss(step.forward(networks[0])))
        elif self.options.reuse:
            self._learn_best(step, networks)
        else:
            rewind, losses = self._rewind(), []
            with torch.no_grad():  # leaves running statistics alone, too
                for network in networks:
                    losses.append(_mean(step, step.loss(step.forward(network))))
                    rewind()
            step.backward(step.loss(step.forward(networks[int(np.argmin(losses))])))

    def _learn_best(self, step: Step, networks: Sequence[Network]) -> None:
        """Eqs. 11 and 12 with one forward pass for each candidate."""
        least, best, rewind = math.inf, None, self._rewind()
        for network in networks:
            rewind()
            statistics: dict[str, Any] = {}
            loss = step.loss(step.forward(network, statistics=statistics))
            value = _mean(step, loss)
            if best is None or value < least or math.isnan(value):
                least, best = value, (loss, statistics)
            del loss  # and what its backward pass would need
        self.network.keep(best[1])
        step.backward(best[0])

    def _rewind(self) -> Callable[[], None]:
        """What brings torch's random numbers back to here: or the least loss would be that of a lucky dropout."""
        device = next(self.network.parameters()).device
        of_device = None if device.type == 'cpu' else torch.get_device_module(device)
        which = () if device.type == 'mps' else (device,)  # there is one
        here, there = torch.get_rng_state(), of_device and of_device.get_rng_state(*which)

        def rewind() -> None:
            torch.set_rng_state(here)
            if of_device is not None:
                of_device.set_rng_state(there, *which)
        return rewind

    # -- search: max-max ---------------------------------------------------------------------------------------

    @property
    def evaluations(self) -> int:
        return self.count * SEARCHES[self.options.search].most(self)

    def choose(self, evaluate: Evaluate) -> list[Choice]:
        winners: dict[tuple, Network] = {}

        def best(widths: Mapping[str, int]) -> tuple[float, float]:
            """Eq. 13: the rank of the best assignment."""
            places = _key(widths, self.grid)
            scored: list[tuple[Score, Network]] = []
            for network in self.candidates(widths, np.random.default_rng([self.seed, *places])):
                found = evaluate(network, batches=self.options.batches or None, statistics=self.options.statistics)
                scored.append((found, network))
            score, winners[places] = max(scored, key=lambda entry: entry[0].rank)
            return score.rank

        return [self._choice(widths, winners) for widths in SEARCHES[self.options.search].run(self, best)]

    def _choice(self, widths: Mapping[str, int], winners: Mapping[tuple, Network]) -> Choice:
        network = winners.get(_key(widths, self.grid), {})  # the largest of all is not scored by a greedy search
        return Choice(dict(widths), channels={n: tuple(w.tolist()) for n, w in network.items() if isinstance(w, np.ndarray)})

    def by_samples(self, best: Best) -> list[Widths]:
        """CafeNet-R."""
        return [max(self._drawn(goal, self.options.samples, np.random.default_rng(self.seed)), key=best) for goal in self.goals]

    def by_evolution(self, best: Best) -> list[Widths]:
        """CafeNet-E."""
        return [self._evolve(goal, best) for goal in self.goals]

    def greedily(self, best: Best) -> list[Widths]:
        """One step of the grid at a time, in the group where it hurts least; one path for all budgets."""
        return [c.widths for c in first_within(greedy_path(self.grid, self.largest, lambda _, ws: max(ws, key=best)), self.goals)]

    def _evolve(self, goal: Budget, best: Best) -> Widths:
        rng, seen = np.random.default_rng(self.seed), {}
        ranked: list[tuple[tuple[float, float], Widths]] = []
        for _ in range(self.options.iterations):
            parents = [widths for _, widths in ranked[:PARENTS]]
            children = [] if not parents else list(self._children(goal, parents, seen, rng))
            children += self._drawn(goal, self.options.population - len(children), rng, seen)
            if not children:
                break  # all networks have been seen
            ranked = sorted([*ranked, *((best(widths), widths) for widths in children)], key=lambda entry: entry[0], reverse=True)
        return ranked[0][1]

    def _children(self, goal: Budget, parents: Sequence[Widths], seen: dict, rng: np.random.Generator) -> Iterator[Widths]:
        """Mutants and crossings of the parents that are within the budget and new; fewer where these are hard to find."""
        half, share = self.options.population // 2, max(MUTATION, min(MUTATED / len(self.grid), 1))
        for i in range(self.options.population):
            for _ in range(TRIES):
                first, second = (parents[rng.integers(len(parents))] for _ in range(2))
                if i < half:
                    drawn = random_widths(self.grid, rng)
                    child = {n: drawn[n] if rng.random() < share else w for n, w in first.items()}
                else:
                    child = {n: w if rng.random() < 0.5 else second[n] for n, w in first.items()}
                if (key := _key(child, self.grid)) not in seen and self._fills(goal, child):
                    seen[key] = child
                    yield child
                    break

    def _drawn(self, goal: Budget, number: int, rng: np.random.Generator, seen: Optional[dict] = None) -> list[Widths]:
        """New random networks: ratios drawn evenly, all scaled to a share of the budget drawn from `least` to 1.

        Fewer where no more are found; where there is none that fills the budget so far, the one that does best.
        """
        seen, found, tries = {} if seen is None else seen, [], 0
        spare: list[Widths] = []
        while len(found) < number and tries < TRIES:
            shape = {n: rng.uniform(levels[0], levels[-1]) / self.space[n].size for n, levels in self.grid.items()}
            share = rng.uniform(self.options.least, 1)
            widths = fill_budget(self.space, replace(goal, limit=share * goal.limit), self.grid, shape)
            key = _key(widths, self.grid)
            tries += 1
            if key in seen or not goal.met(widths):
                continue
            if self._fills(goal, widths):
                seen[key] = widths
                found.append(widths)
                tries = 0
            else:
                spare.append(widths)
        if not seen and number > 0:
            found.append(max(spare or [self.smallest], key=goal.cost))
            seen[_key(found[0], self.grid)] = found[0]
        return found

    def _fills(self, goal: Budget, widths: Mapping[str, int]) -> bool:
        return self.options.least * goal.limit <= goal.cost(widths) <= goal.limit

    # -- stages ------------------------------------------------------------------------------------------------

    @property
    def goals(self) -> Sequence[Budget]:
        """FLOPs(t), eq. 10, which are the budgets in the last stage."""
        return stage_budgets(self.budgets, self.whole, self.stage, self.options.stages)

    def following(self, found: Sequence[Choice]) -> list['CafeNet']:
        """For each budget the next stage: within what was found, with smaller bins.

        Raises:
            PolicyError: A stage has no network within its budget.
        """
        if self.stage >= self.options.stages:
            return []
        after = []
        for budget, whole, choice in zip(self.budgets, self.whole, found):
            beta = self.beta / self.options.alpha
            grid, bins = stage_grid(self.space, budget, choice.widths, beta, self.bins, self.smallest, self.floor)
            policy = type(self)(self.space, [budget], grid, replace(self.options, stages=1, alpha=2., beta=None), self.seed)
            policy.options, policy.stage, policy.beta = self.options, self.stage + 1, beta
            policy.bins, policy.floor, policy.whole = bins, self.floor, [whole]
            [goal] = policy.goals
            if not goal.met(policy.smallest):
                raise PolicyError(f'stage {policy.stage}: {goal} is less than the smallest network of its grid, '
                                  f'{goal.cost.show(goal.cost(policy.smallest))}: give fewer cafenet.stages')
            after.append(policy)
        return after


def _mean(step: Step, loss: torch.Tensor) -> float:
    """A loss over the batches of all processes, so that the same candidate wins in each of them."""
    return float(step.gather(loss.detach().float().reshape(1)).mean())


def _key(widths: Mapping[str, int], grid: Grid) -> tuple[int, ...]:
    return tuple(levels.index(widths[name]) for name, levels in grid.items())


# -- how a network's assignments follow from those of its layers: (assignments of each layer, k, rng) -> (k, layers) places ---


def _tied(counts: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    return np.arange(k)[:, None] % counts


def _drawn_each(counts: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([np.zeros((1, len(counts)), dtype=int), rng.integers(counts, size=(k - 1, len(counts)))])


def _one_other(counts: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    picks = np.zeros((k, len(counts)), dtype=int)
    several = np.flatnonzero(counts > 1)
    for row in picks[1:] if len(several) else ():
        i = rng.choice(several)
        row[i] = rng.integers(1, counts[i])
    return picks


CANDIDATES = {'tied': _tied, 'random': _drawn_each, 'coordinate': _one_other}


class _Search(NamedTuple):
    """A search.

    Attributes:
        run: Policy and rank of a network -> the answers.
        most: Policy -> how many networks it ranks at most.
    """
    run: Callable[[CafeNet, Best], list[Widths]]
    most: Callable[[CafeNet], int]


def _drawn_at_most(policy: CafeNet, number: int) -> int:
    """So many different networks for each budget, if there are."""
    return min(number, space_size(policy.grid)) * len(policy.budgets)


SEARCHES = {
    'evolutionary': _Search(CafeNet.by_evolution, lambda p: _drawn_at_most(p, p.options.iterations * p.options.population)),
    'random': _Search(CafeNet.by_samples, lambda p: _drawn_at_most(p, p.options.samples)),
    'greedy': _Search(CafeNet.greedily, lambda p: greedy_scores(p.grid)),
}
