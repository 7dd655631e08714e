"""Markers of the tests. `make test` runs those without one (they get `fast`); `make test-all` runs them all."""
import os
import shutil
import signal

import pytest

MARKERS = {
    "fast": "has no other marker: runs in `make test`",
    "slow": "takes long, or repeats at length what a fast test checks once",
    "system(*commands)": "needs these commands, or root: `make test-system-deps` installs them (browser, Slurm, mounts, apt)",
    "gpu": "needs a CUDA device; CTXNB_GPU_REHEARSAL=1 runs it on the CPU",
}


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A shell starts what it puts into the background with ctrl-C ignored, and children inherit that: the tests of ctrl-C would wait in vain.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("slow", "system", "gpu")):
            item.add_marker("fast")


def pytest_runtest_setup(item):
    """A missing system package fails a `system` test with the command that installs it; a missing GPU skips a `gpu` test."""
    needed = [command for mark in item.iter_markers("system") for command in mark.args]
    if missing := [command for command in needed if not shutil.which(command)]:
        pytest.fail(f"{', '.join(missing)} not found: run `make test-system-deps`, or leave these tests out with -m 'not system'", pytrace=False)
    if item.get_closest_marker("gpu") and not os.environ.get("CTXNB_GPU_REHEARSAL"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def own_environment():
    """The command sets variables for the processes it starts; one that runs in this process must not pass them on to the next test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
