"""A prunet and a narrowed MobileNetV2 as backbones of torchvision's detectors, as in benchmarks/detection.py."""
import statistics

import pytest
import timm
import torch

import timm_width

from .benchmarks import detection as bench

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def backbones():
    """Name and arguments of a PRUNET and of a MobileNetV2 at other widths, as a search's config has them."""
    with torch.device('meta'):
        space = timm_width.trace(timm.create_model('mobilenetv2_035'))
        supernet = timm.create_model('prunet_search', width=0.25, depth=0.5)
    choice = {n: None if layer.residual else (list(layer.blocks)[-1], None) for n, layer in supernet.stochastic_layers().items()}
    return {'prunet': ('prunet', supernet.chosen(choice)), 'mobilenetv2': ('mobilenetv2_035_width', {'widths': space.scaled(0.7, 8, 8)})}


@pytest.mark.parametrize('detector, steps', [('retinanet', 12), ('faster_rcnn', 6)])
@pytest.mark.parametrize('backbone', ['prunet', 'mobilenetv2'])
def test_losses_fall_on_drawn_boxes(backbones, backbone, detector, steps):
    name, args = backbones[backbone]
    torch.manual_seed(0)
    found = bench.losses(bench.DETECTORS[detector](name, 3, 64, **args), steps, 64)
    assert statistics.median(found[-3:]) < 0.75 * found[0]


def test_the_boxes_are_where_they_are_drawn():
    images, targets = bench.drawn(4, 64)
    for image, target in zip(images, targets):
        x, y, right, bottom = map(int, target['boxes'][0])
        bright = (image == 1).nonzero()
        assert set(bright[:, 0].tolist()) == {0 if target['labels'][0] == 1 else 2}
        assert bright[:, 1:].min(0).values.tolist() == [y, x] and (bright[:, 1:].max(0).values + 1).tolist() == [bottom, right]


def test_effdet():
    """EfficientDet of the effdet package, where it is installed."""
    pytest.importorskip('effdet')
    torch.manual_seed(0)
    found = bench.losses(bench.DETECTORS['efficientdet']('prunet', 3, 64, width=0.25, depth=0.5), 6, 64)
    assert found[-1] < 0.75 * found[0]
