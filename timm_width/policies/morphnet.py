"""MorphNet: training under a penalty on normalisation scales that costs more where channels do; then growth to the budget."""
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from torch import nn

from ..budget import Budget
from ..cost import Cost
from ..space import Site, WidthError, WidthSpace
from ..supernet import Supernet
from .base import Choice, Evaluate, Policy, PolicyError, Step, fill_budget, option

__all__ = ['MorphNet']

TINY = 1e-24  # below it, the square root of L2 grouping has no gradient

Counts = tuple[int, ...]  # of each group that has scales: its steps that are alive


class MorphNet(Policy):
    """Shrink by a sparsifying penalty on normalisation scales, expand by one factor for all widths; and again.

    "MorphNet: Fast & Simple Resource-Constrained Structure Learning of Deep Networks" (Gordon, Eban, Nachum, Chen, Wu, Yang and
    Choi, CVPR 2018), with what the released code does where the paper is silent:

    - Penalty: a convolution that costs C n_in n_out adds C (A_in sum|gamma_out| + A_out sum|gamma_in|), with gamma the scales of
      the normalisations behind a layer and A the channels alive, through which no gradient flows. That is the sum over all groups
      of the cost's derivative by a group's width, taken at the alive widths, times the sum of the group's |gamma|: so it is
      computed, of any cost, for terms over one group, over two, or over one squared (both published terms fall on one group).
      Of a measured cost the derivative is the difference to the next smaller width measured.
    - Alive are the channels with |gamma| > `threshold`.
    - Ties: of layers whose channels live and die together (residual sums, depthwise convolutions), channel j has the largest
      |gamma_j| of all of them, or with `grouping` l2 their root of the sum of squares; it is alive if it is in one of them.
      A group of several channels per step (grouped convolutions) is treated so, too: a step is worth as much as its best channel.
    - Strength: loss = cross-entropy + `strength` * penalty / (cost of the network trained), the normalisation of "Width
      Transfer: On the (In)variance of Width Optimization" (2021), whose searches take 40 epochs.
    - Shrink: widths are the alive counts, at least one step. A residual block of which nothing is left alive on any path is
      removed, where the cost knows of that (a latency that was measured of whole networks does not).
    - Expand: all widths by the largest factor within the budget, found by bisection. One training serves all budgets.
    - Iterate: with several `rounds`, the network found is trained in the place of the first one, by the same recipe, and so on.

    The network trained is the base itself, not a larger one; what is found may be wider, in the default grid up to 4 times in
    unit steps (a latency to be measured needs a coarser one). The channels that lived are not the first ones, and those that
    were added never lived: as published, the answer tells widths alone and is trained anew. No image of the holdout is used.
    A fixed learning rate is recommended (`--sched none`), as scales die while it is large, and no weight decay on scales,
    as is timm's default.

    What differs: the code counts a depthwise convolution's |gamma| twice, for its input and its output, which are one group;
    here, as the derivative says, once. Groups that no normalisation governs keep their base width, and are not scaled either.
    Costs are taken within the widths of the grid, so a group that is dead is priced at its least width. Of several kinds of
    budgets (MACs and latency, say) the penalty is the mean.
    """

    default_grid = 'all'
    search_epochs = 40

    @dataclass(frozen=True)
    class Options:
        strength: float = option(1., 'of the penalty; 1 is the inverse of the cost of the network trained, and prunes in trainings '
                                     'of many thousand updates. In short ones too little dies: try 3 to 30, and watch the channels '
                                     'that each epoch reports alive')
        threshold: float = option(0.01, 'a channel is alive whose scale is larger; published are 0.01 to 0.05')
        grouping: str = option('max', 'how the scales of tied layers make one: max or l2')
        rounds: int = option(1, 'times to shrink and expand, each with a training of its own, from the network of the one before')
        strict: bool = option(False, 'refuse models with groups that would keep their base width')

        def __post_init__(self):
            for name in 'strength', 'threshold':
                if not 0 <= getattr(self, name) < float('inf'):
                    raise PolicyError(f'morphnet.{name} must be at least 0, not {getattr(self, name):g}')
            if self.grouping not in ('max', 'l2'):
                raise PolicyError(f"morphnet.grouping must be max or l2, not '{self.grouping}'")
            if self.rounds < 1:
                raise PolicyError(f'morphnet.rounds must be at least 1, not {self.rounds}')

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.round = 1
        self.begin = Choice({name: self.space[name].size for name in self.grid})  # the network trained
        self.scales: Optional[_Scales] = None
        self._slopes: Optional[tuple[Counts, torch.Tensor]] = None  # those of the last step, and of which channels alive

    @property
    def start(self) -> Mapping[str, int]:
        return self.begin.widths

    # -- training ----------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, space: WidthSpace) -> Supernet:
        """The network to train. Groups without scales keep their base width from here on.

        Raises:
            PolicyError: There are such groups and --morphnet.strict was given, the network cannot have their base width, or there
                are no others.
            BudgetError: The budgets cannot be met without them.
        """
        network = Supernet(model, space)
        self._keep([name for name in self.grid if name in network.ungated])
        self.scales = _Scales(network, [name for name in self.grid if name not in network.ungated], self.begin.skips)
        self._slopes = None
        return network

    def _keep(self, fixed: Sequence[str]) -> None:
        if not fixed:
            return
        named = ', '.join(fixed[:4]) + (f' and {len(fixed) - 4} more' if len(fixed) > 4 else '')
        why = f'no normalisation governs {named}'
        if self.options.strict:
            raise PolicyError(f'--morphnet.strict: {why}; keep their widths with --fix')
        if len(fixed) == len(self.grid):
            raise PolicyError(f'morphnet can search no group of {self.space.architecture}: {why}')
        for name in fixed:
            if self.space[name].size not in self.grid[name]:
                raise PolicyError(f"morphnet: {why}; '{name}' would keep its {self.space[name].size} channels, which its grid does "
                                  f"not have: give --fix '{name}'")
        self.grid = {name: (self.space[name].size,) if name in fixed else widths for name, widths in self.grid.items()}
        for budget in self.budgets:
            budget.check_feasible(self.smallest, self.largest)
        if self.round == 1:
            self.notes.append(f'{len(fixed)} of {len(self.grid)} groups keep their base width: {why}')

    def train_step(self, step: Step) -> None:
        loss = step.loss(step.forward(skips=self.begin.skips))
        step.backward(loss + self.penalty().to(loss))

    def penalty(self) -> torch.Tensor:
        """What training adds to the loss: a tensor without dimensions, differentiable in the scales."""
        values, counts = self._read()
        if self._slopes is None or self._slopes[0] != counts:  # some channel died, or lives again
            self._slopes = counts, self.slopes(counts).to(values)
        return self.options.strength * (values @ self._slopes[1][self.scales.owners])

    def slopes(self, counts: Counts) -> torch.Tensor:
        """The derivative of the normalised cost by the steps of each group that has scales: (groups,), float64.

        Args:
            counts: Steps alive of each of them.
        """
        widths = self._priced(counts)
        free = {name: torch.tensor(float(widths[name]), dtype=torch.float64, requires_grad=True) for name in self.scales.groups}
        total = sum(cost({**widths, **free}, self.begin.skips) / whole for cost, whole in self._costs()) / len(self._costs())
        found = torch.autograd.grad(total, list(free.values()), materialize_grads=True, allow_unused=True)
        return torch.stack([g * self.space[name].unit for name, g in zip(free, found)])

    def _priced(self, counts: Counts) -> dict[str, int]:
        """Group -> its alive width, or the nearest that the grid's ends allow: a latency is known between them alone."""
        alive = dict(self.start) | {name: n * self.space[name].unit for name, n in zip(self.scales.groups, counts)}
        return {name: min(max(w, self.grid[name][0]), self.grid[name][-1]) for name, w in alive.items()}

    def _costs(self) -> list[tuple[Cost, float]]:
        """The costs that are limited, and what the network trained has of each."""
        whole = self._priced(self.scales.sizes)
        return [(cost, cost(whole, self.begin.skips)) for cost in {b.cost.unit: b.cost for b in self.budgets}.values()]

    def _read(self) -> tuple[torch.Tensor, Counts]:
        return self.scales.read(self.options.grouping, self.options.threshold)

    def alive(self) -> dict[str, int]:
        """Group -> its steps that are alive; before a training, and of groups without scales, all."""
        found = {name: width // self.space[name].unit for name, width in self.start.items()}
        return found if self.scales is None else found | dict(zip(self.scales.groups, self._read()[1]))

    @property
    def _when(self) -> str:
        return f'round {self.round} of {self.options.rounds}, ' if self.options.rounds > 1 else ''

    def epoch_end(self, epoch: int) -> None:
        _, counts = self._read()
        shares = [f'{100 * cost(self._priced(counts), self.begin.skips) / whole:.1f} % of the {cost.unit}'
                  for cost, whole in self._costs()]
        self.notes.append(f'{self._when}epoch {epoch + 1}: {sum(counts)} of {sum(self.scales.sizes)} channels are alive, '
                          f'{" and ".join(shares)}')

    def state_dict(self) -> dict[str, Any]:
        """What its training depends on: the network trained, and what it has of the costs."""
        return {'widths': dict(self.start), 'skips': list(self.begin.skips), 'costs': {c.unit: whole for c, whole in self._costs()}}

    def check_state(self, state: Mapping[str, Any]) -> None:
        units = list(dict.fromkeys(b.cost.unit for b in self.budgets))
        if set(state['costs']) != set(units):
            raise PolicyError(f"the penalty was on {' and '.join(state['costs'])}, and the budgets are of {' and '.join(units)}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Checks that it is that of the same training.

        Raises:
            PolicyError: It is not.
        """
        self.check_state(state)
        if self.state_dict() != dict(state):
            raise PolicyError(f'round {self.round} was begun with another network or with another latency model')

    # -- shrink and expand -------------------------------------------------------------------------------------

    def choose(self, evaluate: Evaluate) -> list[Choice]:
        alive = self.alive()
        if self.scales is not None and self._read()[1] == self.scales.sizes:
            self.notes.append('no channel has died, so what was trained is only scaled: give a larger --morphnet.strength, or more '
                              '--search-epochs')
        return [self._expand(budget, alive) for budget in self.budgets]

    def _expand(self, budget: Budget, alive: Mapping[str, int]) -> Choice:
        """The largest network of the proportions that are alive within a budget."""
        dead = dead_blocks(self.space, [name for name, steps in alive.items() if steps == 0])
        skips = tuple(dict.fromkeys([*self.begin.skips, *dead]))
        if dead:
            try:
                budget.cost(self.smallest, skips)
            except WidthError as e:
                self.notes.append(f'{budget.text}: {", ".join(dead)} should go, but must stay: {e}')
                skips = self.begin.skips
        shape = {name: max(steps, 1) / self.space[name].steps for name, steps in alive.items()}
        widths = fill_budget(self.space, budget, self.grid, shape, skips)
        found = sum(w // self.space[name].unit for name, w in widths.items())
        gone = f', without {", ".join(skips)}' if skips else ''
        self.notes.append(f'{self._when}{budget.text}: {sum(alive.values())} channels alive become {found}, '
                          f'{budget.cost.show(budget.cost(widths, skips))}{gone}')
        return Choice(widths, skips)

    def following(self, found: Sequence[Choice]) -> list['MorphNet']:
        """For each budget the next round: the network found is the one to train."""
        if self.round >= self.options.rounds:
            return []
        after = []
        for budget, choice in zip(self.budgets, found):
            policy = type(self)(self.space, [budget], self.grid, self.options, self.seed)
            policy.round, policy.begin = self.round + 1, Choice(choice.widths, choice.skips)
            after.append(policy)
        return after


class _Scales:
    """The scales of a network's normalisations, by the groups they govern.

    Args:
        network: The shared network.
        groups: Groups to look at.
        skips: Blocks that do not run, and whose normalisations are not looked at.

    Attributes:
        groups: Those that have scales.
        sizes: Their steps in the network.
        owners: Place in `groups` of each of all these steps.
    """

    def __init__(self, network: Supernet, groups: Iterable[str], skips: Sequence[str]):
        space = network.space
        norms = {name: [n for n in network.norms[name] if not _inside(n, skips)] for name in groups}
        self.groups = tuple(name for name, found in norms.items() if found)
        self.sizes = tuple(space[name].steps for name in self.groups)
        first = dict(zip(self.groups, np.cumsum((0, *self.sizes)).tolist()))
        self._parameters, places = [], []
        for norm in dict.fromkeys(n for name in self.groups for n in norms[name]):
            weight = f'{norm}.weight'
            self._parameters.append(network.model.get_parameter(weight))
            for g, repeat in space.tensors[weight].axes[0]:
                group = space.groups[g]
                steps = torch.arange(group.steps) + first[group.name] if group.name in first else torch.full((group.steps,), -1)
                places.append(steps.repeat_interleave(repeat))
        place = torch.cat(places)
        self._taken = torch.nonzero(place >= 0)[:, 0]
        self._steps = place[self._taken]
        self.owners = torch.arange(len(self.groups)).repeat_interleave(torch.tensor(self.sizes))

    def read(self, grouping: str, threshold: float) -> tuple[torch.Tensor, Counts]:
        """The value of every step, (steps,), differentiable; and how many steps of each group are alive."""
        scales = torch.cat([p.abs() for p in self._parameters])
        if self.owners.device != scales.device:
            self._taken, self._steps, self.owners = (t.to(scales.device) for t in (self._taken, self._steps, self.owners))
        scales = scales[self._taken]
        zeros = scales.new_zeros(len(self.owners))
        largest = values = zeros.scatter_reduce(0, self._steps, scales, 'amax', include_self=False)
        if grouping == 'l2':
            values = zeros.index_add(0, self._steps, scales ** 2).clamp_min(TINY).sqrt()
        counts = zeros.new_zeros(len(self.groups)).index_add(0, self.owners, (largest.detach() > threshold).to(zeros))
        return values, tuple(int(n) for n in counts.tolist())


def _inside(name: str, blocks: Sequence[str]) -> bool:
    return any(name.startswith(f'{block}.') for block in blocks)


def dead_blocks(space: WidthSpace, dead: Iterable[str]) -> list[str]:
    """The residual blocks that do nothing once some groups are dead: nothing inside them that is alive reaches their output.

    Args:
        space: The width space.
        dead: Groups without a channel.
    """
    found = []
    for block in (b.name for b in space.blocks):
        sites = [s for s in space.sites if _inside(s.name, [block]) and s.outputs]
        inner = {i for i, g in enumerate(space.groups) if all(_inside(tensor, [block]) for tensor, _ in g.axes)}
        gone = {space.index[name] for name in dead} & inner
        silent: list[Site] = []
        while gone:
            silent = [s for s in sites if s.inputs and all(g in gone for g, _ in s.inputs)]
            fed = {g for s in sites if s not in silent for g, _ in s.outputs}
            further = {g for s in silent for g, _ in s.outputs if g in inner and g not in fed} - gone
            if not further:
                break
            gone |= further
        last = [s for s in sites if not all(g in inner for g, _ in s.outputs)]
        if last and all(s in silent for s in last):
            found.append(block)
    return found
