"""DINOv3 backbones in the commands: each gives what the model itself computes, or trains it, once and cheaply."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dinojax
from dinojax import Preprocessing, VisionTransformer, ViTConfig
from dinojax.finetune import ImageClassifier, merge_parameters, split_parameters
from dinojax.models.files import named_parameters
from dinojax.pretraining.augment import MultiCropConfig
from experiments import cifar10_probe, embed, evaluate, finetune_folder, search, visualize
from experiments.embedding.table import read_table
from experiments.pretraining.config import PretrainConfig
from experiments.pretraining.loop import pretrain
from experiments.runs.settings import create

TINY = ViTConfig(
    img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, init_values=0.5, num_register_tokens=4,
    layer_norm_eps=1e-5, key_bias=False, rope_base=100.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model in which no parameter has its first value, and photos of two classes and several sizes."""
    place, rng = tmp_path_factory.mktemp("dinov3"), np.random.default_rng(0)
    # The commands resize bicubically, whatever the model states.
    stated = Preprocessing(image_size=16, patch_size=4, interpolation="bicubic")
    model = VisionTransformer(TINY, rngs=nnx.Rngs(0), preprocessing=stated)
    noisy = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), nnx.state(model, nnx.Param))
    nnx.update(model, noisy)
    dinojax.save(model, place / "model")
    for index in range(12):
        file = place / "photos" / ("blue", "green")[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (18 + index, 30 - index, 3), dtype=np.uint8)
        pixels[..., 2 - index % 2] += 120
        Image.fromarray(pixels).save(file)
    return place


def words(place, name: str) -> list[str]:
    return ["--out", str(place / name), "--cache-dir", str(place / "cache")]


def test_lora_and_decay_leave_the_keys_without_a_bias():
    """Adapters change the kernel of all three projections; what is trained has no bias of the keys anywhere."""
    model = ImageClassifier(VisionTransformer(TINY, rngs=nnx.Rngs(0)), 3, rngs=nnx.Rngs(1))
    trainable, frozen = split_parameters(model, "lora", lora_rank=2, key=jax.random.key(0))
    assert trainable["backbone"]["blocks"][0]["attn"]["qkv"]["b"].shape == (2, 3 * 16)
    merged = nnx.to_flat_state(merge_parameters(trainable, frozen))
    biases = [param for path, param in merged if path[-2:] == ("qkv", "bias")]
    assert [bias.shape for bias in biases] == [(2 * 16,)] * 2


@pytest.mark.slow  # five commands from start to end, most of it compilation
def test_every_command_takes_a_dinov3(place, capsys):
    model, weights = dinojax.load(place / "model"), str(place / "model")
    photos = sorted((place / "photos").rglob("*.png"))

    embed.main([str(place / "photos"), "--weights", weights, "--image-size", "16", "--out", str(place / "table.npz"),
                "--cache-dir", str(place / "cache")])  # fmt: skip
    table = read_table(place / "table.npz")
    for row, name in enumerate(table.paths):
        expected = model(dinojax.preprocess(place / "photos" / name, model, size=16)).cls_token[0]
        np.testing.assert_allclose(table.arrays["cls"][row], expected, atol=1e-5)
    search.main([str(place / "table.npz"), str(photos[3]), "--k", "3", *words(place, "search")])

    visualize.main([weights, str(photos[0]), "--save-arrays", *words(place, "figures")])
    (arrays,) = (place / "figures").glob("*.npz")
    assert np.load(arrays)["attention"].shape[0] == 1 + TINY.num_heads

    classes = [str(place / "photos"), "--val-fraction", "0.4"]
    quick = ["--classifiers", "knn5", "--no-figures"]
    evaluate.main([weights, *classes, *quick, *words(place, "evaluation")])
    cifar10_probe.main([*classes, "--weights", weights, *quick, "--image-size", "16", *words(place, "probe")])
    tune = ["--mode", "lora", "--epochs", "2", "--batch-size", "4"]  # two steps an epoch; the first has rate 0
    finetune_folder.main([*classes, "--weights", weights, *tune, *words(place, "lora")])
    for name in ("evaluation/result.json", "probe/metrics.json", "lora/metrics.json"):
        assert json.loads((place / name).read_text())
    (after,) = (dinojax.load(folder.parent) for folder in (place / "lora").rglob("model/config.json"))
    before, changed = named_parameters(model), named_parameters(after)
    assert before.keys() == changed.keys()
    moved = {name for name in before if not np.array_equal(before[name], changed[name])}
    assert moved and all(".attn." in name and name.endswith("kernel") for name in moved)


@pytest.mark.slow  # two pretrainings, most of them compilation
@pytest.mark.parametrize("method", ["dino", "dinov2"])
def test_pretraining_starts_from_a_dinov3(place, tmp_path, method):
    """It has a mask token, so that both objectives take it; a stage of another size needs no table."""
    crops = MultiCropConfig(global_size=16, local_size=8, local_crops=1)
    settings = create(
        PretrainConfig, data="digits", max_train=64, max_test=16, batch_size=32, epochs=1, prototypes=16,
        head_hidden_dim=16, bottleneck_dim=8, warmup_epochs=0, method=method, evaluate=False, recipe="tiny",
        crops=crops, init=str(place / "model"), stage=24, out=tmp_path / "run", cache_dir=tmp_path / "cache",
    )  # fmt: skip
    pretrain(settings)
    trained, start = dinojax.load(tmp_path / "run" / "teacher"), dinojax.load(place / "model")
    assert trained.config == dataclasses.replace(TINY, img_size=24, drop_path_rate=trained.config.drop_path_rate)
    assert trained.blocks[0].attn.qkv.bias.shape == (32,)
    assert not np.array_equal(trained.blocks[0].attn.qkv.kernel[...], start.blocks[0].attn.qkv.kernel[...])
