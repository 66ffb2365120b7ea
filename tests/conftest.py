"""What every test runs under: shapes checked as annotated, full float32 products, no hidden devices."""

import jax
from jaxtyping import install_import_hook

install_import_hook(["dinojax", "converters", "experiments"], "typechecker.check")

# Accelerators would otherwise multiply float32 in lower precision, and the tolerances would lose their meaning.
jax.config.update("jax_default_matmul_precision", "highest")
