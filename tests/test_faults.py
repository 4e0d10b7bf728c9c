"""Nothing that hits a sweep loses a cell or changes a number: kills, faults, a cluster, bad grids.

sweep.sh is tried with stand-ins for pretrain.py, finetune.py and fit_laws.py, which count steps in
place of learning, and with the real ones by `python -m pytest -m slow`. One run that is cut off or
damaged: tests/test_pretrain.py.
"""
import os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pytest

from conftest import read

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

# ---------------------------------------------------------------- a sweep, with stand-ins
STAND_INS = {
    "pretrain.py": """
import json, os, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run, steps, users = flags["--out"], int(flags["--steps"]), int(flags["--users"])
if users == 5 and os.path.exists("no five"): sys.exit("pretrain.py: five is too many")
os.makedirs(run, exist_ok=True)
def write(name, content):
    json.dump(content, open(f"{run}/temporary{os.getpid()}", "w"), indent=1)
    os.replace(f"{run}/temporary{os.getpid()}", f"{run}/{name}")
step, loss = json.load(open(run + "/state")) if os.path.exists(run + "/state") else (0, users)
while step < steps:
    time.sleep(.01)
    step, loss = step + 1, loss + step
    if step % 20 == 0 or step == steps: write("state", [step, loss])
    if step == steps: print("trained")
write("result.json", {"loss": loss, "flops": 1e6 * steps, "seconds": .01 * steps})
print(f"loss {loss:.4f}, and more")
""",
    "finetune.py": """
import sys
print("probed", len(sys.argv) - 3, "runs on", sys.argv[-1])
""",
    "fit_laws.py": """
import sys
print("fitted", *sys.argv[1:])
"""}
GRID = dict(DATA="simulated", PROBES="simulated", USERS="2 3 5", HOURS="0.01 0.02", MODELS="8x1x2",
            SEEDS="0", STEPS="60", JOBS="2", OUT="runs/my grid")
ONE_CELL = dict(USERS="2", HOURS="0.01")
CELLS = [f"u{users}-h{hours}-8x1x2-s0" for users, hours in           # the least data first
         ((2, 0.01), (3, 0.01), (2, 0.02), (5, 0.01), (3, 0.02), (5, 0.02))]

@pytest.fixture
def place(home, tmp_path, monkeypatch):
    """The working folder: data, stand-ins, and a blank in its name."""
    place = tmp_path / "a place"
    shutil.copytree(home / "data", place / "data")
    monkeypatch.chdir(place)
    for name, text in STAND_INS.items():
        Path(name).write_text(text)
    for name in ("sweep.sh", "data.py"):
        shutil.copy(CODE / name, place)

def sweep(*arguments, **variables):
    return begin("bash", "sweep.sh", *arguments, **GRID | variables)

def listed(**variables):
    status, output = finish(sweep("--list", **variables))
    assert status == 0, output
    return output.splitlines()

def losses(folder="."):
    return {path.parent.name: read(path)["loss"]
            for path in Path(folder).glob("runs/my grid/*/result.json")}

def undisturbed(cells=CELLS, steps=60):
    """The losses of the stand-ins: each step counts, and counts once."""
    return {name: int(name[1]) + sum(range(steps)) for name in cells}

def starts():
    """How often each cell's log says that it was trained to its end."""
    return [path.read_text().count("trained") for path in Path().glob("runs/my grid/*/log.txt")]

def kill(process, what, luck, most):
    """SIGKILL, within `most` seconds, to a sweep and all it started, to sweep.sh alone, or to any
    one process of it. What is left of the sweep ends by itself, or with the next kill."""
    time.sleep(luck.uniform(0.2, most))
    listing = subprocess.check_output(["ps", "-o", "pid=", "-s", str(process.pid)], text=True)
    chosen = {"all": listing.split(), "sweep.sh": [str(process.pid)],
              "one": [luck.choice(listing.split())]}[what]
    subprocess.run(["kill", "-KILL", *chosen], stderr=subprocess.DEVNULL)
    time.sleep(0.3)
    if luck.random() < 0.5:                            # else the next sweep meets what is left
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)])

@pytest.mark.parametrize("what", ["all", "sweep.sh", "one"])
def test_a_sweep_killed_at_random_moments_ends_with_the_undisturbed_losses(place, what):
    luck = random.Random(what)
    for _ in range(4):
        kill(sweep(), what, luck, 2)
    status, output = finish(sweep())
    assert status == 0 and losses() == undisturbed(), output

@pytest.mark.slow
def test_ten_kills_of_the_real_sweep_then_two_sweeps_at_once(home, tmp_path):
    for name in ("alone", "killed"):
        shutil.copytree(home / "data", tmp_path / name / "data")
    grid = GRID | dict(USERS="2 3 4 6", STEPS="200", FLAGS="--patch 20 --precision fp32")
    start = lambda name: begin("bash", CODE / "sweep.sh", cwd=tmp_path / name, **grid)
    luck = random.Random(0)
    for what in ["all", "sweep.sh", "one", "all", "one"] * 2:
        kill(start("killed"), what, luck, 20)
    for process in (start("killed"), start("killed"), start("alone")):
        assert "not done" not in finish(process)[1]
    killed, alone = (losses(tmp_path / name) for name in ("killed", "alone"))
    assert killed == alone and len(alone) == 8

def test_two_sweeps_at_once_end_with_the_losses_of_one(place):
    outputs = [finish(process) for process in [sweep(), sweep()]]
    assert [status for status, _ in outputs] == [0, 0] and losses() == undisturbed(), outputs

def test_a_stopped_sweep_goes_on_with_the_same_command(place):
    process = sweep(STEPS="300")
    time.sleep(2.5)
    os.killpg(process.pid, signal.SIGINT)                          # Ctrl-C, as a terminal sends it
    assert finish(process)[0] != 0 and len(losses()) < 6
    assert finish(sweep(STEPS="300"))[0] == 0 and losses() == undisturbed(steps=300)

# ---------------------------------------------------------------- what it says
def test_a_line_for_each_cell_then_all_probes_at_once_then_the_law(place):
    status, output = finish(sweep(JOBS="1"))
    lines = output.splitlines()
    assert status == 0 and lines[-1] == "fitted runs/my grid --out results/my grid"
    assert lines[-2] == "probed 6 runs on simulated"
    assert lines[0].startswith("1 of 6, ") and lines[0].endswith(
        " min left: loss 1772.0000, 2 users x 36 s, seed 0")
    assert [line.split()[0] for line in lines[:6]] == [str(n) for n in range(1, 7)]
    again = finish(sweep(JOBS="1"))[1].splitlines()
    assert again == lines[-2:] and starts() == [1] * 6, "and no start"

def test_a_failed_cell_is_reported_with_its_reason_and_the_others_are_done(place):
    Path("no five").touch()
    status, output = finish(sweep())
    assert status == 1 and len(losses()) == 4 and "fitted" not in output
    assert output.count("FAILED, see runs/my grid/u5-h0.0") == 2
    assert output.count("pretrain.py: five is too many") == 2
    assert {line.split()[1]: line[:6] for line in listed()[:6]} == {
        cell: "failed" if cell.startswith("u5") else "done  " for cell in CELLS}
    Path("no five").unlink()                                       # what made it fail is gone
    assert finish(sweep())[0] == 0 and losses() == undisturbed() and starts() == [1] * 6

def test_a_result_is_never_taken_for_that_of_other_flags_or_steps(place):
    assert finish(sweep(**ONE_CELL))[0] == 0
    assert listed(**ONE_CELL)[0].startswith("done ")
    assert listed(**ONE_CELL, FLAGS="--lr 0.1")[0].startswith("to do ")
    longer = ONE_CELL | {"STEPS": "90"}
    assert finish(sweep(**longer))[0] == 0
    assert losses() == undisturbed(CELLS[:1], 90), "more steps lengthen the run"
    Path("runs/my grid", CELLS[0], "result.json").unlink()
    assert listed(**longer)[0].startswith("to do ")

def test_list_has_each_cell_with_a_command_that_runs_as_it_stands_and_what_all_costs(place):
    lines = listed(USERS="5 2", HOURS="0.01", MODELS="8x1x2 16x1x2")
    assert [line.split()[2] for line in lines[:-1]] == [
        f"u{users}-h0.01-{model}-s0" for users in (2, 5) for model in ("8x1x2", "16x1x2")]
    assert lines[-1].startswith("4 cells, 2e+08 FLOPs, about ")
    assert not Path("runs").exists()
    subprocess.run(["bash", "-c", lines[0].split("s0  ", 1)[1]], check=True)
    assert losses() == undisturbed(CELLS[:1])

def test_total_shares_the_hours_among_the_users(place):
    names = [line.split()[2] for line in listed(USERS="2 4 8", TOTAL="0.04 0.08")[:-1]]
    assert names == [f"u{users}-h{hours}-8x1x2-s0" for total in (0.04, 0.08) for users, hours in
                     ((2, total / 2), (4, total / 4), (8, total / 8))]

@pytest.mark.parametrize("words, arguments, variables", [
    ("--lisst", ["--lisst"], {}), ("users -2", [], {"USERS": "4 -2"}), ("JOBS 0", [], {"JOBS": "0"}),
    ("model 64x3", [], {"MODELS": "64x3"}), ("hours *", [], {"HOURS": "0.01 *"}),
    ("there are 10 to train on", [], {"USERS": "4 11"}), ("invalid choice", [], {"DATA": "simulated+a"}),
    ("nobody has more than 0.0500", [], {"HOURS": "0.01 0.06"}), ("mine", [], {"DATA": "mine"}),
    ("nobody has more than 0.0500", [], {"TOTAL": "0.12"}), ("no-such", [], {"PYTHON": "no-such"}),
    ("no cell 7 of 6", [], {"SLURM_ARRAY_TASK_ID": "7"}),
    ("no cell 0 of 6", [], {"SLURM_ARRAY_TASK_ID": "0"})])
def test_a_grid_that_makes_no_sense_is_refused_before_its_first_cell(place, words, arguments, variables):
    status, output = finish(sweep(*arguments, **variables))
    assert status == 2 and words in output and not list(Path().glob("runs/*/u*")), output

# ---------------------------------------------------------------- a cluster
def test_a_task_of_a_job_array_does_its_own_cell_from_a_copy_of_the_script(place):
    """Slurm runs a copy of sweep.sh that stands elsewhere, in the folder of `sbatch`."""
    shutil.copy("sweep.sh", copy := Path("../slurm_script"))
    for task, cell in enumerate(CELLS, start=1):
        status, output = finish(begin("bash", copy, **GRID, SLURM_ARRAY_TASK_ID=str(task),
                                      SLURM_SUBMIT_DIR=str(Path.cwd()), SLURM_CPUS_ON_NODE="1"))
        assert status == 0 and "probed" not in output and len(losses()) == task and cell in losses()
    status, output = finish(sweep())
    assert status == 0 and "fitted" in output and losses() == undisturbed()
