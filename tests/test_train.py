"""train.py: the losses of a loop written out by hand, timm's files, killed and resumed, several processes, and our own flags."""
import csv
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed

import timm_width
from timm_width import train
from timm_width.checkpoints import RANDOM
from timm_width.cli import main as cli
from timm_width.start import build_model

ROOT = Path(__file__).parent.parent
NAMES = ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
SMALL = ['--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu', '--lr', '0.05',
         '--warmup-epochs', '0', '--epochs', '2']


def command(images, out, *flags, name='x'):
    """A short training of test_resnet; later flags win."""
    return [*SMALL, '--data-dir', str(images), '--output', str(out), '--experiment', name, *map(str, flags)]


def run(images, out, *flags, name='x'):
    """Runs it; gives its folder."""
    train.main(command(images, out, *flags, name=name))
    return Path(out) / name


def rows(folder):
    return list(csv.DictReader((folder / 'summary.csv').open()))


def losses(folder):
    return [float(r['train_loss']) for r in rows(folder)]


def load(path):
    with torch.serialization.safe_globals([train.Namespace]):
        return torch.load(path, weights_only=True)


def same(a, b):
    """Names of the tensors that differ between two states."""
    assert a.keys() == b.keys()
    return [k for k in a if not torch.equal(a[k], b[k])]


# -- a loop by hand ----------------------------------------------------------------------------------------------------------

LOOPS = {  # flags -> what they mean to timm's functions
    'sgd': ('', {}),
    'adamw': ('--opt adamw --weight-decay 0.05 --lr 0.002', {'opt': {'opt': 'adamw', 'weight_decay': 0.05, 'lr': 0.002}}),
    'sgd, ema': ('--model-ema --model-ema-decay 0.8', {'ema': {'decay': 0.8}}),
    'adamw, ema': ('--opt adamw --lr 0.002 --model-ema --model-ema-decay 0.8 --model-ema-warmup',
                   {'opt': {'opt': 'adamw', 'lr': 0.002}, 'ema': {'decay': 0.8, 'use_warmup': True}}),
    'lookahead': ('--opt lookahead_sgd', {'opt': {'opt': 'lookahead_sgd'}}),
    'second order': ('--opt adahessian --lr 0.01', {'opt': {'opt': 'adahessian', 'lr': 0.01}, 'second_order': True}),
    'bfloat16': ('--amp --amp-dtype bfloat16', {'dtype': torch.bfloat16}),
    'mixup': ('--mixup 0.4 --cutmix 0.5 --mixup-off-epoch 1', {'mixup': True}),
    'updates, accumulation, clipping': ('--sched-on-updates --grad-accum-steps 3 --clip-grad 0.5',
                                        {'accumulate': 3, 'on_updates': True, 'clip': 0.5}),
    'augmentation': ('--reprob 0.3 --aa rand-m9-mstd0.5 --drop-path 0.2 --vflip 0.1', {
        'aug': {'re_prob': 0.3, 're_mode': 'pixel', 'auto_augment': 'rand-m9-mstd0.5', 'vflip': 0.1}, 'model': {'drop_path_rate': 0.2}}),
}


def by_hand(images, opt=None, ema=None, dtype=None, mixup=False, accumulate=1, on_updates=False, clip=None, aug=None, model=None,
            second_order=False):
    """timm's API, written out: the order in which random numbers are drawn is that of timm's script."""
    random_seed(42, 0)
    net = timm.create_model('test_resnet', num_classes=3, drop_rate=0., **(model or {}))
    config = resolve_data_config({'img_size': 32}, model=net)
    shared = {'mean': config['mean'], 'std': config['std'], 'num_workers': 0, 'device': torch.device('cpu')}
    collate = FastCollateMixup(mixup_alpha=0.4, cutmix_alpha=0.5, label_smoothing=0.1, num_classes=3) if mixup else None
    batches = create_loader(create_dataset('', str(images), split='train', is_training=True), config['input_size'], 8, is_training=True,
                            interpolation='random', scale=(0.08, 1.), ratio=(3 / 4, 4 / 3), collate_fn=collate, **shared, **(aug or {}))
    held = create_loader(create_dataset('', str(images), split='validation'), config['input_size'], 8,
                         interpolation=config['interpolation'], crop_pct=config['crop_pct'], **shared)
    criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(0.1)
    optimizer = create_optimizer_v2(net, **{'opt': 'sgd', 'lr': 0.05, 'momentum': 0.9, 'weight_decay': 2e-5, **(opt or {})})
    averages = ModelEmaV3(net, **ema) if ema else None
    updates = -(-len(batches) // accumulate)
    scheduler, epochs = create_scheduler_v2(optimizer, 'cosine', 2, warmup_epochs=0, warmup_lr=1e-5, step_on_epochs=not on_updates,
                                            updates_per_epoch=updates)
    found, done = [], 0
    for epoch in range(epochs):
        if mixup and epoch >= 1:
            batches.mixup_enabled = False
        net.train()
        seen = []
        for i, (x, y) in enumerate(batches):
            if i % accumulate == 0:
                optimizer.zero_grad()
            with torch.autocast('cpu', dtype, enabled=dtype is not None):
                loss = criterion(net(x), y)
            seen.append(loss.item())
            (loss / min(accumulate, len(batches) - i // accumulate * accumulate)).backward(create_graph=second_order)
            if i % accumulate == accumulate - 1 or i == len(batches) - 1:
                if clip:
                    torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                done += 1
                if averages:
                    averages.update(net, step=done)
                if scheduler:
                    scheduler.step_update(done)
        if hasattr(optimizer, 'sync_lookahead'):
            optimizer.sync_lookahead()
        result = (averages or net).eval()
        with torch.no_grad():
            if averages:
                list(held)  # both networks are validated: a pass over the loader draws a seed
            right = [(result(x).argmax(1) == y) for x, y in held]
        found.append((np.mean(seen), 100 * torch.cat(right).float().mean().item()))
        scheduler.step(epoch + 1)
    return found, net, averages


@pytest.mark.parametrize('name', LOOPS)
def test_losses_and_weights_are_those_of_a_loop_by_hand(name, image_folder, tmp_path):
    flags, meant = LOOPS[name]
    folder = run(image_folder, tmp_path, *flags.split())
    found, net, averages = by_hand(image_folder, **meant)
    np.testing.assert_allclose(losses(folder), [loss for loss, _ in found], rtol=1e-5)
    np.testing.assert_allclose([float(r['eval_top1']) for r in rows(folder)], [top1 for _, top1 in found], rtol=1e-5)
    state = load(folder / 'last.pth.tar')
    torch.testing.assert_close(state['state_dict'], dict(net.state_dict()), rtol=1e-5, atol=1e-6)
    assert ('state_dict_ema' in state) == (averages is not None)
    if averages:
        torch.testing.assert_close(state['state_dict_ema'], dict(averages.module.state_dict()), rtol=1e-5, atol=1e-6)


def test_a_flag_of_zero_is_not_a_flag_left_out():
    """--drop-path 0 takes away what a model has of its own."""
    args, _ = train.parse(['--model', 'swin_tiny_patch4_window7_224', '--drop-path', '0', '--device', 'cpu'])
    with torch.device('meta'):
        model = build_model(args, 3)
    assert not [m for m in model.modules() if type(m).__name__ == 'DropPath' and m.drop_prob > 0]


def test_recovery_checkpoints_count_updates(image_folder, tmp_path):
    """With gradients accumulated over two batches, every second update is the fourth batch; none because an epoch ends."""
    folder = run(image_folder, tmp_path, '-b', 2, '--grad-accum-steps', 2, '--recovery-interval', 2, '--epochs', 1)
    found = sorted(int(p.name.split('-')[2].split('.')[0]) for p in folder.glob('recovery-*'))
    assert found == [5, 7]  # 36 images are 18 batches and 9 updates; the last two are kept


# -- files -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def finished(image_folder, tmp_path_factory):
    """A run of three epochs."""
    return run(image_folder, tmp_path_factory.mktemp('finished'), '--epochs', 3, '--checkpoint-hist', 2, '--save-epochs', 1,
               '--recovery-interval', 2, '--model-ema', '--reprob', 0.3)


def test_files_are_timms(finished):
    assert {p.name for p in finished.iterdir()} >= {'args.yaml', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar', 'milestone-1.pth.tar'}
    assert len(list(finished.glob('checkpoint-*.pth.tar'))) == 2 and list(finished.glob('recovery-*'))
    assert not list(finished.glob('*.saving')) and not (finished / 'tmp.pth.tar').exists()
    table = rows(finished)
    assert list(table[0]) == NAMES and [r['epoch'] for r in table] == ['0', '1', '2']
    state = load(finished / 'last.pth.tar')
    assert set(state) == {'epoch', 'arch', 'state_dict', 'state_dict_ema', 'optimizer', 'args', 'metric', 'version', 'saver', RANDOM}
    assert (state['epoch'], state['arch'], state['version']) == (2, 'test_resnet', 2)
    best = load(finished / 'model_best.pth.tar')
    assert best['metric'] == max(float(r['eval_top1']) for r in table)


def test_own_flags_left_alone_leave_no_trace(finished, image_folder, tmp_path):
    said = yaml.safe_load((finished / 'args.yaml').read_text())
    own = {'widths', 'inherit', 'importance', 'finetune_from', 'teacher_img_size', 'latency_backend', 'latency_precision', 'latency_batch',
           'save_pretrained', 'push_to_hub'}
    assert not own & set(said) and said['batch_size'] == 8 and said['lr'] == 0.05 and said['data'] is None
    assert not own & set(vars(load(finished / 'last.pth.tar')['args']))
    folder = run(image_folder, tmp_path, '--epochs', 1, '--save-pretrained', tmp_path / 'saved')
    assert yaml.safe_load((folder / 'args.yaml').read_text())['save_pretrained'] == str(tmp_path / 'saved')


def test_timm_reads_the_checkpoints(finished):
    model = timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(finished / 'model_best.pth.tar'))
    assert not same(dict(model.state_dict()), load(finished / 'model_best.pth.tar')['state_dict_ema'])


def test_args_yaml_repeats_the_run(finished, tmp_path, capsys):
    train.main(['-c', str(finished / 'args.yaml'), '--output', str(tmp_path)])
    assert losses(tmp_path / 'x') == losses(finished)
    out = capsys.readouterr().out
    results = json.loads(out[out.index('--result') + len('--result'):])
    assert len(results) == 3 and results[-1]['validation']['top1'] == max(r['validation']['top1'] for r in results)


def test_folder_has_the_time_the_model_and_the_size(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*SMALL, '--data-dir', str(image_folder), '--epochs', '1'])
    (folder,) = (tmp_path / 'output' / 'train').iterdir()
    assert folder.name[8] == '-' and folder.name[15:] == '-test_resnet-32'


def test_without_validation_the_loss_decides(image_folder, tmp_path):
    folder = run(image_folder, tmp_path, '--val-split', '')
    assert list(rows(folder)[0]) == ['epoch', 'train_loss', 'lr']
    assert load(folder / 'model_best.pth.tar')['metric'] == min(losses(folder))


def test_epochs_without_validation_keep_the_columns(image_folder, tmp_path):
    folder = run(image_folder, tmp_path, '--epochs', 4, '--val-interval', 3, '--save-epochs', 1)
    assert [bool(r['eval_top1']) for r in rows(folder)] == [True, False, True, True]


# -- killed and resumed ------------------------------------------------------------------------------------------------------

RESUMED = {  # everything that has a state of its own, or draws
    'sgd': '--reprob 0.5 --drop-path 0.2 --drop 0.1',
    'adamw, ema, mixup': '--opt adamw --lr 0.002 --model-ema --model-ema-decay 0.8 --mixup 0.4 --cutmix 0.5 --sched-on-updates',
    'accumulation, aa, averages later': '--grad-accum-steps 3 --aa rand-m9-mstd0.5 --sched step --decay-epochs 1 --lr-noise 0.1 0.9',
    'no prefetcher': '--no-prefetcher --mixup 0.3 --sched wsd --decay-epochs 1',
}


class Killed(BaseException):
    pass


@pytest.mark.parametrize('name', RESUMED)
def test_killed_in_the_middle_of_an_epoch_and_resumed_it_is_the_unbroken_run_bit_for_bit(name, image_folder, tmp_path, monkeypatch):
    flags = ['--epochs', 4, '--resume', 'auto', *RESUMED[name].split()]
    whole = run(image_folder, tmp_path, *flags, name='whole')
    update = train.TaskTraining._update
    for kill_at in (3, 10):
        def dying(self, kill_at=kill_at):
            update(self)
            if self.updates >= kill_at * self.updates_per_epoch / 4:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(train.TaskTraining, '_update', dying)
            with pytest.raises(Killed):
                run(image_folder, tmp_path, *flags, name='killed')
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
    killed = run(image_folder, tmp_path, *flags, name='killed')
    assert (whole / 'summary.csv').read_text() == (killed / 'summary.csv').read_text()
    states = [load(folder / 'last.pth.tar') for folder in (whole, killed)]
    for key in {'state_dict', 'state_dict_ema'} & set(states[0]):
        assert not same(states[0][key], states[1][key])
    assert {p.name for p in whole.iterdir()} == {p.name for p in killed.iterdir()}
    assert states[0]['saver'] == states[1]['saver']


def forked(functions):
    """Runs functions in processes of their own, which need not import anything again; gives their exit codes."""
    context = multiprocessing.get_context('fork')
    started = [context.Process(target=f) for f in functions]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


def test_killed_by_the_system_and_resumed(image_folder, tmp_path):
    """kill -9 of a process, in the middle of an epoch."""
    flags = ['--epochs', 3, '--resume', 'auto', '--reprob', 0.4]
    whole = run(image_folder, tmp_path, *flags, name='whole')

    def dying(self, update=train.TaskTraining._update):
        update(self)
        if self.updates > self.updates_per_epoch + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def child():
        train.TaskTraining._update = dying
        run(image_folder, tmp_path, *flags, name='killed')

    (code,) = forked([child])
    assert code == -signal.SIGKILL and [r['epoch'] for r in rows(tmp_path / 'killed')] == ['0']
    killed = run(image_folder, tmp_path, *flags, name='killed')
    assert not same(*(load(f / 'last.pth.tar')['state_dict'] for f in (whole, killed)))


def test_resumed_with_workers_the_images_come_in_the_same_order(image_folder, tmp_path, monkeypatch):
    seen, prepare = {}, train.TaskTraining.prepare

    def note(self, images, targets):
        seen.setdefault(self.epoch, []).extend(targets.tolist())
        return prepare(self, images, targets)

    monkeypatch.setattr(train.TaskTraining, 'prepare', note)
    flags = ['--epochs', 4, '-j', 1, '--resume', 'auto', '--val-interval', 2]
    run(image_folder, tmp_path, *flags, name='whole')
    whole, save = dict(seen), train.Checkpoints.save

    def dying(self, epoch, metric):
        save(self, epoch, metric)
        raise Killed

    monkeypatch.setattr(train.Checkpoints, 'save', dying)
    for epoch in range(4):
        seen.clear()
        with pytest.raises(Killed):
            run(image_folder, tmp_path, *flags, name='parts')
        assert seen == {epoch: whole[epoch]}


def test_a_checkpoint_of_another_model_is_one_message(finished, image_folder, tmp_path, capsys):
    flags = command(image_folder, tmp_path, '--resume', finished / 'last.pth.tar', '--model', 'test_convnext')
    assert cli(['train', *flags]) == 2
    err = capsys.readouterr().err
    assert 'is not a checkpoint of this model' in err and len(err.splitlines()) == 1 and not any(tmp_path.iterdir())


# -- several processes -------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def in_two(images, out, *flags, name):
    """What torchrun starts, in forked processes."""
    port = free_port()

    def child(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        run(images, out, *flags, name=name)

    assert forked([partial(child, rank) for rank in range(2)]) == [0, 0]
    return Path(out) / name


def torchrun(images, out, *flags, name, processes=2):
    port = free_port()
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', str(processes), '--master_port', port,
         str(ROOT / 'train.py'), *command(images, out, *flags, name=name)],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return Path(out) / name


PLAIN = ['--no-aug', '--smoothing', '0', '-b', '4']


def halves(images, model, config, batch, epochs=1):
    """Each half by itself: the batches that two processes get."""
    found = []
    for rank in range(2):
        dataset = create_dataset('', str(images), split='train', is_training=True)
        loader = create_loader(dataset, config['input_size'], batch, is_training=True, no_aug=True, interpolation=config['interpolation'],
                               mean=config['mean'], std=config['std'], num_workers=0, device=torch.device('cpu'))
        sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=2, rank=rank)
        order = [list(sampler) for e in range(epochs) if sampler.set_epoch(e) is None]
        found.append([torch.utils.data.default_collate([loader.dataset[i] for i in o[j:j + batch]]) for o in order
                      for j in range(0, len(o) - batch + 1, batch)])
        mean, std = (torch.tensor(config[k]).view(1, 3, 1, 1) * 255 for k in ('mean', 'std'))
        found[-1] = [((x.float() - mean) / std, y) for x, y in found[-1]]
    return found


@pytest.mark.parametrize('name', ['test_convnext', 'test_resnet', 'searched'])
def test_two_processes_train_as_one_does_on_both_halves(name, image_folder, tmp_path):
    """Without batch norm, a step on the whole batch; with it, each half by itself and gradients averaged."""
    flags = [*PLAIN, '--epochs', 1, '--sched', 'none']
    if name == 'searched':
        timm_width.save(timm.create_model('test_resnet_width', num_classes=3, widths={'conv1.0': 8}), tmp_path / 'saved', weights=False)
        flags += ['--widths', tmp_path / 'saved']
    start = torchrun if name == 'searched' else in_two
    folder = start(image_folder, tmp_path, *flags, *([] if name == 'searched' else ['--model', name]), name='two')
    random_seed(42, 0)
    base = 'test_resnet' if name == 'searched' else name
    net = timm.create_model(base + '_width' * (name == 'searched'), num_classes=3, drop_rate=0.,
                            **({'widths': {'conv1.0': 8}} if name == 'searched' else {}))
    config = resolve_data_config({'img_size': 32}, model=net)
    optimizer = create_optimizer_v2(net, opt='sgd', lr=0.05, momentum=0.9, weight_decay=2e-5)
    seen = []
    for parts in zip(*halves(image_folder, net, config, 4)):
        net.train()
        optimizer.zero_grad()
        if name == 'test_convnext':
            x, y = (torch.cat(t) for t in zip(*parts))
            loss = torch.nn.functional.cross_entropy(net(x), y)
            loss.backward()
            seen.append(loss.item())
        else:
            for x, y in parts:
                loss = torch.nn.functional.cross_entropy(net(x), y)
                (loss / 2).backward()
                seen.append(loss.item())
        optimizer.step()
    assert len(seen) >= 4 and losses(folder) == pytest.approx([np.mean(seen)], rel=1e-4)
    state = load(folder / 'last.pth.tar')
    own = dict(net.named_parameters())
    torch.testing.assert_close({k: state['state_dict'][k] for k in own}, {k: p.detach() for k, p in own.items()}, rtol=1e-3, atol=1e-5)
    assert len(state[RANDOM]) == 2


# -- widths ------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def space():
    with torch.device('meta'):
        return timm_width.trace(timm.create_model('test_resnet', num_classes=3), (3, 32, 32))


@pytest.fixture(scope='module')
def config(space, tmp_path_factory):
    """A folder as a search writes it before anything is trained."""
    widths = {name: space[name].unit * max(1, space[name].steps // 2) for name in space.searchable}
    folder = tmp_path_factory.mktemp('config')
    timm_width.save(timm.create_model('test_resnet_width', num_classes=3, widths=widths), folder, {'policy': 'mine'}, weights=False)
    return folder


@pytest.fixture(scope='module')
def base(image_folder, tmp_path_factory):
    """A trained base: its run, and what it saved."""
    out = tmp_path_factory.mktemp('base')
    return run(image_folder, out, '--save-pretrained', out / 'saved'), out / 'saved'


def test_widths_make_the_searched_model_of_the_base(config, image_folder, tmp_path, capsys):
    """From a folder or a file; what is saved is timm's, knows how it was found, and gives the metrics of the last epoch."""
    widths = timm_width.load_spec(config).widths
    folder = run(image_folder, tmp_path, '--widths', config / 'config.json', '--save-pretrained', tmp_path / 'saved',
                 '--latency-backend', 'torch')
    assert 'test_resnet_width' in capsys.readouterr().out
    saved = timm.create_model(f'local-dir:{tmp_path}/saved', pretrained=True)
    spec = timm_width.load_spec(tmp_path / 'saved')
    assert spec.widths == widths and spec.provenance['policy'] == 'mine'
    assert spec.provenance['top1'] == pytest.approx(float(rows(folder)[-1]['eval_top1']), abs=0.01)
    assert not same(dict(saved.state_dict()), load(folder / 'last.pth.tar')['state_dict'])
    assert 'local-dir:' in (tmp_path / 'saved' / 'README.md').read_text()
    again = run(image_folder, tmp_path, '--model', f'local-dir:{tmp_path}/saved', '--pretrained', '--lr', 0, '--val-interval', 1,
                '--epochs', 1, name='again')
    assert losses(again) and yaml.safe_load((folder / 'args.yaml').read_text())['widths'] == str(config / 'config.json')


def test_plain_models_are_saved_as_timm_does(base):
    folder, saved = base
    model = timm.create_model(f'local-dir:{saved}', pretrained=True)
    assert not same(dict(model.state_dict()), load(folder / 'last.pth.tar')['state_dict'])
    assert json.loads((saved / 'config.json').read_text())['architecture'] == 'test_resnet'
    assert model.pretrained_cfg['input_size'] == (3, 32, 32)


@pytest.mark.parametrize('importance', [None, 'l1'])
def test_inherit_cuts_the_bases_channels(importance, base, config, space, image_folder, tmp_path):
    """With a learning rate of zero the weights stay what the cut gave."""
    folder, saved = base
    flags = ['--importance', importance] if importance else []
    found = run(image_folder, tmp_path, '--widths', config, '--inherit', folder / 'last.pth.tar', *flags, '--lr', 0, '--epochs', 1,
                '--warmup-epochs', 0, '--weight-decay', 0)
    model = timm.create_model(f'local-dir:{saved}', pretrained=True)
    timm_width.resize(model, timm_width.trace(model), timm_width.load_spec(config).widths, importance=importance)
    state, expected = load(found / 'last.pth.tar')['state_dict'], dict(model.named_parameters())
    assert not [k for k, p in expected.items() if not torch.equal(p, state[k])]


@pytest.mark.parametrize('grown', [False, True])
def test_inherit_takes_the_slices_of_a_searchs_shared_network(grown, space, image_folder, tmp_path):
    """At the grid's largest widths, which may be more than the base's."""
    from timm_width.engine import Training
    model = timm.create_model('test_resnet', num_classes=3)
    names = list(space.searchable)
    wide = {name: space[name].size * 3 // 2 for name in names[:3]} if grown else {}
    timm_width.resize(model, space, wide)
    network = timm_width.Supernet(model, timm_width.trace(model, (3, 32, 32)))
    flags, _ = train.parse(command(image_folder, tmp_path))
    batches = torch.utils.data.DataLoader([(torch.randn(4, 3, 32, 32), torch.arange(4) % 3)] * 2, batch_size=None)
    Training(network, batches, flags, 1, train_step=lambda s: s.backward(s.loss(s.forward()))).run(tmp_path / 'search.pth.tar')
    widths = {name: space[name].unit * max(1, space[name].steps // 2) for name in space.searchable}
    widths[names[0]] = wide.get(names[0], space[names[0]].size)
    timm_width.save(timm.create_model('test_resnet_width', num_classes=3, widths=widths), tmp_path / 'config', weights=False)
    folder = run(image_folder, tmp_path, '--widths', tmp_path / 'config', '--inherit', tmp_path / 'search.pth.tar', '--lr', 0,
                 '--epochs', 1, '--weight-decay', 0)
    found = timm.create_model('test_resnet_width', num_classes=3, widths=widths,
                              checkpoint_path=str(folder / 'last.pth.tar')).eval()
    x = torch.randn(2, 3, 32, 32)
    network.eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for net in (found, network):  # the training has changed the running statistics of one of them
            for m in net.modules():
                if isinstance(m, torch.nn.BatchNorm2d):
                    m.reset_running_stats()
        assert torch.equal(found(x), network(x, widths)) and found(images).shape == (4, 3)


def test_finetune_from_a_folder_or_a_checkpoint(base, image_folder, tmp_path, capsys):
    """Another number of classes gets a new classifier; the folder is --model where that is not said."""
    folder, saved = base
    flags = ['--lr', '0', '--epochs', '1', '--weight-decay', '0']
    state = load(folder / 'last.pth.tar')['state_dict']
    for name, given in {'checkpoint': ['--finetune-from', folder / 'last.pth.tar'], 'folder': ['--finetune-from', saved]}.items():
        found = load(run(image_folder, tmp_path, *given, *flags, name=name) / 'last.pth.tar')
        assert all(torch.equal(found['state_dict'][k], state[k]) for k in state if 'running' not in k and 'num_batches' not in k)
    found = load(run(image_folder, tmp_path, '--finetune-from', saved, '--num-classes', 4, *flags, name='new') / 'last.pth.tar')
    assert found['state_dict']['fc.weight'].shape[0] == 4 and torch.equal(found['state_dict']['conv1.0.weight'], state['conv1.0.weight'])
    assert 'the classifier is new' in capsys.readouterr().out
    argv = [f for f in command(image_folder, tmp_path, '--finetune-from', saved) if f not in ('--model', 'test_resnet')]
    assert train.parse(argv)[0].model == f'local-dir:{saved}'


BAD = {
    'widths of another': (['--widths', 'CONFIG', '--model', 'resnet18'], "are those of test_resnet, and --model is 'resnet18'"),
    'no widths': (['--widths', 'nowhere'], '--widths: nowhere: there is no such file'),
    'inherit of another': (['--inherit', 'BASE', '--model', 'test_convnext'], 'is no checkpoint of test_convnext'),
    'inherit of nothing': (['--inherit', 'nowhere'], "--inherit 'nowhere' is not there"),
    'finetune of another': (['--finetune-from', 'BASE', '--model', 'test_convnext'], 'has weights of another model'),
    'finetune of other widths': (['--finetune-from', 'BASE', '--widths', 'CONFIG'], 'has weights of other shapes than the model'),
    'both': (['--finetune-from', 'BASE', '--inherit', 'BASE'], 'both say where weights come from'),
    'importance': (['--importance', 'l1'], '--importance ranks the channels of weights that are cut'),
    'stop': (['--stop-epoch', '3'], '--stop-epoch must be from 1 to the 2 epochs'),
    'metric': (['--eval-metric', 'map'], '--eval-metric must be one of loss, top1, top5, not map'),
    'classes': (['--num-classes', '2'], 'the images have 3 classes, the model 2: give --num-classes 3'),
    'batch': (['-b', '64'], '36 training images are less than a batch of 64'),
    'odd': (['-b', '7', '--mixup', '0.1'], 'images are mixed in pairs'),
    'no val': (['--val-split', 'test'], 'has no folder test/'),
    'resume': (['--resume', 'nowhere'], "--resume 'nowhere': there is no such file"),
    'clip': (['--clip-mode', 'x'], "--clip-mode must be norm or value or agc, not 'x'"),
    'scale': (['--scale', '0.5'], '--scale needs two numbers'),
    'teacher': (['--kd-model-name', 'resnet1B'], "unknown model 'resnet1B'"),
    'kd loss': (['--kd-model-name', 'local-dir:SAVED', '--kd-loss-type', 'l2'], "Unsupported loss_type 'l2'"),
    'token': (['--kd-model-name', 'local-dir:SAVED', '--kd-distill-type', 'token'], "does not have 'set_distilled_training'"),
    'naflex': (['--naflex-loader'], 'needs a NaFlex model'),
    'opt': (['--opt', 'nonesuch'], 'nonesuch'),
    'labels': (['--task', 'multilabel'], 'a folder of images gives each one class'),
    'no folder': (['--data-dir', 'nowhere'], "there is no folder 'nowhere'"),
    'save to a file': (['--save-pretrained', 'BASE'], 'is a file: give a folder'),
    'script': (['--torchscript', '--latency-backend', 'torch'], '--torchscript does not go with --latency-backend'),
    'fp16 on a CPU': (['--latency-backend', 'torch', '--latency-precision', 'fp16'], 'fp16 on CUDA only'),
    'batch of nothing': (['--latency-batch', '4'], 'need --latency-backend'),
    'remode': (['--remode', 'nope'], "--remode must be const or rand or pixel, not 'nope'"),
    'module': (['--device-modules', 'nonesuch'], "--device-modules 'nonesuch' cannot be imported"),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_message_and_leaves_nothing(name, base, config, image_folder, tmp_path, capsys):
    flags, says = BAD[name]
    known = {'CONFIG': config, 'BASE': base[0] / 'last.pth.tar', 'SAVED': base[1]}
    flags = [str(known.get(f, f)) for f in flags]
    flags = [f.replace('SAVED', str(base[1])) for f in flags]
    assert cli(['train', *command(image_folder, tmp_path / 'out', *flags)]) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1 and not (tmp_path / 'out').exists()


def test_push_to_hub_is_that_of_the_command(config, image_folder, tmp_path, monkeypatch):
    """Of a width model: with how it was found and what this training made of it, not with what another one did."""
    from timm_width import hub, output
    pushed = []

    def push(model, repo, provenance, data_config):
        pushed.append((repo, provenance))
        timm_width.save(model, tmp_path / 'hub', provenance, data_config=data_config)
        return hub.Pushed(repo, 'url')
    monkeypatch.setattr(output, 'push_to_hub', push)
    said = json.loads((config / 'config.json').read_text())
    said['timm_width'] |= {'top1': 99., 'baseline': {'base': {'network': 'base', 'macs': 5, 'top1': 98., 'top1_std': ''}}}
    found = tmp_path / 'found'
    found.mkdir()
    (found / 'config.json').write_text(json.dumps(said))
    folder = run(image_folder, tmp_path, '--widths', found, '--epochs', 1, '--push-to-hub', 'me/mine')
    [(repo, told)] = pushed
    top1 = float(list(csv.DictReader((folder / 'summary.csv').open()))[-1]['eval_top1'])
    assert repo == 'me/mine' and told == {
        'policy': 'mine', 'inherited': None, 'baseline': {'base': {'network': 'base', 'macs': 5}}, 'train': {'epochs': 1},
        'data': image_folder.name, 'top1': pytest.approx(top1, abs=0.01)}
    model = timm.create_model(f'local-dir:{tmp_path}/hub', pretrained=True)
    assert not same(dict(model.state_dict()), load(folder / 'last.pth.tar')['state_dict'])


def test_push_to_hub_of_a_plain_model_is_timms(image_folder, tmp_path, monkeypatch):
    from timm_width import output
    pushed = []
    monkeypatch.setattr(output, 'push_to_hf_hub', lambda model, repo, **kwargs: pushed.append((type(model), repo, kwargs)))
    run(image_folder, tmp_path, '--epochs', 1, '--push-to-hub', 'me/plain')
    [(kind, repo, kwargs)] = pushed
    assert repo == 'me/plain' and kwargs['safe_serialization'] is True and 'transformers' not in kwargs['model_card']['tags']


# -- tasks -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['logit', 'feature', 'logit at 40'])
def test_a_searched_model_learns_from_its_base(kind, base, config, image_folder, tmp_path):
    """Distillation as timm does it, by hand; the teacher may see the images larger."""
    flags = ['--kd-model-name', f'local-dir:{base[1]}', '--kd-distill-type', kind.split()[0], '--task-loss-weight', 0.3,
             '--kd-temperature', 2, '--no-aug', '--epochs', 1, '--widths', config]
    flags += ['--teacher-img-size', 40] if 'at' in kind else []
    folder = run(image_folder, tmp_path, *flags)

    random_seed(42, 0)
    net = timm.create_model('test_resnet_width', num_classes=3, widths=timm_width.load_spec(config).widths)
    data = resolve_data_config({'img_size': 32}, model=net)
    batches = create_loader(create_dataset('', str(image_folder), split='train'), data['input_size'], 8, is_training=True, no_aug=True,
                            interpolation=data['interpolation'], mean=data['mean'], std=data['std'], num_workers=0, device=torch.device('cpu'))
    teacher = timm.create_model(f'local-dir:{base[1]}', pretrained=True).eval()
    bridge = torch.nn.Linear(net.num_features, teacher.num_features) if kind == 'feature' else torch.nn.Identity()
    optimizer = create_optimizer_v2(torch.nn.ModuleList([net, bridge]), opt='sgd', lr=0.05, momentum=0.9, weight_decay=2e-5)
    net.train(), bridge.train()
    seen = []
    for x, y in batches:
        with torch.no_grad():
            z = torch.nn.functional.interpolate(x, size=(40, 40), mode='bicubic', antialias=True) if 'at' in kind else x
            taught = teacher.forward_head(teacher.forward_features(z), pre_logits=kind == 'feature')
        features = net.forward_head(net.forward_features(x), pre_logits=True)
        logits = net.get_classifier()(features)
        if kind == 'feature':
            extra = torch.nn.functional.mse_loss(bridge(features), taught)
        else:
            extra = 4 * torch.nn.functional.kl_div((logits / 2).log_softmax(-1), (taught / 2).log_softmax(-1), log_target=True,
                                                   reduction='batchmean')
        loss = 0.3 * LabelSmoothingCrossEntropy(0.1)(logits, y) + 0.7 * extra
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert losses(folder) == pytest.approx([np.mean(seen)], rel=1e-4)


def test_multilabel(tmp_path):
    """Generated labels: properties of the digits, each right or wrong by itself."""
    flags = ['--dataset', 'digits', '--model', 'test_resnet', '--task', 'multilabel', '--device', 'cpu', '--epochs', '2',
             '--warmup-epochs', '0', '--lr', '0.1', '--output', str(tmp_path), '--experiment', 'x']
    train.main(flags)
    table = rows(tmp_path / 'x')
    assert {'eval_map', 'eval_micro_f1', 'eval_sample_f1'} <= set(table[0]) and float(table[-1]['eval_map']) > 60
    said = yaml.safe_load((tmp_path / 'x' / 'args.yaml').read_text())
    state = load(tmp_path / 'x' / 'model_best.pth.tar')
    assert (said['smoothing'], state['args'].smoothing) == (0.1, 0.) and state['args'].eval_metric == 'map'  # as given, as used
    assert state['metric'] == max(float(r['eval_map']) for r in table) and state['state_dict']['fc.weight'].shape[0] == 5


# -- every flag --------------------------------------------------------------------------------------------------------------

MATRIX = {  # what is trained for an epoch; a dagger marks those that a short test run has, too
    'positional folder': 'IMAGES --data-dir', 'class map': '--class-map MAP', 'grey': '--in-chans 1 --input-img-mode L',
    'grey by itself \u2020': '--in-chans 1', 'input size': '--input-size 3 24 40 --img-size', 'normalised by hand': '--mean 0.5 --std 0.2 0.3 0.2',
    'interpolations': '--interpolation bicubic --train-interpolation bilinear --crop-pct 0.8', 'validation batch': '-vb 5',
    'channels last, checkpointing': '--channels-last --grad-checkpointing', 'head': '--head-init-scale 0.1 --head-init-bias -2 --gp max',
    'overlay': '--pretrained-cfg-overlay crop_pct=0.5 --model-kwargs drop_rate=0.1', 'fast norm': '--fast-norm --model test_convnext',
    'torchscript \u2020': '--torchscript --model-ema', 'compile \u2020': '--torchcompile eager --model-ema', 'dtype': '--model-dtype bfloat16',
    'amp': '--amp --amp-dtype bfloat16 --synchronize-step', 'workers': '-j 1 --pin-mem --worker-seeding part', 'multi epochs': '-j 1 --use-multi-epochs-loader',
    'lamb': '--opt lamb --opt-eps 1e-6 --opt-betas 0.9 0.99', 'rmsprop': '--opt rmsproptf --momentum 0.5 --opt-kwargs decoupled_decay=True',
    'layer decay': '--opt adamw --layer-decay 0.7 --layer-decay-min-scale 0.1 --layer-decay-no-opt-scale 0.2', 'agc': '--clip-grad 0.1 --clip-mode agc',
    'by value': '--clip-grad 0.1 --clip-mode value', 'tanh': '--sched tanh --lr-cycle-limit 2 --lr-cycle-mul 2 --lr-cycle-decay 0.3',
    'poly': '--sched poly --lr-k-decay 0.5 --decay-rate 2 --cooldown-epochs 1', 'multistep': '--sched multistep --decay-milestones 1',
    'wsd': '--sched wsd --decay-epochs 1 --lr-decay-fn linear', 'rsqrt': '--sched rsqrt --warmup-epochs 1 --epochs 3 --decay-epochs 1 --lr-stable-timescale 2',
    'plateau \u2020': '--sched plateau --patience-epochs 0', 'none': '--sched none', 'constant': '--sched constant --warmup-epochs 1', 'prefix': '--warmup-epochs 1 --warmup-prefix',
    'noise': '--lr-noise 0.1 0.9 --lr-noise-pct 0.5 --lr-noise-std 2', 'lr base': '--lr-base 0.2 --lr-base-size 16 --lr-base-scale sqrt --lr',
    'colours': '--color-jitter 0.2 --color-jitter-prob 0.5 --grayscale-prob 0.3 --gaussian-blur-prob 0.3', 'no aug': '--no-aug', 'crop mode': '--train-crop-mode rkrr',
    'erasing': '--reprob 0.5 --remode const --recount 2 --resplit', 'splits, jsd \u2020': '--aug-splits 3 --jsd-loss --split-bn --aa augmix-m3 --resplit',
    'splits': '--aug-splits 2 --aa rand-m3 --no-prefetcher', 'no prefetcher \u2020': '--no-prefetcher --mixup 0.2 --mixup-mode elem --reprob 0.2', 'pairs': '--cutmix-minmax 0.2 0.6 --mixup-mode pair',
    'half': '--mixup 0.3 --mixup-mode half --mixup-prob 0.5 --mixup-switch-prob 0.1', 'bce': '--bce-loss --bce-sum --bce-target-thresh 0.2 --mixup 0.1',
    'bce weights': '--loss bce --bce-pos-weight 2 --loss-class-weight 1,2,3', 'poly loss': '--loss poly --poly-epsilon 1', 'asl': '--loss asl',
    'drops': '--drop 0.2 --drop-connect 0.1', 'drop block': '--model resnet10t --drop-block 0.1', 'batch norm': '--bn-momentum 0.2 --bn-eps 0.01 --model test_efficientnet',
    'ema on the cpu \u2020': '--model-ema --model-ema-force-cpu --model-ema-warmup', 'tta': '--tta 2', 'images': '--save-images --log-interval 1', 'wandb': '--log-wandb --wandb-tags a b',
    'sizes \u2020': '--train-img-sizes 24 32 --train-batch-sizes 12 6 --train-size-probs 1 2 --variable-batch-loss-scale sqrt',
    'growing sizes': '--train-img-sizes 24 32 --train-size-schedule progressive --train-size-schedule-spread 0.3 --train-size-random-mix 0.2',
    'batches': '--train-batches-per-epoch 3', 'naflex \u2020': '--naflex-loader --model naflexvit_base_patch16_gap --model-kwargs patch_size=8 embed_dim=32 depth=1 num_heads=2 --naflex-train-seq-lens 9 16 --naflex-max-seq-len 16 --mixup 0.2',
    'patch sizes': '--naflex-loader --model naflexvit_base_patch16_gap --model-kwargs patch_size=8 embed_dim=32 depth=1 num_heads=2 enable_patch_interpolator=True --naflex-patch-sizes 8 16 --naflex-patch-size-probs 1 2 --naflex-train-seq-lens 4 9 --naflex-max-seq-len 9 --naflex-loss-scale sqrt',
    'loss as metric': '--eval-metric loss', 'efficientnet \u2020': '--model test_efficientnet --opt adamw --lr 0.001', 'byobnet': '--model test_byobnet --model-ema', 'vit': '--model test_vit --img-size 160',
    'no optimiser': '--resume BASE --no-resume-opt --start-epoch 1', 'initial checkpoint': '--initial-checkpoint BASE', 'pretrained path': '--pretrained --pretrained-path WEIGHTS',
    'device modules': '--device-modules json csv', 'local rank': '--local_rank 0 --no-ddp-bb --dist-bn broadcast --sync-bn',
    'repeats': '--epoch-repeats 2', 'samples': '--train-num-samples 8 --val-num-samples 8',
}


QUIET = {  # these say where, how or how much is told, not what comes out; the last two are for datasets that are read as streams
    'positional folder', 'ema on the cpu \u2020', 'images', 'wandb', 'loss as metric', 'device modules', 'local rank', 'repeats',
    'samples'}


@pytest.fixture(scope='module')
def plain_rows(image_folder, tmp_path_factory):
    """What comes out without any of the flags."""
    return rows(run(image_folder, tmp_path_factory.mktemp('plain')))


@pytest.mark.parametrize('name', [n if '\u2020' in n else pytest.param(n, marks=pytest.mark.slow) for n in MATRIX])
def test_flags_train(name, base, plain_rows, image_folder, tmp_path):
    """They train, and losses or learning rates are others than without them, but for those that are QUIET."""
    (tmp_path / 'map.txt').write_text('red\ngreen\nblue\n')
    known = {'IMAGES': image_folder, 'MAP': tmp_path / 'map.txt', 'BASE': base[0] / 'last.pth.tar', 'WEIGHTS': base[1] / 'model.safetensors'}
    flags = [str(known.get(f, f)) for f in MATRIX[name].split()]
    argv = command(image_folder, tmp_path)
    for off in ('--data-dir', '--img-size', '--lr'):
        if flags[-1] == off:  # replaced, not given again
            flags.pop(), argv.__delitem__(slice(argv.index(off), argv.index(off) + 2))
    train.main([*argv, *flags])
    assert losses(tmp_path / 'x') and np.isfinite(losses(tmp_path / 'x')).all()
    assert float(rows(tmp_path / 'x')[-1]['eval_loss']) > 0
    assert (rows(tmp_path / 'x') == plain_rows) == (name in QUIET)


def test_the_matrix_has_every_flag():
    """Those that are not in it are in the tests above."""
    text = ' '.join([*MATRIX.values(), Path(__file__).read_text(), (Path(__file__).parent / 'test_arguments.py').read_text()])
    frozen = json.loads((Path(__file__).parent / 'train_flags.json').read_text())
    elsewhere = {  # readers of other packages; other losses (test_arguments.py); wandb is not here; several processes
        'dataset_download', 'dataset_trust_remote_code', 'input_key', 'target_key', 'train_split', 'fuser', 'torchcompile_mode', 'wandb_project',
        'wandb_resume_id', 'aug_repeats', 'naflex_patchify_channels_first', 'multilabel_threshold', 'class_stats', 'loss_weight_power', 'poly_gamma',
        'distill_loss_weight', 'kd_student_feature_dim', 'kd_teacher_feature_dim', 'kd_token_distill_type', 'layer_decay', 'seed', 'min_lr', 'warmup_lr',
        'hflip', 'ratio'}
    missing = {k for k, v in frozen.items() if k != 'data' and not any(f"{f} " in text or f"'{f}'" in text or f'{f}\'' in text for f in v['flags'])}
    assert missing <= elsewhere
