"""Optimizer and learning-rate schedules of FAT5's pretraining."""

from fat5.optim.adamw_scale import AdamWScale
from fat5.optim.wsd import WarmupStableDecay

__all__ = ["AdamWScale", "WarmupStableDecay"]
