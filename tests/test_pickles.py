from __future__ import annotations

import argparse
import builtins
import os
import pickle
import zlib
from collections import OrderedDict
from pathlib import PurePosixPath
from typing import Any

import pytest

from tomocpt_stream import pickles
from tomocpt_stream.errors import CheckpointError
from tomocpt_stream.pickles import Standin, read_pickle


class Calls:
    """Something that a pickle calls as it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_plain_data_are_read_as_pickle_reads_them(protocol: int) -> None:
    shared = [1, 2]
    plain = {
        "numbers": [0, -1, 300, 2**40, -(2**70), 1.5, float("inf")],
        "text": ["ä", "", None, True, False],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "nested": {"a": {"b": []}, 7: {}},
        "twice": [shared, shared],
    }
    found = read_pickle(pickle.dumps(plain, protocol=protocol), "a file")
    assert found == plain
    assert found["twice"][0] is found["twice"][1]


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_classes_make_is_held_as_data(protocol: int) -> None:
    made = {
        "ordered": OrderedDict(a=1),
        "settings": argparse.Namespace(batch=4),
        "path": PurePosixPath("a/b"),
    }
    found = read_pickle(pickle.dumps(made, protocol=protocol), "a file")
    assert found["ordered"] == {"a": 1}
    assert found["settings"].name == "argparse.Namespace"
    assert found["settings"].state == {"batch": 4}
    assert isinstance(found["path"], Standin)
    assert found["path"].arguments == ("a", "b")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.system, "touch ran", f"{os.name}.system"),
        (builtins.eval, "open('ran', 'w')", "eval"),
        (builtins.exec, "open('ran', 'w')", "exec"),
        (builtins.__import__, "antigravity", "__import__"),
        (zlib.decompress, b"", "zlib.decompress"),
    ],
)
def test_nothing_that_a_pickle_asks_for_runs(
    function: Any,
    argument: Any,
    name: str,
    protocol: int,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    direct = Calls(function, argument)
    nested = {"a": [OrderedDict(b=Calls(argparse.Namespace, Calls(function, argument)))]}
    for hostile in (direct, nested):
        with pytest.raises(CheckpointError, match=name):
            read_pickle(pickle.dumps(hostile, protocol=protocol), "a file")
    assert not list(tmp_path.iterdir())


def test_getattr_is_a_name_and_nothing_more() -> None:
    hostile = Calls(getattr, argparse.Namespace, "__init__")
    found = read_pickle(pickle.dumps(hostile, protocol=2), "a file")
    assert isinstance(found, Standin)
    assert found.arguments[1] == "__init__"
    # What it gave cannot be called, for it is no name.
    called = b"c__builtin__\ngetattr\n(cargparse\nNamespace\nX\x03\0\0\0getttR(tR."
    with pytest.raises(CheckpointError, match="damaged"):
        read_pickle(called.replace(b"getttR", b"gettR"), "a file")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged"),
        (b"\x80\x02", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b".", "damaged"),
        (b"(.", "damaged"),
        (b"0.", "damaged"),
        (b"]e.", "damaged"),
        (b"](00.", "damaged"),
        (b"N}u.", "damaged"),
        (b"h\x05.", "damaged"),
        (b"K\x01K\x02a.", "damaged"),
        (b"K\x01)R.", "damaged"),
        (b"]}b.", "damaged"),
        (b"})]s.", "damaged"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"(i__main__\nx\n.", "opcode INST"),
        # Eight exabytes, and a memo of 2**32 places, in a few bytes.
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),
        (b"I" + b"9" * 5000 + b"\n.", "damaged"),
    ],
)
def test_damaged_pickles_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_pickle(data, "a file")


def test_a_memo_with_a_far_place_costs_nothing() -> None:
    assert read_pickle(b"Nr\xff\xff\xff\xff.", "a file") is None


def test_keys_that_would_take_for_ever_to_hash_are_refused() -> None:
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    with pytest.raises(CheckpointError, match="key that is a tuple"):
        read_pickle(b"\x80\x02}" + pickle.dumps(nested, protocol=2)[2:-1] + b"K\x01s.", "a file")


def test_long_pickles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "LARGEST_PICKLE", 100)
    with pytest.raises(CheckpointError, match="at most 100 bytes"):
        read_pickle(pickle.dumps("x" * 200), "a file")
