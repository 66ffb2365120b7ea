"""`python -m converters NAME|FILE|FOLDER`: converts weights to a folder for `dinojax.load`, or for other programs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from converters.exporting import Target, raise_unless_new_target, write_model
from converters.huggingface.positions import Positions, with_positions
from converters.pretrained import (
    describe,
    fetch_converted,
    load_pretrained,
    model_folder,
    raise_unless_architecture,
    read_file,
    store,
    tell_choices,
    variant,
)
from converters.torch_to_flax import to_torch
from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from dinojax.models.files import is_model_folder, load, named_parameters, shipped_folder
from dinojax.models.variants import VARIANTS
from dinojax.models.vit import VisionTransformer

# Every line starts with a space, so that tyro leaves it as it is; lines fit a terminal of 80 columns.
_DESCRIPTION = """\
 Convert DINO and DINOv2 weights to dinojax, and dinojax models for other
 programs.
\u200b
   python -m converters dinov2_vits14
       download the official file, convert it, store the result in the cache
   python -m converters dinov2_vits14 --verify
       the same, after comparing every output with PyTorch
   python -m converters checkpoint.pth
       convert your own file to the folder checkpoint-flax next to it
   python -m converters folder-of-hugging-face
       the same for a folder that save_pretrained of transformers wrote
   python -m converters runs/mine/teacher --out teacher.pth
       write a trained model for PyTorch, under the official names
   python -m converters runs/mine/teacher --to huggingface --out teacher
       write it for AutoModel and AutoImageProcessor of transformers
   python -m converters runs/mine/teacher --to onnx --out teacher.onnx
       write it for onnxruntime; --to stablehlo writes it for jax.export
\u200b
 Then use dinojax.load(FOLDER) or converters.load_pretrained(NAME).
\u200b
 The exit code is 0 for success, 1 if --verify finds a difference above its
 bound (nothing is written), and 2 for a mistake that the message explains."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to convert, and where to write it."""

    source: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="NAME|FILE|FOLDER",
            help="Weights to convert: a published model by its torch.hub name (dino_vits16 … dinov2_vitg14_reg), a "
            ".pth, .safetensors or .onnx file (a training checkpoint too), or a Hugging Face folder. A folder that "
            "dinojax wrote, or the model dinojax_vitt in the package, is converted to PyTorch unless --to says "
            "otherwise.",
        ),
    ]
    to: Annotated[
        Literal["flax", "torch", "huggingface", "stablehlo", "onnx"] | None,
        tyro.conf.arg(
            help="Program to write for: flax is a folder for dinojax.load, torch a .pth or .safetensors file, "
            "huggingface a folder for transformers, stablehlo and onnx a program with its weights. None takes torch "
            "for a folder that dinojax wrote, and flax for everything else."
        ),
    ] = None
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            help="Folder or file to write. For flax, None takes the cache for a NAME, and for a FILE the folder "
            "FILE-flax next to it."
        ),
    ] = None
    name: Annotated[
        str | None,
        tyro.conf.arg(
            help="Published model whose architecture a FILE or FOLDER must have. None infers the architecture from the "
            "shapes."
        ),
    ] = None
    which: Annotated[
        Literal["teacher", "student"],
        tyro.conf.arg(help="Network to take from a training checkpoint. DINO's results are the teacher's."),
    ] = "teacher"
    num_heads: Annotated[
        int | None,
        tyro.conf.arg(
            help="Number of attention heads in a FILE, which its shapes do not determine. None takes it from the "
            "config.json next to the file, or else one head per 64 channels, as in all published models."
        ),
    ] = None
    positions: Annotated[
        Positions | None,
        tyro.conf.arg(
            help="Convention for images of another size than that of the weights: hub resizes the position table as "
            "upstream's code does, huggingface as transformers does. None takes hub, or what a folder of dinojax "
            "states."
        ),
    ] = None
    size: Annotated[
        int | None,
        tyro.conf.arg(
            help="Side in pixels of the square images of a stablehlo or onnx program. None takes the size that the "
            "model is used with, 224 for published weights."
        ),
    ] = None
    outputs: Annotated[
        str,
        tyro.conf.arg(
            help="Outputs of a stablehlo or onnx program, with commas between them: cls is the class token, patches "
            "the patch tokens, attention the last block's attention of the class token to each patch."
        ),
    ] = "cls,patches"
    verify: Annotated[
        bool,
        tyro.conf.arg(
            help="Run PyTorch and Flax on the same images, and print the largest difference of each output. Needs "
            "transformers. Upstream's own code is compared too if GitHub can be reached (torch.hub downloads and runs "
            "it)."
        ),
    ] = False
    cache_dir: Annotated[
        Path | None,
        tyro.conf.arg(
            help="Folder of downloads and converted models. None takes $DINOJAX_CACHE, or else ~/.cache/dinojax."
        ),
    ] = None


def run(config: Config) -> bool:
    """Converts and prints. False means that `--verify` found a difference above its bound; then nothing is written."""
    if config.num_heads is not None and config.num_heads < 1:
        raise UserError(f"--num-heads {config.num_heads} is not a positive number")
    if config.size is not None and config.size < 1:
        raise UserError(f"--size {config.size} is not a positive number of pixels")
    if config.name is not None:
        variant(config.name)
    folder = _converted_folder(config)
    target = config.to or ("torch" if folder else "flax")
    if target not in ("stablehlo", "onnx") and (config.size is not None or config.outputs != Config.outputs):
        raise UserError(
            "--size and --outputs are for --to stablehlo and --to onnx; other files take images of any size"
        )
    if target != "flax":
        return _export(config, target, folder)
    if folder:
        raise UserError(f"{folder} is converted already: dinojax.load reads it")
    return _convert_published(config) if config.source in VARIANTS else _convert_file(config)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(Config, args=args, prog="python -m converters", description=_DESCRIPTION)
    with exit_on_user_error():
        if not run(config):
            raise SystemExit(1)


def _converted_folder(config: Config) -> Path | None:
    """The folder of the source if dinojax wrote it.

    Raises:
        UserError: the source is most likely a misspelt name; the message suggests others.
    """
    path = Path(config.source).expanduser()
    if shipped := shipped_folder(config.source):
        return shipped
    if config.source in VARIANTS:
        return None
    if not path.exists() and not any(c in config.source for c in "./\\"):
        variant(config.source)
    return path if is_model_folder(path) else None


def _convert_published(config: Config) -> bool:
    name, folder = config.source, config.out or model_folder(config.source, config.cache_dir)
    _raise_unless_free(config)
    if config.positions == "huggingface" and config.out is None:
        raise UserError(
            f"the cache keeps {name} as published; --out FOLDER takes the one with --positions huggingface, and "
            'load_pretrained(..., positions="huggingface") needs none'
        )
    _raise_if_foreign(folder)
    if not config.verify:
        model = load_pretrained(name, cache_dir=config.cache_dir, positions=config.positions)
        if config.out is not None:
            store(model, folder, {"name": name})
        _print_model(name, model, folder)
        return True
    file, checkpoint, model = fetch_converted(name, config.cache_dir)
    if not _equals_pytorch(model, checkpoint, config):
        return False
    if config.positions is not None:
        model.config = with_positions(model.config, config.positions)
    store(model, folder, describe(file, name))
    file.unlink()
    _print_model(name, model, folder)
    return True


def _convert_file(config: Config) -> bool:
    file = Path(config.source).expanduser()
    folder = config.out or file.with_name(f"{file.name if file.is_dir() else file.stem}-flax")
    _raise_if_foreign(folder)
    checkpoint, model = _read(config)
    if config.verify and not _equals_pytorch(model, checkpoint, config):
        return False
    described = describe(file, of_dinov3=model.config.family == "dinov3")
    store(model, folder, described | {"which": config.which})
    _print_model(file.name, model, folder)
    return True


def _export(config: Config, target: Target, folder: Path | None) -> bool:
    if config.out is None and config.to is None:
        raise UserError(
            f"{folder} is converted already: dinojax.load reads it, and --out FILE.pth or FILE.safetensors writes it "
            "for PyTorch"
        )
    if config.out is None:
        kind = "FILE.pth or FILE.safetensors" if target == "torch" else f"FILE.{target}"
        kind = "FOLDER" if target == "huggingface" else kind
        raise UserError(f"--to {target} writes {config.source} to --out {kind}, which is missing")
    out = config.out.expanduser()
    raise_unless_new_target(target, out, config.outputs)
    model, state = _read_any(config, folder)
    if config.verify and not _equals_pytorch(model, state, config):
        return False
    count = sum(array.size for array in named_parameters(model).values())
    told = write_model(model, target, out, size=config.size, outputs=config.outputs)
    print(f"{config.source}: {count:,} parameters, {told}")
    return True


def _read_any(config: Config, folder: Path | None) -> tuple[VisionTransformer, Mapping[str, Any]]:
    """The model of any source, and the tensors to verify it with."""
    if folder is None and config.source not in VARIANTS:
        tensors, model = _read(config)
        return model, tensors
    if folder is None:
        _raise_unless_free(config)
        model = load_pretrained(config.source, cache_dir=config.cache_dir, positions=config.positions)
        return model, to_torch(model)
    if config.num_heads is not None or config.which != "teacher":
        raise UserError(
            f"--num-heads and --which are for weight files; {folder} is a single network whose heads are known"
        )
    model = load(folder)
    if config.positions is not None:
        model.config = with_positions(model.config, config.positions)
    if config.name is not None:
        raise_unless_architecture(model, config.name, str(folder))
    return model, to_torch(model)


def _read(config: Config) -> tuple[Mapping[str, Any], VisionTransformer]:
    """The tensors and the model of a file or a Hugging Face folder; says what was chosen."""
    file = Path(config.source).expanduser()
    which, positions = config.which, config.positions
    tensors, model = read_file(file, num_heads=config.num_heads, which=which, positions=positions)
    if config.name is not None:
        raise_unless_architecture(model, config.name, str(file))
    tell_choices(file, tensors, model, which=which, positions=positions, say=print)
    return tensors, model


def _raise_unless_free(config: Config) -> None:
    """Refuses flags of files for a published model."""
    if config.name not in (None, config.source):
        raise UserError(f"--name {config.name} was given with the published model {config.source}: --name is for files")


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
