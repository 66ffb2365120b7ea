"""TensorFlow Datasets, read without TensorFlow; preparing a set for the first time needs it."""

import difflib
import importlib.util
import io
import logging
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from converters.download import reachable
from dinojax.errors import UserError
from dinojax.images.decode import decode_rgb
from experiments.data.splits import Dataset, Split, digest

TFDS_STORE = "https://storage.googleapis.com/tfds-data/"
PATIENCE_SECONDS = 4.0
WAYS_ON = "pass --data DIR with train/<class>/ and test/<class>/ folders, or --weights FILE, or run `make demo`"


def load_tfds(name: str, data_dir: Path | None = None) -> Dataset:
    """A set of TensorFlow Datasets whose examples have an image and a label; it is prepared if necessary.

    Raises:
        UserError: the name is unknown, the set has no image or label, cannot be prepared here, or has a format without
            random access.
    """
    import_tfds(name, WAYS_ON)
    return read_prepared(name, _prepared_builder(name, data_dir))


def import_tfds(name: str, ways_on: str) -> None:
    """Imports TensorFlow Datasets without its warnings.

    Args:
        name: of the data set that needs it, for the message.
        ways_on: what the user can do without it, for the message.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise UserError(f"--data {name}: reading it needs `pip install 'dinojax[tfds]'`; or {ways_on}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    importlib.import_module("tensorflow_datasets")
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns about every set that is not prepared


def read_prepared(name: str, builder: Any) -> Dataset:
    """The data set of a TFDS builder whose files are on disk.

    Raises:
        UserError: it has no image with a label, no training or test split, or a format without random access.
    """
    features = builder.info.features
    image_key, label_key = _image_and_label(name, features)
    test_name = next((split for split in ("test", "validation") if split in builder.info.splits), None)
    if "train" not in builder.info.splits or test_name is None:
        raise UserError(f"--data {name}: it has the splits {sorted(builder.info.splits)}, not train and test")
    train, test = (_tfds_split(builder, split, image_key, label_key) for split in ("train", test_name))
    return Dataset(name, tuple(features[label_key].names), train, test)


def _prepared_builder(name: str, data_dir: Path | None) -> Any:
    """The builder of a set on disk, which is prepared now if necessary."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir and data_dir.expanduser())
    except (ValueError, AssertionError) as error:  # unknown; no such configuration or version; not a name at all
        known = ["digits", *tfds.list_builders(with_community_datasets=False)]
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close and name not in close else WAYS_ON
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--data {name} is neither a folder nor a TensorFlow Datasets name ({reason}); {hint}"
        ) from error
    if builder.is_prepared():
        return builder
    missing = f"--data {name} is not prepared in {builder.data_path.parent.parent}"
    source = _source_url(builder)
    if not reachable(source, PATIENCE_SECONDS):
        raise UserError(f"{missing} and {urlsplit(source).hostname} cannot be reached to download it; {WAYS_ON}")
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(f"{missing} and preparing it needs `pip install 'dinojax[tensorflow]'`; or {WAYS_ON}")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # TensorFlow would take all of its memory
    builder.download_and_prepare(file_format="array_record")
    return builder


def _source_url(builder: Any) -> str:
    """An address that preparing the set downloads from."""
    return next(iter(builder.url_infos or {}), TFDS_STORE)


def _image_and_label(name: str, features: Any) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    images = [key for key in features if isinstance(features[key], tfds.features.Image)]
    labels = [key for key in features if isinstance(features[key], tfds.features.ClassLabel)]
    if not images or not labels:
        raise UserError(f"--data {name}: its features {sorted(features)} hold no image with a class label")
    return images[0], "label" if "label" in labels else labels[0]


def _tfds_split(builder: Any, name: str, image_key: str, label_key: str) -> Split:
    """A split whose labels are read now, and whose images are decoded when they are needed."""
    import tensorflow_datasets as tfds

    skip = {image_key: tfds.decode.SkipDecoding()}
    try:
        source = builder.as_data_source(name, decoders=skip)
    except NotImplementedError as error:
        raise UserError(
            f"--data {builder.name}: it was prepared in {builder.data_path} in a format without random access; "
            "give an empty folder as --data-dir to prepare it again"
        ) from error
    features = builder.info.features
    has_ids = "id" in features and isinstance(features["id"], tfds.features.Text)
    labels, ids = [], []
    for i, example in enumerate(source):
        labels.append(example[label_key])
        ids.append(example["id"].decode() if has_ids else f"{name}/{i}")
    info = builder.info.splits[name]
    return Split(
        name,
        ids,
        np.array(labels, np.int64),
        lambda i: decode_rgb(io.BytesIO(source[i][image_key]), f"image {i} of {builder.info.full_name} {name}"),
        digest(builder.info.full_name, name, str(info.num_bytes), str(info.shard_lengths)),
    )
