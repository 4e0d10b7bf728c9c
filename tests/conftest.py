"""Tests marked `slow` take minutes and run only by name: python -m pytest -m slow"""
import signal, sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))            # so that `pytest` finds them alone

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run by hand with -m slow")

def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and "slow" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: python -m pytest -m slow"))

# A shell that starts the tests in the background has them, and all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

@pytest.fixture
def main_of(monkeypatch, capsys):
    """A script's main as from the command line: (exit status, stdout, stderr)."""
    def call(module, *words):
        from data import command         # here: a test file sets its threads before numpy is there
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            command(module.main)
        return end.value.code or 0, *capsys.readouterr()
    return call
