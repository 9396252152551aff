"""The timing loop, on a clock of its own: networks take turns, medians are right, and what other load disturbs is never hidden."""
import json

import numpy as np
import pytest

from timm_width.latency.runner import timing
from timm_width.latency.runner.errors import RunnerError
from timm_width.latency.runner.timing import PRESETS, Timing, time_calls


class Machine:
    """A clock, and calls that take their time on it."""

    def __init__(self, slower=lambda now: 1.):
        self.now, self.slower, self.made = 0., slower, []

    def call(self, name, ms, tells=False):
        def run():
            self.made.append(name)
            took = ms * self.slower(self.now)
            self.now += took / 1000
            return took if tells else None
        return run


@pytest.fixture
def machine(monkeypatch):
    def build(*args):
        found = Machine(*args)
        monkeypatch.setattr(timing, 'perf_counter', lambda: found.now)
        return found
    return build


@pytest.mark.parametrize('tells', [False, True])
def test_times_are_those_of_the_clock_or_of_the_call(tells, machine):
    m = machine()
    found = time_calls({'a': m.call('a', 4., tells), 'b': m.call('b', 10., tells)}, batch=4, runs=5)
    assert {k: pytest.approx(t.batch_ms) for k, t in found.items()} == {'a': 4, 'b': 10}
    assert found['a'].ms == pytest.approx(1) and found['a'].batch == 4 and found['a'].runs == 5 and found['a'].attempts == 1
    assert not found['a'].disturbed and found['a'].spread == pytest.approx(0)


def test_what_a_call_says_of_itself_goes_before_the_clock(machine):
    m = machine()
    def call():
        m.now += 1
        return 2.5
    assert time_calls({'a': call}, runs=3)['a'].batch_ms == 2.5


def test_networks_take_turns(machine):
    """Round by round, one call a sample with seconds=0; else as many as fill the time; the warm-up first."""
    m = machine()
    time_calls({'a': m.call('a', 1.), 'b': m.call('b', 3.)}, warmup=2, runs=3, seconds=0, attempts=1)
    assert m.made == ['a', 'a', 'b', 'b', *('a', 'b') * 3]
    m = machine()
    time_calls({'a': m.call('a', 1.), 'b': m.call('b', 3.)}, warmup=1, runs=2, seconds=0.0061, attempts=1)
    assert m.made == ['a', 'b', *(*'a' * 6, *'b' * 2) * 2]


def test_drift_meets_all_alike(machine):
    """A machine that becomes slower and slower: the ratio stays, while one after the other it would not."""
    m = machine(lambda now: 1 + now)
    found = time_calls({'a': m.call('a', 1.), 'b': m.call('b', 1.)}, runs=50, seconds=0.005, attempts=1)
    assert found['b'].ms / found['a'].ms == pytest.approx(1, abs=0.01)
    m = machine(lambda now: 1 + now)
    alone = [time_calls({n: m.call(n, 1.)}, runs=50, seconds=0.005, attempts=1)[n].ms for n in 'ab']
    assert alone[1] / alone[0] > 1.2


def test_statistics_are_those_of_the_samples():
    samples = np.random.default_rng(0).gamma(9., 1., 400)
    found = Timing.of(samples, batch=8)
    assert found.batch_ms == np.median(samples) and found.ms == np.median(samples) / 8
    assert found.mean == pytest.approx(samples.mean()) and found.minimum == samples.min() and found.runs == 400
    assert found.percentiles == {str(p): np.percentile(samples, p) for p in (5, 20, 50, 80, 95, 99)}
    low, high = np.percentile(samples, (25, 75))
    assert found.spread == pytest.approx((high - low) / np.median(samples)) and found.disturbed


def test_single_slow_calls_do_not_count_as_disturbed():
    assert not Timing.of([1.] * 20 + [50.] * 3).disturbed


def test_what_is_disturbed_is_measured_again(machine):
    """A burst of other load ends: the second attempt counts, of all networks, and says that it is one."""
    m = machine(lambda now: 3 if now < 0.5 and len(m.made) % 4 in (1, 2) else 1)  # every other round
    found = time_calls({'a': m.call('a', 5.), 'b': m.call('b', 5.)}, runs=30, seconds=0)
    assert [(t.batch_ms, t.disturbed, t.attempts) for t in found.values()] == [(pytest.approx(5), False, 2)] * 2


def test_what_stays_disturbed_is_marked(machine):
    m = machine(lambda now: 1 + len(m.made) % 2)
    found = time_calls({'a': m.call('a', 5.)}, runs=9, seconds=0, attempts=4)['a']
    assert found.disturbed and found.attempts == 4 and len(m.made) == 3 + 4 * 9
    assert time_calls({'a': m.call('a', 5.)}, runs=9, seconds=0, attempts=4, max_spread=9)['a'].attempts == 1


def test_of_all_attempts_the_calmest_is_kept():
    times = iter([1, *[1, 9, 5], *[2, 3, 2.5], *[1, 8, 4]])
    found = time_calls({'a': lambda: float(next(times))}, warmup=1, runs=3, seconds=0, attempts=3)['a']
    assert (found.batch_ms, found.attempts, found.disturbed) == (2.5, 3, True)


@pytest.mark.parametrize('options', [
    {'warmup': 0}, {'runs': 0}, {'runs': 2.}, {'runs': True}, {'runs': 10 ** 9}, {'batch': 0}, {'attempts': 0}, {'seconds': -1},
    {'seconds': float('nan')}, {'max_spread': -0.1}, {'seconds': 'x'}])
def test_wrong_options(options):
    with pytest.raises(RunnerError, match=f'^{next(iter(options))} must be'):
        time_calls({'a': lambda: 1.}, **options)


@pytest.mark.parametrize('ms', [0., -1., float('nan'), float('inf')])
def test_times_that_no_network_can_have_are_refused(ms):
    with pytest.raises(RunnerError, match='finite and above zero'):
        time_calls({'a': lambda: ms}, runs=2, seconds=0)


def test_json_and_back():
    found = Timing(**{**vars(Timing.of([1., 2., 4.], 2, attempts=2)), 'builds': (1.5, 2.)})
    for one in (found, Timing.of([3.])):
        said = json.loads(json.dumps(one.to_json()))
        assert Timing.from_json(said) == one and said['ms'] == one.ms


@pytest.mark.parametrize('change, says', [
    ({'batch_ms': -1.}, 'batch_ms'), ({'batch_ms': float('nan')}, 'batch_ms'), ({'mean': float('inf')}, 'mean'), ({'minimum': 0}, 'minimum'),
    ({'mean': '1'}, 'mean'), ({'batch': 0}, 'batch'), ({'runs': 1.5}, 'runs'), ({'batch': True}, 'batch'), ({'spread': -1}, 'spread'),
    ({'disturbed': 1}, 'disturbed'), ({'percentiles': [1]}, 'percentiles'), ({'percentiles': {'50': None}}, 'percentile 50'),
    ({'builds': [0.]}, 'build 0'), ({'extra': 1}, 'extra'), ({'mean': ...}, 'mean'), ({'batch_ms': 10 ** 400}, 'batch_ms'),
    ({'batch': 10 ** 400}, 'batch'), ({'percentiles': {}}, '5 is missing'),
    ({'percentiles': {str(p): 1. for p in (5, 20, 50, 80, 95)}}, '99 is missing')])
def test_wrong_files(change, says):
    said = {k: v for k, v in {**Timing.of([1., 2.]).to_json(), **change}.items() if v is not ...}
    with pytest.raises(RunnerError, match=says):
        Timing.from_json(said)


@pytest.mark.parametrize('said', [None, [], 'x', 1.])
def test_something_else_is_no_timing(said):
    with pytest.raises(RunnerError, match='JSON object'):
        Timing.from_json(said)


def test_presets_are_those_of_the_papers():
    """AOWS, supplement C and the authors' code (60 runs after 10); Tiered Pruning, A.1 (trtexec's 10 runs and 3 s)."""
    assert {k: (p['backend'], p['batch']) for k, p in PRESETS.items()} == {
        'aows-tensorrt': ('tensorrt', 64), 'aows-cpu': ('torch', 1), 'aows-gpu': ('torch', 16), 'prunet': ('trtexec', 1)}
    assert all((p['warmup'], p['runs'], p['seconds']) == (10, 60, 0) for k, p in PRESETS.items() if k != 'prunet')
    assert PRESETS['aows-tensorrt']['precision'] == PRESETS['prunet']['precision'] == 'fp16'
    assert (PRESETS['prunet']['runs'], PRESETS['prunet']['runs'] * PRESETS['prunet']['seconds']) == (10, 3)
