"""Writes a bundle that measures blocks alone (runner/manifest.py, format 2), and reads what it says of them."""
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data import UsageError
from ..factors import Grid
from ..space import WidthSpace
from .bundle import Order, beside, check_order, check_packages, write_manifest, write_networks, write_runner
from .onnx_graph import settle
from .plan import Plan, make_plan
from .runner.manifest import PARTS, Manifest

__all__ = ['BLOCK_SAMPLES', 'BlockTable', 'Whole', 'check_same', 'export_blocks', 'read_blocks', 'write_plan']

BLOCK_SAMPLES = 20  # whole networks on which tables of blocks are validated


class BlockTable(NamedTuple):
    """Of a block: its groups, their widths, and the configuration of every point, in an array with a dimension for each group."""
    groups: tuple[str, ...]
    levels: tuple[tuple[int, ...], ...]
    configurations: np.ndarray


class Whole(NamedTuple):
    """A whole network, or a block (then `block` says which), and the configuration that it is."""
    widths: Mapping[str, int]
    skips: tuple[str, ...]
    configuration: int
    block: str = ''


def write_plan(plan: Plan, out: Path) -> None:
    """Writes the manifest alone: enough for torch, which measures blocks where they are built.

    Raises:
        UsageError: It cannot be written.
    """
    check_order(plan.order, out, False)
    with beside(out) as folder:
        write_manifest(folder, _describe(plan, [([], None)] * len(plan.parts)))


def export_blocks(order: Order, out: Path, samples: int = BLOCK_SAMPLES, overwrite: bool = False,
                  say: Callable[[str], None] = print) -> str:
    """Writes a bundle, whole or not at all: a file for each kind of block, and for whole networks.

    Args:
        order: What it is to hold; its `blocks` are not None.
        out: The folder.
        samples: Whole networks to measure besides the first.
        overwrite: Whether a bundle that is there may be replaced.
        say: Told how far it is.

    Returns:
        A line that says what was written.

    Raises:
        UsageError: Something cannot be worked with; then nothing is written.
        CostError: As `blocks.find_blocks`.
    """
    check_packages()
    check_order(order, out, overwrite)
    plan = make_plan(order, samples, exportable=True)
    with beside(out) as folder:
        found = []
        for i, part in enumerate(plan.parts):
            if i % 10 == 0:
                say(f'exporting {part.name} ({i} of {len(plan.parts)})')
            module = part.make({})
            images = torch.randn(order.batch, *part.input_size, generator=torch.Generator().manual_seed(order.seed))
            settle(module, images[:4])
            recipe, files, _ = write_networks(
                order, module, part.space, part.grid, plan.rows_of(i), images, folder, f'p{i:04}')
            found.append((files, recipe))
        write_manifest(folder, _describe(plan, found))
        write_runner(folder)
    total = sum(f.stat().st_size for f in out.rglob('*.onnx'))
    return (f'{out}: {plan.network.space.architecture}, {len(plan.tables)} blocks of {len(plan.parts)} kinds, whole networks '
            f'included, {len(plan.configurations)} configurations, {total / 1e6:.1f} MB, {order.precision}, batch {order.batch}\n'
            f'copy it to the target, and there: python {out.name}/run.py --backend onnxruntime')


def _describe(plan: Plan, written: list[tuple[list, Any]]) -> dict[str, Any]:
    parts = [{'name': p.name, 'input_size': list(p.input_size), 'grid': {g: list(w) for g, w in p.grid.items()}, 'files': files,
              'recipe': recipe} for p, (files, recipe) in zip(plan.parts, written, strict=True)]
    return {'format': PARTS, **plan.describe(), 'parts': parts}


def check_same(manifest: Manifest, plan: Plan, torch_here: bool) -> None:
    """Refuses a bundle that was written for something else.

    Raises:
        UsageError: It was.
    """
    for name, value in plan.describe().items():
        if manifest.data.get(name) != value:
            shown = f' ({str(manifest.data.get(name))[:40]}, not {str(value)[:40]})' if not isinstance(value, (dict, list)) else ''
            raise UsageError(f"'{manifest.folder}' holds networks of another {name}{shown}: remove that folder, or keep to what "
                             'was measured')
    if torch_here == bool(manifest.parts[0]['files']):
        raise UsageError(f"'{manifest.folder}' was written for another backend: remove that folder, or keep to what it was written "
                         'for')


def read_blocks(manifest: Manifest, space: WidthSpace) -> tuple[Grid, dict[str, BlockTable], list[Whole], list[Whole]]:
    """What the configurations of a bundle are; nothing of it is trusted.

    Args:
        manifest: The bundle.
        space: The width space of its network.

    Returns:
        The grid; the table of each block; blocks at widths between their knots; and whole networks, first the one of the rest.

    Raises:
        UsageError: It does not say that, or not so that it can be.
    """
    data, count = manifest.data, len(manifest.configurations)

    def need(right: Any, what: str) -> None:
        if not right:
            raise UsageError(f"'{manifest.folder}' is no bundle of blocks, or a broken one: {what}")

    def is_place(value: Any) -> bool:
        return type(value) is int and 0 <= value < count

    need(data['format'] == PARTS, 'it is one of whole networks')
    for key in ('tables', 'held', 'networks'):
        need(isinstance(data.get(key), list) and all(isinstance(row, dict) for row in data[key]), f'it has no {key}')
    grid = {name: tuple(widths) for name, widths in data['grid'].items()}
    need(all(name in space for name in grid), 'its grid has a group that the network does not have')
    removable = {b.name for b in space.blocks}
    known = removable | {s.name.rsplit('.', k)[0] for s in space.sites for k in range(s.name.count('.') + 1)}
    tables: dict[str, BlockTable] = {}
    for row in data['tables']:
        name, groups, levels, at = (row.get(k) for k in ('block', 'groups', 'levels', 'configurations'))
        need(isinstance(name, str) and name in known and name not in tables, f'a table of {str(name)[:60]!r}')
        need(isinstance(groups, list) and len(groups) <= 2 and all(isinstance(g, str) and g in grid for g in groups)
             and len(set(groups)) == len(groups), f"the groups of '{name}'")
        need(isinstance(levels, list) and len(levels) == len(groups) and all(
            isinstance(step, list) and step and set(step) <= set(grid[g]) and step == sorted(set(step)) and (
                step[0], step[-1]) == (grid[g][0], grid[g][-1]) for g, step in zip(groups, levels)), f"the widths of '{name}'")
        need(isinstance(at, list) and len(at) == prod(map(len, levels)) and all(map(is_place, at)), f"the places of '{name}'")
        tables[name] = BlockTable(tuple(groups), tuple(map(tuple, levels)), np.array(at, dtype=np.int64).reshape(
            [len(step) for step in levels]))
    found: dict[str, list[Whole]] = {'held': [], 'networks': []}
    for key, rows in found.items():
        for row in data[key]:
            widths, skips, block = row.get('widths'), row.get('skips', []), row.get('block', '')
            need(isinstance(widths, dict) and all(g in grid and type(w) is int and w in grid[g] for g, w in widths.items()),
                 f'the widths in {key}')
            need(isinstance(skips, list) and all(isinstance(s, str) and s in removable for s in skips), f'the skips in {key}')
            need(is_place(row.get('configuration')) and (block in tables if key == 'held' else block == ''), f'a place in {key}')
            if key == 'held':
                need(set(widths) == set(tables[block].groups), f"the groups of '{block}' in {key}")
            rows.append(Whole(widths, tuple(skips), row['configuration'], block))
    need(tables and found['networks'], 'it has no tables, or no networks')
    return grid, tables, found['held'], found['networks']
