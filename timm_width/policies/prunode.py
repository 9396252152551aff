"""Prunode: blocks of which two widths run at a time, layers that lose their candidates, and layers that are left out."""
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..gating import unlike_slices
from ..masking import Masks
from ..mixture import Layer, Mixture, build_layers, find_layers
from ..space import WidthSpace
from ..supernet import Supernet
from .base import Choice, Evaluate, Policy, PolicyError, Step, fill_budget, option

__all__ = ['Prunode']

MIN_LOG_COST = 1.  # ln of a cost in its unit of the loss; below, ln(LAT)^beta has no slope, or no value
THRESHOLDS = ('linear', 'constant', 'none')
SKIPS = ('late', 'candidate', 'none')
LOSS_SCALE = 2. ** 10  # gradients in float16 would vanish without; exact in all other types


class Prunode(Policy):
    """Tiered pruning: of widths, of the blocks of a layer, and of layers.

    "Tiered Pruning for Efficient Differentiable Inference-Aware Neural Architecture Search" (PRUNET, Kierat et al., 2022). There
    is no released code. Equations and sections:

    - Loss (1, 2): CE + alpha ln(LAT)^beta, with the natural logarithm of microseconds: only so are the losses of Table 6 what they
      are. Other costs than latency are in thousandths of the largest network's.
    - A layer is sum_i a_i B_i(x) (3), with a from a Gumbel-softmax of constant temperature over its candidates (4); its cost is
      sum_i a_i LAT(B_i) (5), and that of a candidate is of its two widths, by a Gumbel-softmax of their own.
    - 3.2.1, `widths`: each candidate runs with a small and a large mask on its hidden channels, which Algorithm 1 moves
      (masking.py). If not, candidates keep their width: that, with `threshold` none and `skip` candidate, is the FBNet
      baseline of Table 3, on a network that has several expansions of each block as candidates.
    - 3.2.2, `threshold`: after each epoch, candidates whose probability is below t(e) are removed (6), the least likely first;
      `constant` keeps t at its first value (B.1).
    - 3.2.3, `skip`: where a residual layer would lose its last but one candidate, the skip connection takes its place: until one
      of the two is removed, x + is multiplied by `phi` and the block by `lam`. A layer that cannot be left out ends with one block.
    - A.2.1: of all epochs, the first `warmup` train the weights alone. In each epoch after it, 80 % of the images train the weights
      and then the other 20 % the architecture, by Adam, with a cosine from `arch_lr`. The weights' optimiser is that of the flags
      (theirs: --opt rmsproptf --lr 0.002 --weight-decay 1e-5 --aa rand-m9-mstd0.5 --img-size 288 -b 256 --amp, and a tenth of
      the classes: --proxy classes=100).

    Any model is searched, not only one whose layers have several candidates (prunet): there, each block whose hidden groups
    are its own is the one candidate of its layer, its groups are masked by the same share, and if it is residual, it has the
    skip connection for a rival from the end of the warm-up. Groups that reach over several blocks keep their width, and so do
    those of which masked channels are not as good as gone (no normalisation of each channel alone, or an activation with
    f(0) != 0).

    What the paper leaves open: a layer's probabilities are the softmax without noise. The skip connection comes with as much
    weight as the block that it stands beside, so that it is not removed in the epoch in which it came; a tie keeps the block. The
    images for the architecture are the same ones in all epochs. `mask_lr` scales the weight that moves the masks.

    With a budget that has a limit, the network found is brought to it by one factor over all of its widths, those that training
    kept too; without (as in --budget macs), alpha alone decides.
    """

    default_grid = 'prunode'
    search_epochs = 200
    architecture_share = 0.2
    sweeps = ('alpha', 'beta', 'lam', 'phi', 't_final', 'arch_lr', 'mask_lr')
    incomparable = ('alpha', 'beta')
    shrinks = True
    chooses_blocks = True
    weighs_cost = True

    @dataclass(frozen=True)
    class Options:
        alpha: float = option(0.6, 'weight of ln(cost)^beta in the loss: more makes smaller networks (the paper: 0.2 to 2)')
        beta: float = option(0.6, 'its exponent')
        lam: float = option(0.55, 'factor of a block that stands beside a skip connection (lambda; the paper: 0.4, 0.55 or 0.85)')
        phi: float = option(1.1, 'factor of the skip connection')
        warmup: float = option(0.35, 'share of the epochs that train the weights alone')
        widths: bool = option(True, 'search hidden widths (3.2.1)')
        threshold: str = option('linear', 'what removes candidates (3.2.2): linear, constant or none')
        t_initial: float = option(0.15, 'threshold after the warm-up')
        t_final: float = option(0.55, 'threshold at the end')
        skip: str = option('late', 'skip connections: late (3.2.3), candidate (from the start) or none')
        tau: float = option(1., 'temperature of the Gumbel-softmax')
        arch_lr: float = option(0.1, "learning rate of the architecture's Adam")
        mask_lr: float = option(1., 'factor of the steps that masks make')
        strict: bool = option(False, 'refuse a network of which some groups cannot be masked, instead of keeping their width')

        def __post_init__(self):
            for name, known in ('threshold', THRESHOLDS), ('skip', SKIPS):
                if getattr(self, name) not in known:
                    raise PolicyError(f"prunode.{name} must be {', '.join(known)}, not '{getattr(self, name)}'")
            for name in 'alpha', 'beta', 'lam', 'phi', 'arch_lr', 'mask_lr':
                if not 0 <= getattr(self, name) < math.inf:
                    raise PolicyError(f'prunode.{name} must be 0 or more, not {getattr(self, name):g}')
            if not 0 < self.tau < math.inf:
                raise PolicyError(f'prunode.tau must be above 0, not {self.tau:g}')
            if not 0 <= self.warmup < 1:
                raise PolicyError(f'prunode.warmup is a share of the epochs, from 0 to below 1, not {self.warmup:g}')
            if not 0 <= self.t_initial <= self.t_final <= 1:
                raise PolicyError('prunode.t_initial and prunode.t_final are probabilities, the first not above the second, not '
                                  f'{self.t_initial:g} and {self.t_final:g}')
            if self.threshold == 'linear' and self.t_final < 0.5:
                raise PolicyError(f'prunode.t_final {self.t_final:g} leaves layers with several blocks: give 0.5 or more')

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if len({b.cost.unit for b in self.budgets}) > 1:
            if any(math.isinf(b.limit) for b in self.budgets):
                raise PolicyError(f"prunode weighs one cost, and {' '.join(b.text for b in self.budgets)} are several: give one")
            self.notes.append(f'{self.budgets[0].text} says what costs are weighed by; the other budgets are only met')
        self.layers: list[Layer] = []
        self.places: list[tuple[range, range]] = []
        self.mixtures: list[Mixture] = []
        self.costs: list[list[list[float]]] = []  # of each layer, candidate and level, in the unit of the loss
        self.rest = 0.  # what all layers together do not cost
        self.epochs = 1
        self.loss_sum, self.loss_count = 0., 0  # of the batches of an epoch that train the architecture
        self.pending: list[torch.Tensor] = []  # gradients of the batches of an update

    # -- the network -------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, space: WidthSpace) -> nn.Module:
        self.layers = find_layers(model, space, list(self.grid))
        if not self.layers:
            raise PolicyError(f'{space.architecture} has no block with hidden channels of its own, nor one that can be left out')
        own = [g for layer in self.layers for groups in layer.blocks.values() for g in groups]
        if self.options.widths:
            self._keep_unlike(Supernet(model, space), [g for g in own if len(self.grid[g]) > 1])
        if other := [name for name in self.grid if name not in own]:
            self.notes.append(f'{len(other)} groups reach over several blocks and keep their width, as {other[0]}')
        self.mixtures = build_layers(model, space, self.layers, self.grid, self.options.widths)
        for mixture in self.mixtures:
            if mixture.residual and self.options.skip == 'candidate':
                mixture.skip = True
        self._check_layers()
        counts = [len(m.candidates) for m in self.mixtures]
        starts = np.cumsum([0, *(2 * n + 1 for n in counts)]).tolist()
        # of each layer, theta of its candidates and of the skip connection; and theta_large - theta_small of its candidates
        self.places = [(range(a, a + n + 1), range(a + n + 1, a + 2 * n + 1)) for a, n in zip(starts, counts)]
        self.theta = torch.zeros(starts[-1], requires_grad=True)
        for (blocks, _), n in zip(self.places, counts):
            self.theta.data[blocks.start:blocks.stop] = 1 / n
        self.adam = torch.optim.Adam([self.theta], lr=self.options.arch_lr)
        self._count_costs()
        return model

    def _keep_unlike(self, network: Supernet, names: Sequence[str]) -> None:
        fixed = [name for name in names if name in network.ungated]
        fixed += unlike_slices(network, {name: self.grid[name] for name in names if name not in fixed})
        self.keep_base_widths(fixed, 'there, masked channels are not as good as gone (no normalisation of each channel alone, or '
                              'an activation with f(0) != 0)', self.options.strict, largest=True)

    def _check_layers(self) -> None:
        """Refuses what leaves nothing to choose, or removes candidates before they have learned."""
        o, most = self.options, max(len(m.candidates) + m.skip for m in self.mixtures)
        late = [m for m in self.mixtures if m.residual and o.skip == 'late']
        if most == 1 and not late and not any(c.masks for m in self.mixtures for c in m.candidates.values()):
            raise PolicyError(f'prunode has nothing to choose in {self.space.architecture}: its blocks have one width each, and '
                              'none can be left out')
        if o.threshold != 'none' and o.t_initial * most > 1:
            raise PolicyError(f'prunode.t_initial {o.t_initial:g} is above 1/{most}, and some layer has {most} candidates, of '
                              f'which most would go at once: give {math.floor(1000 / most) / 1000:g} or less')
        if o.threshold == 'none' and any(len(m.candidates) > 1 for m in late):
            self.notes.append('with --prunode.threshold none layers lose no candidate, so that no skip connection takes its place')

    def _count_costs(self) -> None:
        """The table of every permissible block, as section 3.2 has it, in the unit of the loss."""
        cost, largest = self.budgets[0].cost, self.largest
        of = [[[cost.of(path, {**largest, **widths}) for widths in prunode.widths]
               for path, prunode in zip(layer.blocks, m.candidates.values())] for layer, m in zip(self.layers, self.mixtures)]
        rest = cost(largest) - sum(levels[-1] for layer in of for levels in layer)
        dearest = rest + sum(max(levels[-1] for levels in layer) for layer in of)
        scale = 1000 if cost.unit.startswith('ms') else 1000 / dearest
        self.costs = [[[scale * c for c in levels] for levels in layer] for layer in of]
        self.rest = scale * rest

    # -- training ----------------------------------------------------------------------------------------------

    def train_step(self, step: Step) -> None:
        self.epochs = step.epochs
        if step.epoch < self.warmup_epochs or not step.for_architecture:
            with torch.no_grad():
                self._sample(step)
            step.backward(step.loss(step.forward()))
            return
        cost = self._sample(step)  # eq. 5
        with torch.set_grad_enabled(cost.requires_grad):  # it does not where all is decided
            loss = step.loss(step.forward()) + penalty(cost, self.options.alpha, self.options.beta).to(step.images.device)  # eq. 2
        gradient = torch.zeros_like(self.theta)
        if cost.requires_grad:
            gradient = torch.autograd.grad(loss * LOSS_SCALE, self.theta)[0] / LOSS_SCALE
        found = torch.cat([gradient, loss.detach().float().cpu()[None]])
        found = step.gather(found.to(loss.device)[None]).mean(0).cpu()  # of all processes
        self.loss_sum, self.loss_count = self.loss_sum + found[-1].item(), self.loss_count + 1
        self.pending.append(found[:-1])
        if step.last:
            self._learn(min(max((step.progress * self.epochs - self.warmup_epochs) / (self.epochs - self.warmup_epochs), 0.), 1.))

    def _learn(self, progress: float) -> None:
        """One update of the architecture."""
        self.theta.grad, self.pending = torch.stack(self.pending).mean(0), []
        if not self.theta.grad.isfinite().all():  # float16 may overflow in one batch
            return
        self.adam.param_groups[0]['lr'] = self.options.arch_lr * (1 + math.cos(math.pi * progress)) / 2
        self.adam.step()
        self._move_masks(progress)

    @property
    def warmup_epochs(self) -> int:
        """e_warmup."""
        return self.shared_epochs(self.epochs)

    def shared_epochs(self, epochs: int) -> int:
        return min(round(self.options.warmup * epochs), epochs - 1)  # one at least is left for the architecture

    def _sample(self, step: Step) -> torch.Tensor:
        """Draws the coefficients of all layers and masks (eq. 4), and returns what they cost (eq. 5)."""
        noise = torch.from_numpy(step.rng.gumbel(size=(2, len(self.theta)))).float()
        drawn = (self.theta + noise[0]) / self.options.tau
        halves = torch.sigmoid((self.theta + noise[0] - noise[1]) / self.options.tau)  # of two logits, whose difference theta is
        on_device = halves.to(step.images.device)
        total = self.theta.new_tensor(self.rest)
        for m, (blocks, masks), costs in zip(self.mixtures, self.places, self.costs):
            left = m.left
            entries = [*(blocks[i] for i in left), *([blocks[-1]] if m.skip else [])]
            weights = drawn[entries].softmax(0)
            m.weights = weights.to(step.images.device)
            for i, weight, prunode in zip(left, weights, m.candidates.values()):
                levels = [costs[i][level - 1] for level in prunode.levels]
                share = halves[masks[i]]
                total = total + weight * (levels[0] if len(levels) == 1 else (1 - share) * levels[0] + share * levels[1])
                prunode.shares = torch.stack([1 - on_device[masks[i]], on_device[masks[i]]])
        return total

    def _move_masks(self, progress: float) -> None:
        weights = self.theta.detach().tolist()
        for m, (_, masks) in zip(self.mixtures, self.places):
            for i, prunode in zip(m.left, m.candidates.values()):
                if prunode.masks is not None:
                    self.theta.data[masks[i]] = prunode.masks.step(weights[masks[i]], progress, self.options.mask_lr)

    # -- pruning -----------------------------------------------------------------------------------------------

    def epoch_end(self, epoch: int) -> None:
        done = epoch + 1
        if self.loss_count:
            self.search_loss, self.loss_sum, self.loss_count = self.loss_sum / self.loss_count, 0., 0
            if not math.isfinite(self.search_loss):
                raise PolicyError(f'prunode: the search loss is {self.search_loss} in epoch {done}; a lower --lr may help')
        if done > self.warmup_epochs and self.options.threshold != 'none':
            self._prune_all(done)
        if done == max(self.warmup_epochs, 1) and self.options.skip == 'late':
            for m, (blocks, _) in zip(self.mixtures, self.places):
                if len(m.candidates) == 1 and m.residual and not m.skip:
                    self._stand_beside(m, blocks)

    def _prune_all(self, done: int) -> None:
        t = self.options.t_initial
        if self.options.threshold == 'linear':
            t = threshold(done, self.warmup_epochs, self.epochs, t, self.options.t_final)
        before = self._left()
        for m, (blocks, _) in zip(self.mixtures, self.places):
            self._prune(m, blocks, t)
        if (now := self._left()) != before or done == self.epochs:
            self.notes.append(f'epoch {done}: {now}, threshold {t:.3f}, search loss {self.search_loss:.4f}')

    def _left(self) -> str:
        blocks, of = sum(len(m.candidates) for m in self.mixtures), sum(len(layer.blocks) for layer in self.layers)
        return f'{blocks} of {of} blocks left, {sum(m.skip for m in self.mixtures)} skip connections'

    def _prune(self, m: Mixture, blocks: Sequence[int], t: float) -> None:
        """Removes the candidates of a layer whose probability is below t, the least likely first."""
        while len(m.candidates) + m.skip > 1:
            probable = self._probabilities(m, blocks)
            weakest = min(probable, key=lambda i: (probable[i], i >= 0))  # of two that tie, the skip connection
            if probable[weakest] >= t:
                return
            if weakest < 0:
                m.skip = False
                continue
            m.remove(weakest)
            if len(m.candidates) == 1 and m.residual and not m.skip and self.options.skip == 'late':
                self._stand_beside(m, blocks)
                return

    def _probabilities(self, m: Mixture, blocks: Sequence[int]) -> dict[int, float]:
        """Number of each candidate left -> probability of being chosen; that of the skip connection is -1."""
        numbers = [*m.left, *([-1] if m.skip else [])]
        return dict(zip(numbers, self.theta.detach()[[blocks[i] for i in numbers]].softmax(0).tolist()))

    def _stand_beside(self, m: Mixture, blocks: Sequence[int]) -> None:
        """Section 3.2.3: the skip connection for the last but one candidate."""
        m.skip, m.scales = True, (self.options.phi, self.options.lam)
        block, skip = blocks[m.left[0]], blocks[-1]
        self.theta.data[skip] = self.theta.data[block]
        for state in self.adam.state.values():  # or Adam, new to its gradients, would make steps of three times `arch_lr`
            state['exp_avg_sq'][skip] = state['exp_avg_sq'][block]

    # -- the answer --------------------------------------------------------------------------------------------

    def choose(self, evaluate: Evaluate) -> Sequence[Choice]:
        widths, skips = self.largest, []
        for layer, m, (blocks, masks) in zip(self.layers, self.mixtures, self.places):
            probable = self._probabilities(m, blocks)
            best = max(probable, key=lambda i: (probable[i], i >= 0)) if probable else -1
            for i, path in enumerate(layer.blocks):
                if i != best:
                    skips.append(path)
                    for group in layer.blocks[path]:
                        del widths[group]
                    continue
                prunode = m.candidates[str(i)]
                level = prunode.levels[0 if self.theta[masks[i]].item() < 0 else -1]
                widths |= prunode.widths[level - 1]
        cost = self.budgets[0].cost
        self.notes.append(f'alpha {self.options.alpha:g} found {cost.show(cost(widths, skips))}, search loss '
                          f'{self.search_loss:.4f}')
        grid, shape = {name: self.grid[name] for name in widths}, {name: w / self.space[name].size for name, w in widths.items()}
        return [Choice(fill_budget(self.space, budget, grid, shape, skips) if math.isfinite(budget.limit) else widths, tuple(skips))
                for budget in self.budgets]

    # -- resuming ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        layers = [{'left': m.left, 'skip': m.skip, 'masks': [
            None if c.masks is None else asdict(c.masks) for c in m.candidates.values()]} for m in self.mixtures]
        return {'costs': self._costs_digest(), 'theta': self.theta.detach().clone(), 'adam': self.adam.state_dict(),
                'layers': layers, 'epochs': self.epochs, 'search_loss': self.search_loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._costs_digest() != state['costs']:
            raise PolicyError('its blocks were chosen by other costs')
        for m, found in zip(self.mixtures, state['layers'], strict=True):
            for i in m.left:
                if i not in found['left']:
                    m.remove(i)
            m.skip = found['skip']
            m.scales = (self.options.phi, self.options.lam) if self.options.skip == 'late' else (1., 1.)
            for prunode, masks in zip(m.candidates.values(), found['masks'], strict=True):
                prunode.masks = None if masks is None else Masks(**masks)
        self.theta.data.copy_(state['theta'])
        self.adam.load_state_dict(state['adam'])
        self.epochs, self.search_loss = state['epochs'], state['search_loss']

    def _costs_digest(self) -> str:
        numbers = [self.rest, *(c for layer in self.costs for levels in layer for c in levels)]
        return hashlib.sha256(' '.join(f'{c:.6g}' for c in numbers).encode()).hexdigest()[:16]


def penalty(cost: torch.Tensor, alpha: float, beta: float = 0.6) -> torch.Tensor:
    """What eq. 2 adds to the cross-entropy: alpha ln(LAT)^beta, of a latency in microseconds."""
    return alpha * cost.log().clamp(min=MIN_LOG_COST) ** beta


def threshold(epoch: float, warmup: int, epochs: int, initial: float = 0.15, final: float = 0.55) -> float:
    """Eq. 6: the probability below which a candidate is removed at the end of an epoch."""
    return initial + (final - initial) * (epoch - warmup) / (epochs - warmup)
