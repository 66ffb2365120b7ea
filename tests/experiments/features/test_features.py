"""Features: equal to the model's own outputs, resized as torchvision does, cached so that nothing is lost or stale."""

import hashlib
import json
import resource
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dinojax import UserError, VisionTransformer, ViTConfig
from experiments.data.splits import Split
from experiments.data.squares import load_square
from experiments.features import extractor as features_module
from experiments.features.extractor import FeatureExtractor

SIZE = 28
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(features_module, "_SHARD_IMAGES", 5)


def make_model(seed=0, depth=5, **options):
    config = ViTConfig(img_size=42, patch_size=14, embed_dim=24, depth=depth, num_heads=2, init_values=0.5, **options)
    return VisionTransformer(config, rngs=nnx.Rngs(seed))


class Images:
    """Random images of many shapes that count how often each was read, and break on demand."""

    def __init__(self, count=13, name="train"):
        rng = np.random.default_rng(count)
        self.arrays = [rng.integers(0, 256, (20 + i % 7, 30 - i % 5, 3), dtype=np.uint8) for i in range(count)]
        self.reads, self.broken = np.zeros(count, int), {}
        self.split = Split(name, [str(i) for i in range(count)], np.arange(count) % 3, self.read, f"{name} {count}")

    def read(self, i):
        if i in self.broken:
            raise self.broken[i]
        self.reads[i] += 1
        return self.arrays[i]


def make_extractor(tmp_path, model=None, **options):
    options = {"image_size": SIZE, "batch_size": 3, "cache_dir": tmp_path, "normalisation": IMAGENET, **options}
    return FeatureExtractor(model or make_model(), **options)


def normalised(split, mean=IMAGENET[0], std=IMAGENET[1]):
    pixels = np.stack([load_square(split, i, SIZE) for i in range(len(split))]) / 255
    return ((pixels - mean) / std).astype(np.float32)


@pytest.mark.parametrize("depth", [2, 5])
def test_features_are_the_last_class_tokens_and_the_mean_patch(tmp_path, depth):
    model, images = make_model(depth=depth), Images()
    (features,) = make_extractor(tmp_path, model).extract([images.split])
    layers = model.get_intermediate_layers(normalised(images.split), n=min(4, depth), return_class_token=True)
    expected = [cls_token for _, cls_token in layers] + [layers[-1][0].mean(axis=1)]
    assert features.cls.shape == (13, min(4, depth), 24)
    np.testing.assert_allclose(features.tokens, np.stack(expected, axis=1), atol=2e-5)
    whole = model(normalised(images.split))
    np.testing.assert_allclose(features.vectors(), whole.cls_token, atol=2e-5)
    np.testing.assert_allclose(features.mean_patch, whole.patch_tokens.mean(axis=1), atol=2e-5)


def test_bfloat16_is_close_and_returned_as_float32(tmp_path):
    images = Images()
    (full,) = make_extractor(tmp_path).extract([images.split])
    (half,) = make_extractor(tmp_path, dtype="bfloat16").extract([images.split])
    assert half.cls.dtype == np.float32
    assert 1e-4 < np.abs(half.tokens - full.tokens).max() < 0.04  # 0.020 measured, of features up to 2.1


def test_pixels_are_normalised_as_the_model_expects(tmp_path):
    model, images, (mean, std) = make_model(), Images(), ([0.5, 0.4, 0.3], [0.3, 0.2, 0.1])
    (features,) = make_extractor(tmp_path, model, normalisation=(mean, std)).extract([images.split])
    whole = model(normalised(images.split, mean, std))
    np.testing.assert_allclose(features.vectors(), whole.cls_token, atol=2e-5)


def test_several_splits_and_any_batch_size_give_the_same(tmp_path):
    train, test = Images(13), Images(4, "test")
    together = make_extractor(tmp_path / "a").extract([train.split, test.split])
    for images, features in zip((train, test), together):
        (alone,) = make_extractor(tmp_path / "b", batch_size=64).extract([images.split])
        np.testing.assert_allclose(features.tokens, alone.tokens, atol=1e-5)


def test_a_second_call_reads_no_image(tmp_path, capsys):
    images = Images()
    (first,) = make_extractor(tmp_path).extract([images.split])
    (second,) = make_extractor(tmp_path).extract([images.split])
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert (images.reads == 1).all()
    assert "all 13 images from the cache" in capsys.readouterr().out
    (folder,) = (tmp_path / "features").iterdir()
    assert json.loads((folder / "meta.json").read_text())["image_size"] == SIZE


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"model": make_model(seed=1)},
        lambda: {"model": make_model(interpolate_offset=0.0)},
        lambda: {"image_size": 42},
        lambda: {"dtype": "bfloat16"},
        lambda: {"normalisation": (IMAGENET[0], [0.229, 0.224, 0.226])},
        lambda: {"normalisation": ([0.484, 0.456, 0.406], IMAGENET[1])},
    ],
)
def test_other_weights_or_transforms_are_not_taken_from_the_cache(tmp_path, change):
    images = Images()
    make_extractor(tmp_path).extract([images.split])
    make_extractor(tmp_path, **change()).extract([images.split])
    assert (images.reads == 2).all()


@pytest.mark.parametrize("interruption", [UserError("image 7 is not a readable image"), KeyboardInterrupt()])
def test_after_an_interruption_the_finished_shards_are_kept(tmp_path, interruption):
    images = Images()
    images.broken[7] = interruption
    with pytest.raises(type(interruption)):
        make_extractor(tmp_path).extract([images.split])
    before = images.reads.copy()
    images.broken.clear()
    (resumed,) = make_extractor(tmp_path).extract([images.split])
    assert (images.reads[:5] == before[:5]).all()
    (fresh,) = make_extractor(tmp_path / "fresh").extract([images.split])
    np.testing.assert_array_equal(resumed.tokens, fresh.tokens)


@pytest.mark.parametrize("damage",
    [lambda b: b[:-9], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1]),
     lambda b: b.replace(b'"F32"', b'"I32"'), lambda b: b.replace(b"[5,5,24]", b"[5,24,5]")],
)  # fmt: skip
def test_a_damaged_shard_is_computed_again(tmp_path, damage):
    images = Images()
    (first,) = make_extractor(tmp_path).extract([images.split])
    (shard,) = tmp_path.glob("features/*/00001.safetensors")
    shard.write_bytes(damage(shard.read_bytes()))
    (second,) = make_extractor(tmp_path).extract([images.split])
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert images.reads.tolist() == [1] * 5 + [2] * 5 + [1] * 3


def test_a_shard_of_an_earlier_version_is_read(tmp_path):
    """Its hash covers the bytes of the array alone."""
    images = Images()
    make_extractor(tmp_path).extract([images.split])
    (shard,) = tmp_path.glob("features/*/00001.safetensors")
    content = shard.read_bytes()
    array = safetensors.numpy.load(content)["features"]
    old = safetensors.numpy.save({"features": array}, {"sha256": hashlib.sha256(array.tobytes()).hexdigest()})
    assert old != content
    shard.write_bytes(old)
    (second,) = make_extractor(tmp_path).extract([images.split])
    np.testing.assert_array_equal(second.tokens[5:10], array)
    assert (images.reads == 1).all()


@contextmanager
def largest_file(size):
    """Writing more than `size` bytes to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path):
    images = Images()
    with largest_file(1200), pytest.raises(UserError, match=r"cannot cache features in .*--cache-dir"):
        make_extractor(tmp_path).extract([images.split])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["meta.json"]


def test_a_cache_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot cache features in"):
        make_extractor(tmp_path / "file").extract([Images().split])


def test_features_that_are_not_finite_are_refused_and_not_cached(tmp_path):
    model = make_model()
    model.cls_token[...] = model.cls_token[...].at[0, 0, 3].set(jnp.nan)
    with pytest.raises(UserError, match="train images 0 to 4 are not finite"):
        make_extractor(tmp_path, model).extract([Images().split])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_sizes_that_the_patch_does_not_divide_are_refused_for_dinov2_alone(tmp_path):
    with pytest.raises(UserError, match=r"--image-size 30 is not a multiple of .* 14; take 28 or 42"):
        make_extractor(tmp_path, image_size=30)
    with pytest.raises(UserError, match="--image-size 13 is smaller than one patch"):
        make_extractor(tmp_path, image_size=13)
    config = ViTConfig(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    model = VisionTransformer(config, rngs=nnx.Rngs(0))
    (features,) = make_extractor(tmp_path, model, image_size=30).extract([Images().split])
    assert features.tokens.shape == (13, 2, 24)


def test_long_work_is_announced_early_with_what_makes_it_shorter(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features_module, "_LONG_SECONDS", 0)
    make_extractor(tmp_path, batch_size=1).extract([Images(40).split])
    err = capsys.readouterr()
    said = err.out + err.err
    assert said.count("--max-train, --max-test") == 1
    assert "--image-size" in said
