"""Nothing that hits a run or a sweep loses a cell or changes a number: kills, faults, two at once, a cluster.

A run of pretrain.py is cut off, torn and starved for real. What sweep.sh does with its cells is shown on stand-ins
for the four scripts, which count steps instead of learning; with the real ones it is killed 20 times by
`python -m pytest -m slow`.
"""
import contextlib
import csv
import fcntl
import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import pretrain

CODE = Path(pretrain.__file__).parent
KEPT = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
ENVIRONMENT = {**{name: os.environ[name] for name in KEPT if name in os.environ},
               "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
SHAPE = ["--patch", "20", "--batch", "16", "--decoder-width", "16", "--precision", "fp32"]
TINY = ["--width", "8", "--depth", "1", "--heads", "2", *SHAPE,
        "--threads", "1", "--device", "cpu", "--steps", "300"]


# ---------------------------------------------------------------- one run
@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small simulated set in data/, where the commands run."""
    home = tmp_path_factory.mktemp("home")
    words = ["simulated", "--users", "8", "--hours-per-user", "0.05"]
    subprocess.run([sys.executable, CODE / "data.py", *words], cwd=home, check=True)
    return home


def start(home, out, *flags):
    words = [sys.executable, CODE / "pretrain.py", *TINY, *flags, "--out", out]
    return subprocess.Popen(words, cwd=home, env=ENVIRONMENT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def interrupt(home, out, number, step):
    """Run the command until it prints a step of `step` or later, send it the signal: exit status and stderr."""
    process = start(home, out)
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1].split("/")[0]) >= step:
            process.send_signal(number)
            break
    return process.wait(), process.communicate()[1]


def inside(monkeypatch, capsys, home, out, *flags):
    """The same command inside this process, which saves its start: exit status and stderr."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *TINY, *flags, "--out", str(out)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    try:
        data.command(pretrain.main)
    except SystemExit as left:
        status = left.code or 0
    gc.collect()                                                 # closes what the traceback held: the run's lock
    return status, capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(home):
    """Two runs of one command: `whole` was left alone; `cut` got TERM, KILL and Ctrl-C, then went on. `middle` is
    what lay on disk before that last start: the checkpoint of Ctrl-C, and the one of TERM before it."""
    whole = start(home, "runs/whole")
    said = {number: interrupt(home, "runs/cut", number, step)
            for number, step in ((signal.SIGTERM, 30), (signal.SIGKILL, 90), (signal.SIGINT, 120))}
    shutil.copytree(home / "runs/cut", home / "runs/middle")
    last = start(home, "runs/cut")
    assert (whole.wait(), last.wait()) == (0, 0)
    return said


def outcome(run):
    """Everything that must not depend on what happened on the way."""
    result = json.loads((run / "result.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    tensors = {f"{part}.{name}": tensor.tolist()
               for part in ("model", "best") for name, tensor in state[part].items()}
    return result["loss"], result["loss_last"], [{**line, "seconds": None} for line in lines], tensors


def test_a_run_cut_off_at_any_moment_goes_on_to_the_same_bits(home, runs):
    assert runs[signal.SIGTERM][0] == 128 + 15 and runs[signal.SIGINT][0] == 128 + 2
    assert runs[signal.SIGKILL][0] == -9
    assert "the same command goes on" in runs[signal.SIGTERM][1] and "saved" in runs[signal.SIGINT][1]
    assert outcome(home / "runs/cut") == outcome(home / "runs/whole")
    assert not list((home / "runs/cut").glob(".*.tmp*")), "nothing half-written is left"


@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty"])
def test_of_a_torn_checkpoint_the_one_before_is_used(home, runs, tmp_path, damage):
    run = shutil.copytree(home / "runs/middle", tmp_path / "run")
    names = ("checkpoint.pt", "checkpoint.prev.pt")
    newest, before = (torch.load(run / name, weights_only=True)["step"] for name in names)
    content = bytearray((run / "checkpoint.pt").read_bytes())
    if damage == "one bit":
        content[content.index(b"model/data/0") + 400 if b"model/data/0" in content else len(content) // 2] ^= 1
    left = {"cut short": content[:len(content) // 2], "one bit": content, "empty": b""}[damage]
    (run / "checkpoint.pt").write_bytes(left)
    assert pretrain.load_checkpoint(run)["step"] == before < newest
    (run / "checkpoint.prev.pt").write_bytes(b"")
    with pytest.raises(data.Refused, match="no checkpoint in .* can be read"):
        pretrain.load_checkpoint(run)


def test_a_run_goes_on_from_the_checkpoint_before_a_torn_one_to_the_same_bits(home, runs, monkeypatch, capsys):
    run = shutil.copytree(home / "runs/middle", home / "runs/torn")
    os.truncate(run / "checkpoint.pt", 5000)
    assert inside(monkeypatch, capsys, home, "runs/torn")[0] == 0
    assert outcome(run) == outcome(home / "runs/whole")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
        home, runs, monkeypatch, capsys):
    run = shutil.copytree(home / "runs/middle", home / "runs/nan")
    schedule, step = pretrain.schedule, pretrain.load_checkpoint(run)["step"]
    broken = lambda at, steps: float("nan") if at == step + 3 else schedule(at, steps)
    monkeypatch.setattr(pretrain, "schedule", broken)
    status, said = inside(monkeypatch, capsys, home, "runs/nan")
    assert status == 2 and f"nan at step {step + 5}" in said and "--lr" in said
    assert pretrain.load_checkpoint(run)["step"] == step and not (run / "result.json").exists()


def test_data_that_changed_under_a_run_are_noticed(home, runs, tmp_path, monkeypatch, capsys):
    shutil.copytree(home / "data", tmp_path / "data")
    shutil.copytree(home / "runs/middle", tmp_path / "runs/middle")
    with open(tmp_path / "data/simulated/windows.npy", "r+b") as file:
        file.seek(5000)
        file.write(b"other people's data")
    status, said = inside(monkeypatch, capsys, tmp_path, "runs/middle")
    assert status == 2 and "changed after it was prepared" in said
    meta = json.loads((home / "data/simulated/meta.json").read_text())
    arrays = (data.np.load(tmp_path / f"data/simulated/{part}.npy") for part in ("windows", "users", "labels"))
    meta["fingerprint"] = data.fingerprint(*arrays)              # as if prepared anew from other recordings
    (tmp_path / "data/simulated/meta.json").write_text(json.dumps(meta))
    status, said = inside(monkeypatch, capsys, tmp_path, "runs/middle")
    assert status == 2 and "holds another run (fingerprint" in said


def test_a_run_that_another_process_works_on_is_left_alone(home, runs, monkeypatch, capsys):
    run = shutil.copytree(home / "runs/middle", home / "runs/busy")
    with open(run / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert inside(monkeypatch, capsys, home, "runs/busy")[0] == pretrain.BUSY


def test_two_processes_get_the_loss_of_one(home, monkeypatch, capsys):
    flags = ["--steps", "40", "--optimizer", "adamw"]            # Muon multiplies in bf16: roundings would grow
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    words = [sys.executable, *torchrun, CODE / "pretrain.py", *TINY, *flags, "--out", "runs/two"]
    two = subprocess.run(words, cwd=home, env=ENVIRONMENT, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert inside(monkeypatch, capsys, home, "runs/one", *flags)[0] == 0
    one, two = (json.loads((home / "runs" / name / "result.json").read_text()) for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["loss_last"] == pytest.approx(one["loss_last"], rel=1e-4)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of the size that `resize(bytes)` gives it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small file system can't be mounted here: {made.stderr.strip()}")
    try:
        yield disk, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_stops_a_run_in_a_sentence_and_loses_nothing(home, runs, small_disk, monkeypatch, capsys):
    disk, resize = small_disk
    for name in ("config.json", "checkpoint.pt"):
        shutil.copy(home / "runs/middle" / name, disk)
    resize(int((disk / "checkpoint.pt").stat().st_size * 1.6))   # room for this checkpoint, not for a second
    step = pretrain.load_checkpoint(disk)["step"]
    status, said = inside(monkeypatch, capsys, home, disk)
    assert status == 2 and "No space left" in said and len(said.strip().splitlines()) == 1
    assert pretrain.load_checkpoint(disk)["step"] == step and not list(disk.glob(".*.tmp*"))
    resize(8 << 20)
    assert inside(monkeypatch, capsys, home, disk)[0] == 0
    assert outcome(disk) == outcome(home / "runs/whole")


# ---------------------------------------------------------------- a sweep, from data to laws
def sweep(code, home, *arguments, **variables):
    """Start `bash sweep.sh`, with everything it says in one text, in a process group of its own."""
    environment = {**ENVIRONMENT, "JOBS": "2", **variables}
    return subprocess.Popen(["bash", code / "sweep.sh", *arguments], cwd=home, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(process):
    said = process.communicate(timeout=900)[0]
    return process.returncode, said


def table(home, out="grid"):
    with open(home / "results" / out / "results.csv") as file:
        return {row["name"]: {key: value for key, value in row.items() if "second" not in key}
                for row in csv.DictReader(file)}


def test_a_sweep_goes_from_data_to_a_table_and_with_enough_cells_to_a_law(tmp_path, home):
    shutil.copytree(home / "data", tmp_path / "data")
    flags = " ".join([*SHAPE, "--evaluations", "2"])
    grid = dict(HOURS="all", MODELS="8x1x2", STEPS="30", FLAGS=flags, OUT="runs/grid")
    status, said = finish(sweep(CODE, tmp_path, USERS="2 4", **grid))
    assert status == 0, said
    assert [row["users"] for row in table(tmp_path).values()] == ["2", "4"], said
    first = (tmp_path / "runs/grid/u2-hall-8x1x2-s0/result.json").stat().st_mtime_ns
    status, said = finish(sweep(CODE, tmp_path, USERS="1 2 3 4 6", **grid))
    laws = json.loads((tmp_path / "results/grid/laws.json").read_text())
    assert status == 0 and laws["laws"][0]["x"] == ["users"] and "users" in said
    rows = table(tmp_path)
    assert len(rows) == 5 and all(0 <= float(row["simulated_macro_f1"]) <= 1 for row in rows.values())
    again = (tmp_path / "runs/grid/u2-hall-8x1x2-s0/result.json").stat().st_mtime_ns
    assert again == first, "what is done is not done again"


# ---------------------------------------------------------------- what sweep.sh does with cells, on stand-ins
STAND_INS = {
    "data.py": """
import json, os, sys
if sys.argv[1] != "simulated": sys.exit(f"there is no data set '{sys.argv[1]}'")
os.makedirs("data/simulated", exist_ok=True)
json.dump({"fingerprint": "f00d"}, open("data/simulated/meta.json", "w"), indent=1)
""",
    "pretrain.py": """
import fcntl, json, os, signal, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run, config = flags["--out"], " ".join(v for k, v in flags.items() if k not in ("--out", "--threads"))
print("started", file=open(run + "/starts", "a"))
lock = open(run + "/.lock", "w")
try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: sys.exit(75)
if flags["--users"] == "99" and not os.path.exists("many"): print("--users 99 is more than there are"), sys.exit(2)
def write(name, text):
    open(run + "/temporary", "w").write(text); os.replace(run + "/temporary", run + "/" + name)
if not os.path.exists(run + "/config"): write("config", config)
if open(run + "/config").read() != config: print("holds another run"), sys.exit(2)
if os.path.exists(run + "/result.json"): sys.exit(0)
got = []
signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
step, loss = json.load(open(run + "/state")) if os.path.exists(run + "/state") else (0, int(flags["--users"]))
while step < int(flags["--steps"]):
    time.sleep(.01)
    step, loss = step + 1, (31 * loss + step) % 9973
    if got or step % 20 == 0: write("state", json.dumps([step, loss]))
    if got: print("saved at", step), sys.exit(143)
write("result.json", json.dumps({"loss": loss}, indent=1))
print(run, file=open("trained", "a"))
""",
    "finetune.py": """
import fcntl, os, sys, time
os.makedirs(sys.argv[1] + "/finetune", exist_ok=True)
fcntl.flock(lock := open(sys.argv[1] + "/finetune/lock", "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
result = sys.argv[1] + "/finetune/" + sys.argv[3] + "-probe.json"
if os.path.exists(result): sys.exit(0)
time.sleep(.1)
open(result, "w").write("{}")
print(sys.argv[1], file=open("probed", "a"))
""",
    "fit_laws.py": """
import glob, json, os, sys
os.makedirs(sys.argv[3], exist_ok=True)
paths = sorted(glob.glob(sys.argv[1] + "/*/result.json"))
rows = [(path.split("/")[2], json.load(open(path))["loss"]) for path in paths]
open(sys.argv[3] + "/results.csv", "w").write("name,loss\\n" + "".join(f"{n},{l}\\n" for n, l in rows))
"""}
GRID = dict(USERS="2 3 5", HOURS="0.1 0.2", MODELS="8x1x2", STEPS="60", OUT="runs/grid")


@pytest.fixture
def stand_ins(tmp_path):
    """A folder with sweep.sh and the stand-ins, and an empty one to run in."""
    (code := tmp_path / "code").mkdir()
    (home := tmp_path / "home").mkdir()
    for name, text in STAND_INS.items():
        (code / name).write_text(text)
    shutil.copy(CODE / "sweep.sh", code)
    return code, home


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def worked_on(home):
    """The cells whose lock somebody holds."""
    busy = []
    for path in home.glob("runs/grid/*/.sweep"):
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                busy.append(path.parent.name)
    return busy


def steps_of(cell):
    return json.loads((cell / "state").read_text())[0] if (cell / "state").exists() else 0


def wait_for(condition, seconds=60):
    for _ in range(int(seconds / 0.05)):
        if condition():
            return True
        time.sleep(0.05)
    return False


def undisturbed(users, hours=("0.1", "0.2"), steps=60):
    """The stand-ins' table: their loss depends on every step, and on the order of the steps."""
    rows = {}
    for user in users:
        loss = user
        for step in range(steps):
            loss = (31 * loss + step) % 9973
        rows |= {f"u{user}-h{h}-8x1x2-s0": {"name": f"u{user}-h{h}-8x1x2-s0", "loss": str(loss)} for h in hours}
    return rows


def kill(process, what, luck):
    """SIGKILL to a sweep and all its children, to it alone, or to one process of them, whichever."""
    if what == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif what == "sweep.sh":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError):             # it has just ended by itself
            members = [int(path.name) for path in Path("/proc").glob("[0-9]*")
                       if path.exists() and os.getpgid(int(path.name)) == process.pid]
            os.kill(luck.choice(members or [process.pid]), signal.SIGKILL)
            time.sleep(1)
        process.terminate()
    process.stdout.close()
    process.wait()


NO_PROC = pytest.mark.skipif(not Path("/proc/1").exists(), reason="no /proc here")


@pytest.mark.parametrize("what", ["all", "sweep.sh", pytest.param("one", marks=NO_PROC)])
def test_a_sweep_killed_at_random_moments_ends_with_the_table_of_an_undisturbed_one(stand_ins, what):
    code, home = stand_ins
    luck = random.Random(what)
    for _ in range(4):
        process = sweep(code, home, **GRID)
        time.sleep(luck.uniform(0.1, 1.0))
        kill(process, what, luck)
    status, said = finish(sweep(code, home, **GRID))
    assert status == 0 and table(home) == undisturbed([2, 3, 5]), said
    assert wait_for(lambda: not worked_on(home))


def test_what_a_killed_sweep_was_running_saves_and_ends(stand_ins):
    code, home = stand_ins
    process = sweep(code, home, **{**GRID, "STEPS": "3000"})
    assert wait_for(lambda: len(list(home.glob("runs/grid/*/config"))) == 2)
    process.kill()
    assert wait_for(lambda: not worked_on(home), 10), "without a sweep, nothing goes on in the background"
    assert all("saved at" in lines(log)[-1] for log in home.glob("runs/grid/*/log.txt"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_sweep_that_is_told_to_stop_lets_its_cells_save(stand_ins, number):
    code, home = stand_ins
    process = sweep(code, home, **GRID)
    assert wait_for(lambda: len(list(home.glob("runs/grid/*/config"))) == 2)
    # a terminal tells all
    process.send_signal(number) if number == signal.SIGTERM else os.killpg(process.pid, number)
    status, said = finish(process)
    assert status == 128 + number and "the same command goes on" in said and not worked_on(home)
    assert any(map(steps_of, home.glob("runs/grid/*"))) and not list(home.glob("runs/grid/*/failed"))
    status, said = finish(sweep(code, home, **GRID))
    assert status == 0 and table(home) == undisturbed([2, 3, 5]), said


def test_two_sweeps_at_once_share_the_cells(stand_ins):
    code, home = stand_ins
    both = [sweep(code, home, **GRID) for _ in range(2)]
    said = [finish(process) for process in both]
    assert [status for status, _ in said] == [0, 0], said
    cells = sorted(f"runs/grid/{name}" for name in undisturbed([2, 3, 5]))
    assert sorted(lines(home / "trained")) == sorted(lines(home / "probed")) == cells
    assert all(": loss " in text for _, text in said), "each did some"


def test_a_failed_cell_is_reported_and_only_that_one_is_repeated(stand_ins):
    code, home = stand_ins
    grid = {**GRID, "USERS": "2 99 3", "HOURS": "0.1"}
    status, said = finish(sweep(code, home, **grid))
    assert status == 1 and "u99-h0.1-8x1x2-s0: FAILED" in said and "--users 99 is more than there are" in said
    others = ["runs/grid/u2-h0.1-8x1x2-s0", "runs/grid/u3-h0.1-8x1x2-s0"]
    assert sorted(lines(home / "trained")) == others, "the others went on"
    assert "failed" in finish(sweep(code, home, "--list", **grid))[1]
    (home / "many").touch()                                       # what made it fail is gone
    status, said = finish(sweep(code, home, **grid))
    assert status == 0 and "3 of 3 done" in said
    assert [len(lines(home / f"runs/grid/u{u}-h0.1-8x1x2-s0/starts")) for u in (2, 3, 99)] == [1, 1, 2]


def test_a_result_is_never_taken_for_that_of_other_flags_or_other_data(stand_ins):
    code, home = stand_ins
    grid = {**GRID, "USERS": "2", "HOURS": "0.1"}
    assert finish(sweep(code, home, **grid))[0] == 0
    for change in ({"STEPS": "61"}, {"FLAGS": "--lr 0.1"}):
        status, said = finish(sweep(code, home, **{**grid, **change}))
        assert status == 1 and "holds another run" in said
    assert [finish(sweep(code, home, **grid))[0] for _ in range(2)] == [0, 0] and len(lines(home / "trained")) == 1
    starts = lines(home / "runs/grid/u2-h0.1-8x1x2-s0/starts")
    assert len(starts) == 4, "that it is done is seen without starting pretrain.py"
    (home / "data/simulated/meta.json").write_text('{"fingerprint": "beef"}')
    assert "to do" in finish(sweep(code, home, "--list", **grid))[1]


def test_list_names_each_cell_with_its_commands_and_touches_nothing(stand_ins):
    code, home = stand_ins
    grid = {**GRID, "HOURS": "0.1 all", "FLAGS": "--batch 64"}
    listed = finish(sweep(code, home, "--list", **grid))[1].splitlines()[:-1]
    assert len(listed) == 6 and not list(home.iterdir())
    assert "pretrain.py --out runs/grid/u2-hall-8x1x2-s0" in listed[1]
    assert "--hours" not in listed[1] and "--batch 64" in listed[1]
    assert "finetune.py runs/grid/u2-hall-8x1x2-s0 --data simulated --mode probe" in listed[1]
    assert "to do" in listed[1]


@pytest.mark.parametrize("arguments, variables, word", [
    (["--lisst"], {}, "--lisst"), (["--list", "all"], {}, "--list all"), ([], {"USERS": "4 -2"}, "-2"),
    ([], {"MODELS": "64x3"}, "64x3"), ([], {"HOURS": "0.1 *"}, "*"), ([], {"JOBS": "0"}, "JOBS"),
    ([], {"DATA": "../data"}, "../data"), ([], {"DATA": "mine"}, "mine"),
    ([], {"PYTHON": "no-such-python"}, "no-such-python")])
def test_a_sweep_that_makes_no_sense_is_refused(stand_ins, arguments, variables, word):
    code, home = stand_ins
    status, said = finish(sweep(code, home, *arguments, **{**GRID, **variables}))
    assert status == 2 and word in said and not list(home.iterdir())


@pytest.mark.slow
def test_twenty_kills_of_the_real_thing_then_two_sweeps_at_once(home, tmp_path):
    """With -s it prints each kill, and the loss of each cell in both tables."""
    flags = " ".join([*SHAPE, "--evaluations", "5"])
    grid = dict(USERS="2 3 4 6", HOURS="0.02 all", MODELS="8x1x2", STEPS="1500", OUT="runs/grid", FLAGS=flags)
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for folder in (alone, killed):
        shutil.copytree(home / "data", folder / "data")
    began = time.monotonic()
    status, said = finish(sweep(CODE, alone, **grid))
    assert status == 0, said
    took, luck = time.monotonic() - began, random.Random(0)
    for number in range(20):
        process = sweep(CODE, killed, **grid)
        time.sleep(after := luck.uniform(0.02, 0.25) * took)
        kill(process, what := ("all", "sweep.sh", "one")[number % 3], luck)
        done = len(list(killed.glob("runs/grid/*/result.json")))
        print(f"kill {number + 1:2d}, of {what}, after {after:.1f} s: {done} of 8 cells have a result", flush=True)
    both = [sweep(CODE, killed, **grid) for _ in range(2)]
    said = [finish(process) for process in both]
    assert [status for status, _ in said] == [0, 0], said
    for name, row in table(alone).items():
        print(name, row["loss"], table(killed)[name]["loss"], flush=True)
    assert table(alone) == table(killed) and len(table(alone)) == 8


# ---------------------------------------------------------------- on a cluster
def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def slurm(tmp_path):
    """A Slurm of one node with its own munge, for one test: calls its commands, returns what they say."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=path)]
    if missing or os.geteuid():
        needed = f"not installed: {', '.join(missing)} (Debian: slurm-wlm munge)"
        pytest.skip(needed if missing else "slurmd is root's")
    node, conf = socket.gethostname().split(".")[0], tmp_path / "slurm.conf"
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_bytes(os.urandom(1024))
    conf.write_text(f"""
ClusterName=one
SlurmctldHost={node}(127.0.0.1)
SlurmUser=root
AuthInfo=socket={tmp_path}/munge
StateSaveLocation={tmp_path}/state
SlurmdSpoolDir={tmp_path}/spool
SlurmctldPidFile={tmp_path}/slurmctld.pid
SlurmdPidFile={tmp_path}/slurmd.pid
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={node} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
""")
    environment = {**ENVIRONMENT, "PATH": path, "SLURM_CONF": str(conf)}
    call = lambda *words, **more: subprocess.run(words, env={**environment, **more}, cwd=tmp_path / "home",
                                                 capture_output=True, text=True).stdout
    daemons = []
    try:
        munged = ["munged", "-F", "--force", "-S", tmp_path / "munge", "--key-file", tmp_path / "key",
                  "--log-file", tmp_path / "munge.log", "--pid-file", tmp_path / "munge.pid",
                  "--seed-file", tmp_path / "seed"]
        for words in (munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D"]):
            with open(tmp_path / f"{words[0]}.log", "w") as log:
                daemons.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
            time.sleep(1)
        idle = wait_for(lambda: "idle" in call("sinfo", "-h", "-o", "%T"))
        assert idle, (tmp_path / "slurmctld.log").read_text()
        yield call
        call("scancel", "--user=root")
        wait_for(lambda: not call("squeue", "-h"), 20)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def test_a_slurm_job_array_does_the_cells_and_a_time_limit_loses_nothing(stand_ins, slurm):
    """The second task gets, while it runs, the signal that announces the time limit: it saves and is requeued."""
    code, home = stand_ins
    grid = {**GRID, "USERS": "2 3", "HOURS": "0.1", "STEPS": "600"}
    job = slurm("sbatch", "--parsable", "--array=1-2", code / "sweep.sh", **grid).strip()
    first, second = (home / f"runs/grid/u{user}-h0.1-8x1x2-s0" for user in (2, 3))
    assert wait_for(lambda: steps_of(second) >= 20), lines(home / f"slurm-{job}_2.out")
    slurm("scancel", "--batch", "--signal=USR1", f"{job}_2")
    assert wait_for(lambda: "saved at" in "".join(lines(second / "log.txt")))

    def done():                                                   # Slurm holds a requeued job for two minutes
        slurm("scontrol", "update", f"JobId={job}_2", "StartTime=now")
        return (home / "results/grid/results.csv").exists()

    assert wait_for(done, 200), slurm("squeue")
    assert [len(lines(cell / "starts")) for cell in (first, second)] == [1, 2]
    assert table(home) == undisturbed([2, 3], ["0.1"], 600)
