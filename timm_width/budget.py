"""Budgets: a cost and the most it may be."""
import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Mapping, Optional, Sequence, Union

from .cost import Cost, Macs, Params, Width
from .space import WidthError, WidthSpace, nearest

__all__ = ['Budget', 'BudgetError']

_COSTS = {'macs': Macs, 'params': Params}
_NAMES = (*_COSTS, 'latency')
_SUFFIXES = {'': 1, 'k': 10 ** 3, 'm': 10 ** 6, 'g': 10 ** 9}
_MILLISECONDS = {'us': Fraction(1, 1000), 'ms': 1, 's': 1000}
_FORMS = ("a budget is written as 'macs=150M', 'macs=1.2G', 'macs=300000000', 'params=2M', 'latency=0.5ms' (per image) or "
          "'macs=0.5x' (of the base network)")
_NUMBER = re.compile(
    r'(?P<number>[+-]?(?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:e[+-]?[0-9]{1,2})?)(?P<suffix>[kmgx]|us|ms|s)?')
_NOT_FINITE = re.compile(r'[+-]?(?:nan|inf|infinity)(?:[kmgx]|us|ms|s)?')


class BudgetError(ValueError):
    """A budget that cannot be read, or that no network or every network meets."""


@dataclass(frozen=True)
class Budget:
    """A cost and its limit.

    Attributes:
        cost: What is limited.
        limit: The most it may be, in the cost's unit; infinite for a policy that weighs costs itself.
        text: How the budget was written.
    """
    cost: Cost
    limit: Union[int, float]
    text: str

    @classmethod
    def parse(cls, text: str, space: WidthSpace, latency: Optional[Cost] = None) -> 'Budget':
        """Reads a budget such as 'macs=150M', 'params=2M', 'latency=0.5ms' or 'macs=0.5x'.

        Args:
            text: Name of a cost, for one without a limit; or, after it, '=' and a number with an optional suffix: K, M, G for
                counts; us, ms or s, which a latency must have; or x for a multiple of the base cost.
            space: The width space that it is for.
            latency: What a latency costs, in milliseconds per image; a latency budget needs it.

        Raises:
            BudgetError: The text is none of the forms.
        """
        shown = f'{str(text)[:60]!r}'
        name, equals, value = str(text).partition('=')
        name, value = name.strip().lower(), value.strip().lower()
        if not isinstance(text, str) or not name or not equals and name not in _NAMES:
            raise BudgetError(f'{shown} is not a budget: {_FORMS}')
        if name not in _NAMES:
            raise BudgetError(f"{shown}: unknown cost '{name[:40]}'{nearest(name, _NAMES)}; known are macs (one multiply-add "
                              f'is 1), params and latency; {_FORMS}')
        if name == 'latency' and latency is None:
            raise BudgetError(f'{shown}: a latency budget needs a latency model: --latency-model FILE, or --latency-model measure '
                              'to make one on this machine first')
        if not equals:
            return cls(latency if name == 'latency' else _COSTS[name](space), math.inf, name)
        found = _NUMBER.fullmatch(value)
        if not found and not _NOT_FINITE.fullmatch(value):
            raise BudgetError(f"{shown}: cannot read '{value[:40]}' as a limit; {_FORMS}")
        number = Fraction(found['number']) if found else Fraction(0)
        if number <= 0:
            raise BudgetError(f'{shown}: the limit must be positive and finite; {_FORMS}')
        suffix, allowed = found['suffix'] or '', _MILLISECONDS if name == 'latency' else _SUFFIXES
        if suffix not in (*allowed, 'x'):
            raise BudgetError(f"{shown}: a limit of {name} ends in {', '.join(filter(None, allowed))} or x, "
                              f"not in '{suffix}'; {_FORMS}" if suffix else f'{shown}: say the unit of the limit; {_FORMS}')
        if name == 'latency':
            try:
                limit = float(number) * latency() if suffix == 'x' else float(number * _MILLISECONDS[suffix])
            except WidthError as e:
                raise BudgetError(f'{shown}: the latency model knows no base network ({e}): give the limit in ms') from None
            return cls(latency, limit, text.strip())
        cost = _COSTS[name](space)
        limit = math.floor(number * (cost() if suffix == 'x' else _SUFFIXES[suffix]))
        if limit < 1:
            hint = '' if suffix else f" (a share of the base is '{name}={value}x')"
            raise BudgetError(f'{shown}: the limit is less than one of {cost.unit}{hint}; {_FORMS}')
        return cls(cost, limit, text.strip())

    def of(self, space: WidthSpace, latency: Optional[Cost] = None) -> 'Budget':
        """The same limit for the networks of another space.

        Args:
            space: The space.
            latency: What a latency costs there.

        Raises:
            BudgetError: It is a limit of latency, and this is not known there.
        """
        if self.cost.space == space:
            return self
        if type(self.cost) in _COSTS.values():
            return replace(self, cost=type(self.cost)(space))
        if latency is None:
            raise BudgetError(f"'{self.text}': there is no latency model of {space.architecture}")
        return replace(self, cost=latency)

    def met(self, widths: Mapping[str, Width] = {}, skips: Sequence[str] = ()) -> bool:
        """Whether a network costs at most the limit.

        Args:
            widths: Group -> channels; groups left out are at their base.
            skips: Residual blocks to leave out.
        """
        return bool(self.cost(widths, skips) <= self.limit)

    def check_feasible(
            self,
            smallest_widths: Optional[Mapping[str, int]] = None,
            largest_widths: Optional[Mapping[str, int]] = None,
            smallest_skips: Sequence[str] = (),
            largest_skips: Sequence[str] = (),
    ) -> None:
        """Checks that the budget can be met, and that it asks for something.

        Args:
            smallest_widths: The smallest network that may be chosen; by default every group at one step.
            largest_widths: The largest network that may be chosen; by default the base.
            smallest_skips: Residual blocks that the smallest leaves out.
            largest_skips: Those that the largest leaves out.

        Raises:
            BudgetError: The limit is below the cost of the smallest network or above that of the largest.
        """
        if self.limit == math.inf:
            return
        if smallest_widths is None:
            smallest_widths = {name: g.unit for name, g in self.cost.space.searchable.items()}
        low = self.cost(smallest_widths, smallest_skips)
        high = self.cost({} if largest_widths is None else largest_widths, largest_skips)
        if not low <= self.limit <= high:
            word, size, end = ('below', 'smallest', low) if self.limit < low else ('above', 'largest', high)
            show = self.cost.show
            raise BudgetError(
                f"budget '{self.text}' is {show(self.limit)}, {word} the {size} network's {show(end)}; for "
                f'{self.cost.space.architecture} at the widths allowed, give a limit between {show(low)} and {show(high)}')

    def __str__(self) -> str:
        return self.text if self.limit == math.inf else f'{self.text} (at most {self.cost.show(self.limit)})'
