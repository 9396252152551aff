"""timm_width: finds the widths of timm's conv nets. Importing it registers the `<base>_width` models with timm."""
from .config import ConfigError, Spec, load_spec, save
from .models import is_supported, register, supported
from .resize import resize
from .space import Group, WidthError, WidthSpace
from .trace import TraceError, trace

__version__ = '0.1.0'
__all__ = [
    'ConfigError', 'Group', 'Spec', 'TraceError', 'WidthError', 'WidthSpace', 'is_supported', 'load_spec', 'register', 'resize',
    'save', 'supported', 'trace',
]
