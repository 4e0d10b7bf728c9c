"""
Recordings to windows: every data set of the study, cut the same way.

    raw archive or folder            irregular stamps, 20-200 Hz, g or m/s^2, rad/s or deg/s, one sensor a file or both
      -> recording (n, 6) at 20 Hz   both sensors on one clock, anti-aliased; acceleration in g (gravity included), rad/s
      -> windows (n, C, T)           10 s = 200 samples, no overlap; none crosses a user, a recording, a gap or a label change
      -> data/NAME/                  windows.npy float16, users.npy, labels.npy (-1: none), meta.json

    python data.py                                  # what is prepared here, and what can be
    python data.py simulated --users 40             # a simulated population, needs nothing
    python data.py wisdm_watch --raw data/raw       # a published archive, downloaded into --raw if it isn't there
    python data.py folder --raw my_recordings --name mine
"""
import argparse, bisect, contextlib, fcntl, functools, hashlib, io, itertools, json, lzma, math, os, platform, re, shutil
import subprocess, sys, threading, time, warnings, zipfile, zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

RATE, SECONDS = 20, 10                                           # Hz, s: every prepared window is 200 samples
CHANNELS = ["acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z"]
GRAVITY = 9.80665                                                # m/s^2 in 1 g


# ---------------------------------------------------------------- where the data sets come from
@dataclass
class Source:
    """A row of the table: what is read by which parser, from which members of which archives."""
    text: str
    parse: str                                                   # the function below that reads one part (mostly: a user)
    members: str = ""                                            # regular expression: what to read; group 1 names the part
    urls: tuple = ()                                             # archives; their file names are the last part of the address
    classes: tuple = ()                                          # label i is classes[i]; () where the recordings tell
    length: int = RATE * SECONDS                                 # samples a window


UCI = "https://archive.ics.uci.edu/static/public/"
WISDM = dict(parse="wisdm", urls=(UCI + "507/wisdm+smartphone+and+smartwatch+activity+and+biometrics+dataset.zip",), classes=(
    "walking", "jogging", "stairs", "sitting", "standing", "typing", "teeth", "soup", "chips", "pasta", "drinking",
    "sandwich", "kicking", "catch", "dribbling", "writing", "clapping", "folding"))               # A to S without N
SOURCES = {
    "simulated": Source("a simulated population, made here", "simulated"),
    "folder": Source("own recordings: a folder with one .npz or .csv a user", "folder"),
    "ucihar": Source("UCI HAR (Anguita 2013): 30 users, phone at the waist, 50 Hz", "ucihar", r"/(train|test)/.*\.txt$",
                     (UCI + "240/human+activity+recognition+using+smartphones.zip",), length=51,  # 2.56 s, as published
                     classes=("WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING")),
    "wisdm_phone": Source("WISDM (Weiss 2019): 51 users, phone in the pocket, 20 Hz", **WISDM,
                          members=r"raw/phone/(?:accel|gyro)/data_(\d+)_(?:accel|gyro)_phone\.txt$"),
    "wisdm_watch": Source("WISDM (Weiss 2019): 51 users, watch on the wrist, 20 Hz", **WISDM,
                          members=r"raw/watch/(?:accel|gyro)/data_(\d+)_(?:accel|gyro)_watch\.txt$"),
}


# ---------------------------------------------------------------- what every command of this project shares
class Refused(Exception):
    """Input that can't be used: one sentence that says what, where, and what to do. Commands print it and exit with 2."""


def command(main):
    """Run `main()` as a command line: a refusal becomes one sentence on stderr and exit status 2, never a traceback."""
    try:
        sys.exit(main())
    except Refused as refusal:
        print(f"{Path(sys.argv[0]).name}: {refusal}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:                                     # a full disk, a folder that can't be written to
        print(f"{Path(sys.argv[0]).name}: {error.strerror or error} ({error.filename or 'while writing'}); nothing "
              "finished was touched: make room or choose another place, and run the same command again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped by you; the same command goes on", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary name beside `path` to write to; it takes the place of `path` only if nothing went wrong."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def provenance():
    """What made a result: the git commit (with `+` if files were changed since) and the versions it ran on."""
    git = lambda *words: subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True).stdout
    changed = "+" if git("status", "--porcelain", "--untracked-files=no").strip() else ""
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "scipy")}
    return {"commit": git("rev-parse", "HEAD").strip() + changed, "python": platform.python_version(), **versions}


# ---------------------------------------------------------------- from irregular stamps to windows
GAP = 0.5                                                        # s without a sample: the recording is cut there
CUTOFF = 9.0                                                     # Hz, half amplitude; the windows' 20 Hz hold up to 10 Hz


def in_order(t, x):
    """Rows to keep so that stamps increase: the longest increasing subsequence; one wild stamp costs one row, no more."""
    whole = np.flatnonzero(np.isfinite(t) & np.isfinite(x).all(1))
    if np.all(np.diff(t[whole]) > 0):
        return whole
    ends, rows, before = [], [], {}                              # ends[k]: the smallest stamp that ends k+1 increasing rows
    for row in whole.tolist():
        k = bisect.bisect_left(ends, t[row])
        before[row] = rows[k - 1] if k else None
        ends[k:k + 1], rows[k:k + 1] = [t[row]], [row]
    kept = rows[-1:]
    while before[kept[-1]] is not None:
        kept.append(before[kept[-1]])
    return np.array(kept[::-1])


def unbroken(t, x):
    """The stretches [(t, x), ...] of one sensor's rows: cut where no sample came for GAP, or where that many were dropped."""
    kept = in_order(t, x)
    if len(kept) < 2:
        return []
    steps = np.diff(t[kept])
    at = np.flatnonzero((steps > GAP) | ((np.diff(kept) - 1) * np.median(steps) > GAP)) + 1
    return [(t[rows], x[rows]) for rows in np.split(kept, at) if len(rows) > 1]


def resample(t, x, start, n):
    """The signal x (rows, columns) with stamps t (s), on n ticks of the 20 Hz clock from `start`: (n, columns).

    Interpolated to a grid of 80 Hz or more (cubic where the stamps are even; linear where they come in bursts, which a
    cubic overshoots), low-passed there (Butterworth, order 8, forwards and backwards: no phase), then every k-th taken.
    """
    from scipy import interpolate, signal                        # here: other scripts import this file and start faster
    steps = np.diff(t)
    even = steps.max() < 1.5 * np.median(steps) < 3 * steps.min()
    k = max(4, math.ceil(len(steps) / (t[-1] - t[0]) / RATE - 1e-6))
    fine = np.clip(start + np.arange((n - 1) * k + 1) / (RATE * k), t[0], t[-1])
    x = interpolate.make_interp_spline(t, x, k=3 if even and len(t) > 3 else 1)(fine)
    low_pass = signal.butter(8, CUTOFF, fs=RATE * k, output="sos")
    return signal.sosfiltfilt(low_pass, x, axis=0)[::k]


def pieces(streams, shortest):
    """Cut and pair the sensors of one recording: yields (n, columns) at 20 Hz, n >= shortest, one per unbroken stretch.

    streams: one (t, x) for both sensors on one clock, or one a sensor. Sensors are paired by stamp: each is brought to
    the common clock of the time that both cover.
    """
    for together in itertools.product(*(unbroken(t, x) for t, x in streams)):
        start, end = max(t[0] for t, _ in together), min(t[-1] for t, _ in together)
        n = math.floor((end - start) * RATE + 1e-6) + 1
        if n >= shortest:
            yield np.hstack([resample(t, x, start, n) for t, x in together])


def cut(recordings, length):
    """Recordings of one part of a source to windows.

    recordings: yields (user, label or None, streams). Returns windows (n, C, length) float16, their users and labels (n,)
    as names, and a count of what was left out and why.
    """
    windows, users, labels, left_out = [], [], [], Counter()
    for user, label, streams in recordings:
        if isinstance(streams, str):                             # the parser says why this one can't be used
            left_out[streams] += 1
            continue
        n = 0
        for piece in pieces(streams, length):
            n += len(piece) // length
            windows += piece[:len(piece) // length * length].reshape(-1, length, piece.shape[1]).astype("float16"),
            users += [user] * (len(piece) // length)
            labels += [label or ""] * (len(piece) // length)
        left_out["recordings shorter than a window (after cutting at gaps)"] += n == 0
    windows = np.concatenate(windows).transpose(0, 2, 1) if windows else np.empty((0, 0, length), "float16")
    return windows, users, labels, +left_out


# ---------------------------------------------------------------- archives, read where they lie
MEMBER_LIMIT, NESTED_LIMIT = 64 << 20, 1 << 30                   # bytes one text, one archive in an archive may inflate to


@functools.lru_cache(maxsize=8)
def open_zips(path):
    """The zip at `path` and those inside it, opened: [ZipFile, ...]. Nothing is unpacked to disk. Raises Refused."""
    try:
        zips = [zipfile.ZipFile(path)]
        for info in zips[0].infolist():
            if info.filename.endswith(".zip"):
                inflate = functools.partial(read, zips[:1], info.filename, path, NESTED_LIMIT)
                zips.append(zipfile.ZipFile(io.BytesIO(inflate())))
    except (zipfile.BadZipFile, EOFError) as error:
        raise Refused(f"{path} is not a whole zip archive ({error}); remove it and fetch it again") from None
    infos = [info for z in zips for info in z.infolist()]
    for info in infos:
        if info.filename.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", info.filename) or ":" in info.filename[:2]:
            raise Refused(f"{path} holds a member named '{info.filename}', which points outside of it; "
                          "this isn't the published archive: fetch it again")
    inflated, packed = sum(info.file_size for info in infos), Path(path).stat().st_size
    if inflated > 1 << 30 and inflated > 200 * packed:
        raise Refused(f"{path} would inflate {inflated // packed}-fold to {inflated / 1e9:.0f} GB; "
                      "this isn't the published archive: fetch it again")
    return zips


def read(zips, name, path="", limit=MEMBER_LIMIT):
    """The bytes of member `name`, whichever of `zips` holds it. Raises Refused if it is damaged or too large."""
    z = next(z for z in zips if name in z.NameToInfo)
    if z.getinfo(name).file_size > limit:
        raise Refused(f"{name} in {path or z.filename} would inflate to {z.getinfo(name).file_size / 1e6:.0f} MB, more than "
                      f"any published file ({limit >> 20} MB): not the published archive, fetch it again")
    try:
        return z.read(name)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as error:
        raise Refused(f"{name} in {path or z.filename} can't be read ({error}); remove the archive and fetch it again") from None


def numbers(text, columns, name):
    """(rows, columns) float64 from bytes of numbers separated by blanks or commas. Raises Refused for anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")                           # numpy warns, and stops, at the first thing that's no number
        try:
            return np.fromstring(text.replace(b",", b" "), sep=" ").reshape(-1, columns)
        except (DeprecationWarning, ValueError):
            raise Refused(f"{name} is not {columns} columns of numbers; fetch the archive again") from None


# ---------------------------------------------------------------- one parser a format: yields (user, label, streams)
def ucihar(split, names, read):
    """Each published window is a recording of its own: 128 samples at 50 Hz, total acceleration in g, gyroscope rad/s."""
    folder = names[0].split(split)[0] + split
    column = lambda what, n=1: numbers(read(f"{folder}/{what}_{split}.txt"), n, what)
    users, classes = column("subject")[:, 0].astype(int), column("y")[:, 0].astype(int)
    x = np.stack([column(f"Inertial Signals/{sensor}_{axis}", 128)
                  for sensor in ("total_acc", "body_gyro") for axis in "xyz"], axis=2)        # (n, 128, 6)
    names_of = dict(enumerate(SOURCES["ucihar"].classes, start=1))
    if not len(users) == len(classes) == len(x) or not set(classes) <= set(names_of):
        raise Refused(f"the files of UCI HAR's {split} half don't fit together; fetch the archive again")
    for user, label, window in zip(users, classes, x):
        yield str(user), names_of[label], [(np.arange(128) / 50, window)]


def wisdm(user, names, read):
    """A file a sensor: `user,activity,timestamp_ns,x,y,z;`, m/s^2 and rad/s. The sensors' stamps differ; rates do, too."""
    sensors = {}
    for name in names:
        text = np.frombuffer(read(name).replace(b";", b" "), np.uint8).copy()
        letters = np.flatnonzero(text == ord(","))[::5] + 1                                   # after a line's first comma
        activity = text[letters]
        text[letters] = ord("0")
        table = numbers(text.tobytes(), 6, name)
        if len(table) != len(letters):
            raise Refused(f"{name} has lines that are not user,activity,timestamp,x,y,z; fetch the archive again")
        sensors["gyro" if "/gyro/" in name else "acc"] = activity, table[:, 2], table[:, 3:]
    if len(sensors) < 2:
        yield user, None, "users with one sensor only"
        return
    for letter, label in zip("ABCDEFGHIJKLMOPQRS", SOURCES["wisdm_phone"].classes):           # there is no N
        streams = []
        for sensor, unit in (("acc", GRAVITY), ("gyro", 1.0)):
            activity, ns, x = sensors[sensor]
            rows = np.flatnonzero(activity == ord(letter))
            times = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)                     # recorded twice: earlier first
            rows = np.concatenate(sorted(times, key=lambda some: ns[some[:1]].tolist()))
            streams.append((ns[rows] / 1e9, x[rows] / unit))
        yield (user, label, streams) if all(len(t) for t, _ in streams) else (user, None, "activities missing in a file")


def folder(user, names, read, flags):
    """A user's own .npz (signal, rate [, segment, label]) or .csv (t, ax ay az gx gy gz [, label])."""
    path = Path(names[0])
    t, x, segment, label = (npz_rows if path.suffix == ".npz" else csv_rows)(path)
    if not np.isfinite(x).all() or not np.isfinite(t).all():
        row = np.flatnonzero(~(np.isfinite(x).all(1) & np.isfinite(t)))[0]
        raise Refused(f"{path} has a value that is missing or infinite in row {row + 1}; take such rows out (a gap of more "
                      f"than {GAP} s cuts the recording there)")
    acc, gyro = (x[:, :3], x[:, 3:]) if x.shape[1] == 6 else (x, x[:, :0])
    acc = acc / (GRAVITY if flags["acc_unit"] == "m/s2" else 1)
    gyro = np.deg2rad(gyro) if flags["gyro_unit"] == "deg/s" else gyro
    norm = np.median(np.linalg.norm(acc, axis=1)) if len(acc) else 0
    if norm > 4 or (flags["acc_unit"] == "m/s2" and norm < 0.25):
        raise Refused(f"{path}: the median acceleration is {norm:.2g} g where 1 g of gravity is expected; "
                      f"say --acc-unit {'m/s2' if flags['acc_unit'] == 'g' else 'g'}")
    if not 0.5 < norm < 2:
        print(f"{path}: the median acceleration is {norm:.2g} g where 1 g of gravity is expected: is gravity in it, is "
              f"--acc-unit {flags['acc_unit']} right?", file=sys.stderr)
    if gyro.size and np.quantile(np.abs(gyro), 0.95) > 35:
        raise Refused(f"{path}: angular velocity is often above 35 rad/s (2000 deg/s); say --gyro-unit deg/s")
    x = np.hstack([acc, gyro])
    at = np.flatnonzero((segment[1:] != segment[:-1]) | (label[1:] != label[:-1])) + 1
    longest = 0
    for rows in np.split(np.arange(len(t)), at):
        longest = max([longest, *(run[-1] - run[0] for run, _ in unbroken(t[rows], x[rows]))])
        yield user, str(label[rows[0]]), [(t[rows], x[rows])]
    if longest < SECONDS - 1.5 / RATE:
        raise Refused(f"{path} has too few samples: its longest unbroken stretch is {longest:.1f} s, a window {SECONDS} s")


def npz_rows(path):
    """Stamps (n,), signal (n, 6 or 3), segment (n,) and label (n,) as text of one .npz. Raises Refused."""
    try:
        with np.load(path) as file:
            content = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise Refused(f"{path} is not a whole .npz of plain arrays ({error}); write it with np.savez(path, signal=..., rate=...)") from None
    if not {"signal", "rate"} <= set(content):
        raise Refused(f"{path} needs the arrays 'signal' and 'rate'; it has {sorted(content) or 'none'}")
    signal, rate = content["signal"], content["rate"]
    if signal.ndim != 2 or signal.shape[1] not in (3, 6) or signal.dtype.kind not in "fiu":
        raise Refused(f"{path}: 'signal' is {signal.dtype} {signal.shape}; it must be numbers, (n, 6) or (n, 3)")
    if rate.size != 1 or rate.dtype.kind not in "fiu" or not 5 <= float(rate.item()) <= 10_000:
        raise Refused(f"{path}: 'rate' is {rate}; it must be one number, 5 to 10,000 samples a second")
    n = len(signal)
    segment, label = content.get("segment", np.zeros(n, int)), content.get("label", np.full(n, ""))
    if segment.shape != (n,) or label.shape != (n,):
        raise Refused(f"{path}: 'segment' {segment.shape} and 'label' {label.shape} must be as long as 'signal', ({n},)")
    label = label.astype(str)
    return np.arange(n) / float(rate.item()), signal.astype(float), segment, np.where(label == "-1", "", label)


def csv_rows(path):
    """The same from one .csv."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            header = [column.strip().lower() for column in file.readline().split(",")]
            columns = [c for c in ("ax", "ay", "az", "gx", "gy", "gz") if c in header]
            if "t" not in header or columns not in (["ax", "ay", "az"], ["ax", "ay", "az", "gx", "gy", "gz"]):
                raise Refused(f"{path} needs the columns t,ax,ay,az,gx,gy,gz (or t,ax,ay,az), named in its first line; "
                              f"it has {','.join(header)[:80]}")
            lines = [line for line in file if line.strip()]
        order = [header.index(column) for column in ["t", *columns]]
        table = np.loadtxt(lines, delimiter=",", usecols=order, ndmin=2) if lines else np.empty((0, len(order)))
        label = np.full(len(table), "")
        if "label" in header and len(table):
            label = np.loadtxt(lines, delimiter=",", usecols=header.index("label"), dtype=str, ndmin=1, quotechar='"')
    except (ValueError, UnicodeDecodeError) as error:
        raise Refused(f"{path} can't be read: {str(error).splitlines()[0]} (rows counted without the header)") from None
    label = np.char.strip(label)
    return table[:, 0], table[:, 1:], np.zeros(len(table), int), np.where(label == "-1", "", label)


# ---------------------------------------------------------------- a simulated population
#             lean   roll   cadence  bounce  swing  fidget  share    (rad, rad, x personal, g, rad, rad, of the day)
ACTIVITIES = {
    "lying":    (1.50, 0.40, 0.00, 0.00, 0.00, 0.010, 0.15),
    "sitting":  (0.45, 0.05, 0.00, 0.00, 0.00, 0.030, 0.25),
    "standing": (0.05, 0.00, 0.00, 0.00, 0.00, 0.020, 0.15),
    "walking":  (0.10, 0.00, 1.00, 0.25, 0.15, 0.020, 0.20),
    "stairs":   (0.25, 0.00, 0.85, 0.30, 0.22, 0.030, 0.10),
    "running":  (0.20, 0.00, 1.45, 0.90, 0.30, 0.030, 0.07),
    "cycling":  (0.60, 0.00, 0.70, 0.06, 0.35, 0.030, 0.08),
}


def traits(rng, spread):
    """What makes a person, each an average plus `spread` times a personal deviation: 0 makes clones, 1 a realistic crowd."""
    vary = lambda average, deviation: average + spread * deviation * rng.standard_normal(np.shape(average))
    harmonic = np.array([[0.5, 1.0, 0.2, 0.5, 0.1, 0.2], [0.2, 0.7, 0.3, 0.3, 0.1, 0.1], [0.8, 0.1, 0.3, 0.1, 0.1, 0.0],
                         [0.7, 0.2, 0.2, 0.1, 0.1, 0.0], [1.0, 0.2, 0.2, 0.1, 0.0, 0.0], [0.8, 0.1, 0.2, 0.1, 0.0, 0.0]])
    return {
        "cadence": vary(0.95, 0.09),                             # strides a second: two steps each
        "vigour": np.exp(vary(0.0, 0.25)),                       # how hard a person steps
        "tempo": np.exp(vary(np.zeros(len(ACTIVITIES)), 0.1)),   # and how fast, in each activity
        "style": harmonic * np.exp(vary(np.zeros((6, 6)), 0.5)), # weight of each harmonic: 3 axes of push, 3 of turn
        "phase": vary(np.linspace(0, 5, 36).reshape(6, 6) ** 2 % 6, 0.9),
        "posture": vary(np.zeros((len(ACTIVITIES), 2)), 0.2),    # rad, added to lean and roll
        "mount": vary(np.zeros(3), 0.5),                         # rotation vector from body to sensor, rad
        "habits": np.exp(vary(np.zeros(len(ACTIVITIES)), 0.5)),  # which activities fill the day
        "bias": vary(np.zeros(6), np.repeat([0.02, 0.01], 3)),   # g and rad/s
        "noise": np.exp(vary(np.log([0.01, 0.02]), 0.3)),        # g and rad/s
    }


def simulated(user, names, read, flags):
    """A person's day: activities follow each other as a Markov chain, each lasting 10 s or a multiple of it.

    In the body's frame (x to the front, y to the left, z up) the trunk leans and rolls, fidgets slowly, and in gait turns
    and is pushed by harmonics of the stride. A sensor mounted on it sees R(t) (gravity + push) and the turning rate.
    """
    from scipy.spatial.transform import Rotation
    number, rate = int(user), 40.0
    person = traits(np.random.default_rng([flags["seed"], 22, number]), flags["spread"])
    rng = np.random.default_rng([flags["seed"], 23, number])     # what happens to that person: clones live lives of their own
    share = np.array([row[-1] for row in ACTIVITIES.values()]) * person["habits"]
    left, now = round(flags["hours_per_user"] * 3600 / SECONDS), None
    while left > 0:
        odds = share * (np.arange(len(share)) != now)            # the next activity is another one
        now = rng.choice(len(share), p=odds / odds.sum())
        windows = min(left, int(rng.geometric(1 / 6)))           # a minute on average
        left -= windows
        label, (lean, roll, tempo, bounce, swing, fidget, _) = list(ACTIVITIES.items())[now]
        n = int(windows * SECONDS * rate)
        walk = lambda scale, *shape: scale * np.cumsum(rng.standard_normal((n, *shape)), 0) / np.sqrt(rate)
        day = np.exp(rng.normal(0, [0.04, 0.12]))                # no two bouts are quite alike: tempo, vigour
        stride = person["cadence"] * tempo * person["tempo"][now] * day[0]
        phase = 2 * np.pi * (stride * np.arange(n) / rate + rng.random() + walk(0.02))
        waves = np.cos(np.multiply.outer(phase, np.arange(1, 7))[:, None, :] + person["phase"]) * person["style"]
        push, turn = np.split(waves.sum(2) * person["vigour"] * day[1] * np.repeat([bounce, swing / 2], 3), 2, axis=1)
        slow = np.sin(walk(1.0, 3) + rng.uniform(0, 6, 3)) * fidget + rng.normal(0, 0.06, 3)
        angles = slow + turn + [roll + person["posture"][now, 1], lean + person["posture"][now, 0], 0]
        body = Rotation.from_rotvec(angles)                      # sensor <- world, before mounting; small angles
        mount = Rotation.from_rotvec(person["mount"])
        acc = mount.apply(body.inv().apply([0, 0, 1]) + push)
        gyro = mount.apply(np.gradient(angles, 1 / rate, axis=0))
        x = np.hstack([acc, gyro]) + person["bias"] + rng.standard_normal((n, 6)) * np.repeat(person["noise"], 3)
        yield f"{number:03d}", label, [(np.arange(n) / rate, x)]


# ---------------------------------------------------------------- preparing a set, part by part
def archives_of(what, raw):
    """The paths of a source's archives under `raw`. Raises Refused where one is missing."""
    paths = [Path(raw) / url.rpartition("/")[2] for url in SOURCES[what].urls]
    for path, url in zip(paths, SOURCES[what].urls):
        if not path.is_file():
            raise Refused(f"{path} is missing; fetch it from {url}")
    return paths


def parts_of(what, raw, flags):
    """What a source is read by, in order: {part: names of members or files}. A part is mostly a user. Raises Refused."""
    if what == "simulated":
        if min(flags["users"], flags["hours_per_user"] * 3600 // SECONDS) < 1 or flags["spread"] < 0:
            raise Refused("--users must be 1 or more, --hours-per-user hold a window (0.003) or more, --spread not be negative")
        return {f"{user:03d}": [] for user in range(flags["users"])}
    parts = {}
    if what == "folder":
        if not Path(raw).is_dir():
            raise Refused(f"there is no folder {raw}; name with --raw the one that holds one .npz or .csv a user")
        for path in sorted(Path(raw).iterdir()):
            if path.suffix in (".npz", ".csv") and not path.name.startswith("."):
                if path.stem in parts:
                    raise Refused(f"{raw} has the user '{path.stem}' twice: {Path(parts[path.stem][0]).name} and {path.name}")
                parts[path.stem] = [str(path)]
        if not parts:
            raise Refused(f"{raw} holds no .npz or .csv file; name with --raw a folder with one a user")
        return parts
    for path in archives_of(what, raw):
        for z in open_zips(path):
            for name in z.namelist():
                found = re.search(SOURCES[what].members, name)
                if found and not name.startswith("__MACOSX"):
                    parts.setdefault(found[1], []).append(name)
    if not parts:
        raise Refused(f"{raw} has the archives of {what}, but they hold nothing like '{SOURCES[what].members}': not the "
                      "published ones; remove them and fetch them again")
    return dict(sorted(parts.items()))


def do_part(what, part, names, archives, flags, out):
    """Read one part, cut it, leave it as `out` (.npz). Returns the number of its windows."""
    source = SOURCES[what]
    if archives:
        zips = [z for path in archives for z in open_zips(path)]
        recordings = globals()[source.parse](part, names, functools.partial(read, zips))
    else:
        recordings = globals()[source.parse](part, names, None, flags)
    windows, users, labels, left_out = cut(recordings, source.length)
    with replacing(out) as temporary:
        np.savez(temporary, windows=windows, users=users, labels=labels, left_out=json.dumps(left_out))
    return len(windows)


def as_worker(parent):
    """In a worker: leave Ctrl-C to the parent, and go when the parent is gone, killed maybe."""
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def do_parts(what, parts, archives, flags, work):
    """All parts, over all cores, those skipped that an earlier call left done. Returns {part: file}."""
    files = {part: work / f"part-{i:05d}.npz" for i, part in enumerate(parts)}
    todo = [part for part in parts if not files[part].exists()]
    cores = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), len(todo))
    began, done, told = time.time(), 0, time.time()
    with ProcessPoolExecutor(max(cores, 1), initializer=as_worker, initargs=(os.getpid(),)) as pool:
        jobs = [pool.submit(do_part, what, part, parts[part], archives, flags, files[part]) for part in todo]
        try:
            for job in as_completed(jobs):
                job.result()
                done += 1
                if time.time() > told + 5:
                    told = time.time()
                    print(f"{what}: {len(parts) - len(todo) + done} of {len(parts)} parts, "
                          f"{(told - began) * (len(todo) - done) / done:.0f} s left", file=sys.stderr)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return files


def gather(what, name, files, limit, out):
    """The parts' windows as one set in the folder `out`; returns its meta but for how it was made. Raises Refused."""
    source, left_out, kept = SOURCES[what], Counter(), []
    for file in files.values():
        with np.load(file) as part:
            kept.append((part["users"], part["labels"], part["windows"].shape[1:]))
            left_out.update(json.loads(part["left_out"].item()))
    tests = set(kept[list(files).index("test")][0].tolist()) if "test" in files and source.parse == "ucihar" else ()
    number = lambda user: [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", user)]   # 9 before 10
    names = sorted({user for users, _, _ in kept for user in users.tolist()}, key=number)[:limit]
    if not names:
        raise Refused(f"nothing of {what} makes a window; left out: {dict(left_out)}")
    shapes = {shape for users, _, shape in kept if len(users)}
    if len(shapes) > 1:
        raise Refused(f"some users of {name} have both sensors and some one; give one kind, in a folder of its own")
    labels = {label for _, labels, _ in kept for label in labels.tolist()} - {""}
    if source.classes and not labels <= set(source.classes):
        raise Refused(f"{what} has activities that the published set hasn't: {sorted(labels - set(source.classes))}")
    classes = list(source.classes) or sorted(labels)
    users = np.concatenate([u for u, _, _ in kept if len(u)])
    chosen = np.isin(users, names)
    users = np.array([names.index(user) for user in users[chosen].tolist()])
    labels = np.concatenate([l for u, l, _ in kept if len(u)])[chosen]
    labels = np.array([classes.index(label) if label else -1 for label in labels.tolist()])
    out.mkdir()
    windows = np.lib.format.open_memmap(out / "windows.npy", "w+", np.float16, (len(users), *shapes.pop()))
    at = seen = 0
    for file, (own, _, _) in zip(files.values(), kept):
        mine = chosen[seen:seen + len(own)]
        with np.load(file) as part:
            if mine.any():
                windows[at:at + mine.sum()] = part["windows"][mine]
        at, seen = at + mine.sum(), seen + len(own)
    windows.flush()
    np.save(out / "users.npy", users)
    np.save(out / "labels.npy", labels)
    prefixed = what == "folder" and all("_" in user for user in names)
    sources = [user.split("_")[0] if prefixed else name if what in ("folder", "simulated") else what for user in names]
    return {"name": name, "rate": RATE, "seconds": source.length / RATE, "channels": CHANNELS[:windows.shape[1]],
            "users": names, "sources": sources, "classes": classes,
            "hours": len(users) * source.length / RATE / 3600, "windows": len(users),
            "origin": "; ".join([source.text, *source.urls]), "left_out": dict(sorted(left_out.items())),
            "test_users": [user for user in names if user in tests] or None,
            "fingerprint": fingerprint(windows, users, labels)}


@contextlib.contextmanager
def workplace(folder, settings):
    """The hidden folder beside `folder` where a set is made, ours alone. What an earlier call with the same settings left
    there is used; it goes away when the set is complete or refused, and stays when the program is killed."""
    work = folder.with_name(f".{folder.name}.partial")
    while True:
        work.mkdir(parents=True, exist_ok=True)
        with open(work / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder.name}: waiting for another process that prepares it", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not (work / "lock").exists():                     # whoever had it is done, and took it away
                continue
            made = work / "settings.json"
            if not made.exists() or json.loads(made.read_text()) != settings:
                for leftover in work.glob("part-*"):
                    leftover.unlink()
                write_json(made, settings)
            shutil.rmtree(work / "set", ignore_errors=True)
            try:
                yield work
            except (Refused, OSError):
                shutil.rmtree(work)
                raise
            shutil.rmtree(work)
            return


def prepare(what, name, raw, flags, limit=None, force=False, root="data"):
    """Make data/NAME/, unless it is there already with the same settings. What was there stays until the new is complete."""
    folder = Path(root) / name
    settings = {"source": what, **flags, "limit_users": limit}
    if prepared_already(folder, settings) and not force:
        return report(folder, "is prepared already, with the same settings; --force makes it anew")
    parts = parts_of(what, raw, flags)
    archives = archives_of(what, raw) if SOURCES[what].urls else []
    settings["input"] = {Path(p).name: Path(p).stat().st_size for p in archives or sum(parts.values(), [])}
    if limit and SOURCES[what].parse != "ucihar":                # its parts are the two halves of the official split
        parts = dict(list(parts.items())[:limit])
    with workplace(folder, settings) as work:
        files = do_parts(what, parts, archives, flags, work)
        meta = gather(what, name, files, limit, work / "set")
        write_json(work / "set" / "meta.json", {**meta, "settings": settings, "provenance": provenance()})
        old = work / "old"
        if folder.exists():
            os.rename(folder, old)
        os.rename(work / "set", folder)
    return report(folder, "is prepared")


def prepared_already(folder, settings):
    """Whether `folder` holds a set made with these settings. Raises Refused if it holds one made with others."""
    if not (folder / "meta.json").is_file():
        return False
    made = read_meta(folder)["settings"]
    differ = [f"{key} {made.get(key)} (now {value})" for key, value in settings.items() if made.get(key) != value]
    if differ:
        raise Refused(f"{folder} is prepared already, with {', '.join(differ)}; give another --name, or --force to replace it")
    return True


def report(folder, what):
    """One paragraph on a prepared set."""
    meta = read_meta(folder)
    print(f"{folder} {what}: {len(meta['users'])} users, {meta['hours']:.2f} hours, {meta['windows']} windows of "
          f"{meta['seconds']:g} s x {len(meta['channels'])} channels, {len(meta['classes'])} classes")
    for reason, count in meta["left_out"].items():
        print(f"  left out: {count} {reason}")


# ---------------------------------------------------------------- prepared sets, read back
@dataclass
class Prepared:
    """A prepared set, or several pooled."""
    windows: np.ndarray                                          # (n, C, T) float16, a memory map
    users: np.ndarray                                            # (n,) index into meta["users"]
    labels: np.ndarray                                           # (n,) index into meta["classes"], -1: none
    meta: dict


def load(name, root="data"):
    """Open the prepared set `name`, or several at once ("a+b+c": their users are kept apart, by source).

    Raises Refused where a set isn't prepared, is incomplete or changed, or where two sets can't be pooled.
    """
    parts = [load_one(part, root) for part in name.split("+")]
    if len(parts) == 1:
        return parts[0]
    metas = [part.meta for part in parts]
    for key, what in (("rate", "rates"), ("seconds", "window lengths"), ("channels", "channels")):
        if any(meta[key] != metas[0][key] for meta in metas):
            raise Refused(f"{name} can't be pooled: their {what} differ "
                          f"({', '.join(meta['name'] + ': ' + str(meta[key]) for meta in metas)})")
    people = [person for meta in metas for person in zip(meta["sources"], meta["users"])]
    twice = [person for person, times in Counter(people).items() if times > 1]
    if twice:
        raise Refused(f"{name} can't be pooled: {len(twice)} users are in more than one of them, as "
                      f"'{twice[0][1]}' of {twice[0][0]}")
    classes = sorted({label for meta in metas for label in meta["classes"]})
    first = np.cumsum([0] + [len(meta["users"]) for meta in metas])
    codes = [np.array([classes.index(label) for label in meta["classes"]] + [-1]) for meta in metas]     # -1 stays -1
    arrays = (np.concatenate([part.windows for part in parts]),
              np.concatenate([part.users + first[i] for i, part in enumerate(parts)]),
              np.concatenate([codes[i][part.labels] for i, part in enumerate(parts)]))
    joined = {key: sum((meta[key] for meta in metas), []) for key in ("users", "sources")}
    total = {key: sum(meta[key] for meta in metas) for key in ("hours", "windows")}
    return Prepared(*arrays, {**metas[0], **joined, **total, "name": name, "classes": classes, "test_users": None,
                              "origin": "; ".join(meta["origin"] for meta in metas), "left_out": {},
                              "settings": {"pooled": [meta["settings"] for meta in metas]}, "fingerprint": fingerprint(*arrays)})


def load_one(name, root):
    folder = Path(root) / name
    if not (folder / "meta.json").is_file():
        known = f"python data.py {name}" if name in SOURCES else "python data.py (it lists what there is)"
        raise Refused(f"the data set '{name}' is not prepared in {root}/; run: {known}")
    meta = read_meta(folder)
    try:
        arrays = [np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("windows", "users", "labels")]
        whole = fingerprint(*arrays) == meta["fingerprint"]
    except (OSError, ValueError, EOFError, IndexError):
        whole = False
    if not whole:
        raise Refused(f"{folder} is damaged, or was changed after it was prepared; prepare it again with --force")
    return Prepared(*arrays, meta)


def read_meta(folder):
    try:
        return json.loads((folder / "meta.json").read_text())
    except ValueError:
        raise Refused(f"{folder}/meta.json is damaged; prepare the set again with --force") from None


def fingerprint(windows, users, labels):
    """sha256 over shapes, users, labels and 4,096 of the windows, evenly spread: quick, and notices changed data."""
    digest = hashlib.sha256(f"{windows.shape} {windows.dtype}".encode())
    some = np.linspace(0, len(windows) - 1, min(len(windows), 4096)).astype(int)
    for array in (users.astype("<i8"), labels.astype("<i8"), windows[some]):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def held_out_users(meta):
    """The users no model of this set is ever trained on: 20 % of each source's, 2 at least; the same whatever the seed.

    Returns (choose, measure): indices of the users the best step is chosen on, and of those the loss is measured on.
    Users are ranked by a hash of their name, so that adding a user to a set moves few of the others.
    """
    choose, measure = [], []
    for source in sorted(set(meta["sources"])):
        mine = [u for u, s in enumerate(meta["sources"]) if s == source]
        mine.sort(key=lambda u: hashlib.sha256(f"{source}/{meta['users'][u]}".encode()).hexdigest())
        held = mine[:max(2, len(mine) // 5)]
        choose, measure = choose + held[::2], measure + held[1::2]
    return choose, measure


def training_users(meta, seed):
    """Every other user, in the order in which a grid takes them in: seeded, alternating between the sources, so that the
    first 8 are among the first 16 and each source is there from the start."""
    held = set(sum(held_out_users(meta), []))
    rng = np.random.default_rng([seed, 20])
    queues = []
    for source in sorted(set(meta["sources"])):
        queues.append(rng.permutation([u for u, s in enumerate(meta["sources"]) if s == source and u not in held]).tolist())
    if not any(queues):
        raise Refused(f"the data set '{meta['name']}' has {len(meta['users'])} users, and all of them are held out (20 % of "
                      "each source's, 2 at least); prepare more users")
    queues = [queues[i] for i in rng.permutation(len(queues))]
    return [q[i] for i in range(max(map(len, queues))) for q in queues if i < len(q)]


def draw_windows(prepared, users, hours_per_user, seed):
    """Indices of the windows one grid cell trains on: at most `hours_per_user` (None: all) of each user in `users`.

    A user's windows are drawn in a seeded order, so that fewer hours are a subset of more hours of the same life.
    """
    seconds = prepared.meta["seconds"]
    most = None if hours_per_user is None else max(1, round(hours_per_user * 3600 / seconds))
    drawn = []
    for user in users:
        mine = np.flatnonzero(prepared.users == user)
        drawn.append(np.random.default_rng([seed, 21, int(user)]).permutation(mine)[:most])
    return np.sort(np.concatenate(drawn))


def overview(root="data"):
    """Print what can be prepared, and what is."""
    for name, source in SOURCES.items():
        print(f"{name:12} {source.text}")
    print()
    folders = sorted(path.parent for path in Path(root).glob("*/meta.json"))
    if not folders:
        print(f"nothing is prepared in {root}/ yet; start with: python data.py simulated")
    else:
        print(f"{'prepared':16} {'users':>6} {'hours':>8} {'windows':>8} {'classes':>8}  where from")
    for meta in map(read_meta, folders):
        print(f"{meta['name']:16} {len(meta['users']):6} {meta['hours']:8.2f} {meta['windows']:8} {len(meta['classes']):8}"
              f"  {meta['origin']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", help="the data set to prepare; without it, all are listed")
    group = parser.add_argument_group("every data set")
    group.add_argument("--raw", default="data/raw", metavar="DIR", help="where the published archives (or your own "
                       "recordings) lie; what is missing is downloaded into it (default: data/raw)")
    group.add_argument("--name", help="prepare it under this name, as data/NAME/ (default: the data set's)")
    group.add_argument("--limit-users", type=int, metavar="N", help="only the first N users, for a quick look (default: all)")
    group.add_argument("--force", action="store_true", help="prepare anew what is prepared already")
    group = parser.add_argument_group("simulated")
    group.add_argument("--users", type=int, default=40, help="how many people (default: 40)")
    group.add_argument("--hours-per-user", type=float, default=0.5, help="how long each is recorded (default: 0.5)")
    group.add_argument("--spread", type=float, default=1.0, help="how much people differ: 0 makes clones, of whom new ones "
                       "teach no more than longer recordings; 1 a realistic crowd (default: 1)")
    group.add_argument("--seed", type=int, default=0, help="another seed, another population (default: 0)")
    group = parser.add_argument_group("folder")
    group.add_argument("--acc-unit", choices=("g", "m/s2"), default="g", help="unit of your accelerations (default: g)")
    group.add_argument("--gyro-unit", choices=("rad/s", "deg/s"), default="rad/s",
                       help="unit of your angular velocities (default: rad/s)")
    args = parser.parse_args()
    if args.what is None:
        return overview()
    if args.what not in SOURCES:
        raise Refused(f"there is no data set '{args.what}'; there are {', '.join(SOURCES)}")
    name = args.name or args.what
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise Refused(f"--name {name}: letters, digits, '_', '-' and '.' only (a '+' joins data sets)")
    if args.limit_users is not None and args.limit_users < 1:
        raise Refused(f"--limit-users {args.limit_users}: one user or more")
    own = {"simulated": ("users", "hours_per_user", "spread", "seed"), "folder": ("acc_unit", "gyro_unit")}
    flags = {key: getattr(args, key) for key in own.get(args.what, ())}
    prepare(args.what, name, args.raw, flags, args.limit_users, args.force)


if __name__ == "__main__":
    command(main)
