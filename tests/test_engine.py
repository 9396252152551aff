"""The training loop: equal to one written out by hand, resumed as if never killed, and the same over several processes."""
import json
import os
import random
import socket
from argparse import Namespace
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from timm.data import FastCollateMixup, create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad, random_seed
from torch import distributed, nn
from torch.utils.data import DataLoader

import timm_width
from timm_width import data, search, target
from timm_width.arguments import Parser, add_arguments
from timm_width.budget import Budget
from timm_width.engine import Training, batch_statistics, score, start_processes
from timm_width.policies.autoslim import AutoSlim

MODEL = 'test_resnet'
CONFIG = {'input_size': (3, 32, 32), 'interpolation': 'bilinear', 'mean': (0.5,) * 3, 'std': (0.2,) * 3, 'crop_pct': 1.,
          'crop_mode': 'center'}


def arguments(*more: str) -> Namespace:
    parser = Parser()
    add_arguments(parser)
    return parser.parse_args(['-b', '8', '--device', 'cpu', '-j', '0', '--lr', '0.05', '--warmup-epochs', '1', '--num-classes', '3',
                              '--train-interpolation', '',
                              *more])


def tensor_batches(count=5, size=8, seed=0, classes=3):
    """Batches in memory."""
    rng = torch.Generator().manual_seed(seed)
    return DataLoader([(torch.randn(size, 3, 32, 32, generator=rng), torch.randint(classes, (size,), generator=rng))
                       for _ in range(count)], batch_size=None)


def doubled(batches):
    return DataLoader([(x.double(), y) for x, y in batches], batch_size=None)


def image_batches(folder, args, training=True, split='train'):
    return data.loader(data.View(create_dataset('', str(folder / split), search_split=False)), args, CONFIG, training)


def make(name=MODEL, seed=1, **kwargs):
    random_seed(seed)
    return timm.create_model(name, num_classes=3, **kwargs)


def assert_same(model, other):
    """The same weights and buffers, bit for bit."""
    states = model.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [k for k in states[0] if not torch.equal(states[0][k], states[1][k])] == []


# -- equal to a loop written out by hand -------------------------------------------------------------------------------------


def by_hand(model, batches, epochs, optimizer, criterion, on_updates=False, accumulate=1, dtype=None, ema=None, clip=None):
    """The loop of timm's train.py, without what Training adds."""
    updates_per_epoch = -(-len(batches) // accumulate)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs, warmup_epochs=1, warmup_lr=1e-5, min_lr=0., step_on_epochs=not on_updates,
        updates_per_epoch=updates_per_epoch)
    updates, losses = 0, []
    for epoch in range(epochs):
        model.train()
        waiting = []
        for i, (images, targets) in enumerate(batches):
            waiting.append((images, targets))
            if len(waiting) < accumulate and i < len(batches) - 1:
                continue
            optimizer.zero_grad()
            for x, y in waiting:
                with torch.autocast('cpu', dtype, enabled=dtype is not None):
                    loss = criterion(model(x), y)
                (loss / len(waiting)).backward()
                losses.append(loss.item())
            waiting = []
            if clip is not None:
                dispatch_clip_grad(model.parameters(), clip)
            optimizer.step()
            updates += 1
            if ema is not None:
                ema.update(model, step=updates)
            scheduler.step_update(updates)
        scheduler.step(epoch + 1)
    return losses


LOOPS = {  # flags -> what they mean to timm's functions, and to the loop above
    'sgd': ('', {}, {}),
    'adamw': ('--opt adamw --weight-decay 0.05 --lr 0.002', {'opt': 'adamw', 'weight_decay': 0.05, 'lr': 0.002}, {}),
    'per update': ('--sched-on-updates', {}, {'on_updates': True}),
    'lr of the batch size': ('--lr-base 1.6', {'lr': 1.6 * 8 / 256}, {}),
    'lr of an adaptive optimiser': ('--opt adamw --lr-base 0.01', {'opt': 'adamw', 'lr': 0.01 * (8 / 256) ** 0.5}, {}),
    'accumulation': ('--grad-accum-steps 2', {}, {'accumulate': 2}),
    'clipping': ('--clip-grad 0.5', {}, {'clip': 0.5}),
    'ema': ('--model-ema --model-ema-decay 0.8', {}, {'ema': {'decay': 0.8}}),
    'ema with warmup': ('--model-ema --model-ema-decay 0.8 --model-ema-warmup --grad-accum-steps 3', {},
                        {'ema': {'decay': 0.8, 'use_warmup': True}, 'accumulate': 3}),
    'bfloat16': ('--amp --amp-dtype bfloat16', {}, {'dtype': torch.bfloat16}),
}


@pytest.mark.parametrize('name', LOOPS)
def test_training_is_timms_loop(name):
    """Weights, averages and losses are those of a loop by hand, for each flag that changes the loop."""
    flags, optimizer, loop = LOOPS[name]
    args = arguments(*flags.split())
    if 'base' in flags:
        args.lr = None
    batches, seen = tensor_batches(), []
    training = Training(make(), batches, args, 2)
    result = training.run(after_epoch=lambda t, loss, lr: seen.append(loss))
    model = make()
    ema = loop.get('ema') and ModelEmaV3(model, **loop['ema'])
    made = create_optimizer_v2(model, **{'opt': 'sgd', 'lr': 0.05, 'momentum': 0.9, 'weight_decay': 2e-5, **optimizer})
    losses = by_hand(model, batches, 2, made, LabelSmoothingCrossEntropy(0.1), **{**loop, 'ema': ema})
    torch.testing.assert_close(training.network.state_dict(), model.state_dict())
    torch.testing.assert_close(result.state_dict(), (ema.module if ema else model).state_dict())
    np.testing.assert_allclose(seen, np.reshape(losses, (2, -1)).mean(1), rtol=1e-5)
    assert (result is training.network) == (ema is None)
    assert not any(torch.equal(a, b) for a, b in zip(training.network.parameters(), make().parameters()) if a.numel() > 100)


def test_training_with_mixup_is_timms_loop(image_folder):
    """Images, their order, mixing and the loss of soft targets; from --mixup-off-epoch on nothing is mixed."""
    args = arguments('--mixup', '0.4', '--cutmix', '0.5', '--smoothing', '0.05', '--mixup-off-epoch', '1')
    result = Training(make(), image_batches(image_folder, args), args, 2, seed=7).run()

    collate = FastCollateMixup(mixup_alpha=0.4, cutmix_alpha=0.5, label_smoothing=0.05, num_classes=3)
    loader = create_loader(
        create_dataset('', str(image_folder / 'train'), search_split=False), (3, 32, 32), 8, is_training=True, interpolation='bilinear',
        mean=(0.5,) * 3, std=(0.2,) * 3, num_workers=0, collate_fn=collate, device=torch.device('cpu'), persistent_workers=False)

    class TurnedOff:
        epoch = -1

        def __len__(self):
            return len(loader)

        def __iter__(self):
            self.epoch += 1
            collate.mixup_enabled = self.epoch < 1
            return iter(loader)

    model = make()
    random_seed(7, 0)
    by_hand(model, TurnedOff(), 2, create_optimizer_v2(model, opt='sgd', lr=0.05, momentum=0.9, weight_decay=2e-5), SoftTargetCrossEntropy())
    torch.testing.assert_close(result.state_dict(), model.state_dict())


def test_a_second_training_on_the_same_batches_mixes_from_the_start(image_folder):
    """What --mixup-off-epoch turned off in one training is on again in the next."""
    args = arguments('--mixup', '0.4', '--mixup-off-epoch', '1')
    batches = image_batches(image_folder, args)
    first, second = (Training(make(), batches, args, 2).run() for _ in range(2))
    assert_same(first, second)


def test_channels_last_changes_no_result():
    batches = tensor_batches()
    models = [Training(make().double(), doubled(batches), arguments(*flags), 1).run() for flags in ((), ('--channels-last',))]
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())
    assert models[1].layer2[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_several_backward_passes_add_up():
    """Two halves of a loss give the gradients of the whole; nothing is stepped between them."""
    def halves(step):
        loss = step.loss(step.forward())
        step.backward(loss / 2)
        step.backward(step.loss(step.forward()) / 2)

    name = 'test_convnext'  # batch norms would count each pass
    batches = tensor_batches()
    torch.testing.assert_close(Training(make(name), batches, arguments(), 1, train_step=halves).run().state_dict(),
                               Training(make(name), batches, arguments(), 1).run().state_dict())


def test_steps_know_where_they_are():
    """Epoch, update and progress; the draws of the batches of one update are the same, of others differ; --seed decides them."""
    seen = {0: [], 1: []}
    for seed in seen:
        def note(step, seed=seed):
            seen[seed].append((step.epoch, step.update, step.progress, step.rng.random()))
            step.backward(step.loss(step.forward()))

        Training(make(), tensor_batches(), arguments('--grad-accum-steps', '2'), 2, train_step=note, seed=seed).run()
    assert [s[:3] for s in seen[0]] == [(e, 3 * e + i // 2, (3 * e + i // 2) / 6) for e in range(2) for i in range(5)]
    draws = {s[1]: s[3] for s in seen[0]}
    assert all(s[3] == draws[s[1]] for s in seen[0]) and len(set(draws.values())) == 6
    assert not set(draws.values()) & {s[3] for s in seen[1]}


def test_the_seed_decides_the_order_of_images_in_several_processes():
    """One order for all processes, another for every seed and every epoch."""
    orders = {}
    for seed in (3, 30):
        for rank in (0, 1):
            dataset = [(torch.full((3, 32, 32), float(i)), 0) for i in range(16)]
            sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=2, rank=rank)
            orders[seed, rank] = order = []

            def note(step, order=order):
                order.extend(step.images[:, 0, 0, 0].int().tolist())

            Training(make(), DataLoader(dataset, 4, sampler=sampler), arguments(), 2, train_step=note, seed=seed).run()
    for seed in (3, 30):
        for epoch in (slice(0, 8), slice(8, 16)):
            assert sorted(orders[seed, 0][epoch] + orders[seed, 1][epoch]) == list(range(16))
        assert orders[seed, 0][:8] != orders[seed, 0][8:]
    assert orders[3, 0] != orders[30, 0]


def test_policy_parameters_are_trained_without_weight_decay():
    """Their gradients are followed as SGD does by hand, and nothing pulls them to zero, as it pulls the weights."""
    args = arguments('--weight-decay', '0.5', '--warmup-epochs', '0', '--sched', 'none', '--opt', 'momentum', '--momentum', '0')
    pulled, idle = nn.Parameter(torch.tensor(1.)), nn.Parameter(torch.tensor(1.))

    def step(s):
        s.backward(0 * s.loss(s.forward()) + (pulled - 3) ** 2 + 0 * idle)

    network = make()
    before = network.conv1[0].weight.detach().clone()
    Training(network, tensor_batches(), args, 1, train_step=step, parameters=[pulled, idle]).run()
    expected = 1.
    for _ in range(5):
        expected -= 0.05 * 2 * (expected - 3)
    assert idle.item() == 1. and pulled.item() == pytest.approx(expected)
    torch.testing.assert_close(network.conv1[0].weight, before * (1 - 0.05 * 0.5) ** 5)


def test_a_loss_that_is_not_finite_is_a_usage_error():
    def step(s):
        s.backward(s.loss(s.forward()) * float('inf'))

    with pytest.raises(data.UsageError, match='the loss is inf in epoch 1; a lower --lr'):
        Training(make(), tensor_batches(1), arguments(), 2, 'mine', train_step=step).run()


@pytest.mark.parametrize('flags', ['--opt nonesuch', '--sched nonesuch', '--opt-kwargs nonesuch=1', '--sched plateau'])
def test_what_timm_or_we_do_not_know_is_a_usage_error(flags):
    with pytest.raises(data.UsageError, match='nonesuch|plateau'):
        Training(make(), tensor_batches(), arguments(*flags.split()), 1)


# -- killed and resumed ------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class Stateful:
    """A policy with a parameter, a history of what it drew, and something that only the ends of epochs decide."""

    def __init__(self):
        self.alpha, self.drawn, self.ended = nn.Parameter(torch.zeros(3)), [], 0

    def train_step(self, step):
        self.drawn.append(int(step.rng.integers(1000)) + self.ended)
        step.backward(step.loss(step.forward() * self.alpha.exp()))

    def epoch_end(self, epoch):
        self.ended += 10 ** epoch

    def state_dict(self):
        return {'alpha': self.alpha.detach(), 'drawn': self.drawn, 'ended': self.ended}

    def load_state_dict(self, state):
        self.alpha.data.copy_(state['alpha'])
        self.drawn, self.ended = list(state['drawn']), state['ended']


RESUMED = {  # everything that has a state of its own, or draws
    'sgd': '--reprob 0.5 --drop-path 0.2',
    'adamw, ema, mixup': '--opt adamw --lr 0.002 --model-ema --model-ema-decay 0.8 --mixup 0.4 --cutmix 0.5 --sched-on-updates',
    'accumulation, aa': '--grad-accum-steps 3 --aa rand-m9-mstd0.5 --sched step --decay-epochs 1',
}


@pytest.mark.parametrize('where', ['after the epoch', 'before saving', 'while writing'])
@pytest.mark.parametrize('name', RESUMED)
def test_a_training_killed_and_resumed_is_the_unbroken_one_bit_for_bit(name, where, image_folder, tmp_path, monkeypatch):
    args, checkpoint = arguments(*RESUMED[name].split()), tmp_path / 'folder' / 'x.pth.tar'

    def run(kill=None, checkpoint=None):
        policy = Stateful()

        def after_epoch(training, loss, lr):
            policy.epoch_end(training.epoch - 1)
            log.append((training.epoch, loss, lr))
            if where == 'after the epoch' and training.epoch == kill:
                raise Killed

        log = []
        training = Training(make(drop_path_rate=args.drop_path or 0.), image_batches(image_folder, args), args, 3,
                            train_step=policy.train_step, parameters=[policy.alpha])
        return training.run(checkpoint, after_epoch, policy), training, policy, log

    result, training, policy, log = run()
    for kill in (1, 2):
        checkpoint.unlink(missing_ok=True)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if where == 'before saving':
                patch.setattr(Training, '_save', _killing(Training._save, kill))
            elif where == 'while writing':
                patch.setattr(torch, 'save', _killing(torch.save, kill, _half_written))
            run(kill, checkpoint)
        random.seed(kill), np.random.seed(kill), torch.manual_seed(kill)  # another process
        resumed, training2, policy2, log2 = run(checkpoint=checkpoint)
        assert_same(result, resumed)
        assert_same(training.network, training2.network)
        assert torch.equal(policy.alpha, policy2.alpha) and (policy.drawn, policy.ended) == (policy2.drawn, policy2.ended)
        assert policy.alpha.abs().sum() > 0
        assert log2 == log[kill - 1:]  # and nothing was trained twice that need not be


def _killing(function, call, instead=lambda *a: None):
    """The function, but for one call, which kills."""
    calls = iter(range(1, 100))

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            instead(*args)
            raise Killed
        return function(*args, **kwargs)
    return wrapped


def _half_written(state, path):
    path.write_bytes(b'PK\x03\x04 half')


def test_a_finished_training_is_only_loaded(tmp_path):
    args = arguments()
    done = Training(make(), tensor_batches(), args, 2).run(tmp_path / 'x')

    def never(step):
        raise AssertionError

    assert_same(done, Training(make(seed=2), tensor_batches(), args, 2, train_step=never).run(tmp_path / 'x'))


WRONG = {
    'junk': lambda path: path.write_bytes(b'no checkpoint at all'),
    'four bytes': lambda path: path.write_bytes(b'junk'),
    'empty': lambda path: path.write_bytes(b''),
    'truncated': lambda path: path.write_bytes(path.read_bytes()[:1000]),
    'cut at the end': lambda path: path.write_bytes(path.read_bytes()[:-100]),
    'folder of weights': lambda path: torch.save(make().state_dict(), path),
    'list': lambda path: torch.save([1, 2], path),
    'code': lambda path: torch.save(Stateful(), path),
    'epochs': lambda path: Training(make(), tensor_batches(), arguments(), 2).run(path),
    'seed': lambda path: Training(make(), tensor_batches(), arguments(), 1, seed=1).run(path),
    'model': lambda path: Training(make('test_convnext'), tensor_batches(), arguments(), 1).run(path),
    'optimiser': lambda path: Training(make(), tensor_batches(), arguments(), 1, parameters=[nn.Parameter(torch.zeros(1))]).run(path),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_checkpoint_of_another_training_is_one_usage_error(name, tmp_path):
    path = tmp_path / 'x.pth.tar'
    Training(make(), tensor_batches(1), arguments(), 1).run(path)
    if name in ('epochs', 'seed', 'model', 'optimiser'):
        path.unlink()
    WRONG[name](path)
    with pytest.raises(data.UsageError, match='is not a checkpoint of this training') as e:
        Training(make(), tensor_batches(), arguments(), 1).run(path)
    assert '\n' not in str(e.value) and str(path) in str(e.value)


# -- scoring -----------------------------------------------------------------------------------------------------------------


def test_score_is_accuracy_and_mean_loss_over_images():
    """Over batches of different sizes, each image counts the same."""
    model = make().eval()
    batches = [*tensor_batches(2), *tensor_batches(1, size=3)]
    images, targets = (torch.cat(t) for t in zip(*batches))
    with torch.no_grad():
        logits = model(images)
    top1, loss = score(model, batches, arguments())
    assert top1 == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)


def test_batch_statistics_are_of_the_batch_and_all_modes_come_back():
    """Dropout is off, running statistics may move (the caller's business), and each module has the mode it had."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Conv2d(4, 4, 3)).train()
    model[3].eval()
    x = torch.randn(8, 3, 8, 8)
    with torch.no_grad(), batch_statistics(model):
        y = model(x)
    conv = model[0](x)
    mean, var = conv.mean((0, 2, 3), keepdim=True), conv.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(y, model[3]((conv - mean) / (var + 1e-5).sqrt()), rtol=1e-4, atol=1e-5)
    assert [m.training for m in model] == [True, True, True, False]


# -- several processes -------------------------------------------------------------------------------------------------------

WITHOUT_BATCH_NORM, GLOBAL_BATCH = 'test_convnext', 16


def _slimmed_training(args, batches, epochs=2):
    """AutoSlim's training of a network without batch norm, in float64: what was drawn and lost at every step."""
    random_seed(1)
    model = timm.create_model(WITHOUT_BATCH_NORM, num_classes=3).double()
    space = timm_width.trace(model, (3, 32, 32))
    grid = {name: (group.size // 4, group.size // 2, group.size) for name, group in space.searchable.items()}
    policy = AutoSlim(space, [Budget.parse('macs=0.5x', space)], grid)
    widths, losses = [], []

    def train_step(step):
        forward, backward = step.forward, step.backward
        step.forward = lambda w: (widths.append(dict(w)), forward(w))[1]
        step.backward = lambda loss: (losses.append(loss.item()), backward(loss))[1]
        policy.train_step(step)

    network = Training(policy.prepare(model, space), batches, args, epochs, train_step=train_step).run()
    return {'widths': widths, 'losses': losses, 'weights': network.state_dict()}


def _share(rank, world, count=3):
    """This process's share of batches in memory."""
    return DataLoader([(x[rank::world].double(), y[rank::world]) for x, y in tensor_batches(count, GLOBAL_BATCH)], batch_size=None)


def _scored(args, folder):
    """37 images, so that two processes have different numbers of them, and of batches."""
    images = create_dataset('', str(folder / 'train'), search_split=False)
    view = data.View(images, [*range(len(images)), 0])
    model = make().train()
    with torch.no_grad():
        model(torch.randn(64, 3, 32, 32))  # running statistics of some use
    return score(model.eval(), data.loader(view, args, CONFIG, training=False), args)


def _searched(folder, out, *more):
    """The rows of a search as `timm-width search` runs it, without times, which only the first process measures."""
    where = ['--resume', str(out)] if more else ['--output', str(out)]
    args, found = search.parse([
        '--model', MODEL, '--data-dir', str(folder), '--policy', 'autoslim', '--baselines', 'base', 'random', '--random.samples', '1',
        '--grid', '0.25,1', '--fix', 'conv1*', '--budget', 'params=0.5x', '--epochs', '1', '--search-epochs', '1', '-b', '4', '-j', '0',
        '--autoslim.statistics', 'recalibrated', '--device', 'cpu', '--img-size', '32', *where, *more])
    rows, *_ = search.search(args, found)
    distributed.destroy_process_group()
    return [{k: v for k, v in row.items() if not k.startswith('latency')} for row in rows]


def _of_several(rank, world, ports, folder, out):
    """One process of several; writes what the tests below read."""
    torch.set_num_threads(1)
    target.measure_many = partial(target.measure_many, seconds=1e-4, attempts=1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=ports[0])
    args = arguments()
    start_processes(args)
    found = {'slimmed': _slimmed_training(args, _share(rank, world)), 'score': _scored(args, folder)}
    flags = '--model-ema --model-ema-decay 0.8 --reprob 0.5 --grad-accum-steps 2'.split()
    for name, kill in (('unbroken', None), ('resumed', 2)):
        args = arguments(*flags)
        args.rank, args.world_size = rank, world

        def training(args=args):
            return Training(make(), image_batches(folder, args), args, 3, seed=5)

        def after_epoch(t, loss, lr, kill=kill):
            if t.epoch == kill:
                raise Killed

        t = training()
        try:
            t.run(out / name, after_epoch)
        except Killed:
            torch.manual_seed(rank + 100)
            t = training()
            t.run(out / name)
        found[name] = {'network': t.network.state_dict(), 'ema': t.ema.module.state_dict()}
    distributed.destroy_process_group()
    for name, port, flags in (('search', ports[1], ()), ('search_again', ports[2], ('--seeds', '2'))):
        os.environ['MASTER_PORT'] = port
        found[name] = _searched(folder, out / 'search', *flags)
    torch.save(found, out / f'{rank}.pt')


@pytest.fixture(scope='module')
def of_two(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp('processes')
    with ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(3)]
        for s in free:
            s.bind(('127.0.0.1', 0))
        ports = [str(s.getsockname()[1]) for s in free]
    torch.multiprocessing.spawn(_of_several, (2, ports, image_folder, out), nprocs=2)
    return [SimpleNamespace(**torch.load(out / f'{rank}.pt', weights_only=False), out=out) for rank in range(2)]


def test_every_process_draws_the_same_widths(of_two):
    widths = [p.slimmed['widths'] for p in of_two]
    assert widths[0] == widths[1] and len(widths[0]) == 4 * 6
    assert len({tuple(w.values()) for w in widths[0]}) > 10  # the largest, the smallest, and random ones


def test_two_processes_lose_what_one_does_at_the_same_global_batch(of_two):
    """Each loss of each update, and the weights at the end; for a network without batch norm, to float precision."""
    alone = _slimmed_training(arguments(), _share(0, 1))
    losses = np.mean([p.slimmed['losses'] for p in of_two], 0)
    np.testing.assert_allclose(losses, alone['losses'], rtol=2e-6)
    for p in of_two:
        torch.testing.assert_close(p.slimmed['weights'], alone['weights'], rtol=1e-5, atol=1e-7)
    assert alone['widths'] == of_two[0].slimmed['widths'] and np.std(losses[::4]) > 1e-3


def test_processes_share_the_images_that_are_scored(image_folder):
    """None twice, none left out, whatever their number."""
    images = create_dataset('', str(image_folder / 'train'), search_split=False)
    for world in (2, 5):
        shares = []
        for rank in range(world):
            args = arguments()
            args.rank, args.world_size = rank, world
            loader = data.loader(data.View(images), args, CONFIG, training=False)
            shares.append(torch.cat([x for x, _ in loader]))
        assert {len(share) for share in shares} <= {36 // world, -(-36 // world)}
        every = torch.cat(shares)
        assert len(every) == 36 == len(torch.unique(every, dim=0))


def test_two_processes_score_as_one(of_two, image_folder):
    """Each image counts once, though their number is odd; the accuracy is the same number, the loss to float precision."""
    alone = _scored(arguments(), image_folder)
    for p in of_two:
        assert p.score[0] == alone[0]
        assert p.score[1] == pytest.approx(alone[1], rel=1e-6)
    assert of_two[0].score == of_two[1].score and 0 < alone[0] < 100


def test_all_processes_end_with_the_same_network(of_two):
    """With batch norms too, and so do the averaged weights."""
    for what in ('network', 'ema'):
        states = [p.unbroken[what] for p in of_two]
        assert [k for k in states[0] if not torch.equal(states[0][k], states[1][k])] == []


def test_several_processes_resume_as_if_never_killed(of_two):
    for p in of_two:
        for what in ('network', 'ema'):
            states = p.unbroken[what], p.resumed[what]
            assert [k for k in states[0] if not torch.equal(states[0][k], states[1][k])] == []


def test_a_search_by_two_processes_is_one_search(of_two):
    """Both have the same table, and what is saved is in it; resumed for a second seed, it trains what is missing."""
    first, second = of_two
    assert first.search == second.search and [r['network'] for r in first.search] == ['base', 'random', 'found']
    assert first.search_again == second.search_again
    model = timm.create_model(f"local-dir:{first.out / 'search'}", pretrained=True)
    assert sum(p.numel() for p in model.parameters()) == first.search[-1]['params'] <= first.search[0]['params'] / 2
    for before, after in zip(first.search, first.search_again):
        assert before['params'] == after['params'] and after['top1_std'] != ''
    lines = [json.loads(line) for line in (first.out / 'search' / 'search' / 'results.jsonl').read_text().splitlines()]
    assert len(lines) == 2 * len({r['params'] for r in first.search}) and len({key for key, _ in lines}) == len(lines)


def test_a_checkpoint_of_two_processes_is_not_one_of_one(of_two, image_folder):
    checkpoint = of_two[0].out / 'unbroken'
    args = arguments('--model-ema', '--model-ema-decay', '0.8', '--reprob', '0.5', '--grad-accum-steps', '2')
    with pytest.raises(data.UsageError, match='number of processes'):
        Training(make(), image_batches(image_folder, args), args, 3, seed=5).run(checkpoint)
