"""`python -m converters NAME|FILE|FOLDER`: converts PyTorch weights to a folder for `dinojax.load`, or back."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from converters.export import export, raise_unless_new
from converters.pretrained import (
    describe,
    fetch_converted,
    load_pretrained,
    model_folder,
    raise_unless_architecture,
    read_file,
    store,
    variant,
)
from converters.torch_to_flax import to_torch
from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from dinojax.models.files import is_model_folder, load, named_parameters, shipped_folder
from dinojax.models.variants import VARIANTS
from dinojax.models.vit import VisionTransformer

_DESCRIPTION = """Convert DINO and DINOv2 weights from PyTorch to Flax, and dinojax models to PyTorch.

  python -m converters dinov2_vits14            download the official file, convert it, store the result in the cache
  python -m converters dinov2_vits14 --verify   the same, after comparing every output with PyTorch
  python -m converters checkpoint.pth           convert your own file to the folder checkpoint-flax next to it
  python -m converters model.safetensors --name dinov2_vitb14   the same, for a file that must be a ViT-B/14
  python -m converters runs/mine/teacher --out teacher.pth      write a trained model under the official names

Then use dinojax.load(FOLDER) or converters.load_pretrained(NAME), or in PyTorch
torch.hub.load("facebookresearch/dinov2", NAME, pretrained=False).load_state_dict(torch.load(FILE)).

The exit code is 0 for success, 1 if --verify finds a difference above its bound (nothing is written), and 2 for a
mistake that the message explains."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to convert, and where to write it."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME|FILE|FOLDER")]
    """Weights to convert: a published model by its torch.hub name (dino_vits16 … dinov2_vitg14_reg), a .pth or
    .safetensors file (a training checkpoint too), or a Hugging Face folder. A folder that dinojax wrote, or the model
    dinojax_vitt in the package, is converted to PyTorch."""
    out: Path | None = None
    """Folder to write, or the .pth or .safetensors file when converting to PyTorch. None takes the cache for a NAME,
    and for a FILE the folder FILE-flax next to it."""
    name: str | None = None
    """Published model whose architecture a FILE or FOLDER must have. None infers the architecture from the shapes."""
    which: Literal["teacher", "student"] = "teacher"
    """Network to take from a training checkpoint. DINO's results are the teacher's."""
    num_heads: int | None = None
    """Number of attention heads in a FILE, which its shapes do not determine. None takes it from the config.json next
    to the file, or else one head per 64 channels, as in all published models."""
    verify: bool = False
    """Run PyTorch and Flax on the same images, and print the largest difference of each output. Needs transformers.
    Upstream's own code is compared too if GitHub can be reached (torch.hub downloads and runs it)."""
    cache_dir: Path | None = None
    """Folder of downloads and converted models. None takes $DINOJAX_CACHE, or else ~/.cache/dinojax."""


def run(config: Config) -> bool:
    """Converts and prints. False means that `--verify` found a difference above its bound; then nothing is written."""
    if config.num_heads is not None and config.num_heads < 1:
        raise UserError(f"--num-heads {config.num_heads} is not a positive number")
    if config.name is not None:
        variant(config.name)
    is_file, shipped = config.source not in VARIANTS, shipped_folder(config.source)
    folder = shipped or Path(config.source).expanduser()
    if shipped or (is_file and is_model_folder(folder)):
        return _export(config, folder)
    if is_file and not Path(config.source).expanduser().exists() and not any(c in config.source for c in "./\\"):
        variant(config.source)  # most likely a misspelled name; the error suggests others
    return _convert_file(config) if is_file else _convert_published(config)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(Config, args=args, prog="python -m converters", description=_DESCRIPTION)
    with exit_on_user_error():
        if not run(config):
            raise SystemExit(1)


def _convert_published(config: Config) -> bool:
    name, folder = config.source, config.out or model_folder(config.source, config.cache_dir)
    if config.name not in (None, name):
        raise UserError(f"--name {config.name} was given with the published model {name}: --name is for files")
    _raise_if_foreign(folder)
    if not config.verify:
        model = load_pretrained(name, cache_dir=config.cache_dir)
        if config.out is not None:
            store(model, folder, {"name": name})
        _print_model(name, model, folder)
        return True
    file, checkpoint, model = fetch_converted(name, config.cache_dir)
    if not _equals_pytorch(model, checkpoint, config):
        return False
    store(model, folder, describe(file, name))
    file.unlink()
    _print_model(name, model, folder)
    return True


def _convert_file(config: Config) -> bool:
    file = Path(config.source).expanduser()
    folder = config.out or file.with_name(f"{file.name if file.is_dir() else file.stem}-flax")
    _raise_if_foreign(folder)
    checkpoint, model = read_file(file, num_heads=config.num_heads, which=config.which, say=print)
    if config.name is not None:
        raise_unless_architecture(model, config.name, str(file))
    if config.verify and not _equals_pytorch(model, checkpoint, config):
        return False
    store(model, folder, describe(file) | {"which": config.which})
    _print_model(file.name, model, folder)
    return True


def _export(config: Config, folder: Path) -> bool:
    if config.out is None:
        raise UserError(
            f"{folder} is converted already: dinojax.load reads it, and --out FILE.pth or FILE.safetensors writes it "
            "for PyTorch"
        )
    if config.num_heads is not None or config.which != "teacher":
        raise UserError(
            f"--num-heads and --which are for weight files; {folder} is a single network whose heads are known"
        )
    file = config.out.expanduser()
    raise_unless_new(file)
    model = load(folder)
    if config.name is not None:
        raise_unless_architecture(model, config.name, str(folder))
    state = to_torch(model)
    if config.verify and not _equals_pytorch(model, state, config):
        return False
    export(state, file)
    print(f"{folder}: {sum(array.size for array in state.values()):,} parameters, written to {file} for PyTorch")
    return True


def _raise_if_foreign(folder: Path) -> None:
    """Refuses a folder that holds something else, before minutes of work."""
    if folder.exists() and not is_model_folder(folder):
        raise UserError(f"{folder} exists and is not a converted model; name another folder with --out")


def _equals_pytorch(model: VisionTransformer, checkpoint: Mapping[str, Any], config: Config) -> bool:
    from converters.verify import BOUND, table, verify, worst

    differences, notes = verify(model, checkpoint, which=config.which)
    share = worst(differences)
    print(table(differences), *notes, sep="\n")
    verdict = "equal" if share <= BOUND else "NOT equal: nothing is written"
    print(f"largest difference: {share:.1e} of the output's largest value (bound {BOUND:.0e}): {verdict}\n")
    return share <= BOUND


def _print_model(title: str, model: VisionTransformer, folder: Path) -> None:
    count = sum(array.size for array in named_parameters(model).values())
    print(f"{title}: {count:,} parameters")
    for field in dataclasses.fields(model.config):
        print(f"  {field.name:<22} {getattr(model.config, field.name)}")
    print(f"written to {folder}; read it with dinojax.load({str(folder)!r})")


if __name__ == "__main__":
    main()
