"""Law 0 at trace time: the resized model must run the operations of the base with the shapes that the table predicts."""
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .ledger import composite, execute, restore, snapshot

__all__ = ['deviations']

Predicted = list[tuple[str, list[tuple[int, ...]], bool]]


def deviations(meta: nn.Module, size: tuple[int, ...], predicted: Predicted) -> list[tuple[int, str]]:
    """Runs a resized meta model against a prediction.

    Args:
        meta: The resized model, on the meta device.
        size: Image size.
        predicted: Per operation of the base: name, output shapes (a negative size stands for any), whether it touches channels.

    Returns:
        (number of the operation, what differs), for every operation that differs.
    """
    checker = _Checker(predicted)
    kept = snapshot(meta)
    x = torch.empty(1, *size, device='meta')
    try:
        with torch.device('meta'), checker:
            meta(x)
    except _Astray:
        pass
    except Exception as e:  # the model's own code refused the sizes
        checker.deviations.append((min(checker.at, len(predicted) - 1), f'{type(e).__name__}: {str(e)[:120]}'))
    restore(kept)
    return checker.deviations


class _Checker(TorchDispatchMode):
    """Compares each output with the shape predicted; where they differ, notes it and goes on with the prediction."""

    def __init__(self, predicted: list):
        super().__init__()
        self.predicted = predicted
        self.at = 0
        self.deviations: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if composite(func):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        called = func._schema.name.split('::')[1]
        at = self.at
        while at < len(self.predicted) - 1 and self.predicted[at][0] != called and not self.predicted[at][2]:
            at += 1  # operations on constants may be cached by the first run
        name, shapes, _ = self.predicted[at] if at < len(self.predicted) else ('the end', (), True)
        if called != name:
            self.deviations.append((min(at, len(self.predicted) - 1), f'{called} runs instead of {name}'))
            raise _Astray
        self.at = at + 1
        fault = None
        try:
            out = execute(func, args, kwargs)
            outs = [o for o in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(o, torch.Tensor)]
            got = [tuple(o.shape) for o in outs]
            if not _agree(got, shapes):
                fault = f'{name} gives {got} where {shapes} was expected'
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as e:
            fault, out = f'{name}: {str(e).splitlines()[0][:120]}', ()
        if fault:
            self.deviations.append((at, fault))
            new = [torch.empty([abs(n) for n in s], device='meta') for s in shapes]
            out = tuple(new) if isinstance(out, (list, tuple)) and len(shapes) != 1 else new[0] if new else out
        return out


def _agree(got: list, predicted: list) -> bool:
    """Whether shapes are those predicted; a negative size stands for any (equal values along that dimension)."""
    return got == predicted or len(got) == len(predicted) and all(
        len(a) == len(b) and all(n == m or m < 0 for n, m in zip(a, b)) for a, b in zip(got, predicted))


class _Astray(Exception):
    """The resized model does not run the operations of the base."""
