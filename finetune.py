"""
Downstream: what a pre-trained encoder knows about activities of people it has never seen.

    windows x (n, C, T)         scaled as in pre-training; a tail shorter than a patch is cut
      encode  -> (n, S, G, 2D)  of each patch of each sensor, none masked: the last two blocks
      pool    -> (n, F)         mean and deviation over time, by sensor: F = 4 x S x D
      predict -> (n,)           by a probe, or by a network of encoder and head
      score   -> RUN/finetune/DATA-MODE.json and .png

Modes: `probe` leaves the encoder as it is and fits a logistic regression on its features; `tune`
then trains both together; `scratch` does so from random weights (what the labels alone can do);
`random` is the probe of random weights (what the architecture alone can do).

Every split is by user. In each fold a fifth of the training users are validation users: they choose
the penalty of a probe (which is then fitted to all training users) and the epoch of a network that
is kept. Test users are evaluated once, after everything is chosen.

    python finetune.py runs/first --data ucihar --mode tune
    python finetune.py runs/first --data wisdm_watch --label-users 1,2,4,8   # few labelled users
    python finetune.py runs/first --export runs/encoder                      # the weights to share
"""
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")    # before torch: idle threads sleep
import argparse, copy, hashlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from matplotlib.figure import Figure
from scipy.optimize import minimize

from data import (UserError, command, held_out_users, load, number, people, provenance,
                  random_rotation, random_stream, read_json, replacing, require, windows_at,
                  write_json)
from model import MAE
from pretrain import choose_device, load_checkpoint, read_config

PENALTIES = [3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4]            # L2, strongest first
LEARNING_RATE = {"tune": 3e-4, "scratch": 1e-3}
COLOURS = {"probe": "#0072B2", "tune": "#009E73", "scratch": "#D55E00", "random": "#777777"}
Probe = namedtuple("Probe", "weights mean sd l2")      # weights (F + 1, K), mean and sd (F,)

# ---------------------------------------------------------------- who trains and who is tested
def split_rows(rows, groups, chosen):
    """Rows -> (rows of the other groups, rows of the `chosen` groups); groups (n,): of all rows."""
    inside = np.isin(groups[rows], chosen)
    return rows[~inside], rows[inside]

def five_folds(rows, users, tested, name):
    """[(train, test), ...]: the rows split 5 times; each of the users `tested` is in one test."""
    order = random_stream(name).permutation(np.intersect1d(users[rows], tested))
    return [split_rows(rows, users, order[k::5]) for k in range(min(5, len(order)))]

def user_folds(meta, users, trained_on, validation=False):
    """Windows for training and for testing: [(train, test), ...], indices into users (n,). No user
    is on both sides of a fold, or tested twice, or tested if the encoder was `trained_on` them.

    Tested are the official test users of a set that has them; the set's held-out users if the
    encoder was trained on others of it; else all users, in 5 folds. With `validation` they
    aren't touched: the training users are split in 5 folds. UserError if nobody is left."""
    everyone, rows = np.arange(len(meta["users"])), np.arange(len(users))
    seen = [u for u, person in enumerate(people(meta)) if list(person) in trained_on]
    official = [u for u in everyone if meta["users"][u] in (meta["test_users"] or [])]
    held_out = np.setdiff1d(sum(held_out_users(meta), []), seen)
    folds = five_folds(rows, users, everyone, "folds")
    if official or seen:
        folds = [split_rows(rows, users, official or held_out)]
    if validation:
        unseen = np.setdiff1d(everyone, seen)
        folds = five_folds(folds[0][0], users, unseen, "validation folds")
    require(not set(official) & set(seen) and folds and all(map(len, sum(folds, ()))),
            f"{meta['name']} has too few users to test: this run was pre-trained on "
            f"{len(seen)} of {len(everyone)}; take another set or run")
    return folds

def few_users(folds, users, count):
    """Folds with only `count` of their training users, who are among those of a larger count; a
    single fold is drawn 5 times."""
    few = []
    for k, (train, test) in enumerate(folds * (5 if len(folds) == 1 else 1)):
        order = random_stream("label users", k).permutation(np.unique(users[train]))
        require(count <= len(order), f"--label-users {count} is more than the {len(order)} "
                "training users of a fold: take fewer")
        few.append((split_rows(train, users, order[:count])[1], test))
    return few

def split_validation(train, groups):
    """Training rows -> (fit, validation): validation is a fifth of the groups, one at least."""
    if len(np.unique(groups[train])) == 1:             # a single user: a fifth of the windows
        groups = np.arange(len(groups))
    return five_folds(train, groups, groups, "validation users")[0]

# ---------------------------------------------------------------- features
def load_run(run):
    """A pre-trained model with the weights of its best step, and its config. Raises UserError."""
    config = read_config(run)
    try:
        model = MAE(**config["model"])
        model.load_state_dict(load_checkpoint(Path(run))["best"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{run} has no weights that fit its config.json and this model.py: let "
                        f"pretrain.py finish it ({error!r:.99})") from None
    return model.eval(), config

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

    by L-BFGS from `start`, until no entry of the gradient is above `tolerance`. Features are
    correlated, so the search goes along their principal axes, in units of the curvature of the
    loss there (about 0.3 variance + l2): the same minimum in half the steps."""
    variance, axes = torch.linalg.eigh(x.mT @ x / len(x))
    axes = axes * (0.3 * variance.clamp(min=0) + l2).rsqrt()                   # (F, F)
    z = (x @ axes).mT.contiguous()                                             # (F, n)
    truth = nn.functional.one_hot(y, start.shape[1]).mT.to(x).contiguous()     # (K, n)

    def loss(flat):
        v = torch.from_numpy(flat).to(x).view(len(truth), -1)                  # (K, F + 1)
        log_p, w = (v[:, :-1] @ z + v[:, -1:]).log_softmax(0), v[:, :-1] @ axes.mT
        error = (log_p.exp() - truth) / len(y)                                 # by the logits
        value = -(log_p * truth).sum() / len(y) + l2 / 2 * w.square().sum()
        slopes = torch.cat([error @ z.mT + l2 * w @ axes, error.sum(1, keepdim=True)], dim=1)
        return value.item(), slopes.double().numpy().ravel()

    v = torch.cat([torch.linalg.solve(axes, start[:-1]), start[-1:]]).mT
    options = {"maxiter": 5000, "maxcor": 20, "gtol": tolerance, "ftol": 0}
    best = minimize(loss, v.double().ravel(), method="L-BFGS-B", jac=True, options=options).x
    v = torch.from_numpy(best).to(x).view(len(truth), -1).mT
    return torch.cat([axes @ v[:-1], v[-1:]])

def fit_probe(x, y, classes, fit, validation, final):
    """Features x (n, F), y (n,) and three sets of rows -> Probe. Each penalty is tried on the rows
    `fit`; the one with the best macro-F1 on `validation` is used to fit the rows `final`."""
    def fit_rows(rows, l2, start, tolerance):
        mean, sd = x[rows].mean(0), x[rows].std(0, correction=0).clamp(min=1e-6)
        z = (x[rows] - mean) / sd
        return Probe(logistic_regression(z, y[rows], l2, start, tolerance), mean, sd, l2)

    probes, val_f1, weights = [], [], x.new_zeros(x.shape[1] + 1, classes)
    for l2 in PENALTIES:
        probes.append(fit_rows(fit, l2, weights, tolerance=3e-4))
        weights = probes[-1].weights
        predicted = predict(probes[-1], x[validation])
        val_f1.append(scores(confusion(y[validation], predicted, classes))["macro_f1"])
    best = probes[np.argmax(val_f1)]
    return fit_rows(final, best.l2, best.weights, tolerance=5e-5)

def predict(probe, x):
    """Features x (n, F) -> predicted classes (n,)."""
    return ((x - probe.mean) / probe.sd @ probe.weights[:-1] + probe.weights[-1]).argmax(1)

# ---------------------------------------------------------------- encoder and head together
def train_network(encoder, probe, x, y, classes, fit, validation, a):
    """Train encoder and head until the macro-F1 on `validation` hasn't risen for --patience epochs.
    Returns the best network, windows (B, C, T) -> logits (B, K), and its epoch.

    Features are standardised by BatchNorm without weights (He et al. 2021, A.1). The head starts
    from `probe`: a random one would first distort the features (Kumar et al. 2022, 2202.10054).
    A moving average of the weights is evaluated and kept, in place of a falling learning rate."""
    norm, head = nn.BatchNorm1d(len(probe.mean), affine=False), nn.Linear(len(probe.mean), classes)
    norm.running_mean, norm.running_var = probe.mean, probe.sd.square()
    head.weight.data, head.bias.data = probe.weights[:-1].T.contiguous(), probe.weights[-1]
    net = nn.Sequential(copy.deepcopy(encoder), norm, head).to(encoder.model.norm.weight.device)
    optimizer = torch.optim.RAdam(net.parameters(), LEARNING_RATE[a.mode], weight_decay=0.05,
                                  decoupled_weight_decay=True)                 # warms up by itself
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    shift = min(net[0].model.patch, x.shape[2] - net[0].model.patch + 1)
    average, epoch, best_epoch, best_f1 = copy.deepcopy(net), 0, 0, -1
    while epoch - best_epoch < a.patience:
        epoch += 1
        rng = random_stream("training epoch", epoch)
        net.train()
        for rows in np.array_split(rng.permutation(fit), max(1, len(fit) // 64)):
            batch = torch.from_numpy(random_rotation(x[rows].numpy(), 0.2, rng))
            logits = net(batch[..., rng.integers(shift):])     # patches start at any sample
            loss(logits, y[rows].to(logits.device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            for old, new in zip(average.state_dict().values(), net.state_dict().values()):
                old.copy_(old + 0.01 * (new - old))
        predicted = in_batches(average.eval(), x[validation]).argmax(1)
        val_f1 = scores(confusion(y[validation], predicted, classes))["macro_f1"]
        print(f"epoch {epoch}: macro-F1 {val_f1:.4f} of the validation users", flush=True)
        if val_f1 > best_f1:
            best, best_f1, best_epoch = copy.deepcopy(average), val_f1, epoch
    return best, best_epoch

# ---------------------------------------------------------------- scores
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

def summarise(folds):
    """A result: means and deviations over folds; F1 of each class and confusion over all folds."""
    result = {**scores(sum(torch.tensor(fold["confusion"]) for fold in folds)), "folds": folds,
              "test_users": sorted({user for fold in folds for user in fold["test_users"]}),
              "n_train": round(np.mean([fold["n_train"] for fold in folds])),
              "n_test": sum(fold["n_test"] for fold in folds), "l2": [fold["l2"] for fold in folds]}
    for key in ("accuracy", "macro_f1"):
        values = [fold[key] for fold in folds]
        result[key] = float(np.mean(values))
        result[key + "_sd"] = float(np.std(values, ddof=1)) if len(folds) > 1 else 0.0
    return result

def print_result(name, results):
    """Print the scores, and the gain over other modes on the same folds with its standard error."""
    result, folds = results[name], len(results[name]["folds"])
    print(f"{name}: accuracy {result['accuracy']:.4f}, macro-F1 {result['macro_f1']:.4f} +- "
          f"{result['macro_f1_sd']:.4f} ({folds} folds, {len(result['test_users'])} users tested)")
    for other in results.values():
        if folds > 1 and other["input"] == result["input"] and other["mode"] != result["mode"]:
            pairs = zip(result["folds"], other["folds"])
            gain = [fold["macro_f1"] - paired["macro_f1"] for fold, paired in pairs]
            print(f"  {np.mean(gain):+.4f} over {other['mode']}, paired by fold, standard error "
                  f"{np.std(gain, ddof=1) / folds ** 0.5:.4f}")

# ---------------------------------------------------------------- figures
def draw_confusion(path, result):
    counts, names = np.array(result["confusion"]), result["classes"]
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    fig = Figure((3.4 + 0.42 * len(names), 2.4 + 0.42 * len(names)), layout="constrained")
    axes = fig.subplots()
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for i, j in zip(*np.nonzero(percent >= 0.5)):
        axes.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", fontsize=8,
                  color="white" if percent[i, j] > 50 else "black")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true (numbers: % of its windows)", title=path.stem)
    with replacing(path) as temporary:
        fig.savefig(temporary, dpi=150)

def draw_label_curves(path, results):
    """Macro-F1 against labelled users: a panel for each data set, a line for each mode."""
    names = sorted({result["data"] for result in results if result["input"][3]})
    fig = Figure((1 + 4 * len(names), 4), layout="constrained")
    for axes, name in zip(fig.subplots(1, len(names), squeeze=False)[0], names):
        for mode, colour in COLOURS.items():
            points = sorted((len(r["folds"][0]["train_users"]), r["macro_f1"], r["macro_f1_sd"])
                            for r in results if (r["data"], r["mode"]) == (name, mode))
            if points:
                axes.errorbar(*zip(*points), color=colour, marker="o", capsize=3, label=mode)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="labelled users", ylabel="macro-F1 (bars: deviation)", title=name)
        axes.legend()
    with replacing(path) as temporary:
        fig.savefig(temporary, dpi=150)

# ---------------------------------------------------------------- the command
def parse_flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = p.add_argument
    flag("run", help="folder of a run of pretrain.py; the weights of its best step are used")
    flag("--data", default="simulated", help="a prepared set with labels (default: simulated)")
    flag("--mode", choices=COLOURS, default="probe", help="see above (default: probe)")
    flag("--sensors", choices=["both", "acc", "gyro"], default="both", help="acc, gyro: use that "
         "sensor only (default: both)")
    flag("--label-users", type=lambda text: [number(int, 1)(part) for part in text.split(",")],
         metavar="K", help="train on K users; 1,2,4: each in turn, with a figure (default: all)")
    flag("--split", choices=["user", "validation", "window"], default="user",
         help="validation: test training users, to choose between runs; window: split windows at\n"
         "random as well, to show how much that leak adds (default: user)")
    flag("--patience", type=number(int, 1), default=8, help="tune, scratch: end after so many "
         "epochs without a better validation macro-F1 (default: 8)")
    flag("--device", default="auto", help="cpu, cuda, mps; auto takes a GPU if any (default: auto)")
    flag("--export", metavar="DIR", help="only write the encoder, as a small run folder")
    return p.parse_args()

def export(model, config, folder):
    """Write a run folder with the encoder alone: without decoder blocks, which no probe needs."""
    require(not (folder / "checkpoint.pt").exists(),
            f"{folder} holds a run or an encoder, which --export would replace: choose another")
    weights = {key: w for key, w in model.state_dict().items() if not key.startswith("decoder.")}
    with replacing(folder / "checkpoint.pt") as temporary, open(temporary, "wb") as file:
        torch.save({"best": weights}, file)
    write_json(folder / "config.json", {**config, "model": {**config["model"], "decoder_depth": 0},
                                        "provenance": provenance()})

def main():
    a = parse_flags()
    trained, config = load_run(a.run)
    if a.export:
        return export(trained, config, Path(a.export))
    prepared, pretrained = load(a.data), config["flags"].get("sensors", "both")
    meta, rows = prepared.meta, np.flatnonzero(prepared.labels >= 0)
    require(len(rows), f"{a.data} has no labels, only --data with labels can be used here")
    require(pretrained in ("both", a.sensors),
            f"{a.run} was pre-trained with --sensors {pretrained}: give that here, too")
    x = torch.from_numpy(windows_at(prepared, rows, a.sensors))                # (n, C, T)
    require(x.shape[2] >= trained.patch, f"a window of {a.data} is shorter than a patch of {a.run}")
    y = torch.from_numpy(prepared.labels[rows].astype(np.int64))
    users, names, classes = prepared.users[rows], np.array(meta["users"]), len(meta["classes"])
    folds = user_folds(meta, users, config["trained_on"], a.split == "validation")
    jobs = [("-validation" if a.split == "validation" else "", folds)]         # suffix, folds
    if a.split == "window":                            # same sizes, but people on both sides
        order = random_stream("windows").permutation(np.concatenate(folds[0]))
        tests = np.split(order, np.cumsum([len(test) for _, test in folds]))[:len(folds)]
        jobs.append(("-window", [(np.setdiff1d(order, test), test) for test in tests]))
    if a.label_users:
        jobs = [(f"-u{count}{suffix}", few_users(folds, users, count))
                for suffix, folds in jobs for count in a.label_users]
    weights = b"".join(w.numpy().tobytes() for w in trained.state_dict().values())
    sensors = {"both": [0, 1], "acc": [0], "gyro": [1]}[a.sensors] if pretrained == "both" else [0]
    torch.manual_seed(0)
    model = trained if a.mode in ("probe", "tune") else MAE(**config["model"]).eval()
    for block in model.blocks if a.mode == "random" else ():   # blocks start as the identity, which
        block.attention.out.reset_parameters()                 # mixes nothing: random ones are the
        block.down.reset_parameters()                          # stronger baseline
    encoder, encoded = Encoder(model.to(choose_device(a.device)), sensors), None
    folder, which = Path(a.run) / "finetune", "" if a.sensors == "both" else f"-{a.sensors}"
    for suffix, folds in jobs:
        name = f"{a.data}-{a.mode}{which}{suffix}"
        spec = {"data": a.data, "mode": a.mode, "patience": a.mode in LEARNING_RATE and a.patience,
                "input": [hashlib.sha256(weights).hexdigest(), a.sensors, meta["fingerprint"],
                          suffix]}
        results = {path.stem: read_json(path) for path in folder.glob("[!.]*.json")}
        if not spec.items() <= results.get(name, {}).items():                 # else it is done
            encoded = in_batches(encoder, x) if encoded is None else encoded   # (n, F)
            groups = np.arange(len(y)) if suffix.endswith("-window") else users
            scored = []
            for train, test in folds:
                fit, validation = split_validation(train, groups)
                final = fit if a.mode in LEARNING_RATE else train
                probe, epoch = fit_probe(encoded, y, classes, fit, validation, final), None
                predicted = predict(probe, encoded[test])
                if a.mode in LEARNING_RATE:
                    net, epoch = train_network(encoder, probe, x, y, classes, fit, validation, a)
                    predicted = in_batches(net, x[test]).argmax(1)
                scored.append({**scores(confusion(y[test], predicted, classes)), "l2": probe.l2,
                               "epoch": epoch, "n_train": len(train), "n_test": len(test),
                               "train_users": names[np.unique(users[train])].tolist(),
                               "test_users": names[np.unique(users[test])].tolist()})
            results[name] = {**summarise(scored), "classes": meta["classes"], **spec}
            results[name]["provenance"] = provenance()
            write_json(folder / f"{name}.json", results[name])
            draw_confusion(folder / f"{name}.png", results[name])
        print_result(name, results)
    if a.label_users:
        curves = [r for r in results.values() if r["input"][:2] == spec["input"][:2] and
                  r["input"][3] in ("", f"-u{len(r['folds'][0]['train_users'])}")]
        draw_label_curves(folder / f"label-users{which}.png", curves)

if __name__ == "__main__":
    command(main)
