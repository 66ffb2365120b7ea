"""Both sides of `benchmarks.finetune`: our step, and PyTorch's as fast as we could write it.

PyTorch's model is `transformers` Dinov2, but with one projection for queries, keys and values, as upstream has it, and
attention by `scaled_dot_product_attention`. SGD and AdamW are fused, the norm of the gradients and the moving average
are `_foreach` operations, a frozen backbone runs without autograd, and LoRA is a path of its own beside the frozen
layers. Between the sides parameters go by our names and in our layouts.

Source: facts about facebookresearch/dinov2 05c66df as in `dinojax.finetune`.
"""

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.finetune import Recipe, Row
from benchmarks.work.dino_work import Arrays, differences, first_steps
from benchmarks.work.paired import Prepared
from benchmarks.work.torch_cpu import use_all_cores

Inputs = tuple[Any, Any]  # images and labels
_TO_OUR_NAMES = (
    (r"\.embeddings\.", "."),
    (r"\.position_embeddings$", ".pos_embed"),
    (r"\.patch_embeddings\.projection\.", ".patch_embed.proj."),
    (r"\.encoder\.layer\.", ".blocks."),
    (r"\.attention\.", ".attn."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.layernorm\.", ".norm."),
    (r"\.(norm[12]?)\.weight$", r".\1.scale"),
    (r"\.weight$", ".kernel"),
)


def random_batch(row: Row, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [batch, size, size, 3], standard normal, and labels."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, row.size, row.size, 3), np.float32)
    return images, rng.integers(0, row.classes, batch)


def same_work(row: Row, initial: Arrays, ours: Arrays, theirs: Arrays) -> dict[str, float]:
    """`dino_work.differences`, but for the few signs that rounding decides.

    AdamW's first steps are little more than the signs of the gradients. Where one is nearly zero the sides may go
    opposite ways: of each tensor one number may, and one more in every hundred thousand.
    """
    theirs = dict(theirs)
    for name in ours.keys() & theirs.keys() if row.adamw else ():
        if "." in name:
            apart = np.abs(ours[name] - theirs[name]).ravel()
            worst = np.argsort(apart)[-1 - apart.size // 100_000 :]
            theirs[name] = theirs[name].copy()
            theirs[name].flat[worst] = ours[name].flat[worst]
    return differences(initial, ours, theirs)


class OurTrainer:
    """Our training, one jitted program a step; it begins with random parameters, the same every time.

    Args:
        row: the model and what of it trains.
        recipe: constants.
        compute_dtype: as for `make_logits`.
    """

    def __init__(self, row: Row, recipe: Recipe, *, compute_dtype: Any = None):
        import jax

        from dinojax import finetune

        model = _random_classifier(row)
        trainable, self.frozen = finetune.split_parameters(
            model, row.mode, lora_rank=recipe.lora_rank, key=jax.random.key(0)
        )
        optimizer = finetune.finetune_optimizer(
            row.mode,
            row.depth,
            learning_rate=lambda step: recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            layer_decay=recipe.layer_decay,
        )
        whole = jax.default_backend() != "cpu" or row.mode == "linear"
        parts = 1 if whole else finetune.cached_parts(model.backbone, row.batch, row.size)
        step = finetune.make_finetune_step(
            finetune.make_logits(model, lora_alpha=recipe.lora_alpha, compute_dtype=compute_dtype),
            optimizer,
            label_smoothing=recipe.label_smoothing,
            ema_decay=recipe.ema_decay if row.averaged else None,
            accumulation_steps=parts,
        )
        self.state = finetune.init_finetune_state(trainable, optimizer, ema=row.averaged)
        self.jitted = jax.jit(step, donate_argnums=0)

    def step(self, inputs: Inputs) -> tuple[Any, Any]:
        """Trains on a batch; the loss and the norm of all gradients."""
        import jax

        self.state, metrics = jax.block_until_ready(self.jitted(self.state, self.frozen, *inputs))
        return metrics["loss"], metrics["gradient_norm"]

    def parameters(self) -> dict[str, np.ndarray]:
        """What trains and its moving average, which `dino_work.differences` calls student and teacher."""
        found = _arrays("student.", self.state.trainable)
        return found | (_arrays("teacher.", self.state.ema) if self.state.ema else {})

    def everything(self) -> dict[str, np.ndarray]:
        """All parameters, LoRA's factors beside the kernels."""
        return _arrays("", self.frozen) | _arrays("", self.state.trainable)


def prepare_jax(row: str, works: dict[str, Any], start: str) -> Prepared:
    """Our step; writes initial parameters and the results of the first steps to the folder `start`.

    Args:
        row: the name of the row.
        works: the fields of each row.
        start: the folder.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the GPU
    import jax
    import jax.numpy as jnp

    from benchmarks.work.jax_dino import timed

    work, folder, gpu = Row(**works[row]), Path(start, row), jax.default_backend() == "gpu"
    trainer = OurTrainer(work, work.recipe)
    folder.mkdir()
    np.savez(folder / "weights.npz", **trainer.everything())
    with jax.default_matmul_precision("highest" if gpu else None):
        results, first = first_steps(trainer, random_batch(work, work.proof_batch(gpu)))
    np.savez(folder / "ours.npz", **results)
    dtype = jnp.bfloat16 if gpu else jnp.float32
    if gpu:  # on a CPU the program of the proof is the one to be timed
        trainer, first = OurTrainer(work, work.recipe, compute_dtype=dtype), 0.0
    images, labels = random_batch(work, work.batch)
    inputs = jax.device_put((images.astype(dtype), labels))
    return timed(work, lambda: trainer.step(inputs), dtype, first)


class TorchTrainer:
    """PyTorch's training.

    Args:
        row: the model and what of it trains.
        arrays: initial parameters under our names.
        recipe: constants.
        device: where all of it lives.
        mode: "eager", or how `torch.compile` compiles model and loss.
        context: entered around the forward pass, for instance autocast.
        frozen_dtype: of the parameters that do not train; None leaves them as they are.
        part: images per forward and backward pass; None takes the whole batch.
    """

    def __init__(
        self,
        row: Row,
        arrays: Arrays,
        recipe: Recipe,
        *,
        device: str = "cpu",
        mode: str = "eager",
        context: Callable[[], AbstractContextManager] = nullcontext,
        frozen_dtype: Any = None,
        part: int | None = None,
    ):
        import torch

        self.row, self.recipe, self.mode, self.context, self.part, self.count = row, recipe, mode, context, part, 0
        self.network = _torch_network(row, recipe)
        named = {_our_name(name): parameter for name, parameter in self.network.named_parameters()}
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(torch.from_numpy(_swapped(name, arrays[name], back=True)))
        self.network.to(device)
        self.trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        for name in named.keys() - self.trained.keys():
            named[name].data = named[name].data.to(dtype=frozen_dtype)
        self.average = {name: p.detach().clone() for name, p in self.trained.items()} if row.averaged else {}
        if row.adamw:
            groups = _adamw_groups(row, recipe, self.trained)
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
        else:
            rates = {"lr": recipe.learning_rate, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
            self.optimizer = torch.optim.SGD(self.trained.values(), **rates, fused=True)
        compiled = None if mode == "default" else mode
        self.loss = self._loss if mode == "eager" else torch.compile(self._loss, mode=compiled, dynamic=False)

    def step(self, inputs: Inputs) -> tuple[Any, Any]:
        """Trains on images [batch, 3, height, width] and labels; the loss and the norm of all gradients."""
        import torch

        if self.mode != "eager":  # CUDA graphs may use the last step's memory again
            torch.compiler.cudagraph_mark_step_begin()
        batch, losses = len(inputs[0]), []
        for images, labels in zip(*(array.split(self.part or batch) for array in inputs)):
            with self.context():
                loss = self.loss(images, labels) * (len(images) / batch)
            loss.backward()
            losses.append(loss.detach())
        gradients = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            with torch.no_grad():
                decay = min(self.recipe.ema_decay, (1 + self.count) / (10 + self.count))
                torch._foreach_lerp_(list(self.average.values()), list(self.trained.values()), 1 - decay)
        self.count += 1
        return sum(losses), norm

    def parameters(self) -> dict[str, np.ndarray]:
        """As `OurTrainer.parameters`."""
        sides = {"student": self.trained, "teacher": self.average}
        return {
            f"{which}.{name}": _swapped(name, value.detach().cpu().numpy()).copy()
            for which, side in sides.items()
            for name, value in side.items()
        }

    def _loss(self, images: Any, labels: Any) -> Any:
        import torch

        with torch.set_grad_enabled(self.row.mode != "linear"):
            features = self.network["backbone"](images).last_hidden_state[:, 0]
        logits = self.network["head"](features).float()
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)


def prepare_torch(
    row: str, works: dict[str, Any], start: str, mode: str, cudnn: bool = False, part: int | None = None
) -> Prepared:
    """PyTorch's step; first it proves that its work is ours, whose side wrote its results to the folder `start`.

    On a GPU the proof is in float32, the timed step in bfloat16 autocast, with TF32 for what remains in float32.

    Args:
        row: the name of the row.
        works: the fields of each row.
        start: the folder.
        mode: "eager", or a mode of `torch.compile`.
        cudnn: attention by cuDNN where it can; otherwise as PyTorch chooses.
        part: as for `TorchTrainer`.
    """
    import torch

    from benchmarks.work.torch_dino import mixed, timed

    work, gpu, folder = Row(**works[row]), torch.cuda.is_available(), Path(start, row)
    device = "cuda" if gpu else "cpu"
    use_all_cores()
    initial, ours = (dict(np.load(folder / name)) for name in ("weights.npz", "ours.npz"))
    trainer = TorchTrainer(work, initial, work.recipe, device=device, mode="eager" if gpu else mode, part=part)
    inputs = to_torch(random_batch(work, work.proof_batch(gpu)), device)
    theirs, first = first_steps(trainer, inputs)
    same = same_work(work, initial, ours, theirs)
    if gpu:
        torch.set_float32_matmul_precision("high")
        options = {"context": partial(mixed, cudnn), "frozen_dtype": torch.bfloat16}
        trainer = TorchTrainer(work, initial, work.recipe, device=device, mode=mode, **options)
        images, labels = to_torch(random_batch(work, work.batch), device)
        inputs, first = (images.bfloat16(), labels), 0.0
    return timed(work, lambda: trainer.step(inputs), inputs[0], first, same_work=same)


def to_torch(inputs: tuple[np.ndarray, np.ndarray], device: str) -> Inputs:
    """Images as PyTorch takes them, channels last in memory, and labels."""
    import torch

    images, labels = (torch.from_numpy(array).to(device) for array in inputs)
    return images.permute(0, 3, 1, 2), labels


def _random_classifier(row: Row) -> Any:
    """Our model; no parameter has the value that training usually begins with."""
    import jax.numpy as jnp
    from flax import nnx

    from dinojax import VisionTransformer, ViTConfig
    from dinojax.finetune import ImageClassifier

    words = {name: getattr(row, name) for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    # `transformers` resizes the position table without upstream's offset; identical work includes that.
    config = ViTConfig(**words, init_values=1.0, interpolate_offset=0.0)
    rng = np.random.default_rng(0)

    def build(rngs: nnx.Rngs) -> ImageClassifier:
        return ImageClassifier(VisionTransformer(config, rngs=rngs), row.classes, rngs=rngs)

    def draw(path: tuple[Any, ...], parameter: Any) -> Any:
        noise = 0.02 * rng.standard_normal(parameter.shape, np.float32)
        return parameter.replace(jnp.asarray(noise + (path[-1] in ("scale", "gamma"))))

    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    return nnx.merge(graphdef, nnx.map_state(draw, state))


def _arrays(prefix: str, state: Any) -> dict[str, np.ndarray]:
    from flax import nnx

    flat = nnx.to_flat_state(state)
    return {prefix + ".".join(map(str, path)): np.array(parameter[...]) for path, parameter in flat}


def _torch_network(row: Row, recipe: Recipe) -> Any:
    """A backbone and a head whose values do not matter, frozen where the mode says so, with LoRA's factors."""
    import torch
    import transformers

    from benchmarks.work.torch_dino import Attention

    class OneProjection(Attention):
        def forward(self, x: torch.Tensor, *mask: Any, **options: Any) -> tuple[torch.Tensor, None]:
            return super().forward(x), None

    sizes = {"hidden_size": row.embed_dim, "num_hidden_layers": row.depth, "num_attention_heads": row.num_heads}
    sizes |= {"image_size": row.img_size, "patch_size": row.patch_size}
    backbone = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, attn_implementation="sdpa"))
    for block in backbone.encoder.layer:
        block.attention = OneProjection(row.embed_dim, row.num_heads)
    backbone.requires_grad_(row.mode in ("finetune", "llrd"))
    if row.mode == "lora":
        factor = recipe.lora_alpha / recipe.lora_rank

        def add_path(layer: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            return torch.add(output, (inputs[0] @ layer.a) @ layer.b, alpha=factor)

        for layer in [part for block in backbone.encoder.layer for part in block.attention.children()]:
            layer.a = torch.nn.Parameter(torch.zeros(layer.in_features, recipe.lora_rank))
            layer.b = torch.nn.Parameter(torch.zeros(recipe.lora_rank, layer.out_features))
            layer.register_forward_hook(add_path)
    return torch.nn.ModuleDict({"backbone": backbone, "head": torch.nn.Linear(row.embed_dim, row.classes)})


def _adamw_groups(row: Row, recipe: Recipe, trained: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameters by rate and by whether they decay, as few groups as can be: each is one fused update."""
    groups: dict[tuple[float, bool], list[Any]] = {}
    for name, parameter in trained.items():
        below = 0  # final norm and head
        if block := re.search(r"\.blocks\.(\d+)\.", name):
            below = row.depth - int(block[1])
        elif re.search(r"token$|pos_embed$|patch_embed", name):
            below = row.depth + 1
        rate = recipe.learning_rate * (recipe.layer_decay**below if row.mode == "llrd" else 1.0)
        decays = parameter.ndim > 1 and not re.search(r"token$|pos_embed$", name)
        groups.setdefault((rate, decays), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": recipe.weight_decay if decays else 0.0}
        for (rate, decays), parameters in groups.items()
    ]


def _our_name(name: str) -> str:
    for pattern, replacement in _TO_OUR_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _swapped(name: str, array: np.ndarray, *, back: bool = False) -> np.ndarray:
    """A kernel from PyTorch's order of axes to ours, or `back`; other arrays as they are."""
    if not name.endswith(".kernel"):
        return array
    axes = (2, 3, 1, 0) if array.ndim == 4 else (1, 0)
    return array.transpose(np.argsort(axes) if back else axes)
