"""
Recordings to windows: every data set of the study, cut the same way.

    archive, folder or simulation    irregular stamps, 20-200 Hz, g or m/s^2, rad/s or deg/s, one sensor a file or both
      -> recording (n, 6) at 20 Hz   both sensors on one clock, anti-aliased; g (gravity included) and rad/s
      -> windows (n, C, T)           10 s = 200 samples, no overlap; none crosses a user, recording, gap or label change
      -> data/NAME/                  windows.npy float16, users.npy, labels.npy (-1: none), meta.json

    python data.py                                  # what can be prepared, and what is
    python data.py simulated --users 40             # a simulated population, needs nothing
    python data.py wisdm_watch --raw data/raw       # a published archive, downloaded into --raw if it isn't there
    python data.py folder --raw my_recordings --name mine
    python data.py pool                             # five corpora of 109 users, for pre-training
    python data.py plot mine                        # look before you train: data/mine/plot.png

To add a corpus, write a row of SOURCES and a parser: a generator of (user, label, streams), a stream being (t, x).
"""
import argparse, bisect, contextlib, fcntl, functools, gzip, hashlib, io, itertools, json, lzma, math, os
import platform, re, shutil, signal, subprocess, sys, threading, time, warnings, zipfile, zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

RATE, SECONDS = 20, 10                                           # Hz, s: a window is 200 samples
CHANNELS = ["acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z"]
GRAVITY = 9.80665                                                # m/s^2 in 1 g
GAP = 0.5                                                        # s without a sample: the recording is cut there
CUTOFF = 9.0                                                     # Hz, half amplitude of the low-pass before 20 Hz
TOO_SHORT, ONE_SENSOR = "recordings shorter than a window, once cut at gaps", "recordings of one sensor only"
MEMBER_LIMIT, NESTED_LIMIT = 64 << 20, 1 << 30                   # bytes one text, all inner archives may inflate to
BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError)  # of zips


# ---------------------------------------------------------------- what can be prepared
@dataclass
class Source:
    text: str                                                    # what it is
    parse: str                                                   # the function below that reads one part, mostly a user
    members: str = ""                                            # what to read of the archives; group 1 names the part
    archives: tuple = ()                                         # addresses, or a name where there is none that lasts
    user: str = "{}"                                             # the user's name, from the part's
    classes: tuple = ()                                          # label i is classes[i]; (): codes the recordings bear
    length: int = RATE * SECONDS                                 # samples a window


UCI = "https://archive.ics.uci.edu/static/public/"
UCIHAR = ("WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING")
HAPT = UCIHAR + ("STAND_TO_SIT", "SIT_TO_STAND", "SIT_TO_LIE", "LIE_TO_SIT", "STAND_TO_LIE", "LIE_TO_STAND")
WISDM = ("walking", "jogging", "stairs", "sitting", "standing", "typing", "teeth", "soup", "chips", "pasta", "drinking",
         "sandwich", "kicking", "catch", "dribbling", "writing", "clapping", "folding")             # A to S without N
WISDM_ZIP = (UCI + "507/wisdm+smartphone+and+smartwatch+activity+and+biometrics+dataset.zip",)
EXTRASENSORY = "http://extrasensory.ucsd.edu/data/"
SOURCES = {
    "simulated": Source("a simulated population, made here", "simulated"),
    "folder": Source("own recordings: a folder with one .npz or .csv a user", "folder"),
    "ucihar": Source("UCI HAR (Anguita 2013): 30 users, phone at the waist, 50 Hz, 2.56 s", "ucihar",
                     r"/(train|test)/.*\.txt$", (UCI + "240/human+activity+recognition+using+smartphones.zip",),
                     classes=UCIHAR, length=51),
    "wisdm_phone": Source("WISDM (Weiss 2019): 51 users, phone in the pocket, 20 Hz", "wisdm",
                          r"raw/phone/(?:accel|gyro)/data_(\d+)_\w+\.txt$", WISDM_ZIP, classes=WISDM),
    "wisdm_watch": Source("WISDM (Weiss 2019): 51 users, watch on the wrist, 20 Hz", "wisdm",
                          r"raw/watch/(?:accel|gyro)/data_(\d+)_\w+\.txt$", WISDM_ZIP, classes=WISDM),
    "extrasensory": Source("ExtraSensory (Vaizman 2017): 60 users, phone in free living, 40 Hz", "extrasensory",
                           r"(?:^|/)([^/]+)(?:/\d+\.m_(?:raw_acc|proc_gyro)\.dat|\.features_labels\.csv\.gz)$",
                           (EXTRASENSORY + "raw_measurements/ExtraSensory.raw_measurements.raw_acc.zip",
                            EXTRASENSORY + "raw_measurements/ExtraSensory.raw_measurements.proc_gyro.zip",
                            EXTRASENSORY + "primary_data_files/ExtraSensory.per_uuid_features_labels.zip"), classes=(
                               "LYING_DOWN", "SITTING", "OR_standing", "FIX_walking", "FIX_running", "BICYCLING")),
    "motionsense": Source("MotionSense (Malekzadeh 2019): 24 users, phone in the pocket, 50 Hz", "motionsense",
                          r"/[a-z]+_\d+/sub_(\d+)\.csv$",
                          ("https://github.com/mmalekzadeh/motion-sense/raw/master/data/A_DeviceMotion_data.zip",),
                          "motionsense_{:0>2}"),
    "uschad": Source("USC-HAD (Zhang 2012): 14 users, hip, 100 Hz", "uschad", r"/Subject(\d+)/a\d+t\d+\.mat$",
                     ("https://sipi.usc.edu/had/USC-HAD.zip",), "uschad_{:0>2}"),
    "dsads": Source("Daily and Sports Activities (Barshan 2010): 8 users, torso, 25 Hz", "dsads",
                    r"/a\d+/p(\d+)/s\d+\.txt$", (UCI + "256/daily+and+sports+activities.zip",), "dsads_{:0>2}"),
    "sisfall": Source("SisFall (Sucerquia 2017): 38 users, waist, 200 Hz, with falls", "sisfall",
                      r"/(S[AE]\d+)/[DF]\d+_S[AE]\d+_R\d+\.txt$", ("SisFall_dataset.zip",), "sisfall_{}"),
    "wedafall": Source("WEDA-FALL (Marques 2022): 25 users, wrist, 50 Hz, with falls", "wedafall",
                       r"/50Hz/[DF]\d+/U(\d+)_R\d+_(?:accel|gyro)\.csv$",
                       ("https://github.com/joaojtmarques/WEDA-FALL/archive/refs/heads/main.zip#/WEDA-FALL-main.zip",),
                       "wedafall_{:0>2}"),
    "hapt": Source("HAPT (Reyes-Ortiz 2016): the people of UCI HAR (never train on one, test on the other), 50 Hz",
                   "hapt", r"RawData/(?:acc|gyro)_exp\d+_user(\d+)\.txt$",
                   (UCI + "341/smartphone+based+recognition+of+human+activities+and+postural+transitions.zip",),
                   "hapt_{:0>2}", HAPT),
    "pool": Source("the five corpora dsads motionsense sisfall uschad wedafall, unlabelled: 109 users", "pool"),
}
POOL = ("dsads", "motionsense", "sisfall", "uschad", "wedafall")
SAME_PEOPLE = [{"ucihar", "hapt"}, {"wisdm_watch", "wisdm_phone"}]               # recorded with the same people
CHECKSUMS = {"A_DeviceMotion_data.zip": "78f9957d9f4d0a4b6457461009e1f2e0453a872d"}  # git's name of the file


# ---------------------------------------------------------------- what every command of this project shares
class Refused(Exception):
    """Input that can't be used: one sentence that says what, where, and what to do. Commands print it, exit 2."""


def command(main):
    """Run `main()` as a command line: a refusal becomes one sentence on stderr and exit status 2, never a traceback."""
    try:
        sys.exit(main())
    except Refused as refusal:
        print(f"{Path(sys.argv[0]).name}: {refusal}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                                      # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:                                     # a full disk, a folder that can't be written to
        print(f"{Path(sys.argv[0]).name}: {error.strerror or error} ({error.filename or 'while writing'}); nothing "
              "finished was touched: make room or choose another place, and run the command again", file=sys.stderr)
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
    def git(*words):
        if shutil.which("git") is None:
            return ""
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True).stdout
    changed = "+" if git("status", "--porcelain", "--untracked-files=no").strip() else ""
    there = {package.metadata["Name"]: package.version for package in metadata.distributions()}
    versions = {name: there.get(name, "not installed") for name in ("torch", "numpy", "scipy")}
    return {"commit": git("rev-parse", "HEAD").strip() + changed, "python": platform.python_version(), **versions}


# ---------------------------------------------------------------- from irregular stamps to windows
def in_order(t, x):
    """Indices of rows whose stamps increase, as many as can be: a wild stamp costs its own row only."""
    whole = np.flatnonzero(np.isfinite(t) & np.isfinite(x).all(1))
    if np.all(np.diff(t[whole]) > 0):
        return whole
    ends, rows, before = [], [], {}                              # ends[k]: the smallest stamp that ends k + 1 rows
    for row in whole.tolist():
        k = bisect.bisect_left(ends, t[row])
        if ends[k:k + 1] == [t[row]]:                            # of a repeated stamp the first row counts
            continue
        before[row] = rows[k - 1] if k else None
        ends[k:k + 1], rows[k:k + 1] = [t[row]], [row]
    kept = rows[-1:]
    while before[kept[-1]] is not None:
        kept.append(before[kept[-1]])
    return np.array(kept[::-1])


def unbroken(t, x):
    """The stretches [(t, x), ...] of one sensor: cut where no sample came for GAP, or where as much was dropped."""
    kept = in_order(t, x)
    steps = np.diff(t[kept])
    at = np.flatnonzero((steps > GAP) | ((np.diff(kept) - 1) * np.median(steps) > GAP)) + 1 if len(steps) else []
    return [(t[rows], x[rows]) for rows in np.split(kept, at) if len(rows) > 1]


@functools.lru_cache
def low_pass(k):
    """A filter of 1 s for 20 k Hz: half amplitude at 9 Hz, 60 dB down from 10.8 Hz on."""
    from scipy.signal import firwin                              # here, so that what imports this file starts fast
    return firwin(RATE * k + 1, CUTOFF, fs=RATE * k, window=("kaiser", 5.65))


def resample(t, x, start, n):
    """The signal x (rows, columns) with stamps t (s), on n ticks of the 20 Hz clock from `start`: (n, columns).

    Interpolated to an even grid of 80 Hz or more (cubic; linear where stamps come in bursts, which a cubic overshoots),
    low-passed without phase, the ends continued by point reflection; then every k-th sample is taken.
    """
    from scipy.interpolate import make_interp_spline
    from scipy.signal import resample_poly
    steps = np.diff(t)
    even = len(t) > 3 and steps.max() < 1.5 * np.median(steps) < 3 * steps.min()
    k = max(4, math.ceil(len(steps) / (t[-1] - t[0]) / RATE - 1e-6))
    grid = np.clip(start + np.arange((n - 1) * k + 1) / (RATE * k), t[0], t[-1])
    x = make_interp_spline(t, x, k=3 if even else 1)(grid)
    return resample_poly(x, 1, k, window=low_pass(k), padtype="antireflect")


def pieces(streams, shortest):
    """Cut and pair the sensors of one recording: yields (n, columns) at 20 Hz, n >= shortest, one per unbroken stretch.

    streams: one (t, x) for both sensors on one clock, or one a sensor. Sensors are paired by stamp, never by position
    in the file: each is brought to the common clock of the time that both cover.
    """
    for together in itertools.product(*(unbroken(t, x) for t, x in streams)):
        start, end = max(t[0] for t, _ in together), min(t[-1] for t, _ in together)
        n = math.floor((end - start) * RATE + 1e-6) + 1
        if n >= shortest:
            yield np.hstack([resample(t, x, start, n) for t, x in together])


def cut(recordings, length):
    """Recordings (user, label or None, streams) to windows (n, C, length) float16, their users and labels (n,) as text,
    and a count of what was left out and why. Streams that are text say why there are none."""
    windows, users, labels, left_out = [], [], [], Counter()
    for user, label, streams in recordings:
        some = [] if isinstance(streams, str) else list(pieces(streams, length))
        for piece in some:
            n = len(piece) // length
            windows.append(piece[:n * length].reshape(n, length, -1).transpose(0, 2, 1).astype(np.float16))
            users += [user] * n
            labels += [label or ""] * n
        if not some:
            left_out[streams if isinstance(streams, str) else TOO_SHORT] += 1
    windows = np.concatenate(windows) if windows else np.empty((0, 0, length), np.float16)
    return windows, np.array(users, str), np.array(labels, str), left_out


# ---------------------------------------------------------------- archives: downloaded, and read where they lie
def archives_of(what, raw, flags):
    """The archives of a source: {path under `raw`: address, or a mere name}."""
    urls = [url for source in (POOL if what == "pool" else (what,)) for url in SOURCES[source].archives]
    return {Path(raw) / url.rpartition("/")[2]: url for url in urls if "labels" not in url or flags["labels"]}


def fetch_missing(archives):
    """Download what isn't there and has an address. Raises Refused, at the end, for what must be fetched by hand."""
    missing = {path: url for path, url in archives.items() if not path.is_file()}
    by_hand = [f"{path} is missing and has no lasting address: find it by its name, and put it there"
               for path, url in missing.items() if "://" not in url]
    print(*by_hand, sep="\n", end="\n" * bool(by_hand), file=sys.stderr)
    for path, url in missing.items():
        if "://" in url:
            download(url, path)
    if by_hand:
        raise Refused("; ".join(by_hand))


def download(url, path, wait=1.0):
    """Fetch `url` to `path`, by way of `path`.part, going on where an earlier call was cut. Raises Refused."""
    import requests
    part, by_hand = path.with_name(path.name + ".part"), f"fetch it by hand to {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{urlsplit(url).hostname}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                         # one download at a time from a host
        for attempt in range(6):
            if path.is_file():
                return
            try:
                download_rest(url, part, by_hand)
                break
            except requests.RequestException as error:           # cut, busy, timed out: wait, and go on
                problem = error
                time.sleep(wait * 2 ** attempt)
        else:
            raise Refused(f"{url} failed six times ({problem}); the same command goes on from there, or {by_hand}")
        name = hashlib.sha1(f"blob {part.stat().st_size}\0".encode())
        with open(part, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                name.update(block)
        if not zipfile.is_zipfile(part) or CHECKSUMS.get(path.name, name.hexdigest()) != name.hexdigest():
            part.unlink()
            raise Refused(f"what came from {url} is not the published archive (no zip, or a wrong checksum); {by_hand}")
        os.replace(part, path)


def download_rest(url, part, by_hand):
    """One request for what `part` lacks. Raises requests' exceptions where another try may help, Refused where not."""
    import requests
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as answer:
        status, span = answer.status_code, answer.headers.get("Content-Range", "")   # "bytes 7-9/10"
        if status == 416 or status == 206 and not span.startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise requests.ConnectionError("it did not go on where it had stopped")
        if status == 429 or status >= 500:
            answer.raise_for_status()
        if status >= 400 or "html" in answer.headers.get("Content-Type", ""):
            raise Refused(f"{url} answered '{status} {answer.reason}' with no archive but a page; {by_hand}")
        have = have if status == 206 else 0                      # a server without Range starts over
        total = have + int(answer.headers.get("Content-Length", 0))
        began = told = time.time()
        with open(part, "ab" if have else "wb") as file:
            for block in answer.iter_content(1 << 18):
                file.write(block)
                if time.time() > told + 5:
                    told, done = time.time(), file.tell()
                    left = max(0, total - done) / (done - have) * (told - began)
                    print(f"{part.stem}: {done >> 20} of {total >> 20} MB, {left:.0f} s left", file=sys.stderr)
    if total > have and part.stat().st_size != total:
        raise requests.ConnectionError(f"{part.stat().st_size} of {total} bytes came")


@functools.lru_cache(maxsize=8)
def open_zips(path):
    """The zip at `path` and those inside it, opened: [ZipFile, ...]. Nothing is unpacked to disk. Raises Refused."""
    def check(wrong, why):
        if wrong:
            raise Refused(f"{path} is not the published archive ({why}); remove it, and it is fetched again")
    try:
        zips = [zipfile.ZipFile(path)]
        inner = [info for info in zips[0].infolist() if info.filename.endswith(".zip")]
        check(sum(info.file_size for info in inner) > NESTED_LIMIT, "the archives in it would fill the memory")
        zips += [zipfile.ZipFile(io.BytesIO(read(zips, info.filename, NESTED_LIMIT))) for info in inner]
    except BROKEN as error:
        check(True, error)
    infos = [info for z in zips for info in z.infolist()]
    for name in (info.filename for info in infos):
        check(name.startswith(("/", "\\")) or ":" in name[:2] or ".." in re.split(r"[/\\]", name),
              f"its member '{name}' points outside of it")
    inflated = sum(info.file_size for info in infos)
    check(inflated > max(1 << 30, 200 * Path(path).stat().st_size), f"it would inflate to {inflated >> 30} GiB")
    return zips


def read(zips, name, limit=MEMBER_LIMIT):
    """The bytes of member `name` of one of `zips`. Raises Refused if it is missing, damaged or too large."""
    z = next((z for z in zips if name in z.NameToInfo), None)
    try:
        if z is None:
            raise ValueError("it is missing")
        if z.getinfo(name).file_size > limit:                    # zipfile never yields more than is declared here
            raise ValueError(f"it would inflate to {z.getinfo(name).file_size >> 20} MiB")
        return z.read(name)
    except BROKEN as error:
        raise Refused(f"{name} in {zips[0].filename} can't be read ({error}); remove the archive, and it is fetched "
                      "again") from None


def numbers(text, columns, name):
    """(rows, columns) float64 from bytes: numbers between blanks or commas. Raises Refused for anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")                           # numpy warns, and stops, at what is no number
        try:
            return np.fromstring(text.replace(b",", b" "), sep=" ").reshape(-1, columns)
        except (DeprecationWarning, ValueError):
            raise Refused(f"{name} is not {columns} columns of numbers; fetch the archive again") from None


# ---------------------------------------------------------------- a parser a format: yields (user, label, streams)
def ucihar(split, names, read):
    """Each published window is a recording: 128 samples at 50 Hz; total acceleration in g, gyroscope in rad/s."""
    folder = names[0][:names[0].index(f"/{split}/")] + f"/{split}"
    column = lambda what, n=1: numbers(read(f"{folder}/{what}_{split}.txt"), n, f"{what}_{split}.txt")
    users, labels = column("subject")[:, 0].astype(int), column("y")[:, 0].astype(int)
    x = [column(f"Inertial Signals/{sensor}_{axis}", 128) for sensor in ("total_acc", "body_gyro") for axis in "xyz"]
    activity = dict(enumerate(UCIHAR, start=1))
    for user, label, *window in zip(users, labels, *x, strict=True):
        yield str(user), activity[label], [(np.arange(128) / 50, np.stack(window, axis=1))]


def wisdm(user, names, read):
    """A file a sensor: `user,activity,timestamp_ns,x,y,z;`, m/s^2, rad/s. Stamps, rates, activities differ."""
    sensors = []
    for name in sorted(names):                                   # accel, then gyro
        text = np.frombuffer(read(name).replace(b";", b" "), np.uint8).copy()
        letters = np.flatnonzero(text == ord(","))[:-1:5] + 1    # what follows each line's first comma
        activity = text[letters].tobytes().decode("latin1")
        text[letters] = ord("0")
        table = numbers(text.tobytes(), 6, name)
        if len(table) != len(letters) or not set(activity) <= set("ABCDEFGHIJKLMOPQRS"):
            raise Refused(f"{name} has lines that are not user,activity (A to S, no N),timestamp,x,y,z")
        x = table[:, 3:] / (GRAVITY if "/accel/" in name else 1)
        sensors.append((np.array(list(activity)), table[:, 2] / 1e9, x))
    for letter, label in zip("ABCDEFGHIJKLMOPQRS", WISDM):
        streams = []
        for activity, t, x in sensors:
            rows = np.flatnonzero(activity == letter)
            times = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)                # recorded twice: earlier first
            rows = np.concatenate(sorted(times, key=lambda some: t[some[:1]].tolist()))
            streams.append((t[rows], x[rows]))
        whole = len(streams) == 2 and all(len(t) for t, _ in streams)
        yield user, label, streams if whole else "activities that a sensor lacks"


def extrasensory(user, names, read, flags):
    """A file a sensor and minute, `clock_s x y z` for some 20 s. Acceleration is in g or m/s^2: its norm tells."""
    minutes, labels = {}, {}
    for name in names:
        if name.endswith(".dat"):
            minutes.setdefault(int(name.rsplit("/", 1)[1].split(".")[0]), {})[name.endswith("gyro.dat")] = name
        elif flags["labels"]:
            labels = extrasensory_labels(read(name))
    for minute, sensors in sorted(minutes.items()):
        texts, streams = [read(sensors[sensor]) for sensor in sorted(sensors)], []           # acceleration first
        with contextlib.suppress(Refused):                       # a failed recording is counted
            streams = [(table[:, 0], table[:, 1:]) for table in (numbers(text, 4, "") for text in texts)]
        if len(sensors) < 2 or not streams or not all(len(t) for t, _ in streams):
            yield user, None, ONE_SENSOR if len(sensors) < 2 else "recordings that failed"
            continue
        (t, acc), gyro = streams
        norms = np.linalg.norm(acc[np.isfinite(acc).all(1)], axis=1)
        norm = np.median(norms) if len(norms) else 0
        unit = 1 if 0.7 <= norm <= 1.5 else GRAVITY if 6 <= norm <= 15 else None
        yield user, labels.get(minute), [(t, acc / unit), gyro] if unit else "recordings neither in g nor in m/s^2"


def extrasensory_labels(packed):
    """{minute: class} of one user, for the minutes in which exactly one of the classes is reported."""
    classes = SOURCES["extrasensory"].classes
    with gzip.open(io.BytesIO(packed)) as file:
        header, *lines = file.read(MEMBER_LIMIT).decode().splitlines()
    columns = [header.split(",").index(name) for name in ("timestamp", *(f"label:{label}" for label in classes))]
    table = np.genfromtxt(lines, delimiter=",", usecols=columns, ndmin=2)
    return {int(row[0]): classes[np.argmax(row[1:] == 1)] for row in table if (row[1:] == 1).sum() == 1}


def motionsense(user, names, read):
    """Acceleration = gravity + userAcceleration, in g; rotationRate in rad/s."""
    for name in names:
        header, _, rows = read(name).partition(b"\n")
        header = header.decode().strip().split(",")
        table = numbers(rows, len(header), name)
        take = lambda what: table[:, [header.index(f"{what}.{axis}") for axis in "xyz"]]
        x = np.hstack([take("gravity") + take("userAcceleration"), take("rotationRate")])
        yield user, name.split("/")[-2].split("_")[0], [(np.arange(len(x)) / 50, x)]


def uschad(user, names, read):
    """MATLAB files with one array (n, 6), g and deg/s."""
    from scipy.io import loadmat
    for name in names:
        (x,) = (value for value in loadmat(io.BytesIO(read(name))).values() if np.shape(value)[1:] == (6,))
        x = x * ([1.0] * 3 + [np.pi / 180] * 3)
        yield user, name.split("/")[-1].split("t")[0], [(np.arange(len(x)) / 100, x)]


def dsads(user, names, read):
    """Segments of 5 s x 45 columns, torso first, m/s^2 and rad/s; an activity's segments follow on each other."""
    for activity, segments in itertools.groupby(sorted(names), lambda name: name.split("/")[-3]):
        x = np.vstack([numbers(read(name), 45, name)[:, :6] for name in segments]) / ([GRAVITY] * 3 + [1] * 3)
        yield user, activity, [(np.arange(len(x)) / 25, x)]


def sisfall(user, names, read):
    """Nine integers a line: ADXL345 acceleration (13 bits, 32 g), ITG3200 rotation (16 bits, 4000 deg/s), and more."""
    for name in names:
        lines = [line for line in read(name).replace(b";", b"").splitlines() if line.count(b",") == 8]    # some are cut
        x = numbers(b"\n".join(lines), 9, name)[:, :6] * ([32 / 2**13] * 3 + [np.deg2rad(4000 / 2**16)] * 3)
        yield user, name.split("/")[-1].split("_")[0], [(np.arange(len(x)) / 200, x)]


def wedafall(user, names, read):
    """A file a sensor: `time_s,x,y,z`, m/s^2 and rad/s, stamps in bursts."""
    for name in (name for name in names if name.endswith("_accel.csv")):
        pair = [n for n in (name, name.replace("_accel.", "_gyro.")) if n in names]
        tables = [numbers(read(n).partition(b"\n")[2], 4, n) for n in pair]
        streams = [(table[:, 0], table[:, 1:] / unit) for table, unit in zip(tables, (GRAVITY, 1))]
        yield user, name.split("/")[-2], streams if len(pair) == 2 else ONE_SENSOR


def hapt(user, names, read):
    """Experiments at 50 Hz, g and rad/s; labels.txt: `experiment user activity first last`, samples counted from 1."""
    labels = numbers(read("RawData/labels.txt"), 5, "labels.txt").astype(int)
    for name in (name for name in names if "/acc_" in name):
        x = np.hstack([numbers(read(n), 3, n) for n in (name, name.replace("/acc_", "/gyro_"))])
        activity = np.zeros(len(x), int)
        for _, _, code, first, last in labels[labels[:, 0] == int(re.search(r"exp(\d+)", name)[1])]:
            activity[first - 1:last] = code
        for rows in np.split(np.arange(len(x)), np.flatnonzero(np.diff(activity)) + 1):
            yield user, dict(enumerate(HAPT, start=1)).get(activity[rows[0]]), [(rows / 50, x[rows])]


def folder(user, names, read, flags):
    """Own recordings: .npz (signal, rate [, segment, label]) or .csv (t, ax ay az [, gx gy gz] [, label])."""
    path = Path(names[0])
    t, x, segment, label = (npz_rows if path.suffix == ".npz" else csv_rows)(path)
    holes = np.flatnonzero(~(np.isfinite(x).all(1) & np.isfinite(t)))
    if len(holes):
        raise Refused(f"{path}: row {holes[0] + 1} has a value that is missing or infinite; leave such rows out (the "
                      f"recording is cut where more than {GAP} s are missing)")
    x = np.hstack([x[:, :3] / (GRAVITY if flags["acc_unit"] == "m/s2" else 1),
                   x[:, 3:] * (np.pi / 180 if flags["gyro_unit"] == "deg/s" else 1)])
    g = np.median(np.linalg.norm(x[:, :3], axis=1)) if len(x) else 1
    far = f"{path}: the median acceleration is {g:.2g} g, where 1 g of gravity is expected"
    if g > 4 or g < 0.25 and flags["acc_unit"] == "m/s2":
        raise Refused(f"{far}; say --acc-unit {'m/s2' if flags['acc_unit'] == 'g' else 'g'}, or convert it")
    if not 0.5 < g < 2:
        print(f"{far}: is gravity in it, and is --acc-unit {flags['acc_unit']} right?", file=sys.stderr)
    if x[:, 3:].size and np.quantile(np.abs(x[:, 3:]), 0.95) > 35:
        raise Refused(f"{path}: angular velocity is often above 35 rad/s (2000 deg/s); say --gyro-unit deg/s")
    label, longest = np.where(np.isin(label, ("-1", "-1.0", "nan")), "", label), 0
    change = (segment[1:] != segment[:-1]) | (label[1:] != label[:-1])
    for rows in np.split(np.arange(len(t)), np.flatnonzero(change) + 1):
        longest = max([longest, *(run[-1] - run[0] + 1 / RATE for run, _ in unbroken(t[rows], x[rows]))])
        yield user, str(label[rows[0]]) if len(rows) else None, [(t[rows], x[rows])]
    if longest < SECONDS - 1e-6:
        step = f" (stamps are {np.median(np.diff(t)):g} s apart)" if len(t) > 1 else ""
        raise Refused(f"{path} has too few samples: a window is {SECONDS} s, the longest stretch without a gap "
                      f"{longest:.1f} s{step}; leave this user out, or look at the column t")


def npz_rows(path):
    """Stamps (n,), signal (n, 6 or 3), segment (n,) and label (n,) as text, of one .npz. Raises Refused."""
    try:
        with np.load(path) as file:
            content = {key: file[key] for key in file.files}
    except (*BROKEN, AttributeError, TypeError) as error:
        raise Refused(f"{path} is not a whole .npz of plain arrays ({error}); make it with np.savez") from None
    if not {"signal", "rate"} <= set(content):
        raise Refused(f"{path} needs the arrays 'signal' and 'rate'; it has {sorted(content)}")
    signal, rate = content["signal"], content["rate"]
    if signal.ndim != 2 or signal.shape[1] not in (3, 6) or signal.dtype.kind not in "fiu":
        raise Refused(f"{path}: 'signal' is {signal.dtype} {signal.shape}; it must be numbers, (n, 6) or (n, 3)")
    if rate.size != 1 or rate.dtype.kind not in "fiu" or not 5 <= rate.item() <= 10_000:
        raise Refused(f"{path}: 'rate' is {rate}; it must be one number, 5 to 10,000 samples a second")
    segment, label = content.get("segment", np.zeros(len(signal), int)), content.get("label", np.full(len(signal), ""))
    if not segment.shape == label.shape == (len(signal),):
        raise Refused(f"{path}: 'segment' {segment.shape} and 'label' {label.shape} must be as long as 'signal', "
                      f"{len(signal)}")
    return np.arange(len(signal)) / rate.item(), signal.astype(float), segment, label.astype(str)


def csv_rows(path):
    """The same of one .csv. Raises Refused."""
    header, *lines = [line for line in path.read_text("utf-8-sig", "replace").splitlines() if line.strip()] or [""]
    header = [column.strip().lower() for column in header.split(",")]
    wanted = ["t", "ax", "ay", "az"] + ["gx", "gy", "gz"] * ("gx" in header)
    if not set(wanted) <= set(header):
        raise Refused(f"{path} needs the columns t,ax,ay,az,gx,gy,gz (or t,ax,ay,az) in its first line; it has "
                      f"{','.join(header)[:80] or 'none'}")
    try:
        columns = [header.index(column) for column in wanted]
        table = np.empty((0, len(columns)))
        if lines:
            table = np.loadtxt(lines, delimiter=",", usecols=columns, ndmin=2, comments=None)
        named = header.index("label") if "label" in header else None
        label = ["" if named is None else line.split(",")[named].strip(' "') for line in lines]
    except (ValueError, IndexError) as error:
        raise Refused(f"{path} can't be read: {error} (rows are counted from 0, after the header)") from None
    return table[:, 0], table[:, 1:], np.zeros(len(table), int), np.array(label, str)


# ---------------------------------------------------------------- a simulated population
ACTIVITIES = {  # lean, roll (rad), strides (x personal), push (g), turn (rad), fidgeting (rad), share of the day
    "lying":    (1.50, 0.40, 0.00, 0.00, 0.00, 0.01, 0.15),
    "sitting":  (0.45, 0.05, 0.00, 0.00, 0.00, 0.03, 0.25),
    "standing": (0.05, 0.00, 0.00, 0.00, 0.00, 0.02, 0.15),
    "walking":  (0.10, 0.00, 1.00, 0.25, 0.07, 0.02, 0.20),
    "stairs":   (0.25, 0.00, 0.85, 0.30, 0.11, 0.03, 0.10),
    "running":  (0.20, 0.00, 1.45, 0.90, 0.15, 0.03, 0.07),
    "cycling":  (0.60, 0.00, 0.70, 0.06, 0.17, 0.03, 0.08),
}
HARMONICS = np.array([                                           # weights of 1 to 6 x the stride, on average
    [0.5, 1.0, 0.2, 0.5, 0.1, 0.2], [0.8, 0.1, 0.3, 0.1, 0.1, 0.0], [0.2, 1.0, 0.3, 0.4, 0.1, 0.1],      # push x y z
    [0.8, 0.2, 0.2, 0.1, 0.0, 0.0], [0.4, 0.7, 0.2, 0.1, 0.1, 0.0], [1.0, 0.1, 0.2, 0.1, 0.0, 0.0]])     # turn x y z
PHASES = np.arange(36).reshape(6, 6) ** 2 % 6.3                  # of each, rad: any will do


def person(rng, spread):
    """What makes a person: each trait is an average plus `spread` times a deviation; 0 makes clones, 1 a crowd."""
    vary = lambda average, deviation: average + spread * deviation * rng.standard_normal(np.shape(average))
    each = np.zeros(len(ACTIVITIES))
    return {
        "strides": vary(0.95, 0.09),                             # a second; a stride is two steps
        "tempo": np.exp(vary(each, 0.1)),                        # in each activity
        "vigour": np.exp(vary(each, 0.25)),
        "posture": vary(np.zeros((len(each), 2)), 0.2),          # rad, beside the activity's lean and roll
        "style": HARMONICS * np.exp(vary(np.zeros((6, 6)), 0.5) + 1j * vary(PHASES, 0.9)),
        "habits": np.exp(vary(each, 0.5)),                       # how much of which activity
        "mount": vary(np.zeros(3), 0.5),                         # how the sensor is worn: rotation vector, rad
        "bias": vary(np.zeros(6), np.repeat([0.02, 0.01], 3)),   # of the sensors, g and rad/s
        "noise": np.repeat(np.exp(vary(np.log([0.01, 0.02]), 0.3)), 3),
    }


def simulated(user, names, read, flags, rate=40.0):
    """A person's day. Activities follow each other as a Markov chain, for a minute on average, in multiples of 10 s.

    In the body's frame (x forwards, y left, z up) the trunk leans and rolls, fidgets slowly, and in gait is turned and
    pushed by harmonics of the stride. The sensor feels gravity and push in its own frame, and the turning rate:
    acc = M R(angles)^-1 (0, 0, 1) + M push,   gyro = M d angles / dt   (for small angles)
    """
    from scipy.spatial.transform import Rotation
    who = person(np.random.default_rng([flags["seed"], 22, int(user)]), flags["spread"])
    rng = np.random.default_rng([flags["seed"], 23, int(user)])  # what happens: clones, too, live their own lives
    mount, left, now = Rotation.from_rotvec(who["mount"]), round(flags["hours_per_user"] * 3600 / SECONDS), None
    while left > 0:
        odds = [row[-1] * habit * (i != now) for i, (row, habit) in enumerate(zip(ACTIVITIES.values(), who["habits"]))]
        now = rng.choice(len(odds), p=np.divide(odds, sum(odds)))
        label, (lean, roll, strides, push, turn, fidget, _) = list(ACTIVITIES.items())[now]
        windows = min(left, rng.geometric(1 / 6))
        left -= windows
        n = int(windows * SECONDS * rate)
        t = np.arange(n) / rate
        today = np.exp(rng.normal(0, [0.04, 0.12]))              # no two bouts are quite alike, in tempo and vigour
        jitter = 0.01 * np.cumsum(rng.standard_normal(n)) / np.sqrt(rate)
        phase = 2 * np.pi * (who["strides"] * strides * who["tempo"][now] * today[0] * t + jitter)
        turns = np.exp(1j * np.multiply.outer(phase, np.arange(1, 7)))                        # (n, 6 harmonics)
        waves = np.einsum("nh,ch->nc", turns, who["style"]).real                              # (n, 6 channels)
        waves *= np.repeat([push, turn], 3) * who["vigour"][now] * today[1]
        angles = waves[:, 3:] + fidget * np.sin(np.outer(t, rng.uniform(0.5, 4, 3)) + rng.uniform(0, 6, 3))
        angles += rng.normal(0, 0.06, 3) + [roll + who["posture"][now, 1], lean + who["posture"][now, 0], 0]
        acc = mount.apply(Rotation.from_rotvec(angles).inv().apply([0, 0, 1]) + waves[:, :3])
        gyro = mount.apply(np.gradient(angles, 1 / rate, axis=0))
        x = np.hstack([acc, gyro]) + who["bias"] + who["noise"] * rng.standard_normal((n, 6))
        yield user, label, [(t, x)]


# ---------------------------------------------------------------- preparing a set, part by part
def parts_of(what, raw, flags):
    """What a source is read by, mostly users, in order: {part: (parser, names of files or members)}. Raises Refused."""
    parts = {}
    if what == "simulated":
        if flags["users"] < 1 or not flags["hours_per_user"] * 3600 >= SECONDS or not 0 <= flags["spread"] < math.inf:
            raise Refused("a population needs --users 1 or more, --hours-per-user 0.003 or more, --spread 0 or more")
        return {f"{user:03d}": (what, []) for user in range(flags["users"])}
    if what == "folder":
        for path in sorted(path for path in Path(raw).glob("[!.]*") if path.suffix in (".npz", ".csv")):
            if path.stem in parts:
                raise Refused(f"{raw} has the user '{path.stem}' as .csv and as .npz; keep one of the two")
            parts[path.stem] = what, [str(path)]
        if not parts:
            raise Refused(f"{raw} holds no .npz or .csv file; name with --raw the folder that has one a user")
        return parts
    for path, url in archives_of(what, raw, flags).items():
        source = next(SOURCES[each] for each in (POOL if what == "pool" else (what,)) if url in SOURCES[each].archives)
        members = [name for z in open_zips(path) for name in z.namelist() if not name.startswith("__MACOSX")]
        found = [(match[1], name) for name in members if (match := re.search(source.members, name))]
        for part, name in dict.fromkeys(found):                  # an archive may name a member twice
            parts.setdefault(source.user.format(part), (source.parse, []))[1].append(name)
        if not found:
            raise Refused(f"{path} has no file like the published archive's; remove it, and it is fetched again")
    open_zips.cache_clear()                                      # each worker opens what it reads
    return dict(sorted(parts.items()))


def do_part(job):
    """Read one part, cut it, and leave it as `out`, an .npz. Raises Refused."""
    part, parser, names, archives, length, flags, out = job
    member = functools.partial(read, [z for path in archives for z in open_zips(path)])
    try:
        windows, users, labels, left_out = cut(globals()[parser](part, names, member, *[flags] * bool(flags)), length)
    except (ValueError, KeyError, IndexError, TypeError, NotImplementedError) as error:
        raise Refused(f"'{part}' is not laid out as {parser} was published ({error!r}); fetch it again") from error
    with replacing(out) as temporary:
        np.savez(temporary, windows=windows, users=users, labels=labels, channels=windows.shape[1],
                 left_out=json.dumps(left_out))


def as_worker(parent):
    """In a worker: leave Ctrl-C to the parent, and go when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def do_parts(name, parts, archives, length, flags, work):
    """All parts, side by side, but for those that an earlier call left done. Returns {part: file}. Raises Refused."""
    import scipy.interpolate, scipy.signal                       # once, before the workers are forked
    files = {part: work / f"part-{i:05d}.npz" for i, part in enumerate(parts)}
    todo = [(part, *parts[part], archives, length, flags, files[part]) for part in parts if not files[part].exists()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    began = told = time.time()
    with ProcessPoolExecutor(max(1, min(cores, len(todo))), initializer=as_worker, initargs=(os.getpid(),)) as pool:
        try:
            for done, job in enumerate(as_completed([pool.submit(do_part, job) for job in todo]), start=1):
                job.result()
                if time.time() > told + 5:
                    told = time.time()
                    print(f"{name}: {len(parts) - len(todo) + done} of {len(parts)} parts, "
                          f"{(told - began) * (len(todo) - done) / done:.0f} s left", file=sys.stderr)
        except BrokenProcessPool:
            raise Refused(f"a process preparing {name} was killed, for want of memory maybe; run it again") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return files


def gather(what, name, files, limit, out):
    """The parts as one set, written to the folder `out` part by part. Returns its meta. Raises Refused."""
    source, user, label, sizes, channels, left_out = SOURCES[what], [], [], [], set(), Counter()
    for file in files.values():
        with np.load(file) as part:
            user += part["users"].tolist()
            label += part["labels"].tolist()
            sizes.append(len(part["users"]))
            channels |= {int(part["channels"])} - {0}
            left_out.update(json.loads(part["left_out"].item()))
    found = sorted(set(label) - {""}) if what != "pool" else []
    if not user:
        raise Refused(f"nothing of {what} makes a window of {source.length / RATE:g} s; left out: {dict(left_out)}")
    if len(channels) > 1:
        raise Refused(f"some users of {name} have both sensors and some have one; keep them in folders of their own")
    if source.classes and not set(found) <= set(source.classes):
        raise Refused(f"{what} has activities that the published set hasn't: {set(found) - set(source.classes)}")
    order = lambda user: [piece.zfill(12) if piece.isdigit() else piece for piece in re.split(r"(\d+)", user)]
    users, classes = sorted(set(user), key=order)[:limit], list(source.classes) or found
    index, code = ({key: i for i, key in enumerate(keys)} for keys in (users, classes))
    user, label = np.array([index.get(key, -1) for key in user]), np.array([code.get(key, -1) for key in label])
    mine = user >= 0                                             # False: beyond --limit-users
    user, label = user[mine], label[mine]
    out.mkdir()
    np.save(out / "users.npy", user)
    np.save(out / "labels.npy", label)
    with open(out / "windows.npy", "wb") as stream:              # not a memory map: its pages would count as ours
        shape = (len(user), *channels, source.length)
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for file, chosen in zip(files.values(), np.split(mine, np.cumsum(sizes)[:-1])):
            with np.load(file) as part:
                stream.write(part["windows"][chosen].tobytes() if chosen.any() else b"")
    windows = np.load(out / "windows.npy", mmap_mode="r")
    sources = [name if what in ("folder", "simulated") else what] * len(users)
    if all("_" in user for user in users):
        sources = [user.split("_")[0] for user in users]
    tests = set(np.load(files["test"])["users"].tolist()) if what == "ucihar" else ()
    return {"name": name, "rate": RATE, "seconds": source.length / RATE, "channels": CHANNELS[:windows.shape[1]],
            "users": users, "sources": sources, "classes": classes, "hours": len(user) * source.length / RATE / 3600,
            "windows": len(user), "origin": "; ".join([source.text, *source.archives]), "left_out": dict(left_out),
            "test_users": [user for user in users if user in tests] or None,
            "fingerprint": fingerprint(windows, user, label)}


@contextlib.contextmanager
def workplace(target, settings):
    """The hidden folder beside `target` where a set is made. What an earlier call with the same settings left there is
    used. It goes when the set is complete or refused, and stays when the program is stopped or killed."""
    work = target.with_name(f".{target.name}.partial")
    work.mkdir(parents=True, exist_ok=True)

    def put_back():                                              # stopped between the two renames that replace a set
        if (work / "old").exists() and not target.exists():
            os.rename(work / "old", target)
    try:
        put_back()
        if not (work / "settings.json").exists() or json.loads((work / "settings.json").read_text()) != settings:
            for leftover in work.glob("part-*"):
                leftover.unlink()
            write_json(work / "settings.json", settings)
        shutil.rmtree(work / "set", ignore_errors=True)
        yield work
    except Exception:
        put_back()
        shutil.rmtree(work)
        raise
    shutil.rmtree(work)


def prepare(what, name, raw, flags, limit=None, force=False, root="data"):
    """Make data/NAME/, unless it is there with the same settings. What was there stays until the new is complete."""
    target, settings = Path(root) / name, {"source": what, **flags, "limit_users": limit}
    if what == "folder":
        settings["recordings"] = {part: zlib.crc32(Path(names[0]).read_bytes()) for part, (_, names)
                                  in parts_of(what, raw, flags).items()}
    if not force and prepared_already(target, settings):
        return report(target, "is prepared already, with the same settings (--force makes it anew)")
    Path(root).mkdir(parents=True, exist_ok=True)
    with open(Path(root) / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)     # one at a time: each takes all cores
        except BlockingIOError:
            print("waiting for another process that prepares a data set here", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not force and prepared_already(target, settings):
                return report(target, "was prepared by that process")
        archives = archives_of(what, raw, flags)
        fetch_missing(archives)
        parts = parts_of(what, raw, flags)
        if limit and what != "ucihar":                           # (its parts are the halves of the official split)
            parts = dict(itertools.islice(parts.items(), limit))
        with workplace(target, settings) as work:
            files = do_parts(name, parts, list(archives), SOURCES[what].length, flags, work)
            meta = gather(what, name, files, limit, work / "set")
            write_json(work / "set" / "meta.json", {**meta, "settings": settings, "provenance": provenance()})
            if target.exists():
                os.rename(target, work / "old")
            os.rename(work / "set", target)
    report(target, "is prepared")


def prepared_already(target, settings):
    """Whether `target` holds a set made with these settings. Raises Refused if it holds one made with others."""
    if not (target / "meta.json").is_file():
        return False
    made = read_meta(target)["settings"]
    if made != settings:
        differ = [key for key in made | settings if made.get(key) != settings.get(key)]
        values = ", ".join(f"{key} {made.get(key)} (now {settings.get(key)})" for key in differ if key != "recordings")
        raise Refused(f"{target} is prepared already, with {values or 'other recordings'}; give another --name, or "
                      "--force to replace it")
    return True


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
    for key in ("rate", "seconds", "channels"):
        if any(meta[key] != metas[0][key] for meta in metas):
            raise Refused(f"{name} can't be pooled, their {key} differ: {[meta[key] for meta in metas]}")
    for people in SAME_PEOPLE:
        if len(twice := people & {meta["settings"]["source"] for meta in metas}) > 1:
            raise Refused(f"{name} can't be pooled: {' and '.join(sorted(twice))} were recorded with the same people, "
                          "so who is held out of one would be trained on in the other; take one of them")
    people = Counter(person for meta in metas for person in zip(meta["sources"], meta["users"]))
    if twice := [f"{user} of {source}" for (source, user), times in people.items() if times > 1]:
        raise Refused(f"{name} can't be pooled: {len(twice)} users are in several of them ({', '.join(twice[:3])} ...)")
    classes = sorted({label for meta in metas for label in meta["classes"]})
    codes = [np.array([classes.index(label) for label in meta["classes"]] + [-1]) for meta in metas]     # none stays -1
    first = np.cumsum([0] + [len(meta["users"]) for meta in metas])
    windows, users, labels = (np.concatenate(arrays) for arrays in zip(*(
        (part.windows, part.users + before, code[part.labels]) for part, before, code in zip(parts, first, codes))))
    joined = {key: sum((meta[key] for meta in metas), []) for key in ("users", "sources")}
    total = {key: sum(meta[key] for meta in metas) for key in ("hours", "windows")}
    return Prepared(windows, users, labels, {
        **metas[0], **joined, **total, "name": name, "classes": classes, "test_users": None, "left_out": {},
        "origin": "; ".join(meta["origin"] for meta in metas), "settings": [meta["settings"] for meta in metas],
        "fingerprint": fingerprint(windows, users, labels)})


def load_one(name, root):
    folder = Path(root) / name
    if not (folder / "meta.json").is_file():
        known = f"python data.py {name}" if name in SOURCES else "python data.py (it lists what there is)"
        raise Refused(f"the data set '{name}' is not prepared in {root}/; run: {known}")
    meta = read_meta(folder)
    try:
        arrays = [np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("windows", "users", "labels")]
        whole = fingerprint(*arrays) == meta["fingerprint"]
    except (OSError, ValueError, EOFError, IndexError):          # cut off, or of other shapes
        whole = False
    if not whole:
        raise Refused(f"{folder} is damaged, or was changed after it was prepared; prepare it again with --force")
    return Prepared(*arrays, meta)


def read_meta(folder):
    try:
        meta = json.loads((folder / "meta.json").read_text())
        assert {"users", "sources", "classes", "fingerprint", "settings", "left_out"} <= set(meta)
    except (ValueError, AssertionError, TypeError):
        raise Refused(f"{folder}/meta.json is damaged; prepare the set again with --force") from None
    return meta


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
    """Every other user, in the order in which a grid takes them in: seeded, alternating between the sources, so that
    the first 8 are among the first 16 and each source is there from the start. Raises Refused if there is none."""
    held = set(sum(held_out_users(meta), []))
    rng = np.random.default_rng([seed, 20])
    queues = [rng.permutation([u for u, s in enumerate(meta["sources"]) if s == source and u not in held]).tolist()
              for source in sorted(set(meta["sources"]))]
    if not any(queues):
        raise Refused(f"all {len(meta['users'])} users of '{meta['name']}' are held out, 20 % of each source's and 2 "
                      "at least; prepare more users (in a folder, the part of a file name up to the first _ is the "
                      "source)")
    queues = [queues[i] for i in rng.permutation(len(queues))]
    return [q[i] for i in range(max(map(len, queues))) for q in queues if i < len(q)]


def draw_windows(prepared, users, hours_per_user, seed):
    """Indices of the windows one grid cell trains on: at most `hours_per_user` (None: all) of each user in `users`.

    A user's windows are drawn in a seeded order, so that fewer hours are a subset of more hours of the same life.
    """
    most = None if hours_per_user is None else max(1, round(hours_per_user * 3600 / prepared.meta["seconds"]))
    drawn = []
    for user in users:
        mine = np.flatnonzero(prepared.users == user)
        drawn.append(np.random.default_rng([seed, 21, int(user)]).permutation(mine)[:most])
    return np.sort(np.concatenate(drawn))


# ---------------------------------------------------------------- looking at them, and the command line
def report(folder, what):
    """A sentence on a prepared set, and what was left out of it."""
    meta = read_meta(folder)
    print(f"{folder} {what}: {len(meta['users'])} users, {meta['hours']:.2f} hours, {meta['windows']} windows of "
          f"{meta['seconds']:g} s x {len(meta['channels'])} channels, {len(meta['classes'])} classes")
    for reason, count in sorted(meta["left_out"].items()):
        print(f"  left out: {count} {reason}")


def overview(root="data"):
    """Print what can be prepared, and what is."""
    metas = {path.parent.name: read_meta(path.parent) for path in sorted(Path(root).glob("[!.]*/meta.json"))}
    print(f"{'name':16} {'users':>6} {'hours':>8} {'windows':>8} {'classes':>8}  where from (-: not prepared here)")
    for name in [*SOURCES, *sorted(set(metas) - set(SOURCES))]:
        if meta := metas.get(name):
            print(f"{name:16} {len(meta['users']):6} {meta['hours']:8.2f} {meta['windows']:8} {len(meta['classes']):8}"
                  f"  {meta['origin']}")
        else:
            print(f"{name:16} {'-':>6} {'-':>8} {'-':>8} {'-':>8}  {SOURCES[name].text}")


def plot(name, root="data"):
    """Draw three windows of each class, of different users where there are, and the hours of each user."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    prepared, rng = load_one(name, root), np.random.default_rng(0)
    meta, t = prepared.meta, np.arange(prepared.windows.shape[2]) / prepared.meta["rate"]
    names, sensors = {**dict(enumerate(meta["classes"])), -1: "no label"}, len(meta["channels"]) // 3
    kinds = [(names[label], np.flatnonzero(prepared.labels == label)) for label in np.unique(prepared.labels)]
    fig, axes = plt.subplots(len(kinds) + 1, 3 * sensors, figsize=(7.5 * sensors, 1.4 * len(kinds) + 3), squeeze=False,
                             layout="constrained")
    for row, (text, mine) in zip(axes, kinds):
        users = np.resize(rng.permutation(np.unique(prepared.users[mine])), 3)
        for i, ax in enumerate(row):
            if i % sensors == 0:
                window = prepared.windows[rng.choice(mine[prepared.users[mine] == users[i // sensors]])]
                ax.set_title(f"{text}, user {meta['users'][users[i // sensors]]}", fontsize=8, loc="left")
            for axis, x, colour in zip("xyz", window[i % sensors * 3:], ("#0072b2", "#d55e00", "#009e73")):
                ax.plot(t, x, color=colour, lw=0.8, label=axis)
            ax.set_title(f"{'g' if 'acc' in meta['channels'][i % sensors * 3] else 'rad/s'}", fontsize=8, loc="right")
            ax.tick_params(labelsize=7)
    axes[0, 0].legend(fontsize=7, ncols=3)
    bars = fig.add_subplot(axes[-1, 0].get_gridspec()[-1, :])
    for ax in axes[-1]:
        ax.remove()
    hours = np.bincount(prepared.users, minlength=len(meta["users"])) * meta["seconds"] / 3600
    held = np.isin(np.arange(len(hours)), sum(held_out_users(meta), []))
    for mine, colour, text in ((~held, "#0072b2", "to train on"), (held, "#d55e00", "held out")):
        bars.bar(np.flatnonzero(mine), hours[mine], color=colour, label=text)
    bars.set(xlabel="user", ylabel="hours", xlim=(-1, len(hours)))
    bars.legend(fontsize=8)
    with replacing(Path(root) / name / "plot.png") as temporary:
        fig.savefig(temporary, dpi=90)
    print(f"{Path(root) / name / 'plot.png'} shows {3 * len(kinds)} windows, and the hours of {len(hours)} users")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", help="the data set to prepare, or 'plot'; without it, all are listed")
    parser.add_argument("which", nargs="?", help="with 'plot': the prepared set to draw")
    flag = parser.add_argument_group("every data set").add_argument
    flag("--raw", default="data/raw", metavar="DIR", help="where the published archives, or your own recordings, lie; "
         "an archive that is missing is downloaded into it (default: %(default)s)")
    flag("--name", help="prepare it as data/NAME/ (default: the data set's own name)")
    flag("--limit-users", type=int, metavar="N", help="the first N users only, for a quick look (default: all)")
    flag("--force", action="store_true", help="make anew what is prepared already (default: leave it alone)")
    flag = parser.add_argument_group("simulated").add_argument
    flag("--users", type=int, default=40, help="how many people (default: %(default)s)")
    flag("--hours-per-user", type=float, default=0.5, help="how long each is recorded (default: %(default)s)")
    flag("--spread", type=float, default=1.0, help="how much people differ: 0 makes clones, of whom a new one teaches "
         "what a longer recording does; 1 a realistic crowd (default: %(default)s)")
    flag("--seed", type=int, default=0, help="another seed, another population (default: %(default)s)")
    flag = parser.add_argument_group("folder").add_argument
    flag("--acc-unit", choices=("g", "m/s2"), default="g", help="what your files hold (default: %(default)s)")
    flag("--gyro-unit", choices=("rad/s", "deg/s"), default="rad/s", help="what your files hold (default: %(default)s)")
    flag = parser.add_argument_group("extrasensory").add_argument
    flag("--labels", action="store_true", help="read the labels, too, from a third archive, so that probes can be run "
         "on it (default: without, as for pre-training)")
    args = parser.parse_args()
    name, limit = args.name or args.what, args.limit_users
    if args.what is None:
        overview()
    elif args.what == "plot":
        plot(args.which or "")
    elif args.what not in SOURCES or args.which:
        raise Refused(f"there is no data set '{args.which or args.what}'; there are {', '.join(SOURCES)}")
    elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "raw":
        raise Refused(f"--name {name}: take letters, digits, '_', '-' and '.' ('+' joins sets, 'raw' is for archives)")
    elif limit is not None and limit < 1:
        raise Refused(f"--limit-users {limit}: take one user or more")
    else:
        own = {"simulated": ("users", "hours_per_user", "spread", "seed"), "folder": ("acc_unit", "gyro_unit"),
               "extrasensory": ("labels",)}.get(args.what, ())
        prepare(args.what, name, args.raw, {key: getattr(args, key) for key in own}, limit, args.force)


if __name__ == "__main__":
    command(main)
