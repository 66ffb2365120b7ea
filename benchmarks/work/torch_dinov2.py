"""The DINOv2 training step in PyTorch, as fast as we could write it: what `benchmarks.dino_step` measures ours against.

Global and local crops have a backbone pass each. Masked patches are gathered by their indices, which come with the
batch, before the head; one head pass takes them and all class tokens. Attention is `scaled_dot_product_attention`,
AdamW is fused, clipping and the moving average are `_foreach` operations.

Source: "DINOv2: Learning Robust Visual Features without Supervision" (arXiv 2304.07193); facts about
facebookresearch/dinov2 b8931f7 as in `dinojax`.
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from benchmarks.work.dino_work import (
    GLOBAL_CROPS,
    GPU_PROOF_BATCH,
    Arrays,
    Model,
    differences,
    first_steps,
    random_crops,
)
from benchmarks.work.dinov2_work import DINOV2_ROWS, LAYER_SCALE, DINOv2Recipe, random_masks
from benchmarks.work.paired import Prepared
from benchmarks.work.torch_cpu import use_all_cores
from benchmarks.work.torch_dino import Backbone, Block, Head, mixed, timed, to_torch

FIRST_LAYER = ("cls_token", "pos_embed", "mask_token", "patch_embed")
SINKHORN_ITERATIONS = 3


class Masked(NamedTuple):
    """Masks of the global crops, as a data loader hands them over."""

    masks: Tensor
    """Bool [crops · batch, patches]; the mask token replaces these patches."""
    places: Tensor
    """Where the masked patches are among all patches of the global crops."""
    weights: Tensor
    """1 / (masked patches of the image), for each masked patch."""


class LayerScale(nn.Module):
    """Multiplies every channel with a learned factor."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ScaledBlock(Block):
    """A block with LayerScale after attention and after the MLP."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x)))))


class MaskedBackbone(Backbone):
    """A vision transformer whose masked patches are a learned token; gives all tokens after the last norm."""

    def __init__(self, model: Model):
        super().__init__(model)
        self.mask_token = nn.Parameter(torch.zeros(1, model.embed_dim))
        self.blocks = nn.ModuleList(ScaledBlock(model.embed_dim, model.num_heads) for _ in range(model.depth))

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        patches = self.patch_embed["proj"](images)
        positions = self.positions(*patches.shape[2:])
        patches = patches.flatten(2).transpose(1, 2)
        if masks is not None:
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        cls_token = (self.cls_token + positions[:, :1]).expand(len(images), -1, -1)
        x = torch.cat([cls_token, patches + positions[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return x

    def class_tokens(self, images: Tensor) -> Tensor:
        """Of crops whose patches nobody asks for."""
        return self.norm(self(images)[:, 0])

    def tokens(self, images: Tensor, masked: Masked, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Class tokens, and the tokens of masked patches."""
        x = self.norm(self(images, masks))
        return x[:, 0], x[:, 1:].flatten(0, 1).index_select(0, masked.places)


class Network(nn.Module):
    """A backbone, and a head for class tokens and masked patches."""

    def __init__(self, model: Model):
        super().__init__()
        self.backbone, self.dino_head = MaskedBackbone(model), Head(model)
        self.dino_head.last_layer.weight_g.requires_grad_(True)


class DINOv2Trainer:
    """Student, teacher and optimiser; `step` is one step of training.

    Args:
        model: the architecture.
        arrays: initial parameters under official names.
        recipe: schedules and constants.
        device: where all of it lives.
        mode: "eager", or how `torch.compile` compiles student, teacher and loss.
        context: entered around the forward pass, for instance autocast.
    """

    def __init__(
        self,
        model: Model,
        arrays: Arrays,
        recipe: DINOv2Recipe,
        *,
        device: str = "cpu",
        mode: str = "eager",
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.recipe, self.context, self.mode, self.count = recipe, context, mode, 0
        self.student = Network(model)
        state = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        self.precise = next(iter(state.values())).dtype
        self.student.to(dtype=self.precise).load_state_dict(state)
        self.student.to(device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.student, recipe, model.depth), lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True
        )
        compiled = None if mode == "default" else mode
        self.forward = self._forward if mode == "eager" else torch.compile(self._forward, mode=compiled, dynamic=False)

    def step(self, inputs: tuple[Sequence[Tensor], Masked]) -> tuple[Tensor, Tensor]:
        """Trains on global and local crops, each [crops · batch, 3, height, width] with crops outermost, and masks.

        Returns the loss and the norm of all gradients before clipping.
        """
        recipe = self.recipe
        if self.mode != "eager":  # CUDA graphs may use the last step's memory again
            torch.compiler.cudagraph_mark_step_begin()
        with self.context():
            loss = self.forward(*inputs[0], inputs[1])
        loss.backward()
        parts = self.student.backbone, self.student.dino_head
        norms = [clip_grad_norm_(part.parameters(), recipe.clip_norm, foreach=True) for part in parts]
        rate = self._cosine(recipe.learning_rate, recipe.min_learning_rate)
        decay = self._cosine(recipe.weight_decay, recipe.last_weight_decay)
        for group in self.optimizer.param_groups:
            frozen = group["last_layer"] and self.count < recipe.freeze_last_layer_steps
            group["lr"] = 0.0 if frozen else rate * group["rate_factor"]
            group["weight_decay"] = decay * group["decays"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            moved = 1 - self._cosine(recipe.teacher_momentum, 1.0)
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), moved)
        self.count += 1
        return loss.detach(), torch.stack(norms).norm()

    def parameters(self) -> dict[str, np.ndarray]:
        """Student and teacher as `dino_work.differences` takes them."""
        found = {}
        for which in ("student", "teacher"):
            found |= {f"{which}.{name}": value for name, value in getattr(self, which).state_dict().items()}
        return {name: value.cpu().numpy().copy() for name, value in found.items()}

    def _forward(self, global_crops: Tensor, local_crops: Tensor, masked: Masked) -> Tensor:
        """The loss."""
        recipe, images = self.recipe, len(global_crops) // GLOBAL_CROPS
        with torch.no_grad():
            tokens, patches = self.teacher.backbone.tokens(global_crops, masked)
            logits = self.teacher.dino_head(torch.cat([tokens, patches])).to(self.precise)
            of_classes, of_patches = logits.split([len(tokens), len(patches)])
            targets = sinkhorn_knopp(of_classes, recipe.teacher_temp).unflatten(0, (GLOBAL_CROPS, images))
            patch_targets = sinkhorn_knopp(of_patches, recipe.teacher_temp)
        tokens, patches = self.student.backbone.tokens(global_crops, masked, masked.masks)
        others = self.student.backbone.class_tokens(local_crops)
        logits = self.student.dino_head(torch.cat([tokens, others, patches])).to(self.precise)
        logs = functional.log_softmax(logits / recipe.student_temp, dim=-1)
        of_classes, of_patches = logs.split([len(tokens) + len(others), len(patches)])
        of_classes = of_classes.unflatten(0, (-1, images))
        # All pairs at once, less each global crop with itself.
        agreement = (targets.sum(0) * of_classes.sum(0)).sum() - (targets * of_classes[:GLOBAL_CROPS]).sum()
        class_loss = -agreement / (GLOBAL_CROPS * (len(of_classes) - 1) * images)
        patch_loss = -((patch_targets * of_patches).sum(-1) * masked.weights).sum() / len(global_crops)
        koleo = koleo_loss(tokens.to(self.precise).unflatten(0, (GLOBAL_CROPS, images)))
        return class_loss + recipe.koleo_weight * koleo + recipe.patch_weight * patch_loss

    def _cosine(self, first: float, last: float) -> float:
        return last + 0.5 * (first - last) * (1 + math.cos(math.pi * self.count / self.recipe.total_steps))


def parameter_groups(student: Network, recipe: DINOv2Recipe, depth: int) -> list[dict[str, Any]]:
    """Parameters with the same factor of the learning rate, with or without decay, the head's last layer apart."""
    groups: dict[tuple[float, bool, bool], list[Tensor]] = {}
    for name, parameter in student.named_parameters():
        part, first, *rest = name.split(".")
        factor = 1.0
        if part == "backbone" and first == "blocks":
            factor = recipe.layer_decay ** (depth - int(rest[0]))
        elif part == "backbone" and first in FIRST_LAYER:
            factor = recipe.layer_decay ** (depth + 1)
            factor *= recipe.patch_embed_factor if first == "patch_embed" else 1.0
        decays = not (name.endswith((".bias", ".gamma")) or "norm" in name)
        groups.setdefault((factor, decays, first == "last_layer"), []).append(parameter)
    names = "rate_factor", "decays", "last_layer"
    return [{"params": parameters} | dict(zip(names, key)) for key, parameters in groups.items()]


def sinkhorn_knopp(logits: Tensor, temperature: float) -> Tensor:
    """Balanced probabilities; logits are cosines times lengths near one, so that no exponential overflows."""
    probs = torch.exp(logits / temperature)
    for _ in range(SINKHORN_ITERATIONS):
        probs.div_(probs.sum(0, keepdim=True))
        probs.div_(probs.sum(1, keepdim=True))
    return probs


def koleo_loss(tokens: Tensor) -> Tensor:
    """The mean of -log of the distance to the nearest neighbour, for tokens [crops, images, dim]; summed over crops."""
    with torch.autocast(tokens.device.type, enabled=False):
        unit = functional.normalize(tokens, dim=-1, eps=1e-8)
        with torch.no_grad():
            similarity = unit @ unit.mT
            similarity.diagonal(dim1=1, dim2=2).fill_(-math.inf)
            neighbours = similarity.argmax(-1, keepdim=True)
        nearest = unit.gather(1, neighbours.expand(-1, -1, unit.shape[-1]))
        distances = functional.pairwise_distance(unit, nearest, eps=1e-8)
        return -(distances + 1e-8).log().mean(1).sum()


def to_masked(masks: np.ndarray, device: str, dtype: torch.dtype = torch.float32) -> Masked:
    """What a data loader makes of masks bool[2, batch, patches]."""
    flat = torch.from_numpy(masks).flatten(0, 1)
    weights = (1 / flat.sum(1, dtype=dtype).clamp(min=1))[:, None].expand_as(flat)[flat]
    return Masked(*(x.to(device) for x in (flat, flat.flatten().nonzero()[:, 0], weights)))


def prepare(row: str, start: str, mode: str, cudnn: bool = False) -> Prepared:
    """PyTorch's step; first it proves that its work is ours, as `torch_dino.prepare` does.

    Args:
        row: of `dinov2_work.DINOV2_ROWS`.
        start: the folder where our side wrote its results.
        mode: "eager", or a mode of `torch.compile`.
        cudnn: attention by cuDNN where it can; otherwise as PyTorch chooses.
    """
    work, gpu, folder = DINOV2_ROWS[row], torch.cuda.is_available(), Path(start)
    device = "cuda" if gpu else "cpu"
    use_all_cores()
    initial, ours = (dict(np.load(folder / name)) for name in ("weights.npz", "ours.npz"))

    def inputs(batch: int, dtype: torch.dtype) -> tuple[list[Tensor], Masked]:
        crops = [group.to(dtype) for group in to_torch(random_crops(work, batch), device)]
        return crops, to_masked(random_masks(work, batch), device)

    trainer = DINOv2Trainer(work.model, initial, DINOv2Recipe(), device=device, mode="eager" if gpu else mode)
    batch = inputs(GPU_PROOF_BATCH if gpu else work.batch, torch.float32)
    theirs, first = first_steps(trainer, batch)
    same = differences(initial, ours, theirs)
    if gpu:
        torch.set_float32_matmul_precision("high")
        context = partial(mixed, cudnn)
        trainer = DINOv2Trainer(work.model, initial, DINOv2Recipe(), device=device, mode=mode, context=context)
        batch, first = inputs(work.batch, torch.bfloat16), 0.0
    return timed(work, lambda: trainer.step(batch), batch[0][0], first, same_work=same)
