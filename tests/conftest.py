"""What several test files use."""
import importlib, json, os, signal, sys
os.environ["OMP_NUM_THREADS"] = "1"                    # before numpy: waiting threads cost time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))            # so that `pytest` finds them alone
import data

signal.signal(signal.SIGINT, signal.default_int_handler)       # which nohup has set to: ignored

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs only by name, -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"

def read(path):
    return json.loads(Path(path).read_text())

def write(path, content):
    """A file from its text, its bytes or, if it is a .npz, its arrays."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        np.savez(path, **content)
    else:
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

def prepare(what, raw="raw", name=None, limit=None, force=False, **flags):
    """The set data/NAME/, made by the command line of data.py."""
    if what == "simulated":
        flags = {"users": 6, "hours_per_user": 0.1, **flags}
    flags |= {"raw": raw, "name": name or what} | ({"limit_users": limit} if limit else {})
    words = [f"--{flag.replace('_', '-')}={value}" for flag, value in flags.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["data.py", what, *words, *["--force"][:force]])
        data.main()
    return data.load(name or what)

@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder that a file's tests run in, with a small simulated set in data/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home := tmp_path_factory.mktemp("a home"))
        prepare("simulated", users=12, hours_per_user=0.05)
        yield home

@pytest.fixture
def run(monkeypatch, capfd):
    """A command, such as "data.py plot pool", in this process: (exit status, stdout, stderr)."""
    def call(line):
        words = line.split()
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            data.command(importlib.import_module(words[0].removesuffix(".py")).main)
        return end.value.code or 0, *capfd.readouterr()
    return call

@pytest.fixture
def refused(run):
    """Run a command that has to end with status 2 and one sentence, in which these words are; with
    `usage`, argparse may have said before how the command is used."""
    def call(line, words, usage=False):
        status, printed, error = run(line)
        sentences = error.splitlines()[-1:] if usage else error.splitlines()
        assert (status, printed, len(sentences)) == (2, "", 1) and words in sentences[0], error
        assert "Traceback" not in error
    return call
