"""Images per second of train's loop over those of a bare PyTorch loop: same model, loader, optimiser and images.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_train.py

Short epochs of the two alternate; the ratio is that of the least processor times, which other processes on the machine have
disturbed least.
"""
import argparse
import sys
import time
from functools import partial

import timm
import torch
from sklearn.datasets import load_digits
from timm.data import create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.utils import random_seed
from torch.nn import functional as F
from tqdm import tqdm

from timm_width import train
from timm_width.data import Digits, View
from timm_width.engine import make_optimizer, start_processes
from timm_width.task_training import TaskTraining
from timm_width.tasks import make_task

BAR = 0.97
IMAGES = 768  # of an epoch


def digits_loader(model, size, batch):
    data = load_digits()
    config = resolve_data_config({'img_size': size}, model=model)
    return create_loader(View(Digits((data.images * (255 / 16)).astype('uint8'), data.target), range(IMAGES)), config['input_size'], batch, is_training=True,
                         interpolation='bilinear', mean=config['mean'], std=config['std'], num_workers=0, device=torch.device('cpu'))


def bare_epoch(model, loader, optimizer):
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def measure(name, size, batch, rounds):
    """Least seconds of an epoch of each loop, and the images of an epoch."""
    args, _ = train.parse(['--model', name, '--dataset', 'digits', '--device', 'cpu', '-b', str(batch), '--img-size', str(size), '--smoothing', '0',
                           '--lr', '0.01', '--num-classes', '10', '--log-interval', '1000'])
    start_processes(args)
    times = {'bare': [], 'ours': [], 'again': []}  # the bare loop twice, to see what a difference is worth
    random_seed(0)
    nets = {k: timm.create_model(name, num_classes=10) for k in times}
    loaders = {k: digits_loader(nets[k], size, batch) for k in times}
    optimizers = {k: create_optimizer_v2(nets[k], opt='sgd', lr=0.01, momentum=0.9, weight_decay=2e-5) for k in ('bare', 'again')}
    task = make_task(nets['ours'], args)
    ours = TaskTraining(task, loaders['ours'], args, make_optimizer(nets['ours'], args, 300, len(loaders['ours'])))
    bar = tqdm(disable=True)
    calls = {k: partial(bare_epoch, nets[k], loaders[k], o) for k, o in optimizers.items()} | {'ours': partial(ours.run_epoch, bar)}
    for i in range(rounds + 1):
        for k in sorted(calls, reverse=bool(i % 2)):
            start = time.process_time()
            calls[k]()
            if i:  # the first is warm-up
                times[k].append(time.process_time() - start)
    return {k: min(t) for k, t in times.items()}, len(loaders['bare']) * batch


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=12)
    rounds = parser.parse_args().rounds
    worst = 9.
    print(f"{'model':<16}{'size':>6}{'batch':>7}{'bare':>12}{'ours':>12}{'ratio':>8}{'control':>9}   (images per second of processor time)")
    for name, size, batch in ('test_resnet', 32, 16), ('test_resnet', 32, 64), ('resnet10t', 32, 32), ('test_convnext', 32, 32):
        seconds, images = measure(name, size, batch, rounds)
        ratio = seconds['bare'] / seconds['ours']
        worst = min(worst, ratio)
        print(f"{name:<16}{size:>6}{batch:>7}{images / seconds['bare']:>12.0f}{images / seconds['ours']:>12.0f}{ratio:>8.3f}{seconds['bare'] / seconds['again']:>9.3f}", flush=True)
    print(f'worst {worst:.3f}, bar {BAR}')
    return worst < BAR


if __name__ == '__main__':
    sys.exit(main())
