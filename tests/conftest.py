"""What every test runs under: shapes checked as annotated, full float32 products; and what parity tests measured."""

from collections.abc import Callable

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook(["dinojax", "converters", "experiments"], "typechecker.check")

# Accelerators would otherwise multiply float32 in lower precision, and the tolerances would lose their meaning.
jax.config.update("jax_default_matmul_precision", "highest")

_LARGEST: dict[tuple[str, str], float] = {}


@pytest.fixture
def record_difference() -> Callable[[str, str, float], None]:
    """Keeps the largest difference from PyTorch seen for a model and an output, to be printed at the end."""

    def record(model: str, output: str, difference: float) -> None:
        _LARGEST[model, output] = max(difference, _LARGEST.get((model, output), 0.0))

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The parity table of the README."""
    if _LARGEST:
        terminalreporter.section("largest absolute differences from PyTorch")
        for (model, output), difference in sorted(_LARGEST.items()):
            terminalreporter.write_line(f"{model:48} {output:12} {difference:.1e}")
