"""The backbone that `--weights` names: published, from a file or folder, or never trained."""

from pathlib import Path

from flax import nnx

from dinojax import VARIANTS, UserError, VisionTransformer

RANDOM = "random"
DEFAULT_SHAPE = "dinov2_vits14"


def load_backbone(weights: str, *, seed: int, cache_dir: Path) -> VisionTransformer:
    """The model that `--weights` names.

    Raises:
        UserError: no such checkpoint, file or architecture, or none that can be had here.
    """
    if is_random(weights):
        name = weights.removeprefix(RANDOM).removeprefix(":") or DEFAULT_SHAPE
        if name not in VARIANTS:
            raise UserError(f"--weights {weights}: {name!r} is none of {', '.join(VARIANTS)}")
        return VisionTransformer(VARIANTS[name], rngs=nnx.Rngs(seed))
    # Torch is only loaded where a PyTorch file is read.
    from converters.pretrained import load_pretrained, read_model

    path = Path(weights).expanduser()
    if path.exists():
        return read_model(path)
    if path.name != weights or path.suffix:
        raise UserError(f"--weights {weights}: there is no such file or folder")
    try:
        return load_pretrained(weights, cache_dir=cache_dir)
    except UserError as error:
        raise UserError(f"--weights {weights}: {error}; `make demo` needs neither weights nor data") from error


def is_random(weights: str) -> bool:
    """Whether `--weights` asks for a model that was never trained."""
    return weights == RANDOM or weights.startswith(f"{RANDOM}:")
