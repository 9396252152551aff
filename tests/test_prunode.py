"""Prunode: its loss, its expected costs, what it removes and when, and that it finds what is best by construction."""
import copy
import math
import os
import socket
import weakref
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

from timm_width.budget import Budget, BudgetError
from timm_width.conformance import PolicyConformance, _layer, _Net
from timm_width.cost import Macs
from timm_width.factors import Factors
from timm_width.mixture import Mixture
from timm_width.policies import PolicyError
from timm_width.policies.base import fill_budget
from timm_width.policies.prunode import Prunode, penalty, threshold
from timm_width.space import Block
from timm_width.tables import Tables
from timm_width.trace import trace

torch.set_num_threads(1)


class Residual(_Net):
    """The small network of the conformance suite, whose blocks are modules that add."""

    class Add(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    def __init__(self, blocks=1):
        super().__init__(blocks)
        self.blocks = nn.ModuleList(self.Add(*block) for block in self.blocks)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x).mean((2, 3)))


class Candidate(nn.Sequential):
    """A block of 16 hidden channels; where it can be left out, it adds to its input, as timm's do."""

    def __init__(self, kernel, residual):
        super().__init__(_layer(8, 16, kernel), nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.residual = residual

    def forward(self, x):
        return x + super().forward(x) if self.residual else super().forward(x)


class Choice(nn.Module):
    def __init__(self, kernels, residual):
        super().__init__()
        self.residual = residual
        self.candidates = nn.ModuleDict({f'k{k}': Candidate(k, residual) for k in kernels})

    def forward(self, x):
        return sum(c(x) for c in self.candidates.values())


class Layered(nn.Module):
    """Three layers: one of two candidates that must stay, one of four, and one of a single candidate."""

    def __init__(self, blocks=1):
        super().__init__()
        self.stem = _layer(3, 8, 3)
        self.layers = nn.Sequential(Choice((1, 3), False), Choice((1, 3, 5, 7), True), Choice((3,), True))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


def layered_space():
    space = trace(Layered(), (3, 16, 16))
    return replace(space, blocks=tuple(Block(f'layers.{i}.candidates.k{k}') for i, ks in enumerate(((1, 3), (1, 3, 5, 7), (3,))) for k in ks))


class Suite(PolicyConformance):
    policy = Prunode
    regret = None  # it asks for no scores


class TestPrunode(Suite):
    network = Residual
    epochs = 4


class TestLayers(Suite):
    network = Layered
    epochs = 5
    options = {'arch_lr': 1.}  # so that blocks go within the few updates

    @classmethod
    def space(cls, blocks=1):
        return layered_space()

    @staticmethod
    def grid(space):
        return {name: tuple(range(4, g.size + 1, 4)) for name, g in space.searchable.items() if g.size == 16}

    def images(self, seed=0):
        return PolicyConformance.images(seed) * 3


class TestFBNet(TestLayers):
    """The baseline of Table 3: blocks of one width, no threshold, the skip connection a candidate from the start."""
    options = {'widths': False, 'threshold': 'none', 'skip': 'candidate'}


class Batch:
    """A step without an engine."""
    epochs, last, update = 10, True, 0

    def __init__(self, network, images=None, targets=None, epoch=9, progress=0.9, architecture=True, seed=0):
        self.network, self.epoch, self.progress, self.for_architecture = network, epoch, progress, architecture
        self.images, self.targets = PolicyConformance.images()[0] if images is None else (images, targets)
        self.rng, self.logits = np.random.default_rng(seed), None

    def forward(self):
        self.logits = self.network(self.images)
        return self.logits

    def loss(self, logits):
        return F.cross_entropy(logits, self.targets)

    def backward(self, loss):
        loss.backward()

    def gather(self, tensor):
        return tensor


@cache
def _layered():
    return layered_space()


def prepared(budget=('macs',), seed=0, **options):
    """A policy for the layered net, and its network."""
    space = _layered()
    torch.manual_seed(seed)
    budgets = [Budget.parse(text, space) for text in budget]
    policy = Prunode(space, budgets, TestLayers.grid(space), Prunode.Options(**options), seed)
    return policy, policy.prepare(Layered(), space)


def set_probabilities(policy, layer, candidates, skip=0.):
    """The probabilities of a layer's candidates, by their number, and of its skip connection."""
    blocks, _ = policy.places[layer]
    for number, p in candidates.items():
        policy.theta.data[blocks[number]] = math.log(p)
    if skip:
        policy.theta.data[blocks[-1]] = math.log(skip)


# -- equations ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('epoch, t', [(70, 0.15), (102.5, 0.25), (129.6, 0.3333), (183.75, 0.5), (200, 0.55)])
def test_the_threshold_is_that_of_eq_6(epoch, t):
    assert threshold(epoch, 70, 200) == pytest.approx(t, abs=1e-4)


TABLE_6 = {  # alpha: total losses of the four (phi, lambda); the least of the last three is the PRUNET of
    2.0: (6.7149, 6.6316, 6.5968, 6.6241), 1.2: (4.2938, 4.1876, 4.2139, 4.2039), 1.0: (3.6352, 3.6015, 3.6074, 3.6138),
    0.8: (3.0027, 2.9932, 2.9762, 2.9692), 0.6: (2.3528, 2.3394, 2.316, 2.3723), 0.4: (1.7154, 1.7201, 1.7296, 1.6946),
    0.2: (1.0573, 1.0573, 1.0687, 1.0531)}
LATENCY = dict(zip(TABLE_6, (0.48, 0.56, 0.66, 0.77, 0.91, 1.07, 1.28)))  # ms, Table 2


def test_table_6_is_cross_entropy_and_the_logarithm_of_microseconds():
    """What eq. 2 leaves of the losses is a cross-entropy of 100 classes, and less for larger networks; in ms it would not be."""
    left = [min(losses[1:]) - penalty(torch.tensor(1000. * LATENCY[alpha]), alpha).item() for alpha, losses in TABLE_6.items()]
    assert all(0.40 <= ce <= 0.64 for ce in left) and left == sorted(left, reverse=True)
    wrong = [min(losses[1:]) - alpha * (1000 * LATENCY[alpha]) ** 0.6 for alpha, losses in TABLE_6.items()]  # as its caption says
    assert max(wrong) < 0


def test_the_penalty_has_a_slope_for_all_costs_that_are():
    for cost in (3., 500., 1e6):
        c = torch.tensor(cost, requires_grad=True)
        value = penalty(c, 0.8, 0.6)
        slope, = torch.autograd.grad(value, c)
        assert value.item() == pytest.approx(0.8 * math.log(cost) ** 0.6, rel=1e-6)
        assert slope.item() == pytest.approx(0.8 * 0.6 * math.log(cost) ** -0.4 / cost, rel=1e-5)
    assert penalty(torch.tensor(0.), 0.8, 0.6).isfinite()


def every_network(policy):
    """All networks of the mixtures as they stand, with the probability of each by the coefficients drawn."""
    each = []
    for layer, m in zip(policy.layers, policy.mixtures):
        count, found = len(m.candidates) + m.skip, []
        weights = [1.] if count == 1 else m.weights.tolist()
        for weight, i, c in zip(weights, m.left, m.candidates.values()):
            path = list(layer.blocks)[i]
            others = tuple(p for p in layer.blocks if p != path)
            for share, level in zip(c.shares.tolist() if c.masks else [1.], c.levels):
                found.append((weight * share, c.widths[level - 1], others))
        if m.skip:
            found.append((weights[-1], {}, tuple(layer.blocks)))
        each.append(found)
    for point in product(*each):
        yield (math.prod(p for p, _, _ in point), {k: v for _, w, _ in point for k, v in w.items()},
               tuple(s for _, _, skips in point for s in skips))


@pytest.mark.parametrize('skip', ['late', 'candidate'])
@pytest.mark.parametrize('seed', range(3))
def test_the_expected_cost_is_that_of_all_networks(skip, seed):
    """Eq. 5, by enumeration of every candidate and level, whatever is left and drawn."""
    policy, network = prepared(skip=skip)
    policy.theta.data.normal_(generator=torch.Generator().manual_seed(seed))
    if seed:
        policy.mixtures[1].remove(2)
        policy.mixtures[0].remove(0)
    for m in policy.mixtures:
        for c in m.candidates.values():
            c.masks.small, c.masks.large = 1 + seed, 2 + seed
    cost = policy._sample(Batch(network, seed=seed))
    macs, found = Macs(policy.space), list(every_network(policy))
    assert sum(p for p, _, _ in found) == pytest.approx(1, abs=1e-5)
    largest = macs(policy.largest) - sum(  # all layers at their dearest
        sum(levels) - max(levels) for levels in ([c[-1] / 1000 for c in layer] for layer in [
            [[macs.of(path, policy.largest) * 1000] for path in layer.blocks] for layer in policy.layers]))
    expected = sum(p * macs(widths, skips) for p, widths, skips in found)
    assert cost.item() == pytest.approx(1000 * expected / largest, rel=1e-5)


def test_the_loss_is_eq_2_of_what_was_drawn():
    policy, network = prepared(alpha=0.8, beta=0.5)
    before, batch = policy.theta.detach().clone(), Batch(network, seed=5)
    torch.manual_seed(0)
    policy.train_step(batch)
    macs, space = Macs(policy.space), policy.space
    again, network = prepared(alpha=0.8, beta=0.5)
    cost = again._sample(Batch(network, seed=5)).item()
    expected = F.cross_entropy(batch.logits, batch.targets).item() + 0.8 * math.log(cost) ** 0.5
    assert policy.loss_sum == pytest.approx(expected, rel=1e-5) and policy.loss_count == 1
    assert not torch.equal(before, policy.theta) and all(p.grad is None for p in network.parameters())
    assert 1 < cost < 1000 * macs(policy.largest) / macs({}, [b.name for b in space.blocks])


def test_coefficients_are_gumbel_softmax_draws():
    """The first of two logits wins as often as the softmax says, and the temperature decides how clear the cut is."""
    spread = {}
    for tau in (0.1, 1., 5.):
        policy, network = prepared(tau=tau)
        set_probabilities(policy, 0, {0: 0.7, 1: 0.3})
        drawn = []
        for seed in range(300):
            policy._sample(Batch(network, seed=seed))
            drawn.append(policy.mixtures[0].weights[0].item())
        assert np.mean(np.array(drawn) > 0.5) == pytest.approx(0.7, abs=0.07)
        spread[tau] = np.std(drawn)
    assert spread[0.1] > spread[1.] > spread[5.]


def test_the_gradient_is_that_of_finite_differences():
    """Of the coefficients of layers and of masks, through network and cost."""
    def loss(theta, seed=3):
        policy, network = prepared(alpha=2.)
        network.double()
        policy.theta = theta
        batch = Batch(network, seed=seed)
        batch.images = batch.images.double()
        cost = policy._sample(batch)
        return batch.loss(batch.forward()) + penalty(cost, 2.)

    theta = torch.zeros_like(prepared()[0].theta, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(0))
    theta.requires_grad_()
    gradient, = torch.autograd.grad(loss(theta), theta)
    moved = 0
    for i in range(len(theta)):
        with torch.no_grad():
            up, down = theta.clone(), theta.clone()
            up[i] += 1e-4
            down[i] -= 1e-4
            slope = (loss(up) - loss(down)) / 2e-4
        assert slope.item() == pytest.approx(gradient[i].item(), rel=1e-3, abs=2e-6)
        moved += abs(slope.item()) > 1e-5
    assert moved >= 12  # of 6 candidates and 7 pairs of masks, those of layers with one candidate aside


# -- phases ------------------------------------------------------------------------------------------------------------------


def test_the_warm_up_trains_weights_alone_on_all_images():
    policy, network = prepared(warmup=0.35)
    before = policy.theta.detach().clone()
    for epoch, architecture in ((0, False), (0, True), (3, False), (3, True), (4, False)):
        policy.train_step(Batch(network, epoch=epoch, progress=epoch / 10, architecture=architecture))
        assert torch.equal(policy.theta, before) and all(p.grad is not None for p in network.parameters())
        network.zero_grad()
    policy.train_step(Batch(network, epoch=4, progress=0.4))
    assert policy.warmup_epochs == 4 and not torch.equal(policy.theta, before)
    assert all(p.grad is None for p in network.parameters())


def test_masks_move_by_the_progress_of_the_architectures_training():
    """And its learning rate falls by a cosine of it, from the end of the warm-up."""
    policy, network = prepared(warmup=0.5, mask_lr=0.)
    masks = policy.mixtures[2].candidates['0'].masks
    for progress, done in ((0.5, 0.), (0.75, 0.5), (0.9, 0.8)):
        policy.train_step(Batch(network, epoch=int(10 * progress), progress=progress))
        assert policy.adam.param_groups[0]['lr'] == pytest.approx(0.1 * (1 + math.cos(math.pi * done)) / 2)
        assert masks.converged or masks.l - masks.s == pytest.approx(0.6 * (1 - done) ** 2)
    assert masks.s == pytest.approx(0.5)  # mask_lr


def test_mask_lr_changes_the_steps_and_not_the_weight():
    policy, network = prepared(mask_lr=0.1)
    [m] = [m for m in policy.mixtures if len(m.left) == 1]
    masks, place = m.candidates['0'].masks, policy.places[2][1][0]
    masks.s, masks.l = 0.5, 0.75  # next to one another
    policy.theta.data[place] = 3.
    for i in range(3):
        policy.train_step(Batch(network, seed=i))
    assert 2.5 < policy.theta[place].item() < 3.5


def test_an_update_of_several_batches_moves_the_architecture_once():
    """By the mean of their gradients."""
    images, targets = PolicyConformance.images()[0]
    alone, network = prepared()
    halves, same = prepared()
    for part in (slice(0, 4), slice(4, 8)):
        batch = Batch(same, images[part], targets[part])
        batch.last = part.stop == 8
        halves.train_step(batch)
        assert len(halves.adam.state) == batch.last
    each = []
    for part in (slice(0, 4), slice(4, 8)):
        other, network = prepared()
        other.train_step(Batch(network, images[part], targets[part]))
        each.append(other.theta.grad)
    torch.testing.assert_close(halves.theta.grad, sum(each) / 2)
    assert halves.adam.state[halves.theta]['step'] == 1


def test_a_gradient_that_overflows_moves_nothing():
    policy, network = prepared()
    before, masks = policy.theta.detach().clone(), copy.deepcopy(policy.mixtures[2].candidates['0'].masks)
    policy.pending = [torch.full_like(policy.theta, math.inf)]
    policy._learn(0.5)
    assert torch.equal(policy.theta, before) and masks == policy.mixtures[2].candidates['0'].masks


def test_a_loss_that_is_no_number_ends_the_search():
    policy, network = prepared()
    with torch.no_grad():
        network.head.weight.fill_(math.nan)
    policy.train_step(Batch(network))
    with pytest.raises(PolicyError, match='search loss is nan in epoch 10; a lower --lr'):
        policy.epoch_end(9)


@pytest.mark.parametrize('dtype', ['bfloat16', None])
def test_mixed_precision_and_channels_last(dtype):
    """A training under --amp --channels-last; coefficients stay in float32, and the answer is a network."""
    class Mixed(TestLayers):
        @staticmethod
        def arguments():
            args = PolicyConformance.arguments()
            args.amp, args.amp_dtype, args.channels_last, args.grad_accum_steps = dtype is not None, dtype or 'float16', True, 2
            return args

    suite = Mixed()
    policy = suite.make([Budget.parse('macs', _layered())])
    suite.trained(policy)
    [(widths, skips)] = policy.choose(None)
    assert policy.theta.dtype == torch.float32 and policy.theta.isfinite().all() and math.isfinite(policy.search_loss)
    assert 0 < Macs(_layered())(widths, skips) < Macs(_layered())(policy.largest)


# -- removal -----------------------------------------------------------------------------------------------------------------


def after(policy, epoch, epochs=10):
    policy.epochs = epochs
    policy.epoch_end(epoch - 1)


def test_blocks_go_at_the_end_of_an_epoch_the_least_likely_first():
    """And what is left is measured anew: of 0.4, 0.3, 0.2 and 0.1, at 0.25 the last goes, then 0.2 of 0.9, and 0.3 of 0.7 stays."""
    policy, _ = prepared(warmup=0., t_initial=0.25, t_final=0.5)
    set_probabilities(policy, 1, {0: 0.2, 1: 0.4, 2: 0.1, 3: 0.3})
    after(policy, 1, 1000)
    assert policy.mixtures[1].left == [1, 3] and policy.mixtures[0].left == [0, 1] and not policy.mixtures[1].skip


def test_nothing_goes_during_the_warm_up():
    policy, _ = prepared(warmup=0.5)
    set_probabilities(policy, 1, {0: 0.97, 1: 0.01, 2: 0.01, 3: 0.01})
    after(policy, 5)
    assert len(policy.mixtures[1].left) == 4
    after(policy, 6)
    assert policy.mixtures[1].left == [0]


def test_the_skip_connection_takes_the_place_of_the_last_but_one():
    """With as much weight; multiplied by phi, and the block by lambda, until one of them goes."""
    policy, network = prepared(phi=1.1, lam=0.4)
    set_probabilities(policy, 1, {0: 0.01, 1: 0.01, 2: 0.97, 3: 0.01})
    set_probabilities(policy, 0, {0: 0.01, 1: 0.99})
    after(policy, 10)  # the threshold is 0.55
    m, (blocks, _) = policy.mixtures[1], policy.places[1]
    assert m.left == [2] and m.skip and m.scales == (1.1, 0.4) and policy.theta[blocks[2]] == policy.theta[blocks[-1]]
    assert policy.mixtures[0].left == [1] and not policy.mixtures[0].skip  # it changes its input: it ends with one block
    policy._sample(Batch(network))
    x = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        expected = 1.1 * m.weights[1] * x + 0.4 * m.weights[0] * m.candidates['2'].eval()(x)
        torch.testing.assert_close(m(x), expected)
        policy.theta.data[blocks[-1]] -= 3
        after(policy, 10)
        torch.testing.assert_close(m(x), m.candidates['2'](x))
    assert not m.skip


def test_the_skip_connection_can_win_and_a_tie_keeps_the_block():
    policy, _ = prepared(warmup=0.5)
    after(policy, 5)  # the layer of one candidate has it from the end of the warm-up
    m, (blocks, _) = policy.mixtures[2], policy.places[2]
    assert m.skip and m.scales == (1.1, 0.55)
    after(policy, 9)
    assert m.skip and m.left == [0]  # at 0.5, above the threshold of 0.47
    tie = copy.deepcopy(policy)
    after(tie, 10)
    assert not tie.mixtures[2].skip and tie.mixtures[2].left == [0]
    policy.theta.data[blocks[-1]] += 0.01
    after(policy, 10)
    assert m.skip and m.left == []
    x = torch.randn(1, 8, 2, 2)
    assert m(x) is x
    [(widths, skips)] = policy.choose(None)
    assert 'layers.2.candidates.k3' in skips and not any(name.startswith('layers.2.') for name in widths)


def test_late_skip_connections_learn_as_fast_as_their_blocks():
    """Adam, new to a parameter's gradients, would make larger steps."""
    policy, network = prepared(warmup=0.)
    policy.theta.grad = torch.ones_like(policy.theta)
    for _ in range(200):
        policy.adam.step()
    blocks, _ = policy.places[2]
    policy.theta.grad[blocks[-1]] = 0
    policy._stand_beside(policy.mixtures[2], blocks)
    policy.theta.grad = -torch.ones_like(policy.theta)
    policy.theta.grad[blocks[-1]] = 1
    policy.adam.state[policy.theta]['exp_avg'][:] = 0
    before = policy.theta.detach().clone()
    policy.adam.step()
    moved = policy.theta.detach() - before
    assert moved[blocks[-1]].item() == pytest.approx(-moved[blocks[0]].item(), rel=0.01)


def test_constant_and_no_threshold():
    policy, _ = prepared(threshold='constant', t_initial=0.133)
    set_probabilities(policy, 1, {0: 0.13, 1: 0.14, 2: 0.36, 3: 0.37})
    after(policy, 10)
    assert policy.mixtures[1].left == [1, 2, 3]
    policy, _ = prepared(threshold='none')
    assert any('no skip connection takes its place' in note for note in policy.notes)
    set_probabilities(policy, 1, {0: 0.001, 1: 0.997, 2: 0.001, 3: 0.001})
    after(policy, 10)
    assert len(policy.mixtures[1].left) == 4
    [(_, skips)] = policy.choose(None)
    assert [s for s in skips if s.startswith('layers.1')] == [f'layers.1.candidates.k{k}' for k in (1, 5, 7)]


def test_what_is_removed_is_freed():
    """Parameters, and the optimiser's state of them."""
    suite = TestLayers()
    policy = suite.make([Budget.parse('macs', _layered())])
    run, gone = suite.training(policy), []

    def after_epoch(training, loss, lr):
        if training.epoch == 3:
            weight = training.network.get_submodule('layers.1').candidates['0'].block[1].weight
            assert weight in training.optimizer.state
            gone.append(weakref.ref(weight))
            set_probabilities(policy, 1, {0: 0.01, 1: 0.01, 2: 0.01, 3: 0.97})
        policy.epoch_end(training.epoch - 1)

    network = run.run(after_epoch=after_epoch)
    left = set(map(id, network.parameters()))
    assert gone[0]() is None and {id(p) for p in run.optimizer.state} <= left
    assert {id(p) for group in run.optimizer.param_groups for p in group['params']} == left


# -- a planted best ----------------------------------------------------------------------------------------------------------


class Planted(Batch):
    """What is lost is a given number for each candidate and width, as the coefficients weigh them."""
    epochs = 20

    def __init__(self, policy, lost, update, updates):
        super().__init__(None, epoch=update * 20 // updates, progress=update / updates, seed=1000 * policy.seed + update)
        self.policy, self.lost = policy, lost

    def forward(self):
        total = torch.zeros(())
        for layer, m in enumerate(self.policy.mixtures):
            count = len(m.candidates) + m.skip
            weights = torch.ones(1) if count == 1 else m.weights
            for weight, number, c in zip(weights, m.left, m.candidates.values()):
                at = [self.lost(layer, number, level / len(c.widths)) for level in c.levels]
                total = total + weight * sum(s * v for s, v in zip(c.shares, at))
            if m.skip:
                total = total + weights[-1] * self.lost(layer, -1, 1.)
        return total

    def loss(self, logits):
        return logits

    def backward(self, loss):
        pass


@pytest.mark.parametrize('seed', range(2))
def test_the_planted_network_is_found(seed):
    """One candidate of each layer, at one of its widths, is the best by construction; and a layer that is best left out."""
    best = {0: (1, 0.25), 1: (2, 0.75), 2: (-1, 0.)}

    def lost(layer, number, share):
        candidate, width = best[layer]
        return 0.3 * (number != candidate) + 2 * (share - width) ** 2 * (number != -1)

    policy, _ = prepared(alpha=0., seed=seed)
    for update in range(20 * 30):
        policy.train_step(Planted(policy, lost, update, 600))
        if update % 30 == 29:
            policy.epoch_end(update // 30)
    [(widths, skips)] = policy.choose(None)
    left = [b.name for b in policy.space.blocks if b.name not in skips]
    assert left == ['layers.0.candidates.k3', 'layers.1.candidates.k5'] and list(widths.values()) == [4, 12]


class Signal(nn.Module):
    """A block that adds what its input says of the class: a network of few of them is uncertain of it."""
    residual = True

    def __init__(self):
        super().__init__()
        self.candidates = nn.ModuleDict({'only': self.Add()})

    class Add(nn.Conv2d):
        def __init__(self):
            super().__init__(2, 2, 1, bias=False)
            self.weight.data = torch.tensor([[0., 0.], [1., 0.]])[..., None, None]

        def forward(self, x):
            return x + super().forward(x)

    def forward(self, x):
        return sum(c(x) for c in self.candidates.values())


class Signals(nn.Module):
    """Eight such layers, each followed by a normalisation to the first channel."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Signal() for _ in range(8))
        self.register_buffer('sign', torch.tensor([-1., 1.]))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = torch.cat([torch.ones_like(x[:, :1]), x[:, 1:] / x[:, :1]], 1)
        return x.mean((2, 3))[:, 1:] * self.sign


def survivors(phi, lam, seed, steps=15):
    network = Signals()
    space = replace(trace(Signals(), (2, 4, 4)), blocks=tuple(Block(f'layers.{i}.candidates.only') for i in range(8)))
    options = Prunode.Options(alpha=0.05, phi=phi, lam=lam, warmup=0.1, arch_lr=0.02)
    policy = Prunode(space, [Budget.parse('macs', space)], {}, options, seed)
    policy.prepare(network, space)
    x = torch.ones(4, 2, 4, 4)
    x[:, 1] = 0
    for update in range(20 * steps):
        batch = Batch(network, x, torch.ones(4, dtype=torch.long), update // steps, update / 20 / steps, seed=1000 * seed + update)
        batch.epochs = 20
        policy.train_step(batch)
        if update % steps == steps - 1:
            policy.epoch_end(update // steps)
    [(_, skips)] = policy.choose(None)
    return 8 - len(skips)


def test_fewer_layers_survive_where_blocks_are_not_held_back():
    """Every layer that is left out costs accuracy, and (phi, lambda) = (1, 1) leaves out more than (1.1, 0.4) does: Table 6."""
    plain, held = ([survivors(phi, lam, seed) for seed in range(2)] for phi, lam in ((1., 1.), (1.1, 0.4)))
    print('layers left', plain, held)
    assert max(plain) < min(held) and min(plain) >= 1


# -- answers -----------------------------------------------------------------------------------------------------------------


def test_a_limit_is_filled_by_one_factor():
    space = _layered()
    policy, _ = prepared(budget=('macs=0.1x', 'params=0.15x'))
    assert any('macs=0.1x says what costs are weighed by' in note for note in policy.notes)
    set_probabilities(policy, 1, {0: 0.1, 1: 0.7, 2: 0.1, 3: 0.1})
    for (widths, skips), budget in zip(policy.choose(None), policy.budgets):
        shape = {name: 1. for name in widths}
        assert len(skips) == 4 and budget.met(widths, skips)
        assert widths == fill_budget(space, budget, {n: policy.grid[n] for n in widths}, shape, skips)
        assert any(w < policy.grid[n][-1] for n, w in widths.items())


def test_a_latency_is_weighed_in_microseconds():
    """By what each block takes, in tables; and blocks that are left out are taken off."""
    space = _layered()
    grid, names = TestLayers.grid(space), [b.name for b in space.blocks]
    group = {name: next(g for g in grid if g.startswith(name + '.')) for name in names}
    tables = {name: Factors({group[name]: grid[group[name]]}, 0., {group[name]: np.arange(1., 5.) * (i + 1) / 100})
              for i, name in enumerate(names)}
    whole = Factors(grid, 1., {g: t for part in tables.values() for g, t in part.unary.items()})
    cost = Tables(space, 'ms per image', whole, tables)
    policy = Prunode(space, [Budget(cost, math.inf, 'latency')], grid, Prunode.Options())
    network = policy.prepare(Layered(), space)
    assert policy.costs[0] == [pytest.approx([10. * n for n in range(1, 5)]), pytest.approx([20. * n for n in range(1, 5)])]
    assert policy.rest == pytest.approx(1000.)
    found = policy._sample(Batch(network)).item()
    assert found == pytest.approx(1000 * sum(p * cost(w, s) for p, w, s in every_network(policy)), rel=1e-5)


def test_what_keeps_its_width_counts_at_that_width():
    """Where the grid goes beyond the base widths."""
    space = trace(Residual(), (3, 16, 16))
    grid = {name: (g.size, 2 * g.size) for name, g in space.searchable.items()}
    policy = Prunode(space, [Budget.parse('macs', space)], grid, Prunode.Options())
    wide = _Net.__new__(Residual)
    nn.Module.__init__(wide)
    wide.stem, wide.head = _layer(3, 32, 3), nn.Linear(48, 4)
    wide.blocks = nn.ModuleList([Residual.Add(_layer(32, 64, 1), _layer(64, 64, 3, groups=64), nn.Conv2d(64, 32, 1, bias=False),
                                              nn.BatchNorm2d(32))])
    wide.last = nn.Sequential(_layer(32, 48, 3, stride=2), _layer(48, 48, 3))
    network = policy.prepare(wide, trace(wide, (3, 16, 16)))
    cost = policy._sample(Batch(network)).item()
    [m] = policy.mixtures
    macs, [c] = Macs(space), m.candidates.values()
    expected = sum(p * macs({**policy.largest, **c.widths[level - 1]}) for p, level in zip(c.shares.tolist(), c.levels))
    assert cost == pytest.approx(1000 * expected / macs(policy.largest), rel=1e-5)


# -- what it refuses, and says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('options, message', [
    ({'t_initial': 0.3}, r'prunode.t_initial 0.3 is above 1/4, and some layer has 4 candidates.*give 0.25 or less'),
    ({'t_initial': 0.23, 'skip': 'candidate'}, r'above 1/5.*give 0.2 or less'),
])
def test_layers_that_do_not_fit_the_options(options, message):
    with pytest.raises(PolicyError, match=message):
        prepared(**options)


@pytest.mark.parametrize('options, message', [
    ({'threshold': 'cubic'}, "prunode.threshold must be linear, constant, none, not 'cubic'"), ({'tau': 0.}, 'tau must be above 0'),
    ({'alpha': -1.}, 'prunode.alpha must be 0 or more, not -1'), ({'alpha': math.nan}, 'must be 0 or more, not nan'),
    ({'warmup': 1.}, 'warmup is a share'), ({'t_final': 0.4}, '0.4 leaves layers with several blocks'),
    ({'t_initial': 0.6}, 'the first not above the second'), ({'skip': 'never'}, "late, candidate, none, not 'never'"),
])
def test_options_out_of_range(options, message):
    with pytest.raises(PolicyError, match=message):
        Prunode.Options(**options)


def test_costs_of_several_kinds_cannot_be_weighed():
    with pytest.raises(PolicyError, match='weighs one cost, and macs params are several'):
        prepared(budget=('macs', 'params'))


class Unlike(Residual):
    """Blocks whose hidden channels show where they are 0: one by its activation, one for want of a normalisation."""

    def __init__(self, blocks=2):
        super().__init__(blocks)
        if blocks > 1:
            self.blocks[0][1][2] = nn.Sigmoid()
            self.blocks[1][0][1] = self.blocks[1][1][1] = nn.Identity()


def test_groups_that_masks_cannot_narrow_keep_their_width():
    space = trace(Unlike(3), (3, 16, 16))
    grid = {name: tuple(range(4, g.size + 1, 4)) for name, g in space.searchable.items()}

    def policy(**options):
        return Prunode(space, [Budget.parse('macs', space)], grid, Prunode.Options(**options))

    found = policy()
    found.prepare(Unlike(3), space)
    assert [len(c.widths) for m in found.mixtures for c in m.candidates.values()] == [1, 1, 8]
    assert 'blocks.1.0.0, blocks.0.0.0: there, masked channels are not as good as gone' in found.notes[0]
    with pytest.raises(PolicyError, match=r'--prunode.strict: blocks.1.0.0, blocks.0.0.0: .*--fix'):
        policy(strict=True).prepare(Unlike(3), space)
    other = policy(widths=False, strict=True)
    other.prepare(Unlike(3), space)  # where widths are not searched, it does not matter


def test_a_model_without_blocks_and_one_without_a_choice():
    plain = nn.Sequential(_layer(3, 8, 3), _layer(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    space = trace(plain, (3, 16, 16))
    grid = {name: (4, 8) for name in space.searchable}
    with pytest.raises(PolicyError, match='no block with hidden channels of its own, nor one that can be left out'):
        Prunode(space, [Budget.parse('macs', space)], grid).prepare(plain, space)
    space = trace(Residual(), (3, 16, 16))
    policy = Prunode(space, [Budget.parse('macs', space)], {n: (g.size,) for n, g in space.searchable.items()},
                     Prunode.Options(skip='none'))
    with pytest.raises(PolicyError, match='nothing to choose'):
        policy.prepare(Residual(), space)


def test_budgets_that_fixed_groups_cannot_meet():
    space = trace(Unlike(2), (3, 16, 16))
    grid = {name: (4, g.size) for name, g in space.searchable.items() if name.startswith('blocks')}
    policy = Prunode(space, [Budget.parse('macs=0.1x', space)], {**grid, 'last.0.0': (4, 24)})
    with pytest.raises(BudgetError, match="budget 'macs=0.1x'"):
        policy.prepare(Unlike(2), space)


# -- going on ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('epoch', [2, 4, 6])
def test_a_kill_in_any_epoch_changes_nothing(epoch, tmp_path):
    """In the warm-up, after it, after blocks went and while skip connections stand beside the last ones: bit for bit."""
    unbroken, network, notes = _unbroken()
    suite, resumed = Longer(), Longer().make(unbroken.budgets)
    with pytest.raises(Exception, match='^$'):
        suite.trained(suite.make(unbroken.budgets), tmp_path / 'x.pth.tar', kill_after=epoch)
    again = suite.trained(resumed, tmp_path / 'x.pth.tar')
    assert [n for n in resumed.notes if n.startswith('epoch')] == [n for n in notes if int(n.split()[1][:-1]) > epoch]
    for name, t in network.state_dict().items():
        assert torch.equal(t, again.state_dict()[name]), name
    assert torch.equal(unbroken.theta, resumed.theta) and unbroken.search_loss == resumed.search_loss
    assert unbroken.choose(None) == resumed.choose(None)


class Longer(TestLayers):
    __test__ = False
    epochs = 8
    options = {'arch_lr': 0.7}


@cache
def _unbroken():
    policy = Longer().make([Budget.parse('macs', _layered())])
    network = Longer().trained(policy)
    notes = [n for n in policy.notes if n.startswith('epoch')]
    assert any(' 0 skip connections' not in n for n in notes) and len(notes) > 2  # all phases are there
    return policy, network, notes


def test_a_state_of_other_costs_is_refused():
    policy, _ = prepared()
    state = policy.state_dict()
    prepared()[0].load_state_dict(state)
    with pytest.raises(PolicyError, match='chosen by other costs'):
        prepared(budget=('params',))[0].load_state_dict(state)


# -- several processes -------------------------------------------------------------------------------------------------------


def _process(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    distributed.init_process_group('gloo', rank=rank, world_size=2)

    class Halves(Longer):
        epochs = 4

        @staticmethod
        def arguments():
            args = PolicyConformance.arguments()
            args.rank, args.world_size = rank, 2
            return args

        def images(self, seed=0):
            return [(x[rank::2], y[rank::2]) for x, y in super().images(seed)]

    suite = Halves()
    policy, gathered = suite.make([Budget.parse('macs', _layered())]), []
    network = suite.trained(policy)
    torch.save({'state': policy.state_dict(), 'weights': dict(network.named_parameters()), 'found': policy.choose(None),
                'gathered': gathered}, Path(folder) / f'{rank}.pt')
    distributed.destroy_process_group()


def test_processes_remove_the_same_blocks(tmp_path):
    """They learn from other images, and from one another."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    method = 'spawn' if torch.cuda.is_available() else 'fork'  # which need not import everything again
    torch.multiprocessing.start_processes(_process, (port, tmp_path), nprocs=2, start_method=method)
    a, b = (torch.load(tmp_path / f'{rank}.pt', weights_only=False) for rank in range(2))
    assert torch.equal(a['state']['theta'], b['state']['theta']) and a['state']['layers'] == b['state']['layers']
    assert a['state']['search_loss'] == b['state']['search_loss'] and a['found'] == b['found']
    assert all(torch.equal(t, b['weights'][k]) for k, t in a['weights'].items())
    assert sum(len(m['left']) for m in a['state']['layers']) < 7


def test_gradients_are_averaged_over_processes():
    class Two(Batch):
        def gather(self, tensor):
            other = torch.ones_like(tensor)
            return torch.cat([tensor, other])

    policy, network = prepared()
    policy.train_step(Batch(network))
    both, network = prepared()
    both.train_step(Two(network))
    torch.testing.assert_close(both.theta.grad, (policy.theta.grad + 1) / 2)
    assert both.loss_sum == pytest.approx((policy.loss_sum + 1) / 2)


def test_mixtures_are_in_the_place_of_layers():
    policy, network = prepared()
    assert [type(m) for m in network.layers] == [Mixture] * 3 and [m.residual for m in policy.mixtures] == [False, True, True]
