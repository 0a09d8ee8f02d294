"""Reading the pickled batches of CIFAR's archives without Python's unpickler.

A pickle is a program: it can name any function to call, and even harmless functions
can be had to fill the memory. Here its instructions are interpreted, and only those
that a dictionary of numbers, bytes, text, lists and arrays needs; whatever it says of
an array is checked before the array is made.

>>> load(pickle.dumps({b"labels": [3, 8]}, protocol=2))
{b'labels': [3, 8]}
"""

import pickletools
from typing import Any

import numpy as np

INSTRUCTIONS = 200_000
"""More than five times as many as a batch of 10,000 images has. Some take a byte of the
file and a hundred of the memory."""

_NUMBERS = {"BININT", "BININT1", "BININT2", "BINFLOAT"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CODES = {kind + size for kind in "iu" for size in "1248"}
_NOTHING_TO_DO = {"PROTO", "FRAME"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NAMES = {
    "numpy.core.multiarray _reconstruct": "array",
    "numpy._core.multiarray _reconstruct": "array",
    "numpy ndarray": "class",
    "numpy dtype": "type",
    "_codecs encode": "bytes",  # how Python 3 writes bytes for Python 2
}


class _Name(str):
    """What an instruction may call."""


class _Type:
    """A NumPy type: whole numbers only."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code
        self.order = "="
        if type(self.code) is not str or self.code not in _CODES:
            raise ValueError(f"an array of the type {self.code[:20]!r}")

    def build(self, state: tuple) -> None:
        order = state[1]
        self.order = order.decode() if isinstance(order, bytes) else order
        if self.order not in ("<", ">", "=", "|"):
            raise ValueError(f"the byte order {self.order[:20]!r}")


class _Array:
    """An array; its content comes after it."""

    value: np.ndarray | None = None

    def build(self, state: tuple) -> None:
        _, shape, kind, by_columns, content = state
        # reshape compares the sizes: nothing is made larger than its content.
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError("an array of no shape")
        values = np.frombuffer(content, np.dtype(kind.code).newbyteorder(kind.order))
        self.value = values.reshape(shape, order="F" if by_columns else "C")


def load(content: bytes, instructions: int = INSTRUCTIONS) -> dict[str | bytes, Any]:
    """Give the dictionary that a pickle of protocol 2 to 4 describes.

    Args:
        content: the pickle.
        instructions: how many it may have.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, RecursionError: it asks for
            anything else, or is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    for count, (instruction, argument, _) in enumerate(pickletools.genops(content)):
        name = instruction.name
        if count == instructions:
            raise ValueError(f"it has more than {instructions:,} instructions")
        if name in _NUMBERS or name in _TEXTS:
            stack.append(argument)
        elif name in ("SHORT_BINSTRING", "BINSTRING"):
            stack.append(argument.encode("latin1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "TUPLE":
            stack.append(tuple(above_mark()))
        elif name in _TUPLES:
            values = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(values)))
        elif name == "APPEND":
            value = stack.pop()
            _append(stack[-1], [value])
        elif name == "APPENDS":
            values = above_mark()
            _append(stack[-1], values)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _update(stack[-1], [key, value])
        elif name == "SETITEMS":
            values = above_mark()
            _update(stack[-1], values)
        elif name == "GLOBAL":
            stack.append(_named(argument))
        elif name == "STACK_GLOBAL":
            function, module = stack.pop(), stack.pop()
            stack.append(_named(f"{module} {function}"))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].build(state)
        elif name == "STOP":
            break
        elif name not in _NOTHING_TO_DO:
            raise ValueError(f"it has the instruction {name}")
    return {
        key: value.value if isinstance(value, _Array) else value
        for key, value in stack.pop().items()
    }


def _append(target: Any, values: list[Any]) -> None:
    if type(target) is not list:
        raise TypeError(f"it appends to {type(target).__name__}")
    target.extend(values)


def _update(target: Any, values: list[Any]) -> None:
    keys = values[::2]
    # A tuple of tuples as key would be hashed by as many nested calls.
    if type(target) is not dict or not all(type(k) in (str, bytes) for k in keys):
        raise TypeError("it has a dictionary with keys that are no text")
    target.update(zip(keys, values[1::2], strict=True))


def _named(name: str) -> _Name:
    if name not in _NAMES:
        raise ValueError(f"it asks for {name[:80]!r}")
    return _Name(_NAMES[name])


def _call(name: Any, arguments: tuple) -> Any:
    if type(name) is _Name and name == "array":
        return _Array()
    if type(name) is _Name and name == "type":
        return _Type(*arguments)
    if type(name) is _Name and name == "bytes":
        text, encoding = arguments
        if encoding not in ("latin1", b"latin1"):
            raise ValueError(f"it asks for the encoding {str(encoding)[:20]!r}")
        return text.encode("latin1")
    raise ValueError("it calls what is no function")
