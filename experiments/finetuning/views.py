"""The views of images in supervised training, made on the device: a random crop, perhaps mirrored; or all of it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from dinojax import image_ops as ops
from dinojax.pretraining.augment import Range, Triple, draw_box

_RATIO = (3 / 4, 4 / 3)  # width over height


def training_views(
    key: Key[Array, ""],
    images: UInt8[Array | np.ndarray, "batch side side 3"],
    ids: Int[Array | np.ndarray, " batch"],
    *,
    size: int,
    mean: Triple,
    std: Triple,
    scale: Range = (0.08, 1.0),
    flip_probability: float = 0.5,
    interpolation: ops.Interpolation = "bilinear",
) -> Float[Array, "batch {size} {size} 3"]:
    """One randomly cropped, resized and mirrored view of each image, normalised; for use under `jax.jit`.

    Args:
        key: of this epoch (`fold_in(key, epoch)`). A view follows from it and the image's id alone, whatever the batch
            or the device.
        images: RGB.
        ids: of the images, `Batch.ids`.
        size: side of the views in pixels.
        mean: of red, green and blue on a scale of 0 to 1.
        std: standard deviation of red, green and blue, on the same scale.
        scale: smallest and largest share of the image's area that a crop covers.
        flip_probability: of mirroring a view left to right.
        interpolation: bilinear, torchvision's default, or bicubic, as in DINOv2's evaluations; both antialiased.

    Source: torchvision `RandomResizedCrop`, `RandomHorizontalFlip`, `ToTensor`, `Normalize`, on Pillow images.
    """
    boxes, flips = draw_crops(key, ids, images.shape[1], scale, flip_probability)
    planes = ops.to_planes(jnp.asarray(images))
    return ops.normalize(ops.crop_resize(planes, boxes, size, flips, interpolation=interpolation), mean, std)


def draw_crops(
    key: Key[Array, ""], ids: Int[Array | np.ndarray, " batch"], side: int, scale: Range, flip_probability: float
) -> tuple[Int[Array, "batch 4"], Bool[Array, " batch"]]:
    """Top, left, height and width of each crop of an image of `side` × `side` px, and whether it is mirrored."""

    def draw(image: Array) -> tuple[Array, Array]:
        box_key, flip_key = jax.random.split(jax.random.fold_in(key, image))
        return draw_box(box_key, side, side, scale, _RATIO), jax.random.uniform(flip_key) < flip_probability

    return jax.vmap(draw)(ids)


def plain_views(
    images: UInt8[Array | np.ndarray, "batch side side 3"], mean: Triple, std: Triple
) -> Float[Array, "batch side side 3"]:
    """The whole images, normalised."""
    return ops.normalize(ops.to_planes(jnp.asarray(images)), mean, std)
