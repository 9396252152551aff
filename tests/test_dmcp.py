"""DMCP: what its training steps, what its chains learn from, and what it answers."""
import copy
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import timm_width
from timm_width import cli, target
from timm_width.budget import Budget, BudgetError
from timm_width.conformance import PolicyConformance, _Net
from timm_width.engine import Step
from timm_width.grids import make_grid
from timm_width.policies import PolicyError, load
from timm_width.policies.dmcp import DMCP, budget_loss, nearest_within
from timm_width.trace import meta_copy, trace

from .test_markov import latency
from .test_published_widths import UNCOUNTED, group_widths, layers
from .test_search import command

FACTS = Path(__file__).resolve().parents[2] / 'shared' / 'facts' / 'published_widths.json'
SUITE = PolicyConformance()
SPACE = SUITE.space()
GRID = SUITE.grid(SPACE)


class TestDMCP(PolicyConformance):
    policy = DMCP
    epochs = 4  # the chains learn in the last two, so that a resumed search needs their state
    regret = None  # it asks for no scores


class TestDMCPSampled(PolicyConformance):
    policy = DMCP
    options = {'result': 'sampled', 'transition': 'exp', 'initial': 'zero', 'start': 0., 'uniform': 0.1, 'passes': 3}
    regret = None  # it trains on no planted problem


def budgets(*texts, cost=None):
    return [Budget.parse(text, SPACE, cost) for text in texts or ('macs=0.5x',)]


def make(*texts, **options):
    return DMCP(SPACE, budgets(*texts), GRID, DMCP.Options(**options))


class Alone(Step):
    """A step without an engine; keeps what was run, and what was lost."""

    def __init__(self, network, images, targets, update=0, progress=0.):
        self.network, self.images, self.targets, self.update = network, images, targets, update
        self.asked, self.losses, self.share = [], [], progress
        self.rng = np.random.default_rng(update)

    progress = property(lambda self: self.share)

    def forward(self, widths, **kwargs):
        self.asked.append((dict(widths), kwargs))
        return self.network(self.images, widths, **kwargs)

    def loss(self, logits):
        return F.cross_entropy(logits, self.targets)

    def distill(self, logits, teacher):
        return F.cross_entropy(logits, teacher.softmax(-1))

    def backward(self, loss):
        self.losses.append(loss.item())
        loss.backward()

    def gather(self, tensor):
        return tensor


def prepared(policy, seed=0):
    torch.manual_seed(seed)
    model = _Net().double()
    return policy.prepare(model, trace(model, (3, 16, 16)))


def batch(count=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 16, 16, generator=rng, dtype=torch.float64), torch.randint(4, (count,), generator=rng)


# -- the budget loss ---------------------------------------------------------------------------------------------------------


def pull(expected, limit):
    e = torch.tensor(expected, dtype=torch.float64, requires_grad=True)
    loss = budget_loss(e, limit)
    return loss.item(), torch.autograd.grad(loss, e)[0].item()


@pytest.mark.parametrize('limit', [87e6, 2.2e9, 0.04, 12_345])
def test_nothing_pulls_inside_the_dead_zone(limit):
    """From 0.95 to 1 of the budget, in any unit; below it the loss falls with the cost, above it rises; it is continuous."""
    for share in 0.9501, 0.97, 0.9999:
        assert pull(share * limit, limit) == (0, 0)
    for share in 0.02, 0.5, 0.94:
        loss, gradient = pull(share * limit, limit)
        assert loss > 0 > gradient
    for share in 1.0001, 1.2, 10.:
        loss, gradient = pull(share * limit, limit)
        assert loss > 0 and gradient > 0
    assert pull(0.95 * limit * (1 - 1e-9), limit)[0] == pytest.approx(0, abs=1e-6) == pull(limit * (1 + 1e-9), limit)[0]


@pytest.mark.parametrize('target', [87., 300., 2200.])
@pytest.mark.parametrize('share', [0.1, 0.6, 0.94, 1.001, 1.3, 4.])
def test_its_gradient_is_that_of_the_published_form(target, share):
    """log_l1 of facts/ALGORITHMS.md, section 3, in MFLOPs."""
    e = torch.tensor(share * target, dtype=torch.float64, requires_grad=True)
    r = 0.1 if abs(e.item() - target) > 200 else 1
    published = torch.log(r * (e - (target if share < 0.95 else 0.95 * target)).abs())
    gradient = torch.autograd.grad(published, e)[0].item()
    assert pull(share * target, target)[1] == pytest.approx(gradient)
    assert pull(share * target * 1e6, target * 1e6)[1] * 1e6 == pytest.approx(gradient)


# -- training ----------------------------------------------------------------------------------------------------------------


def test_a_batch_runs_the_largest_the_smallest_and_two_random_networks():
    """The largest learns from the labels, the others from its softmax; in the first half, nothing else happens."""
    policy = make()
    network, alpha = prepared(policy), policy.chains[0].alpha.clone()
    step = Alone(network, *batch(), progress=0.499)
    policy.train_step(step)
    ran = [widths for widths, kwargs in step.asked if not kwargs]
    assert len(step.asked) == len(ran) == 4 and ran[:2] == [policy.largest, policy.smallest] and ran[2] != ran[3]
    assert all(w[g] in GRID[g] for w in ran[2:] for g in GRID)
    logits = [network(step.images, w).detach() for w in ran]
    soft = logits[0].softmax(-1)
    assert step.losses == pytest.approx([F.cross_entropy(logits[0], step.targets).item(),
                                         *(F.cross_entropy(x, soft).item() for x in logits[1:])])
    assert torch.equal(alpha, policy.chains[0].alpha)


def drawn(policy, progress, count=4000):
    found = []
    for update in range(count // 2):
        found += policy.scheduled(Alone(None, None, None, update, progress))
    return found


def test_random_networks_come_from_the_chains_ever_more_often():
    """Uniform through the first half; at the end with the probability `uniform`."""
    policy = make(uniform=0.6)
    chains = policy.chains[0]
    with torch.no_grad():
        chains.alpha.fill_(-30)  # the chains draw the smallest network, which else hardly ever comes up
    for progress, uniform in (0., 1), (0.5, 1), (0.75, math.sqrt(0.6)), (1 - 1e-9, 0.6):
        found = drawn(policy, progress)
        assert np.mean([w != policy.smallest for w in found]) == pytest.approx(uniform, abs=0.03)
        for group, widths in GRID.items():
            seen = [w[group] for w in found if w != policy.smallest]
            np.testing.assert_allclose([np.mean(np.array(seen) == w) for w in widths], 1 / len(widths), atol=0.04)


def test_the_published_probability_at_the_end():
    """0.9999 for every 10 of the 25,000 batches of 1,024 images in 20 epochs of ImageNet."""
    batches = 20 * 1_281_167 / 1024
    assert 0.9999 ** (batches / 10) == pytest.approx(DMCP.Options().uniform, abs=0.005)


def test_chains_learn_from_channels_times_their_marginals():
    """The gradient is that of normalisations' outputs times q, one by one, plus the pull of the budget."""
    policy = make(weight=0.1, transition='sigmoid')
    network = prepared(policy)
    chains, budget = policy.chains[0], policy.budgets[0]
    with torch.no_grad():
        chains.alpha += torch.randn(chains.alpha.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, alpha = copy.deepcopy(network.model), chains.alpha.detach().clone().requires_grad_()
    owner = {'stem.0': ['stem.1', 'blocks.0.3'], 'blocks.0.0.0': ['blocks.0.0.1', 'blocks.0.1.1'], 'last.0.0': ['last.0.1'],
             'last.1.0': ['last.1.1']}
    start = 0
    for group, widths in GRID.items():
        q = torch.cumprod(torch.sigmoid(alpha[start:start + len(widths) - 1]), 0)
        start += len(widths) - 1
        gate = torch.cat([q.new_ones(4), q.repeat_interleave(4)])[:, None, None]
        for norm in owner[group]:
            model.get_submodule(norm).register_forward_hook(lambda m, i, out, gate=gate: out * gate)
    images, targets = batch()
    wanted, = torch.autograd.grad(F.cross_entropy(model(images), targets), alpha)
    attraction, = torch.autograd.grad(budget_loss(chains.expected(budget.cost), budget.limit), chains.alpha)
    assert attraction.any()
    policy.learn(Alone(network, images, targets, progress=0.5))
    torch.testing.assert_close(chains.alpha.grad, wanted + 0.1 * attraction, rtol=1e-4, atol=1e-7)


def test_the_step_of_the_chains_leaves_the_network_alone():
    """Weights, their gradients, running statistics; and the images are run once for each budget."""
    policy = make('macs=0.5x', 'macs=0.3x')
    network = prepared(policy)
    images, targets = batch()
    network(images).sum().backward()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    gradients = [p.grad.clone() for p in network.parameters()]
    alphas = [c.alpha.detach().clone() for c in policy.chains]
    step = Alone(network, images, targets, progress=0.6)
    policy.learn(step)
    assert [widths for widths, _ in step.asked] == [policy.largest] * 2 and not step.losses
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), gradients))
    assert all((c.alpha != a).all() for c, a in zip(policy.chains, alphas))
    assert list(policy.parameters()) == []  # the engine's optimiser has none of them


def test_chains_are_stepped_by_sgd_with_nesterov_momentum():
    """Learning rates from 0.5 to 0.1 by a cosine; a gradient that is not finite is left out."""
    policy = make()
    network, (chains,) = prepared(policy), policy.chains
    images, targets = batch()
    alpha, velocity = chains.alpha.detach().clone(), 0.
    for update, (progress, lr) in enumerate([(0.5, 0.5), (0.75, 0.3), (1 - 1e-9, 0.1)]):
        policy.learn(Alone(network, images, targets, update, progress))
        velocity = 0.9 * velocity + chains.alpha.grad
        alpha -= lr * (chains.alpha.grad + 0.9 * velocity)
        torch.testing.assert_close(chains.alpha.detach(), alpha)
    policy.learn(Alone(network, images * math.nan, targets, 3, 0.9))
    torch.testing.assert_close(chains.alpha.detach(), alpha)


class Planted(Alone):
    """Logits without a network: the loss falls with the marginals of one group, and by nothing else."""

    def __init__(self, worth, progress):
        super().__init__(None, torch.zeros(1), None, progress=progress)
        self.worth = worth

    def forward(self, widths, gates, statistics):
        return sum(self.worth.get(g, 0) * gate.mean() for g, gate in gates.items())

    def loss(self, logits):
        return -logits


@pytest.mark.parametrize('initial, updates, transition', [
    ('budget', 300, 'sigmoid'), ('zero', 400, 'sigmoid'), ('budget', 300, 'exp')])
def test_a_planted_worth_is_found_on_the_budget(initial, updates, transition):
    """Each budget's chains come to expect 0.9 to 1.05 of it; the group that is worth something becomes wide, others narrow."""
    policy = make('macs=0.5x', 'params=0.4x', initial=initial, transition=transition)
    for update in range(updates):
        policy.learn(Planted({'last.0.0': 1.}, update / updates / 2 + 0.5))
    for choice, chains, budget in zip(policy.choose(None), policy.chains, policy.budgets):
        assert 0.9 < chains.expected(budget.cost).item() / budget.limit < 1.05
        widths = {name: w.item() / SPACE[name].size for name, w in chains.expected_widths().items()}
        assert widths['last.0.0'] > 0.85 and max(widths, key=widths.get) == 'last.0.0'
        assert choice.widths['last.0.0'] >= 20 and budget.met(choice.widths)


def test_gradients_are_averaged_over_processes():
    """That of the images; the pull of the budget is the same in all of them."""
    policy = make()
    network, (chains,), (budget,) = prepared(policy), policy.chains, policy.budgets
    with torch.no_grad():
        chains.alpha += 1
    attraction, = torch.autograd.grad(budget_loss(chains.expected(budget.cost), budget.limit), chains.alpha)
    gathered = []

    class TwoProcesses(Alone):
        def gather(self, tensor):
            gathered.append(tensor)
            return torch.cat([tensor, torch.ones_like(tensor)])

    policy.learn(TwoProcesses(network, *batch(), progress=0.5))
    [own] = gathered
    assert own.shape == (1, len(chains.alpha)) and own.any() and attraction.any()
    torch.testing.assert_close(chains.alpha.grad, (own[0].double() + 1) / 2 + 0.1 * attraction)


# -- answers -----------------------------------------------------------------------------------------------------------------


def mobilenet():
    space = trace(meta_copy(timm.create_model('mobilenetv2_100')), (3, 224, 224))
    return space, make_grid(space, 'dmcp', high=1.5)


def scores(calls):
    """`evaluate` by which the narrower stem is the better."""
    def evaluate(widths, statistics):
        calls.append(dict(widths))
        return SimpleNamespace(rank=-widths['conv_stem'])
    return evaluate


@pytest.mark.parametrize('result', ['expected', 'sampled'])
def test_answers_have_99_to_100_percent_of_their_budgets(result):
    """Of MobileNetV2, from chains that have learned something; in MACs, parameters and a measured cost."""
    space, grid = mobilenet()
    texts = ('macs=150M', 'params=1.5M', 'latency=0.4x')
    limits = [Budget.parse(text, space, latency(grid, space)) for text in texts]
    policy = DMCP(space, limits, grid, DMCP.Options(result=result, samples=2))
    rng, calls = torch.Generator().manual_seed(0), []
    for chains, budget in zip(policy.chains, policy.budgets):
        with torch.no_grad():
            chains.alpha += torch.randn(chains.alpha.shape, generator=rng, dtype=torch.float64)
        for step in 2. ** np.arange(1, -12, -1):  # back to the budget, as training would bring them
            chains.alpha.data += step if chains.expected(budget.cost).item() < 0.975 * budget.limit else -step
        assert 0.95 < chains.expected(budget.cost).item() / budget.limit < 1
    for found, budget, chains, note in zip(policy.choose(scores(calls)), limits, policy.chains, policy.notes, strict=True):
        assert 0.99 <= budget.cost(found.widths) / budget.limit <= 1
        assert all(found.widths[g] in grid[g] for g in grid)
        assert note.startswith(f'{budget.text}: ') and '% of the budget)' in note and 'none' not in note
        if result == 'expected':
            for name, w in chains.expected_widths().items():
                step = max(np.diff(grid[name]))
                assert abs(found.widths[name] - w) <= 1.5 * step
        else:
            assert found.widths in calls
            tried = [w for w in calls if 0.99 <= budget.cost(w) / budget.limit <= 1]
            assert found.widths['conv_stem'] == min(w['conv_stem'] for w in tried)
    assert len(calls) == (6 if result == 'sampled' else 0) == policy.evaluations


def test_samples_that_cannot_be_had_are_said_so():
    policy = make(result='sampled')
    with torch.no_grad():
        policy.chains[0].alpha.fill_(-40)  # always the smallest
    [found] = policy.choose(None)
    assert 0.9 < policy.budgets[0].cost(found.widths) / policy.budgets[0].limit <= 1
    assert 'none of 10000 networks drawn has 99 to 100 % of the budget: the nearest was moved there' in policy.notes[0]


def test_widths_go_to_the_nearest_of_the_grid_if_that_fits():
    grid = {name: (4, 8, 16) for name in GRID}
    wanted = {name: w for name, w in zip(GRID, (5.9, 6.1, 11.9, 16.))}
    nearest = dict(zip(GRID, (4, 8, 8, 16)))
    cost = budgets()[0].cost
    for limit in cost(nearest), int(cost(nearest) / 0.991):
        assert nearest_within(Budget(cost, limit, ''), grid, wanted) == nearest


@pytest.mark.parametrize('seed', range(5))
def test_whatever_is_wanted_the_budget_is_met_and_filled(seed):
    """From far above and far below; where steps are coarse, up to what one more step would exceed."""
    rng, space_grid = np.random.default_rng(seed), mobilenet()
    for space, grid in space_grid, (SPACE, GRID):
        budget = Budget.parse('macs=0.5x', space)
        for low, high in (0, 0.1), (0, 1), (0.9, 1):
            wanted = {n: w[0] + rng.uniform(low, high) * (w[-1] - w[0]) for n, w in grid.items()}
            found = nearest_within(budget, grid, wanted)
            assert budget.met(found)
            if space is not SPACE:
                assert budget.cost(found) >= 0.99 * budget.limit
            elif budget.cost(found) < 0.99 * budget.limit:
                assert not any(budget.met({**found, n: levels[levels.index(found[n]) + 1]})
                               for n, levels in grid.items() if found[n] < levels[-1])


@pytest.mark.skipif(not FACTS.exists(), reason=f'needs {FACTS}, which is not part of the repository')
@pytest.mark.parametrize('arch, model, high', [('mobilenet_v2', 'mobilenetv2_100', 1.5), ('resnet50', 'resnet50', 1.)])
def test_the_published_networks_lie_on_their_grids(arch, model, high):
    entry, = (e for e in json.loads(FACTS.read_text())['entries'] if (e['method'], e['arch']) == ('DMCP', arch))
    model = meta_copy(timm.create_model(model))
    space = trace(model, (3, 224, 224))
    grid = make_grid(space, DMCP.default_grid, high=high)
    found = group_widths(space, layers(entry, model))
    uncounted = [conv for (method, of), (conv, _) in UNCOUNTED.items() if (method, of) == ('DMCP', arch)]  # not from a search
    assert found.keys() == grid.keys() and [name for name, w in found.items() if w not in grid[name]] == uncounted
    for name, widths in grid.items():
        largest = int(high * space[name].size)
        step, count = int(0.1 * largest / high + 1e-9), int((high - 0.1) / 0.1 + 1e-4)
        assert widths == tuple(largest - k * step for k in range(count, -1, -1)), name


# -- groups without a normalisation ------------------------------------------------------------------------------------------


def bare(budget='macs=0.7x', widths=(8, 16), **options):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(),
                          nn.Flatten(), nn.Linear(16 * 36, 2))
    space = trace(model, (3, 8, 8))
    policy = DMCP(space, [Budget.parse(budget, space)], dict.fromkeys(space.searchable, widths), DMCP.Options(**options))
    return policy, policy.prepare(model, space)


def test_groups_without_a_normalisation_keep_their_base_width_and_are_listed():
    policy, network = bare()
    assert policy.grid == {'0': (8, 16), '3': (16,)}
    [note] = policy.notes
    assert note.startswith('1 of 2 groups keep their base width: 3: no normalisation governs them')
    policy.train_step(Alone(network, torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]), progress=0.5))
    [(widths, _)] = policy.choose(None)
    assert widths['3'] == 16 and policy.budgets[0].met(widths)
    with pytest.raises(PolicyError, match='^--dmcp.strict: 3: no normalisation .*; keep their widths with --fix$'):
        bare(strict=True)
    with pytest.raises(PolicyError, match="'3' would keep its 16 channels, which its grid does not have: give --fix '3'"):
        bare('macs=0.2x', (4, 8))
    with pytest.raises(BudgetError, match='below the smallest'):
        bare('macs=0.45x')


# -- searches ----------------------------------------------------------------------------------------------------------------


def test_a_search_and_what_may_change_when_it_goes_on(image_folder, tmp_path, capsys, monkeypatch):
    """Another way to answer, from the same chains; not another budget, which they know nothing of."""
    monkeypatch.setattr(target, 'measure_many', partial(target.measure_many, seconds=1e-4, attempts=1))
    run = tmp_path / 'x'
    assert cli.main(command(image_folder, run, '--epochs', '0', '--search-epochs', '2', '--baselines', 'base',
                            '--dmcp.start', '0', policy='dmcp')) == 0
    assert 'dmcp: macs=0.5x: ' in capsys.readouterr().out
    spec = timm_width.load_spec(run)
    base = timm_width.trace(timm.create_model('test_resnet', num_classes=3), (3, 32, 32))
    assert Budget.parse('macs=0.5x', base).met(spec.widths) and spec.provenance['policy'] == 'dmcp'
    assert spec.provenance['grid']['rule'] == 'dmcp' and spec.provenance['options']['start'] == 0
    checkpoint = (run / 'search' / 'dmcp.pth.tar').read_bytes()
    assert cli.main(['search', '--resume', str(run), '--budget', 'macs=0.4x']) == 2
    assert 'dmcp learned for the budgets there, macs=0.5x, and knows nothing of others' in capsys.readouterr().err
    assert cli.main(['search', '--resume', str(run), '--dmcp.result', 'sampled', '--dmcp.samples', '2']) == 0
    assert ' sampled' in capsys.readouterr().out and (run / 'search' / 'dmcp.pth.tar').read_bytes() == checkpoint


def test_grids_without_a_choice_and_chains_of_others_are_refused():
    with pytest.raises(PolicyError, match='has one width to choose from: give another --grid'):
        DMCP(SPACE, budgets(), {name: (8,) for name in GRID})
    policy = make()
    with pytest.raises(PolicyError, match='of another grid, or of other budgets'):
        policy.load_state_dict(make('macs=0.5x', 'macs=0.3x').state_dict())


def test_defaults_are_those_of_the_paper():
    policy = load('dmcp')
    assert (policy.default_grid, policy.search_epochs, policy.learns_budget) == ('dmcp', 40, True)
    options = policy.Options()
    assert (options.passes, options.start, options.lr, options.lr_min, options.weight, options.samples) == (4, 0.5, 0.5, 0.1, 0.1, 5)
    zero = make(initial='zero')
    assert not zero.chains[0].alpha.any() and make().chains[0].expected(zero.budgets[0].cost).item() == pytest.approx(
        0.975 * zero.budgets[0].limit)


@pytest.mark.parametrize('options, says', [
    ({'passes': 1}, 'dmcp.passes must be at least 2, not 1'),
    ({'samples': 0}, 'dmcp.samples must be at least 1, not 0'),
    ({'start': 1.}, 'dmcp.start must be from 0 to below 1, not 1'),
    ({'uniform': 0.}, 'dmcp.uniform must be above 0, to 1, not 0'),
    ({'uniform': math.nan}, 'not nan'),
    ({'lr': math.inf}, 'dmcp.lr must be at least 0, not inf'),
    ({'weight': -1.}, 'dmcp.weight must be at least 0, not -1'),
    ({'transition': 'tanh'}, "dmcp.transition must be sigmoid or exp, not 'tanh'"),
    ({'initial': 'max'}, "dmcp.initial must be budget or zero, not 'max'"),
    ({'result': 'best'}, "dmcp.result must be expected or sampled, not 'best'"),
])
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(PolicyError, match=says):
        DMCP.Options(**options)
