"""Which groups can be narrowed by zeros: channels set to 0 behind their normalisations do what channels that are gone do."""
import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .factors import Grid
from .supernet import Supernet

__all__ = ['unlike_slices']

ALIKE = 1e-6  # relative: outputs of masks and slices that differ by more are not equal
SMALL = 96  # pixels that are enough, where the model takes them


@torch.no_grad()
def unlike_slices(network: Supernet, grid: Grid) -> list[str]:
    """The groups whose channels, set to 0 behind their normalisations, leave another output than their absence does.

    Tried on a copy with random biases and scales, since those of a new network may be 0 and hide what they multiply.

    Args:
        network: The shared network.
        grid: Group -> widths, ascending; of groups that a normalisation governs.
    """
    rng, space = torch.Generator().manual_seed(0), network.space
    tried = copy.deepcopy(network).double().cpu().eval()
    for t in [*tried.parameters(), *tried.buffers()]:
        if t.ndim < 2 and t.is_floating_point():
            t.uniform_(0.5, 1.5, generator=rng)
    images = _images(tried, rng)

    def alike(widths: Mapping[str, int]) -> bool:
        gates = {name: (torch.arange(space[name].steps) < w // space[name].unit).expand(2, -1) for name, w in widths.items()}
        sliced = tried(images, widths)
        try:
            masked = tried(images, gates=gates)
        except RuntimeError:  # where images are not what the first dimension counts
            return False
        return bool((sliced - masked).abs().max() <= ALIKE * sliced.abs().max())

    def found(names: Sequence[str]) -> list[str]:
        if alike({name: grid[name][0] for name in names}):
            return []
        half = len(names) // 2
        return [*names] if not half else [*found(names[:half]), *found(names[half:])]

    return found(list(grid)) if grid else []


def _images(network: nn.Module, rng: torch.Generator) -> torch.Tensor:
    """Two random images, small ones if the network takes such."""
    size = network.space.input_size
    images = torch.randn(2, *size, generator=rng, dtype=torch.float64)
    if max(size) <= SMALL:
        return images
    small = images[:, :, :SMALL, :SMALL]
    try:
        network(small)
        return small
    except (RuntimeError, AssertionError, ValueError):  # windows, or positions, of another size
        return images
