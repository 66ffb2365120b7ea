"""Damaged checkpoints: noticed, named and passed over, never given back in silence."""

import shutil

import jax
import jax.numpy as jnp
import pytest

from dinojax import UserError
from dinojax.checkpoint import TrainingCheckpoints
from tests.support.checkpoint_states import LIKE, assert_same, save_steps, state_of, tiny_training


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(folder):
    return max(folder.rglob("state/**/d/*"), key=lambda path: path.stat().st_size)


DAMAGES = {
    "flipped array": (lambda step: flip(largest(step)), "model.weight is not what was written"),
    "cut array": (lambda step: cut(largest(step)), "model.weight cannot be read"),
    "emptied array": (lambda step: largest(step).write_bytes(b""), "model.weight cannot be read"),
    "deleted array": (lambda step: largest(step).unlink(), "model.weight cannot be read"),
    "flipped index": (lambda step: flip(step / "state" / "manifest.ocdbt"), "model.bias cannot be read"),
    "no arrays": (lambda step: shutil.rmtree(step / "state"), "model.bias cannot be read"),
    "flipped manifest": (lambda step: flip(step / "manifest" / "metadata"), "its manifest "),
    "cut manifest": (lambda step: cut(step / "manifest" / "metadata"), "its manifest cannot be read"),
    "edited manifest": (
        lambda step: (step / "manifest" / "metadata").write_text(
            (step / "manifest" / "metadata").read_text().replace('"seen": 20', '"seen": 30')
        ),
        "its manifest is not the one that was written",
    ),
    "deleted manifest": (lambda step: (step / "manifest" / "metadata").unlink(), "its manifest cannot be read"),
    "empty folder": (lambda step: [shutil.rmtree(step), step.mkdir()], "its manifest cannot be read"),
    "another step's": (
        lambda step: [shutil.rmtree(step), shutil.copytree(step.with_name("step_1"), step)],
        "its manifest is not the one that was written",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(damage, tmp_path, capfd):
    save_steps(tmp_path, 1, 2, scores={1: 0.1, 2: 0.2})
    destroy, complaint = DAMAGES[damage]
    destroy(tmp_path / "step_2")
    with TrainingCheckpoints(tmp_path) as checkpoints:
        for restore in (checkpoints.restore_best, checkpoints.restore):
            restored = restore(LIKE)
            assert (restored.step, restored.record, len(restored.skipped)) == (1, {"seen": 10}, 1)
            assert restored.skipped[0].startswith(f"the checkpoint of step 2 is damaged: {complaint}")
            assert_same(restored.state, state_of(1))
        # The training gets to the same step once more.
        checkpoints.save(2, state_of(2), record={"seen": 21})
        again = checkpoints.restore(LIKE)
        assert (again.step, again.record, again.skipped) == (2, {"seen": 21}, [])
        assert_same(again.state, state_of(2))
    assert capfd.readouterr() == ("", "")


def test_no_damage_of_any_file_gives_another_state(tmp_path):
    """What no hash covers, such as Orbax's own notes, may be damaged without harm; all else is noticed."""
    save_steps(tmp_path / "whole", 2)
    noticed = 0
    for path in sorted((tmp_path / "whole").rglob("*")):
        for damage in (flip, cut) if path.is_file() else ():
            shutil.copytree(tmp_path / "whole", tmp_path / "copy")
            damage(tmp_path / "copy" / path.relative_to(tmp_path / "whole"))
            with TrainingCheckpoints(tmp_path / "copy") as checkpoints:
                try:
                    assert_same(checkpoints.restore(LIKE).state, state_of(2))
                except UserError as error:
                    noticed += 1
                    assert "holds no sound checkpoint" in str(error)
            shutil.rmtree(tmp_path / "copy")
    assert noticed >= 6  # arrays, index and manifest


def test_later_damaged_checkpoints_go_with_the_next_save(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, keep_newest=4)
    for step in (3, 4):
        flip(largest(tmp_path / f"step_{step}"))
    with TrainingCheckpoints(tmp_path, keep_newest=4) as checkpoints:
        restored = checkpoints.restore(LIKE)
        assert restored.step == 2
        assert [sentence[:24] for sentence in restored.skipped] == [
            "the checkpoint of step 4",
            "the checkpoint of step 3",
        ]
        assert checkpoints.steps == [1, 2, 3, 4]
        checkpoints.save(3, state_of(3), record={})
        checkpoints.wait()
        assert checkpoints.steps == [1, 2, 3]
        assert checkpoints.restore(LIKE).step == 3


def test_no_sound_checkpoint_is_the_users_to_decide(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        flip(largest(tmp_path / f"step_{step}"))
    with (
        TrainingCheckpoints(tmp_path) as checkpoints,
        pytest.raises(
            UserError, match=f"{tmp_path} holds no sound checkpoint.*remove the folder to start again or name"
        ),
    ):
        checkpoints.restore(LIKE)


def test_another_architecture_is_named_and_not_passed_over(tmp_path):
    extra = {"model": {**state_of(2)["model"], "extra": jnp.zeros(2)}, "step": jnp.zeros([])}
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), record={})
        checkpoints.save(2, extra, record={})
        with pytest.raises(
            UserError, match=r"of step 2 in .* is another model's.* model\.extra is float32\[2\] there and absent here"
        ):
            checkpoints.restore(LIKE)
        with pytest.raises(UserError, match=r"; step is float32\[\] there and int32\[\] here"):
            checkpoints.restore(LIKE)
    init, _ = tiny_training()
    deeper, _ = tiny_training(depth=2)
    with TrainingCheckpoints(tmp_path / "tiny") as checkpoints:
        checkpoints.save(1, init(), record={})
        with pytest.raises(UserError, match=r"student\.backbone\.blocks\.1.* is absent there.*and \d+ more; give"):
            checkpoints.restore(jax.eval_shape(deeper))


def test_where_every_scored_checkpoint_is_damaged_the_newest_sound_one_is_the_best(tmp_path):
    save_steps(tmp_path, 1, 2, 3, scores={1: 0.5}, keep_newest=2)
    flip(largest(tmp_path / "step_1"))
    with TrainingCheckpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_best(LIKE)
    assert restored.step == 3
    assert restored.skipped == [
        "the checkpoint of step 1 is damaged: model.weight is not what was written (its SHA-256 differs)"
    ]


def test_a_training_goes_back_to_an_earlier_step(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    with TrainingCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"holds no checkpoint of step 7; its steps are: 1, 2, 3"):
            checkpoints.restore(LIKE, step=7)
        assert_same(checkpoints.restore(LIKE, step=1).state, state_of(1))
        checkpoints.save(2, state_of(20), record={})
    with TrainingCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1, 2]
        assert_same(checkpoints.restore(LIKE).state, state_of(20))


@pytest.mark.parametrize("damage", DAMAGES)
def test_some_arrays_are_read_from_the_newest_checkpoint_in_which_they_are_sound(damage, tmp_path):
    save_steps(tmp_path, 1, 2)
    destroy, _ = DAMAGES[damage]
    destroy(tmp_path / "step_2")
    with TrainingCheckpoints(tmp_path) as checkpoints:
        found = checkpoints.read(("model.",))
        assert (found.step, found.record, len(found.skipped)) == (1, {"seen": 10}, 1)
        assert set(found.state) == {"model.weight", "model.bias"}
        assert (found.state["model.weight"] == state_of(1)["model"]["weight"]).all()
        with pytest.raises(UserError, match="holds no checkpoint of step 3; its steps are: 1, 2"):
            checkpoints.read(("model.",), step=3)
        assert checkpoints.read(("step",), step=1).state["step"] == 1
        checkpoints.save(3, state_of(3), record={})  # reading has not made it the checkpoint that was restored


def test_arrays_that_are_not_asked_for_may_be_damaged(tmp_path):
    save_steps(tmp_path, 1)
    flip(largest(tmp_path / "step_1"))
    with TrainingCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.read(("step", "model.bias")).skipped == []
        with pytest.raises(UserError, match=r"model\.weight is not what was written"):
            checkpoints.read(("model.weight",))


def test_reading_follows_a_training_that_removes_what_is_superseded(tmp_path):
    """The newest checkpoint is removed while it is read, as soon as a newer one is there."""
    save_steps(tmp_path, 1)

    class Overtaken(TrainingCheckpoints):
        def _manifest(self, step):
            if step == 1:
                save_steps(tmp_path, 2, keep_newest=1)
            return super()._manifest(step)

    with Overtaken(tmp_path) as checkpoints:
        found = checkpoints.read(("model.",))
    assert (found.step, found.skipped) == (2, [])
