"""The DINO training step in PyTorch, as fast as we could write it: what `benchmarks.dino_step` measures ours against.

Parameter names and numerics are the official code's. Crops of one size share a backbone pass, all crops share a head
pass, no pair of crops is formed in the loss, attention is `scaled_dot_product_attention`, AdamW is fused, clipping and
the moving averages are `_foreach` operations.

Source: "Emerging Properties in Self-Supervised Vision Transformers" (arXiv 2104.14294); facts about
facebookresearch/dino 7c446df as in `dinojax`.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.work.dino_work import (
    GLOBAL_CROPS,
    GPU_PROOF_BATCH,
    ROWS,
    Arrays,
    Model,
    Recipe,
    differences,
    first_steps,
    product_tflops,
    random_crops,
)
from benchmarks.work.paired import Prepared, warmed_up
from benchmarks.work.torch_cpu import use_all_cores


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        out = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """Attention, then an MLP with exact GELU; both after a LayerNorm, both added to their input."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


class Backbone(nn.Module):
    """A vision transformer; gives the class token after the last norm."""

    def __init__(self, model: Model):
        super().__init__()
        dim, self.side = model.embed_dim, model.img_size // model.patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, model.patch_size, model.patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, dim))
        self.blocks = nn.ModuleList(Block(dim, model.num_heads) for _ in range(model.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images)
        positions = self.positions(*patches.shape[2:])
        cls_token = (self.cls_token + positions[:, :1]).expand(len(images), -1, -1)
        x = torch.cat([cls_token, patches.flatten(2).transpose(1, 2) + positions[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position table for `rows` × `columns` patches, resized by the official scale factor (n + 0.1) / side."""
        if rows == columns == self.side:
            return self.pos_embed
        table = self.pos_embed[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / self.side, (columns + 0.1) / self.side)
        table = functional.interpolate(table, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)


class PrototypeLayer(nn.Module):
    """Products with prototypes of learned direction and fixed length."""

    def __init__(self, in_dim: int, prototypes: int):
        super().__init__()
        self.weight_v = nn.Parameter(torch.zeros(prototypes, in_dim))
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class Head(nn.Module):
    """Three linear layers with GELU in between, unit length, prototypes."""

    def __init__(self, model: Model):
        super().__init__()
        hidden, bottleneck = model.hidden_dim, model.bottleneck_dim
        layers = nn.Linear(model.embed_dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)
        self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        self.last_layer = PrototypeLayer(bottleneck, model.prototypes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(functional.normalize(self.mlp(x), dim=-1))


class MultiCrop(nn.Module):
    """Backbone and head on groups of crops, one backbone pass a group and one head pass for all."""

    def __init__(self, model: Model):
        super().__init__()
        self.backbone, self.head = Backbone(model), Head(model)

    def forward(self, groups: Sequence[Tensor]) -> Tensor:
        return self.head(torch.cat([self.backbone(group) for group in groups]))


class Trainer:
    """Student, teacher, center and optimiser; `step` is one step of training.

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
        recipe: Recipe,
        *,
        device: str = "cpu",
        mode: str = "eager",
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.recipe, self.context, self.mode, self.count = recipe, context, mode, 0
        self.student = MultiCrop(model)
        state = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        self.student.to(dtype=next(iter(state.values())).dtype).load_state_dict(state)
        self.student.to(device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.center = torch.zeros(model.prototypes, device=device, dtype=self.student.backbone.cls_token.dtype)
        self.trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        decayed = [p for name, p in self.trained.items() if p.ndim > 1 and not name.endswith(".bias")]
        vectors = [p for name, p in self.trained.items() if p.ndim <= 1 or name.endswith(".bias")]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
        compiled = None if mode == "default" else mode
        self.forward = self._forward if mode == "eager" else torch.compile(self._forward, mode=compiled, dynamic=False)

    def step(self, groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Trains on groups of crops, the global ones first, each [crops · batch, 3, height, width]; crops outermost.

        Returns the loss and the norm of all gradients before clipping.
        """
        recipe = self.recipe
        if self.mode != "eager":  # CUDA graphs may use the last step's memory again
            torch.compiler.cudagraph_mark_step_begin()
        with self.context():
            loss, mean_logits = self.forward(groups)
        loss.backward()
        norm = self._clip()
        if self.count < recipe.freeze_last_layer_steps:
            self.student.head.last_layer.weight_v.grad = None
        for group in self.optimizer.param_groups:
            group["lr"] = self._cosine(recipe.learning_rate, recipe.min_learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            moved = 1 - self._cosine(recipe.teacher_momentum, 1.0)
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), moved)
            self.center.lerp_(mean_logits.to(self.center.dtype), 1 - recipe.center_momentum)
        self.count += 1
        return loss.detach(), norm

    def parameters(self) -> dict[str, np.ndarray]:
        """Student, teacher and center as `dino_work.differences` takes them."""
        found = {"center": self.center}
        for which in ("student", "teacher"):
            found |= {f"{which}.{name}": value for name, value in getattr(self, which).state_dict().items()}
        return {name: value.cpu().numpy().copy() for name, value in found.items()}

    def _forward(self, groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss and the teacher's mean logits."""
        precise = self.center.dtype
        with torch.no_grad():
            teacher = self.teacher(groups[:1]).to(precise).unflatten(0, (GLOBAL_CROPS, -1))
            probs = functional.softmax((teacher - self.center) / self.recipe.teacher_temp, dim=-1)
        student = self.student(groups).to(precise).unflatten(0, (-1, probs.shape[1]))
        logs = functional.log_softmax(student / self.recipe.student_temp, dim=-1)
        # All pairs at once, less each global crop with itself.
        agreement = (probs.sum(0) * logs.sum(0)).sum() - (probs * logs[:GLOBAL_CROPS]).sum()
        return -agreement / (GLOBAL_CROPS * (len(logs) - 1) * probs.shape[1]), teacher.mean((0, 1))

    @torch.no_grad()
    def _clip(self) -> Tensor:
        gradients = [p.grad for p in self.trained.values()]
        norms = torch._foreach_norm(gradients)
        total = torch.stack(norms).norm()
        factors = torch._foreach_add(norms, 1e-6)
        torch._foreach_reciprocal_(factors)
        torch._foreach_mul_(factors, self.recipe.clip_norm)
        torch._foreach_clamp_max_(factors, 1.0)
        torch._foreach_mul_(gradients, factors)
        return total

    def _cosine(self, first: float, last: float) -> float:
        return last + 0.5 * (first - last) * (1 + math.cos(math.pi * self.count / self.recipe.total_steps))


def prepare(row: str, start: str, mode: str, cudnn: bool = False) -> Prepared:
    """PyTorch's step; first it proves that its work is ours, whose side wrote its results to the folder `start`.

    On a GPU the proof is in float32, the timed step in bfloat16 autocast, with TF32 for what remains in float32.

    Args:
        row: of `dino_work.ROWS`.
        start: the folder.
        mode: "eager", or a mode of `torch.compile`.
        cudnn: attention by cuDNN where it can; otherwise as PyTorch chooses.
    """
    work, gpu, folder = ROWS[row], torch.cuda.is_available(), Path(start)
    device = "cuda" if gpu else "cpu"
    use_all_cores()
    initial, ours = (dict(np.load(folder / name)) for name in ("weights.npz", "ours.npz"))
    trainer = Trainer(work.model, initial, Recipe(), device=device, mode="eager" if gpu else mode)
    crops = to_torch(random_crops(work, GPU_PROOF_BATCH if gpu else work.batch), device)
    theirs, first = first_steps(trainer, crops)
    same = differences(initial, ours, theirs)
    if gpu:
        torch.set_float32_matmul_precision("high")
        trainer = Trainer(work.model, initial, Recipe(), device=device, mode=mode, context=partial(mixed, cudnn))
        crops = [group.bfloat16() for group in to_torch(random_crops(work, work.batch), device)]
        first = 0.0
    return timed(work, lambda: trainer.step(crops), crops[0], first, same_work=same)


def timed(work: Any, run: Callable[[], Any], like: Tensor, first: float, **info: Any) -> Prepared:
    """`run`, warmed up, beside the rate of products on the device of `like`; `first` as in `jax_dino.timed`."""
    left, right = (torch.randn(shape, device=like.device, dtype=like.dtype) for shape in work.product)

    def finished(function: Callable[[], Any]) -> None:
        function()
        if like.is_cuda:
            torch.cuda.synchronize()

    rate = product_tflops(work, lambda: finished(lambda: left @ right))
    prepared = warmed_up(lambda: finished(run), matmul_tflops=rate, **info)
    if like.is_cuda:
        prepared.info["gpu_peak_mib"] = torch.cuda.max_memory_allocated() >> 20
    return dataclasses.replace(prepared, compile_seconds=max(prepared.compile_seconds, first - prepared.unit_seconds))


def to_torch(groups: Sequence[np.ndarray], device: str) -> list[Tensor]:
    """Groups [crops, batch, height, width, 3] as PyTorch takes them, channels last in memory."""
    return [torch.from_numpy(group).flatten(0, 1).permute(0, 3, 1, 2).to(device) for group in groups]


def mixed(cudnn: bool) -> AbstractContextManager:
    """Autocast to bfloat16; with `cudnn`, attention by cuDNN first."""
    stack = ExitStack()
    stack.enter_context(torch.autocast("cuda", torch.bfloat16))
    if cudnn:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        stack.enter_context(sdpa_kernel(backends, set_priority=True))
    return stack
