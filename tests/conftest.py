"""What every test runs under: shapes checked as annotated, full float32 products; and what parity tests measured."""

import os
import shutil
import tempfile
from collections.abc import Callable

# Most of the time of the tests is XLA's. Worker processes and the commands that tests start share what is compiled.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_OWNER = _CACHE not in os.environ
if _OWNER:
    os.environ[_CACHE] = tempfile.mkdtemp(prefix="dinojax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import jax
import pytest
from jaxtyping import install_import_hook

import tests.support.typechecker  # noqa: F401 (the hook looks it up by name)

install_import_hook(["dinojax", "converters", "experiments"], "tests.support.typechecker.check")

# Accelerators would otherwise multiply float32 in lower precision, and the tolerances would lose their meaning.
jax.config.update("jax_default_matmul_precision", "highest")
# Arrays of different rank are never added up by accident.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure() -> None:
    """The process that made the folder of compiled programs removes it."""
    if _OWNER:
        shutil.rmtree(os.environ[_CACHE], ignore_errors=True)


@pytest.fixture
def record_difference(record_property) -> Callable[[str, str, float], None]:
    """Keeps a difference from PyTorch, of a model and an output, to be printed at the end of the run."""
    return lambda model, output, difference: record_property("difference", (model, output, float(difference)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The parity table of the README: the largest difference of each model and output."""
    largest: dict[tuple[str, str], float] = {}
    reports = [report for status in ("passed", "failed") for report in terminalreporter.stats.get(status, [])]
    for key, value in [entry for report in reports for entry in report.user_properties]:
        if key == "difference":
            *place, difference = value
            largest[tuple(place)] = max(difference, largest.get(tuple(place), 0.0))
    if largest:
        terminalreporter.section("largest absolute differences from PyTorch")
        for (model, output), difference in sorted(largest.items()):
            terminalreporter.write_line(f"{model:52} {output:12} {difference:.1e}")
