"""StableHLO: one file that `jax.export` runs for any batch, for three platforms, with equal outputs."""

import json

import jax
import jax.export
import numpy as np
import pytest
from flax import nnx

import dinojax
from converters.__main__ import main
from dinojax.maps import cls_attention

CONFIG = dinojax.ViTConfig(
    img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2, init_values=1.0, num_register_tokens=3,
    interpolate_antialias=True, interpolate_offset=0.0,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    dinojax.save(dinojax.VisionTransformer(CONFIG, rngs=nnx.Rngs(0)), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow  # starts a process of its own
def test_the_printed_lines_run_it(folder, tmp_path, capsys, record_difference):
    out = tmp_path / "model.stablehlo"
    main([str(folder), "--to", "stablehlo", "--out", str(out), "--size", "42", "--outputs", "attention,patches,cls"])
    printed = capsys.readouterr().out
    lines = [line.strip() for line in printed.splitlines() if line.startswith("  ")]
    assert len(lines) == 3 and "images: float32 [batch, 42, 42, 3], normalised" in printed
    model = dinojax.load(folder)
    for count in (1, 3, 8):
        images = np.random.default_rng(count).standard_normal((count, 42, 42, 3), np.float32)
        scope = {"images": images}
        exec("\n".join(lines), scope)
        features, attention = model(images), model.get_last_selfattention(images)
        expected = {
            "cls": features.cls_token,
            "patches": features.patch_tokens,
            "attention": cls_attention(attention, 3, 3, num_register_tokens=3),
        }
        for key, array in scope["outputs"].items():
            record_difference("registers as StableHLO", key, np.abs(array - expected[key]).max())
            np.testing.assert_allclose(array, expected[key], rtol=0, atol=3e-5)
    program = jax.export.deserialize(bytearray(out.read_bytes()))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    written = json.loads((tmp_path / "model.stablehlo.json").read_text())
    assert written["preprocessing"]["image_size"] == 42
    assert written["outputs"]["attention"] == ["batch", 2, 3, 3]


def test_size_and_outputs_belong_to_programs(folder, tmp_path, capsys):
    for words in (("--size", "28"), ("--outputs", "cls")):
        with pytest.raises(SystemExit) as caught:
            main([str(folder), "--out", str(tmp_path / "model.pth"), *words])
        assert caught.value.code == 2
        assert "--size and --outputs are for --to stablehlo and --to onnx" in capsys.readouterr().err


def test_a_model_too_large_for_one_file_is_refused_first(folder, tmp_path, capsys, monkeypatch):
    from converters.exports import outputs

    monkeypatch.setattr(outputs, "_LARGEST", 1000)
    with pytest.raises(SystemExit):
        main([str(folder), "--to", "stablehlo", "--out", str(tmp_path / "model.stablehlo")])
    assert "one exported file holds less than 2 GB" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
