"""Ground truths that are pickles: the values of `pickle.loads`, and nothing is run."""

import os
import pickle
import struct
import zlib

import numpy as np
import pytest

from dinojax import UserError
from experiments.retrieval.pickles import read_plain_pickle


def truth() -> dict:
    """Of the form of revisited Oxford's, with lists, arrays and numpy's numbers."""
    random = np.random.default_rng(0)
    answers = [
        {
            "bbx": [136.5, 34.1, float(i), 955.7],
            "easy": random.integers(0, 4993, 5),
            "hard": [int(value) for value in random.integers(0, 4993, 300)],
            "junk": np.array([], np.int64) if i else random.integers(0, 9, (2, 3)).astype(">i4", order="F"),
            "count": np.int64(i),
        }
        for i in range(3)
    ]
    return {"gnd": answers, "imlist": ["all_souls_000013", "ünïcode"], "qimlist": ("a", "b", "c"), "more": [None, True]}


def same(found, expected) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, np.ndarray):
        # `pickle.loads` swaps bytes on the way.
        return found.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=") and np.array_equal(found, expected)
    return found == expected


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_those_of_pickle(tmp_path, protocol):
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(truth(), protocol))
    found = read_plain_pickle(tmp_path / "gnd.pkl")
    assert same(found, pickle.loads((tmp_path / "gnd.pkl").read_bytes())) and same(found, truth())


class Evil:
    """Runs a program when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


def hostile(content: bytes) -> bytes:
    return b"\x80\x04" + content + b"."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"gnd": [Evil()]}), r"names '(posix|os)\.system', which could run anything"),
        (pickle.dumps({"gnd": {1, 2}}), "holds the instruction EMPTY_SET"),
        (b"cos\nsystem\n(S'touch hacked'\ntR.", r"names 'os\.system'"),
        (b"(S'touch hacked'\nios\nsystem\n.", "holds the instruction INST"),
        (hostile(b"cnumpy\ndtype\n(X\x01\x00\x00\x00OK\x00K\x01tR"), "no pickle of plain values"),
        (pickle.dumps(np.array([Evil()], dtype=object)), "is refused|no pickle of plain values"),
        (hostile(b"X\xff\xff\xff\x7fabc"), "damaged or no pickle"),  # a text of 2 GB
        (hostile(b"\x8d" + struct.pack("<Q", 2**62)), "damaged or no pickle"),
        (hostile(b"]r\xff\xff\xff\x7f"), None),  # a memory of two billion places, which is a dictionary here
        (hostile(b"]q\x00h\x00a"), "nested too deeply"),  # a list that holds itself
        (hostile(b"]" * 100_000 + b"a" * 99_999), "nested too deeply"),
        (b"\x80\x04]q\x00(" + b"K\x01" * 9, "damaged or no pickle"),
        (b"", "damaged or no pickle"),
        (zlib.compress(b"text"), "damaged or no pickle"),
        (hostile(b"0"), "damaged or no pickle"),
        (hostile(b"cnumpy.core.multiarray\n_reconstruct\n)R"), "damaged or no pickle"),
    ],
    ids=range(16),
)
def test_anything_else_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gnd.pkl").write_bytes(content)
    if message is None:
        assert read_plain_pickle(tmp_path / "gnd.pkl") == []
    else:
        with pytest.raises(UserError, match=message):
            read_plain_pickle(tmp_path / "gnd.pkl")
    assert not (tmp_path / "hacked").exists()


def test_what_is_named_often_is_finished_once(tmp_path):
    """Four levels of a thousand names for one list: a trillion values if each were copied."""
    lists: list = [1] * 1000
    for _ in range(3):
        lists = [lists] * 1000
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(lists))
    found = read_plain_pickle(tmp_path / "gnd.pkl")
    assert len(found) == 1000 and found[7][8][9][10] == 1


def test_a_large_or_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_plain_pickle(tmp_path / "gnd.pkl")
    with (tmp_path / "gnd.pkl").open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(UserError, match="67,108,865 bytes"):
        read_plain_pickle(tmp_path / "gnd.pkl")
