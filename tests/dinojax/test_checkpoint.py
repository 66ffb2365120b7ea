"""Checkpoints of a training: back bit for bit, and whole or not at all."""

import json
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from dinojax import UserError
from dinojax.checkpoint import TrainingCheckpoints
from dinojax.pretraining.step import TrainState
from tests.support.checkpoint_states import LIKE, assert_same, save_steps, state_of, tiny_training

UNFINISHED = "*.orbax-checkpoint-tmp*"


def test_a_training_that_was_interrupted_goes_on_bit_for_bit(tmp_path):
    init, step = tiny_training()
    state = step(step(init()))
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(int(state.step), state, record={"epoch": 1})
        uninterrupted = step(step(state))  # takes the buffers that were just saved
    with TrainingCheckpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(init))
    assert (restored.step, restored.record, restored.skipped) == (2, {"epoch": 1}, [])
    assert isinstance(restored.state, TrainState)
    assert isinstance(restored.state.student, nnx.State)
    assert_same(step(step(restored.state)), uninterrupted)


class FormerFreeze(NamedTuple):
    """The state of the frozen last layer as it was called before `optax.conditionally_mask`."""

    count: jax.Array
    inner: tuple


def test_a_checkpoint_from_before_the_freeze_was_optax_s_is_read(tmp_path):
    init, step = tiny_training()
    state = step(step(init()))
    groups = state.opt_state.inner_states
    former = groups | {"last_layer": groups["last_layer"]._replace(inner_state=FormerFreeze(*groups["last_layer"][0]))}
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state._replace(opt_state=state.opt_state._replace(inner_states=former)), record={})
        assert_same(checkpoints.restore(jax.eval_shape(init)).state, state)


def test_the_state_is_the_one_at_save_whatever_becomes_of_its_buffers(tmp_path):
    def first():
        return {f"leaf {index}": jnp.full(10**6, index, jnp.float32) for index in range(20)}

    add = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    add(first())
    state, host = first(), np.zeros(10**6, np.float32)
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, (state, host), record={})
        host += 1
        for _ in range(3):
            state = add(state)
        expected = (first(), jnp.zeros(10**6))
        assert_same(checkpoints.restore(expected).state, expected)


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    with jax.enable_x64(True):
        odd = np.array([np.nan, -0.0, 5e-324, -np.inf, np.pi])
        odd_bits = np.array([0x7FF8DEADBEEF0001, 0xFFF0000000000001], np.uint64)
        state = {
            "float64": jnp.asarray(odd),
            "float32": jnp.asarray(odd, jnp.float32),
            "bfloat16": jnp.asarray(odd, jnp.bfloat16),
            "float8": jnp.asarray([1.0, 0.5], jnp.float8_e4m3fn),
            "nan payloads": jax.lax.bitcast_convert_type(jnp.asarray(odd_bits), jnp.float64),
            "int32": jnp.int32(-7),
            "int64": jnp.asarray([2**62 + 1]),
            "bool": jnp.asarray([[True, False]]),
            "complex": jnp.asarray([1 + 2j]),
            "raw key": jax.random.PRNGKey(3),
            "keys": jax.random.split(jax.random.key(4), 3),
            "rbg key": jax.random.key(5, impl="rbg"),
            "a/b.c ü": (jnp.zeros(2), None, [jnp.ones([])]),
        }
        with TrainingCheckpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state, record={})
            for like in (state, jax.eval_shape(lambda: state)):
                assert_same(checkpoints.restore(like).state, state)


@pytest.mark.parametrize("leaf", [3, "text", np.zeros((0, 2))], ids=repr)
def test_what_is_no_array_is_refused_at_once(leaf, tmp_path):
    with TrainingCheckpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match=r"model\.0 of the state is "):
        checkpoints.save(1, {"model": [leaf]}, record={})
    assert list(tmp_path.iterdir()) == []


def test_float64_is_refused_where_jax_makes_it_float32(tmp_path):
    with jax.enable_x64(True):
        state = {"weight": jnp.asarray([np.pi])}
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, record={})
        with pytest.raises(UserError, match="JAX_ENABLE_X64"):
            checkpoints.restore(state)


def test_arrays_go_where_those_of_the_like_are_bound(tmp_path):
    save_steps(tmp_path, 1)
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec())
    with TrainingCheckpoints(tmp_path) as checkpoints:
        free = checkpoints.restore(state_of(1)).state
        bound = checkpoints.restore(jax.device_put(state_of(1), sharding)).state
    assert not any(leaf.committed for leaf in jax.tree.leaves(free))
    assert {leaf.sharding for leaf in jax.tree.leaves(bound)} == {sharding}


def test_the_newest_and_the_best_are_kept(tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.9, 5: float("nan"), 6: None, 7: 0.2, 8: 0.3}
    save_steps(tmp_path, *scores, scores=scores, keep_newest=2, keep_best=2)
    with TrainingCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [2, 4, 7, 8]
        best = checkpoints.restore_best(LIKE)
        assert (best.step, best.record) == (4, {"seen": 40})
        assert_same(best.state, state_of(4))
        assert checkpoints.restore(LIKE).step == 8
    save_steps(tmp_path / "failed", 1, 2, scores={1: float("nan"), 2: 0.1})
    assert TrainingCheckpoints(tmp_path / "failed").restore_best(LIKE).step == 2
    save_steps(tmp_path / "no best", 1, 2, 3, scores=scores, keep_newest=1, keep_best=0)
    assert TrainingCheckpoints(tmp_path / "no best").steps == [3]


def test_nothing_to_restore_is_no_mistake(tmp_path):
    with TrainingCheckpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(LIKE) is None
        assert checkpoints.restore_best(LIKE) is None
        assert not (tmp_path / "new").exists()
        checkpoints.save(1, state_of(1), record={})
        assert checkpoints.restore_best(LIKE) is None


def test_the_record_is_the_one_at_save(tmp_path):
    record = {"seeds": [1, 2], "loss": float("inf"), "settings": {"lr": 0.1 + 0.2}}
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), record=record)
        record["seeds"].append(3)
        assert checkpoints.restore(LIKE).record == {**record, "seeds": [1, 2]}


def test_a_save_on_leaving_may_come_at_any_time(tmp_path):
    with TrainingCheckpoints(tmp_path) as checkpoints:
        for seen in (1, 2):
            checkpoints.save(5, state_of(5), record={"seen": seen})
    with TrainingCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(LIKE).record == {"seen": 1}
        checkpoints.save(5, state_of(5), record={"seen": 3})
        assert checkpoints.restore(LIKE).record == {"seen": 1}


def test_two_runs_do_not_mix(tmp_path):
    save_steps(tmp_path, 100)
    for step in (10, 100):
        with (
            TrainingCheckpoints(tmp_path) as checkpoints,
            pytest.raises(UserError, match=f"up to step 100, and now step {step}.*resume from them or name another"),
        ):
            checkpoints.save(step, state_of(step), record={})
    assert TrainingCheckpoints(tmp_path).steps == [100]


def test_orbax_itself_reads_them(tmp_path):
    save_steps(tmp_path, 3)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arrays = checkpointer.restore(tmp_path / "step_3" / "state")
    np.testing.assert_array_equal(arrays["model.weight"], state_of(3)["model"]["weight"])
    manifest = json.loads((tmp_path / "step_3" / "manifest" / "metadata").read_text())
    assert arrays.keys() == manifest["leaves"].keys() == {"model.weight", "model.bias", "step"}


def test_a_full_disk_is_named_before_anything_is_written(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.restore(LIKE)
        with monkeypatch.context() as patched:
            patched.setattr(
                shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5 * 10**5, 5 * 10**5)
            )
            with pytest.raises(UserError, match=r"needs 1 MB, and .* has 0 MB left; make room"):
                checkpoints.save(2, state_of(2), record={})
        checkpoints.save(2, state_of(2), record={})
    assert TrainingCheckpoints(tmp_path).steps == [1, 2]


def test_a_failed_write_ends_a_command_in_one_sentence(tmp_path):
    """The write breaks off in the middle, as at the end of a quota, which no look at the free space shows."""
    save_steps(tmp_path, 1)
    code = """
import contextlib, resource, sys, jax.numpy as jnp
from dinojax.checkpoint import TrainingCheckpoints
from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
with exit_on_user_error(), TrainingCheckpoints(sys.argv[1]) as checkpoints:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    checkpoints.save(2, {"weight": jnp.ones(6000)}, record={})
    if sys.argv[2] == "tries again":
        with contextlib.suppress(UserError):
            checkpoints.wait()
        checkpoints.save(2, {"weight": jnp.ones(6000)}, record={})
"""
    for way in ("ends", "tries again"):
        done = subprocess.run([sys.executable, "-c", code, tmp_path, way], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        sentence = done.stderr.splitlines()[-1]
        assert sentence.startswith(
            f"error: the checkpoint of step 2 could not be written to {tmp_path} (File too large"
        )
        assert sentence.endswith("make room or name another folder; the earlier checkpoints are untouched")
        assert TrainingCheckpoints(tmp_path).steps == [1]
    with TrainingCheckpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(LIKE).state, state_of(1))
        checkpoints.save(2, state_of(2), record={})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_1", "step_2"]


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        TrainingCheckpoints(tmp_path / "file") as checkpoints,
        pytest.raises(UserError, match=r"file cannot be written to .*name another folder"),
    ):
        checkpoints.save(1, state_of(1), record={})


def test_other_things_in_the_folder_stay(tmp_path):
    for name in ("2024", "step_new", "step_007", "notes.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_7").write_text("a file")
    save_steps(tmp_path, 1, 2, 3, keep_newest=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"2024", "step_new", "step_007", "notes.orbax-checkpoint-tmp", "step_7", "step_3"}


TRAINING = """
import sys, numpy as np
from dinojax.checkpoint import TrainingCheckpoints

def state_of(step):
    return {f"leaf{index}": np.random.default_rng([step, index]).random((96, 10_000), np.float32) for index in range(8)}

with TrainingCheckpoints(sys.argv[1], keep_newest=2) as checkpoints:
    restored = checkpoints.restore(state_of(0))
    step = 0 if restored is None else restored.step
    while True:
        step += 1
        checkpoints.save(step, state_of(step), record={"seen": step})
"""


def test_a_training_killed_in_the_middle_of_a_save_goes_on_from_the_one_before(tmp_path):
    namespace = {}
    exec(TRAINING.split("with")[0], namespace)  # the very same `state_of`
    like, reached = namespace["state_of"](0), 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", TRAINING, str(tmp_path)])
        try:
            stop_in_the_middle_of_a_save(process, tmp_path, after=reached + 3)
        finally:
            process.kill()
            process.wait()
        assert len(list(tmp_path.glob(UNFINISHED))) == 1
        checkpoints = TrainingCheckpoints(tmp_path)
        newest = checkpoints.steps[-1]
        restored = checkpoints.restore(like)
        assert (restored.step, restored.record, restored.skipped) == (newest, {"seen": newest}, [])
        assert newest >= reached + 3
        assert_same(restored.state, jax.tree.map(jnp.asarray, namespace["state_of"](newest)))
        reached = newest
    with checkpoints:
        checkpoints.save(reached + 1, like, record={})
    assert not list(tmp_path.glob(UNFINISHED))


def stop_in_the_middle_of_a_save(process, folder, after):
    """Leaves the process standing still where a checkpoint is half written."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(step >= after for step in TrainingCheckpoints(folder).steps) and list(folder.glob(UNFINISHED)):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)
            if list(folder.glob(UNFINISHED)):
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    raise AssertionError(f"no save was caught, exit code {process.poll()}")
