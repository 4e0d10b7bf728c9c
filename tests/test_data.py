"""Every format, written here in its published layout from one known movement, comes out as that
movement, 20 times a second, in g and rad/s. Then what must never happen: windows across a gap,
sensors out of step, half-made sets, archives that harm, people who are counted twice."""
import http.server, io, json, os, shutil, sys, threading, time, zipfile
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import pytest

import data
from conftest import prepare, write
from data import GRAVITY, UserError

REAL = Path(data.__file__).resolve().parents[1] / "shared/data"
ONE, TWO = "0A986513-7828-4D53-AA1F-E02D6DF9561B", "1155FF54-63D3-4AB2-9863-8385D0BD0A13"
MEMBER, NOISE = "A_DeviceMotion_data/wlk_7/sub_1.csv", np.random.default_rng(0).bytes(600_000)
pytestmark = pytest.mark.usefixtures("elsewhere")

def movement(t):
    """What every fixture recorded: acceleration in g, around 1 g of gravity, and rad/s; (n, 6)."""
    hertz, phase = [1.0, 2.0, 3.0, 1.0, 2.5, 0.7], np.arange(6)
    waves = np.sin(2 * np.pi * np.outer(t, hertz) + phase)
    return waves * [0.3, 0.2, 0.1, 1.5, 1.0, 0.5] + [0, 0, 1, 0, 0, 0]

def clock(seconds, rate, start=0.0):
    return start + np.arange(round(seconds * rate)) / rate

def text(line, rows):
    """An array as the text of a file, given how a row is written."""
    return "".join(line % tuple(row) for row in rows)

def zipped(members, packing=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(content := io.BytesIO(), "w", packing) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return content.getvalue()

def write_archives(raw, what, *contents):
    """Under their published names."""
    for url, content in zip(data.SOURCES[what].archives, contents, strict=True):
        write(f"{raw}/{url.split('/')[-1]}", content)

def refuses(words, call, *arguments, **flags):
    with pytest.raises(UserError, match=words) as refusal:
        call(*arguments, **flags)
    assert "\n" not in str(refusal.value)

def files_in_data():
    return {path.name for path in Path("data").glob("*")} - {".lock"}

# ---------------------------------------------------------------- the formats, as published
def ucihar():
    members, x = {}, movement(clock(2.56, 50))
    sensors = [f"{sensor}_{axis}" for sensor in ("total_acc", "body_gyro") for axis in "xyz"]
    for split, users, labels in (("train", [1, 1, 3], [1, 2, 3]), ("test", [2, 2], [1, 2])):
        files = {"subject": text("%d\n", np.c_[users]), "y": text("%d\n", np.c_[labels])}
        for sensor, values in zip(sensors, x.T):
            line = " % .7e" * len(values) + "\n"
            files[f"Inertial Signals/{sensor}"] = text(line, [values] * len(users))
        for name, content in files.items():
            members[f"UCI HAR Dataset/{split}/{name}_{split}.txt"] = content
    yield zipped({"UCI HAR Dataset.zip": zipped(members), "README.txt": "x"})

def wisdm():
    """Gyroscope late and faster; 1601 lacks activity B in one file, 1602 a sensor; of 1600's
    activity A the second half stands before the first. A zip within the zip, LZMA inside."""
    members = {}
    for file in ("accel 1600 AB", "accel 1601 AB", "accel 1602 AB", "gyro 1600 AB", "gyro 1601 A"):
        (sensor, user, letters), content = file.split(), ""
        for i, letter in enumerate(letters):
            t = clock(25, 20, 1000 * i) if sensor == "accel" else clock(25, 25, 1000 * i + 0.37)
            x = movement(t)[:, :3] * GRAVITY if sensor == "accel" else movement(t)[:, 3:]
            rows = np.c_[np.round((252207 + t) * 1e9), x]
            half = len(rows) // 2 if (user, letter) == ("1600", "A") else 0
            content += text(f"{user},{letter},%d,%.7g,%.7g,%.7g;\n", np.roll(rows, half, axis=0))
        for device in ("phone", "watch"):
            name = f"wisdm-dataset/raw/{device}/{sensor}/data_{user}_{sensor}_{device}.txt"
            members[name] = content
    yield zipped({"wisdm-dataset.zip": zipped(members, zipfile.ZIP_LZMA), "README.txt": "x"})

def extrasensory():
    """Three minutes of each user (the second phone in m/s^2), then one of each kind of failure."""
    members = {"raw_acc": {}, "proc_gyro": {}}
    for user, unit in ((ONE, 1), (TWO, GRAVITY)):
        for i in range(7):
            ta, tg = clock(20.5, 36, 5000 + 60 * i), clock(20.5, 40, 5000.011 + 60 * i)
            a, g = np.c_[ta, movement(ta)[:, :3] * unit], np.c_[tg, movement(tg)[:, 3:]]
            if i == 1:                                 # the clock repeats, runs back, leaps once
                a[100, 0], g[200:206, 0], g[400, 0] = a[99, 0], g[200:206, 0] - 1, g[400, 0] + 1000
            elif i == 2:                               # rows that are no numbers
                a[50, 2], g[60, 1:] = np.nan, np.inf
            elif i == 3:                               # neither g nor m/s^2
                a[:, 1:] *= 4 / unit
            elif i == 4:                               # too short
                a, g = a[:300], g[:300]
            for sensor, rows in (("raw_acc", a), ("proc_gyro", g))[:2 if i < 6 else 1]:
                name = f"{sensor}/{user}/{1444079161 + 60 * i}.m_{sensor}.dat"
                members[sensor][name] = text("%.6f %.7g %.7g %.7g\n", rows)
        members["raw_acc"][f"raw_acc/{user}/{1444079161 + 60 * 5}.m_raw_acc.dat"] = "nan\n"
    yield from map(zipped, members.values())

def motionsense():
    x = movement(clock(25, 50))
    rows = np.c_[np.zeros((len(x), 4)), x[:, :3] - 1, x[:, 3:], np.ones((len(x), 3))]
    yield zipped({MEMBER: ",header\n" + text(",".join(["%.7g"] * 13) + "\n", rows)})

FORMATS = {  # name: (archives, users, windows, labels, s from start to first window)
    "ucihar": (ucihar, ["1", "2", "3"], 5, set(data.UCIHAR[:3]), 0),
    "wisdm_phone": (wisdm, ["1600", "1601"], 6, {"walking", "jogging"}, 0.37),
    "wisdm_watch": (wisdm, ["1600", "1601"], 6, {"walking", "jogging"}, 0.37),
    "extrasensory": (extrasensory, [ONE, TWO], 12, set(), 0.011),
    "motionsense": (motionsense, ["motionsense_01"], 2, {"wlk"}, 0)}

@pytest.mark.parametrize("what", FORMATS)
def test_every_format_comes_out_as_the_movement_that_was_recorded(what):
    archives, users, n, labels, late = FORMATS[what]
    write_archives("raw", what, *archives())
    windows, _, numbers, meta = prepare(what)
    assert meta["users"] == users and len(windows) == n
    assert {meta["classes"][number] for number in numbers if number >= 0} == labels
    ticks = np.arange(windows.shape[2]) / 20
    for i, window in enumerate(windows.astype(float)):
        starts = [late] if what == "ucihar" else [late, late + 10]
        errors = [np.abs(window.T - movement(start + ticks)).mean(0) for start in starts]
        assert any(error[:3].max() < 0.01 and error[3:].max() < 0.05 for error in errors), i
    assert meta["sources"] == [what.split("_")[0]] * len(users)
    assert meta["test_users"] == (["2"] if what == "ucihar" else None)
    assert windows.dtype == np.float16 and meta["seconds"] == len(ticks) / 20
    assert what != "extrasensory" or sorted(meta["left_out"].values()) == [2, 2, 4]

# ---------------------------------------------------------------- own recordings
X25 = movement(clock(25, 50))

def npz(x=X25, rate=50, **more):
    return {"signal": x, "rate": rate, **more}

def csv(t, x, label=None):
    columns = ["t", "ax", "ay", "az", "gx", "gy", "gz"][:1 + x.shape[1]] + ["label"] * bool(label)
    line = ",".join(["%.17g"] * (1 + x.shape[1]) + [label] * bool(label)) + "\n"
    return ",".join(columns) + "\n" + text(line, np.c_[t, x])

def test_a_folder_of_npz_and_csv_in_any_unit_and_rate():
    t = clock(25, 31.7, 1.7e9)
    labels = np.repeat(["walk", ""], 1250)
    write("own/ann_1.npz", npz(movement(clock(25, 100)), 100, label=labels))
    write("own/bob_2.CSV", csv(t, movement(t - t[0]), label="-1"))
    mine = prepare("folder", "own", "mine")
    assert mine.meta["users"] == ["ann_1", "bob_2"] and mine.meta["sources"] == ["ann", "bob"]
    assert mine.meta["classes"] == ["walk"] and mine.labels.tolist() == [0, -1, -1, -1]
    for window, start in zip(mine.windows[[0, 2, 3]], [0, 0, 10]):
        assert np.abs(window.T - movement(start + np.arange(200) / 20)).mean(0).max() < 0.02
    write("other/cy.csv", csv(t, movement(t)[:, :3] * GRAVITY, label="#1 walk"))
    other = prepare("folder", "other", acc_unit="m/s2")
    assert other.windows.shape == (2, 3, 200) and other.meta["classes"] == ["#1 walk"]
    refuses("check --acc-unit", prepare, "folder", "own", "wrong", acc_unit="m/s2")

def test_no_window_crosses_a_recording_a_gap_or_a_label_change():
    """Each stretch holds a value of its own, so a window that crossed two would not be constant."""
    stretches = [(25, "r1", "a"), (25, "r1", "b"), (12, "r2", "b"), (9, "r3", "b"), (15, "r3", "c")]
    level = np.repeat(np.arange(5), [50 * seconds for seconds, _, _ in stretches])
    segment, label = (np.array([stretch[i] for stretch in stretches])[level] for i in (1, 2))
    still, turn = np.array([0, 0, 1, 0, -1e-17, 0]), [0, 0, 0, 1, 0, 0]
    x = still + np.outer(level / 10, turn)
    write("own/u.npz", npz(x, segment=segment, label=label))
    t = clock(40, 50)
    t = t[(t < 18) | (t > 18.6)]                       # a gap of 0.6 s: 18 s and 21 s remain
    write("own/v.csv", csv(t, still + np.outer(t > 18, turn)))
    windows, users, labels, meta = prepare("folder", "own")
    assert np.ptp(windows, axis=2).max() < 1e-3 and sum(meta["left_out"].values()) == 1
    assert labels.tolist() == [0, 0, 1, 1, 1, 2, -1, -1, -1]
    assert windows[6:, 3, 0].tolist() == [0, 1, 1]
    zeros = windows[windows == 0]                      # the same bytes on every processor
    assert len(zeros) and not np.signbit(zeros).any()

def test_what_is_too_fast_for_20_hz_is_filtered_out_not_folded_back():
    t = clock(30, 100)
    for frequency, gain in ((1, 1), (5, 1), (15, 0), (21, 0), (39, 0)):
        y = data.resample(t, np.sin(2 * np.pi * frequency * t)[:, None], 0, 590)[20:-20]
        assert abs(np.sqrt(2 * np.mean(y**2)) - gain) < 0.01, frequency

def test_a_clock_that_errs_costs_the_rows_in_error():
    t = clock(21, 40)
    x = movement(t)
    x[9, 2], x[11, 3] = np.inf, np.nan
    harms = {"repeat": (np.r_[100:400:3], t[99:399:3]), "swap": ([200, 201], t[[201, 200]]),
             "back": (np.r_[300:310], t[300:310] - 2), "wild": ([50, 500], [1e9, -1e9]),
             "missing": ([7], np.nan), "set back for good": (np.r_[600:840], t[600:] - 12)}
    for harm, (rows, stamps) in harms.items():
        length, stamped = 200 if harm == "set back for good" else 400, t.copy()
        stamped[rows] = stamps
        windows, _, _ = data.cut([("u", None, [(stamped, x)])], length)
        assert len(windows) == 1, harm
        errors = np.abs(windows[0].T - movement(np.arange(length) / 20)).mean(0)
        assert errors.max() < 0.02, harm

BAD = {  # what makes a folder unusable: (its files, words of the sentence)
    "no recordings": ({"notes.txt": "x"}, "nothing that can be read as own recordings"),
    "user twice": ({"u.npz": npz(), "u.csv": "t,ax,ay,az"}, "as .csv and as .npz"),
    "wrong columns": ({"u.csv": "time,a,b,c\n0,0,0,1"}, "wanted: .* the columns t,ax,ay,az"),
    "short row": ({"u.csv": "t,ax,ay,az\n0,0,0,1\n0.1,0"}, "can't be read"),
    "too short": ({"u.npz": npz(X25[:450])}, "too short"),
    "milliseconds": ({"u.csv": csv(20 * np.arange(1250), X25)}, "t in seconds?"),
    "missing value": ({"u.npz": npz(np.r_[X25[:7], [[np.nan] * 6], X25[8:]])}, "row 8"),
    "five channels": ({"u.npz": npz(X25[:, :5])}, r"signal \(1250, 5\).* wanted: .*\(n, 6\)"),
    "labels in a column": ({"u.npz": npz(label=np.full((1250, 1), "x"))}, r"label \(1250, 1\)"),
    "no rate": ({"u.npz": {"signal": X25}}, "rate is not a file"),
    "pickles": ({"u.npz": npz(np.array([{}], object))}, "allow_pickle"),
    "no zip": ({"u.npz": "PK"}, "can't be read"),
    "m/s^2": ({"u.npz": npz(X25 * ([GRAVITY] * 3 + [1] * 3))}, "check --acc-unit"),
    "deg/s": ({"u.npz": npz(X25 * ([1] * 3 + [57.3] * 3))}, "--gyro-unit deg/s"),
    "other sensors": ({"u.npz": npz(), "v.npz": npz(X25[:, :3])}, "keep them apart")}

@pytest.mark.parametrize("why", BAD)
def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence_and_leaves_nothing(why, capfd):
    files, words = BAD[why]
    for name, content in files.items():
        write(f"own/{name}", content)
    refuses(words, prepare, "folder", "own", "mine")
    assert files_in_data() == set() and "Traceback" not in capfd.readouterr().err

# ---------------------------------------------------------------- archives that harm
HOSTILE = {  # what is wrong: (the archive or its members, words of the sentence)
    "endless": ({MEMBER: bytes(70 << 20)}, "too big"),
    "endless zip within": ({MEMBER: "1", "inner.zip": bytes(70 << 20)}, "too large"),
    "damaged": (zipped({MEMBER: NOISE}).replace(NOISE[300:340], bytes(40)), "can't be read"),
    "no zip": (b"<html>", "can't be read as a zip"),
    "something else": ({"holiday.jpg": "x"}, "nothing that can be read as MotionSense"),
    "other content": ({MEMBER: "header\n" + "x" * 999}, "can't be read .* wanted: 50 Hz; columns")}

@pytest.mark.parametrize("why", HOSTILE)
def test_a_hostile_or_broken_archive_is_refused_and_what_was_prepared_stays(why, monkeypatch):
    write_archives("good", "motionsense", *motionsense())
    before = prepare("motionsense", "good").meta
    monkeypatch.setattr(data, "ZIP_LIMIT", 69 << 20 if "within" in why else data.ZIP_LIMIT)
    content, words = HOSTILE[why]
    content = content if isinstance(content, bytes) else zipped(content)
    write_archives("raw", "motionsense", content)
    refuses(words, prepare, "motionsense", force=True)
    assert data.load("motionsense").meta == before and files_in_data() == {"motionsense"}

# ---------------------------------------------------------------- once, again, side by side
def test_preparing_twice_is_a_no_op_other_settings_are_refused_and_force_redoes(capsys):
    for i in range(3):
        write(f"own/u{i}.npz", npz())
    first = prepare("folder", "own", "mine")
    made = os.stat("data/mine/windows.npy").st_mtime_ns
    prepare("folder", "own", "mine")
    assert "already" in capsys.readouterr().out
    assert os.stat("data/mine/windows.npy").st_mtime_ns == made
    refuses("limit_users", prepare, "folder", "own", "mine", limit=2)
    assert prepare("folder", "own", "mine", limit=2, force=True).meta["users"] == ["u0", "u1"]
    assert len(first.windows) == 6                     # an open map outlives its replacement
    write("own/u1.npz", npz(rate=60))
    refuses("recordings", prepare, "folder", "own", "mine", limit=2)
    Path("data/notes").mkdir()
    refuses("no data set", prepare, "folder", "own", "notes", force=True)

def test_a_replacement_that_is_stopped_between_its_last_steps_loses_no_set(monkeypatch):
    before, rename = prepare("simulated").meta, os.rename
    def stopped(source, target):
        if Path(source).name == ".simulated.partial":
            raise KeyboardInterrupt
        rename(source, target)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", stopped)
        prepare("simulated", force=True, seed=1)
    assert files_in_data() == {".simulated.old"}
    assert prepare("simulated").meta == before and files_in_data() == {"simulated"}
    shutil.copytree("data/simulated", "data/.simulated.old")     # as if killed one step later
    assert prepare("simulated").meta == before and files_in_data() == {"simulated"}

def test_a_set_is_prepared_once_by_two_processes_and_a_kill_leaves_no_half_of_it():
    words = [sys.executable, data.__file__, *"simulated --users 12 --hours-per-user".split()]
    start = lambda hours: Popen([*words, hours], text=True, stdout=PIPE, start_new_session=True)
    killed = start("2")
    while not Path("data/.simulated.partial/windows.npy").exists():
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert files_in_data() == {".simulated.partial"}
    with pytest.raises(ProcessLookupError):            # its workers end, too
        for _ in range(200):
            os.killpg(killed.pid, 0)
            time.sleep(0.1)
    printed = [process.communicate()[0] for process in (start("0.05"), start("0.05"))]
    assert ["already" in words for words in printed].count(True) == 1
    assert len(data.load("simulated").windows) == 216 and files_in_data() == {"simulated"}

def test_a_set_that_was_damaged_or_changed_is_noticed():
    meta = prepare("simulated").meta
    path, windows = Path("data/simulated/meta.json"), Path("data/simulated/windows.npy")
    for harm in ("{", "[]", "null", '{"users": 3}', json.dumps(meta | {"fingerprint": 0})):
        path.write_text(harm)
        for use in (data.load, data.plot, prepare, data.describe):
            refuses("damaged or was changed", use, "simulated")
    assert prepare("simulated", force=True).meta["fingerprint"] == meta["fingerprint"]
    for change in (lambda: np.load(windows, mmap_mode="r+")[3, 0].fill(7),
                   lambda: os.truncate(windows, 999)):
        change()
        refuses("damaged or was changed", data.load, "simulated")
    refuses("not prepared", data.load, "nothing")

# ---------------------------------------------------------------- downloads
class Misbehaving(http.server.BaseHTTPRequestHandler):
    """GET /KIND/...: 600 kB, delivered as KIND says; `seen`: where it was asked to begin."""
    body, seen, log_message = b"", [], lambda self, *args: None

    def do_GET(self):
        kind, first = self.path.split("/")[1], not self.seen
        self.seen.append(int(self.headers["Range"][6:-1]))
        start = self.seen[-1] if kind != "no-range" else 0
        body = b"no archive at all" if kind == "other" else self.body
        status = {"gone": 404, "busy": 503 if first else 200}.get(kind, 206 if start else 200)
        self.send_response(416 if start >= len(body) else status)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = {"stalls": start + 1, "cut": 1 << 17, "no-range": 1 << 17}.get(kind)
        self.wfile.write(body[start:end if first or kind == "stalls" else None])

@pytest.mark.parametrize("kind, outcome", {
    "cut": [0, 1 << 17], "no-range": [0, 1 << 17], "busy": [0, 0], "gone": "404",
    "other": "no zip|416", "stalls": "run it again"}.items())
def test_a_download_arrives_whole_or_says_why_not_and_leaves_no_archive(kind, outcome, monkeypatch):
    """It goes on from the last whole block that came, in the fixture 128 kB."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Misbehaving, "seen", [])
    Misbehaving.body = zipped({"noise": NOISE})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, path = f"http://127.0.0.1:{server.server_address[1]}/{kind}/a.zip", Path("a.zip")
        if isinstance(outcome, str):
            refuses(outcome, data.download, url, path)
            assert not path.exists()
        else:
            data.download(url, path)
            assert path.read_bytes() == Misbehaving.body and Misbehaving.seen == outcome
            assert not Path("a.zip.part").exists()
        server.shutdown()

# ---------------------------------------------------------------- the simulated population
def test_the_simulated_population_is_labelled_and_seeded_and_its_spread_sets_people_apart():
    windows, users, labels, one = prepare("simulated", name="one")
    assert labels.min() >= 0 and np.bincount(users).tolist() == [36] * 6
    gravity = np.linalg.norm(windows[:, :3].astype(float).mean(2), axis=1)
    assert abs(np.median(gravity) - 1) < 0.1
    two, other, clones = (prepare("simulated", name=name, **flags).meta for name, flags in (
        ("two", {}), ("other", {"seed": 1}), ("clones", {"spread": 0})))
    assert two["fingerprint"] == one["fingerprint"] != other["fingerprint"]
    assert two["sources"] == one["sources"] != other["sources"]
    assert data.held_out_users(clones) == data.held_out_users(one)
    crowd = {spread: [data.person(0, user, spread) for user in range(30)] for spread in (0, 0.5, 1)}
    deviation = {spread: np.std([who["strides"] for who in crowd[spread]]) for spread in crowd}
    assert 0.05 < deviation[1] < 0.13 and deviation[0.5] == pytest.approx(deviation[1] / 2)
    assert all(np.array_equal(crowd[0][0][trait], who[trait]) for who in crowd[0] for trait in who)

# ---------------------------------------------------------------- who is held out, pooling
def test_held_out_users_never_change_and_training_users_are_nested_and_alternate():
    meta = {"name": "m", "users": [f"u{i}" for i in range(36)], "sources": sorted("abc" * 12)}
    half_a, half_b = data.held_out_users(meta)
    assert len(half_a) == len(half_b) == 3 and not set(half_a) & set(half_b)
    for seed in range(3):
        order = data.training_users(meta, seed)
        assert sorted([*order, *half_a, *half_b]) == list(range(36))
        turns = np.reshape([meta["sources"][user] for user in order], (10, 3))
        assert all(len(set(turn)) == 3 for turn in turns)
    assert data.training_users(meta, 0) != data.training_users(meta, 1)
    two = {"name": "m", "users": ["a", "b"], "sources": ["s", "s"]}
    refuses("held out", data.training_users, two, 0)

def test_fewer_hours_are_a_subset_of_more_hours_and_everyone_is_evaluated_evenly():
    prepared = prepare("simulated")
    few, more = (set(data.draw_windows(prepared, [1, 4], hours, 0)) for hours in (0.02, 0.05))
    assert len(few) == 2 * 7 and len(more) == 2 * 18 and few < more
    assert len(data.draw_windows(prepared, [1, 4], None, 0)) == 72
    evaluated = data.held_out_windows(prepared, [2, 0], most=5)
    assert prepared.users[evaluated].tolist() == [2] * 5 + [0] * 5

def test_sets_are_pooled_by_person_and_class_and_nobody_twice():
    write("own/ann.npz", npz(label=np.repeat(["walking", "dancing"], [700, 550])))
    mine, other = prepare("folder", "own", "mine"), prepare("simulated")
    pooled = data.load("simulated+mine")
    assert len(pooled.windows) == len(mine.windows) + len(other.windows) == pooled.meta["windows"]
    assert data.people(pooled.meta)[5:] == [("simulated-0", "005"), ("own", "ann")]
    named = [[each.meta["classes"][i] for i in each.labels] for each in (pooled, other, mine)]
    assert named[0] == named[1] + named[2] and pooled.meta["classes"].count("walking") == 1
    prepare("folder", "own", "again")
    refuses("a person is in two", data.load, "mine+again")             # one set under two names
    write("three/ann.npz", npz(X25[:, :3]))
    three = prepare("folder", "three", "three")
    refuses("channels.* differ", data.load, "mine+three")
    refuses("--sensors gyro", data.windows_at, three, [0], "gyro")

def test_windows_are_scaled_without_an_offset_and_rotated_as_a_whole():
    ones = data.Prepared(np.ones((2, 6, 5), np.float16), None, None, {"channels": data.CHANNELS})
    x = data.windows_at(ones, [0, 1], "both")
    assert x.dtype == np.float32 and x[1, :, 3] == pytest.approx([1 / 0.7] * 3 + [1 / 1.05] * 3)
    x[:, 3:] = x[:, :3]
    turned = data.random_rotation(x, 1.0, np.random.default_rng(0))
    assert np.allclose(turned[:, 3:], turned[:, :3]) and not np.allclose(turned, x)
    assert np.allclose(np.linalg.norm(turned[:, :3], axis=1), np.linalg.norm(x[:, :3], axis=1))

# ---------------------------------------------------------------- as a user
def test_the_command_line_lists_prepares_draws_and_refuses(run, refused):
    assert run("data.py simulated --users 2 --hours-per-user 0.02")[0] == 0
    assert run("data.py plot simulated")[0] == 0
    assert Path("data/simulated/plot.png").read_bytes()[:4] == b"\x89PNG"
    printed = run("data.py")[1]
    assert all(name in printed for name in data.SOURCES)
    for flags, words in {
            "nonsense": "invalid choice", "simulated --name a+b": "use letters",
            "plot nothing": "not prepared", "simulated --users 3": "differs in users",
            "simulated --users 0 --name s": "--users: 0 is not a whole number",
            "simulated --hours-per-user nan --name s": "--hours-per-user: nan is not a number",
            "simulated --limit-users -1 --name s": "--limit-users: -1",
            "folder --raw /dev/null": "nothing that can be read"}.items():
        refused(f"data.py {flags}", words, usage=True)

@pytest.mark.skipif(not REAL.is_dir(), reason="no real recordings in ../shared/data")
@pytest.mark.parametrize("source", ["motionsense", "sisfall", "uschad"])
def test_published_archives_give_the_recordings_that_were_prepared_elsewhere(source):
    prepared = prepare(source, REAL / "raw" / "samples")
    for user in prepared.meta["users"]:
        write(f"pool/{user}.npz", (REAL / f"pool/{user}.npz").read_bytes())
    pool = prepare("folder", "pool")
    for i, user in enumerate(prepared.meta["users"]):
        theirs = pool.windows[pool.users == i].astype(np.float32)
        for window in prepared.windows[prepared.users == i].astype(np.float32):
            assert np.abs(theirs - window).mean((1, 2)).min() < 0.003, user
