"""Algorithm 1: the two masks of a block move to the best width, from wherever they are, and stay within bounds."""
import numpy as np
import pytest

from timm_width.masking import Masks


def descend(levels: int, best: float, start: float = 0.5, noise: float = 1., iterations: int = 4000, seed: int = 0) -> float:
    """Trains the weight by Adam, as published, on a loss that is least at a share of the channels; returns the share chosen.

    The loss is (1 - b) f(small) + b f(large), f(w) = (w - best)^2, with b from a Gumbel-softmax of two logits that differ by the
    weight: the difference of their noises is logistic.
    """
    rng, masks, weight, mean, square = np.random.default_rng(seed), Masks(levels, s=start, l=start + 0.5), 0., 0., 0.
    for i in range(iterations):
        b = 1 / (1 + np.exp(-(weight + noise * rng.logistic())))
        slope = b * (1 - b) * ((masks.large / levels - best) ** 2 - (masks.small / levels - best) ** 2)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope ** 2
        rate = 0.1 * (1 + np.cos(np.pi * i / iterations)) / 2
        weight -= rate * (mean / (1 - 0.9 ** (i + 1))) / (np.sqrt(square / (1 - 0.999 ** (i + 1))) + 1e-8)
        weight = masks.step(weight, i / iterations)
        assert 1 <= masks.small < masks.large <= levels and 0 <= masks.s <= 1
    assert masks.converged
    return (masks.small if weight < 0 else masks.large) / levels


@pytest.mark.parametrize('levels', [4, 32, 112])
@pytest.mark.parametrize('best', [0., 0.1, 0.35, 0.5, 0.77, 1.])
def test_the_best_width_is_found_from_every_start_and_in_both_corners(levels, best):
    nearest = min(range(1, levels + 1), key=lambda k: abs(k / levels - best)) / levels
    for start in (0., 0.3, 0.5, 0.9):
        assert abs(descend(levels, best, start) - nearest) <= 1.01 / levels


def test_where_it_ends_does_not_hang_on_the_noise():
    ends = [descend(56, 0.6, seed=seed) for seed in range(5)]
    assert max(ends) - min(ends) <= 2.01 / 56


def test_the_first_steps_by_hand():
    masks = Masks(16)
    assert (masks.small, masks.large) == (8, 16)
    assert masks.step(-0.1, 0.) == 0  # update -0.1, distance 0.6
    assert (masks.s, masks.l) == pytest.approx((0.4, 1.0))
    assert masks.step(0.05, 0.5) == 0  # update -0.04 + 0.05, distance 0.15
    assert (masks.s, masks.l) == pytest.approx((0.41, 0.56))
    assert (masks.small, masks.large) == (7, 9)
    assert masks.step(1., 0.5) == 0  # held back by the slack: 1 - 0.8 * 0.15
    assert (masks.s, masks.l) == pytest.approx((0.88, 1.03)) and (masks.small, masks.large) == (14, 16)


def test_at_the_lower_corner_the_weight_is_kept():
    masks = Masks(16)
    assert masks.step(-0.8, 0.) == -0.8  # what speaks for the small mask adds up
    assert (masks.s, masks.l) == pytest.approx((0., 0.6)) and masks.small == 1
    assert masks.step(-4., 0.) == -1


def test_masks_next_to_one_another_stay():
    masks = Masks(4, s=0.5, l=0.75)
    before = (masks.small, masks.large)
    assert masks.converged and masks.step(1., 0.9) == 1 and (masks.small, masks.large) == before


def test_one_width_has_no_masks():
    with pytest.raises(ValueError, match='2 widths or more'):
        Masks(1)
