"""What a kind of device cannot do."""

import torch


def widest_float(device: torch.device) -> torch.dtype:
    """float64, and float32 on Apple's GPUs, which have no float64.
    https://developer.apple.com/documentation/metalperformanceshaders/mpsdatatype"""
    return torch.float32 if device.type == "mps" else torch.float64
