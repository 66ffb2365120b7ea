"""The published checkpoints as data: URL, size, SHA-256 and licence of each.

URLs and licence: facebookresearch/dino 7c446df `hubconf.py` and facebookresearch/dinov2 b8931f7
`dinov2/hub/backbones.py`; weights and code of both are under Apache-2.0 (their LICENSE and MODEL_CARD.md).

Upstream publishes neither sizes nor checksums. Those below were recorded by others who downloaded the files:
- DINOv2, SHA-256 of all eight: finegrain-ai/refiners, its DINOv2 conversion script (`expected_sha256` beside the
  official URL). Several unrelated projects pin the same values for ViT-S, ViT-B and ViT-g.
- DINOv2, sizes: catalogues and lock files that give bytes and the same SHA-256 together.
- dino_vits8: a converter that pins both and refuses other downloads.
- The other DINO files: only MD5 sums are on record, so only the announced length is compared.
- Heads: no record was found, so only the announced length is compared.

Paths of heads: facebookresearch/dinov2 b8931f7 `dinov2/hub/classifiers.py` and `depthers.py`, facebookresearch/dino
7c446df `utils.load_pretrained_linear_weights`.
"""

import dataclasses
from types import MappingProxyType

HOST = "https://dl.fbaipublicfiles.com"


@dataclasses.dataclass(frozen=True)
class Source:
    """One published file.

    Attributes:
        path: path of the file on `HOST`.
        size: size in bytes; None if no record was found.
        sha256: SHA-256 in hexadecimal; None if no record was found.
        license: SPDX identifier of the weights.
    """

    path: str
    size: int | None = None
    sha256: str | None = None
    license: str = "Apache-2.0"

    @property
    def url(self) -> str:
        """The official address."""
        return f"{HOST}/{self.path}"

    @property
    def filename(self) -> str:
        """The last part of the address."""
        return self.path.rsplit("/", 1)[-1]


def _dino(stem: str, size: int | None = None, sha256: str | None = None) -> Source:
    return Source(f"dino/{stem}_pretrain/{stem}_pretrain.pth", size, sha256)


def _dinov2(stem: str, size: int, sha256: str) -> Source:
    return Source(f"dinov2/{stem.removesuffix('_reg4')}/{stem}_pretrain.pth", size, sha256)


SOURCES: MappingProxyType[str, Source] = MappingProxyType(
    {
        "dino_vits16": _dino("dino_deitsmall16"),
        "dino_vits8": _dino(
            "dino_deitsmall8", 86_728_949, "55c8b267f479b614ec20858947ce361ba804846c193e20be74263a096bb6d75e"
        ),
        "dino_vitb16": _dino("dino_vitbase16"),
        "dino_vitb8": _dino("dino_vitbase8"),
        "dinov2_vits14": _dinov2(
            "dinov2_vits14", 88_283_115, "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"
        ),
        "dinov2_vitb14": _dinov2(
            "dinov2_vitb14", 346_378_731, "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"
        ),
        "dinov2_vitl14": _dinov2(
            "dinov2_vitl14", 1_217_586_395, "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
        ),
        "dinov2_vitg14": _dinov2(
            "dinov2_vitg14", 4_546_108_579, "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3"
        ),
        "dinov2_vits14_reg": _dinov2(
            "dinov2_vits14_reg4", 88_291_785, "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb"
        ),
        "dinov2_vitb14_reg": _dinov2(
            "dinov2_vitb14_reg4", 346_393_545, "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71"
        ),
        "dinov2_vitl14_reg": _dinov2(
            "dinov2_vitl14_reg4", 1_217_607_321, "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51"
        ),
        "dinov2_vitg14_reg": _dinov2(
            "dinov2_vitg14_reg4", 4_546_140_349, "746ecb8c6301c645c5c855be91687d274587d6e48fdaec4a729753160b34a283"
        ),
    }
)

IMAGENET_HEADS = ("imagenet-linear", "imagenet-linear4")
DEPTH_HEADS = tuple(f"{data}-{kind}" for data in ("nyu", "kitti") for kind in ("linear", "linear4", "dpt"))


def _dinov2_head(stem: str, head: str) -> Source:
    part = head.removeprefix("imagenet-").replace("-", "_")
    return Source(f"dinov2/{stem.removesuffix('_reg4')}/{stem}_{part}_head.pth")


def _dino_head(stem: str) -> Source:
    return Source(f"dino/{stem}_pretrain/{stem}_linearweights.pth")


_SIZES = tuple("sblg")
HEAD_SOURCES: MappingProxyType[tuple[str, str], Source] = MappingProxyType(
    {(f"dino_vits{patch}", "imagenet-linear"): _dino_head(f"dino_deitsmall{patch}") for patch in (16, 8)}
    | {(f"dino_vitb{patch}", "imagenet-linear"): _dino_head(f"dino_vitbase{patch}") for patch in (16, 8)}
    | {
        (f"dinov2_vit{size}14", head): _dinov2_head(f"dinov2_vit{size}14", head)
        for size in _SIZES
        for head in (*IMAGENET_HEADS, *DEPTH_HEADS)
    }
    | {
        (f"dinov2_vit{size}14_reg", head): _dinov2_head(f"dinov2_vit{size}14_reg4", head)
        for size in _SIZES
        for head in IMAGENET_HEADS
    }
)
"""Backbone and head → its file. No depth heads were published for models with registers."""
