"""Scores for a policy: of the shared network at widths, and of networks trained briefly by themselves, on the holdout."""
import itertools
import json
import math
import numbers
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from timm.utils import distribute_bn, random_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .engine import batch_statistics, is_primary, of_primary, score, sum_of_all
from .meter import Meter
from .policies.base import Choice, PolicyError, Score
from .supernet import Supernet, recalibrate

__all__ = ['Holdout', 'Journal', 'runs']

CALIBRATION = 5  # batches: AutoSlim's bn_cal_batch_num
KEPT_BYTES = 2 << 30  # a holdout of at most this is decoded once


class Journal:
    """Results that are known already, one line of JSON each: what a run that was killed need not do again.

    Args:
        path: The file.
        args: Says which process this is; only the first one writes.
    """

    def __init__(self, path: Path, args: Namespace):
        self.path, self.primary = path, is_primary(args)
        self.known: dict[str, Any] = {}
        if self.primary and path.is_file():
            whole = 0
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b'\n'):  # a kill cut it
                    os.truncate(path, whole)
                    break
                whole += len(line)
                key, value = json.loads(line)
                self.known[key] = value
        self.known = of_primary(args, self.known)

    def recall(self, key: Sequence[Any], compute: Callable[[], Any], anew: bool = False) -> Any:
        """The result of that key, computed and written down if it is not known.

        Args:
            key: Anything that JSON holds.
            compute: Gives a result that JSON holds.
            anew: Whether to compute it even if it is known.
        """
        name = json.dumps(key, sort_keys=True)
        if anew or name not in self.known:
            self.known[name] = compute()
            if self.primary:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open('a') as file:
                    file.write(json.dumps([name, self.known[name]]) + '\n')
        return self.known[name]


def runs(indices: Sequence[int]) -> list[list[int]]:
    """Ascending indices as runs [first, length], which are few where bins of channels are kept."""
    indices = np.asarray(indices, dtype=np.int64)
    starts = np.flatnonzero(np.diff(indices, prepend=indices[:1] - 2) != 1)
    lengths = np.diff(starts, append=len(indices))
    return [[first, length] for first, length in zip(indices[starts].tolist(), lengths.tolist())]


class Holdout:
    """What `Policy.choose` is given (see `policies.base.Evaluate`).

    Args:
        args: The flags.
        network: The trained shared network, if the policy has one.
        training: Training batches, for the statistics of batch norms.
        batches: The holdout.
        train: Trains a network of its own at some widths; gives it, and the MACs of all processes that this took.
        journal: Scores known already.
        bar: Progress bar, which moves with every score.

    Attributes:
        macs: MACs of all scores that were asked for, those that were known included; each counts once.
    """

    def __init__(
            self,
            args: Namespace,
            network: Optional[nn.Module],
            training: DataLoader,
            batches: DataLoader,
            train: Callable[[Choice], tuple[nn.Module, int]],
            journal: Journal,
            bar: tqdm,
    ):
        self.args, self.network, self.training, self.batches = args, network, training, batches
        self.train, self.journal, self.bar = train, journal, bar
        self.best = -math.inf
        self._asked: dict[str, int] = {}  # a score -> its MACs
        self._kept: list = []
        self._calibration: list = []

    def __call__(
            self,
            widths: Mapping[str, Union[int, Sequence[int]]],
            skips: Sequence[str] = (),
            batches: Optional[int] = None,
            statistics: str = 'batch',
    ) -> Score:
        if self.network is None:
            raise PolicyError('a policy without a train_step has no shared network to evaluate: use evaluate.alone')
        key = {name: int(w) if isinstance(w, numbers.Integral) else runs(w) for name, w in widths.items()}
        return self._recall(['shared', key, list(skips), batches, statistics],
                            lambda: self._shared(widths, skips, batches, statistics))

    def alone(self, widths: Mapping[str, int], skips: Sequence[str] = ()) -> Score:
        choice = Choice({name: int(w) for name, w in widths.items()}, tuple(skips))
        return self._recall(['alone', choice.widths, list(choice.skips)], lambda: self._alone(choice))

    @property
    def macs(self) -> int:
        return sum(self._asked.values())

    def _recall(self, key: list, compute: Callable[[], tuple[float, float, int]]) -> Score:
        top1, loss, *macs = self.journal.recall(key, compute)  # an earlier version wrote no MACs
        self._asked[json.dumps(key, sort_keys=True)] = sum(macs)
        found = Score(top1, loss)
        self.best = max(self.best, found.top1)
        self.bar.set_postfix_str(f'best so far {self.best:.2f} %', refresh=False)
        self.bar.update()
        return found

    def _alone(self, choice: Choice) -> tuple[float, float, int]:
        meter = Meter()
        network, macs = self.train(choice)
        found = score(partial(meter, network.eval()), self._holdout(None), self.args)
        return *found, macs + sum_of_all(self.args, meter.macs)

    def _shared(
            self,
            widths: Mapping[str, Union[int, Sequence[int]]],
            skips: Sequence[str],
            batches: Optional[int],
            statistics: str,
    ) -> tuple[float, float, int]:
        meter = Meter()
        found = self._score(meter, widths, skips, batches, statistics)
        return *found, sum_of_all(self.args, meter.macs)

    def _score(
            self,
            meter: Meter,
            widths: Mapping[str, Union[int, Sequence[int]]],
            skips: Sequence[str],
            batches: Optional[int],
            statistics: str,
    ) -> tuple[float, float]:
        network = partial(meter, self.network)
        if statistics == 'batch':
            several = (batch for batch in self._holdout(batches) if len(batch[1]) > 1)  # one image has no statistics
            with batch_statistics(self.network):
                return score(network, several, self.args, widths, skips=skips)
        self.network.eval()
        if statistics == 'running':
            return score(network, self._holdout(batches), self.args, widths, skips=skips)
        if statistics != 'recalibrated':
            raise PolicyError(f"statistics must be batch, recalibrated or running, not '{statistics}'")
        before = {name: b.clone() for name, b in self.network.named_buffers()}
        calibration = self._calibration_batches()
        try:
            recalibrate(self.network, calibration, CALIBRATION, widths, self.args.device, skips)
            if isinstance(self.network, Supernet):
                meter.add(sum(len(images) for images, _ in calibration), self.network, widths, skips=skips)
            if getattr(self.args, 'world_size', 1) > 1:
                distribute_bn(self.network, self.args.world_size, reduce=True)
            return score(network, self._holdout(batches), self.args, widths, skips=skips)
        finally:
            with torch.no_grad():
                for name, b in self.network.named_buffers():
                    b.copy_(before[name])

    def _calibration_batches(self) -> list:
        """Training batches, the same however much was drawn before: a resumed search draws less."""
        if not self._calibration:
            random_seed(self.args.seed, getattr(self.args, 'rank', 0))
            sampler = getattr(self.training, 'sampler', None)
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(0)
            self._calibration = list(itertools.islice(self.training, CALIBRATION))
        return self._calibration

    def _holdout(self, batches: Optional[int]) -> Any:
        """The first batches of the holdout, or all; decoded once if they are not too many."""
        loader = self.batches
        wanted = len(loader) if batches is None else min(batches, len(loader))
        if len(self._kept) >= wanted:
            return self._kept[:wanted]
        found = itertools.islice(loader, wanted)
        first = next(found)
        found = itertools.chain([first], found)
        if wanted * first[0].nbytes > KEPT_BYTES:
            return found
        self._kept = list(found)
        return self._kept
