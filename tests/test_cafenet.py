"""CafeNet: which assignments are compared, which one learns, which width is chosen, and how stages follow one another."""
import copy
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from torch import nn

import timm_width
from timm_width import cli, conformance, start, train
from timm_width.bins import bin_grid
from timm_width.budget import Budget
from timm_width.conformance import PlantedProblem, PolicyConformance, _Net
from timm_width.cost import Macs
from timm_width.factors import Factors, random_widths
from timm_width.grids import make_grid
from timm_width.policies import PolicyError, Score
from timm_width.policies.cafenet import CafeNet
from timm_width.resize import resize
from timm_width.tables import Tables
from timm_width.trace import trace


class Suite(PolicyConformance):
    """The small network of the conformance suite and its training, for CafeNet."""
    __test__ = False
    policy = CafeNet

    def __init__(self, **options):
        self.options = options


def make(budgets=('macs=0.5x',), seed=0, **options):
    suite = Suite(**options)
    return suite.make([Budget.parse(text, suite.space()) for text in budgets], seed)


def as_keys(networks):
    return [{n: w if isinstance(w, int) else tuple(w.tolist()) for n, w in net.items()} for net in networks]


def widths_of(network):
    return {n: w if isinstance(w, int) else len(w) for n, w in network.items()}


# -- candidates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['tied', 'random', 'coordinate'])
@pytest.mark.parametrize('r', range(4))
def test_the_fixed_pattern_is_first_among_candidates_of_the_same_widths(r, kind):
    policy, rng = make(r=r, candidates=kind), np.random.default_rng(0)
    for _ in range(20):
        widths = random_widths(policy.grid, rng)
        networks = policy.candidates(widths, rng)
        assert networks[0] == widths and len(networks) <= policy.count == (1, 3, 10, 35)[r]
        assert all(widths_of(net) == widths for net in networks)
        keys = [json.dumps(net, sort_keys=True) for net in as_keys(networks)]
        assert len(set(keys)) == len(keys) and (r > 0 or len(keys) == 1)
        if kind == 'coordinate':
            assert all(sum(not isinstance(w, int) for w in net.values()) == 1 for net in networks[1:])


def test_tied_candidates_take_the_same_assignment_everywhere():
    """Bins of four channels; c = 3 of 4, 2 of 8 and 6 of 6 bins, at r = 1."""
    policy = make(r=1)
    stem, inner, *last = policy.grid
    widths = {stem: 12, inner: 8, **{name: policy.largest[name] for name in last}}
    fixed, second, third = as_keys(policy.candidates(widths, np.random.default_rng(0)))
    assert second[stem] == (*range(8), *range(12, 16)) and second[inner] == (*range(4), *range(8, 12))
    assert third[stem] == (*range(4), *range(8, 16)) and third[inner] == tuple(range(4, 12))
    assert all(net[name] == widths[name] for net in (fixed, second, third) for name in last)


def test_groups_whose_channels_have_an_order_keep_to_it():
    space = trace(timm.create_model('eca_resnet33ts'), (3, 64, 64))
    ordered = [name for name, g in space.searchable.items() if g.ordered]
    assert ordered and len(ordered) < len(space.searchable)
    grid = {name: tuple(g.size * i // 4 for i in range(1, 5)) for name, g in space.searchable.items()}
    policy = CafeNet(space, [Budget.parse('macs=0.5x', space)], grid, CafeNet.Options(r=2, candidates='random'))
    for network in policy.candidates({name: w[1] for name, w in grid.items()}, np.random.default_rng(0)):
        assert all(isinstance(network[name], int) for name in ordered)


# -- training --------------------------------------------------------------------------------------------------------------


def trained(**options):
    suite = Suite(**options)
    policy = suite.make([Budget.parse('macs=0.5x', suite.space())])
    losses, run = [], suite.training(policy)
    network = run.run(after_epoch=lambda training, loss, lr: losses.append(loss))
    return network, losses


def same(a, b):
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


def test_r_0_is_the_plain_supernet_under_the_same_seed():
    """The same widths, the same losses, the same weights and statistics, bit for bit."""
    class Plain(CafeNet):
        def train_step(self, step):
            step.backward(step.loss(step.forward(random_widths(self.grid, step.rng))))

    class PlainSuite(Suite):
        policy = Plain

    suite = PlainSuite()
    policy = suite.make([Budget.parse('macs=0.5x', suite.space())])
    expected = []
    plain = suite.training(policy).run(after_epoch=lambda training, loss, lr: expected.append(loss))
    network, losses = trained(r=0)
    assert losses == expected and same(network, plain)
    assert not same(trained(r=1)[0], plain)


@pytest.mark.parametrize('r', [1, 2])
def test_the_winners_forward_pass_need_not_run_twice(r):
    """Holding it gives what running it again gives, bit for bit: losses, weights and running statistics."""
    held, again = trained(r=r, reuse=True), trained(r=r, reuse=False)
    assert held[1] == again[1] and same(held[0], again[0])


@pytest.mark.parametrize('reuse', [True, False])
def test_candidates_draw_the_same_dropout(reuse):
    """Where all candidates are the same network, all losses are the same: none wins by its luck."""
    class Same(CafeNet):
        def candidates(self, widths, rng):
            return 3 * super().candidates(widths, rng)[:1]

    policy = Same(Suite.space(), make().budgets, make().grid, CafeNet.Options(r=1, reuse=reuse), 0)
    torch.manual_seed(0)
    model = _Net()
    model.head = nn.Sequential(nn.Dropout(0.5), model.head)
    network = policy.prepare(model, trace(model, (3, 16, 16))).train()
    losses = []

    class Noted(Watched):
        def loss(self, logits):
            losses.append(super().loss(logits))
            return losses[-1]

    policy.train_step(Noted(network, *Suite.images()[0]))
    assert len(losses) == 3 + (not reuse) and len({loss.item() for loss in losses}) == 1


def test_reuse_is_running_again_with_dropout_too(monkeypatch):
    layer = conformance._layer
    monkeypatch.setattr(conformance, '_layer', lambda *args, **kwargs: nn.Sequential(*layer(*args, **kwargs), nn.Dropout(0.3)))
    held, again = trained(r=1, reuse=True), trained(r=1, reuse=False)
    assert held[1] == again[1] and same(held[0], again[0])


class Watched:
    """A step that tells which networks ran, with and without gradients, and learned."""

    def __init__(self, network, x, y, progress=0., seed=0):
        self.network, self.images, self.targets, self.progress = network, x, y, progress
        self.rng = np.random.default_rng(seed)
        self.ran, self.learned = [], None

    def forward(self, widths, **kwargs):
        self.ran.append((as_keys([widths])[0], torch.is_grad_enabled()))
        return self.network(self.images, widths, **kwargs)

    def loss(self, logits):
        return torch.nn.functional.cross_entropy(logits, self.targets)

    def gather(self, tensor):
        return tensor

    def backward(self, loss):
        self.learned = loss.item()
        loss.backward()


def watched(progress=0., seed=0, **options):
    policy = make(**options)
    x, y = Suite.images()[0]
    torch.manual_seed(0)
    model = _Net()
    network = policy.prepare(model, trace(model, (3, 16, 16))).train()
    step = Watched(network, x, y, progress, seed)
    policy.train_step(step)
    return policy, network, step


@pytest.mark.parametrize('reuse', [True, False])
def test_min_min(reuse):
    """Eq. 12: the candidate with the least loss learns, and only its running statistics move, once."""
    learned = set()
    for seed in range(6):
        policy, network, step = watched(seed=seed, r=1, reuse=reuse)
        _, fresh, _ = watched(seed=seed, r=1, reuse=reuse, explore=1.)  # for a network of the same initial weights
        fresh = policy.prepare(fresh.model, fresh.space)
        torch.manual_seed(0)
        fresh.load_state_dict({f'model.{k}': v for k, v in _Net().state_dict().items()})
        rng = np.random.default_rng(seed)
        candidates = policy.candidates(random_widths(policy.grid, rng), rng)
        fresh.train()
        with torch.no_grad():
            losses = [step.loss(fresh(step.images, c)).item() for c in candidates]
        best = int(np.argmin(losses))
        learned.add(best)
        assert step.learned == pytest.approx(losses[best]) and len(step.ran) == len(candidates) + (not reuse)
        assert [ran for ran, _ in step.ran[:len(candidates)]] == as_keys(candidates)
        fresh(step.images, candidates[best])
        for name, b in fresh.named_buffers():
            assert torch.equal(b, dict(network.named_buffers())[name]), name
    assert len(learned) > 1  # or the test would pass where the first one always learns


@pytest.mark.parametrize('reuse', [True, False])
def test_all_processes_let_the_same_candidate_learn(reuse):
    """That of the least mean loss, also where another has the least loss here."""
    class Gathered(Watched):
        losses: list

        def gather(self, tensor):
            self.losses.append(float(tensor))
            return torch.cat([tensor, torch.tensor([1000. - 100 * len(self.losses)])])

    reversed_ = set()
    for seed in range(6):
        policy, model = make(r=1, reuse=reuse), _Net()
        step = Gathered(policy.prepare(model, trace(model, (3, 16, 16))).train(), *Suite.images()[0], seed=seed)
        step.losses = []
        policy.train_step(step)
        assert len(step.losses) > 1 and step.learned == pytest.approx(step.losses[-1])
        reversed_.add(int(np.argmin(step.losses)) < len(step.losses) - 1)
    assert True in reversed_  # by the losses here, others would have won


def test_lambda_says_for_how_long_a_random_assignment_learns():
    """Before lambda, one forward pass; of the candidates, each at some time. From it on, all of them."""
    ran = {json.dumps(watched(0.39, seed, r=1, explore=0.4)[2].ran[0][0], sort_keys=True) for seed in range(8)}
    assert len(ran) > 1 and len(watched(0.39, r=1, explore=0.4)[2].ran) == 1
    assert len(watched(0.4, r=1, explore=0.4)[2].ran) == 3


# -- search ----------------------------------------------------------------------------------------------------------------


class Local:
    """A planted problem in which assignments differ: a network scores by the worth of its channels, at random."""

    def __init__(self, grid, seed):
        rng = np.random.default_rng(seed)
        self.worth = {name: rng.random(w[-1]) for name, w in grid.items()}
        self.asked = []

    def __call__(self, widths, skips=(), batches=None, statistics='batch'):
        self.asked.append((json.dumps(as_keys([widths])[0], sort_keys=True), batches, statistics))
        total = sum(self.worth[n][:w].sum() if isinstance(w, int) else self.worth[n][w].sum() for n, w in widths.items())
        return Score(float(total), 0.)


@pytest.mark.parametrize('r', [0, 1, 2])
@pytest.mark.parametrize('search, options', [('evolutionary', {'population': 20, 'iterations': 12}), ('random', {'samples': 400})])
def test_max_max_finds_what_enumeration_finds(r, search, options):
    """Eq. 13, on three groups of four widths: the best over all widths and their assignments, and the assignment itself."""
    space = Suite.space()
    budget = Budget.parse('macs=0.5x', space)
    grid = {name: tuple(g.size * i // 4 for i in range(1, 5)) for name, g in space.searchable.items()}
    for seed in range(2):
        policy = CafeNet(space, [budget], grid, CafeNet.Options(r=r, search=search, least=0.5, **options), seed)
        problem, best = Local(grid, seed), (-1.,)
        for levels in itertools.product(*grid.values()):
            widths = dict(zip(grid, levels))
            if budget.met(widths):
                for network in policy.candidates(widths, np.random.default_rng(0)):
                    best = max(best, (problem(network).top1, widths, as_keys([network])[0]), key=lambda entry: entry[0])
        [choice] = policy.choose(problem)
        assert choice.widths == best[1]
        assert {**choice.widths, **choice.channels} == best[2]


def test_evolution_scores_new_networks_that_fill_the_budget():
    policy = make(r=0, population=10, iterations=5)
    problem = Local(policy.grid, 0)
    policy.choose(problem)
    asked = [json.loads(key) for key, *_ in problem.asked]
    [budget] = policy.budgets
    assert len(asked) == 50 == policy.evaluations and len({json.dumps(a) for a in asked}) == 50
    assert all(0.8 * budget.limit <= budget.cost(a) <= budget.limit for a in asked)


def test_how_networks_are_scored():
    policy = make(r=0, search='random', samples=3, batches=2, statistics='running')
    problem = Local(policy.grid, 0)
    policy.choose(problem)
    assert [asked[1:] for asked in problem.asked] == [(2, 'running')] * 3


def test_a_budget_that_no_network_fills_is_answered_with_the_one_that_does_best():
    space = Suite.space()
    grid = {name: (g.size // 4, g.size) for name, g in space.searchable.items()}
    limit = int(Macs(space)({n: w[0] for n, w in grid.items()}) * 1.01)
    policy = CafeNet(space, [Budget(Macs(space), limit, 'few')], grid, CafeNet.Options(least=1.))
    assert policy.choose(PlantedProblem(grid))[0].widths == {n: w[0] for n, w in grid.items()}


def test_several_budgets_from_one_network_and_each_as_if_alone():
    texts = ('macs=0.6x', 'macs=0.3x')
    problem = PlantedProblem(make().grid)
    together = make(texts, population=10, iterations=4).choose(problem)
    assert together == [make([text], population=10, iterations=4).choose(problem)[0] for text in texts]


# -- stages ----------------------------------------------------------------------------------------------------------------


def staged(text='macs=0.4x', beta=4., **options):
    space = Suite.space()
    grid = bin_grid(space, space.base_widths, beta)
    options = CafeNet.Options(**{'beta': beta, 'population': 8, 'iterations': 3, 'r': 0, **options})
    return CafeNet(space, [Budget.parse(text, space)], grid, options)


@pytest.mark.parametrize('alpha', [1.5, 2., 4.])
def test_stages_shrink_budgets_linearly_and_bins_by_alpha(alpha):
    """Eq. 10; the widths that a stage finds are the largest of the next."""
    policy = staged(stages=3, alpha=alpha)
    whole, [final] = policy.space.macs(), policy.budgets
    for t in (1, 2, 3):
        [goal] = policy.goals
        assert goal.limit == pytest.approx(whole - (whole - final.limit) * t / 3, abs=1)
        [choice] = policy.choose(PlantedProblem(policy.grid))
        assert goal.met(*choice)
        after = policy.following([choice])
        if t == 3:
            assert goal.limit == final.limit and not after
            break
        [after] = after
        assert after.beta == policy.beta / alpha and after.largest == choice.widths
        assert after.grid == bin_grid(policy.space, choice.widths, after.beta, most=policy.bins)
        policy = after


def test_stages_keep_the_least_widths_that_were_asked_for():
    policy = staged('macs=0.6x')
    grid = {name: tuple(w for w in widths if w >= 0.5 * policy.largest[name]) for name, widths in policy.grid.items()}
    policy = CafeNet(policy.space, policy.budgets, grid, CafeNet.Options(stages=2, beta=4.))
    [after] = policy.following([SimpleNamespace(widths=policy.largest)])
    assert all(after.grid[name][0] >= widths[0] for name, widths in grid.items() if len(widths) > 1)


def test_stages_refuse_a_grid_of_other_bins():
    with pytest.raises(PolicyError, match='--grid flops:4'):
        CafeNet(Suite.space(), staged().budgets, Suite.grid(Suite.space()), CafeNet.Options(stages=2, beta=4.))


def test_beta_and_alpha_are_refused_where_they_would_say_nothing():
    with pytest.raises(PolicyError, match='--grid flops:0.5'):
        make(beta=0.5)
    assert staged(stages=1, beta=2.).bins
    with pytest.raises(PolicyError, match='alpha 3 is for several stages'):
        CafeNet.Options(alpha=3.)


@pytest.mark.parametrize('alpha', [1.1, 3.])
@pytest.mark.parametrize('text', ['macs=0.4x', 'macs=0.12x'])
def test_the_smallest_network_of_a_stage_is_no_larger_than_that_of_the_stage_before(text, alpha):
    """So that no budget is lost; bins may not grow either, whatever alpha and what was found."""
    space, grid = Suite.space(), staged().grid
    for least in 0., 0.4:
        rng = np.random.default_rng(0)
        first = {name: tuple(w for w in widths if w >= least * widths[-1]) for name, widths in grid.items()}
        if not Budget.parse(text, space).met({name: w[0] for name, w in first.items()}):
            continue
        for _ in range(20):
            policy = CafeNet(space, [Budget.parse(text, space)], first, CafeNet.Options(stages=4, beta=4., alpha=alpha))
            while policy.stage < 4:
                [after] = policy.following([SimpleNamespace(widths=random_widths(policy.grid, rng))])
                assert all(w <= policy.smallest[name] for name, w in after.smallest.items())
                assert all(w <= policy.bins[name] for name, w in after.bins.items())
                assert after.goals[0].met(after.smallest)
                policy = after


def test_stages_stay_where_a_latency_was_measured():
    """Its model knows nothing of widths below the first bin of the first stage, which the bins of the next would have."""
    space, first = Suite.space(), staged(beta=8.)
    rng = np.random.default_rng(0)
    tables = Factors(first.grid, 1., {name: np.sort(rng.random(len(widths))) for name, widths in first.grid.items()})
    cost = Tables(space, 'ms per image', tables)
    policy = CafeNet(space, [Budget(cost, 0.7 * cost(first.largest), 'latency')], first.grid,
                     CafeNet.Options(stages=3, beta=8., population=8, iterations=2, r=0))
    while policy.stage < 3:
        [choice] = policy.choose(PlantedProblem(policy.grid))
        [after] = policy.following([choice])
        assert all(widths[0] >= first.grid[name][0] for name, widths in after.grid.items())
        policy = after
    [choice] = policy.choose(PlantedProblem(policy.grid))
    assert policy.budgets[0].met(*choice) and any(len(w) > 1 for w in policy.grid.values())


@pytest.mark.parametrize('stages', [1, 2])
def test_what_a_search_goes_on_with_is_of_the_same_grid(stages):
    """In several stages also of the same search, as the next stage trains what it finds; in one stage, any."""
    state = staged(stages=stages).state_dict()
    staged(stages=stages).load_state_dict(state)
    with pytest.raises(PolicyError, match='stage 1 was begun on another grid'):
        staged(stages=stages, beta=2.).load_state_dict(state)
    other = staged(stages=stages, least=0.5, search='greedy')
    if stages == 1:
        return other.load_state_dict(state)
    with pytest.raises(PolicyError, match='cafenet.search evolutionary, cafenet.least 0.8'):
        other.load_state_dict(state)


@pytest.mark.parametrize('given, rule, settled', [
    ({}, '', (None, 'flops')), ({}, 'bins', (None, 'bins')), ({'beta': 4.}, '', (4., 'flops:4')), ({'beta': 0.5}, 'flops:0.5', (0.5, 'flops:0.5')),
    ({'stages': 2}, 'flops:4', (4., 'flops:4')), ({'stages': 2}, '', (1., 'flops')), ({}, 'flops:4', (None, 'flops:4'))])
def test_the_size_of_bins_need_be_said_once(given, rule, settled):
    options, found = CafeNet.settle(CafeNet.Options(**given), rule)
    assert (options.beta, found) == settled
    space = Suite.space()
    CafeNet(space, staged().budgets, make_grid(space, found), options)


@pytest.mark.parametrize('given, rule, says', [
    ({'beta': 4.}, 'flops:2', '--grid flops:2 says that the least bin has 2 channels, and cafenet.beta 4: give one'),
    ({'beta': 4.}, 'bins', 'cafenet.beta 4 is for bins of about the same MACs, .* --grid is bins'),
    ({'stages': 3}, '0.5,1', 'cafenet.stages 3 is for')])
def test_bins_that_contradict_one_another_are_refused_by_what_was_given(given, rule, says):
    with pytest.raises(PolicyError, match=says):
        CafeNet.settle(CafeNet.Options(**given), rule)


@pytest.mark.parametrize('beta, says', [(0.001, True), (4., False)])
def test_stages_whose_bins_cannot_be_split_are_told(beta, says):
    policy = staged(beta=beta, stages=2)
    policy.prepare(_Net(), policy.space)
    assert any('of stage 1 are of one channel' in note for note in policy.notes) == says


@pytest.mark.parametrize('r', [0, 1])
@pytest.mark.parametrize('options', [
    {'search': 'greedy'}, {'search': 'random', 'samples': 10 ** 6, 'least': 0.}, {'population': 10, 'iterations': 3},
    {'population': 100, 'iterations': 100, 'least': 0.95}])
def test_no_search_takes_more_scores_than_it_says(r, options):
    """And random ones say no more than there are networks."""
    space = Suite.space()
    grid = {name: (g.size // 4, g.size // 2, g.size) for name, g in space.searchable.items()}
    least = Macs(space)({name: w[0] for name, w in grid.items()})
    for limit in least, int(0.5 * space.macs()):
        policy = CafeNet(space, [Budget(Macs(space), limit, 'it')], grid, CafeNet.Options(r=r, **options))
        problem = Local(grid, 0)
        policy.choose(problem)
        assert 0 < len(problem.asked) <= policy.evaluations <= policy.count * 3 ** len(grid)


def test_a_space_of_more_networks_than_a_float_holds_is_told():
    policy = make()
    policy.grid = {f'{i}': range(10) for i in range(400)}
    model = _Net()
    policy.prepare(model, trace(model, (3, 16, 16)))
    assert '10^400.0 networks' in policy.notes[-1]


def test_one_stage_is_followed_by_none():
    policy = make()
    assert policy.following([None]) == [] and policy.goals == policy.budgets


@pytest.mark.parametrize('options, says', [
    ({'r': 4}, 'cafenet.r'), ({'candidates': 'all'}, 'tied, random, coordinate'), ({'search': 'best'}, 'evolutionary, random, greedy'),
    ({'population': 1}, 'population must be at least 2'), ({'explore': 1.5}, 'from 0 to 1'), ({'beta': 0.}, 'above 0'),
    ({'stages': 2, 'alpha': 1.}, 'alpha must be above 1, not 1: bins become smaller'), ({'stages': 2, 'alpha': 0.5}, 'above 1'),
    ({'stages': 0}, 'stages'), ({'statistics': 'mean'}, 'recalibrated')])
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(PolicyError, match=says):
        CafeNet.Options(**options)


# -- from the command line -------------------------------------------------------------------------------------------------


MODEL = 'test_resnet'
SHORT = ['--dataset', 'digits', '--search-epochs', '1', '--epochs', '0', '--device', 'cpu', '-j', '0', '--proxy', 'data=0.1,resolution=16', '--model', MODEL,
         '--cafenet.population', '2', '--cafenet.iterations', '2', '--cafenet.batches', '1', '--baselines', 'base']


def test_the_channels_that_won_are_inherited(tmp_path):
    """The network that train cuts is the shared one at these channels."""
    out = tmp_path / 'x'
    assert cli.main(['search', '--policy', 'cafenet', *SHORT, '--budget', 'macs=0.5x', '--cafenet.r', '2', '--cafenet.candidates', 'random',
                     '--output', str(out)]) == 0
    spec = timm_width.load_spec(out)
    said = spec.provenance['channels']
    kept = said['kept']
    checkpoint = out / said['file']
    state = torch.load(checkpoint, weights_only=True)['network']
    model = timm.create_model(MODEL, num_classes=10)
    network = timm_width.Supernet(model, timm_width.trace(model, (3, 32, 32)))
    network.load_state_dict(state)
    args, _ = train.parse(['--dataset', 'digits', '--model', MODEL, '--widths', str(out), '--inherit', str(checkpoint), '--num-classes', '10'])
    found = start.build_model(args, 10)
    start.load_start(found, args)
    x = torch.randn(2, 3, 32, 32)
    widths = {**dict(spec.widths), **kept}
    assert kept and torch.equal(found.eval()(x), network.eval()(x, widths))
    assert not torch.equal(found(x), network(x, dict(spec.widths)))
    config = json.loads((out / 'config.json').read_text())
    for wrong in ({next(iter(kept)): [3, 2]}, [1], {'nothing': [1]}, {next(iter(kept)): 'x'}, {next(iter(kept)): [[1], [2, 3]]}):
        config['timm_width']['channels'] = {**said, 'kept': wrong}
        (out / 'config.json').write_text(json.dumps(config))
        with pytest.raises(start.UsageError, match=f"^'channels' in the config of --widths {out}: "):
            start.load_start(start.build_model(args, 10), args)


def test_channels_are_those_of_one_shared_network_alone(tmp_path):
    """Of the last stage, and of averaged weights; neither another stage nor a baseline nor another seed may stand in for it."""
    def run(name, *flags):
        assert cli.main(['search', *SHORT, '--budget', 'macs=0.5x', '--output', str(tmp_path / name), '--model-ema', *flags]) == 0

    cafenet = ['--policy', 'cafenet', '--cafenet.beta', '2', '--cafenet.stages', '2', '--cafenet.r', '2',
               '--cafenet.candidates', 'random']
    run('x', *cafenet, '--baselines', 'base', 'autoslim')
    run('other', *cafenet[:2], '--seed', '5')
    spec = timm_width.load_spec(tmp_path / 'x')
    said = spec.provenance['channels']
    assert said['file'] == 'search/cafenet.macs-0.5x.2.pth.tar' and said['kept']
    flags = ['--dataset', 'digits', '--model', MODEL, '--widths', str(tmp_path / 'x'), '--num-classes', '10']
    args, _ = train.parse([*flags, '--inherit', str(tmp_path / 'x' / said['file'])])
    start.load_start(start.build_model(args, 10), args)
    for wrong in ('x/search/cafenet.pth.tar', 'x/search/autoslim.pth.tar', 'other/search/cafenet.pth.tar'):
        assert (tmp_path / wrong).is_file()
        args, _ = train.parse([*flags, '--inherit', str(tmp_path / wrong)])
        with pytest.raises(start.UsageError, match=f"is not the shared network .* give {said['file']}"):
            start.load_start(start.build_model(args, 10), args)
    args, _ = train.parse([*flags, '--inherit', str(tmp_path / wrong), '--importance', 'l2'])
    start.load_start(start.build_model(args, 10), args)
    grid = {name: tuple(widths) for name, widths in spec.provenance['grid'].items() if name != 'rule'}
    assert all(spec.widths.get(name, widths[-1]) in widths for name, widths in grid.items())  # the last stage's


def test_what_is_inherited_is_told_and_of_this_search(tmp_path, capsys):
    """First channels, too: of another search's network they are not the ones that were scored."""
    for name, more in ('x', []), ('y', ['--seed', '5']):
        assert cli.main(['search', '--policy', 'cafenet', *SHORT, '--cafenet.r', '0', '--budget', 'macs=0.5x', '--output', str(tmp_path / name),
                         *more]) == 0
    assert timm_width.load_spec(tmp_path / 'x').provenance['channels']['kept'] == {}
    flags = ['--dataset', 'digits', '--model', MODEL, '--widths', str(tmp_path / 'x'), '--num-classes', '10', '--inherit']
    for name, notes in ('x', False), ('y', True):
        args, _ = train.parse([*flags, str(tmp_path / name / 'search' / 'cafenet.pth.tar')])
        capsys.readouterr()
        start.load_start(start.build_model(args, 10), args)
        out = capsys.readouterr().out
        assert '--inherit: the first channels, of the network that a search shared' in out
        assert ('is not the shared network that these widths were found on: that is search/cafenet.pth.tar' in out) == notes


def test_a_search_in_stages_resumes_to_the_same_answer(tmp_path, capsys):
    flags = ['search', '--policy', 'cafenet', *SHORT, '--budget', 'macs=0.5x', 'macs=0.3x', '--grid', 'flops:2',
             '--cafenet.stages', '2', '--supernet-macs', '1.2', '--output', str(tmp_path / 'x')]
    assert cli.main(flags) == 0
    args = yaml.safe_load((tmp_path / 'x' / 'args.yaml').read_text())
    assert args['supernet_macs'] == 1.2 and args.get('width_max') is None
    assert 'x the base MACs' in capsys.readouterr().out
    names = {f.name for f in (tmp_path / 'x' / 'search').iterdir()}
    labels = 'cafenet', 'cafenet.macs-0.5x.2', 'cafenet.macs-0.3x.2'
    assert {f'{label}.{end}' for label in labels for end in ('pth.tar', 'scores.jsonl')} <= names
    found = [timm_width.load_spec(tmp_path / 'x' / f'macs-{s}x').widths for s in (0.5, 0.3)]
    scores = {label: (tmp_path / 'x' / 'search' / f'{label}.scores.jsonl').read_text().splitlines() for label in labels}
    (tmp_path / 'x' / 'search' / 'cafenet.scores.jsonl').write_text('\n'.join(scores['cafenet'][:3]) + '\n')  # killed there
    assert cli.main(['search', '--resume', str(tmp_path / 'x')]) == 0
    assert found == [timm_width.load_spec(tmp_path / 'x' / f'macs-{s}x').widths for s in (0.5, 0.3)]
    for label, lines in scores.items():
        assert (tmp_path / 'x' / 'search' / f'{label}.scores.jsonl').read_text().splitlines() == lines
    macs = [timm_width.load_spec(tmp_path / 'x' / f'macs-{s}x').provenance['costs']['macs'] for s in (0.5, 0.3)]
    space = timm_width.trace(timm.create_model(MODEL, num_classes=10), (3, 32, 32))
    assert macs[0] <= 0.5 * space.macs() and macs[1] <= 0.3 * space.macs()


def test_another_search_goes_on_from_the_same_training(tmp_path, capsys):
    """Of several stages it may not: what it finds is trained next."""
    run = ['search', '--policy', 'cafenet', *SHORT, '--budget', 'macs=0.5x', '--output']
    assert cli.main([*run, str(tmp_path / 'x')]) == 0
    written = (tmp_path / 'x' / 'search' / 'cafenet.pth.tar').stat().st_mtime_ns
    assert cli.main(['search', '--resume', str(tmp_path / 'x'), '--cafenet.search', 'random', '--cafenet.samples', '3']) == 0
    assert (tmp_path / 'x' / 'search' / 'cafenet.pth.tar').stat().st_mtime_ns == written
    assert timm_width.load_spec(tmp_path / 'x').provenance['options']['search'] == 'random'
    assert cli.main([*run, str(tmp_path / 'y'), '--cafenet.stages', '2', '--grid', 'flops:1']) == 0
    capsys.readouterr()
    before = {f: f.read_bytes() for f in (tmp_path / 'y').rglob('*') if f.is_file()}
    assert cli.main(['search', '--resume', str(tmp_path / 'y'), '--cafenet.samples', '3', '--cafenet.search', 'random']) == 2
    assert 'begun with cafenet.search evolutionary, cafenet.samples 2000' in capsys.readouterr().err
    assert before == {f: f.read_bytes() for f in (tmp_path / 'y').rglob('*') if f.is_file()}


def test_resize_is_what_holds_the_channels():
    """`resize(keep=...)` and `Supernet` mean the same by an assignment."""
    policy = make(r=1)
    torch.manual_seed(0)
    model = _Net().eval()
    space = trace(model, (3, 16, 16))
    network = timm_width.Supernet(model, space).eval()
    x = torch.randn(2, 3, 16, 16)
    widths = {name: levels[2] for name, levels in policy.grid.items()}
    for candidate in policy.candidates(widths, np.random.default_rng(0)):
        keep = {n: w for n, w in candidate.items() if not isinstance(w, int)}
        assert torch.equal(network(x, candidate), resize(copy.deepcopy(model), space, widths, keep=keep)(x))
