"""A TensorFlow Datasets builder of Tiny-ImageNet from the official zip, which does not need TensorFlow.

The encoded images are copied unchanged and in order, so that image i of a split is the same whether the set is read
from the extracted folder or from here.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from converters.download import download, raise_unless_room
from dinojax.documents import sha256_of_file
from dinojax.errors import UserError
from experiments.data.splits import Dataset
from experiments.data.tfds import read_prepared
from experiments.data.tiny_imagenet import ARCHIVE, FOLDER, NAME, is_tiny_imagenet, read_layout, reading


def load_prepared(data_dir: Path | None) -> Dataset:
    """The TFDS set in `data_dir` (None is TFDS's own default), which is prepared now if necessary.

    Raises:
        UserError: the set could not be downloaded, or is damaged.
    """
    builder = TinyImagenet(data_dir=data_dir and data_dir.expanduser())
    if not builder.is_prepared():
        fetch(Path(builder.data_dir_root))  # if TFDS failed to download it, it would leave a folder behind
        builder.download_and_prepare(file_format="array_record")
    return read_prepared(NAME, builder)


def fetch(root: Path) -> Path:
    """The extracted folder or the verified zip in `root`. If neither is there, the zip is downloaded.

    Raises:
        UserError: the download failed, or the zip is not the official one.
    """
    if is_tiny_imagenet(root / FOLDER):
        return root / FOLDER
    zipped = root / f"{FOLDER}.zip"
    if not zipped.exists():
        try:
            return download(ARCHIVE.url, zipped, size=ARCHIVE.size, sha256=ARCHIVE.sha256)
        except UserError as error:
            raise UserError(
                f"--data {NAME} is not in {root}, and its download failed: {error}; download {ARCHIVE.url} elsewhere "
                f"and put it into {root}, or extract it and pass its folder as --data"
            ) from error
    if (digest := sha256_of_file(zipped)) != ARCHIVE.sha256:
        raise UserError(
            f"{zipped} is damaged or not the official file (its SHA-256 is {digest[:12]}…, not "
            f"{ARCHIVE.sha256[:12]}…); remove it, and the same command downloads it again, or extract it and pass its "
            "folder as --data"
        )
    return zipped


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """100,000 training and 10,000 validation images of 200 classes, 64×64 px.

    The images are those of `tiny-imagenet-200/` in the builder's `data_dir`; if that does not exist, of
    `tiny-imagenet-200.zip` there, which is downloaded if necessary.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(),  # the names are in the zip
            "id": tfds.features.Text(doc="Path inside tiny-imagenet-200/."),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images of 200 ImageNet classes, scaled down to 64×64 pixels.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="http://cs231n.stanford.edu/reports/2015/pdfs/yle_project.pdf",
            citation="Ya Le and Xuan Yang. Tiny ImageNet Visual Recognition Challenge. Stanford CS 231N, 2015.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
        source = fetch(Path(self.data_dir_root))
        raise_unless_room(source.parent, ARCHIVE.size)  # the prepared set is about as large
        layout = read_layout(source)
        self.info.features["label"].names = list(layout.class_names)
        labels = {wnid: label for label, wnid in enumerate(layout.train)}
        return {
            split: self._generate_examples(source, [(name, labels[wnid]) for wnid in found for name in found[wnid]])
            for split, found in (("train", layout.train), ("validation", layout.validation))
        }

    def _generate_examples(self, source: Path, images: list[tuple[str, int]]) -> Iterator[tuple[int, dict[str, Any]]]:
        with reading(source) as read:
            for i, (name, label) in enumerate(images):
                yield i, {"image": io.BytesIO(read(name)), "label": label, "id": name}
