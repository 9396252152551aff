"""Law 4, rebuilding: config.json -> timm.create_model in a fresh process -> the same model. And what a config must not do."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

import timm_width
from timm_width.config import FORMAT, ConfigError, Spec, fingerprint, load_spec, save
from timm_width.laws import random_widths, randomise

torch.set_num_threads(1)

NETS = [
    'resnet50', 'mobilenetv2_100', 'efficientnet_b0', 'regnety_016', 'densenet121', 'convnext_atto', 'hrnet_w18_small',
    'res2net50_14w_8s', 'cs3darknet_focus_s', 'ghostnet_100', 'repvgg_a0', 'mobileone_s0', 'nf_regnet_b0', 'nfnet_l0',
    'skresnet18', 'tresnet_m', 'dpn48b', 'fasternet_t0', 'rexnet_100',
]
LIGHT = ['mobilenetv2_100', 'convnext_atto', 'cs3darknet_focus_s', 'ghostnet_100', 'fasternet_t0', 'rexnet_100', 'test_nfnet']
SMALL = 'test_resnet'
ROOT = Path(__file__).parents[1]


def space_of(name):
    with torch.device('meta'):
        return timm_width.trace(timm.create_model(name))


def widths_of(space, kind, seed=1):
    """'half', '1.5x', 'random', or 'narrow': random, none above the base."""
    if kind in ('random', 'narrow'):
        return random_widths(space, seed, high=1.5 if kind == 'random' else 1)
    return space.scaled({'half': 0.5, '1.5x': 1.5}[kind])


def resized(name, kind, skips=0, **kwargs):
    """`<name>_width` with random batch norms, at these widths, without some of its blocks."""
    timm_width.register(name)
    space = space_of(name)
    left_out = [b.name for b in space.blocks][:skips]
    model = timm.create_model(f'{name}_width', widths=widths_of(space, kind), skips=left_out, **kwargs)
    return randomise(model).eval()


@pytest.fixture
def small():
    return resized(SMALL, 'narrow')


@pytest.fixture
def folder(small, tmp_path):
    save(small, tmp_path / 'model')
    return tmp_path / 'model'


def image(size=64, channels=3):
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model, x=None):
    return model(image() if x is None else x)


# -- law 4 -----------------------------------------------------------------------------------------------------------------

REBUILD = """
import json, sys
import timm, torch
import timm_width
torch.set_num_threads(1)
for job in json.load(open(sys.argv[1])):
    found = {}
    try:
        if job['register']:
            timm_width.register(job['register'])
        model = timm.create_model(job['model'], pretrained=True).eval()
        features = timm.create_model(job['model'], pretrained=True, features_only=True).eval()
        x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = {'logits': model(x), 'levels': [list(o.shape) for o in features(x)],
                     'width': model.forward_features(x).shape[1]}
        found |= {'indices': list(features.feature_info.out_indices),
                  'channels': features.feature_info.channels(), 'reduction': features.feature_info.reduction(),
                  'num_features': model.num_features, 'head_hidden_size': model.head_hidden_size,
                  'architecture': model.pretrained_cfg['architecture'],
                  'shapes': {n: list(t.shape) for n, t in model.state_dict().items()}}
    except Exception as e:
        found = {'error': f'{type(e).__name__}: {e}'}
    torch.save(found, job['out'])
"""


def rebuild(jobs, tmp_path, **environment):
    """Runs REBUILD in a new interpreter over jobs of (model, base to register or None); returns what it found, in order."""
    (tmp_path / 'rebuild.py').write_text(REBUILD)
    listed = [{'model': m, 'register': b, 'out': str(tmp_path / f'{i}.pt')} for i, (m, b) in enumerate(jobs)]
    (tmp_path / 'jobs.json').write_text(json.dumps(listed))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    subprocess.run([sys.executable, str(tmp_path / 'rebuild.py'), str(tmp_path / 'jobs.json')], check=True,
                   env={**os.environ, 'PYTHONPATH': path, **environment})
    return [torch.load(j['out']) for j in listed]


def differences(model, found):
    """How a rebuilt model differs from the one saved; empty if it does not."""
    if 'error' in found:
        return [found['error']]
    logits = run(model)
    out = []
    off = ((logits - found['logits']).abs().max() / logits.abs().max()).item()
    if not off <= 1e-5:  # mostly 0, but another process may pick another kernel, by the alignment of memory
        out.append(f'logits differ by {off:.1e} of the largest')
    if {n: list(t.shape) for n, t in model.state_dict().items()} != found['shapes']:
        out.append('shapes')
    if found['channels'] != [s[1] for s in found['levels']]:
        out.append(f"features_only says {found['channels']} and gives {found['levels']}")
    if found['channels'] != [model.feature_info[i]['num_chs'] for i in found['indices']]:
        out.append(f"features_only says {found['channels']}, the model {[i['num_chs'] for i in model.feature_info]}")
    if found['reduction'] != [64 // s[-1] for s in found['levels']]:
        out.append(f"reductions {found['reduction']} and {found['levels']}")
    if found['num_features'] != found['width'] or found['num_features'] != model.num_features:
        out.append('num_features')
    if found['head_hidden_size'] != model.head_hidden_size:
        out.append('head_hidden_size')
    return out


def saved_all(names, kind, tmp_path):
    """Saves each model, by us or by timm in turn; (models, jobs)."""
    models, jobs = {}, []
    for k, name in enumerate(names):
        model = models[name] = resized(name, kind, skips=k % 3)
        if k % 2:
            save(model, tmp_path / name)
        else:
            save_for_hf(model, tmp_path / name, safe_serialization=bool(k % 4))
        jobs.append((f'local-dir:{tmp_path / name}', name))
    return models, jobs


def test_rebuilt_in_a_fresh_process(tmp_path):
    """Random widths, saved by us and by timm; a plain timm model that was resized; a Hub repository in an offline cache."""
    models, jobs = saved_all(LIGHT, 'random', tmp_path)

    plain = timm.create_model('resnet18')
    timm_width.resize(plain, timm_width.trace(plain), widths_of(space_of('resnet18'), 'narrow'), skips=['layer2.1'])
    models['plain'] = randomise(plain).eval()
    save_for_hf(plain, tmp_path / 'plain', safe_serialization=True)
    jobs.append((f"local-dir:{tmp_path / 'plain'}", None))

    models['hub'] = resized(SMALL, 'random')
    snapshot = tmp_path / 'hub' / 'models--me--net_width.test' / 'snapshots' / ('0' * 40)
    save(models['hub'], snapshot)
    refs = snapshot.parents[1] / 'refs'
    refs.mkdir()
    (refs / 'main').write_text('0' * 40)
    jobs.append(('hf-hub:me/net_width.test', SMALL))

    found = rebuild(jobs, tmp_path, HF_HUB_CACHE=str(tmp_path / 'hub'), HF_HUB_OFFLINE='1')
    faults = {n: f for n, f in ((n, differences(m, r)) for (n, m), r in zip(models.items(), found)) if f}
    assert not faults
    assert [r['architecture'] for r in found][-2:] == ['resnet18_width', f'{SMALL}_width']


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['random', 'half', '1.5x'])
def test_rebuilt_in_a_fresh_process_all(kind, tmp_path):
    models, jobs = saved_all(NETS, kind, tmp_path)
    found = rebuild(jobs, tmp_path)
    for name in NETS:
        shutil.rmtree(tmp_path / name)  # gigabytes
    faults = {n: f for n, f in ((n, differences(m, r)) for (n, m), r in zip(models.items(), found)) if f}
    assert not faults


def test_overrides_of_a_saved_folder(small, folder):
    """What timm lets one change about a saved model: classes, input channels, features, head, device, dtype."""
    name = f'local-dir:{folder}'
    head = small.pretrained_cfg['classifier']
    seven = timm.create_model(name, pretrained=True, num_classes=7).eval()
    ours, theirs = seven.state_dict(), small.state_dict()
    assert run(seven).shape == (1, 7)
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items() if not n.startswith(head + '.'))
    gray = timm.create_model(name, pretrained=True, in_chans=1).eval()
    assert torch.allclose(run(gray, torch.ones(1, 1, 64, 64)), run(small, torch.ones(1, 3, 64, 64)), atol=1e-4)
    assert run(timm.create_model(name, pretrained=True, num_classes=0).eval()).shape == (1, small.head_hidden_size)
    assert run(timm.create_model(name, num_classes=0, global_pool='').eval()).ndim == 4
    meta = timm.create_model(name, device='meta')
    assert all(p.is_meta for p in meta.parameters())
    assert run(timm.create_model(name, dtype=torch.bfloat16).eval(), image().bfloat16()).dtype == torch.bfloat16
    features = timm.create_model(name, pretrained=True, features_only=True, out_indices=(1, 2)).eval()
    assert [o.shape[1] for o in run(features)] == [small.feature_info[i]['num_chs'] for i in (1, 2)]
    with pytest.raises(ConfigError, match='other shapes'):  # other widths than the weights have
        timm.create_model(name, pretrained=True, widths={})


def test_saved_again(small, folder, tmp_path):
    """Rebuilt, changed and saved: the second folder rebuilds too."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=5, in_chans=1).eval()
    save(model, tmp_path / 'two')
    again = timm.create_model(f"local-dir:{tmp_path / 'two'}", pretrained=True).eval()
    assert torch.equal(run(again, image(channels=1)), run(model, image(channels=1)))
    small.reset_classifier(3)
    save(small, tmp_path / 'three')
    again = timm.create_model(f"local-dir:{tmp_path / 'three'}", pretrained=True).eval()
    assert torch.equal(run(again), run(small)) and again.num_classes == 3


def test_saved_at_base_widths(tmp_path):
    model = randomise(timm.create_model(SMALL)).eval()
    save(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(run(again), run(model))
    assert load_spec(tmp_path).widths == {}


def test_channels_last_is_saved(tmp_path):
    model = resized(SMALL, 'narrow').to(memory_format=torch.channels_last)
    save(model, tmp_path)
    assert any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in model.parameters())
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.allclose(run(again), run(model), atol=1e-5)


def test_the_files(small, folder):
    data = json.loads((folder / 'config.json').read_text())
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'model.safetensors']
    assert data['architecture'] == f'{SMALL}_width'
    args = data['model_args']
    assert args['format'] == FORMAT and args['shapes'] == fingerprint(small) and args['skips'] == []
    assert all(type(w) is int for w in args['widths'].values())
    assert 'importance' not in args and 'pretrained' not in args
    base = timm.get_pretrained_cfg(SMALL)
    assert data['pretrained_cfg']['mean'] == list(base.mean) and data['pretrained_cfg']['crop_pct'] == base.crop_pct
    assert not {'url', 'file', 'hf_hub_id', 'source'} & set(data['pretrained_cfg'])


def test_provenance_and_weights_are_options(small, tmp_path):
    path = save(small, tmp_path, provenance={'policy': 'test', 'seed': 3}, weights=False)
    assert path == tmp_path / 'config.json' and [p.name for p in tmp_path.iterdir()] == ['config.json']
    spec = load_spec(tmp_path)
    assert spec.provenance == {'policy': 'test', 'seed': 3}
    assert isinstance(spec, Spec) and spec == load_spec(path)
    assert spec.architecture == f'{SMALL}_width' and spec.shapes == fingerprint(small)
    model = timm.create_model(spec.architecture, widths=spec.widths, skips=spec.skips, shapes=spec.shapes, **spec.model_args)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}


def test_the_fingerprint():
    """It changes with the widths, and not with classes, input channels, or the resolution."""
    def of(**kwargs):
        with torch.device('meta'):
            return fingerprint(timm.create_model(f'{SMALL}_width', **kwargs))
    assert of() == of(num_classes=7) == of(num_classes=0) == of(in_chans=1) == of(global_pool='max')
    assert of(widths={'layer1.0.conv1': 8}) != of()
    vit = timm_width.register('test_vit')
    with torch.device('meta'):
        assert fingerprint(timm.create_model(vit)) == fingerprint(timm.create_model(vit, img_size=96))


# -- what is refused -------------------------------------------------------------------------------------------------------


def edited(folder, **args):
    """Changes model_args of a saved config; `cfg`: those of its pretrained_cfg."""
    file = folder / 'config.json'
    data = json.loads(file.read_text())
    data['pretrained_cfg'].update(args.pop('cfg', {}))
    data['model_args'].update(args)
    file.write_text(json.dumps(data))
    return f'local-dir:{folder}'


def nested(depth):
    out = 1
    for _ in range(depth):
        out = [out]
    return out


FAULTS = [
    (dict(widths={'layer1.0.conv9': 8}), "did you mean 'layer1.0.conv"),
    (dict(widths={'layer1.0.conv1': 0}), 'outside'),
    (dict(widths={'layer1.0.conv1': -1}), 'outside'),
    (dict(widths={'layer1.0.conv1': 8.5}), 'whole number'),
    (dict(widths={'layer1.0.conv1': 1e9}), 'whole number'),
    (dict(widths={'layer1.0.conv1': 10 ** 9}), 'outside'),
    (dict(widths={'layer1.0.conv1': 10 ** 400}), 'outside'),
    (dict(widths={'layer1.0.conv1': '8'}), 'whole number'),
    (dict(widths={'layer1.0.conv1': None}), 'whole number'),
    (dict(widths={'layer1.0.conv1': True}), 'whole number'),
    (dict(widths={'layer1.0.conv1': [8]}), 'whole number'),
    (dict(widths={'layer1.0.conv1': nested(500)}), 'whole number'),
    (dict(widths={'layer1.0.conv1': 9}), 'other shapes'),
    (dict(widths={}), 'other shapes'),
    (dict(widths='widths.json'), 'load_spec'),
    (dict(widths=[1, 2]), 'must be a dict'),
    (dict(widths=nested(500)), 'must be a dict'),
    (dict(widths={f'g{i}': 1 for i in range(30_000)}), 'more than'),
    (dict(widths={'a' * 100_000: 1}), 'unknown group'),
    (dict(widths={"__import__('os').system('true')": 1}), 'unknown group'),
    (dict(skips='layer1.0'), 'must be a list'),
    (dict(skips={'layer1.0': 1}), 'must be a list'),
    (dict(skips=['../../etc/passwd']), 'cannot be skipped'),
    (dict(skips=[{}]), 'cannot be skipped'),
    (dict(skips=[nested(500)]), 'cannot be skipped'),
    (dict(format=FORMAT + 1), 'newer'),
    (dict(format='1'), 'format must be'),
    (dict(format=None), 'format must be'),
    (dict(format=0), 'format must be'),
    (dict(shapes='sha256:0000000000000000'), 'other shapes'),
    (dict(shapes=1), 'shapes must be'),
    (dict(shapes='x' * 10_000), 'shapes must be'),
    (dict(unknown=1), "unknown argument 'unknown'"),
    (dict(width={}), "did you mean 'widths'"),
    (dict(base='resnet50'), "unknown argument 'base'"),
    (dict(name='x'), "unknown argument 'name'"),
    (dict(pruned=True), "unknown argument 'pruned'"),
    (dict(pretrained_filter_fn='os.system'), "unknown argument 'pretrained_filter_fn'"),
    (dict(pretrained_strict=False), "unknown argument 'pretrained_strict'"),
    (dict(feature_cfg={}), "unknown argument 'feature_cfg'"),
    (dict(kwargs_filter=['widths']), "unknown argument 'kwargs_filter'"),
    (dict(checkpoint_path='/etc/passwd'), "unknown argument 'checkpoint_path'"),
    (dict(fresh='x'), "unknown argument 'fresh'"),
    (dict(keep={}), "unknown argument 'keep'"),
]


@pytest.mark.parametrize('args, said', FAULTS, ids=[f'{next(iter(a))}-{k}' for k, (a, _) in enumerate(FAULTS)])
def test_refused_configs(args, said, folder):
    before = sorted(folder.iterdir())
    with pytest.raises(timm_width.WidthError) as caught:
        timm.create_model(edited(folder, **args), pretrained=True)
    text = str(caught.value)
    assert said in text and f'{SMALL}_width' in text and len(text) < 5000
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize('key', ['pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir'])
def test_a_config_cannot_set_what_create_model_sets(key, folder, tmp_path):
    """timm itself refuses these, before an entry point is asked; load_spec refuses them, with all others of create_model."""
    other = tmp_path / 'other.pth'
    torch.save(timm.create_model(SMALL).state_dict(), other)
    name = edited(folder, **{key: {'file': str(other)}})
    with pytest.raises(TypeError, match='multiple values'):
        timm.create_model(name, pretrained=True)
    with pytest.raises(ConfigError, match=f'cannot set {key}'):
        load_spec(folder)


@pytest.mark.parametrize('cfg', [
    dict(file='OTHER'), dict(url='file://OTHER'), dict(hf_hub_id='a/b'), dict(source='timm', file='OTHER'),
    dict(custom_load=True, file='OTHER')], ids=lambda c: '-'.join(c))
def test_a_config_cannot_name_other_weights(cfg, small, folder, tmp_path):
    """The weights are those of the folder, whatever its pretrained_cfg says."""
    other = tmp_path / 'other.pth'
    torch.save(resized(SMALL, 'narrow').state_dict(), other)
    name = edited(folder, cfg={k: v.replace('OTHER', str(other)) if isinstance(v, str) else v for k, v in cfg.items()})
    assert torch.equal(run(timm.create_model(name, pretrained=True).eval()), run(small))


@pytest.mark.parametrize('args', [dict(act_layer='os.system'), dict(norm_layer='os.system'), dict(block='os.system')],
                         ids=lambda a: next(iter(a)))
def test_names_of_code_are_refused_by_timm(args, folder):
    with pytest.raises((KeyError, TypeError, AttributeError, ValueError)):
        timm.create_model(edited(folder, **args))


JUNK = {
    'empty': b'', 'binary': bytes(range(256)) * 40, 'text': b'hello', 'list': b'[]', 'number': b'1', 'null': b'null',
    'string': b'"a"',
    'truncated': b'{"architecture": "test_resnet_width", "model_args": {"widths": {"lay',
    'no architecture': b'{"model_args": {}}', 'architecture number': b'{"architecture": 7}',
    'architecture list': b'{"architecture": ["a"]}',
    'a base': b'{"architecture": "resnet50"}', 'a path': b'{"architecture": "../../etc/passwd"}',
    'args list': b'{"architecture": "test_resnet_width", "model_args": []}',
    'args string': b'{"architecture": "test_resnet_width", "model_args": "widths"}',
    'widths string': b'{"architecture": "test_resnet_width", "model_args": {"widths": "a.json"}}',
    'skips null': b'{"architecture": "test_resnet_width", "model_args": {"skips": null}}',
    'format': b'{"architecture": "test_resnet_width", "model_args": {"format": 2}}',
    'checkpoint_path': b'{"architecture": "test_resnet_width", "model_args": {"checkpoint_path": "/etc/passwd"}}',
    'nested': b'{"architecture": "test_resnet_width", "model_args": ' + b'[' * 100_000 + b']' * 100_000 + b'}',
    'nested dicts': b'{"a":' * 50_000 + b'1' + b'}' * 50_000,
    'ten megabytes': b'{"architecture": "' + b'a' * 10_000_000 + b'"}',
    'ten megabytes of widths': b'{"architecture": "test_resnet_width", "model_args": {"widths": {'
                               + b','.join(b'"g%d": 1' % i for i in range(900_000)) + b'}}}',
    'many widths': b'{"architecture": "test_resnet_width", "model_args": {"widths": {'
                   + b','.join(b'"g%d": 1' % i for i in range(30_000)) + b'}}}',
    'long number': b'{"architecture": "test_resnet_width", "model_args": {"format": ' + b'9' * 10_000 + b'}}',
    'pickle': b'cposix\nsystem\n(S"ls"\ntR.',
}


@pytest.mark.parametrize('junk', JUNK)
def test_load_spec_refuses_junk(junk, tmp_path):
    (tmp_path / 'config.json').write_bytes(JUNK[junk])
    with pytest.raises(ConfigError) as caught:
        load_spec(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 1000
    assert [p.name for p in tmp_path.iterdir()] == ['config.json']


def test_load_spec_of_nothing(tmp_path):
    for path in (tmp_path, tmp_path / 'config.json', tmp_path / 'no' / 'such'):
        with pytest.raises(ConfigError, match='no such file'):
            load_spec(path)


@pytest.mark.parametrize('model', [nn.Conv2d(3, 8, 3), nn.Sequential()])
def test_save_refuses_what_a_config_cannot_rebuild(model, tmp_path):
    with pytest.raises(ConfigError, match='not a timm model'):
        save(model, tmp_path / 'new')
    assert not list(tmp_path.iterdir())


def test_save_refuses_a_feature_extractor(tmp_path):
    with pytest.raises(ConfigError, match='features_only'):
        save(timm.create_model(f'{SMALL}_width', features_only=True), tmp_path / 'new')
    assert not list(tmp_path.iterdir())


def test_save_refuses_an_unregistered_name(tmp_path):
    model = timm.create_model(SMALL)
    model.pretrained_cfg = dict(model.pretrained_cfg, architecture='nowhere')
    with pytest.raises(ConfigError, match=r"register\('nowhere'\)"):
        save(model, tmp_path / 'new')
    assert not list(tmp_path.iterdir())


# -- a save that fails ------------------------------------------------------------------------------------------------------


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize('where', ['weights', 'config', 'rename'])
def test_a_failing_save_leaves_the_old_files(where, small, folder, monkeypatch):
    """The disk is full, say, while the weights or the config are written, or before either is in place."""
    before = contents(folder)

    def fail(*args, **kwargs):
        raise OSError('no space left on device')

    def half_written(tensors, path, **kwargs):
        Path(path).write_bytes(b'half')
        fail()

    if where == 'weights':
        monkeypatch.setattr('safetensors.torch.save_file', half_written)
    elif where == 'config':
        monkeypatch.setattr('json.dump', fail)
    else:
        monkeypatch.setattr('os.replace', fail)
    other = resized(SMALL, 'half')
    args = dict(other._model_args)
    with pytest.raises(OSError, match='no space left'):
        save(other, folder)
    assert contents(folder) == before
    assert other._model_args == args
    with pytest.raises(OSError, match='no space left'):
        save(other, folder.parent / 'new')
    assert not (folder.parent / 'new').exists()
    monkeypatch.undo()
    assert torch.equal(run(timm.create_model(f'local-dir:{folder}', pretrained=True).eval()), run(small))


def test_provenance_that_json_cannot_hold(small, folder):
    before = contents(folder)
    with pytest.raises(ConfigError, match='provenance'):
        save(small, folder, provenance={'policy': object()})
    assert contents(folder) == before


def test_interrupted(small, folder, monkeypatch):
    before = contents(folder)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm.models._hub.save_config_for_hf', interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(small, folder)
    assert contents(folder) == before
