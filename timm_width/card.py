"""The model card of a width model: README.md with YAML metadata, as the Hub shows it."""
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import yaml

__all__ = ['render_card']

COLUMNS = {'network': 'network', 'macs': 'MACs', 'params': 'params', 'latency_ms': 'ms per image', 'top1': 'top-1 %', 'map': 'mAP'}


def render_card(
        config: dict,
        repo: str,
        table: Sequence[Mapping[str, Any]],
        notes: Sequence[str] = (),
        image: Optional[str] = None,
        *,
        base_widths: Optional[Mapping[str, int]] = None,
) -> str:
    """Writes a card.

    Args:
        config: What config.json holds.
        repo: Its repository on the Hub, OWNER/NAME.
        table: The networks to compare, as in the table of a search.
        notes: Sentences that the reader must know.
        image: File beside the card with a picture of the widths.
        base_widths: Group -> channels of the base.
    """
    said = config.get('timm_width') or {}
    metadata = {'tags': ['image-classification', 'timm', 'timm_width'], 'library_name': 'timm'}
    columns = [c for c in COLUMNS if any(row.get(c, '') != '' for row in table)]
    lines = ['---', yaml.safe_dump(metadata, sort_keys=False).strip(), '---', '```python', 'import timm, timm_width', '',
             f"model = timm.create_model('hf-hub:{repo}', pretrained=True)", '```', '', f"# {repo.rpartition('/')[2]}", '',
             config['architecture'] + (f", found by {said['policy']} for {said.get('budget')}" if said.get('policy') else ''), '']
    lines += [f'> {note}\n' for note in notes]
    if table:
        lines += ['| ' + ' | '.join(COLUMNS[c] for c in columns) + ' |', '|---' * len(columns) + '|']
        lines += ['| ' + ' | '.join(str(row.get(c, '')) for c in columns) + ' |' for row in table]
    lines += ['', f'![widths]({image})'] if image else []
    widths = (config.get('model_args') or {}).get('widths') or {}
    lines += ['', *(f'    {n} {w} of {base_widths[n]}' for n, w in widths.items() if n in base_widths)] if base_widths else []
    return '\n'.join(lines) + '\n'
