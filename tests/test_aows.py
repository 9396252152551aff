"""The policies of policies/aows.py: what they train, what they learn from it, how they sample, and what they answer."""
import copy
import itertools
import math
import os
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import distributed, nn
from torch.nn import functional as F

import timm_width
from timm_width import cli, target
from timm_width.budget import Budget, BudgetError
from timm_width.conformance import PlantedProblem, PolicyConformance, _Net
from timm_width.cost import Macs
from timm_width.engine import Step, Training
from timm_width.factors import Factors
from timm_width.grids import make_grid, squeezes
from timm_width.moving import MovingMeans
from timm_width.policies import PolicyError, load
from timm_width.policies.aows import AOWS, OWS, Greedy, error, temperature
from timm_width.tables import Tables
from timm_width.trace import meta_copy, trace

from .test_search import command

SUITE = PolicyConformance()
SPACE = SUITE.space()
GRID = SUITE.grid(SPACE)


def budgets(*texts):
    return [Budget.parse(text, SPACE) for text in texts or ('macs=0.5x',)]


class Alone(Step):
    """A step without an engine, in float64; keeps what was run, and what was lost."""

    def __init__(self, network, images, targets, update=0, progress=0., seed=0):
        self.network, self.images, self.targets = network, images, targets
        self.update, self.asked, self.losses = update, [], []
        self.share = progress
        self.image_rng = np.random.default_rng([seed, update])

    progress = property(lambda self: self.share)

    def forward(self, widths, gates=None):
        self.asked.append((dict(widths), gates))
        return self.network(self.images, widths, gates=gates)

    def loss(self, logits):
        return F.cross_entropy(logits, self.targets)

    def distill(self, logits, teacher):
        return F.cross_entropy(logits, teacher.softmax(-1))

    def backward(self, loss):
        self.losses.append(loss.item())
        loss.backward()

    def gather(self, tensor):
        return tensor


def batch(count=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 16, 16, generator=rng, dtype=torch.float64), torch.randint(4, (count,), generator=rng)


def prepared(policy):
    torch.manual_seed(0)
    model = _Net().double()
    return policy.prepare(model, trace(model, (3, 16, 16)))


# -- training ----------------------------------------------------------------------------------------------------------------


def masks(model, policy, widths):
    """The authors' way: behind every activation, channels are set to 0. Here the norms without one feed a sum, where it is the same."""
    owner = {'stem.0': ['stem.2', 'blocks.0.3'], 'blocks.0.0.0': ['blocks.0.0.2', 'blocks.0.1.2'], 'last.0.0': ['last.0.2'], 'last.1.0': ['last.1.2']}
    assert set(owner) == set(policy.free)
    for group, places in owner.items():
        mask = (torch.arange(SPACE[group].size) < torch.as_tensor(widths[group]).reshape(-1, 1)).double()[:, :, None, None]
        for place in places:
            model.get_submodule(place).register_forward_hook(lambda m, i, out, mask=mask: out * mask)


def test_a_step_has_the_gradients_of_the_authors_masks():
    """The largest from labels, the smallest and one random network for each image from its softmax; summed."""
    policy = OWS(SPACE, budgets(), GRID)
    network = prepared(policy)
    reference = copy.deepcopy(network.model)
    images, targets = batch()
    step = Alone(network, images, targets)
    policy.train_step(step)
    assert [widths for widths, _ in step.asked] == [policy.largest, policy.smallest, policy.largest]
    assert [gates is not None for _, gates in step.asked] == [False, False, True]
    drawn = {g: gates.sum(1).long() for g, gates in step.asked[2][1].items()}
    assert set(drawn) == set(GRID) and all(set(w.tolist()) <= set(GRID[g]) for g, w in drawn.items())
    assert len(set(zip(*(w.tolist() for w in drawn.values())))) > 8  # of 16 images

    logits = reference(images)
    F.cross_entropy(logits, targets).backward()
    soft, losses = logits.detach().softmax(-1), [F.cross_entropy(logits, targets).item()]
    for widths in (policy.smallest, drawn):
        masked = copy.deepcopy(reference)
        masks(masked, policy, widths)
        loss = F.cross_entropy(masked(images), soft)
        losses.append(loss.item())
        loss.backward()
        for p, q in zip(reference.parameters(), masked.parameters()):
            p.grad += q.grad
    assert step.losses == pytest.approx(losses, rel=1e-10)
    for (name, p), q in zip(reference.named_parameters(), network.model.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_an_image_counts_for_the_widths_on_its_path():
    """(cross-entropy at its widths - that of the largest) / number of groups, by the label."""
    policy = OWS(SPACE, budgets(), GRID, OWS.Options(seen=1))
    network = prepared(policy)
    images, targets = batch()
    step = Alone(network, images, targets)
    policy.train_step(step)
    gates = step.asked[2][1]
    with torch.no_grad():
        full, masked = network(images, policy.largest), network(images, policy.largest, gates=gates)
    u = (F.cross_entropy(masked, targets, reduction='none') - F.cross_entropy(full, targets, reduction='none')) / len(GRID)
    for group, table in policy.errors().unary.items():
        for width, mean in zip(GRID[group], table):
            on = gates[group].sum(1) == width
            if on.any():
                assert mean == pytest.approx(u[on].mean().item(), rel=1e-5, abs=1e-7)


def test_the_error_of_images_with_labels_is_the_mean_over_the_labels():
    logits, targets = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 0, 1]] * 5)
    want = [F.binary_cross_entropy_with_logits(row, t.float()).item() for row, t in zip(logits, targets)]
    assert error(logits, targets).tolist() == pytest.approx(want)


def test_images_draw_uniformly_another_network_in_every_process_batch_and_update():
    policy = OWS(SPACE, budgets(), GRID)

    def paths(update=0, rank=0, accumulated=0, count=8):
        training = SimpleNamespace(seed=3, epoch=0, epochs=1, batches=(), updates=update, batch=accumulated, args=SimpleNamespace(rank=rank))
        return policy.paths(Step(training, torch.zeros(count, 1), None))

    found = [paths(), paths(1), paths(rank=1), paths(accumulated=1), paths(1, 1, 1)]
    assert np.array_equal(paths(), found[0])
    assert all((a != b).any() for a, b in itertools.combinations(found, 2))
    step = Step(SimpleNamespace(seed=3, epoch=0, epochs=1, batches=(), updates=0, batch=0, args=SimpleNamespace()), None, None)
    assert step.rng.random() != step.image_rng.random()
    for row, widths in zip(paths(count=20_000), GRID.values()):
        np.testing.assert_allclose(np.bincount(row) / len(row), 1 / len(widths), atol=0.015)


# -- moving means ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('window', [1, 3, 7, 100, 10_000])
def test_moving_means_are_those_of_the_last_values(window):
    """To the last digit of float32 values, also where a batch is longer than the window, and from a state in between."""
    rng, sizes = np.random.default_rng(window), [3, 1, 5]
    means, history = MovingMeans(sizes, window), [[[] for _ in range(n)] for n in sizes]
    for i, count in enumerate([4, 1, 30, 0, 17, 30, 30, 200]):
        paths = np.stack([rng.integers(n, size=count) ** 2 % n for n in sizes])
        values = rng.normal(size=count).astype(np.float32)
        means.add(paths, values)
        for g, k in itertools.product(range(len(sizes)), range(count)):
            history[g][paths[g, k]].append(values[k])
        if i == 4:
            state = {k: v.clone() for k, v in means.state_dict().items()}
            means = MovingMeans(sizes, window)
            means.load_state_dict(state)
        for found, wanted in zip(means.means(1), history):
            seen = [h[-window:] for h in wanted]
            known = [j for j, h in enumerate(seen) if h]
            want = np.interp(range(len(seen)), known, [np.mean(seen[j], dtype=np.float64) for j in known]) if known else np.zeros(len(seen))
            np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)
    assert means._last.shape[1] <= window


def test_what_was_seen_too_seldom_is_interpolated_and_what_is_not_finite_left_out():
    means = MovingMeans([4, 2], 10)
    means.add(np.array([[1] * 3 + [3] * 3 + [0, 1, 3]] * 2) % np.array([[4], [2]]), np.array([1., 1, 1, 3, 3, 3, 9, np.nan, np.inf]))
    assert [m.tolist() for m in means.means(3)] == [[1, 1, 2, 3], [2, 2]]
    assert [m.tolist() for m in means.means(10)] == [[0] * 4, [0] * 2]


def test_moving_means_of_another_grid_are_not_loaded():
    state = MovingMeans([3], 10)
    state.add(np.zeros((1, 10), dtype=int), np.ones(10))
    with pytest.raises(ValueError, match='another grid'):
        MovingMeans([4], 10).load_state_dict(state.state_dict())


@pytest.mark.parametrize('before', [5, 30, 1000])
@pytest.mark.parametrize('window', [1, 4, 30, 200])
def test_a_window_that_is_made_shorter_keeps_the_last_values(before, window):
    rng, history = np.random.default_rng(0), [[], [], []]
    means = MovingMeans([3], before)
    for i in range(12):
        paths, values = rng.choice(3, size=(1, 17), p=[0.1, 0.2, 0.7]), rng.normal(size=17).astype(np.float32)
        means.add(paths, values)
        for k, v in zip(paths[0], values):
            history[k].append(v)
        if i == 6:
            means.shorten(min(window, before))
            history = [h[-min(window, before):] for h in history]
        if i >= 6:
            np.testing.assert_allclose(means.means(1)[0], [np.mean(h[-min(window, before):], dtype=np.float64) for h in history], rtol=1e-9)


def test_aows_averages_the_share_of_an_epoch():
    """Of 400 images and up to 8 widths, the last 50 of each; OWS, whose widths are all drawn alike, 100,000."""
    for policy, options, window in ((AOWS, {}, 50), (AOWS, {'window': 7}, 7), (AOWS, {'seen': 60}, 60), (OWS, {}, 100_000), (OWS, {'window': 0}, 50)):
        p = policy(SPACE, budgets(), GRID, policy.Options(**options))
        assert max(map(len, GRID.values())) == 8
        for epoch in range(2):
            for update in range(4):
                step = Alone(None, *batch(100), update)
                p.learn(step, policy.paths(p, step), torch.zeros(100))
            p.epoch_end(epoch)
            assert p.estimates.window == window


# -- sampling ----------------------------------------------------------------------------------------------------------------


def test_temperatures_are_those_of_the_supplement():
    assert [temperature(e) for e in (5, 6, 10, 20)] == pytest.approx([1, 1e-2, 1e-3, 5e-4])
    assert temperature(5.5) == pytest.approx(0.1) and temperature(15) == pytest.approx(math.sqrt(1e-3 * 5e-4))


def taught(policy, seed=0):
    """A policy with estimates: of 20 images on each width, errors that fall with the width."""
    rng, free = np.random.default_rng(seed), policy.free
    most = max(len(policy.grid[g]) for g in free)
    worth = rng.exponential(0.1, len(free))
    for k in np.repeat(np.arange(most), 20):
        for i, g in enumerate(free):
            paths = rng.integers([[len(policy.grid[f])] for f in free])
            paths[i] = k % len(policy.grid[g])
            policy.estimates.add(paths, worth[[i]] * np.exp(-3 * (paths[i] + 1) / len(policy.grid[g])))
    return policy


@pytest.mark.parametrize('sampling', ['marginal', 'joint'])
def test_aows_draws_from_the_gibbs_distribution_of_its_budget(sampling):
    """Of the enumeration, at the multiplier of the budget whose turn it is; by marginals as independent draws, jointly as whole networks."""
    policy = taught(AOWS(SPACE, budgets('macs=0.5x', 'params=0.3x'), GRID, AOWS.Options(sampling=sampling)))
    errors, everything = policy.errors(), [dict(zip(GRID, w)) for w in itertools.product(*GRID.values())]
    places = np.array([[GRID[g].index(w[g]) for g in GRID] for w in everything])
    count = 40_000
    for turn, t in ((0, 0.02), (1, 0.02), (1, 1e-3)):
        solution = policy.limits()[turn].lagrangian.solve(errors)
        cost = policy.budgets[turn].cost
        energy = np.array([errors(w) + solution.gamma * cost(w) for w in everything]) / t
        p = np.exp(energy.min() - energy)
        p /= p.sum()
        drawn = policy.gibbs(turn, t, np.random.default_rng(0), count)
        for g, (row, widths) in enumerate(zip(drawn, GRID.values())):
            want = [p[places[:, g] == k].sum() for k in range(len(widths))]
            np.testing.assert_allclose(np.bincount(row, minlength=len(widths)) / count, want, atol=0.012)
        a, b = list(GRID).index('stem.0'), list(GRID).index('blocks.0.0.0')
        product = sum(p * (places[:, a] * places[:, b]))
        if sampling == 'marginal':
            product = sum(p * places[:, a]) * sum(p * places[:, b])
        assert np.mean(drawn[a] * drawn[b]) == pytest.approx(product, abs=0.12)
    cold = policy.gibbs(0, 1e-10, np.random.default_rng(0), 50)
    best = policy.limits()[0].lagrangian.solve(errors).widths
    assert all({GRID[g][k] for k in row} == {best[g]} for g, row in zip(GRID, cold))


def test_aows_samples_uniformly_first_and_then_for_each_budget_in_turn(monkeypatch):
    """Through the fifth of 20 epochs, stretched to the length of the search; the temperature is that of the update."""
    policy = taught(AOWS(SPACE, budgets('macs=0.5x', 'params=0.3x'), GRID))
    asked = []
    monkeypatch.setattr(AOWS, 'gibbs', lambda self, turn, t, rng, count: asked.append((turn, t)) or np.zeros((len(GRID), count), dtype=int))
    images, targets = batch(4)
    drawn = [policy.paths(Alone(None, images, targets, update, update / 80)) for update in range(80)]
    assert [p.any() for p in drawn] == [True] * 20 + [False] * 60
    assert asked == [(update % 2, temperature(update / 4)) for update in range(20, 80)]


# -- answers -----------------------------------------------------------------------------------------------------------------


def best_within(policy, budget):
    errors = policy.errors()
    return min(errors(w) for w in (dict(zip(GRID, w)) for w in itertools.product(*GRID.values())) if budget.met(w))


def latency():
    """A cost in floats, as if measured."""
    cost, rng = Macs(SPACE).factors(GRID), np.random.default_rng(0)
    return Tables(SPACE, 'ms', Factors(GRID, 0.05, {g: t * 1e-6 * rng.uniform(1, 1.01, t.shape) for g, t in cost.unary.items()},
                                       {p: t * 1e-6 * rng.uniform(1, 1.01, t.shape) for p, t in cost.pairwise.items()}))


@pytest.mark.parametrize('policy', [OWS, AOWS])
@pytest.mark.parametrize('text', ['macs=0.5x', 'params=0.4x', 'latency=0.5x'])
def test_answers_have_the_least_estimated_error_within_the_budget(policy, text):
    """Exactly, or up to the gap that is reported; in MACs, parameters or milliseconds."""
    budget = Budget.parse(text, SPACE, latency())
    relaxed, closed = (taught(policy(SPACE, [budget], GRID, policy.Options(solver=s))) for s in ('lagrangian', 'exact'))
    best = best_within(relaxed, budget)
    for p in (relaxed, closed):
        [(widths, skips)] = p.choose(None)
        assert budget.met(widths) and skips == ()
        [note] = p.notes
        assert note.startswith(f'{text}: {budget.cost.show(budget.cost(widths))[:6]}')
        value = p.errors()(widths)
        if p is closed:
            assert value == pytest.approx(best, rel=1e-9) and 'the least' in note
        else:
            gap = float(note.partition('at most ')[2].split()[0])
            assert best <= value + 1e-12 <= best + gap * 1.01 + 2e-12 and 'duality gap' in note


def test_ows_answers_another_budget_from_the_same_state():
    one = taught(OWS(SPACE, budgets('macs=0.5x'), GRID))
    other = OWS(SPACE, budgets('macs=0.3x', 'macs=0.5x'), GRID)
    other.load_state_dict(one.state_dict())
    found = other.choose(None)
    assert found[1:] == one.choose(None) and found[0] != found[1]
    assert not OWS.learns_budget and AOWS.learns_budget and not Greedy.learns_budget


@pytest.mark.parametrize('score', ['error', 'ratio'])
def test_greedy_by_hand(score):
    """Drops what costs the least accuracy, or the least per MAC saved, until the budget is met."""
    budget, problem = budgets('macs=0.4x')[0], PlantedProblem(GRID, 3)
    [found] = Greedy(SPACE, [budget], GRID, Greedy.Options(score=score)).choose(problem)
    widths, macs = {g: w[-1] for g, w in GRID.items()}, Macs(SPACE)
    while macs(widths) > budget.limit:
        def harm(slimmer, widths=widths):
            lost = problem.top1(widths) - problem.top1(slimmer)
            return lost / (macs(widths) - macs(slimmer)) if score == 'ratio' else lost

        widths = min(({**widths, g: w[w.index(widths[g]) - 1]} for g, w in GRID.items() if widths[g] > w[0]), key=harm)
    assert found.widths == widths


def test_a_network_too_dense_is_refused_before_training():
    space = timm_width.trace(meta_copy(timm.create_model('densenet121')), (3, 64, 64))
    budget = [Budget.parse('macs=0.5x', space)]
    with pytest.raises(PolicyError, match=r'ows: densenet121: too many groups .* or --ows.solver exact'):
        OWS(space, budget, make_grid(space, 'aows')).limits()
    OWS(space, budget, make_grid(space, 'aows'), OWS.Options(solver='exact')).limits()
    with pytest.raises(PolicyError, match=r'aows: densenet121: too many groups .*\(--fix\)$'):
        AOWS(space, budget, make_grid(space, 'aows'), AOWS.Options(solver='exact')).limits()


# -- groups that cannot be masked --------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Channels of which a zero behind the norm is as good as gone, and some of which it is not."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()

        def layer(i, o, act, norm=norm):
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), norm(o), act())

        self.good, self.shifted = layer(3, 16, nn.SiLU), layer(16, 16, nn.Sigmoid)
        self.bare, self.after = nn.Conv2d(16, 16, 1), layer(16, 16, nn.ReLU6)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.after(self.bare(self.shifted(self.good(x)))).mean((2, 3)))


def odd(policy=OWS, budget='macs=0.7x', widths=(8, 16), norm=nn.BatchNorm2d, **options):
    model = Odd(norm)
    space = trace(model, (3, 8, 8))
    p = policy(space, [Budget.parse(budget, space)], dict.fromkeys(space.searchable, widths), policy.Options(**options))
    return p, p.prepare(model, space)


def test_groups_that_cannot_be_masked_keep_their_base_width_and_are_listed():
    policy, network = odd()
    assert policy.free == ['good.0', 'after.0']
    assert {g: w for g, w in policy.grid.items() if len(w) == 1} == {'shifted.0': (16,), 'bare': (16,)}
    [note] = policy.notes
    assert note.startswith('2 of 4 groups keep their base width: bare, shifted.0')
    x, y = torch.randn(8, 3, 8, 8), torch.randint(2, (8,))
    step = Alone(network, x, y)
    policy.train_step(step)
    assert set(step.asked[2][1]) == {'good.0', 'after.0'}
    [(widths, _)] = policy.choose(None)
    assert widths['bare'] == widths['shifted.0'] == 16 and policy.budgets[0].met(widths)


@pytest.mark.parametrize('policy', [Greedy, OWS, AOWS])
def test_strict_and_what_is_left_without_them(policy):
    name = policy.__name__.lower()
    with pytest.raises(PolicyError, match=f'^--{name}.strict: bare, shifted.0: .*--fix$'):
        odd(policy, strict=True)
    with pytest.raises(BudgetError, match='below the smallest'):  # it was feasible with all groups
        odd(policy, 'macs=0.35x')
    with pytest.raises(PolicyError, match="'bare' would keep its 16 channels, which its grid does not have: give --fix 'bare'"):
        odd(policy, 'macs=0.2x', (4, 8))
    with pytest.raises(PolicyError, match=f'^{name} can search no group of Odd'):  # all channels share their statistics
        odd(policy, norm=lambda n: nn.GroupNorm(1, n))


@pytest.mark.parametrize('model', [
    'test_resnet', 'resnet10t', 'mobilenetv1_100', 'test_efficientnet', 'mobilenetv3_small_050', 'regnetx_002'])
def test_groups_of_usual_networks_can_be_masked(model):
    """But for the squeezes of squeeze-excite, which are not searched unless asked for, and a head without a norm."""
    net = timm.create_model(model)
    space = timm_width.trace(net, (3, 64, 64))

    grid = make_grid(space, '0.5,1', fix=sorted(squeezes(net, space)))
    policy = OWS(space, [Budget.parse('macs=0.9x', space)], grid)
    rng = torch.get_rng_state()
    policy.prepare(net, space)
    left = {'conv_head'} if model == 'mobilenetv3_small_050' else set()
    assert policy.grid == {g: (space[g].size,) if g in left else w for g, w in grid.items()} and len(policy.notes) == len(left)
    assert torch.equal(rng, torch.get_rng_state())  # the check draws from a generator of its own


# -- several processes -------------------------------------------------------------------------------------------------------


def _process(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    distributed.init_process_group('gloo', rank=rank, world_size=2)

    class Suite(PolicyConformance):
        policy, options, epochs = AOWS, {'seen': 1, 'window': 1000}, 4

        @staticmethod
        def arguments():
            args = PolicyConformance.arguments()
            args.rank, args.world_size = rank, 2
            return args

        @staticmethod
        def images(seed=0):
            return [(x[rank::2], y[rank::2]) for x, y in PolicyConformance.images(seed)]

    suite = Suite()
    policy = suite.make([Budget.parse('macs=0.5x', suite.space())])
    drawn, paths = [], policy.paths
    policy.paths = lambda step: drawn.append(paths(step)) or drawn[-1]
    network = suite.trained(policy)
    torch.save({'state': policy.state_dict(), 'drawn': drawn, 'weights': dict(network.named_parameters()),
                'found': policy.choose(None)}, Path(folder) / f'{rank}.pt')
    distributed.destroy_process_group()


def test_processes_draw_their_own_networks_and_learn_the_same(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    torch.multiprocessing.spawn(_process, (port, tmp_path), nprocs=2)
    a, b = (torch.load(tmp_path / f'{rank}.pt', weights_only=False) for rank in range(2))
    assert all(torch.equal(t, b['state'][k]) for k, t in a['state'].items()) and a['found'] == b['found']
    assert a['state']['seen'].sum() == 4 * 32 * len(GRID)  # epochs, images of both, groups
    assert all(torch.equal(t, b['weights'][k]) for k, t in a['weights'].items())
    assert sum((p != q).any() for p, q in zip(a['drawn'], b['drawn'])) >= 4


# -- searches ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module', params=['ows', 'aows', 'greedy'])
def searched(request, image_folder, tmp_path_factory):
    """A short search of every policy, without the trainings that follow."""
    folder = tmp_path_factory.mktemp(request.param) / 'x'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, 'measure_many', partial(target.measure_many, seconds=1e-4, attempts=1))
        assert cli.main(command(image_folder, folder, '--epochs', '0', '--search-epochs', '4', '--baselines', 'base',
                                policy=request.param)) == 0
        yield SimpleNamespace(policy=request.param, folder=folder)


def test_a_search_answers_within_its_budget_and_says_how_near_to_the_best(searched):
    spec = timm_width.load_spec(searched.folder)
    base = timm_width.trace(timm.create_model('test_resnet', num_classes=3), (3, 32, 32))
    assert Budget.parse('macs=0.5x', base).met(spec.widths) and spec.provenance['policy'] == searched.policy
    assert spec.provenance['grid']['rule'] == 'aows'


def test_a_search_resumed_with_another_budget(searched, capsys, monkeypatch):
    """OWS answers it from what it has learned; AOWS has learned for the first, and refuses."""
    checkpoint = searched.folder / 'search' / f'{searched.policy}.pth.tar'
    before, args = checkpoint.read_bytes(), (searched.folder / 'args.yaml').read_text()
    monkeypatch.setattr(Training, 'run_epoch', None)  # nothing trains
    capsys.readouterr()
    code = cli.main(['search', '--resume', str(searched.folder), '--budget', 'macs=0.4x'])
    out, err = capsys.readouterr()
    if searched.policy == 'aows':
        assert code == 2 and len(err.strip().splitlines()) == 1 and not out
        assert 'aows learned for the budgets there, macs=0.5x, and knows nothing of others: they need another --output' in err
        assert (searched.folder / 'args.yaml').read_text() == args
        assert cli.main(['search', '--resume', str(searched.folder), '--budget', 'macs=0.5x']) == 0  # the same is no other
        out = capsys.readouterr().out
        assert 'aows: macs=0.5x: ' in out and '(duality gap)' in out
    else:
        assert code == 0
        base = timm_width.trace(timm.create_model('test_resnet', num_classes=3), (3, 32, 32))
        assert Budget.parse('macs=0.4x', base).met(timm_width.load_spec(searched.folder / 'macs-0.4x').widths)
        assert timm_width.load_spec(searched.folder).provenance['budget'] == 'macs=0.5x'  # stays
        assert searched.policy != 'ows' or 'ows: macs=0.4x: ' in out
    assert checkpoint.read_bytes() == before


def test_images_may_not_be_mixed(image_folder, tmp_path, capsys):
    assert cli.main(command(image_folder, tmp_path / 'x', '--mixup', '0.2', policy='ows')) == 2
    assert 'cannot be used with the policy ows' in capsys.readouterr().err


# -- names -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['greedy', 'ows', 'aows'])
def test_defaults_are_those_of_the_paper(name):
    policy = load(name)
    assert (policy.default_grid, policy.search_epochs, policy.mixup) == ('aows', 20, False)
    assert '"AOWS: Adaptive and Optimal Network Width Search With Latency Constraints"' in OWS.__doc__
    if name != 'greedy':
        assert policy.Options().solver == 'lagrangian'


@pytest.mark.parametrize('policy, options, says', [
    (OWS, {'window': -1}, 'ows.window and aows.window must be at least 0, not -1'),
    (OWS, {'seen': 0}, 'at least 1'),
    (OWS, {'solver': 'both'}, "must be lagrangian or exact, not 'both'"),
    (OWS, {'seconds': 0}, 'more than 0'),
    (OWS, {'seconds': math.nan}, 'more than 0'),
    (AOWS, {'sampling': 'ffbs'}, "must be marginal or joint, not 'ffbs'"),
    (AOWS, {'window': -1}, 'at least 0'),
    (Greedy, {'score': 'top1'}, "must be error or ratio, not 'top1'"),
    (Greedy, {'batches': -1}, 'at least 0'),
])
def test_options_out_of_range_are_refused(policy, options, says):
    with pytest.raises(PolicyError, match=says):
        policy.Options(**options)
