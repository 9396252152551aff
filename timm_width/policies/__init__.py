"""Policies by name. A package adds its own by the entry-point group `timm_width.policies`; nothing here lists them."""
import dataclasses
import pkgutil
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from ..space import nearest
from .base import Choice, Policy, PolicyError

__all__ = ['Choice', 'Policy', 'PolicyError', 'add_options', 'load', 'names', 'read_options']

GROUP = 'timm_width.policies'


def names() -> list[str]:
    """All that `load` knows: the entry points, and the files of this folder, for a checkout that is not installed."""
    return sorted({e.name for e in entry_points(group=GROUP)} | _files())


def _files() -> set[str]:
    return {m.name for m in pkgutil.iter_modules(__path__)} - {'base'}


def load(name: str) -> type[Policy]:
    """Imports the policy of that name.

    Raises:
        PolicyError: There is none, or its package cannot be imported.
    """
    for entry in entry_points(group=GROUP, name=name):
        try:
            return entry.load()
        except (ImportError, AttributeError) as e:
            raise PolicyError(f"policy '{name}' ({entry.value}) cannot be imported: {e}") from e
    if name not in _files():
        raise PolicyError(f"unknown policy '{name}'{nearest(name, names())}; there are {', '.join(names())}")
    module = import_module(f'{__name__}.{name}')
    return next(v for v in vars(module).values()
                if isinstance(v, type) and issubclass(v, Policy) and v.__module__ == module.__name__)


def add_options(parser: ArgumentParser, name: str, policy: type[Policy]) -> None:
    """Gives a parser one flag `--<name>.<field>` for every field of the policy's Options."""
    group = parser.add_argument_group(f'options of the policy {name}')
    types = get_type_hints(policy.Options)
    for f in dataclasses.fields(policy.Options):
        kind: dict[str, Any] = {'type': types[f.name], 'metavar': types[f.name].__name__.upper()}
        if types[f.name] is bool:
            kind = {'action': BooleanOptionalAction}
        group.add_argument(f'--{name}.{f.name}', default=f.default, help=f.metadata.get('help'), **kind)


def read_options(args: Namespace, name: str, policy: type[Policy]) -> Any:
    """The policy's Options as parsed.

    Raises:
        PolicyError: A value is out of its range.
    """
    return policy.Options(**{f.name: getattr(args, f'{name}.{f.name}') for f in dataclasses.fields(policy.Options)})
