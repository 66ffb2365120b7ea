"""DINOv2 as a method of the pretraining commands, and trainings that start from given weights."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dinojax
from dinojax import Preprocessing, UserError, VisionTransformer, ViTConfig, load
from dinojax.pretraining.augment import MultiCropConfig
from experiments.features.backbones import load_backbone
from experiments.pretraining.config import PretrainConfig
from experiments.pretraining.loop import pretrain
from experiments.pretraining.start import load_start, with_position_table
from experiments.runs.log import read_log
from experiments.runs.settings import create, replace

SHAPE = ViTConfig(img_size=12, patch_size=4, embed_dim=16, depth=2, num_heads=2, init_values=0.5, num_register_tokens=1)
OWN = Preprocessing((0.5, 0.4, 0.3), (0.25, 0.3, 0.2), image_size=12, patch_size=4)
TINY = create(
    PretrainConfig, data="digits", max_train=160, max_test=60, batch_size=32, epochs=3, patch_size=4, embed_dim=16,
    depth=1, num_heads=2, prototypes=16, head_hidden_dim=16, bottleneck_dim=8, warmup_epochs=1, knn_every=1,
    log_every=5, checkpoint_minutes=1e-6, drop_path_rate=0.2, method="dinov2", evaluate=False, recipe="tiny",
    crops=MultiCropConfig(global_size=12, local_size=8, local_crops=1),
)  # fmt: skip


@pytest.fixture
def weights(tmp_path):
    model = VisionTransformer(SHAPE, rngs=nnx.Rngs(5), preprocessing=OWN)
    return model, str(dinojax.save(model, tmp_path / "weights"))


def settings(tmp_path, **changes):
    return replace(TINY, **{"out": tmp_path / "run", "cache_dir": tmp_path / "cache", **changes})


def parameters(model):
    return jax.tree.map(np.asarray, nnx.state(model, nnx.Param))


@pytest.mark.slow  # compiles a step of two heads and runs three times; a DINO run is resumed in each run of the tests
def test_a_run_of_dinov2_resumes_bit_for_bit_and_logs_every_term(tmp_path):
    """Two centers, masks and drop path follow from the step: a run that was stopped on its way is the same."""
    whole = settings(
        tmp_path, out=tmp_path / "whole", centering="centering", patch_prototypes=8, prototype_chunk=4,
        dtype="bfloat16", remat=True, accumulation_steps=2, steps_per_dispatch=3,
    )  # fmt: skip
    pretrain(whole)
    pretrain(replace(whole, out=tmp_path / "parts", minutes=1e-9))
    pretrain(replace(whole, out=tmp_path / "parts"))
    for network in ("teacher", "student"):
        found, expected = (load(tmp_path / run / network) for run in ("parts", "whole"))
        jax.tree.map(np.testing.assert_array_equal, parameters(found), parameters(expected))
    logs = [
        [{k: v for k, v in record.items() if k != "seconds"} for record in read_log(tmp_path / run)]
        for run in ("whole", "parts")
    ]
    assert logs[0][-1] == logs[1][-1]
    steps = [record for record in logs[0] if "loss" in record]
    for one in steps:
        terms = one["class_loss_local"] + one["class_loss_global"] + 0.1 * one["koleo_loss"] + one["patch_loss"]
        assert one["loss"] == pytest.approx(terms, rel=1e-5)
    assert load(tmp_path / "whole" / "teacher").mask_token is not None
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["class_cross_entropy"] == steps[-1]["class_cross_entropy"]


@pytest.mark.slow  # a whole training, which compiles for the heads and for everything
def test_the_training_starts_from_the_weights_and_warms_up_the_heads_alone(weights, tmp_path):
    model, init = weights
    config = settings(tmp_path, init=init, heads_warmup=2, backbone_rate=0.5, epochs=2 + 1, keep=9)
    pretrain(replace(config, minutes=1e-9))  # stops in the first epoch, in which the backbone is frozen
    student = load_backbone(str(tmp_path / "run"), seed=0, cache_dir=tmp_path, network="student").model
    jax.tree.map(np.testing.assert_array_equal, parameters(student), parameters(model))
    pretrain(config)
    log = read_log(tmp_path / "run")
    factors = [record["backbone_factor"] for record in log if "loss" in record]
    assert factors[0] == factors[1] == 0 and factors[-1] == 0.5
    rank = [record["rank_me"] for record in log if "rank_me" in record]
    assert rank[0] == rank[1] == rank[2] != rank[3]  # the features stay until the backbone learns
    teacher = load(tmp_path / "run" / "teacher")
    assert teacher.config == SHAPE.__class__(**{**vars(SHAPE), "drop_path_rate": 0.2})
    assert (teacher.preprocessing.mean, teacher.preprocessing.std) == (OWN.mean, OWN.std)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(result["rank_me"]) == {"teacher", "student", "start"}
    assert result["config"]["init"] == init and result["config"]["own_statistics"] is False


@pytest.mark.slow  # compiles a training for weights of another shape
def test_other_weights_under_the_same_name_are_refused(weights, tmp_path):
    _, init = weights
    config = settings(tmp_path, init=init, minutes=1e-9)
    pretrain(config)
    shutil.rmtree(init)
    dinojax.save(VisionTransformer(SHAPE, rngs=nnx.Rngs(6), preprocessing=OWN), init)
    with pytest.raises(UserError, match="is a run with init_fingerprint = "):
        pretrain(config)


def test_the_position_table_of_a_stage_is_what_the_model_computed_in_every_step(weights):
    model, _ = weights
    resized = with_position_table(model, 20)
    assert resized.pos_embed.shape == (1, 1 + 25, 16) and model.pos_embed.shape == (1, 1 + 9, 16)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 20, 20, 3), np.float32))
    np.testing.assert_allclose(resized(images).cls_token, model(images).cls_token, atol=1e-6)


@pytest.mark.slow  # compiles a training for images of another size
def test_a_stage_trains_at_its_own_size_and_ends_in_a_model_of_that_size(weights, tmp_path):
    pretrain(settings(tmp_path, init=weights[1], stage=20, epochs=1, warmup_epochs=0, learning_rate=0.01))
    teacher = load(tmp_path / "run" / "teacher")
    assert teacher.config.img_size == 20 and teacher.pos_embed.shape == (1, 1 + 25, 16)
    moved = np.asarray(teacher.pos_embed[...]) - np.asarray(with_position_table(weights[0], 20).pos_embed[...])
    assert moved.any() and np.abs(moved).max() < 0.1  # it starts from the resized table
    config = json.loads((tmp_path / "run" / "result.json").read_text())["config"]
    assert config["crops"]["global_size"] == 20 and config["stage"] == 20


def test_crops_become_whole_patches_of_the_weights(weights, tmp_path, capsys):
    config = settings(tmp_path, init=weights[1], crops=MultiCropConfig(global_size=18, local_size=9, local_crops=1))
    crops = load_start(config)[0].crops
    assert (crops.global_size, crops.local_size, crops.mean) == (16, 8, OWN.mean)
    assert "crops of 18 px become 16 px and of 9 px become 8 px" in capsys.readouterr().out
    staged = load_start(settings(tmp_path, init=weights[1], stage=20))[0]
    assert staged.crops.global_size == 20 and staged.architecture.img_size == 20


@pytest.mark.parametrize(
    ("method", "named", "kind"), [("dino", None, "v1"), ("dinov2", None, "v2_paper"), ("dinov2", "v1", "v1")]
)
def test_the_kind_of_blur_follows_the_method_unless_it_is_named(tmp_path, method, named, kind):
    crops = MultiCropConfig(global_size=12, local_size=8, mode=named)
    assert load_start(settings(tmp_path, method=method, crops=crops))[0].crops.mode == kind


@pytest.mark.slow  # compiles a training without clipping
def test_a_loss_of_what_was_learnt_before_is_reported_at_once(weights, tmp_path, capfd):
    config = settings(tmp_path, init=weights[1], learning_rate=0.5, most_lost=0.01, clip_norm=0, epochs=2)
    pretrain(config)
    said = capfd.readouterr()
    assert "the k-NN accuracy in % has fallen from" in said.out + said.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "dinojax_vitt"}, "dinojax_vitt is a DINO model, which has no mask token for --method dinov2"),
        ({"init": "WEIGHTS", "stage": 22}, "--stage 22 is not a multiple of the weights' patch size 4"),
        ({"stage": 24}, "--stage 24 is not possible without --init"),
        ({"heads_warmup": 1}, "--heads-warmup 1 is not possible without --init"),
        ({"init": "WEIGHTS", "heads_warmup": 3}, "--heads-warmup 3 is not less than --epochs 3"),
        ({"patch_size": 5}, "--crops.global-size 12 is not a multiple of the patch size 5"),
        ({"patch_size": 8, "crops": MultiCropConfig(global_size=8, local_size=8)}, "is not two patches of 8 px"),
        ({"mask_ratio": (0.5, 1.1)}, "--mask-ratio 0.5 1.1 is not two rising shares from 0 to 1"),
        ({"mask_ratio": (0.5, 0.1)}, "--mask-ratio 0.5 0.1 is not two rising shares"),
        ({"batch_size": 4, "accumulation_steps": 4}, "--batch-size 1 is not 2 or more in each part, for KoLeo"),
        (
            {"prototype_chunk": 8, "patch_prototypes": 12},
            "--prototype-chunk 8 is not a divisor of the 12 --patch-proto",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_folder_is_made(weights, tmp_path, changes, message):
    changes = {name: weights[1] if value == "WEIGHTS" else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        pretrain(settings(tmp_path, **changes))
    assert not (tmp_path / "run").exists()
