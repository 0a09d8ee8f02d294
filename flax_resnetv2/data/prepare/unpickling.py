"""Load the pickled batches of CIFAR's Python archives without running their code.

A pickle is a program: it can call any function by its name, and even harmless functions
can fill the memory. Here only a few instructions are allowed, up to a limited number,
and the only functions are stand-ins for the five that the pickle of a batch names.

>>> load(pickle.dumps({b"labels": [3, 8]}, protocol=2), instructions=100)
{b'labels': [3, 8]}
"""

import io
import pickle
import pickletools
import re
from typing import Any

import numpy as np

_ALLOWED = re.compile(
    "PROTO|FRAME|STOP|MARK|NONE|NEWTRUE|NEWFALSE|BININT[12]?|BINFLOAT|"
    "(SHORT_)?BIN(UNICODE|BYTES|STRING)|(EMPTY_)?TUPLE|TUPLE[123]|EMPTY_(LIST|DICT)|"
    "(APPEND|SETITEM)S?|(LONG_)?BIN(PUT|GET)|MEMOIZE|(STACK_)?GLOBAL|REDUCE|BUILD"
)


def load(content: bytes, instructions: int) -> dict[str | bytes, Any]:
    """Return the dictionary of a pickle of protocol 2 to 4.

    ``instructions`` limits their number, as each can take a hundred bytes of memory.

    Raises:
        Exception: of several types; the pickle asks for anything else, or is damaged.
    """
    for count, (instruction, _, _) in enumerate(pickletools.genops(content)):
        if count == instructions:
            raise ValueError(f"it has more than {instructions:,} instructions")
        if not _ALLOWED.fullmatch(instruction.name):
            raise ValueError(f"it has the instruction {instruction.name}")
    batch = _Unpickler(content).load()
    return {k: v.value if isinstance(v, _Array) else v for k, v in batch.items()}


# The unpickler in C would allocate as many memo entries as four bytes announce, and
# would hash tuples within tuples until the stack overflows.
class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, which calls stand-ins only."""

    dispatch = pickle._Unpickler.dispatch.copy()

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), fix_imports=False, encoding="bytes")
        self._unencoded = len(content)

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name of NumPy or codecs."""
        stand_ins = {
            "numpy.core.multiarray _reconstruct": _Array,
            "numpy._core.multiarray _reconstruct": _Array,
            "numpy ndarray": None,  # only an argument of _reconstruct
            "numpy dtype": _UInt8,
            "_codecs encode": self._encode,
        }
        if (wanted := f"{module} {name}") not in stand_ins:
            raise ValueError(f"it asks for {wanted[:80]!r}")
        return stand_ins[wanted]

    def _encode(self, text: str, encoding: str | bytes) -> bytes:
        """Return bytes that Python 3 pickled as text for Python 2."""
        if encoding not in ("latin1", b"latin1"):
            raise ValueError(f"it asks for the encoding {encoding[:20]!r}")
        self._unencoded -= len(text)
        if self._unencoded < 0:  # the same text many times would fill the memory
            raise ValueError("it encodes more text than it has")
        return text.encode("latin1")

    def load_empty_dict(self) -> None:
        """Push a dictionary that checks its keys."""
        self.append(_Dict())

    def load_build(self) -> None:
        """Set the state of a stand-in; no other object has one."""
        state = self.stack.pop()
        self.stack[-1].build(state)

    dispatch[pickle.EMPTY_DICT[0]] = load_empty_dict
    dispatch[pickle.BUILD[0]] = load_build


class _Dict(dict):
    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) not in (str, bytes):
            raise TypeError("it has a dictionary with keys that are no text")
        super().__setitem__(key, value)


class _UInt8:
    """The only dtype; its state is the byte order, which bytes do not have."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        if code not in ("u1", b"u1"):
            raise ValueError(f"an array of the type {code[:20]!r}")

    def build(self, _: Any) -> None: ...


class _Array:
    """An array; its shape, dtype and content come with its state."""

    value: np.ndarray | None = None

    def __init__(self, *_: Any) -> None: ...

    def build(self, state: tuple) -> None:
        _, shape, dtype, by_columns, content = state
        if type(dtype) is not _UInt8 or min(shape) < 0:
            raise ValueError("an array of no type or shape")
        # A view: reshape compares the size of the content with the shape.
        values = np.frombuffer(content, np.uint8)
        self.value = values.reshape(shape, order="F" if by_columns else "C")
