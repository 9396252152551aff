"""Writes hub/, and the README's table of it, from the table of published networks.

    python -m timm_width.make_hub [CHECKOUT]

hub/NAME/config.json is what timm_width.save writes of timm.create_model(NAME), and README.md its card. The costs of every network
are counted anew; one that differs from what models/published.json says of it is an error, which says what was counted.
"""
import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from .card import render_card
from .config import SUFFIX, fingerprint, save
from .cost import Macs, Params
from .data import UsageError
from .models.published import Published, list_configs, prunets
from .space import WidthSpace
from .trace import trace

__all__ = ['counted', 'write_hub', 'write_readme', 'zoo']

MARKERS = '<!-- zoo -->', '<!-- end of zoo -->'
LICENSE = 'apache-2.0'  # of the configs and cards, which are ours; what is known of the sources' terms is in the cards
INDEX = '''# Published networks

Widths that the authors of searches published, and the GPUNets: one folder `<name>/` each, with the `config.json` that timm loads
and a card. `python -m timm_width.make_hub` writes this folder from `timm_width/models/published.json`; edit that. There are no
weights in it.

```python
import timm, timm_width

model = timm.create_model('mobilenetv1_100_width.aows_trt')
for network in timm_width.list_configs('*autoslim*'):
    print(network)
```

An installed package carries this folder as `timm_width/_hub`.

'''


def counted(model: nn.Module) -> dict[str, Any]:
    """What the table says of a network that is ours to count: 'macs', 'params', and 'shapes', its fingerprint."""
    space = trace(model)
    return {'macs': Macs(space)(), 'params': Params(space)(), 'shapes': fingerprint(model)}


@lru_cache
def _base(name: str, size: tuple[int, int, int]) -> WidthSpace:
    with torch.device('meta'):
        return trace(timm.create_model(name), size)


def _write_config(network: Published, folder: Path) -> None:
    """Writes config.json and the card of one network.

    Raises:
        UsageError: The table says otherwise than what is counted.
    """
    with torch.device('meta'):
        model = timm.create_model(network.name)
    found, size = counted(model), tuple(model.pretrained_cfg['input_size'])
    if wrong := {k: v for k, v in found.items() if getattr(network, k) != v}:
        raise UsageError(f'{network.name}: published.json does not say what was counted: {wrong}')
    provenance = {**network.provenance, 'costs': {k: found[k] for k in ('macs', 'params')}, **network.claims}
    rows, base_widths = [{'network': network.name, **found, **network.claims}], None
    if network.tag:
        save(model, folder, provenance, weights=False)
        name = network.model.removesuffix(SUFFIX)
        base = _base(name, size)
        rows.insert(0, {'network': name, 'macs': Macs(base)(), 'params': Params(base)()})
        base_widths = {group: base[group].size for group in base.searchable}
    else:
        folder.mkdir(parents=True)
        save_config_for_hf(model, str(folder / 'config.json'), model_config={'timm_width': provenance})
    notes = [
        f"{'The widths' if network.tag else 'The network'} that {network.method} found, without weights: from "
        f"{network.source} ({network.url}; {network.terms}). Multiply-adds and parameters are counted here, at {size[-1]} pixels."
        f"{' What is claimed is claimed by the source, of its own weights.' if network.claims else ''}", *network.notes]
    card = render_card(
        json.loads((folder / 'config.json').read_text(encoding='utf-8')), network.name, rows, notes, license=LICENSE,
        base_widths=base_widths, weights=False, method=network.paper)
    (folder / 'README.md').write_text(card, encoding='utf-8')


def zoo() -> str:
    """The README's tables: what can be built, and PRUNET's results, which cannot."""
    lines = ['| name | method | MACs (M) | parameters (M) | top-1 %, claimed | source |', '|---|---|---:|---:|---:|---|']
    for n in list_configs():
        top1 = '' if n.top1 is None else n.top1
        lines.append(f'| `{n.name}` | {n.method} | {n.macs / 1e6:.1f} | {n.params / 1e6:.2f} | {top1} | [{n.short}]({n.url}) |')
    lines += [
        '', 'For comparison, the results of the paper of PRUNET (Table 2), at 288 pixels, with TensorRT, FP16, batch 1, on an',
        'NVIDIA V100. Their structure is only in a figure, so there are no configs of them.', '',
        '| network | MACs (G), claimed | parameters (M), claimed | ms, claimed | top-1 %, claimed | top-1 % distilled, claimed |',
        '|---|---:|---:|---:|---:|---:|']
    row = '| {name} | {macs_G:.2f} | {params_M:.1f} | {ms:.2f} | {top1:.1f} | {top1_distilled:.1f} |'
    lines += [row.format(**r) for r in prunets()]
    return '\n'.join(lines)


def write_hub(folder: Path) -> None:
    """Writes the folder, whole or not at all; what was in it is gone.

    Raises:
        UsageError: The table of published networks is wrong.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.making-') as beside:
        made = Path(beside) / folder.name
        for network in list_configs():
            _write_config(network, made / network.name)
        (made / 'README.md').write_text(INDEX + zoo() + '\n', encoding='utf-8')
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(made, folder)


def write_readme(path: Path) -> None:
    """Puts the tables between the README's markers.

    Raises:
        UsageError: It has none.
    """
    text = path.read_text(encoding='utf-8')
    if not all(text.count(marker) == 1 for marker in MARKERS):
        raise UsageError(f'{path} must have the lines {MARKERS[0]} and {MARKERS[1]}, between which the table goes')
    before, rest = text.split(MARKERS[0])
    beside = path.with_name(f'.{path.name}.saving')
    beside.write_text(f'{before}{MARKERS[0]}\n{zoo()}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}', encoding='utf-8')
    os.replace(beside, path)


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m timm_width.make_hub', description=__doc__.splitlines()[0])
    parser.add_argument('checkout', nargs='?', type=Path, default=Path('.'), help='the repository')
    root = parser.parse_args(argv).checkout
    try:
        if not (root / 'README.md').is_file():
            raise UsageError(f"'{root}' is no checkout of timm_width: it has no README.md")
        write_hub(root / 'hub')
        write_readme(root / 'README.md')
    except UsageError as e:
        parser.exit(2, f'make_hub: {e}\n')
    print(f'{len(list_configs())} networks')


if __name__ == '__main__':
    main()
