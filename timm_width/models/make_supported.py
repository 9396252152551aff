"""Writes supported.json: runs the laws over timm's registry and keeps the conv nets that pass.

    python -m timm_width.models.make_supported [--pattern 'resnet*'] [--law1-params 10]

A conv net has eight or more convolutions besides patch embeddings (timm's small test models: one). Laws 0 and 3 run on the meta
device for every model, law 1 in float64 for models up to --law1-params million parameters (the larger ones share their family's
code). An entry gives the family (timm's module), whether the net is purely convolutional (no attention, at most two linears),
its parameters, the searchable share and half_macs.
"""
import argparse
import fnmatch
import json
import os
import warnings
from pathlib import Path
from typing import Optional

import timm
import torch
from timm.models._registry import _model_to_module
from torch import nn

from ..laws import commutation_faults, cost_faults, permutation_error, random_widths, randomise
from ..resize import resize
from ..trace import TraceError, trace

MARKERS = '<!-- families -->', '<!-- end of families -->'
PATH = Path(__file__).parent / 'supported.json'


def convolutions(model: nn.Module) -> int:
    """Number of 2d convolutions besides patch embeddings (kernel = stride, 4 or more)."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return sum(not (m.kernel_size == m.stride and m.kernel_size[0] >= 4) for m in convs)


def is_pure(model: nn.Module) -> bool:
    """No attention module and at most two linear layers."""
    names = {type(m).__name__.lower() for m in model.modules()}
    attention = any(w in n for n in names for w in ('attention', 'mhsa', 'attn2d', 'mixer', 'ssd', 'haloattn', 'litemla'))
    return not attention and sum(isinstance(m, nn.Linear) for m in model.modules()) <= 2


def entry(name: str, law1_params: float) -> tuple[Optional[dict], str]:
    """The table's row of one model, or None and why it is not supported."""
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    convs = convolutions(model)
    if convs < (1 if name.startswith('test_') else 8):
        return None, 'not a conv net'
    try:
        space = trace(model)
    except TraceError as e:
        return None, str(e)
    if not space.searchable:
        return None, f'nothing is searchable: {next(iter(space.frozen.values()), "")}'
    widths = random_widths(space, 1)
    faults = commutation_faults(model, space, widths) + cost_faults(model, space, widths)
    if faults:
        return None, f'laws 0 and 3: {faults[0]}'
    params = sum(p.numel() for p in model.parameters())
    if params <= law1_params * 1e6:
        torch.manual_seed(0)
        real = randomise(timm.create_model(name).eval().double())
        size = space.input_size
        try:
            small = trace(real, (size[0], 96, 96))
        except TraceError:  # a fixed resolution
            small = trace(real, size)
        errors = [permutation_error(real, small)]
        resized = resize(real, small, random_widths(small, 2))
        errors.append(permutation_error(resized, trace(resized, small.input_size)))
        if max(errors) > 1e-6:
            return None, f'law 1: outputs change by {max(errors):.1e}'
    return {
        'family': _model_to_module[name], 'pure': is_pure(model), 'params': params,
        'share': round(space.searchable_share, 4), 'half_macs': round(space.half_macs, 4),
    }, ''


def families_table(table: dict[str, dict]) -> str:
    """The README's table: per family its models, and the smallest one's searchable share and half_macs."""
    families: dict[str, list[str]] = {}
    for name in sorted(table, key=lambda n: table[n]['params']):
        families.setdefault(table[name]['family'], []).append(name)
    lines = ['| family | models | smallest | searchable share | half_macs |', '|---|---|---|---|---|']
    for family, names in sorted(families.items()):
        smallest = next((n for n in names if not n.startswith('test_')), names[0])
        row = table[smallest]
        kind = '' if row['pure'] else ' (hybrid)'
        lines.append(f"| {family}{kind} | {len(names)} | {smallest} | {row['share']:.3f} | {row['half_macs']:.3f} |")
    return '\n'.join(lines)


def write_readme(path: Path) -> None:
    """Puts the table between the README's markers."""
    before, rest = path.read_text().split(MARKERS[0])
    path.write_text(f'{before}{MARKERS[0]}\n{families_table(json.loads(PATH.read_text()))}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pattern', default='*', help='only these names; the others keep their entries')
    parser.add_argument('--law1-params', type=float, default=10, metavar='M', help='largest model for law 1, in millions')
    parser.add_argument('--readme', type=Path, metavar='FILE', help='only write the table of families into this README')
    args = parser.parse_args()
    if args.readme:
        write_readme(args.readme)
        return
    warnings.filterwarnings('ignore')
    table = json.loads(PATH.read_text()) if PATH.exists() and args.pattern != '*' else {}
    for name in fnmatch.filter([n for n in timm.list_models() if not n.endswith('_width')], args.pattern):
        try:
            found, why = entry(name, args.law1_params)
        except Exception as e:  # whatever goes wrong, the model is not supported
            found, why = None, f'{type(e).__name__}: {e}'
        table.pop(name, None)
        if found:
            table[name] = found
        elif why != 'not a conv net':
            print(f'{name}: {why}', flush=True)
    rows = ',\n'.join(f'{json.dumps(n)}: {json.dumps(table[n])}' for n in sorted(table))
    beside = PATH.with_suffix('.tmp')
    beside.write_text('{\n' + rows + '\n}\n')
    os.replace(beside, PATH)
    print(f'{len(table)} models, {len({r.get("family") for r in table.values()})} families')


if __name__ == '__main__':
    main()
