"""Scores on the holdout: what they leave untouched, what they equal, and what is not computed twice."""
import itertools
import json
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import timm_width
from timm_width.engine import batch_statistics, score
from timm_width.holdout import CALIBRATION, Holdout, Journal, runs
from timm_width.policies.base import Choice, PolicyError, Score
from timm_width.supernet import Supernet, recalibrate

ARGS = Namespace(device='cpu', amp=False, amp_dtype='float16', channels_last=False, seed=0)
HALF = {'layer1.0.conv1': 16, 'layer2.0.conv2': 20, 'conv1.6': 24}


def images(count, seed, size=6):
    rng = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(size, 3, 16, 16, generator=rng) + 1, torch.randint(3, (size,), generator=rng)) for _ in range(count)]


class Shuffled:
    """Training batches in an order that torch's global state decides, as a loader's is."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return (self.batches[i] for i in torch.randperm(len(self.batches)).tolist())

TRAINING_MACS = 10 ** 12  # said of every candidate


@pytest.fixture
def shared(tmp_path):
    """A shared network with running statistics of some use, and what evaluates it."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3)
    network = Supernet(model, timm_width.trace(model, (3, 16, 16)))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))  # timm starts residual blocks as the identity
        for x, _ in images(3, 9):
            network.train()(x)
    trained = []

    def train(choice):
        trained.append(choice)
        return timm.create_model('test_resnet', num_classes=3), TRAINING_MACS

    held, training = images(4, 1), images(CALIBRATION, 2)
    holdout = Holdout(ARGS, network, training, held, train, Journal(tmp_path / 'scores.jsonl', ARGS), tqdm(disable=True))
    return SimpleNamespace(network=network, holdout=holdout, held=held, training=training, trained=trained)


def state(network):
    return {k: v.clone() for k, v in network.state_dict().items()}


def unchanged(network, before):
    return all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize('statistics', ['batch', 'recalibrated', 'running'])
def test_scoring_leaves_weights_and_running_statistics_untouched(shared, statistics):
    before = state(shared.network)
    shared.holdout(HALF, statistics=statistics)
    assert unchanged(shared.network, before)


def test_recalibrated_leaves_them_untouched_when_it_fails(shared, monkeypatch):
    before = state(shared.network)
    monkeypatch.setattr('timm_width.holdout.score', lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shared.holdout(HALF, statistics='recalibrated')
    assert unchanged(shared.network, before)


def test_scores_are_those_by_hand_for_each_kind_of_statistics(shared):
    """batch: of the images scored; recalibrated: recalibrate, then evaluation mode; running: evaluation mode."""
    network, held, found = shared.network, shared.held, {}
    for kind in ('batch', 'recalibrated', 'running'):
        found[kind] = shared.holdout(HALF, statistics=kind)
    with torch.no_grad(), batch_statistics(network):
        assert found['batch'] == score(network, held, ARGS, HALF)
    assert found['running'] == score(network.eval(), held, ARGS, HALF)
    recalibrate(network, shared.training, CALIBRATION, HALF)
    assert found['recalibrated'] == score(network.eval(), held, ARGS, HALF)
    assert len({s.loss for s in found.values()}) == 3 and isinstance(found['batch'], Score)


def test_batches_are_the_first_ones_whatever_was_asked_before(shared):
    for count in (2, 1, None, 3, 9):
        found = shared.holdout(HALF, batches=count, statistics='running')
        assert found == score(shared.network.eval(), shared.held[:count], ARGS, HALF)


def test_a_large_holdout_is_not_kept(shared, monkeypatch):
    monkeypatch.setattr('timm_width.holdout.KEPT_BYTES', 0)
    found = [shared.holdout(HALF, batches=count, statistics='running') for count in (2, None)]
    assert found == [score(shared.network.eval(), shared.held[:count], ARGS, HALF) for count in (2, None)]
    assert not shared.holdout._kept


def test_blocks_left_out_are_left_out(shared):
    skip = shared.network.space.blocks[0].name
    found = [shared.holdout({}, skips, statistics='running') for skips in ((), (skip,))]
    assert found[1] == score(shared.network.eval(), shared.held, ARGS, {}, skips=(skip,)) != found[0]


def test_unknown_statistics_and_no_shared_network_are_policy_errors(shared):
    with pytest.raises(PolicyError, match="not 'mean'"):
        shared.holdout(HALF, statistics='mean')
    shared.holdout.network = None
    with pytest.raises(PolicyError, match='evaluate.alone'):
        shared.holdout(HALF)


def test_alone_trains_a_network_once(shared):
    """Asked again, it is remembered; with other skips it is another network."""
    torch.manual_seed(0)
    first = shared.holdout.alone(HALF)
    assert shared.holdout.alone(dict(reversed(HALF.items()))) == first
    assert shared.trained == [Choice(HALF)]
    shared.holdout.alone(HALF, ('layer2.0',))
    assert shared.trained == [Choice(HALF), Choice(HALF, ('layer2.0',))]


def test_calibration_does_not_depend_on_what_was_asked_before(shared):
    """A search that is resumed asks for fewer scores, and draws less from the global random state: no score may notice."""
    shared.holdout.training = Shuffled(images(3 * CALIBRATION, 2))
    first = shared.holdout(HALF, statistics='recalibrated')
    shared.holdout.journal.known.clear()
    shared.holdout._calibration = []
    torch.manual_seed(1234)
    np.random.seed(1234)
    assert shared.holdout(HALF, statistics='recalibrated') == first


# -- the journal -------------------------------------------------------------------------------------------------------------


def counted():
    count = itertools.count(1)
    return lambda: next(count)


def test_journal_computes_once_and_remembers_over_runs(tmp_path):
    path, compute = tmp_path / 'new' / 'x.jsonl', counted()
    journal = Journal(path, ARGS)
    assert not path.parent.exists()  # nothing is written before there is something to write
    assert [journal.recall(key, compute) for key in (['a', {'w': 1}], ['b'], ['a', {'w': 1}])] == [1, 2, 1]
    again = Journal(path, ARGS)
    assert [again.recall(key, compute) for key in (['b'], ['a', {'w': 1}], ['a', {'w': 2}])] == [2, 1, 3]


@pytest.mark.parametrize('cut', [1, 5, 10])
def test_journal_survives_a_cut_last_line(cut, tmp_path):
    """It is computed again, and what is written after it can be read."""
    path, compute = tmp_path / 'x.jsonl', counted()
    for key in 'abc':
        Journal(path, ARGS).recall([key], compute)
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(path, ARGS)
    assert [journal.recall([key], compute) for key in 'abcd'] == [1, 2, 4, 5]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [value for _, value in lines] == [1, 2, 4, 5]


def test_only_the_first_process_writes(tmp_path):
    other = Journal(tmp_path / 'x.jsonl', Namespace(rank=1))
    assert other.recall(['a'], lambda: 1) == 1 and not any(tmp_path.iterdir())


def test_order_of_widths_is_no_other_key(tmp_path):
    journal, compute = Journal(tmp_path / 'x.jsonl', ARGS), counted()
    assert journal.recall(['a', {'x': 1, 'y': 2}], compute) == journal.recall(['a', {'y': 2, 'x': 1}], compute)


def test_loaders_of_timm_are_scored_as_lists_are(shared):
    """`Holdout` takes any loader; the same batches give the same scores, asked for twice."""
    shared.holdout.batches = DataLoader(shared.held, batch_size=None)
    for _ in range(2):
        assert shared.holdout(HALF, statistics='running') == score(shared.network.eval(), shared.held, ARGS, HALF)
        shared.holdout.journal.known.clear()


@pytest.mark.parametrize('indices, found', [([], []), ([3], [[3, 1]]), ([0, 1, 2], [[0, 3]]), ([1, 2, 5, 7, 8], [[1, 2], [5, 1], [7, 2]]),
                                            (np.array([0, 2]), [[0, 1], [2, 1]])])
def test_indices_are_written_as_runs(indices, found):
    assert runs(indices) == found == json.loads(json.dumps(runs(indices)))
    assert [i for first, length in runs(indices) for i in range(first, first + length)] == list(indices)


def test_a_journals_line_is_short_however_many_channels_are_kept(shared):
    kept = {'layer1.0.conv1': [*range(8), *range(12, 20)]}
    first = shared.holdout(kept)
    [key] = shared.holdout.journal.known
    assert json.loads(key)[1] == {'layer1.0.conv1': [[0, 8], [12, 8]]}
    assert shared.holdout(kept) == first and len(shared.holdout.journal.known) == 1
