"""Policies by name, or from a file.

A package adds its own by the entry-point group `timm_width.policies`; nothing here lists them.
"""
import dataclasses
import pkgutil
import sys
import traceback
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

from ..space import nearest
from .base import (
    Choice,
    Evaluate,
    Policy,
    PolicyError,
    Score,
    Step,
    fill_budget,
    first_within,
    greedy_path,
    greedy_scores,
    option,
    random_widths,
    uniform_widths,
)

__all__ = [
    'Choice', 'Evaluate', 'Policy', 'PolicyError', 'Score', 'Step', 'add_options', 'fill_budget', 'first_within', 'greedy_path',
    'greedy_scores', 'label', 'load', 'names', 'option', 'option_names', 'random_widths', 'read_options', 'uniform_widths',
]

GROUP = 'timm_width.policies'


def names() -> list[str]:
    """All that `load` knows: the entry points, and the policies of this folder, for a checkout that is not installed."""
    return sorted({e.name for e in entry_points(group=GROUP)} | set(_ours()))


def _ours() -> dict[str, type[Policy]]:
    """The policies of this folder, each called as its class, in lower case; a file may define several."""
    modules = (import_module(f'{__name__}.{m.name}') for m in pkgutil.iter_modules(__path__) if m.name != 'base')
    return {policy.__name__.lower(): policy for module in modules for policy in _defined_in(module)}


def load(name: str) -> type[Policy]:
    """Imports the policy of that name, or the one that a file 'FOLDER/NAME.py' defines.

    Raises:
        PolicyError: There is none, or it cannot be imported.
    """
    if name.endswith('.py'):
        return _only(_defined_in(_import_file(name)), name)
    for entry in entry_points(group=GROUP, name=name):
        try:
            return entry.load()
        except (ImportError, AttributeError) as e:
            raise PolicyError(f"policy '{name}' ({entry.value}) cannot be imported: {e}") from e
    if name not in _ours():
        raise PolicyError(f"unknown policy '{name}'{nearest(name, names())}; there are {', '.join(names())}, or a file NAME.py")
    return _ours()[name]


def label(name: str) -> str:
    """What a policy is called in flags, files and tables: its name, or that of its file."""
    return Path(name).stem if name.endswith('.py') else name


def _import_file(path: str) -> ModuleType:
    spec = spec_from_file_location(f'{__name__}._from_file_{label(path)}', path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        raise PolicyError(f"--policy '{path}': there is no such file") from None
    except Exception as e:  # it is the user's own code: anything can happen, and its line is what helps
        where = traceback.extract_tb(e.__traceback__)[-1]
        raise PolicyError(f"--policy '{path}' cannot be imported: {type(e).__name__}: {e} ({where.filename}:{where.lineno})") from e
    return module


def _defined_in(module: ModuleType) -> list[type[Policy]]:
    """The policies of a module; a class whose name begins with _ is what several have in common."""
    return [v for k, v in vars(module).items()
            if isinstance(v, type) and issubclass(v, Policy) and v.__module__ == module.__name__ and not k.startswith('_')]


def _only(found: Sequence[type[Policy]], name: str) -> type[Policy]:
    if len(found) != 1:
        raise PolicyError(f"--policy '{name}' defines {len(found)} subclasses of timm_width.policies.Policy: one is needed")
    if missing := ', '.join(sorted(found[0].__abstractmethods__)):
        raise PolicyError(f"--policy '{name}': {found[0].__name__} has no {missing}")
    return found[0]


def add_options(parser: ArgumentParser, name: str, policy: type[Policy]) -> None:
    """Gives a parser one flag `--<name>.<field>` for every field of the policy's Options."""
    group = parser.add_argument_group(f'options of the policy {name}')
    types = get_type_hints(policy.Options)
    for f in dataclasses.fields(policy.Options):
        of = next((t for t in get_args(types[f.name]) if t is not type(None)), types[f.name])  # Optional[float] is a float
        kind: dict[str, Any] = {'type': of, 'metavar': getattr(of, '__name__', 'value').upper()}
        if of is bool:
            kind = {'action': BooleanOptionalAction}
        group.add_argument(f'--{name}.{f.name}', dest=f'{name}.{f.name}', default=f.default, help=f.metadata.get('help'), **kind)


def option_names(name: str) -> list[str]:
    """The fields of a policy's Options; none, if it cannot be imported."""
    try:
        return [f.name for f in dataclasses.fields(load(name).Options)]
    except PolicyError:
        return []


def read_options(args: Namespace, name: str, policy: type[Policy]) -> Any:
    """The policy's Options as parsed.

    Raises:
        PolicyError: A value is out of its range.
    """
    return policy.Options(**{f.name: getattr(args, f'{name}.{f.name}') for f in dataclasses.fields(policy.Options)})
