"""Model cards: what a repository on the Hub, or a folder of hub/, says of a searched network."""
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from .config import SUFFIX, UNSUFFIXED
from .models.published import citation
from .models.width_nets import BASES
from .report import METRICS

__all__ = ['render_card', 'source_of']

TASK = 'image-classification'
MAX_TEXT = 400  # characters that a card shows of any one thing that a config says
COSTS = (  # key of a row -> heading, format; shown where a row has it
    ('macs', 'MACs (M)', lambda v: f'{v / 1e6:.2f}'), ('claimed_macs_M', 'MACs (M, claimed)', str),
    ('params', 'parameters (M)', lambda v: f'{v / 1e6:.3f}'),
    ('predicted_ms', 'predicted ms per image', lambda v: f'{v:.4g}'), ('latency_ms', 'ms per image', lambda v: f'{v:.4g}'),
    ('claimed_ms', 'ms per image (claimed)', str), ('claimed_top1', 'top-1 % (claimed)', str))


def render_card(
        config: Mapping[str, Any],
        repo: str,
        table: Sequence[Mapping[str, Any]],
        notes: Sequence[str] = (),
        image: Optional[str] = None,
        *,
        license: Optional[str] = None,
        base_model: Optional[str] = None,
        dataset: Optional[str] = None,
        base_widths: Optional[Mapping[str, int]] = None,
        weights: bool = True,
        method: Optional[str] = None,
) -> str:
    """A README.md with the metadata that the Hub reads.

    Args:
        config: timm's config.json of the network; the provenance under 'timm_width' says how it was found.
        repo: What the card's first lines load: OWNER/NAME on the Hub, 'local-dir:FOLDER', or a name that timm_width registers.
        table: Rows as in a search's summary.csv ('network', 'macs', 'params', 'latency_ms', 'top1', ...), the base first, and what
            was found called 'found', or last. 'claimed_...' is what others say, and stays out of the metadata.
        notes: Paragraphs of Markdown below the table.
        image: File name, in the repository, of a picture of the widths.
        license: Of the weights, as the Hub names it; by default what the config's pretrained_cfg says, if it is a name.
        base_model: Repository on the Hub whose weights the network began with.
        dataset: Name of the data that the table's accuracies are of; without it the metadata has none of them.
        base_widths: Group -> channels of the base, shown beside the widths.
        weights: Whether the repository has weights.
        method: Key of the paper to cite (see `citation`); by default the config's policy.
    """
    from huggingface_hub import EvalResult, ModelCardData

    said = config.get('timm_width') if isinstance(config.get('timm_width'), Mapping) else {}
    cfg = config.get('pretrained_cfg') if isinstance(config.get('pretrained_cfg'), Mapping) else {}
    name = _plain(repo).removeprefix('local-dir:').rstrip('/').rpartition('/')[2]
    found = next((row for row in table if row.get('network') == 'found'), table[-1] if table else {})
    metric = next((m for m in METRICS if _has(found, m)), None)
    results = None
    if metric and dataset:
        results = [EvalResult(
            task_type=TASK, dataset_type=re.sub(r'[^\w.-]+', '-', dataset.lower()), dataset_name=dataset,
            metric_type={'top1': 'accuracy'}.get(metric, metric), metric_name=METRICS[metric],
            metric_value=round(float(found[metric]) / 100, 6))]
    data = ModelCardData(
        library_name='timm', tags=[TASK, 'timm', 'timm_width', *_policy_tag(said)], pipeline_tag=TASK,
        license=license or _license(cfg), base_model=base_model, base_model_relation='finetune' if base_model else None,
        model_name=name if results else None, eval_results=results)
    parts = [f'---\n{data.to_yaml()}\n---\n# {name}', '```\npip install timm-width\n```', _code(config, repo, weights)]
    if table:
        parts.append(_table(table, metric))
    parts += notes
    if image:
        parts.append(f'![Widths]({image})')
    parts += [*_how(said), *_widths(config, base_widths)]
    cited = citation(method or str(said.get('policy', '')))
    if cited:
        parts.append(f'## Citation\n\n```bibtex\n{cited}\n```')
    return '\n\n'.join(parts) + '\n'


def source_of(repo: str) -> str:
    """What timm.create_model takes: a repository of the Hub gets its prefix."""
    return repo if ':' in repo or '/' not in repo else f'hf-hub:{repo}'


def _plain(value: Any) -> str:
    """Text of a config in one line, with nothing in it that Markdown or HTML would read; at most MAX_TEXT characters."""
    return re.sub(r'\s+', ' ', re.sub(r'[`|<>\[\]]', ' ', str(value)))[:MAX_TEXT].strip()


def _has(row: Mapping[str, Any], key: str) -> bool:
    return row.get(key, '') not in ('', None)


def _license(cfg: Mapping[str, Any]) -> Optional[str]:
    text = str(cfg.get('license') or '')
    return text if re.fullmatch(r'[\w.+-]{1,60}', text) else None


def _policy_tag(said: Mapping[str, Any]) -> list[str]:
    policy = re.sub(r'[^\w-]+', '-', str(said.get('policy', '')))[:40].strip('-')
    return [policy] if policy else []


def _code(config: Mapping[str, Any], repo: str, weights: bool) -> str:
    architecture = str(config['architecture'])
    base = _plain(architecture.removesuffix(SUFFIX))
    further = '' if base in (*BASES, *UNSUFFIXED) or not architecture.endswith(SUFFIX) else f'timm_width.register({base!r})\n'
    pretrained = ', pretrained=True' if weights else ''
    return f'```python\nimport timm, timm_width\n{further}\nmodel = timm.create_model({source_of(_plain(repo))!r}{pretrained})\n```'


def _table(rows: Sequence[Mapping[str, Any]], metric: Optional[str]) -> str:
    columns = [c for c in COSTS if any(_has(row, c[0]) for row in rows)]
    if metric:
        columns.append((metric, f'{METRICS[metric]} %', lambda v: f'{float(v):.2f}'))
    lines = [f"| network | {' | '.join(c[1] for c in columns)} |", '|---|' + '---:|' * len(columns)]
    for row in rows:
        cells = []
        for key, _, form in columns:
            text = form(row[key]) if _has(row, key) else ''
            if text and key in ('macs', 'params') and row is not rows[0] and rows[0].get(key):
                text += f' ({row[key] / rows[0][key]:.1%})'
            if text and _has(row, f'{key}_std'):
                text += f" ± {float(row[f'{key}_std']):.2f}"
            cells.append(text)
        lines.append(f"| {_plain(row.get('network', ''))} | {' | '.join(cells)} |")
    return '\n'.join(lines) + '\n\nMACs are multiply-adds of one image.'


def _how(said: Mapping[str, Any]) -> list[str]:
    """The policy with its options, the budget, the latency with device and versions, the command line."""
    costs = said.get('costs') if isinstance(said.get('costs'), Mapping) else {}
    told = {'policy': said.get('policy'), 'options': said.get('options'), 'budget': said.get('budget'), 'seed': said.get('seed'),
            'search': said.get('search'), 'training': said.get('train'), 'latency': costs.get('latency_ms'),
            'versions': said.get('versions')}
    lines = [f'- {key}: {_items(value)}' for key, value in told.items() if value not in (None, {}, '')]
    if not lines:
        return []
    command = f"\n\n```\n{_plain(said['command'])}\n```" if said.get('command') else ''
    return ['## How it was found\n\n' + '\n'.join(lines) + command]


def _items(value: Any) -> str:
    if isinstance(value, Mapping):
        return _plain(', '.join(f"{k} {json.dumps(v) if isinstance(v, (Mapping, list)) else v}" for k, v in value.items()
                                if v not in (None, '', {})))
    return _plain(value)


def _widths(config: Mapping[str, Any], base: Optional[Mapping[str, int]]) -> list[str]:
    args = config.get('model_args') if isinstance(config.get('model_args'), Mapping) else {}
    widths, skips = args.get('widths') or {}, args.get('skips') or ()
    lines = []
    wide = max((len(_plain(name)) for name in widths), default=0)
    for name, width in widths.items():
        text = f'{_plain(name):<{wide}} {width:>6}'
        if base and base.get(name):
            text += f' of {base[name]:>5} {width / base[name]:>7.1%}'
        lines.append(text)
    lines += [f'left out: {_plain(name)}' for name in skips]
    if not lines:
        return []
    return ['## Widths\n\nChannels of each group of layers, named by its first layer' + ', of so many in the base' * bool(base) +
            '. The other groups are as wide as in the base.\n\n```\n' + '\n'.join(lines) + '\n```']
