"""Downstream: who is tested, what is fitted, what a score means, what is refused."""
import shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import finetune
from conftest import prepare, read, write
from finetune import Encoder, in_batches, load_run

CLASSES = ["fast", "slow", "still"]
TEN, RED, BLUE = ([f"{name}{u}" for u in range(10)] for name in ("p", "red_", "blue_"))

def record(raw, users, labels=CLASSES):
    """The set RAW: each user does each activity for half a minute, in a style of their own."""
    label, hertz = np.repeat(labels, 600), np.repeat([3, 1, 0], 600)[:, None]
    for user in users:
        rng = data.random_stream(user)                 # the same recordings in each set
        style = rng.uniform(0.2, 0.4, 6) * (hertz > 0)
        x = style * np.sin(2 * np.pi * hertz.cumsum(0) / 20 + rng.uniform(0, 6, 6))
        x += 0.05 * rng.standard_normal(x.shape)
        write(f"{raw}/{user}.npz", {"signal": x, "rate": 20.0, "label": label})
    prepare("folder", raw, raw)

def make_run(name, trained_on=(("else", "where"),), **shape):
    """runs/NAME/ as pretrain.py leaves it, with random weights."""
    shape = {"width": 16, "depth": 2, "heads": 2, "patch": 5, "sensors": 2, **shape}
    config = {"flags": {"sensors": "both" if shape["sensors"] == 2 else "acc"}, "model": shape,
              "trained_on": [*map(list, trained_on)]}
    data.write_json(Path(f"runs/{name}/config.json"), config)
    weights = finetune.random_model(config, "random").state_dict()
    torch.save({"best": weights}, f"runs/{name}/checkpoint.pt")

@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """Every test runs in a folder with these sets in data/, and the run runs/a."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("world"))
        patch.setattr(finetune, "PENALTIES", [3e-2, 3e-3])       # the smaller ones take long
        for raw, users in {"shakes": TEN, "red": RED, "blue": BLUE, "pool": RED + BLUE}.items():
            record(raw, users)
        record("unlabelled", TEN[:2], labels=[""] * 3)
        prepare("folder", "shakes", "again")
        official = shutil.copytree("data/shakes", Path("data/official")) / "meta.json"
        data.write_json(official, read(official) | {"test_users": ["p2", "p5", "p7"]})
        make_run("a")
        yield

def result(name, run="a"):
    return read(f"runs/{run}/finetune/{name}.json")

@pytest.mark.parametrize("trained_by, tested_by", {
    "pool": ["pool", "red", "red+blue", "shakes"], "red": ["red", "pool", "blue"],
    "red+blue": ["pool", "blue"], "shakes": ["again"]}.items())
def test_nobody_is_tested_who_was_trained_on(run, trained_by, tested_by):
    """Whatever a set is called: a pool and its parts, pooled sets, one set under two names."""
    assert run(f"pretrain.py --data {trained_by} --out runs/{trained_by} --users 8 --width 16 "
               "--depth 1 --heads 2 --patch 20 --steps 2 --threads 1")[0] == 0
    seen = {name for _, name, _ in read(f"runs/{trained_by}/config.json")["trained_on"]}
    for name in tested_by:
        assert run(f"finetune.py runs/{trained_by} --data {name}")[0] == 0
        folds, meta = result(f"{name}-probe", trained_by)["folds"], data.load(name).meta
        assert not any(set(fold["train_users"]) & set(fold["test_users"]) for fold in folds)
        tested, users = {user for fold in folds for user in fold["test_users"]}, set(meta["users"])
        held_out = {meta["users"][user] for user in sum(data.held_out_users(meta), [])}
        if users & seen:                               # shared people: the held-out are tested
            assert tested == (held_out - seen or users - seen)
        else:                                          # strangers: everyone, in one of five folds
            assert tested == users and len(folds) == 5

def test_official_test_users_are_tested_unless_one_was_trained_on(run, refused):
    make_run("saw-two", [("shakes", "p0"), ("shakes", "p1")])
    make_run("saw-one-of-them", [("shakes", "p0"), ("shakes", "p5")])
    assert run("finetune.py runs/saw-two --data official")[0] == 0
    assert result("official-probe", "saw-two")["test_users"] == ["p2", "p5", "p7"]
    refused("finetune.py runs/saw-one-of-them --data official", "too few users to test")

def test_few_labelled_users_are_among_more_of_them_and_scores_are_means_over_five_draws(run):
    for count in (1, 4):
        assert run(f"finetune.py runs/a --data official --label-users {count}")[0] == 0
    one, four = (result(f"official-probe-u{count}") for count in (1, 4))
    for folds in zip(one["folds"], four["folds"], strict=True):
        few, more = (set(fold["train_users"]) for fold in folds)
        assert (len(few), len(more)) == (1, 4) and few < more and not more & {"p2", "p5", "p7"}
    assert four["classes"] == CLASSES and len(four["per_class_f1"]) == 3
    assert four["n_test"] == np.sum(four["confusion"]) == 5 * 3 * 9 and four["n_train"] == 4 * 9
    for key in ("accuracy", "macro_f1"):
        each = [fold[key] for fold in four["folds"]]
        assert four[key] == pytest.approx(np.mean(each))
        assert four[f"{key}_sd"] == pytest.approx(np.std(each, ddof=1)) and len(each) == 5

def test_a_split_by_window_shows_the_leak_that_a_split_by_user_hides(run):
    """Users do one activity each, and are told by how a sensor is worn: new ones can't be told."""
    for u, style in enumerate(np.random.default_rng(1).uniform(-1, 1, (15, 6))):
        x = style + 0.05 * np.random.default_rng(u).standard_normal((2000, 6))
        label = [CLASSES[u % 3]] * 2000
        write(f"habits/p{u}.npz", {"signal": x, "rate": 20.0, "label": label})
    prepare("folder", "habits", "habits")
    for split in ("user", "window"):
        assert run(f"finetune.py runs/a --data habits --split {split}")[0] == 0
    honest, leak = result("habits-probe"), result("habits-probe-window")
    assert honest["macro_f1"] < 0.6 and leak["macro_f1"] > 0.95
    assert leak["n_test"] == 15 * 10, "each window is tested once"

def test_features_are_mean_and_deviation_over_all_patches():
    model, x = load_run(Path("runs/a"))[0], torch.randn(3, 6, 200)
    patches, pooled = model.features(x).detach(), in_batches(Encoder(model), x)
    by_hand = torch.cat([patches.mean(2), patches.std(2, correction=0)], 1).flatten(1)
    torch.testing.assert_close(pooled, by_hand, atol=1e-3, rtol=1e-3)

def problem():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 6)) @ rng.standard_normal((6, 6))
    y = (x @ rng.standard_normal((6, 4)) + rng.gumbel(size=(400, 4))).argmax(1)
    return torch.from_numpy(x), torch.from_numpy(y)

@pytest.mark.parametrize("l2", [1e-1, 1e-4])
def test_logistic_regression_ends_where_the_gradient_of_its_convex_loss_is_zero(l2):
    x, y = problem()
    start = torch.randn(7, 4, dtype=x.dtype)
    w = finetune.logistic_regression(x, y, l2, start, tolerance=1e-9).requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ w[:-1] + w[-1], y) + l2 / 2 * w[:-1].square().sum()
    [gradient] = torch.autograd.grad(loss, w)
    assert gradient.abs().max() < 1e-6

def test_the_penalty_is_chosen_on_validation_rows():
    x, y = problem()
    fit, validation, l2 = np.arange(200), np.arange(200, 400), finetune.PENALTIES[0]
    z = (x - x[fit].mean(0)) / x[fit].std(0, correction=0)
    weights = finetune.logistic_regression(z[fit], y[fit], l2, x.new_zeros(7, 4), tolerance=3e-4)
    y[validation] = (z[validation] @ weights[:-1] + weights[-1]).argmax(1)     # they agree with it
    assert finetune.fit_probe(x, y, 4, fit, validation, fit).l2 == l2

def test_scores_by_hand():
    truth, predicted = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 0, 0])
    scores = finetune.scores(finetune.confusion(truth, predicted, 4))          # nobody has class 3
    assert scores["confusion"] == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert scores["per_class_f1"] == [pytest.approx(4 / 7), pytest.approx(2 / 4), 0, None]
    assert scores["macro_f1"] == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)
    assert scores["accuracy"] == pytest.approx(3 / 6)

def test_the_sensors_of_a_run_reach_its_probes(run, refused):
    make_run("acc", sensors=1)
    for flags in ("", " --sensors acc"):
        assert run(f"finetune.py runs/acc --data shakes{flags}")[0] == 0
    plain = result("shakes-probe", "acc")              # this name enters the table of a grid
    assert plain["sensors"] == "acc"
    assert result("shakes-probe-acc", "acc")["macro_f1"] == plain["macro_f1"]
    for sensors in ("gyro", "both"):
        refused(f"finetune.py runs/acc --data shakes --sensors {sensors}", "--sensors acc")
    assert run("finetune.py runs/a --data shakes --sensors gyro")[0] == 0      # of two sensors
    assert result("shakes-probe-gyro")["sensors"] == "gyro"
    assert finetune.sensor_numbers("a run", "both", "gyro", count=2) == [1]

def test_many_runs_are_probed_in_one_process_until_one_is_not_finished(run):
    for name in ("one", "two", "cut-off"):
        make_run(name)
    torch.save({"step": 5, "best": {}}, "runs/cut-off/checkpoint.pt")
    status, printed, error = run("finetune.py runs/one runs/two runs/cut-off --data red")
    assert status == 2 and printed.count("macro-F1") == 2
    assert error.startswith("finetune.py: runs/cut-off isn't finished") and error.count("\n") == 1
    assert result("red-probe", "one")["folds"] == result("red-probe", "two")["folds"]
    assert not Path("runs/cut-off/finetune").exists()

@pytest.mark.parametrize("mode", ["tune", "scratch"])
def test_a_network_keeps_the_epoch_that_is_best_for_validation_users(run, mode):
    before = Path("runs/a/checkpoint.pt").read_bytes()
    _, printed, _ = run(f"finetune.py runs/a --data official --mode {mode} --patience 2")
    epochs = [line.split() for line in printed.splitlines() if line.startswith("epoch")]
    best, network = np.argmax([words[3] for words in epochs]), result(f"official-{mode}")
    assert network["folds"][0]["epoch"] == best + 1 == len(epochs) - 2
    assert network["macro_f1"] > 0.5                   # by chance: 0.33
    assert Path("runs/a/checkpoint.pt").read_bytes() == before

def test_a_result_is_left_alone_until_the_weights_change_and_two_at_once_do_no_harm(
        run, refused):
    make_run("b")
    words, folder = "runs/b --data red", Path("runs/b/finetune")
    two = [subprocess.Popen([sys.executable, finetune.__file__, *words.split()]) for _ in range(2)]
    assert [process.wait() for process in two] == [0, 0]
    assert sorted(path.name for path in folder.iterdir()) == ["red-probe.json", "red-probe.png"]
    first, made = result("red-probe", "b"), (folder / "red-probe.json").stat().st_mtime_ns
    assert run(f"finetune.py {words}")[0] == 0
    assert (folder / "red-probe.json").stat().st_mtime_ns == made
    make_run("b", width=32)
    assert run(f"finetune.py {words}")[0] == 0 and result("red-probe", "b") != first
    write(folder / "red-probe.json", "{")
    refused(f"finetune.py {words}", "red-probe.json can't be read")

def test_an_encoder_without_a_decoder_is_a_run_that_knows_whom_it_saw(run, refused):
    make_run("alone", data.people(data.load("red").meta), decoder_depth=0)
    refused("finetune.py runs/alone --data red", "too few users to test")
    assert run("finetune.py runs/alone --data pool")[0] == 0
    assert {user[:4] for user in result("pool-probe", "alone")["test_users"]} == {"blue"}

@pytest.mark.parametrize("flags, words", {"unlabelled": "no labels", "nowhere": "not prepared",
                                          "shakes --label-users 20": "20 is more"}.items())
def test_what_cannot_be_used_is_refused_in_a_sentence(refused, flags, words):
    refused(f"finetune.py runs/a --data {flags}", words)
