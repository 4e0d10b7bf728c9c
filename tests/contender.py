"""What benchmarks time: build(width, depth, heads) -> module; module(windows (B, 6, 400)) -> loss, with new masks."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import MAE, draw_masks, forward_flops


class Contender(torch.nn.Module):
    def __init__(self, width, depth, heads):
        super().__init__()
        self.mae = MAE(width, depth, heads, patch=20, steps=20)
        self.flops_per_window = forward_flops(width, depth, 20, 2, 20, 0.75, 64, 1)

    def forward(self, x):
        return self.mae(x, *draw_masks(len(x), 2, 20, 0.75))


build = Contender
