"""
The model: a masked autoencoder (MAE) with a Transformer encoder, for windows of accelerometer + gyroscope.

    x (B, C, T)           standardised windows: C = 3 axes x S sensors, T samples
      patchify        ->  (B, N, 3P)   a token is one sensor over P samples; N = S x G, G = T / P, accelerometer first
      draw_masks      ->  keep (B, K), masked (B, M): the tokens the encoder sees, those it must guess; K + M = N
      encode          ->  (B, K, D)    the visible tokens only, through `depth` blocks
      decode          ->  (B, M, 3P)   each masked patch asks the visible ones: narrow, shallow cross-attention
      loss                             mean squared error on the masked patches

What differs from the textbook MAE (He et al. 2021):
  - rotary positions on time in every attention: movement is periodic, and relative time is what tells its phase
  - short patches (0.25 s): a step is several tokens
  - masked tokens are only queries in the decoder (CrossMAE, Fu et al. 2024): nothing is computed for what is visible
  - attention written out, linear layers without bias: faster on a CPU

    python model.py                    # the grid's architectures: parameters, FLOPs, tokens
    python model.py --patch 10         # the same, with half-second patches
"""
import argparse, math, re

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Refused, command

GRID = ["16x2x2", "32x3x2", "64x3x4", "128x4x4", "256x6x8"]      # width x depth x heads


# ---------------------------------------------------------------- patchify, mask
def patchify(x, patch):
    """(B, C, T) -> (B, S, G, 3P): one sensor's three axes over P samples; a tail shorter than a patch is cut."""
    B, C, T = x.shape
    G = T // patch
    return x[..., :G * patch].reshape(B, C // 3, 3, G, patch).transpose(2, 3).reshape(B, C // 3, G, 3 * patch)


def visible_tokens(tokens, mask_ratio):
    """K, how many of N tokens the encoder sees."""
    return tokens - round(tokens * mask_ratio)


def draw_masks(batch, sensors, steps, mask_ratio, masking="patch", generator=None):
    """Draw which of the N = sensors x steps tokens are visible: keep (B, K) and masked (B, M), indices into N.

    masking: "patch" draws each token alone (He et al. 2021), "time" hides a time step in all sensors at once, "span"
    hides stretches of 4 patches (as LIMU-BERT, Xu et al. 2021). All hide the same number of tokens.
    """
    if masking in ("patch", "time"):
        rows = sensors if masking == "patch" else 1
        noise = torch.rand(batch, rows, steps, generator=generator).expand(batch, sensors, steps)
    elif masking == "span":
        offset = int(torch.randint(4, (), generator=generator))
        noise = torch.rand(batch, sensors, steps // 4 + 2, generator=generator).repeat_interleave(4, dim=2)
        noise = noise[:, :, offset:offset + steps]
    else:
        raise Refused(f"no masking is called '{masking}': choose patch, time or span")
    order = noise.flatten(1).argsort(dim=1, stable=True)
    return order.split([K := visible_tokens(sensors * steps, mask_ratio), sensors * steps - K], dim=1)


# ---------------------------------------------------------------- positions
def rotary_table(steps, head_width):
    """The turn of each time step, complex (G, Dh/2): exp(i w t) (Su et al. 2021), with w from pi rad a patch, the
    fastest that a row of patches can show, down a hundredfold. q and k carry half each of their scale 1/sqrt(Dh)."""
    pairs = head_width // 2
    w = math.pi * 100.0 ** -(torch.arange(pairs) / pairs)
    return torch.polar(torch.tensor(head_width ** -0.25), torch.arange(steps)[:, None] * w)


def rotate(x, turn):
    """Turn the feature pairs of x (B, H, K, Dh) by `turn` (B, 1, K, Dh/2): q @ k then depends on the time between two
    tokens, not on where in the window they lie. One complex product: a third of the traffic of four real ones."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def sincos_table(steps, width):
    """Fixed positions to add to tokens, (G, D) (Vaswani et al. 2017, section 3.5)."""
    angle = torch.arange(steps)[:, None] * 10000.0 ** -(torch.arange(width // 2) / (width // 2))
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# ---------------------------------------------------------------- the Transformer
class Attention(nn.Module):
    """Queries from x (B, M, D), keys and values from context (B, K, D); the two are the same in self-attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, context, turn_x, turn_context):
        B, M, D = x.shape
        q = self.query(x).view(B, M, self.heads, -1).transpose(1, 2)                             # (B, H, M, Dh)
        k, v = self.key_value(context).view(B, -1, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        # keys as rows: over two threads, a softmax down columns takes a fifth of the time of one along such short rows
        weights = (rotate(k, turn_context) @ rotate(q, turn_x).mT).softmax(dim=-2, dtype=torch.float32)   # (B, H, K, M)
        return self.out((weights.mT @ v).transpose(1, 2).reshape(B, M, D))


class Block(nn.Module):
    """Pre-norm Transformer block: attention, then a perceptron four times as wide."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x, turn_x, context=None, turn_context=None):
        h = self.norm1(x)
        if context is None:
            context, turn_context = h, turn_x
        x = x + self.attention(h, context, turn_x, turn_context)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class MAE(nn.Module):
    """The masked autoencoder of (B, 3 x sensors, steps x patch) windows. Raises Refused where it can't be built."""

    def __init__(self, width, depth, heads, patch=5, sensors=2, steps=40, decoder_width=64, decoder_depth=1,
                 decoder_heads=4, positions="rotary"):
        super().__init__()
        for w, h in ((width, heads), (decoder_width, decoder_heads)):
            if w % h or (w // h) % 2:
                raise Refused(f"{h} heads don't divide a width of {w} into even parts: choose an even width / heads")
        self.patch, self.sensors, self.steps = patch, sensors, steps
        self.embed = nn.Linear(3 * patch, width, bias=False)
        self.sensor = nn.Embedding(sensors, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.to_decoder = nn.Linear(width, decoder_width, bias=False)
        self.mask_token = nn.Embedding(sensors, decoder_width)
        self.decoder = nn.ModuleList(Block(decoder_width, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_width, bias=False)
        self.predict = nn.Linear(decoder_width, 3 * patch)
        self.place(positions, "encoder", width, heads)
        self.place(positions, "decoder", decoder_width, decoder_heads)
        for table in (self.sensor, self.mask_token):
            nn.init.normal_(table.weight, std=0.02)
        for block in [*self.blocks, *self.decoder]:              # starts as the identity: early steps go further
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.down.weight)

    def place(self, positions, part, width, heads):
        """Give `part` its tables of time: what turns queries and keys (G, Dh/2), what is added to tokens (G, D)."""
        turns = rotary_table(self.steps, width // heads)
        added = nn.Buffer(torch.zeros(self.steps, width), persistent=False)
        if positions != "rotary":
            turns = torch.full_like(turns, (width // heads) ** -0.25)                            # only the scale
            added = (nn.Parameter(0.02 * torch.randn(self.steps, width)) if positions == "learned" else
                     nn.Buffer(sincos_table(self.steps, width), persistent=False))
        setattr(self, f"{part}_turns", nn.Buffer(turns, persistent=False))
        setattr(self, f"{part}_added", added)

    def encode(self, tokens, index, steps):
        """Visible tokens (B, K, 3P), their indices (B, K) into S x `steps` -> latents (B, K, D)."""
        sensor, time = index // steps, index % steps
        x = self.embed(tokens) + self.sensor(sensor) + self.encoder_added[time]
        turn = self.encoder_turns[time][:, None]                                                 # (B, 1, K, Dh/2)
        for block in self.blocks:
            x = block(x, turn)
        return self.norm(x)

    def decode(self, latents, keep, masked, steps):
        """Latents (B, K, D) of the tokens `keep` -> predicted patches (B, M, 3P) of the tokens `masked`."""
        context = self.to_decoder(latents) + self.decoder_added[keep % steps]                    # (B, K, Dd)
        x = self.mask_token(masked // steps) + self.decoder_added[masked % steps]                # (B, M, Dd)
        turn_x, turn_context = (self.decoder_turns[index % steps][:, None] for index in (masked, keep))
        for block in self.decoder:
            x = block(x, turn_x, context, turn_context)
        return self.predict(self.decoder_norm(x))

    def forward(self, x, keep, masked, normalise=False):
        """Reconstruction loss of windows x (B, C, T): mean squared error on the masked patches, a scalar. `normalise`:
        the target is each channel less its mean over the window, by its deviation (He et al. 2021, 4.1, by patch)."""
        steps = x.shape[2] // self.patch
        pick = lambda windows, index: take(patchify(windows, self.patch).flatten(1, 2), index)
        predicted = self.decode(self.encode(pick(x, keep), keep, steps), keep, masked, steps)
        if normalise:
            x = (x - x.mean(2, keepdim=True)) / (x.std(2, keepdim=True) + 0.1)
        return F.mse_loss(predicted.float(), pick(x, masked))

    def features(self, x):
        """What a probe sees: windows (B, C, T) -> latents (B, S, G, D) of every patch, none masked. T may differ from
        the windows the model was trained on; added positions end at the trained number of steps."""
        tokens = patchify(x, self.patch)
        B, S, G, _ = tokens.shape
        index = torch.arange(S * G, device=x.device).expand(B, -1)
        return self.encode(tokens.flatten(1, 2), index, G).view(B, S, G, -1)


def take(tokens, index):
    """Pick tokens (B, N, F) by index (B, K) -> (B, K, F); by rows, several times faster than torch.gather."""
    rows = index + torch.arange(len(tokens), device=tokens.device)[:, None] * tokens.shape[1]
    return tokens.flatten(0, 1)[rows]


def baseline_loss(x, keep, masked, patch):
    """What a model must beat: the loss of predicting, channel by channel, the mean of the window's visible patches (0
    for a sensor that shows none). x (B, C, T) -> squared errors (B, M, 3P)."""
    tokens = patchify(x, patch)
    B, S, G, _ = tokens.shape
    seen = torch.zeros(B, S * G, device=x.device).scatter_(1, keep, 1.0).view(B, S, G, 1, 1)
    axes = tokens.view(B, S, G, 3, patch)
    mean = (axes * seen).sum((2, 4), keepdim=True) / (seen.sum((2, 4), keepdim=True) * patch).clamp(min=1)
    return take((axes - mean).square().view(B, S * G, -1), masked)


# ---------------------------------------------------------------- its size and cost
def parameters(model):
    """(all trained, encoder): the encoder is what is kept after pre-training, and what the laws call parameters."""
    kept = ("embed.", "sensor.", "blocks.", "norm.", "encoder_added")
    encoder = sum(p.numel() for name, p in model.named_parameters() if name.startswith(kept))
    return sum(p.numel() for p in model.parameters()), encoder


def forward_flops(width, depth, patch, sensors, steps, mask_ratio, decoder_width, decoder_depth):
    """FLOPs of one window's forward pass, two a multiply-add, matrix products only. A training step costs three times
    that: the backward pass has a product for the gradient of each factor."""
    K = visible_tokens(sensors * steps, mask_ratio)
    M, D, E = sensors * steps - K, width, decoder_width
    attention = lambda queries, keys, w: 4 * queries * w * w + 4 * keys * w * w + 4 * queries * keys * w
    perceptron = lambda tokens, w: 16 * tokens * w * w
    return (2 * K * 3 * patch * D + depth * (attention(K, K, D) + perceptron(K, D)) + 2 * K * D * E
            + decoder_depth * (attention(M, K, E) + perceptron(M, E)) + 2 * M * E * 3 * patch)


def main():
    flags = argparse.ArgumentParser(description="The architectures of a grid: parameters, FLOPs, tokens.",
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--models", nargs="+", default=GRID, metavar="WxDxH", help="width x depth x heads of each")
    flags.add_argument("--patch", type=int, default=5, help="samples a patch, at 20 Hz: half as long, twice the tokens")
    flags.add_argument("--mask-ratio", type=float, default=0.75, help="share of the tokens that the encoder never sees")
    flags.add_argument("--samples", type=int, default=200, help="samples a window")
    a = flags.parse_args()
    wrong = [name for name in a.models if not re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", name)]
    if wrong or not 1 <= a.patch <= a.samples or not 0 < a.mask_ratio < 1:
        raise Refused(f"--models {' '.join(wrong)}: write width x depth x heads, such as 64x3x4" if wrong else
                      "choose a --patch of 1 to --samples and a --mask-ratio between 0 and 1")
    steps = a.samples // a.patch
    print(f"{'model':>10s} {'parameters':>11s} {'encoder':>11s} {'tokens':>7s} {'visible':>8s}"
          f"{'MFLOP a window and training step':>34s}")
    for name in a.models:
        width, depth, heads = map(int, name.split("x"))
        total, encoder = parameters(MAE(width, depth, heads, a.patch, steps=steps))
        flops = 3 * forward_flops(width, depth, a.patch, 2, steps, a.mask_ratio, 64, 1)
        visible = visible_tokens(2 * steps, a.mask_ratio)
        print(f"{name:>10s} {total:11,d} {encoder:11,d} {2 * steps:7d} {visible:8d}{flops / 1e6:34.2f}")


if __name__ == "__main__":
    command(main)
