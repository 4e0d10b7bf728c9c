"""Pre-training: batches, averaged weights, when a run ends, what its loss is, what is refused."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import pretrain
from finetune import load_run
from model import MAE

CODE = Path(pretrain.__file__).parent
TINY = ["--width", "16", "--depth", "1", "--heads", "2", "--patch", "20", "--batch", "16",
        "--threads", "1"]

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small simulated set in data/, where the commands run."""
    home = tmp_path_factory.mktemp("home")
    words = ["simulated", "--users", "12", "--hours-per-user", "0.05"]
    subprocess.run([sys.executable, CODE / "data.py", *words], cwd=home, check=True)
    return home

def run(home, out, *flags):
    words = [sys.executable, CODE / "pretrain.py", "--data", "simulated", *TINY, "--out", out]
    return subprocess.run([*words, *map(str, flags)], cwd=home, capture_output=True, text=True)

def read(path):
    return json.loads(path.read_text())

def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

# ---------------------------------------------------------------- batches, optimiser, average
def test_a_batch_depends_on_the_seed_and_its_step_alone(home, monkeypatch):
    monkeypatch.chdir(home)
    prepared, rows = data.load("simulated"), np.arange(50)
    flags = {"seed": 3, "batch": 8, "sensors": "both", "patch": 20, "mask_ratio": 0.75,
             "rotate": 0.5}
    first, again = (pretrain.batch_at(7, prepared, rows, flags) for _ in range(2))
    other = pretrain.batch_at(8, prepared, rows, flags)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])

def test_muon_equals_the_library():
    torch.manual_seed(0)
    shapes = [(64, 256), (256, 64), (128, 64), (64, 64), (64, 64)]
    start = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = [pretrain.Muon(ours, dict(lr=0.02, weight_decay=0.1)),
                  torch.optim.Muon(theirs, 0.02, 0.1)]
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = q.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.step()
    for p, q, before in zip(ours, theirs, start):
        assert (p - q).norm() < 0.02 * (q - before).norm(), "equal up to the library's bfloat16"

def test_the_average_is_a_weighted_mean_of_the_weights_passed_through():
    gamma, passed = 7, [torch.randn(5) for _ in range(40)]
    model, average = torch.nn.Linear(5, 1, bias=False), torch.nn.Linear(5, 1, bias=False)
    for step, weights in enumerate(passed, start=1):
        model.weight.data = weights[None].clone()
        pretrain.update_average(average, model, step, gamma)
    share = np.array([1 - (1 - 1 / s) ** (gamma + 1) for s in range(1, 41)])
    kept = np.array([np.prod(1 - share[s:]) for s in range(1, 41)])    # of w_s, after step s
    expected = sum(w * float(part) for w, part in zip(passed, share * kept))
    assert (share * kept).sum() == pytest.approx(1)
    torch.testing.assert_close(average.weight[0], expected)
    s = np.arange(1, 41)
    closed = np.array([np.prod((1 - 1 / s[i:]) ** (gamma + 1)) for i in s])    # about (s / 40)^8
    np.testing.assert_allclose(kept, closed)

def test_the_learning_rate_and_the_evaluations_do_not_depend_on_the_end():
    rate = [pretrain.schedule(step, tau=500, decay=0.5) for step in range(20_000)]
    assert np.argmax(rate) < 100 and rate[1500] == pytest.approx(0.5), "(1 + 3)^-1/2"
    steps = [step for step in range(1, 20_001) if pretrain.is_evaluated(step)]
    growth = np.divide(steps[1:], steps[:-1])
    assert steps[0] < 20 and growth.max() < 1.15
    assert np.median(growth) == pytest.approx(1.07, abs=0.01)

# ---------------------------------------------------------------- the held-out loss
def test_each_half_of_the_held_out_people_is_scored_at_a_step_chosen_on_the_other():
    half = np.array([0, 0, 1, 1])
    history = [{"people": [1.0, 1.0, 5.0, 5.0]}, {"people": [3.0, 3.0, 4.0, 4.0]},
               {"people": [2.0, 2.0, 6.0, 6.0]}]    # A is best at the first, B at the second
    assert pretrain.cross_fitted(history, half).tolist() == [3, 3, 5, 5]

def test_every_person_has_one_vote(home, monkeypatch):
    monkeypatch.chdir(home)
    flags = vars(pretrain.build_parser().parse_args(["--patch", "20"]))
    held = pretrain.held_out(data.load("simulated"), flags)
    held.x[:] = torch.from_numpy(held.person == 1).float()[:, None, None]
    losses = pretrain.evaluate(lambda x, keep, masked: 3 * x[:, 0, 0], held)
    assert losses.tolist() == [0, 3] + [0] * (len(held.people) - 2)

def test_a_run_has_converged_when_it_has_not_improved_over_a_share_of_its_steps():
    history = [{"step": 700, "loss": 1.0}, {"step": 990, "loss": 1.1}]
    assert not pretrain.has_converged(history, 0.3)
    assert pretrain.has_converged([*history, {"step": 1010, "loss": 1.1}], 0.3)
    assert not pretrain.has_converged([*history, {"step": 9000, "loss": 1.1}], 0)
    assert not pretrain.has_converged([{"step": 70, "loss": 1.0}, {"step": 200, "loss": 1.1}], 0.3)

# ---------------------------------------------------------------- a whole run
def test_a_cell_leaves_what_it_was_and_what_it_got(home):
    cell = ["--users", 4, "--hours-per-user", 0.02, "--steps", 60, "--patience", 0]
    done = run(home, "runs/a", *cell, "--plot")
    assert done.returncode == 0, done.stderr
    result, config = read(home / "runs/a/result.json"), read(home / "runs/a/config.json")
    assert (result["windows"], result["users"], result["hours_cap"]) == (28, 4, 0.02)
    assert result["hours"] == pytest.approx(28 / 360) == 4 * result["hours_per_user"]
    assert (result["steps"], result["converged"], result["patches"]) == (60, False, 10)
    assert result["config"] == {**config["flags"], "fingerprint": config["fingerprint"]}
    assert lines(home / "runs/a")[-1]["loss"] == result["loss_last"]
    people = result["people"]
    assert result["loss"] == pytest.approx(np.mean([p["loss"] for p in people]))
    unexplained = np.mean([p["loss"] / p["baseline"] for p in people])
    assert result["unexplained"] == pytest.approx(unexplained)
    held_out = {(p["source"], p["user"]) for p in people}
    assert len(config["trained_on"]) == 4 and not held_out & set(map(tuple, config["trained_on"]))
    assert (home / "runs/a/reconstruction.png").stat().st_size > 10_000
    model, _ = load_run(home / "runs/a")
    assert isinstance(model, MAE)

def test_a_longer_cap_lengthens_a_run_and_other_flags_are_refused(home):
    cell = ["--users", 4, "--hours-per-user", 0.02, "--patience", 0]
    assert run(home, "runs/long", *cell, "--steps", 90).returncode == 0
    assert run(home, "runs/short", *cell, "--steps", 40).returncode == 0
    before = (home / "runs/short/result.json").read_bytes()
    for flags, words in ((["--steps", 39], "steps 40 -> 39"),
                         (["--steps", 40, "--lr", 0.01], "lr 0.02 -> 0.01"),
                         (["--steps", 40, "--patience", 0.5], "patience")):
        refused = run(home, "runs/short", *cell, *flags)
        assert refused.returncode == 2 and words in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert (home / "runs/short/result.json").read_bytes() == before
    assert run(home, "runs/short", *cell, "--steps", 90).returncode == 0
    weights = [torch.load(home / f"runs/{name}/checkpoint.pt", weights_only=True)
               for name in ("long", "short")]
    for part in ("model", "average", "best"):
        assert all(torch.equal(weights[0][part][k], weights[1][part][k]) for k in weights[0][part])

def test_a_flag_that_an_old_run_does_not_name_had_its_default(home):
    cell = ["--users", 3, "--steps", 20]
    assert run(home, "runs/old", *cell).returncode == 0
    config = read(home / "runs/old/config.json")
    del config["flags"]["rotate"]
    data.write_json(home / "runs/old/config.json", config)
    assert run(home, "runs/old", *cell).returncode == 0
    config["flags"]["mlp"] = "swiglu"
    data.write_json(home / "runs/old/config.json", config)
    refused = run(home, "runs/old", *cell)
    assert refused.returncode == 2 and "mlp swiglu -> None" in refused.stderr

def test_a_run_ends_by_itself(home):
    cell = ["--users", 2, "--hours-per-user", 0.01, "--lr", 0.1]
    assert run(home, "runs/ends", *cell).returncode == 0
    result = read(home / "runs/ends/result.json")
    assert result["converged"] and result["best_step"] <= 0.7 * result["steps"] < 10_000

@pytest.mark.parametrize("flags, word", [
    (["--users", 99], "--users 99"), (["--hours-per-user", 0.001], "--hours-per-user"),
    (["--patch", 7], "--patch 7"), (["--heads", 3], "heads"), (["--mask-ratio", 1], "--mask-ratio"),
    (["--steps", 0], "--steps"), (["--lr", -1], "--lr"), (["--patience", 1.5], "--patience"),
    (["--patience", -0.1], "--patience"), (["--device", "tpu9"], "--device"),
    (["--data", "nowhere"], "nowhere")])
def test_what_cannot_be_run_is_refused_in_a_sentence(home, flags, word, monkeypatch, capsys):
    monkeypatch.chdir(home)
    words = ["pretrain.py", "--data", "simulated", *TINY, "--out", "runs/refused", *map(str, flags)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as status:
        data.command(pretrain.main)
    error = capsys.readouterr().err.strip()
    assert status.value.code == 2 and word in error.splitlines()[-1] and "Traceback" not in error
    assert not (home / "runs/refused").exists()
