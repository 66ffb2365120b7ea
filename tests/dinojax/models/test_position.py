"""The resize matrices are torch's bicubic interpolation, in every convention and direction."""

import numpy as np
import pytest

from dinojax.models.position import resize_matrix

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize(("side", "size"), [(37, 16), (37, 37), (37, 50), (14, 1), (8, 17), (2, 9), (1, 4)])
def test_rows_are_resized_as_torch_does(side, size, antialias, offset):
    table = torch.randn(1, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side))
    # The scale factor applies to rows; columns keep their number, which torch leaves as they are.
    how = {"scale_factor": ((size + offset) / side, 1.0)} if offset else {"size": (size, side)}
    expected = torch.nn.functional.interpolate(table, mode="bicubic", antialias=antialias, **how).numpy()
    found = np.einsum("nm,bcmk->bcnk", resize_matrix(side, size, antialias, offset), table.numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("antialias", [False, True])
def test_every_row_sums_to_one(antialias):
    for side in (1, 2, 7, 16, 37):
        for size in (1, 3, 16, 60):
            np.testing.assert_allclose(resize_matrix(side, size, antialias, 0.1).sum(1), 1, atol=1e-12)
