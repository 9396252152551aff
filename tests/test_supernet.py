"""The supernet against the resized model, bit for bit; statistics, gates, skips, recalibration; timm's and torch's wrappers."""
import copy
import random

import numpy as np
import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.utils import ModelEmaV3
from torch import nn

from timm_width.resize import resize
from timm_width.space import WidthError
from timm_width.supernet import Supernet, recalibrate
from timm_width.trace import trace

SIZE = (3, 64, 64)
MODELS = [  # each with what it adds
    'resnet10t',  # residual sums
    'mobilenetv2_035',  # depthwise, fused activations
    'regnetx_002',  # conv-groups as units
    'densenet121',  # axes of many pieces
    'ghostnet_050',  # a slice end in Python
    'cs3darknet_focus_s',  # split sizes in Python
    'res2next50',
    'skresnet18',
    'rexnet_100',  # sums over a part of the channels
    'dpn48b',
    'convnext_zepto_rms',  # no batch norms
    'repghostnet_050',
    'hrnet_w18_small',
    'mobileone_s0',  # branches of sums
    'nf_regnet_b0',  # standardised weights, no norms
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name, seed=0, **kwargs):
    """A model in evaluation mode with statistics and scales like those of a trained one, and its space."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs).eval()
    for key, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.ndim == 1 and t.is_floating_point():
            with torch.no_grad():
                t.uniform_(0.5, 1.5) if key.endswith(('weight', 'running_var')) else t.normal_(0, 0.1)
    return model, trace(model, SIZE)


@pytest.fixture(scope='module')
def cached():
    made = {}

    def get(name, **kwargs):
        key = (name, *kwargs.items())
        if key not in made:
            made[key] = build(name, **kwargs)
        model, space = made[key]
        return copy.deepcopy(model), space
    return get


def images(n=2, seed=1):
    return torch.randn(n, *SIZE, generator=torch.Generator().manual_seed(seed))


def draw(space, seed, index=False):
    """Random widths between 0.3 and 1.0; for the supernet (`index`: as indices), and for resize, as widths and keep."""
    rng = random.Random(seed)
    chosen, widths, keep = {}, {}, {}
    for name, group in space.searchable.items():
        n = max(1, int(rng.uniform(0.3, 1.0) * group.steps))
        chosen[name] = widths[name] = n * group.unit
        if index and not group.ordered:
            keep[name] = sorted(rng.sample(range(group.steps), n))
            chosen[name] = torch.tensor(keep[name])
    assert space.macs(widths) < space.macs()
    return chosen, widths, keep or None


def buffers(model):
    return {n: b.clone() for n, b in model.named_buffers()}


def same(a, b):
    assert a.keys() == b.keys()
    return [n for n in a if not torch.equal(a[n], b[n])] == []


# -- law 2 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', MODELS)
def test_equals_resized_model(name, cached):
    model, space = cached(name)
    net, x = Supernet(model, space).eval(), images()
    with torch.no_grad():
        base = model(x)
        for index in (False, True):
            chosen, widths, keep = draw(space, seed=2 + index, index=index)
            small = resize(copy.deepcopy(model), space, widths, keep=keep)
            out = net(x, chosen)
            assert out.isfinite().all() and not torch.allclose(out, base)
            assert torch.equal(out, small(x))
        assert torch.equal(net(x), base)


@pytest.mark.parametrize('index', [False, True])
@pytest.mark.parametrize('name', ['resnet10t', 'densenet121', 'res2next50'])
def test_training_equals_resized_model(name, index, cached):
    model, space = cached(name)
    chosen, widths, keep = draw(space, seed=4, index=index)
    small = resize(copy.deepcopy(model), space, widths, keep=keep).train()
    net, before = Supernet(model, space).train(), buffers(model)
    x, y = images(4), torch.tensor([1, 2, 3, 4])
    losses = [nn.functional.cross_entropy(run(x), y) for run in (lambda x: net(x, chosen), small)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    after = resize(copy.deepcopy(model), space, widths, keep=keep)
    assert same(buffers(after), buffers(small))
    for key, b in model.named_buffers():
        if b.is_floating_point():  # what is not kept has not changed
            assert 0 < (b != before[key]).sum() <= small.get_buffer(key).numel()
    grads = copy.deepcopy(model)
    for p, q in zip(grads.parameters(), model.parameters()):
        p.data = q.grad
    grads = resize(grads, space, widths, keep=keep)
    for (key, p), whole, q in zip(small.named_parameters(), model.parameters(), grads.parameters()):
        assert torch.equal(p.grad, q), key
        assert whole.grad.count_nonzero() == q.count_nonzero(), key


def test_many_runs_are_taken_by_index(cached):
    model, space = cached('resnet10t')
    net = Supernet(model, space).train()
    keep = {n: list(range(0, g.steps, 2)) for n, g in space.searchable.items()}
    small = resize(copy.deepcopy(model), space, {n: len(k) for n, k in keep.items()}, keep=keep)
    assert max(len(k) for k in keep.values()) > 100
    x = images(4)
    for chosen in (keep, {n: np.array(k, dtype=np.int32) for n, k in keep.items()}):
        model.zero_grad()
        small.zero_grad()
        net.eval()(x, chosen).square().sum().backward()
        small.eval()(x).square().sum().backward()
        grad = model.layer3[0].conv2.weight.grad
        assert torch.equal(grad[::2, ::2], small.layer3[0].conv2.weight.grad)
        assert grad.count_nonzero() == grad[::2, ::2].count_nonzero()


def test_index_that_is_a_prefix_is_a_width(cached):
    model, space = cached('resnet10t')
    net, x = Supernet(model, space).eval(), images()
    name = 'layer2.0.conv1'
    assert torch.equal(net(x, {name: 40}), net(x, {name: torch.arange(40)}))
    assert torch.equal(net(x), net(x, {name: range(space[name].steps)}))


def test_sandwich_has_one_backward(cached):
    """Statistics written for one width must not invalidate what another one's backward needs."""
    model, space = cached('densenet121')
    net, x = Supernet(model, space).train(), images()
    loss = sum(net(x, w).square().mean() for w in ({}, space.scaled(0.3), draw(space, 5, index=True)[0], {}))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_trainable_after_a_second_derivative(cached):
    model, space = cached('resnet10t')
    net = Supernet(model, space).eval()
    weight = model.layer1[0].conv1.weight
    grad, = torch.autograd.grad(net(images(), space.scaled(0.5)).square().sum(), weight, create_graph=True)
    second, = torch.autograd.grad(grad.square().sum(), weight)
    n = weight.shape[0] // 2
    assert second[:n, :n].count_nonzero() > 0 and second.count_nonzero() == second[:n, :n].count_nonzero()


class Twice(nn.Module):
    """One convolution under two names, and one weight in two modules."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.a = nn.Conv2d(8, 8, 1)
        self.b = self.a
        self.c = nn.Conv2d(8, 8, 1)
        self.c.weight = self.a.weight
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(torch.relu(self.a(x)))
        return self.head((x + self.c(x)).mean((2, 3)))


def test_shared_modules_and_weights():
    torch.manual_seed(0)
    model = Twice()
    space = trace(model, SIZE)
    net, x, before = Supernet(model, space), images(), copy.deepcopy(model.state_dict())
    widths = space.scaled(0.5)
    assert widths
    assert torch.equal(net(x, widths), resize(copy.deepcopy(model), space, widths)(x))
    assert same(model.state_dict(), before)
    assert model.b is model.a and isinstance(model.a.weight, nn.Parameter) and model.c.weight is model.a.weight


# -- what a call leaves behind ---------------------------------------------------------------------------------------------


def attributes(model):
    """All that modules keep in plain attributes, hooks included."""
    return {n: {k: dict(v) if isinstance(v, dict) else v for k, v in m.__dict__.items()} for n, m in model.named_modules()}


@pytest.mark.parametrize('name', ['res2next50', 'ghostnet_050'])
def test_model_is_restored_after_an_exception(name, cached):
    model, space = cached(name)
    net, x = Supernet(model, space).eval(), images()
    gates = {g: torch.ones(len(x), space[g].steps) for g in net.norms}
    before, seen = attributes(model), []

    def fail(module, args):
        seen.extend(m.__dict__.get('groups') for m in model.modules())
        raise KeyboardInterrupt

    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        net(x, space.scaled(0.5), gates, [space.blocks[0].name])
    handle.remove()
    assert seen != [m.__dict__.get('groups') for m in model.modules()]
    assert attributes(model) == before
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values() if p is not None)


@pytest.mark.parametrize('index', [False, True])
def test_candidates_leave_statistics_alone(index, cached):
    model, space = cached('densenet121')
    net, x = Supernet(model, space).train(), images()
    before = buffers(model)
    for chosen in ({}, draw(space, 6, index)[0]):
        with torch.no_grad():
            out = net(x, chosen)
        assert same(buffers(model), before)
        assert torch.equal(out, net(x, chosen))  # as with gradients: by the statistics of the batch
        assert not same(buffers(model), before)
        model.load_state_dict(before, strict=False)


def test_evaluation_changes_nothing(cached):
    model, space = cached('densenet121')
    net, before = Supernet(model, space).eval(), buffers(model)
    net(images(), draw(space, 7, index=True)[0])
    assert same(buffers(model), before)


def test_plans_are_kept_and_bounded(cached, monkeypatch):
    model, space = cached('resnet10t')
    net, x = Supernet(model, space).eval(), images(1)
    made = []
    new_plan = net._new_plan
    monkeypatch.setattr(net, '_new_plan', lambda *args: made.append(1) or new_plan(*args))
    monkeypatch.setattr('timm_width.supernet.MAX_PLANS', 2)
    for n in (8, 16, 8, 24, 8, 16):
        net(x, {'layer1.0.conv1': n})
    assert len(made) == 4 and len(net._plans) == 2


# -- skips -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['mobilenetv2_035', 'convnext_zepto_rms'])
def test_skips_equal_resized_model(name, cached):
    model, space = cached(name)
    net, x = Supernet(model, space).train(), images()
    skips = [b.name for b in space.blocks][::2]
    _, widths, _ = draw(space, 8)
    small = resize(copy.deepcopy(model), space, widths, skips).train()
    before = buffers(model)
    out = net(x, widths, skips=skips)
    assert torch.equal(out, small(x))
    out.sum().backward()
    for block in skips:
        assert all(p.grad is None for p in model.get_submodule(block).parameters())
        assert all(torch.equal(b, before[f'{block}.{n}']) for n, b in model.get_submodule(block).named_buffers())
    assert not torch.equal(net(x, widths), out)


# -- gates -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['resnet10t', 'mobilenetv2_035', 'densenet121', 'convnext_zepto_rms'])
def test_vector_gates_scale_the_norms(name, cached):
    model, space = cached(name)
    net, x = Supernet(model, space).eval(), images()
    picked = [g for k, g in enumerate(net.norms) if k % 3 == 0]
    gates = {g: torch.rand(space[g].steps, generator=torch.Generator().manual_seed(k)) for k, g in enumerate(picked)}
    scaled = copy.deepcopy(model)
    modules, done = dict(scaled.named_modules()), 0
    for key, t in space.tensors.items():
        owner, _, leaf = key.rpartition('.')
        if 'norm' in type(modules[owner]).__name__.lower() and leaf in ('weight', 'bias'):
            pieces = [(space.groups[g], r) for g, r in t.axes[0]]
            parts = [gates.get(g.name, torch.ones(g.steps)).repeat_interleave(r) for g, r in pieces]
            getattr(modules[owner], leaf).data *= torch.cat(parts)
            done += 1
    assert done
    assert torch.equal(net(x, gates=gates), scaled(x))
    chosen, widths, keep = draw(space, 9, index=True)
    expected = resize(scaled, space, widths, keep=keep)(x)
    assert torch.equal(net(x, chosen, gates), expected)
    cut = {g: gate[chosen[g]] for g, gate in gates.items()}  # of the steps kept alone
    assert torch.equal(net(x, chosen, cut), expected)


GATED = {  # unfused and fused batch norm; with an activation that is not homogeneous; norms of pieces; over NCHW; over NHWC
    'resnet10t': {}, 'mobilenetv2_035': {}, 'mobilenetv3_small_050': {}, 'densenet121': {}, 'convnext_zepto_rms': {},
    'convnext_atto': {'conv_mlp': False},
}


@pytest.mark.parametrize('name', GATED)
def test_gates_per_image(name, cached):
    model, space = cached(name, **GATED[name])
    net, x = Supernet(model, space).eval().double(), images(3).double()
    widths = space.scaled(0.5)
    maker = torch.Generator().manual_seed(0)
    rows = {g: (torch.rand(3, space[g].steps, generator=maker) < 0.6).float() for g in net.norms}
    for chosen in ({}, widths):
        out = net(x, chosen, rows)
        each = [net(x[i:i + 1], chosen, {g: r[i] for g, r in rows.items()}) for i in range(3)]  # weights and biases zeroed
        torch.testing.assert_close(out, torch.cat(each))
        assert not torch.allclose(out, net(x, chosen), rtol=1e-2)
    soft = {g: 0.5 + torch.rand(space[g].steps, generator=maker) for g in net.norms}
    rows = {g: s.expand(3, -1) for g, s in soft.items()}
    torch.testing.assert_close(net(x, gates=rows), net(x, gates=soft))


def test_rows_and_vectors_meet_in_one_norm(cached):
    model, space = cached('densenet121')
    net, x = Supernet(model, space).eval(), images()
    one, two = [space.groups[g].name for g, _ in next(a for a in net.norm_axes.values() if len(a) > 1)][:2]
    vector, row = torch.rand(space[one].steps), torch.rand(2, space[two].steps)
    expected = net(x, gates={one: vector.expand(2, -1), two: row})
    torch.testing.assert_close(net(x, gates={one: vector, two: row}), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('per_image', [False, True])
def test_gates_are_differentiable(per_image, cached):
    model, space = cached('mobilenetv2_035')
    net, x = Supernet(model, space).train(), images()
    group = space['blocks.1.0.conv_pw']
    gate = torch.ones(*([2] if per_image else []), group.steps, requires_grad=True)
    out = net(x, {group.name: group.size // 2}, {group.name: gate})
    out.square().sum().backward()
    half = group.steps // 2
    assert gate.grad[..., :half].count_nonzero() and not gate.grad[..., half:].count_nonzero()
    assert model.blocks[1][0].bn1.weight.grad is not None


def test_groups_without_a_norm_are_listed(cached):
    model, space = cached('convnext_zepto_rms')
    net = Supernet(model, space)
    assert net.ungated and set(net.ungated) | set(net.norms) >= set(space.searchable)
    assert 'stages.0.blocks.0.mlp.fc1' in net.ungated
    assert not Supernet(*cached('resnet10t')).ungated
    with pytest.raises(WidthError, match='no normalisation governs it'):
        net(images(), gates={net.ungated[0]: torch.ones(space[net.ungated[0]].steps)})


# -- recalibrate -----------------------------------------------------------------------------------------------------------


def test_recalibrate_averages(cached):
    model, space = cached('resnet10t')
    data = [images(4, seed) for seed in range(3)]
    inputs, hand = {}, copy.deepcopy(model).train()
    for name, m in hand.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_pre_hook(lambda m, args, name=name: inputs.setdefault(name, []).append(args[0].detach()))
    with torch.no_grad():
        for x in data:
            hand(x)
    noisy = timm.create_model('resnet10t', drop_rate=0.5, drop_path_rate=0.5)
    noisy.load_state_dict(model.state_dict())
    recalibrate(noisy, iter([(x, 0) for x in data] + [(data[0], 0)]), batches=3)
    assert len(inputs) == 14
    for name, seen in inputs.items():
        bn = noisy.get_submodule(name)
        mean, var = (torch.stack([of(x, (0, 2, 3)) for x in seen]).mean(0) for of in (torch.mean, torch.var))
        torch.testing.assert_close(bn.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bn.running_var, var, rtol=1e-4, atol=1e-5)
        assert bn.momentum == 0.1 and bn.training and bn.num_batches_tracked == 3


def test_recalibrate_has_no_randomness():
    def of(norm):
        return nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).train()

    dropping = of(BatchNormAct2d(8, drop_layer=nn.Dropout))
    plain = of(BatchNormAct2d(8))
    plain.load_state_dict(dropping.state_dict())
    for model in (dropping, plain):
        recalibrate(model, [images()])
    assert same(buffers(dropping), buffers(plain))
    assert dropping[1].drop.training


@pytest.mark.parametrize('index', [False, True])
def test_recalibrate_supernet_at_widths(index, cached):
    model, space = cached('mobilenetv2_035')
    chosen, widths, keep = draw(space, 10, index)
    skips = [space.blocks[1].name]
    small = resize(copy.deepcopy(model), space, widths, skips, keep=keep)
    net, before, data = Supernet(model, space), buffers(model), [images(4, seed) for seed in range(2)]
    net.eval()
    model.blocks[0].train()
    modes = [m.training for m in net.modules()]
    recalibrate(net, data, widths=chosen, skips=skips)
    recalibrate(small, data)
    assert modes == [m.training for m in net.modules()]
    assert same(buffers(resize(copy.deepcopy(model), space, widths, skips, keep=keep)), buffers(small))
    for key, b in model.named_buffers():
        kept = 0 if key.startswith(skips[0] + '.') else small.get_buffer(key).numel()
        assert (b != before[key]).sum() <= kept, key


def test_recalibrate_keeps_what_it_cannot_estimate(cached):
    model, space = cached('resnet10t')
    model.spare = nn.BatchNorm2d(4)
    model.spare.running_mean.fill_(3.0)
    before, modes = buffers(model), [m.training for m in model.modules()]
    for faulty in (lambda: recalibrate(model, []), lambda: recalibrate(model, [images()], batches=0),
                   lambda: recalibrate(model, [images(), 'no image'])):
        with pytest.raises((ValueError, AttributeError)):
            faulty()
        assert same(buffers(model), before)
        assert modes == [m.training for m in model.modules()]
        assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    recalibrate(model, [images()])
    assert model.spare.running_mean[0] == 3.0 and not torch.equal(model.bn1.running_mean, before['bn1.running_mean'])


# -- in company ------------------------------------------------------------------------------------------------------------


def test_autocast(cached):
    model, space = cached('mobilenetv2_035')
    net, x, widths = Supernet(model, space), images(), space.scaled(0.5)
    small = resize(copy.deepcopy(model), space, widths)
    with torch.autocast('cpu', torch.bfloat16):
        out = net(x, widths)
        assert out.dtype == torch.bfloat16 and torch.equal(out, small(x))
        group = 'blocks.1.0.conv_pw'
        for shape in ((), (2,)):
            assert net(x, widths, {group: torch.ones(*shape, space[group].steps)}).isfinite().all()
    out.float().sum().backward()
    assert model.conv_stem.weight.grad.dtype == torch.float32


def test_channels_last(cached):
    model, space = cached('resnet10t')
    net = Supernet(model, space).to(memory_format=torch.channels_last)
    chosen, widths, keep = draw(space, 11, index=True)
    x = images().contiguous(memory_format=torch.channels_last)
    for take, kept in ((widths, None), (chosen, keep)):
        small = resize(copy.deepcopy(model), space, widths, keep=kept)
        out = net(x, take)
        assert torch.equal(out, small(x))
        out.sum().backward()
    weight = model.layer2[0].conv2.weight
    assert weight.grad.stride() == weight.stride() and weight.is_contiguous(memory_format=torch.channels_last)


def test_state_dict_copies_and_ema(cached):
    model, space = cached('resnet10t')
    net, x, widths = Supernet(model, space).eval(), images(), space.scaled(0.5)
    out = net(x, widths)
    assert list(net.state_dict()) == [f'model.{n}' for n in model.state_dict()]
    other = Supernet(timm.create_model('resnet10t'), space).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x, widths), out)
    twin = copy.deepcopy(net)
    ema = ModelEmaV3(net, decay=0.5)
    with torch.no_grad():
        model.conv1[0].weight += 1
    ema.update(net)
    assert torch.equal(twin(x, widths), out)
    assert not torch.equal(net(x, widths), out)
    torch.testing.assert_close(ema.module.model.conv1[0].weight, twin.model.conv1[0].weight + 0.5)
    assert not torch.equal(ema.module(x, widths), out)


def test_gradient_checkpointing_is_refused(cached):
    model, space = cached('resnet10t')
    model.set_grad_checkpointing()
    net, x = Supernet(model, space), images()
    with pytest.raises(RuntimeError, match='set_grad_checkpointing'):
        net(x, space.scaled(0.5))
    net(x).sum().backward()  # at base widths the model runs as it is
    with torch.no_grad():
        net(x, space.scaled(0.5))


def _ddp_worker(rank, rendezvous):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=rendezvous, rank=rank, world_size=2)
    model, space = build('resnet10t', seed=rank, num_classes=10)  # the wrapper hands out those of rank 0
    net = Supernet(model, space).train()
    ddp = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    alone = copy.deepcopy(net)
    optim = torch.optim.SGD(ddp.parameters(), 0.01)
    for step in range(3):
        alone.load_state_dict(net.state_dict())
        alone.zero_grad()
        drawn = [draw(space, 20 + step + (rank if step == 2 else 0), index=step == 1)[0] for rank in range(2)]
        for r in range(2):
            (alone(images(4, r), drawn[r]).square().mean() / 2).backward()
        optim.zero_grad()
        ddp(images(4, rank), drawn[rank]).square().mean().backward()
        for (name, p), q in zip(net.named_parameters(), alone.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
        optim.step()
    ddp = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False, find_unused_parameters=True)
    for skips in ([b.name for b in space.blocks], ()):
        ddp(images(4, rank), space.scaled(0.5), skips=skips).square().mean().backward()
        optim.step()
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    found = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(found, flat)
    assert torch.equal(*found)
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, args=(f'file://{tmp_path}/rendezvous',), nprocs=2)


# -- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('widths, words', [
    ({'layer1.0.conv': 8}, "did you mean 'layer1.0.conv1'"),
    ({'layer1.0.conv1': 65}, 'grow the model first, by resize'),
    ({'layer1.0.conv1': 0}, 'outside'),
    ({'layer1.0.conv1': 8.0}, 'whole number'),
    ({'layer1.0.conv1': '8'}, 'whole number'),
    ({'layer1.0.conv1': torch.tensor([True, False])}, 'vector of indices'),
    ({'layer1.0.conv1': torch.tensor([[1, 2]])}, 'vector of indices'),
    ({'layer1.0.conv1': [3, 2]}, 'ascending'),
    ({'layer1.0.conv1': [3, 64]}, 'below 64'),
    ({'layer1.0.conv1': [-1, 2]}, 'below 64'),
    ({'layer1.0.conv1': []}, 'vector of indices'),
    ({'layer1.0.conv1': torch.arange(0)}, 'outside'),
    ({'fc': 500}, 'frozen'),
    ({'fc': [0, 1]}, 'frozen'),
    ([8], 'must be a dict'),
])
def test_wrong_widths(widths, words, cached):
    net = Supernet(*cached('resnet10t'))
    for _ in range(2):
        with pytest.raises(WidthError, match=words):
            net(images(), widths)


def test_all_faults_at_once(cached):
    net = Supernet(*cached('resnet10t'))
    with pytest.raises(WidthError, match="(?s)'layer1.0.conv1'.*'layer2.0.conv1'.*'nothing'"):
        net(images(), {'layer1.0.conv1': 999, 'layer2.0.conv1': [2, 1]}, skips=['nothing'])


def test_ordered_groups_keep_their_first_channels(cached):
    model, space = cached('ecaresnet26t')
    name = next(n for n, g in space.searchable.items() if g.ordered)
    net, x = Supernet(model, space).eval(), images()
    assert torch.equal(net(x, {name: [0, 1, 2]}), net(x, {name: 3}))
    with pytest.raises(WidthError, match='ordered'):
        net(x, {name: [0, 2, 3]})


@pytest.mark.parametrize('gate, words', [
    (torch.ones(63), 'of 64 or 32 factors'),
    (torch.ones(3, 64), 'each of 2 images'),
    (torch.ones(()), 'not \\(\\)'),
    ([1.0] * 64, 'not list'),
])
def test_wrong_gates(gate, words, cached):
    net = Supernet(*cached('resnet10t'))
    with pytest.raises(WidthError, match=words):
        net(images(), {'layer1.0.conv1': 32}, {'layer1.0.conv1': gate})
    with pytest.raises(WidthError, match='did you mean'):
        net(images(), gates={'layer1.0.conv': torch.ones(64)})


def test_wrong_model(cached):
    _, space = cached('resnet10t')
    with pytest.raises(WidthError, match='not the one that was traced'):
        Supernet(timm.create_model('resnet18'), space)
    with pytest.raises(WidthError, match='only a Supernet'):
        recalibrate(timm.create_model('resnet10t'), [images()], widths={'layer1.0.conv1': 8})
