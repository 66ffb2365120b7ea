"""Heads on a backbone: classes of images, and depth of every pixel."""

from dinojax.heads.classifier import Classifier, ClassifierHead
from dinojax.heads.depth import DepthEstimator
from dinojax.heads.dpt import DPTHead
from dinojax.heads.linear_depth import LinearDepthHead

__all__ = ["Classifier", "ClassifierHead", "DPTHead", "DepthEstimator", "LinearDepthHead"]
