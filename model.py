"""
The model: a masked autoencoder (MAE) with a Transformer encoder, for windows of motion sensors.

    model = MAE(width=64, depth=3, heads=4)            # patches of 5 samples, two sensors
    keep, masked = draw_masks(8, 80, 0.75)             # 8 windows of 2 sensors x 40 patches
    loss = model(torch.randn(8, 6, 200), keep, masked)           # (8,): one loss a window
    features = model.features(torch.randn(8, 6, 200))            # (8, 2, 40, 128), for a probe

    x (B, C, T)       scaled windows: C = 3 axes x S sensors, T samples
      patchify    ->  (B, S, G, 3P)   a token is one sensor over P samples; G = T / P
      draw_masks  ->  keep (B, K), masked (B, M): which of the N = S x G tokens the encoder sees and
                      which are to be predicted; the G of the first sensor come first
      encode      ->  (B, K, D)       the visible tokens only, through `depth` blocks; D = width
      decode      ->  (B, M, 3P)      a narrow, shallow decoder predicts each masked patch
      forward     ->  (B,)            mean squared error on the masked patches of each window

The decoder is the same for every encoder, so it outweighs the small ones: of the 58,000 parameters
of 16x2x2 (width x depth x heads), 51,000 are the decoder's. The laws count the encoder alone.

What differs from the MAE of He et al. (2021, arXiv 2111.06377), measured in results/recipe.md:
  - rotary positions in every attention: movement is periodic, and relative time tells its phase
  - short patches (0.25 s): a stride is several tokens
  - masked tokens are only queries in the decoder (CrossMAE, Fu et al. 2024, arXiv 2401.14391)
  - attention written out, and no bias in linear layers: faster on a CPU"""
import math

import torch
import torch.nn as nn

DECODER_WIDTH, DECODER_HEADS = 64, 4

# ---------------------------------------------------------------- patches, masks, positions
def patchify(x, patch):
    """(B, C, T) -> (B, S, G, 3P): one sensor's three axes over P samples. A shorter tail is cut."""
    B, C, T = x.shape
    G, S = T // patch, C // 3
    x = x[..., :G * patch].reshape(B, S, 3, G, patch)
    return x.transpose(2, 3).reshape(B, S, G, 3 * patch)

def unpatchify(tokens, patch):
    """(B, S, G, 3P) -> (B, C, T), the inverse of `patchify`."""
    B, S, G, _ = tokens.shape
    x = tokens.view(B, S, G, 3, patch).transpose(2, 3)
    return x.reshape(B, 3 * S, G * patch)

def select(tokens, index):
    """Tokens (B, N, F) at index (B, K) -> (B, K, F)."""
    batch = torch.arange(len(tokens), device=tokens.device)
    return tokens[batch[:, None], index]

def draw_masks(B, N, mask_ratio, generator=None):
    """Visible and masked tokens of each window (He et al. 2021, section 3): (B, K) and (B, M)."""
    order = torch.rand(B, N, generator=generator).argsort(dim=1, stable=True)
    K = N - round(N * mask_ratio)
    return order[:, :K], order[:, K:]

def rotary(time, head_width):
    """Rotations exp(i w time), time (B, K) in patches: complex (B, 1, K, Dh/2). w falls from pi rad
    a patch, the fastest that patches resolve, towards pi / 100 (Su et al., arXiv 2104.09864)."""
    pairs = head_width // 2
    w = math.pi * 100.0 ** -(torch.arange(pairs, device=time.device) / pairs)
    angle = time[:, None, :, None] * w
    return torch.polar(torch.ones_like(angle), angle)

def rotate(x, rotation):
    """Rotate pairs of features of x (B, H, K, Dh), so q k depends on the time between tokens."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)

# ---------------------------------------------------------------- the Transformer
def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)

def norm(width):
    return nn.LayerNorm(width, bias=False)

class Attention(nn.Module):
    """Queries from x (B, M, D), keys and values from context (B, K, D); H heads of width Dh."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query = linear(width, width)
        self.key_value = linear(width, 2 * width)
        self.out = linear(width, width)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)               # (B, H, K, Dh)

    def forward(self, x, context, rotation_x, rotation_context):
        q = self.split_heads(self.query(x))                                    # (B, H, M, Dh)
        k, v = self.key_value(context).chunk(2, dim=-1)
        k, v = self.split_heads(k), self.split_heads(v)                        # (B, H, K, Dh)
        q, k = rotate(q, rotation_x), rotate(k, rotation_context)
        scores = (q @ k.mT) * q.shape[-1] ** -0.5                              # (B, H, M, K)
        mixed = scores.softmax(dim=-1) @ v                                     # (B, H, M, Dh)
        return self.out(mixed.transpose(1, 2).flatten(2))                      # (B, M, D)

class Block(nn.Module):
    """Pre-norm Transformer block, attention and an MLP four times as wide: (B, M, D) -> (B, M, D).
    With context (B, K, D), cross-attention: the tokens of x don't see each other."""
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = norm(width)
        self.norm2 = norm(width)
        self.attention = Attention(width, heads)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width)
        # A block starts as the identity: the loss falls faster in the first steps.
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x, rotation, context=None, rotation_context=None):
        h = self.norm1(x)
        if context is None:                                                    # self-attention
            context, rotation_context = h, rotation
        x = x + self.attention(h, context, rotation, rotation_context)
        h = self.up(self.norm2(x))
        return x + self.down(nn.functional.gelu(h))

class MAE(nn.Module):
    """The masked autoencoder for windows x (B, 3 x sensors, T).

    target: what is predicted. "raw": the signal; "window": each channel less its mean over the
    window, divided by its deviation (He et al. 2021, section 4.1, do this for each patch).
    decoder_depth: 0 for an encoder alone. pretrain.py passes on its flags of the same names."""
    def __init__(self, width, depth, heads, patch=5, sensors=2, target="raw", decoder_depth=1):
        super().__init__()
        self.patch, self.sensors, self.target = patch, sensors, target
        self.head_width = width // heads
        self.embed = linear(3 * patch, width)
        self.sensor = nn.Embedding(sensors, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = norm(width)
        self.to_decoder = linear(width, DECODER_WIDTH)
        self.mask_token = nn.Embedding(sensors, DECODER_WIDTH)
        blocks = [Block(DECODER_WIDTH, DECODER_HEADS) for _ in range(decoder_depth)]
        self.decoder = nn.ModuleList(blocks)
        self.decoder_norm = norm(DECODER_WIDTH)
        self.predict = nn.Linear(DECODER_WIDTH, 3 * patch)
        nn.init.normal_(self.sensor.weight, std=0.02)
        nn.init.normal_(self.mask_token.weight, std=0.02)

    def states(self, tokens, index, G):
        """Tokens (B, K, 3P) at index (B, K) -> [(B, K, D), ...], before block 1 and after each."""
        states = [self.embed(tokens) + self.sensor(index // G)]
        rotation = rotary(index % G, self.head_width)
        for block in self.blocks:
            states.append(block(states[-1], rotation))
        return states

    def encode(self, tokens, index, G):
        """Visible tokens (B, K, 3P) at index (B, K) -> latents (B, K, D)."""
        return self.norm(self.states(tokens, index, G)[-1])

    def decode(self, latents, keep, masked, G):
        """Latents (B, K, D) of the tokens `keep` -> predicted patches (B, M, 3P) at `masked`."""
        context = self.to_decoder(latents)
        rotation_context = rotary(keep % G, DECODER_WIDTH // DECODER_HEADS)
        x = self.mask_token(masked // G)
        rotation = rotary(masked % G, DECODER_WIDTH // DECODER_HEADS)
        for block in self.decoder:
            x = block(x, rotation, context, rotation_context)
        return self.predict(self.decoder_norm(x)).float()

    def mean_and_deviation(self, x):
        """What normalises the target of windows x: (B, C, 1) each, or 0, 1."""
        if self.target == "raw":
            return 0, 1
        return x.mean(2, keepdim=True), x.std(2, keepdim=True) + 0.1   # or noise is amplified

    def target_of(self, x):
        """What is to be predicted of windows x: (B, C, T)."""
        mean, deviation = self.mean_and_deviation(x)
        return (x - mean) / deviation

    def predictions(self, x, keep, masked):
        """Windows x (B, C, T) -> predicted patches (B, M, 3P)."""
        patches = patchify(x, self.patch)                                      # (B, S, G, 3P)
        tokens = select(patches.flatten(1, 2), keep)                           # (B, K, 3P)
        G = patches.shape[2]
        return self.decode(self.encode(tokens, keep, G), keep, masked, G)

    def forward(self, x, keep, masked):
        """Mean squared error on the masked patches of each window x (B, C, T): (B,). It is what is
        reported; training minimises pretrain.objective, where an auxiliary term belongs."""
        patches = patchify(self.target_of(x), self.patch)
        truth = select(patches.flatten(1, 2), masked)                          # (B, M, 3P)
        errors = self.predictions(x, keep, masked) - truth
        return errors.square().mean((1, 2))

    def reconstruct(self, x, keep, masked):
        """Windows x (B, C, T) -> (B, C, T): the predicted signal, nan where it was visible."""
        blank = torch.full_like(patchify(x, self.patch), torch.nan)            # (B, S, G, 3P)
        index = masked[..., None].expand(-1, -1, blank.shape[-1])
        predicted = self.predictions(x, keep, masked)
        tokens = blank.flatten(1, 2).scatter(1, index, predicted).view(blank.shape)
        mean, deviation = self.mean_and_deviation(x)
        return unpatchify(tokens, self.patch) * deviation + mean

    def features(self, x, sensors=None):
        """Windows (B, C, T), of any length T -> (B, S, G, 2D) of all patches, none masked: the last
        block's input beside its output: the output alone suits reconstruction.
        sensors: the model's numbers of the sensors in x; default: all."""
        tokens = patchify(x, self.patch)
        B, S, G, _ = tokens.shape
        numbers = range(self.sensors) if sensors is None else sensors
        first = torch.tensor(numbers, device=x.device)[:, None] * G            # (S, 1)
        index = first + torch.arange(G, device=x.device)                       # (S, G)
        index = index.flatten().expand(B, -1)
        before, last = self.states(tokens.flatten(1, 2), index, G)[-2:]
        both = torch.cat([before, self.norm(last)], dim=-1)                    # (B, N, 2D)
        return both.view(B, S, G, -1)

    def baseline(self, x, keep, masked):
        """The loss (B,) that a model must beat: each channel's target is predicted by the mean of
        its visible patches in the window, 0 if none is visible."""
        patches = patchify(self.target_of(x), self.patch)
        B, S, G, _ = patches.shape
        axes = patches.view(B, S, G, 3, self.patch)
        visible = torch.zeros(B, S * G, device=x.device).scatter(1, keep, 1.0)
        visible = visible.view(B, S, G, 1, 1)
        count = visible.sum(2, keepdim=True) * self.patch
        total = (axes * visible).sum((2, 4), keepdim=True)                     # (B, S, 1, 3, 1)
        errors = (axes - total / count.clamp(min=1)).square().view(B, S * G, -1)
        return select(errors, masked).mean((1, 2))

# ---------------------------------------------------------------- size and cost
def parameters(model):
    """How many parameters: (of all, of the encoder with its embeddings, which is what is kept)."""
    kept = (model.embed, model.sensor, model.blocks, model.norm)
    encoder = sum(p.numel() for part in kept for p in part.parameters())
    return sum(p.numel() for p in model.parameters()), encoder

def forward_flops(model, T, mask_ratio):
    """FLOPs of the forward pass for a window of T samples; a multiply-add is two. Training costs
    three times as much: the backward pass has two matrix products for each one here."""
    N = model.sensors * (T // model.patch)
    M = round(N * mask_ratio)                          # masked tokens
    K = N - M
    D, E, values = model.embed.out_features, DECODER_WIDTH, 3 * model.patch

    def block(queries, keys, w):
        projections = 4 * (queries + keys) * w * w     # query and out; key and value
        attention = 4 * queries * keys * w             # q k^T; weights v
        mlp = 16 * queries * w * w                     # up and down
        return projections + attention + mlp

    encoder = 2 * K * values * D + len(model.blocks) * block(K, K, D)
    decoder = 2 * K * D * E + len(model.decoder) * block(M, K, E) + 2 * M * E * values
    return encoder + decoder
