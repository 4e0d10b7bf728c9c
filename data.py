"""
Recordings to windows: every data set of the study, cut in the same way.

    archive, folder or simulation    20-200 Hz, uneven stamps, g or m/s^2, rad/s or deg/s
      -> recording (n, 6) at 20 Hz   both sensors on one clock, low-passed; g (with gravity), rad/s
      -> windows (n, C, T)           10 s = 200 samples, no overlap
      -> data/NAME/                  windows.npy float16, users.npy, labels.npy, meta.json

    python data.py                                  # which sets there are, and which are prepared
    python data.py wisdm_watch                      # a published archive, downloaded if missing
    python data.py folder --raw my_recordings --name mine
    python data.py plot mine                        # a picture: data/mine/plot.png

To add a corpus, write a row of SOURCES and a parser of the same name.
"""
import argparse, contextlib, fcntl, functools, hashlib, io, itertools, json, math, os
import multiprocessing, platform, re, shutil, signal, subprocess, sys, threading
import zipfile, zlib
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path

import numpy as np

RATE, SECONDS = 20, 10                             # Hz, s: a window has 200 samples
CHANNELS = ["acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z"]
SCALE = {"acc": 0.7, "gyro": 1.05}                 # g, rad/s: the model's input is divided by it
GRAVITY, DEGREE = 9.80665, np.pi / 180             # m/s^2 in 1 g, rad in 1 degree
GAP, LARGEST = 0.5, 1e4                            # s without a sample, a value: more is an error
MEMBER_LIMIT, ZIP_LIMIT = 64 << 20, 1 << 30        # bytes that a file, a zip may inflate to
ONE_SENSOR = "recordings of one sensor only"

# ---------------------------------------------------------------- the table of sources
# members: which files are read; group 1 is the part, mostly a user. archives: their addresses, or a
# mere name where no address lasts. classes: label i is classes[i]; (): the labels in the files.
Source = namedtuple("Source", "text members archives classes length", defaults=("", (), (), 200))
UCI, GITHUB = "https://archive.ics.uci.edu/static/public/", "https://github.com/"
UCIHAR = "WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING"
UCIHAR_ZIP = UCI + "240/human+activity+recognition+using+smartphones.zip"
WISDM = ("walking jogging stairs sitting standing typing teeth soup chips pasta drinking sandwich "
         "kicking catch dribbling writing clapping folding").split()     # A to S; there is no N
WISDM_ZIP = UCI + "507/wisdm+smartphone+and+smartwatch+activity+and+biometrics+dataset.zip"
EXTRASENSORY = "http://extrasensory.ucsd.edu/data/raw_measurements/ExtraSensory.raw_measurements."
MOTIONSENSE_ZIP = GITHUB + "mmalekzadeh/motion-sense/raw/master/data/A_DeviceMotion_data.zip"
WEDAFALL_ZIP = GITHUB + "joaojtmarques/WEDA-FALL/archive/refs/heads/main.zip#/WEDA-FALL-main.zip"
SOURCES = {
    "simulated": Source("a simulated population"),
    "folder": Source("own recordings: a folder with one .npz or .csv a user"),
    "ucihar": Source("UCI HAR (Anguita 2013): 30 users, phone at the waist, 50 Hz, 2.56 s",
                     r"/(train|test)/.*\.txt$", (UCIHAR_ZIP,), UCIHAR, 51),
    "wisdm_phone": Source("WISDM (Weiss 2019): 51 users, phone in the pocket, 20 Hz",
                          r"raw/phone/\w+/data_(\d+)_\w+\.txt$", (WISDM_ZIP,), WISDM),
    "wisdm_watch": Source("WISDM (Weiss 2019): 51 users, watch on the wrist, 20 Hz",
                          r"raw/watch/\w+/data_(\d+)_\w+\.txt$", (WISDM_ZIP,), WISDM),
    "extrasensory": Source("ExtraSensory (Vaizman 2017): 60 users, phone in free living, 40 Hz",
                           r"([^/]+)/\d+\.m_(?:raw_acc|proc_gyro)\.dat$",
                           (EXTRASENSORY + "raw_acc.zip", EXTRASENSORY + "proc_gyro.zip")),
    "dsads": Source("Daily and Sports Activities (Barshan 2010): 8 users, torso, 25 Hz",
                    r"/a\d+/p(\d+)/s\d+\.txt$", (UCI + "256/daily+and+sports+activities.zip",)),
    "motionsense": Source("MotionSense (Malekzadeh 2019): 24 users, phone in the pocket, 50 Hz",
                          r"^A.*/[a-z]+_\d+/sub_(\d+)\.csv$", (MOTIONSENSE_ZIP,)),
    "sisfall": Source("SisFall (Sucerquia 2017): 38 users, waist, 200 Hz, with falls",
                      r"/(S[AE]\d+)/[DF]\d+_S[AE]\d+_R\d+\.txt$", ("SisFall_dataset.zip",)),
    "uschad": Source("USC-HAD (Zhang 2012): 14 users, hip, 100 Hz",
                     r"/Subject(\d+)/a\d+t\d+\.mat$", ("https://sipi.usc.edu/had/USC-HAD.zip",)),
    "wedafall": Source("WEDA-FALL (Marques 2022): 25 users, wrist, 50 Hz, with falls",
                       r"/50Hz/[DF]\d+/U(\d+)_R\d+_(?:accel|gyro)\.csv$", (WEDAFALL_ZIP,)),
    "pool": Source("dsads, motionsense, sisfall, uschad and wedafall, unlabelled: 109 users"),
}
POOL = "dsads", "motionsense", "sisfall", "uschad", "wedafall"

# ---------------------------------------------------------------- what all commands share
class UserError(Exception):
    """Input that can't be used, in one sentence: what, where, and what to do."""

def require(condition, sentence):
    if not condition:
        raise UserError(sentence)

def command(main):
    """Run `main()` as a command line: an error is one sentence on stderr, never a traceback."""
    try:
        sys.exit(main())
    except BrokenPipeError:                        # `| head` has read enough
        os._exit(141)
    except (UserError, BrokenProcessPool) as error:
        message, status = error, 2
    except OSError as error:                       # a full disk, a folder that can't be written to
        message, status = f"{error}: make room or choose another place, and run it again", 2
    except KeyboardInterrupt:
        message, status = "stopped; run the same command again", 130
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)

@contextlib.contextmanager
def replacing(path):
    """Yield a temporary name to write to; the file replaces `path` only if nothing went wrong."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def write_json(path, content):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

def provenance():
    """What made a result: the git commit (with + if files were changed) and the versions used."""
    git = subprocess.run("git describe --always --exclude='*' --abbrev=40 --dirty=+", shell=True,
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {package: metadata.version(package) for package in ("torch", "numpy", "scipy")}
    return {"commit": git.stdout.strip(), "python": platform.python_version(), **versions}

def random_stream(*key):
    """A random generator for each use, by name: random_stream(seed, "masks", step)."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in key])

# ---------------------------------------------------------------- stamps to a clock, to windows
def unbroken(t, x):
    """The stretches [(t, x), ...] of one sensor: without the rows whose stamp or value is wrong,
    cut where samples of GAP seconds are missing."""
    kept = np.flatnonzero(np.isfinite(t) & (np.abs(x) < LARGEST).all(1))
    steps = np.diff(t[kept], prepend=-np.inf, append=np.inf)
    kept = kept[(steps[:-1] < GAP) | (steps[1:] > 0)]            # not far ahead, for one row
    latest = np.maximum.accumulate(t[kept])
    kept = kept[np.diff(latest, prepend=-np.inf) > 0]            # not repeated, not running back
    steps, dropped = np.diff(t[kept]), np.diff(kept) - 1
    typical = np.median(steps) if len(steps) else 0
    cuts = np.flatnonzero((steps > GAP) | (dropped * typical > GAP)) + 1
    return [(t[rows], x[rows]) for rows in np.split(kept, cuts) if len(rows) > 1]

def resample(t, x, start, n):
    """The signal x (rows, columns) with stamps t (s) at n ticks of the 20 Hz clock from `start`:
    interpolated to an even grid of 80 Hz or more, low-passed without phase shift, thinned out."""
    from scipy.interpolate import make_interp_spline             # late, so that commands start fast
    from scipy.signal import firwin, resample_poly
    steps = np.diff(t)
    even = len(t) > 3 and steps.max() < 1.5 * np.median(steps) < 3 * steps.min()
    k = max(4, math.ceil(len(steps) / (t[-1] - t[0]) / RATE - 1e-6))
    grid = np.clip(start + np.arange((n - 1) * k + 1) / (RATE * k), t[0], t[-1])
    x = make_interp_spline(t, x, k=3 if even else 1)(grid)       # a cubic overshoots where uneven
    low_pass = firwin(RATE * k + 1, 9.0, fs=RATE * k, window=("kaiser", 5.65))       # half at 9 Hz
    return resample_poly(x, 1, k, window=low_pass, padtype="antireflect")

def cut(recordings, length):
    """Recordings (user, label, streams) to windows (n, C, length) float16, the user and label of
    each, and a count of what was left out and why. streams: one (t, x), or one for each sensor,
    paired by their stamps; or the reason why there is none. No window crosses a gap."""
    windows, rows, left_out = [], [], Counter()
    for user, label, streams in recordings:
        if isinstance(streams, str):
            left_out[streams] += 1
            continue
        before = len(rows)
        for pair in itertools.product(*(unbroken(t, x) for t, x in streams)):
            start, end = max(t[0] for t, _ in pair), min(t[-1] for t, _ in pair)
            n = math.floor((end - start) * RATE + 1e-6) + 1
            if n >= length:
                x = np.hstack([resample(t, x, start, n) for t, x in pair])           # (n, C)
                x = x[:n // length * length].reshape(n // length, length, -1)
                windows.append(x.transpose(0, 2, 1).astype(np.float16))
                rows += [(user, label or "")] * len(x)
        left_out["recordings shorter than a window, once cut at gaps"] += len(rows) == before
    windows = np.concatenate(windows) if windows else np.empty((0, 0, length), np.float16)
    return windows, rows, +left_out

# ---------------------------------------------------------------- a parser for each format
# It reads one part, mostly a user: given the part's name, the names of its files, a function that
# returns the bytes of a file, and the settings, it yields recordings (user, label, streams).
def numbers(text, columns, name):
    """(rows, columns) from bytes: numbers between blanks, commas or semicolons."""
    try:
        values = text.replace(b",", b" ").replace(b";", b" ").split()
        return np.fromiter(map(float, values), float).reshape(-1, columns)
    except ValueError:
        raise UserError(f"{name} is not {columns} columns of numbers; fetch it again") from None

def ucihar(split, names, read, settings):
    """Each published window is a recording of 128 samples at 50 Hz, in g and rad/s."""
    def table(what, columns=1):
        name = f"{names[0].partition(f'/{split}/')[0]}/{split}/{what}_{split}.txt"
        return numbers(read(name), columns, name)
    users, labels = table("subject").astype(int).ravel(), table("y").astype(int).ravel()
    signals = [table(f"Inertial Signals/{sensor}_{axis}", 128)
               for sensor in ("total_acc", "body_gyro") for axis in "xyz"]
    for user, label, *window in zip(users, labels, *signals, strict=True):
        if user <= (settings["limit_users"] or user):
            yield str(user), UCIHAR[label - 1], [(np.arange(128) / 50, np.stack(window, axis=1))]

def wisdm(user, names, read, settings):
    """A file for each sensor, lines `user,activity,ns,x,y,z;`, m/s^2, rad/s; the clocks differ."""
    sensors = []
    for name in sorted(names):                     # accel, then gyro
        text, unit = read(name), GRAVITY if "/accel/" in name else 1
        activity = np.array(re.findall(rb",([A-MO-S]),", text), "S1")
        table = numbers(re.sub(rb",[A-MO-S],", b",", text), 5, name)
        require(len(activity) == len(table), f"{name} has activities other than A to S without N")
        rows = np.argsort(table[:, 1], kind="stable")
        sensors.append((activity[rows], table[rows, 1] / 1e9, table[rows, 2:] / unit))
    for letter, label in zip("ABCDEFGHIJKLMOPQRS", WISDM):
        rows = [activity == letter.encode() for activity, *_ in sensors]
        streams = [(t[here], x[here]) for here, (_, t, x) in zip(rows, sensors)]
        whole = len(streams) == 2 and all(len(t) for t, _ in streams)
        yield user, label, streams if whole else "activities that a sensor lacks"

def extrasensory(user, names, read, settings):
    """A file for each sensor and minute, lines `clock_s x y z`; acceleration in g or in m/s^2."""
    for name in sorted({name.replace("proc_gyro", "raw_acc") for name in names}):
        try:
            acc, gyro = (numbers(read(file), 4, file)
                         for file in (name, name.replace("raw_acc", "proc_gyro")))
        except (KeyError, UserError) as error:     # no such file, or it holds a mere "nan"
            failed = "recordings that failed" if isinstance(error, UserError) else ONE_SENSOR
            yield user, None, failed
            continue
        norms = np.linalg.norm(acc[:, 1:], axis=1)
        norm = np.median(norms[norms < LARGEST]) if (norms < LARGEST).any() else 0
        unit = 1 if 0.7 <= norm <= 1.5 else GRAVITY if 6 <= norm <= 15 else None
        streams = [(acc[:, 0], acc[:, 1:] / (unit or 1)), (gyro[:, 0], gyro[:, 1:])]
        yield user, None, streams if unit else "recordings neither in g nor in m/s^2"

def dsads(user, names, read, settings):
    """25 Hz, m/s^2 and rad/s; files of 5 s x 45 columns, torso first, that follow on each other."""
    for activity, files in itertools.groupby(sorted(names), lambda name: name.split("/")[-3]):
        x = np.vstack([numbers(read(name), 45, name)[:, :6] for name in files])
        yield user, activity, [(np.arange(len(x)) / 25, x / ([GRAVITY] * 3 + [1] * 3))]

def motionsense(user, names, read, settings):
    """50 Hz; columns: index, attitude (3), gravity (3), rad/s (3), acceleration but gravity (3)."""
    for name in names:
        table = numbers(read(name).partition(b"\n")[2], 13, name)
        x = np.hstack([table[:, 4:7] + table[:, 10:13], table[:, 7:10]])
        yield user, name.split("/")[-2].split("_")[0], [(np.arange(len(x)) / 50, x)]

def sisfall(user, names, read, settings):
    """200 Hz, nine integers a line: acceleration (32 g in 13 bits), rotation (4000 deg/s in 16)."""
    for name in names:
        lines = [line for line in read(name).splitlines() if line.count(b",") == 8]  # some are cut
        x = numbers(b"\n".join(lines), 9, name)[:, :6]
        x = x * ([32 / 2**13] * 3 + [4000 / 2**16 * DEGREE] * 3)
        yield user, name.split("/")[-1].split("_")[0], [(np.arange(len(x)) / 200, x)]

def uschad(user, names, read, settings):
    """100 Hz, MATLAB files with one array (n, 6), g and deg/s."""
    from scipy.io import loadmat
    for name in names:
        (x,) = (x for x in loadmat(io.BytesIO(read(name))).values() if np.shape(x)[1:] == (6,))
        x = x * ([1] * 3 + [DEGREE] * 3)
        yield user, name.split("/")[-1].split("t")[0], [(np.arange(len(x)) / 100, x)]

def wedafall(user, names, read, settings):
    """About 50 Hz, a file for each sensor, a header, lines `time_s,x,y,z`, m/s^2 and rad/s."""
    for name in (name for name in names if name.endswith("_accel.csv")):
        streams, gyro = ONE_SENSOR, name.replace("_accel.", "_gyro.")
        if gyro in names:
            acc, gyro = (numbers(read(file).partition(b"\n")[2], 4, file) for file in (name, gyro))
            streams = [(acc[:, 0], acc[:, 1:] / GRAVITY), (gyro[:, 0], gyro[:, 1:])]
        yield user, name.split("/")[-2], streams

# ---------------------------------------------------------------- own recordings
def folder(user, names, read, settings):
    """One .npz (signal, rate, segment, label) or .csv (t, ax ay az, gx gy gz, label) a user."""
    path = names[0]
    t, x, segment, label = (read_npz if path.suffix == ".npz" else read_csv)(path)
    good = (np.abs(x) < LARGEST).all(1) & np.isfinite(t)
    require(good.all(), f"{path}: row {good.argmin() + 1} has a missing or impossible value; leave "
            f"such rows out (the recording is cut where more than {GAP} s are missing)")
    acc, gyro, unit = x[:, :3], x[:, 3:], settings["acc_unit"]             # changed in place
    acc /= GRAVITY if unit == "m/s2" else 1
    gyro *= DEGREE if settings["gyro_unit"] == "deg/s" else 1
    g = np.median(np.linalg.norm(acc, axis=1))
    problem = f"{path}: the median acceleration is {g:.2g} g, but gravity alone is 1 g"
    require(g < 4 and (g > 0.25 or unit == "g"),
            f"{problem}; give --acc-unit {'m/s2' if unit == 'g' else 'g'}, or convert it")
    if not 0.5 < g < 2:
        print(f"{problem}: is the unit right, and gravity in it?", file=sys.stderr)
    require((np.abs(gyro) < 35).mean() > 0.95 if gyro.size else True,
            f"{path}: angular velocity is often above 35 rad/s; is it --gyro-unit deg/s?")
    label[np.isin(label, ("-1", "-1.0", "nan"))] = ""
    changes = np.flatnonzero((segment[1:] != segment[:-1]) | (label[1:] != label[:-1])) + 1
    for rows in np.split(np.arange(len(t)), changes):
        yield user, label[rows[0]], [(t[rows], x[rows])]

def read_npz(path):
    """Stamps (n,), signal (n, 6 or 3), segment (n,) and label (n,) as text of one .npz."""
    open_zips(path)                                # refuses what would inflate without end
    try:
        with np.load(path) as file:
            signal, rate = file["signal"].astype(float), file["rate"].item()
            n = len(signal)
            segment = file["segment"] if "segment" in file else np.zeros(n)
            label = file["label"].astype(str) if "label" in file else np.full(n, "")
            require(signal.shape in ((n, 3), (n, 6)) and n, f"signal {signal.shape}")
            require(segment.shape == label.shape == (n,), f"{segment.shape}, {label.shape}")
            require(5 <= rate <= 10_000, f"rate {rate}")
    except Exception as error:
        raise UserError(f"{path} can't be used ({error}): it needs 'signal' (n, 6) or (n, 3), "
                        "'rate' (5 to 10,000 Hz) and may have 'segment', 'label' (n,)") from None
    return np.arange(n) / rate, signal, segment, label

def read_csv(path):
    """The same of one .csv."""
    header, *lines = path.read_text("utf-8-sig", "replace").strip().splitlines() or [""]
    header = [column.strip().lower() for column in header.split(",")]
    wanted = ["t", "ax", "ay", "az"] + ["gx", "gy", "gz"] * ("gx" in header)
    require(set(wanted) <= set(header) and lines, f"{path} needs rows with the columns "
            f"t,ax,ay,az,gx,gy,gz (or t,ax,ay,az); its first line is '{','.join(header)[:80]}'")
    try:
        columns = [header.index(name) for name in wanted]
        table = np.loadtxt(lines, delimiter=",", usecols=columns, ndmin=2, comments=None)
        label = [""] * len(table)
        if "label" in header:
            rows = [line.split(",") for line in lines if line.strip()]
            label = [row[header.index("label")].strip(' "') for row in rows]
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} can't be read: {error} (the first row of numbers is 0)") from None
    return table[:, 0], table[:, 1:], np.zeros(len(table)), np.array(label, str)

# ---------------------------------------------------------------- a simulated population
ACTIVITIES = {  # lean, roll (rad), strides (x the person's), push (g), turn, fidget (rad), share
    "lying":    (1.50, 0.40, 0.00, 0.00, 0.00, 0.01, 0.15),
    "sitting":  (0.45, 0.05, 0.00, 0.00, 0.00, 0.03, 0.25),
    "standing": (0.05, 0.00, 0.00, 0.00, 0.00, 0.02, 0.15),
    "walking":  (0.10, 0.00, 1.00, 0.25, 0.07, 0.02, 0.20),
    "stairs":   (0.25, 0.00, 0.85, 0.30, 0.11, 0.03, 0.10),
    "running":  (0.20, 0.00, 1.45, 0.90, 0.15, 0.03, 0.07),
    "cycling":  (0.60, 0.00, 0.70, 0.06, 0.17, 0.03, 0.08),
}
TRAITS = {  # average, deviation between people, shape (7 activities, 6 channels)
    "strides": (0.95, 0.09, ()),                   # a second; a stride is two steps
    "tempo": (0, 0.1, 7),                          # log of a factor, in each activity
    "vigour": (0, 0.25, 7),                        # log of a factor, in each activity
    "posture": (0, 0.15, (7, 2)),                   # rad, added to the activity's roll and lean
    "sizes": (-np.arange(6), 0.2, (6, 6)),         # log of the size of 1 to 6 x the stride
    "phases": (np.arange(36).reshape(6, 6) ** 2 % 6.3, 0.25, (6, 6)),   # rad; any average will do
    "habits": (0, 0.5, 7),                         # log of a factor of each activity's share
    "mount": (0, 0.3, 3),                          # how the sensor is worn: rotation, rad
    "bias": (0, np.repeat([0.02, 0.01], 3), 6),    # of the sensors, g and rad/s
}

def person(seed, user, spread):
    """The traits of one person: average + spread x deviation x a normal number; spread 0: clones.
    Each trait has a random stream of its own: a new trait leaves the others as they are."""
    return {name: average + spread * deviation *
            random_stream(seed, "trait", name, user).standard_normal(shape)
            for name, (average, deviation, shape) in TRAITS.items()}

def simulated(user, names, read, settings, rate=40):
    """Random activities. In the body's frame (x forwards, y left, z up) the trunk leans, fidgets,
    and is turned and pushed by harmonics of the stride; the sensor is worn rotated, by M (mount):
    acc = M R(angles)^-1 (0, 0, 1) + M push,   gyro = M d angles / dt   (for small angles)"""
    from scipy.spatial.transform import Rotation
    who = person(settings["seed"], user, settings["spread"])
    rng = random_stream(settings["seed"], "day", user)           # clones, too, have own days
    mount = Rotation.from_rotvec(who["mount"])
    style = np.exp(who["sizes"] + 1j * who["phases"])
    shares = np.array([row[-1] for row in ACTIVITIES.values()]) * np.exp(who["habits"])
    left, now = round(settings["hours_per_user"] * 3600 / SECONDS), None
    while left > 0:
        odds = shares * (np.arange(len(shares)) != now)
        now = rng.choice(len(odds), p=odds / odds.sum())
        label, (lean, roll, strides, push, turn, fidget, _) = list(ACTIVITIES.items())[now]
        windows = min(left, rng.geometric(1 / 6))  # for a minute, on average
        left -= windows
        t = np.arange(windows * SECONDS * rate) / rate
        tempo, vigour = np.exp(rng.normal([who["tempo"][now], who["vigour"][now]], [0.04, 0.12]))
        drift = 0.004 * np.cumsum(rng.standard_normal(len(t))) / np.sqrt(rate)
        phase = 2 * np.pi * (who["strides"] * strides * tempo * t + drift)
        waves = (np.exp(1j * np.outer(phase, np.arange(1, 7))) @ style.T).real      # (n, 6)
        waves *= vigour * np.repeat([push, turn], 3)
        angles = waves[:, 3:] + [roll, lean, 0] + rng.normal(0, 0.06, 3)
        angles[:, :2] += who["posture"][now]
        angles += fidget * np.sin(np.outer(t, rng.uniform(0.5, 4, 3)) + rng.uniform(0, 6, 3))
        gravity = Rotation.from_rotvec(angles).inv().apply([0, 0, 1])
        acc, gyro = gravity + waves[:, :3], np.gradient(angles, 1 / rate, axis=0)
        x = np.hstack([mount.apply(acc), mount.apply(gyro)]) + who["bias"]
        yield user, label, [(t, x + rng.normal(0, [0.01] * 3 + [0.02] * 3, x.shape))]

# ---------------------------------------------------------------- prepare: fetch, read, write
def download(url, path):
    """Fetch `url` to `path` by way of `path`.part, going on where an earlier transfer was cut."""
    import requests, urllib3
    by_hand, part = f"fetch it by hand to {path}", path.with_name(path.name + ".part")
    require("://" in url, f"{path} is missing and has no lasting address; {by_hand}")
    retry = urllib3.Retry(4, backoff_factor=0.3, status_forcelist=[429, 500, 502, 503, 504])
    session = requests.Session()
    session.mount(url[:url.index("//") + 2], requests.adapters.HTTPAdapter(max_retries=retry))
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(6):
        if zipfile.is_zipfile(part):
            return os.replace(part, path)
        with open(part, "ab") as file:
            headers = {"Accept-Encoding": "identity", "Range": f"bytes={file.tell()}-"}
            try:
                answer = session.get(url, headers=headers, stream=True, timeout=60)
            except requests.RequestException as error:
                raise UserError(f"{url} can't be reached ({error}); {by_hand}") from None
            if answer.status_code == 416:          # all of it came, and it is no zip
                part.unlink()
            require(answer.ok and "html" not in answer.headers.get("Content-Type", ""),
                    f"{url} answered '{answer.status_code} {answer.reason}' and no zip; {by_hand}")
            if answer.status_code != 206:          # not from there: from the beginning
                file.truncate(0)
            with contextlib.suppress(requests.RequestException):         # cut: ask for the rest
                for i, block in enumerate(answer.iter_content(1 << 16)):
                    file.write(block)
                    if i % 512 == 511:
                        print(f"{path.name}: {i + 1 >> 4} MB came", file=sys.stderr)
    raise UserError(f"{url}: no whole zip in six attempts; run it again to go on, or {by_hand}")

@functools.lru_cache(maxsize=8)
def open_zips(path):
    """The zip at `path` and the zips in it, opened; nothing is unpacked to disk."""
    try:
        zips = [zipfile.ZipFile(path)]
        inner = [info for info in zips[0].infolist() if info.filename.endswith(".zip")]
        require(sum(info.file_size for info in inner) <= ZIP_LIMIT, "the zips in it are too large")
        zips += [zipfile.ZipFile(io.BytesIO(zips[0].read(info))) for info in inner]
        size = sum(info.file_size for z in zips for info in z.infolist())
        require(size <= max(ZIP_LIMIT, 200 * os.stat(path).st_size), f"{size >> 30} GiB, inflated")
    except Exception as error:
        raise UserError(f"{path} can't be read as a zip archive ({error}); replace it") from None
    return zips

def parts_of(what, raw, archives, settings):
    """What is read on its own, mostly a user: {part: names of its files}, in order."""
    parts, limit = {}, settings["limit_users"]
    require(limit is None or limit > 0, "--limit-users: take 1 or more")
    if what == "simulated":
        parts = {f"{user:03d}": [] for user in range(settings["users"])}
    if what == "folder":
        files = [path for path in Path(raw).glob("[!.]*") if path.suffix in (".csv", ".npz")]
        parts = {path.stem: [path] for path in files}
        require(files, f"--raw {raw} holds no .npz or .csv file")
        require(len(parts) == len(files), f"{raw} has a user both as .csv and as .npz; keep one")
    for path, _, name in archives:
        found = {member: match[1] for z in open_zips(path) for member in z.namelist()
                 if (match := re.search(SOURCES[name].members, member))}
        require(found, f"{path} holds no file named as in the published archive; replace it")
        for member, part in found.items():
            user = f"{name}_{part:0>2}" if name in POOL else part
            parts.setdefault(user, []).append(member)
    open_zips.cache_clear()                        # each process opens the archives for itself
    return dict(sorted(parts.items())[:limit if what != "ucihar" else None])   # (train and test)

def read_part(what, archives, settings, part, names):
    """Read and cut one part, in a process of its own."""
    parser = (part if what == "pool" else what).split("_")[0]
    try:
        zips = {name: z for path, *_ in archives for z in open_zips(path) for name in z.namelist()}

        def read(name):
            size = zips[name].getinfo(name).file_size            # zipfile gives no more than that
            require(size <= MEMBER_LIMIT, f"{name} inflates to {size >> 20} MiB; replace its zip")
            return zips[name].read(name)
        return cut(globals()[parser](part, names, read, settings), SOURCES[what].length)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{part} can't be read as {parser} ({error!r}); replace it") from None

def start_process():
    """In a new process: leave Ctrl-C to the parent, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

def write_set(what, raw, archives, settings, out):
    """Read the parts side by side and append their windows to a file as they come -> the meta."""
    import scipy.interpolate, scipy.signal         # once, before the processes are forked
    source, parts = SOURCES[what], parts_of(what, raw, archives, settings)
    read = functools.partial(read_part, what, archives, settings)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows, channels, left_out, test_users = [], set(), Counter(), {}
    with open(out / "windows.npy", "wb") as file, ProcessPoolExecutor(
            max(1, min(cores, len(parts))), initializer=start_process) as pool:
        file.write(bytes(128))                     # room for the header
        results = pool.map(read, parts, parts.values())
        for part, (windows, part_rows, part_left_out) in zip(parts, results):
            require(part_rows or what != "folder", f"{part} has too few samples for {SECONDS} s "
                    "without a gap (is t in seconds?); leave this user out")
            file.write(windows.tobytes())
            rows += part_rows
            left_out += part_left_out
            channels |= {windows.shape[1]} - {0}
            test_users |= dict(part_rows if part == "test" else {})
            if len(rows) % 2000 < len(windows):
                print(f"{what}: {len(rows)} windows so far", file=sys.stderr)
        require(rows, f"{what} has no window of {source.length / RATE} s: {dict(left_out)}")
        require(len(channels) == 1, "some users have both sensors, some have one; keep them apart")
        shape = (len(rows), *channels, source.length)
        file.seek(0)
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f2", "fortran_order": False, "shape": shape})
    names = sorted(dict(rows), key=int) if what == "ucihar" else list(dict(rows))
    classes = list(source.classes) or sorted({label for _, label in rows} - {""}) * (what != "pool")
    users = np.array([names.index(user) for user, _ in rows])
    labels = np.array([classes.index(label) if label in classes else -1 for _, label in rows])
    np.save(out / "users.npy", users)
    np.save(out / "labels.npy", labels)
    own = {"folder": Path(raw).resolve().name, "simulated": f"simulated-{settings.get('seed')}"}
    sources = [own.get(what, what.split("_")[0])] * len(names)
    if all(name.find("_") > 0 for name in names):
        sources = [name.split("_")[0] for name in names]
    return {"rate": RATE, "seconds": source.length / RATE, "channels": CHANNELS[:max(channels)],
            "users": names, "sources": sources, "classes": classes, "windows": len(rows),
            "hours": len(rows) * source.length / RATE / 3600, "left_out": left_out,
            "origin": "; ".join([source.text, *source.archives]),
            "test_users": list(test_users) or None,
            "fingerprint": fingerprint(np.load(out / "windows.npy", mmap_mode="r"), users, labels)}

def prepare(what, name, raw, flags, limit=None, force=False, root="data"):
    """Make data/NAME/, unless it stands there with the same settings. An old set stays until the
    new one is complete; what a killed process left is removed by the next."""
    target, work = Path(root) / name, Path(root) / f".{name}.partial"
    settings = {"source": what, **flags, "limit_users": limit}
    archives = [(Path(raw) / url.split("/")[-1], url, each)
                for each in (POOL if what == "pool" else [what]) for url in SOURCES[each].archives]
    if what == "folder":
        parts = parts_of(what, raw, [], settings).items()
        settings["recordings"] = {part: zlib.crc32(path.read_bytes()) for part, [path] in parts}
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)           # a second process waits, then finds it prepared
        require((target / "meta.json").is_file() or not target.exists(),
                f"{target} is no prepared set; give another --name")
        if target.exists() and not force:
            made = load_one(name, root).meta["settings"]
            differ = [f"{key} {made.get(key)}"[:60] for key in made | settings
                      if made.get(key) != settings.get(key)]
            require(not differ, f"{target} is prepared already, but with {', '.join(differ)}; give "
                    "another --name, or --force to replace it")
            return print("prepared already:", describe(name, root))
        for path, url, _ in archives:
            path.is_file() or download(url, path)
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir()
            meta = write_set(what, raw, archives, settings, work)
            write_json(work / "meta.json", {"name": name, **meta, "settings": settings,
                                            "provenance": provenance()})
            shutil.rmtree(target, ignore_errors=True)
            os.rename(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    print(describe(name, root))

# ---------------------------------------------------------------- load; who is held out, who drawn
Prepared = namedtuple("Prepared", "windows users labels meta")   # (n, C, T), (n,), (n,), a dict

def load(name, root="data"):
    """The prepared set `name`, or several as one ("a+b"): users side by side, classes by name."""
    sets = [load_one(part, root) for part in name.split("+")]
    if len(sets) == 1:
        return sets[0]
    metas = [each.meta for each in sets]
    for key in ("rate", "seconds", "channels"):
        values = [meta[key] for meta in metas]
        require(values.count(values[0]) == len(sets), f"{name}: {key} differ, {values}")
    meta = {key: sum((meta[key] for meta in metas), []) for key in ("users", "sources", "classes")}
    twice = len(meta["users"]) - len(set(people(meta)))
    require(not twice, f"{name}: {twice} people are in several of these sets; leave one out")
    classes = sorted(set(meta["classes"]))
    first = np.cumsum([0] + [len(each["users"]) for each in metas])
    codes = [np.array([*map(classes.index, each["classes"]), -1]) for each in metas]
    windows = np.concatenate([each.windows for each in sets])
    users = np.concatenate([each.users + index for each, index in zip(sets, first)])
    labels = np.concatenate([code[each.labels] for each, code in zip(sets, codes)])  # none stays -1
    return Prepared(windows, users, labels, metas[0] | meta | {
        "name": name, "classes": classes, "test_users": None, "left_out": {}, "settings": {},
        "hours": sum(each["hours"] for each in metas), "windows": len(windows), "origin": name,
        "fingerprint": fingerprint(windows, users, labels)})

def load_one(name, root):
    folder = Path(root) / name
    kinds = {"users": list, "sources": list, "classes": list, "channels": list, "settings": dict,
             "left_out": dict, "hours": (int, float)}
    require((folder / "meta.json").is_file(), f"'{name}' is not prepared in {root}/; python data.py"
            " lists what is prepared and what can be")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = [np.load(folder / f"{part}.npy", mmap_mode="r") for part in Prepared._fields[:3]]
        whole = (all(isinstance(meta[key], kind) for key, kind in kinds.items())
                 and fingerprint(*arrays) == meta["fingerprint"]
                 and len(meta["sources"]) == len(meta["users"]) > max(arrays[1])
                 and len(meta["classes"]) > max(arrays[2]))
    except (OSError, EOFError, ValueError, TypeError, LookupError):      # cut off, other shapes
        whole = False
    require(whole, f"{folder} is damaged or was changed; prepare the set again with --force")
    return Prepared(*arrays, meta)

def fingerprint(windows, users, labels):
    """sha256 over users, labels and 4,096 windows, evenly spread: quick, and notices a change."""
    digest = hashlib.sha256(f"{windows.shape} {windows.dtype}".encode())
    some = np.linspace(0, len(windows) - 1, min(len(windows), 4096)).astype(int)
    for array in (users.astype("<i8"), labels.astype("<i8"), windows[some]):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

def people(meta, users=None):
    """Who the users are, whatever the set is called: [(source, user name), ...]."""
    everyone = list(zip(meta["sources"], meta["users"]))
    return everyone if users is None else [everyone[user] for user in users]

def held_out_users(meta):
    """The users no model of this set is trained on, whatever the seed: 20 % of each source's, 2 at
    least, by a hash. Two halves, lists of user indices: a step is chosen on one for the other."""
    half_a, half_b = [], []
    for source in sorted(set(meta["sources"])):
        ranked = sorted((hashlib.sha256(f"{source}/{name}".encode()).hexdigest(), user)
                        for user, (other, name) in enumerate(people(meta)) if other == source)
        held_out = [user for _, user in ranked[:max(2, len(ranked) // 5)]]
        half_a, half_b = half_a + held_out[::2], half_b + held_out[1::2]
    return half_a, half_b

def held_out_windows(prepared, users, most=64):
    """Rows (n,) of the windows that are evaluated: at most `most` of each user, evenly spread."""
    rows = [np.flatnonzero(prepared.users == user) for user in users]
    even = [np.linspace(0, n - 1, min(most, n)).astype(int) for n in map(len, rows)]
    return np.concatenate([own[chosen] for own, chosen in zip(rows, even)])

def training_users(meta, seed):
    """All users who aren't held out, in the order in which a grid takes them: random, the sources
    in turn, so that the first 8 are among the first 16."""
    held_out, rng = set(sum(held_out_users(meta), [])), random_stream(seed, "training users")
    queues = [rng.permutation([user for user, other in enumerate(meta["sources"])
                               if other == source and user not in held_out]).tolist()
              for source in sorted(set(meta["sources"]))]
    require(any(queues), f"all users of '{meta['name']}' are held out (20 % of each source, at "
            "least 2; in a folder, what stands before the first _ is the source): add users")
    turns = itertools.zip_longest(*[queues[i] for i in rng.permutation(len(queues))])
    return [user for turn in turns for user in turn if user is not None]

def draw_windows(prepared, users, hours_per_user, seed):
    """Rows (n,) of the windows that a grid cell trains on: at most `hours_per_user` (None: all) of
    each user, in a random order of the user's own, so that fewer hours are a subset of more."""
    most = hours_per_user and max(1, round(hours_per_user * 3600 / prepared.meta["seconds"]))
    rows = [random_stream(seed, "windows of user", int(user)).permutation(
        np.flatnonzero(prepared.users == user))[:most] for user in users]
    return np.sort(np.concatenate(rows))

# ---------------------------------------------------------------- windows as a model reads them
def select_sensors(channels, sensors):
    """Positions of the channels of `sensors`: "both", "acc" or "gyro"."""
    wanted = ["acc", "gyro"] if sensors == "both" else [sensors]
    chosen = [i for i, channel in enumerate(channels) if channel.split("_")[0] in wanted]
    require(len(chosen) == 3 * len(wanted), f"--sensors {sensors}: the set has only {channels}")
    return chosen

def scaled(windows, channels):
    """(n, C, T) in g and rad/s -> float32, divided by 0.7 g and 1.05 rad/s. Nothing is subtracted,
    so that a loss means the same in every set and cell."""
    scale = [[SCALE[channel.split("_")[0]]] for channel in channels]                # (C, 1)
    return windows.astype(np.float32) / np.float32(scale)

def random_rotation(x, angle, rng):
    """Windows x (n, C, T), both sensors rotated alike, about a random axis by about `angle` rad."""
    from scipy.spatial.transform import Rotation
    vectors = angle * rng.standard_normal((len(x), 3))
    matrices = Rotation.from_rotvec(vectors).as_matrix().astype(x.dtype)            # (n, 3, 3)
    return (matrices[:, None] @ x.reshape(len(x), -1, 3, x.shape[2])).reshape(x.shape)

# ---------------------------------------------------------------- overview, plot, the command line
def describe(name, root):
    """A prepared set in a line, and what was left out of it."""
    meta = load_one(name, root).meta
    left_out = "".join(f"; left out: {n} {reason}" for reason, n in meta["left_out"].items())
    return (f"{name}: {len(meta['users'])} users, {meta['hours']:.2f} hours, {meta['windows']} "
            f"windows, {len(meta['classes'])} classes, {meta.get('origin')}{left_out}")

def overview(root="data"):
    """Print the prepared sets, and what else can be prepared."""
    names = sorted(path.parent.name for path in Path(root).glob("[!.]*/meta.json"))
    lines = [describe(name, root) for name in names]
    lines += [f"{name} (not prepared): {source.text}" for name, source in SOURCES.items()
              if name not in names]
    print(*lines, sep="\n")

def plot(name, root="data"):
    """Draw three windows of each class."""
    from matplotlib import pyplot as plt
    windows, users, labels, meta = load_one(name, root)
    kinds, sensors = np.unique(labels), len(meta["channels"]) // 3
    fig, axes = plt.subplots(len(kinds), 3 * sensors, squeeze=False, layout="constrained",
                             figsize=(7.5 * sensors, 1.4 * len(kinds) + 1))
    for label, row in zip(kinds, axes):
        chosen = random_stream("plot", label).choice(np.flatnonzero(labels == label), 3)
        for i, ax in enumerate(row):
            window, sensor = chosen[i // sensors], i % sensors
            x = windows[window, 3 * sensor:3 * sensor + 3].T     # (T, 3)
            ax.plot(np.arange(len(x)) / meta["rate"], x, lw=0.8, label=["x", "y", "z"])
            text = [*meta["classes"], "no label"][label]
            ax.set_title(f"{text}, user {meta['users'][users[window]]}, {['g', 'rad/s'][sensor]}",
                         fontsize=8, loc="left")
    axes[0, 0].legend(fontsize=7, ncols=3)
    with replacing(Path(root) / name / "plot.png") as temporary:
        fig.savefig(temporary, dpi=90)
    print(f"{Path(root) / name / 'plot.png'} shows {3 * len(kinds)} windows")

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag, default = parser.add_argument, " (default: %(default)s)"
    flag("what", nargs="?", choices=[*SOURCES, "plot"], metavar="what",
         help="the set to prepare, or 'plot'; without it all sets are listed")
    flag("which", nargs="?", default="", help="with 'plot': the prepared set to draw")
    flag("--raw", default="data/raw", metavar="DIR",
         help="folder of the archives (what is missing is downloaded) or recordings" + default)
    flag("--name", help="prepare it as data/NAME/ (default: what the set is called)")
    flag("--limit-users", type=int, metavar="N", help="only the first N users, for a quick look")
    flag("--force", action="store_true", help="replace what is prepared; without, it is left alone")
    flag = parser.add_argument_group("simulated").add_argument
    flag("--users", type=int, default=40, help="number of people" + default)
    flag("--hours-per-user", type=float, default=0.5, help="hours recorded of each" + default)
    flag("--spread", type=float, default=1.0,
         help="how much people differ; 0: clones, of whom one teaches as much as many" + default)
    flag("--seed", type=int, default=0, help="another seed, other people" + default)
    flag = parser.add_argument_group("folder").add_argument
    flag("--acc-unit", choices=("g", "m/s2"), default="g", help="in your files" + default)
    flag("--gyro-unit", choices=("rad/s", "deg/s"), default="rad/s", help="in your files" + default)
    args = parser.parse_args()
    if args.what is None or args.what == "plot":
        return plot(args.which) if args.what else overview()
    own = {"simulated": ("users", "hours_per_user", "spread", "seed"),
           "folder": ("acc_unit", "gyro_unit")}.get(args.what, ())
    flags, name = {key: getattr(args, key) for key in own}, args.name or args.what
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "raw":
        parser.error(f"--name {name}: take letters, digits, _ - and . ('raw' is for archives)")
    prepare(args.what, name, args.raw, flags, args.limit_users, args.force)

if __name__ == "__main__":
    command(main)
