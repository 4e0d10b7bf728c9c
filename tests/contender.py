"""What benchmarks time: modules, windows (B, 6, T) -> loss, with new masks at each call."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import MAE, draw_masks, forward_flops

class Contender(torch.nn.Module):
    """This model, for an outside benchmark of windows of 400 samples, 20 in a patch."""

    def __init__(self, width, depth, heads, patch=20):
        super().__init__()
        self.mae = MAE(width, depth, heads, patch)
        self.flops_per_window = forward_flops(self.mae, 20 * patch, 0.75)

    def forward(self, x):
        return self.mae(x, *draw_masks(len(x), 2 * x.shape[2] // self.mae.patch, 0.75)).mean()

build = Contender

def as_image(x):
    """(B, 6, T) -> (B, 3, 2, T): a sensor is a row of pixels, its axes are the colours."""
    return x.unflatten(1, (2, 3)).transpose(1, 2)

def sin_cos(patches, width):
    """Fixed positions, (1, 1 + 2 x patches, width): zeros for the class token; half of the features
    are of the sensor, half of the time (He et al. 2021, as published)."""
    sensor, time = torch.meshgrid(torch.arange(2.), torch.arange(float(patches)), indexing="ij")
    frequencies = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angles = [position.flatten()[:, None] * frequencies for position in (sensor, time)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)
    return torch.nn.Parameter(torch.cat([torch.zeros(1, width), table])[None], requires_grad=False)

class HuggingFace(torch.nn.Module):
    """The textbook masked autoencoder, transformers.ViTMAEForPreTraining. It takes square images:
    the parts that depend on the shape are replaced by those of a window."""

    def __init__(self, width, depth, heads, samples=200, patch=10):
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
        self.mae = ViTMAEForPreTraining(ViTMAEConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
            intermediate_size=4 * width, image_size=8 * patch, patch_size=patch, mask_ratio=0.75,
            decoder_hidden_size=64, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
            decoder_intermediate_size=256))
        patches, embeddings, decoder = samples // patch, self.mae.vit.embeddings, self.mae.decoder
        embeddings.image_size = embeddings.patch_embeddings.image_size = (2, samples)
        embeddings.num_patches = embeddings.patch_embeddings.num_patches = 2 * patches
        embeddings.patch_embeddings.projection = torch.nn.Conv2d(3, width, (1, patch), (1, patch))
        embeddings.position_embeddings = sin_cos(patches, width)
        decoder.decoder_pos_embed = sin_cos(patches, 64)
        decoder.decoder_pred = torch.nn.Linear(64, 3 * patch)
        self.mae.patchify = lambda image, *_, **__: (
            image.unflatten(3, (patches, patch)).permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2))

    def forward(self, x):
        return self.mae(as_image(x)).loss

class VitPytorch(torch.nn.Module):
    """vit_pytorch.mae.MAE: learned positions, patches normalised before they are embedded."""

    def __init__(self, width, depth, heads, samples=200, patch=10):
        super().__init__()
        from vit_pytorch import ViT, mae
        encoder = ViT(image_size=(2, samples), patch_size=(1, patch), num_classes=1, pool="mean",
                      dim=width, depth=depth, heads=heads, dim_head=width // heads,
                      mlp_dim=4 * width)
        self.mae = mae.MAE(encoder=encoder, masking_ratio=0.75, decoder_dim=64, decoder_depth=1,
                           decoder_heads=4, decoder_dim_head=16)

    def forward(self, x):
        return self.mae(as_image(x))

PEERS = {"hugging-face": HuggingFace, "vit-pytorch": VitPytorch}
