"""`load_pretrained`: the table of sources, the download from a local server, the cache, the names."""

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import jax
import pytest
from flax import nnx

from converters import download, pretrained
from converters.sources import SOURCES, Source
from dinojax import VARIANTS, UserError
from dinojax.models.files import abstract_model
from experiments.features.backbones import load_backbone
from tests.support.http_files import serving
from tests.support.tiny_weights import TINY_V2, assert_holds, official_state, torch_bytes

pytest.importorskip("torch")

STATE = official_state(TINY_V2)
FILE = torch_bytes(STATE)
TINY = Source("tiny/tiny_pretrain.pth", len(FILE), hashlib.sha256(FILE).hexdigest())


@pytest.fixture(autouse=True)
def tiny_variant(monkeypatch):
    """One more published model, small enough for tests; as data, like the others."""
    monkeypatch.setattr(pretrained, "VARIANTS", MappingProxyType({**VARIANTS, "tiny_vit14": TINY_V2}))
    monkeypatch.setattr(pretrained, "SOURCES", MappingProxyType({**SOURCES, "tiny_vit14": TINY}))


@pytest.fixture
def server(monkeypatch):
    with serving() as server:
        server.files[TINY.path] = FILE
        monkeypatch.setenv("DINOJAX_WEIGHTS_URL", server.url)
        yield server


def load(cache: Path):
    return pretrained.load_pretrained("tiny_vit14", cache_dir=cache)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# --- the table of sources


def test_every_published_model_has_a_source_and_nothing_else():
    assert set(SOURCES) == {name for name in VARIANTS if "vitt" not in name and not name.startswith("dinov3")}


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("dino_vits8", "https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"),
        ("dino_vitb16", "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
        ("dinov2_vitg14", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitg14/dinov2_vitg14_pretrain.pth"),
        ("dinov2_vits14_reg", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"),
    ],
)
def test_urls_are_those_of_torch_hub(name, url):
    assert SOURCES[name].url == url


def test_recorded_sizes_exceed_their_parameters_by_file_overhead_only():
    for name, source in SOURCES.items():
        if source.size is not None:
            one, two = (_count(dataclasses.replace(VARIANTS[name], depth=depth)) for depth in (1, 2))
            parameters = one + (VARIANTS[name].depth - 1) * (two - one)
            assert 0 < source.size - 4 * parameters < 200_000, name


def _count(config) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract_model(config))))


# --- download and cache


def test_downloads_converts_and_keeps_the_converted_model_alone(server, tmp_path):
    assert_holds(load(tmp_path), STATE)
    assert server.served == [(0, len(FILE))]
    assert files_in(tmp_path) == {"models/tiny_vit14/config.json", "models/tiny_vit14/model.safetensors"}
    source = json.loads((tmp_path / "models/tiny_vit14/config.json").read_text())["source"]
    assert source["sha256"] == TINY.sha256 and source["url"] == TINY.url and source["license"] == "Apache-2.0"


def test_the_second_call_needs_neither_server_nor_torch(server, tmp_path):
    first = load(tmp_path)
    server.files.clear()
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from converters import pretrained; from tests.support.tiny_weights import TINY_V2\n"
        "pretrained.VARIANTS = {'tiny_vit14': TINY_V2}\n"
        f"model = pretrained.load_pretrained('tiny_vit14', cache_dir={str(tmp_path)!r})\n"
        "print(float(model.cls_token[...].sum()))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(float(first.cls_token[...].sum()), abs=1e-6)
    assert len(server.served) == 1


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    server.cut_after = 100_000
    with pytest.raises(
        UserError, match=rf"stopped after 100000 of {len(FILE)} bytes.*run the same command again to resume"
    ):
        load(tmp_path)
    assert files_in(tmp_path) == {f"downloads/tiny_pretrain.pth.part{end}" for end in ("", ".version")}
    server.cut_after = None
    assert_holds(load(tmp_path), STATE)
    assert server.served == [(0, 100_000), (100_000, len(FILE) - 100_000)]


def test_a_server_that_ignores_ranges_is_read_from_the_start(server, tmp_path):
    server.cut_after = 100_000
    with pytest.raises(UserError, match="stopped"):
        load(tmp_path)
    server.cut_after, server.ignores_ranges = None, True
    assert_holds(load(tmp_path), STATE)
    assert server.served[-1] == (0, len(FILE))


def test_a_file_that_changed_meanwhile_is_not_glued_to_the_old_beginning(server, tmp_path):
    target = tmp_path / "file.bin"
    server.files["file.bin"], server.cut_after = b"a" * 5000, 2000
    with pytest.raises(UserError, match="stopped"):
        download.download(f"{server.url}/file.bin", target)
    server.files["file.bin"], server.cut_after = b"b" * 5000, None
    assert download.download(f"{server.url}/file.bin", target).read_bytes() == b"b" * 5000


def test_without_a_version_from_the_server_nothing_is_resumed(server, tmp_path):
    server.files["file.bin"], server.cut_after, server.has_etags = b"a" * 5000, 2000, False
    with pytest.raises(UserError, match="stopped"):
        download.download(f"{server.url}/file.bin", tmp_path / "file.bin")
    server.cut_after = None
    assert download.download(f"{server.url}/file.bin", tmp_path / "file.bin").read_bytes() == b"a" * 5000
    assert server.served[-1] == (0, 5000)


def test_a_partial_file_that_is_whole_already_is_accepted(server, tmp_path):
    server.files["file.bin"], server.cut_after = b"a" * 5000, 2000
    with pytest.raises(UserError, match="stopped"):
        download.download(f"{server.url}/file.bin", tmp_path / "file.bin")
    (tmp_path / "file.bin.part").write_bytes(b"a" * 5000)
    server.cut_after = None
    assert download.download(f"{server.url}/file.bin", tmp_path / "file.bin").read_bytes() == b"a" * 5000


def test_another_digest_is_refused_and_removed(server, tmp_path):
    server.files[TINY.path] = FILE[:-1] + bytes([FILE[-1] ^ 1])
    with pytest.raises(UserError, match="SHA-256"):
        load(tmp_path)
    assert files_in(tmp_path) == set()


def test_another_length_is_refused_before_the_download(server, tmp_path):
    server.files[TINY.path] = FILE + b"more"
    with pytest.raises(UserError, match=f"{len(FILE) + 4} bytes, but {len(FILE)} are published"):
        load(tmp_path)
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize(("trouble", "words"), [("web_page", "web page"), ("missing", "404")])
def test_an_answer_that_is_no_file_is_refused(server, tmp_path, trouble, words):
    if trouble == "web_page":
        server.web_page = True
    else:
        server.files.clear()
    with pytest.raises(UserError, match=words):
        load(tmp_path)
    assert files_in(tmp_path) == set()


def test_without_a_network_one_sentence_says_what_to_do(monkeypatch, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("DINOJAX_WEIGHTS_URL", f"http://127.0.0.1:{port}")
    advice = rf"cannot be reached.*get {TINY.url} on another machine.*--weights FILE.*--weights dinojax_vitt"
    with pytest.raises(UserError, match=advice):
        load(tmp_path)
    assert files_in(tmp_path) == set()


def test_a_server_that_never_answers_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "SILENCE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("DINOJAX_WEIGHTS_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UserError, match=r"cannot be reached \(timed out"):
            load(tmp_path)


def test_a_disk_without_room_is_refused_at_the_start(server, monkeypatch, tmp_path):
    usage = download.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="0 MB left"):
        load(tmp_path)
    assert not [name for name in files_in(tmp_path) if not name.endswith(".version")]


def test_a_bad_official_file_is_removed_so_that_the_next_call_downloads_again(server, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "SOURCES", {"tiny_vit14": Source(TINY.path)})  # no checksum on record
    server.files[TINY.path] = FILE[: len(FILE) // 2]
    with pytest.raises(UserError, match="damaged or cut off"):
        load(tmp_path)
    assert files_in(tmp_path) == set()
    server.files[TINY.path] = FILE
    assert_holds(load(tmp_path), STATE)


def test_a_damaged_cache_says_which_folder_to_delete(server, tmp_path):
    load(tmp_path)
    weights = tmp_path / "models/tiny_vit14/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"damaged.*delete .*models/tiny_vit14"):
        load(tmp_path)


def test_the_cache_folder_comes_from_the_environment(server, monkeypatch, tmp_path):
    monkeypatch.setenv("DINOJAX_CACHE", str(tmp_path / "elsewhere"))
    pretrained.load_pretrained("tiny_vit14")
    assert (tmp_path / "elsewhere/models/tiny_vit14/config.json").is_file()


# --- names


def test_a_misspelt_name_gets_suggestions():
    with pytest.raises(UserError, match="did you mean dinov2_vits14"):
        pretrained.load_pretrained("dinov2_vit_s14")


def test_every_command_that_takes_weights_suggests_names(tmp_path):
    for weights, suggestion in (("dinov2_vit_s14", "dinov2_vits14"), ("random:dino_vits61", "random:dino_vits16")):
        with pytest.raises(UserError, match=f"did you mean {suggestion}"):
            load_backbone(weights, seed=0, cache_dir=tmp_path)


def test_a_path_in_the_place_of_the_name_is_pointed_out():
    with pytest.raises(UserError, match="weights="):
        pretrained.load_pretrained("folder/checkpoint.pth")


def test_a_model_without_published_weights_says_so(tmp_path):
    with pytest.raises(UserError, match="no weights were published for dino_vitt16"):
        pretrained.load_pretrained("dino_vitt16", cache_dir=tmp_path)
