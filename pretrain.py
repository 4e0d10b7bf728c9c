"""
Pre-training: one cell of the grid. A number of users, hours of each, an architecture -> a held-out loss.

    data/NAME/windows.npy (n, C, T) float16  ->  standardised (B, C, T)  ->  masked autoencoder  ->  RUN/result.json

    python pretrain.py --data simulated --steps 300 --out runs/first             # a minute
    python pretrain.py --data pool --users 16 --hours-per-user 0.1 --width 128 --depth 4 --heads 4 --out runs/u16
    torchrun --nproc_per_node=2 pretrain.py --data pool --out runs/two           # one cell over two processes

The same command again goes on where it was, to the same bits: what is random at step t (batch, masks) is drawn from
(seed, t) alone, so a checkpoint holds no random state, and N processes see the same batches and masks as one.
"""
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")              # before torch: idle threads sleep, cells share cores
import argparse, ctypes, fcntl, functools, hashlib, io, json, math, platform, signal, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import Refused, command, draw_windows, held_out_users, load, provenance, replacing, training_users, write_json
from model import MAE, baseline_loss, draw_masks, forward_flops, parameters

BUSY = 75                                                        # exit status: another process works on this run
SCALE = {"acc": 0.7, "gyro": 1.05}                               # g, rad/s: what signals are divided by, in every cell
EVALUATED = 64                                                   # evaluation windows a held-out user, at most
LEARNING_RATE = {"muon": 0.02, "adamw": 0.003}                  # peaks, for all widths: matrices, or all with AdamW


# ---------------------------------------------------------------- what a cell sees
def select_sensors(channels, sensors):
    """Positions of the channels of `sensors` ("both", "acc" or "gyro"). Raises Refused where the set lacks them."""
    wanted = ["acc", "gyro"] if sensors == "both" else [sensors]
    chosen = [i for i, name in enumerate(channels) if name.split("_")[0] in wanted]
    if len(chosen) != 3 * len(wanted):
        raise Refused(f"the data set has the channels {', '.join(channels)}, not those of --sensors {sensors}: choose "
                      "another")
    return chosen


def standardise(windows, channels):
    """(n, C, T) float16 in g and rad/s -> float32, divided by 0.7 g and 1.05 rad/s, nothing subtracted: gravity stays,
    and a loss means the same in every set and cell."""
    scale = torch.tensor([1 / SCALE[name.split("_")[0]] for name in channels], device=windows.device)
    return windows.float() * scale[:, None]


@functools.lru_cache(maxsize=2)
def epoch_order(n, epoch, seed):
    return np.random.default_rng([seed, 1, epoch]).permutation(n)


def batch_rows(step, n, batch, seed):
    """The rows of the batch of `step`: a fresh permutation each epoch, a function of (seed, step) alone."""
    first, last = step * batch, (step + 1) * batch
    epochs = range(first // n, (last - 1) // n + 1)
    return np.concatenate([epoch_order(n, e, seed)[max(0, first - e * n):last - e * n] for e in epochs])


def held_out_windows(prepared, users, most):
    """Rows of the evaluation windows: at most `most` a user, evenly over the recordings, so that people weigh alike."""
    mine = [np.flatnonzero(prepared.users == user) for user in users]
    return np.concatenate([rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)] for rows in mine])


def seeded(*seed):
    """A generator for the numbers `seed`: what it draws is the same on any device, for any number of processes."""
    return torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2 ** 62)))


def seeded_masks(batch, config, *seed):
    """Masks of a batch, a function of the numbers `seed` alone."""
    model, task = config["model"], config["training"]
    return draw_masks(batch, model["sensors"], model["steps"], task["mask_ratio"], task["masking"], seeded(*seed))


def turn_sensors(x, vectors):
    """Windows (B, C, T) as if worn askew: turned by rotation vectors (B, 1, 3) in rad, both sensors alike."""
    turn = torch.linalg.matrix_exp(torch.linalg.cross(vectors, torch.eye(3)[None]))[:, None]     # (B, 1, 3, 3)
    return (turn.to(x.device) @ x.unflatten(1, (-1, 3))).flatten(1, 2)


# ---------------------------------------------------------------- learning
def build_optimizers(model, optimizer, lr, weight_decay):
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for the rest; or AdamW for all."""
    matrices = [p for part in (model.blocks, model.decoder) for p in part.parameters() if p.ndim == 2]
    ids = set(map(id, matrices)) if optimizer == "muon" else set()
    rest = [p for p in model.parameters() if id(p) not in ids]
    adam_lr = 0.3 * lr if optimizer == "muon" else lr
    optimizers = [torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)]
    if optimizer == "muon":
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay))
    for o in optimizers:
        o.param_groups[0]["peak"] = o.param_groups[0]["lr"]
    return optimizers


def schedule(step, steps):
    """Share of the peak learning rate: 5 % of the steps up in a line, then half a cosine down to zero."""
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))


@torch.no_grad()
def evaluate(model, held, normalise):
    """Mean loss of each (windows, keep, masked) in `held`, in fp32: the two halves of the held-out users."""
    losses = []
    for part in held:
        chunks = zip(*(tensor.split(256) for tensor in part))
        losses.append(sum(model(*chunk, normalise).item() * len(chunk[0]) for chunk in chunks) / len(part[0]))
    return losses


def train(model, forward, optimizers, batch_at, held, a, state, save, stopped):
    """From state["step"] to the last step, or to the next if `stopped()`; state["history"] gets a line each evaluation.

    `forward` is the model as it is called in training (compiled, over several processes), `batch_at(step)` gives
    (windows, keep, masked), `save()` keeps `state`. Raises Refused, with the last good checkpoint kept, where the loss
    is no number.
    """
    device, normalise, began, saved = held[0][0].device, a.target == "window", time.monotonic(), time.monotonic()
    kept = "choose a lower --lr; the last good checkpoint is kept"
    marks = {round(i * a.steps / a.evaluations) for i in range(1, a.evaluations + 1)}
    before, first, unread, stop = state["seconds"], state["step"], [], False
    while state["step"] < a.steps and not stop:
        for o in optimizers:
            o.param_groups[0]["lr"] = o.param_groups[0]["peak"] * schedule(state["step"], a.steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=a.precision == "bf16"):
            loss = forward(*batch_at(state["step"]), normalise)
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        state["step"] += 1
        stop = stopped()
        unread.append(loss.detach())
        due, mark = time.monotonic() - saved > 10, state["step"] in marks
        if device.type == "cpu" or due or mark or stop or len(unread) == 20:    # reading a loss makes a GPU wait
            values = torch.stack(unread).tolist()
            for i, value in enumerate(values):
                if not math.isfinite(value):
                    raise Refused(f"the loss is {value} at step {state['step'] - len(values) + i + 1}: {kept}")
            state["recent"] += values
            unread.clear()
            state["seconds"] = before + time.monotonic() - began
        if mark:
            choose, measure = evaluate(model, held, normalise)
            if not math.isfinite(choose + measure):
                raise Refused(f"the held-out loss is {choose + measure} after step {state['step']}: {kept}")
            if not state["history"] or choose < min(line["choose"] for line in state["history"]):
                state["best"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            recent, state["recent"] = sum(state["recent"]) / len(state["recent"]), []
            state["history"].append({"step": state["step"], "train_loss": recent, "choose": choose, "loss": measure,
                                     "seconds": round(state["seconds"], 1)})
            speed = (state["step"] - first) / (time.monotonic() - began)
            print(f"step {state['step']:6d}/{a.steps}  train {recent:.4f}  held-out {measure:.4f}  "
                  f"{speed * a.batch:7,.0f} windows/s  {clock((a.steps - state['step']) / speed)} left", flush=True)
        if due or state["step"] == a.steps or stop:
            if not all(p.isfinite().all() for p in model.parameters()):
                raise Refused(f"a weight is no number after step {state['step']}: {kept}")
            save()
            saved = time.monotonic()


# ---------------------------------------------------------------- never losing a run
def digest(state):
    """sha256 over every value and every tensor's bytes of a nested state: zip files don't notice a damaged tensor."""
    if isinstance(state, dict):
        state = [item for pair in state.items() for item in pair]
    if isinstance(state, (list, tuple)):
        content = "".join(map(digest, state)).encode()
    elif isinstance(state, torch.Tensor):
        content = state.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        content = repr(state).encode()
    return hashlib.sha256(content).hexdigest()


def save_checkpoint(run, state):
    """Write to a temporary name, then rename; the one before stays as checkpoint.prev.pt. OSError on a full disk."""
    content = io.BytesIO()                                       # torch's own writer would hide that the disk is full
    torch.save({**state, "digest": digest(state)}, content)
    with replacing(run / "checkpoint.pt") as temporary:
        temporary.write_bytes(content.getbuffer())
        if (run / "checkpoint.pt").exists():
            os.replace(run / "checkpoint.pt", run / "checkpoint.prev.pt")


def load_checkpoint(run, device="cpu"):
    """The newest checkpoint in `run` that is whole, or None where there is none. Raises Refused if all are damaged."""
    damaged = []
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        if not (run / name).exists():
            continue
        try:
            state = torch.load(run / name, map_location=device, weights_only=True)
            if state.pop("digest") == digest(state):
                if damaged:
                    print(f"{damaged[0]} is passed over; the one before it is whole", file=sys.stderr)
                return state
            damaged.append(f"{name} (its content is not what was written)")
        except Exception as error:                               # torch raises whatever its zip reader and unpickler do
            damaged.append(f"{name} ({type(error).__name__})")
    if damaged:
        raise Refused(f"no checkpoint in {run} can be read: {', '.join(damaged)}; delete the folder to start anew")
    return None


def read_json(path, **kinds):
    """The JSON object at `path`, with keys of these types. Raises Refused where it is damaged."""
    try:
        content = json.loads(path.read_text())
    except ValueError:                                           # not JSON, or not text
        content = None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), kinds[key]) for key in kinds):
        raise Refused(f"{path} is damaged: put it back, or delete its folder to start this run anew")
    return content


def load_run(run):
    """A pre-trained model with the weights of its best step, and its config. Raises Refused."""
    run = Path(run)
    if not (run / "config.json").is_file():
        raise Refused(f"{run} is not a run of pretrain.py: it has no config.json")
    state = load_checkpoint(run)
    if state is None:
        raise Refused(f"{run} has no checkpoint yet: let pretrain.py finish it")
    config = read_json(run / "config.json", data=dict, model=dict, training=dict)
    if config["model"] != state["config"]["model"]:
        raise Refused(f"the checkpoint in {run} is of another architecture than its config.json says: "
                      f"{state['config']['model']}")
    if not state["best"]:
        raise Refused(f"{run} was stopped before its first evaluation: let pretrain.py finish it")
    model = MAE(**config["model"])
    model.load_state_dict(state["best"])
    return model.eval(), config


def lock(run):
    """Hold `run` for as long as this process lives; the kernel lets go of the lock however it dies."""
    run.mkdir(parents=True, exist_ok=True)
    handle = open(run / ".lock", "w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"pretrain.py: another process is working on {run}", file=sys.stderr)
        sys.exit(BUSY)
    for leftover in run.glob(".*.tmp*"):                         # of a process that was killed while it wrote
        leftover.unlink()
    return handle


def differences(old, new):
    """What differs between two configs, for a sentence: "steps 100 -> 200"."""
    return ", ".join(f"{key} {old[part].get(key)} -> {value}" for part in ("data", "model", "training")
                     for key, value in new[part].items() if old[part].get(key) != value)


def finished(run, config, rank):
    """Whether `run` has its result; a new run gets its config.json. Raises Refused where it is another run's folder."""
    if (run / "config.json").exists():
        changed = differences(read_json(run / "config.json", data=dict, model=dict, training=dict), config)
        if changed:
            raise Refused(f"{run} holds another run ({changed}): choose another --out, or delete that folder")
    if (run / "result.json").exists():
        if rank == 0:
            print(f"{run} is done: loss {read_json(run / 'result.json', loss=float)['loss']:.4f}")
        return True
    if rank == 0 and not (run / "config.json").exists():
        write_json(run / "config.json", config)
    return False


# ---------------------------------------------------------------- the machine
def choose_device(name):
    """The torch device called `name`; "auto" takes an NVIDIA or Apple GPU if there is one. Raises Refused."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"         # set by torchrun: each process has a GPU of its own
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"--device {name} can't be used ({str(error).splitlines()[0]}): leave it out to take what is "
                      "there") from None


def choose_precision(name, device):
    if name != "auto":
        return name
    native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
              device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False))
    return "bf16" if native else "fp32"


def keep_memory():
    """Tell glibc to keep freed memory instead of giving it back and faulting it in again, page by page, every step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)                                # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)                          # M_TRIM_THRESHOLD


def describe_device(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}"


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# ---------------------------------------------------------------- the run
def parse_flags():
    p = argparse.ArgumentParser(description="Pre-train one masked autoencoder: one cell of the grid.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("data: how many people, how long each")
    g.add_argument("--data", default="simulated", help="prepared set, or several pooled: a+b+c")
    g.add_argument("--users", type=int, help="training users, in turn from all sources; default: all not held out")
    g.add_argument("--hours-per-user", type=float, help="at most this much of each user's recordings; default: all")
    g.add_argument("--sensors", choices=["both", "acc", "gyro"], default="both", help="one alone: half the tokens")
    g = p.add_argument_group("model")
    g.add_argument("--width", type=int, default=64, help="features a token: parameters grow with its square")
    g.add_argument("--depth", type=int, default=3, help="encoder blocks")
    g.add_argument("--heads", type=int, default=4, help="attention heads; width / heads must be even")
    g.add_argument("--patch", type=int, default=5, help="samples a token (20 a second): half as long, twice the tokens")
    g.add_argument("--positions", choices=["rotary", "sincos", "learned"], default="rotary",
                   help="how tokens know their time")
    g.add_argument("--decoder-width", type=int, default=64, help="features a token in the decoder")
    g.add_argument("--decoder-depth", type=int, default=1, help="decoder blocks")
    g = p.add_argument_group("task")
    g.add_argument("--mask-ratio", type=float, default=0.75, help="share of tokens hidden: more is harder, and cheaper")
    g.add_argument("--masking", choices=["patch", "time", "span"], default="patch",
                   help="hide patches, time steps or stretches")
    g.add_argument("--target", choices=["raw", "window"], default="raw",
                   help="standardised signal, or normalised by window: better features, a loss that compares with none")
    g.add_argument("--rotate", type=float, default=0.0, help="turn the sensors of each training window by about so "
                   "many rad: features that mind less how a sensor is worn, at a higher loss on those worn as usual")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, default=2000, help="updates; the learning rate falls to zero at the last")
    g.add_argument("--batch", type=int, default=128, help="windows an update, over all processes")
    g.add_argument("--optimizer", choices=["muon", "adamw"], default="muon",
                   help="muon: for the blocks' matrices, AdamW for the rest")
    g.add_argument("--lr", type=float, help="peak learning rate (of the matrices, with muon); default: from this file")
    g.add_argument("--weight-decay", type=float, default=0.05, help="pull of all weights to zero")
    g.add_argument("--seed", type=int, default=0, help="draws users, windows, weights, batches and masks")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes the fastest there is")
    g.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="bf16: products in "
                   "half precision, 1.3 times faster for 0.7 %% of the loss; auto takes it where the processor can")
    g.add_argument("--compile", action="store_true", help="torch.compile: a minute before the first step, then faster")
    g.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    g = p.add_argument_group("run")
    g.add_argument("--evaluations", type=int, default=20, help="how often the held-out loss is taken; the best counts")
    g.add_argument("--out", default="runs/pretrain", help="folder of this run; the same command goes on in it")
    a = p.parse_args()
    if a.seed < 0:
        raise Refused(f"--seed {a.seed} is too small: 0 at least")
    return a


def check_flags(a, prepared, trainable, world):
    """Raise Refused, with a sentence, for what can't be run."""
    samples = prepared.windows.shape[2]
    for name, low in (("users", 1), ("width", 2), ("depth", 1), ("heads", 1), ("patch", 1), ("decoder_width", 2),
                      ("decoder_depth", 1), ("batch", 1), ("steps", 1), ("evaluations", 1), ("threads", 0)):
        if getattr(a, name) is not None and getattr(a, name) < low:
            raise Refused(f"--{name.replace('_', '-')} {getattr(a, name)} is too small: {low} at least")
    if a.users and a.users > len(trainable):
        raise Refused(f"--users {a.users} is more than the {len(trainable)} training users of {a.data} "
                      f"({len(prepared.meta['users'])} less those held out)")
    if a.hours_per_user is not None and not prepared.meta["seconds"] <= a.hours_per_user * 3600 < math.inf:
        raise Refused(f"--hours-per-user {a.hours_per_user} is not a time of one window "
                      f"({prepared.meta['seconds']} s) or more")
    if samples % a.patch:
        raise Refused(f"--patch {a.patch} doesn't divide the window of {samples} samples: choose a divisor")
    tokens = samples // a.patch * (2 if a.sensors == "both" else 1)
    if not 0 < a.mask_ratio < 1 or not 0 < round(tokens * a.mask_ratio) < tokens:
        raise Refused(f"--mask-ratio {a.mask_ratio} leaves nothing to see or nothing to guess of {tokens} tokens")
    if a.batch % world:
        raise Refused(f"--batch {a.batch} can't be shared evenly by {world} processes")
    if not 0 <= a.rotate <= math.pi:
        raise Refused(f"--rotate {a.rotate} is no angle: choose one from 0 to 3.14 rad")
    if a.lr is not None and not 0 < a.lr < 10:
        raise Refused(f"--lr {a.lr} is no learning rate: choose one between 0 and 10")


def describe(a, prepared):
    """The config of a run: what it is (compared when it goes on), apart from where it ran."""
    training = {key: getattr(a, key) for key in (
        "users", "hours_per_user", "sensors", "mask_ratio", "masking", "target", "rotate", "steps", "batch",
        "optimizer", "lr", "weight_decay", "seed", "precision", "evaluations")}
    model = {"width": a.width, "depth": a.depth, "heads": a.heads, "patch": a.patch,
             "sensors": 2 if a.sensors == "both" else 1, "steps": prepared.windows.shape[2] // a.patch,
             "decoder_width": a.decoder_width, "decoder_depth": a.decoder_depth, "positions": a.positions}
    return {"data": {"name": a.data, "fingerprint": prepared.meta["fingerprint"]}, "model": model, "training": training,
            "provenance": provenance()}


def result_of(a, config, state, users, hours, windows, baseline, model, device):
    """The flat result of a finished run, as the grid's table has it."""
    best, shape = min(state["history"], key=lambda line: line["choose"]), config["model"]
    total, encoder = parameters(model)
    flops = 3 * a.steps * a.batch * forward_flops(a.width, a.depth, a.patch, shape["sensors"], shape["steps"],
                                                  a.mask_ratio, a.decoder_width, a.decoder_depth)
    return {"loss": best["loss"], "loss_last": state["history"][-1]["loss"], "loss_choose": best["choose"],
            "baseline_loss": baseline, "best_step": best["step"], **shape, **config["training"],
            "users": users, "hours": hours, "hours_per_user": hours / users, "hours_cap": a.hours_per_user,
            "windows": windows, "params": total, "params_encoder": encoder, "data": a.data,
            "fingerprint": config["data"]["fingerprint"], "seconds": round(state["seconds"], 2), "flops": flops,
            "windows_per_second": round(a.steps * a.batch / max(state["seconds"], 1e-9), 1),
            "device": describe_device(device), "versions": provenance()}


def main():
    a = parse_flags()
    run, rank, world = Path(a.out), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(a.device)
    torch.set_num_threads(a.threads if a.threads > 0 else max(1, os.cpu_count() // world))
    keep_memory()
    a.precision = choose_precision(a.precision, device)
    a.lr = LEARNING_RATE[a.optimizer] if a.lr is None else a.lr

    prepared = load(a.data)
    trainable = training_users(prepared.meta, a.seed)
    check_flags(a, prepared, trainable, world)
    channels = select_sensors(prepared.meta["channels"], a.sensors)
    names = [prepared.meta["channels"][c] for c in channels]
    config = describe(a, prepared)
    torch.manual_seed(a.seed)
    model = MAE(**config["model"]).to(device)

    if rank == 0:
        held_lock = lock(run)                                    # open, so held, until this process ends
    if finished(run, config, rank):                              # all processes leave, or one would wait for the others
        return

    users = trainable[:a.users]
    rows = draw_windows(prepared, users, a.hours_per_user, a.seed)
    fits = prepared.windows[:1].nbytes * len(rows) < 2 ** 31      # else batches are read through the memory map
    source = torch.from_numpy(prepared.windows[rows][:, channels]).to(device) if fits else None

    def windows_at(index):
        raw = torch.from_numpy(prepared.windows[index][:, channels]).to(device)
        return standardise(raw, names)

    def batch_at(step):
        mine = slice(rank * a.batch // world, (rank + 1) * a.batch // world)
        index = batch_rows(step, len(rows), a.batch, a.seed)[mine]
        x = standardise(source[torch.from_numpy(index).to(device)], names) if fits else windows_at(rows[index])
        if a.rotate:
            x = turn_sensors(x, a.rotate * torch.randn(a.batch, 1, 3, generator=seeded(a.seed, 4, step))[mine])
        return x, *(part[mine].to(device) for part in seeded_masks(a.batch, config, a.seed, 2, step))

    held = []
    for half, people in enumerate(held_out_users(prepared.meta)):
        x = windows_at(held_out_windows(prepared, people, EVALUATED))
        held.append((x, *(part.to(device) for part in seeded_masks(len(x), config, 3, half))))
    baseline = baseline_loss(*held[1], a.patch).mean().item()

    optimizers = build_optimizers(model, a.optimizer, a.lr, a.weight_decay)
    state = load_checkpoint(run, device) or {"step": 0, "seconds": 0.0, "history": [], "recent": [], "best": {}}
    if state["step"]:
        model.load_state_dict(state["model"])
        for o, saved in zip(optimizers, state["optimizers"]):
            o.load_state_dict(saved)
        print(f"goes on from step {state['step']}")
    forward = torch.compile(model) if a.compile else model
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        forward = torch.nn.parallel.DistributedDataParallel(forward)

    def save():
        if rank == 0:
            state.update(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], config=config)
            save_checkpoint(run, state)
            with replacing(run / "metrics.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in state["history"]))

    got = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: got.append(received))

    def stopped():
        """Whether a signal came; several processes agree on it, so that all leave at the same step."""
        if world > 1:
            signals = torch.tensor(len(got), device=device)
            dist.all_reduce(signals)
            got.extend([signal.SIGTERM] * (signals.item() > len(got)))
        return bool(got)

    if rank == 0:
        print(f"{a.data}: {len(rows)} windows of {len(users)} users -> {a.width}x{a.depth}x{a.heads}, "
              f"{parameters(model)[1]:,} encoder parameters, on {device}; baseline {baseline:.4f}", flush=True)
    try:
        train(model, forward, optimizers, batch_at, held, a, state, save, stopped)
    except (MemoryError, RuntimeError) as error:                 # torch says it differently on a CPU and on a GPU
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise Refused(f"out of memory on {device}: lower --batch, --width or --depth, or take --precision "
                      "bf16") from None
    if got and state["step"] < a.steps:
        print(f"stopped at step {state['step']} of {a.steps} and saved: the same command goes on from there",
              file=sys.stderr)
        sys.exit(128 + got[0])
    if rank == 0:
        hours = len(rows) * prepared.meta["seconds"] / 3600
        result = result_of(a, config, state, len(users), hours, len(rows), baseline, model, device)
        write_json(run / "result.json", result)
        (run / "checkpoint.prev.pt").unlink(missing_ok=True)
        print(f"done: loss {result['loss']:.4f} at step {result['best_step']} (baseline {baseline:.4f}), "
              f"{clock(state['seconds'])} of training")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
