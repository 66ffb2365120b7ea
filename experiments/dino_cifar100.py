"""DINO from scratch on CIFAR-100 or other images of 32 px, by named recipes whose every setting can be changed.

    python -m experiments.dino_cifar100                       ViT-Tiny with patches of 4 px, 200 epochs
    python -m experiments.dino_cifar100 seed                  ViT-Tiny/16 at 128 px, as in the work this repeats
    python -m experiments.dino_cifar100 notebook              the same with that notebook's own settings
    python -m experiments.dino_cifar100 smoke --data digits   minutes on two cores, no download
    python -m experiments.dino_cifar100 cpu --data cifar10    an hour or two on two cores
    python -m experiments.dino_cifar100 small --data cifar10 --epochs 100 --seed 1

Interrupted in whatever way, the same command goes on from its last checkpoint. The run folder gets the networks
teacher/ and student/, which every --weights takes, metrics.jsonl, curves.png, and result.json with the k-NN accuracy
beside that of the untrained network. `RECIPE --help` shows all settings.
"""

from experiments.pretraining.recipes import recipes

RECIPES = recipes("dino_cifar100", "cifar100", image_size=32, patch_size=4, scales=((0.7, 1.0), (0.2, 0.5)))

if __name__ == "__main__":
    from experiments.pretraining.loop import main

    main(RECIPES, __doc__)
