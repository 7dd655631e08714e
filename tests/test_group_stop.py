"""A run of several processes that is stopped is interrupted, not failed: by ctrl-C, and by what Slurm sends when a job is preempted or cancelled."""
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.slow

GRID = """\
notebook = "nbs/runs/train.ipynb"
data = "ctxnb.text.tokens:token_store"
[parameters]
corpus = "texts"
processes = 2
train_tokens = 2000
max_context = 16
layers = 1
width = 16
dev_targets = 2
test_targets = 2
train_targets = 10
epochs = [0.5, 5000.0]
device = "cpu"
precision = "float32"
"""


@pytest.fixture
def grid(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"document {number} says a word. " * 40)
    (tmp_path / "g.toml").write_text(GRID)
    return tmp_path / "g.toml"


def ctxnb(command: str, grid, *more) -> list:
    return [sys.executable, "-m", "ctxnb", command, grid, *more, "--runs-dir", grid.parent / "runs"]


@pytest.mark.parametrize("how", ["ctrl-C", "Slurm"])
def test_a_stopped_run_of_two_processes_is_interrupted(grid, how):
    job = {"SLURM_JOB_ID": "7"} if how == "Slurm" else {}
    command = ctxnb("one", grid, "0") if job else ctxnb("run", grid)
    launcher = subprocess.Popen(command, env=os.environ | job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not (first := list((grid.parent / "runs").glob("train-*.partial/metrics.jsonl"))):  # the first process has evaluated the short budget
            assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()
            time.sleep(0.1)
        members = psutil.Process(launcher.pid).children(recursive=True)
        if job:
            for member in members:
                command = " ".join(member.as_dict(["cmdline"])["cmdline"] or [])  # none of one that has ended, and waits for its parent
                if "forkserver" in command or "spawn" in command:
                    member.send_signal(signal.SIGTERM)
        else:
            os.killpg(launcher.pid, signal.SIGINT)
        out, err = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode == (1 if job else 130), err
    assert "Traceback" not in err, err
    _, alive = psutil.wait_procs(members, timeout=30)
    assert not alive, alive
    shown = subprocess.run(ctxnb("status", grid), capture_output=True, text=True).stdout
    assert "1 interrupted" in shown, shown + first[0].with_name("log.txt").read_text()
    assert all(json.loads(line)["step"] for line in first[0].read_text().splitlines())
