"""Published heads at work on photos: the classes of ImageNet, and depth."""
