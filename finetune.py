"""
Downstream: what a pre-trained encoder knows about activities, asked of people it has never seen.

    windows (n, C, T)               standardised as in pre-training; a tail shorter than a patch is cut
      encode    ->  (n, S, G, D)    a latent for each patch of each sensor, nothing masked
      pool      ->  (n, F)          average and deviation over time, sensor by sensor: F = 2 x S x D
      classify  ->  (n, K)          multinomial logistic regression, or a head trained together with the encoder
      score     ->  RUN/finetune/DATA-MODE.json and .png

    probe     the encoder stays as it is: logistic regression on its features
    tune      encoder and head are trained together, from the checkpoint and the probe's solution
    scratch   the same from random weights: what the labels alone can do
    random    the probe of an untrained encoder: what the architecture alone can do

Always split by user. In each fold a fifth of the training users are set aside: they choose the penalty (probe, random)
or the epoch to keep (tune, scratch). The probe is then fitted on all training users, with those; a network is not. The
test users are looked at once, when all that is decided.

    python finetune.py runs/first --data simulated
    python finetune.py runs/first --data ucihar --mode tune
    python finetune.py runs/first --data wisdm_watch --label-users 1,2,4,8,16    # what pre-training saves in labels
    python finetune.py runs/first --data wisdm_watch --split validation          # to choose between runs: no test user
    python finetune.py runs/first --data wisdm_watch --split window              # how good a leak looks
"""
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")              # before torch: idle threads sleep
import argparse, copy, itertools, json, sys, time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import SAME_PEOPLE, Refused, command, held_out_users, load, provenance, replacing, write_json
from model import MAE, patchify
from pretrain import (choose_device, choose_precision, digest, keep_memory, load_run, select_sensors, standardise,
                      turn_sensors)

PENALTIES = [3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5]     # L2, strongest first
LOOKS = {"probe": ("#0072B2", "o"), "tune": ("#009E73", "s"), "scratch": ("#D55E00", "D"), "random": ("#777777", "^")}


# ---------------------------------------------------------------- who trains, who is tested
def labelled(prepared):
    """Rows of the windows that have a label. Raises Refused if none has, or if a label has no name."""
    name, labels, known = prepared.meta["name"], np.asarray(prepared.labels), len(prepared.meta["classes"])
    if not (labels >= 0).any():
        raise Refused(f"the data set '{name}' has no labels: it serves for pre-training only")
    if labels.max() >= known or labels.min() < -1:
        raise Refused(f"the data set '{name}' has labels from {labels.min()} to {labels.max()}, but {known} names of "
                      "classes: prepare it again")
    return np.flatnonzero(labels >= 0)


def user_folds(meta, users, labels, pretrained_on, seed):
    """Which windows train and which test: [(train, test), ...], indices into users (n,), labels (n,). No user is on
    both sides of a fold or tested in two.

    Official test users where the set has some; those held out of pre-training if the encoder has seen the others
    (`pretrained_on`: "data" of its config); else 5 folds over users. Raises Refused where one can't be had.
    """
    shared = set(meta["name"].split("+")) & set(pretrained_on["name"].split("+"))
    if meta["test_users"]:
        tests = [[u for u, name in enumerate(meta["users"]) if name in meta["test_users"]]]
    elif shared or pretrained_on["fingerprint"] == meta["fingerprint"]:
        tests = [sum(held_out_users(meta), [])]
    else:
        order = np.random.default_rng([seed, 30]).permutation(np.unique(users))
        tests = [order[k::5] for k in range(min(5, len(order)))]
    folds = [(np.flatnonzero(~np.isin(users, test)), np.flatnonzero(np.isin(users, test))) for test in tests]
    for train, test in folds:
        if not len(train) or not len(test):
            raise Refused(f"the labels of '{meta['name']}' are of {len(np.unique(users))} users, too few to train on "
                          "some and test on others: prepare more")
        missing = np.setdiff1d(labels[test], labels[train])
        if len(missing):
            raise Refused(f"'{meta['classes'][missing[0]]}' can't be learned in one of the folds of '{meta['name']}': "
                          "only users who are tested there have it; prepare more users")
    return folds


def window_folds(folds, seed):
    """As many folds of the same sizes, but of windows drawn at random: each test user is in training, too."""
    order = np.random.default_rng([seed, 33]).permutation(np.concatenate(folds[0]))
    ends = np.cumsum([0] + [len(test) for _, test in folds])
    parts = [slice(*ends[k:k + 2]) for k in range(len(folds))]
    return [(np.delete(order, part), order[part]) for part in parts]


def validation_folds(folds, users, seed):
    """Five folds over the training users of the first fold: to choose by, with its test users left alone."""
    train = folds[0][0]
    order = np.random.default_rng([seed, 34]).permutation(np.unique(users[train]))
    tests = [np.isin(users[train], order[k::5]) for k in range(min(5, len(order)))]
    return [(train[~test], train[test]) for test in tests if not test.all()]


def few_users(folds, users, count, seed):
    """The folds with `count` training users each, the first 2 among the first 4; a single fold is drawn 5 times."""
    few = []
    for k, (train, test) in enumerate(folds * (5 if len(folds) == 1 else 1)):
        order = np.random.default_rng([seed, 32, k]).permutation(np.unique(users[train]))
        if count > len(order):
            raise Refused(f"--label-users {count} is more than the {len(order)} training users of a fold")
        few.append((train[np.isin(users[train], order[:count])], test))
    return few


def set_aside(train, groups, seed):
    """Training rows -> (fit, validation): a fifth of the groups (n,), one at least; of one user every fifth window."""
    mine = np.random.default_rng([seed, 31]).permutation(np.unique(groups[train]))
    held = np.isin(groups[train], mine[:max(1, len(mine) // 5)])
    if len(mine) == 1:
        held = np.arange(len(train)) % 5 == 0
    return train[~held], train[held]


# ---------------------------------------------------------------- windows to features
def sensor_numbers(sensors, pretrained):
    """The numbers by which an encoder pre-trained on the sensors `pretrained` knows `sensors`. Raises Refused."""
    if pretrained not in ("both", sensors):
        raise Refused(f"this run was pre-trained with --sensors {pretrained} and knows nothing else: say the same here")
    return [0] if pretrained != "both" else {"both": [0, 1], "acc": [0], "gyro": [1]}[sensors]


def build(config, weights, mode, samples):
    """The encoder that `mode` starts from, for windows of `samples`: they may be longer than those it was trained on.
    Raises Refused for windows it can't read."""
    shape = config["model"]
    steps = samples // shape["patch"]
    if steps < 1 or shape["positions"] == "learned" and steps > shape["steps"]:
        raise Refused(f"this run reads windows of 1 to {shape['steps']} patches of {shape['patch']} samples, and these "
                      f"have {samples} samples: take a run with shorter patches and rotary positions")
    model = MAE(**{**shape, "steps": max(steps, shape["steps"])})
    if mode in ("probe", "tune"):
        model.load_state_dict(weights)
    if mode == "random":                                         # blocks that start as the identity (see model.py) mix
        for block in model.blocks:                               # nothing; drawn ones are the stronger baseline
            block.attention.out.reset_parameters(), block.down.reset_parameters()
    return model.eval()


def encode(model, x, sensors, half=False):
    """Windows x (B, C, T) of the sensors with these numbers -> latents (B, S, G, D): every patch visible, none masked.
    `half`: matrix products in bf16, of the encoder only."""
    tokens = patchify(x, model.patch)                                                            # (B, S, G, 3P)
    B, S, G, _ = tokens.shape
    index = (torch.tensor(sensors, device=x.device)[:, None] * G + torch.arange(G, device=x.device)).flatten()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        return model.encode(tokens.flatten(1, 2), index.expand(B, -1), G).view(B, S, G, -1).float()


def pool(latents, how):
    """(B, S, G, D) -> (B, F): each sensor's average over time; "mean+std": and how far its latents stray from it."""
    mean = latents.mean(2)
    spread = [] if how == "mean" else [((latents - mean[:, :, None]).square().mean(2) + 1e-5).sqrt()]
    return torch.cat([mean, *spread], dim=1).flatten(1)


@torch.no_grad()
def batched(net, windows_at, rows):
    """The net's answers to the windows `rows`, on the CPU."""
    return torch.cat([net(windows_at(some)).cpu() for some in np.array_split(rows, -(-len(rows) // 64))])


# ---------------------------------------------------------------- logistic regression
def regression_path(x, y, classes, penalties, tolerance=1e-5, start=None):
    """Multinomial logistic regression of y (n,) on x (n, F), penalty by penalty: yields weights (F + 1, K), bias last.

        minimise over W, b   mean of -log softmax(x W + b)[y]  +  l2 / 2 |W|^2

    by L-BFGS with the exact gradient, until its largest entry is below `tolerance`. Each solution starts the next, and
    `start` the first. Features are correlated, so the search goes along their principal axes, in units of the loss's
    curvature there, about .3 variance + l2: the same minimum in half the steps.
    """
    from scipy.optimize import minimize                          # here: what is done already needs no scipy
    rows = torch.arange(len(x))
    variance, axes = torch.linalg.eigh(x.mT.double() @ x.double() / len(x))
    weights = torch.zeros(x.shape[1] + 1, classes).double() if start is None else start
    for l2 in penalties:
        scale = (0.3 * variance.clamp(min=0) + l2).rsqrt()
        z, shrink = x @ (axes * scale).to(x.dtype), (l2 * scale.square())[:, None].to(x.dtype)

        def loss_and_gradient(flat):
            w = torch.from_numpy(flat).to(x.dtype).view(-1, classes)
            log_p = F.log_softmax(torch.addmm(w[-1], z, w[:-1]), dim=1)                          # (n, K)
            loss = 0.5 * (shrink * w[:-1].square()).sum() - log_p[rows, y].mean()
            error = log_p.exp()
            error[rows, y] -= 1                                                                  # softmax less one-hot
            gradient = torch.cat([z.mT @ error / len(x) + shrink * w[:-1], error.mean(0, keepdim=True)])
            return loss.item(), gradient.flatten().double().numpy()

        first = torch.cat([axes.mT @ weights[:-1] / scale[:, None], weights[-1:]])
        found = minimize(loss_and_gradient, first.flatten().numpy(), jac=True, method="L-BFGS-B",
                         options={"maxiter": 5000, "maxfun": 10000, "maxcor": 20, "gtol": tolerance, "ftol": 0})
        w = torch.from_numpy(found.x).view(-1, classes)
        weights = torch.cat([(axes * scale) @ w[:-1], w[-1:]])
        yield weights


def predict(x, weights):
    return (x @ weights[:-1].to(x.dtype) + weights[-1].to(x.dtype)).argmax(1)


def fit_probe(x, y, fit, validation, last, classes):
    """Standardise on the rows `fit`, choose the penalty by the macro-F1 of `validation`, fit all on the rows `last`.
    Returns weights (F + 1, K), the features' mean and deviation, the penalty."""
    moments = lambda rows: (x[rows].mean(0), x[rows].std(0, correction=0).clamp(min=1e-6))
    mean, sd = moments(fit)
    path = list(regression_path((x[fit] - mean) / sd, y[fit], classes, PENALTIES, tolerance=3e-4))
    f1 = [scores(confusion(y[validation], predict((x[validation] - mean) / sd, w), classes))["macro_f1"] for w in path]
    best = int(np.argmax(f1))
    mean, sd = moments(last)
    final = next(regression_path((x[last] - mean) / sd, y[last], classes, [PENALTIES[best]], start=path[best]))
    return final, mean, sd, PENALTIES[best]


# ---------------------------------------------------------------- encoder and head together
class Classifier(nn.Module):
    """Windows (B, C, T) -> (B, K). Features are standardised by BatchNorm without weights (He et al. 2021, A.1).

    `features` (model, x) -> (B, F); `probe`: weights, mean and deviation to start from, since a random head would first
    bend the features to itself (Kumar et al. 2022)."""

    def __init__(self, model, features, example, classes, probe=None):
        super().__init__()
        self.model, self.features = model, features
        width = features(model, example).shape[1]
        self.norm, self.head = nn.BatchNorm1d(width, affine=False), nn.Linear(width, classes)
        if probe:
            weights, mean, sd = probe
            self.norm.running_mean, self.norm.running_var = mean.clone(), sd.square()
            self.head.weight.data, self.head.bias.data = weights[:-1].T.float().contiguous(), weights[-1].float()
        self.to(example.device)

    def forward(self, x):
        return self.head(self.norm(self.features(self.model, x)))


def augment(x, patch, angle, generator):
    """Windows (B, C, T) as they might have been: worn a little askew (both sensors alike), cut at another sample."""
    x = turn_sensors(x, angle * torch.randn(len(x), 1, 3, generator=generator))
    return x[..., int(torch.randint(min(patch, x.shape[2] - patch + 1), (), generator=generator)):]


def learn(net, windows_at, y, fit, validation, a):
    """Train until the macro-F1 of `validation` hasn't risen for --patience epochs; returns the best net, its epoch.
    Judged and kept is a running average of the weights: it does what a falling learning rate does, without an end that
    is fixed beforehand."""
    generator, step, best = torch.Generator().manual_seed(a.seed), 0, (-1.0, 0, None)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    average = copy.deepcopy(net)
    for epoch in itertools.count(1):
        net.train()
        for batch in torch.randperm(len(fit), generator=generator)[:max(2, len(fit) // 64 * 64)].split(64):
            step += 1
            optimizer.param_groups[0]["lr"] = a.lr * min(1, step / 100)
            logits = net(augment(windows_at(fit[batch]), net.model.patch, a.rotate, generator))
            F.cross_entropy(logits, y[fit[batch]].to(logits.device), label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for old, new in zip(average.state_dict().values(), net.state_dict().values()):
                    old.copy_(old + (new - old) * max(0.01, 1 / step))
        answer = batched(average.eval(), windows_at, validation).argmax(1)
        f1 = scores(confusion(y[validation], answer, net.head.out_features))["macro_f1"]
        if f1 > best[0]:
            best = f1, epoch, copy.deepcopy(average)
        if epoch - best[1] >= a.patience:
            return best[2], best[1]


# ---------------------------------------------------------------- scores
def confusion(truth, answer, classes):
    """Counts (K, K): rows are the truth, columns the answer."""
    return torch.bincount(truth * classes + answer, minlength=classes ** 2).view(classes, classes)


def scores(counts):
    """Accuracy, each class's F1 (None if neither there nor answered), and their mean: as scikit-learn has them."""
    counts = counts.double()
    there = counts.sum(0) + counts.sum(1)
    f1 = 2 * counts.diag() / there
    return {"accuracy": (counts.trace() / counts.sum()).item(), "macro_f1": f1[there > 0].mean().item(),
            "per_class_f1": [value if n else None for value, n in zip(f1.tolist(), there.tolist())]}


def summarise(meta, users, y, done):
    """The content of the file: means over folds and their deviation; by class, of all tested windows together."""
    names = lambda rows: [meta["users"][u] for u in np.unique(users[rows])]
    tables = [confusion(y[fold["test"]], fold["answer"], len(meta["classes"])) for fold in done]
    folds = [{**scores(table), "l2": fold["l2"], "epoch": fold["epoch"], "train_users": names(fold["train"]),
              "test_users": names(fold["test"]), "n_train": len(fold["train"]), "n_test": len(fold["test"])}
             for table, fold in zip(tables, done)]
    column = lambda key: [fold[key] for fold in folds]
    deviation = lambda key: float(np.std(column(key), ddof=1)) if len(folds) > 1 else 0.0
    return {
        "accuracy": float(np.mean(column("accuracy"))), "accuracy_sd": deviation("accuracy"),
        "macro_f1": float(np.mean(column("macro_f1"))), "macro_f1_sd": deviation("macro_f1"),
        "per_class_f1": scores(sum(tables))["per_class_f1"], "classes": meta["classes"],
        "confusion": sum(tables).tolist(), "l2": column("l2"),
        "test_users": names(np.concatenate([fold["test"] for fold in done])),
        "n_train": round(np.mean(column("n_train"))), "n_test": sum(column("n_test")), "folds": folds}


# ---------------------------------------------------------------- figures
def figure(size):
    import matplotlib                                            # here: it takes half a second to import
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot.subplots(figsize=size, layout="constrained")


def draw_confusion(path, result):
    counts, K = np.array(result["confusion"]), len(result["classes"])
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    fig, axes = figure((3.4 + 0.42 * K, 2.4 + 0.42 * K))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in zip(*np.nonzero(share >= 0.005)):
        colour = "white" if share[i, j] > 0.5 else "black"
        axes.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    names = [name.lower().replace("_", " ") for name in result["classes"]]
    f1 = ["-" if value is None else f"{value:.2f}" for value in result["per_class_f1"]]
    axes.set_xticks(range(K), names, rotation=90)
    axes.set_yticks(range(K), [f"{name}   F1 {value}" for name, value in zip(names, f1)])
    axes.set(xlabel="answer", ylabel="truth (numbers: % of its windows)")
    axes.set_title(f"{path.stem}: macro-F1 {result['macro_f1']:.3f}", fontsize=10, loc="right")
    with replacing(path) as temporary:
        fig.savefig(temporary, dpi=150)


def draw_label_curve(path, results):
    """Macro-F1 against labelled users, a line a mode."""
    fig, axes = figure((6, 4))
    people = lambda result: float(np.mean([len(fold["train_users"]) for fold in result["folds"]]))
    for mode, (colour, marker) in LOOKS.items():
        points = sorted((people(r), r["macro_f1"], r["macro_f1_sd"]) for r in results if r["made_from"]["mode"] == mode)
        if points:
            x, y, sd = zip(*points)
            axes.errorbar(x, y, sd, color=colour, marker=marker, capsize=3, label=mode)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="labelled users", ylabel="macro-F1 on other users\n(bars: deviation over folds)",
             title=results[0]["data"])
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        fig.savefig(temporary, dpi=150)


# ---------------------------------------------------------------- a benchmark as one run sees it
@dataclass
class Task:
    meta: dict                                                   # of the prepared set
    users: np.ndarray                                            # (n,) of the labelled windows
    y: torch.Tensor                                              # (n,)
    folds: list                                                  # of (train, test), split by user
    windows_at: Callable                                         # indices (B,) -> standardised windows (B, C, T)
    model: MAE                                                   # what --mode starts from
    features: Callable                                           # model, windows (B, C, T) -> (B, F)
    made_from: dict                                              # what a result depends on


def open_task(a):
    """Run, data and flags -> Task. Raises Refused for whatever doesn't fit together."""
    trained, config = load_run(a.run)
    prepared = load(a.data)
    meta, rows, trained_on = prepared.meta, labelled(prepared), config["data"]
    users, y = prepared.users[rows], torch.from_numpy(prepared.labels[rows].astype(np.int64))
    sensors = sensor_numbers(a.sensors, config["training"]["sensors"])
    channels = select_sensors(meta["channels"], a.sensors)
    names = [meta["channels"][c] for c in channels]
    folds = user_folds(meta, users, y.numpy(), trained_on, a.seed)
    if any(a.data in people and people - {a.data} & set(trained_on["name"].split("+")) for people in SAME_PEOPLE):
        print(f"warning: {trained_on['name']} was recorded with the people of {a.data}: the encoder has seen some of "
              "those tested here, without labels", file=sys.stderr)
    torch.manual_seed(a.seed)
    device = choose_device(a.device)
    half = choose_precision(a.precision, device) == "bf16"
    model = build(config, trained.state_dict(), a.mode, prepared.windows.shape[2]).to(device)
    windows_at = lambda i: standardise(torch.from_numpy(prepared.windows[rows[i]][:, channels]).to(device), names)
    features = lambda model, x: pool(encode(model, x, sensors, half), a.pool)
    matters = ["mode", "sensors", "pool", "seed"] + ["lr", "patience", "rotate"] * (a.mode in ("tune", "scratch"))
    made_from = {"weights": digest(trained.state_dict()), "model": config["model"], "data": meta["fingerprint"],
                 **{key: getattr(a, key) for key in matters}}
    return Task(meta, users, y, folds, windows_at, model, features, made_from)


def do_fold(task, x, train, test, groups, a):
    """Learn from the rows `train`, answer the rows `test`, once. x: features (n, F), None for scratch."""
    fit, validation = set_aside(train, groups, a.seed)
    probe, l2, epoch, classes = None, None, None, len(task.meta["classes"])
    if a.mode != "scratch":                                      # tune starts from a probe without validation users
        *probe, l2 = fit_probe(x, task.y, fit, validation, fit if a.mode == "tune" else train, classes)
    if a.mode in ("probe", "random"):
        weights, mean, sd = probe
        answer = predict((x[test] - mean) / sd, weights)
    else:
        torch.manual_seed(a.seed)
        net = Classifier(copy.deepcopy(task.model), task.features, task.windows_at(test[:1]), classes, probe)
        net, epoch = learn(net, task.windows_at, task.y, fit, validation, a)
        answer = batched(net, task.windows_at, test).argmax(1)
    return {"train": train, "test": test, "answer": answer, "l2": l2, "epoch": epoch}


# ---------------------------------------------------------------- the command
def parse_flags():
    """All flags, checked; `label_users` as a list of counts, [None] for all users. Raises Refused."""
    p = argparse.ArgumentParser(description="Test a pre-trained encoder on activities of people it has never seen.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("run", help="folder of a run of pretrain.py; the weights of its best step are used")
    g = p.add_argument_group("what is learned")
    g.add_argument("--data", required=True, help="prepared set with labels: ucihar, wisdm_phone, wisdm_watch, ...")
    g.add_argument("--mode", choices=list(LOOKS), default="probe", help="probe: encoder frozen; tune: trained further; "
                   "scratch: trained from random weights; random: probe of an untrained encoder")
    g.add_argument("--sensors", choices=["both", "acc", "gyro"], default="both", help="one alone: the other is unseen")
    g.add_argument("--pool", choices=["mean", "mean+std"], default="mean+std", help="what is kept of latents over "
                   "time: the average alone has half the features, and scores a few points less")
    g = p.add_argument_group("who is tested")
    g.add_argument("--label-users", metavar="K", help="train on K labelled users only; 1,2,4: on so many, one after "
                   "the other. Draws the curve of all such results. default: all training users")
    g.add_argument("--split", choices=["user", "validation", "window"], default="user", help="validation: training "
                   "users only, some tested on the others: to choose runs or flags by. window: windows drawn at "
                   "random, test users in training: no result, but what that leak is worth beside the honest score")
    g.add_argument("--seed", type=int, default=0, help="draws folds, users set aside, labelled users, first weights")
    g = p.add_argument_group("tune and scratch")
    g.add_argument("--lr", type=float, help="learning rate. default: 0.0003 for tune, 0.001 for scratch")
    g.add_argument("--patience", type=int, default=8, help="stop when so many epochs didn't help the validation users")
    g.add_argument("--rotate", type=float, default=0.2, help="turn training windows' sensor frame by about so many rad")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes the fastest there is")
    g.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="bf16: the encoder's matrix "
                   "products in half precision, twice as fast; auto takes it where the processor can")
    g.add_argument("--threads", type=int, default=0, help="CPU threads; 0: OMP_NUM_THREADS, or all cores")
    a = p.parse_args()
    if a.lr is None:
        a.lr = 1e-3 if a.mode == "scratch" else 3e-4
    for name, low, high in (("patience", 1, 1000), ("rotate", 0, 3.2), ("seed", 0, 2 ** 31), ("threads", 0, 1024),
                            ("lr", 0, 1)):
        if not low <= getattr(a, name) <= high:
            raise Refused(f"--{name} {getattr(a, name)}: choose one from {low} to {high}")
    parts = [None] if a.label_users is None else a.label_users.split(",")
    if not all(part is None or part.isdecimal() and int(part) for part in parts):
        raise Refused(f"--label-users {a.label_users}: give a number of users, or several with commas, such as 1,2,4,8")
    if a.label_users is not None and a.split != "user":
        raise Refused(f"--label-users can't go with --split {a.split}: it takes the split by user")
    a.label_users = [part and int(part) for part in parts]
    return a


def read_result(path):
    """The result at `path`; {} where there is none, or none that can be read."""
    try:
        result = json.loads(path.read_text())
        return result if "made_from" in result else {}
    except (OSError, ValueError, TypeError):
        return {}


def is_done(path, made_from):
    """Whether `path` holds a result of the same input. If it holds another one, says that this will be replaced."""
    old = read_result(path).get("made_from", {})
    if old == made_from:
        print(f"{path} is there already, made from the same weights, data and flags")
    elif path.exists():
        differ = ", ".join(key for key in made_from if old.get(key) != made_from[key])
        print(f"{path} is replaced: it " + (f"was made from other {differ}" if old else "is damaged"), file=sys.stderr)
    return old == made_from


def announce(name, result):
    folds = len(result["folds"])
    score = lambda key: f"{result[key]:.4f}" + (f" +- {result[key + '_sd']:.4f}" if folds > 1 else "")
    print(f"{name}: accuracy {score('accuracy')}, macro-F1 {score('macro_f1')} "
          f"({len(result['test_users'])} users tested, {folds} fold{'s' * (folds > 1)})", flush=True)


def main():
    a = parse_flags()
    if a.threads:
        torch.set_num_threads(a.threads)
    keep_memory()
    task, x, folder = open_task(a), None, Path(a.run) / "finetune"
    sensor = f"-{a.sensors}" * (a.sensors != "both")
    tail = f"-{a.pool}" * (a.pool != "mean+std") + f"-s{a.seed}" * (a.seed > 0)
    jobs = [(count, "user", few_users(task.folds, task.users, count, a.seed) if count else task.folds)
            for count in a.label_users]
    if a.split == "validation":
        jobs = [(None, "validation", validation_folds(task.folds, task.users, a.seed))]
    if a.split == "window":
        jobs.append((None, "window", window_folds(task.folds, a.seed)))
    for count, split, folds in jobs:
        name = f"{a.data}-{a.mode}{sensor}" + f"-u{count}" * bool(count) + f"-{split}" * (split != "user") + tail
        made_from = {**task.made_from, "label_users": count, "split": split}
        if not is_done(folder / f"{name}.json", made_from):
            started, done, groups = time.time(), [], np.arange(len(task.y)) if split == "window" else task.users
            if x is None and a.mode != "scratch":
                x = batched(lambda windows: task.features(task.model, windows), task.windows_at, np.arange(len(task.y)))
            for train, test in folds:
                done.append(do_fold(task, x, train, test, groups, a))
                print(f"fold {len(done)} of {len(folds)}, {time.time() - started:.0f} s", file=sys.stderr)
            result = {**summarise(task.meta, task.users, task.y, done), "data": a.data, "made_from": made_from,
                      "seconds": round(time.time() - started, 1), "provenance": provenance()}
            write_json(folder / f"{name}.json", result)
            draw_confusion(folder / f"{name}.png", result)
        announce(name, read_result(folder / f"{name}.json"))
    if a.split == "window":
        print("warning: the second score is what a leak looks like, not a result: people in its test are in its "
              "training, too", file=sys.stderr)
    if a.label_users != [None]:
        alike = {key: made_from[key] for key in ("weights", "model", "data", "sensors", "pool", "seed", "split")}
        results = [r for r in map(read_result, sorted(folder.glob(f"{a.data}-*.json")))
                   if r and alike.items() <= r["made_from"].items()]
        draw_label_curve(folder / f"{a.data}{sensor}{tail}-label-users.png", results)


if __name__ == "__main__":
    command(main)
