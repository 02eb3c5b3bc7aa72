"""FAT5: T5 on fused kernels, and its continued pretraining with UL2."""
