"""dinojax models → ONNX graphs, written node by node: a ViT needs few kinds of them.

Images are "batch channels height width", as ONNX models take them; the batch is free, the size is fixed. Tensors have
the names of Hugging Face's files; weights of linear layers are transposed, and their names end in ".T".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from converters.exports.outputs import shapes
from converters.huggingface.names import hugging_face_name, to_hugging_face
from converters.weight_files.optional import import_onnx
from dinojax.models.config import ViTConfig
from dinojax.models.vit import VisionTransformer

INPUT = "pixel_values"
_OPSET = 17  # the first with LayerNormalization
_IR_VERSION = 8


def onnx_model(model: VisionTransformer, state: Mapping[str, np.ndarray], size: int, outputs: Sequence[str]) -> Any:
    """The `onnx.ModelProto` of a model.

    Args:
        model: of any architecture, with parameters of float32.
        state: the result of `to_torch(model)`.
        size: side in pixels of the square images.
        outputs: names among "cls", "patches" and "attention".

    Raises:
        UserError: the package onnx is missing.
    """
    onnx = import_onnx()
    graph = _Graph(onnx, model.config, {**to_hugging_face(state, model.config.family), **_positions(model, size)})
    _write(graph, size, outputs)
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    axes = shapes(model, size, outputs)
    proto = helper.make_graph(
        graph.nodes,
        "dinojax",
        [helper.make_tensor_value_info(INPUT, number, ["batch", model.config.in_chans, size, size])],
        [helper.make_tensor_value_info(name, number, shape) for name, shape in axes.items()],
        initializer=[onnx.numpy_helper.from_array(array, name) for name, array in graph.tensors.items()],
    )
    opsets = [helper.make_opsetid("", _OPSET)]
    made = helper.make_model(proto, producer_name="dinojax", opset_imports=opsets, ir_version=_IR_VERSION)
    onnx.checker.check_model(made, full_check=True)
    return made


def _positions(model: VisionTransformer, size: int) -> dict[str, np.ndarray]:
    """The position table for images of this size, or DINOv3's factors of the rotation, one column for all heads."""
    rotation = model.rotation(size, size)
    if rotation is None:
        return {"embeddings.position_embeddings": np.asarray(model.interpolated_pos_embed(size, size), np.float32)}
    return {name: np.asarray(x, np.float32)[:, None] for name, x in zip(_ROTATION, rotation)}


_ROTATION = ("rotation_cos", "rotation_sin")


class _Graph:
    """Nodes and tensors in the order in which they are added; every method returns the name of its result."""

    def __init__(self, onnx: Any, config: ViTConfig, state: Mapping[str, np.ndarray]):
        self.onnx, self.config, self._state = onnx, config, state
        self.nodes: list[Any] = []
        self.tensors: dict[str, np.ndarray] = {}

    def add(self, kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        """A node; `name` is that of its result too."""
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        """A tensor that is no parameter."""
        self.tensors[name] = np.asarray(value, dtype)
        return name

    def parameter(self, name: str) -> str:
        """A parameter by its official name."""
        name = hugging_face_name(name, self.config.family)
        self.tensors[name] = np.ascontiguousarray(self._state[name], np.float32)
        return name

    def has(self, name: str) -> bool:
        """Whether the model has the parameter with this official name."""
        return hugging_face_name(name, self.config.family) in self._state

    def linear(self, x: str, layer: str) -> str:
        """x · weightᵀ + bias."""
        weight = hugging_face_name(f"{layer}.weight", self.config.family)
        path = f"/{weight.removesuffix('.weight').replace('.', '/')}"
        self.tensors[f"{weight}.T"] = np.ascontiguousarray(self._state[weight].T, np.float32)
        product = self.add("MatMul", x, f"{weight}.T", name=f"{path}/MatMul")
        if not self.has(f"{layer}.bias"):
            return product
        return self.add("Add", product, self.parameter(f"{layer}.bias"), name=f"{path}/Add")

    def norm(self, x: str, layer: str) -> str:
        """LayerNorm over the last axis."""
        pair = (self.parameter(f"{layer}.weight"), self.parameter(f"{layer}.bias"))
        return self.add("LayerNormalization", x, *pair, name=f"/{layer}", axis=-1, epsilon=self.config.layer_norm_eps)


def _write(graph: _Graph, size: int, outputs: Sequence[str]) -> None:
    config = graph.config
    side = size // config.patch_size
    first_patch = 1 + config.num_register_tokens
    tokens = first_patch + side * side
    x, probabilities = _embed(graph, side * side), ""
    for index in range(config.depth):
        block = f"blocks.{index}"
        attended, probabilities = _attention(graph, graph.norm(x, f"{block}.norm1"), block, tokens)
        x = graph.add("Add", x, _scaled(graph, attended, f"{block}.ls1"), name=f"/{block}/residual1")
        hidden = _feed_forward(graph, graph.norm(x, f"{block}.norm2"), block)
        x = graph.add("Add", x, _scaled(graph, hidden, f"{block}.ls2"), name=f"/{block}/residual2")
    x = graph.norm(x, "norm")
    if "cls" in outputs:
        graph.add("Gather", x, graph.constant("first", 0), name="cls", axis=1)
    if "patches" in outputs:
        graph.add("Slice", x, *_range(graph, "patch_tokens", first_patch, tokens, axis=1), name="patches")
    if "attention" in outputs:
        row = graph.add("Slice", probabilities, *_range(graph, "cls_row", 0, 1, axis=2), name="/cls_row")
        row = graph.add(
            "Slice", row, *_range(graph, "patch_columns", first_patch, tokens, axis=3), name="/patch_columns"
        )
        shape = graph.constant("attention_shape", [0, config.num_heads, side, side])
        graph.add("Reshape", row, shape, name="attention")


def _embed(graph: _Graph, patches: int) -> str:
    """Patches, CLS in front, positions, registers behind CLS."""
    config, dim = graph.config, graph.config.embed_dim
    kernel = [config.patch_size] * 2
    filters = (graph.parameter("patch_embed.proj.weight"), graph.parameter("patch_embed.proj.bias"))
    x = graph.add("Conv", INPUT, *filters, name="/patch_embed", kernel_shape=kernel, strides=kernel)
    x = graph.add("Reshape", x, graph.constant("patches_shape", [0, dim, patches]), name="/patches")
    x = graph.add("Transpose", x, name="/patch_tokens", perm=[0, 2, 1])
    count = graph.add("Shape", x, name="/batch", start=0, end=1)

    def repeated(name: str, length: int) -> str:
        rest = graph.constant(f"{name}_shape", [length, dim])
        shape = graph.add("Concat", count, rest, name=f"/{name}_shape", axis=0)
        return graph.add("Expand", graph.parameter(name), shape, name=f"/{name}")

    x = graph.add("Concat", repeated("cls_token", 1), x, name="/with_cls", axis=1)
    if config.rope_base is None:
        x = graph.add("Add", x, graph.parameter("pos_embed"), name="/with_positions")
    if not config.num_register_tokens:
        return x
    cls_token = graph.add("Slice", x, *_range(graph, "cls_part", 0, 1, axis=1), name="/cls_part")
    rest = graph.add("Slice", x, *_range(graph, "patch_part", 1, 1 + patches, axis=1), name="/patch_part")
    registers = repeated("register_tokens", config.num_register_tokens)
    return graph.add("Concat", cls_token, registers, rest, name="/with_registers", axis=1)


def _attention(graph: _Graph, x: str, block: str, tokens: int) -> tuple[str, str]:
    """Self-attention, and its probabilities."""
    config = graph.config
    channels = config.embed_dim // config.num_heads
    split = graph.constant("heads_shape", [0, tokens, config.num_heads, channels])

    def heads(part: str, axes: list[int]) -> str:
        projected = graph.linear(x, f"{block}.attn.{part}")
        projected = graph.add("Reshape", projected, split, name=f"/{block}/{part}_heads")
        if config.rope_base is not None and part != "value":
            projected = _rotated(graph, projected, f"/{block}/{part}")
        return graph.add("Transpose", projected, name=f"/{block}/{part}", perm=axes)

    query, key, value = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]), heads("value", [0, 2, 1, 3])
    factor = graph.constant("query_factor", channels**-0.5, np.float32)
    query = graph.add("Mul", query, factor, name=f"/{block}/scaled_query")
    scores = graph.add("MatMul", query, key, name=f"/{block}/scores")
    probabilities = graph.add("Softmax", scores, name=f"/{block}/probabilities", axis=-1)
    mixed = graph.add("MatMul", probabilities, value, name=f"/{block}/mixed")
    mixed = graph.add("Transpose", mixed, name=f"/{block}/mixed_tokens", perm=[0, 2, 1, 3])
    shape = graph.constant("tokens_shape", [0, tokens, config.embed_dim])
    merged = graph.add("Reshape", mixed, shape, name=f"/{block}/merged")
    return graph.linear(merged, f"{block}.attn.proj"), probabilities


def _rotated(graph: _Graph, x: str, path: str) -> str:
    """Queries or keys "batch tokens heads channels", rotated as `dinojax.models.rope.rotate` does."""
    first, second = f"{path}_first", f"{path}_second"
    graph.nodes.append(graph.onnx.helper.make_node("Split", [x], [first, second], name=f"{path}_halves", axis=-1))
    swapped = graph.add("Concat", second, first, name=f"{path}_swapped", axis=-1)
    cos, sin = (graph.parameter(name) for name in _ROTATION)
    turned = graph.add("Mul", swapped, sin, name=f"{path}_sin")
    return graph.add("Add", graph.add("Mul", x, cos, name=f"{path}_cos"), turned, name=f"{path}_rotated")


def _feed_forward(graph: _Graph, x: str, block: str) -> str:
    if graph.config.ffn_layer == "mlp":
        x = graph.linear(x, f"{block}.mlp.fc1")
        scaled = graph.add("Mul", x, graph.constant("half_root", math.sqrt(0.5), np.float32), name=f"/{block}/gelu_in")
        error = graph.add("Erf", scaled, name=f"/{block}/erf")
        error = graph.add("Add", error, graph.constant("one", 1, np.float32), name=f"/{block}/gelu_sum")
        x = graph.add("Mul", x, error, name=f"/{block}/gelu_product")
        x = graph.add("Mul", x, graph.constant("half", 0.5, np.float32), name=f"/{block}/gelu")
        return graph.linear(x, f"{block}.mlp.fc2")
    if graph.config.family == "dinov3":
        gate, value = graph.linear(x, f"{block}.mlp.w1"), graph.linear(x, f"{block}.mlp.w2")
    else:
        x = graph.linear(x, f"{block}.mlp.w12")
        gate, value = f"/{block}/mlp_gate", f"/{block}/mlp_value"
        graph.nodes.append(graph.onnx.helper.make_node("Split", [x], [gate, value], name=f"/{block}/split", axis=-1))
    sigmoid = graph.add("Sigmoid", gate, name=f"/{block}/sigmoid")
    gate = graph.add("Mul", gate, sigmoid, name=f"/{block}/silu")
    return graph.linear(graph.add("Mul", gate, value, name=f"/{block}/gated"), f"{block}.mlp.w3")


def _scaled(graph: _Graph, x: str, layer: str) -> str:
    """LayerScale, where the model has it."""
    if not graph.has(f"{layer}.gamma"):
        return x
    return graph.add("Mul", x, graph.parameter(f"{layer}.gamma"), name=f"/{layer}")


def _range(graph: _Graph, name: str, start: int, end: int, *, axis: int) -> tuple[str, str, str]:
    """The inputs of a Slice of one axis."""
    return (
        graph.constant(f"{name}_start", [start]),
        graph.constant(f"{name}_end", [end]),
        graph.constant(f"{name}_axis", [axis]),
    )
