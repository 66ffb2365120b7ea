"""Depth of every pixel: a backbone, a depth head, and what upstream does before and after them.

Source: facebookresearch/dinov2 b8931f7 `dinov2/hub/utils.py` (`CenterPadding`), `dinov2/hub/depth/encoder_decoder.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dinojax.errors import require
from dinojax.heads.dpt import DPTHead
from dinojax.heads.linear_depth import LinearDepthHead
from dinojax.heads.resize import resize_bilinear
from dinojax.models.layers import Module
from dinojax.models.preprocessing import Preprocessing
from dinojax.models.vit import VisionTransformer
from dinojax.precision import matmul_precision


class DepthEstimator(Module):
    """A backbone and a depth head: images of any size to metres.

    Args:
        backbone: a model as wide as the head expects.
        head: a linear or DPT head.

    Raises:
        UserError: the head is for a backbone of another width, or of more blocks.
    """

    def __init__(self, backbone: VisionTransformer, head: LinearDepthHead | DPTHead):
        config, depth = head.config, backbone.config.depth
        width = backbone.config.embed_dim
        require(config.embed_dim == width, "embed_dim", config.embed_dim, f"the backbone's width, {width}")
        inside = all(0 <= block < depth for block in config.blocks)
        require(inside, "blocks", config.blocks, f"among the backbone's {depth} blocks")
        self.backbone = backbone
        self.head = head

    def __call__(
        self, images: Float[Array | np.ndarray, "batch height width channels"]
    ) -> Float[Array, "batch height width"]:
        """Depth in metres of normalised images, in float32 at least.

        The images are padded with zeros to whole patches, on both sides; of an odd number, one more is at the right and
        the bottom. The map of the padded image is resized, not cropped, to the size of the image: so does upstream.

        Raises:
            ValueError: images that the backbone does not take.
        """
        height, width = images.shape[1:3]
        config = self.head.config
        with jax.default_matmul_precision(matmul_precision(self.backbone.cls_token[...].dtype)):
            layers = self.backbone.get_intermediate_layers(
                pad_to_patches(images, self.backbone.config.patch_size),
                n=config.blocks,
                reshape=True,
                return_class_token=True,
                norm=False,
            )
            depth = jnp.clip(self.head(layers), config.min_depth, config.max_depth)
        return resize_bilinear(depth[..., None], (height, width), align_corners=False)[..., 0]

    @property
    def preprocessing(self) -> Preprocessing:
        """What the backbone expects of its images, for `dinojax.preprocess`."""
        return self.backbone.preprocessing


def pad_to_patches(
    images: Float[Array | np.ndarray, "batch height width channels"], patch_size: int
) -> Float[Array, "batch padded_height padded_width channels"]:
    """Images in the middle of zeros, so that both sides are a multiple of `patch_size`."""
    missing = (-side % patch_size for side in images.shape[1:3])
    around = [(pixels // 2, pixels - pixels // 2) for pixels in missing]
    return jnp.pad(jnp.asarray(images), ((0, 0), *around, (0, 0)))
