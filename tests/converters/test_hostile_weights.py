"""Small files that would hang, fill the memory or convert to something else: each is refused at once, in a sentence."""

import dataclasses
import io
import json
import re
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

import dinojax
from converters.pretrained import read_model
from dinojax.documents import write_document
from tests.support.tiny_weights import TINY_V2, official_state, torch_bytes

torch = pytest.importorskip("torch")

STATE = official_state(TINY_V2)
FILE = torch_bytes(STATE)
REPOSITORY = Path(__file__).parents[2]
# Reads a sound file first, and then allows one more GiB, and 20 s a file.
_READ = """
import resource, signal, sys
from converters.pretrained import read_model
from dinojax import UserError
from pathlib import Path
sound, *others = map(Path, sys.argv[1:])
read_model(sound)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30,) * 2)
for path in others:
    signal.alarm(20)
    try:
        read_model(path)
        print(path.name, "READ")
    except UserError as error:
        print(path.name, str(error).replace("\\n", "NEWLINE"))
"""


class _Rebuilt:
    """Pickles to a tensor of the given shape on a storage of one number, as torch itself writes tensors."""

    def __init__(self, shape):
        self.shape = shape

    def __reduce__(self):
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.zeros(1).untyped_storage(), dtype=torch.float32, _internal=True
        )
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.shape, (1,) * len(self.shape), False, OrderedDict())


def _cycle():
    inside = {}
    inside["model"] = inside
    return inside


def _quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(64), 0.1, 0, torch.qint8)


_SHARED = torch.zeros(2**18)
CONTENTS = {
    "far_block.pth": (STATE | {"blocks.1000000.norm1.bias": np.zeros(64, np.float32)}, "blocks.1000000 is named among"),
    "far_head.pth": (STATE | {"blocks.99999999999999.norm1.bias": np.zeros(64, np.float32)}, "extra blocks.9999"),
    "cycle.pth": (_cycle(), "more than 8 dictionaries inside each other"),
    "stride_0.pth": (STATE | {"norm.bias": torch.zeros(1).expand(10**12)}, "norm.bias claims 4,000,000,000,000 bytes"),
    "shared.pth": ({f"blocks.{i}.norm1.bias": _SHARED.view(-1) for i in range(900)}, "tensors claim 943,718,400 bytes"),
    "overflow.pth": (STATE | {"norm.bias": _Rebuilt((2**40, 2**40))}, "damaged or cut off"),
    "long_name.pth": (STATE | {"module." * 100_000 + "norm.bias": np.zeros(64, np.float32)}, "name of 700,009 char"),
    "numbered.pth": ({"model": {0: torch.zeros(3)}}, "names a tensor 0 but text was expected"),
    "pos_embed.pth": (STATE | {"pos_embed": np.zeros(5, np.float32)}, r"misshapen pos_embed \(5,\): 3 axes"),
    "fp8.pth": (STATE | {"norm.bias": torch.zeros(64).to(torch.float8_e4m3fn)}, "norm.bias holds float8_e4m3fn but"),
    "sparse.pth": (STATE | {"norm.bias": torch.zeros(64).to_sparse()}, "norm.bias is sparse"),
    "quantised.pth": (STATE | {"norm.bias": _quantised()}, "norm.bias is quantised"),
    "meta.pth": (STATE | {"norm.bias": torch.zeros(64, device="meta")}, "norm.bias is a meta tensor, without values"),
    "object.pth": (STATE | {"lr": [np.array([{}], object)]}, "holds code"),
}


def _safetensors(dtype: str, shape: list[int], size: int) -> bytes:
    header = json.dumps({"norm.bias": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def _bomb() -> bytes:
    """An archive whose entry unpacks to a thousand times its size."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    return target.getvalue()


def _flipped() -> bytes:
    """One bit of a weight is another."""
    place = FILE.index(STATE["norm.bias"].tobytes()) + 17
    return FILE[:place] + bytes([FILE[place] ^ 4]) + FILE[place + 1 :]


BYTES = {
    "overflow.safetensors": (_safetensors("F32", [2**40, 2**40], 8), "damaged or not a safetensors file"),
    "fp8.safetensors": (_safetensors("F8_E4M3", [64], 64), "float8_e4m3fn"),
    "unknown.safetensors": (_safetensors("F7", [64], 64), "damaged or not a safetensors file"),
    "bomb.pth": (_bomb(), "unpacks to more than its size"),
    "flipped.pth": (_flipped(), "CRC-32 of .* is not the stored one"),
}


def _folders(place: Path) -> dict[str, str]:
    """Model folders whose configuration claims another depth, with right hashes; and a folder of shards."""
    model = read_model(place / "sound.pth")
    for depth in (10**6, 900):
        folder = dinojax.save(model, place / f"depth_{depth}")
        document = {"model": "VisionTransformer", "config": dataclasses.asdict(model.config) | {"depth": depth}}
        write_document(folder / "config.json", document, files=["model.safetensors"])
    (place / "shards").mkdir()
    index = {"weight_map": {"norm.bias": "", "norm.weight": "a.safetensors"}}
    (place / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    return {
        "depth_1000000": "depth=1000000 is not a whole number from 1 to 1024",
        "depth_900": "holds 2 blocks and config.json says depth 900",
        "shards": "names a shard without a name",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to limit the memory")
def test_hostile_files_are_refused_in_seconds_and_little_memory(tmp_path):
    (tmp_path / "sound.pth").write_bytes(FILE)
    expected = _folders(tmp_path)
    for name, (content, message) in CONTENTS.items():
        (tmp_path / name).write_bytes(torch_bytes(content))
        expected[name] = message
    for name, (content, message) in BYTES.items():
        (tmp_path / name).write_bytes(content)
        expected[name] = message
    files = ["sound.pth", *expected]
    # The timeout is that of all files together.
    done = subprocess.run(
        [sys.executable, "-c", _READ, *(str(tmp_path / file) for file in files)],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    for name, message in expected.items():
        assert re.search(message, said[name]), (name, said[name])
        assert "NEWLINE" not in said[name] and len(said[name]) < 700
