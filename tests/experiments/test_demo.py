"""The demo: what it says, writes and refuses, and that its maps are those of the model."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

import dinojax
from converters import load_pretrained
from experiments import demo


def test_the_figure_is_drawn_and_named(tmp_path, capsys):
    demo.main(["--out", str(tmp_path / "new" / "demo")])
    figure = tmp_path / "new" / "demo" / "photos.png"
    assert str(figure) in capsys.readouterr().out
    with Image.open(figure) as image:
        assert image.width > 1000 and np.asarray(image.convert("L")).std() > 10


def test_the_maps_are_those_of_the_model():
    """Attention and similarity of one photo, from the model's tokens by plain arithmetic."""
    row, other = demo.see()
    model = load_pretrained("dinojax_vitt")
    images = dinojax.preprocess(load_sample_image("flower.jpg"), model, size=160, crop=False)
    (attention,) = np.asarray(model.get_last_selfattention(images))
    np.testing.assert_allclose(row.attention, attention[:, 0, 1:].mean(0).reshape(40, 60), atol=1e-6)
    tokens = np.asarray(model(images).patch_tokens)[0].reshape(40, 60, -1)
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    np.testing.assert_allclose(row.similarity, unit @ unit[20, 27], atol=1e-5)
    assert row.attention[row.mask].sum() >= 0.6 * row.attention.sum() > row.attention[row.mask][1:].sum()
    # The flower is told from the leaves: the patches most like its centre are around it.
    rows, columns = np.nonzero(row.similarity > 0.8)
    assert abs(rows.mean() - 20) < 4 and abs(columns.mean() - 27) < 4
    assert other.pixels.shape == (160, 240, 3)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        demo.main(["--out", str(tmp_path / "file" / "demo")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "cannot be written" in said
