"""Values held to their type hints: the rule of a field stands beside the field.

``Annotated[int, Range(1, 64)]`` is a hint with a range. ``check_dataclass`` holds a
dataclass to its hints, ``check_arguments`` a function's arguments; what does not fit is
refused in one line: the field, the value received, what is legal.
"""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from flax_resnetv2.errors import UsageError

_LONGEST = 160
"""Characters of a value in a message."""
_LARGEST = 3e38
"""Of a number: float32 ends there."""
_WORDS = {
    int: "a whole number (int)",
    float: "a number (float)",
    bool: "True or False",
    str: "a text (str)",
    NoneType: "None",
}


@dataclass(frozen=True)
class Range:
    """What a number may be, the ends included."""

    low: float
    high: float
    above: bool = False
    """``low`` itself is not included."""
    below: bool = False
    """``high`` itself is not included."""
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
"""As JAX counts, in int32."""
Share = Annotated[float, Range(0, 1, below=True)]


def check_dataclass(value: object, kind: type, at: str = "") -> None:
    """Refuse ``value`` unless it is a ``kind`` and every field fits its hint.

    Args:
        value: what to check.
        kind: the dataclass that it should be.
        at: begins the names of fields in a message, as "train.".

    Raises:
        UsageError: naming the field, its value, what is legal.
    """
    if not isinstance(value, kind):
        name = at.rstrip(".") or kind.__name__.lower()
        raise UsageError(f"{name}={shown(value)} must be {_words(kind)}")
    for field, hint in hints_of(kind).items():
        check(at + field, getattr(value, field), hint)


def check_arguments(function: Callable, values: dict[str, Any]) -> None:
    """Refuse an argument, ``values[name]``, that does not fit its hint."""
    for name, hint in hints_of(function).items():
        if name in values:
            check(name, values[name], hint)


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Refuse a value that is none of ``choices``, or of another type."""
    check(name, value, Literal[choices])


def check(name: str, value: object, hint: Any) -> None:
    """Refuse a value that does not fit ``hint``."""
    if is_dataclass(hint):
        check_dataclass(value, hint, f"{name}.")
    elif not _fits(value, hint):
        raise UsageError(f"{name}={shown(value)} {_rule(hint)}")


def shown(value: object) -> str:
    """``repr`` for a message: one line, not too long."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):
        # Python writes no int of more than 4300 digits, and nothing nested too deeply.
        return f"<{type(value).__name__} too large to show>"
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 40]} ... {text[-35:]}"


@cache
def hints_of(owner: Any) -> dict[str, Any]:
    """Type hints of a dataclass or function, with their ranges."""
    return get_type_hints(owner, include_extras=True)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = (rule for rule in args[1:] if isinstance(rule, Range))
        return _fits(value, args[0]) and all(value in rule for rule in ranges)
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in args)
    if origin in (Union, UnionType):
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


def _rule(hint: Any) -> str:
    if get_origin(hint) is Literal or hint is bool:
        words = get_args(hint) or (True, False)
        return f"is unknown; choose one of {', '.join(map(repr, words))}"
    return f"must be {_words(hint)}"


def _words(hint: Any) -> str:
    """What a hint allows, as the end of "must be"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join(map(str, (_words(args[0]), *args[1:])))
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if origin in (Union, UnionType):
        words = [
            "a tuple of such" if _is_tuple_of(choice, args) else _words(choice)
            for choice in args
        ]
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if origin is tuple:
        count = "" if args[-1] is ... else f" of {len(args)}"
        return f"a tuple{count}, each {_words(args[0])}"
    return _WORDS.get(hint) or f"of type {hint.__name__}"


def _is_tuple_of(hint: Any, choices: tuple) -> bool:
    if get_origin(hint) is not tuple:
        return False
    item = get_args(hint)[0]
    union = get_origin(item) in (Union, UnionType)
    return set(get_args(item) if union else (item,)) <= set(choices)
