"""Where the layers of a network stand: in which block of which stage, and at which place there.

Blocks that a network repeats are modules with a number: `layer2.3`, `blocks.4.1`, `s3.b2`, `features.denseblock1.denselayer6`. The
first number on a layer's path tells its stage, the second its block, and what is left is its place in the block. A network that is
one long sequence (VGG, ReXNet) has one number only: there, a stage is a run of blocks whose outputs have one size, which is what
section 3.1 of "Width Transfer" calls a stage. Whatever is outside of stages (stem, head, transitions) has only its name.
"""
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from .space import WidthSpace

__all__ = ['Layer', 'Stages', 'split_part']

_NUMBERED = re.compile(r'([A-Za-z_]*)([0-9]{1,6})')
LEAST_RUN = 3  # members of a sequence that is searched for stages: a stem has fewer


@dataclass(frozen=True)
class Layer:
    """The output of a convolution or linear layer, or one of several parts of it.

    Attributes:
        group: The group that it belongs to.
        stage: The stage's name; empty outside of stages.
        block: The block's path.
        place: Path in the block, or outside of stages the whole; with ':2' and so on behind it for the parts of a concatenation.
    """
    group: str
    stage: str
    block: str
    place: str


def split_part(name: str) -> tuple[str, str]:
    """'layer:2' -> ('layer', ':2')."""
    path, colon, part = name.partition(':')
    return path, colon + part


class Stages:
    """The stages of a network.

    Args:
        space: Its width space.
        left_out: Blocks that are not there.

    Attributes:
        layers: Name of a layer (or group) -> where it is, in the order of the forward pass.
        blocks: Stage -> paths of its blocks, in the same order.
        places: Stage -> the places that its blocks have.
        outside: Names of the searchable groups outside of stages.
    """

    def __init__(self, space: WidthSpace, left_out: Sequence[str] = ()):
        names = _outputs(space)
        sizes = {site.name: site.output_size for site in space.sites if site.outputs}
        runs = _sequences(list(dict.fromkeys(split_part(name)[0] for name in names)), sizes)
        self.layers: dict[str, Layer] = {}
        self.blocks: dict[str, list[str]] = {}
        self.places: dict[str, set[str]] = {}
        for name, group in names.items():
            path, part = split_part(name)
            stage, block, place = _nested(path) or runs.get(path) or ('', '', path)
            if any(path == b or path.startswith(f'{b}.') for b in left_out):
                continue
            self.layers[name] = Layer(group, stage, block, place + part)
            if stage:
                if block not in self.blocks.setdefault(stage, []):
                    self.blocks[stage].append(block)
                self.places.setdefault(stage, set()).add(place)
        self.outside = [name for name, layer in self.layers.items() if not layer.stage and name in space.searchable]

    def at(self, stage: str, block: str) -> dict[str, str]:
        """Place -> group, of one block."""
        return {layer.place: layer.group for layer in self.layers.values() if (layer.stage, layer.block) == (stage, block)}


def _outputs(space: WidthSpace) -> dict[str, str]:
    """What layers put out, named as groups are -> its group."""
    found: dict[str, str] = {}
    for site in space.sites:
        pieces = list(dict.fromkeys(g for g, _ in site.outputs or ()))
        for k, g in enumerate(pieces, 1):
            found[site.name if len(pieces) == 1 else f'{site.name}:{k}'] = space.groups[g].name
    return {**found, **{name: name for name in space}}


def _nested(path: str) -> Optional[tuple[str, str, str]]:
    """Stage, block and place of a layer whose path has the numbers of both."""
    parts = path.split('.')
    numbered = [(i, m) for i, part in enumerate(parts) if (m := _NUMBERED.fullmatch(part))]
    if len(numbered) < 2 or numbered[1][0] == len(parts) - 1:
        return None
    i, m = numbered[1]
    return '.'.join([*parts[:i], m[1]]).rstrip('.'), '.'.join(parts[:i + 1]), '.'.join(parts[i + 1:])


def _sequences(paths: Sequence[str], sizes: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, str, str]]:
    """Stages, blocks and places of layers in long sequences of numbered modules."""
    members: dict[str, dict[str, tuple[int, ...]]] = {}  # sequence -> member -> size of its output
    where: dict[str, tuple[str, str, str]] = {}
    of_stages = {found[0] for path in paths if (found := _nested(path))}
    for path in paths:
        parts = path.split('.')
        i = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
        if path not in sizes or not i or _nested(path) or any(_NUMBERED.fullmatch(part) for part in parts[:i]):
            continue
        sequence, member = '.'.join(parts[:i]), '.'.join(parts[:i + 1])
        members.setdefault(sequence, {})[member] = sizes[path]
        where[path] = sequence, member, '.'.join(parts[i + 1:])
    stage_of: dict[str, str] = {}
    for sequence, outputs in members.items():
        if len(outputs) < LEAST_RUN or any(stage.startswith(f'{sequence}.') for stage in of_stages):
            continue
        number, last = 0, None
        for member, size in outputs.items():
            number, last = number + (size != last), size
            stage_of[member] = f'{sequence}, part {number}'
    return {path: (stage_of[member], member, place) for path, (_, member, place) in where.items() if member in stage_of}
