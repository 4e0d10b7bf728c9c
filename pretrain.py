"""
Pre-training: one cell of the grid. Users, hours per user, architecture -> loss on held-out users.

    windows (n, C, T)  ->  scaled batches (B, C, T)  ->  masked autoencoder  ->  RUN/result.json

    python pretrain.py --data simulated --users 8 --out runs/first

The learning rate never stops falling, an average of the weights is evaluated and kept, and a run
ends when its held-out loss has stopped improving (--patience), or at --steps. The batch of step t
is drawn from (seed, t) alone, so a run that was cut off goes on bit-identically.
"""
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")    # before torch: idle threads sleep
import copy, inspect, json, math, platform, time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data import (CHANNELS, SENSOR_CHOICES, UserError, build_parser, command, draw_windows,
                  held_out_users, held_out_windows, identities, load, number, people, provenance,
                  random_rotation, random_stream, read_json, replacing, require, training_users,
                  windows_at, write_json)
from model import MAE, draw_masks, forward_flops, parameters

HeldOut = namedtuple("HeldOut", "x keep masked person people half")            # see held_out

# ---------------------------------------------------------------- what a cell sees
def masks_for(x, flags, *key):
    """Masks for windows x (B, C, T), drawn from `key` alone: keep (B, K) and masked (B, M), in
    training and in held_out: another way to mask in training alone belongs in batch_at."""
    seed = int(random_stream(*key).integers(2 ** 62))            # NumPy seeds torch
    tokens = x.shape[1] // 3 * (x.shape[2] // flags.patch)       # sensors x patches
    return draw_masks(len(x), tokens, flags.mask_ratio, torch.Generator().manual_seed(seed))

def batch_at(step, prepared, rows, flags):
    """The batch of `step`, drawn from the seed and the step alone: x (B, C, T), keep, masked."""
    drawn = random_stream(flags.seed, "batch", step).integers(len(rows), size=flags.batch)
    x = windows_at(prepared, rows[drawn], flags.sensors)
    if flags.rotate:
        x = random_rotation(x, flags.rotate, random_stream(flags.seed, "rotation", step))
    return torch.from_numpy(x), *masks_for(x, flags, flags.seed, "masks", step)

def held_out(prepared, flags, device="cpu"):
    """The evaluation, the same for every cell: windows x (n, C, T) of people who are never trained
    on; their masks; person (n,), an index into people; half (people,): see cross_fitted."""
    half_a, half_b = held_out_users(prepared.meta)
    users = half_a + half_b
    rows = held_out_windows(prepared, users, most=32)
    x = windows_at(prepared, rows, flags.sensors)
    batch = torch.from_numpy(x), *masks_for(x, flags, "held-out masks")
    person = np.array([users.index(user) for user in prepared.users[rows]])
    return HeldOut(*[part.to(device) for part in batch], person, people(prepared.meta, users),
                   half=np.isin(users, half_b))

# ---------------------------------------------------------------- optimisers, schedule, average
def orthogonal(x):
    """Matrix x (a, b), a <= b, with rows made nearly orthonormal by Newton-Schulz iteration."""
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):                                 # x <- (3.4445 - 4.775 g + 2.0315 g g) x
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x

class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (Jordan 2024, kellerjordan.github.io/posts/muon), but in fp32."""
    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for p in group["params"]:
            rows, columns = p.shape
            momentum = self.state[p].setdefault("average", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            update = p.grad.lerp(momentum, 0.95)                               # Nesterov
            update = orthogonal(update) if rows <= columns else orthogonal(update.mT).mT
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

def build_optimizers(model, lr, weight_decay):
    """Muon for the matrices of the blocks, AdamW with a smaller rate for the rest."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        in_block = name.startswith(("blocks.", "decoder."))
        (matrices if in_block and p.ndim == 2 else rest).append(p)
    return [Muon(matrices, dict(lr=lr, weight_decay=weight_decay)),
            torch.optim.AdamW(rest, 0.3 * lr, betas=(0.9, 0.95), weight_decay=weight_decay)]

def schedule(step, tau, decay):
    """Share of the peak learning rate at `step`: linear warm-up times (1 + step / tau)^-decay."""
    return min(1, (step + 1) / 50) * (1 + step / tau) ** -decay

@torch.no_grad()
def update_average(average, model, step, gamma):
    """Power-function average of the weights w (Karras et al. 2024, arXiv 2312.02696, section 3):
    average <- b average + (1 - b) w_t, b = (1 - 1/t)^(gamma + 1): w_s weighs about s^gamma."""
    b = (1 - 1 / step) ** (gamma + 1)
    torch._foreach_lerp_([*average.parameters()], [*model.parameters()], 1 - b)

# ---------------------------------------------------------------- the loop
def new_state(model, flags):
    """A run between two steps, and what a checkpoint holds. best: the averaged weights with the
    lowest held-out loss, the outcome. train_loss: a sum since the last line of the history."""
    muon, adamw = build_optimizers(model, flags.lr, flags.weight_decay)
    return SimpleNamespace(model=model, average=copy.deepcopy(model).eval(), muon=muon, adamw=adamw,
                           step=0, seconds=0.0, train_loss=0.0, history=[], best={})

def objective(model, x, keep, masked):
    """What training minimises, a number. An auxiliary term is added here, and nowhere else."""
    return model(x, keep, masked).mean()

def train(state, prepared, rows, held, flags):
    """Train from `state` on the windows `rows`, until the held-out loss has stopped improving or
    --steps is reached. Yields after each step: then the caller may save the state."""
    device = held.x.device
    began = time.monotonic() - state.seconds           # as if it had never been cut off
    while state.step < flags.steps and not has_converged(state.history, flags.patience):
        batch = [part.to(device) for part in batch_at(state.step, prepared, rows, flags)]
        with torch.autocast(device.type, torch.bfloat16, enabled=flags.precision == "bf16"):
            loss = objective(state.model, *batch)
        loss.backward()
        share = schedule(state.step, flags.tau, flags.decay)
        for optimizer in (state.muon, state.adamw):
            optimizer.param_groups[0]["lr"] = share * optimizer.defaults["lr"]
            optimizer.step()
            optimizer.zero_grad()
        state.step += 1
        update_average(state.average, state.model, state.step, gamma=flags.average)
        state.train_loss = state.train_loss + loss.detach()      # it was on the CPU, if resumed
        state.seconds = time.monotonic() - began
        if is_evaluated(state.step) or state.step == flags.steps:
            record(state, held, flags)
        yield

# ---------------------------------------------------------------- the held-out loss, and the end
@torch.no_grad()
def evaluate(loss_of, held):
    """The mean loss of each held-out person, (people,). loss_of: as MAE.forward."""
    chunks = zip(*[part.split(64) for part in held[:3]])                       # x, keep, masked
    losses = torch.cat([loss_of(*chunk) for chunk in chunks]).cpu().double().numpy()
    return np.bincount(held.person, losses) / np.bincount(held.person)

def is_evaluated(step):
    """Whether to evaluate: at steps about 7 % apart, whatever the length of the run."""
    return step >= 16 and int(math.log(step, 1.07)) < int(math.log(step + 1, 1.07))

def best_step(history):
    return min(history, key=lambda line: line["loss"])["step"]

def has_converged(history, patience):
    """Whether the held-out loss hasn't improved in the last share `patience` of the steps (0: it
    never ends). Not before 300: many cells learn nothing new for about 200 steps, then go on."""
    step = history[-1]["step"] if history else 0
    return step >= 300 and patience > 0 and best_step(history) <= (1 - patience) * step

def cross_fitted(history, half):
    """Each held-out person's loss (people,), at the evaluation that is best for the *other* half:
    at their own best, the luckiest of many, it would be too low. half (people,): True in half b."""
    losses = np.array([line["people"] for line in history])              # (evaluations, people)
    best_of_0, best_of_1 = (losses[:, half == h].mean(1).argmin() for h in (0, 1))
    return np.where(half, losses[best_of_0], losses[best_of_1])

# ---- from here on: files, flags, figures
SAVE_EVERY = 10          # seconds: about what a kill of any kind costs
COUNT, AMOUNT, SHARE = number(int, 1), number(float, 0), number(float, 0, 1)
FLAGS = {                # name: (default, range or choices, what it does)
    "data": ("simulated", str, "prepared set, or several pooled: a+b+c"),
    "users": (None, COUNT, "training users; without it, all who aren't held out"),
    "hours_per_user": (None, number(float, 0.0027), "at most so many of each, 10 s or more"),
    "sensors": ("both", SENSOR_CHOICES, "both, or one (half the tokens)"),
    "width": (64, COUNT, "parameters and time grow with its square"),
    "depth": (3, COUNT, "blocks of the encoder"),
    "heads": (4, COUNT, "the width must be a multiple of 2 x heads"),
    "patch": (5, COUNT, "samples in a token: halving it doubles the cost"),
    "mask_ratio": (0.75, SHARE, "share of hidden tokens: more is harder"),
    "target": ("raw", ["raw", "window"], "window: better features, but losses of another kind"),
    "rotate": (0.0, AMOUNT, "random rotation of about so many rad"),
    "steps": (20000, COUNT, "updates at most; raise it to lengthen a run"),
    "patience": (0.3, SHARE, "end after this share of all steps without a better loss; 0: never"),
    "batch": (64, COUNT, "windows in an update"),
    "lr": (0.02, AMOUNT, "peak learning rate, the same for every width"),
    "weight_decay": (0.05, AMOUNT, "pull of the weights towards zero"),
    "tau": (500, COUNT, "time scale of the learning rate's fall, in steps"),
    "decay": (0.5, AMOUNT, "how fast it falls: (1 + step / tau)^-decay"),
    "average": (7, AMOUNT, "gamma of the averaged weights: larger forgets sooner"),
    "seed": (0, number(int, 0), "draws users, windows, weights, batches, masks"),
    "precision": ("auto", ["auto", "fp32", "bf16"], "auto: bf16 where it is faster"),
}
MACHINE = {              # the same, of what doesn't change the result of a run
    "device": ("auto", str, "cpu, cuda or mps; auto takes a GPU if there is one"),
    "threads": (os.cpu_count(), COUNT, "CPU threads"),
    "plot": (False, bool, "draw RUN/reconstruction.png: true and predicted signal"),
    "out": ("runs/pretrain", str, "folder of this run; the same command resumes it"),
}

def check_flags(a, held, users):
    """UserError for flags that don't suit these data."""
    require(len(users) >= (a.users or 0), f"--users {a.users}: there are {len(users)} to train on")
    require(a.width % (2 * a.heads) == 0, f"--width isn't a multiple of {2 * a.heads}, 2 x heads")
    require(held.x.shape[2] % a.patch == 0, f"--patch doesn't divide {held.x.shape[2]} samples")
    require(held.keep.numel() and held.masked.numel(), "--mask-ratio hides all tokens or none")
    require(held.x.std(2).any(), "the held-out people don't move: no loss can be told")

def choose_device(name):
    """The torch device `name`; "auto" takes a GPU if there is one."""
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.zeros(1, device=best if name == "auto" else name).device
    except Exception:                                  # torch raises many kinds
        raise UserError(f"--device {name}: this PyTorch has none here, take another") from None

# ---------------------------------------------------------------- a run is never lost
def record(state, held, flags):
    """Evaluate the averaged weights, note it, print it, keep the best weights."""
    losses = evaluate(state.average, held)
    loss = losses.mean().item()
    require(math.isfinite(loss), f"no finite loss at step {state.step}: choose a lower --lr")
    since = state.step - (state.history[-1]["step"] if state.history else 0)
    train_loss = float(state.train_loss) / since
    state.train_loss = 0.0
    flops = 3 * flags.batch * forward_flops(state.model, held.x.shape[2], flags.mask_ratio)
    state.history.append({"step": state.step, "train_loss": train_loss, "loss": loss,
                          "people": losses.tolist(), "seconds": state.seconds,
                          "flops": state.step * flops})
    if best_step(state.history) == state.step:
        state.best = copy.deepcopy(state.average.state_dict())
    left = state.seconds / state.step * (flags.steps - state.step)
    print(f"step {state.step:6d}  train {train_loss:.4f}  held-out {loss:.4f}  "
          f"{state.seconds:.0f} s, at most {left:.0f} s left", flush=True)

def save_checkpoint(run, state):
    """Write checkpoint.pt and metrics.jsonl."""
    content = {name: part.state_dict() if hasattr(part, "state_dict") else part
               for name, part in vars(state).items()}
    with replacing(run / "checkpoint.pt") as temporary, open(temporary, "wb") as file:
        torch.save(content, file)                      # given a path, it hides a full disk
    with replacing(run / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in state.history))

def load_checkpoint(run, **parts):
    """What checkpoint.pt holds, or {}. `parts`, modules and optimisers, get what it has of them."""
    path = run / "checkpoint.pt"
    if not path.exists():
        return {}
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except Exception as error:                         # torch raises many kinds
        raise UserError(f"{path} is damaged, or made by other code than this ({error!r:.99}): "
                        "delete it, or choose another --out") from None
    return saved

def resume(run, state, config):
    """Bring a new `state` to where RUN stood. UserError if another command made that run."""
    if not any((run / name).exists() for name in ("config.json", "checkpoint.pt")):
        return
    before = read_json(run / "config.json")
    check_same_run(run, before, config)
    if before["provenance"] != config["provenance"]:
        print(f"note: {run} was begun by other code or versions: {before['provenance']}")
    config["provenance"] = before["provenance"]
    parts = {name: part for name, part in vars(state).items() if hasattr(part, "load_state_dict")}
    vars(state).update(load_checkpoint(run, **parts) | parts)

def check_same_run(run, before, now):
    """UserError if another command made `run`; but --steps and --patience may be raised."""
    defaults = {name: default for name, (default, *_) in FLAGS.items()}        # of older runs
    old, new = (defaults | config["flags"] | {"fingerprint": config["fingerprint"]}
                for config in (before, now))
    for limit in ("steps", "patience"):
        if (new[limit] or math.inf) >= (old[limit] or math.inf):         # --patience 0: no end
            old[limit] = new[limit]
    changed = [f"{name} {value} -> {new.get(name)}" for name, value in old.items()
               if value != new.get(name)]
    require(not changed, f"{run} is another run ({', '.join(changed)}): choose another --out")

# ---------------------------------------------------------------- picture, result, the command
@torch.no_grad()
def draw_reconstruction(path, model, held, sensors):
    """True and predicted signal in every 100th held-out window, as the model reads them."""
    from matplotlib.figure import Figure
    x, keep, masked = (part[::100] for part in held[:3])
    pairs = torch.stack([x, model.reconstruct(x, keep, masked)], dim=3)        # (n, C, T, 2)
    channels = [name for name in CHANNELS if sensors in ("both", name[:-2])]
    figure = Figure((14, 12), layout="constrained")
    for k, axes in enumerate(figure.subplots(len(channels))):
        axes.plot(pairs[:, k].flatten(0, 1).cpu())     # (n T, 2): one window after another
        axes.set_ylabel(channels[k])
    axes.legend(["scaled signal", "prediction of what was hidden"])
    with replacing(path) as temporary:
        figure.savefig(temporary)

def result_of(config, state, held, baseline, windows, hours):
    """A run as a row of a grid's table, and the loss of each held-out person."""
    flags, last, users = config["flags"], state.history[-1], len(config["trained_on"])
    losses = cross_fitted(state.history, held.half)
    params, params_encoder = parameters(state.model)
    people = [{"source": source, "user": user, "loss": loss, "baseline": base}
              for (source, user), loss, base in zip(held.people, losses, baseline)]
    return {
        **flags, "loss": losses.mean(), "loss_last": last["loss"], "baseline_loss": baseline.mean(),
        "unexplained": losses.mean() / baseline.mean(), "users": users, "hours": hours,
        "hours_per_user": hours / users, "hours_cap": flags["hours_per_user"], "windows": windows,
        "params": params, "params_encoder": params_encoder, "steps": state.step, "people": people,
        "best_step": best_step(state.history), "patches": held.x.shape[2] // flags["patch"],
        "converged": has_converged(state.history, flags["patience"]), "seconds": state.seconds,
        "windows_per_second": state.step * flags["batch"] / state.seconds, "flops": last["flops"],
        "device": f"{held.x.device}, {torch.get_num_threads()} threads, {platform.machine()}",
        "config": {**flags, "fingerprint": config["fingerprint"]}, "versions": config["provenance"]}

def main():
    flags = build_parser(FLAGS | MACHINE, __doc__).parse_args()
    run, device = Path(flags.out), choose_device(flags.device)
    torch.set_num_threads(flags.threads)
    if flags.precision == "auto":
        fast = device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16")
        flags.precision = "bf16" if fast else "fp32"
    prepared = load(flags.data)                        # the people of this run, their windows
    users = training_users(prepared.meta, flags.seed)[:flags.users]
    held = held_out(prepared, flags, device)
    check_flags(flags, held, users)
    rows = draw_windows(prepared, users, flags.hours_per_user, flags.seed)
    hours = len(rows) * prepared.meta["seconds"] / 3600
    settings = {name: getattr(flags, name) for name in FLAGS}
    arguments = {name: settings[name] for name in FLAGS
                 if name in inspect.signature(MAE).parameters}
    arguments["sensors"] = held.x.shape[1] // 3        # how many
    torch.manual_seed(flags.seed)
    state = new_state(MAE(**arguments).to(device), flags)
    baseline = evaluate(state.model.baseline, held)
    config = {"flags": settings, "fingerprint": prepared.meta["fingerprint"], "model": arguments,
              "trained_on": identities(prepared.meta, users), "provenance": provenance()}
    resume(run, state, config)                         # from where it stood, or from the start
    write_json(run / "config.json", config)
    print(f"{len(rows)} windows of {len(users)} users, baseline loss {baseline.mean():.4f}")
    saved = state.seconds
    for _ in train(state, prepared, rows, held, flags):
        if state.seconds > saved + SAVE_EVERY:
            save_checkpoint(run, state)
            saved = state.seconds
    save_checkpoint(run, state)
    result = result_of(config, state, held, baseline, len(rows), hours)
    write_json(run / "result.json", result)
    if flags.plot:
        state.average.load_state_dict(state.best)
        draw_reconstruction(run / "reconstruction.png", state.average, held, flags.sensors)
    print(f"loss {result['loss']:.4f}, {result['unexplained']:.1%} of the baseline, best at step "
          f"{result['best_step']} of {state.step}; converged: {result['converged']}")

if __name__ == "__main__":
    command(main)
