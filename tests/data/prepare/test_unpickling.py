"""Pickles call nothing but stand-ins, and cannot have memory filled."""

import copyreg
import pickle
import tracemalloc

import numpy as np
import pytest

from flax_resnetv2.data.prepare import unpickling
from flax_resnetv2.data.prepare.cifar_archive import CIFAR10

ARRAYS = [
    np.arange(6, dtype=np.uint8).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
    np.zeros((2, 0), np.uint8),
]
ERRORS = ValueError, TypeError, LookupError, AttributeError, pickle.UnpicklingError


def load(content):
    return unpickling.load(content, CIFAR10.instructions)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_a_batch_needs_is_read(protocol):
    # For protocol 2 Python 3 writes empty bytes as a call of bytes().
    arrays = [array for array in ARRAYS if array.size or protocol > 2]
    wanted = {
        b"labels": list(range(3000)),
        "numbers": [0, -1, 65536, 0.5, None, True, False],
        "text": "\N{SNOWMAN}",
        "again": [b"a", b"a", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "inner": {b"a": {}},
    }
    content = pickle.dumps(wanted | dict(zip("abcde", arrays, strict=False)), protocol)
    found = load(content)
    for key, value in wanted.items():
        assert found[key] == value
    for name, array in zip("abcde", arrays, strict=False):
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments, state=None):
        self.call = function, arguments, state

    def __reduce__(self):
        function, arguments, state = self.call
        return (function, arguments) if state is None else self.call


class Sub(np.ndarray):
    pass


RECONSTRUCT = np._core.multiarray._reconstruct
OBJECTS = np.array([1, None], object)
FIELDS = np.zeros(2, [("a", "u1"), ("b", "O")])
HUGE = 2_000_000_000


def array_state(shape=(2,), kind="u1", content=b"ab"):
    return Call(
        RECONSTRUCT,
        *(np.ndarray, (0,), b"b"),
        state=(1, shape, np.dtype(kind), False, content),
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (OBJECTS, "an array of the type 'O8'"),
        (FIELDS, "an array of the type 'V9'"),
        (np.array(["2020-01-01"], "M8[D]"), "an array of the type 'M8'"),
        (np.zeros(2), "an array of the type 'f8'"),
        (np.zeros(2, np.int64), "an array of the type 'i8'"),
        (np.zeros(2, "U4"), "an array of the type 'U4'"),
        (np.uint8(3), "asks for 'numpy._core.multiarray scalar'"),
        (
            np.zeros(2, np.uint8).view(Sub),
            "asks for 'tests.data.prepare.test_unpickling Sub'",
        ),
        (np.ma.zeros(2), "asks for 'numpy.ma"),
        (
            Call(np.ndarray, (HUGE,), np.dtype("u1")),
            "'NoneType' object is not callable",
        ),
        (Call(np.zeros, HUGE), "asks for 'numpy zeros'"),
        (Call(np.frombuffer, b"a"), "asks for 'numpy frombuffer'"),
        (Call(np.dtype, "O"), "an array of the type 'O'"),
        (Call(np.dtype, "u1,O"), "an array of the type 'u1,O'"),
        (Call(np.dtype, ("u1", (HUGE,))), r"an array of the type \('u1', \(2"),
        (array_state((HUGE,)), "cannot reshape"),
        (array_state((-1,)), "an array of no type or shape"),
        (array_state("ab"), "not supported between"),
        (array_state(content="ab"), "str"),
        (array_state((3,), content=b"ab"), "cannot reshape"),
        (array_state(kind="u4", content=b"ab"), "an array of the type 'u4'"),
        (Call(print, "never"), "asks for '__builtin__ print'"),
        (Call(eval, "never"), "asks for '__builtin__ eval'"),
        (Call(getattr, 1, "a"), "asks for '__builtin__ getattr'"),
        (bytearray(3), "asks for '__builtin__ bytearray'"),
        ({1, 2}, "asks for '__builtin__ set'"),
        (1j, "asks for '__builtin__ complex'"),
        (1 << 40, "the instruction LONG1"),
        ({1: 2}, "keys that are no text"),
        (pickle.PickleBuffer, "asks for"),
    ],
)
def test_anything_else_is_refused(value, message, capsys):
    with pytest.raises(ERRORS, match=message):
        load(pickle.dumps({b"data": value}, protocol=2))
    assert "never" not in capsys.readouterr().out


def test_what_numpy_would_read_out_of_its_bounds_is_refused():
    # A type of one byte with a field a million bytes behind it.
    content = b"\x80\x02cnumpy\ndtype\n(U\x02V1K\x00K\x01tR."
    with pytest.raises(ValueError, match="type b'V1'"):
        load(content)


@pytest.mark.parametrize("encoding", ["zip", "hex", "utf-7", "idna", "rot13", "latinX"])
def test_no_other_codec_is_run(encoding):
    name = bytes([len(encoding), 0, 0, 0]) + encoding.encode()
    content = (
        b"\x80\x02}U\x01ac_codecs\nencode\nX\x01\x00\x00\x00aX" + name + b"\x86Rs."
    )
    with pytest.raises(ValueError, match=f"the encoding '{encoding}'"):
        load(content)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"cos\nsystem\n(U\x05nevertR.", "asks for 'os system'"),
        (b"(S'never'\nios\nsystem\n.", "the instruction STRING"),
        (b"(K\x01ios\nsystem\n.", "the instruction INST"),
        (b"(cnumpy\ndtype\nK\x01o.", "the instruction OBJ"),
        (b"cnumpy\ndtype\n)\x81.", "the instruction NEWOBJ"),
        (b"\x8c\x02os\x8c\x06system\x93.", "asks for 'os system'"),
        (b"\x82\x01.", "the instruction EXT1"),
        (b"K\x01Q.", "the instruction BINPERSID"),
        (b"Pa\n.", "the instruction PERSID"),
        (b"I9\n.", "the instruction INT"),
        (b"L" + b"9" * 10000 + b"L\n.", "digits|the instruction LONG"),
        (b"N0.", "the instruction POP"),
        (b"N2.", "the instruction DUP"),
        (b"K\x01)R.", "'int' object is not callable"),
        (b"U\x05array)R.", "'bytes' object is not callable"),
        (b"}}b.", "no attribute 'build'"),
        (b"cnumpy\ndtype\n}b.", "missing 1 required positional"),
        (b"c_codecs\nencode\n}b.", "no attribute 'build'"),
        (b"cnumpy\ndtype\nK\x01a.", "no attribute 'append'"),
        (b"}](K\x01K\x02us.", "out of range"),
        (b"}(](K\x01K\x02tK\x03u.", "no text"),
        (b"]}K\x01as.", "no attribute 'append'"),
        (b"NN\x87.", "pop from empty list|out of range"),
        (b"K\x01u.", "pop from empty list"),
        (b"h\x05.", "not found at index 5"),
        (b"N.", "items"),
        (b"", "exhausted|STOP"),
        (b"\x80\x02}", "exhausted|STOP"),
        (b"\xff", "opcode"),
    ],
)
def test_no_other_instruction_is_followed(program, message, capfd):
    with pytest.raises(ERRORS, match=message):
        load(program)
    assert "never" not in capfd.readouterr().out


def test_a_registered_extension_is_not_asked():
    copyreg.add_extension("os", "system", 240)
    try:
        with pytest.raises(ValueError, match="the instruction EXT1"):
            load(b"\x82\xf0.")
    finally:
        copyreg.remove_extension("os", "system", 240)


@pytest.mark.parametrize(
    "bomb",
    [
        b"Nr\xff\xff\xff\x7f.",  # a memo of two billion places
        b"B\xff\xff\xff\x7fabc.",  # two billion bytes, of which three come
        b"\x8e" + (1 << 60).to_bytes(8, "little") + b"abc.",
        b"\x8b\xff\xff\xff\x7fabc.",  # a number of two billion bytes
        b"\x95" + (1 << 60).to_bytes(8, "little") + b"N.",
        b"]" * (4 << 20) + b".",
        b"}" * (4 << 20) + b".",
        b"(" * (4 << 20) + b".",
        b"]q\x00" + b"h\x00" * (4 << 20) + b".",
        b"\x96" + (1 << 60).to_bytes(8, "little") + b"abc.",  # a bytearray
        # One text, encoded a thousand times, and each result kept.
        b"]X\x00\x00\x10\x00"
        + b"a" * (1 << 20)
        + b"q\x00(c_codecs\nencode\nq\x01"
        + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 1000
        + b"e.",
    ],
)
def test_a_small_pickle_takes_little_memory(bomb):
    tracemalloc.start()
    with pytest.raises(ERRORS):
        load(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"}", b"Ns.", "keys that are no text"),
        (b"cnumpy\ndtype\n", b"\x85R.", "recursion"),
        (b"c_codecs\nencode\nU\x01a", b"\x86R.", "recursion"),
        (b"cnumpy._core.multiarray\n_reconstruct\n)R(NN", b"NNtb.", "no type or sha"),
    ],
)
def test_tuples_within_tuples_do_not_overflow_the_stack(before, after, message):
    with pytest.raises((*ERRORS, RecursionError), match=message):
        load(before + b")" + b"\x85" * 150_000 + after)


def test_an_array_that_is_only_announced_is_none():
    content = pickle.dumps({b"data": Call(RECONSTRUCT, np.ndarray, (HUGE,), b"b")}, 2)
    assert load(content) == {b"data": None}


def test_a_batch_has_far_less_instructions_than_the_limit():
    names = [b"a_name_of_a_file_%05d.png" % k for k in range(10_000)]
    labels = [k % 10 for k in range(10_000)]
    content = pickle.dumps({b"labels": labels, b"filenames": names}, protocol=3)
    count = sum(1 for _ in unpickling.pickletools.genops(content))
    assert 5 * count < 1.2 * CIFAR10.instructions
    assert load(content)[b"filenames"] == names
