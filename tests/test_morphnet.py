"""MorphNet: the penalty against its published forms and finite differences, what dies, what grows, and how rounds follow."""
import copy
from functools import cache, partial

import numpy as np
import pytest
import timm
import torch
from torch import nn

import timm_width
from timm_width import cli, target
from timm_width.budget import Budget, BudgetError
from timm_width.conformance import PolicyConformance, _layer, _Net, _Table
from timm_width.cost import Macs, Params
from timm_width.engine import Training
from timm_width.factors import Factors, random_widths
from timm_width.grids import make_grid
from timm_width.policies import Choice, PolicyError
from timm_width.policies.morphnet import MorphNet, dead_blocks
from timm_width.resize import resize
from timm_width.supernet import Supernet
from timm_width.tables import Tables
from timm_width.trace import trace

TestSuite = type('TestSuite', (PolicyConformance,), {'policy': MorphNet, 'regret': None, '__doc__': 'It asks for no scores.'})
TestSuiteOfAStrongPenalty = type('TestSuiteOfAStrongPenalty', (PolicyConformance,), {
    'policy': MorphNet, 'regret': None, 'options': {'strength': 300., 'threshold': 0.3, 'grouping': 'l2'}, 'epochs': 4})


class Mixed(nn.Module):
    """A residual sum, a depthwise convolution, a layer from a group to itself, and a concatenation."""

    def __init__(self):
        super().__init__()
        self.stem, self.inside = _layer(3, 6, 3), _layer(6, 6, 3)
        self.expand, self.depthwise = _layer(6, 8, 1), _layer(8, 8, 3, groups=8)
        self.project = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.left, self.right = _layer(6, 4, 3), _layer(6, 5, 1, stride=1)
        self.join = _layer(9, 7, 1)
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.inside(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(self.join(torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3)))


@cache
def spaces(name):
    size = (3, 16, 16) if name == 'mixed' else (3, 64, 64)
    model = Mixed() if name == 'mixed' else timm.create_model(name)
    return model, trace(model, size)


def prepared(name='mixed', costs=(Macs,), seed=0, **options):
    """A policy whose network, in float64, has random scales: some dead, none near the threshold, no two alike."""
    model, space = copy.deepcopy(spaces(name)[0]).double(), spaces(name)[1]
    rng = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            signs = torch.where(torch.rand(len(m.weight), generator=rng) < 0.5, -1., 1.)
            drawn = signs * (torch.rand(len(m.weight), generator=rng, dtype=torch.float64) + 0.05)
            m.weight.data = torch.where(torch.rand(len(m.weight), generator=rng) < 0.4, drawn / 1000, drawn)
    budgets = [Budget(c, 0.5 * c(), 'half') for c in (cost(space) for cost in costs)]
    policy = MorphNet(space, budgets, make_grid(space, 'all'), MorphNet.Options(**options))
    policy.prepare(model, space)
    return policy, model, space


def test_a_toy_of_two_layers_by_hand():
    """3x3 convolutions of 3 to 4 to 5 channels and a classifier of 2, on 8x8 images; 3 and 2 channels are alive."""
    model = nn.Sequential(_layer(3, 4, 3), _layer(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))
    first, second = [0.5, -0.25, 0.005, 1.], [0.75, 0., -0.5, 0.01, 0.001]
    model[0][1].weight.data, model[1][1].weight.data = torch.tensor(first), torch.tensor(second)
    space = trace(model, (3, 8, 8))
    macs = 8 * 8 * 9 * (3 * 4 + 4 * 5) + 5 * 2
    assert Macs(space)() == macs
    policy = MorphNet(space, [Budget.parse('macs=0.5x', space)], make_grid(space, 'all'), MorphNet.Options(strength=3.))
    policy.prepare(model, space)
    assert list(policy.alive().values()) == [3, 2]  # one that is at the threshold is not
    g1, g2 = sum(map(abs, first)), sum(map(abs, second))
    by_hand = 576 * (3 * g1) + 576 * (3 * g2 + 2 * g1) + 2 * g2
    assert float(policy.penalty().detach()) == pytest.approx(3 * by_hand / macs, rel=1e-6)


@pytest.mark.parametrize('name', ['mixed', 'test_resnet', 'mobilenetv2_035', 'densenet121', 'resnext26ts'])
def test_the_derivative_is_the_published_sum_over_convolutions(name):
    """C (A_in sum|out| + A_out sum|in|) for each; of depthwise ones the mean of the two sums; the image has three channels."""
    policy, model, space = prepared(name)
    values, alive = {}, {}
    for group in space.searchable:
        members = {n: (model.get_submodule(n), space.tensors[f'{n}.weight'].axes[0]) for n in Supernet(model, space).norms.get(group, ())}
        found = []
        for norm, axis in members.values():
            at = 0
            for g, repeat in axis:
                n = space.groups[g].steps * repeat
                if space.groups[g].name == group:
                    found.append(norm.weight.detach().abs()[at:at + n].reshape(-1, repeat).amax(1))
                at += n
        values[group] = float(torch.stack(found).amax(0).sum()) if found else 0.
        alive[group] = int((torch.stack(found).amax(0) > 0.01).sum()) if found else space[group].steps
    assert policy.alive() == {g: alive[g] for g in policy.grid} and sum(alive.values()) < 0.99 * sum(g.steps for g in space.searchable.values())

    def sums(axis):
        """Channels alive of an axis, and the sum of its scales."""
        if isinstance(axis, int):
            return axis, 0.
        of = [(space.groups[g], r) for g, r in axis]
        return (sum(max(alive[g.name], 1) * r if g.frozen is None else g.steps * r for g, r in of),
                sum(values.get(g.name, 0) * r for g, r in of))

    total = kinds = 0
    for site in space.sites:
        if len(site.factors) == 1:  # depthwise, or of whole groups: in and out are one group
            kinds += 1
        lengths, scales = zip(*map(sums, site.factors))
        total += site.positions * sum(s * np.prod(lengths[:i] + lengths[i + 1:]) for i, s in enumerate(scales))
    assert kinds or name in ('test_resnet', 'densenet121', 'resnext26ts')
    assert float(policy.penalty().detach()) == pytest.approx(float(total) / Macs(space)(), rel=1e-9)


def test_a_depthwise_convolution_counts_the_tied_scales_once():
    """coef sum|gamma|, with gamma the largest of the normalisations before and behind it: half of (in + out) of the authors."""
    policy, model, space = prepared()
    site = next(s for s in space.sites if s.name == 'depthwise.0')
    [[(g, _)]] = [f for f in site.factors if not isinstance(f, int)]
    assert space.groups[g].name == 'expand.0' and site.positions == 16 * 16 * 9
    tied = torch.maximum(model.expand[1].weight.abs(), model.depthwise[1].weight.abs())
    counts = tuple(policy.alive()[name] for name in policy.scales.groups)
    at = policy.scales.groups.index('expand.0')
    one_by_one = 2 * 16 * 16 * policy.alive()['stem.0']  # expand and project, 6 to 8 and back
    assert float(policy.slopes(counts)[at]) * Macs(space)() == pytest.approx(site.positions + one_by_one)
    values, _ = policy.scales.read('max', 0.01)
    assert torch.equal(values[policy.scales.owners == at], tied)


def test_of_tied_layers_the_largest_scale_counts():
    """Residual sums; l2 is the alternative, with the same channels alive."""
    policy, model, space = prepared()
    norms = torch.stack([m.weight for m in (model.stem[1], model.inside[1], model.project[1])])
    at = policy.scales.groups.index('stem.0')
    largest, counts = policy.scales.read('max', 0.01)
    squares, same = policy.scales.read('l2', 0.01)
    mine = policy.scales.owners == at
    assert torch.equal(largest[mine], norms.abs().amax(0)) and torch.allclose(squares[mine], norms.square().sum(0).sqrt())
    assert counts == same and counts[at] == int((norms.abs() > 0.01).any(0).sum())
    for m in (model.stem[1], model.inside[1], model.project[1]):
        m.weight.data[:] = 0
    for grouping in 'max', 'l2':
        values, counts = policy.scales.read(grouping, 0.01)
        [*grads] = torch.autograd.grad(values.sum(), [model.stem[1].weight])
        assert counts[at] == 0 and torch.isfinite(grads[0]).all()


@pytest.mark.parametrize('name, apart', [('regnetx_002', False), ('resnext26ts', True)])
def test_a_step_of_several_channels_is_worth_its_best(name, apart):
    """They are neighbours where the size of the convolution's groups is kept, and far apart where their number is."""
    policy, model, space = prepared(name)
    name = next(n for n in policy.scales.groups if space[n].unit > 1)
    values, _ = policy.scales.read('max', 0.01)
    mine = values[policy.scales.owners == policy.scales.groups.index(name)]
    norms = [model.get_submodule(n).weight.abs() for n in Supernet(model, space).norms[name]]
    norms = [n.reshape(-1, space[name].steps).T if apart else n.reshape(space[name].steps, -1) for n in norms]
    assert torch.equal(mine, torch.cat(norms, 1).amax(1)) and len(mine) == space[name].size // space[name].unit


def tables(space):
    """Measured at 1, half and all of every width: latencies that are no polynomial."""
    grid = {name: (1, g.size // 2, g.size) for name, g in space.searchable.items()}
    names, rng = list(grid), np.random.default_rng(0)
    rising = np.cumsum(rng.random((len(names), 3)), 1)
    pairs = {(a, b): np.multiply.outer(rising[i] ** 1.5, rising[i + 1]) for i, (a, b) in enumerate(zip(names, names[1:]))}
    return Tables(space, 'ms', Factors(grid, 1., dict(zip(names, rising)), pairs))


@pytest.mark.parametrize('costs', [(Macs,), (Params,), (_Table,), (tables,), (Macs, tables)], ids=lambda costs: '+'.join(c.__name__ for c in costs))
@pytest.mark.parametrize('grouping', ['max', 'l2'])
def test_the_gradient_is_that_of_finite_differences(grouping, costs):
    """Alive counts held, as they are in a small neighbourhood; on a residual, a depthwise layer and a concatenation."""
    for seed in range(2):
        policy, model, space = prepared(costs=costs, seed=seed, grouping=grouping)
        if tables in costs:
            policy.grid = {name: tuple(range(1, g.size + 1)) for name, g in space.searchable.items()}
        weights = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        grads = torch.autograd.grad(policy.penalty(), weights)
        assert sum(int((g != 0).sum()) for g in grads) > 20
        rng = np.random.default_rng(seed)
        for w, grad in zip(weights, grads):
            for i in rng.permutation(len(w))[:3]:
                at, ends = w.data[i].item(), []
                for offset in (1e-6, -1e-6):
                    w.data[i] = at + offset
                    ends.append(float(policy.penalty().detach()))
                w.data[i] = at
                assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(grad[i]), rel=1e-4, abs=1e-8)


def test_of_a_measured_cost_the_slope_is_the_difference_to_the_next_smaller_width():
    policy, model, space = prepared(costs=(tables,))
    policy.grid = {name: tuple(range(1, g.size + 1)) for name, g in space.searchable.items()}
    cost = policy.budgets[0].cost
    slopes = policy.slopes(policy.scales.sizes)
    for name, slope in zip(policy.scales.groups, slopes.tolist()):
        half = space[name].size // 2
        assert slope * cost() == pytest.approx((cost() - cost({name: half})) / (space[name].size - half))
    dead = policy.slopes((0,) * len(policy.scales.groups))  # nothing was measured below one channel
    assert torch.isfinite(dead).all()


# -- growth ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['mixed', 'test_resnet'])
def test_growth_is_by_the_largest_factor_of_all(name):
    """By brute force over every factor at which a width changes. It may leave some of the budget: widths can change together."""
    space = spaces(name)[1]
    grid, macs = make_grid(space, 'all'), Macs(space)
    rng = np.random.default_rng(0)
    for share in 0.3, 1., 1.5:
        alive = {n: int(rng.integers(0, g.steps + 1)) for n, g in space.searchable.items()}
        budget = Budget(macs, int(share * macs()), 'some')
        policy = MorphNet(space, [budget], grid)
        policy.alive = lambda alive=alive: alive
        [(widths, skips)] = policy.choose(None)
        shape = {n: max(a, 1) * space[n].unit for n, a in alive.items()}

        def at(omega, shape=shape):
            found = {}
            for n, levels in grid.items():
                unit = space[n].unit
                k = -int(-(omega * shape[n] / unit - 0.5) // 1)  # to the nearest, halves down
                found[n] = unit * min(max(k, 1), levels[-1] // unit)
            return found

        changes = {0., *((k + 0.5) * space[n].unit / shape[n] * (1 + 1e-9) for n, levels in grid.items()
                         for k in range(levels[-1] // space[n].unit))}
        assert widths == at(max(omega for omega in changes if budget.met(at(omega), skips))) and budget.met(widths, skips)
        assert share < 1 or any(w > space[n].size for n, w in widths.items())


class Branches(nn.Module):
    """Two equal branches, of which one sees the images and one sees noise."""

    def __init__(self):
        super().__init__()
        self.seeing, self.blind = nn.Sequential(_layer(1, 8, 3), _layer(8, 8, 3)), nn.Sequential(_layer(1, 8, 3), _layer(8, 8, 3))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        both = [self.seeing(x[:, :1]), self.blind(x[:, 1:2])]
        return self.head(torch.cat([b.amax((2, 3)) for b in both], 1))


class Lines(torch.utils.data.Dataset):
    """Batches of horizontal and vertical lines, light and dark, beside noise that is never the same."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError
        y = torch.arange(32) % 4
        x = torch.randn(32, 2, 8, 8)
        x[:, 0] *= 0.3
        for image, c in zip(x[:, 0], y.tolist()):
            (image if c % 2 else image.T)[4] += 4 * (c // 2) - 2
        return x, y


def test_useless_channels_die_and_their_cost_goes_to_the_others():
    """At the cost of the base network: the branch that sees noise all but goes, the other gets wider than it was."""
    torch.manual_seed(0)
    model, batches = Branches(), torch.utils.data.DataLoader(Lines(), batch_size=None)
    space = trace(model, (2, 8, 8))
    policy = MorphNet(space, [Budget.parse('macs=1x', space)], make_grid(space, 'all'), MorphNet.Options(strength=6.))
    arguments = PolicyConformance.arguments()
    arguments.sched = 'none'
    network = Training(policy.prepare(model, space), batches, arguments, 20, train_step=policy.train_step).run()
    right = np.mean([float((network(x).argmax(1) == y).float().mean()) for x, y in batches])
    alive = policy.alive()
    seeing, blind = (sum(n for g, n in alive.items() if g.startswith(side)) for side in ('seeing', 'blind'))
    assert right > 0.9 and seeing >= 4 and blind <= 1, (alive, right)
    [(widths, _)] = policy.choose(None)
    assert sum(w for g, w in widths.items() if g.startswith('seeing')) > 16 > 2 * sum(w for g, w in widths.items() if g.startswith('blind'))
    assert 0.9 * Macs(space)() < Macs(space)(widths) <= Macs(space)()


# -- blocks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['resnet26t', 'mobilenetv2_035', 'efficientnet_b0'])
def test_a_block_of_which_an_inner_group_is_dead_does_nothing(name):
    """Whichever of its inner groups; what ties it to other blocks is not inside. The squeezes of b0 only scale: they are no path."""
    model, space = spaces(name)
    for block in space.blocks:
        inner = [n for n, g in space.searchable.items() if all(t.startswith(f'{block.name}.') for t, _ in g.axes)]
        assert inner
        for group in inner:
            assert dead_blocks(space, [group]) == ([] if '.se.' in group else [block.name]), group
    assert dead_blocks(space, []) == []
    assert dead_blocks(space, [n for n in space.searchable if n not in inner])[-1:] != [space.blocks[-1].name]


class Joined(nn.Module):
    """A block of two paths side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.join = _layer(4, 4, 3), _layer(4, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return x + self.join(torch.cat([self.a(x), self.b(x)], 1))


class Added(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Sequential(_layer(4, 4, 3), nn.Conv2d(4, 4, 1)), nn.Sequential(_layer(4, 4, 1), nn.Conv2d(4, 4, 1))

    def forward(self, x):
        return x + (self.a(x) + self.b(x))


@pytest.mark.parametrize('block', [Joined, Added])
def test_a_block_stays_while_one_of_its_paths_lives(block):
    model = nn.Sequential(_layer(3, 4, 3), block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    space = trace(model, (3, 16, 16))
    assert [b.name for b in space.blocks] == ['1']
    a, b = (next(n for n in space.searchable if n.startswith(f'1.{path}.')) for path in 'ab')
    assert dead_blocks(space, [a]) == dead_blocks(space, [b]) == dead_blocks(space, ['0.0']) == []
    assert dead_blocks(space, [a, b]) == ['1']


class Blocks(_Net):
    """The small network of the conformance suite, whose blocks are modules that add: only these can be left out."""

    class Add(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    def __init__(self, blocks=2):
        super().__init__(blocks)
        self.blocks = nn.Sequential(*(self.Add(*block) for block in self.blocks))

    def forward(self, x):
        return self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))


def test_a_dead_block_is_removed_and_what_it_cost_is_spent():
    """But where the cost knows nothing of networks without blocks, one channel stays."""
    space = trace(Blocks(), (3, 16, 16))
    latency = Tables(space, 'ms', Factors({n: (1, 4 * g.size) for n, g in space.searchable.items()}, 0., {
        n: np.array([0., 1.]) for n in space.searchable}))
    budgets = [Budget.parse('macs=0.5x', space), Budget(latency, 1., 'latency=1ms')]
    policy = MorphNet(space, budgets, make_grid(space, 'all'))
    alive = policy.alive()
    inner = next(n for n in alive if n.startswith('blocks.1.'))
    policy.alive = lambda: {**alive, inner: 0}
    without, whole = policy.choose(None)
    assert without.skips == ('blocks.1',) and whole.skips == () and whole.widths[inner] >= 1
    macs = Macs(space)
    assert macs(*without) <= budgets[0].limit < macs(without.widths)
    assert any('must stay' in note for note in policy.notes)
    smaller = resize(Blocks(), space, *without)
    assert trace(smaller, (3, 16, 16)).macs() == macs(*without)


# -- rounds ----------------------------------------------------------------------------------------------------------------


def test_the_next_round_trains_what_was_found():
    """With its widths, larger than the base's among them; and without the blocks that were removed, which no longer count."""
    space = trace(Blocks(), (3, 16, 16))
    budget = Budget.parse('macs=1x', space)
    policy = MorphNet(space, [budget, Budget.parse('macs=0.5x', space)], make_grid(space, 'all'), MorphNet.Options(rounds=3))
    assert policy.start == space.base_widths
    found = [Choice({n: 2 * g.size for n, g in space.searchable.items()}, ('blocks.1',)),
             Choice({n: g.size // 2 for n, g in space.searchable.items()})]
    after, other = policy.following(found)
    assert (after.start, after.budgets, other.start) == (found[0].widths, (budget,), found[1].widths)
    model = resize(Blocks(), space, after.start)
    network = after.prepare(model, trace(model, (3, 16, 16)))
    model.blocks[1][3].weight.data[:] = 0  # the second block's last: it neither runs nor keeps its group alive
    model.blocks[0][3].weight.data[:5], model.stem[1].weight.data[:5] = 0, 0
    inner = next(n for n in after.start if n.startswith('blocks.1'))
    assert inner not in after.scales.groups and after.alive()[inner] == after.start[inner]
    assert after.alive()['stem.0'] == after.start['stem.0'] - 5
    x = torch.randn(2, 3, 16, 16)
    assert after.state_dict()['costs'] == {'MACs': Macs(space)(*found[0])}
    after.penalty().backward()
    assert model.blocks[1][3].weight.grad is None and model.blocks[0][3].weight.grad is not None
    assert torch.equal(network(x, skips=after.begin.skips), Supernet(model, network.space)(x, skips=('blocks.1',)))
    [answer] = after.choose(None)
    assert answer.skips == ('blocks.1',) and budget.met(*answer)
    [last] = after.following([answer])
    assert last.round == 3 and last.following([answer]) == [] and last.start == answer.widths


FLAGS = ['--policy', 'morphnet', '--model', 'test_resnet', '--img-size', '24', '--device', 'cpu', '--workers', '0', '--lr', '0.1', '-b', '12',
         '--sched', 'none', '--search-epochs', '2', '--epochs', '0', '--morphnet.strength', '300', '--morphnet.threshold', '0.1',
         '--baselines', 'base', '--search-holdout', '0.2']


def test_a_search_in_rounds_resumes_to_the_same_answer(image_folder, tmp_path, capsys, monkeypatch):
    """The base is trained first, although the grid goes up to four times its widths; then each budget's network."""
    monkeypatch.setattr(target, 'measure_many', partial(target.measure_many, seconds=1e-4, attempts=1))
    out = tmp_path / 'x'
    flags = ['search', *FLAGS, '--data-dir', str(image_folder), '--morphnet.rounds', '2', '--output', str(out)]
    assert cli.main([*flags, '--budget', 'macs=1x', 'macs=0.5x']) == 0
    said = capsys.readouterr().out
    assert said.count('channels are alive') == 6 and 'round 2 of 2, macs=0.5x' in said
    state = {p.name: torch.load(p, weights_only=True) for p in (out / 'search').glob('*.pth.tar')}
    assert sorted(state) == ['morphnet.macs-0.5x.2.pth.tar', 'morphnet.macs-1x.2.pth.tar', 'morphnet.pth.tar']
    model = timm.create_model('test_resnet', num_classes=3)
    shapes = {n: t.shape for n, t in state['morphnet.pth.tar']['network'].items()}
    assert shapes == {f'model.{n}': t.shape for n, t in model.state_dict().items()}
    names = ('macs-1x', 'macs-0.5x')
    found = [timm_width.load_spec(out / name) for name in names]
    assert found[0].widths != found[1].widths and found[0].provenance['grid']['rule'] == 'all'
    second = state['morphnet.macs-1x.2.pth.tar']
    space = trace(model, (3, 24, 24))
    assert second['extra']['widths'] != space.base_widths
    for part in 'morphnet.macs-1x.2.pth.tar', 'morphnet.pth.tar':
        (out / 'search' / part).unlink()
    assert cli.main(['search', '--resume', str(out)]) == 0
    assert [timm_width.load_spec(out / name).widths for name in names] == [spec.widths for spec in found]
    assert all(Macs(space)(spec.widths, spec.skips) <= limit * Macs(space)() for spec, limit in zip(found, (1, 0.5)))
    capsys.readouterr()
    before = (out / 'args.yaml').read_bytes()
    assert cli.main(['search', '--resume', str(out), '--budget', 'params=0.5x']) == 2
    assert 'the penalty was on MACs, and the budgets are of MACs and params' in capsys.readouterr().err
    assert (out / 'args.yaml').read_bytes() == before


def test_a_training_for_another_network_is_refused():
    policy, model, space = prepared()
    state = policy.state_dict()
    policy.load_state_dict(state)
    with pytest.raises(PolicyError, match='another network'):
        policy.load_state_dict({**state, 'widths': {**state['widths'], 'stem.0': 5}})


# -- groups without scales, options -------------------------------------------------------------------------------------------


class Half(nn.Module):
    """Its second convolution has no normalisation."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = _layer(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()), _layer(8, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.c(self.b(self.a(x))).mean((2, 3)))


def test_groups_without_scales_keep_their_base_width():
    space = trace(Half(), (3, 8, 8))
    grid = make_grid(space, 'all')

    def make(limit, grid=grid, **options):
        policy = MorphNet(space, [Budget.parse(f'macs={limit}x', space)], grid, MorphNet.Options(**options))
        policy.prepare(Half(), space)
        return policy

    policy = make(0.5)
    assert 'no normalisation governs b.0' in policy.notes[0] and set(policy.scales.groups) == {'a.0', 'c.0'}
    [(widths, _)] = policy.choose(None)
    assert widths['b.0'] == 8 and policy.budgets[0].met(widths) and widths['a.0'] < 8
    with pytest.raises(PolicyError, match='strict: no normalisation governs b.0'):
        make(0.5, strict=True)
    with pytest.raises(PolicyError, match="give --fix 'b.0'"):
        make(0.3, {**grid, 'b.0': (2, 4)})
    with pytest.raises(BudgetError, match='below the smallest'):
        make(0.05)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    space = trace(model, (3, 8, 8))
    with pytest.raises(PolicyError, match='can search no group'):
        MorphNet(space, [Budget.parse('macs=0.5x', space)], make_grid(space, 'all')).prepare(model, space)


@pytest.mark.parametrize('options, says', [
    ({'strength': -1.}, 'morphnet.strength must be at least 0, not -1'),
    ({'strength': float('nan')}, 'morphnet.strength'),
    ({'threshold': -0.1}, 'morphnet.threshold'),
    ({'grouping': 'mean'}, "morphnet.grouping must be max or l2, not 'mean'"),
    ({'rounds': 0}, 'morphnet.rounds must be at least 1, not 0'),
])
def test_bad_options_say_why(options, says):
    with pytest.raises(PolicyError, match=says):
        MorphNet.Options(**options)


def test_where_nothing_dies_it_says_so():
    space = trace(_Net(), (3, 16, 16))
    policy = MorphNet(space, [Budget.parse('macs=0.5x', space)], make_grid(space, 'all'))
    policy.prepare(_Net(), space)
    policy.choose(None)
    assert 'no channel has died' in policy.notes[0] and '--morphnet.strength' in policy.notes[0]


def test_strength_is_relative_to_the_inverse_of_the_network_trained():
    """A base network all of whose scales are 1: a sum over all groups, of derivative times width."""
    space = trace(_Net(), (3, 16, 16))
    for strength in 1., 5.:
        policy = MorphNet(space, [Budget.parse('params=0.5x', space)], make_grid(space, 'all'), MorphNet.Options(strength=strength))
        policy.prepare(_Net(), space)
        params = Params(space)
        widths = {n: torch.tensor(float(w), dtype=torch.float64, requires_grad=True) for n, w in space.base_widths.items()}
        params(widths).backward()
        total = sum(float(w.grad) * float(w.detach()) for w in widths.values())
        assert float(policy.penalty().detach()) == pytest.approx(strength * total / params(), rel=1e-6)


def test_random_widths_lie_on_the_grid_of_all():
    """Unit steps up to four times the base width."""
    space = spaces('resnext26ts')[1]
    grid = make_grid(space, 'all')
    assert all(w == tuple(range(space[n].unit, 4 * space[n].size + 1, space[n].unit)) for n, w in grid.items())
    space.check(random_widths(grid, np.random.default_rng(0)))
