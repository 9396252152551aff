"""Model cards: what they say first, their metadata as huggingface_hub reads it, and what a hostile config can put into them."""
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from timm_width.card import render_card, source_of

CONFIG = {
    'architecture': 'resnet18_width', 'num_classes': 5,
    'model_args': {'widths': {'conv1': 32, 'layer1.0.conv1': 16}, 'skips': ['layer2.1']},
    'pretrained_cfg': {'license': 'apache-2.0'},
    'timm_width': {
        'policy': 'aows', 'options': {'solver': 'exact', 'window': 100}, 'budget': 'latency=0.5x', 'seed': 3,
        'command': 'timm-width search --model resnet18', 'versions': {'timm': '1.0.31', 'torch': '2.15'},
        'costs': {'macs': 9, 'latency_ms': {'backend': 'torch', 'device': 'cuda:0', 'ms': 0.5}}}}
TABLE = [
    {'network': 'base', 'macs': 2_000_000, 'params': 4_000_000, 'latency_ms': 2., 'top1': 90., 'top1_std': ''},
    {'network': 'uniform', 'macs': 1_000_000, 'params': 1_000_000, 'latency_ms': 1., 'top1': 80., 'top1_std': 0.5},
    {'network': 'found', 'macs': 1_000_000, 'params': 2_000_000, 'latency_ms': 1.25, 'top1': 85.5, 'top1_std': 0.25}]


def parts(card: str) -> tuple[dict, str]:
    """The metadata, read as YAML and as huggingface_hub reads it, and the text."""
    _, head, text = card.split('---\n', 2)
    data = yaml.safe_load(head)
    assert ModelCard(card).data.to_dict() == data
    return data, text


def test_the_first_lines_install_and_load():
    _, text = parts(render_card(CONFIG, 'me/small', TABLE))
    lines = [line for line in text.splitlines() if line][:9]
    assert lines == ['# small', '```', 'pip install timm-width', '```', '```python', 'import timm, timm_width',
                     "model = timm.create_model('hf-hub:me/small', pretrained=True)", '```',
                     '| network | MACs (M) | parameters (M) | ms per image | top-1 % |']


def test_a_base_that_is_not_registered_on_import_is_registered_by_the_first_lines():
    _, text = parts(render_card({**CONFIG, 'architecture': 'vit_tiny_patch16_224_width'}, 'me/small', TABLE))
    assert "import timm, timm_width\ntimm_width.register('vit_tiny_patch16_224')\n" in text
    for name in ('gpunet_1', 'prunet', 'prunet_width', 'resnet18_width'):
        assert 'register' not in render_card({**CONFIG, 'architecture': name}, 'me/small', TABLE)


@pytest.mark.parametrize('repo, source', [
    ('me/small', 'hf-hub:me/small'), ('local-dir:runs/small', 'local-dir:runs/small'), ('resnet50_width.dmcp_2g', 'resnet50_width.dmcp_2g')])
def test_source_of(repo, source):
    assert source_of(repo) == source
    assert f"timm.create_model('{source}')" in render_card(CONFIG, repo, TABLE, weights=False)


def test_metadata():
    data, _ = parts(render_card(CONFIG, 'me/small', TABLE, base_model='timm/resnet18.a1_in1k', dataset='My Flowers'))
    assert data['library_name'] == 'timm' and data['pipeline_tag'] == 'image-classification' and data['license'] == 'apache-2.0'
    assert data['tags'] == ['image-classification', 'timm', 'timm_width', 'aows']
    assert (data['base_model'], data['base_model_relation']) == ('timm/resnet18.a1_in1k', 'finetune')
    result, = data['model-index'][0]['results']
    assert data['model-index'][0]['name'] == 'small' and result['dataset'] == {'name': 'My Flowers', 'type': 'my-flowers'}
    assert result['metrics'] == [{'type': 'accuracy', 'value': 0.855, 'name': 'top-1'}]  # of what was found
    plain, _ = parts(render_card(CONFIG, 'me/small', TABLE, license='cc-by-nc-4.0'))
    assert plain['license'] == 'cc-by-nc-4.0' and not {'model-index', 'base_model', 'base_model_relation', 'model_name'} & set(plain)


def test_claims_of_others_are_shown_and_stay_out_of_the_metadata():
    rows = [TABLE[0] | {'top1': ''}, {'network': 'found', 'macs': 1_000_000, 'params': 1, 'claimed_top1': 70.25, 'claimed_ms': 0.5}]
    data, text = parts(render_card(CONFIG, 'me/small', rows, dataset='imagenet'))
    assert 'model-index' not in data and '70.25' in text and 'top-1 % (claimed)' in text


def test_the_table_the_policy_the_widths_and_the_citation():
    _, text = parts(render_card(CONFIG, 'me/small', TABLE, ['A note.'], 'widths.png', base_widths={'conv1': 64, 'layer1.0.conv1': 64}))
    for said in ('| base | 2.00 | 4.000 | 2 | 90.00 |', '| found | 1.00 (50.0%) | 2.000 (50.0%) | 1.25 | 85.50 ± 0.25 |', 'A note.',
                 '![Widths](widths.png)', '- policy: aows', '- options: solver exact, window 100', '- budget: latency=0.5x', '- seed: 3',
                 '- latency: backend torch, device cuda:0, ms 0.5', '- versions: timm 1.0.31, torch 2.15',
                 '```\ntimm-width search --model resnet18\n```', 'conv1              32 of    64   50.0%', 'left out: layer2.1',
                 '@misc{berman2020aows'):
        assert said in text, said
    order = [text.index(s) for s in ('| base', '![Widths]', '- policy', '## Widths', '@misc')]
    assert order == sorted(order)


@pytest.mark.parametrize('config', [
    {'architecture': 'resnet18_width'}, {'architecture': 'gpunet_0', 'timm_width': None, 'model_args': None, 'pretrained_cfg': None},
    {'architecture': 'resnet18_width', 'timm_width': 'x', 'model_args': [], 'pretrained_cfg': []}])
def test_a_config_that_says_little(config):
    data, text = parts(render_card(config, 'me/small', []))
    assert 'license' not in data and '## ' not in text


def test_what_a_config_says_cannot_leave_its_place():
    """Text of a config ends no code block, makes no markup, adds no metadata and is not endless."""
    bad = '\n---\nlicense: mit\n```\n<script>alert(1)</script> [a](b) | c\n# Head'
    config = {
        'architecture': 'resnet18_width', 'model_args': {'widths': {bad: 3}, 'skips': [bad]}, 'pretrained_cfg': {'license': bad},
        'timm_width': {'policy': bad, 'options': {bad: bad, 'deep': {bad: [bad]}}, 'budget': bad * 1000, 'command': bad}}
    clean, text = parts(render_card(config, 'me/small', [{'network': bad, 'macs': 1, 'params': 1}]))
    assert set(clean) == {'library_name', 'pipeline_tag', 'tags'} and len(text) < 5000
    assert '<script>' not in text and text.count('```') % 2 == 0 and '\n# Head' not in text and '\nlicense' not in text
    assert all(len(line.split('|')) == 5 for line in text.splitlines() if line.startswith('|'))


def test_it_is_read_from_a_file(tmp_path):
    (tmp_path / 'README.md').write_text(render_card(CONFIG, 'me/small', TABLE), encoding='utf-8')
    assert metadata_load(tmp_path / 'README.md')['library_name'] == 'timm'
