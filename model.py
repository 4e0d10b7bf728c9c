"""
The model: a masked autoencoder (MAE) with a Transformer encoder, for windows of two motion sensors.

    x (B, C, T)       scaled windows: C = 3 axes x S sensors, T samples
      patchify    ->  (B, S, G, 3P)   a token is one sensor over P samples; G = T / P
      draw_masks  ->  keep (B, K), masked (B, M): which of the N = S x G tokens the encoder sees and
                      which are to be predicted; the G of the accelerometer come first
      encode      ->  (B, K, D)       the visible tokens only, through `depth` blocks
      decode      ->  (B, M, 3P)      a narrow, shallow decoder predicts each masked patch
      forward     ->  (B,)            mean squared error on the masked patches of each window

What differs from the MAE of He et al. (2021, arXiv 2111.06377), as measured in results/recipe.md:
  - rotary positions in every attention: movement is periodic, and relative time tells its phase
  - short patches (0.25 s): a stride is several tokens
  - masked tokens are only queries in the decoder (CrossMAE, Fu et al. 2024, arXiv 2401.14391)
  - attention written out, and no bias in linear layers: faster on a CPU

    python model.py --patch 5          # the grid's architectures: parameters, FLOPs, tokens
"""
import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------- patches and masks
def patchify(x, patch):
    """(B, C, T) -> (B, S, G, 3P): one sensor's three axes over P samples. What is left
    after the last whole patch is dropped."""
    B, C, T = x.shape
    G = T // patch
    x = x[..., :G * patch].reshape(B, C // 3, 3, G, patch)
    return x.transpose(2, 3).reshape(B, C // 3, G, 3 * patch)

def unpatchify(tokens, patch):
    """(B, S, G, 3P) -> (B, C, T), the inverse of `patchify`."""
    B, S, G, _ = tokens.shape
    return tokens.view(B, S, G, 3, patch).transpose(2, 3).reshape(B, 3 * S, G * patch)

def select(tokens, index):
    """Tokens (B, N, F) at index (B, K) -> (B, K, F)."""
    return tokens[torch.arange(len(tokens), device=tokens.device)[:, None], index]

def visible_tokens(N, mask_ratio):
    """How many of N tokens the encoder sees."""
    return N - round(N * mask_ratio)

def draw_masks(B, N, mask_ratio, generator=None):
    """Visible and masked tokens of each window (He et al. 2021, section 3): (B, K) and (B, M)."""
    order = torch.rand(B, N, generator=generator).argsort(dim=1, stable=True)
    K = visible_tokens(N, mask_ratio)
    return order[:, :K], order[:, K:]

# ---------------------------------------------------------------- positions
def rotary(time, head_width):
    """Rotations exp(i w t) at patch numbers t (B, K): complex (B, 1, K, Dh/2). w falls from pi rad
    per patch, the fastest that patches resolve, to about pi / 100 (Su et al., arXiv 2104.09864)."""
    pairs = head_width // 2
    w = math.pi * 100.0 ** -(torch.arange(pairs, device=time.device) / pairs)
    angle = time[:, None, :, None] * w
    return torch.polar(torch.ones_like(angle), angle)

def rotate(x, rotation):
    """Rotate pairs of features of x (B, H, K, Dh): the product of a query and a key then depends on
    the time between the two tokens, not on where in the window they are."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)

# ---------------------------------------------------------------- the Transformer
class Attention(nn.Module):
    """Queries from x (B, M, D), keys and values from context (B, K, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)               # (B, H, K, Dh)

    def forward(self, x, context, rotation_x, rotation_context):
        q = rotate(self.split_heads(self.query(x)), rotation_x)                # (B, H, M, Dh)
        k, v = (self.split_heads(part) for part in self.key_value(context).chunk(2, dim=-1))
        k = rotate(k, rotation_context)                                        # (B, H, K, Dh)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)             # (B, H, M, K)
        return self.out((weights @ v).transpose(1, 2).flatten(2))              # (B, M, D)

class Block(nn.Module):
    """Pre-norm Transformer block, attention and an MLP four times as wide: x (B, M, D) -> the same.
    Without context: self-attention. With context (B, K, D): cross-attention, in which the tokens
    of x don't see each other."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.attention = Attention(width, heads)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.attention.out.weight)      # a block starts as the identity: the loss
        nn.init.zeros_(self.down.weight)               # falls faster in the first steps

    def forward(self, x, rotation, context=None, rotation_context=None):
        h = self.norm1(x)
        if context is None:                                                    # self-attention
            context, rotation_context = h, rotation
        x = x + self.attention(h, context, rotation, rotation_context)
        return x + self.down(F.gelu(self.up(self.norm2(x))))

class MAE(nn.Module):
    """The masked autoencoder for windows x (B, 3 x sensors, T).

    target: what is predicted. "raw": the signal; "window": each channel less its mean over the
    window, divided by its deviation (He et al. 2021, section 4.1, do this for each patch).
    Raises ValueError if the heads don't divide the width into even parts."""

    def __init__(self, width, depth, heads, patch=5, sensors=2, decoder_width=64, decoder_depth=1,
                 decoder_heads=4, target="raw"):
        super().__init__()
        for w, h in ((width, heads), (decoder_width, decoder_heads)):
            if w % (2 * h):
                raise ValueError(f"{h} heads don't divide a width of {w} into even parts: choose a "
                                 f"width that is a multiple of {2 * h}")
        self.patch, self.sensors, self.target = patch, sensors, target
        self.head_width, self.decoder_head_width = width // heads, decoder_width // decoder_heads
        self.embed = nn.Linear(3 * patch, width, bias=False)
        self.sensor = nn.Embedding(sensors, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.to_decoder = nn.Linear(width, decoder_width, bias=False)
        self.mask_token = nn.Embedding(sensors, decoder_width)
        self.decoder = nn.ModuleList(Block(decoder_width, decoder_heads)
                                     for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_width, bias=False)
        self.predict = nn.Linear(decoder_width, 3 * patch)
        for table in (self.sensor, self.mask_token):
            nn.init.normal_(table.weight, std=0.02)

    def streams(self, tokens, index, G):
        """Tokens (B, K, 3P) at index (B, K) into S x G -> [(B, K, D), ...]: what goes into the
        first block, and what comes out of each."""
        stream = [self.embed(tokens) + self.sensor(index // G)]
        rotation = rotary(index % G, self.head_width)
        for block in self.blocks:
            stream.append(block(stream[-1], rotation))
        return stream

    def encode(self, tokens, index, G):
        """Visible tokens (B, K, 3P) at index (B, K) -> latents (B, K, D)."""
        return self.norm(self.streams(tokens, index, G)[-1])

    def decode(self, latents, keep, masked, G):
        """Latents (B, K, D) of the tokens `keep` -> predicted patches (B, M, 3P) at `masked`."""
        context, x = self.to_decoder(latents), self.mask_token(masked // G)
        rotation_context, rotation = (rotary(index % G, self.decoder_head_width)
                                      for index in (keep, masked))
        for block in self.decoder:
            x = block(x, rotation, context, rotation_context)
        return self.predict(self.decoder_norm(x)).float()

    def target_of(self, x):
        """What is to be predicted of windows x (B, C, T): (B, C, T)."""
        if self.target == "raw":
            return x
        deviation = x.std(2, keepdim=True) + 0.1       # + 0.1: noise of a still sensor stays small
        return (x - x.mean(2, keepdim=True)) / deviation

    def predictions(self, x, keep, masked):
        """Windows x (B, C, T) -> predicted patches (B, M, 3P)."""
        G = x.shape[2] // self.patch
        tokens = select(patchify(x, self.patch).flatten(1, 2), keep)
        return self.decode(self.encode(tokens, keep, G), keep, masked, G)

    def forward(self, x, keep, masked):
        """The loss of each window x (B, C, T), (B,): mean squared error on its masked patches."""
        truth = select(patchify(self.target_of(x), self.patch).flatten(1, 2), masked)
        return (self.predictions(x, keep, masked) - truth).square().mean((1, 2))

    def reconstruct(self, x, keep, masked):
        """Windows x (B, C, T) -> (B, C, T): their target, the masked patches as predicted."""
        truth = patchify(self.target_of(x), self.patch)                        # (B, S, G, 3P)
        index = masked[..., None].expand(-1, -1, truth.shape[-1])
        tokens = truth.flatten(1, 2).scatter(1, index, self.predictions(x, keep, masked))
        return unpatchify(tokens.view(truth.shape), self.patch)

    def features(self, x, sensors=None):
        """Windows (B, C, T), of any length T -> (B, S, G, 2D) of all patches, none masked: what
        goes into the last block, and what comes out, which by itself suits reconstruction only.

        sensors: the indices of the sensors of x in the model's sensor embedding; default: all."""
        tokens = patchify(x, self.patch)
        B, S, G, _ = tokens.shape
        indices = torch.tensor(range(self.sensors) if sensors is None else sensors, device=x.device)
        index = (indices[:, None] * G + torch.arange(G, device=x.device)).flatten().expand(B, -1)
        before, last = self.streams(tokens.flatten(1, 2), index, G)[-2:]
        return torch.cat([before, self.norm(last)], dim=-1).view(B, S, G, -1)

def baseline_loss(model, x, keep, masked):
    """The loss (B,) that a model must beat: each channel is predicted by the mean of its visible
    patches in the window, 0 if none is visible. The target is the model's."""
    tokens = patchify(model.target_of(x), model.patch)
    B, S, G, _ = tokens.shape
    visible = torch.zeros(B, S * G, device=x.device).scatter_(1, keep, 1.0).view(B, S, G, 1, 1)
    axes = tokens.view(B, S, G, 3, model.patch)
    count = (visible.sum((2, 4), keepdim=True) * model.patch).clamp(min=1)
    mean = (axes * visible).sum((2, 4), keepdim=True) / count                  # (B, S, 1, 3, 1)
    errors = (axes - mean).square().view(B, S * G, -1)
    return select(errors, masked).mean((1, 2))

# ---------------------------------------------------------------- size and cost
def parameters(model):
    """(number of all parameters, of those of the encoder with its embeddings). Only the encoder is
    kept after pre-training, so the laws count its parameters."""
    kept = ("embed.", "sensor.", "blocks.", "norm.")
    encoder = sum(p.numel() for name, p in model.named_parameters() if name.startswith(kept))
    return sum(p.numel() for p in model.parameters()), encoder

def forward_flops(width, depth, patch, S, G, mask_ratio, decoder_width=64, decoder_depth=1):
    """FLOPs of the forward pass per window: two for each multiply-add of a matrix product. Training
    costs three times as much: the backward pass has two matrix products for each one here."""
    K = visible_tokens(S * G, mask_ratio)
    M, D, E = S * G - K, width, decoder_width

    def block(queries, keys, w):
        projections = 4 * (queries + keys) * w * w     # query and out; key and value
        attention = 4 * queries * keys * w             # q k^T; weights v
        return projections + attention + 16 * queries * w * w                  # + up and down
    encoder = 2 * K * 3 * patch * D + depth * block(K, K, D)
    return encoder + 2 * K * D * E + decoder_depth * block(M, K, E) + 2 * M * E * 3 * patch

def main():
    p = argparse.ArgumentParser(description="Parameters, FLOPs and tokens of the grid's models.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--models", nargs="+", metavar="WxDxH", help="width x depth x heads of each",
                   default=["16x2x2", "32x3x2", "64x3x4", "128x4x4", "256x6x8"])
    p.add_argument("--patch", type=int, choices=[2, 4, 5, 10, 20, 40], default=5,
                   help="samples in a patch (a window has 200): half as many, twice the tokens")
    a = p.parse_args()
    tokens = 2 * 200 // a.patch
    print(f"{tokens} tokens, {visible_tokens(tokens, 0.75)} visible. MFLOP: training, per window")
    print(f"{'model':>10s} {'parameters':>11s} {'encoder':>11s} {'MFLOP':>7s}")
    for name in a.models:
        try:
            width, depth, heads = map(int, name.split("x"))
            total, encoder = parameters(MAE(width, depth, heads, a.patch))
        except (ValueError, ZeroDivisionError) as error:
            p.error(f"--models {name}: write width x depth x heads, such as 64x3x4 ({error})")
        flops = 3 * forward_flops(width, depth, a.patch, 2, 200 // a.patch, 0.75)
        print(f"{name:>10s} {total:11,d} {encoder:11,d} {flops / 1e6:7.2f}")

if __name__ == "__main__":
    main()
