"""Tables of embeddings: three formats, equal numbers, read by other libraries; damage and foreign files are refused."""

import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from dinojax import UserError
from experiments.embedding import parquet_file
from experiments.embedding.layout import PATHS, SIZES, Column, Layout
from experiments.embedding.table import (
    SUFFIXES,
    EmbeddingTable,
    read_layout,
    read_table,
    table_path,
    write_chunks,
    write_table,
)

NAMES = ("cls", "cls_2", "mean_patch", "dense")
every_format = pytest.mark.parametrize("suffix", SUFFIXES)


def make_table(rows=7, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=(rows, 6)).astype(np.float32) for name in NAMES[:3]}
    arrays["dense"] = rng.normal(size=(rows, 2, 3, 6)).astype(np.float16)
    paths = tuple(f"ä b/{'x' * i}{i}.jpg" for i in range(rows))
    sizes = rng.integers(1, 5000, (rows, 2)).astype(np.int32)
    return EmbeddingTable("/photos", paths, sizes, arrays, {"weights": "dinojax_vitt", "grid": [2, 3]})


def assert_same(one, other):
    assert (one.root, one.paths, one.meta) == (other.root, other.paths, other.meta)
    assert list(one.arrays) and one.arrays.keys() == other.arrays.keys()
    for a, b in [(one.sizes, other.sizes), *((one.arrays[name], other.arrays[name]) for name in one.arrays)]:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@every_format
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_what_is_written_comes_back(tmp_path, suffix, rows):
    table = make_table(rows)
    path = write_table(tmp_path / f"new/table{suffix}", table)
    assert_same(read_table(path), table)
    assert [file.name for file in path.parent.iterdir()] == [f"table{suffix}"]  # no temporary file
    layout = read_layout(path)
    assert (layout.rows, layout.root, layout.columns["dense"]) == (rows, "/photos", Column("float16", (2, 3, 6)))


@every_format
def test_some_of_the_arrays_are_read_alone(tmp_path, suffix):
    path = write_table(tmp_path / f"t{suffix}", make_table())
    table = read_table(path, arrays=["cls"])
    assert list(table.arrays) == ["cls"]
    np.testing.assert_array_equal(table.arrays["cls"], make_table().arrays["cls"])
    with pytest.raises(UserError, match=r"holds no column 'cls_3', only cls, cls_2, mean_patch, dense; embed"):
        read_table(path, arrays=["cls_3"])


@every_format
def test_chunks_make_the_file_that_the_whole_table_makes(tmp_path, suffix):
    table = make_table()
    rows = {PATHS: table.paths, SIZES: table.sizes, **table.arrays}
    columns = {name: Column(rows[name].dtype.name, rows[name].shape[1:]) for name in (SIZES, *NAMES)}
    layout = Layout(table.root, len(table), columns, table.meta)

    def chunks(names):
        for part in (slice(0, 3), slice(3, 3), slice(3, 7)):
            yield {name: rows[name][part] for name in names}

    one = write_chunks(tmp_path / f"chunks{suffix}", layout, chunks)
    other = write_table(tmp_path / f"whole{suffix}", table)
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(ValueError, match="rows were written"):
        write_chunks(one, Layout(table.root, 8, columns, table.meta), chunks)
    assert one.read_bytes() == other.read_bytes()  # and no half of another


def test_other_libraries_read_the_files(tmp_path):
    table = make_table()
    for suffix in SUFFIXES:
        write_table(tmp_path / f"t{suffix}", table)
    parquet = pq.read_table(tmp_path / "t.parquet")
    assert parquet["path"].to_pylist() == list(table.paths)
    np.testing.assert_array_equal(parquet["width"].to_numpy(), table.sizes[:, 1])
    np.testing.assert_array_equal(np.stack(parquet["cls"].to_numpy()), table.arrays["cls"])
    np.testing.assert_array_equal(np.stack(parquet["dense"].to_numpy()).reshape(-1, 2, 3, 6), table.arrays["dense"])
    assert json.loads(pq.read_metadata(tmp_path / "t.parquet").metadata[b"dinojax"])["meta"] == table.meta
    with np.load(tmp_path / "t.npz") as npz:
        assert npz["paths"].tolist() == list(table.paths) and set(npz) == {PATHS, SIZES, *NAMES, "dinojax"}
        for name in NAMES:
            np.testing.assert_array_equal(npz[name], table.arrays[name])
        assert json.loads(str(npz["dinojax"]))["root"] == "/photos"
    with zipfile.ZipFile(tmp_path / "t.npz") as archive:  # equal tables are equal files, whenever they are written
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    tensors = load_file(tmp_path / "t.safetensors")
    assert tensors.pop(PATHS).tobytes().decode().split("\0")[:-1] == list(table.paths)
    np.testing.assert_array_equal(tensors.pop(SIZES), table.sizes)
    for name in NAMES:
        np.testing.assert_array_equal(tensors[name], table.arrays[name])


@every_format
@pytest.mark.parametrize("damage", ["byte", "cut"])
def test_damage_is_refused(tmp_path, suffix, damage):
    """One byte of the array changed, or the file cut off: never a wrong number, always one sentence."""
    table = make_table()
    path = write_table(tmp_path / f"t{suffix}", table)
    content = bytearray(path.read_bytes())
    place = content.index(table.arrays["cls"].tobytes()[:24])
    if damage == "byte":
        content[place + 2] ^= 1
    path.write_bytes(content if damage == "byte" else content[: place + 10])
    with pytest.raises(UserError, match=r"is damaged \(.*; write it again|is not an embedding file") as told:
        read_table(path)
    assert "\n" not in str(told.value) and path.name in str(told.value)


@every_format
def test_no_byte_of_a_file_changes_what_is_read(tmp_path, suffix):
    """Every 7th byte is changed in turn: the table is the same, or the file is refused."""
    table = make_table(2)
    path = write_table(tmp_path / f"t{suffix}", table)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 0x21
        path.write_bytes(changed)
        try:
            found = read_table(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert_same(found, table)
    assert refused > 50


@every_format
def test_foreign_files_are_refused(tmp_path, suffix):
    path, rows = tmp_path / f"t{suffix}", np.zeros((3, 4), np.float32)
    with pytest.raises(UserError, match="there is no such embedding file"):
        read_table(path)
    path.write_text("no table")
    with pytest.raises(UserError, match=f"t{suffix} is not an embedding file; dinojax embed writes one"):
        read_table(path)
    if suffix == ".parquet":
        pq.write_table(pa.table({"path": ["a"], "cls": [[1.0]]}), path)
    elif suffix == ".npz":
        np.savez(path, cls=rows, paths=np.array(["a"]))
    else:
        save_file({"cls": rows}, path)
    with pytest.raises(UserError, match="is not an embedding file"):
        read_table(path)


def rewritten(path, change):
    """The file, written by its own library after `change(columns)`, with the document as it was."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        change(columns)
        write_sealed(path, pa.table(columns), compression="NONE", use_dictionary=False)
    elif path.suffix == ".npz":
        with np.load(path) as npz:
            columns = dict(npz)
        change(columns)
        np.savez(path, **columns)
    else:
        columns, document = load_file(path), json.dumps(document_of(path))
        change(columns)
        save_file(columns, path, metadata={"dinojax": document})


def write_sealed(path, table, **options):
    """What only someone who knows the format would do."""
    document = pq.read_metadata(path).metadata[b"dinojax"]
    with pq.ParquetWriter(path, table.schema, **options) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"dinojax": document, "dinojax_footer_sha256": "0" * 64})
    with path.open("r+b") as file:
        parquet_file.seal_footer(file)


def document_of(path):
    content = path.read_bytes()
    return json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["dinojax"])


@every_format
def test_a_missing_column_is_named(tmp_path, suffix):
    path = write_table(tmp_path / f"t{suffix}", make_table())
    rewritten(path, lambda columns: columns.pop("cls_2"))
    with pytest.raises(UserError, match=r"is damaged \(it lacks the column cls_2\); write it again"):
        read_table(path)


@every_format
def test_rows_in_another_order_are_refused(tmp_path, suffix):
    """Also where every number is one that was written."""

    def swap(columns):
        columns["cls"] = columns["cls"].take([1, 0, 2, 3, 4, 5, 6]) if suffix == ".parquet" else columns["cls"][::-1]
        columns["cls"] = columns["cls"] if suffix == ".parquet" else np.ascontiguousarray(columns["cls"])

    path = write_table(tmp_path / f"t{suffix}", make_table())
    rewritten(path, swap)
    with pytest.raises(UserError, match="the SHA-256 of cls is not the stored one"):
        read_table(path)


def test_a_compressed_copy_is_refused_before_it_is_unpacked(tmp_path):
    parquet, npz = (write_table(tmp_path / name, make_table()) for name in ("t.parquet", "t.npz"))
    write_sealed(parquet, pq.read_table(parquet), compression="ZSTD")
    with np.load(npz) as columns:
        np.savez_compressed(npz, **columns)
    for path in (parquet, npz):
        with pytest.raises(UserError, match="another program has compressed its columns"):
            read_table(path)


def test_an_npz_that_promises_more_than_it_has_allocates_nothing(tmp_path):
    path = write_table(tmp_path / "t.npz", make_table(2))
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    header = entries["paths.npy"]
    entries["paths.npy"] = header.replace(b"'shape': (2,)", b"'shape': (9" + b"0" * 11 + b",)").ljust(len(header))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="is damaged"):
        read_table(path)


@pytest.mark.parametrize(("given", "expected"), [("t", "t.parquet"), ("t.NPZ", "t.NPZ"), ("a.b/t", "a.b/t.parquet")])
def test_a_name_without_a_suffix_is_a_parquet_file(tmp_path, given, expected):
    assert table_path(tmp_path / given) == tmp_path / expected
    assert_same(read_table(write_table(tmp_path / given, make_table(2))), make_table(2))


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"t\.csv does not end with \.parquet, \.npz or \.safetensors; name it so"):
        write_table(tmp_path / "t.csv", make_table())


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"t\.npz cannot be written \(.*\); make room or name another file"):
        write_table(tmp_path / "file" / "t.npz", make_table())


def test_rows_that_do_not_fit_are_a_bug():
    table = make_table()
    with pytest.raises(ValueError, match="6 paths do not fit"):
        EmbeddingTable("/", table.paths[1:], table.sizes, table.arrays, {})


def test_a_file_of_another_kind_is_not_a_table(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"photo")
    with pytest.raises(UserError, match=r"photo\.jpg is not an embedding file; dinojax embed writes one"):
        read_table(tmp_path / "photo.jpg")
