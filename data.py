"""
Recordings to windows: every data set, cut in the same way.

    archive, folder or simulation    5-900 Hz, stamps as they came
      -> stretches (t, x)            rising stamps without a gap; g (with gravity), rad/s
      -> windows (n, C, T)           20 Hz, sensors on one clock, 10 s = 200 samples, no overlap
      -> data/NAME/                  windows.npy float16, users.npy, labels.npy, meta.json

    python data.py                                  # all data sets, and which are prepared
    python data.py wisdm_watch                      # a published archive, downloaded if missing
    python data.py folder --raw my_recordings --name mine
"""
import argparse, contextlib, csv, datetime, functools, hashlib, importlib.metadata, io, itertools
import json, math, operator, os, re, subprocess, sys, tempfile, zipfile, zlib
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import scipy                                       # submodules are imported at first use

RATE, SECONDS = 20, 10                             # Hz, s: a window has 200 samples
GAP = 0.5                                          # s without a new reading: a stretch ends
LARGEST = 200                                      # g or rad/s: no body sensor gives it
GRAVITY, DEGREE = 9.80665, np.pi / 180             # m/s^2 in 1 g, rad in 1 degree

# A sensor has three axes. columns: in a csv. units: factors to its unit. scale: a model's input is
# divided by it. rest: lowest and highest norm when still. usual: 9 norms in 10 are below it.
Sensor = namedtuple("Sensor", "columns unit units scale rest usual")
SENSORS = {
    "acc": Sensor(["ax", "ay", "az"], "g", {"g": 1, "m/s2": 1 / GRAVITY}, 0.7, (0.5, 1.5), 8),
    "gyro": Sensor(["gx", "gy", "gz"], "rad/s", {"rad/s": 1, "deg/s": DEGREE}, 1.05, (0, 0.2), 35),
}
SENSOR_CHOICES = ["both", *SENSORS]
CHANNELS = [f"{name}_{axis}" for name in SENSORS for axis in "xyz"]
SCALE = np.float32([[sensor.scale] for sensor in SENSORS.values() for _ in "xyz"])     # (C, 1)

# Below the line: mean_step (seconds a row), in_order, no_reading (rows that can't be motion),
# side_by_side (stretches of two clocks), left_out (of an account), random_stream (a generator by
# name), require (or an error is said).
# ---------------------------------------------------------------- stamps to a clock
def clock(t):
    """Stamps t (n,) -> times (n,), seconds a row, and for each row why it is dropped, or "". Stamps
    that come in bursts, or were rounded, are spread evenly: by a mean over 10 s."""
    t, steps, step = t.copy(), np.diff(t), mean_step(t)
    burst = steps < min(step / 4, 0.004)           # far closer than the mean step
    uneven = burst.mean() > 0.05
    pause = np.median(steps[~burst]) if uneven else 0                          # between bursts
    why = np.full(len(t), "", object)
    ends = np.flatnonzero((steps < -max(pause, 0.1)) | (steps > max(GAP, 2 * pause))) + 1
    for rows in np.split(np.arange(len(t)), ends):
        if not uneven:
            behind = t[rows[1:]] <= np.maximum.accumulate(t[rows[:-1]])
            why[rows[1:][behind]] = "stamps that repeat or go back"
        width = min(round(SECONDS / step), len(rows) - 1) // 2 * 2 + 1         # rows, odd
        if len(rows) * step < GAP:
            why[rows] = f"stretches of less than {GAP} s"
        elif uneven and width > 1:
            lost = np.diff(t[rows], prepend=t[rows[0]])            # packets
            lost = np.cumsum((lost - pause) * (lost > 1.5 * pause) * (pause > 1.5 * step))
            t[rows] = scipy.signal.savgol_filter(t[rows] - lost, width, 1)
            pace = np.diff(t[rows])
            t[rows] += lost
            if pace.max() > 1.5 * pace.min():
                why[rows] = f"stamps of no steady rate (about {1 / step:.0f} rows a second)"
    return t, step, why

def stretches(stream, sensor):
    """Stamps t (n,) in s and readings x (n, C) of one clock, first of `sensor` -> [(t, x), ...]
    whose stamps rise without a gap, seconds a row, and the account (see cut)."""
    t, x = stream
    known = np.isfinite(t)
    if len(np.unique(t[known])) < 2:
        return [], 0, Counter({"no stamps, or a single row": len(t) / RATE, "all": len(t) / RATE})
    row = np.arange(len(t))
    t = np.interp(row, row[known], t[known])       # missing stamps are filled
    order = in_order(t)
    x, stamps = x[order], t[order]
    t, step, why = clock(stamps)
    why[(why == "") & no_reading(x, sensor, step)] = "no reading"
    kept = np.flatnonzero(why == "")
    steps = np.diff(t[kept])
    ends = np.flatnonzero((steps <= 0) | (steps > GAP)) + 1
    parts = [rows for rows in np.split(kept, ends) if len(rows)]
    for rows in parts:
        inside = why[rows[0]:rows[-1]]             # a view: this writes into why
        inside[inside != ""] = "mended: bridged over " + inside[inside != ""]
    account = Counter({reason: n * step for reason, n in Counter(why).items() if reason})
    wide = np.diff(t) - step
    account["mended: bridged over missing rows"] = wide[(wide > 1.5 * step) & (wide < GAP)].sum()
    account["mended: rows out of order, sorted"] = step * np.sum(order != row)
    account["mended: stamps in bursts, or rounded, spread evenly"] = step * np.sum(t != stamps)
    spans = [t[rows[-1]] - t[rows[0]] + step for rows in parts]
    account["all"] = left_out(account).total() + sum(spans)
    return [(t[rows], x[rows]) for rows in parts], step, account

# ---------------------------------------------------------------- a clock to windows
def resample(t, x, start, n):
    """The signal x (rows, columns) with stamps t (s) at n ticks of the 20 Hz clock from `start`:
    interpolated to an even grid of 80 Hz or more, low-passed without phase shift, decimated."""
    steps = np.diff(t)
    typical = np.median(steps)
    even = len(t) > 3 and 0.5 * typical < steps.min() and steps.max() < 1.5 * typical
    k = max(4, math.ceil(len(steps) / (t[-1] - t[0]) / RATE - 1e-6))   # fine ticks in one of 20 Hz
    grid = np.clip(start + np.arange((n - 1) * k + 1) / (RATE * k), t[0], t[-1])
    spline = scipy.interpolate.make_interp_spline(t, x, k=3 if even else 1)  # a cubic overshoots
    low_pass = scipy.signal.firwin(RATE * k + 1, 9, fs=RATE * k, window=("kaiser", 5.65))    # 60 dB
    return scipy.signal.resample_poly(spline(grid), 1, k, window=low_pass, padtype="antireflect")

def cut(recordings, length):
    """Recordings (user, label, streams), a stream (t, x) for each clock -> arrays of windows
    (n, C, length), a row (user, label) for each window, and the account, a Counter of seconds by
    reason: recorded = in windows + left out; what begins with "mended" was kept."""
    windows, rows, account = [], [], Counter()
    for user, label, streams in recordings:
        parts, pace, accounts = zip(*map(stretches, streams, SENSORS.values()))
        own = functools.reduce(operator.or_, accounts)         # of two clocks, the larger of each
        rest = own.pop("all", 0) - left_out(own).total()
        for pair in side_by_side(parts):
            start, end = max(t[0] for t, _ in pair), min(t[-1] for t, _ in pair)
            n = max(0, math.floor((end - start) * RATE + 1e-6) + 1)
            if count := n // length:
                x = np.hstack([resample(t, x, start, n) for t, x in pair])           # (n, C)
                x = x[:count * length].reshape(count, length, -1).transpose(0, 2, 1)
                x = x.astype(np.float16, "C") + np.float16(0)    # -0 -> 0, on every processor
                windows.append(x)
                rows += [(user, label)] * count
            why = "ends of stretches" if count else "stretches shorter than a window"
            span = max(0, end - start + max(pace))
            own[why] += span - count * length / RATE
            rest -= span
        own["one sensor without the other"] = max(0, rest)
        account += own
    return windows, rows, account

# ---------------------------------------------------------------- who is held out, who is drawn
Prepared = namedtuple("Prepared", "windows users labels meta")   # (n, C, T), (n,), (n,), a dict

def by_source(meta):
    """The users of each source: [[user, ...], ...]."""
    return [[user for user, other in enumerate(meta["sources"]) if other == source]
            for source in sorted(set(meta["sources"]))]

def held_out_users(meta):
    """The users that no model is trained on: a fifth of each source's, at least 2, by a hash. Two
    halves: the best step for one is where the other is scored (pretrain.cross_fitted)."""
    def rank(user):
        name = f"{meta['sources'][user]}/{meta['users'][user]}"
        return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
    half_a, half_b = [], []
    for group in by_source(meta):
        ranked = sorted(group, key=rank)
        held_out = ranked[:max(2, len(ranked) // 5)]
        half_a, half_b = half_a + held_out[::2], half_b + held_out[1::2]
    return half_a, half_b

def training_users(meta, seed):
    """Users that aren't held out, in the seeded random order a grid takes them, sources in turn."""
    half_a, half_b = held_out_users(meta)
    held_out, rng = {*half_a, *half_b}, random_stream(seed, "training users")
    queues = [rng.permutation([user for user in group if user not in held_out]).tolist()
              for group in by_source(meta)]
    require(any(queues), f"{meta['name']}: all are held out (at least 2 per source): add users")
    turns = itertools.zip_longest(*[queues[i] for i in rng.permutation(len(queues))])
    return [user for turn in turns for user in turn if user is not None]

def draw_windows(prepared, users, hours_per_user, seed):
    """Rows (n,) of the windows that a cell trains on: the first `hours_per_user` (None: all) of a
    random order of each user's, so that fewer hours are a subset of more."""
    most = hours_per_user and max(1, round(hours_per_user * 3600 / prepared.meta["seconds"]))
    order = [random_stream(seed, "windows of user", int(user)).permutation(
        np.flatnonzero(prepared.users == user)) for user in users]
    return np.sort(np.concatenate([rows[:most] for rows in order]))

# ---- from here on: files, flags, figures

# ---------------------------------------------------------------- the table of sources
# members: pattern of the files to read, with the part, usually a user. archives: URLs, or file
# names where no URL is stable. classes: label i is classes[i]; (): as named in the files.
Source = namedtuple("Source", "text members archives classes seconds test_users rate",
                    defaults=((), (), SECONDS, (), None))
UCI = "https://archive.ics.uci.edu/static/public/"
UCIHAR = "WALKING WALKING_UPSTAIRS WALKING_DOWNSTAIRS SITTING STANDING LAYING".split()
WISDM = ("walking jogging stairs sitting standing typing teeth soup chips pasta drinking sandwich "
         "kicking catch dribbling writing clapping folding").split()     # A to S; there is no N
WISDM_ZIP = UCI + "507/wisdm+smartphone+and+smartwatch+activity+and+biometrics+dataset.zip"
EXTRASENSORY = "http://extrasensory.ucsd.edu/data/raw_measurements/ExtraSensory.raw_measurements."
MOTIONSENSE = "https://github.com/mmalekzadeh/motion-sense/raw/master/data/A_DeviceMotion_data.zip"
SOURCES = {
    "simulated": Source("a simulated population", r"(?P<part>\d+)"),
    "folder": Source("own recordings: a folder with one .npz or .csv per user",
                     r"(?i:(?P<part>[^/]+)\.(csv|npz))$"),
    "ucihar": Source(
        "UCI HAR (Anguita 2013): 30 users, phone at the waist, 50 Hz, 2.56 s",
        r"/(?P<part>train|test)/.*\.txt$",
        (UCI + "240/human+activity+recognition+using+smartphones.zip",), UCIHAR, 2.55,
        "2 4 9 10 12 13 18 20 24".split()),
    "wisdm_phone": Source(
        "WISDM (Weiss 2019): 51 users, phone in the pocket, 20 Hz",
        r"raw/phone/\w+/data_(?P<part>\d+)_\w+\.txt$", (WISDM_ZIP,), WISDM),
    "wisdm_watch": Source(
        "WISDM (Weiss 2019): 51 users, watch on the wrist, 20 Hz",
        r"raw/watch/\w+/data_(?P<part>\d+)_\w+\.txt$", (WISDM_ZIP,), WISDM),
    "extrasensory": Source(
        "ExtraSensory (Vaizman 2017): 60 users, phone in free living, 40 Hz",
        r"(?P<part>[^/]+)/\d+\.m_(?:raw_acc|proc_gyro)\.dat$",
        (EXTRASENSORY + "raw_acc.zip", EXTRASENSORY + "proc_gyro.zip")),
    "motionsense": Source(
        "MotionSense (Malekzadeh 2019): 24 users, phone in the pocket, 50 Hz",
        r"^A.*/(?P<label>[a-z]+)_\d+/sub_(?P<part>\d+)\.csv$", (MOTIONSENSE,), rate=50),
    "sisfall": Source(
        "SisFall (Sucerquia 2017): 38 users, waist, 200 Hz, with falls",
        r"(?P<part>S[AE]\d+)/(?P<label>[DF]\d+)_S[AE]\d+_R\d+\.txt$",
        ("SisFall_dataset.zip",), rate=200),
    "uschad": Source(
        "USC-HAD (Zhang 2012): 14 users, hip, 100 Hz",
        r"Subject(?P<part>\d+)/(?P<label>a\d+)t\d+\.mat$",
        ("https://sipi.usc.edu/had/USC-HAD.zip",), rate=100),
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

def build_parser(flags, text):
    """An argparse parser of {name: (default, type or choices, what it does)}; bool: a switch."""
    p = argparse.ArgumentParser(description=text,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, allowed, meaning) in flags.items():
        kind = {"choices": allowed} if isinstance(allowed, list) else {"type": allowed}
        if allowed is bool:
            kind = {"action": "store_true"}
        p.add_argument("--" + name.replace("_", "-"), default=default,
                       help=meaning + " (default: %(default)s)", **kind)
    return p

def command(main):
    """Run `main()` as a command line: an error that is expected is one sentence on stderr."""
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
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}): delete it, make it again") from None

def provenance():
    """What made a result: the git commit (with + if files were changed) and the versions used."""
    git = subprocess.run("git describe --always --exclude='*' --abbrev=40 --dirty=+", shell=True,
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy")}
    return {"commit": git.stdout.strip(), "python": sys.version.split()[0], **versions}

def left_out(account):
    """The seconds that aren't in windows, by reason: what was mended is."""
    return Counter({why: seconds for why, seconds in account.items()
                    if not why.startswith("mended")})

def random_stream(*key):
    """A random generator for each use, by name: random_stream(seed, "masks", step)."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in key])

# ---------------------------------------------------------------- stamps and rows that can't be
def mean_step(t):
    """Mean seconds a row of stamps t (n,), over lags of 256 rows; lags far from their median, as of
    gaps, don't count. Leaps of over 2 s, as between short recordings (not bursts), are closed."""
    steps = np.diff(t)
    leaps = np.abs(steps) > 2
    if 0 < leaps.sum() < 0.02 * len(t) and (usual := steps[~leaps].mean()) > 0.004:
        t = np.cumsum(np.where(leaps, usual, steps))
    lag = max(1, min(256, len(t) // 4))
    lags = t[lag:] - t[:-lag]
    typical = np.median(lags)
    step = np.mean(lags[np.abs(lags - typical) <= abs(typical) / 2]) / lag
    return step if step > 0 else np.ptp(t) / len(t)

def in_order(t):
    """The rows (n,) of stamps t (n,) in order of time, if sorting halves the steps that are too
    short or backwards; else as they stand: the clock was set back, or restarted."""
    steps, order = np.diff(t), np.argsort(t, kind="stable")
    close = 0.6 * np.median(np.abs(steps[steps != 0])) if steps.any() else 0
    mends = np.sum(np.diff(t[order]) < close) < np.sum(steps < close) - np.sum(steps < 0) / 2
    return order if mends else np.arange(len(t))

def no_reading(x, sensor, step):
    """(n,): rows of x (n, C) that can't be motion: no number, or too large; x = y = z in every
    sensor (0, 0, 0 g; -999), unless that is a sensor at rest; one row repeated for over GAP."""
    new = np.r_[True, (x[1:] != x[:-1]).any(1)]
    run = np.cumsum(new) - 1
    stuck = ~new & (np.bincount(run)[run] * step > GAP)
    axes = x.reshape(len(x), -1, 3)                # (n, sensors, 3)
    size, equal = np.linalg.norm(axes, axis=2), (axes == axes[:, :, :1]).all((1, 2))
    low, high = sensor.rest
    at_rest = (low <= size[:, 0]) & (size[:, 0] <= high)
    return stuck | equal & ~at_rest | ~(size < LARGEST).all(1)

def side_by_side(parts):
    """Stretches of one clock or two that were recorded together, in the order of the file."""
    at = [0] * len(parts)
    while all(map(operator.lt, at, map(len, parts))):
        yield (pair := [own[i] for own, i in zip(parts, at)])
        first = min(t[-1] for t, _ in pair)
        at = [i + (t[-1] < first + GAP) for i, (t, _) in zip(at, pair)]

# ---------------------------------------------------------------- a parser for each format
# A new corpus is a row of SOURCES and a parser (part, file names, a function from file name to
# bytes, settings), named as the row is up to its first _, that yields (user, label, streams). If
# the row has a rate, each file is a recording, and the parser is one of bytes to readings (n, 6).
# A parser's docstring is what an error says was wanted.
def numbers(text, columns):
    """Bytes -> numbers (lines, columns), separated by blanks, commas or semicolons. Any other line
    is nan: it keeps its place, and counts as no reading."""
    rows, unreadable = [], [math.nan] * columns    # until it is read
    for line in text.replace(b",", b" ").replace(b";", b" ").splitlines():
        fields = line.split()
        if fields:
            rows.append(unreadable)
        if len(fields) == columns:
            with contextlib.suppress(ValueError):
                rows[-1] = [float(field) for field in fields]
    return np.array(rows).reshape(-1, columns)

def ucihar(split, names, read, settings):
    """Each published window is a recording of 128 samples at 50 Hz, in g and rad/s."""
    folder = names[0].partition(f"/{split}/")[0]
    def table(what, columns):
        return numbers(read(f"{folder}/{split}/{what}_{split}.txt"), columns)
    signals = [table(f"Inertial Signals/{sensor}_{axis}", 128)
               for sensor in ("total_acc", "body_gyro") for axis in "xyz"]
    classes = dict(enumerate(UCIHAR, 1))
    labels = [classes[label] for [label] in table("y", 1)]
    users = [int(user) for [user] in table("subject", 1)]
    for user, label, x in zip(users, labels, np.stack(signals, axis=2), strict=True):
        if user <= (settings["limit_users"] or user):
            yield str(user), label, steady(x, 50)

def wisdm(user, names, read, settings):
    """A file for each sensor, lines `user,activity,ns,x,y,z;`, m/s^2, rad/s; the clocks differ."""
    sensors = []
    for sensor, unit in ("/accel/", GRAVITY), ("/gyro/", 1):
        text = b"".join(read(name) for name in names if sensor in name)
        for code, letter in enumerate(b"ABCDEFGHIJKLMOPQRS"):
            text = text.replace(b",%c," % letter, b",%d," % code)
        table = numbers(text, 6)
        readable = np.arange(len(table)) * np.isfinite(table[:, 1])
        activity = table[np.maximum.accumulate(readable), 1]           # else: of the line before
        sensors.append((activity, table[:, 2] / 1e9, table[:, 3:] / unit))
    for code, label in enumerate(WISDM):
        yield user, label, [(t[activity == code], x[activity == code])
                            for activity, t, x in sensors]

def extrasensory(user, names, read, settings):
    """A file for each sensor and minute, lines `clock_s x y z`; acceleration in g or in m/s^2."""
    for name in sorted({name.replace("proc_gyro", "raw_acc") for name in names}):
        acc = numbers(read(name), 4)
        gyro = numbers(read(name.replace("raw_acc", "proc_gyro")), 4)
        norm = np.nanmedian(np.r_[np.linalg.norm(acc[:, 1:], axis=1), 0])      # 0: if all are nan
        unit = 1 if 0.7 <= norm <= 1.5 else GRAVITY if 6 <= norm <= 15 else math.nan   # no reading
        yield user, "", [(acc[:, 0], acc[:, 1:] / unit), (gyro[:, 0], gyro[:, 1:])]

def steady(x, rate):
    return [(np.arange(len(x)) / rate, x)]

def files_of(user, names, read, settings):
    """Recordings that are a file each, at a steady rate."""
    what = settings["source"]
    for name in names:
        label = re.search(SOURCES[what].members, name)["label"]
        yield f"{what}_{user}", label, steady(globals()[what](read(name)), SOURCES[what].rate)

def motionsense(content):
    """Columns: index, attitude (3), gravity (3), rad/s (3), user acceleration (3); g."""
    table = numbers(content.partition(b"\n")[2], 13)
    return np.hstack([table[:, 4:7] + table[:, 10:13], table[:, 7:10]])

def sisfall(content):
    """Nine integers a line: acceleration (32 g in 13 bits), rotation (4000 deg/s in 16)."""
    return numbers(content, 9)[:, :6] * ([32 / 2**13] * 3 + [4000 / 2**16 * DEGREE] * 3)

def uschad(content):
    """MATLAB files, g and deg/s."""
    return scipy.io.loadmat(io.BytesIO(content))["sensor_readings"] * ([1] * 3 + [DEGREE] * 3)

# ---------------------------------------------------------------- own recordings
TIME_UNITS = {"s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
NO_LABEL = "-1,none,na,n/a,nan,null,unknown,undefined,unlabelled,unlabeled,no label,-,?".split(",")

def folder(user, names, read, settings):
    """A .npz with signal (n, 6) or (n, 3), rate (5 to 900 Hz) and, if you like, segment and label
    (n,); or a .csv with the columns t,ax,ay,az[,gx,gy,gz][,label], t in seconds."""
    require(len(names) == 1, f"{user} is there as .csv and as .npz; keep one")
    path = Path(names[0])
    fields = np.load(path) if path.suffix.lower() == ".npz" else read_csv(path)
    x = fields["signal"].astype(float)
    rate = 5 if "t" in fields else fields["rate"].item()
    require(5 <= rate <= 900, f"{path}: rate is {rate}, not from 5 to 900 Hz")
    t = fields["t"] if "t" in fields else np.arange(len(x)) / rate
    segment = fields.get("segment", np.zeros(len(x)))
    label = fields.get("label", np.full(len(x), "")).astype(str)
    three_axes_each = x.shape[1] in range(3, len(CHANNELS) + 1, 3)
    if not (three_axes_each and segment.shape == label.shape == t.shape):
        raise ValueError(f"signal {x.shape}, segment {segment.shape}, label {label.shape}")
    order = in_order(t)
    steps = {unit: mean_step(t[order] * second) for unit, second in TIME_UNITS.items()}
    unit = next((unit for unit, step in steps.items() if 0.0011 < step < 0.201), None)
    require(unit, f"{path}: t grows by {steps['s']:.3g} a row, in none of {[*steps]} 5 to 900 Hz")
    second, spelled = TIME_UNITS[unit], one_spelling(label)
    mended = {f"t read as {unit}, {1 / steps[unit]:.4g} rows a second": unit != "s",
              "rows out of order, sorted": np.any(np.diff(order) < 0),
              "other spellings of a label": np.any((spelled != label) & (spelled != ""))}
    for what, happened in mended.items():
        if happened:
            print(f"{path}: {what}", file=sys.stderr)
    x = in_units(path, x, settings)
    segment, label = segment[order], spelled[order]
    ends = np.flatnonzero((segment[1:] != segment[:-1]) | (label[1:] != label[:-1])) + 1
    for rows in np.split(order, ends):
        yield user, spelled[rows[0]], [(t[rows] * second, x[rows])]

def read_csv(path):
    """The columns of a .csv, named as the arrays of a .npz, but t (n,) in place of rate. UserError
    for a row with too many or too few fields, or without t. Other columns are left alone."""
    text = path.read_text("utf-8-sig").splitlines()
    reader = csv.reader(text, delimiter=max(";\t,", key=text[0].count), skipinitialspace=True,
                        strict=True)
    def plain(row):
        return [field.strip().lower() for field in row]
    header = plain(next(reader))
    first, *others = (sensor.columns for sensor in SENSORS.values())
    given = sum(itertools.takewhile({*header}.intersection, others), [])       # up to a missing one
    names = ["t", *first, *given]
    columns = [header.index(name) for name in names]
    require(sum(map(header.count, names)) == len(names), f"{path} has a column twice: {header}")
    table, labels = [], []
    for row in reader:
        if not any(map(str.strip, row)):
            continue
        where = f"{path}, row {reader.line_num}"
        require(len(row) == len(header),
                f"{where}: {len(row)} fields for {len(header)} of the header")
        values = [value_of(row[column]) for column in columns]
        if math.isnan(values[0]):                  # the header of a file that was appended to this?
            require(plain(row) == header, f"{where}: no number or date as t")
            continue
        table.append(values)
        labels.append(row[header.index("label")] if "label" in header else "")
    table = np.array(table)
    return {"t": table[:, 0], "signal": table[:, 1:], "label": np.array(labels)}

def value_of(text):
    """A number, with a decimal comma or point, or a date in s; nan for any other text."""
    text = text.strip().replace(",", ".")
    with contextlib.suppress(ValueError):
        return float(text)
    with contextlib.suppress(ValueError):
        date = datetime.datetime.fromisoformat(text)
        return date.replace(tzinfo=date.tzinfo or datetime.UTC).timestamp()
    return math.nan

def one_spelling(label):
    """Labels (n,) in lower case, with single blanks, and 1 for 1.0; "" for what says that there is
    none: 0, too, if others are words."""
    spellings, which = np.unique(label, return_inverse=True)
    plain = [re.sub(r"^(-?\d+)\.0*$", r"\1", " ".join(one.lower().split())) for one in spellings]
    words = any(re.search(r"[^\W\d_]", one) for one in {*plain} - {*NO_LABEL})
    none = NO_LABEL + ["0"] * words
    return np.array(["" if one in none else one for one in plain])[which]

def in_units(path, x, settings):
    """Readings x (n, C) to g and rad/s. UserError if they weren't in the unit that was given."""
    full = np.isfinite(x).all(1)
    require(full.mean() > 0.4, f"{path}: most rows have an empty or "
            "unreadable field: join the sensors' rows by time, or leave a sensor's columns out")
    for (name, sensor), axes in zip(SENSORS.items(), np.split(x, x.shape[1] // 3, axis=1)):
        unit = settings[f"{name}_unit"]
        axes *= sensor.units[unit]                 # a view: this writes into x
        size = np.linalg.norm(axes, axis=1) * (np.ptp(axes, axis=1) > 0)       # 0 if x = y = z
        high = np.quantile(size[full], 0.9)
        require(high < sensor.usual and (high >= sensor.rest[0] or unit == sensor.unit),
                f"{path}: {name} is {high:.2g} {sensor.unit}, and nine rows in ten are below; at "
                f"rest it is {sensor.rest} (acc without gravity: convert it): check --{name}-unit")
    return x

# ---------------------------------------------------------------- a simulated population
ACTIVITIES = [  # name, lean (rad), strides (times the person's), push (g), turn (rad), share
    ("lying",    1.50, 0.00, 0.00, 0.00, 0.10),
    ("sitting",  0.45, 0.00, 0.00, 0.00, 0.15),
    ("standing", 0.05, 0.00, 0.00, 0.00, 0.10),
    ("walking",  0.10, 1.00, 0.30, 0.10, 0.25),
    ("stairs",   0.25, 0.85, 0.35, 0.15, 0.15),
    ("running",  0.20, 1.45, 0.60, 0.15, 0.10),
    ("cycling",  0.60, 0.70, 0.10, 0.25, 0.15),
]
HARMONICS = np.arange(1, 5)                        # of the stride, which is two steps
TRAITS = {  # mean, standard deviation over people, shape (7 activities, 6 channels, 4 harmonics)
    "strides": (0.95, 0.09, ()),                   # a second
    "vigour":  (0, 0.1, 7),                        # log of a factor, for each activity
    "posture": (0, 0.1, (7, 2)),                   # rad, added to each activity's roll and lean
    "sizes":   (1 - HARMONICS, 0.5, (6, 4)),       # log of each harmonic's size
    "phases":  (np.arange(24).reshape(6, 4) ** 2 % 6.3, 0.1, (6, 4)),    # rad, arbitrary
    "mount":   (0, 0.3, 3),                        # rotation of the sensor as worn, rad
}

def person(seed, user, spread):
    """Traits: mean + spread x deviation x a normal number, each from its own random stream."""
    who = {}
    for trait, (mean, deviation, shape) in TRAITS.items():
        rng = random_stream(seed, "trait", trait, user)
        who[trait] = mean + spread * deviation * rng.standard_normal(shape)
    return who

def simulated(user, names, read, settings, rate=40):
    """A day of random activities, 20 s each on average. In the body's frame (x forwards, y left,
    z up) the trunk leans and is pushed and turned by harmonics of the stride; the sensor is worn
    rotated, by M (mount):  acc = M R(angles)^-1 (0, 0, 1) + M push,  gyro = M d angles / dt"""
    rotation = scipy.spatial.transform.Rotation.from_rotvec
    who = person(settings["seed"], user, settings["spread"])
    rng = random_stream(settings["seed"], "day", user)           # clones, too, have different days
    mount = rotation(who["mount"])
    style = np.exp(who["sizes"] + 1j * who["phases"]).T          # (4, 6)
    shares = [share for *_, share in ACTIVITIES]
    left = round(settings["hours_per_user"] * 3600 / SECONDS)
    while left > 0:
        now = rng.choice(len(shares), p=shares)
        label, lean, strides, push, turn, _ = ACTIVITIES[now]
        windows = min(left, rng.geometric(1 / 2))
        left -= windows
        t = np.arange(windows * SECONDS * rate) / rate
        tempo, vigour = np.exp(rng.normal([0, who["vigour"][now]], [0.05, 0.12]))
        drift = 0.004 * np.cumsum(rng.standard_normal(len(t))) / np.sqrt(rate)
        turns = who["strides"] * strides * tempo * t + drift + rng.uniform()
        waves = (np.exp(2j * np.pi * np.outer(turns, HARMONICS)) @ style).real         # (n, 6)
        waves *= vigour * np.repeat([push, turn], 3)
        angles = waves[:, 3:] + [0, lean, 0] + rng.normal(0, 0.06, 3)
        angles[:, :2] += who["posture"][now]
        angles += 0.02 * np.sin(np.outer(t, rng.uniform(0.5, 4, 3)) + rng.uniform(0, 6, 3))
        acc = rotation(angles).inv().apply([0, 0, 1]) + waves[:, :3]
        gyro = np.gradient(angles, 1 / rate, axis=0)
        x = np.hstack([mount.apply(acc), mount.apply(gyro)])
        noise = rng.normal(0, [0.01] * 3 + [0.02] * 3, x.shape)
        yield user, label, [(t, x + noise)]

# ---------------------------------------------------------------- prepare: fetch, read, write
def download(url, path):
    """Fetch `url` to `path` through `path`.part; a transfer that was cut off is resumed."""
    import requests, urllib3
    require("://" in url, f"{path} is missing and has no stable URL: download it by hand")
    print(f"fetching {url}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    retry = urllib3.Retry(4, backoff_factor=0.3, status_forcelist=[429, 500, 502, 503, 504])
    session = requests.Session()
    session.mount(url.split("//")[0] + "//", requests.adapters.HTTPAdapter(max_retries=retry))
    with open(part, "ab") as file:
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={file.tell()}-"}
        try:
            response = session.get(url, headers=headers, stream=True, timeout=60)
            if response.status_code in (200, 416):               # no resuming: start again
                file.truncate(0)
            response.raise_for_status()
            for block in response.iter_content(1 << 16):
                file.write(block)
        except requests.RequestException as error:
            raise UserError(f"{url}: {error}; run it again, or download it by hand") from None
    if not zipfile.is_zipfile(part):
        part.unlink()
        raise UserError(f"{url} sent no zip file: download it by hand to {path}")
    os.replace(part, path)

@functools.lru_cache(maxsize=1)
def open_zips(what, raw):
    """{file name: the open zip that holds it}, of the source's archives and the zips in them."""
    files = {}
    for url in SOURCES[what].archives:
        path = Path(raw) / url.split("/")[-1]
        if not path.is_file():
            download(url, path)
        try:
            outer = zipfile.ZipFile(path)
            zips = [name for name in outer.namelist() if name.endswith(".zip")]
            inner = [zipfile.ZipFile(io.BytesIO(outer.read(name))) for name in zips]
        except Exception as error:
            raise UserError(f"{path} can't be read as a zip ({error}): replace the file") from None
        for archive in [outer, *inner]:
            files |= dict.fromkeys(archive.namelist(), archive)
    return files

def parts_of(settings, raw):
    """{part: names of its files}, sorted; a part is read on its own, and is usually one user."""
    what, parts = settings["source"], defaultdict(list)
    source = SOURCES[what]
    names = open_zips(what, raw)
    open_zips.cache_clear()                        # each process opens the archives for itself
    if what == "simulated":
        names = [f"{user:03d}" for user in range(settings["users"])]
    elif what == "folder":
        names = [str(path) for path in Path(raw).glob("[!.~]*")]
    for name in names:
        if match := re.search(source.members, name):
            parts[match["part"].zfill(2 if source.rate else 0)].append(name)
    require(parts, f"--raw {raw} holds nothing that can be read as {source.text}: check it")
    most = settings["limit_users"] if what != "ucihar" else None               # (train and test)
    return dict(sorted(parts.items())[:most])

def read_part(settings, raw, part, names):
    """Read and cut one part, in a process of its own."""
    what, opened = settings["source"], names[:1]
    source, files, parser = SOURCES[what], open_zips(what, raw), globals()[what.split("_")[0]]
    recordings = files_of if source.rate else parser
    def read(name):
        opened.append(name)
        return files[name].read(name) if name in files else b""
    try:
        return cut(recordings(part, names, read, settings), round(source.seconds * RATE))
    except UserError:
        raise
    except Exception as error:
        wanted = " ".join(parser.__doc__.split())
        raise UserError(f"{opened[-1]} can't be read ({error}); wanted: {wanted}") from None

def read_all(settings, raw):
    """Read all parts in parallel, and say what became of each: see `cut`."""
    parts, read = parts_of(settings, raw), functools.partial(read_part, settings, raw)
    windows, rows, account, empty = [], [], Counter(), []
    import scipy.interpolate, scipy.signal         # once, before the processes are forked
    with ProcessPoolExecutor() as pool:
        for part, (own, own_rows, seconds) in zip(parts, pool.map(read, parts, parts.values())):
            line = f"{part}: {len(own_rows)} windows; {said(seconds)}"
            if said(seconds):
                print(line, file=sys.stderr)
            windows += own
            rows += own_rows
            account += seconds
            if not own:
                empty.append(line)
    require(windows and not (empty and settings["source"] == "folder"),
            f"no {SOURCES[settings['source']].seconds} s of motion in a stretch, drop: "
            + ", ".join(empty))
    require(len({own.shape[1] for own in windows}) == 1,
            "some users have both sensors, some have one; keep them apart")
    return np.concatenate(windows), rows, account

def said(account):
    """What was left out, and what was mended, in words."""
    return "; ".join(f"{why} {seconds:.2f} s" for why, seconds in account.items()
                     if seconds >= 0.01)

def read_set(name, settings, raw):
    """A set, read from its archives or files: a Prepared."""
    what, source = settings["source"], SOURCES[settings["source"]]
    windows, rows, account = read_all(settings, raw)
    names = sorted({user for user, _ in rows}, key=int if what == "ucihar" else str)
    classes = list(source.classes) or sorted({label for _, label in rows} - {""})
    users = np.array([names.index(user) for user, _ in rows])
    labels = np.array([classes.index(label) if label else -1 for _, label in rows])
    hashes = np.array([hashlib.sha256(x).hexdigest()[:12] for x in windows])
    own = {"folder": name, "simulated": f"simulated-{settings.get('seed')}"}
    default = own.get(what, what.split("_")[0])                  # WISDM's two are one
    named = all(user.find("_") > 0 for user in names)
    left, remarks = left_out(account), to_look_at(names, windows, users, hashes)
    if what == "folder":
        remarks += about_files(names, raw)
    if mended := said(account - left):
        remarks.append(mended)
    return Prepared(windows, users, labels, {
        "name": name, "rate": RATE, "seconds": source.seconds,
        "channels": CHANNELS[:windows.shape[1]], "users": names,
        "sources": [settings.get("own_source") or (user.split("_")[0] if named else default)
                    for user in names],
        "classes": classes, "windows": len(rows), "hours": len(rows) * source.seconds / 3600,
        "left_out": left, "remarks": remarks, "origin": "; ".join([source.text, *source.archives]),
        "test_users": [user for user in names if user in source.test_users] or None,
        # A recording that is most of two files is among the smallest hashes of both.
        "checksums": [np.unique(hashes[users == user])[:64] for user in range(len(names))],
        "settings": settings,
        "provenance": provenance(), "fingerprint": fingerprint(windows, users, labels)})

def to_look_at(names, windows, users, hashes):
    """What to look at before anyone trains: sentences."""
    found, owner = defaultdict(list), {}
    for user, name in enumerate(names):
        x = windows[users == user].astype(np.float32)                          # (n, C, T)
        moves = x.std(2) / SCALE[:x.shape[1], 0]
        still = (moves < 1e-6).mean(0)
        for channel in np.flatnonzero(still > 0.1):
            found[f"{CHANNELS[channel]} is constant in windows: was it on?"].append(
                f"{name} {still[channel]:.0%}")
        if np.sqrt(np.mean(moves ** 2)) < 0.05:
            found["hardly moves: was it worn?"].append(name)
        if np.median(np.linalg.norm(x[:, :3].mean(2), axis=1)) < 0.5:
            found["gravity is missing, which encoders expect (and is it in g?)"].append(name)
        for one in hashes[users == user]:
            if one in owner:
                found["the same recording twice, leave one out"].append(
                    f"in {owner[one]} and in {name}")
            owner[one] = name
    return [f"{what}: {', '.join(dict.fromkeys(who))}" for what, who in found.items()]

def about_files(names, raw):
    """Of own recordings: files that aren't read, and names that look like sessions of a person."""
    others = sorted(path.name for path in Path(raw).glob("[!.~]*")
                    if not re.search(SOURCES["folder"].members, path.name))
    remarks = [f"not read, no .csv or .npz: {', '.join(others)}"] * any(others)
    stems = sorted({re.split(r"[-_. ]|(?<=\d)(?=[a-zA-Z])", name)[0] for name in names})
    if 1 < len(stems) < len(names):
        remarks.append(f"{len(stems)} sources with {len(names) / len(stems):.3g} users each, by "
                       f"the names of the files ({', '.join(stems[:9])}). If these are sessions "
                       "of a person, make them one file (t may start again), or they are trained "
                       "on and tested")
    return remarks

def prepare(name, settings, raw, force=False):
    """Make data/NAME/ unless it has the same settings; an old set stays until the new is whole."""
    target = Path("data") / name
    require(not target.exists() or (target / "meta.json").is_file(),
            f"{target} is no data set and is left as it is: delete it or give another --name")
    if settings["source"] == "folder":
        settings["recordings"] = {user: zlib.crc32(Path(file).read_bytes())
                                  for user, (file, *_) in parts_of(settings, raw).items()}
    if target.exists() and not force:
        made = load_one(name).meta["settings"]
        differ = [key for key in made | settings if made.get(key) != settings.get(key)]
        require(not differ, f"{target} differs in {', '.join(differ)}: give --name or --force")
        return print("prepared already:", describe(name))
    *arrays, meta = read_set(name, settings, raw)
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir="data") as work:
        made = Path(work) / "made"
        write_json(made / "meta.json", meta)                     # makes the folder
        for part, array in zip(Prepared._fields, arrays):
            np.save(made / f"{part}.npy", array)
        if target.exists():
            target.rename(Path(work) / "replaced")
        made.rename(target)
    print(describe(name))

# ---------------------------------------------------------------- load, pool, scale
def load(name):
    """The prepared set `name`, or several as one ("a+b"). UserError if one is missing or damaged,
    or if they don't fit together."""
    return functools.reduce(pooled, map(load_one, name.split("+")))

def pooled(a, b):
    """Two sets as one: users side by side, classes by name."""
    meta = {key: a.meta[key] for key in ("rate", "seconds", "channels")}
    name = f"{a.meta['name']}+{b.meta['name']}"
    require(meta.items() <= b.meta.items(), f"{name}: {[*meta]} differ")
    twice = [b.meta["users"][user] for user in known(b.meta, identities(a.meta))]
    require(not twice, f"{name}: a person is in two sets: {', '.join(twice)}; drop one set")
    for key in ("users", "sources", "checksums", "windows", "hours"):
        meta[key] = a.meta[key] + b.meta[key]
    classes = sorted({*a.meta["classes"], *b.meta["classes"]})
    labels = [np.array([*map(classes.index, one.meta["classes"]), -1])[one.labels]   # -1 stays
              for one in (a, b)]
    users = a.users, b.users + len(a.meta["users"])
    arrays = [*map(np.concatenate, ((a.windows, b.windows), users, labels))]
    return Prepared(*arrays, meta | {"name": name, "classes": classes, "test_users": None,
                                     "fingerprint": fingerprint(*arrays)})

def load_one(name):
    folder = Path("data") / name
    require((folder / "meta.json").is_file(), f"{folder} is not prepared: see data.py --help")
    with contextlib.suppress(OSError, EOFError, ValueError, TypeError, LookupError):
        meta = json.loads((folder / "meta.json").read_text())
        arrays = [np.load(folder / f"{part}.npy", mmap_mode="r") for part in Prepared._fields[:3]]
        if fingerprint(*arrays) == meta["fingerprint"]:
            older = {"checksums": [[]] * len(meta["users"]), "remarks": []}
            return Prepared(*arrays, older | meta)
    raise UserError(f"{folder} is damaged or was changed; prepare the set again with --force")

def fingerprint(windows, users, labels):
    """sha256 over users, labels and at most 4,096 windows, evenly spread: a quick check."""
    digest = hashlib.sha256(f"{windows.shape} {windows.dtype}".encode())
    for array in (users.astype("<i8"), labels.astype("<i8"), evenly(windows, 4096)):
        digest.update(array.tobytes())
    return digest.hexdigest()

def evenly(rows, most):
    """At most `most` of the rows, evenly spread."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]

def people(meta, users=None):
    """Who the users are, whatever the set is called: [(source, user name), ...]."""
    return [(source, name) for source, name, _ in identities(meta, users)]

def identities(meta, users=None):
    """The same with the checksums of their recordings: [[source, name, [checksum, ...]], ...]."""
    everyone = [[*who] for who in zip(meta["sources"], meta["users"], meta["checksums"])]
    return everyone if users is None else [everyone[user] for user in users]

def known(meta, trained_on):
    """The users who are among `trained_on` (of `identities`; older runs have no checksums), by
    source and name, or by one of their recordings."""
    def marks(source, name, checksums=()):
        return {(source, name), *checksums}
    seen = set().union(*(marks(*who) for who in trained_on))
    return [user for user, who in enumerate(identities(meta)) if seen & marks(*who)]

def held_out_windows(prepared, users, most=64):
    """Rows (n,) of the windows that are evaluated: at most `most` of each user, evenly spread."""
    rows = [np.flatnonzero(prepared.users == user) for user in users]
    return np.concatenate([evenly(own, most) for own in rows])

def windows_at(prepared, rows, sensors):
    """The windows `rows` as a model reads them, (n, C, T) float32, divided by SCALE: of "both"
    (all sensors) or of one. UserError if the set lacks it."""
    channels = prepared.meta["channels"]
    chosen = [i for i, name in enumerate(channels) if sensors in ("both", name[:-2])]
    require(len(chosen) >= (6 if sensors == "both" else 3),
            f"--sensors {sensors}: the set has only {channels}")
    return prepared.windows[rows][:, chosen].astype(np.float32) / SCALE[chosen]

def random_rotation(x, angle, rng):
    """Windows x (n, C, T), all sensors rotated alike, about each axis by about `angle` rad."""
    vectors = angle * rng.standard_normal((len(x), 3))
    matrices = scipy.spatial.transform.Rotation.from_rotvec(vectors).as_matrix().astype(x.dtype)
    return (matrices[:, None] @ x.reshape(len(x), -1, 3, x.shape[2])).reshape(x.shape)

# ---------------------------------------------------------------- overview, plot, the command line
def describe(name):
    """A prepared set in a line; then its classes, its account, and what to look at."""
    _, _, labels, meta = load_one(name)
    size = f"{len(meta['users'])} users, {meta['hours']:.2f} hours, {meta['windows']} windows"
    counts = zip(*np.unique(labels, return_counts=True))
    classes = [f"{[*meta['classes'], 'no label'][label]} {n}" for label, n in counts]
    return "\n  ".join([f"{name}: {size}, {len(meta['classes'])} classes; {meta['origin']}",
                        f"{len(meta['channels'])} channels; windows of each class: "
                        f"{', '.join(classes)}",
                        f"left out: {said(meta['left_out']) or 'nothing'}", *meta["remarks"]])

def overview():
    """A line for each data set."""
    made = {path.parent.name for path in Path("data").glob("[!.]*/meta.json")}
    for name in sorted(made | set(SOURCES)):
        print(describe(name).split("\n")[0] if name in made else
              f"{name} (not prepared) {SOURCES[name].text}")

def plot(name):
    """Draw three windows of each class, one after another."""
    from matplotlib import pyplot as plt
    windows, _, labels, meta = load_one(name)
    kinds = np.unique(labels)
    figure, rows = plt.subplots(len(kinds), squeeze=False, layout="constrained",
                                figsize=(14, 1.5 * len(kinds) + 1))
    for label, ax in zip(kinds, rows.flat):
        x = np.hstack(windows[evenly(np.flatnonzero(labels == label), 3)])     # (C, 3 T)
        curves = ax.plot(np.arange(x.shape[1]) / RATE, x.T, lw=0.8)
        ax.set_title([*meta["classes"], "no label"][label], parse_math=False)
    figure.legend(curves, meta["channels"], loc="outside right upper", title="g, rad/s over s")
    figure.savefig(path := f"data/{name}/plot.png", dpi=90)
    print(f"{path} shows three windows of each class")

FLAGS = {  # name: (default, range or choices, what it does: of one source, if it begins with one)
    "raw": ("data/raw", str, "folder of the archives or the recordings"),
    "name": (None, str, "prepare it as data/NAME/; without it, under the name of the source"),
    "limit_users": (None, number(int, 1), "only the first so many users, for a quick look"),
    "force": (False, bool, "replace a set that is prepared already"),
    "users": (40, number(int, 1), "simulated: number of people"),
    "hours_per_user": (0.5, number(float, 1e-3, 1e4), "simulated: hours of each person"),
    "spread": (1.0, number(float, 0, 1e4), "simulated: how people differ; 0: clones"),
    "seed": (0, int, "simulated: another seed, other people"),
    "source": (None, str, "folder: whose recordings these are; without it, what stands before the "
               "first _ of the files' names, if all have one, or the name of the set"),
    **{f"{name}_unit": (sensor.unit, [*sensor.units], "folder: its unit in the files")
       for name, sensor in SENSORS.items()},
}

def main():
    parser = build_parser(FLAGS, __doc__)
    parser.add_argument("what", nargs="?", choices=[*SOURCES, "plot"], help="without: a list")
    parser.add_argument("which", nargs="?", default="", help="with plot: the prepared set")
    a = parser.parse_args()
    if a.what == "plot":
        return plot(a.which)
    require(not a.which, f"'{a.which}' is one word too many: a set's name is given by --name")
    if a.what is None:
        return overview()
    name = a.name or a.what
    require(re.fullmatch(r"[A-Za-z0-9][\w.-]*", name), f"--name {name}: use letters, digits, _.-")
    own = {flag: getattr(a, flag) for flag, (_, _, meaning) in FLAGS.items()
           if meaning.startswith(a.what + ":")}
    if a.what == "folder":
        own["own_source"] = own.pop("source")
    settings = {"source": a.what, **own, "limit_users": a.limit_users}
    prepare(name, settings, a.raw, a.force)

if __name__ == "__main__":
    command(main)
