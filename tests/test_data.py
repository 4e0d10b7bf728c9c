"""Every format, written here in its published layout from one known movement, comes out as that
movement, 20 times a second, in g and rad/s. Then recordings as people really have them: no second
is lost unsaid, what can't be motion is no reading, people are who they are."""
import http.server, io, json, os, subprocess, sys, threading, zipfile
from pathlib import Path

import numpy as np
import pytest

import data
from conftest import prepare, write
from data import DEGREE, GRAVITY, UserError

SHARED = Path(data.__file__).resolve().parents[1] / "shared"
REAL, FAULTS = SHARED / "data", SHARED / "faults/make.py"
ONE, TWO = "0A986513-7828-4D53-AA1F-E02D6DF9561B", "1155FF54-63D3-4AB2-9863-8385D0BD0A13"
MEMBER, NOISE = "A_DeviceMotion_data/wlk_7/sub_1.csv", np.random.default_rng(0).bytes(600_000)
pytestmark = pytest.mark.usefixtures("elsewhere")

def movement(t):
    """What every fixture recorded: acceleration in g, with gravity, and rad/s; (..., 6)."""
    hertz, phase = [1.0, 2.0, 3.0, 1.0, 2.5, 0.7], np.arange(6)
    waves = np.sin(2 * np.pi * np.multiply.outer(t, hertz) + phase)
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

def write_archives(what, *contents):
    """Into raw/, under their published names."""
    for url, content in zip(data.SOURCES[what].archives, contents, strict=True):
        write(f"raw/{url.split('/')[-1]}", content)

def refuses(words, call, *arguments, **flags):
    with pytest.raises(UserError, match=words) as refusal:
        call(*arguments, **flags)
    assert "\n" not in str(refusal.value)

def seconds_of(meta):
    return meta["hours"] * 3600 + sum(meta["left_out"].values())

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
    """Four minutes of two users, the second's in m/s^2: one as it should be, one in neither unit,
    one without a gyroscope, one without a number."""
    members = {"raw_acc": {}, "proc_gyro": {}}
    for user, unit in ((ONE, 1), (TWO, GRAVITY)):
        for i, unit in enumerate((unit, 4, unit, unit)):
            ta, tg = clock(20.5, 36, 5000 + 60 * i), clock(20.5, 40, 5000.011 + 60 * i)
            rows = {"raw_acc": np.c_[ta, movement(ta)[:, :3] * unit],
                    "proc_gyro": np.c_[tg, movement(tg)[:, 3:]]}
            for sensor in members if i != 2 else ["raw_acc"]:
                name = f"{sensor}/{user}/{1444079161 + 60 * i}.m_{sensor}.dat"
                lines = text("%.6f %.7g %.7g %.7g\n", rows[sensor])
                members[sensor][name] = "nan\n" if (i, sensor) == (3, "raw_acc") else lines
    yield from map(zipped, members.values())

def motionsense():
    x = movement(clock(25, 50))
    rows = np.c_[np.zeros((len(x), 4)), x[:, :3] - 1, x[:, 3:], np.ones((len(x), 3))]
    yield zipped({MEMBER: ",header\n" + text(",".join(["%.7g"] * 13) + "\n", rows)})

def sisfall(folder="SisFall_dataset/"):
    """Cut off in the last line."""
    x = movement(clock(25, 200)) / ([32 / 2**13] * 3 + [4000 / 2**16 * DEGREE] * 3)
    lines = text("%d,%d,%d,%d,%d,%d,0,0,0;\n", np.round(x)) + "17,3"
    yield zipped({folder + "SA01/D01_SA01_R01.txt": lines})

FORMATS = {  # name: (archives, users, windows, labels, s from start to first window)
    "ucihar": (ucihar, ["1", "2", "3"], 5, set(data.UCIHAR[:3]), 0),
    "wisdm_phone": (wisdm, ["1600", "1601"], 6, {"walking", "jogging"}, 0.37),
    "wisdm_watch": (wisdm, ["1600", "1601"], 6, {"walking", "jogging"}, 0.37),
    "extrasensory": (extrasensory, [ONE, TWO], 4, set(), 0.011),
    "motionsense": (motionsense, ["motionsense_01"], 2, {"wlk"}, 0),
    "sisfall": (sisfall, ["sisfall_SA01"], 2, {"D01"}, 0)}

@pytest.mark.parametrize("what", FORMATS)
def test_every_format_comes_out_as_the_movement_that_was_recorded(what):
    archives, users, n, labels, late = FORMATS[what]
    write_archives(what, *archives())
    windows, _, numbers, meta = prepare(what)
    assert meta["users"] == users and len(windows) == n
    assert {meta["classes"][number] for number in numbers if number >= 0} == labels
    ticks = np.arange(windows.shape[2]) / 20
    starts = [late] if what == "ucihar" else [late, late + 10]
    for window in windows.astype(float):
        errors = [np.abs(window.T - movement(start + ticks)).mean(0) for start in starts]
        assert any(error[:3].max() < 0.01 and error[3:].max() < 0.05 for error in errors)
    assert meta["sources"] == [what.split("_")[0]] * len(users)
    assert meta["test_users"] == (["2"] if what == "ucihar" else None)
    assert windows.dtype == np.float16 and meta["seconds"] == len(ticks) / 20
    if what == "extrasensory":
        assert meta["left_out"]["no reading"] == pytest.approx(2 * 20.5, abs=0.5)
        assert meta["left_out"]["one sensor without the other"] == pytest.approx(4 * 20.5, abs=2)

T60, X25, X60 = clock(60, 50), movement(clock(25, 50)), movement(clock(60, 50))
COLUMNS = "t,ax,ay,az,gx,gy,gz"

def npz(x=X25, rate=50, **more):
    return {"signal": x, "rate": rate, **more}

def csv(t=T60, x=X60, labels=(), head=COLUMNS):
    """t: numbers, or texts; labels: none, or one a row."""
    columns = [np.asarray(t).tolist(), *x.T.tolist(), *[labels] * (len(labels) > 0)]
    head = [*head.split(",")[:1 + x.shape[1]], *["label"] * (len(labels) > 0)]
    return "\n".join(",".join(map(str, row)) for row in [head, *zip(*columns)]) + "\n"

def test_a_folder_of_npz_and_csv_in_any_unit_and_rate():
    t = clock(25, 31.7, 1.7e9)
    labels = np.repeat(["walk", ""], 1250)
    write("own/ann_1.npz", npz(movement(clock(25, 100)), 100, label=labels))
    write("own/bob_2.CSV", csv(t, movement(t - t[0]), ["-1"] * len(t)))
    mine = prepare("folder", "own", "mine")
    assert mine.meta["users"] == ["ann_1", "bob_2"] and mine.meta["sources"] == ["ann", "bob"]
    assert mine.meta["classes"] == ["walk"] and mine.labels.tolist() == [0, -1, -1, -1]
    for window, start in zip(mine.windows[[0, 2, 3]], [0, 0, 10]):
        assert np.abs(window.T - movement(start + np.arange(200) / 20)).mean(0).max() < 0.02
    write("other/cy.csv", csv(t, movement(t)[:, :3] * GRAVITY, ["#1 walk"] * len(t)))
    other = prepare("folder", "other", acc_unit="m/s2")
    assert other.windows.shape == (2, 3, 200) and other.meta["classes"] == ["#1 walk"]
    refuses("check --acc-unit", prepare, "folder", "own", "wrong", acc_unit="m/s2")

def test_no_window_crosses_a_recording_a_gap_or_a_label_change():
    """Each stretch turns at a rate of its own, so a window that crossed two would not be level."""
    level = np.repeat(np.arange(5), [1250, 1250, 600, 450, 750])
    segment, label = np.array([*"11233"])[level], np.array([*"abbbc"])[level]
    def moves(level):
        still, sway = np.zeros(len(level)), 0.1 * np.sin(10 * np.arange(len(level)) / 50)
        return np.c_[sway, still, still + 1, level, still, still]
    write("own/u.npz", npz(moves(level / 10), segment=segment, label=label))
    t = clock(40, 50)
    t = t[(t < 18) | (t > 18.6)]                       # a gap of 0.6 s: 18 s and 21 s remain
    write("own/v.csv", csv(t, moves(t > 18)))
    windows, users, labels, meta = prepare("folder", "own")
    assert np.ptp(windows[:, 3], axis=1).max() < 1e-3
    assert labels.tolist() == [0, 0, 1, 1, 1, 2, -1, -1, -1]
    assert windows[6:, 3, 0].tolist() == [0, 1, 1]
    assert seconds_of(meta) == pytest.approx(86 + 39.4, abs=0.1)
    assert meta["left_out"]["stretches shorter than a window"] == pytest.approx(9)
    zeros = windows[windows == 0]                      # the same bytes on every processor
    assert len(zeros) and not np.signbit(zeros).any()

def test_what_is_too_fast_for_20_hz_is_filtered_out_not_folded_back():
    t = clock(30, 100)
    for frequency, gain in ((1, 1), (5, 1), (15, 0), (21, 0), (39, 0)):
        y = data.resample(t, np.sin(2 * np.pi * frequency * t)[:, None], 0, 590)[20:-20]
        assert abs(np.sqrt(2 * np.mean(y**2)) - gain) < 0.01, frequency

# ---------------------------------------------------------------- recordings as people have them
def changed(x, rows, value):
    x = x.copy()
    x[rows] = value
    return x

RNG = np.random.default_rng(0)
BATCHES = np.concatenate(RNG.permutation(np.arange(3000).reshape(-1, 60)))
LOST = RNG.random(3000) < 0.1
PACKETS = np.arange(3000) // 10 % 20 != 7              # 10 rows each, one in 20 is lost
ISO = [f"2026-01-31 12:0{int(s // 60)}:{s % 60:06.3f}" for s in T60]
MINUTES = {  # what happened to a minute at 50 Hz: (its csv, windows, what is said)
    "starts again, twice": (csv(T60 % 20), 6, ""),
    "starts again each 10 s": (csv(T60 % 10), 6, ""),
    "appended, header and all": (2 * csv(T60[:1500], X60[:1500]), 6, ""),
    "set back for good": (csv(np.where(T60 > 30, T60 - 12.345, T60)), 6, ""),
    "leaps ahead and back": (csv(T60 + 1e4 * ((T60 > 20) & (T60 < 40))), 6, ""),
    "a row leaps": (csv(changed(T60, [50, 2000], [1e9, -1e9])), 6, "less than"),
    "some repeat": (csv(changed(T60, slice(10, 2000, 100), T60[9:1999:100])), 6, "repeat"),
    "batches shuffled": (csv(T60[BATCHES], X60[BATCHES]), 6, "out of order"),
    "milliseconds": (csv(T60 * 1e3), 6, "t read as ms"),
    "nanoseconds": (csv(1.7e18 + T60 * 1e9), 6, "t read as ns"),
    "dates": (csv(ISO), 6, ""),
    "a clock that is slewed back": (csv(T60 - 0.03 * (T60 // 20)), 5, "repeat or go back"),
    "jitter": (csv(T60 + RNG.normal(0, 0.006, 3000)), 6, ""),
    "rounded to seconds": (csv(np.floor(T60)), 5, "spread evenly"),
    "bursts": (csv(T60 // 0.5 * 0.5 + np.arange(3000) % 25 / 1e3), 6, "spread evenly"),
    "bursts, some lost": (csv((np.arange(3000) // 10 / 5)[PACKETS], X60[PACKETS]), 6,
                          "spread evenly"),
    "-999": (csv(x=changed(X60, LOST, -999)), 6, "over no reading"),
    "1e30, nan": (csv(x=changed(X60, [100, 900], [[1e30], [np.nan]])), 6, "over no reading"),
    "a minus one": (csv(x=changed(X60, 500, -1)), 6, "over no reading"),
    "asleep": (csv(x=changed(X60, slice(1000, 2000), X60[1000])), 4, "no reading 19.98"),
    "semicolons": (csv().replace(",", ";").replace(".", ","), 6, ""),
    "tabs, an index, a heart rate": (csv(T60, np.c_[X60, X60[:, 0] + 70], head=COLUMNS + ",bpm")
                                     .replace(",", "\t"), 6, ""),
    "a gyroscope that was off": (csv(x=X60 * ([1] * 3 + [0] * 3)), 6, "gyro_y is constant"),
    "a gyroscope that stops": (csv(x=X60 * np.where(np.arange(6) < 3, 1, T60[:, None] < 25)), 6,
                               "gyro_y is constant in windows: was it on?: ann 50%"),
    "hardly moves": (csv(x=X60[:1] + RNG.normal(0, 0.01, X60.shape)), 6, "hardly moves"),
    "gravity removed": (csv(x=X60 - [0, 0, 1, 0, 0, 0]), 6, "gravity is missing")}

@pytest.mark.parametrize("what", MINUTES)
def test_a_recording_as_people_have_it_loses_no_second_unsaid(what, capfd):
    content, n, words = MINUTES[what]
    write("own/ann.csv", content)
    windows, _, _, meta = prepare("folder", "own", "mine")
    assert len(windows) == n and words in "".join(capfd.readouterr())
    assert seconds_of(meta) == pytest.approx(60, abs=0.15)
    if what not in ("hardly moves", "gravity removed", *(one for one in MINUTES if "gyro" in one)):
        starts = np.arange(0, 51, 0.01)                # it is still the movement
        could_be = movement(starts[:, None] + np.arange(200) / 20)
        for window in windows.astype(float):
            assert np.abs(window.T - could_be).mean((1, 2)).min() < 0.06

def test_two_clocks_that_start_again_are_paired_in_the_order_of_the_file():
    bouts = np.repeat([0.0, 100.3, 200.7], 1000), np.repeat([0.0, 100.3, 200.7], 800)
    stamps = np.tile(clock(20, 50), 3), np.tile(clock(20, 40, 0.01), 3)
    acc, gyro = (movement(t + bout) for t, bout in zip(stamps, bouts))
    streams = [(stamps[0], acc[:, :3]), (stamps[1], gyro[:, 3:])]
    windows, rows, account = data.cut([("ann", "", streams)], 100)
    assert len(rows) == 3 * 4 and sum(account.values()) < 0.2
    starts = np.add.outer([0.01, 100.31, 200.71], [0, 5, 10, 15]).ravel()
    for window, start in zip(np.concatenate(windows), starts):
        assert np.abs(window.T - movement(start + clock(5, 20))).mean() < 0.05

LABELS = {  # labels of 20 s each, and the windows of each class that they make
    ("1", "1.0", "2"): {"1": 4, "2": 2}, ("Walk", "walk ", "WALK"): {"walk": 6},
    ("-1", "None", "NA"): {}, ("walk", "unknown", "0"): {"walk": 2},
    ("0", "1", "two  steps"): {"1": 2, "two steps": 2}, ("0", "1", "2"): {"0": 2, "1": 2, "2": 2}}

@pytest.mark.parametrize("labels", LABELS)
def test_spellings_of_a_label_are_one_class_and_the_windows_of_each_are_listed(labels, capfd):
    write("own/ann.csv", csv(labels=np.repeat(labels, 1000)))
    _, _, numbers, meta = prepare("folder", "own", "mine")
    counts = {name: int(np.sum(numbers == i)) for i, name in enumerate(meta["classes"])}
    assert counts == LABELS[labels]
    listed, said = counts | {"no label": 6 - sum(counts.values())}, capfd.readouterr().out
    assert all(f"{name} {n}" in said for name, n in listed.items() if n)

@pytest.mark.skipif(not FAULTS.is_file(), reason="no ../shared/faults here")
def test_every_case_of_the_shared_faults_is_accounted_for_to_the_second_or_refused():
    subprocess.run([sys.executable, FAULTS, "cases"], check=True, capture_output=True)
    refused = {"17": "ann.csv, row 2: 9 fields", "19": "q0: .*no reading",
               "59": "ann.csv, row 1802: 8 fields"}
    for case in {path.parent for path in Path("cases").rglob("*.csv")} - {Path("cases/tables")}:
        number, name = case.relative_to("cases").parts[0][:2], "-".join(case.parts)
        if number in refused:
            refuses(refused[number], prepare, "folder", case, name)
            continue
        rows = sum(len(path.read_text().splitlines()) - 1 for path in case.glob("*.csv"))
        recorded = rows / {"05": 25, "06": 100}.get(number, 50)
        meta = prepare("folder", case, name).meta
        assert seconds_of(meta) == pytest.approx(recorded, rel=1e-3), case
    [archive] = Path("cases").glob("73*.zip")
    write("raw/" + archive.name[3:], archive.read_bytes())
    assert seconds_of(prepare("wisdm_watch").meta) == pytest.approx(6 * 180, abs=0.1)

BAD = {  # what makes a folder unusable: (its files, words of the sentence)
    "no recordings": ({"notes.txt": "x"}, "nothing that can be read as own recordings"),
    "user twice": ({"u.npz": npz(), "u.csv": "t,ax,ay,az"}, "as .csv and as .npz"),
    "wrong columns": ({"u.csv": "time,a,b,c\n0,0,0,1"}, "wanted: .* the columns t,ax,ay,az"),
    "short row": ({"u.csv": "t,ax,ay,az\n0,0,0,1\n0.1,0"}, "u.csv, row 3: 2 fields"),
    "no date": ({"u.csv": "t,ax,ay,az\nnoon,0,0,1\n"}, "u.csv, row 2: .*no number or date as t"),
    "empty": ({"u.csv": ""}, "u.csv can't be read"),
    "row numbers as t": ({"u.csv": csv(np.arange(3000))}, "t grows by 1 a row"),
    "unsteady bursts": ({"u.csv": csv(np.repeat(np.arange(60), RNG.permutation([10, 90] * 30)))},
                        "no steady rate .about"),
    "too short": ({"u.npz": npz(X25[:450])}, "u: 0 windows; stretches shorter than a window 9.00"),
    "no motion": ({"u.npz": npz(X60 * 0 + X60[7])}, "no 10 s of motion"),
    "a sensor a row": ({"u.csv": csv(x=np.where(np.arange(3000)[:, None] % 2 == [0, 0, 0, 1, 1, 1],
                                                X60, np.nan))}, "join the sensors' rows by time"),
    "five channels": ({"u.npz": npz(X25[:, :5])}, r"signal \(1250, 5\).* wanted: .*\(n, 6\)"),
    "labels in a column": ({"u.npz": npz(label=np.full((1250, 1), "x"))}, r"label \(1250, 1\)"),
    "a column twice": ({"u.csv": "t,ax,ay,az,AX\n0,0,0,1,1"}, "u.csv has a column twice"),
    "seconds as rate": ({"u.npz": npz(rate=0.02)}, "rate is 0.02"),
    "no rate": ({"u.npz": {"signal": X25}}, "rate is not a file"),
    "pickles": ({"u.npz": npz(np.array([{}], object))}, "allow_pickle"),
    "no zip": ({"u.npz": "PK"}, "can't be read"),
    "m/s^2": ({"u.npz": npz(X25 * ([GRAVITY] * 3 + [1] * 3))}, "check --acc-unit"),
    "deg/s": ({"u.npz": npz(X25 * ([1] * 3 + [57.3] * 3))}, "check --gyro-unit"),
    "other sensors": ({"u.npz": npz(), "v.npz": npz(X25[:, :3])}, "keep them apart")}

@pytest.mark.parametrize("why", BAD)
def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence_and_leaves_nothing(why, capfd):
    files, words = BAD[why]
    for name, content in files.items():
        write(f"own/{name}", content)
    refuses(words, prepare, "folder", "own", "mine")
    assert not Path("data/mine").exists() and "Traceback" not in capfd.readouterr().err

def test_a_corpus_survives_a_bad_line_and_names_an_archive_that_cannot_be_read():
    [archive] = motionsense()
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        rows = file.read(MEMBER).split(b"\n")
    rows[300], rows[700] = rows[300][:40], b"<html>"
    write_archives("motionsense", zipped({MEMBER: b"\n".join(rows)}))
    windows, _, _, meta = prepare("motionsense")
    assert len(windows) == 2 and seconds_of(meta) == pytest.approx(25)
    assert "mended: bridged over no reading 0.04 s" in meta["remarks"]
    for content, words in ((b"<html>", "can't be read as a zip"),
                           (zipped({"holiday.jpg": "x"}), "nothing that can be read as Motion"),
                           (zipped({MEMBER: "x" * 999}), "no 10 s of motion")):
        write_archives("motionsense", content)
        refuses(words, prepare, "motionsense", force=True)
        assert data.load("motionsense").meta == meta
    write_archives("sisfall", *sisfall(folder=""))     # as a person may have packed it
    assert len(prepare("sisfall").windows) == 2
    assert {path.name for path in Path("data").iterdir()} == {"motionsense", "sisfall"}

class Misbehaving(http.server.BaseHTTPRequestHandler):
    """GET /KIND/...: 600 kB, delivered as KIND says; `seen`: where it was asked to begin."""
    body, seen, log_message = zipped({"noise": NOISE}), [], lambda self, *args: None

    def do_GET(self):
        kind, first = self.path.split("/")[1], not self.seen
        self.seen.append(int(self.headers["Range"][6:-1]))
        start = self.seen[-1] if kind != "no-range" else 0
        body = b"no archive at all" if kind == "other" else self.body
        status = {"gone": 404, "busy": 503 if first else 200}.get(kind, 206 if start else 200)
        self.send_response(416 if start >= len(body) else status)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = 1 << 17 if first and kind in ("cut", "no-range") else None
        self.wfile.write(body[start:end])

@pytest.mark.parametrize("kind, words, asked", [
    ("cut", "run it again", [0, 1 << 17]), ("no-range", "run it again", [0, 1 << 17]),
    ("busy", None, [0, 0]), ("gone", "404", None), ("other", "no zip", None)])
def test_a_download_arrives_whole_or_says_why_not_and_the_same_command_goes_on(
        kind, words, asked, monkeypatch):
    monkeypatch.setattr(Misbehaving, "seen", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, path = f"http://127.0.0.1:{server.server_address[1]}/{kind}/a.zip", Path("a.zip")
        if words:
            refuses(words, data.download, url, path)
            assert not path.exists()
        if asked:
            data.download(url, path)
            assert path.read_bytes() == Misbehaving.body and Misbehaving.seen == asked
            assert not Path("a.zip.part").exists()
        server.shutdown()

def test_preparing_twice_is_a_no_op_other_settings_are_refused_and_force_redoes(capsys):
    for user in ("ann", "bob"):
        write(f"own/{user}.npz", npz())
    first, windows = prepare("folder", "own", "mine"), Path("data/mine/windows.npy")
    made = windows.stat().st_mtime_ns
    prepare("folder", "own", "mine")
    assert "already" in capsys.readouterr().out and windows.stat().st_mtime_ns == made
    refuses("limit_users", prepare, "folder", "own", "mine", limit=1)
    assert prepare("folder", "own", "mine", limit=1, force=True).meta["users"] == ["ann"]
    assert len(first.windows) == 4                     # an open map outlives its replacement
    write("own/ann.npz", npz(rate=60))
    refuses("recordings", prepare, "folder", "own", "mine", limit=1)
    write("data/notes/todo.txt", "x")
    refuses("no data set", prepare, "folder", "own", "notes", force=True)

def test_a_set_that_was_damaged_or_changed_is_noticed_and_an_older_one_is_read():
    meta, path = prepare("simulated").meta, "data/simulated/meta.json"
    older = {key: meta[key] for key in meta if key not in ("checksums", "remarks")}
    write(path, json.dumps(older))
    assert data.identities(data.load("simulated").meta, [1]) == [["simulated-0", "001", []]]
    assert "simulated" in data.describe("simulated")
    for harm in ("{", "[]", "null", '{"users": 3}', json.dumps(meta | {"fingerprint": 0})):
        write(path, harm)
        for use in (data.load, data.plot, prepare, data.describe):
            refuses("damaged or was changed", use, "simulated")
    prepare("simulated", force=True)
    os.truncate("data/simulated/windows.npy", 999)
    refuses("damaged or was changed", data.load, "simulated")

def test_the_simulated_population_is_labelled_and_seeded_and_its_spread_sets_people_apart():
    windows, users, labels, one = prepare("simulated", name="one")
    assert labels.min() >= 0 and np.bincount(users).tolist() == [36] * 6
    gravity = np.linalg.norm(windows[:, :3].astype(float).mean(2), axis=1)
    assert abs(np.median(gravity) - 1) < 0.1
    two, other = prepare("simulated", name="two").meta, prepare("simulated", name="x", seed=1).meta
    for key in ("fingerprint", "sources"):
        assert two[key] == one[key] != other[key]
    crowd = {spread: [data.person(0, user, spread) for user in range(30)] for spread in (0, 0.5, 1)}
    assert all(np.array_equal(crowd[0][0][trait], who[trait]) for who in crowd[0] for trait in who)
    half, full = (np.std([who["strides"] for who in crowd[spread]]) for spread in (0.5, 1))
    assert 0.05 < full < 0.13 and half == pytest.approx(full / 2)

# ---------------------------------------------------------------- who is held out, pooling
def test_held_out_users_never_change_and_training_users_are_nested_and_alternate():
    meta = {"name": "m", "users": [f"u{i}" for i in range(36)], "sources": sorted("abc" * 12)}
    half_a, half_b = data.held_out_users(meta)
    assert len(half_a) == len(half_b) == 3 and not set(half_a) & set(half_b)
    orders = [data.training_users(meta, seed) for seed in range(3)]
    assert orders[0] != orders[1]
    for order in orders:
        assert sorted([*order, *half_a, *half_b]) == list(range(36))
        turns = np.reshape([meta["sources"][user] for user in order], (10, 3))
        assert all(len(set(turn)) == 3 for turn in turns)
    two = {"name": "m", "users": ["a", "b"], "sources": ["s", "s"]}
    refuses("held out", data.training_users, two, 0)

def test_fewer_hours_are_a_subset_of_more_hours_and_everyone_is_evaluated_evenly():
    prepared = prepare("simulated")
    few, more = (set(data.draw_windows(prepared, [1, 4], hours, 0)) for hours in (0.02, 0.05))
    assert len(few) == 2 * 7 and len(more) == 2 * 18 and few < more
    assert len(data.draw_windows(prepared, [1, 4], None, 0)) == 72
    evaluated = data.held_out_windows(prepared, [2, 0], most=5)
    assert prepared.users[evaluated].tolist() == [2] * 5 + [0] * 5

def test_people_are_known_by_name_and_by_their_recordings_whatever_they_are_called():
    write("own/ann.npz", npz(label=np.repeat(["walking", "dancing"], [700, 550])))
    mine, other = prepare("folder", "own", "mine"), prepare("simulated")
    pooled = data.load("simulated+mine")
    assert len(pooled.windows) == len(mine.windows) + len(other.windows)
    assert data.people(pooled.meta)[5:] == [("simulated-0", "005"), ("mine", "ann")]
    named = [[each.meta["classes"][i] for i in each.labels] for each in (pooled, other, mine)]
    assert named[0] == named[1] + named[2] and pooled.meta["classes"].count("walking") == 1
    write("renamed/bea.npz", npz())                    # the same recording
    again = prepare("folder", "renamed", "again").meta
    refuses("a person is in two sets: bea", data.load, "mine+again")
    assert data.known(again, data.identities(mine.meta, [0])) == [0]
    assert data.known(again, [["mine", "ann"], ["again", "cy"]]) == []         # an older run's
    assert data.known(again, [["again", "bea"]]) == [0]
    write("lab/ann.npz", npz(movement(clock(25, 50, 3.3))))                    # of another lab
    assert data.people(prepare("folder", "lab", "b", source="B").meta) == [("B", "ann")]
    assert len(data.load("mine+b").meta["users"]) == 2

def test_windows_are_scaled_without_an_offset_and_rotated_as_a_whole():
    write("three/ann.npz", npz(X25[:, :3]))
    three, ones = prepare("folder", "three", "three"), np.ones((2, 6, 5), np.float16)
    refuses("--sensors gyro", data.windows_at, three, [0], "gyro")
    refuses("--sensors both", data.windows_at, three, [0], "both")
    prepare("simulated")
    refuses("channels.* differ", data.load, "simulated+three")
    six = {"channels": data.CHANNELS[:6]}
    x = data.windows_at(three._replace(windows=ones, meta=six), [0], "both")
    assert x.dtype == np.float32 and x[0, :, 3] == pytest.approx([1 / 0.7] * 3 + [1 / 1.05] * 3)
    x[:, 3:] = x[:, :3]
    turned = data.random_rotation(x, 1.0, np.random.default_rng(0))
    assert np.allclose(turned[:, 3:], turned[:, :3]) and not np.allclose(turned, x)
    assert np.allclose(np.linalg.norm(turned[:, :3], axis=1), np.linalg.norm(x[:, :3], axis=1))

def test_the_command_line_lists_prepares_draws_and_refuses(run, refused):
    assert run("data.py simulated --users 2 --hours-per-user 0.02")[0] == 0
    for name in ("S01-1", "S01-2", "S02-1", "S02-2"):
        write(f"own/{name}.npz", npz(label=["walk $$ fast"] * 1250))
    write("own/bob.txt", "t,ax")
    _, said, _ = run("data.py folder --raw own --name mine --source lab")
    assert all(words in said for words in ("bob.txt", "2 sources with 2 users each", "S01, S02"))
    assert data.load("mine").meta["sources"] == ["lab"] * 4 and run("data.py plot mine")[0] == 0
    assert Path("data/mine/plot.png").read_bytes()[:4] == b"\x89PNG"
    assert all(name in run("data.py")[1] for name in ("mine", *data.SOURCES))
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
        ours, theirs = (each.windows[each.users == i].astype(float) for each in (prepared, pool))
        assert all(np.abs(theirs - window).mean((1, 2)).min() < 0.003 for window in ours), user
