"""Nothing that hits a run or a sweep loses a cell or changes a number: kills, faults, a cluster.

A run of pretrain.py is stopped and damaged for real. sweep.sh is tried with stand-ins for the four
scripts, which count steps instead of learning; with the real ones by `python -m pytest -m slow`.
"""
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pytest
import torch

from conftest import read
from pretrain import load_checkpoint

CODE, PYTHON = Path(__file__).parent.parent, sys.executable
ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
ENVIRONMENT |= {"PYTHON": PYTHON, "OMP_NUM_THREADS": "1"}

def begin(*words, cwd=".", **variables):
    """Start a command in a session of its own; all that it prints is one text."""
    return Popen(words, cwd=cwd, env=ENVIRONMENT | variables, text=True, start_new_session=True,
                 stdout=PIPE, stderr=STDOUT)

def finish(process):
    output = process.communicate(timeout=900)[0]
    return process.returncode, output

def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()

# ---------------------------------------------------------------- one run
def pretrain(out, *before):
    flags = ("--width 8 --depth 1 --heads 2 --patch 20 --batch 16 --precision fp32 --threads 1 "
             "--patience 0 --steps 150")
    return begin(*before, PYTHON, CODE / "pretrain.py", *flags.split(), "--out", f"runs/{out}")

@pytest.fixture(scope="module")
def runs(home):
    """Two runs of one command: `whole` was left alone; `cut` got TERM, KILL and Ctrl-C and was
    resumed. `middle` is what Ctrl-C left: its checkpoint, and that of TERM before it."""
    whole = pretrain("whole")
    for number, step in ((signal.SIGTERM, 20), (signal.SIGKILL, 50), (signal.SIGINT, 70)):
        process = pretrain("cut")
        for line in process.stdout:
            if line.startswith("step") and int(line.split()[1]) >= step:
                break
        process.send_signal(number)
        status, output = finish(process)
        assert status == (-9 if number == signal.SIGKILL else 128 + number)
        assert ("the same command resumes" in output) == (number != signal.SIGKILL)
    shutil.copytree("runs/cut", "runs/middle")
    assert [finish(process)[0] for process in (pretrain("cut"), whole)] == [0, 0]
    return home / "runs"

def outcome(run):
    """Everything that must not depend on what happened on the way."""
    result = read(run / "result.json")
    for key in ("seconds", "windows_per_second", "versions"):
        del result[key]
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    weights = {part: b"".join(x.numpy().tobytes() for x in state[part].values())
               for part in ("model", "average", "best")}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return result, [{**json.loads(line), "seconds": 0} for line in lines], weights

def test_a_run_cut_off_at_any_moment_resumes_bit_identically(runs):
    assert outcome(runs / "cut") == outcome(runs / "whole")
    assert not list((runs / "cut").glob(".*.tmp*")), "nothing half-written is left"

def test_of_a_damaged_checkpoint_the_one_before_is_used(runs):
    checkpoint = runs / "middle/checkpoint.pt"
    state, whole = torch.load(checkpoint, weights_only=True), checkpoint.read_bytes()
    before = torch.load(runs / "middle/checkpoint.prev.pt", weights_only=True)["step"]
    weights = max(state["average"].values(), key=torch.Tensor.numel)
    (flipped := bytearray(whole))[whole.index(weights.numpy().tobytes())] ^= 1
    for name, content in (("empty", b""), ("cut short", whole[:5000]), ("one bit", flipped)):
        run = shutil.copytree(runs / "middle", runs / name)
        (run / "checkpoint.pt").write_bytes(content)
        assert load_checkpoint(run)["step"] == before < state["step"]
    status, output = finish(pretrain("one bit"))
    assert status == 0 and f"resumes at step {before}\n" in output
    assert outcome(runs / "one bit") == outcome(runs / "whole")

@pytest.mark.parametrize("fault, advice", [("no number", "lower --lr"), ("full disk", "too large")])
def test_a_run_that_cannot_go_on_says_so_and_keeps_its_checkpoint(runs, fault, advice):
    run = shutil.copytree(runs / "middle", runs / fault)
    if fault == "no number":
        state = torch.load(run / "checkpoint.pt", weights_only=True)
        for moments in state["optimizers"][-1]["state"].values():
            moments["exp_avg"].fill_(float("nan"))
        torch.save(state, run / "checkpoint.pt")
    before = (run / "checkpoint.pt").read_bytes()
    most = len(before) // 2048 if fault == "full disk" else "unlimited"           # kB of a file
    status, output = finish(pretrain(fault, "bash", "-c", f'ulimit -f {most}; "$0" "$@"'))
    assert status == 2 and advice in output and "Traceback" not in output
    assert (run / "checkpoint.pt").read_bytes() == before and not (run / "result.json").exists()
    assert not list(run.glob(".*.tmp*")), "nothing half-written is left"

def test_two_processes_get_the_losses_of_one(runs):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --no-python"
    assert finish(pretrain("two", PYTHON, *torchrun.split()))[0] == 0
    one, two = ([person["loss"] for person in read(runs / name / "result.json")["people"]]
                for name in ("whole", "two"))
    assert two == pytest.approx(one, rel=1e-3)

# ---------------------------------------------------------------- a sweep, with stand-ins
STAND_INS = {
    "data.py": """
import json, os, sys
if sys.argv[1] != "simulated": sys.exit("there is no data set " + sys.argv[1])
os.makedirs("data/simulated", exist_ok=True)
json.dump({"fingerprint": "f00d"}, open("data/simulated/meta.json", "w"), indent=1)
""",
    "pretrain.py": """
import json, os, signal, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run, steps, users = flags["--out"], int(flags["--steps"]), int(flags["--users"])
if users == 99 and not os.path.exists("many"): sys.exit("--users 99 is more than there are")
def write(name, content):
    json.dump(content, open(run + "/temporary", "w"))
    os.replace(run + "/temporary", run + "/" + name)
signals = []
signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
step, loss = json.load(open(run + "/state")) if os.path.exists(run + "/state") else (0, users)
while step < steps:
    time.sleep(.01)
    step, loss = step + 1, loss + step
    if step == steps: print("trained")
    if signals or step % 20 == 0 or step == steps: write("state", [step, loss])
    if signals: print("saved at", step), sys.exit(143)
write("result.json", {"loss": loss})
""",
    "finetune.py": """
import os, sys
result = sys.argv[1] + "/probe.json"
if not os.path.exists(result): print("probed", file=open(result, "w")), print("probed")
""",
    "fit_laws.py": ""}
GRID = dict(USERS="2 3 5", HOURS="0.1 0.2", MODELS="8x1x2", SEEDS="0", STEPS="60", JOBS="2",
            OUT="runs/my grid")
ONE_CELL = dict(USERS="2", HOURS="0.1")
CELLS = [f"u{users}-h{hours}-8x1x2-s0" for users in (2, 3, 5) for hours in (0.1, 0.2)]

@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder: with stand-ins, and a blank in its name."""
    (place := tmp_path / "a place").mkdir()
    monkeypatch.chdir(place)
    for name, text in STAND_INS.items():
        Path(name).write_text(text)
    shutil.copy(CODE / "sweep.sh", place)

def sweep(*arguments, **variables):
    return begin("bash", "sweep.sh", *arguments, **GRID | variables)

def listed(**variables):
    return finish(sweep("--list", **variables))[1].splitlines()[:-1]

def losses(folder="."):
    return {path.parent.name: read(path)["loss"]
            for path in Path(folder).glob("runs/my grid/*/result.json")}

def undisturbed(cells=CELLS, steps=60):
    """The losses of the stand-ins: each step counts, and counts once."""
    return {name: int(name[1]) + sum(range(steps)) for name in cells}

def logs():
    return [path.read_text() for path in Path().glob("runs/my grid/*/log.txt")]

def kill(process, what, luck, most):
    """SIGKILL, within `most` seconds, to a sweep and all it started, to sweep.sh alone, or to any
    one process of it."""
    time.sleep(luck.uniform(0.2, most))
    pids = subprocess.check_output(["ps", "-o", "pid=", "-s", str(process.pid)], text=True).split()
    chosen = {"all": pids, "sweep.sh": [str(process.pid)], "one": [luck.choice(pids)]}[what]
    subprocess.run(["kill", "-KILL", *chosen], stderr=subprocess.DEVNULL)
    time.sleep(0.5)
    process.terminate()
    finish(process)

@pytest.mark.parametrize("what", ["all", "sweep.sh", "one"])
def test_a_sweep_killed_at_random_moments_ends_with_the_undisturbed_losses(place, what):
    luck = random.Random(what)
    for _ in range(4):
        kill(sweep(), what, luck, 1.2)
    status, output = finish(sweep())
    assert status == 0 and losses() == undisturbed(), output
    assert all(text.count("trained") <= 1 for text in logs()), "no cell was trained twice"

@pytest.mark.slow
def test_twenty_kills_of_the_real_sweep_then_two_sweeps_at_once(home, tmp_path):
    for name in ("alone", "killed"):
        shutil.copytree(home / "data", tmp_path / name / "data")
    grid = GRID | dict(USERS="2 3 4 6", HOURS="0.02 all", STEPS="200",
                       FLAGS="--patch 20 --precision fp32")
    start = lambda name: begin("bash", CODE / "sweep.sh", cwd=tmp_path / name, **grid)
    luck = random.Random(0)
    for what in ["all", "sweep.sh", "one", "all", "one"] * 4:
        kill(start("killed"), what, luck, 20)
    for process in (start("killed"), start("killed"), start("alone")):
        assert "not done" not in finish(process)[1]
    killed, alone = (losses(tmp_path / name) for name in ("killed", "alone"))
    assert killed == alone and len(alone) == 8

@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "KILL", "USR1"])
def test_the_cells_of_a_stopped_sweep_save_and_end(place, name):
    """USR1 comes from Slurm, before a time limit: the task, not the whole array, is requeued."""
    Path("scontrol").write_text("#!/bin/sh\necho scontrol $*")
    Path("scontrol").chmod(0o755)
    task = dict(SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2", PATH=f"{Path.cwd()}:/usr/bin:/bin")
    cells, task = (1, task) if name == "USR1" else (2, {})
    process = sweep(STEPS="1000", **task)
    assert wait_for(lambda: len(list(Path().glob("runs/*/*/state"))) == cells)
    number = getattr(signal, f"SIG{name}")
    os.killpg(process.pid, number) if name == "INT" else process.send_signal(number)
    status, output = finish(process)
    assert status == {"KILL": -9, "USR1": 143}.get(name, 128 + number)
    assert wait_for(lambda: all("saved at" in text for text in logs())), output
    assert {line[:7] for line in listed(STEPS="1000")} == {"to do  "}
    assert name == "KILL" or "the same command resumes" in output
    assert ("scontrol requeue 7_2" in output) == (name == "USR1") and len(logs()) == cells

def test_two_sweeps_at_once_share_the_cells(place):
    outputs = [finish(process) for process in [sweep(), sweep()]]
    assert [status for status, _ in outputs] == [0, 0] and losses() == undisturbed(), outputs
    assert all(text.count("trained") == text.count("\nprobed") == 1 for text in logs())
    assert all(output.count("-s0: ") >= 2 for _, output in outputs), "each did some"

def test_a_failed_cell_is_reported_and_only_that_one_is_repeated(place):
    grid = ONE_CELL | {"USERS": "2 99 3"}
    status, output = finish(sweep(**grid))
    assert status == 1 and "u99-h0.1-8x1x2-s0 FAILED" in output and "2 of 3 done" in output
    assert "--users 99 is more than there are" in output
    assert [line.split()[0] for line in listed(**grid)] == ["done", "done", "failed"]
    Path("many").touch()                                           # what made it fail is gone
    assert finish(sweep(**grid))[0] == 0
    assert sorted(text.count("pretrain.py") for text in logs()) == [1, 1, 2]

def test_a_result_is_never_taken_for_that_of_other_flags_steps_or_data(place):
    assert [finish(sweep(**ONE_CELL))[0] for _ in range(2)] == [0, 0]
    assert logs()[0].count("pretrain.py") == 1, "that it is done is known without a start"
    assert listed(**ONE_CELL)[0].startswith("done ")
    assert listed(**ONE_CELL, FLAGS="--lr 0.1")[0].startswith("to do ")
    longer = ONE_CELL | {"STEPS": "90"}
    assert finish(sweep(**longer))[0] == 0
    assert losses() == undisturbed(CELLS[:1], 90), "more steps lengthen the run"
    Path("data/simulated/meta.json").write_text('{"fingerprint": "beef"}')
    assert listed(**longer)[0].startswith("to do ")

def test_list_names_each_cell_with_commands_that_run_as_they_stand(place):
    lines = listed(USERS="5 2 all", HOURS="0.1 all", FLAGS="--batch 64")
    cheapest_first = ["u2-h0.1", "u5-h0.1", "uall-h0.1", "u2-hall", "u5-hall", "uall-hall"]
    assert [line.split()[2] for line in lines] == [f"{name}-8x1x2-s0" for name in cheapest_first]
    assert "--users 5 --width 8 --depth 1 --heads 2 --seed 0 --steps 60 --batch 64" in lines[4]
    assert not Path("runs").exists() and finish(sweep())[0] == 0
    (probe := Path("runs/my grid/u2-h0.1-8x1x2-s0/probe.json")).unlink()
    subprocess.run(["bash", "-c", listed()[0].split("s0  ", 1)[1]], check=True)
    assert probe.exists()

@pytest.mark.parametrize("word, arguments, variables", [
    ("--lisst", ["--lisst"], {}), ("-2", [], {"USERS": "4 -2"}), ("64x3", [], {"MODELS": "64x3"}),
    ("*", [], {"HOURS": "0.1 *"}), ("JOBS", [], {"JOBS": "0"}), ("mine", [], {"DATA": "mine"}),
    ("no-such", [], {"PYTHON": "no-such"}), ("--array=1-6", [], {"SLURM_ARRAY_TASK_ID": "7"})])
def test_a_sweep_that_makes_no_sense_is_refused(place, word, arguments, variables):
    status, output = finish(sweep(*arguments, **variables))
    assert status == 2 and word in output and not list(Path().glob("runs/*/u*"))
