"""`dinojax.embed`: the model's own features, whatever the size of the batches."""

import numpy as np
import pytest
from flax import nnx

import dinojax
from dinojax import UserError, VisionTransformer, ViTConfig

CONFIG = ViTConfig(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
IMAGES = np.random.default_rng(0).standard_normal((7, 32, 40, 3), np.float32)


@pytest.mark.parametrize("batch_size", [None, 1, 3, 7, 100])
def test_features_are_those_of_the_model(batch_size):
    model = VisionTransformer(CONFIG, rngs=nnx.Rngs(0))
    found, expected = dinojax.embed(model, IMAGES, batch_size=batch_size), model(IMAGES)
    np.testing.assert_allclose(found.cls, expected.cls_token, atol=1e-6)
    np.testing.assert_allclose(found.mean_patch, expected.patch_tokens.mean(axis=1), atol=1e-6)


def test_what_cannot_be_embedded_is_refused():
    model = VisionTransformer(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the batch is empty"):
        dinojax.embed(model, IMAGES[:0])
    with pytest.raises(ValueError, match=r"images of uint8 are not normalised: dinojax\.preprocess\(photos, model\)"):
        dinojax.embed(model, IMAGES.astype(np.uint8))
    with pytest.raises(UserError, match="batch_size=0 is not a positive number"):
        dinojax.embed(model, IMAGES, batch_size=0)
