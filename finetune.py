"""
Downstream: what a pre-trained encoder knows about activities of people it has never seen.

    windows x (n, C, T)         scaled as in pre-training; a tail shorter than a patch is cut
      encode  -> (n, S, G, 2D)  of each patch of each sensor, none masked
      pool    -> (n, F)         mean and deviation over time, by sensor: F = 4 x S x D
      predict -> (n,)           by a probe, or by a network of encoder and head
      score   -> RUN/finetune/DATA-MODE.json and .png

Modes: `probe` fits a logistic regression on the features; `tune` then trains encoder and head;
`scratch` does so from random weights (what the labels alone can do); `random` is the probe of
random weights (what the architecture alone can do).

Splits are by user (but see --split). In each fold a fifth of the training users are validation
users: they choose the penalty of a probe (then fitted to all training users), and which epoch of a
network is kept.

    python finetune.py runs/first --data ucihar --mode tune
    python finetune.py runs/pool/* --data wisdm_watch                 # a probe of each run
"""
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")    # before torch: idle threads sleep
import copy, hashlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from data import (SENSOR_CHOICES, SENSORS, build_parser, command, held_out_users, known, load,
                  number, provenance, random_rotation, random_stream, read_json, replacing,
                  require, windows_at, write_json)
from model import MAE
from pretrain import choose_device, load_checkpoint

PENALTIES = [3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4]            # L2, strongest first
LEARNING_RATE = {"tune": 3e-4, "scratch": 1e-3}             # of the modes that train a network
Probe = namedtuple("Probe", "weights mean sd l2")      # weights (F + 1, K), mean and sd (F,)

# ---------------------------------------------------------------- who trains and who is tested
def split_rows(rows, groups, chosen):
    """Rows outside and inside the `chosen` groups; groups (n,): one a window."""
    inside = np.isin(groups[rows], chosen)
    return rows[~inside], rows[inside]

def five_folds(rows, groups, name):
    """[(train, test), ...]: the rows split up to 5 times; each group is in one test."""
    order = random_stream(name).permutation(np.unique(groups[rows]))
    return [split_rows(rows, groups, order[k::5]) for k in range(min(5, len(order)))]

def user_folds(meta, users, seen):
    """Windows for training and for testing, [(train, test), ...], nobody on both sides. Who is
    tested: the official test users of the set; else, if the encoder has `seen` people of this set,
    the held-out ones that are new to it (or else all new ones); else everyone, in 5 folds."""
    rows = np.arange(len(users))
    official = [meta["users"].index(name) for name in meta["test_users"] or []]
    unseen = {*users} - {*seen}
    held_out = unseen & {*sum(held_out_users(meta), [])}
    if official or seen:
        return [split_rows(rows, users, official or list(held_out or unseen))]
    return five_folds(rows, users, "folds")

def split_validation(train, groups):
    """Training rows -> (fit, validation): validation is a fifth of the groups, one at least."""
    if len(np.unique(groups[train])) == 1:             # a single user: a fifth of the windows
        groups = np.arange(len(groups))
    return five_folds(train, groups, "validation users")[0]

# ---------------------------------------------------------------- features
class Encoder(nn.Module):
    """Scaled windows (B, C, T) -> features (B, F): the mean over time of each sensor's patches, and
    their deviation. sensors: the numbers of the model's sensors, all by default."""
    def __init__(self, model, sensors=None):
        super().__init__()
        self.model, self.sensors = model, sensors

    def forward(self, x):
        patches = self.model.features(x.to(self.model.norm.weight.device), self.sensors)
        deviation = (patches.var(2, correction=0) + 1e-5).sqrt()               # (B, S, 2D)
        return torch.cat([patches.mean(2), deviation], dim=1).flatten(1)

@torch.no_grad()
def in_batches(net, x):
    """net(x) for an array or a tensor x (n, C, T), 64 windows at a time: (n, ...), on the CPU."""
    return torch.cat([net(part).cpu() for part in torch.as_tensor(x).split(64)])

# ---------------------------------------------------------------- a probe: fit and predict
def logistic_regression(x, y, l2, start, tolerance):
    """Multinomial logistic regression of y (n,) on x (n, F): weights (F + 1, K), the bias last.
        minimise over W, b   mean of -log softmax(x W + b)[y]  +  l2 / 2 |W|^2
    by L-BFGS from `start`, until no entry of the gradient is above `tolerance`."""
    w = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=5000, history_size=20, tolerance_grad=tolerance,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        likelihood = nn.functional.cross_entropy(x @ w[:-1] + w[-1], y)
        value = likelihood + l2 / 2 * w[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach()

def fit_probe(x, y, classes, fit, validation, final):
    """Features x (n, F), y (n,) and three sets of rows -> Probe. Each penalty is tried on the rows
    `fit`; the one with the best macro-F1 on `validation` is used to fit the rows `final`."""
    def fit_rows(rows, l2, start, tolerance):
        mean, sd = x[rows].mean(0), x[rows].std(0, correction=0).clamp(min=1e-6)
        z = (x[rows] - mean) / sd
        return Probe(logistic_regression(z, y[rows], l2, start, tolerance), mean, sd, l2)

    best_f1, weights = -1, x.new_zeros(x.shape[1] + 1, classes)
    for l2 in PENALTIES:
        probe = fit_rows(fit, l2, weights, tolerance=3e-4)
        weights = probe.weights                        # where the next one starts
        counts = confusion(y[validation], predict(probe, x[validation]), classes)
        f1 = scores(counts)["macro_f1"]
        if f1 > best_f1:
            best, best_f1 = probe, f1
    return fit_rows(final, best.l2, best.weights, tolerance=5e-5)

def predict(probe, x):
    """Features x (n, F) -> predicted classes (n,)."""
    z = (x - probe.mean) / probe.sd
    return (z @ probe.weights[:-1] + probe.weights[-1]).argmax(1)

# ---- from here on: files, flags, figures
def confusion(truth, predicted, classes):
    """Counts (K, K): rows are the true classes, columns the predicted ones."""
    return torch.bincount(truth * classes + predicted, minlength=classes ** 2).view(classes, -1)

def scores(counts):
    """Accuracy, F1 of each class (None if it is neither present nor predicted), and their mean."""
    total = (counts.sum(0) + counts.sum(1)).tolist()
    f1 = [2 * hits / n if n else None for hits, n in zip(counts.diag().tolist(), total)]
    return {"accuracy": (counts.trace() / counts.sum()).item(), "per_class_f1": f1,
            "macro_f1": float(np.mean([value for value in f1 if value is not None])),
            "confusion": counts.tolist()}

# ---------------------------------------------------------------- encoder and head together
def train_network(encoder, probe, x, y, classes, fit, validation, flags):
    """Train encoder and head until the macro-F1 on `validation` hasn't risen for --patience epochs:
    the best network, windows (B, C, T) -> logits (B, K), and its epoch. BatchNorm standardises the
    features (He et al. 2021, A.1). The head starts from `probe`: a random one would first distort
    the features (Kumar et al. 2022, 2202.10054). A moving average of the weights is kept."""
    norm, head = nn.BatchNorm1d(len(probe.mean), affine=False), nn.Linear(len(probe.mean), classes)
    norm.running_mean, norm.running_var = probe.mean, probe.sd.square()
    head.weight.data, head.bias.data = probe.weights[:-1].T.contiguous(), probe.weights[-1]
    net = nn.Sequential(copy.deepcopy(encoder), norm, head).to(encoder.model.norm.weight.device)
    optimizer = torch.optim.RAdam(net.parameters(), LEARNING_RATE[flags.mode], weight_decay=0.05,
                                  decoupled_weight_decay=True)                 # warms up by itself
    shift = min(net[0].model.patch, x.shape[2] - net[0].model.patch + 1)
    average, epoch, best_epoch, best_f1 = copy.deepcopy(net), 0, 0, -1
    while epoch - best_epoch < flags.patience:
        epoch += 1
        rng = random_stream("training epoch", epoch)
        net.train()
        for rows in np.array_split(rng.permutation(fit), max(1, len(fit) // 64)):
            batch = torch.from_numpy(random_rotation(x[rows].numpy(), 0.2, rng))
            logits = net(batch[..., rng.integers(shift):])     # patches start at any sample
            truth = y[rows].to(logits.device)
            nn.functional.cross_entropy(logits, truth, label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            for old, new in zip(average.state_dict().values(), net.state_dict().values()):
                old.copy_(old + 0.01 * (new - old))
        predicted = in_batches(average.eval(), x[validation]).argmax(1)
        f1 = scores(confusion(y[validation], predicted, classes))["macro_f1"]
        print(f"epoch {epoch}: macro-F1 {f1:.4f} of the validation users", flush=True)
        if f1 > best_f1:
            best, best_f1, best_epoch = copy.deepcopy(average), f1, epoch
    return best, best_epoch

def score_folds(encoder, x, y, classes, users, names, folds, flags):
    """Train and score on each fold: [{key: value}, ...]."""
    encoded, scored = in_batches(encoder, x), []                               # (n, F)
    for train, test in folds:
        fit, validation = split_validation(train, users)
        network = flags.mode in LEARNING_RATE          # validation must be new to a network
        probe = fit_probe(encoded, y, classes, fit, validation, fit if network else train)
        epoch, predicted = None, predict(probe, encoded[test])
        if network:
            net, epoch = train_network(encoder, probe, x, y, classes, fit, validation, flags)
            predicted = in_batches(net, x[test]).argmax(1)
        scored.append({**scores(confusion(y[test], predicted, classes)), "l2": probe.l2,
                       "epoch": epoch, "n_train": len(train), "n_test": len(test),
                       "train_users": np.unique(names[train]),
                       "test_users": np.unique(names[test])})
    return scored

def summarise(folds):
    """A result: means and deviations over folds; F1 of each class and confusion over all folds."""
    each = {key: [fold[key] for fold in folds] for key in folds[0]}
    result = {**scores(torch.tensor(each["confusion"]).sum(0)), "folds": folds, "l2": each["l2"],
              "n_train": round(np.mean(each["n_train"])), "n_test": sum(each["n_test"]),
              "test_users": np.unique(np.concatenate(each["test_users"]))}
    for key in ("accuracy", "macro_f1"):
        result[key] = float(np.mean(each[key]))
        result[key + "_sd"] = float(np.std(each[key], ddof=1)) if len(folds) > 1 else 0.0
    return result

def draw_confusion(path, result):
    """A row for each true class: the percentage of its windows that have each prediction."""
    from matplotlib.figure import Figure
    counts, names = np.array(result["confusion"]), result["classes"]
    percent = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    figure = Figure((10, 10), layout="constrained")
    axes = figure.subplots()
    axes.imshow(percent, cmap="Blues", vmax=200)       # black numbers can be read on it
    for row, column in np.argwhere(percent >= 0.5):
        axes.text(column, row, f"{percent[row, column]:.0f}", ha="center", va="center")
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true", title=path.stem)
    with replacing(path) as temporary:
        figure.savefig(temporary)

# ---------------------------------------------------------------- a run, the command
def load_run(run):
    """A pre-trained model with the weights of its best step, and its config. Raises UserError."""
    config, saved = read_json(run / "config.json"), load_checkpoint(run)
    exported = "step" not in saved                     # as results/encoder
    require("best" in saved and (exported or (run / "result.json").exists()),
            f"{run} isn't finished: let pretrain.py end first")
    model = MAE(**config["model"]).eval()
    load_checkpoint(run, best=model)
    return model, config

def random_model(config, mode):
    """The model of a run with random weights. Blocks start as the identity, which mixes nothing:
    for the mode "random", random ones are the stronger baseline."""
    torch.manual_seed(0)
    model = MAE(**config["model"]).eval()
    if mode == "random":
        for block in model.blocks:
            block.attention.out.reset_parameters()
            block.down.reset_parameters()
    return model

def sensor_numbers(run, pretrained, wanted, count):
    """Which of a model's `count` sensors, pre-trained on `pretrained`, read those `wanted`."""
    names = [*SENSORS][:count] if pretrained == "both" else [pretrained]
    chosen = [number for number, name in enumerate(names) if wanted in ("both", name)]
    require(chosen and pretrained in ("both", wanted), f"{run} was pre-trained with --sensors "
            f"{pretrained}: leave --sensors away, or give the same")
    return chosen

FLAGS = {                # name: (default, range or choices, what it does)
    "data": ("simulated", str, "a prepared set with labels"),
    "mode": ("probe", ["probe", "tune", "scratch", "random"], "see above"),
    "sensors": (None, SENSOR_CHOICES, "use that sensor only; without it, those of the run"),
    "label_users": (None, number(int, 1), "train on so many users; without it, on all"),
    "split": ("user", ["user", "window"], "window: at random, to show what a leak of people adds"),
    "patience": (8, number(int, 1), "tune, scratch: end after so many epochs without progress"),
    "device": ("auto", str, "cpu, cuda or mps; auto takes a GPU if there is one"),
}

def few_users(folds, users, count):
    """Folds with `count` of their training users, nested; a single fold is drawn 5 times."""
    few = []
    for k, (train, test) in enumerate(folds * (5 if len(folds) == 1 else 1)):
        order = random_stream("label users", k).permutation(np.unique(users[train]))
        require(count <= len(order), f"--label-users {count} is more than {len(order)}: take fewer")
        few.append((train[np.isin(users[train], order[:count])], test))
    return few

def folds_of(run, trained_on, flags, meta, users):
    """The folds that the flags ask for. UserError if nobody is left to train on or to test."""
    seen = known(meta, trained_on)
    folds = user_folds(meta, users, seen)
    for train, test in folds:
        fair = len(train) and len(test) and not np.isin(users[test], seen).any()
        require(fair, f"{flags.data} has too few users to test: {run} was pre-trained on "
                f"{len(seen)} of {len(meta['users'])}; take another set or run")
    return few_users(folds, users, flags.label_users) if flags.label_users else folds

def result_name(flags):
    """The name of a result's file: plain DATA-probe alone enters the table of a grid."""
    sensor = f"-{flags.sensors}" if flags.sensors in SENSORS else ""
    few = f"-u{flags.label_users}" if flags.label_users else ""
    return f"{flags.data}-{flags.mode}{sensor}{few}{'-window' if flags.split == 'window' else ''}"

def score_run(run, flags, prepared):
    """The result of a run, from its file if that was made of the same weights, data and flags."""
    trained, config = load_run(run)
    meta, rows = prepared.meta, np.flatnonzero(prepared.labels >= 0)
    require(len(rows), f"{flags.data} has no labels, only --data with labels can be used here")
    pretrained = config["flags"].get("sensors", "both")
    sensors = flags.sensors or pretrained
    numbers = sensor_numbers(run, pretrained, sensors, config["model"]["sensors"])
    require(prepared.windows.shape[2] >= config["model"]["patch"],
            f"{flags.data} has windows that are shorter than a patch of {run}: take another run")
    users = prepared.users[rows]
    names = np.array(meta["users"])[users]
    if flags.split == "window":                        # as if anyone had recorded each window
        users = random_stream("windows").permutation(users)
    folds = folds_of(run, config["trained_on"], flags, meta, users)
    weights = b"".join(w.numpy().tobytes() for w in trained.state_dict().values())
    made_of = {name: getattr(flags, name) for name in FLAGS if name != "device"}
    made_of |= {"sensors": sensors, "fingerprint": meta["fingerprint"],
                "weights": hashlib.sha256(weights).hexdigest()}
    path = run / "finetune" / f"{result_name(flags)}.json"
    result = read_json(path) if path.exists() else {}
    if made_of.items() <= result.items():
        return result
    x = torch.from_numpy(windows_at(prepared, rows, sensors)[:, :3 * len(numbers)])    # (n, C, T)
    y, classes = torch.from_numpy(prepared.labels[rows]).long(), meta["classes"]
    model = random_model(config, flags.mode) if flags.mode in ("scratch", "random") else trained
    encoder = Encoder(model.to(choose_device(flags.device)), numbers[:x.shape[1] // 3])
    scored = score_folds(encoder, x, y, len(classes), users, names, folds, flags)
    result = {**summarise(scored), **made_of, "classes": classes, "provenance": provenance()}
    draw_confusion(path.with_suffix(".png"), result)
    write_json(path, result)
    return result

def main():
    parser = build_parser(FLAGS, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of pretrain.py")
    flags = parser.parse_args()
    prepared = load(flags.data)
    for run in flags.runs:
        result = score_run(run, flags, prepared)
        print(f"{run} {result_name(flags)}: accuracy {result['accuracy']:.4f}, macro-F1 "
              f"{result['macro_f1']:.4f} +- {result['macro_f1_sd']:.4f} ({len(result['folds'])} "
              f"folds, {len(result['test_users'])} users tested)", flush=True)

if __name__ == "__main__":
    command(main)
