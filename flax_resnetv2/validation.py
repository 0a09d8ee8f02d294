"""Checks of values against their type hints, such as ``Annotated[int, Range(1, 64)]``.

A value that does not fit is refused by one line: the field, the value, what is legal.
"""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from flax_resnetv2.errors import UsageError

_LONGEST = 160  # characters of a value in a message
_LARGEST = 3e38  # where float32 ends
_UNIONS = (Union, UnionType)
_WORDS = {
    int: "a whole number (int)",
    float: "a number (float)",
    bool: "True or False",
    str: "a string (str)",
    NoneType: "None",
}


@dataclass(frozen=True)
class Range:
    """The range of a number; ``above`` and ``below`` exclude its ends."""

    low: float
    high: float
    above: bool = False
    below: bool = False
    odd: bool = False

    def __contains__(self, value: float) -> bool:
        return (
            self.low <= value <= self.high
            and not (self.above and value == self.low)
            and not (self.below and value == self.high)
            and not (self.odd and value % 2 == 0)
        )

    def __str__(self) -> str:
        if self.above or self.below:
            ends = "[("[self.above], "])"[self.below]
            return f"in {ends[0]}{self.low}, {self.high}{ends[1]}"
        odd = " (odd, so that there is a center: 1, 3, 5, ...)" if self.odd else ""
        return f"from {self.low} to {self.high}{odd}"


Count = Annotated[int, Range(1, 2**31 - 1)]
"""A positive number that fits into JAX's int32."""
Share = Annotated[float, Range(0, 1, below=True)]


def check_dataclass(value: object, kind: type, at: str = "") -> None:
    """Refuse ``value`` unless it is a dataclass ``kind`` and every field fits its hint.

    ``at`` is the prefix of field names in messages, for example "train.".
    """
    if not isinstance(value, kind):
        name = at.rstrip(".") or kind.__name__.lower()
        raise UsageError(f"{name}={shown(value)} must be {_words(kind)}")
    for field, hint in hints_of(kind).items():
        check(at + field, getattr(value, field), hint)


def check_arguments(function: Callable, values: dict[str, Any]) -> None:
    """Refuse a function's arguments ``values`` unless each fits its hint."""
    for name, hint in hints_of(function).items():
        if name in values:
            check(name, values[name], hint)


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Refuse a value that is not one of ``choices``, or equal but of another type."""
    check(name, value, Literal[choices])


def check(name: str, value: object, hint: Any) -> None:
    """Refuse a value that does not fit ``hint``."""
    if is_dataclass(hint):
        check_dataclass(value, hint, f"{name}.")
    elif not _fits(value, hint):
        rule = f"must be {_words(hint)}"
        if get_origin(hint) is Literal or hint is bool:
            choices = get_args(hint) or (True, False)
            rule = f"is unknown; choose one of {', '.join(map(repr, choices))}"
        raise UsageError(f"{name}={shown(value)} {rule}")


def shown(value: object) -> str:
    """Return ``repr(value)`` on one line of limited length."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):
        # An int of more than 4300 digits, or deep nesting.
        return f"<{type(value).__name__} too large to show>"
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 40]} ... {text[-35:]}"


@cache
def hints_of(owner: Any) -> dict[str, Any]:
    """Return the type hints of a dataclass or function, with their ranges."""
    return get_type_hints(owner, include_extras=True)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = (rule for rule in args[1:] if isinstance(rule, Range))
        return _fits(value, args[0]) and all(value in rule for rule in ranges)
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in args)
    if origin in _UNIONS:
        return any(_fits(value, choice) for choice in args)
    if origin is tuple:
        if type(value) is not tuple:
            return False
        items = args[:1] * len(value) if args[-1] is ... else args
        return len(items) == len(value) and all(map(_fits, value, items))
    if hint is float:
        # NaN is in no range; an int may be larger than any float.
        return type(value) in (int, float) and -_LARGEST < value < _LARGEST
    return type(value) is hint


def _words(hint: Any) -> str:
    """Describe the values that fit a hint, to follow "must be"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join(map(str, (_words(args[0]), *args[1:])))
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if origin in _UNIONS:
        *first, last = (
            "a tuple of these"
            if get_origin(choice) is tuple and _items(choice) <= set(args)
            else _words(choice)
            for choice in args
        )
        return f"{', '.join(first)} or {last}"
    if origin is tuple:
        count = "" if args[-1] is ... else f" of {len(args)}"
        return f"a tuple{count}, each {_words(args[0])}"
    return _WORDS.get(hint) or f"of type {hint.__name__}"


def _items(hint: Any) -> set:
    """Return the alternatives for an item of a tuple."""
    item = get_args(hint)[0]
    return set(get_args(item) if get_origin(item) in _UNIONS else (item,))
