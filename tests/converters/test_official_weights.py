"""The published checkpoints against upstream's own PyTorch code, both fetched from the internet."""

import jax
import numpy as np
import pytest

from converters.download import reachable
from converters.pretrained import load_pretrained
from converters.sources import HOST, SOURCES

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.network

REPOSITORIES = {
    "dino": "facebookresearch/dino:7c446df5b9f45747937fb0d72314eb9f7b66930a",
    "dinov2": "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0",
}
SMALL = ["dino_vits16", "dino_vits8", "dinov2_vits14", "dinov2_vits14_reg"]
SIZES = [(224, 224), (112, 168)]  # divided by 8, 14 and 16 alike, but for 16 and 168: DINO cuts the rest off


@pytest.fixture(scope="module")
def internet():
    for url in (f"{HOST}/{SOURCES['dino_vits16'].path}", "https://github.com"):
        if not reachable(url):
            pytest.skip(f"{url} cannot be reached")


def upstream(name: str):
    family = name.split("_")[0]
    if family == "dino":
        pytest.importorskip("torchvision", reason="upstream's hubconf.py imports torchvision")
    return torch.hub.load(REPOSITORIES[family], name, trust_repo=True, skip_validation=True, verbose=False).eval()


@pytest.mark.filterwarnings("ignore:xFormers")  # upstream's notice that it works without it
@pytest.mark.parametrize("name", SMALL)
def test_features_equal_those_of_upstream(internet, tmp_path_factory, name):
    model = load_pretrained(name, cache_dir=tmp_path_factory.getbasetemp() / "official")
    theirs = upstream(name)
    for height, width in SIZES:
        images = np.random.default_rng(0).standard_normal((2, height, width, 3), dtype=np.float32)
        with jax.default_matmul_precision("highest"):
            features = model(images)
        with torch.inference_mode():
            batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            if name.startswith("dino_"):
                tokens = theirs.get_intermediate_layers(batch, 1)[0].numpy()
                expected = {"cls_token": tokens[:, 0], "patch_tokens": tokens[:, 1:]}
            else:
                outputs = theirs.forward_features(batch)
                expected = {
                    "cls_token": outputs["x_norm_clstoken"].numpy(),
                    "patch_tokens": outputs["x_norm_patchtokens"].numpy(),
                    "register_tokens": outputs["x_norm_regtokens"].numpy(),
                }
        for output, values in expected.items():
            if values.size:
                difference = np.abs(np.asarray(getattr(features, output)) - values).max()
                assert difference <= 3e-5 * np.abs(values).max(), (output, (height, width))
