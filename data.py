"""
Recordings to windows: every data set, cut in the same way.

    archive, folder or simulation    20-200 Hz, uneven stamps, g or m/s^2, rad/s or deg/s
      -> recording (n, 6) at 20 Hz   both sensors on one clock, low-passed; g (with gravity), rad/s
      -> windows (n, C, T)           10 s = 200 samples, no overlap
      -> data/NAME/                  windows.npy float16, users.npy, labels.npy, meta.json

    python data.py                                  # all data sets, and which are prepared
    python data.py wisdm_watch                      # a published archive, downloaded if missing
    python data.py folder --raw my_recordings --name mine
"""
import argparse, contextlib, fcntl, functools, hashlib, importlib.metadata, io, itertools, json
import math, multiprocessing, os, re, shutil, signal, subprocess, sys, threading, zipfile, zlib
from collections import Counter, namedtuple
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import scipy                                       # submodules are imported at first use

RATE, SECONDS = 20, 10                             # Hz, s: a window has 200 samples
CHANNELS = ["acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z"]
SENSORS = {"both": slice(0, 6), "acc": slice(0, 3), "gyro": slice(3, 6)}          # of CHANNELS
SCALE = np.float32([[0.7]] * 3 + [[1.05]] * 3)     # g, rad/s: the model's input is divided by it
GRAVITY, DEGREE = 9.80665, np.pi / 180             # m/s^2 in 1 g, rad in 1 degree
GAP = 0.5                                          # s: a longer gap ends a stretch
LARGEST = 1e4                                      # a larger reading is an error
FILE_LIMIT, ZIP_LIMIT = 64 << 20, 1 << 30          # bytes: the most a file, a zip may unpack to

# ---------------------------------------------------------------- the table of sources
# members: pattern of the files to read; group 1 is the part, usually a user. archives: URLs, or
# file names where no URL is stable. classes: label i is classes[i]; (): as named in the files.
Source = namedtuple("Source", "text members archives classes length", defaults=("", (), (), 200))
UCI = "https://archive.ics.uci.edu/static/public/"
UCIHAR = "WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING"
WISDM = ("walking jogging stairs sitting standing typing teeth soup chips pasta drinking sandwich "
         "kicking catch dribbling writing clapping folding").split()     # A to S; there is no N
WISDM_ZIP = UCI + "507/wisdm+smartphone+and+smartwatch+activity+and+biometrics+dataset.zip"
EXTRASENSORY = "http://extrasensory.ucsd.edu/data/raw_measurements/ExtraSensory.raw_measurements."
MOTIONSENSE = "https://github.com/mmalekzadeh/motion-sense/raw/master/data/A_DeviceMotion_data.zip"
SOURCES = {
    "simulated": Source("a simulated population"),
    "folder": Source("own recordings: a folder with one .npz or .csv per user"),
    "ucihar": Source("UCI HAR (Anguita 2013): 30 users, phone at the waist, 50 Hz, 2.56 s",
                     r"/(train|test)/.*\.txt$",
                     (UCI + "240/human+activity+recognition+using+smartphones.zip",), UCIHAR, 51),
    "wisdm_phone": Source("WISDM (Weiss 2019): 51 users, phone in the pocket, 20 Hz",
                          r"raw/phone/\w+/data_(\d+)_\w+\.txt$", (WISDM_ZIP,), WISDM),
    "wisdm_watch": Source("WISDM (Weiss 2019): 51 users, watch on the wrist, 20 Hz",
                          r"raw/watch/\w+/data_(\d+)_\w+\.txt$", (WISDM_ZIP,), WISDM),
    "extrasensory": Source("ExtraSensory (Vaizman 2017): 60 users, phone in free living, 40 Hz",
                           r"([^/]+)/\d+\.m_(?:raw_acc|proc_gyro)\.dat$",
                           (EXTRASENSORY + "raw_acc.zip", EXTRASENSORY + "proc_gyro.zip")),
    "motionsense": Source("MotionSense (Malekzadeh 2019): 24 users, phone in the pocket, 50 Hz",
                          r"^A.*/[a-z]+_\d+/sub_(\d+)\.csv$", (MOTIONSENSE,)),
    "sisfall": Source("SisFall (Sucerquia 2017): 38 users, waist, 200 Hz, with falls",
                      r"/(S[AE]\d+)/[DF]\d+_S[AE]\d+_R\d+\.txt$", ("SisFall_dataset.zip",)),
    "uschad": Source("USC-HAD (Zhang 2012): 14 users, hip, 100 Hz",
                     r"/Subject(\d+)/a\d+t\d+\.mat$", ("https://sipi.usc.edu/had/USC-HAD.zip",)),
}

# ---------------------------------------------------------------- what all commands share
class UserError(Exception):
    """Input that can't be used, in one sentence: what, where, and what to do."""

def require(condition, sentence):
    if not condition:
        raise UserError(sentence)

def number(kind, low, high=1e9):
    """An argparse type: an int or a float from `low` to `high`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text} is not {what} from {low:g} to {high:g}")
    return parse

def command(main):
    """Run `main()` as a command line: an error is one sentence on stderr, never a traceback."""
    try:
        sys.exit(main())
    except BrokenPipeError:                        # the reader, such as `| head`, has ended
        os._exit(141)
    except (UserError, OSError, BrokenExecutor) as error:        # OSError: full disk, no permission
        message, status = error, 2
    except (MemoryError, RuntimeError) as error:   # of numpy, of torch
        if not re.search("MemoryError|(out of|allocate) memory", repr(error)):
            raise
        message, status = "out of memory: take less data, or a smaller --width or --batch", 2
    except KeyboardInterrupt:
        message, status = "stopped; run the same command again", 130
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)

@contextlib.contextmanager
def replacing(path):
    """Yield a temporary name to write to; the file replaces `path` only if nothing went wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def write_json(path, content):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False,
                                        default=np.ndarray.tolist) + "\n")

def read_json(path):
    """The content of a .json file; of a .jsonl file, the list of its lines."""
    try:
        text = path.read_text()
        return json.loads(f"[{','.join(text.splitlines())}]" if path.suffix == ".jsonl" else text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}): delete it, make it again") from None

def provenance():
    """What made a result: the git commit (with + if files were changed) and the versions used."""
    git = subprocess.run("git describe --always --exclude='*' --abbrev=40 --dirty=+", shell=True,
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy")}
    return {"commit": git.stdout.strip(), "python": sys.version.split()[0], **versions}

def random_stream(*key):
    """A random generator for each use, by name: random_stream(seed, "masks", step)."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in key])

# ---------------------------------------------------------------- stamps to a clock, to windows
def unbroken(t, x):
    """Drop invalid rows of t (n,), x (n, 3), cut at gaps above GAP s: stretches [(t, x), ...]."""
    kept = np.flatnonzero(np.isfinite(t) & (np.abs(x) < LARGEST).all(1))
    steps = np.diff(t[kept], prepend=-np.inf, append=np.inf)
    kept = kept[(steps[:-1] < GAP) | (steps[1:] > 0)]  # a stamp that leaps ahead, then back, errs
    kept = kept[np.diff(np.maximum.accumulate(t[kept]), prepend=-np.inf) > 0]    # stamps rise
    steps, dropped = np.diff(t[kept]), np.diff(kept) - 1
    typical = np.median(steps) if len(steps) else 0
    cuts = np.flatnonzero((steps > GAP) | (dropped * typical > GAP)) + 1     # many dropped: a gap
    return [(t[rows], x[rows]) for rows in np.split(kept, cuts) if len(rows) > 1]

def resample(t, x, start, n):
    """The signal x (rows, columns) with stamps t (s) at n ticks of the 20 Hz clock from `start`:
    interpolated to an even grid of 80 Hz or more, low-passed without phase shift, decimated."""
    steps = np.diff(t)
    typical = np.median(steps)
    even = len(t) > 3 and 0.5 * typical < steps.min() and steps.max() < 1.5 * typical
    k = max(4, math.ceil(len(steps) / (t[-1] - t[0]) / RATE - 1e-6))   # ticks of it in one of 20 Hz
    grid = np.clip(start + np.arange((n - 1) * k + 1) / (RATE * k), t[0], t[-1])
    spline = scipy.interpolate.make_interp_spline(t, x, k=3 if even else 1)  # a cubic overshoots
    low_pass = scipy.signal.firwin(RATE * k + 1, 9, fs=RATE * k, window=("kaiser", 5.65))    # 60 dB
    return scipy.signal.resample_poly(spline(grid), 1, k, window=low_pass, padtype="antireflect")

def cut(recordings, length):
    """Recordings (user, label, streams) to windows (n, C, length), the user and label of each, and
    what was left out. streams: a (t, x) for each clock, or a sentence why there is none."""
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
                x = x.transpose(0, 2, 1).astype(np.float16) + np.float16(0)          # -0 -> 0:
                windows.append(x)                  # its sign would depend on the processor
                rows += [(user, label or "")] * len(x)
        left_out["recordings shorter than a window, once cut at gaps"] += len(rows) == before
    windows = np.concatenate(windows) if windows else np.empty((0, 0, length), np.float16)
    return windows, rows, +left_out

# ---------------------------------------------------------------- a parser for each format
# A new corpus is a row of SOURCES and a parser, named as the row is up to its first _: of a part,
# its file names, a function from file name to bytes, and the settings, to (user, label, streams).
def numbers(text, columns):
    """Bytes -> numbers (rows, columns); separators are blanks, commas and semicolons."""
    values = text.replace(b",", b" ").replace(b";", b" ").split()
    return np.fromiter(map(float, values), float).reshape(-1, columns)

def ucihar(split, names, read, settings):
    """Each published window is a recording of 128 samples at 50 Hz, in g and rad/s."""
    def table(what, columns=1):
        folder = names[0].partition(f"/{split}/")[0]
        return numbers(read(f"{folder}/{split}/{what}_{split}.txt"), columns)
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
        text = read(name)
        activity = np.array(re.findall(rb",([A-S]),", text)).astype(str)
        table = numbers(re.sub(rb",[A-S],", b",", text), 5)
        rows = np.argsort(table[:, 1], kind="stable")
        unit = GRAVITY if "/accel/" in name else 1
        sensors.append((activity[rows], table[rows, 1] / 1e9, table[rows, 2:] / unit))
    for letter, label in zip("ABCDEFGHIJKLMOPQRS", WISDM):
        streams = [(t[activity == letter], x[activity == letter])
                   for activity, t, x in sensors if letter in activity]
        yield user, label, streams if len(streams) == 2 else "activities that a sensor lacks"

def extrasensory(user, names, read, settings):
    """A file for each sensor and minute, lines `clock_s x y z`; acceleration in g or in m/s^2."""
    for name in sorted({name.replace("proc_gyro", "raw_acc") for name in names}):
        try:
            acc = numbers(read(name), 4)
            gyro = numbers(read(name.replace("raw_acc", "proc_gyro")), 4)
        except (KeyError, ValueError):             # no such file, or it holds only "nan"
            yield user, None, "recordings that a sensor lacks"
            continue
        norm = np.nanmedian(np.linalg.norm(acc[:, 1:], axis=1))
        unit = 1 if 0.7 <= norm <= 1.5 else GRAVITY if 6 <= norm <= 15 else None
        streams = [(acc[:, 0], acc[:, 1:] / (unit or 1)), (gyro[:, 0], gyro[:, 1:])]
        yield user, None, streams if unit else "recordings neither in g nor in m/s^2"

def motionsense(user, names, read, settings):
    """50 Hz; columns: index, attitude (3), gravity (3), rad/s (3), user acceleration (3); g."""
    for name in names:
        table = numbers(read(name).partition(b"\n")[2], 13)
        x = np.hstack([table[:, 4:7] + table[:, 10:13], table[:, 7:10]])
        activity = name.split("/")[-2].split("_")[0]
        yield f"motionsense_{user}", activity, [(np.arange(len(x)) / 50, x)]

def sisfall(user, names, read, settings):
    """200 Hz, nine integers a line: acceleration (32 g in 13 bits), rotation (4000 deg/s in 16)."""
    for name in names:
        lines = [line for line in read(name).splitlines() if line.count(b",") == 8]  # some are cut
        x = numbers(b"\n".join(lines), 9)[:, :6]
        x *= [32 / 2**13] * 3 + [4000 / 2**16 * DEGREE] * 3
        activity = name.split("/")[-1].split("_")[0]
        yield f"sisfall_{user}", activity, [(np.arange(len(x)) / 200, x)]

def uschad(user, names, read, settings):
    """100 Hz, MATLAB files, g and deg/s."""
    for name in names:
        x = scipy.io.loadmat(io.BytesIO(read(name)))["sensor_readings"] * ([1] * 3 + [DEGREE] * 3)
        activity = name.split("/")[-1].split("t")[0]
        yield f"uschad_{user}", activity, [(np.arange(len(x)) / 100, x)]

def folder(user, names, read, settings):
    """A .npz with signal (n, 6) or (n, 3), rate (5 to 10,000 Hz) and, if you like, segment, label
    (n,); or a .csv with the columns t,ax,ay,az[,gx,gy,gz][,label], t in seconds."""
    path = names[0]
    if zipped := path.suffix.lower() == ".npz":
        open_zips((path,))                         # refuses a file that unpacks to too much
    fields = np.load(path) if zipped else read_recording(path)
    x = fields["signal"].astype(float)
    t = fields["t"] if "t" in fields else np.arange(len(x)) / fields["rate"].item()
    segment = fields.get("segment", np.zeros(len(x)))
    label = np.char.strip(fields.get("label", np.full(len(x), "")).astype(str))
    if x.shape[1:] not in ((3,), (6,)) or not (
            5 <= round(1 / np.nanmedian(np.diff(t)), 2) <= 10_000):
        raise ValueError(f"signal {x.shape}, or a rate that isn't 5 to 10,000 Hz")
    if not segment.shape == label.shape == t.shape:
        raise ValueError(f"segment {segment.shape} or label {label.shape} of {t.shape} rows")
    good = (np.abs(x) < LARGEST).all(1) & np.isfinite(t)
    require(good.all(), f"{path}, row {good.argmin() + 1}: missing or impossible value; drop it")
    x[:, :3] /= GRAVITY if settings["acc_unit"] == "m/s2" else 1
    x[:, 3:] *= DEGREE if settings["gyro_unit"] == "deg/s" else 1
    g = np.median(np.linalg.norm(x[:, :3], axis=1))
    problem = f"{path}: acceleration is {g:.2g} g, gravity is 1 g: check --acc-unit"
    require(g < 4 and (g > 0.25 or settings["acc_unit"] == "g"), problem)
    if not 0.5 < g < 2:                            # perhaps gravity was subtracted
        print(problem, file=sys.stderr)
    require((np.abs(x[:, 3:]) > 35).sum() <= 0.05 * x[:, 3:].size,
            f"{path}: rotation is often above 35 rad/s: is it --gyro-unit deg/s?")
    label[np.isin(np.char.lower(label), ("-1", "-1.0", "nan"))] = ""
    changes = np.flatnonzero((segment[1:] != segment[:-1]) | (label[1:] != label[:-1])) + 1
    for rows in np.split(np.arange(len(t)), changes):
        yield user, label[rows[0]], [(t[rows], x[rows])]

def read_recording(path):
    """The columns of a .csv, named as the arrays of a .npz, but t (n,) in place of rate."""
    load = functools.partial(np.loadtxt, path, delimiter=",", quotechar='"', comments=None,
                             encoding="utf-8-sig")
    header = [column.strip().lower() for column in load(dtype=str, max_rows=1)]
    columns = "t ax ay az gx gy gz".split()[:7 if {"gx", "gy", "gz"} & {*header} else 4]
    table = load(skiprows=1, usecols=[header.index(column) for column in columns])
    fields = {"t": table[:, 0], "signal": table[:, 1:]}
    if "label" in header:
        fields["label"] = load(dtype=str, skiprows=1, usecols=header.index("label"))
    return fields

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
TRAITS = {  # mean, standard deviation over people, shape (7 activities, 6 channels)
    "strides": (0.95, 0.09, ()),                   # a second; a stride is two steps
    "tempo": (0, 0.1, 7),                          # log of a factor, for each activity
    "vigour": (0, 0.25, 7),                        # log of a factor, for each activity
    "posture": (0, 0.15, (7, 2)),                   # rad, added to the activity's roll and lean
    "sizes": (-np.arange(6), 0.2, (6, 6)),         # log of each channel's harmonics 1 to 6
    "phases": (np.arange(36).reshape(6, 6) ** 2 % 6.3, 0.25, (6, 6)),   # rad; any mean would do
    "habits": (0, 0.5, 7),                         # log of a factor of each activity's share
    "mount": (0, 0.3, 3),                          # rotation of the sensor as worn, rad
    "bias": (0, np.repeat([0.02, 0.01], 3), 6),    # of the sensors, g and rad/s
}

def person(seed, user, spread):
    """Traits: average + spread x deviation x a normal number, each from its own random stream."""
    return {name: average + spread * deviation *
            random_stream(seed, "trait", name, user).standard_normal(shape)
            for name, (average, deviation, shape) in TRAITS.items()}

def simulated(user, names, read, settings, rate=40):
    """Random activities. In the body's frame (x forwards, y left, z up) the trunk leans, fidgets,
    and is turned and pushed by harmonics of the stride; the sensor is worn rotated, by M (mount):
    acc = M R(angles)^-1 (0, 0, 1) + M push,   gyro = M d angles / dt   (for small angles)"""
    Rotation = scipy.spatial.transform.Rotation
    who = person(settings["seed"], user, settings["spread"])
    rng = random_stream(settings["seed"], "day", user)           # clones, too, have different days
    mount = Rotation.from_rotvec(who["mount"])
    style = np.exp(who["sizes"] + 1j * who["phases"])
    shares = np.array([row[-1] for row in ACTIVITIES.values()]) * np.exp(who["habits"])
    left, now = round(settings["hours_per_user"] * 3600 / SECONDS), None
    while left > 0:
        odds = shares * (np.arange(len(shares)) != now)
        now = rng.choice(len(odds), p=odds / odds.sum())
        label, (lean, roll, strides, push, turn, fidget, _) = list(ACTIVITIES.items())[now]
        windows = min(left, rng.geometric(1 / 6))  # a minute on average
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
    """Fetch `url` to `path` through `path`.part; a transfer that was cut off is resumed."""
    import requests, urllib3
    require("://" in url, f"{path} is missing and has no stable URL: download it by hand")
    print(f"fetching {url}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, problem = path.with_name(path.name + ".part"), "the server sent no zip file"
    retry = urllib3.Retry(4, backoff_factor=0.3, status_forcelist=[429, 500, 502, 503, 504])
    session = requests.Session()
    session.mount(url.split("//")[0] + "//", requests.adapters.HTTPAdapter(max_retries=retry))
    for attempt in range(3):
        with open(part, "ab") as file:
            headers = {"Accept-Encoding": "identity", "Range": f"bytes={file.tell()}-"}
            try:
                response = session.get(url, headers=headers, stream=True, timeout=60)
                if response.status_code in (200, 416):           # no resuming: start again
                    file.truncate(0)
                response.raise_for_status()
                for block in response.iter_content(1 << 16):
                    file.write(block)
            except requests.RequestException as error:
                problem = error
        if zipfile.is_zipfile(part):
            return os.replace(part, path)
    raise UserError(f"{url}: {problem}; run it again to resume, or download it by hand to {path}")

@functools.lru_cache(maxsize=1)
def open_zips(paths):
    """{file name: the open zip that holds it}, for the zips `paths` and the zips inside them."""
    files = {}
    for path in paths:
        try:
            outer = zipfile.ZipFile(path)
            inner = [info for info in outer.infolist() if info.filename.endswith(".zip")]
            require(sum(info.file_size for info in inner) <= ZIP_LIMIT, "a zip in it is too large")
            zips = [outer, *(zipfile.ZipFile(io.BytesIO(outer.read(info))) for info in inner)]
            size = sum(info.file_size for z in zips for info in z.infolist())
            require(size <= max(ZIP_LIMIT, 200 * os.stat(path).st_size), "it unpacks to too much")
        except Exception as error:
            raise UserError(f"{path} can't be read as a zip ({error}): replace the file") from None
        files |= {name: z for z in zips for name in z.namelist()}
    return files

def parts_of(archives, raw, settings):
    """{part: names of its files}, sorted; a part is read on its own, and is usually one user."""
    what, limit, parts = settings["source"], settings["limit_users"], {}
    if what == "simulated":
        parts = {f"{user:03d}": [] for user in range(settings["users"])}
    if what == "folder":
        files = [p for p in Path(raw).glob("[!.]*") if p.suffix.lower() in (".csv", ".npz")]
        parts = {path.stem: [path] for path in files}
        require(len(parts) == len(files), f"--raw {raw} has a user as .csv and as .npz; keep one")
    for name, file in open_zips(archives).items():
        if match := re.search(SOURCES[what].members, name):
            require(file.getinfo(name).file_size <= FILE_LIMIT, f"{name} is too big; replace it")
            parts.setdefault(match[1].zfill(2), []).append(name)
    require(parts, f"--raw {raw} holds nothing that can be read as {SOURCES[what].text}: check it")
    open_zips.cache_clear()                        # each process opens the archives for itself
    return dict(sorted(parts.items())[:limit if what != "ucihar" else None])   # (train and test)

def read_part(archives, settings, part, names):
    """Read and cut one part, in a process of its own."""
    what, files = settings["source"], open_zips(archives)
    parser = globals()[what.split("_")[0]]
    try:
        recordings = parser(part, names, lambda name: files[name].read(name), settings)
        return cut(recordings, SOURCES[what].length)
    except UserError:
        raise
    except Exception as error:
        wanted = " ".join(parser.__doc__.split())
        raise UserError(f"{part} of {what} can't be read ({error}); wanted: {wanted}") from None

def start_process():
    """In a new process: leave Ctrl-C to the parent, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

def write_set(name, settings, raw, out):
    """Fetch the archives, read their parts in parallel, append the windows to a file one by one."""
    import scipy.interpolate, scipy.signal         # once, before the processes are forked
    what, source = settings["source"], SOURCES[settings["source"]]
    archives = tuple(Path(raw) / url.split("/")[-1] for url in source.archives)
    for path, url in zip(archives, source.archives):
        if not path.is_file():
            download(url, path)
    parts = parts_of(archives, raw, settings)
    read = functools.partial(read_part, archives, settings)
    rows, channels, left_out, test_users = [], set(), Counter(), None
    with (open(out / "windows.npy", "wb") as file,
          ProcessPoolExecutor(min(8, os.cpu_count()), initializer=start_process) as pool):
        file.write(bytes(128))                     # room for the header
        for part, (windows, part_rows, why) in zip(parts, pool.map(read, parts, parts.values())):
            require(part_rows or what != "folder", f"{part} is too short: drop it (t in seconds?)")
            file.write(windows.tobytes())
            rows += part_rows
            left_out += why
            if part_rows:
                channels.add(windows.shape[1])
            if (what, part) == ("ucihar", "test"):
                test_users = list(dict(part_rows))
            print(f"{part}: {len(windows)} windows", file=sys.stderr)
        require(rows, f"{what} has no {source.length / RATE} s window: {dict(left_out)}; add data")
        require(len(channels) == 1, "some users have both sensors, some have one; keep them apart")
        shape = (len(rows), *channels, source.length)
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)
    names = sorted(dict(rows), key=int) if what == "ucihar" else list(dict(rows))
    classes = list(source.classes) or sorted({label for _, label in rows} - {""})
    users = np.array([names.index(user) for user, _ in rows])
    labels = np.array([classes.index(label) if label else -1 for _, label in rows])
    np.save(out / "users.npy", users)
    np.save(out / "labels.npy", labels)
    own = {"folder": Path(raw).resolve().name, "simulated": f"simulated-{settings.get('seed')}"}
    sources = [own.get(what, what.split("_")[0])] * len(names)   # WISDM's sets: the same people
    if all(name.find("_") > 0 for name in names):
        sources = [name.split("_")[0] for name in names]
    write_json(out / "meta.json", {
        "name": name, "rate": RATE, "seconds": source.length / RATE,
        "channels": CHANNELS[:shape[1]], "users": names, "sources": sources, "classes": classes,
        "windows": len(rows), "hours": len(rows) * source.length / RATE / 3600,
        "left_out": left_out, "origin": "; ".join([source.text, *source.archives]),
        "test_users": test_users, "settings": settings, "provenance": provenance(),
        "fingerprint": fingerprint(np.load(out / "windows.npy", mmap_mode="r"), users, labels)})

def prepare(name, settings, raw, force=False):
    """Make data/NAME/ unless it has the same settings; an old set stays until the new is whole."""
    target, work, old = (Path("data") / part for part in (name, f".{name}.partial", f".{name}.old"))
    if settings["source"] == "folder":
        files = parts_of((), raw, settings).items()
        settings["recordings"] = {user: zlib.crc32(path.read_bytes()) for user, [path] in files}
    target.parent.mkdir(exist_ok=True)
    with open("data/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)           # a second process waits, then finds it prepared
        if old.exists() and not target.exists():   # killed between the two renames below
            os.rename(old, target)
        shutil.rmtree(old, ignore_errors=True)
        require(not target.exists() or (target / "meta.json").is_file(),
                f"{target} is no data set and is left as it is: delete it or give another --name")
        if target.exists() and not force:
            made = load_one(name).meta["settings"]
            differ = [key for key in made | settings if made.get(key) != settings.get(key)]
            require(not differ, f"{target} differs in {', '.join(differ)}: give --name or --force")
            return print("prepared already:", describe(name))
        try:
            work.mkdir(exist_ok=True)
            write_set(name, settings, raw, work)
            if target.exists():
                os.rename(target, old)
            os.rename(work, target)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    print(describe(name))

# ---------------------------------------------------------------- load, hold out, draw, scale
Prepared = namedtuple("Prepared", "windows users labels meta")   # (n, C, T), (n,), (n,), a dict

def load(name, root="data"):
    """The prepared set `name`, or several as one ("a+b"): users side by side, classes by name.
    UserError if one is missing or damaged, or if they don't fit together."""
    sets = [load_one(part, root) for part in name.split("+")]
    if len(sets) == 1:
        return sets[0]
    meta = {key: sets[0].meta[key] for key in ("rate", "seconds", "channels")}
    require(all(meta.items() <= part.meta.items() for part in sets), f"{name}: {[*meta]} differ")
    classes = sorted({label for part in sets for label in part.meta["classes"]})
    everyone, users, labels = [], [], []
    for part in sets:
        users.append(part.users + len(everyone))
        everyone += people(part.meta)
        codes = np.array([*map(classes.index, part.meta["classes"]), -1])
        labels.append(codes[part.labels])                                      # -1 stays
    require(len(set(everyone)) == len(everyone), f"{name}: a person is in two sets; drop 1")
    windows, users, labels = map(np.concatenate, ([part.windows for part in sets], users, labels))
    meta["sources"], meta["users"] = map(list, zip(*everyone))
    return Prepared(windows, users, labels, meta | {
        "name": name, "classes": classes, "test_users": None, "windows": len(windows),
        "fingerprint": fingerprint(windows, users, labels)})

def load_one(name, root="data"):
    folder = Path(root) / name
    require((folder / "meta.json").is_file(), f"{folder} is not prepared: see data.py --help")
    with contextlib.suppress(OSError, EOFError, ValueError, TypeError, LookupError):
        meta = json.loads((folder / "meta.json").read_text())
        arrays = [np.load(folder / f"{part}.npy", mmap_mode="r") for part in Prepared._fields[:3]]
        if fingerprint(*arrays) == meta["fingerprint"]:
            return Prepared(*arrays, meta)
    raise UserError(f"{folder} is damaged or was changed; prepare the set again with --force")

def fingerprint(windows, users, labels):
    """sha256 over users, labels and at most 4,096 windows, evenly spread: a quick check."""
    digest = hashlib.sha256(f"{windows.shape} {windows.dtype}".encode())
    chosen = np.linspace(0, len(windows) - 1, min(len(windows), 4096)).astype(int)
    for array in (users.astype("<i8"), labels.astype("<i8"), windows[chosen]):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

def people(meta, users=None):
    """Who the users are, whatever the set is called: [(source, user name), ...]."""
    everyone = list(zip(meta["sources"], meta["users"]))
    return everyone if users is None else [everyone[user] for user in users]

def held_out_users(meta):
    """The users that no model is trained on, whatever the seed: 20 % of each source's, at least 2,
    by a hash. Two halves, lists of user indices: each chooses the step at which the other is
    scored (pretrain.cross_fitted)."""
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
    return np.concatenate([user_rows[chosen] for user_rows, chosen in zip(rows, even)])

def training_users(meta, seed):
    """Users that aren't held out, in the seeded random order a grid takes them, sources in turn."""
    held_out, rng = set(sum(held_out_users(meta), [])), random_stream(seed, "training users")
    queues = [rng.permutation([user for user, other in enumerate(meta["sources"])
                               if other == source and user not in held_out]).tolist()
              for source in sorted(set(meta["sources"]))]
    require(any(queues), f"{meta['name']}: all are held out (at least 2 per source): add users")
    turns = itertools.zip_longest(*[queues[i] for i in rng.permutation(len(queues))])
    return [user for turn in turns for user in turn if user is not None]

def draw_windows(prepared, users, hours_per_user, seed):
    """Rows (n,) of the windows that a grid cell trains on: at most `hours_per_user` (None: all) of
    each user, in a random order of the user's own, so that fewer hours are a subset of more."""
    most = hours_per_user and max(1, round(hours_per_user * 3600 / prepared.meta["seconds"]))
    rows = [random_stream(seed, "windows of user", int(user)).permutation(
        np.flatnonzero(prepared.users == user))[:most] for user in users]
    return np.sort(np.concatenate(rows))

def windows_at(prepared, rows, sensors):
    """The windows `rows` as a model reads them, (n, C, T) float32, divided by SCALE: of "both",
    "acc" or "gyro". UserError if the set lacks that sensor."""
    chosen, channels = SENSORS[sensors], prepared.meta["channels"]
    require(chosen.stop <= len(channels), f"--sensors {sensors}: the set has only {channels}")
    return prepared.windows[rows][:, chosen].astype(np.float32) / SCALE[chosen]

def random_rotation(x, angle, rng):
    """Windows x (n, C, T), both sensors rotated alike, about a random axis by about `angle` rad."""
    vectors = angle * rng.standard_normal((len(x), 3))
    matrices = scipy.spatial.transform.Rotation.from_rotvec(vectors).as_matrix().astype(x.dtype)
    return (matrices[:, None] @ x.reshape(len(x), -1, 3, x.shape[2])).reshape(x.shape)

# ---------------------------------------------------------------- overview, plot, the command line
def describe(name):
    """A prepared set in a line, and what was left out of it."""
    meta = load_one(name).meta
    size = f"{len(meta['users'])} users, {meta['hours']:.2f} hours, {meta['windows']} windows"
    left_out = [f"left out: {n} {reason}" for reason, n in meta["left_out"].items()]
    return "; ".join([f"{name}: {size}, {len(meta['classes'])} classes", meta["origin"], *left_out])

def plot(name):
    """Draw three windows of each class, one after another."""
    from matplotlib import pyplot as plt
    windows, _, labels, meta = load_one(name)
    kinds = np.unique(labels)
    plt.figure(figsize=(14, 1.5 * len(kinds) + 1), layout="constrained")
    for row, label in enumerate(kinds, start=1):
        chosen = random_stream("plot", label).choice(np.flatnonzero(labels == label), 3)
        x = np.hstack(windows[chosen]).T           # (3 T, C)
        plt.subplot(len(kinds), 1, row, title=[*meta["classes"], "no label"][label])
        plt.plot(np.arange(len(x)) / meta["rate"], x, lw=0.8, label=meta["channels"])
    plt.legend(ncols=6, fontsize=7, title="g, rad/s")
    with replacing(Path("data") / name / "plot.png") as temporary:
        plt.savefig(temporary, dpi=90)
    print(f"data/{name}/plot.png shows {3 * len(kinds)} windows")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, count = parser.add_argument, number(int, 1)
    flag("source", nargs="?", choices=[*SOURCES, "plot"], help="what to prepare; without: a list")
    flag("which", nargs="?", default="", help="with plot: the prepared set to draw")
    flag("--raw", default="data/raw", help="folder of the archives or the recordings")
    flag("--name", help="prepare it as data/NAME/; without it, under the name of the source")
    flag("--limit-users", type=count, metavar="N", help="only the first N users, for a quick look")
    flag("--force", action="store_true", help="replace a set that is prepared already")
    flag("--users", type=count, default=40, help="simulated: number of people")
    flag("--hours-per-user", type=number(float, 1e-3, 1e4), default=0.5,
         help="simulated: hours of each person")
    flag("--spread", type=number(float, 0, 1e4), default=1.0,
         help="simulated: how people differ; 0: clones")
    flag("--seed", type=int, default=0, help="simulated: another seed, other people")
    flag("--acc-unit", choices=("g", "m/s2"), default="g", help="folder: unit of acceleration")
    flag("--gyro-unit", choices=("rad/s", "deg/s"), default="rad/s", help="folder: gyroscope")
    a = parser.parse_args()
    if a.source == "plot":
        return plot(a.which)
    if a.source is None:
        made = {path.parent.name for path in Path("data").glob("[!.]*/meta.json")}
        for name in sorted(made | set(SOURCES)):
            print(describe(name) if name in made else f"{name} (not prepared) {SOURCES[name].text}")
        return
    own = {"simulated": ["users", "hours_per_user", "spread", "seed"],
           "folder": ["acc_unit", "gyro_unit"]}.get(a.source, [])
    settings = {key: getattr(a, key) for key in ["source", *own, "limit_users"]}
    name = a.name or a.source
    require(re.fullmatch(r"[A-Za-z0-9][\w.-]*", name), f"--name {name}: use letters, digits, _.-")
    prepare(name, settings, a.raw, a.force)

if __name__ == "__main__":
    command(main)
