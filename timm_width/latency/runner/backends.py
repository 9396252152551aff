"""Which backends there are."""
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Optional

from .base import Backend
from .errors import RunnerError

__all__ = ['BACKENDS', 'open_backend', 'unknown']

BACKENDS: dict[str, tuple[str, str]] = {  # name -> (module, class)
    'onnxruntime': ('ort', 'OnnxRuntime'),
    'onnxruntime-cuda': ('ort', 'OnnxRuntime'),
    'onnxruntime-tensorrt': ('ort', 'OnnxRuntime'),
    'tensorrt': ('trt', 'TensorRT'),
    'trtexec': ('trtexec', 'Trtexec'),
}


def open_backend(name: str, *, precision: str = 'fp32', threads: Optional[int] = None, **options: Any) -> Backend:
    """Finds a backend.

    Args:
        name: A key of BACKENDS.
        precision: 'fp32', 'fp16' or 'int8'.
        threads: Of the CPU, for backends that compute there; None: all that this process may use.
        **options: Of the backend: see its class.

    Raises:
        RunnerError: There is none of that name, it is not installed (the message says what to install), or it does not take that.
    """
    if name not in BACKENDS:
        raise RunnerError(unknown('backend', name, BACKENDS))
    module, kind = BACKENDS[name]
    found = getattr(import_module(f'.{module}', __package__), kind)
    known = [a for a in found.__init__.__code__.co_varnames[:found.__init__.__code__.co_argcount] if a not in ('self', 'name')]
    if wrong := [o for o in options if o not in known]:
        raise RunnerError(unknown(f'option of {name}', wrong[0], known))
    return found(name, precision, threads, **options)


def unknown(what: str, name: str, known: Any) -> str:
    """What to say about a name that is not known, with the nearest right one."""
    near = get_close_matches(str(name), list(known), 1)
    hint = f"; did you mean '{near[0]}'?" if near else ''
    return f"unknown {what} '{name}'{hint} (there are {', '.join(known)})"
