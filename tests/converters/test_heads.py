"""Published heads: equal to PyTorch at odd sizes, names and shapes of the files, strict import, names, cache."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import heads, load_pretrained, pretrained
from converters.heads import file_layout, head_config, read_head
from converters.sources import DEPTH_HEADS, HEAD_SOURCES
from converters.torch_to_flax import from_torch
from dinojax import VARIANTS, UserError, ViTConfig
from dinojax.heads import Classifier, ClassifierHead, DepthEstimator
from dinojax.heads.classifier import ClassifierConfig
from dinojax.heads.dpt import DPTConfig
from dinojax.heads.files import abstract_head
from dinojax.heads.imagenet import imagenet_classes
from dinojax.models.files import named_parameters
from tests.support import torch_heads
from tests.support.http_files import serving
from tests.support.hugging_face_models import images_of
from tests.support.tiny_weights import torch_bytes

torch = pytest.importorskip("torch")

TINY = ViTConfig(img_size=70, patch_size=14, embed_dim=64, depth=12, num_heads=1, init_values=1.0)
SIZES = ((59, 33), (45, 73))  # padded to 5 × 3 patches, whose half is rounded up, and to 4 × 6
BOUND = 3e-5


@pytest.fixture(scope="module")
def theirs():
    """DPT on a small Dinov2, both of `transformers`."""
    return torch_heads.randomize(torch_heads.dpt(64, 12, 1, image_size=70))


@pytest.fixture(scope="module")
def linear4(theirs):
    """Tensors of a linear head on four blocks, as the official file names them."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn((256, 2 * 64 * 4, 1, 1), generator=generator) / 22
    return {
        "decode_head.conv_depth.weight": weight,
        "decode_head.conv_depth.bias": torch.randn(256, generator=generator),
    }


@pytest.fixture
def tiny(monkeypatch):
    """A published model that is small enough for tests, with the heads of DINOv2's models without registers."""
    sources = {("tiny_vit14", head): HEAD_SOURCES["dinov2_vits14", head] for head in (*DEPTH_HEADS, "imagenet-linear4")}
    for module in (heads, pretrained):
        monkeypatch.setattr(module, "VARIANTS", MappingProxyType({**VARIANTS, "tiny_vit14": TINY}))
    monkeypatch.setattr(heads, "HEAD_SOURCES", MappingProxyType({**HEAD_SOURCES, **sources}))


@pytest.fixture
def files(theirs, linear4, tmp_path):
    """A backbone, and files of heads with the dictionaries around them that the official ones have."""
    meta = {"epoch": 1, "CLASSES": None, "config": "text"}
    torch.save(torch_heads.backbone_state(theirs), tmp_path / "backbone.pth")
    torch.save({"meta": meta, "state_dict": torch_heads.official_dpt_state(theirs)}, tmp_path / "dpt.pth")
    torch.save({"meta": meta, "state_dict": linear4}, tmp_path / "linear4.pth")
    return tmp_path


def estimator(files: Path, head: str, **options) -> DepthEstimator:
    return load_pretrained(
        "tiny_vit14",
        head=head,
        weights=files / "backbone.pth",
        head_weights=files / f"{head.split('-')[1]}.pth",
        positions="huggingface",
        **options,
    )


# --- equal to PyTorch


@pytest.mark.parametrize("size", SIZES)
def test_dpt_equals_transformers(tiny, files, theirs, size):
    images = images_of(*size)
    with torch.no_grad():
        depth = theirs(torch.from_numpy(torch_heads.padded(images).transpose(0, 3, 1, 2).copy())).predicted_depth
    for head, most, options in (("nyu-dpt", 10.0, {}), ("kitti-dpt", 80.0, {}), ("nyu-dpt", 1e6, {"max_depth": 1e6})):
        expected = torch_heads.finished(depth + 0.001, size, most)
        found = estimator(files, head, **options)(images)
        assert found.shape == (2, *size) and expected.std() > 0.1 and (expected > 0.01).mean() > 0.9
        np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND)


@pytest.mark.slow  # compiles the network in another precision
def test_dpt_is_the_same_function_in_float64(theirs):
    model, size = copy.deepcopy(theirs).double(), SIZES[0]
    with jax.enable_x64(True), torch.no_grad():
        images = images_of(*size).astype(np.float64)
        depth = model(torch.from_numpy(torch_heads.padded(images).transpose(0, 3, 1, 2).copy())).predicted_depth
        state = heads.official_names({"state_dict": torch_heads.official_dpt_state(model)}, "head")
        backbone = from_torch(torch_heads.backbone_state(model), num_heads=1)
        backbone.config = dataclasses.replace(backbone.config, interpolate_offset=0.0)
        head = heads.fill(abstract_head(DPTConfig(64, (2, 5, 8, 11))), state)
        found = DepthEstimator(backbone, head)(images)
        assert found.dtype == jnp.float64
        # transformers resizes the position table in float32.
        np.testing.assert_allclose(found, torch_heads.finished(depth + 0.001, size, 10.0), rtol=0, atol=5e-9)


def linear_reference(theirs, state, images, most, **changes) -> np.ndarray:
    tokens = {name: changes.pop(name) for name in ("norm", "shift") if name in changes}
    layers = torch_heads.tokens_of(theirs, torch_heads.padded(images), **tokens)
    return torch_heads.finished(torch_heads.linear_depth(layers, state, most, **changes), images.shape[1:3], most)


@pytest.mark.parametrize("size", SIZES)
def test_the_linear_head_equals_upstream_written_out_in_torch(tiny, files, theirs, linear4, size):
    images = images_of(*size)
    for head, most in (("nyu-linear4", 10.0), ("kitti-linear4", 80.0)):
        expected = linear_reference(theirs, linear4, images, most)
        found = estimator(files, head)(images)
        assert expected.std() > most / 1000
        np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND * most / 10)


def test_the_linear_head_of_one_block_takes_the_last(tiny, files, theirs, linear4):
    state = {name: x[:, :128] if x.ndim == 4 else x for name, x in linear4.items()}
    torch.save({"state_dict": state}, files / "linear.pth")
    images = images_of(*SIZES[0])
    layers = torch_heads.tokens_of(theirs, torch_heads.padded(images))[-1:]
    expected = torch_heads.finished(torch_heads.linear_depth(layers, state, 10.0), SIZES[0], 10.0)
    np.testing.assert_allclose(estimator(files, "nyu-linear")(images), expected, rtol=0, atol=BOUND)


def test_torch_hub_spreads_the_bins_of_nyu_to_80_metres(tiny, files, theirs, linear4):
    images = images_of(*SIZES[0])
    expected = linear_reference(theirs, linear4, images, 80.0)
    found = estimator(files, "nyu-linear4", max_depth=80)(images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=8 * BOUND)


@pytest.mark.parametrize(
    "miss", [{"align_corners": True}, {"norm": True}, {"shift": 1}, {"join_cls": False}, {"most": 80.0}]
)
def test_a_near_miss_would_be_seen(tiny, files, theirs, linear4, miss):
    images = images_of(*SIZES[0])
    wrong = linear_reference(theirs, linear4, images, **({"most": 10.0} | miss))
    assert np.abs(estimator(files, "nyu-linear4")(images) - wrong).max() > 30 * BOUND


@pytest.mark.parametrize("blocks", [1, 4])
def test_classifiers_equal_torch(theirs, blocks):
    backbone = from_torch(torch_heads.backbone_state(theirs), num_heads=1)
    backbone.config = dataclasses.replace(backbone.config, interpolate_offset=0.0)
    config = ClassifierConfig(64, [str(i) for i in range(7)], blocks=blocks)
    linear = torch.nn.Linear(config.in_features, 7)
    head = heads.fill(abstract_head(config), {name: x.detach().numpy() for name, x in linear.named_parameters()})
    images = images_of(28, 56)
    with torch.no_grad():
        hidden = theirs.backbone(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
        normed = [theirs.backbone.layernorm(x) for x in hidden.hidden_states[-blocks:]]
        inputs = torch.cat([*(x[:, 0] for x in normed), normed[-1][:, 1:].mean(dim=1)], dim=1)
        expected = linear(inputs)
    np.testing.assert_allclose(Classifier(backbone, head)(images), expected, rtol=0, atol=BOUND)


@pytest.mark.slow  # compiles the network in another precision
def test_half_precision_stays_near(tiny, files):
    images = images_of(*SIZES[0], count=1)
    full, half = (np.asarray(estimator(files, "nyu-linear4", dtype=d)(images)) for d in (None, jnp.bfloat16))
    assert half.dtype == np.float32 and 0 < np.abs(full - half).mean() < 0.05 * full.mean()


# --- files


@pytest.mark.parametrize("size", ["s", "b", "l", "g"])
def test_the_layout_of_dpt_files_is_that_of_transformers(size):
    config = VARIANTS[f"dinov2_vit{size}14"]
    with torch.device("meta"):
        model = torch_heads.dpt(config.embed_dim, config.depth, config.num_heads)
    expected = {name: tuple(tensor.shape) for name, tensor in torch_heads.official_dpt_state(model).items()}
    assert file_layout(f"dinov2_vit{size}14", "nyu-dpt") == expected == file_layout(f"dinov2_vit{size}14", "kitti-dpt")
    assert head_config(f"dinov2_vit{size}14", "nyu-dpt").blocks == torch_heads.BLOCKS[config.depth]


@pytest.mark.parametrize(
    ("name", "head", "layout"),
    [
        ("dinov2_vits14_reg", "imagenet-linear", {"weight": (1000, 768), "bias": (1000,)}),
        ("dinov2_vitg14", "imagenet-linear4", {"weight": (1000, 7680), "bias": (1000,)}),
        ("dino_vits8", "imagenet-linear", {"module.linear.weight": (1000, 1536), "module.linear.bias": (1000,)}),
        ("dino_vitb16", "imagenet-linear", {"module.linear.weight": (1000, 1536), "module.linear.bias": (1000,)}),
        (
            "dinov2_vitb14",
            "kitti-linear",
            {"decode_head.conv_depth.weight": (256, 1536, 1, 1), "decode_head.conv_depth.bias": (256,)},
        ),
        (
            "dinov2_vitl14",
            "nyu-linear4",
            {"decode_head.conv_depth.weight": (256, 8192, 1, 1), "decode_head.conv_depth.bias": (256,)},
        ),
    ],
)
def test_the_layout_of_linear_files(name, head, layout):
    assert file_layout(name, head) == layout


@pytest.mark.parametrize(
    ("name", "head", "path"),
    [
        ("dinov2_vits14", "imagenet-linear", "dinov2/dinov2_vits14/dinov2_vits14_linear_head.pth"),
        ("dinov2_vitg14_reg", "imagenet-linear4", "dinov2/dinov2_vitg14/dinov2_vitg14_reg4_linear4_head.pth"),
        ("dinov2_vitb14", "nyu-dpt", "dinov2/dinov2_vitb14/dinov2_vitb14_nyu_dpt_head.pth"),
        ("dinov2_vitl14", "kitti-linear4", "dinov2/dinov2_vitl14/dinov2_vitl14_kitti_linear4_head.pth"),
        ("dino_vits16", "imagenet-linear", "dino/dino_deitsmall16_pretrain/dino_deitsmall16_linearweights.pth"),
        ("dino_vitb8", "imagenet-linear", "dino/dino_vitbase8_pretrain/dino_vitbase8_linearweights.pth"),
    ],
)
def test_addresses_are_upstreams(name, head, path):
    assert HEAD_SOURCES[name, head].path == path and len(HEAD_SOURCES) == 4 + 4 * 8 + 4 * 2


@pytest.mark.parametrize("name", ["dino_vits16", "dino_vitb16"])
def test_dinos_classifiers_take_their_tokens_in_upstreams_order(name, tmp_path):
    """ViT-S: class tokens of four blocks. ViT-B: class token and mean patch of the last, stacked and then flattened."""
    linear = torch.nn.Linear(1536, 1000)
    state = {f"module.linear.{key}": value for key, value in linear.state_dict().items()}
    torch.save({"epoch": 100, "state_dict": state, "optimizer": {"state": {}}, "best_acc": 77.0}, tmp_path / "file.pth")
    head = heads.load_published_head(name, "imagenet-linear", weights=tmp_path / "file.pth")
    assert isinstance(head, ClassifierHead)
    blocks, dim = (4, 384) if name == "dino_vits16" else (1, 768)
    random = np.random.default_rng(0)
    layers = [(random.random((2, 6, dim), np.float32), random.random((2, dim), np.float32)) for _ in range(blocks)]
    if blocks == 4:
        inputs = np.concatenate([cls_token for _, cls_token in layers], axis=1)
    else:
        inputs = np.stack([layers[0][1], layers[0][0].mean(axis=1)], axis=-1).reshape(2, -1)
    expected = linear(torch.from_numpy(inputs)).detach()
    found = head(head.inputs([(jnp.asarray(patches), jnp.asarray(token)) for patches, token in layers]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"convs.0.conv.weight": None}, r"missing convs\.0\.conv\.weight \(256, 8, 3, 3\)"),
        ({"bn.weight": torch.ones(4)}, r"extra bn\.weight \(4,\)"),
        ({"project.conv.bias": torch.ones(4)}, r"misshapen project\.conv\.bias \(4,\) instead of \(256,\)"),
        ({"project.conv.bias": torch.full((256,), torch.nan)}, r"not finite in project\.conv\.bias"),
    ],
)
def test_a_file_that_is_not_the_head_is_refused(tiny, theirs, tmp_path, damage, message):
    state = torch_heads.official_dpt_state(theirs) | {f"decode_head.{key}": value for key, value in damage.items()}
    torch.save({"state_dict": {key: value for key, value in state.items() if value is not None}}, tmp_path / "f.pth")
    with pytest.raises(UserError, match=message):
        read_head(tmp_path / "f.pth", head_config("tiny_vit14", "nyu-dpt"))


def test_a_backbone_beside_the_head_is_left_out_with_a_warning(tiny, linear4, tmp_path):
    torch.save({"state_dict": linear4 | {"backbone.norm.bias": torch.ones(64)}}, tmp_path / "f.pth")
    with pytest.warns(UserWarning, match="the backbone beside the head is left out"):
        read_head(tmp_path / "f.pth", head_config("tiny_vit14", "nyu-linear4"))


def test_a_folder_of_transformers_holds_the_same_head(tiny, theirs, files, tmp_path):
    theirs.save_pretrained(tmp_path / "folder")
    config = head_config("tiny_vit14", "nyu-dpt")
    with pytest.warns(UserWarning, match="the backbone beside the head is left out"):
        found = named_parameters(read_head(tmp_path / "folder", config))
    expected = named_parameters(read_head(files / "dpt.pth", config))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(array, expected[name]) for name, array in found.items())


# --- names


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "dinov2_vits14_reg",
            {"head": "nyu-dpt"},
            "no depth heads were published for models with registers; nyu-dpt is ",
        ),
        ("dinov2_vits14", {"head": "nyu-dtp"}, "did you mean 'nyu-dpt'"),
        ("dino_vits16", {"head": "imagenet-linear4"}, "published are imagenet-linear$"),
        ("dinojax_vitt", {"head": "imagenet-linear"}, "published are none"),
        ("dinov2_vits14_lc", {"head": "nyu-dpt"}, "'nyu-dpt' goes with its backbone, 'dinov2_vits14'"),
        ("dinov2_vits14_lc", {"max_depth": 80}, "max_depth=80 is not for imagenet-linear4"),
        ("dinov2_vits14", {"head_weights": "head.pth"}, "head_weights='head.pth' is not of any use without head="),
        ("dinov2_vits14", {"head": "nyu-dpt", "max_depth": -1}, r"max_depth=-1\.0 is not above 0\.001 m"),
    ],
)
def test_what_was_not_published_is_refused_with_a_sentence(name, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_pretrained(name, cache_dir=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_hubs_classifiers_stand_for_the_head_on_four_blocks():
    assert len(heads.CLASSIFIERS) == 8
    assert heads.split_name("dinov2_vitb14_reg_lc", None) == ("dinov2_vitb14_reg", "imagenet-linear4")
    assert heads.split_name("dinov2_vitb14_lc", "imagenet-linear") == ("dinov2_vitb14", "imagenet-linear")
    assert heads.split_name("dinov2_vitb14", None) == ("dinov2_vitb14", None)


def test_the_classes_are_those_of_imagenet():
    names = imagenet_classes()
    labels = pytest.importorskip("tensorflow_datasets.datasets.siscore.labels")
    assert len(names) == len(set(names)) == 1000
    plain = [name.lower().replace("-", " ") for name in names]
    same = [label.lower().replace("-", " ").split(" (")[0] in plain[i] for label, i in labels.IMAGENET_LABELS.items()]
    assert len(same) == 112 and sum(same) == 108  # the others are common fig, jeans, light switch and maracas


# --- cache


def test_the_head_is_downloaded_once_and_then_needs_neither_server_nor_torch(tiny, files, linear4, monkeypatch):
    source, content = HEAD_SOURCES["dinov2_vits14", "nyu-linear4"], torch_bytes({"state_dict": linear4})
    cache = files / "cache"
    with serving() as server:
        server.files[source.path] = content
        monkeypatch.setenv("DINOJAX_WEIGHTS_URL", server.url)
        first = heads.load_published_head("tiny_vit14", "nyu-linear4", cache_dir=cache)
        assert server.served == [(0, len(content))]
        server.files.clear()
        again = heads.load_published_head("tiny_vit14", "nyu-linear4", cache_dir=cache, max_depth=80)
    assert sorted(path.name for path in cache.rglob("*") if path.is_file()) == ["config.json", "model.safetensors"]
    assert first.config.max_depth == 10 and again.config.max_depth == 80
    np.testing.assert_array_equal(first.conv_depth.kernel[...], again.conv_depth.kernel[...])
    program = (
        "import sys; sys.modules['torch'] = None\n"
        f"from dinojax.heads.files import load_head; print(load_head({str(cache / 'heads/tiny_vit14-nyu-linear4')!r}))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environment)
    (cache / "heads/tiny_vit14-nyu-linear4/model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"damaged.*delete .* and run the same command again"):
        heads.load_published_head("tiny_vit14", "nyu-linear4", cache_dir=cache)


def test_a_failed_download_says_how_to_pass_the_file(tiny, tmp_path, monkeypatch):
    with serving() as server:
        monkeypatch.setenv("DINOJAX_WEIGHTS_URL", server.url)
        with pytest.raises(UserError, match=r"nyu-dpt of dinov2_vits14 is not in .*head_weights=FILE"):
            load_pretrained("dinov2_vits14", head="nyu-dpt", cache_dir=tmp_path)
