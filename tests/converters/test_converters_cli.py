"""`python -m converters`: what it writes, prints and refuses, and that `--verify` can fail."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dinojax
from converters import __main__ as command
from converters import verify
from converters.pretrained import convert
from converters.sources import Source
from converters.weight_files.state_dicts import read_state_dict
from tests.support.http_files import serving
from tests.support.tiny_weights import TINY_V1, TINY_V2, official_state, torch_bytes

pytest.importorskip("torch")

WITH_REGISTERS = dataclasses.replace(
    TINY_V2, num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0, num_heads=2
)


def write(path: Path, content) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else torch_bytes(content))
    return path


def refusal(capsys, *args: object) -> str:
    """Runs a command that must end in exit code 2 with one line; returns the line."""
    with pytest.raises(SystemExit) as caught:
        command.main([str(arg) for arg in args])
    streams = capsys.readouterr()
    assert caught.value.code == 2
    assert streams.out == "" and streams.err.startswith("error: ") and streams.err.count("\n") == 1
    return streams.err


# --- converting


def test_a_file_becomes_a_folder_beside_it(tmp_path, capsys):
    state = official_state(TINY_V2)
    file = write(tmp_path / "mine.pth", state)
    command.main([str(file)])
    model = dinojax.load(tmp_path / "mine-flax")
    assert model.config == dataclasses.replace(TINY_V2, mlp_ratio=4.0)
    assert np.array_equal(model.blocks[0].mlp.fc1.kernel[...], state["blocks.0.mlp.fc1.weight"].T)
    printed = capsys.readouterr().out
    count = sum(array.size for array in state.values())
    assert f"mine.pth: {count:,} parameters" in printed and str(tmp_path / "mine-flax") in printed


def test_out_num_heads_and_which_are_followed(tmp_path):
    networks = {"teacher": official_state(TINY_V1, 1), "student": official_state(TINY_V1, 2)}
    checkpoint = {key: {f"backbone.{k}": _torch(v) for k, v in state.items()} for key, state in networks.items()}
    file = write(tmp_path / "checkpoint.pth", checkpoint)
    command.main([str(file), "--out", str(tmp_path / "deep/er"), "--which", "student", "--num-heads", "2"])
    model = dinojax.load(tmp_path / "deep/er")
    assert model.config.num_heads == 2
    assert np.array_equal(model.norm.bias[...], networks["student"]["norm.bias"])
    command.main([str(file), "--out", str(tmp_path / "deep/er")])  # an earlier result is replaced
    assert np.array_equal(dinojax.load(tmp_path / "deep/er").norm.bias[...], networks["teacher"]["norm.bias"])


def test_a_published_name_goes_to_the_cache_and_where_out_says(tmp_path, monkeypatch):
    variants = {**dinojax.VARIANTS, "tiny_vit14": TINY_V2}
    for module in ("converters.pretrained", "converters.__main__"):
        monkeypatch.setattr(sys.modules[module], "VARIANTS", variants)
    monkeypatch.setattr(sys.modules["converters.pretrained"], "SOURCES", {"tiny_vit14": Source("tiny.pth")})
    with serving() as server:
        server.files["tiny.pth"] = torch_bytes(official_state(TINY_V2))
        monkeypatch.setenv("DINOJAX_WEIGHTS_URL", server.url)
        command.main(["tiny_vit14", "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")])
        command.main(["tiny_vit14", "--cache-dir", str(tmp_path / "cache")])
        assert len(server.served) == 1
        command.main(["tiny_vit14", "--cache-dir", str(tmp_path / "cache"), "--verify"])
        assert len(server.served) == 2  # PyTorch needs the official file, which is not kept
    expected = official_state(TINY_V2)["norm.bias"]
    for folder in (tmp_path / "cache/models/tiny_vit14", tmp_path / "out"):
        assert np.array_equal(dinojax.load(folder).norm.bias[...], expected)


# --- and back


@pytest.mark.parametrize("config", [TINY_V1, TINY_V2, WITH_REGISTERS], ids=["dino", "dinov2", "registers"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_pytorch_gets_back_what_it_gave(tmp_path, capsys, config, suffix):
    import torch
    from safetensors.torch import load_file

    state, out = official_state(config), tmp_path / f"deep/er/back{suffix}"
    command.main([str(write(tmp_path / "mine.pth", state)), "--num-heads", str(config.num_heads)])
    command.main([str(tmp_path / "mine-flax"), "--out", str(out)])
    found = torch.load(out, weights_only=True) if suffix == ".pth" else load_file(out)
    assert found.keys() == state.keys()
    for name, array in state.items():
        assert found[name].dtype == torch.float32 and found[name].is_contiguous()
        np.testing.assert_array_equal(found[name].numpy(), array, err_msg=name)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert f"written to {out} for PyTorch" in capsys.readouterr().out


@pytest.mark.slow  # traces the model in PyTorch and in JAX at several sizes
def test_a_trained_model_in_pytorch_is_verified(tmp_path, capsys):
    pytest.importorskip("transformers")
    command.main(["dinojax_vitt", "--verify", "--out", str(tmp_path / "vitt.safetensors")])
    assert "(bound 3e-05): equal" in capsys.readouterr().out
    assert convert(read_state_dict(tmp_path / "vitt.safetensors"), "vitt", num_heads=4).config.embed_dim == 128


def test_what_cannot_be_written_for_pytorch_is_said(tmp_path, capsys):
    command.main([str(write(tmp_path / "mine.pth", official_state(TINY_V2)))])
    capsys.readouterr()
    folder, before = tmp_path / "mine-flax", sorted(tmp_path.rglob("*"))
    assert "--out FILE.pth or FILE.safetensors" in refusal(capsys, folder)
    assert "neither .pth nor .safetensors" in refusal(capsys, folder, "--out", tmp_path / "mine.onnx")
    assert "exists; remove it" in refusal(capsys, folder, "--out", tmp_path / "mine.pth")
    for words in (("--num-heads", "2"), ("--which", "student")):
        assert "heads are known" in refusal(capsys, folder, "--out", tmp_path / "new.pth", *words)
    assert "not a dinov2_vits14" in refusal(capsys, folder, "--out", tmp_path / "new.pth", "--name", "dinov2_vits14")
    assert "could not be written" in refusal(capsys, folder, "--out", tmp_path / "mine.pth" / "new.pth")
    assert sorted(tmp_path.rglob("*")) == before


# --- verifying


@pytest.mark.parametrize("config", [TINY_V1, TINY_V2, WITH_REGISTERS], ids=["dino", "dinov2", "registers"])
def test_verify_compares_every_output_with_pytorch(tmp_path, capsys, config):
    pytest.importorskip("transformers")
    file = write(tmp_path / "mine.pth", official_state(config))
    command.main([str(file), "--verify", "--num-heads", str(config.num_heads)])
    printed = capsys.readouterr().out
    outputs = ["cls_token", "patch_tokens", "block 0 (raw)", "block 1 (raw)", "attention"]
    outputs += ["register_tokens"] if config.num_register_tokens else []
    assert all(f"\n{output} " in printed for output in outputs)
    patch, native = config.patch_size, config.img_size
    assert all(f" {h}x{w} " in printed for h, w in [(7 * patch, 7 * patch), (10 * patch, 13 * patch), (native, native)])
    assert "(bound 3e-05): equal" in printed
    assert (tmp_path / "mine-flax/config.json").is_file()


def test_verify_takes_hugging_face_files_as_they_are(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    transformers.utils.logging.disable_progress_bar()
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes, use_swiglu_ffn=True)).save_pretrained(tmp_path / "hub")
    command.main([str(tmp_path / "hub"), "--verify"])
    assert "equal" in capsys.readouterr().out
    assert dinojax.load(tmp_path / "hub-flax").config.ffn_layer == "swiglufused"


def test_a_difference_ends_in_exit_code_1_and_nothing_written(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    file = write(tmp_path / "mine.pth", official_state(TINY_V2))
    # float32 rounding is above zero, so that a bound of zero stands for a wrong model
    monkeypatch.setattr(verify, "BOUND", 0.0)
    with pytest.raises(SystemExit) as caught:
        command.main([str(file), "--verify"])
    assert caught.value.code == 1
    assert "NOT equal" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["mine.pth"]


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (TINY_V2, "blocks.1.attn.proj.weight"),
        (TINY_V2, "blocks.0.norm2.bias"),
        (WITH_REGISTERS, "register_tokens"),
        (TINY_V1, "patch_embed.proj.weight"),
    ],
)
def test_verify_sees_one_wrong_tensor(config, wrong):
    """Square matrices fit transposed too; vectors and tokens fit in any order."""
    pytest.importorskip("transformers")
    state = official_state(config)
    array = state[wrong]
    changed = array.T if array.ndim == 2 else np.flip(array, -1)
    model = convert(state | {wrong: np.ascontiguousarray(changed)}, "wrong", num_heads=config.num_heads)
    size = (config.img_size, config.img_size)
    differences, _ = verify.verify(model, state, sizes=[size])
    assert verify.worst(differences) > 100 * verify.BOUND


def test_not_a_number_is_no_agreement():
    differences = [verify.Difference("torch", "cls_token", (1, 1), largest, 1.0) for largest in (1e-9, float("nan"))]
    assert verify.worst(differences) == float("inf")


# --- refusing


def test_bad_files_end_in_one_line_and_nothing_written(tmp_path, capsys):
    write(tmp_path / "page.pth", b"<html>403</html>")
    file = torch_bytes(official_state(TINY_V2))
    write(tmp_path / "cut.pth", file[: len(file) // 2])
    write(tmp_path / "good.pth", file)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert "web page" in refusal(capsys, tmp_path / "page.pth")
    assert "cut off" in refusal(capsys, tmp_path / "cut.pth")
    assert "does not exist" in refusal(capsys, tmp_path / "nowhere.pth")
    assert "not a dinov2_vits14: img_size 28" in refusal(capsys, tmp_path / "good.pth", "--name", "dinov2_vits14")
    assert "did you mean" in refusal(capsys, tmp_path / "good.pth", "--name", "dinov2_vit_s14")
    assert "did you mean" in refusal(capsys, "dinov2_vits41")
    assert "--num-heads 0" in refusal(capsys, tmp_path / "good.pth", "--num-heads", "0")
    assert "num_heads=5" in refusal(capsys, tmp_path / "good.pth", "--num-heads", "5")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_foreign_folder_is_never_replaced(tmp_path, capsys):
    file = write(tmp_path / "mine.pth", official_state(TINY_V2))
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text('{"model_type": "dinov2"}')
    (hub / "precious.txt").write_text("mine")
    assert "not a converted model" in refusal(capsys, file, "--out", hub)
    assert (hub / "precious.txt").read_text() == "mine"


def test_no_network_ends_within_seconds_and_names_the_way_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DINOJAX_WEIGHTS_URL", "http://127.0.0.1:9")
    line = refusal(capsys, "dinov2_vits14", "--cache-dir", tmp_path)
    assert "dinov2_vits14_pretrain.pth on another machine" in line


def test_help_loads_no_heavy_package():
    program = (
        "import sys\nfrom converters import __main__ as command\n"
        "try: command.main(['--help'])\nexcept SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'tensorflow', 'matplotlib', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "HEAVY []" in result.stdout and "--verify" in result.stdout


def test_the_module_runs_as_a_command(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "converters", str(tmp_path / "nowhere.pth")], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def _torch(array: np.ndarray):
    import torch

    return torch.from_numpy(array)
