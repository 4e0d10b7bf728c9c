"""
How fast a model learns, and what makes its step fast.

    python tests/speed.py steps --model 128x4x4          # the time of a step without each trick
    python tests/speed.py quality ours hugging-face:0.003 vit-pytorch:0.003 --seconds 400
    python tests/speed.py draw                           # those curves: table and figure

All times are CPU times of one thread. quality: the pool, all training users, models of 64x3x4; how
much of the loss of held-out people is explained (1 - loss / baseline), and the time of data, masks
and updates up to there. ours-0.5s has the peers' patches. A curve that exists is left alone.
"""
import os
os.environ["OMP_NUM_THREADS"] = "1"
import argparse, copy, csv, ctypes, math, statistics, time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

from contender import PEERS
import data
import model
import pretrain
from data import draw_windows, load, random_stream, training_users, windows_at

CURVES = Path("results/time_to_quality.csv")
COLOURS = {"ours": "#0072B2", "ours-0.5s": "#56B4E9", "hugging-face": "#D55E00",
           "vit-pytorch": "#009E73"}

def keep_memory(keep=True):
    """Whether the C library keeps what is freed (glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD)."""
    for option in (-3, -1):
        ctypes.CDLL(None).mallopt(option, 2 ** 30 if keep else 2 ** 17)

def update(optimizers):
    for o in optimizers:
        o.step()
        o.zero_grad()

# ---------------------------------------------------------------- the step, without its tricks
def time_steps(a):
    mae = model.MAE(*map(int, a.model.split("x")))
    average, x = copy.deepcopy(mae), torch.randn(a.batch, 6, 200)
    muon, adamw = pretrain.build_optimizers(mae, 1e-4, 0.05)
    bf16_muon = torch.optim.Muon(muon.param_groups[0]["params"], 1e-4, weight_decay=0.05)
    all_adamw = torch.optim.AdamW(mae.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.05)
    rows = {
        "(nothing changed: the noise)": {}, "GELU -> ReLU": {"gelu": F.relu},
        "all masked patches predicted -> half of them": {"predicted": 0.5},
        "Muon, fp32 -> torch.optim.Muon (bf16)": {"optimizers": [bf16_muon, adamw]},
        "Muon -> AdamW for all": {"optimizers": [all_adamw]},
        "freed memory kept -> given back": {"freed": True}}

    def took(gelu=F.gelu, optimizers=(muon, adamw), predicted=1, freed=False):
        keep_memory(not freed)
        with patch.object(F, "gelu", gelu):
            for n in range(6):                         # the first two warm up
                began = began if n > 2 else time.process_time()
                keep, masked = model.draw_masks(a.batch, 80, 0.75)
                mae(x, keep, masked[:, :int(predicted * masked.shape[1])]).mean().backward()
                update(optimizers)
                pretrain.update_average(average, mae, 100, 7)
        return (time.process_time() - began) / 4

    for name, change in rows.items():
        pairs = [(took(), took(**change)) for _ in range(a.rounds)]
        print(f"| {name} | {1000 * statistics.median(t for t, _ in pairs):.0f} ms | "
              f"{statistics.median(without / full for full, without in pairs):.2f} |", flush=True)

# ---------------------------------------------------------------- time to quality
@torch.no_grad()
def peer_loss(peer, held):
    """The mean loss of the held-out people, with the same masks each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        people = [held.x[held.person == person] for person in range(len(held.people))]
        return statistics.mean(peer(x).item() for x in people)

def curve(name, lr, seconds):
    """Train for so many CPU seconds: ours as pretrain.py does, a peer with AdamW, warm-up and a
    cosine to zero. Yields a row of the table at each evaluation."""
    prepared, ours = load("pool"), name.startswith("ours")
    parser = data.build_parser(pretrain.FLAGS | pretrain.MACHINE, "")
    flags = parser.parse_args(["--patch", "5" if name == "ours" else "10"])
    rows = draw_windows(prepared, training_users(prepared.meta, 0), None, 0)
    held = pretrain.held_out(prepared, flags)
    baseline = pretrain.evaluate(model.MAE(64, 3, 4, flags.patch).baseline, held).mean()
    torch.manual_seed(0)
    net = model.MAE(64, 3, 4, flags.patch) if ours else PEERS[name](64, 3, 4)
    step, spent = 0, 0.0
    if ours:
        keep_memory()
        average = copy.deepcopy(net)
        optimizers = pretrain.build_optimizers(net, lr or flags.lr, flags.weight_decay)
    else:
        weights = [p for p in net.parameters() if p.requires_grad]
        optimizers = [torch.optim.AdamW(weights, lr, (0.9, 0.95), weight_decay=0.05)]
    while spent < seconds:
        began, progress = time.process_time(), spent / seconds
        if ours:
            share = pretrain.schedule(step, flags.tau, flags.decay)
            loss = net(*pretrain.batch_at(step, prepared, rows, flags)).mean()
        else:
            share = min(1, progress / 0.05) * (0.5 + 0.5 * math.cos(math.pi * progress))
            drawn = random_stream(0, "batch", step).integers(len(rows), size=flags.batch)
            loss = net(torch.from_numpy(windows_at(prepared, rows[drawn], "both")))
        loss.backward()
        for o in optimizers:
            o.param_groups[0]["lr"] = o.defaults["lr"] * share
        update(optimizers)
        step += 1
        if ours:
            pretrain.update_average(average, net, step, flags.average)
        spent += time.process_time() - began
        if pretrain.is_evaluated(step) or spent >= seconds:
            loss = pretrain.evaluate(average, held).mean() if ours else peer_loss(net, held)
            yield [step, round(spent, 2), round(1 - loss / baseline, 5)]

def measure_curves(a):
    for contender in a.contenders:
        name, _, lr = contender.partition(":")
        setting = [name, lr, f"{a.seconds:g}"]
        if CURVES.exists() and setting in [line[:3] for line in csv.reader(CURVES.open())]:
            continue
        lines = []
        for line in curve(name, float(lr or 0), a.seconds):
            lines.append(setting + line)
            print(*lines[-1], flush=True)
        with CURVES.open("a", newline="") as file:
            columns = ["contender", "lr", "budget", "step", "core_seconds", "explained"]
            csv.writer(file).writerows(lines if file.tell() else [columns, *lines])

def draw(a):
    """Table and figure of the curves: the best learning rate of each, the others faint."""
    from matplotlib import pyplot as plt
    curves = {}
    for line in csv.DictReader(CURVES.open()):
        points = curves.setdefault((line["contender"], line["lr"], line["budget"]), [])
        points.append((float(line["core_seconds"]), 100 * float(line["explained"])))
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    print("| | learning rate | core-seconds to 20 % | to 28 % | explained, after core-seconds |\n"
          "|---|---|---|---|---|")
    for (name, lr, budget), points in curves.items():
        first = [next((f"{t:.0f}" for t, y in points if y >= level), "-") for level in (20, 28)]
        seconds, last = points[-1]
        print(f"| {name} | {lr} | {first[0]} | {first[1]} | {last:.1f} %, {seconds:.0f} |")
        best = last == max(end[-1][1] for key, end in curves.items() if key[0] == name)
        [line] = ax.plot(*zip(*points), color=COLOURS[name], lw=0.7, alpha=0.5)
        if best:
            line.set(lw=2, alpha=1)
            ax.annotate(f" {name}", points[-1], color=COLOURS[name], va="center")
    for level in (20, 28):
        ax.axhline(level, color="0.8", lw=0.8, zorder=0)
    ax.set(xscale="log", xlim=(2, 1500), ylim=(-5, None), xlabel="core-seconds of training",
           ylabel="held-out variance explained (%)")
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(CURVES.with_suffix(".png"), dpi=120)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("what", choices=["steps", "quality", "draw"])
    p.add_argument("contenders", nargs="*", help="ours, ours-0.5s, or a peer:learning rate")
    p.add_argument("--seconds", type=float, default=400, help="CPU seconds of each curve")
    p.add_argument("--model", default="64x3x4", help="steps: width x depth x heads")
    p.add_argument("--batch", type=int, default=64, help="steps: windows in a step")
    p.add_argument("--rounds", type=int, default=9, help="steps: paired rounds, for a median")
    a = p.parse_args()
    torch.set_num_threads(1)
    {"steps": time_steps, "quality": measure_curves, "draw": draw}[a.what](a)

if __name__ == "__main__":
    main()
