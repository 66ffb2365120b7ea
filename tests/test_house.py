"""The house's rules: what may import what, without circles, and that a plain import stays light."""

import ast
import subprocess
import sys

import pytest

from tests.support.house import PACKAGES, ROOT, circle, import_graph, python_files, room, rooms_of

# Each package stands on those behind it.
ALLOWED = {
    "dinojax": {"dinojax"},
    "converters": {"converters", "dinojax"},
    "experiments": {"experiments", "converters", "dinojax"},
    "benchmarks": {"benchmarks", "experiments", "converters", "dinojax"},
}
# These work on any arrays, on any devices: they import nothing of ours but the error class and each other.
ON_THEIR_OWN = ("dinojax.models.layers", "dinojax.models.norm", "dinojax.models.position", "dinojax.models.rope",
                "dinojax.pretraining.losses",
                "dinojax.pretraining.dinov2_losses", "dinojax.pretraining.masking", "dinojax.pretraining.schedules",
                "dinojax.errors", "dinojax.parallel", "dinojax.precision", "dinojax.image_ops",
                "dinojax.maps")  # fmt: skip
HEAVY = {"torch", "tensorflow", "transformers", "matplotlib", "tyro", "tqdm"}
GRAPH = import_graph()


def test_imports_point_downwards():
    assert ALLOWED.keys() == set(PACKAGES)
    for module, imported in GRAPH.items():
        package = module.partition(".")[0]
        assert {other.partition(".")[0] for other in imported} <= ALLOWED[package], module


def test_no_circle_of_imports_exists():
    assert not circle(GRAPH)
    assert not circle(rooms_of(GRAPH))


def test_a_circle_would_be_found():
    """Also one that a function's import closes."""
    assert "experiments.data.tiny_imagenet_builder" in GRAPH["experiments.data.load"]  # imported inside a function
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()})


def test_the_method_imports_no_torch():
    for module, path in python_files().items():
        if module.startswith("dinojax"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
            assert not {name.split(".")[0] for name in names} & HEAVY, module


def test_arrays_in_arrays_out_needs_nothing_of_ours():
    for module in ON_THEIR_OWN:
        assert GRAPH[module] <= set(ON_THEIR_OWN), module
    for module, imported in GRAPH.items():
        if module.startswith("dinojax.probes"):
            assert all(
                other.startswith(("dinojax.probes", "dinojax.errors", "dinojax.parallel")) for other in imported
            ), module


def test_commands_never_import_each_other():
    commands = {module for module in GRAPH if room(module) == "experiments"} - {"experiments"}
    for module, imported in GRAPH.items():
        if module.startswith("experiments"):
            assert not imported & commands, module


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
        ["-m", "experiments.pretrain", "--help"],
        ["-m", "experiments.pretrain_folder", "--help"],
        ["-m", "experiments.finetune_folder", "--help"],
        ["-m", "experiments.dense", "--help"],
        ["-m", "experiments.embed", "--help"],
        ["-m", "experiments.visualize", "--help"],
        ["-m", "experiments.evaluate", "--help"],
        ["-m", "experiments.stl10_transfer", "--help"],
        ["-m", "experiments.summarize", "--help"],
        ["-m", "experiments.search", "--help"],
        ["-m", "experiments.duplicates", "--help"],
        ["-m", "experiments.cluster", "--help"],
        ["-m", "experiments.patches", "--help"],
        ["-m", "experiments.patches", "anomaly", "--help"],
        ["-m", "converters", "--help"],
    ],
    ids=" ".join,
)
@pytest.mark.slow  # starts every module in a process of its own
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
