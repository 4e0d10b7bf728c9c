"""Pre-training: what a batch is, what is held out, what is refused. Resuming and faults are in test_sweep.py."""
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import pretrain
from model import MAE

CODE = Path(pretrain.__file__).parent
TINY = ["--width", "16", "--depth", "1", "--heads", "2", "--patch", "20", "--batch", "16", "--threads", "1",
        "--evaluations", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small simulated set in data/, where the commands run."""
    home = tmp_path_factory.mktemp("home")
    words = ["simulated", "--users", "12", "--hours-per-user", "0.05"]
    subprocess.run([sys.executable, CODE / "data.py", *words], cwd=home, check=True)
    return home


def run(home, *flags):
    words = [sys.executable, CODE / "pretrain.py", "--data", "simulated", *TINY, *map(str, flags)]
    return subprocess.run(words, cwd=home, capture_output=True, text=True)


def test_an_epoch_shows_each_window_once_and_a_batch_depends_on_its_step_alone():
    batches = [pretrain.batch_rows(step, 30, 12, seed=3) for step in range(5)]       # two epochs of 30
    assert sorted(np.concatenate(batches)[:30]) == list(range(30)) == sorted(np.concatenate(batches)[30:])
    assert np.array_equal(pretrain.batch_rows(3, 30, 12, seed=3), batches[3])
    small = pretrain.batch_rows(0, 5, 12, seed=3)
    assert len(small) == 12, "a set smaller than a batch is gone through more than once"


def test_gravity_and_units_survive_standardising():
    windows = torch.zeros(1, 6, 4, dtype=torch.float16)
    windows[:, 2], windows[:, 3] = 0.7, 1.05
    x = pretrain.standardise(windows, data.CHANNELS)
    torch.testing.assert_close(x[0, :, 0], torch.tensor([0, 0, 1, 1, 0, 0.0]), atol=1e-3, rtol=0)


def test_sensors_worn_askew_feel_as_much_and_turn_together():
    x = torch.randn(4, 6, 20)
    turned = pretrain.turn_sensors(x, torch.tensor([0, 0, math.pi / 2]).expand(4, 1, 3))
    torch.testing.assert_close(turned[:, [0, 2]], x[:, [1, 2]])  # a quarter turn about z: x feels what y felt
    torch.testing.assert_close(turned[:, [3, 5]], x[:, [4, 5]])
    torch.testing.assert_close(pretrain.turn_sensors(x, torch.zeros(4, 1, 3)), x)


def test_evaluation_windows_weigh_people_alike():
    prepared = data.Prepared(None, np.repeat([0, 1, 2], [500, 100, 7]), None, {})
    rows = pretrain.held_out_windows(prepared, [0, 1, 2], 64)
    assert np.bincount(prepared.users[rows]).tolist() == [64, 64, 7] and len(set(rows)) == len(rows)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = MAE(16, 2, 2)
    adamw, muon = pretrain.build_optimizers(model, "muon", 0.02, 0.05)
    count = lambda optimizer: sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert count(muon) == 12 * (2 * 16 ** 2 + 64 ** 2)
    assert count(muon) + count(adamw) == sum(p.numel() for p in model.parameters())
    assert len(pretrain.build_optimizers(model, "adamw", 0.003, 0.05)) == 1


def test_a_cell_leaves_what_it_was_and_what_it_got(home):
    done = run(home, "--users", 4, "--hours-per-user", 0.02, "--steps", 30, "--out", "runs/a")
    assert done.returncode == 0, done.stderr
    result, config = (json.loads((home / "runs/a" / name).read_text()) for name in ("result.json", "config.json"))
    lines = [json.loads(line) for line in (home / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert result["windows"] == 4 * 7 and result["users"] == 4 and result["hours"] == pytest.approx(4 * 7 / 360)
    assert result["loss"] == min(lines, key=lambda line: line["choose"])["loss"]
    assert result["loss_last"] == lines[-1]["loss"]
    chosen = result["loss_choose"]
    assert result["loss"] != chosen, "chosen on one half of the held-out users, measured on the other"
    assert config["training"]["lr"] == result["lr"] and config["data"]["fingerprint"] == result["fingerprint"]
    assert "done" in run(home, "--users", 4, "--hours-per-user", 0.02, "--steps", 30, "--out", "runs/a").stdout
    other = run(home, "--users", 4, "--hours-per-user", 0.02, "--steps", 31, "--out", "runs/a")
    assert other.returncode == 2 and "steps 30 -> 31" in other.stderr
    model, _ = pretrain.load_run(home / "runs/a")
    assert isinstance(model, MAE)


@pytest.mark.parametrize("flags, word", [
    (["--users", 99], "--users 99"), (["--hours-per-user", 0.001], "--hours-per-user"),
    (["--patch", 7], "--patch 7"), (["--heads", 3], "heads"), (["--mask-ratio", 1], "--mask-ratio"),
    (["--steps", 0], "--steps"), (["--lr", -1], "--lr"),
    (["--device", "tpu9"], "--device"), (["--data", "nowhere"], "nowhere")])
def test_what_cannot_be_run_is_refused_in_a_sentence(home, flags, word, monkeypatch, capsys):
    monkeypatch.chdir(home)
    words = ["pretrain.py", "--data", "simulated", *TINY, "--out", "runs/refused", *map(str, flags)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as status:
        data.command(pretrain.main)
    said = capsys.readouterr().err.strip()
    assert status.value.code == 2 and word in said and len(said.splitlines()) == 1
    assert not (home / "runs/refused").exists()
