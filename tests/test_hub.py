"""Pushing to a Hub and loading from it, with huggingface_hub's own client against a server on loopback (loopback_hub.py)."""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

import timm_width
from timm_width import cli
from timm_width.data import UsageError
from timm_width.hub import _check, _licence, _table, folders_of

from .loopback_hub import Hub

pytest.importorskip('huggingface_hub', minversion='1.0', reason='the loopback Hub speaks to the client of huggingface_hub 1.0 and later')
ROOT = Path(__file__).parent.parent
SIZE = 64
MODELS = {  # a resnet, an efficientnet, a prunet: what timm.create_model builds
    'resnet10t_width': {'widths': {'conv1.0': 40, 'layer3.0.conv1': 24}, 'skips': ['layer1.0'], 'num_classes': 7},
    'test_efficientnet_width': {'widths': {'blocks.1.0.conv_exp': 24}},
    'prunet': {'width': 0.25, 'depth': 0.5, 'num_classes': 5},
}

# One process that keeps running, as torch takes long to import: a line of JSON says what to do, a line says what came of it.
CLIENT = """
import contextlib, io, json, os, sys, time, types
import huggingface_hub.utils._http as http
http.time = types.SimpleNamespace(**{**vars(time), 'sleep': lambda s: None})   # retries without waiting
import timm, torch, timm_width
from timm.models import push_to_hf_hub
from timm_width import cli

def logits(source, **kwargs):
    model = timm.create_model(source, pretrained=True, **kwargs).eval()
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * SIZE * SIZE).reshape(1, 3, SIZE, SIZE)).tolist()

def timm_push(folder, repo, **kwargs):
    push_to_hf_hub(timm.create_model('local-dir:' + folder, pretrained=True), repo, safe_serialization=True, **kwargs)

def token(value):
    os.environ.pop('HF_TOKEN', None)
    if value:
        os.environ['HF_TOKEN'] = value

def command(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(argv)
    return [code, out.getvalue(), err.getvalue()]

answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    name, args, kwargs = json.loads(line)
    try:
        found = {'found': globals()[name](*args, **kwargs)}
    except Exception as e:
        found = {'error': f'{type(e).__name__}: {e}'}
    print(json.dumps(found), file=answers, flush=True)
"""


class Client:
    """A process whose Hub is the one on loopback."""

    def __init__(self, hub: Hub, home: Path):
        env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING_FACE'))}
        env |= {'HF_ENDPOINT': hub.url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1',
                'HF_HUB_DISABLE_TELEMETRY': '1', 'NO_PROXY': '127.0.0.1,localhost', 'PYTHONPATH': str(ROOT)}
        self.process = subprocess.Popen([sys.executable, '-c', f'SIZE = {SIZE}\n{CLIENT}'], env=env, cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.process.stdin.write(json.dumps([name, args, kwargs]) + '\n')
            self.process.stdin.flush()
            found = json.loads(self.process.stdout.readline())
            if 'error' in found:
                raise RuntimeError(found['error'])
            return found['found']
        return call

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope='module')
def hub():
    with Hub() as found:
        yield found
        assert not found.unknown, 'the client asked for what the loopback Hub does not know'


@pytest.fixture(scope='module')
def client(hub, tmp_path_factory):
    found = Client(hub, tmp_path_factory.mktemp('home'))
    yield found
    found.close()


@pytest.fixture(scope='module')
def reader(hub, tmp_path_factory):
    """Another process with a cache of its own, that never pushes."""
    found = Client(hub, tmp_path_factory.mktemp('other'))
    yield found
    found.close()


@pytest.fixture(autouse=True)
def logged_in(request):
    if 'client' in request.fixturenames:
        request.getfixturevalue('client').token('hf_write')
        if 'reader' in request.fixturenames:
            request.getfixturevalue('reader').token('')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Model -> (a folder of it, its logits)."""
    found = {}
    for i, (name, kwargs) in enumerate(MODELS.items()):
        torch.manual_seed(i)
        model = timm.create_model(name, **kwargs)
        for m in model.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2)
        folder = tmp_path_factory.mktemp('runs') / name
        timm_width.save(model, folder, {'policy': 'autoslim', 'budget': 'macs=0.5x', 'top1': 71.5, 'data': 'digits'})
        with torch.no_grad():
            found[name] = folder, model.eval()(torch.linspace(-1, 1, 3 * SIZE * SIZE).reshape(1, 3, SIZE, SIZE)).tolist()
    return found


@pytest.fixture
def small(folders):
    return str(folders['test_efficientnet_width'][0])


def metadata(hub, repo, revision='main') -> dict:
    return yaml.safe_load(hub.files(repo, revision)['README.md'].decode().split('---\n')[1])


# -- the round trip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('private', [False, True], ids=['public', 'private'])
@pytest.mark.parametrize('by', ['timm_width', 'timm'])
@pytest.mark.parametrize('name', MODELS)
def test_what_is_pushed_computes_the_same_elsewhere(name, by, private, hub, client, reader, folders):
    """Bit for bit, in a process that has only the Hub; a private one only for its owner."""
    folder, expected = folders[name]
    repo = f'me/{name}.{by}-{private}'
    if by == 'timm':
        client.timm_push(str(folder), repo, private=private)
    else:
        code, out, err = client.command('push', str(folder), repo, *['--private'] * private)
        assert (code, err) == (0, ''), err
        assert f"timm.create_model('hf-hub:{repo}', pretrained=True)" in out
    assert hub.repos[repo].private == private
    assert {'config.json', 'model.safetensors', 'README.md'} <= set(hub.files(repo)) <= {
        'config.json', 'model.safetensors', 'README.md', 'widths.png'}
    if private:
        with pytest.raises(RuntimeError, match='Repo|401|not found'):
            reader.logits(f'hf-hub:{repo}')
        reader.token('hf_write')
    assert reader.logits(f'hf-hub:{repo}') == expected
    assert not hub.leaked  # storage never sees the token


def test_the_files_are_those_of_the_folder(hub, client, small):
    assert client.command('push', small, 'me/same')[0] == 0
    for name in ('config.json', 'model.safetensors'):
        assert hub.files('me/same')[name] == (Path(small) / name).read_bytes()


def test_a_name_alone_is_ones_own(hub, client, small):
    code, out, _ = client.command('push', small, 'alone')
    assert code == 0 and 'hf-hub:me/alone' in out and 'hf-hub:me/alone' in hub.files('me/alone')['README.md'].decode()


def test_branches_and_pull_requests(hub, client, reader, folders, small):
    expected = folders['test_efficientnet_width'][1]
    code, out, err = client.command('push', small, 'me/branches', '--revision', 'v2')
    assert code == 0 and 'hf-hub:me/branches@v2' in out, err
    assert not hub.files('me/branches') and hub.files('me/branches', 'v2')
    assert reader.logits('hf-hub:me/branches@v2') == expected
    code, out, err = client.command('push', small, 'me/branches', '--create-pr')
    assert code == 0 and 'hf-hub:me/branches@refs/pr/1' in out and '/discussions/1' in out, err
    assert not hub.files('me/branches') and hub.files('me/branches', 'refs/pr/1')
    client.token('hf_other')  # who may not write there
    assert client.command('push', small, 'me/branches', '--create-pr')[0] == 0
    assert hub.files('me/branches', 'refs/pr/2')


def test_pushing_again_refreshes_the_card_and_removes_pickles(hub, client, small, tmp_path):
    client.timm_push(small, 'me/again')  # writes a card of timm's
    before = hub.files('me/again')['README.md']
    repo = hub.repos['me/again']
    sha, files = repo.refs['main'][-1]
    repo.refs['main'].append(('1' * 40, {**files, 'pytorch_model.bin': files['config.json']}))
    assert client.command('push', small, 'me/again', '--license', 'mit')[0] == 0
    assert metadata(hub, 'me/again')['license'] == 'mit' and hub.files('me/again')['README.md'] != before
    assert 'pytorch_model.bin' not in hub.files('me/again')
    commits, uploads = len(repo.refs['main']), hub.uploads
    assert client.command('push', small, 'me/again', '--license', 'mit')[0] == 0
    assert (len(repo.refs['main']), hub.uploads) == (commits, uploads)  # nothing has changed


def test_budgets_of_one_search_are_a_collection(hub, client, folders, tmp_path):
    for budget in ('macs-0.5x', 'macs-0.25x'):
        (tmp_path / budget).symlink_to(folders['test_efficientnet_width'][0])
    code, _, err = client.command('push', str(tmp_path), 'me/several')
    assert code == 2 and 'macs-0.25x, macs-0.5x, or all with --collection' in err
    for _ in range(2):
        code, out, err = client.command('push', str(tmp_path), 'me/several', '--collection', 'Of One Search')
        assert code == 0 and '/collections/me/of-one-search-' in out, err
    [found] = hub.collections.values()
    assert [(i['id'], i['note']['text']) for i in found['items']] == [
        ('me/several-macs-0.25x', 'macs=0.5x'), ('me/several-macs-0.5x', 'macs=0.5x')]


# -- what goes wrong -------------------------------------------------------------------------------------------------------

REFUSED = {  # token, further arguments, what the one line says
    'wrong token': ('hf_nonsense', ['me/x'], 'the Hub does not accept the token'),
    'no token': ('', ['me/x'], 'the Hub does not accept the token, or has been given none'),
    'token to read': ('hf_read', ['me/x'], 'this token may not write there'),
    "someone else's": ('hf_write', ['you/x'], 'this token may not write there'),
    'a wrong name': ('hf_write', ['me/a/b'], "Repo id must be in the form"),
    'both': ('hf_write', ['me/x', '--revision', 'v2', '--create-pr'], 'give either a revision or create_pr'),
    'a token on the line': ('hf_write', ['me/x', '--token', 'hf_nonsense'], 'the Hub does not accept the token'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_the_hub_refuses_is_one_line(case, hub, client, small):
    token, args, says = REFUSED[case]
    client.token(token)
    code, out, err = client.command('push', small, *args)
    assert code == 2 and says in err and len(err.splitlines()) == 1 and 'hf_nonsense' not in err
    assert 'me/x' not in hub.repos and 'you/x' not in hub.repos


def test_private_is_never_pushed_to_a_public_repository(hub, client, small):
    assert client.command('push', small, 'me/public')[0] == 0
    commits = len(hub.repos['me/public'].refs['main'])
    code, _, err = client.command('push', small, 'me/public', '--private')
    assert code == 2 and 'and public' in err and len(err.splitlines()) == 1
    assert len(hub.repos['me/public'].refs['main']) == commits


def test_an_interrupted_upload_is_one_message_and_a_second_push_completes(hub, client, reader, folders):
    folder, expected = folders['resnet10t_width']
    torch.manual_seed(9)  # weights that the Hub has not yet
    other = Path(folder).with_name('interrupted')
    timm_width.save(timm.create_model('resnet10t_width', **MODELS['resnet10t_width']), other)
    hub.cuts = 1000
    code, out, err = client.command('push', str(other), 'me/interrupted')
    hub.cuts = 0
    *retries, last = err.splitlines()
    assert code == 2 and 'the upload was interrupted' in last and 'tries again' in last and not out
    assert all('Retry' in line or 'thrown while' in line for line in retries)  # the client's own, as it tries
    assert not hub.files('me/interrupted')  # nothing half-way
    hub.cuts = 1  # the client itself gets over one
    assert client.command('push', str(other), 'me/interrupted')[0] == 0
    assert len(reader.logits('hf-hub:me/interrupted')[0]) == 7


def test_without_a_network(hub, client, reader, small):
    hub.stop()
    try:
        code, _, err = client.command('push', small, 'me/x')
        assert code == 2 and f'the Hub at {hub.url} cannot be reached' in err and len(err.splitlines()) == 1
        code, _, err = reader.command('show', 'hf-hub:me/nowhere')
        assert code == 2 and "'hf-hub:me/nowhere' cannot be read" in err and len(err.splitlines()) == 1
    finally:
        hub.start()


def test_loading_what_is_not_there(hub, client, reader):
    with pytest.raises(RuntimeError, match='Repository Not Found'):
        reader.logits('hf-hub:me/nothing')


def test_show_reads_from_the_hub(hub, client, reader, small):
    assert client.command('push', small, 'me/shown')[0] == 0
    code, out, err = reader.command('show', 'hf-hub:me/shown')
    assert code == 0 and 'test_efficientnet_width' in out and 'blocks.1.0.conv_exp' in out, err


# -- what is refused before anything is sent -------------------------------------------------------------------------------


def test_folders_that_nobody_could_load_are_refused(folders, small, tmp_path, capsys):
    (tmp_path / 'none').mkdir()
    model = timm.create_model('test_efficientnet_width', widths={'blocks.1.0.conv_exp': 16})
    timm_width.save(model, tmp_path / 'config', weights=False)
    timm_width.save(model, tmp_path / 'other')
    weights = load_file(Path(small) / 'model.safetensors')
    save_file(weights, tmp_path / 'other' / 'model.safetensors')
    timm_width.save(model, tmp_path / 'broken')
    (tmp_path / 'broken' / 'model.safetensors').write_bytes(b'\xff' * 100)
    timm.models.save_for_hf(timm.create_model('test_resnet'), tmp_path / 'plain', safe_serialization=True)
    for name, says in {'none': 'not a folder with a config.json', 'config': 'has no model.safetensors', 'broken': 'cannot be read',
                       'other': 'has weights of another model than config.json', 'plain': 'is not a width model'}.items():
        assert cli.main(['push', str(tmp_path / name), 'me/x']) == 2
        err = capsys.readouterr().err
        assert says in err and len(err.splitlines()) == 1, err


def test_a_search_with_a_model_of_its_own_and_others(tmp_path, small):
    for name in ('config.json', 'model.safetensors'):
        (tmp_path / name).symlink_to(Path(small) / name)
    (tmp_path / 'aows').mkdir()
    (tmp_path / 'aows' / 'macs-0.5x').symlink_to(small)
    args = SimpleNamespace(folder=tmp_path, repo='me/x', collection=None)
    assert folders_of(args) == {'me/x': tmp_path}
    args.collection = 'all'
    assert folders_of(args) == {'me/x': tmp_path, 'me/x-aows-macs-0.5x': tmp_path / 'aows' / 'macs-0.5x'}
    with pytest.raises(UsageError):
        folders_of(SimpleNamespace(folder=tmp_path / 'nowhere', repo='me/x', collection=None))


# -- licence and results ---------------------------------------------------------------------------------------------------

LICENCES = {  # architecture, tag in the config, what is recorded, --license: metadata, what the card points out, what the user is told
    'inherited': (('resnet10t', 'c3_in1k', {'inherited': 'resnet10t.c3_in1k'}, None),
                  {'license': 'apache-2.0', 'base_model': 'timm/resnet10t.c3_in1k', 'base_model_relation': 'finetune'}, '', ''),
    'not inherited': (('resnet10t', 'c3_in1k', {'inherited': None}, None), {}, '', 'no licence is stated'),
    'not recorded': (('resnet10t', 'c3_in1k', {}, None), {'license': 'apache-2.0'}, 'not recorded', ''),
    'no such weights': (('mobilenetv2_035', 'untrained', {}, None), {}, '', 'no licence is stated'),
    'not commercial': (('convnextv2_atto', 'fcmae', {'inherited': 'convnextv2_atto.fcmae'}, None),
                       {'license': 'cc-by-nc-4.0', 'base_model': 'timm/convnextv2_atto.fcmae', 'base_model_relation': 'finetune'},
                       'does not allow commercial use', ''),
    'not commercial, whatever is said': (
        ('convnextv2_atto', 'fcmae', {'inherited': 'convnextv2_atto.fcmae'}, 'mit'),
        {'license': 'mit', 'base_model': 'timm/convnextv2_atto.fcmae', 'base_model_relation': 'finetune'}, 'does not allow', ''),
    'a licence that the Hub has no name for': (
        ('mobileone_s0', 'apple_in1k', {'inherited': 'mobileone_s0.apple_in1k'}, None),
        {'license': 'other', 'license_name': 'mobileone-license',
         'base_model': 'timm/mobileone_s0.apple_in1k', 'base_model_relation': 'finetune'}, '', ''),
    'nonsense': (('resnet10t', 'c3_in1k', {'inherited': ['x']}, None), {}, '', 'no licence is stated'),
    'no such tag': (('resnet10t', 'c3_in1k', {'inherited': 'resnet10t.x'}, 'mit'), {'license': 'mit'}, '', ''),
}


@pytest.mark.parametrize('case', LICENCES)
def test_the_licence_is_that_of_the_weights_that_these_began_with(case):
    (base, tag, said, chosen), expected, note, hint = LICENCES[case]
    found, notes, hints = _licence({'architecture': f'{base}_width', 'pretrained_cfg': {'tag': tag}, 'timm_width': said}, chosen)
    assert found == expected
    for texts, says in ((notes, note), (hints, hint)):
        assert len(texts) == bool(says) and says in ''.join(texts)


def test_results_are_in_the_metadata(hub, client, small):
    assert client.command('push', small, 'me/results')[0] == 0
    found = metadata(hub, 'me/results')
    assert found['library_name'] == 'timm' and {'timm', 'timm_width', 'image-classification', 'autoslim'} <= set(found['tags'])
    [index] = found['model-index']
    [result] = index['results']
    assert index['name'] == 'results' and result['dataset']['name'] == 'digits'
    assert result['metrics'] == [{'type': 'accuracy', 'value': 0.715, 'name': 'top-1'}]
    card = hub.files('me/results')['README.md'].decode()
    assert 'import timm, timm_width' in card.split('\n---\n')[1].splitlines()[:12] and "'hf-hub:me/results'" in card


def test_the_table_counts_what_no_search_has_told(small, tmp_path):
    _, network = _check(Path(small))
    base, found = _table(network, {'top1': 1.5, 'costs': {'latency_ms': {'ms': 2., 'spread': 0.1}}})
    space = timm_width.trace(timm.create_model('test_efficientnet'))
    widths = MODELS['test_efficientnet_width']['widths']
    assert base == {'network': 'base', 'budget': '', 'macs': timm_width.Macs(space)(), 'params': timm_width.Params(space)()}
    assert found == {'network': 'found', 'budget': '', 'macs': timm_width.Macs(space)(widths), 'top1': 1.5, 'latency_ms': 2.,
                     'params': timm_width.Params(space)(widths), 'latency_spread': 0.1}
    rows = _table(network, {'baseline': {'base': {'network': 'base', 'macs': 5, 'params': 'x', 'other': 1}, 'x': 3}, 'costs': 7})
    assert rows[0] == {'network': 'base', 'macs': 5} and len(rows) == 2


def test_a_model_in_memory_is_pushed_too(monkeypatch, small):
    """By `timm_width.push_to_hub`, through the same folder as the command."""
    from timm_width import hub
    seen = {}

    def check(folder):
        seen['config'] = json.loads((folder / 'config.json').read_text())
        raise UsageError('enough')
    monkeypatch.setattr(hub, '_check', check)
    with pytest.raises(UsageError, match='enough'):
        timm_width.push_to_hub(timm.create_model('test_efficientnet_width'), 'me/x', provenance={'policy': 'p'})
    assert seen['config']['timm_width'] == {'policy': 'p'}
