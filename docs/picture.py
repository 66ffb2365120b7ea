"""The picture of the README: what the model inside the package sees in two photos.

    python docs/picture.py

It writes docs/images/dahlia_and_pavilion.png: each photo, the attention of the class token in two heads of the last
block, and the first three principal components of its patches as colours. The colours of an
attention map range from its 1st to its 99th percentile. The photos come with scikit-learn, under
CC BY 2.0: flower.jpg by vultilion and china.jpg by danielbuechele, both from flickr.com.
"""

from pathlib import Path

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image

import dinojax
from converters import load_pretrained
from dinojax.maps import cls_attention, pca_maps, value_range

FILE = Path(__file__).parent / "images" / "dahlia_and_pavilion.png"
HEIGHT = 160  # pixels that the model sees
HEADS = (2, 3)  # of four, from 0
TITLES = ("photo", "attention, head 3", "attention, head 4", "patch PCA")


def main() -> None:
    """Draws the picture."""
    model = load_pretrained("dinojax_vitt")
    photos = [Image.fromarray(load_sample_image(name)) for name in ("flower.jpg", "china.jpg")]
    images = dinojax.preprocess(photos, model, size=HEIGHT, crop=False)
    rows, columns = (side // model.config.patch_size for side in images.shape[1:3])
    attention = cls_attention(jax.jit(lambda model, x: model.get_last_selfattention(x))(model, images), rows, columns)
    tokens = np.asarray(jax.jit(lambda model, x: model(x).patch_tokens)(model, images))

    figure = Figure(figsize=(9.6, 3.45), facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 4, gridspec_kw={"wspace": 0.03, "hspace": 0.03})
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=0.93)
    for axes, title in zip(panels[0], TITLES):
        axes.set_title(title, fontsize=9, loc="left", pad=3)
    for row, photo, heads, patches in zip(panels, photos, np.asarray(attention), tokens):
        (colours,) = pca_maps([patches.reshape(rows, columns, -1)], threshold=None)
        row[0].imshow(photo.resize((480, 320), Image.Resampling.BICUBIC))
        for axes, head in zip(row[1:3], HEADS):
            low, high = value_range(heads[head])
            axes.imshow(heads[head], cmap="magma", vmin=low, vmax=high, interpolation="nearest")
        row[3].imshow(colours.rgb, interpolation="nearest")
        for axes in row:
            axes.set_aspect("auto")
            axes.set_axis_off()
    FILE.parent.mkdir(exist_ok=True)
    figure.savefig(FILE, dpi=130)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
