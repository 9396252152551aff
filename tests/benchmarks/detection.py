"""A searched network as the backbone of a detector: torchvision's RetinaNet and Faster R-CNN with FPN, effdet's EfficientDet.

    python tests/benchmarks/detection.py [--model prunet] [--model-kwargs width=0.25 depth=0.5] [--detector retinanet] [--steps 12]

Trains on drawn boxes, and prints the loss of every step. `--model local-dir:FOLDER` takes what a search wrote.
"""
import argparse
import warnings

import timm
import torch
from timm.utils import ParseKwargs
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import timm_width  # noqa: F401  registers prunet and the `_width` models

LEVELS = 3  # the last ones of the backbone; the pyramid adds one more


class Pyramid(nn.Module):
    """A timm model's last levels in a feature pyramid: what torchvision's detectors call a backbone."""

    def __init__(self, model: str, channels: int = 64, **kwargs):
        super().__init__()
        self.body = timm.create_model(model, features_only=True, **kwargs)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels()[-LEVELS:], channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.fpn({str(i): y for i, y in enumerate(self.body(x)[-LEVELS:])})


def retinanet(model: str, classes: int, size: int, **kwargs) -> nn.Module:
    """RetinaNet for images of `size` pixels."""
    anchors = AnchorGenerator(tuple((size // 8 << i,) for i in range(LEVELS + 1)), ((0.5, 1., 2.),) * (LEVELS + 1))
    return RetinaNet(Pyramid(model, **kwargs), classes, min_size=size, max_size=size, anchor_generator=anchors)


def faster_rcnn(model: str, classes: int, size: int, **kwargs) -> nn.Module:
    """Faster R-CNN for images of `size` pixels."""
    anchors = AnchorGenerator(tuple((size // 8 << i,) for i in range(LEVELS + 1)), ((0.5, 1., 2.),) * (LEVELS + 1))
    pool = MultiScaleRoIAlign([str(i) for i in range(LEVELS)], output_size=5, sampling_ratio=2)
    return FasterRCNN(Pyramid(model, **kwargs), classes, min_size=size, max_size=size, rpn_anchor_generator=anchors,
                      box_roi_pool=pool)


class _EffDet(nn.Module):
    """effdet's training bench with torchvision's way of being called."""

    def __init__(self, model: str, classes: int, size: int, **kwargs):
        from effdet import DetBenchTrain, EfficientDet
        from effdet.config import get_efficientdet_config

        super().__init__()
        config = get_efficientdet_config('tf_efficientdet_d0')
        config.update(backbone_name=model, backbone_args=kwargs, image_size=(size, size), num_classes=classes - 1, fpn_channels=32,
                      fpn_cell_repeats=1, box_class_repeats=1, backbone_indices=None)
        self.bench = DetBenchTrain(EfficientDet(config, pretrained_backbone=False))

    def forward(self, images, targets):
        boxes = [t['boxes'][:, [1, 0, 3, 2]] for t in targets]  # y before x
        found = self.bench(torch.stack(images), {
            'bbox': boxes, 'cls': [t['labels'].float() for t in targets],
            'img_scale': torch.ones(len(images)), 'img_size': torch.tensor([i.shape[:0:-1] for i in images])})
        return {k: v for k, v in found.items() if k != 'loss'}


DETECTORS = {'retinanet': retinanet, 'faster_rcnn': faster_rcnn, 'efficientdet': _EffDet}


def drawn(count: int, size: int, seed: int = 0) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Grey noise with one bright box each, red (class 1) or blue (class 2)."""
    rng = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for i in range(count):
        image = 0.3 * torch.rand(3, size, size, generator=rng)
        w, h = (int(torch.randint(size // 4, size // 2, (), generator=rng)) for _ in range(2))
        x, y = int(torch.randint(size - w, (), generator=rng)), int(torch.randint(size - h, (), generator=rng))
        image[2 * (i % 2), y:y + h, x:x + w] = 1
        images.append(image)
        targets.append({'boxes': torch.tensor([[x, y, x + w, y + h]], dtype=torch.float), 'labels': torch.tensor([i % 2 + 1])})
    return images, targets


def losses(detector: nn.Module, steps: int, size: int, batch: int = 4, rate: float = 5e-4) -> list[float]:
    """Trains on one batch of drawn boxes; the total loss of every step."""
    optimizer, found = torch.optim.Adam(detector.parameters(), rate), []
    images, targets = drawn(batch, size)
    detector.train()
    for _ in range(steps):
        loss = sum(detector(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.)
        optimizer.step()
        found.append(loss.item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='prunet')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    parser.add_argument('--detector', default='retinanet', choices=DETECTORS)
    parser.add_argument('--steps', type=int, default=12)
    parser.add_argument('--size', type=int, default=64)
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.manual_seed(0)
    detector = DETECTORS[args.detector](args.model, 3, args.size, **args.model_kwargs)
    for step, loss in enumerate(losses(detector, args.steps, args.size), 1):
        print(f'step {step}: loss {loss:.3f}')


if __name__ == '__main__':
    main()
