"""The sizes that modules keep in Python, which ATen never sees: how a trace finds them, and which axes they follow.

Two sources. `SIZES` lists the attributes of torch's and timm's own layers that restate the shape of a weight. Everything else
(split sizes, view shapes, slice ends) is found while the model runs: every int that a module keeps is replaced by a `Size`, an
int that remembers where it came from through `+ - * //`; where a Size reaches a call that says how long a channel axis is, that
is an equation, attribute = axis. Solved, they are the bindings of the space. A size met by two axes unites them. The lengths
that `x.shape` gives are Sizes too: code such as `reshape(B, N, heads, C // heads)` ties the new axis to the one that C was read
from.
"""
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .resize import feature_info
from .rules import is_ids

__all__ = ['FUSE', 'Recipe', 'Size', 'SizeWatcher', 'metadata', 'recipes', 'tag_sizes']

Where = tuple[str, str, tuple]  # module path, attribute, key inside it


@dataclass(frozen=True)
class Recipe:
    """`module.attribute[key] = length of the axis * mul // div`; the axis is that of a tensor's dimension, or given ids."""
    module: str
    attribute: str
    tensor: str = ''
    dim: int = 0
    mul: int = 1
    div: int = 1
    key: tuple[Union[int, str], ...] = ()
    ids: Optional[np.ndarray] = None


# module class -> attribute -> 'tensor:dim'; 'attribute[i]' is an entry of a tuple
SIZES: dict[str, dict[str, str]] = {
    'Linear': {'in_features': 'weight:1', 'out_features': 'weight:0'},
    '_BatchNorm': {'num_features': 'running_mean:0'},
    'GroupNorm': {'num_channels': 'weight:0'},
    'LayerNorm': {'normalized_shape[0]': 'weight:0'},
    'RmsNorm': {'normalized_shape[0]': 'weight:0'},
    'RmsNorm2d': {'normalized_shape[0]': 'weight:0'},
    'SimpleNorm': {'normalized_shape[0]': 'weight:0'},
    'SimpleNorm2d': {'normalized_shape[0]': 'weight:0'},
}
FUSE = ('fuse', 'reparameterize', 'switch_to_deploy')  # methods that timm's reparameterize_model calls; they read sizes too
PLAIN = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def recipes(model: nn.Module, unit_rules: dict[str, bool]) -> list[Recipe]:
    """Lists the sizes that restate a weight's shape, for every module of a model at its base widths.

    Args:
        model: The model, at base widths.
        unit_rules: For each grouped convolution and norm, whether its groups are units.
    """
    out = []
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            out += _conv(path, module, unit_rules.get(path))
        for cls in type(module).__mro__:
            for attribute, size in SIZES.get(cls.__name__, {}).items():
                tensor, _, dim = size.partition(':')
                attribute, _, key = attribute.partition('[')
                tensor = f'{path}.{tensor}' if path else tensor
                out.append(Recipe(path, attribute, tensor, int(dim), key=(int(key[:-1]),) if key else ()))
        if isinstance(module, nn.GroupNorm) and unit_rules.get(path):
            tensor = f'{path}.weight' if path else 'weight'
            out.append(Recipe(path, 'num_groups', tensor, 0, 1, module.num_channels // module.num_groups))
    return out


def _conv(path: str, conv: nn.Module, unit: Optional[bool]) -> list[Recipe]:
    weight = path + '.weight' if path else 'weight'
    i, o, g = conv.in_channels, conv.out_channels, conv.groups
    if conv.transposed:
        return [Recipe(path, 'in_channels', weight, 0), Recipe(path, 'out_channels', weight, 1, g)]
    out = [Recipe(path, 'out_channels', weight, 0)]
    if g == 1 or unit is False:
        return out + [Recipe(path, 'in_channels', weight, 1, g)]
    return out + [Recipe(path, 'in_channels', weight, 0, i // g, o // g), Recipe(path, 'groups', weight, 0, 1, o // g)]


def metadata(model: nn.Module, ledger) -> list[Recipe]:
    """Lists the widths that timm models state about themselves: num_features, head_hidden_size, feature_info, their heads'.

    No forward reads them, so no shape check would miss them; features_only, reset_classifier, fusion and users do read them.
    """
    classifier = []
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('classifier') or ()
    for name in (names,) if isinstance(names, str) else names:
        weight = ledger.tensors.get(f'{name}.weight')
        if weight is not None and weight.ndim > 1:
            classifier.append(ledger.label(weight)[1])
    features = ledger.channels('#features')
    last = classifier + ledger.channels('#output')
    out = []

    def state(path: str, holder: nn.Module, attribute: str, candidates: list) -> None:
        size = holder.__dict__.get(attribute)
        ids = next((e for e in candidates if is_ids(e) and len(e) == size), None) if isinstance(size, int) else None
        if ids is not None:
            out.append(Recipe(path, attribute, ids=ids))

    state('', model, 'num_features', features + last)
    state('', model, 'head_hidden_size', last + features)
    state('', model, 'embed_dim', last + features)
    for k, size in enumerate(model.__dict__.get('embed_dim') if isinstance(model.__dict__.get('embed_dim'), (tuple, list)) else ()):
        if k < len(classifier) and is_ids(classifier[k]) and len(classifier[k]) == size:  # a classifier per stage
            out.append(Recipe('', 'embed_dim', key=(k,), ids=classifier[k]))
    for path, module in model.named_modules():
        if 'head' in path.rpartition('.')[2] and path in ledger.inputs:
            state(path, module, 'in_features', ledger.inputs[path] + features)
            state(path, module, 'num_features', last + ledger.inputs[path])
            state(path, module, 'hidden_size', last)
        elif path in ledger.inputs and any(hasattr(module, method) for method in FUSE):
            for attribute in ('in_chs', 'in_channels', 'groups', 'dim'):
                state(path, module, attribute, ledger.inputs[path])
            for attribute in ('out_chs', 'out_channels'):
                state(path, module, attribute, ledger.channels(path))
    for k, info in enumerate(feature_info(model)):
        found = ledger.channels(str(info.get('module', ''))) + ledger.channels(f'#intermediate.{k}')
        ids = next((e for e in found if len(e) == info.get('num_chs')), None)
        if ids is not None:
            out.append(Recipe('', 'feature_info', key=(k, 'num_chs'), ids=ids))
    return out


READ = '#shape'  # in place of an attribute: a length read from a tensor's shape


class Size(int):
    """An int with its origin: a sum of module attributes times fractions."""
    terms: dict[Where, Fraction]

    def __new__(cls, value: int, terms: dict):
        out = super().__new__(cls, value)
        out.terms = terms
        return out

    def _scaled(self, by: Fraction):
        value = int(self) * by
        return Size(int(value), {k: c * by for k, c in self.terms.items()}) if value.denominator == 1 else None

    def _plus(self, other, sign: int):
        if not isinstance(other, Size):
            return int(self) + sign * other
        terms = dict(self.terms)
        for k, c in other.terms.items():
            terms[k] = terms.get(k, Fraction(0)) + sign * c
        return Size(int(self) + sign * int(other), {k: c for k, c in terms.items() if c})

    def __add__(self, other):
        return self._plus(other, 1)

    def __sub__(self, other):
        return self._plus(other, -1)

    @property
    def read(self) -> bool:
        """Whether it comes from the shape of a tensor alone."""
        return all(k[1] == READ for k in self.terms)

    def __mul__(self, other):
        if not isinstance(other, int):
            return int(self) * other
        if isinstance(other, Size) and (other.read, int(other)) > (self.read, int(self)):
            return other._scaled(Fraction(int(self)))  # a width times a count: the count is the smaller, an attribute
        return self._scaled(Fraction(int(other)))

    __rmul__ = __mul__

    def __floordiv__(self, other):
        found = self._scaled(Fraction(1, int(other))) if isinstance(other, int) and other else None
        return int(self) // other if found is None else found


def tag_sizes(model: nn.Module) -> None:
    """Replaces the ints (and the entries of int tuples and lists) that modules keep by Sizes."""
    for path, module in model.named_modules():
        if isinstance(module, PLAIN):
            continue
        for name, value in list(module.__dict__.items()):
            if name[0] == '_' or name in ('training', 'feature_info'):
                continue
            if type(value) is int and value > 1:
                module.__dict__[name] = Size(value, {(path, name, ()): Fraction(1)})
            elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
                module.__dict__[name] = type(value)(
                    Size(v, {(path, name, (k,)): Fraction(1)}) if v > 1 else v for k, v in enumerate(value))


class SizeWatcher(TorchFunctionMode):
    """Collects what the run says about Sizes: equations between expressions of attributes and channel axes."""
    CALLS = ('reshape', 'view', 'split', 'split_with_sizes', '__getitem__', '__setitem__', 'expand', 'narrow', 'unflatten',
             'conv1d', 'conv2d')

    def __init__(self, ledger):
        super().__init__()
        self.ledger = ledger
        self.equations: dict[tuple, list] = {}  # terms -> ids of the axes met, all united
        self.read: dict[int, np.ndarray] = {}  # id(ids) -> ids, of the lengths read from shapes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if type(out) is torch.Size:
            return torch.Size([self._length(n, e) for n, e in zip(out, self.ledger.label(args[0]))])
        name = getattr(func, '__name__', '')
        if name == 'size' and type(out) is int and len(args) > 1:
            return self._length(out, self.ledger.label(args[0])[args[1]])
        if name in self.CALLS and args and isinstance(args[0], torch.Tensor):
            try:
                self._note(name, out, *args, **(kwargs or {}))
            except (IndexError, TypeError):  # an odd call of the model's own; law 0 has the last word
                pass
        return out

    def _length(self, n: int, ids) -> int:
        if not is_ids(ids) or n < 2:
            return n
        self.read[id(ids)] = ids
        return Size(n, {('', READ, (id(ids),)): Fraction(1)})

    def _note(self, name: str, out: Any, x: torch.Tensor, *args, **kwargs) -> None:
        label = self.ledger.label
        if name in ('reshape', 'view', 'expand'):
            sizes = args[0] if args and isinstance(args[0], (tuple, list)) else args
            for d, s in enumerate(sizes):
                self._equal(s, label(out)[d])
        elif name == 'unflatten':
            for k, s in enumerate(args[1]):
                self._equal(s, label(out)[args[0] % x.ndim + k])
        elif name in ('split', 'split_with_sizes'):
            sizes, dim = args[0], args[1] if len(args) > 1 else kwargs.get('dim', 0)
            for s, o in zip(sizes if isinstance(sizes, (tuple, list)) else [sizes], out):
                self._equal(s, label(o)[dim])
        elif name == 'narrow':
            self._equal(args[2], label(out)[args[0]])
        elif name in ('conv1d', 'conv2d'):
            groups = kwargs.get('groups', args[5] if len(args) > 5 else 1)
            if groups == x.shape[1]:
                self._equal(groups, label(x)[1])
        else:
            index, d = args[0] if isinstance(args[0], tuple) else (args[0],), 0
            for i in index:
                if i is Ellipsis:
                    d = x.ndim - (len(index) - index.index(i) - 1)
                    continue
                e = label(x)[d] if i is not None else None
                if isinstance(i, slice) and is_ids(e):
                    if isinstance(i.stop, Size):
                        self._equal(i.stop, e[:int(i.stop)])
                    if isinstance(i.start, Size):
                        self._equal(i.start, e[:int(i.start)])
                d += i is not None

    def _equal(self, size: Any, ids) -> None:
        if not isinstance(size, Size) or not is_ids(ids) or len(ids) != int(size):
            return
        if size.read:
            if len(size.terms) == 1:
                self._tie(*next(iter(size.terms.items())), ids)
            return
        met = self.equations.setdefault(tuple(sorted(size.terms.items())), [])
        if met and met[0] is not ids:
            self.ledger.unite(met[0], ids)
        met.append(ids)

    def _tie(self, where: Where, by: Fraction, ids: np.ndarray) -> None:
        """An axis is `by` times as long as another one in the model's own code: unite them, position by position."""
        other = self.read[where[2][0]]
        longer, shorter, times = (ids, other, by.numerator) if by >= 1 else (other, ids, by.denominator)
        if by.numerator > 1 and by.denominator > 1 or any(
                np.array_equal(longer, f(shorter, times)) for f in (np.repeat, np.tile)):
            return  # one was made from the other
        if by.numerator == 1:
            self.ledger.unite(other.reshape(by.denominator, -1), np.tile(ids, (by.denominator, 1)))
        elif by.denominator == 1:
            self.ledger.unite(np.tile(other, (by.numerator, 1)), ids.reshape(by.numerator, -1))

    def solve(self) -> list[Recipe]:
        """Turns the equations into recipes: single attributes first, then those that remain alone in a sum."""
        known: dict[Where, tuple[np.ndarray, Fraction]] = {}
        waiting = [(dict(terms), ids[0]) for terms, ids in self.equations.items()
                   if all(k[1] != READ for k, _ in terms)]
        progress = True
        while waiting and progress:
            progress, rest = False, []
            for terms, ids in waiting:
                unknown = [k for k in terms if k not in known]
                if len(unknown) != 1:
                    rest += [(terms, ids)] if unknown else []
                    continue
                here, coefficient = unknown[0], terms[unknown[0]]
                parts = [(k, c) for k, c in terms.items() if k != here]
                if coefficient > 0 and all(c == -1 and coefficient == 1 and known[k][1] == 1 for k, c in parts):
                    known[here] = (np.concatenate([ids, *(known[k][0] for k, _ in parts)]), 1 / coefficient)
                    progress = True
            waiting = rest
        return [Recipe(m, a, mul=f.numerator, div=f.denominator, key=k, ids=ids) for (m, a, k), (ids, f) in known.items()]
