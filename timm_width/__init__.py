"""timm_width: finds the widths of timm's conv nets. Importing it registers the `<base>_width` models with timm."""
from typing import Any

from .budget import Budget, BudgetError
from .config import ConfigError, Spec, load_spec, save
from .cost import Cost, Macs, Params
from .models import is_supported, list_configs, register, supported
from .recover import widths_from
from .resize import resize
from .space import Group, WidthError, WidthSpace
from .supernet import Supernet, recalibrate
from .trace import TraceError, trace

__version__ = '0.1.0'
__all__ = [
    'Budget', 'BudgetError', 'ConfigError', 'Cost', 'Group', 'Macs', 'Params', 'Spec', 'Supernet', 'TraceError', 'WidthError',
    'WidthSpace', 'is_supported', 'list_configs', 'load_spec', 'push_to_hub', 'recalibrate', 'register', 'resize', 'save',
    'supported', 'trace', 'widths_from',
]


def push_to_hub(*args: Any, **kwargs: Any) -> Any:
    """Puts a width model on the Hub: see `timm_width.hub.push_to_hub`, whose arguments these are."""
    from .hub import push_to_hub as push  # here, as it brings what scripts need
    return push(*args, **kwargs)
