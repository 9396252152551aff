"""hub/ and the README's table are what the script writes from the table of published networks; every config loads and every card reads."""
import dataclasses
import json
from pathlib import Path

import pytest
import timm
from huggingface_hub import ModelCard

import timm_width
from timm_width import make_hub
from timm_width.config import fingerprint

ROOT = Path(__file__).parents[1]
HUB = ROOT / 'hub'
NETWORKS = {n.name: n for n in timm_width.list_configs()}
REMEDY = 'run python -m timm_width.make_hub'


def files(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text(encoding='utf-8') for p in folder.rglob('*') if p.is_file()}


def test_the_hub_is_what_the_script_writes(tmp_path):
    (tmp_path / 'hub' / 'gone').mkdir(parents=True)
    make_hub.write_hub(tmp_path / 'hub')
    made, there = files(tmp_path / 'hub'), files(HUB)
    assert made.keys() == there.keys() == {'README.md', *(f'{n}/{f}' for n in NETWORKS for f in ('config.json', 'README.md'))}, REMEDY
    for name, text in made.items():
        assert text == there[name], f'{name}: {REMEDY}'
    assert [p.name for p in tmp_path.iterdir()] == ['hub']


def test_the_readme_is_what_the_script_writes(tmp_path, monkeypatch, capsys):
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    (tmp_path / 'README.md').write_text(text.replace('| PRUNET-3', '| PRUNET'), encoding='utf-8')
    monkeypatch.setattr(make_hub, 'write_hub', lambda folder: None)
    make_hub.main([str(tmp_path)])
    assert (tmp_path / 'README.md').read_text(encoding='utf-8') == text, REMEDY
    (tmp_path / 'README.md').write_text('no table')
    for folder, said in ((tmp_path, 'must have the lines <!-- zoo -->'), (tmp_path / 'other', 'is no checkout of timm_width')):
        with pytest.raises(SystemExit):
            make_hub.main([str(folder)])
        assert said in capsys.readouterr().err


def test_what_is_counted_otherwise_stops_the_script_before_anything_is_lost(tmp_path, monkeypatch):
    network = timm_width.list_configs('*aows_trt')[0]
    (tmp_path / 'kept').write_text('')
    monkeypatch.setattr(make_hub, 'list_configs', lambda: [dataclasses.replace(network, macs=1)])
    with pytest.raises(timm_width.data.UsageError, match="aows_trt: published.json does not say what was counted: {'macs': 486954304}"):
        make_hub.write_hub(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['kept']


@pytest.mark.parametrize('name', NETWORKS)
def test_a_folder_is_a_config_and_a_card(name):
    """Read as ours, where it has widths; the card as the Hub reads it: no accuracy, which is not ours to report."""
    network, folder = NETWORKS[name], HUB / name
    said = json.loads((folder / 'config.json').read_text())
    assert said['timm_width']['costs'] == {'macs': network.macs, 'params': network.params}
    if network.tag:
        spec = timm_width.load_spec(folder)
        assert (spec.architecture, spec.shapes) == (network.model, network.shapes) and set(spec.widths.values()) <= set(network.vector)
    card = ModelCard.load(folder / 'README.md')
    assert card.data.library_name == 'timm' and card.data.license == 'apache-2.0' and not card.data.eval_results
    assert f"timm.create_model('{name}')" in card.text and network.url in card.text and network.terms in card.text
    assert f'{network.macs / 1e6:.2f}' in card.text and '@misc' in card.text
    assert network.top1 is None or str(network.top1) in card.text


@pytest.mark.parametrize('name', ['mobilenetv1_100_width.greedy_trt', 'mnasnet_100_width.autoslim_315m', 'resnet50_width.bcnet_1g', 'gpunet_p0'])
def test_a_folder_loads_as_any_saved_model_does(name):
    model = timm.create_model(f'local-dir:{HUB / name}', device='meta')
    assert fingerprint(model) == NETWORKS[name].shapes and model.pretrained_cfg['input_size'][0] == 3


def test_the_misprint_is_noted():
    for name in ('aows_trt', 'ows_trt', 'greedy_trt'):
        assert 'prints 15 numbers' in (HUB / f'mobilenetv1_100_width.{name}' / 'README.md').read_text()
