"""
Pre-training: one cell of the grid. Users, hours per user, architecture -> loss on held-out users.

    windows (n, C, T)  ->  scaled batches (B, C, T)  ->  masked autoencoder  ->  RUN/result.json

    python pretrain.py --data simulated --users 8 --out runs/first
    torchrun --nproc_per_node=2 pretrain.py --data simulated --out runs/two      # two processes

The learning rate falls without end, a moving average of the weights is evaluated and kept, and a
run ends when the held-out loss has stopped improving (--patience), or at --steps. The same command
resumes bit-identically: batch and masks of step t are drawn from (seed, t) alone.
"""
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")    # before torch: idle threads sleep
import argparse, contextlib, copy, fcntl, io, json, math, platform, signal, sys, time, zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import (UserError, command, draw_windows, held_out_users, held_out_windows, load, number,
                  people, provenance, random_rotation, random_stream, replacing, require,
                  training_users, windows_at, write_json)
from model import MAE, baseline_loss, draw_masks, forward_flops, parameters

MACHINE = ("device", "threads", "plot", "out")         # flags that don't change the result of a run
HeldOut = namedtuple("HeldOut", "x keep masked person people half")            # see `held_out`

# ---------------------------------------------------------------- what a cell sees
def masks_for(x, flags, *key):
    """Masks for windows x (B, C, T), drawn from `key` alone: keep (B, K) and masked (B, M)."""
    generator = torch.Generator().manual_seed(int(random_stream(*key).integers(2 ** 62)))
    tokens = x.shape[1] // 3 * (x.shape[2] // flags["patch"])
    return draw_masks(len(x), tokens, flags["mask_ratio"], generator)

def batch_at(step, prepared, rows, flags):
    """The batch of `step`, drawn from the seed and the step alone: x (B, C, T), keep, masked."""
    drawn = random_stream(flags["seed"], "batch", step).integers(len(rows), size=flags["batch"])
    x = windows_at(prepared, rows[drawn], flags["sensors"])
    if flags["rotate"]:
        x = random_rotation(x, flags["rotate"], random_stream(flags["seed"], "rotation", step))
    return torch.from_numpy(x), *masks_for(x, flags, flags["seed"], "masks", step)

def held_out(prepared, flags, device="cpu"):
    """The evaluation, the same for every cell: windows x (n, C, T) of people who are never trained
    on; their masks; person (n,), an index into people; half (people,), see `cross_fitted`."""
    halves = held_out_users(prepared.meta)
    users = halves[0] + halves[1]
    rows = held_out_windows(prepared, users, most=32)
    x = torch.from_numpy(windows_at(prepared, rows, flags["sensors"]))
    tensors = [part.to(device) for part in (x, *masks_for(x, flags, "held-out masks"))]
    person = np.array([users.index(user) for user in prepared.users[rows]])
    half = np.repeat([0, 1], [len(halves[0]), len(halves[1])])
    return HeldOut(*tensors, person, people(prepared.meta, users), half)

# ---------------------------------------------------------------- optimisers, schedule, average
def orthogonal(matrices, steps=5):
    """Matrices (M, a, b), a <= b, with rows made nearly orthonormal by Newton-Schulz iteration."""
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):                             # with Jordan's numbers
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)               # 3.4445 x + polynomial x
    return x

class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (Jordan 2024, kellerjordan.github.io/posts/muon), but in fp32 and faster."""
    @torch.no_grad()
    def step(self):
        group, by_shape = self.param_groups[0], {}
        for p in group["params"]:
            average = self.state[p].setdefault("average", torch.zeros_like(p))
            average.lerp_(p.grad, 0.05)
            by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(average, 0.95)))     # Nesterov
        for (rows, columns), pairs in by_shape.items():
            updates = torch.stack([update for _, update in pairs])
            updates = orthogonal(updates) if rows <= columns else orthogonal(updates.mT).mT
            for (p, _), update in zip(pairs, updates):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

def build_optimizers(model, lr, weight_decay):
    """Muon for the matrices of the blocks, AdamW with a smaller rate for the rest."""
    matrices = [p for p in (*model.blocks.parameters(), *model.decoder.parameters()) if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [Muon(matrices, dict(lr=lr, weight_decay=weight_decay)),
            torch.optim.AdamW(rest, 0.3 * lr, (0.9, 0.95), weight_decay=weight_decay)]

def schedule(step, tau, decay, warmup=50):
    """Share of the peak learning rate at `step`: linear warm-up, then (1 + t / tau)^-decay."""
    return min(1, (step + 1) / warmup) * (1 + step / tau) ** -decay

@torch.no_grad()
def update_average(average, model, step, gamma):
    """Power-function average of the weights w (Karras et al. 2024, arXiv 2312.02696, section 3):
    average <- b average + (1 - b) w_t, b = (1 - 1/t)^(gamma + 1): w_s weighs about s^gamma."""
    share = 1 - (1 - 1 / step) ** (gamma + 1)
    torch._foreach_lerp_([*average.parameters()], [*model.parameters()], share)

# ---------------------------------------------------------------- the held-out loss, and the end
@torch.no_grad()
def evaluate(loss, held):
    """The mean loss of each held-out person, (people,): equal weights. loss: as MAE.forward."""
    chunks = zip(held.x.split(64), held.keep.split(64), held.masked.split(64))
    losses = torch.cat([loss(*chunk) for chunk in chunks]).cpu().double().numpy()
    return np.bincount(held.person, losses) / np.bincount(held.person)

def is_evaluated(step):
    """Whether to evaluate: at steps about 7 % apart, whatever the length of the run."""
    return step >= 16 and math.floor(math.log(step, 1.07)) < math.floor(math.log(step + 1, 1.07))

def best_step(history):
    return min(history, key=lambda line: line["loss"])["step"]

def has_converged(history, patience, least=300):
    """Whether the held-out loss hasn't improved over the last `patience` share of the steps; never
    before `least` steps: many cells learn nothing new for about 200 steps, then go on."""
    if not history or not patience:                    # --patience 0: only --steps ends a run
        return False
    step = history[-1]["step"]
    return step >= least and best_step(history) <= (1 - patience) * step

def cross_fitted(history, half):
    """Each held-out person's loss (people,), at the evaluation that is best for the other half: the
    lowest of many noisy losses of the same people would be too low."""
    losses = np.array([line["people"] for line in history])              # (evaluations, people)
    best_of_0, best_of_1 = (losses[:, half == h].mean(1).argmin() for h in (0, 1))
    return np.where(half == 0, losses[best_of_1], losses[best_of_0])

# ---------------------------------------------------------------- a run is never lost
def lock(run):
    """Hold `run` for as long as this process lives: the system frees the lock, however it ends."""
    run.mkdir(parents=True, exist_ok=True)
    handle = open(run / ".lock", "w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process works on {run}: let it end") from None
    for leftover in run.glob(".*.[0-9]*.tmp*"):        # left by a process that was killed
        leftover.unlink()
    return handle

def save_checkpoint(run, state):
    """Write metrics.jsonl and checkpoint.pt; keep the one before as checkpoint.prev.pt."""
    content, path = io.BytesIO(), run / "checkpoint.pt"
    torch.save(state, content)                         # torch.save to a file hides a full disk
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())
        if path.exists():
            os.replace(path, run / "checkpoint.prev.pt")
    with replacing(run / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in state["history"]))

def load_checkpoint(run, device="cpu"):
    """The newest undamaged checkpoint, {} if there is none. UserError if all are damaged."""
    paths = [*run.glob("checkpoint.pt"), *run.glob("checkpoint.prev.pt")]
    for path in paths:
        try:
            require(not zipfile.ZipFile(path).testzip(), "a checksum differs")
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:                     # zip reader and unpickler raise many kinds
            print(f"{path} is damaged: {error!r:.99}", file=sys.stderr)
    require(not paths, f"all checkpoints in {run} are damaged: delete this folder to start again")
    return {}

def read_config(run):
    """The config.json of a run. Raises UserError if `run` is not a run."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        config = json.loads((Path(run) / "config.json").read_text())
        if {"flags", "fingerprint", "model", "trained_on"} <= set(config):
            return config
    raise UserError(f"{run} is not a run of pretrain.py: config.json is missing or damaged")

def check_same_run(run, config, done):
    """UserError if another command made `run`: only --steps may differ, but not be below what is
    done, and --patience be raised."""
    defaults = vars(build_parser().parse_args([]))     # a flag that an old run doesn't name
    before, now = ({**defaults, **made["flags"], "fingerprint": made["fingerprint"]}
                   for made in (read_config(run), config))
    allowed = {"steps": now["steps"] >= done,
               "patience": (now["patience"] or 1) >= (before["patience"] or 1)}      # 0: no end
    changed = [f"{key} {before.get(key)} -> {now.get(key)}" for key in before | now
               if before.get(key) != now.get(key) and not allowed.get(key)]
    require(not changed, f"{run} holds {done} steps of another run ({', '.join(changed)}): choose "
            "another --out, or delete that folder; only --steps and --patience may be raised")

# ---------------------------------------------------------------- machine, picture, flags
def choose_device(name):
    """The torch device `name`; "auto" takes a GPU if there is one."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"                       # set by torchrun
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: take another; {str(error).splitlines()[0]}") from None

def draw_reconstruction(path, model, held, rate):
    """True and predicted signal of the first sensor in 3 held-out windows, from calm to lively."""
    from matplotlib.figure import Figure
    order, n = held.x.std(2).mean(1).argsort(), len(held.x)
    x, keep, masked = (part[order[[-n // 2, -n // 4, -n // 10]]] for part in held[:3])
    with torch.no_grad():
        true, predicted = model.target_of(x).cpu(), model.reconstruct(x, keep, masked).cpu()
    predicted[predicted == true] = torch.nan           # visible patches aren't predicted
    figure, seconds = Figure((10, 7), layout="constrained"), np.arange(x.shape[2]) / rate
    for axes, y, prediction in zip(figure.subplots(3), true[:, :3], predicted[:, :3]):
        axes.plot(seconds, y.T, lw=0.8)
        axes.set_prop_cycle(None)                      # x, y, z have the same colours again
        axes.plot(seconds, prediction.T, lw=2)
        axes.fill_between(seconds, *axes.get_ylim(), where=~prediction[0].isnan(), color="0.9")
    axes.set_xlabel("s (grey: hidden from the model; thin: the true signal; thick: its prediction)")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)

def build_parser():
    p = argparse.ArgumentParser(description="Pre-train a masked autoencoder: one cell of the grid.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    count, share, amount = number(int, 1), number(float, 0, 1), number(float, 0)
    flag = p.add_argument_group("data, model and task").add_argument
    flag("--data", default="simulated", help="prepared set, or several pooled: a+b+c")
    flag("--users", type=count, help="training users; without it, all who aren't held out")
    flag("--hours-per-user", type=amount, help="at most so many hours of each; without it, all")
    flag("--sensors", choices=["both", "acc", "gyro"], default="both", help="one: half the tokens")
    flag("--width", type=count, default=64, help="parameters and time grow with its square")
    flag("--depth", type=count, default=3, help="blocks of the encoder")
    flag("--heads", type=count, default=4, help="the width must be a multiple of 2 x heads")
    flag("--patch", type=count, default=5, help="samples in a token: half as many, twice the cost")
    flag("--mask-ratio", type=share, default=0.75, help="share of hidden tokens: more is harder")
    flag("--target", choices=["raw", "window"], default="raw", help="window: the signal "
         "normalised by window: better features, but losses can't be compared with those of raw")
    flag("--rotate", type=amount, default=0.0, help="random rotation of about so many rad")
    flag = p.add_argument_group("optimisation").add_argument
    flag("--steps", type=count, default=20000, help="updates at most; raise it to lengthen a run")
    flag("--patience", type=share, default=0.3, help="end when the held-out loss hasn't improved "
         "over this share of the steps so far; 0: run all of --steps")
    flag("--batch", type=count, default=64, help="windows in an update, over all processes")
    flag("--lr", type=amount, default=0.02, help="peak learning rate, the same for every width")
    flag("--weight-decay", type=amount, default=0.05, help="pull of the weights towards zero")
    flag("--tau", type=count, default=500, help="step at which the learning rate begins to fall")
    flag("--decay", type=amount, default=0.5, help="how fast it falls: (1 + step / tau)^-decay")
    flag("--average", type=amount, default=7, help="gamma of the averaged weights: larger, shorter")
    flag("--seed", type=number(int, 0), default=0, help="draws users, windows, weights, batches")
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 if fast")
    flag = p.add_argument_group("machine and output").add_argument
    flag("--device", default="auto", help="cpu, cuda or mps; auto takes a GPU if there is one")
    flag("--threads", type=number(int, 0), default=0, help="CPU threads; 0: all cores")
    flag("--plot", action="store_true", help="draw RUN/reconstruction.png: true, predicted signal")
    flag("--out", default="runs/pretrain", help="folder of this run; the same command resumes it")
    return p

def check_data(a, prepared, trainable, world):
    """Raise UserError for flags that don't suit these data or the number of processes."""
    samples, seconds = prepared.windows.shape[2], prepared.meta["seconds"]
    tokens = samples // a.patch * (2 if a.sensors == "both" else 1)
    require((a.users or 0) <= trainable, f"--users {a.users}: there are {trainable} to train on")
    require(a.hours_per_user is None or a.hours_per_user * 3600 > 0.99 * seconds,
            f"--hours-per-user {a.hours_per_user} is less than a window of {seconds} s: take more")
    require(a.width % (2 * a.heads) == 0, f"--width isn't a multiple of {2 * a.heads}, 2 x heads")
    require(samples % a.patch == 0, f"--patch {a.patch} doesn't divide a window, {samples} samples")
    require(0 < round(tokens * a.mask_ratio) < tokens, "--mask-ratio hides all tokens or none")
    require(a.batch % world == 0, f"--batch {a.batch}: take a multiple of the {world} processes")

# ---------------------------------------------------------------- the run
def result_of(config, history, held, baseline, windows, hours):
    """A run as a row of a grid's table, and the loss of each held-out person."""
    flags, last, users = config["flags"], history[-1], len(config["trained_on"])
    losses = cross_fitted(history, held.half)
    params, params_encoder = parameters(MAE(**config["model"]))
    return {
        **flags, "loss": losses.mean(), "loss_last": last["loss"], "baseline_loss": baseline.mean(),
        "unexplained": (losses / baseline).mean(), "users": users, "hours": hours,
        "hours_per_user": hours / users, "hours_cap": flags["hours_per_user"], "windows": windows,
        "params": params, "params_encoder": params_encoder, "steps": last["step"],
        "best_step": best_step(history), "converged": has_converged(history, flags["patience"]),
        "patches": held.x.shape[2] // flags["patch"], "seconds": last["seconds"],
        "windows_per_second": last["step"] * flags["batch"] / last["seconds"],
        "device": f"{held.x.device}, {torch.get_num_threads()} threads, {platform.machine()}",
        "flops": last["flops"], "versions": config["provenance"],
        "config": {**flags, "fingerprint": config["fingerprint"]},
        "people": [{"source": source, "user": user, "loss": loss, "baseline": base}
                   for (source, user), loss, base in zip(held.people, losses, baseline)]}

def main():
    a = build_parser().parse_args()
    run, device = Path(a.out), choose_device(a.device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # torchrun
    torch.set_num_threads(a.threads or max(1, os.cpu_count() // world))
    if a.precision == "auto":                          # bf16 if the processor computes with it
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
                else torch.cpu.get_capabilities().get("avx512_bf16"))
        a.precision = "bf16" if fast else "fp32"

    # The people of this run, their windows, the model, the evaluation.
    prepared = load(a.data)
    users = training_users(prepared.meta, a.seed)
    check_data(a, prepared, len(users), world)
    users = users[:a.users]
    rows = draw_windows(prepared, users, a.hours_per_user, a.seed)
    flags = {key: value for key, value in vars(a).items() if key not in MACHINE}
    shape = {key: flags[key] for key in ("width", "depth", "heads", "patch", "target")}
    shape["sensors"] = 2 if a.sensors == "both" else 1
    config = {"flags": flags, "fingerprint": prepared.meta["fingerprint"], "model": shape,
              "trained_on": people(prepared.meta, users), "provenance": provenance()}
    torch.manual_seed(a.seed)
    model, held = MAE(**shape).to(device), held_out(prepared, flags, device)
    baseline = evaluate(lambda *batch: baseline_loss(model, *batch), held)

    # The state: that of the last checkpoint, if there is one.
    held_lock = lock(run) if rank == 0 else None       # until this process ends
    average, optimizers = copy.deepcopy(model), build_optimizers(model, a.lr, a.weight_decay)
    new = {"step": 0, "seconds": 0.0, "train_loss": 0.0, "history": [], "best": {}}
    start = {**new, **load_checkpoint(run, device)}
    step, seconds, train_loss, history, best = (start[key] for key in new)
    require(step or not best, f"{run} holds an exported encoder: choose another --out")
    if step or (run / "config.json").exists():
        check_same_run(run, config, step)
    if step >= a.steps or has_converged(history, a.patience):            # nothing is left to do
        config["provenance"] = read_config(run)["provenance"]
    if step:
        print(f"resumes at step {step}")
        model.load_state_dict(start["model"])
        average.load_state_dict(start["average"])
        for o, content in zip(optimizers, start["optimizers"]):
            o.load_state_dict(content)
    if world > 1:
        dist.init_process_group()
    forward = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    if rank == 0:
        write_json(run / "config.json", config)
        print(f"{len(rows)} windows of {len(users)} users, baseline loss {baseline.mean():.4f}")

    def save():
        require(all(weights.isfinite().all() for weights in model.parameters()),
                f"the weights are nan or infinite at step {step}: choose a lower --lr")
        if rank == 0:
            save_checkpoint(run, {
                "step": step, "seconds": seconds, "train_loss": train_loss, "history": history,
                "best": best, "model": model.state_dict(), "average": average.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers]})

    signals, stop, saved, clock = [], 0, seconds, time.monotonic() - seconds
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda received, frame: signals.append(received))
    flops = 3 * a.batch * forward_flops(a.width, a.depth, a.patch, shape["sensors"],
                                        held.x.shape[2] // a.patch, a.mask_ratio)       # of a step
    while not stop and step < a.steps and not has_converged(history, a.patience):
        batch = batch_at(step, prepared, rows, flags)
        with torch.autocast(device.type, torch.bfloat16, enabled=a.precision == "bf16"):
            loss = forward(*(part[rank::world].to(device) for part in batch)).mean()
        loss.backward()
        for o in optimizers:
            o.param_groups[0]["lr"] = o.defaults["lr"] * schedule(step, a.tau, a.decay)
            o.step()
            o.zero_grad()
        step += 1
        update_average(average, model, step, a.average)
        train_loss += loss.detach()                    # summed since the last evaluation
        seconds = time.monotonic() - clock
        if is_evaluated(step) or step == a.steps:
            losses, since = evaluate(average, held), step - (history[-1]["step"] if history else 0)
            history.append({"step": step, "train_loss": float(train_loss) / since,
                            "loss": losses.mean().item(), "people": losses.tolist(),
                            "seconds": round(seconds, 3), "flops": step * flops})
            train_loss = 0.0
            if best_step(history) == step:
                best = copy.deepcopy(average.state_dict())
            if rank == 0:
                speed = (step - start["step"]) / (seconds - start["seconds"])
                print("step {step:6d}  train {train_loss:.4f}  held-out {loss:.4f}  {seconds:.0f} s"
                      .format(**history[-1]), f" {speed * a.batch:.0f} windows/s, at most "
                      f"{(a.steps - step) / speed:.0f} s left", flush=True)
        stop = len(signals)
        if world > 1:                                  # all processes stop at the same step
            stop = torch.tensor(stop, device=device)
            dist.all_reduce(stop)
        if stop or seconds > saved + 10:
            save()
            saved = seconds
    if stop:
        print(f"stopped at step {step} and saved: the same command resumes", file=sys.stderr)
        sys.exit(128 + (signals or [signal.SIGTERM])[0])
    save()
    if rank == 0:
        hours = len(rows) * prepared.meta["seconds"] / 3600
        result = result_of(config, history, held, baseline, len(rows), hours)
        write_json(run / "result.json", result)
        (run / "checkpoint.prev.pt").unlink(missing_ok=True)
        if a.plot:
            average.load_state_dict(best)
            draw_reconstruction(run / "reconstruction.png", average, held, prepared.meta["rate"])
        print("loss {loss:.4f}, {unexplained:.1%} of the baseline, best at step {best_step} of "
              "{steps}; converged: {converged}".format(**result))
    if world > 1:
        del forward                                    # else it may wait for the group for ever
        dist.destroy_process_group()

if __name__ == "__main__":
    command(main)
