"""Self-distillation: the steps of DINO and DINOv2, and everything they are made of."""

from dinojax.pretraining.augment import MultiCropConfig, multi_crop
from dinojax.pretraining.dinov2_losses import (
    class_token_losses,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
    updated_patch_center,
)
from dinojax.pretraining.dinov2_optim import dinov2_optimizer
from dinojax.pretraining.dinov2_step import (
    DINOv2,
    DINOv2Objective,
    init_dinov2_state,
    make_dinov2_train_step,
    with_masks,
)
from dinojax.pretraining.losses import dino_loss, dino_loss_in_chunks, entropy, teacher_probs, updated_center
from dinojax.pretraining.masking import BlockMasking, block_masks, gather_patches, masked_patches
from dinojax.pretraining.monitors import (
    diagnose_collapse,
    diagnose_dinov2_collapse,
    feature_std,
    gradient_norms,
    rank_me,
)
from dinojax.pretraining.optim import dino_optimizer
from dinojax.pretraining.schedules import cosine_schedule, teacher_temp_schedule
from dinojax.pretraining.step import DINO, Batches, TrainState, init_state, make_pretrain_steps, make_train_step

__all__ = [
    "DINO",
    "Batches",
    "BlockMasking",
    "DINOv2",
    "DINOv2Objective",
    "MultiCropConfig",
    "TrainState",
    "block_masks",
    "class_token_losses",
    "cosine_schedule",
    "diagnose_collapse",
    "diagnose_dinov2_collapse",
    "dino_loss",
    "dino_loss_in_chunks",
    "dino_optimizer",
    "dinov2_optimizer",
    "entropy",
    "feature_std",
    "gather_patches",
    "gradient_norms",
    "ibot_loss",
    "init_dinov2_state",
    "init_state",
    "koleo_loss",
    "make_dinov2_train_step",
    "make_pretrain_steps",
    "make_train_step",
    "masked_patches",
    "multi_crop",
    "rank_me",
    "sinkhorn_knopp",
    "teacher_probs",
    "teacher_temp_schedule",
    "updated_center",
    "updated_patch_center",
    "with_masks",
]
