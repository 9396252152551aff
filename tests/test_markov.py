"""Markov chains over widths: marginals, expectations against sampling and enumeration, and gates."""
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from timm_width.cost import Macs, Params
from timm_width.factors import Factors
from timm_width.markov import Chains
from timm_width.tables import Tables
from timm_width.trace import trace

GRIDS = {'even': tuple(range(10, 65, 6)), 'uneven': (1, 2, 5, 24, 25), 'two': (3, 7), 'one': (8,)}


class Net(nn.Module):
    """A residual stage whose conv joins its group to itself, a depthwise conv and a concatenation."""

    def __init__(self):
        super().__init__()

        def layer(i, o, k=3, **kwargs):
            return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kwargs), nn.BatchNorm2d(o), nn.ReLU())

        self.stem, self.block = layer(3, 16), layer(16, 16)
        self.expand, self.depthwise, self.project = layer(16, 24, 1), layer(24, 24, groups=24), layer(24, 16, 1)
        self.left, self.right = layer(16, 12, 1), layer(16, 20)
        self.joined, self.head = layer(32, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.block(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(self.joined(torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3)))


SPACE = trace(Net(), (3, 8, 8))
GRID = {name: tuple(range(4, g.size + 1, 4)) for name, g in SPACE.searchable.items()}


def chains(grid=GRID, transition='sigmoid', seed=0):
    """With transitions all over the place."""
    made, rng = Chains(grid, transition), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.alpha.copy_(torch.randn(made.alpha.shape, generator=rng, dtype=torch.float64) + 1)
        made.clamp()
    return made


def latency(grid=GRID, space=SPACE):
    """A cost by tables of floats, whose entries are no products."""
    macs, rng = Macs(space).factors(grid), np.random.default_rng(0)
    return Tables(space, 'ms', Factors(grid, 0.05, {g: t * rng.uniform(1, 2, t.shape) for g, t in macs.unary.items()},
                                       {p: t * rng.uniform(1, 2, t.shape) for p, t in macs.pairwise.items()}))


def test_the_net_has_what_the_tests_are_about():
    assert set(GRID) == {'stem.0', 'expand.0', 'left.0', 'right.0', 'joined.0'}


@pytest.mark.parametrize('transition', ['sigmoid', 'exp'])
def test_marginals_and_probabilities(transition):
    """q is a running product; the probabilities of the widths sum to 1; both give the same expected width."""
    made = chains(GRIDS, transition)
    q, p, start = made.marginals(), made.transitions(), 0
    for name, (widths, probabilities) in made.distributions().items():
        steps = len(GRIDS[name]) - 1
        alpha = made.alpha[start:start + steps]
        start += steps
        torch.testing.assert_close(p[name], torch.exp(-alpha) if transition == 'exp' else 1 / (1 + torch.exp(-alpha)))
        assert widths == GRIDS[name] and probabilities.sum().item() == pytest.approx(1) and (probabilities >= 0).all()
        for k in range(steps):
            assert q[name][k].item() == pytest.approx(math.prod(p[name][:k + 1].tolist()))
            assert probabilities[k + 1:].sum().item() == pytest.approx(q[name][k].item())
        grown = sum((b - a) * m for a, b, m in zip(widths, widths[1:], q[name].tolist()))
        assert made.expected_widths()[name].item() == pytest.approx(widths[0] + grown)
    assert start == len(made.alpha)


def test_expected_widths_where_alpha_is_zero():
    """c_min + g (1 - 2^-K): facts/ALGORITHMS.md, 8C."""
    expected = Chains({'r': range(10, 65, 6), 'm': range(6, 49, 3)}).expected_widths()
    assert expected['r'].item() == pytest.approx(10 + 6 * (1 - 2 ** -9))
    assert expected['m'].item() == pytest.approx(6 + 3 * (1 - 2 ** -14))


@pytest.mark.parametrize('make', [Macs, Params, lambda space: latency()])
def test_expected_cost_is_the_mean_over_20000_sampled_widths(make):
    """Within four standard errors; the cost of the expected widths, by which the authors' code goes, is not."""
    cost, made = make(SPACE), chains()
    table = cost.factors(GRID)  # the same, and quicker to ask
    drawn = np.array([table(widths) for widths in made.sample(np.random.default_rng(0), 20_000)], dtype=float)
    error = drawn.std() / math.sqrt(len(drawn))
    expected = made.expected(cost).item()
    assert abs(drawn.mean() - expected) < 4 * error < 0.02 * expected
    if make is Macs:
        assert abs(cost(made.expected_widths()).item() - expected) > 8 * error


@pytest.mark.parametrize('transition', ['sigmoid', 'exp'])
@pytest.mark.parametrize('make', [Macs, lambda space: latency({**GRID, 'stem.0': (4, 12, 16)})])
def test_expected_cost_by_enumeration(make, transition):
    """Of all networks of an uneven grid; and its gradient by finite differences."""
    grid = {**{name: widths[::2] for name, widths in GRID.items()}, 'stem.0': (4, 12, 16), 'joined.0': (16,)}
    cost, made = make(SPACE), chains(grid, transition)
    distributions = made.distributions()
    total = 0.
    for places in itertools.product(*(range(len(widths)) for widths in grid.values())):
        probability = math.prod(distributions[name][1][i].item() for name, i in zip(grid, places))
        total += probability * cost({name: grid[name][i] for name, i in zip(grid, places)})
    assert made.expected(cost).item() == pytest.approx(total, rel=1e-10)

    gradient, = torch.autograd.grad(made.expected(cost), made.alpha)
    for i in range(len(made.alpha)):
        around = []
        for step in 1e-5, -1e-5:
            with torch.no_grad():
                made.alpha[i] += step
                around.append(made.expected(cost).item())
                made.alpha[i] -= step
        assert gradient[i].item() == pytest.approx((around[0] - around[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize('transition', ['sigmoid', 'exp'])
def test_samples_stop_at_the_first_step_that_fails(transition):
    made, count = chains(GRIDS, transition), 20_000
    drawn = made.sample(np.random.default_rng(0), count)
    for name, (widths, p) in made.distributions().items():
        found = np.array([d[name] for d in drawn])
        for width, probability in zip(widths, p.tolist()):
            assert (found == width).mean() == pytest.approx(probability, abs=4 * math.sqrt(0.25 / count))
    assert drawn == made.sample(np.random.default_rng(0), count)


def test_gates_are_the_probabilities_that_channels_are_kept():
    """By steps of the shared network; groups without a choice have none."""
    made = chains({**GRIDS, 'wide': (8, 24, 32)})
    gates = made.gates({**dict.fromkeys(GRIDS, 1), 'wide': 8})
    assert gates.keys() == {'even', 'uneven', 'two', 'wide'}
    for name, gate in gates.items():
        unit, (widths, p) = 8 if name == 'wide' else 1, made.distributions()[name]
        kept = [sum(q for w, q in zip(widths, p.tolist()) if w > channel) for channel in range(0, widths[-1], unit)]
        assert gate.tolist() == pytest.approx(kept, rel=1e-6)
    assert Chains({'one': (8,)}).gates({'one': 1}) == {}


@pytest.mark.parametrize('transition', ['sigmoid', 'exp'])
def test_spread_puts_the_expected_cost_where_it_is_wanted(transition):
    cost = latency()
    for share in 0.2, 0.5, 0.9:
        made = chains(GRID, transition)
        made.spread(cost, share * cost())
        assert made.expected(cost).item() == pytest.approx(share * cost(), rel=1e-6)
        p = torch.cat([*made.transitions().values()])
        assert p.min().item() == pytest.approx(p.max().item()) and (transition != 'exp' or made.alpha.min() >= 0)
    made.spread(cost, 2 * cost())  # cannot be: nearly everything is kept, and can still be unlearned
    assert 0.9 * cost() < made.expected(cost) < cost()


def test_transitions_of_exp_stay_probabilities():
    made = Chains(GRID, 'exp')
    assert made.expected_widths() == {name: widths[-1] for name, widths in GRID.items()}
    with torch.no_grad():
        made.alpha -= 1
        made.clamp()
    assert made.alpha.tolist() == [0] * len(made.alpha)
