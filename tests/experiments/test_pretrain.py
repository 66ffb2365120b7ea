"""The pretraining loop: resumed equals uninterrupted bit for bit; how runs stop, what they refuse and what they say."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

from dinojax import Preprocessing, UserError, load
from dinojax.checkpoint import TrainingCheckpoints
from dinojax.parallel import make_mesh
from dinojax.pretraining.augment import MultiCropConfig
from experiments import dino_cifar100, dino_tinyimagenet
from experiments import pretrain as pretrain_command
from experiments.pretraining.config import PretrainConfig
from experiments.pretraining.data import EpochSampler, own_statistics, windows
from experiments.pretraining.loop import pretrain
from experiments.pretraining.online import make_embed
from experiments.pretraining.program import is_sound, make_networks, make_program
from experiments.runs.lock import RunLock
from experiments.runs.log import read_log
from experiments.runs.settings import create, replace

ROOT = Path(__file__).parents[2]
EPOCHS, STEPS_PER_EPOCH = 8, 5
FLAGS = {
    "data": "digits", "max_train": 320, "max_test": 100, "batch_size": 64, "epochs": EPOCHS, "patch_size": 4,
    "embed_dim": 16, "depth": 1, "num_heads": 2, "prototypes": 16, "head_hidden_dim": 16, "bottleneck_dim": 8,
    "warmup_epochs": 1, "knn_every": 4, "log_every": 2, "checkpoint_minutes": 1e-6,
}  # fmt: skip
CROPS = MultiCropConfig(global_size=12, local_size=8, local_crops=1)
TINY = create(PretrainConfig, crops=CROPS, evaluate=False, recipe="small", **FLAGS)


def settings(**changes):
    cache = {"cache_dir": changes["out"].parent / "cache"} if "out" in changes else {}
    return replace(TINY, **{**cache, **changes})


def final_state(folder, config=TINY):
    like = jax.eval_shape(make_program(config, STEPS_PER_EPOCH).init)
    with TrainingCheckpoints(folder / "checkpoints", keep_newest=config.monitoring.keep) as checkpoints:
        return checkpoints.restore(like)


def log_without_times(folder):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_log(folder)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return pretrain(settings(out=tmp_path_factory.mktemp("run") / "whole")).folder


def start(folder, **environment):
    flags = [word for name, value in FLAGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    crops = ["--crops.global-size", "12", "--crops.local-size", "8", "--crops.local-crops", "1", "--no-evaluate"]
    crops += ["--cache-dir", str(folder.parent / "cache")]
    code = (
        "import sys; from experiments.pretraining.command import run_recipe; "
        "from experiments.pretraining.config import PretrainConfig; from experiments.runs.settings import create; "
        "small = {'small': create(PretrainConfig, data='digits', recipe='small')}; "
        "run_recipe('tiny', small, '', ['small', *sys.argv[1:]])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "--out", str(folder), *flags, *crops],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"} | environment,
    )  # fmt: skip


def wait_for_step(folder, step, process):
    while not any(record["step"] >= step for record in read_log(folder)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


@pytest.mark.slow  # two trainings, one of them killed and resumed
def test_a_run_stopped_then_killed_equals_the_uninterrupted_one_bit_for_bit(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    stopped = start(folder)
    wait_for_step(folder, 7, stopped)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate()[0]
    assert stopped.returncode == 0 and re.search(r"stopped by SIGTERM at step \d+ of 40", said), said

    killed = start(folder)
    wait_for_step(folder, 22, killed)
    killed.kill()
    assert "resuming at step" in killed.communicate()[0]
    assert not (folder / "result.json").exists()

    pretrain(settings(out=folder))
    assert log_without_times(folder) == log_without_times(uninterrupted)
    found, expected = final_state(folder), final_state(uninterrupted)
    assert found.step == expected.step == EPOCHS * STEPS_PER_EPOCH
    jax.tree.map(np.testing.assert_array_equal, found.state, expected.state)
    for name in ("teacher", "student"):
        arrays, others = (load_file(run / name / "model.safetensors") for run in (folder, uninterrupted))
        assert arrays.keys() == others.keys()
        assert all(np.array_equal(arrays[key], others[key]) for key in arrays)
    results = [json.loads((run / "result.json").read_text()) for run in (folder, uninterrupted)]
    assert results[0]["test_knn_accuracy"] == results[1]["test_knn_accuracy"]


def test_the_evaluation_follows_the_training_and_agrees_with_its_k_nn(uninterrupted, tmp_path, capsys):
    """As `experiments.evaluate` evaluates the run; what the labels do not allow is left out with a sentence."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)  # a run that was interrupted before its evaluation
    config = settings(out=folder, evaluate=True, cache_dir=tmp_path / "cache")
    pretrain(config)
    result = json.loads((folder / "evaluation" / "result.json").read_text())
    assert list(result["networks"]) == ["teacher", "student", "untrained"]
    assert {row["probe"] for row in result["rows"]} >= {"knn_20", "knn5", "linear_crops", "5_shot_linear"}
    evaluated = {row["network"]: row["accuracy"] for row in result["rows"] if row["features"] == "cls"
                 and row["probe"] == "knn_20"}  # fmt: skip
    known = json.loads((folder / "result.json").read_text())["test_knn_accuracy"]
    assert {name: evaluated[name] for name in ("teacher", "student")} == {n: known[n] for n in ("teacher", "student")}
    shown = (folder / "evaluation" / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    pretrain(config)
    assert "is finished" in capsys.readouterr().out
    assert (folder / "evaluation" / "result.json").stat().st_mtime_ns == shown


@pytest.mark.slow  # compiles a training of real size
def test_ctrl_c_does_not_wait_for_the_compiler(tmp_path):
    """The process ends before the step is compiled, as JAX's own log says, and leaves nothing half-written."""
    process = start(tmp_path / "run", JAX_ENABLE_COMPILATION_CACHE="0", JAX_LOG_COMPILES="1")
    said = ""
    while "Compiling jit(steps)" not in said:
        said += (letter := process.stdout.read(1))
        assert letter, said
    process.send_signal(signal.SIGINT)
    said += process.communicate()[0]
    assert process.returncode == 130, said
    assert "compiling…" in said and "Finished XLA compilation of jit(steps)" not in said
    assert "stopped by SIGINT before the first step" in said and "Traceback" not in said
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "data.json"}


@pytest.mark.slow  # compiles a loop of two training steps: the longest compilation of this file
def test_however_many_steps_a_dispatch_the_run_is_the_same(uninterrupted, tmp_path):
    """XLA fuses a loop's body differently than one step alone, so to rounding only."""
    folder = pretrain(settings(out=tmp_path / "run", steps_per_dispatch=2)).folder
    losses = [[record["loss"] for record in read_log(run) if "loss" in record] for run in (folder, uninterrupted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_run_folder_holds_what_is_promised(uninterrupted):
    result = json.loads((uninterrupted / "result.json").read_text())
    assert set(result["test_knn_accuracy"]) == {"teacher", "student", "random_init"}
    assert set(result["rank_me"]) == {"teacher", "student", "random_init"}
    assert result["steps"] == 40 and result["uniform_loss"] == pytest.approx(math.log(16))
    assert {"jax", "flax"} <= set(result["environment"]["packages"])
    log = read_log(uninterrupted)
    steps = [record for record in log if "loss" in record]
    # Every epoch of five steps begins a new window of two steps.
    assert [record["step"] for record in steps[:4]] == [2, 4, 5, 7] and steps[-1]["step"] == 40
    assert [record["epoch"] for record in log if "knn_accuracy" in record] == [0, 4, 8]
    assert all(record["kl"] + record["teacher_entropy"] == pytest.approx(record["loss"], rel=1e-5) for record in steps)
    teacher = load(uninterrupted / "teacher")
    assert teacher.config.embed_dim == 16
    assert teacher.preprocessing == Preprocessing(TINY.crops.mean, TINY.crops.std, image_size=12, patch_size=4)
    with Image.open(uninterrupted / "curves.png") as image:
        assert np.asarray(image.convert("L")).std() > 10


def test_the_logged_loss_is_that_of_the_steps(uninterrupted):
    """The first window, computed again from its parts."""
    from experiments.data.load import load_dataset
    from experiments.pretraining.data import read_images

    images = read_images(load_dataset("digits", max_train=320, max_test=100).train, None)
    program, sampler = make_program(TINY, STEPS_PER_EPOCH), EpochSampler(len(images), 64, seed=0)
    state, losses = program.init(), []
    for batches, count in sampler.batches(next(windows(0, EPOCHS, STEPS_PER_EPOCH, 2)), 1):
        state, metrics = program.steps(state, images, batches, count)
        losses.append(float(metrics["loss"][0]))
    logged = next(record for record in read_log(uninterrupted) if "loss" in record)
    assert logged["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert logged["learning_rate"] == pytest.approx(5e-4 * 64 / 256 / 4)


def test_a_finished_run_is_not_run_again(uninterrupted, capsys):
    before = (uninterrupted / "metrics.jsonl").stat().st_mtime_ns
    pretrain(settings(out=uninterrupted))
    assert "is finished" in capsys.readouterr().out
    assert (uninterrupted / "metrics.jsonl").stat().st_mtime_ns == before


def test_other_settings_in_a_run_folder_are_refused(uninterrupted):
    with pytest.raises(UserError, match=r"is a run with learning_rate = 0.0005, not 0.1; give the same settings"):
        pretrain(settings(out=uninterrupted, learning_rate=0.1))
    pretrain(settings(out=uninterrupted, log_every=2, minutes=3))  # these change nothing that is learnt


def test_the_second_process_in_a_run_folder_is_refused(uninterrupted):
    with RunLock(uninterrupted), pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
        pretrain(settings(out=uninterrupted))


def test_a_state_that_overflows_is_not_sound():
    state = make_program(TINY, STEPS_PER_EPOCH).init()
    assert is_sound(state)
    for value in (jnp.nan, jnp.inf, 1e30):  # the last one is finite, and its square is not
        broken = state._replace(student=jax.tree.map(lambda x, value=value: jnp.full_like(x, value), state.student))
        assert not is_sound(broken)


@pytest.mark.slow  # compiles a training of its own
def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint_intact(tmp_path):
    """The teacher's temperature falls to nothing in the third epoch; the way back is tried too."""
    config = settings(out=tmp_path / "run", warmup_teacher_temp_epochs=3, teacher_temp=1e-40)
    with pytest.raises(UserError, match=r"the loss is nan between steps 10 and 12; training has diverged, and earlier"):
        pretrain(config)
    restored = final_state(tmp_path / "run", config)
    assert restored.step == 10 and not restored.skipped
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.state))
    assert all(math.isfinite(record.get("loss", 0)) for record in read_log(tmp_path / "run"))
    mended = replace(config, teacher_temp=0.04, from_step=5, minutes=1e-9)
    with pytest.raises(UserError, match=r"holds no checkpoint of step 6; its steps are: 5, 10"):
        pretrain(replace(mended, from_step=6))
    pretrain(mended)
    assert final_state(tmp_path / "run", mended).step == 7


@pytest.mark.slow  # a training of other temperatures, compiled for itself
def test_collapse_is_named_after_the_warm_up(tmp_path, capfd):
    """Temperatures at which the answers of teacher and student are uniform."""
    config = settings(
        out=tmp_path / "run", epochs=3, teacher_temp=1e3, warmup_teacher_temp=1e3, student_temp=1e3, knn_every=0
    )
    folder = pretrain(config).folder
    assert re.search(
        r"collapse: the loss 2\.\d+ stays at log\(16\).*lower the teacher temperature", capfd.readouterr().out
    )
    named = [record["step"] for record in read_log(folder) if "collapse" in record]
    assert named and min(named) == 10
    assert "collapse" in json.loads((folder / "result.json").read_text())["collapse"]


@pytest.mark.slow  # compiles a training of its own
def test_stopping_after_minutes_saves(tmp_path, capsys):
    result = pretrain(settings(out=tmp_path / "run", minutes=1e-9))
    folder = result.folder
    assert result.test_knn_accuracy is None
    assert "stopped after --minutes at step 2 of 40" in capsys.readouterr().out
    assert final_state(folder).step == 2 and not (folder / "result.json").exists()
    shutil.rmtree(folder / "checkpoints")  # as if it had been killed before the first one
    pretrain(settings(out=folder, minutes=1e-9))
    assert [record["step"] for record in read_log(folder)] == [0, 2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 2_000}, "--batch-size 2000 is more than the 320 training images; give --batch-size 320"),
        ({"data": "no/such/folder"}, "there is no such folder"),
    ],
)
def test_what_cannot_be_run_leaves_no_folder(changes, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        pretrain(settings(out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        pretrain(settings(out=tmp_path))
    with pytest.raises(UserError, match="is a file"):
        pretrain(settings(out=tmp_path / "letter.txt"))


@pytest.fixture
def of_several_sizes(tmp_path):
    """Settings of a training on 8 images of four sizes."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (10 + 2 * i, 14, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    data, out = str(tmp_path / "data"), tmp_path / "run"
    return settings(data=data, out=out, max_train=None, max_test=None, batch_size=4, epochs=1)


@pytest.mark.slow  # compiles a training for another size of images
def test_images_are_brought_to_one_size(of_several_sizes):
    folder = pretrain(replace(of_several_sizes, image_size=12, own_statistics=True)).folder
    assert json.loads((folder / "result.json").read_text())["images"] == 8


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "--epochs 0 is not a positive number"),
        ({"teacher_momentum": 1.5}, "--teacher-momentum 1.5 is not between 0 and 1"),
        ({"patch_size": 10}, "--patch-size 10 is not at most the crops' 8 px"),
        ({"prototype_chunk": 5}, "--prototype-chunk 5 is not a divisor of 16"),
        ({"warmup_epochs": 9}, "--warmup-epochs 9 is not 0 to 8 epochs"),
        ({"crops": MultiCropConfig(global_crops=1, local_crops=0)}, "--crops.global-crops 1 is not 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_run_are_refused(changes, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        settings(**changes).check()


def test_each_epoch_takes_each_image_at_most_once_and_order_does_not_depend_on_where_one_starts():
    sampler = EpochSampler(images=23, batch_size=4, seed=3)
    assert sampler.steps_per_epoch == 5

    def rows(start, size):
        found = []
        for window in windows(start, 3, 5, 2):
            for batches, count in sampler.batches(window, size):
                assert set(batches.epochs) == {window.epoch} and len(batches.rows) == size
                found.extend(batches.rows[:count].tolist())
        return found

    whole = rows(0, 1)
    assert len(whole) == 15
    for epoch in range(3):
        assert len(np.unique(whole[5 * epoch : 5 * epoch + 5])) == 20
    assert whole[:5] != whole[5:10]
    assert rows(0, 2) == whole
    assert rows(7, 1) == whole[7:]
    assert sum(w.stop - w.start for w in windows(7, 3, 5, 2)) == 8
    assert [w.stop for w in windows(0, 1, 5, 2) if w.ends_epoch] == [5]


def test_own_statistics_are_those_of_all_pixels():
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), np.uint8)
    mean, std = own_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-9)


def test_embedding_resizes_as_pillow_and_normalises():
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    model = make_networks(TINY).backbone
    graph, state = nnx.split(model, nnx.Param)
    found = make_embed(graph, TINY, make_mesh())(state, images)
    small = np.stack([Image.fromarray(x).resize((12, 12), Image.Resampling.BICUBIC) for x in images])
    pixels = (small / 255 - np.array(TINY.crops.mean)) / np.array(TINY.crops.std)
    expected = model(pixels.astype(np.float32)).cls_token
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("module", [dino_cifar100, dino_tinyimagenet])
def test_recipes_are_those_of_the_notes(module):
    small, reported, notebook = (module.RECIPES[name] for name in ("small", "reported", "notebook"))
    model = reported.model
    assert (model.patch_size, model.embed_dim, model.depth, model.prototypes) == (16, 192, 12, 65_536)
    assert (reported.crops.global_size, reported.crops.local_crops, notebook.crops.local_crops) == (128, 8, 2)
    assert notebook.distillation.teacher_momentum == notebook.distillation.teacher_momentum_end == 0.996
    training = notebook.training
    assert (training.learning_rate, training.weight_decay, training.epochs) == (1e-4, 1e-6, 300)
    assert small.crops.local_size * 2 == small.crops.global_size == small.model.patch_size * 8
    assert (small.model.prototypes, small.model.norm_last_layer, small.training.warmup_epochs) == (1024, False, 30)
    assert small.dataset.own_statistics


def test_the_general_command_has_the_same_recipes_for_any_images(capsys):
    small32, small64 = pretrain_command.RECIPES["small32"], pretrain_command.RECIPES["small64"]
    named = {"data": "cifar100", "command": "dino_cifar100", "recipe": "small"}
    assert replace(small32, **named) == dino_cifar100.RECIPES["small"]
    named |= {"data": "tiny_imagenet", "command": "dino_tinyimagenet"}
    assert replace(small64, **named) == dino_tinyimagenet.RECIPES["small"]
    for recipe, config in pretrain_command.RECIPES.items():
        assert replace(config, seed=3).folder == Path("runs", "pretrain", f"{recipe}-seed3")
    with pytest.raises(SystemExit) as stop:
        pretrain_command.main(["smoke"])
    assert stop.value.code == 2 and "--data" in capsys.readouterr().err


def test_a_run_folder_of_an_earlier_version_is_resumed(uninterrupted, tmp_path, capsys):
    """Its settings were those of one flat dataclass without a method, and the recipe `reported` was called `seed`."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    kept = json.loads((folder / "config.json").read_text())
    del kept["document_sha256"], kept["method"], kept["init"], kept["architecture"]
    assert kept["prototypes"] == 16 and kept["crops"]["global_size"] == 12  # flat, by the names of the flags
    (folder / "config.json").write_text(json.dumps(kept | {"recipe": "seed"}))
    pretrain(settings(out=folder, recipe="reported"))
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="is a run with recipe = reported, not small"):
        pretrain(settings(out=folder))
