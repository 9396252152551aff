"""The flags: timm's, frozen; one definition for search and train; YAML files as timm reads them."""
import json
from pathlib import Path

import pytest
import torch
import yaml

from timm_width import search, search_flags
from timm_width.arguments import OWN, Parser, add_arguments
from timm_width.commandline import RECIPES as RECIPE_FOLDER
from timm_width.commandline import make_parser, parse
from timm_width.data import UsageError

ROOT = Path(__file__).parent.parent
FACTS = ROOT.parent / 'shared' / 'facts' / 'train_flags.json'  # what timm's train.py was seen to take
FROZEN = json.loads((Path(__file__).parent / 'train_flags.json').read_text())
OTHER = ('help', 'config', 'sweep_locks', 'sweep_attempt')  # of timm's pre-parser, and no flags of a training
ACTIONS = {'_StoreAction': 'store', '_StoreTrueAction': 'store_true', 'ParseKwargs': 'ParseKwargs'}


def described(action):
    """A flag as train_flags.json has it; what is as argparse has it by default is left out."""
    found = {'flags': sorted(action.option_strings or [action.dest]), 'default': action.default, 'action': ACTIONS[type(action).__name__],
             'type': action.type.__name__ if action.type else None, 'choices': list(action.choices) if action.choices else None,
             'nargs': action.nargs if ACTIONS[type(action).__name__] == 'store' else None,
             'const': action.const if ACTIONS[type(action).__name__] == 'store' else None}
    return {k: v for k, v in found.items() if v is not None and (k, v) != ('action', 'store')}


def flags(parser):
    return {a.dest: described(a) for a in parser._actions if a.dest not in OTHER and type(a).__name__ in ACTIONS}


def test_the_flags_are_timms_and_ours():
    ours = flags(make_parser())
    assert set(ours) - set(FROZEN) == set(OWN)
    assert [(k, ours.get(k), v) for k, v in FROZEN.items() if ours.get(k) != v] == []


def test_the_frozen_list_is_the_facts():
    if not FACTS.is_file():
        pytest.skip(f'{FACTS} is not here')
    known = {}
    for f in json.loads(FACTS.read_text()):
        if f['dest'] not in OTHER:
            simple = f['action'] == 'store'
            nargs = {'*|+': '*'}.get(f['nargs'], f['nargs'])
            found = {'flags': sorted(f['flags']), **{k: f[k] for k in ('default', 'type', 'choices')}, 'nargs': nargs if simple else None,
                     'const': f['const'] if simple else None, 'action': None if simple else f['action']}
            known[f['dest']] = {k: v for k, v in found.items() if v is not None}
    assert known == FROZEN


def test_search_has_its_flags_from_the_same_definition():
    """All that the two share say the same, but for the defaults that a search has of its own."""
    shared = Parser()
    add_arguments(shared)
    wanted = flags(shared)
    assert len(wanted) > 100 and {k: FROZEN[k] for k in wanted} == wanted
    args, _ = search.parse(['--policy', 'random', '--budget', 'macs=0.5x', '--output', 'x'])
    other = {k for k, v in wanted.items() if getattr(args, k) != shared.get_default(k)}
    assert other <= {*search_flags.SEARCH_DEFAULTS}
    assert (args.epochs, args.batch_size, args.validation_batch_size, args.sched_on_updates) == (50, 64, 512, True)


def test_own_flags_are_off_by_default():
    args, text = parse(['--device', 'cpu'])
    assert all(getattr(args, name) is None for name in OWN) and not set(OWN) & set(yaml.safe_load(text))
    assert set(yaml.safe_load(text)) == set(FROZEN)


def test_flags_may_be_shortened():
    assert parse(['--device', 'cpu', '--weight-dec', '0.5', '--train-steps-per-epoch', '3'])[0].weight_decay == 0.5


def test_without_a_gpu_the_default_device_is_the_cpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    args, text = parse([])
    assert args.device == 'cpu' and yaml.safe_load(text)['device'] == 'cuda'
    assert 'training on the CPU' in capsys.readouterr().out
    with pytest.raises(UsageError, match="--device 'cuda' cannot be used here"):
        parse(['--device', 'cuda'])


# -- YAML --------------------------------------------------------------------------------------------------------------------


def with_file(tmp_path, content, *flags):
    path = tmp_path / 'c.yaml'
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return parse(['-c', str(path), '--device', 'cpu', *flags])[0]


def test_yaml_sets_flags_and_the_command_line_goes_before_it(tmp_path):
    args = with_file(tmp_path, {'batch_size': 64, 'opt': 'adamw', 'model_ema': True, 'scale': [0.5, 1.], 'dataset': 'digits', 'stop_epoch': None,
                                'model_kwargs': {'a': {'b': [1]}}, 'input_size': [3, 32, 32], 'save_epochs': None}, '--opt', 'lamb')
    assert (args.batch_size, args.opt, args.model_ema, args.scale) == (64, 'lamb', True, [0.5, 1.])
    assert args.model_kwargs == {'a': {'b': [1]}} and args.input_size == [3, 32, 32] and args.save_epochs == []
    assert args.img_size == 32 and args.hflip == 0.  # what --dataset digits brings


def test_yaml_numbers_may_be_strings(tmp_path):
    args = with_file(tmp_path, 'lr: 3e-4\nepochs: "10"\nmean: ["0.5", 0.4, "0.3"]\nmomentum: 1\n')
    assert args.lr == 3e-4 and args.epochs == 10 and args.mean == [0.5, 0.4, 0.3] and isinstance(args.momentum, float)


def test_yaml_with_an_unknown_key_is_a_warning(tmp_path, caplog):
    assert with_file(tmp_path, {'lr': 0.5, 'weight_decai': 1}).lr == 0.5
    assert "'weight_decai' is no flag, did you mean 'weight_decay'" in caplog.text


@pytest.mark.parametrize('content, says', [
    ({'train_size_schedule': 'nope'}, 'train_size_schedule must be one of constant, progressive'), ({'lr': 'fast'}, "lr must be a number, not 'fast'"),
    ({'input_size': 224}, 'input_size must be a list of 3'), ({'decay_milestones': [1, 'x']}, 'decay_milestones must be a number'),
    ({'epochs': 1.5}, 'epochs must be a whole number'), ({'amp': 'yes'}, 'amp must be true or false'), ({'epochs': True}, 'epochs must be a number'),
    ({'epochs': None}, 'epochs must be given'), ({'model': ['a']}, 'model must be one value'), ({'model_kwargs': 'a=1'}, 'must be a mapping'),
    ('- a\n', 'must hold flags'), ('a: [', 'cannot be read')])
def test_yaml_with_a_bad_value_is_an_error(content, says, tmp_path):
    with pytest.raises(UsageError) as e:
        with_file(tmp_path, content)
    assert says in str(e.value) and '\n' not in str(e.value)


def test_a_missing_file_is_an_error():
    with pytest.raises(UsageError, match="--config 'nowhere' cannot be read"):
        parse(['--config', 'nowhere'])


# -- what follows from flags -------------------------------------------------------------------------------------------------

MULTI = ['--task', 'multilabel', '--device', 'cpu']


def test_old_names_of_losses(tmp_path):
    args, _ = parse([*MULTI, '--bce-loss', '--bce-pos-weight', '2'])
    assert args.loss == 'bce' and args.loss_pos_weight == '2.0'
    assert parse(['--device', 'cpu', '--jsd-loss', '--aug-splits', '3'])[0].loss == 'jsd'
    assert parse(['--device', 'cpu', '--drop-connect', '0.2'])[0].drop_path == 0.2
    assert parse(['--device', 'cpu', 'folder'])[0].data_dir == 'folder'


def test_multilabel_has_defaults_of_its_own():
    args, _ = parse(MULTI)
    assert (args.smoothing, args.eval_metric) == (0., 'map')
    assert parse([*MULTI, '--smoothing', '0.1'])[0].smoothing == 0.1


@pytest.mark.parametrize('bad, says', [
    ([*MULTI, '--bce-loss', '--loss', 'asl'], '--bce-loss and --loss asl'), ([*MULTI, '--loss', 'twoway', '--mixup', '0.5'], 'binary targets'),
    ([*MULTI, '--loss', 'zlpr', '--loss-pos-weight', '2'], 'weights are only supported'), (['--jsd-loss'], '--aug-splits'), (['--loss', 'zlpr'], 'multi-label'),
    ([*MULTI, '--loss-class-weight', 'missing.json'], 'missing.json'), ([*MULTI, '--loss', 'db'], 'class_counts'),
    ([*MULTI, '--loss-pos-weight', 'neg_pos'], 'requires class stats'), (['--loss', 'nonesuch'], "'nonesuch'"),
    (['--target-format', 'multihot'], '--task multilabel'), ([*MULTI, '--kd-model-name', 'resnet18'], 'leave out --task multilabel'),
    (['--amp', '--model-dtype', 'bfloat16'], 'exclude one another'), (['--resume', 'auto'], 'needs --experiment'),
    (['--split-bn'], '--aug-splits'), (['--aug-splits', '1'], 'is no split'), (['--model-dtype', 'x'], 'is no type'),
    (['--wieght-decay', '1'], "did you mean '--weight-decay'"), (['--latency-backend', 'x'], 'invalid choice')])
def test_what_does_not_go_together_is_one_message(bad, says):
    with pytest.raises(UsageError) as e:
        parse(['--device', 'cpu', *bad])
    assert says in str(e.value) and '\n' not in str(e.value)


def test_a_sweep_holds_its_locks_and_ends_with_its_attempt(tmp_path):
    """timm's sweep.py gives two flags that are no flags of the training."""
    import fcntl
    (tmp_path / 'lock').touch(), (tmp_path / 'attempt').write_text('a1')
    argv = ['--device', 'cpu', '--sweep-locks', str(tmp_path / 'lock'), '--sweep-attempt', str(tmp_path / 'attempt')]
    args, text = parse([*argv, 'a1'])
    assert 'sweep' not in text and not [k for k in vars(args) if 'sweep' in k]
    with (tmp_path / 'lock').open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(UsageError, match='not the live one'):
        parse([*argv, 'a0'])


# -- recipes -----------------------------------------------------------------------------------------------------------------

RECIPES = sorted(RECIPE_FOLDER.glob('*.yaml'))


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_recipes_are_read_without_a_warning(path, caplog):
    assert parse(['-c', str(path), '--device', 'cpu']) == parse(['-c', path.stem, '--device', 'cpu'])
    assert not caplog.text


def test_there_are_recipes():
    assert len(RECIPES) >= 8
