"""DINO from scratch on Tiny-ImageNet or other images of 64 px, by named recipes whose every setting can be changed.

    python -m experiments.dino_tinyimagenet                       ViT-Tiny with patches of 8 px, 200 epochs
    python -m experiments.dino_tinyimagenet seed                  ViT-Tiny/16 at 128 px, as in the work this repeats
    python -m experiments.dino_tinyimagenet notebook              the same with that notebook's own settings
    python -m experiments.dino_tinyimagenet smoke --data digits   minutes on two cores, no download
    python -m experiments.dino_tinyimagenet small --data path/to/images --epochs 100 --seed 1

Interrupted in whatever way, the same command goes on from its last checkpoint. The run folder gets the networks
teacher/ and student/, which every --weights takes, metrics.jsonl, curves.png, and result.json with the k-NN accuracy
beside that of the untrained network. `RECIPE --help` shows all settings.
"""

from experiments.pretraining.recipes import recipes

RECIPES = recipes("dino_tinyimagenet", "tiny_imagenet", image_size=64, patch_size=8, scales=((0.5, 1.0), (0.2, 0.4)))

if __name__ == "__main__":
    from experiments.pretraining.loop import main

    main(RECIPES, __doc__)
