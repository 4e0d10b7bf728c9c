"""
What each trick of model.py and pretrain.py buys: a training step with it against one without, in paired rounds.

    python tests/speed.py                                             # a cell of the grid, one thread
    python tests/speed.py --model 256x6x8 --batch 256 --patch 20 --samples 400 --threads 2 --only bf16

Each row undoes one trick; the ratio is the time without it over the time with it, the median over rounds.
"""
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import argparse, contextlib, ctypes, statistics, sys, time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import model
from pretrain import build_optimizers, keep_memory


# ---------------------------------------------------------------- the tricks, undone
def attention(how):
    def forward(self, x, context, turn_x, turn_context):
        B, M, D = x.shape
        q = self.query(x).view(B, M, self.heads, -1).transpose(1, 2)
        k, v = self.key_value(context).view(B, -1, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k = model.rotate(q, turn_x), model.rotate(k, turn_context)
        if how == "library":
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        elif how == "rows":
            out = (q @ k.mT).softmax(-1, dtype=torch.float32) @ v
        else:                                                    # the precision that autocast gives
            out = (k @ q.mT).softmax(-2).mT @ v
        return self.out(out.transpose(1, 2).reshape(B, M, D))
    return patch.object(model.Attention, "forward", forward)


def rotate_real(x, turn):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * turn.real - b * turn.imag, a * turn.imag + b * turn.real], -1).flatten(-2).to(x.dtype)


def gather(tokens, index):
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def forward_all(encoder_too):
    """Every token through the decoder's self-attention, as in the textbook; and, if so, through the encoder first."""
    def forward(self, x, keep, masked, normalise=False):
        tokens, steps = model.patchify(x, self.patch).flatten(1, 2), x.shape[2] // self.patch
        order = torch.cat([keep, masked], 1)
        picked = model.take(tokens, order if encoder_too else keep)
        latents = self.to_decoder(self.encode(picked, order if encoder_too else keep, steps))[:, :keep.shape[1]]
        blank = self.mask_token(masked // steps).to(latents.dtype)
        y, turn = torch.cat([latents, blank], 1), self.decoder_turns[order % steps][:, None]
        for block in self.decoder:
            y = block(y, turn)
        return F.mse_loss(self.predict(self.decoder_norm(y)).float()[:, keep.shape[1]:], model.take(tokens, masked))
    return patch.object(model.MAE, "forward", forward)


@contextlib.contextmanager
def memory_returned():
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 17), libc.mallopt(-1, 1 << 17)         # glibc's own thresholds
    yield
    keep_memory()


TRICKS = {
    "masked tokens are only queries": lambda: forward_all(False),
    "... and only visible ones are encoded": lambda: forward_all(True),
    "attention written out (library: SDPA)": lambda: attention("library"),
    "softmax down columns (along rows)": lambda: attention("rows"),
    "softmax in fp32 (in autocast's)": lambda: attention("autocast"),
    "one complex product (four real)": lambda: patch.object(model, "rotate", rotate_real),
    "tokens picked by rows (torch.gather)": lambda: patch.object(model, "take", gather),
    "freed memory kept (given back)": memory_returned,
}


# ---------------------------------------------------------------- the clock
def step(mae, optimizers, x, sensors, steps, precision):
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = mae(x, *model.draw_masks(len(x), sensors, steps, 0.75))
    loss.backward()
    for o in optimizers:
        o.step()
        o.zero_grad()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="64x3x4", help="width x depth x heads (default: %(default)s)")
    p.add_argument("--batch", type=int, default=64, help="windows a step (default: %(default)s)")
    p.add_argument("--patch", type=int, default=5, help="samples a token (default: %(default)s)")
    p.add_argument("--samples", type=int, default=200, help="samples a window (default: %(default)s)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=9, help="paired rounds (default: %(default)s)")
    p.add_argument("--only", choices=["fp32", "bf16"], help="one precision (default: both)")
    p.add_argument("--compile", action="store_true", help="torch.compile as one more row")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    keep_memory()
    width, depth, heads = map(int, a.model.split("x"))
    steps, x = a.samples // a.patch, torch.randn(a.batch, 6, a.samples)
    plain = model.MAE(width, depth, heads, a.patch, steps=steps)
    optimizers = {name: build_optimizers(plain, name, 1e-3, 0.05) for name in ("muon", "adamw")}

    def took(mae=plain, precision="fp32", optimizer="muon", least=0.3):
        began, n = time.perf_counter(), 0
        while time.perf_counter() - began < least or n < 3:
            step(mae, optimizers[optimizer], x, 2, steps, precision)
            n += 1
        return (time.perf_counter() - began) / n

    def ratio(undone, **settings):
        """Median over rounds of the time with `undone` over the time before it."""
        with undone():
            took(**settings)
        rounds = []
        for _ in range(a.rounds):
            before = took(**{"precision": settings.get("precision", "fp32")})
            with undone():
                rounds.append(took(**settings) / before)
        return statistics.median(rounds)

    print(f"{a.model}, {a.batch} windows of {a.samples} samples, patch {a.patch}, {a.threads} thread(s), Muon")
    for precision in [a.only] if a.only else ["fp32", "bf16"]:
        windows = a.batch / min(took(precision=precision) for _ in range(5))
        print(f"\n| trick ({precision}: {windows:,.0f} windows/s) | gains |\n|---|---|")
        for name, undone in TRICKS.items():
            print(f"| {name} | {ratio(undone, precision=precision):.2f} x |", flush=True)
        nothing = contextlib.nullcontext
        print(f"| nothing changed (the noise) | {ratio(nothing, precision=precision):.2f} x |")
        adamw = 1 / ratio(nothing, precision=precision, optimizer="adamw")
        print(f"| AdamW for all, cheaper than Muon | {adamw:.2f} x |")
        if a.compile:
            compiled = torch.compile(plain)
            print(f"| torch.compile | {1 / ratio(nothing, mae=compiled, precision=precision):.2f} x |")
    if not a.only:
        both = [took(precision="fp32") / took(precision="bf16") for _ in range(a.rounds)]
        print(f"\nbf16 against fp32: {statistics.median(both):.2f} x")


if __name__ == "__main__":
    main()
