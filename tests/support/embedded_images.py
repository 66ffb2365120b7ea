"""A folder of small images, a tiny model, and the embedding file of both."""

from pathlib import Path

import numpy as np
from flax import nnx
from PIL import Image

import dinojax
from dinojax import Preprocessing, VisionTransformer, ViTConfig
from experiments.embedding.table import EmbeddingTable, write_table
from experiments.features.extractor import fingerprint

TINY = ViTConfig(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
PREPROCESSING = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.25, 0.3, 0.2), image_size=16, patch_size=4)
HOSTILE = "<script>alert('$1')<&$.png"  # a file name


def picture(seed: int, height: int = 20, width: int = 24) -> Image.Image:
    """Smooth colours, so that images differ as photographs do."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def make_images(root: Path, count: int = 8) -> list[str]:
    """Writes images of which the last is called `HOSTILE`; returns their paths inside the folder."""
    names = [*(f"deep/{i}.png" for i in range(count - 1)), HOSTILE]
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(root / name)
    return names


def make_model(folder: Path, seed: int = 0) -> VisionTransformer:
    """Saves a tiny model with random weights."""
    model = VisionTransformer(TINY, rngs=nnx.Rngs(seed), preprocessing=PREPROCESSING)
    dinojax.save(model, folder)
    return model


def make_table(path: Path, root: Path, names: list[str], model: VisionTransformer, weights: Path) -> EmbeddingTable:
    """Embeds the images with the library's own functions, and writes the file."""
    photos = [root / name for name in names]
    found = dinojax.embed(model, dinojax.preprocess(photos, model, size=16))
    sizes = np.array([np.asarray(Image.open(photo)).shape[:2] for photo in photos], np.int32)
    return write(path, root, names, sizes, found._asdict(), model, weights)


def write(path, root, names, sizes, arrays, model, weights) -> EmbeddingTable:
    """Writes the file of given arrays."""
    meta = {
        "weights": str(weights),
        "weights_fingerprint": fingerprint(model),
        "image_size": 16,
        "normalisation": [list(PREPROCESSING.mean), list(PREPROCESSING.std)],
        "dtype": "float32",
    }
    table = EmbeddingTable(str(root), tuple(names), sizes, dict(arrays), meta)
    write_table(path, table)
    return table
