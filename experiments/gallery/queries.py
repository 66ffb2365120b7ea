"""Photos from elsewhere through the model of an embedding file."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from dinojax.errors import UserError
from experiments.gallery.bank import Bank
from experiments.runs.settings import BatchSettings


@dataclasses.dataclass(frozen=True)
class BankModel(BatchSettings):
    """The model of the embedding file."""

    weights: str | None = None
    """Present place of the model. None takes the place that the file has recorded."""


def embed_photos(
    photos: Sequence[Path], bank: Bank, settings: BankModel, cache_dir: Path | None
) -> Float[np.ndarray, "photos dim"]:
    """The features of photos, computed as those of the bank.

    Raises:
        UserError: the model is not found or is not that of the bank, or a photo cannot be read.
    """
    from dinojax.parallel import make_mesh
    from experiments.data.files import split_of_paths
    from experiments.embedding.table import CLS, MEAN_PATCH
    from experiments.features.backbones import load_backbone
    from experiments.features.extractor import FeatureExtractor

    meta, weights = bank.meta, settings.weights or str(bank.meta["weights"])
    try:
        backbone = load_backbone(weights, seed=int(meta.get("seed", 0)), cache_dir=cache_dir)
    except UserError as error:
        raise UserError(f"{error} (the model of {bank.table}; --weights names its present place)") from error
    extractor = FeatureExtractor(
        backbone.model,
        normalisation=meta["normalisation"],
        image_size=meta["image_size"],
        dtype=meta["dtype"],
        batch_size=settings.batch_size,
        cache_dir=cache_dir,
        mesh=make_mesh(settings.mesh),
    )
    if extractor.fingerprint != meta["weights_fingerprint"]:
        raise UserError(
            f"{weights} is not the model that {bank.table} was made with (fingerprint {extractor.fingerprint[:12]}, "
            f"the file has {meta['weights_fingerprint'][:12]}); name that one with --weights, or embed the images again"
        )
    root = Path("/")
    split = split_of_paths(root, "photos", [photo.absolute() for photo in photos], np.zeros(len(photos), np.int64))
    parts = extractor.extract([split])[0]
    if bank.feature == MEAN_PATCH:
        return parts.vectors(MEAN_PATCH)
    block = 1 if bank.feature == CLS else int(bank.feature.removeprefix(f"{CLS}_"))
    return np.ascontiguousarray(parts.cls[:, -block])
