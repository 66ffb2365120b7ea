"""The parts of a vision transformer: patch embedding, attention, feed-forward, LayerScale, drop path, block.

Parameter paths are upstream's (`attn.qkv.kernel`, `mlp.fc1.bias`, `ls1.gamma`, …). Every layer computes in the dtype
of its parameters, except LayerNorm statistics and the softmax, which use float32 at least.

Source: facebookresearch/dino 7c446df `vision_transformer.py`, facebookresearch/dinov2 b8931f7 `dinov2/layers/`; for
DINOv3 `modeling_dinov3_vit.py` of Hugging Face's transformers 5.24.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, Key

from dinojax.models.norm import LayerNorm
from dinojax.models.rope import Rotation, rotate
from dinojax.precision import at_least_float32

# Upstream truncates at ±2, a hundred standard deviations away, so the plain normal distribution is the same.
_linear_init = nnx.initializers.normal(0.02)

AnyModule = TypeVar("AnyModule", bound=nnx.Module)


class Module(nnx.Module):
    """A Flax module whose constructor `inspect.signature` and `help` can read; Flax's metaclass hides it from them."""

    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        signature = inspect.signature(cls.__init__)
        cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def astype(self: AnyModule, dtype: DTypeLike) -> AnyModule:
        """A copy with parameters of another dtype, in which it computes; jnp.bfloat16 suits GPUs and TPUs."""
        graphdef, state = nnx.split(self)
        return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), state))


class Linear(nnx.Linear):
    """A linear layer on the last axis; the other axes are merged for the product.

    XLA:CPU has no fast product for the gradient of a weight over several axes: merged, attention trains three times as
    fast.
    """

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        super().__init__(in_features, out_features, use_bias=use_bias, kernel_init=_linear_init, rngs=rngs)

    def __call__(  # type: ignore[override]
        self, x: Float[Array | np.ndarray, "*batch in_dim"]
    ) -> Float[Array, "*batch out_dim"]:
        return super().__call__(jnp.asarray(x).reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.out_features)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact GELU through erf, as in torch; on XLA:CPU it takes half the time of erfc in `jax.nn.gelu`."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def torch_default_init(fan_in: int) -> Callable[..., Array]:
    """torch's default initialiser for convolutions, bare weights and their biases: uniform within ±1/√fan_in."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32, *_: jax.random.uniform(key, shape, dtype, -bound, bound)


class PatchEmbed(Module):
    """Cuts images into patches and projects each one linearly; pixels beyond the last whole patch are dropped."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, *, rngs: nnx.Rngs):
        self.patch_size = patch_size
        init = torch_default_init(in_chans * patch_size**2)
        size = (patch_size, patch_size)
        self.proj = nnx.Conv(in_chans, embed_dim, size, strides=size, kernel_init=init, bias_init=init, rngs=rngs)

    def __call__(
        self, images: Float[Array | np.ndarray, "batch height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        batch, height, width, channels = images.shape
        patch, rows, columns = self.patch_size, height // self.patch_size, width // self.patch_size
        assert self.proj.bias is not None
        kernel, bias = self.proj.kernel[...], self.proj.bias[...]
        # The stride of the convolution is its size, so one matrix product does it, faster on every backend.
        patches = jnp.asarray(images)[:, : rows * patch, : columns * patch].astype(kernel.dtype)
        patches = patches.reshape(batch, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(batch * rows * columns, patch * patch * channels)
        tokens = patches @ kernel.reshape(-1, kernel.shape[-1]) + bias[None]
        return tokens.reshape(batch, rows * columns, -1)


class QueryValueBias(Linear):
    """The fused projection to queries, keys and values (3·dim) with a bias "2·dim" of queries and values alone.

    Official files of DINOv3 hold zeros for the keys, and a mask that keeps them zero. Here these numbers do not exist:
    rotated keys would feel a bias, and no gradient, decay or average can move what is not there.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        super().__init__(dim, 3 * dim, use_bias=True, rngs=rngs)
        assert self.bias is not None
        self.bias = nnx.Param(self.bias[: 2 * dim])

    def __call__(  # type: ignore[override]
        self, x: Float[Array | np.ndarray, "*batch in_dim"]
    ) -> Float[Array, "*batch out_dim"]:
        assert self.bias is not None
        query, value = jnp.split(self.bias[...], 2)
        products = jnp.asarray(x).reshape(-1, x.shape[-1]) @ self.kernel[...]
        bias = jnp.concatenate([query, jnp.zeros_like(query), value])
        return (products + bias[None]).reshape(*x.shape[:-1], self.out_features)


class Attention(Module):
    """Multi-head self-attention; the fused projection is laid out (3, heads, head_dim) as upstream.

    With a rotation, queries and keys are rotated by it before their products (`dinojax.models.rope`).
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, key_bias: bool = True, rngs: nnx.Rngs):
        self.num_heads = num_heads
        masked = qkv_bias and not key_bias
        self.qkv = QueryValueBias(dim, rngs=rngs) if masked else Linear(dim, 3 * dim, use_bias=qkv_bias, rngs=rngs)
        self.proj = Linear(dim, dim, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch tokens dim"], rotation: Rotation | None = None
    ) -> Float[Array, "batch tokens dim"]:
        query, key, value = self._heads(x)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        scores = _scores(query, key)
        # Dividing after the product with the values touches head_dim numbers per query instead of `tokens`.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value)
        out = (out / weights.sum(-1, keepdims=True)).astype(x.dtype)
        return self.proj(out.transpose(0, 2, 1, 3).reshape(x.shape))

    def probs(
        self, x: Float[Array, "batch tokens dim"], rotation: Rotation | None = None
    ) -> Float[Array, "batch heads tokens tokens"]:
        """The attention probabilities; each row (a query) sums to one."""
        query, key, _ = self._heads(x)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return jax.nn.softmax(_scores(query, key), axis=-1).astype(x.dtype)

    def keys(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        """The keys of all heads, side by side."""
        return self._heads(x)[1].transpose(0, 2, 1, 3).reshape(x.shape)

    def _heads(self, x: Array) -> Array:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        return qkv.transpose(2, 0, 3, 1, 4)


def _scores(query: Array, key: Array) -> Array:
    """Scaled products of every query with every key, in float32 at least."""
    scale = query.shape[-1] ** -0.5
    dtype = at_least_float32(query.dtype)
    return jnp.einsum("bhqd,bhkd->bhqk", query * scale, key, preferred_element_type=dtype)


class Mlp(Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(dim, hidden_dim, rngs=rngs)
        self.fc2 = Linear(hidden_dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return self.fc2(gelu(self.fc1(x)))


class SwiGLUFFN(Module):
    """SiLU-gated feed-forward network with a fused input projection: w3(silu(x1) · x2) for x1, x2 = w12(x)."""

    def __init__(self, dim: int, hidden_dim: int, *, rngs: nnx.Rngs):
        self.w12 = Linear(dim, 2 * hidden_dim, rngs=rngs)
        self.w3 = Linear(hidden_dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        gate, value = jnp.split(self.w12(x), 2, axis=-1)
        return self.w3(jax.nn.silu(gate) * value)


def swiglu_hidden_dim(dim: int, mlp_ratio: float) -> int:
    """Width of upstream's `swiglufused`: two thirds of the MLP's, rounded up to a multiple of 8."""
    return (int(int(dim * mlp_ratio) * 2 / 3) + 7) // 8 * 8


class LayerScale(Module):
    """A learned factor per channel on a residual branch."""

    def __init__(self, dim: int, init_value: float):
        # With a dtype: a weakly typed parameter would turn strong in the first step, and the second compile again.
        self.gamma = nnx.Param(jnp.full((dim,), init_value, dtype=float))

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return x * self.gamma[...][None, None]


def drop_path(
    x: Float[Array, "batch *rest"],
    rate: float,
    key: Key[Array, ""] | None,
    order: Int[np.ndarray, " batch"] | None = None,
) -> Float[Array, "batch *rest"]:
    """Zeroes whole samples with probability `rate` and rescales the others; without a key, returns `x` unchanged.

    `order` is the place of each sample in the order of the draws, if that is another one.
    """
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    keep = keep if order is None else keep[order]
    return jnp.where(keep, x / (1 - rate), 0)


def add_branch(
    x: Float[Array, "batch *rest"],
    norm: LayerNorm,
    branch: Callable[[Array], Array],
    rate: float,
    key: Key[Array, ""] | None,
    *,
    drop_subsets: bool = False,
    drop_order: Int[np.ndarray, " batch"] | None = None,
) -> Float[Array, "batch *rest"]:
    """x + branch(norm(x)) with drop path: of each sample on its own, or of all samples but a random subset.

    With `drop_subsets` the branch is computed only for batch · (1 - rate) samples, at least one, drawn without
    repetition, and rescaled: what is dropped is not computed. With a `drop_order` (see `drop_path`) it is computed and
    multiplied by zero. Without a key, or at rate 0, nothing is dropped.

    Source: facebookresearch/dinov2 b8931f7 `dinov2/layers/block.py`, `drop_add_residual_stochastic_depth`.
    """
    if not drop_subsets or key is None or rate == 0:
        x, normed = norm.branch(x)
        return x + drop_path(branch(normed), rate, key, drop_order)
    batch = len(x)
    kept = max(int(batch * (1 - rate)), 1)
    rows = jax.random.permutation(key, batch)[:kept]
    if drop_order is not None:
        factors = jnp.zeros(batch, x.dtype).at[rows].set(batch / kept)[drop_order]
        return x + branch(norm(x)) * factors.reshape(batch, *[1] * (x.ndim - 1))
    return x.at[rows].add(branch(norm(x[rows])) * (batch / kept), unique_indices=True)


class Block(Module):
    """Pre-norm transformer block: attention, then feed-forward, each with optional LayerScale and drop path."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        qkv_bias: bool,
        ffn_layer: str,
        init_values: float | None,
        drop_path_rate: float,
        key_bias: bool = True,
        layer_norm_eps: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate = drop_path_rate
        self.norm1 = LayerNorm(dim, epsilon=layer_norm_eps, rngs=rngs)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, key_bias=key_bias, rngs=rngs)
        self.norm2 = LayerNorm(dim, epsilon=layer_norm_eps, rngs=rngs)
        self.mlp: Mlp | SwiGLUFFN
        if ffn_layer == "mlp":
            self.mlp = Mlp(dim, int(dim * mlp_ratio), rngs=rngs)
        else:
            self.mlp = SwiGLUFFN(dim, swiglu_hidden_dim(dim, mlp_ratio), rngs=rngs)
        self.ls1 = None if init_values is None else LayerScale(dim, init_values)
        self.ls2 = None if init_values is None else LayerScale(dim, init_values)

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        rotation: Rotation | None = None,
        *,
        key: Key[Array, ""] | None = None,
        drop_subsets: bool = False,
        drop_order: Int[np.ndarray, " batch"] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        attn_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        add: Callable[..., Array] = functools.partial(
            add_branch, rate=self.drop_path_rate, drop_subsets=drop_subsets, drop_order=drop_order
        )
        x = add(x, self.norm1, lambda x: _scaled(self.ls1, self.attn(x, rotation)), key=attn_key)
        return add(x, self.norm2, lambda x: _scaled(self.ls2, self.mlp(x)), key=mlp_key)

    def attention_probs(
        self, x: Float[Array, "batch tokens dim"], rotation: Rotation | None = None
    ) -> Float[Array, "batch heads tokens tokens"]:
        """The attention probabilities of this block for the input `x`; each row (a query) sums to one."""
        return self.attn.probs(self.norm1(x), rotation)

    def attention_keys(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        """The keys of this block's attention for the input `x`, of all heads side by side."""
        return self.attn.keys(self.norm1(x))


def _scaled(scale: LayerScale | None, x: Array) -> Array:
    return x if scale is None else scale(x)
