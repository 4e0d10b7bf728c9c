"""Downstream scores: who is tested, what is fitted, what a number means, what is refused."""
import json
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import data
import finetune
import pretrain
from model import MAE, patchify

SHAPE = {"width": 16, "depth": 2, "heads": 2, "patch": 5, "sensors": 2, "steps": 40, "decoder_width": 16,
         "decoder_depth": 1, "decoder_heads": 2, "positions": "rotary"}
CLASSES = ["still", "slow", "fast"]
ELSEWHERE = {"name": "elsewhere", "fingerprint": "-"}             # what a run was pre-trained on


def make_set(home, name, users=10, samples=200, labels=None, channels=6, **meta):
    """data/NAME/: people shake a sensor not at all, slowly or fast, each in a way of their own; 12 windows a person."""
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(users), 12)
    what = np.arange(len(who)) % 3 if labels is None else np.asarray(labels)
    t = np.arange(samples) / 20
    phase, style = rng.uniform(0, 6, (len(who), channels, 1)), rng.uniform(0.2, 0.4, (users, channels, 1))[who]
    hertz = np.array([0, 1, 3])[what % 3][:, None, None]
    windows = style * np.sin(2 * np.pi * hertz * t + phase) * (hertz > 0)
    windows = (windows + 0.05 * rng.standard_normal(windows.shape)).astype("float16")
    folder = home / "data" / name
    folder.mkdir(parents=True)
    for part, array in (("windows", windows), ("users", who), ("labels", what)):
        np.save(folder / f"{part}.npy", array)
    (folder / "meta.json").write_text(json.dumps({
        "name": name, "rate": 20, "seconds": samples / 20, "channels": data.CHANNELS[:channels], "classes": CLASSES,
        "hours": 1, "windows": len(who), "users": [f"p{u}" for u in range(users)], "sources": [name] * users,
        "test_users": None, "settings": {}, "left_out": {}, "fingerprint": data.fingerprint(windows, who, what),
        **meta}))


def make_run(home, name, seed=0, sensors="both"):
    """runs/NAME/ as pretrain.py leaves it, the weights as they were drawn (and no block the identity)."""
    config = {"data": ELSEWHERE, "model": {**SHAPE, "sensors": 2 if sensors == "both" else 1},
              "training": {"sensors": sensors}}
    torch.manual_seed(seed)
    model = MAE(**config["model"])
    for block in model.blocks:
        block.attention.out.reset_parameters(), block.down.reset_parameters()
    data.write_json(home / "runs" / name / "config.json", config)
    weights = model.state_dict()
    pretrain.save_checkpoint(home / "runs" / name, {"model": weights, "best": weights, "config": config})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_set(home, "shakes")
    make_set(home, "short", samples=51, test_users=["p2", "p5", "p7"])
    make_run(home, "a")
    return home


@pytest.fixture
def command(home, monkeypatch, capsys):
    """finetune.py as from the command line, in `home`: (exit status, stdout, stderr)."""
    def call(*flags):
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
        with pytest.raises(SystemExit) as status:
            data.command(finetune.main)
        return status.value.code or 0, *capsys.readouterr()
    return call


def result(home, name, run="a"):
    return json.loads((home / "runs" / run / "finetune" / f"{name}.json").read_text())


# ---------------------------------------------------------------- who is tested
def test_five_folds_test_each_user_once_and_train_on_none_that_is_tested():
    users = np.random.default_rng(0).integers(0, 36, 2000)
    meta = {"name": "any", "fingerprint": "+", "test_users": None}
    folds = finetune.user_folds(meta, users, np.zeros(2000, int), ELSEWHERE, seed=0)
    assert len(folds) == 5
    assert sorted(np.concatenate([np.unique(users[test]) for _, test in folds])) == list(range(36))
    for train, test in folds:
        assert not set(users[train]) & set(users[test]) and len(train) + len(test) == 2000
        fit, validation = finetune.set_aside(train, users, seed=0)
        assert not set(users[fit]) & set(users[validation]) and sorted([*fit, *validation]) == sorted(train)
        assert len(set(users[validation])) == len(set(users[train])) // 5
    other = finetune.user_folds(meta, users, np.zeros(2000, int), ELSEWHERE, seed=1)
    assert set(users[other[0][1]]) != set(users[folds[0][1]])


def test_official_test_users_come_first_then_those_held_out_of_pre_training():
    users = np.repeat(np.arange(10), 3)
    meta = {"name": "any", "fingerprint": "+", "users": [f"p{u}" for u in range(10)], "sources": ["any"] * 10}
    [(train, test)] = finetune.user_folds({**meta, "test_users": ["p9", "p4"]}, users, 0 * users, ELSEWHERE, 0)
    assert set(users[test]) == {4, 9} and set(users[train]) == set(range(10)) - {4, 9}
    for pretrained_on in ({"name": "this+any", "fingerprint": "-"}, {"name": "copy", "fingerprint": "+"}):
        [(train, test)] = finetune.user_folds({**meta, "test_users": None}, users, 0 * users, pretrained_on, 0)
        assert set(users[test]) == set(sum(data.held_out_users(meta), [])) == set(range(10)) - set(users[train])


def test_fewer_labelled_users_are_among_more_of_them():
    users = np.repeat(np.arange(20), 4)
    [(train, test)] = [(np.flatnonzero(users < 15), np.flatnonzero(users >= 15))]
    draws = {count: finetune.few_users([(train, test)], users, count, seed=0) for count in (1, 2, 8, 15)}
    for k in range(5):                                           # one fold is drawn five times
        chosen = [set(users[few[k][0]]) for few in draws.values()]
        assert [len(people) for people in chosen] == [1, 2, 8, 15] and chosen[0] < chosen[1] < chosen[2] < chosen[3]
    assert len({tuple(few[0]) for few in draws[1]}) > 1


def test_choosing_leaves_the_test_users_alone():
    users = np.repeat(np.arange(20), 4)
    test_first = (np.flatnonzero(users < 15), np.flatnonzero(users >= 15))
    folds = finetune.validation_folds([test_first, test_first[::-1]], users, seed=0)
    assert sorted(np.concatenate([test for _, test in folds])) == sorted(test_first[0]) and len(folds) == 5
    assert all(not set(users[train]) & set(users[test]) and users[train].max() < 15 for train, test in folds)


def test_windows_drawn_at_random_give_folds_of_the_same_sizes():
    folds = [(np.arange(3, 10), np.arange(3)), (np.r_[:3, 7:10], np.arange(3, 7)), (np.arange(7), np.arange(7, 10))]
    leaky = finetune.window_folds(folds, seed=0)
    assert [len(test) for _, test in leaky] == [3, 4, 3]
    assert sorted(np.concatenate([test for _, test in leaky])) == list(range(10))
    assert all(sorted([*train, *test]) == list(range(10)) for train, test in leaky)


# ---------------------------------------------------------------- features
def test_a_probe_sees_every_patch_and_one_sensor_alone_sees_nothing_of_the_other():
    config = {"model": SHAPE}
    model = finetune.build(config, MAE(**SHAPE).state_dict(), "random", 200)
    x = torch.randn(3, 6, 200)
    torch.testing.assert_close(finetune.encode(model, x, [0, 1]), model.features(x))
    gyro = finetune.encode(model, x[:, 3:], [1])
    tokens = patchify(x, 5)[:, 1]                                # those of the gyroscope are numbers 40 to 79
    torch.testing.assert_close(gyro[:, 0], model.encode(tokens, torch.arange(40, 80).expand(3, -1), 40))
    changed = x.clone()
    changed[:, :, 90] += 1                                       # one sample is felt by every token, so none was masked
    assert ((finetune.encode(model, changed, [0, 1]) - model.features(x)).abs().amax(-1) > 0).all()
    torch.testing.assert_close(finetune.pool(gyro, "mean"), gyro.mean((1, 2)))
    spread = finetune.pool(gyro, "mean+std")[:, 16:]
    torch.testing.assert_close(spread, gyro[:, 0].std(1, correction=0), atol=1e-3, rtol=1e-3)


def test_windows_may_be_shorter_or_longer_than_in_pre_training():
    config, weights = {"model": SHAPE}, MAE(**SHAPE).state_dict()
    x = torch.randn(2, 6, 400)
    assert finetune.encode(finetune.build(config, weights, "probe", 400), x, [0, 1]).shape == (2, 2, 80, 16)
    short = finetune.build(config, weights, "probe", 51)
    torch.testing.assert_close(finetune.encode(short, x[..., :51], [0, 1]), finetune.encode(short, x[..., :50], [0, 1]))
    torch.testing.assert_close(finetune.encode(finetune.build(config, weights, "probe", 400), x[..., :200], [0, 1]),
                               finetune.encode(finetune.build(config, weights, "probe", 200), x[..., :200], [0, 1]))
    learned = {"model": {**SHAPE, "positions": "learned"}}
    with pytest.raises(data.Refused, match="rotary"):
        finetune.build(learned, MAE(**learned["model"]).state_dict(), "probe", 400)


# ---------------------------------------------------------------- logistic regression
def problem(n=400, F=6, K=4):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, F)) @ rng.standard_normal((F, F))                                # correlated features
    y = (x @ rng.standard_normal((F, K)) + rng.gumbel(size=(n, K))).argmax(1)
    return torch.from_numpy(x), torch.from_numpy(y)


@pytest.mark.parametrize("l2", [1e-1, 1e-4])
def test_logistic_regression_ends_in_the_minimum_that_scipy_finds(l2):
    x, y = problem()

    def objective(flat):
        w = torch.from_numpy(flat).view(7, 4).requires_grad_()
        loss = torch.nn.functional.cross_entropy(x @ w[:-1] + w[-1], y) + l2 / 2 * w[:-1].square().sum()
        loss.backward()
        return loss.item(), w.grad.flatten().numpy()

    [ours] = finetune.regression_path(x, y, 4, [l2], tolerance=1e-9)
    loss, gradient = objective(ours.flatten().numpy())
    theirs = minimize(objective, np.zeros(28), jac=True, method="BFGS", options={"gtol": 1e-8})
    assert np.abs(gradient).max() < 1e-7 and loss == pytest.approx(theirs.fun, abs=1e-10)
    np.testing.assert_allclose(ours[:-1].flatten(), theirs.x[:24], atol=1e-4)
    path = list(finetune.regression_path(x.float(), y, 4, [10 * l2, l2], tolerance=1e-5))        # started elsewhere
    np.testing.assert_allclose(path[1][:-1], ours[:-1], atol=0.02 * ours.abs().max())


def test_the_penalty_is_chosen_on_users_set_aside_and_features_standardised_on_training_users():
    x, y = problem()
    x[300:] += 1e3                                               # what is tested has no say
    fit, validation, train = np.arange(200), np.arange(200, 300), np.arange(300)
    weights, mean, sd, l2 = finetune.fit_probe(x, y, fit, validation, train, 4)
    again = finetune.fit_probe(x[:300], y[:300], fit, validation, train, 4)
    torch.testing.assert_close((weights, mean, sd, l2), again)
    torch.testing.assert_close((mean, sd), (x[:300].mean(0), x[:300].std(0, correction=0)))
    z = (x - x[fit].mean(0)) / x[fit].std(0, correction=0)
    strongest = next(finetune.regression_path(z[fit], y[fit], 4, finetune.PENALTIES, tolerance=3e-4))
    y[validation] = finetune.predict(z[validation], strongest)   # so that the validation users agree with it
    assert finetune.fit_probe(x, y, fit, validation, train, 4)[3] == finetune.PENALTIES[0]


# ---------------------------------------------------------------- scores
def test_scores_by_hand():
    truth, answer = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 0, 0])
    counts = finetune.confusion(truth, answer, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    found = finetune.scores(counts)
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["per_class_f1"] == [pytest.approx(4 / 7), pytest.approx(2 / 4), 0, None]
    assert found["macro_f1"] == pytest.approx((4 / 7 + 1 / 2 + 0) / 3), "a class nobody has or answers doesn't count"


def test_scores_and_regression_equal_those_of_scikit_learn():
    pytest.importorskip("sklearn", reason="scikit-learn isn't installed; the project doesn't need it")
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
    rng = np.random.default_rng(1)
    for classes in (2, 6, 18):
        truth, answer = rng.integers(0, classes, 60), rng.integers(0, max(2, classes - 3), 60)
        counts = finetune.confusion(torch.from_numpy(truth), torch.from_numpy(answer), classes)
        found = finetune.scores(counts)
        assert found["accuracy"] == pytest.approx(accuracy_score(truth, answer))
        assert found["macro_f1"] == pytest.approx(f1_score(truth, answer, average="macro"))
        assert np.array_equal(counts, confusion_matrix(truth, answer, labels=range(classes)))
    x, y = problem()
    [ours] = finetune.regression_path(x, y, 4, [1e-2])
    theirs = LogisticRegression(C=1 / (400 * 1e-2), tol=1e-8, max_iter=10000).fit(x, y)
    np.testing.assert_allclose(ours[:-1].T, theirs.coef_, atol=1e-3)
    assert np.array_equal(finetune.predict(x, ours), theirs.predict(x))


# ---------------------------------------------------------------- the command
def test_a_probe_leaves_its_scores_and_not_the_encoder_changed(home, command):
    checkpoint = (home / "runs/a/checkpoint.pt").read_bytes()
    status, said, error = command("runs/a", "--data", "short")
    assert status == 0 and "short-probe: accuracy" in said, error
    found = result(home, "short-probe")
    assert found["test_users"] == ["p2", "p5", "p7"] and (found["n_train"], found["n_test"]) == (7 * 12, 3 * 12)
    assert found["classes"] == CLASSES and len(found["per_class_f1"]) == 3 and np.sum(found["confusion"]) == 36
    assert found["accuracy"] == np.trace(found["confusion"]) / 36 > 0.8
    assert found["accuracy_sd"] == found["macro_f1_sd"] == 0
    assert found["l2"][0] in finetune.PENALTIES and found["provenance"]["torch"]
    assert (home / "runs/a/finetune/short-probe.png").read_bytes()[:4] == b"\x89PNG"
    assert (home / "runs/a/checkpoint.pt").read_bytes() == checkpoint


def test_five_folds_give_a_mean_and_a_deviation(home, command):
    assert command("runs/a", "--data", "shakes", "--sensors", "acc", "--seed", 3)[0] == 0
    found = result(home, "shakes-probe-acc-s3")
    f1 = [fold["macro_f1"] for fold in found["folds"]]
    assert len(f1) == 5 and found["macro_f1"] == pytest.approx(np.mean(f1))
    assert found["macro_f1_sd"] == pytest.approx(np.std(f1, ddof=1))
    assert found["n_test"] == 120 and len(found["test_users"]) == 10
    assert not any(set(fold["train_users"]) & set(fold["test_users"]) for fold in found["folds"])


def test_what_is_done_is_left_and_what_another_checkpoint_made_is_replaced_aloud(home, command):
    make_run(home, "b")
    command("runs/b", "--data", "short")
    path = home / "runs/b/finetune/short-probe.json"
    before = path.stat().st_mtime_ns
    status, said, _ = command("runs/b", "--data", "short")
    assert status == 0 and "is there already" in said and path.stat().st_mtime_ns == before
    make_run(home, "b", seed=1)
    status, _, said = command("runs/b", "--data", "short")
    assert status == 0 and "is replaced: it was made from other weights" in said and path.stat().st_mtime_ns > before
    path.write_text("{")
    assert "is damaged" in command("runs/b", "--data", "short")[2] and result(home, "short-probe", "b")["macro_f1"]


def test_a_curve_of_labelled_users(home, command):
    status, said, _ = command("runs/a", "--data", "short", "--label-users", "1,3")
    assert status == 0 and len(said.splitlines()) == 2
    assert [len(fold["train_users"]) for fold in result(home, "short-probe-u3")["folds"]] == [3] * 5
    assert set(result(home, "short-probe-u3")["test_users"]) == {"p2", "p5", "p7"}
    assert (home / "runs/a/finetune/short-label-users.png").exists()


def test_a_split_by_window_happens_only_when_named_and_stands_beside_the_honest_score(home, command):
    command("runs/a", "--data", "shakes")
    assert result(home, "shakes-probe")["made_from"]["split"] == "user"
    assert not list((home / "runs/a/finetune").glob("*-window*"))
    status, said, warning = command("runs/a", "--data", "shakes", "--split", "window")
    assert status == 0 and "shakes-probe: accuracy" in said and "shakes-probe-window: accuracy" in said
    assert "not a result" in warning
    leaky = result(home, "shakes-probe-window")["folds"][0]
    assert set(leaky["train_users"]) & set(leaky["test_users"])


@pytest.mark.parametrize("mode", ["random", "tune", "scratch"])
def test_the_other_modes_learn_the_toy_and_leave_the_checkpoint_alone(home, command, mode):
    checkpoint = (home / "runs/a/checkpoint.pt").read_bytes()
    flags = {"random": [], "tune": ["--patience", 1], "scratch": ["--patience", 20, "--lr", 0.01]}[mode]
    assert command("runs/a", "--data", "short", "--mode", mode, *flags)[0] == 0
    found = result(home, f"short-{mode}")
    assert found["macro_f1"] > 0.8 and (found["folds"][0]["epoch"] is None) == (mode == "random")
    assert (home / "runs/a/checkpoint.pt").read_bytes() == checkpoint


def test_what_cannot_be_used_is_refused_in_a_sentence(home, command):
    make_run(home, "acc", sensors="acc")
    make_run(home, "torn")
    checkpoint = home / "runs/torn/checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    make_run(home, "other")
    config = json.loads((home / "runs/other/config.json").read_text())
    data.write_json(home / "runs/other/config.json", {**config, "model": {**SHAPE, "depth": 3}})
    make_run(home, "garbled")
    (home / "runs/garbled/config.json").write_text('{"model": ')
    make_set(home, "unlabelled", labels=[-1] * 120)
    make_set(home, "misnamed", labels=[3] + [0] * 119)
    make_set(home, "rare", labels=[2] + [0, 1] * 59 + [0])
    make_set(home, "alone", users=1)
    make_set(home, "accelerometer", channels=3)
    make_set(home, "instants", samples=4)
    for word, *flags in [
            ("--sensors acc", "runs/acc", "--data", "short"),
            ("can be read", "runs/torn", "--data", "short"),
            ("another architecture", "runs/other", "--data", "short"),
            ("not a run", "runs/nowhere", "--data", "short"),
            ("not prepared", "runs/a", "--data", "nowhere"),
            ("no labels", "runs/a", "--data", "unlabelled"),
            ("names of classes", "runs/a", "--data", "misnamed"),
            ("'fast' can't be learned", "runs/a", "--data", "rare"),
            ("too few", "runs/a", "--data", "alone"),
            ("--sensors both", "runs/a", "--data", "accelerometer"),
            ("4 samples", "runs/a", "--data", "instants"),
            ("--label-users 8", "runs/a", "--data", "short", "--label-users", "2,8"),
            ("--label-users 0", "runs/a", "--data", "short", "--label-users", 0),
            ("--split window", "runs/a", "--data", "short", "--label-users", 2, "--split", "window"),
            ("config.json is damaged", "runs/garbled", "--data", "short"),
            ("--lr", "runs/a", "--data", "short", "--lr", "nan")]:
        status, _, said = command(*flags)
        assert status == 2 and word in said and len(said.splitlines()) == 1, (flags, said)
    assert not (home / "runs/acc/finetune").exists() and not (home / "runs/a/finetune/short-probe-u2.json").exists()
