"""ONNX exports of DINO and DINOv2, as `torch.onnx` and optimum write them, read back into named tensors.

An export keeps the names of vectors and convolutions. It folds the weights of linear layers into transposed matrices
under names such as `onnx::MatMul_123`: the bias that is added to the product says whose weight it is. Nothing is
computed but transposes, and arrays are bounded by the bytes that are in the file.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters.dinov3.hugging_face import has_dinov3_names
from converters.weight_files.optional import import_onnx
from dinojax.errors import UserError

_LARGEST = 2**31  # bytes of a protobuf
_PARAMETER = re.compile(r"^(\w+\.)?(embeddings|encoder\.layer|layers|layernorm|classifier|pooler)\.[\w.]+$")
_BFLOAT16 = 16
_DTYPES = {1: "<f4", 10: "<f2", 11: "<f8", _BFLOAT16: "<u2"}  # TensorProto.DataType → how its bytes are read
_PASSED_ON = ("Identity", "Cast")
_RESIZED = ("Reshape", "Transpose", "Resize")  # what is done to the position table
_QUANTISED = ("DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "MatMulNBits")
_FIRST_QUERY = re.compile(r"\.0\.attention\.(attention\.query|q_proj)\.weight$")
_DEEPEST = 16
_EPSILON = 1e-6  # of every LayerNorm in DINO and DINOv2


class OnnxWeights(NamedTuple):
    """The tensors under Hugging Face's names in torch's layout, and the number of attention heads where it is found."""

    tensors: dict[str, np.ndarray]
    num_heads: int | None


def read_onnx(path: Path) -> OnnxWeights:
    """Reads the parameters of an ONNX file.

    Raises:
        UserError: there is no such file; it is damaged, too large, quantised or no export of DINO or DINOv2; or the
            package onnx is missing.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; name an .onnx file")
    if path.stat().st_size >= _LARGEST:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, and an ONNX file holds less than {_LARGEST:,}")
    onnx = import_onnx()
    try:
        graph = onnx.load_model(str(path), format="protobuf", load_external_data=False).graph
    except Exception as error:  # protobuf's own classes, which differ between its versions
        raise UserError(f"{path} is damaged or not an ONNX file ({error!s:.80}); download it again") from error
    reader = _Reader(path, graph)
    reader.raise_unless_float()
    tensors = reader.parameters()
    if not tensors:
        raise UserError(f"{path} has no tensors under Hugging Face's names, such as embeddings.cls_token")
    return OnnxWeights(tensors, reader.num_heads(tensors))


class _Reader:
    """A graph: who makes which value, and who takes it."""

    def __init__(self, path: Path, graph: Any):
        self.path, self.nodes = path, list(graph.node)
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and len(node.output) == 1:
                self.stored |= {name: a.t for a in node.attribute for name in node.output if a.name == "value"}
        self.makers = {output: node for node in self.nodes for output in node.output}
        self.files: dict[str, int] = {}  # external files and their sizes
        self.read = 0  # bytes of them
        self.products: dict[str, Any] = {}  # weight of a linear layer → its node
        self.takers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.takers.setdefault(name, []).append(node)

    def raise_unless_float(self) -> None:
        """Refuses quantised graphs, and those that compute another model."""
        kinds = {node.op_type for node in self.nodes}
        if found := sorted(kinds.intersection(_QUANTISED)):
            raise UserError(f"{self.path} is quantised ({found[0]}); take the export in float32, such as model.onnx")
        if has_dinov3_names(self.stored):
            raise UserError(
                f"{self.path} is a DINOv3, of which ONNX files are written but not read: its rotation is in the "
                "program alone; take the weight file or the folder that it was made of"
            )
        for node in self.nodes:
            values = {attribute.name: attribute for attribute in node.attribute}
            if node.op_type == "LayerNormalization" and "epsilon" in values and values["epsilon"].f > _EPSILON * 1.001:
                raise UserError(f"{self.path} computes LayerNorm with epsilon {values['epsilon'].f:g} instead of 1e-06")
            if node.op_type == "Gelu" and "approximate" in values and values["approximate"].s != b"none":
                raise UserError(f"{self.path} computes an approximate GELU; DINO and DINOv2 have the exact one")

    def parameters(self) -> dict[str, np.ndarray]:
        """Hugging Face's name → array in torch's layout."""
        matrices = dict(self._linear_layers())
        taken = {stored for stored, _ in matrices.values()}
        # Equal tensors are stored once, and an Identity gives the others their names.
        named = [name for name in (*self.stored, *self.makers) if _PARAMETER.match(name) and name not in matrices]
        behind = {name: self._behind(name, _PASSED_ON) for name in named}
        found = {name: self._array(stored) for name, stored in behind.items() if stored and stored not in taken}
        found |= self._positions(found)
        for name, (stored, transposed) in matrices.items():
            array = self._array(stored)
            if array.ndim != 2:
                raise UserError(f"{self.path}: the weight {name} has {array.ndim} axes, and a linear layer has 2")
            found[name] = np.ascontiguousarray(array.T if transposed else array)
        return found

    def _linear_layers(self) -> Iterator[tuple[str, tuple[str, bool]]]:
        """Name of a weight → name of the stored tensor, and whether it is transposed to torch's layout there."""
        for node in self.nodes:
            if node.op_type not in ("MatMul", "Gemm") or len(node.input) < 2:
                continue
            stored, turned = self._stored_matrix(node.input[1])
            name = self._name_of_layer(node, stored)
            if stored is None or name is None:
                continue
            if name in self.products:
                raise UserError(f"{self.path} has two matrices for {name}")
            self.products[name] = node
            rows_are_inputs = not _flag(node, "transB") if node.op_type == "Gemm" else True
            yield name, (stored, rows_are_inputs != turned)

    def _stored_matrix(self, name: str) -> tuple[str | None, bool]:
        """The stored tensor behind a value, and whether it is transposed on the way."""
        turns = 0
        for _ in range(_DEEPEST):
            node = self.makers.get(name)
            if name in self.stored or node is None or node.op_type not in (*_PASSED_ON, "Transpose"):
                break
            turns += node.op_type == "Transpose"
            name = node.input[0] if node.input else ""
        return (name if name in self.stored else None), turns % 2 == 1

    def _behind(self, name: str, kinds: tuple[str, ...]) -> str | None:
        """The stored tensor that reaches a value through nodes of these kinds, by their first inputs."""
        for _ in range(_DEEPEST):
            node = self.makers.get(name)
            if name in self.stored or node is None or node.op_type not in kinds:
                break
            name = node.input[0] if node.input else ""
        return name if name in self.stored else None

    def _name_of_layer(self, node: Any, stored: str | None) -> str | None:
        """The weight's name: from the bias, else its own, else from the node, which torch names after the module."""
        biases = list(node.input[2:3])
        for taker in self._takers_of(node):
            biases += [name for name in taker.input if name not in node.output] if taker.op_type == "Add" else []
        for bias in biases:
            if _PARAMETER.match(bias) and bias.endswith(".bias"):
                return f"{bias.removesuffix('.bias')}.weight"
        if stored and _PARAMETER.match(stored) and stored.endswith(".weight"):
            return stored
        name = f"{node.name.strip('/').removesuffix('/MatMul').replace('/', '.')}.weight"
        return name if stored and _PARAMETER.match(name) else None

    def _positions(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The position table, where the export has cut it: the class token's entry, and patches that are resized."""
        token = next((name for name in found if name.endswith("embeddings.cls_token")), None)
        table = f"{token.removesuffix('cls_token')}position_embeddings" if token else ""
        if token is None or table in found:
            return {}
        pairs = set()
        for node in self.nodes:
            if node.op_type == "Concat" and len(node.input) == 2:
                first, rest = (self._behind(name, (*_PASSED_ON, *_RESIZED)) for name in node.input)
                if first and rest and list(self.stored[first].dims) == [1, 1, found[token].size]:
                    pairs.add((first, rest))
        if len(pairs) != 1:
            return {}
        cls_entry, patches = (self._array(name) for name in pairs.pop())
        dim = found[token].size
        if patches.ndim == 4 and patches.shape[1] == dim != patches.shape[3]:
            patches = patches.transpose(0, 2, 3, 1)
        if patches.ndim not in (3, 4) or patches.shape[0] != 1 or patches.shape[-1] != dim:
            raise UserError(f"{self.path}: the position table of shape {patches.shape} is not one of {dim} channels")
        return {table: np.concatenate([cls_entry, patches.reshape(1, -1, dim)], axis=1)}

    def num_heads(self, tensors: Mapping[str, np.ndarray]) -> int | None:
        """From the shape that the first query is split into, whose last axis has the channels of a head."""
        query = next((name for name in self.products if _FIRST_QUERY.search(name)), "")
        reached = [self.products[query]] if query else []
        reached += [taker for node in reached for taker in self._takers_of(node) if taker.op_type == "Add"]
        for taker in (taker for node in reached for taker in self._takers_of(node) if taker.op_type == "Reshape"):
            channels, dim = self._last_of_shape(taker.input[-1]), len(tensors[query])
            if channels and channels > 0 and dim % channels == 0:
                return dim // channels
        return None

    def _takers_of(self, node: Any) -> list[Any]:
        return [taker for output in node.output for taker in self.takers.get(output, [])]

    def _last_of_shape(self, name: str) -> int | None:
        node = self.makers.get(name)
        if name not in self.stored and node is not None and node.op_type == "Concat" and node.input:
            name = node.input[-1]
        tensor = self.stored.get(name)
        if tensor is None or tensor.data_type != 7 or len(tensor.dims) != 1 or not 0 < tensor.dims[0] <= 8:
            return None
        count = tensor.dims[0]
        if len(tensor.raw_data) == 8 * count:
            return int(np.frombuffer(tensor.raw_data, "<i8")[-1])
        return tensor.int64_data[-1] if len(tensor.int64_data) == count else None

    def _array(self, name: str) -> np.ndarray:
        """The values of a stored tensor, once its shape agrees with the bytes that are there."""
        tensor = self.stored[name]
        if tensor.data_type not in _DTYPES:
            raise UserError(f"{self.path}: {name} does not hold floating-point numbers (ONNX type {tensor.data_type})")
        dtype, shape = np.dtype(_DTYPES[tensor.data_type]), tuple(tensor.dims)
        claimed = math.prod(shape) * dtype.itemsize
        stored = self._external(name, tensor) if tensor.data_location == 1 else tensor.raw_data
        if not stored and (tensor.float_data or tensor.double_data):
            stored = np.array(tensor.float_data or tensor.double_data, dtype).tobytes()
        if len(stored) != claimed or min(shape, default=1) < 1:
            raise UserError(f"{self.path}: {name} claims {claimed:,} bytes {shape} of which {len(stored):,} are stored")
        array = np.frombuffer(stored, dtype).reshape(shape)
        if tensor.data_type != _BFLOAT16:
            return array
        return (array.astype(np.uint32) << 16).view(np.float32)

    def _external(self, name: str, tensor: Any) -> bytes:
        """Bytes in a file beside the model; never in another folder."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        file = self.path.parent / location
        # Caches link to files with other names: the links may lead to where the model's own link leads.
        folders = (self.path.parent.resolve(), self.path.resolve().parent)
        if Path(location).name != location or not file.is_file() or file.resolve().parent not in folders:
            raise UserError(f"{self.path}: {name} is said to be in {location!r:.80}, which is no file in its folder")
        try:
            size = self.files[location] = file.stat().st_size
            offset, length = int(entries.get("offset") or 0), int(entries.get("length") or size)
            self.read += length
            if offset < 0 or length < 0 or offset + length > size or self.read > sum(self.files.values()):
                raise ValueError(f"{size:,} bytes, of which {length:,} from {offset:,} are wanted")
            with file.open("rb") as opened:
                opened.seek(offset)
                return opened.read(length)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: {name} cannot be read from {location} ({error!s:.80})") from error


def _flag(node: Any, name: str) -> bool:
    return any(attribute.name == name and attribute.i for attribute in node.attribute)
