"""Published networks: widths (and GPUNets) that authors of searches gave out, by name. `make_hub.py` writes hub/ from them.

`published.json` is the one table: `papers`, `policies` (ours -> paper), `sources` of the numbers, `configs`, and `prunets`, results
whose structure is only in a figure. A config has the numbers as they are printed at their source, and what we count of them.
"""
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

from timm.models._pretrained import PretrainedCfg
from torch import nn

from ..config import ConfigError
from ..space import WidthSpace

__all__ = ['Published', 'citation', 'conv_names', 'find', 'group_widths', 'list_configs', 'prunets', 'tags']

PATH = Path(__file__).parent / 'published.json'
LOCATIONS = ('url', 'file', 'state_dict', 'hf_hub_id')  # what of a pretrained_cfg says where weights are


@dataclass(frozen=True)
class Published:
    """One published network.

    Attributes:
        name: What timm.create_model takes.
        method: What found it.
        macs: Multiply-adds of one image, counted by us.
        params: Parameters, counted by us.
        top1: Accuracy on ImageNet in percent, as claimed at the source; None where the source has none.
        ms: Milliseconds per image, as claimed at the source; None where the source has none.
        claimed_macs_M: Millions of multiply-adds, as claimed at the source, or None.
        source: Where the numbers are from.
        short: The source in a word or two.
        url: Of the source.
        terms: Licence of the source.
        paper: Key of its paper in the table.
        model: Registered model.
        tag: Tag of the model that means these widths; '' for a model that has no other.
        vector: Widths, in the order of the source; empty for such a model.
        shortcut: Where in the vector a ResNet's shortcuts are: 'before' or 'behind' the first block of a stage, or ''.
        shapes: Fingerprint of the network.
        notes: What there is to know of it.
    """
    name: str
    method: str
    macs: int
    params: int
    top1: Optional[float]
    ms: Optional[float]
    claimed_macs_M: Optional[float] = field(repr=False)
    source: str
    short: str = field(repr=False)
    url: str
    terms: str
    paper: str = field(repr=False)
    model: str = field(repr=False)
    tag: str = field(repr=False)
    vector: tuple[int, ...] = field(repr=False)
    shortcut: str = field(repr=False)
    shapes: str = field(repr=False)
    notes: tuple[str, ...] = field(repr=False)

    def widths(self, model: nn.Module, space: WidthSpace) -> dict[str, int]:
        """Group -> channels.

        Args:
            model: The base, at its own widths.
            space: Its width space.

        Raises:
            ConfigError: The base is built otherwise than the network of the source.
        """
        names = conv_names(model, self.shortcut)
        if len(names) != len(self.vector):
            raise ConfigError(f'{self.name} is {len(self.vector)} widths, and this version of timm builds {len(names)} for them')
        return group_widths(space, list(zip(names, self.vector)))

    @property
    def claims(self) -> dict[str, float]:
        """What the source claims: those there are of 'claimed_macs_M', 'claimed_top1' and 'claimed_ms'."""
        said = {'claimed_macs_M': self.claimed_macs_M, 'claimed_top1': self.top1, 'claimed_ms': self.ms}
        return {k: v for k, v in said.items() if v is not None}

    @property
    def provenance(self) -> dict[str, str]:
        """What the config of a network of these widths, whatever its weights, says of where they are from."""
        return {'method': self.method, 'source': f'{self.source} ({self.url})'}

    def pretrained_cfg(self, base: PretrainedCfg) -> PretrainedCfg:
        """timm's settings of the tag: those that ImageNet was used with when it was published, and no weights.

        Args:
            base: Any settings of the base model.
        """
        paper = _table()['papers'][self.paper]
        return PretrainedCfg(
            input_size=(3, 224, 224), pool_size=(7, 7), interpolation='bilinear', first_conv=base.first_conv,
            classifier=base.classifier, paper_name=paper['title'], paper_ids=f"arXiv:{paper['arxiv']}", origin_url=self.url)


@lru_cache
def _table() -> dict[str, Any]:
    return json.loads(PATH.read_text(encoding='utf-8'))


@lru_cache
def _configs() -> dict[str, Published]:
    found = {}
    for row in _table()['configs']:
        source, tag = _table()['sources'][row['source']], row.get('tag', '')
        method = row.get('method') or _table()['papers'][source['paper']]['name']
        name = f"{row['model']}.{tag}" if tag else row['model']
        found[name] = Published(
            name=name, method=method, macs=row['macs'], params=row['params'], top1=row.get('top1'), ms=row.get('ms'),
            claimed_macs_M=row.get('claimed_macs_M'), source=source['where'], short=source['short'], url=source['url'],
            terms=source['terms'], paper=source['paper'], model=row['model'], tag=tag, vector=tuple(row.get('widths', ())),
            shortcut=row.get('shortcut', ''), shapes=row['shapes'], notes=(*row.get('notes', ()), *source['notes']))
    return found


def list_configs(pattern: str = '*') -> list[Published]:
    """The published networks that `timm.create_model` builds by name, with what is claimed of them and what we count.

    Args:
        pattern: Only names that match, as in '*autoslim*'.
    """
    return [p for name, p in _configs().items() if fnmatch(name, pattern)]


@lru_cache
def tags() -> dict[str, list[Published]]:
    """Registered model -> the published networks that are tags of it."""
    found: dict[str, list[Published]] = {}
    for network in list_configs():
        if network.tag:
            found.setdefault(network.model, []).append(network)
    return found


def find(model: str, pretrained_cfg: Any) -> Optional[Published]:
    """The published network that timm's settings of a model name by their tag, if they do.

    Args:
        model: Registered name.
        pretrained_cfg: What timm hands to an entry point: a tag, a dict or a PretrainedCfg; those of a folder or of the Hub, whose
            config has widths of its own, name none.
    """
    cfg = pretrained_cfg if isinstance(pretrained_cfg, Mapping) else getattr(pretrained_cfg, '__dict__', {})
    tag = pretrained_cfg if isinstance(pretrained_cfg, str) else None if cfg.get('source') else cfg.get('tag')
    return _configs().get(f'{model}.{tag}') if tag else None


def conv_names(model: nn.Module, shortcut: str = '') -> list[str]:
    """The convolutions whose output channels a published vector lists, in its order.

    Of a ResNet the stem, then three per block; of the MobileNets the stem, the expansion (where there is one) and the output of
    each block, and the last convolution where it is one of the features.

    Args:
        model: A timm model.
        shortcut: See `Published`.
    """
    if hasattr(model, 'layer1'):
        names = ['conv1']
        for stage in ('layer1', 'layer2', 'layer3', 'layer4'):
            blocks = [[f'{stage}.{j}.conv{k}' for k in (1, 2, 3)] for j in range(len(getattr(model, stage)))]
            if shortcut:
                blocks[0].insert({'before': 0, 'behind': 3}[shortcut], f'{stage}.0.downsample.0')
            names += sum(blocks, [])
        return names
    names = ['conv_stem']
    for i, stage in enumerate(model.blocks):
        for j, block in enumerate(stage):
            names += [f'blocks.{i}.{j}.{k}' for k in ('conv_pw', 'conv_pwl') if hasattr(block, k)]
    return names + ['conv_head'] * isinstance(getattr(model, 'conv_head', None), nn.Conv2d)


def group_widths(space: WidthSpace, found: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Widths per group, from those of convolutions.

    Args:
        space: The width space.
        found: (convolution, output channels).

    Raises:
        ConfigError: Convolutions of one group differ, one has no group to itself, or groups are left without a width.
    """
    widths: dict[str, int] = {}
    for conv, width in found:
        axis = space.tensors[f'{conv}.weight'].axes[0]
        if len(axis) != 1 or space.groups[axis[0][0]].unit != axis[0][1]:
            raise ConfigError(f'{space.architecture}: the channels of {conv} are not one group')
        name = space.groups[axis[0][0]].name
        if widths.setdefault(name, width) != width:
            raise ConfigError(f'{space.architecture}: {conv} is tied to {name}, whose width is {widths[name]}, not {width}')
    if missing := space.searchable.keys() - widths.keys():
        raise ConfigError(f"{space.architecture}: there are no widths for {', '.join(sorted(missing))}")
    return widths


def prunets() -> list[dict[str, Any]]:
    """The rows of PRUNET-0 to 6 in their paper's Table 2: 'name', 'top1', 'top1_distilled', 'ms', 'params_M' and 'macs_G'."""
    return _table()['prunets']


def citation(method: str) -> str:
    """BibTeX of a paper, by its key in the table or by a policy of ours; '' if there is none."""
    paper = _table()['papers'].get(_table()['policies'].get(method, method))
    if paper is None:
        return ''
    lines = {'title': f"{{{paper['title']}}}", 'author': ' and '.join(paper['authors']), 'year': paper['year'],
             'eprint': paper['arxiv'], 'archivePrefix': 'arXiv', 'note': paper['venue']}
    fields = ''.join(f'  {key} = {{{value}}},\n' for key, value in lines.items())
    return f"@misc{{{paper['authors'][0].split()[-1].lower()}{paper['year']}{paper['name'].lower()},\n{fields}}}"
