"""timm-width show: what is printed is what the config says and what the table counts."""
import io
import json
import re
import sys

import pytest
import timm

import timm_width
from timm_width import Macs, Params, cli, trace
from timm_width.show import describe, find, printable, render

WIDTHS = {'conv1': 32, 'layer1.0.conv1': 128, 'layer4.0.conv1': 100}


@pytest.fixture
def folder(tmp_path):
    model = timm.create_model('resnet18_width', widths=WIDTHS, skips=['layer2.1'], num_classes=10)
    said = {'policy': 'aows', 'options': {'passes': 3}, 'budget': 'macs=0.5x', 'top1': 70.5, 'baseline': {'base': {'top1': 71.25}}}
    timm_width.save(model, tmp_path / 'x', said, weights=False)
    return tmp_path / 'x'


def show(name, capsys) -> str:
    assert cli.main(['show', str(name)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize('form', ['{}', '{}/config.json', 'local-dir:{}'])
def test_bars_are_the_widths_and_costs_are_counted(form, folder, capsys):
    out = show(form.format(folder), capsys)
    space = trace(timm.create_model('resnet18', num_classes=10))
    bars = {}
    for line in out.splitlines():
        if match := re.fullmatch(r'(\S+) +(\d+) +(\d+)  (█+·*▓*) *[\d.]+%', line):
            bars[match[1]] = int(match[2]), int(match[3]), match[4]
    assert bars.keys() == space.searchable.keys() - {'layer2.1.conv1'}
    assert all(base == space[n].size and width == WIDTHS.get(n, base) for n, (base, width, _) in bars.items())
    assert bars['conv1'][2] == '█' * 10 + '·' * 10 and bars['layer1.0.conv1'][2] == '█' * 20 + '▓' * 20
    assert bars['layer1.1.conv1'][2] == '█' * 20
    assert re.search(r'layer2\.1\.conv1 +128 +-  left out', out) and 'left out: layer2.1' in out
    for name, cost in (('MACs', Macs(space)), ('params', Params(space))):
        base, this = cost(), cost(WIDTHS, skips=('layer2.1',))
        assert re.search(rf'{name} +{base / 1e6:.2f}M +{this / 1e6:.2f}M +{this / base:.1%}', out)
    assert 'found by aows (passes=3); budget macs=0.5x; top-1 70.5 % (base 71.25)' in out


@pytest.mark.parametrize('name', ['resnet18', 'resnet18_width', 'test_efficientnet.r160_in1k'])
def test_a_model_by_name_is_at_its_base(name, capsys):
    out = show(name, capsys)
    space = trace(timm.create_model(name.partition('.')[0].removesuffix('_width')))
    assert f'{len(space.searchable)} groups to search' in out and out.count(' 100.0%') == len(space.searchable) + 2
    assert f'{Macs(space)() / 1e6:.2f}M' in out


def test_layers_of_prunet_that_the_base_has_not_are_named(tmp_path):
    base = timm.create_model('prunet', width=0.25, depth=0.5)
    layers = [{'stage': s, 'kernel': 3, **({} if s == 1 else {'hidden': 16})} for s in range(1, 7)]
    model = timm.create_model('prunet', width=0.25, depth=0.5, layers=[*layers[:1], *layers])  # one layer more than the base
    timm_width.save(model, tmp_path, weights=False)
    network = describe(*find(str(tmp_path)))
    assert network.costs['params'] == tuple(sum(p.numel() for p in m.parameters()) for m in (base, model))
    assert network.widths.keys() - network.base.keys() and network.base.keys() & network.widths.keys()
    assert 'not in the base' in render(network)


def test_terminals_without_blocks_and_narrow_ones(folder, monkeypatch):
    lines = render(describe(*find(str(folder))), columns=60).splitlines()
    bars = [line for line in lines if '█' in line]
    assert bars and all(len(line) <= 60 for line in bars)
    file = io.TextIOWrapper(io.BytesIO(), 'ascii')
    monkeypatch.setattr(sys, 'stdout', file)
    assert cli.main(['show', str(folder)]) == 0
    file.seek(0)
    assert '####' in file.read()


def test_what_a_config_says_cannot_steer_the_terminal(folder, capsys):
    config = json.loads((folder / 'config.json').read_text())
    config['timm_width'] = {'policy': 'x\x1b[2J\n\rnew', 'options': [1], 'baseline': 3, 'top1': 'y' * 9999, 'versions': 1}
    (folder / 'config.json').write_text(json.dumps(config))
    out = show(folder, capsys)
    assert '\x1b' not in out and '\r' not in out and 'found by x?[2J??new' in out and max(map(len, out.splitlines())) <= 600
    assert printable('a' * 300) == 'a' * 197 + '...'


BAD = {
    'name': ('resnet1B', "unknown model 'resnet1B', did you mean"),
    'folder': ('local-dir:nowhere', 'there is no such file'),
    'not JSON': ('FOLDER', 'not a JSON file'),
    'size': ('FOLDER', 'input_size must be three whole numbers from 1 to 4096'),
    'a group': ('FOLDER', "unknown group 'conv9'"),
    'a model': ('FOLDER', "timm has no model 'resnet1B'"),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_message(case, folder, capsys):
    name, says = BAD[case]
    config = json.loads((folder / 'config.json').read_text())
    if case == 'size':
        config['pretrained_cfg']['input_size'] = [3, 10 ** 9, 10 ** 9]
    elif case == 'a group':
        config['model_args']['widths']['conv9'] = 3
    elif case == 'a model':
        config['architecture'] = 'resnet1B_width'
    (folder / 'config.json').write_text('{' if case == 'not JSON' else json.dumps(config))
    assert cli.main(['show', name.replace('FOLDER', str(folder))]) == 2
    out, err = capsys.readouterr()
    assert says in err and not out and len(err.splitlines()) == 1
