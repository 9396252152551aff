"""Moving means of what is seen of every width of every group, exact over a window."""
from collections.abc import Mapping, Sequence

import numpy as np
import torch

__all__ = ['MovingMeans']


class MovingMeans:
    """The last values seen of every width of every group, and their means.

    Args:
        sizes: Number of widths of each group.
        window: How many values of each width count.
    """

    def __init__(self, sizes: Sequence[int], window: int):
        self.window, self._starts = window, np.cumsum([0, *sizes])
        self.seen = np.zeros(sum(sizes), dtype=np.int64)
        self._sums = np.zeros(sum(sizes))
        self._last = np.zeros((sum(sizes), 0), dtype=np.float32)  # of each width a ring, as long as needed so far

    def add(self, paths: np.ndarray, values: np.ndarray) -> None:
        """Adds the value of each image (N,) to all widths on its path (groups, N); those that are not finite are left out."""
        finite = np.isfinite(values)
        entries = (paths[:, finite] + self._starts[:-1, None]).T.reshape(-1)
        order = np.argsort(entries, kind='stable')
        entries, values = entries[order], np.repeat(values[finite], len(paths))[order]
        values = values.astype(np.float32).astype(np.float64)  # as they are kept
        new = np.bincount(entries, minlength=len(self.seen))
        after = np.arange(len(entries)) - (np.cumsum(new) - new)[entries]  # how many new ones of the same width come first
        kept = after >= new[entries] - self.window
        entries, values, at = entries[kept], values[kept], ((self.seen[entries] + after) % self.window)[kept]
        self._grow(min(int((self.seen + new).max(initial=0)), self.window))
        gone = np.where(at < self.seen[entries], self._last[entries, at], 0.)
        self._sums += np.bincount(entries, values - gone, len(self.seen))
        self._last[entries, at] = values
        self.seen += new

    def _grow(self, length: int) -> None:
        have = self._last.shape[1]
        if length > have:
            more = min(max(2 * have, length), self.window) - have
            self._last = np.pad(self._last, ((0, 0), (0, more)))

    def shorten(self, window: int) -> None:
        """From now on, only so many of the last values of each width count."""
        kept = np.minimum(self.seen, min(window, self.window))
        index = (self.seen - kept)[:, None] + np.arange(kept.max(initial=0))  # the oldest first
        held = index < self.seen[:, None]
        last = np.where(held, self._last[np.arange(len(index))[:, None], np.where(held, index, 0) % self.window], 0.)
        self._last, self._sums, self.seen, self.window = last.astype(np.float32), last.sum(1, dtype=np.float64), kept, window

    def means(self, least: int) -> list[np.ndarray]:
        """For each group, the mean of every width; for one seen less than `least` times, interpolated from those seen as often."""
        means = self._sums / np.clip(self.seen, 1, self.window)
        found = []
        for start, end in zip(self._starts, self._starts[1:]):
            known = np.flatnonzero(self.seen[start:end] >= least)
            mean = means[start:end]
            if len(known) < end - start:
                mean = np.interp(np.arange(end - start), known, mean[known]) if len(known) else np.zeros(end - start)
            found.append(mean)
        return found

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {'window': torch.tensor(self.window), 'seen': torch.from_numpy(self.seen.copy()),
                'sums': torch.from_numpy(self._sums.copy()), 'last': torch.from_numpy(self._last.copy())}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        seen, sums, last = (state[name].cpu().numpy().copy() for name in ('seen', 'sums', 'last'))
        window = int(state['window'])
        if seen.shape != self.seen.shape or sums.shape != seen.shape or last.shape[:1] != seen.shape or last.shape[1] > window:
            raise ValueError('its moving means are of another grid')
        self.seen, self._sums, self._last, self.window = seen, sums, last, window
