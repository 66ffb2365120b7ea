"""Documents and the files they rely on: one flipped bit anywhere is noticed."""

import json
from pathlib import Path

import numpy as np
import pytest

from dinojax import UserError
from dinojax.documents import read_document, write_document, write_whole

REMEDY = "repeat the run that wrote it"


def written(folder: Path) -> Path:
    (folder / "arrays.bin").write_bytes(bytes(range(64)))
    path = folder / "result.json"
    write_document(path, {"accuracy": 0.1 + 0.2, "out": Path("here"), "names": ["é", "b"]}, files=["arrays.bin"])
    return path


def test_what_was_written_is_read(tmp_path):
    assert read_document(written(tmp_path), remedy=REMEDY) == {
        "accuracy": 0.1 + 0.2,
        "out": "here",
        "names": ["é", "b"],
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arrays.bin", "result.json"]


def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    path = written(tmp_path)
    sound = read_document(path, remedy=REMEDY)
    refused = 0
    for file in (path, tmp_path / "arrays.bin"):
        content = file.read_bytes()
        for position in range(len(content)):
            for bit in range(8):
                damaged = bytearray(content)
                damaged[position] ^= 1 << bit
                file.write_bytes(damaged)
                try:
                    assert read_document(path, remedy=REMEDY) == sound
                except UserError as error:
                    refused += 1
                    assert str(error).endswith(REMEDY)
                    assert "\n" not in str(error)
        file.write_bytes(content)
    assert refused > 64 * 8


def test_only_the_files_that_are_asked_for_need_to_be_there(tmp_path):
    path = written(tmp_path)
    (tmp_path / "arrays.bin").unlink()
    assert read_document(path, files=[], remedy=REMEDY)["accuracy"] == 0.1 + 0.2
    for files in (None, ["arrays.bin"]):
        with pytest.raises(UserError, match=r"arrays.bin is missing or cannot be read \(No such file or directory\)"):
            read_document(path, files=files, remedy=REMEDY)


def test_a_document_of_an_earlier_release_is_read(tmp_path):
    path = tmp_path / "result.json"
    path.write_text('{"accuracy": 0.5}')
    assert read_document(path, remedy=REMEDY) == {"accuracy": 0.5}


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b'{"a": 1', b"[" * 100_000])
def test_what_is_not_a_document_is_refused(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"damaged.*{REMEDY}"):
        read_document(path, remedy=REMEDY)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    write_whole(path, b"old")
    with pytest.raises(TypeError):
        write_document(path, {"array": {np.float32(1): json}})
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
