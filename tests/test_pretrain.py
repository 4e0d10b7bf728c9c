"""Pre-training: batches, averaged weights, when a run ends, what its loss is, what is refused."""
import json, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import model
import pretrain
from conftest import prepare, read, write
from finetune import load_run

CODE = Path(__file__).parent.parent
TINY = "pretrain.py --width 16 --depth 1 --heads 2 --patch 20 --batch 16 --threads 1"
CELL = f"{TINY} --users 4 --hours-per-user 0.02 --patience 0"
pytestmark = pytest.mark.usefixtures("home")

def flags(seed=0):
    words = f"--patch 20 --batch 8 --rotate 0.5 --seed {seed}".split()
    return data.build_parser(pretrain.FLAGS | pretrain.MACHINE, "").parse_args(words)

def weights(run):
    state = torch.load(f"runs/{run}/checkpoint.pt", weights_only=True)
    return {part: b"".join(x.numpy().tobytes() for x in state[part].values())
            for part in ("model", "average", "best")}

def test_a_batch_depends_on_the_seed_and_its_step_alone_and_the_evaluation_on_neither():
    prepared = data.load("simulated")
    def batch(seed, step, rows):                       # x, keep, masked
        parts = pretrain.batch_at(step, prepared, np.arange(rows), flags(seed))
        return [part.numpy().tobytes() for part in parts]
    for rows in (50, 1):                               # of a single window, rotations differ
        batches = [batch(seed, step, rows) for seed in (0, 1) for step in (7, 8)]
        assert batch(0, 7, rows) == batches[0]
        assert all(len({*parts}) == 4 for parts in zip(*batches))
    held = [pretrain.held_out(prepared, flags(seed))[:3] for seed in (0, 1)]
    assert all(torch.equal(*parts) for parts in zip(*held))

def test_an_auxiliary_term_changes_training_and_not_what_is_reported(run, monkeypatch):
    assert run(f"{CELL} --steps 1 --out runs/plain")[0] == 0
    size = lambda model: sum(p.square().sum() for p in model.parameters())
    monkeypatch.setattr(pretrain, "objective",
                        lambda model, *batch: model(*batch).mean() + 1e6 * size(model))
    assert run(f"{CELL} --steps 1 --out runs/decayed")[0] == 0
    plain, other = (read(f"runs/{name}/metrics.jsonl") for name in ("plain", "decayed"))
    assert other["train_loss"] > 1e6 > 10 > other["loss"] != plain["loss"]

def test_muon_equals_the_library():
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((32, 64), (64, 32), (32, 32))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    muon = pretrain.Muon(ours, dict(lr=0.02, weight_decay=0.1))
    library = torch.optim.Muon(theirs, 0.02, 0.1)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = q.grad = torch.randn_like(p)
        muon.step()
        library.step()
    for p, q, before in zip(ours, theirs, start):
        assert (p - q).norm() < 0.02 * (q - before).norm(), "equal up to the library's bfloat16"

def test_the_average_is_a_weighted_mean_of_the_weights_passed_through():
    model, average = (torch.nn.Linear(40, 1, bias=False) for _ in range(2))
    for step, weights in enumerate(torch.eye(40), start=1):      # so entry s is the share of w_s
        model.weight.data = weights[None]
        pretrain.update_average(average, model, step, gamma=7)
    shares = np.diff((np.arange(41) / 40) ** 8)                  # about s^7, and 1 in all
    np.testing.assert_allclose(average.weight[0].detach(), shares, rtol=1e-3, atol=1e-12)

def test_the_learning_rate_and_the_evaluations_do_not_depend_on_the_end():
    rate = [pretrain.schedule(step, tau=500, decay=0.5) for step in range(20_000)]
    assert np.argmax(rate) < 100 and rate[1500] == pytest.approx(0.5), "(1 + 3)^-1/2"
    steps = [step for step in range(1, 20_001) if pretrain.is_evaluated(step)]
    growth = np.divide(steps[1:], steps[:-1])
    assert steps[0] < 20 and growth.max() < 1.15
    assert np.median(growth) == pytest.approx(1.07, abs=0.01)

def test_each_half_of_the_held_out_people_is_scored_at_a_step_chosen_on_the_other():
    people = [1.0, 1.0, 5.0, 5.0], [3.0, 3.0, 4.0, 4.0], [2.0, 2.0, 6.0, 6.0]
    history = [{"people": losses} for losses in people]    # A is best at the first, B at the second
    assert pretrain.cross_fitted(history, np.array([0, 0, 1, 1])).tolist() == [3, 3, 5, 5]

def test_every_person_has_one_vote():
    held = pretrain.held_out(data.load("simulated"), flags())
    held.x[:] = torch.from_numpy(held.person == 1).float()[:, None, None]
    losses = pretrain.evaluate(lambda x, keep, masked: 3 * x[:, 0, 0], held)
    assert losses.tolist() == [0, 3] + [0] * (len(held.people) - 2)

def test_a_run_ends_when_it_has_not_improved_over_a_share_of_its_steps(run):
    best = {"step": 700, "loss": 1.0}
    for step, patience, converged in ((990, 0.3, False), (1010, 0.3, True), (9000, 0, False)):
        assert pretrain.has_converged([best, {"step": step, "loss": 1.1}], patience) == converged
    assert not pretrain.has_converged([best | {"step": 70}, best | {"step": 200}], 0.3), "too early"
    assert run(f"{TINY} --users 2 --hours-per-user 0.01 --lr 0.1 --out runs/ends")[0] == 0
    result = read("runs/ends/result.json")
    assert result["converged"] and result["best_step"] <= 0.7 * result["steps"] < 10_000

def test_a_cell_leaves_what_it_was_and_what_it_got(run):
    assert run(f"{CELL} --out runs/a --steps 60 --plot")[0] == 0
    result, config = read("runs/a/result.json"), read("runs/a/config.json")
    assert (result["windows"], result["users"], result["hours_cap"]) == (28, 4, 0.02)
    assert result["hours"] == pytest.approx(28 / 360) == 4 * result["hours_per_user"]
    assert (result["steps"], result["converged"], result["patches"]) == (60, False, 10)
    assert result["config"] == {**config["flags"], "fingerprint": config["fingerprint"]}
    last_line = Path("runs/a/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last_line)["loss"] == result["loss_last"]
    people = result["people"]
    assert result["loss"] == pytest.approx(np.mean([p["loss"] for p in people]))
    assert result["baseline_loss"] == pytest.approx(np.mean([p["baseline"] for p in people]))
    trained_on = {(source, user) for source, user, _ in config["trained_on"]}
    assert len(trained_on) == 4 and not {(p["source"], p["user"]) for p in people} & trained_on
    assert Path("runs/a/reconstruction.png").stat().st_size > 10_000

def start(line, first="pass"):
    program = f"import data, pretrain; {first}; data.command(pretrain.main)"
    words = ["env", f"PYTHONPATH={CODE}", sys.executable, "-c", program, *line.split()[1:]]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def test_a_killed_run_goes_on_bit_identically_and_two_processes_corrupt_nothing():
    line, often = f"{CELL} --steps 60 --precision fp32 --out runs/", "pretrain.SAVE_EVERY = 0"
    assert pretrain.SAVE_EVERY == 10, "seconds"
    whole, killed = start(line + "whole"), start(line + "killed", often)
    while '"step": 2' not in "".join(p.read_text() for p in Path("runs/killed").glob("metrics.*")):
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() != 0 and not Path("runs/killed/result.json").exists()
    both = [start(line + "killed", often), start(line + "killed", often), whole]
    assert [process.communicate() and process.returncode for process in both] == [0, 0, 0]
    assert weights("whole") == weights("killed")
    assert read("runs/whole/result.json")["people"] == read("runs/killed/result.json")["people"]

def test_a_longer_cap_lengthens_a_run_and_other_flags_are_refused(run, refused):
    long, short = f"{CELL} --out runs/long --steps", f"{CELL} --out runs/short --steps"
    assert [run(f"{long} 60")[0], run(f"{short} 30")[0]] == [0, 0]
    for flags, words in (("29", "steps 30 -> 29"), ("30 --lr 0.01", "lr 0.02 -> 0.01"),
                         ("30 --patience 0.5", "patience 0.0 -> 0.5")):
        refused(f"{short} {flags}", words)
    assert run(f"{short} 60")[0] == 0 and weights("long") == weights("short")

def test_of_a_damaged_checkpoint_one_is_told_in_a_sentence(run, refused):
    cell, path = f"{CELL} --steps 20 --out runs/torn", Path("runs/torn/checkpoint.pt")
    assert run(cell)[0] == 0
    for content in (b"", path.read_bytes()[:5000], b"no zip"):
        path.write_bytes(content)
        refused(cell, "checkpoint.pt is damaged")
        refused("finetune.py runs/torn", "checkpoint.pt is damaged")

def test_a_run_without_finite_numbers_ends_before_they_are_saved(run):
    status, _, error = run(f"{CELL} --steps 40 --lr 1e9 --out runs/nan")
    assert status == 2 and "lower --lr" in error
    assert [path.name for path in Path("runs/nan").iterdir()] == ["config.json"]

def test_a_flag_that_changes_the_model_cannot_be_forgotten(run, refused, monkeypatch):
    """One line in FLAGS and an argument of MAE: it reaches the model, its record and old runs."""
    cell = f"{CELL} --steps 2 --out runs/"
    assert run(cell + "old")[0] == 0
    monkeypatch.setitem(pretrain.FLAGS, "decoder_depth", (1, int, "blocks of the decoder"))
    refused(f"{cell}old --decoder-depth 2", "decoder_depth 1 -> 2")            # it had the default
    assert run(f"{cell}new --decoder-depth 2")[0] == 0
    assert len(load_run(Path("runs/new"))[0].decoder) == 2
    refused(cell + "new", "decoder_depth 2 -> 1")

def test_a_run_of_another_model_is_refused(run, refused, monkeypatch):
    assert run(f"{CELL} --steps 2 --out runs/was")[0] == 0
    monkeypatch.setattr(model, "linear", lambda inputs, outputs: torch.nn.Linear(inputs, outputs))
    refused(f"{CELL} --steps 2 --out runs/was", "made by other code")

def test_a_flag_that_an_old_run_does_not_name_had_its_default(run, refused):
    cell, path = f"{CELL} --steps 20 --out runs/older", Path("runs/older/config.json")
    assert run(cell)[0] == 0
    config = read(path)
    del config["flags"]["rotate"]
    config["provenance"]["commit"] = "an old one"
    data.write_json(path, config)
    _, printed, _ = run(cell)
    assert "begun by other code" in printed
    assert read("runs/older/result.json")["versions"]["commit"] == "an old one", "it did the work"
    config["flags"]["mlp"] = "swiglu"                  # but a flag of the old code counts
    data.write_json(path, config)
    refused(cell, "mlp swiglu -> None")
    path.unlink()
    refused(cell, "config.json can't be read")

@pytest.mark.parametrize("flag", [
    "--users 99", "--hours-per-user 0.001", "--patch 7", "--heads 3", "--mask-ratio 1",
    "--steps 0", "--lr -1", "--patience 1.5", "--patience -0.1", "--device tpu9", "--data nowhere"])
def test_what_cannot_be_run_is_refused_in_a_sentence(refused, flag):
    option, value = flag.split()
    words = {"--heads": "heads", "--data": value}.get(option, option)
    refused(f"{TINY} --out runs/refused {flag}", words, usage=True)
    assert not Path("runs/refused").exists()

WINDOWS = """import multiprocessing, os, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None                           # an import of it fails
del os.fork
multiprocessing.set_start_method("spawn")
"""
def test_all_runs_without_what_windows_lacks():
    write("sitecustomize.py", WINDOWS)                 # runs first, in every process
    for line in ("data.py simulated --users 4 --hours-per-user 0.02 --name spawned",
                 f"{TINY} --steps 2 --data spawned --out runs/windows",
                 "finetune.py runs/windows --data spawned"):
        words = [CODE / line.split()[0], *line.split()[1:]]
        subprocess.run(["env", "PYTHONPATH=.", sys.executable, *words], check=True)
    forked = prepare("simulated", name="forked", users=4, hours_per_user=0.02)
    assert data.load("spawned").meta["fingerprint"] == forked.meta["fingerprint"]
