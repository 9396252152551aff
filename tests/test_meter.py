"""The MACs of a search: of supernets those of the widths, of other networks those that torch counts; thrice with gradients."""
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import timm_width
from tests.test_holdout import ARGS
from timm_width import data, engine, search
from timm_width.cost import Macs
from timm_width.engine import Training
from timm_width.holdout import Holdout, Journal
from timm_width.meter import BACKWARD, Meter
from timm_width.supernet import Supernet

IMAGES = torch.zeros(3, 3, 32, 32)


@pytest.fixture(scope='module')
def shared():
    model = timm.create_model('test_resnet', num_classes=3)
    return Supernet(model, timm_width.trace(model, (3, 32, 32)))


@pytest.mark.parametrize('gradients', [False, True])
def test_a_pass_of_a_supernet_costs_the_macs_of_its_widths(shared, gradients):
    space = shared.space
    name, group = next(iter(space.searchable.items()))
    skip = space.blocks[0].name
    meter, macs = Meter(), Macs(space)
    calls = [({}, ()), (space.scaled(0.5), ()), ({name: range(group.steps // 2)}, ()), ({}, (skip,))]
    expected = [macs(), macs(space.scaled(0.5)), macs({name: group.size // 2}), macs({}, (skip,))]
    for (widths, skips), cost in zip(calls, expected, strict=True):
        before = meter.macs
        with torch.set_grad_enabled(gradients):
            out = meter(shared, IMAGES, widths, skips=skips)
        assert meter.macs - before == 3 * cost * (1 + BACKWARD * gradients)
        assert torch.equal(out, shared(IMAGES, widths, skips=skips)) or gradients
    assert len(set(expected)) == 4


def test_another_network_is_counted_as_torch_counts_it_and_again_when_it_has_changed():
    with torch.no_grad():
        for name in 'test_resnet', 'test_convnext':
            model = timm.create_model(name, num_classes=3).eval()
            meter = Meter()
            for _ in range(2):
                meter(model, IMAGES)
            assert meter.macs == 2 * 3 * timm_width.trace(model, (3, 32, 32)).macs()
    net, meter = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5)), Meter()
    with torch.no_grad():
        meter(net, torch.zeros(2, 4))
        net[1] = nn.Identity()
        meter(net, torch.zeros(2, 4))
    assert meter.macs == 2 * (20 + 25) + 2 * 20


def test_a_network_that_is_refused_costs_nothing(shared):
    meter = Meter()
    with pytest.raises(timm_width.WidthError, match='unknown group'):
        meter(shared, IMAGES, {'nothing': 3})
    assert not meter.macs


def batches(count):
    return [(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1])) for _ in range(count)]


def test_scores_count_once_and_a_resumed_run_knows_what_they_cost(shared, tmp_path):
    """Statistics that are recalibrated cost the passes over the calibration images, and a network of its own its training."""
    def holdout(train=None):
        bar = SimpleNamespace(set_postfix_str=lambda *a, **k: None, update=lambda: None)
        return Holdout(ARGS, shared, batches(5), batches(3), train, Journal(tmp_path / 'scores.jsonl', ARGS), bar)

    half = shared.space.scaled(0.5)
    cost = Macs(shared.space)(half)
    first = holdout(lambda choice: (timm.create_model('test_resnet', num_classes=3), 10 ** 9))
    for _ in range(2):
        first(half, batches=2)
    assert first.macs == 2 * 2 * cost
    first(half, statistics='recalibrated')
    assert first.macs == (4 + 6 + 10) * cost
    first.alone({})
    expected = 20 * cost + 10 ** 9 + 6 * shared.space.macs()
    assert first.macs == expected
    again = holdout()
    again(half, batches=2)
    assert again.macs == 4 * cost
    again(half, statistics='recalibrated')
    again.alone({})
    assert again.macs == expected


def test_a_training_that_goes_on_counts_as_an_unbroken_one(tmp_path):
    args, _ = search.parse(['--model', 'test_resnet', '--dataset', 'digits', '--policy', 'uniform', '--budget', 'macs=0.5x', '--device',
                            'cpu', '-j', '0', '--output', str(tmp_path / 'x'), '--num-classes', '10'])
    model = timm.create_model('test_resnet', num_classes=10)
    view = data.View(data.find_splits(args).train, range(128))

    def training(meter):
        net = timm.create_model('test_resnet', num_classes=10)
        loaded = data.loader(view, args, engine.data_config(args, model), training=True)
        return Training(net, loaded, args, 2, 'x', 0, meter=meter)

    macs = []
    for path, stops in ((tmp_path / 'a.pth', [None]), (tmp_path / 'b.pth', [1, None])):
        for stop in stops:
            meter = Meter()
            training(meter).run(path, stop=stop)
        macs.append(meter.macs)
    assert macs[0] == macs[1] == 3 * 2 * 128 * timm_width.trace(model, (3, 32, 32)).macs()
