"""Self-distillation: the DINO step and everything it is made of."""

from dinojax.pretraining.augment import MultiCropConfig, multi_crop
from dinojax.pretraining.losses import dino_loss, dino_loss_in_chunks, entropy, teacher_probs, updated_center
from dinojax.pretraining.monitors import diagnose_collapse, feature_std, gradient_norms, rank_me
from dinojax.pretraining.optim import dino_optimizer
from dinojax.pretraining.schedules import cosine_schedule, teacher_temp_schedule
from dinojax.pretraining.step import DINO, Batches, TrainState, init_state, make_pretrain_steps, make_train_step

__all__ = [
    "DINO",
    "Batches",
    "MultiCropConfig",
    "TrainState",
    "cosine_schedule",
    "diagnose_collapse",
    "dino_loss",
    "dino_loss_in_chunks",
    "dino_optimizer",
    "entropy",
    "feature_std",
    "gradient_norms",
    "init_state",
    "make_pretrain_steps",
    "make_train_step",
    "multi_crop",
    "rank_me",
    "teacher_probs",
    "teacher_temp_schedule",
    "updated_center",
]
