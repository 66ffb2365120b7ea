"""A page that opens anywhere: read by an HTML parser, whatever the names of files hold."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from experiments.figures.sheets import Band, Cell, save_sheet
from experiments.gallery.page import Card, Section, render_page
from experiments.gallery.thumbnails import SIDE, first_of_each, shrunk, thumbnails
from tests.support.embedded_images import HOSTILE, picture

NAMES = [HOSTILE, '"><img src=x onerror=alert(1)>', "a&amp;b.jpg", "$x$ \\no_maths$", "caf\udce9.jpg", "two\nlines"]


class Reader(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page():
    pixels = np.asarray(picture(0))
    cards = [
        Card(pixels if place % 2 else None, "0.9", name, (name,), marked=not place) for place, name in enumerate(NAMES)
    ]
    return render_page(
        NAMES[0], [NAMES[1]], [Section(NAMES[0], NAMES[1], cards, NAMES[2]), Section("second", "2", cards)]
    )


def test_names_are_text_and_nothing_else():
    found = Reader(page())
    assert not found.open  # every tag is closed, in order
    assert {tag for tag, _ in found.tags} == {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "p", "nav", "a", "main", "section", "h2",
        "ul", "li", "div", "img", "span", "b", "wbr"}  # fmt: skip
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    text = "".join(found.text)
    for name in (*NAMES[:4], "caf\\udce9.jpg", "two\N{REPLACEMENT CHARACTER}lines"):
        assert text.count(name) >= 4  # the name and a line of two cards
    page().encode("utf-8")


def test_nothing_comes_from_elsewhere():
    found, text = Reader(page()), re.sub(r"base64,[\w+/=]+", "", page())
    for tag, attributes in found.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            if name in attributes:
                assert attributes[name].startswith("data:image/jpeg;base64," if tag == "img" else "#s"), (
                    tag,
                    attributes,
                )
    assert not any(word in text for word in ("http:", "https:", "//", "@import", "url("))
    anchors = {attributes["href"][1:] for tag, attributes in found.tags if tag == "a"}
    assert anchors == {attributes["id"] for tag, attributes in found.tags if tag == "section"}
    policies = [attributes["content"] for tag, attributes in found.tags if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_thumbnails_are_the_images():
    pictures = [attributes for tag, attributes in Reader(page()).tags if tag == "img"]
    assert [one["alt"] for one in pictures[:2]] == [NAMES[1], NAMES[3]]
    data = base64.b64decode(pictures[0]["src"].partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("JPEG", (24, 20))
        difference = np.asarray(image).astype(int) - np.asarray(picture(0))
    assert np.abs(difference).mean() < 6


def test_thumbnails_keep_their_shape_and_what_cannot_be_read_is_named(tmp_path, capsys):
    files = {3: tmp_path / "wide.jpg", 5: tmp_path / "small.png", 7: tmp_path / "damaged.png", 9: tmp_path / "gone.png"}
    picture(1, 300, 1200).save(files[3])
    picture(2).save(files[5])
    files[7].write_bytes(b"no image")
    found = thumbnails(files)
    assert {key: one.shape for key, one in found.items()} == {3: (SIDE // 4, SIDE, 3), 5: (20, 24, 3)}
    assert f"2 of 4 thumbnails are missing; the first: {files[7]} is not a readable image" in capsys.readouterr().out
    assert shrunk(np.zeros((3, 5000, 3), np.uint8)).shape == (1, SIDE, 3)


def test_pages_show_whole_groups_up_to_a_number_of_images():
    groups = [[1, 2, 3, 4], [5, 6], [7, 8], [9]]
    assert first_of_each(groups, 3, 5) == [[1, 2, 3], [5, 6]]
    assert first_of_each(groups, 3, 1) == [[1, 2, 3]]  # never nothing
    assert first_of_each(groups, 9, 99) == groups
    assert first_of_each([], 9, 99) == []


@pytest.mark.parametrize("heading", ["$a_b$ ^", ""])
def test_a_sheet_draws_any_name(tmp_path, heading):
    pixels = np.asarray(picture(0))
    names = [*NAMES[:4], "x" * 200]
    cells = [Cell(pixels if place % 2 else None, name, name, marked=not place) for place, name in enumerate(names * 2)]
    save_sheet(tmp_path / "sheet.png", [Band(heading, cells), Band("two", cells[:1])], title=NAMES[3], note=NAMES[0])
    drawn = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    assert drawn.shape[1] > 1500 and drawn.std() > 10
