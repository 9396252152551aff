"""The paper's VGGNet: its size, and the laws that every width model keeps."""
import pytest
import timm
import torch

import timm_width
from timm_width.cost import Macs, Params
from timm_width.laws import commutation_faults, cost_faults, permutation_error, random_widths, randomise

NAME = 'vgg19_bn_cifar'


@pytest.fixture(scope='module')
def space():
    with torch.device('meta'):
        return timm_width.trace(timm.create_model(NAME))


def test_it_is_the_papers_size(space):
    """Section 4.2 of CafeNet: 20 M parameters and 399 M FLOPs at 32 pixels; 16 layers to search."""
    assert round(Params(space)() / 1e6) == 20 and Macs(space)() == pytest.approx(399e6, rel=0.005)
    assert len(space.searchable) == 16 and space.input_size == (3, 32, 32)


@pytest.mark.parametrize('seed', range(2))
def test_laws(space, seed):
    model = timm.create_model(NAME)
    widths = random_widths(space, seed)
    assert not commutation_faults(model, space, widths) and not cost_faults(model, space, widths)
    assert permutation_error(randomise(model).double().eval(), space, seed) < 1e-9


def test_what_timm_does_with_a_model_works_at_widths(space, tmp_path):
    widths = space.scaled(0.25)
    x = torch.randn(2, 3, 32, 32)
    model = timm.create_model(f'{NAME}_width', widths=widths, num_classes=7).eval()
    assert model(x).shape == (2, 7) and model.num_features == 128
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 128)
    timm_width.save(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    features = timm.create_model(f'{NAME}_width', widths=widths, features_only=True, out_indices=(1, 3)).eval()
    assert features.feature_info.channels() == [32, 128] and [f.shape[1:] for f in features(x)] == [(32, 16, 16), (128, 4, 4)]
    last, levels = model.forward_intermediates(x)
    assert len(levels) == 5 and torch.equal(last, model.forward_features(x))
    model.reset_classifier(0)
    assert model(x).shape == (2, 128)
