import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dinojax import UserError, VisionTransformer, ViTConfig
from dinojax.models import chunks
from dinojax.models.chunks import images_in_cache, in_chunks

CONFIG = ViTConfig(
    img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, init_values=0.5, num_register_tokens=2
)
TOKENS = 4 * 6


def inputs(batch: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(1)
    return draw.standard_normal((batch, 32, 48, 3)), draw.random((batch, TOKENS)) < 0.3


def everything(vit, images, masks):
    layers = vit.get_intermediate_layers(images, n=2, reshape=True, return_class_token=True)
    return vit(images, masks), layers, vit.get_last_selfattention(images)


def chunked(vit, images, masks):
    return in_chunks(lambda *chunk: everything(vit, *chunk), CONFIG, images, masks)


@pytest.mark.parametrize("batch", [6, 7])
def test_chunks_change_nothing(monkeypatch, batch):
    """A cache that holds four images takes 6 as 2 × 3; 7 has no divisor but itself and one."""
    monkeypatch.setattr(chunks, "_CACHED_NUMBERS", 4 * TOKENS * 24)
    with jax.enable_x64(True):
        vit = jax.tree.map(lambda x: x.astype(jnp.float64), VisionTransformer(CONFIG, rngs=nnx.Rngs(0)))
        images, masks = inputs(batch)
        found = jax.jit(chunked)(vit, images, masks)
        expected = everything(vit, images, masks)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("fitting", "batch", "chunk"), [(4, 6, 3), (4, 7, 1), (6, 6, 6), (100, 6, 6), (0, 6, 1)])
def test_a_chunk_is_the_largest_divisor_that_the_cache_holds(monkeypatch, fitting, batch, chunk):
    monkeypatch.setattr(chunks, "_CACHED_NUMBERS", fitting * TOKENS * 24)
    sizes = []

    def function(images, masks):
        sizes.append((len(images), masks))
        return images.mean((1, 2, 3))

    images, _ = inputs(batch)
    np.testing.assert_allclose(
        jax.jit(lambda x: in_chunks(function, CONFIG, x, None))(images), images.mean((1, 2, 3)), atol=1e-6
    )
    assert set(sizes) == {(chunk, None)}


def test_the_model_alone_runs_the_whole_batch_at_once(monkeypatch):
    monkeypatch.setattr(chunks, "_CACHED_NUMBERS", 0)
    vit, (images, masks) = VisionTransformer(CONFIG, rngs=nnx.Rngs(0)), inputs(2)
    assert "while" not in jax.jit(everything).lower(vit, images, masks).as_text()
    assert "while" in jax.jit(chunked).lower(vit, images, masks).as_text()


def test_the_cache_holds_eight_images_of_a_vit_s_14_at_224_px():
    assert images_in_cache(257, 384) == 8
    assert images_in_cache(10**9, 384) == 1


def test_an_empty_batch_is_one_sentence():
    with pytest.raises(UserError, match="the batch is empty: one image or more was expected"):
        in_chunks(VisionTransformer(CONFIG, rngs=nnx.Rngs(0)), CONFIG, np.zeros((0, 32, 32, 3), np.float32))


def test_one_export_serves_every_batch():
    model = VisionTransformer(CONFIG, rngs=nnx.Rngs(0))
    (batch,) = jax.export.symbolic_shape("batch")
    forward = jax.jit(lambda images: in_chunks(model, CONFIG, images).cls_token)
    exported = jax.export.export(forward)(jax.ShapeDtypeStruct((batch, 32, 32, 3), np.float32))
    for count in (1, 5):
        images = np.random.default_rng(count).normal(size=(count, 32, 32, 3)).astype(np.float32)
        np.testing.assert_allclose(exported.call(images), model(images).cls_token, atol=1e-5)
