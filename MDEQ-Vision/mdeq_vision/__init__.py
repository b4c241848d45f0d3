"""MDEQ-Vision: multiscale equilibrium models on images."""

from mdeq_vision.model import MDEQClsNet, MDEQSegNet, get_cls_net
from mdeq_vision.trained import load
from mdeq_vision.transfer import get_seg_net

__all__ = ["MDEQClsNet", "MDEQSegNet", "get_cls_net", "get_seg_net", "load"]
