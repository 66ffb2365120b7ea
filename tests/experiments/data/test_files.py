"""Image files of folders: which are found, in which order, and what is said about the others."""

import os

import numpy as np
import pytest
from PIL import Image

from dinojax import UserError
from experiments.data.files import find_images, notes_about, readable_images, split_of_files
from experiments.data.squares import centre_cropped, reduced
from experiments.data.views import augmented


@pytest.fixture
def folder(tmp_path):
    for name, (height, width) in {"b.png": (3, 5), "a/deep/z.jpg": (8, 2), "a/y.PNG": (4, 4)}.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)
    for name in (".hidden.png", "a/notes.txt"):
        (tmp_path / "in" / name).write_text("no image")
    return tmp_path / "in"


def test_images_are_found_at_any_depth_in_the_order_of_their_paths(folder, capsys):
    found = readable_images([folder, folder / "b.png"])
    assert [path.relative_to(folder).as_posix() for path in found] == ["a/deep/z.jpg", "a/y.PNG", "b.png"]
    assert list(found.values()) == [(8, 2), (4, 4), (3, 5)]
    assert capsys.readouterr().out == ""


def test_unreadable_images_of_a_folder_are_named_and_left_out(folder, capsys):
    (folder / "a" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    assert len(readable_images([folder])) == 3
    told = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[2] for line in told] == [str(folder / "a" / "broken.jpg"), str(folder / "gone.png")]
    assert all(line.startswith("left out: ") for line in told)


def test_what_holds_no_readable_image_is_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    for path, message in (
        ("missing", "missing: there is no such image or folder"),
        ("empty", r"empty holds no images \(.*BMP, "),
        ("bad", r"broken\.jpg is not a readable image"),
        ("bad/broken.jpg", r"broken\.jpg is not a readable image"),
    ):
        with pytest.raises(UserError, match=message):
            readable_images([folder, tmp_path / path])


def test_a_link_to_nowhere_is_named(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"gone\.png cannot be read \(No such file or directory\); replace or remove it"
    ):
        split_of_files(tmp_path, "train", {"cat": [tmp_path / "gone.png"]}, ["cat"])


def test_hidden_parts_of_the_path_are_left_out_and_links_are_followed_once(folder, tmp_path):
    store = tmp_path / "store" / "deep"
    store.mkdir(parents=True)
    for hidden in (".ipynb_checkpoints", "a/.AppleDouble", "a/__MACOSX"):
        (folder / hidden).mkdir()
        (folder / hidden / "y.png").write_bytes(b"")
    for place in (store / "linked.png", store.parent / "also.png"):
        (folder / "b.png").rename(place) if place.name == "linked.png" else place.write_bytes(b"")
    (folder / "more").symlink_to(store.parent)
    (folder / "again").symlink_to(store)  # it is read already, as more/deep, or the other way round
    (folder / "a" / "self").symlink_to(folder / "a")
    (folder / "a" / "up").symlink_to(tmp_path)
    (folder / "folder.jpg").mkdir()
    found = find_images(folder)
    names = [path.relative_to(folder).as_posix() for path in found.files]
    assert names == ["a/deep/z.jpg", "a/y.PNG", "again/linked.png", "more/also.png"]
    assert found.notes == [f"{folder}/a/up is a link to a folder that holds it: it is left out"]


def test_what_is_left_out_is_counted_by_suffix(folder):
    for name in ("1.HEIC", "a/2.heic", "3.xyz", "a/README", "a/notes.json"):
        (folder / name).write_bytes(b"")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.heic").symlink_to(folder / "nowhere")
    assert len(find_images(folder).files) == 3
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "4.heic").write_bytes(b"")
    searches = {path: find_images(path) for path in (folder, folder.parent / "other")}
    assert notes_about(folder.parent, searches) == [
        f"{folder}/gone.heic is a link to nowhere: it is left out",
        "in: left out 1 file without a suffix",
        "in: left out 1 file called like an image: a pipe, a device or a socket",
        "in and 1 more: left out 4 .heic files: Pillow does not read them here",
        "in: left out 1 .xyz file: Pillow does not read it here",
    ]


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    """Its path is longer than the system takes, which stops every user."""
    (tmp_path / "0.png").write_bytes(b"")
    place = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=place)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = below
    os.close(place)
    found = find_images(tmp_path)
    assert [path.name for path in found.files] == ["0.png"]
    assert len(found.notes) == 1
    assert "cannot be read (File name too long): its images are left out" in found.notes[0]


def test_names_that_are_not_utf_8_are_shown_as_escapes_and_read(folder):
    place = os.fsencode(folder / "a") + b"/caf\xe9.png"
    (folder / "b.png").rename(os.fsdecode(place))
    split = split_of_files(folder, "train", {"cat": find_images(folder).files}, ["cat"])
    row = split.ids.index("a/caf\\xe9.png")
    assert split.read(row).shape == (3, 5, 3)
    assert reduced(split, 8).read(row).shape == (3, 5, 3)
    split.ids[row].encode()  # which tables, JSON and figures can hold


def test_a_folder_without_images_tells_what_it_holds(tmp_path):
    (tmp_path / "1.heic").write_bytes(b"")
    with pytest.raises(UserError, match=r"\); left out 1 \.heic file: Pillow does not read it here"):
        readable_images([tmp_path])


def hashes(folder, paths):
    split = split_of_files(folder, "train", {"cat": paths}, ["cat"])
    return split.fingerprint, split.identity


@pytest.mark.parametrize("size", [1, 24_576, 24_577, 100_000])
def test_other_pixels_under_an_equal_name_size_and_time_are_noticed(tmp_path, size):
    path = tmp_path / "0.jpg"
    path.write_bytes(bytes(size))
    before, time = hashes(tmp_path, [path]), path.stat().st_mtime_ns
    for place in {0, size // 2, size - 1}:
        content = bytearray(size)
        content[place] = 1
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
        after = hashes(tmp_path, [path])
        assert after[0] != before[0] and after[1] != before[1]
    path.write_bytes(bytes(size))
    os.utime(path, ns=(time, time))
    assert hashes(tmp_path, [path]) == before


def test_copies_of_a_folder_have_one_identity(folder, tmp_path):
    """Their times differ, so their features are computed on their own."""
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "b.png").write_bytes((folder / "b.png").read_bytes())
    os.utime(tmp_path / "copy" / "b.png", (1, 1))
    first, second = (
        split_of_files(place, "train", {"cat": [place / "b.png"]}, ["cat"]) for place in (folder, tmp_path / "copy")
    )
    assert first.fingerprint != second.fingerprint
    assert first.identity == second.identity
    for change in (
        lambda split: split.subset(np.zeros(1, int)),
        lambda split: centre_cropped(split, 8, 4),
        lambda split: reduced(split, 8),
        lambda split: augmented(split, 0, 4),
    ):
        assert change(first).fingerprint != change(second).fingerprint
        assert change(first).identity == change(second).identity != first.identity
    assert first.subset(np.zeros(1, int)).files == [folder / "b.png"]
