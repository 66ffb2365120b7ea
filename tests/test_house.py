"""The house's rules: what may import what, and that a plain import stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "dinojax": {"dinojax"},
    "converters": {"converters", "dinojax"},
    "experiments": {"experiments", "converters", "dinojax"},
}
METHOD_ONLY = {"errors", "layers", "losses", "position", "schedules"}  # these import nothing of ours
# The probe's files import nothing of ours but each other and the error class: they work on any features.
PROBE_FILES = {"few_shot", "labelled", "linear_probe", "linear_sweep", "logistic", "neighbours", "probe"}
OWN = {"dinojax", "converters", "experiments", "benchmarks", "tests"}


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_downwards(package):
    for path in (ROOT / package).rglob("*.py"):
        ours = {name.split(".")[0] for name in imports(path)} & OWN
        assert ours <= ALLOWED[package], path


def test_the_method_imports_no_torch():
    for path in (ROOT / "dinojax").glob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"torch", "tensorflow", "transformers", "matplotlib", "tyro", "tqdm"}, path
        if path.stem in METHOD_ONLY:
            assert "dinojax" not in roots, path
        if path.stem in PROBE_FILES:
            ours = {name for name in imports(path) if name.startswith("dinojax")}
            assert ours <= {f"dinojax.{name}" for name in PROBE_FILES | {"errors"}}, path


def test_commands_never_import_each_other():
    commands = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__"}
    for path in (ROOT / "experiments").rglob("*.py"):
        assert not {f"experiments.{name}" for name in commands} & imports(path), path


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import dinojax"],
        ["-c", "import converters"],
        ["-m", "experiments.cifar10_probe", "--help"],
        ["-m", "experiments.predict", "--help"],
        ["-m", "experiments.demo", "--help"],
        ["-m", "experiments.dino_cifar100", "small", "--help"],
        ["-m", "experiments.dino_tinyimagenet", "--help"],
        ["-m", "experiments.visualize", "--help"],
        ["-m", "experiments.evaluate", "--help"],
        ["-m", "experiments.stl10_transfer", "--help"],
        ["-m", "experiments.summarize", "--help"],
        ["-m", "converters", "--help"],
    ],
    ids=" ".join,
)
def test_starting_loads_no_heavy_library(command):
    code = (
        "import runpy, sys; argv = sys.argv[1:]\n"
        "try:\n"
        "    sys.argv = argv[1:]\n"
        "    exec(argv[1]) if argv[0] == '-c' else runpy.run_module(argv[1], run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'tensorflow', 'matplotlib', 'sklearn', 'transformers', 'tensorflow_datasets'}\n"
        "heavy |= {'orbax', 'tensorstore'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
