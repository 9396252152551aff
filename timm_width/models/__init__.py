"""The `<base>_width` models, and bases that timm does not have; importing this package registers them with timm."""
from . import prunet_search as _prunet_search  # noqa: F401  registers itself
from .published import list_configs
from .width_nets import is_supported, register, supported

__all__ = ['is_supported', 'list_configs', 'register', 'supported']
