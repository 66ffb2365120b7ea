"""What the README says is true: its snippet runs, its commands, files and folders exist."""

import re
import subprocess
import sys

import pytest

from experiments.__main__ import COMMANDS
from tests.support.house import ROOT, python_files, room

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tests/reference/README.md")]
PAGES += [*(ROOT / "dinojax" / "assets").rglob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_first_screens_stay_short():
    assert len(README.splitlines()) <= 160
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 400_000, picture


def test_the_snippet_runs_and_prints_what_it_says(tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout and done.stdout.splitlines() == re.findall(r"^print.*  # (.*)$", snippet, re.MULTILINE)


def test_every_command_is_in_the_table():
    rows = re.findall(r"^\| (?:`dinojax (\w+)`)? ?\| .+ \| `(\S+)` \|$", README, re.MULTILINE)
    assert {name: module for name, module in rows if name} == {
        name: module.removesuffix(".__main__") for name, (module, _) in COMMANDS.items()
    }
    files = {module for module in python_files() if room(module) == "experiments"}
    assert {module for _, module in rows} == files - {"experiments", "experiments.__main__"} | {"converters"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_linked_or_named_is_there(path):
    text = path.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    home = "https://github.com/dinojax/dinojax/blob/main/"
    named = re.findall(
        r"\b(?:tests|docs|benchmarks|dinojax|experiments|converters)/[\w/]+\.(?:py|md|json)\b", text.replace(home, "")
    )
    missing += [file for file in named if not (ROOT / file).exists()]
    modules = re.findall(r"python -m ((?:experiments|benchmarks|converters|tests)[\w.]*)", text)
    known = set(python_files()) | {"tests.support.house"}
    missing += [module for module in modules if module not in known]
    assert not missing


def test_every_room_is_named():
    """A newcomer finds each folder of code in the tree of the README and in docs/rooms.md."""
    tree, rooms = README[README.index("## Folders") :], (ROOT / "docs" / "rooms.md").read_text()
    for folder in {path.relative_to(ROOT).parent for path in python_files().values()}:
        name = f"{folder.name}/"
        assert name in tree, folder
        assert name in rooms or f"`{folder.name}`" in rooms, folder
