"""The timing loop: several networks take turns, so that whatever else the machine does meets all alike.

A sample is the mean of a few calls in a row; a network has one sample per round, and its latency is the median of those. Where
the samples of a network lie too far apart, all are measured again, and the calmest attempt is kept; what stays unsteady is marked.
"""
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Optional

import numpy as np

from .errors import RunnerError

__all__ = ['BRIEF', 'LOOP', 'MAX_SPREAD', 'PRESETS', 'Timing', 'middle_of', 'time_calls']

PERCENTILES = (5, 20, 50, 80, 95, 99)
MAX_SPREAD = 0.1
BRIEF = {'seconds': 0.01}  # options of time_calls where thousands of networks are measured
MAX_RUNS = 10 ** 6
MAX_COUNT = 2 ** 31
MAX_MS = 1e9

# What the papers measured. AOWS (supplement C): batches of 64 by TensorRT, of 1 and 16 by PyTorch on a CPU and a GPU; the loop is
# that of the authors' code, which takes the mean (`Timing` has both). PRUNET (Tiered Pruning, A.1): what trtexec does by default.
_AOWS = {'warmup': 10, 'runs': 60, 'seconds': 0.}
PRESETS: dict[str, dict[str, Any]] = {
    'aows-tensorrt': {'backend': 'tensorrt', 'precision': 'fp16', 'batch': 64, **_AOWS},
    'aows-cpu': {'backend': 'torch', 'precision': 'fp32', 'batch': 1, **_AOWS},
    'aows-gpu': {'backend': 'torch', 'device': 'cuda', 'precision': 'fp32', 'batch': 16, **_AOWS},
    'prunet': {'backend': 'trtexec', 'precision': 'fp16', 'batch': 1, 'runs': 10, 'seconds': 0.3},
}


@dataclass(frozen=True)
class Timing:
    """How long a network takes, in milliseconds per batch but for `ms`.

    Args:
        batch: Images per call.
        runs: Samples.
        batch_ms: Their median.
        percentiles: Percentage, as text -> that percentile of the samples.
        mean: Their mean.
        minimum: The least.
        spread: The distance of their quartiles, as a share of the median: a robust measure that single slow calls do not move.
        disturbed: The spread is above what was allowed, after all attempts.
        attempts: How often it was measured; the figures are those of the calmest attempt.
        builds: The median of each engine, where several were built (the other figures are those of the middle one).
    """
    batch: int
    runs: int
    batch_ms: float
    percentiles: Mapping[str, float]
    mean: float
    minimum: float
    spread: float
    disturbed: bool
    attempts: int = 1
    builds: tuple[float, ...] = ()

    @property
    def ms(self) -> float:
        """Median milliseconds per image."""
        return self.batch_ms / self.batch

    @classmethod
    def of(cls, samples: Sequence[float], batch: int = 1, max_spread: float = MAX_SPREAD, attempts: int = 1) -> 'Timing':
        """Of samples, in milliseconds per batch.

        Raises:
            RunnerError: There are none, or one is not finite and positive.
        """
        values = np.asarray(samples, dtype=np.float64)
        if not values.size or not np.isfinite(values).all() or not (values > 0).all():
            raise RunnerError(f'{values.size} measured times, which must be some, finite and above zero: {values[:3].tolist()}')
        low, median, high = (float(v) for v in np.percentile(values, (25, 50, 75)))
        spread = (high - low) / median
        percentiles = {str(p): float(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES))}
        return cls(batch, values.size, median, percentiles, float(values.mean()), float(values.min()), spread, spread > max_spread,
                   attempts)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads, and `ms` for other readers."""
        found = {**dataclasses.asdict(self), 'percentiles': dict(self.percentiles), 'builds': list(self.builds), 'ms': self.ms}
        return found if self.builds else {k: v for k, v in found.items() if k != 'builds'}

    @classmethod
    def from_json(cls, found: Any) -> 'Timing':
        """Of what a file says, which is not trusted.

        Raises:
            RunnerError: A key is missing or unknown, or a value is no number that a measurement can give.
        """
        if not isinstance(found, Mapping):
            raise RunnerError(f'a timing is a JSON object, not {type(found).__name__}')
        found = {k: v for k, v in found.items() if k != 'ms'}
        known = {f.name for f in dataclasses.fields(cls)}
        optional = {'attempts', 'builds'}
        if wrong := sorted(map(str, (known - optional - set(found)) | (set(found) - known))):
            raise RunnerError(f"a timing with keys {', '.join(sorted(known - optional))}: these are missing or unknown: "
                              f"{', '.join(wrong)}")
        for name in ('batch', 'runs', 'attempts'):
            value = found.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
                raise RunnerError(f'{name} of a timing must be a whole number of at least 1, not {str(value)[:40]}')
        if not isinstance(found['disturbed'], bool):
            raise RunnerError(f"disturbed of a timing must be true or false, not {str(found['disturbed'])[:40]}")
        percentiles, builds = found['percentiles'], found.get('builds', [])
        if not isinstance(percentiles, Mapping) or not isinstance(builds, (list, tuple)):
            raise RunnerError('percentiles of a timing are a JSON object, builds a list')
        numbers = {**{k: found[k] for k in ('batch_ms', 'mean', 'minimum')},
                   **{f'percentile {k}': v for k, v in percentiles.items()}, **{f'build {i}': v for i, v in enumerate(builds)}}
        for name, value in {**numbers, 'spread': found['spread']}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_MS or (
                    value == 0 and name != 'spread'):
                raise RunnerError(f'{name} of a timing must be a finite number above zero, not {str(value)[:40]}')
        if missing := [str(p) for p in PERCENTILES if str(p) not in percentiles]:
            raise RunnerError(f"percentiles of a timing must have {', '.join(map(str, PERCENTILES))}: {missing[0]} is missing")
        return cls(**{**found, 'percentiles': {str(k): float(v) for k, v in percentiles.items()},
                      'builds': tuple(map(float, builds))})


def time_calls(
        calls: Mapping[str, Callable[[], Optional[float]]],
        *,
        warmup: int = 3,
        runs: int = 15,
        seconds: float = 0.05,
        batch: int = 1,
        max_spread: float = MAX_SPREAD,
        attempts: int = 3,
) -> dict[str, Timing]:
    """Times calls, which take turns: a round has one sample of each.

    Args:
        calls: Name -> a call that runs a network once and waits for it. It returns its milliseconds, or None: then the clock around
            it counts.
        warmup: Calls of each before anything is measured.
        runs: Rounds, and so samples per call.
        seconds: About how long a sample of one call lasts: fast ones are called several times. 0 is one call per sample.
        batch: Images per call.
        max_spread: A spread (`Timing.spread`) above this is measured again.
        attempts: How often to measure at most.

    Raises:
        RunnerError: An option makes no sense; a call returned a time that is not finite and positive.
    """
    for name, value, least in (('warmup', warmup, 1), ('runs', runs, 1), ('batch', batch, 1), ('attempts', attempts, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_RUNS:
            raise RunnerError(f'{name} must be a whole number of at least {least}, not {value!r}')
    for name, value in (('seconds', seconds), ('max_spread', max_spread)):
        if not isinstance(value, (int, float)) or not value >= 0:  # nor if it is NaN
            raise RunnerError(f'{name} must be a number of at least 0, not {value!r}')
    counts = {}
    for name, call in calls.items():
        once = min(_sample(call, 1)[1] for _ in range(warmup))
        counts[name] = min(max(int(seconds / max(once, 1e-9)), 1), MAX_RUNS)
    best: dict[str, Timing] = {}
    made = 0
    while made < attempts and (not best or any(t.disturbed for t in best.values())):
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(runs):
            for name, call in calls.items():
                samples[name].append(_sample(call, counts[name])[0])
        made += 1
        found = {name: Timing.of(times, batch, max_spread) for name, times in samples.items()}
        if not best or _worst(found) < _worst(best):  # all of one attempt: of other times they would not compare
            best = found
        if not calls:
            break
    return {name: dataclasses.replace(timing, attempts=made) for name, timing in best.items()}


LOOP: dict[str, Any] = {k: v for k, v in time_calls.__kwdefaults__.items() if k != 'batch'}  # its options, and their defaults


def middle_of(builds: Sequence[Timing]) -> Timing:
    """The timing that counts, of several engines built from one network: the middle one."""
    ordered = sorted(builds, key=lambda t: t.batch_ms)
    told = tuple(t.batch_ms for t in ordered) if len(ordered) > 1 else ()
    return dataclasses.replace(ordered[(len(ordered) - 1) // 2], builds=told)


def _worst(timings: Mapping[str, Timing]) -> float:
    return max(t.spread for t in timings.values())


def _sample(call: Callable[[], Optional[float]], count: int) -> tuple[float, float]:
    """Mean milliseconds of some calls in a row, by their own account or by the clock; and the clock's seconds of all."""
    told = []
    start = perf_counter()
    for _ in range(count):
        told.append(call())
    elapsed = perf_counter() - start
    return (sum(told) / count if told[0] is not None else 1000 * elapsed / count), elapsed
