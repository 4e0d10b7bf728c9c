"""
From recordings to windows: every format in exactly its published layout, written here from one known movement, has to
come out as that movement, 20 times a second, in g and rad/s. Then what must never happen: windows across a gap, sensors
shifted against each other, users on both sides, half-written sets, archives that harm.
"""
import gzip, http.server, io, os, subprocess, sys, threading, zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io

import data
from data import GRAVITY, Refused

HERE = Path(__file__).resolve().parent.parent
REAL = HERE.parent / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real recordings in ../shared/data on this machine")
ONE, TWO = "0A986513-7828-4D53-AA1F-E02D6DF9561B", "1155FF54-63D3-4AB2-9863-8385D0BD0A13"


def movement(t):
    """What every fixture has recorded: acceleration in g around 1 g of gravity, angular velocity in rad/s; (n, 6)."""
    waves = [(0.3, 1.0, 0), (0.2, 2.0, 1), (0.1, 3.0, 2), (1.5, 1.0, 3), (1.0, 2.5, 4), (0.5, 0.7, 5)]
    return np.stack([size * np.sin(2 * np.pi * f * t + phase) for size, f, phase in waves], axis=1) + [0, 0, 1, 0, 0, 0]


def clock(seconds, rate, start=0.0):
    return start + np.arange(round(seconds * rate)) / rate


def text(table, separator=" ", end="\n"):
    return "".join(separator.join(f"{value:.15g}" if isinstance(value, float) else str(value) for value in row) + end
                   for row in (table.tolist() if isinstance(table, np.ndarray) else table))


def write_zip(path, members, packing=zipfile.ZIP_DEFLATED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", packing) as z:
        for name, content in members.items():
            z.writestr(name, content)
    return path


def zip_in_zip(path, inner, members):
    """As the UCI repository packs them; LZMA inside."""
    packed = write_zip(path.parent / "inner.zip", members, zipfile.ZIP_LZMA)
    write_zip(path, {inner: packed.read_bytes(), "README.txt": "x"}, zipfile.ZIP_STORED)
    packed.unlink()


# ---------------------------------------------------------------- the formats, as published
def ucihar(raw):
    members = {"UCI HAR Dataset/activity_labels.txt": "1 WALKING\n"}
    for split, subjects in (("train", [1, 1, 3]), ("test", [2, 2])):
        x = movement(clock(2.56, 50))
        members[f"UCI HAR Dataset/{split}/subject_{split}.txt"] = text([[s] for s in subjects])
        members[f"UCI HAR Dataset/{split}/y_{split}.txt"] = text([[i + 1] for i in range(len(subjects))])
        for sensor, columns in (("total_acc", x[:, :3]), ("body_gyro", x[:, 3:])):
            for axis, column in zip("xyz", columns.T):
                rows = "".join(" " + " ".join(f"{value: .7e}" for value in column) + "\n" for _ in subjects)
                members[f"UCI HAR Dataset/{split}/Inertial Signals/{sensor}_{axis}_{split}.txt"] = rows
    zip_in_zip(raw / "human+activity+recognition+using+smartphones.zip", "UCI HAR Dataset.zip", members)


def wisdm(raw):
    """Gyroscope 0.37 s late and at 25 Hz; user 1601 lacks activity B in one file; user 1602 has one sensor only."""
    members = {"wisdm-dataset/activity_key.txt": "walking = A\n"}
    sensors = ("accel", 0.0, 20, slice(0, 3), GRAVITY), ("gyro", 0.37, 25, slice(3, 6), 1)
    for device in ("phone", "watch"):
        for sensor, late, rate, columns, unit in sensors:
            for user in (1600, 1601, 1602)[:3 if sensor == "accel" else 2]:
                lines = ""
                for i, letter in enumerate("AB" if (user, sensor) != (1601, "gyro") else "A"):
                    t = clock(25, rate, 1000 * i + late)
                    for moment, x in zip(t, movement(t)[:, columns] * unit):
                        lines += f"{user},{letter},{round((252207 + moment) * 1e9)},{x[0]:.7g},{x[1]:.7g},{x[2]:.7g};\n"
                members[f"wisdm-dataset/raw/{device}/{sensor}/data_{user}_{sensor}_{device}.txt"] = lines
    zip_in_zip(raw / data.SOURCES["wisdm_phone"].archives[0].split("/")[-1], "wisdm-dataset.zip", members)


def extrasensory(raw, users=(ONE, TWO), minutes=3):
    """Each user's first minutes whole (the second user's phone in m/s^2), then one of each kind of failure."""
    acc, gyro, labels = {}, {}, {}
    for user in users:
        unit = 1 if user == ONE else GRAVITY
        rows = [[1444079161 + 60 * i, 0.5, *(1 if c == i else 0 for c in range(5)), "nan"] for i in range(minutes)]
        header = ["timestamp", "raw_acc:mean", *(f"label:{c}" for c in data.SOURCES["extrasensory"].classes)]
        labels[f"{user}.features_labels.csv.gz"] = gzip.compress((",".join(header) + "\n" + text(rows, ",")).encode())
        for i in range(minutes + 5):
            minute, start = 1444079161 + 60 * i, 5000.0 + 60 * i
            ta, tg = clock(20.5, 36, start), clock(20.5, 40, start + 0.011)
            a, g = np.c_[ta, movement(ta)[:, :3] * unit], np.c_[tg, movement(tg)[:, 3:]]
            if i == 1:                                           # the clock repeats, runs back, goes wild once
                a[100, 0] = a[99, 0]
                g[200:206, 0] -= 1.0
                g[400, 0] += 1000
            if i == 2:                                           # rows that are no numbers
                a[50, 2], g[60, 1:] = np.nan, np.inf
            if i == minutes + 2:
                a[:, 1:] *= 4 / unit                             # neither g nor m/s^2
            if i == minutes + 3:
                a, g = a[:300], g[:300]                          # too short
            if i == minutes + 4:
                a = np.delete(a, slice(300, 400), 0)             # a gap in its middle
            a, g = ("".join("%.6f %.7g %.7g %.7g\n" % tuple(row) for row in rows) for rows in (a, g))
            acc[f"raw_acc/{user}/{minute}.m_raw_acc.dat"] = a if i != minutes + 1 else "nan\n"
            if i != minutes:
                gyro[f"proc_gyro/{user}/{minute}.m_proc_gyro.dat"] = g
    write_zip(raw / "ExtraSensory.raw_measurements.raw_acc.zip", acc)
    write_zip(raw / "ExtraSensory.raw_measurements.proc_gyro.zip", gyro)
    write_zip(raw / "ExtraSensory.per_uuid_features_labels.zip", labels)


def motionsense(raw):
    header = ",attitude.roll,attitude.pitch,attitude.yaw," + ",".join(
        f"{what}.{axis}" for what in ("gravity", "rotationRate", "userAcceleration") for axis in "xyz") + "\n"
    x, still = movement(clock(25, 50)), np.tile([0.0, 0.0, 1.0], (1250, 1))
    rows = np.c_[np.arange(1250.0), still, still, x[:, 3:], x[:, :3] - still]
    write_zip(raw / "A_DeviceMotion_data.zip", {"A_DeviceMotion_data/wlk_7/sub_1.csv": header + text(rows, ","),
                                                "__MACOSX/A_DeviceMotion_data/wlk_7/._sub_1.csv": b"\x00\x05"})


def uschad(raw):
    file = io.BytesIO()
    x = movement(clock(25, 100)) * ([1] * 3 + [180 / np.pi] * 3)
    scipy.io.savemat(file, {"sensor_readings": x, "activity": "run", "age": "27"})
    write_zip(raw / "USC-HAD.zip", {"USC-HAD/Subject1/a6t1.mat": file.getvalue(), "USC-HAD/Readme.txt": "x"})


def dsads(raw):
    x = np.hstack([movement(clock(25, 25)) * ([GRAVITY] * 3 + [1] * 3), np.zeros((625, 39))])
    write_zip(raw / "daily+and+sports+activities.zip",
              {f"data/a09/p1/s{i + 1:02d}.txt": text(x[125 * i:125 * (i + 1)], ",") for i in range(5)})


def sisfall(raw):
    x = movement(clock(25, 200)) / ([32 / 2**13] * 3 + [np.deg2rad(4000 / 2**16)] * 3)
    rows = np.c_[x, x[:, :3]].round().astype(int).tolist()
    lines = "".join(",".join(f"{value:4d}" for value in row) + ";\n" for row in rows)
    write_zip(raw / "SisFall_dataset.zip", {"SisFall_dataset/SE06/D01_SE06_R01.txt": lines + "  17,-179,\n",
                                            "SisFall_dataset/Readme.txt": "x"})


def wedafall(raw):
    members = {}
    for sensor, start, columns, unit in ("accel", 0.0, slice(0, 3), GRAVITY), ("gyro", 0.12, slice(3, 6), 1):
        t = clock(25, 50, start) + 0.004 * np.sin(np.arange(1250))          # uneven
        rows = np.c_[t, movement(t)[:, columns] * unit]
        members[f"WEDA-FALL-main/dataset/50Hz/D01/U03_R01_{sensor}.csv"] = "time_list,x,y,z\n" + text(rows, ",")
    members["WEDA-FALL-main/dataset/50Hz/D01/U03_R01_vertical_accel.csv"] = "time,x\n"
    write_zip(raw / "WEDA-FALL-main.zip", members)


def hapt(raw):
    x = movement(clock(30, 50))
    write_zip(raw / data.SOURCES["hapt"].archives[0].split("/")[-1], {
        "RawData/acc_exp01_user01.txt": text(x[:, :3]), "RawData/gyro_exp01_user01.txt": text(x[:, 3:]),
        "RawData/labels.txt": "1 1 5 1 1250\n2 1 4 1 9\n"})


FORMATS = {  # name: (writer, users, windows, labels, s between the fixture's start and its first window's)
    "ucihar": (ucihar, ["1", "2", "3"], 5, {"WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS"}, 0),
    "wisdm_phone": (wisdm, ["1600", "1601"], 6, {"walking", "jogging"}, 0.37),
    "wisdm_watch": (wisdm, ["1600", "1601"], 6, {"walking", "jogging"}, 0.37),
    "extrasensory": (extrasensory, [ONE, TWO], 12, {"LYING_DOWN", "SITTING", "OR_standing"}, 0.011),
    "motionsense": (motionsense, ["motionsense_01"], 2, {"wlk"}, 0),
    "uschad": (uschad, ["uschad_01"], 2, {"a6"}, 0),
    "dsads": (dsads, ["dsads_01"], 2, {"a09"}, 0),
    "sisfall": (sisfall, ["sisfall_SE06"], 2, {"D01"}, 0),
    "wedafall": (wedafall, ["wedafall_03"], 2, {"D01"}, 0.12),
    "hapt": (hapt, ["hapt_01"], 2, {"STANDING"}, 0),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


UNITS = {"acc_unit": "g", "gyro_unit": "rad/s"}


def prepare(what, raw="raw", name=None, **more):
    flags = {"extrasensory": {"labels": True}, "folder": UNITS}.get(what, {})
    data.prepare(what, name or what, raw, {**flags, **more.pop("flags", {})}, **more)
    return data.load(name or what)


@pytest.mark.parametrize("what", FORMATS)
def test_every_format_comes_out_as_the_movement_that_was_recorded(what):
    writer, users, n, labels, late = FORMATS[what]
    writer(Path("raw"))
    prepared = prepare(what)
    assert prepared.meta["users"] == users and len(prepared.windows) == n
    assert {prepared.meta["classes"][label] for label in prepared.labels if label >= 0} == labels
    length = prepared.windows.shape[2]
    starts = [late] if what == "ucihar" else [late, late + 10]
    for i, window in enumerate(prepared.windows.astype(float)):
        errors = [np.abs(window.T - movement(start + np.arange(length) / 20)).mean(0) for start in starts]
        assert any(error[:3].max() < 0.01 and error[3:].max() < 0.05 for error in errors), i
    assert prepared.meta["test_users"] == (["2"] if what == "ucihar" else None)
    assert prepared.windows.dtype == np.float16 and prepared.meta["seconds"] == (2.55 if what == "ucihar" else 10)


# ---------------------------------------------------------------- own recordings
def npz(path, x=None, rate=50, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, signal=movement(clock(25, rate)) if x is None else x, rate=rate, **more)


def table(path, t, x, header="t,ax,ay,az,gx,gy,gz", labels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [[*row, *([] if labels is None else [labels[i]])] for i, row in enumerate(np.c_[t, x].tolist())]
    path.write_text(header + ("" if labels is None else ",label") + "\n" + text(rows, ","))


def test_a_folder_of_npz_and_csv_in_any_unit_and_rate():
    t = clock(25, 31.7, 1.7e9)
    npz(Path("own/ann_1.npz"), rate=100, label=np.repeat(["walk", ""], 1250))
    table(Path("own/bob_2.csv"), t, movement(t - t[0]), labels=["-1"] * len(t))
    mine = prepare("folder", "own", "mine")
    assert mine.meta["users"] == ["ann_1", "bob_2"] and mine.meta["sources"] == ["ann", "bob"]
    assert [mine.meta["classes"][label] if label >= 0 else None for label in mine.labels] == ["walk", None, None, None]
    for window, start in zip(mine.windows[[0, 2, 3]], [0, 0, 10]):
        assert np.abs(window.T - movement(start + np.arange(200) / 20)).mean(0).max() < 0.02
    table(Path("other/cy.csv"), t, movement(t)[:, :3] * GRAVITY, header="t,ax,ay,az")
    assert prepare("folder", "other", flags={"acc_unit": "m/s2"}).windows.shape == (2, 3, 200)


def test_no_window_crosses_a_recording_a_gap_or_a_label_change():
    """Each stretch holds a value of its own, so a window that crossed two would not be constant."""
    stretches = [(25, "r1", "a"), (25, "r1", "b"), (12, "r2", "b"), (9, "r3", "b"), (15, "r3", "c")]
    level = np.repeat(np.arange(len(stretches)), [50 * seconds for seconds, _, _ in stretches])
    x = np.zeros((len(level), 6)) + [0, 0, 1, 0, 0, 0]
    x[:, 3] = level / 10
    segment, label = (np.array([stretch[i] for stretch in stretches])[level] for i in (1, 2))
    npz(Path("own/u.npz"), x, segment=segment, label=label)
    t = clock(40, 50)
    t = t[(t < 18) | (t > 18.6)]                                 # 0.6 s without a sample: 18 s and 21 s are left
    x = np.zeros((len(t), 6)) + [0, 0, 1, 0, 0, 0]
    x[:, 3] = t > 18
    table(Path("own/v.csv"), t, x)
    windows, users, labels, left_out = data.cut(data.folder("u", ["own/u.npz"], None, UNITS), 200)
    assert labels.tolist() == list("aabbbc") and np.ptp(windows, axis=2).max() < 1e-3 and sum(left_out.values()) == 1
    windows, *_ = data.cut(data.folder("v", ["own/v.csv"], None, UNITS), 200)
    assert windows[:, 3, 0].tolist() == [0, 1, 1] and np.ptp(windows, axis=2).max() < 1e-3


def test_what_is_too_fast_for_20_hz_is_filtered_out_not_folded_back():
    t = clock(30, 100)
    for frequency, gain in ((1, 1), (5, 1), (15, 0), (21, 0), (39, 0)):
        y = data.resample(t, np.sin(2 * np.pi * frequency * t)[:, None], 0, 590)[20:-20]
        assert abs(np.sqrt(2 * np.mean(y**2)) - gain) < 0.01, frequency


@pytest.mark.parametrize("harm", ["repeat", "swap", "back", "wild", "blank"])
def test_a_clock_that_errs_costs_the_rows_in_error(harm):
    t = clock(21, 40)
    x = movement(t)
    if harm == "repeat":
        t[100:400:3] = t[99:399:3]
    elif harm == "swap":
        t[[200, 201]] = t[[201, 200]]
    elif harm == "back":
        t[300:310] -= 2
    elif harm == "wild":
        t[[50, 500]] = 1e9, -1e9
    else:
        t[7], x[9, 2] = np.nan, np.inf
    (y,) = data.pieces([(t, x)], 200)
    assert len(y) >= 419 and np.abs(y - movement(np.arange(len(y)) / 20)).mean(0).max() < 0.02


def test_a_clock_set_back_for_good_cuts_the_recording():
    t, x = np.r_[clock(15, 40), clock(15, 40, 3)], movement(clock(30, 40))
    for y in data.pieces([(t, x)], 100):
        ticks = np.arange(len(y)) / 20
        assert min(np.abs(y - movement(start + ticks)).mean(0).max() for start in (0, 15)) < 0.02


T25, X25 = clock(25, 50), movement(clock(25, 50))


def lines(*rows):
    return lambda own: (own.mkdir(), (own / "u.csv").write_text("\n".join(rows)))


def arrays(x=X25, rate=50, **more):
    return lambda own: npz(own / "u.npz", x, rate, **more)


BAD = {  # what makes a folder unusable: (how it is made, words of the sentence)
    "no folder": (lambda own: None, "holds no .npz or .csv"),
    "no recordings": (lambda own: (own.mkdir(), (own / "notes.txt").write_text("x")), "holds no .npz or .csv"),
    "user twice": (lambda own: (npz(own / "u.npz"), table(own / "u.csv", T25, X25)), "as .csv and as .npz"),
    "wrong columns": (lines("time,a,b,c", "0,0,0,1"), "needs the columns"),
    "text in a number": (lines("t,ax,ay,az", "0,0,0,1", "0.1,0,oops,1"), "oops"),
    "short row": (lines("t,ax,ay,az", "0,0,0,1", "0.1,0"), "can't be read"),
    "empty file": (lines(""), "needs the columns"),
    "empty user": (lines("t,ax,ay,az"), "too few samples"),
    "too short": (arrays(X25[:450]), "too few samples"),
    "milliseconds": (lambda own: table(own / "u.csv", 1000 * T25, X25), "stamps are 20 s apart"),
    "missing value": (arrays(np.where(np.arange(1250)[:, None] == 7, np.nan, X25)), "row 8"),
    "five channels": (arrays(np.ones((999, 5))), r"must be numbers, \(n, 6\)"),
    "no rate": (lambda own: (own.mkdir(), np.savez(own / "u.npz", signal=X25)), "'rate'"),
    "silly rate": (arrays(rate=-5), "'rate' is -5"),
    "label too short": (arrays(label=np.arange(3)), "as long as 'signal'"),
    "pickles": (arrays(np.array([{}], object)), "plain arrays"),
    "cut off": (lambda own: (npz(own / "u.npz"), os.truncate(own / "u.npz", 900)), "not a whole .npz"),
    "m/s^2": (arrays(X25 * ([GRAVITY] * 3 + [1] * 3)), "--acc-unit m/s2"),
    "deg/s": (arrays(X25 * ([1] * 3 + [57.3] * 3)), "--gyro-unit deg/s"),
    "one and both sensors": (lambda own: (npz(own / "u.npz"), npz(own / "v.npz", X25[:, :3])), "some have one"),
}


@pytest.mark.parametrize("why", BAD)
def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence_and_leaves_nothing(why, capfd):
    make, words = BAD[why]
    make(Path("own"))
    with pytest.raises(Refused, match=words) as refusal:
        prepare("folder", "own", "mine")
    assert "\n" not in str(refusal.value) and {path.name for path in Path("data").glob("*")} <= {".lock"}
    assert "Traceback" not in capfd.readouterr().err


# ---------------------------------------------------------------- archives that harm
def bomb(raw):
    with zipfile.ZipFile(write_zip(raw / "USC-HAD.zip", {}), "w", zipfile.ZIP_DEFLATED) as z:
        with z.open("USC-HAD/Subject1/a1t1.mat", "w") as file:
            for _ in range(70):
                file.write(bytes(1 << 20))


def damaged(raw):
    uschad(raw)
    packed = bytearray((raw / "USC-HAD.zip").read_bytes())
    packed[300:340] = bytes(40)
    (raw / "USC-HAD.zip").write_bytes(packed)


def holding(members):
    return lambda raw: write_zip(raw / "USC-HAD.zip", members)


HOSTILE = {
    "upwards": (holding({"USC-HAD/../../../etc/Subject1/a1t1.mat": "x"}), "points outside"),
    "absolute": (holding({"/Subject1/a1t1.mat": "x"}), "points outside"),
    "endless": (bomb, "would inflate to 70 MiB"),
    "truncated": (lambda raw: (uschad(raw), os.truncate(raw / "USC-HAD.zip", 5000)), "not the published archive"),
    "damaged": (damaged, "can't be read"),
    "no zip": (lambda raw: (raw.mkdir(), (raw / "USC-HAD.zip").write_text("<html>")), "not the published archive"),
    "something else": (holding({"holiday.jpg": "x"}), "no file like the published"),
    "other content": (holding({"USC-HAD/Subject1/a1t1.mat": "x" * 999}), "not laid out as uschad was published"),
}


@pytest.mark.parametrize("why", HOSTILE)
def test_a_hostile_or_broken_archive_is_refused_and_what_was_prepared_is_untouched(why):
    uschad(Path("good"))
    before = prepare("uschad", "good").meta
    make, words = HOSTILE[why]
    make(Path("raw"))
    with pytest.raises(Refused, match=words):
        prepare("uschad", force=True)
    assert data.load("uschad").meta == before and {path.name for path in Path("data").iterdir()} == {".lock", "uschad"}


@pytest.mark.parametrize("harm, words", [
    (lambda text: text.replace(",A,", ",N,", 1), "A to S, no N"),
    (lambda text: text.replace(";\n", "oops;\n", 1), "columns of numbers"),
    (lambda text: text[:-20], "columns of numbers")])
def test_lines_that_wisdm_does_not_have_are_refused(harm, words):
    lines = "".join(f"1600,A,{i * 50_000_000},0,0,9.8;\n" for i in range(300))
    read = lambda name: harm(lines).encode()
    with pytest.raises(Refused, match=words):
        list(data.wisdm("1600", ["raw/phone/accel/x.txt", "raw/phone/gyro/x.txt"], read))


# ---------------------------------------------------------------- once, again, otherwise, and after a kill
def test_preparing_twice_is_a_no_op_other_settings_are_refused_and_force_redoes(capsys):
    for i in range(3):
        npz(Path(f"own/u{i}.npz"))
    first = prepare("folder", "own", "mine")
    made = os.stat("data/mine/windows.npy").st_mtime_ns
    prepare("folder", "own", "mine")
    assert "already" in capsys.readouterr().out and os.stat("data/mine/windows.npy").st_mtime_ns == made
    with pytest.raises(Refused, match="limit_users None"):
        prepare("folder", "own", "mine", limit=2)
    assert prepare("folder", "own", "mine", limit=2, force=True).meta["users"] == ["u0", "u1"]
    assert len(first.windows) == 6                               # an open map outlives its replacement
    npz(Path("own/u1.npz"), rate=60)
    with pytest.raises(Refused, match="other recordings"):
        prepare("folder", "own", "mine", limit=2)


def test_extrasensory_goes_on_with_the_users_not_yet_done(monkeypatch, tmp_path):
    extrasensory(Path("raw"))
    whole = prepare("extrasensory", name="whole")
    monkeypatch.setattr(data, "gather", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare("extrasensory")
    monkeypatch.undo()
    os.chdir(tmp_path)                                           # undone, too
    left = sorted(Path("data/.extrasensory.partial").glob("part-*"))
    left[1].unlink()                                             # as if killed before the second user was done
    original = data.extrasensory

    def watched(user, *args):
        Path(f"read-{user}").touch()
        return original(user, *args)
    monkeypatch.setattr(data, "extrasensory", watched)
    again = prepare("extrasensory")
    assert [path.name for path in Path().glob("read-*")] == [f"read-{TWO}"]
    assert again.meta["fingerprint"] == whole.meta["fingerprint"] and not Path("data/.extrasensory.partial").exists()
    assert whole.meta["left_out"] == {"recordings of one sensor only": 2, "recordings that failed": 2,
                                      "recordings neither in g nor in m/s^2": 2, data.TOO_SHORT: 4}


def test_a_set_that_was_damaged_or_changed_is_noticed():
    prepare("simulated", flags=dict(users=2, hours_per_user=0.01, spread=1.0, seed=0))
    windows = np.load("data/simulated/windows.npy", mmap_mode="r+")
    windows[3, 0, 0] += 1
    windows.flush()
    with pytest.raises(Refused, match="changed after it was prepared"):
        data.load("simulated")
    Path("data/simulated/meta.json").write_text("{")
    with pytest.raises(Refused, match="meta.json is damaged"):
        data.load("simulated")
    with pytest.raises(Refused, match="not prepared"):
        data.load("nothing")


# ---------------------------------------------------------------- downloads, from a server that misbehaves
class Misbehaving(http.server.BaseHTTPRequestHandler):
    """GET /KIND/...: an archive of 600 kB, delivered as KIND says; `seen` is what was asked for."""
    content = io.BytesIO()
    seen = []

    def do_GET(self):
        kind, body, span = self.path.split("/")[1], self.content.getvalue(), self.headers.get("Range")
        first = not any(path == self.path for path, _ in self.seen)
        self.seen.append((self.path, span))
        start = int(span[6:-1]) if span and kind not in ("no-range", "wrong-size") else 0
        status = {"gone": 404, "busy": 503 if first else 200, "redirect": 302}.get(kind, 206 if start else 200)
        self.send_response(status)
        if kind == "redirect":
            self.send_header("Location", "/whole/a.zip")
        if kind == "html":
            body = b"<html>Please log in</html>"
            self.send_header("Content-Type", "text/html; charset=utf-8")
        if kind == "other":
            body = b"no archive at all" * 1000
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start + (7 if kind == "wrong-size" else 0)))
        self.end_headers()
        cut = kind in ("cut", "no-range") and first
        self.wfile.write(body[start:len(body) // 2] if cut else body[start:])

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with zipfile.ZipFile(Misbehaving.content, "w") as z:
        z.writestr("noise", np.random.default_rng(0).bytes(600_000))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.mark.parametrize("kind, requests, goes_on", [
    ("whole", 1, False), ("cut", 2, True), ("no-range", 2, True), ("busy", 2, False), ("redirect", 2, False)])
def test_a_download_arrives_whole_whatever_the_server_does(kind, requests, goes_on, server, tmp_path):
    Misbehaving.seen.clear()
    data.download(f"{server}/{kind}/a.zip", tmp_path / "a.zip", wait=0.01)
    assert (tmp_path / "a.zip").read_bytes() == Misbehaving.content.getvalue()
    assert not (tmp_path / "a.zip.part").exists()
    assert len(Misbehaving.seen) == requests
    assert (Misbehaving.seen[-1][1] is not None) == goes_on      # asked for the rest only


@pytest.mark.parametrize("kind, words", [("html", "page"), ("gone", "404"), ("other", "not the published archive"),
                                         ("wrong-size", "failed six times"), ("whole", "wrong checksum")])
def test_a_download_that_cannot_succeed_says_why_and_leaves_no_archive(kind, words, server, tmp_path, monkeypatch):
    monkeypatch.setitem(data.CHECKSUMS, "a.zip", "0" * 40)
    with pytest.raises(Refused, match=words):
        data.download(f"{server}/{kind}/a.zip", tmp_path / "a.zip", wait=0.01)
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_stops_a_download_with_the_systems_own_words(server, tmp_path):
    (tmp_path / "a.zip.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        data.download(f"{server}/whole/a.zip", tmp_path / "a.zip")


def test_what_has_no_lasting_address_is_asked_for_by_name(server, monkeypatch):
    for source in data.POOL:
        url = data.SOURCES[source].archives[0]
        if "://" in url:
            monkeypatch.setattr(data.SOURCES[source], "archives", (f"{server}/whole/{url.split('/')[-1]}",))
    monkeypatch.setattr(data, "CHECKSUMS", {})
    with pytest.raises(Refused, match="SisFall_dataset.zip is missing and has no lasting address"):
        prepare("pool")
    assert len(list(Path("raw").glob("*.zip"))) == 4             # the others were fetched


# ---------------------------------------------------------------- the simulated population
POPULATION = dict(users=6, hours_per_user=0.1, spread=1.0, seed=0)


def test_the_simulated_population_is_labelled_seeded_and_of_the_length_asked_for():
    one = prepare("simulated", name="one", flags=POPULATION)
    assert len(one.windows) == 6 * 36 and one.labels.min() >= 0 and np.bincount(one.users).tolist() == [36] * 6
    two, three = (prepare("simulated", name=f"seed{seed}", flags=POPULATION | {"seed": seed}) for seed in (0, 1))
    assert two.meta["fingerprint"] == one.meta["fingerprint"] != three.meta["fingerprint"]
    norm = np.linalg.norm(one.windows[:, :3].astype(float).mean(2), axis=1)
    assert abs(np.median(norm) - 1) < 0.1                        # gravity


def test_spread_is_what_sets_people_apart():
    crowd = lambda spread: [data.person(np.random.default_rng(seed), spread) for seed in range(30)]
    people = {spread: crowd(spread) for spread in (0, 0.5, 1)}
    deviation = {spread: np.std([who["strides"] for who in them]) for spread, them in people.items()}
    assert deviation[0] < 1e-12 and deviation[0.5] == pytest.approx(deviation[1] / 2) and 0.05 < deviation[1] < 0.13
    assert all(np.array_equal(people[0][0][trait], who[trait]) for who in people[0] for trait in who)


# ---------------------------------------------------------------- read back: held-out users, pooling
def test_held_out_users_never_change_and_training_users_are_nested_and_alternate():
    meta = {"name": "m", "users": [f"{source}_{i}" for source in "abc" for i in range(12)],
            "sources": [source for source in "abc" for _ in range(12)]}
    choose, measure = data.held_out_users(meta)
    assert len(choose) == len(measure) == 3 and not set(choose) & set(measure)
    for seed in range(3):
        order = data.training_users(meta, seed)
        assert sorted([*order, *choose, *measure]) == list(range(36))
        assert all(len({meta["sources"][user] for user in order[i:i + 3]}) == 3 for i in range(0, 30, 3))
    assert data.training_users(meta, 0) != data.training_users(meta, 1)
    with pytest.raises(Refused, match="held out"):
        data.training_users({"name": "m", "users": ["a", "b"], "sources": ["s", "s"]}, 0)


def test_fewer_hours_are_a_subset_of_more_hours():
    prepared = prepare("simulated", flags=POPULATION)
    few, more = (set(data.draw_windows(prepared, [1, 4], hours, 0).tolist()) for hours in (0.02, 0.05))
    assert len(few) == 2 * 7 and len(more) == 2 * 18 and few < more
    assert len(data.draw_windows(prepared, [1, 4], None, 0)) == 72


def test_sets_are_pooled_with_users_kept_apart_and_classes_merged_by_name():
    npz(Path("own/ann.npz"), label=np.repeat(["walking", "dancing"], [700, 550]))
    mine, other = prepare("folder", "own", "mine"), prepare("simulated", flags=POPULATION)
    pooled = data.load("simulated+mine")
    assert len(pooled.windows) == len(mine.windows) + len(other.windows) and len(pooled.meta["users"]) == 7
    assert pooled.meta["sources"][-1] == "mine" and pooled.users[-1] == 6
    assert pooled.meta["classes"][pooled.labels[-1]] == "dancing" and pooled.meta["classes"].count("walking") == 1
    assert [pooled.meta["classes"][i] for i in pooled.labels[:216]] == [other.meta["classes"][i] for i in other.labels]
    with pytest.raises(Refused, match="several"):
        data.load("mine+mine")
    npz(Path("three/ann.npz"), movement(clock(25, 50))[:, :3])
    prepare("folder", "three", "three")
    with pytest.raises(Refused, match="channels differ"):
        data.load("mine+three")


# ---------------------------------------------------------------- the command line, and real recordings
def test_the_command_line_lists_prepares_draws_and_refuses():
    def run(*words):
        done = subprocess.run([sys.executable, str(HERE / "data.py"), *words], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    assert run("simulated", "--users", "2", "--hours-per-user", "0.02")[0] == 0
    assert run("plot", "simulated")[0] == 0 and Path("data/simulated/plot.png").read_bytes()[:4] == b"\x89PNG"
    code, listed, _ = run()
    assert code == 0 and all(name in listed for name in data.SOURCES)
    for words in (["nonsense"], ["simulated", "--name", "a+b"], ["plot", "nothing"], ["simulated", "--users", "3"]):
        code, out, err = run(*words)
        assert code == 2 and out == "" and len(err.splitlines()) == 1, words


@needs_real
@pytest.mark.parametrize("source", data.POOL)
def test_the_pool_rebuilt_from_published_archives_equals_the_one_that_lies_here(source):
    """But for rounding to float16; WEDA-FALL's stamps come in bursts, which were made even in another way there."""
    prepared = prepare(source, REAL / "raw" / "samples")
    for i, user in enumerate(prepared.meta["users"]):
        own = data.folder(user, [str(REAL / "pool" / f"{user}.npz")], None, UNITS)
        there = data.cut(own, 200)[0].astype(np.float32)
        for window in prepared.windows[prepared.users == i].astype(np.float32):
            same = there[np.abs(there - window).mean((1, 2)).argmin()]
            moves = np.std(window - window.mean(1, keepdims=True))
            assert np.abs(same - window).mean() < (0.1 * moves if source == "wedafall" else 0.003), user


@needs_real
def test_real_wisdm_recordings_have_all_classes_and_gravity():
    prepared = prepare("wisdm_watch", REAL / "raw", limit=2)
    assert prepared.windows.shape[0] > 600 and prepared.meta["users"] == ["1600", "1601"]
    assert np.bincount(prepared.labels, minlength=18).min() >= 30
    assert abs(np.median(np.linalg.norm(prepared.windows[:, :3].astype(float).mean(2), axis=1)) - 1) < 0.1
