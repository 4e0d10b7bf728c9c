"""Nothing that hits a sweep loses a cell or changes a number: kills, faults, a cluster, bad grids.
sweep.sh is tried with stand-ins for what it runs, which count steps in place of learning, and with
the real ones by `python -m pytest -m slow`. One run, cut off or damaged: tests/test_pretrain.py."""
import os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pytest

from conftest import read, write

CODE = Path(__file__).parent.parent
ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
ENVIRONMENT |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
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
write("result.json", {"loss": loss, "flops": 1e6 * steps, "seconds": .01 * steps})
print(f"loss {loss:.4f}, and more")
""",
    "finetune.py": "import sys; print('probed', len(sys.argv) - 3, 'runs on', sys.argv[-1])",
    "fit_laws.py": "import sys; print('fitted', *sys.argv[1:])"}
GRID = dict(DATA="simulated", PROBES="simulated", USERS="2 3 5", HOURS="0.01 0.02", MODELS="8x1x2",
            SEEDS="0", STEPS="60", JOBS="2", OUT="runs/my grid")
CELLS = [f"u{users}-h{hours}-8x1x2-s0" for users, hours in           # the least data first
         ((2, 0.01), (3, 0.01), (2, 0.02), (5, 0.01), (3, 0.02), (5, 0.02))]

@pytest.fixture
def place(home, tmp_path, monkeypatch):
    """The working folder: data, stand-ins, and a blank in its name."""
    place = tmp_path / "a place"
    shutil.copytree(home / "data", place / "data")
    monkeypatch.chdir(place)
    for name, text in STAND_INS.items():
        write(name, text)
    for name in ("sweep.sh", "data.py"):
        shutil.copy(CODE / name, place)

def begin(*arguments, script="sweep.sh", **variables):
    """Start a sweep in a session of its own; all that it prints is one text."""
    return Popen(["bash", script, *arguments], env={**ENVIRONMENT, **GRID, **variables},
                 text=True, start_new_session=True, stdout=PIPE, stderr=STDOUT)

def finish(process):
    output = process.communicate(timeout=900)[0]
    return process.returncode, output

def sweep(*arguments, **variables):
    return finish(begin(*arguments, **variables))

def listed(**variables):
    status, output = sweep("--list", **variables)
    assert status == 0, output
    return output.splitlines()

def losses():
    return {path.parent.name: read(path)["loss"] for path in Path().glob("runs/*/*/result.json")}

def undisturbed(cells=CELLS, steps=60):
    """The losses of the stand-ins: each step counts, and counts once."""
    return {name: int(name[1]) + sum(range(steps)) for name in cells}

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
        kill(begin(), what, luck, 2)
    status, output = sweep()
    assert status == 0 and losses() == undisturbed(), output

@pytest.mark.slow
def test_ten_kills_of_the_real_sweep_then_two_sweeps_at_once(place):
    for name in ("model.py", *STAND_INS):
        shutil.copy(CODE / name, name)
    grid = dict(USERS="2 3 4 6", STEPS="200", FLAGS="--patch 20 --precision fp32")
    luck = random.Random(0)
    for what in ["all", "sweep.sh", "one", "all", "one"] * 2:
        kill(begin(**grid), what, luck, 20)
    for process in [begin(**grid), begin(**grid)]:
        assert "not done" not in finish(process)[1]
    killed = losses()
    shutil.rmtree("runs")
    assert "not done" not in sweep(**grid)[1] and losses() == killed and len(killed) == 8

def test_two_sweeps_at_once_end_with_the_losses_of_one(place):
    outputs = [finish(process) for process in [begin(), begin()]]
    assert [status for status, _ in outputs] == [0, 0] and losses() == undisturbed(), outputs

def test_a_stopped_sweep_goes_on_with_the_same_command(place):
    process = begin(STEPS="300")
    time.sleep(2.5)
    os.killpg(process.pid, signal.SIGINT)                          # Ctrl-C, as a terminal sends it
    assert finish(process)[0] != 0 and len(losses()) < 6
    assert sweep(STEPS="300")[0] == 0 and losses() == undisturbed(steps=300)

def test_a_line_for_each_cell_then_all_probes_at_once_then_the_law(place):
    status, output = sweep(JOBS="1")
    lines = output.splitlines()
    assert status == 0 and [line.split()[0] for line in lines[:6]] == [*"123456"]
    assert lines[0].startswith("1 of 6, ") and lines[0].endswith(
        " min left: u2-h0.01-8x1x2-s0 loss 1772.0000")
    assert lines[6:] == ["probed 6 runs on simulated", "fitted runs/my grid --out results/my grid"]
    assert sweep(JOBS="1")[1].splitlines() == lines[6:], "and no cell"

def test_a_failed_cell_is_reported_with_its_reason_and_the_others_are_done(place):
    Path("no five").touch()
    status, output = sweep()
    assert status == 1 and len(losses()) == 4 and "fitted" not in output
    assert output.count("FAILED, see runs/my grid/u5-h0.0") == 2
    assert output.count("pretrain.py: five is too many") == 2
    assert [line[:6] for line in listed()[:6]] == [
        "failed" if cell.startswith("u5") else "done  " for cell in CELLS]
    Path("no five").unlink()                                       # what made it fail is gone
    status, output = sweep()
    assert status == 0 and losses() == undisturbed() and output.count("min left: u5") == 2

def test_a_result_is_never_taken_for_that_of_other_flags_or_steps(place):
    cell = dict(USERS="2", HOURS="0.01")
    assert sweep(**cell)[0] == 0 and listed(**cell)[0].startswith("done ")
    assert listed(**cell, FLAGS="--lr 0.1")[0].startswith("to do ")
    assert sweep(**cell, STEPS="90")[0] == 0
    assert losses() == undisturbed(CELLS[:1], 90), "more steps lengthen the run"
    Path("runs/my grid", CELLS[0], "result.json").unlink()
    assert listed(**cell, STEPS="90")[0].startswith("to do ")

def test_list_has_each_cell_with_a_command_that_runs_as_it_stands_and_what_all_costs(place):
    *lines, cost = listed(USERS="5 2", HOURS="0.01", MODELS="8x1x2 16x1x2")
    assert [line.split()[2] for line in lines] == [
        f"u{users}-h0.01-{model}-s0" for users in (2, 5) for model in ("8x1x2", "16x1x2")]
    assert cost.startswith("4 cells, about ") and not Path("runs").exists()
    subprocess.run(["bash", "-c", lines[0].split("s0  ", 1)[1]], check=True)
    assert losses() == undisturbed(CELLS[:1])
    *lines, _ = listed(USERS="2 4", TOTAL="0.04 0.08")             # shared among the users
    assert [line.split()[2] for line in lines] == [
        f"{cell}-8x1x2-s0" for cell in ("u2-h0.02", "u4-h0.01", "u2-h0.04", "u4-h0.02")]

@pytest.mark.parametrize("words, variables", [
    ("users -2", {"USERS": "4 -2"}), ("hours *", {"HOURS": "0.01 *"}), ("mine", {"DATA": "mine"}),
    ("model 64x3", {"MODELS": "64x3"}), ("JOBS 0", {"JOBS": "0"}), ("nope", {"PYTHON": "nope"}),
    ("invalid choice", {"DATA": "simulated+a"}), ("there are 10 to train on", {"USERS": "4 11"}),
    ("nobody has more than 0.0500", {"HOURS": "0.01 0.06"}), ("--lisst", {}),
    ("nobody has more than 0.0500", {"TOTAL": "0.12"}),
    ("no cell 7 of 6", {"SLURM_ARRAY_TASK_ID": "7"}),
    ("no cell 0 of 6", {"SLURM_ARRAY_TASK_ID": "0"})])
def test_a_grid_that_makes_no_sense_is_refused_before_its_first_cell(place, words, variables):
    status, output = sweep(*["--lisst"] * (words == "--lisst"), **variables)
    assert status == 2 and words in output and not list(Path().glob("runs/*/u*")), output

def test_a_task_of_a_job_array_does_its_own_cell_from_a_copy_of_the_script(place):
    """Slurm runs a copy of sweep.sh that stands elsewhere, in the folder of `sbatch`."""
    shutil.copy("sweep.sh", copy := Path("../slurm_script"))
    slurm = dict(SLURM_SUBMIT_DIR=str(Path.cwd()), SLURM_CPUS_ON_NODE="1")
    for task, cell in enumerate(CELLS, start=1):
        status, output = sweep(script=copy, SLURM_ARRAY_TASK_ID=str(task), **slurm)
        assert status == 0 and "probed" not in output and len(losses()) == task and cell in losses()
    status, output = sweep()
    assert status == 0 and "fitted" in output and losses() == undisturbed()
