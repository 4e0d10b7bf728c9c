"""
Downstream: what a pre-trained encoder knows about activities of people it has never seen.

    windows x (n, C, T)         scaled as in pre-training; a tail shorter than a patch is cut
      encode  -> (n, S, G, 2D)  of each patch of each sensor, none masked
      pool    -> (n, F)         mean and deviation over time, by sensor: F = 4 x S x D
      predict -> (n,)           by a probe, or by a network of encoder and head
      score   -> RUN/finetune/DATA-MODE.json and .png

Modes: `probe` leaves the encoder as it is and fits a logistic regression on its features; `tune`
then trains both together; `scratch` does so from random weights (what the labels alone can do);
`random` is the probe of random weights (what the architecture alone can do).

Every split is by user. In each fold a fifth of the training users are validation users: they choose
the penalty of a probe (which is then fitted to all training users) and which epoch of a network is
kept. Test users are evaluated once, after everything is chosen.

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

from data import (SENSOR_CHOICES, SENSORS, UserError, build_parser, command, held_out_users,
                  known, load, number, provenance, random_rotation, random_stream, read_json,
                  replacing, require, windows_at, write_json)
from model import MAE
from pretrain import choose_device, load_checkpoint, read_config

PENALTIES = [3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4]            # L2, strongest first
LEARNING_RATE = {"tune": 3e-4, "scratch": 1e-3}             # of the modes that train a network
Probe = namedtuple("Probe", "weights mean sd l2")      # weights (F + 1, K), mean and sd (F,)

# ---------------------------------------------------------------- who trains and who is tested
def split_rows(rows, groups, chosen):
    """Rows outside and inside the `chosen` groups; groups (n,): one a window."""
    inside = np.isin(groups[rows], chosen)
    return rows[~inside], rows[inside]

def five_folds(rows, groups, name):
    """[(train, test), ...]: the rows split 5 times; each group is in one test."""
    order = random_stream(name).permutation(np.unique(groups[rows]))
    return [split_rows(rows, groups, order[k::5]) for k in range(min(5, len(order)))]

def user_folds(meta, users, trained_on):
    """Windows for training and for testing, [(train, test), ...]. Nobody is on both sides, tested
    twice, or tested if the encoder was `trained_on` them. Who is tested: the official test users of
    the set; else, if the encoder saw people of this set, the held-out ones that it didn't see (if
    none, all that it didn't see); else everyone, in 5 folds."""
    rows, seen = np.arange(len(users)), known(meta, trained_on)
    official = [u for u, name in enumerate(meta["users"]) if name in (meta["test_users"] or [])]
    unseen = set(range(len(meta["users"]))) - set(seen)
    held_out = unseen & set(sum(held_out_users(meta), []))
    if official or seen:
        return [split_rows(rows, users, official or sorted(held_out or unseen))]
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

    probes, f1, weights = [], [], x.new_zeros(x.shape[1] + 1, classes)
    for l2 in PENALTIES:
        probes.append(fit_rows(fit, l2, weights, tolerance=3e-4))
        weights = probes[-1].weights                   # where the next one starts
        predicted = predict(probes[-1], x[validation])
        f1.append(scores(confusion(y[validation], predicted, classes))["macro_f1"])
    best = probes[np.argmax(f1)]
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
    """Train encoder and head until the macro-F1 on `validation` hasn't risen for --patience epochs.
    Returns the best network, windows (B, C, T) -> logits (B, K), and its epoch.

    Features are standardised by BatchNorm without weights (He et al. 2021, A.1). The head starts
    from `probe`: a random one would first distort the features (Kumar et al. 2022, 2202.10054).
    A moving average of the weights is evaluated and kept, in place of a falling learning rate."""
    norm, head = nn.BatchNorm1d(len(probe.mean), affine=False), nn.Linear(len(probe.mean), classes)
    norm.running_mean, norm.running_var = probe.mean, probe.sd.square()
    head.weight.data, head.bias.data = probe.weights[:-1].T.contiguous(), probe.weights[-1]
    net = nn.Sequential(copy.deepcopy(encoder), norm, head).to(encoder.model.norm.weight.device)
    optimizer = torch.optim.RAdam(net.parameters(), LEARNING_RATE[flags.mode], weight_decay=0.05,
                                  decoupled_weight_decay=True)                 # warms up by itself
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    shift = min(net[0].model.patch, x.shape[2] - net[0].model.patch + 1)
    average, epoch, best_epoch, best_f1 = copy.deepcopy(net), 0, 0, -1
    while epoch - best_epoch < flags.patience:
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
        f1 = scores(confusion(y[validation], predicted, classes))["macro_f1"]
        print(f"epoch {epoch}: macro-F1 {f1:.4f} of the validation users", flush=True)
        if f1 > best_f1:
            best, best_f1, best_epoch = copy.deepcopy(average), f1, epoch
    return best, best_epoch

def score_fold(encoder, encoded, x, y, classes, groups, train, test, flags):
    """Train on the rows `train`, score on the rows `test`."""
    fit, validation = split_validation(train, groups)
    network = flags.mode in LEARNING_RATE
    final, epoch = fit if network else train, None     # validation must be new to a network
    probe = fit_probe(encoded, y, classes, fit, validation, final)
    predicted = predict(probe, encoded[test])
    if network:
        net, epoch = train_network(encoder, probe, x, y, classes, fit, validation, flags)
        predicted = in_batches(net, x[test]).argmax(1)
    counts = confusion(y[test], predicted, classes)
    return {**scores(counts), "l2": probe.l2, "epoch": epoch, "n_train": len(train),
            "n_test": len(test)}

def summarise(folds):
    """A result: means and deviations over folds; F1 of each class and confusion over all folds."""
    together = sum(torch.tensor(fold["confusion"]) for fold in folds)
    result = {**scores(together), "folds": folds, "l2": [fold["l2"] for fold in folds],
              "n_train": round(np.mean([fold["n_train"] for fold in folds])),
              "n_test": sum(fold["n_test"] for fold in folds)}
    for key in ("accuracy", "macro_f1"):
        values = [fold[key] for fold in folds]
        result[key] = float(np.mean(values))
        result[key + "_sd"] = float(np.std(values, ddof=1)) if len(folds) > 1 else 0.0
    return result

def draw_confusion(path, result):
    """Of the windows of each true class, a row, the percentage of each prediction."""
    from matplotlib.figure import Figure
    counts = np.array(result["confusion"])
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [name.replace("$", r"\$") for name in result["classes"]]    # else: a formula
    figure = Figure((3.4 + 0.42 * len(names), 2.4 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for row, column in zip(*np.nonzero(percent >= 0.5)):
        axes.text(column, row, f"{percent[row, column]:.0f}", ha="center", va="center", fontsize=8,
                  color="white" if percent[row, column] > 50 else "black")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true", title=path.stem)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)

# ---------------------------------------------------------------- a run, the command
def load_run(run):
    """A pre-trained model with the weights of its best step, and its config. Raises UserError."""
    config, saved = read_config(run), load_checkpoint(run)
    finished = "step" not in saved                     # an exported encoder
    if (run / "result.json").exists():
        finished = finished or read_json(run / "result.json")["steps"] == saved["step"]
    require("best" in saved and finished, f"{run} isn't finished: let pretrain.py end first")
    try:
        model = MAE(**config["model"])
        model.load_state_dict(saved["best"])
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{run} has no weights that fit its config.json and this model.py "
                        f"({error!r:.99})") from None
    return model.eval(), config

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

def sensor_numbers(run, pretrained, wanted):
    """Which sensors of a model that was pre-trained on `pretrained` read those `wanted`."""
    require(pretrained in ("both", wanted), f"{run} was pre-trained with --sensors {pretrained}: "
            "leave --sensors away, or give the same")
    if pretrained != "both":
        return [0]
    return [number for number, name in enumerate(SENSORS) if wanted in ("both", name)]

FLAGS = {                # name: (default, range or choices, what it does)
    "data": ("simulated", str, "a prepared set with labels"),
    "mode": ("probe", ["probe", "tune", "scratch", "random"], "see above"),
    "sensors": (None, SENSOR_CHOICES, "use that sensor only; without it, those of the run"),
    "label_users": (None, number(int, 1), "train on so many users; without it, on all"),
    "split": ("user", ["user", "window"], "window: split windows at random, to show what a leak of "
              "people adds"),
    "patience": (8, number(int, 1), "tune, scratch: end after so many epochs without a better "
                 "validation macro-F1"),
    "device": ("auto", str, "cpu, cuda or mps; auto takes a GPU if there is one"),
}

def few_users(folds, users, count):
    """Folds with only `count` of their training users (a larger count has all of a smaller one's);
    a single fold is drawn 5 times."""
    few = []
    for k, (train, test) in enumerate(folds * (5 if len(folds) == 1 else 1)):
        order = random_stream("label users", k).permutation(np.unique(users[train]))
        few.append((split_rows(train, users, order[:count])[1], test))
    return few

def folds_of(run, trained_on, flags, meta, users):
    """The folds that the flags ask for, and groups (n,), each wholly in validation or not."""
    folds, groups, seen = user_folds(meta, users, trained_on), users, known(meta, trained_on)
    fair = [len(train) and len(test) and not np.isin(users[test], seen).any()
            for train, test in folds]
    require(folds and all(fair), f"{flags.data} has too few users to test: {run} was pre-trained "
            f"on {len(seen)} of {len(meta['users'])}; take another set or run")
    if flags.label_users:
        least = min(len(np.unique(users[train])) for train, _ in folds)
        require(flags.label_users <= least, f"--label-users {flags.label_users} is more than the "
                f"{least} training users of a fold: take fewer")
        folds = few_users(folds, users, flags.label_users)
    if flags.split == "window":                        # same sizes, but people on both sides
        order = random_stream("windows").permutation(np.concatenate(folds[0]))
        tests = np.split(order, np.cumsum([len(test) for _, test in folds]))[:len(folds)]
        folds, groups = [(np.setdiff1d(order, test), test) for test in tests], np.arange(len(users))
    return folds, groups

def result_name(flags):
    """Only plain DATA-probe enters the table of a grid."""
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
    numbers = sensor_numbers(run, pretrained, sensors)
    users, y = prepared.users[rows], torch.from_numpy(prepared.labels[rows].astype(np.int64))
    folds, groups = folds_of(run, config["trained_on"], flags, meta, users)
    weights = b"".join(w.numpy().tobytes() for w in trained.state_dict().values())
    made_of = {"data": flags.data, "mode": flags.mode, "fingerprint": meta["fingerprint"],
               "weights": hashlib.sha256(weights).hexdigest(), "sensors": sensors,
               "patience": flags.patience if flags.mode in LEARNING_RATE else None}
    path = run / "finetune" / f"{result_name(flags)}.json"
    result = read_json(path) if path.exists() else {}
    if made_of.items() <= result.items():
        return result
    x = torch.from_numpy(windows_at(prepared, rows, sensors))                  # (n, C, T)
    model = trained if flags.mode in ("probe", "tune") else random_model(config, flags.mode)
    encoder = Encoder(model.to(choose_device(flags.device)), numbers)
    encoded, classes = in_batches(encoder, x), len(meta["classes"])            # (n, F)
    scored = []
    for train, test in folds:
        fold = score_fold(encoder, encoded, x, y, classes, groups, train, test, flags)
        for part, chosen in (("train_users", train), ("test_users", test)):
            fold[part] = [meta["users"][user] for user in np.unique(users[chosen])]
        scored.append(fold)
    tested = sorted({user for fold in scored for user in fold["test_users"]})
    result = {**summarise(scored), **made_of, "test_users": tested, "classes": meta["classes"],
              "provenance": provenance()}
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
