"""timm-width show MODEL: the widths of a network as bars against its base, what it costs, and how it was found.

    timm-width show runs/demo                      a folder of `timm-width search`, or a config.json
    timm-width show hf-hub:someone/resnet50_width.x
    timm-width show resnet50                       a timm model, plain or searched: what there is to search

Nothing is trained or run, and no weights are read. MACs count one multiply-add as 1, for one image of the size in the config.
"""
import argparse
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import timm
import torch

from .config import SUFFIX, ConfigError, Spec, check_stored_args, is_ours, load_spec, read_config
from .cost import Macs, Params
from .data import UsageError, first_line
from .engine import create
from .models import register
from .report import METRICS
from .space import WidthSpace
from .trace import trace

__all__ = ['Network', 'describe', 'main', 'printable', 'size_of']

MAX_SIDE = 4096  # of an image, in a config
BAR = 40  # longest bar
FULL, LACKS, BEYOND = '█·▓'
ASCII = {FULL: '#', LACKS: '.', BEYOND: '+'}


@dataclass(frozen=True)
class Network:
    """A network beside its base.

    Attributes:
        spec: What the config says.
        space: The width space: that of the base, or of a network whose layers are chosen, its own.
        base: Group -> width of the base; groups that the base has not are left out.
        widths: Group -> width; groups of blocks that are left out are at base.
        costs: 'macs' and 'params' -> (of the base, of the network).
    """
    spec: Spec
    space: WidthSpace
    base: Mapping[str, int]
    widths: Mapping[str, int]
    costs: Mapping[str, tuple[int, int]]


def describe(spec: Spec, input_size: Optional[Sequence[int]] = None) -> Network:
    """Counts a network and its base.

    Args:
        spec: The network, of any architecture that timm knows.
        input_size: (channels, height, width) of an image; by default the model's own.

    Raises:
        WidthError: The widths are not those of such a model.
        UsageError: The model cannot be built.
    """
    name = spec.architecture
    base = name.removesuffix(SUFFIX)
    if name.endswith(SUFFIX):
        register(base)
    layers = {k: v for k, v in spec.model_args.items() if k == 'layers'}  # of prunet: what its search has found
    plain = {k: v for k, v in spec.model_args.items() if k not in layers}

    def space_of(arguments: Mapping[str, Any]) -> WidthSpace:
        with torch.device('meta'):
            return trace(create(base, **{'num_classes': None, **arguments}), input_size)

    base_space = space_of(plain)
    space = space_of(spec.model_args) if layers else base_space
    space.check(spec.widths, spec.skips)
    costs = {key: (cost(base_space)(), cost(space)(dict(spec.widths), skips=spec.skips)) for key, cost in (
        ('macs', Macs), ('params', Params))}
    return Network(spec, space, base_space.base_widths, {**space.base_widths, **spec.widths}, costs)


def size_of(config: Mapping[str, Any]) -> Optional[tuple[int, ...]]:
    """The size of the images of a config that nothing else has checked.

    Raises:
        ConfigError: It is none.
    """
    size = config.get('pretrained_cfg', {}).get('input_size')
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 3 or not all(type(n) is int and 1 <= n <= MAX_SIDE for n in size):
        raise ConfigError(f'input_size must be three whole numbers from 1 to {MAX_SIDE}, not {str(size)[:60]}')
    return tuple(size)


def printable(value: Any, longest: int = 200) -> str:
    """Text of a config for a terminal: one line, and no control characters."""
    text = ''.join(c if c.isprintable() else '?' for c in str(value)[:longest + 1])
    return text if len(text) <= longest else text[:longest - 3] + '...'


# -- what is shown ---------------------------------------------------------------------------------------------------------


def find(name: str) -> tuple[Spec, Optional[tuple[int, ...]]]:
    """What a name, a folder or a file is: the network, and the size of its images.

    Raises:
        UsageError: There is no such thing.
        ConfigError: The config cannot be read.
    """
    source, _, rest = name.partition(':')
    if source in ('hf-hub', 'hf_hub') and rest:
        path = _download(rest)
    elif source == 'local-dir':
        path = Path(rest)
    else:
        path = None if timm.is_model(name.partition('.')[0]) or not Path(name).exists() else Path(name)
    if path is None:
        with torch.device('meta'):
            model = create(name, None)
        args = {k: v for k, v in getattr(model, '_model_args', {}).items() if k not in ('format', 'shapes')}
        widths, skips = args.pop('widths', None), args.pop('skips', None)
        cfg = model.pretrained_cfg
        return Spec(cfg['architecture'], widths or {}, tuple(skips or ()), args), tuple(cfg['input_size'])
    config, path = read_config(path)
    if is_ours(config['architecture']):
        return load_spec(path), size_of(config)
    args = config.get('model_args', {})
    if not isinstance(args, dict):
        raise ConfigError(f'{path}: model_args must be a dict, not {type(args).__name__}')
    check_stored_args(str(path), args)
    return Spec(config['architecture'], {}, (), args), size_of(config)


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    repo, _, revision = name.partition('@')
    try:
        return Path(hf_hub_download(repo, 'config.json', revision=revision or None))
    except Exception as e:  # of the network, of rights
        raise UsageError(f"'hf-hub:{name}' cannot be read: {first_line(e)}") from e


# -- as text ---------------------------------------------------------------------------------------------------------------


def render(network: Network, columns: int = 100) -> str:
    """The text of a network.

    Args:
        network: What `describe` gives.
        columns: Width of the terminal; a line is longer only where the names of groups are.
    """
    spec, space = network.spec, network.space
    size = 'x'.join(map(str, space.input_size))
    lines = [f'{spec.architecture}, one image of {size}: {len(space.searchable)} groups to search, {len(space.frozen)} frozen, '
             f'{len(space.blocks)} blocks that can be left out', *_provenance(spec.provenance), '']
    lines += _bars(network, columns)
    if spec.skips:
        lines += ['', f'left out: {", ".join(spec.skips)}']
    reasons = Counter(space.frozen.values())
    lines += [''] * bool(reasons) + [f"frozen: {', '.join(n for n, r in space.frozen.items() if r == reason)} ({reason})"
                                     for reason in reasons]
    lines += ['', f"{'':<8}{'base':>12}{'this':>12}"]
    for key, title in (('macs', 'MACs'), ('params', 'params')):
        base, this = network.costs[key]
        lines.append(f'{title:<8}{base / 1e6:>11.2f}M{this / 1e6:>11.2f}M{this / base:>9.1%}')
    return '\n'.join(lines)


def _bars(network: Network, columns: int) -> list[str]:
    widths = {n: network.widths[n] for n in network.space.searchable}
    ratios = {n: w / network.base[n] if n in network.base else math.nan for n, w in widths.items()}
    most = max([1., *(r for r in ratios.values() if not math.isnan(r))])
    wide = max([5, *map(len, widths)])
    longest = max(10, min(BAR, columns - wide - 26))
    at_base = round(longest / most)
    left_out = {n for n in widths if any(n.startswith(f'{block}.') for block in network.spec.skips)}
    lines = [f"{'group':<{wide}}{'base':>7}{'width':>7}"]
    for name, width in widths.items():
        ratio = ratios[name]
        base = '-' if math.isnan(ratio) else str(network.base[name])
        if name in left_out or math.isnan(ratio):
            lines.append(f"{name:<{wide}}{base:>7}{'-' if name in left_out else width:>7}  "
                         + ('left out' if name in left_out else 'not in the base'))
            continue
        filled = max(1, round(ratio / most * longest))
        bar = FULL * min(filled, at_base) + LACKS * (at_base - filled) + BEYOND * (filled - at_base)
        lines.append(f'{name:<{wide}}{base:>7}{width:>7}  {bar:<{longest}}{ratio:>8.1%}')
    return lines


def _provenance(said: Mapping[str, Any]) -> list[str]:
    """How the network was found, of which nothing has been checked."""
    parts = [f"found by {said['policy']}"] if said.get('policy') else []
    options = said.get('options')
    if parts and isinstance(options, Mapping) and options:
        parts[0] += f" ({', '.join(f'{k}={v}' for k, v in options.items())})"
    parts += [f'{key} {said[key]}' for key in ('budget', 'seed', 'data') if said.get(key, '') != '']
    for key, name in METRICS.items():
        if key in said:
            baseline = said.get('baseline')
            beside = ', '.join(f'{n} {row[key]}' for n, row in baseline.items() if isinstance(row, Mapping) and key in row) if (
                isinstance(baseline, Mapping)) else ''
            parts.append(f'{name} {said[key]} %' + f' ({beside})' * bool(beside))
    versions = said.get('versions')
    if isinstance(versions, Mapping) and versions:
        parts.append(', '.join(f'{k} {v}' for k, v in versions.items()))
    return [printable('; '.join(parts), 600)] if parts else []


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Parses, and prints."""
    parser = argparse.ArgumentParser(
        prog='timm-width show', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('model', metavar='MODEL', help="a folder, a config.json, 'hf-hub:OWNER/NAME' or the name of a timm model")
    text = render(describe(*find(parser.parse_args(argv).model)), shutil.get_terminal_size().columns)
    try:
        text.encode(sys.stdout.encoding or 'utf-8')
    except UnicodeEncodeError:
        text = text.translate(str.maketrans(ASCII)).encode('ascii', 'replace').decode()
    try:
        print(text, flush=True)
    except BrokenPipeError:  # as by `| head`; what Python itself writes at its end must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
