"""Image files of folders: which are found, in which order, and what is said about the others."""

import numpy as np
import pytest
from PIL import Image

from dinojax import UserError
from experiments.data.splits import readable_images, split_of_files


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
        ("empty", r"empty holds no images \(\.bmp, "),
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
