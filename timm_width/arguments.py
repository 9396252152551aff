"""The flags of search and train, and the checks of what they say.

All of timm's train.py are here, with its names, types, defaults and meaning: those that search has, too (`add_arguments`), and
those that only train has (`add_train_arguments`). `add_own_arguments` are train's that timm does not have.
"""
import os
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter, _AppendAction
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from timm.loss import LOSS_TYPES
from timm.utils import ParseKwargs

from .data import DEFAULTS, UsageError
from .latency.measure import BACKEND_NAMES
from .resize import IMPORTANCE
from .space import nearest

__all__ = [
    'AMP_DTYPES', 'OWN', 'RANGES', 'TRAIN_RANGES', 'Parser', 'add_arguments', 'add_own_arguments', 'add_train_arguments',
    'check_arguments', 'check_output', 'flags_given', 'write_args',
]

# flag -> (least, most) that makes sense; None is no bound
RANGES: dict[str, tuple[Optional[float], Optional[float]]] = {
    'epochs': (1, None), 'warmup_epochs': (0, None), 'batch_size': (1, None), 'validation_batch_size': (1, None),
    'workers': (0, None), 'img_size': (1, None), 'num_classes': (2, None), 'lr': (0, None), 'lr_base': (0, None),
    'lr_base_size': (1, None), 'min_lr': (0, None), 'warmup_lr': (0, None), 'momentum': (0, None), 'weight_decay': (0, None),
    'clip_grad': (0, None), 'grad_accum_steps': (1, None), 'smoothing': (0, 1), 'hflip': (0, 1), 'vflip': (0, 1),
    'reprob': (0, 1), 'mixup': (0, None), 'cutmix': (0, None), 'mixup_prob': (0, 1), 'mixup_switch_prob': (0, 1),
    'drop': (0, 1), 'drop_path': (0, 1), 'crop_pct': (0.01, 1), 'model_ema_decay': (0, 1), 'seed': (0, 2 ** 32 - 1),
}
TRAIN_RANGES = {
    **RANGES, 'num_classes': (1, None), 'in_chans': (1, None), 'checkpoint_hist': (1, None), 'val_interval': (1, None),
    'log_interval': (1, None), 'recovery_interval': (0, None), 'aug_splits': (0, None), 'tta': (0, None), 'start_epoch': (0, None),
    'train_batches_per_epoch': (1, None), 'multilabel_threshold': (0, 1), 'kd_temperature': (0, None),
    'teacher_img_size': (1, None), 'latency_batch': (1, None),
}
CHOICES = {  # timm's parser leaves these to fail later
    'amp_dtype': ('float16', 'bfloat16'), 'clip_mode': ('norm', 'value', 'agc'), 'lr_base_scale': ('', 'linear', 'sqrt'),
    'remode': ('const', 'rand', 'pixel'), 'train_crop_mode': (None, 'rrc', 'rkrc', 'rkrr'),
    'mixup_mode': ('batch', 'pair', 'elem', 'half'), 'worker_seeding': ('all', 'part'),
}
PROCESS = ('rank', 'local_rank', 'distributed')
AMP_DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: Action) -> str:
        return action.help if action.default in (None, '', False, [], {}) else super()._get_help_string(action)


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are one line, without the list of all flags."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=_Formatter, **kwargs)
        self.elsewhere: dict[str, str] = {}  # flag that another policy has -> that policy

    def error(self, message: str):
        if message.startswith('unrecognized arguments: -'):
            flag = message.split()[2]
            owner = self.elsewhere.get(flag.partition('=')[0])
            if owner:
                raise UsageError(f'{flag} is an option of --policy {owner}, which this search does not run')
            message += nearest(flag, [s for a in self._actions for s in a.option_strings])
        raise UsageError(f'{message} (--help lists the flags)')


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags that search and train share: those of timm's train.py, with its names, types and defaults."""
    add = parser.add_argument_group('data').add_argument
    add('--data-dir', metavar='FOLDER', help='images in train/CLASS/ and val/CLASS/, or where the dataset is')
    add('--dataset', default='', metavar='NAME',
        help=f"{', '.join(DEFAULTS)} (embedded), or a name that timm's create_dataset takes: torch/cifar10, hfds/OWNER/NAME; "
             'by default the folders of images in --data-dir')
    add('--train-split', default='train', metavar='NAME', help='split to train on')
    add('--val-split', default='validation', metavar='NAME', help='split to validate on')
    add('--dataset-download', action='store_true', help='download the dataset, where timm can')
    add('--class-map', default='', type=str, metavar='FILE', help='class name to index, one name a line')
    add('--input-img-mode', type=str, metavar='MODE',
        help='PIL mode that images are converted to (default: RGB, or L for one channel)')
    add('--input-key', type=str, metavar='KEY', help='where a dataset keeps its images')
    add('--target-key', type=str, metavar='KEY', help='where a dataset keeps its labels')
    add('--dataset-trust-remote-code', action='store_true', help='let a dataset of the Hub run its code')
    add('-j', '--workers', type=int, default=4, metavar='N', help='processes that load images')
    add('--pin-mem', action='store_true', help='page-locked memory, for faster copies to a GPU')
    add('--worker-seeding', default='all', type=str, metavar='MODE', help="what each worker seeds: 'all' or 'part'")

    add = parser.add_argument_group('model').add_argument
    add('--model', default='resnet50', type=str, metavar='NAME', help="a timm model, 'local-dir:FOLDER' or 'hf-hub:OWNER/NAME'")
    add('--pretrained', action='store_true', help='start from pretrained weights')
    add('--pretrained-path', type=str, metavar='FILE', help='the pretrained weights, instead of those that timm would fetch')
    add('--pretrained-cfg-overlay', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
        help="entries of the model's pretrained_cfg to replace")
    add('--initial-checkpoint', default='', type=str, metavar='FILE', help='weights to load once the model is built')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='further arguments of the model')
    add('--num-classes', type=int, metavar='N', help='outputs of the model')
    add('--gp', type=str, metavar='NAME', help='global pooling: fast, avg, max, avgmax, avgmaxc')
    add('--drop', type=float, default=0., metavar='P', help='dropout')
    add('--drop-path', type=float, metavar='P', help='stochastic depth')
    add('--drop-block', type=float, metavar='P', help='drop block')
    add('--img-size', type=int, metavar='N', help="side of the images (default: the model's)")
    add('--crop-pct', type=float, metavar='N', help="part of a validation image that is seen (default: the model's)")
    add('--mean', type=float, nargs='+', metavar='MEAN', help="pixel mean (default: the model's)")
    add('--std', type=float, nargs='+', metavar='STD', help="pixel deviation (default: the model's)")
    add('--interpolation', default='', type=str, metavar='NAME', help="resizing (default: the model's)")
    add('-b', '--batch-size', type=int, default=128, metavar='N', help='images per step and process')
    add('-vb', '--validation-batch-size', type=int, metavar='N',
        help='images per step when nothing is trained')
    add('--channels-last', action='store_true', help='channels-last memory layout')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='batches per optimiser step')
    add('--fast-norm', action='store_true', help='normalisations in lower precision under --amp')
    add('--bn-momentum', type=float, metavar='M', help="momentum of batch norms (default: the model's)")
    add('--bn-eps', type=float, metavar='E', help="epsilon of batch norms (default: the model's)")

    add = parser.add_argument_group('device').add_argument
    add('--device', default='cuda', type=str, metavar='NAME', help='torch device')
    add('--device-modules', nargs='+', type=str, metavar='MODULE',
        help='Python modules to import first: devices, or models of yours')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', default='float16', type=str, metavar='NAME', help='lower precision of --amp: float16 or bfloat16')

    add = parser.add_argument_group('optimiser').add_argument
    add('--opt', default='sgd', type=str, metavar='NAME', help="any of timm's optimisers")
    add('--opt-eps', type=float, metavar='E', help="the optimiser's epsilon")
    add('--opt-betas', type=float, nargs='+', metavar='B', help="the optimiser's betas")
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='further arguments of the optimiser')
    add('--momentum', type=float, default=0.9, metavar='M', help='momentum of the optimiser')
    add('--weight-decay', type=float, default=2e-5, metavar='D', help='weight decay')
    add('--clip-grad', type=float, metavar='N', help='clip gradients at this value')
    add('--clip-mode', type=str, default='norm', metavar='MODE', help='how gradients are clipped: norm, value or agc')
    add('--layer-decay', type=float, metavar='D', help='decay of the learning rate from layer to layer')
    add('--layer-decay-min-scale', type=float, default=0, metavar='S', help='least share of the learning rate that a layer keeps')
    add('--layer-decay-no-opt-scale', type=float, metavar='S', help='layers with less than this share are not trained')

    add = parser.add_argument_group('learning rate').add_argument
    add('--lr', type=float, metavar='LR', help='learning rate (default: from --lr-base)')
    add('--lr-base', type=float, default=0.1, metavar='LR', help='learning rate of a batch of --lr-base-size')
    add('--lr-base-size', type=int, default=256, metavar='N', help='batch size that --lr-base is for')
    add('--lr-base-scale', type=str, default='', metavar='HOW',
        help="how --lr-base follows the batch size: linear or sqrt (default: 'sqrt' for adaptive optimisers, else 'linear')")
    add('--sched', type=str, default='cosine', metavar='NAME', help="any of timm's schedules")
    add('--sched-on-updates', action='store_true', help='change the learning rate every step, not every epoch')
    add('--epochs', type=int, default=300, metavar='N', help='length of the training')
    add('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of rising learning rate')
    add('--warmup-lr', type=float, default=1e-5, metavar='LR', help='learning rate at the start')
    add('--warmup-prefix', action='store_true', help='the warm-up comes before the schedule, not out of it')
    add('--min-lr', type=float, default=0, metavar='LR', help='learning rate at the end')
    add('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at --min-lr after the schedule')
    add('--decay-epochs', type=float, default=90, metavar='N', help='epochs between the steps of step-wise schedules')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N', help='or these epochs')
    add('--decay-rate', '--dr', type=float, default=0.1, metavar='RATE', help='decay of step-wise schedules; power of poly')
    add('--patience-epochs', type=int, default=10, metavar='N', help='epochs without progress before --sched plateau decays')
    add('--lr-noise', type=float, nargs='+', metavar='PART', help='parts of the schedule between which the rate is noisy')
    add('--lr-noise-pct', type=float, default=0.67, metavar='PCT', help='most of this noise')
    add('--lr-noise-std', type=float, default=1.0, metavar='STD', help='its standard deviation')
    add('--lr-cycle-mul', type=float, default=1.0, metavar='X', help='each cycle is as much longer than the one before')
    add('--lr-cycle-decay', type=float, default=0.5, metavar='X', help='and starts at this share of its rate')
    add('--lr-cycle-limit', type=int, default=1, metavar='N', help='cycles')
    add('--lr-k-decay', type=float, default=1.0, metavar='K', help='k-decay of cosine and poly')
    add('--lr-decay-fn', type=str, metavar='NAME', help='shape of the decay of --sched wsd and rsqrt')
    add('--lr-stable-timescale', type=float, metavar='N', help='epochs that rsqrt takes as its unit (default: the warm-up)')

    add = parser.add_argument_group('augmentation and regularisation').add_argument
    add('--no-aug', action='store_true', help='no augmentation')
    add('--train-crop-mode', type=str, metavar='MODE', help='how training images are cropped: rrc, rkrc or rkrr')
    add('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='PCT', help='part of an image that a crop keeps')
    add('--ratio', type=float, nargs='+', default=[3. / 4., 4. / 3.], metavar='R', help='aspect ratio of a crop')
    add('--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip')
    add('--vflip', type=float, default=0., metavar='P', help='probability of a vertical flip')
    add('--color-jitter', type=float, default=0.4, metavar='PCT', help='strength of colour changes')
    add('--color-jitter-prob', type=float, metavar='P', help='their probability (default: always)')
    add('--grayscale-prob', type=float, metavar='P', help='probability of a grey image')
    add('--gaussian-blur-prob', type=float, metavar='P', help='probability of a blurred image')
    add('--aa', type=str, metavar='NAME', help="AutoAugment policy: 'v0', 'original', 'rand-m9-mstd0.5', 'augmix-m3', ...")
    add('--train-interpolation', type=str, default='random', metavar='NAME', help='resizing of training images')
    add('--reprob', type=float, default=0., metavar='P', help='probability of random erasing')
    add('--remode', type=str, default='pixel', metavar='MODE', help='what erased pixels become: const, rand or pixel')
    add('--recount', type=int, default=1, metavar='N', help='erasures per image')
    add('--resplit', action='store_true', help='nothing is erased in the first augmentation split (or half of the batch)')
    add('--smoothing', type=float, default=0.1, metavar='P', help='label smoothing')
    add('--mixup', type=float, default=0., metavar='ALPHA', help='mixup, if above 0')
    add('--cutmix', type=float, default=0., metavar='ALPHA', help='cutmix, if above 0')
    add('--cutmix-minmax', type=float, nargs='+', metavar='R', help='least and largest ratio of cutmix')
    add('--mixup-prob', type=float, default=1., metavar='P', help='probability of mixup or cutmix')
    add('--mixup-switch-prob', type=float, default=0.5, metavar='P', help='probability of cutmix, of the two')
    add('--mixup-mode', type=str, default='batch', metavar='MODE', help='what shares a mixing ratio: batch, pair or elem')
    add('--mixup-off-epoch', type=int, default=0, metavar='N', help='no mixing from this epoch on, if above 0')

    add = parser.add_argument_group('task and loss').add_argument
    add('--task', type=str, default='classification', choices=['classification', 'multilabel'],
        help='one class per image, or any number')
    add('--target-format', type=str, metavar='NAME', help='how labels are written: indices, or multihot (--task multilabel)')
    add('--loss', type=str, metavar='NAME', help=f"{', '.join(LOSS_TYPES)} (default: ce, or bce for multilabel)")
    add('--loss-pos-weight', type=str, metavar='W',
        help='weight of positives: a number, list, file, or neg_pos (needs --class-stats)')
    add('--loss-class-weight', type=str, metavar='W', help='weight of classes: list, file, inv_freq or effective_num')
    add('--loss-weight-power', type=float, metavar='X', help='power of computed weights (default: 1)')
    add('--class-stats', type=str, metavar='FILE', help="JSON with the classes' pos_counts and num_samples")
    add('--poly-gamma', type=float, metavar='X', help='focusing parameter of --loss poly')
    add('--poly-epsilon', type=float, metavar='X', help='coefficient of --loss poly')
    add('--bce-loss', action='store_true', help='same as --loss bce')
    add('--bce-sum', action='store_true', help='sum the BCE over the classes')
    add('--bce-target-thresh', type=float, metavar='P', help='mixed targets above this are 1, else 0')
    add('--bce-pos-weight', type=float, metavar='W', help='same as --loss-pos-weight')

    add = parser.add_argument_group('averaged weights').add_argument
    add('--model-ema', action='store_true', help='average the weights; the averages are what is scored and saved')
    add('--model-ema-force-cpu', action='store_true', help='keep them on the CPU')
    add('--model-ema-decay', type=float, default=0.9998, metavar='D', help='decay of these averages')
    add('--model-ema-warmup', action='store_true', help='let the decay rise from 0')

    add = parser.add_argument_group('run').add_argument
    add('--seed', type=int, default=42, metavar='S', help='seed of all that is random')


def add_train_arguments(parser: ArgumentParser) -> None:
    """Adds the flags of timm's train.py that only train has."""
    add = parser.add_argument_group('task of a training').add_argument
    add('--multilabel-threshold', type=float, default=0.5, metavar='P',
        help='probability from which a label counts as found, for F1')
    add('--jsd-loss', action='store_true', help='same as --loss jsd (needs --aug-splits)')
    add('--aug-repeats', type=float, default=0, metavar='N', help='repetitions of an image in a batch of several processes')
    add('--aug-splits', type=int, default=0, metavar='N', help='parts of a batch with augmentations of their own: 0, or 2 and more')
    add('--drop-connect', type=float, metavar='P', help='old name of --drop-path')

    add = parser.add_argument_group('data of a training').add_argument
    parser.add_argument('data', nargs='?', metavar='FOLDER', help='old form of --data-dir')
    add('--train-num-samples', type=int, metavar='N', help='training images, of a dataset that does not say')
    add('--val-num-samples', type=int, metavar='N', help='validation images, of a dataset that does not say')
    add('--in-chans', type=int, metavar='N', help='channels of the images')
    add('--input-size', type=int, nargs=3, metavar='N', help='channels, height and width of the images')
    add('--epoch-repeats', type=float, default=0., metavar='N', help='times that an epoch goes through the images')
    add('--no-prefetcher', action='store_true', help='images are normalised by the loading processes')
    add('--use-multi-epochs-loader', action='store_true', help='loading goes on from epoch to epoch')
    add('--tta', type=int, default=0, metavar='N', help='validation outputs are means over N images of the loader')
    add('--train-img-sizes', type=int, nargs='+', metavar='N', help='sides that training images take in turn')
    add('--train-batch-sizes', type=int, nargs='+', metavar='N', help='batch size of each of these sides')
    add('--train-size-probs', type=float, nargs='+', metavar='P', help='how often each side comes')
    add('--train-size-schedule', type=str, default='constant', choices=['constant', 'progressive'],
        help='or from the first side to the last')
    add('--train-size-schedule-spread', type=float, default=0.65, metavar='X', help='how wide the progress is, in sides')
    add('--train-size-random-mix', type=float, default=0.1, metavar='PART', help='part of the batches with any side')
    add('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, metavar='N', help='batches of an epoch')
    add('--variable-batch-loss-scale', type=str, default='none', choices=['none', 'sqrt', 'linear'],
        help='how the loss follows the size of a batch, relative to --batch-size')
    add('--naflex-loader', action='store_true', help='patches of images in their own aspect ratio, for NaFlex models')
    add('--naflex-train-seq-lens', type=int, nargs='+', default=[128, 256, 576, 784, 1024], metavar='N', help='patches per image')
    add('--naflex-max-seq-len', type=int, default=576, metavar='N', help='patches per validation image')
    add('--naflex-patch-sizes', type=int, nargs='+', metavar='N', help='sides that patches take in turn')
    add('--naflex-patch-size-probs', type=float, nargs='+', metavar='P', help='how often each comes')
    add('--naflex-loss-scale', type=str, default='linear', choices=['none', 'sqrt', 'linear'],
        help='how the loss follows the size of a batch')
    add('--naflex-patchify-channels-first', action='store_true', help='patches in the order channel, row, column')

    add = parser.add_argument_group('model of a training').add_argument
    add('--fuser', default='', type=str, metavar='NAME', help='fuser of torchscript: te, old or nvfuser')
    add('--grad-checkpointing', action='store_true', help='less memory for more time')
    add('--head-init-scale', type=float, metavar='X', help='scale the initial weights of the classifier')
    add('--head-init-bias', type=float, metavar='X', help='initial bias of the classifier')
    add('--torchcompile', nargs='?', type=str, default=None, const='inductor', metavar='BACKEND', help='torch.compile')
    add('--torchcompile-mode', type=str, metavar='MODE', help='its mode')
    add('--torchscript', action='store_true', help='torch.jit.script the model')
    add('--model-dtype', type=str, metavar='NAME', help='type of the weights, without --amp: bfloat16, float16')
    add('--no-ddp-bb', action='store_true', help='several processes do not copy buffers before each step')
    add('--synchronize-step', action='store_true', help='wait for the device after each step')
    add('--local_rank', type=int, default=0, metavar='N', help='set by old launchers')
    add('--sync-bn', action='store_true', help='batch norms see the batches of all processes')
    add('--dist-bn', type=str, default='reduce', metavar='HOW',
        help='after an epoch batch norms take the mean statistics of all processes (reduce), or those of the first (broadcast)')
    add('--split-bn', action='store_true', help='batch norms of their own for each augmentation split')

    add = parser.add_argument_group('distillation').add_argument
    add('--kd-model-name', type=str, metavar='NAME', help='teacher, a timm model with weights; it turns distillation on')
    add('--kd-distill-type', type=str, default='logit', choices=['logit', 'feature', 'token'],
        help='what the student learns from it')
    add('--kd-loss-type', type=str, default='kl', metavar='NAME', help='loss between logits: kl')
    add('--distill-loss-weight', type=float, metavar='W', help='weight of the distillation')
    add('--task-loss-weight', type=float, metavar='W', help='weight of the classification')
    add('--kd-temperature', type=float, default=4.0, metavar='T', help='softmax temperature')
    add('--kd-student-feature-dim', type=int, metavar='N', help="width of the student's features (default: found)")
    add('--kd-teacher-feature-dim', type=int, metavar='N', help="width of the teacher's features (default: found)")
    add('--kd-token-distill-type', type=str, default='soft', choices=['soft', 'hard'],
        help="the teacher's probabilities, or its answer")

    add = parser.add_argument_group('checkpoints, logs and output').add_argument
    add('--output', default='', type=str, metavar='FOLDER', help='folder of all runs (default: ./output/train)')
    add('--experiment', default='', type=str, metavar='NAME', help='folder of this run in it (default: time, model and image size)')
    add('--resume', default='', type=str, metavar='FILE',
        help="checkpoint to go on from; 'auto' is the last one of --experiment, if any")
    add('--no-resume-opt', action='store_true', help='with a new optimiser')
    add('--start-epoch', type=int, metavar='N', help='first epoch (default: 0, or the next one)')
    add('--stop-epoch', type=int, metavar='N', help='stop after N epochs, with the schedule of --epochs')
    add('--save-epochs', type=int, nargs='*', default=[], metavar='N', help='keep the state after N epochs as milestone-N.pth.tar')
    add('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep')
    add('--recovery-interval', type=int, default=0, metavar='N', help='batches between recovery checkpoints')
    add('--log-interval', type=int, default=50, metavar='N', help='batches between lines of the log')
    add('--val-interval', type=int, default=1, metavar='N', help='epochs between validations')
    add('--eval-metric', default='top1', type=str, metavar='NAME', help='what the best checkpoint is best at (multilabel: map)')
    add('--save-images', action='store_true', help='save each logged batch as an image')
    add('--log-wandb', action='store_true', help='log to wandb')
    add('--wandb-project', type=str, metavar='NAME', help='project there')
    add('--wandb-tags', type=str, nargs='+', default=[], metavar='TAG', help='tags there')
    add('--wandb-resume-id', default='', type=str, metavar='ID', help='run to go on with there')


def add_own_arguments(parser: ArgumentParser) -> None:
    """Adds the flags of train that timm's train.py does not have; left alone, they leave no trace in what a run writes."""
    add = parser.add_argument_group('widths (not in timm)').add_argument
    add('--widths', metavar='PATH', help='config.json of a search, or its folder: --model takes the widths found')
    add('--inherit', metavar='FILE',
        help="start from a search's shared network (search/POLICY.pth.tar) or from a checkpoint of the "
        'base: its channels are cut to the widths')
    add('--importance', choices=IMPORTANCE, metavar='NAME',
        help=f"which channels --inherit and --pretrained keep: the most important "
        f"by {', '.join(IMPORTANCE)} (default: the first ones, as a search does)")
    add('--finetune-from', metavar='PATH',
        help='start from trained weights of the same shapes: a saved model\'s folder (which then is '
        '--model, too) or a checkpoint; another number of classes gets a new classifier')
    add('--teacher-img-size', type=int, metavar='N', help="side of the images that --kd-model-name sees (default: the student's)")
    add('--latency-backend', choices=BACKEND_NAMES, metavar='NAME',
        help=f"time the final model next to its base: {', '.join(BACKEND_NAMES)}")
    add('--latency-precision', choices=('fp32', 'fp16'), metavar='NAME', help='in what to compute then: fp32 (default) or fp16')
    add('--latency-batch', type=int, metavar='N', help='images per call then (default: 1 on a CPU, 16 on a GPU)')
    add('--save-pretrained', metavar='FOLDER',
        help="save the final model for timm.create_model('local-dir:FOLDER', pretrained=True)")
    add('--push-to-hub', metavar='OWNER/NAME', help='and to the Hugging Face Hub')


OWN = ('widths', 'inherit', 'importance', 'finetune_from', 'teacher_img_size', 'latency_backend', 'latency_precision',
       'latency_batch', 'save_pretrained', 'push_to_hub')


def flags_given(parser: ArgumentParser, argv: Optional[Sequence[str]]) -> set[str]:
    """The flags that a command line says, by their names in Python; but for those that may be said several times."""
    unset = object()
    known = [a.dest for a in parser._actions if not isinstance(a, _AppendAction)]
    found = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(known, unset))))
    return {k for k in known if found.get(k, unset) is not unset}


def check_arguments(args: Namespace, ranges: Mapping[str, tuple] = RANGES) -> None:
    """Refuses values that would fail later: numbers out of range, unknown names, no such device; imports --device-modules.

    Raises:
        UsageError: With the flag, its value and what would be right.
    """
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if value is None:
            continue
        if not ((least is None or value >= least) and (most is None or value <= most)):
            wanted = f'at least {least}' if most is None else f'from {least} to {most}'
            raise UsageError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")
    for name, choices in CHOICES.items():
        if getattr(args, name) not in choices:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} must be {' or '.join(filter(None, choices))}, not '{getattr(args, name)}'")
    for name in ('scale', 'ratio'):
        pair = getattr(args, name)
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] or name == 'scale' and pair[1] > 1:
            raise UsageError(f"--{name} needs two numbers, the smaller first{', from above 0 to 1' * (name == 'scale')}, "
                             f"not {' '.join(f'{x:g}' for x in pair)}")
    if args.cutmix_minmax is not None and len(args.cutmix_minmax) != 2:
        raise UsageError(f'--cutmix-minmax needs two numbers, not {len(args.cutmix_minmax)}')
    for name in args.device_modules or ():
        try:
            import_module(name)
        except ImportError as e:
            raise UsageError(f"--device-modules '{name}' cannot be imported: {e}") from None
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as e:
        raise UsageError(f"--device '{args.device}' cannot be used here: {str(e).splitlines()[0]}") from None


def check_output(folder: Path, overwrite: bool, source: str = '', flag: str = '--output') -> None:
    """Refuses an output folder that is in use, cannot be made, or is where the model comes from.

    Args:
        folder: The folder.
        overwrite: Whether it may be in use.
        source: --model.
        flag: The flag that names the folder.

    Raises:
        UsageError: With the reason.
    """
    kind, _, path = source.partition(':')
    if kind == 'local-dir' and Path(path).resolve() == folder.resolve():
        raise UsageError(f"{flag} '{folder}' is the folder of --model: the results would replace what they start from")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{flag} '{folder}' is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UsageError(f"{flag} '{folder}' exists and is not empty: give another folder, or --overwrite")
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f"{flag} '{folder}' cannot be made: '{there}' is not a folder that one can write to")


def write_args(args: Namespace, folder: Path) -> None:
    """Writes args.yaml, as timm does; without what only tells processes apart."""
    said = {k: v for k, v in vars(args).items() if k not in PROCESS}
    (folder / 'args.yaml').write_text(yaml.safe_dump(said, default_flow_style=False))
