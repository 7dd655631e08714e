"""What a notebook cell cannot show of the batch runner: the command line, killed processes, two launchers, a full disk.

Every case drives the installed `ctxnb` command on a real grid through real papermill. The template is short so
that many faults fit in little time; its result is a pure function of the parameters, so tables can be compared.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

COMMAND = [str(Path(sys.executable).with_name("ctxnb"))]
WORK = """
import time
from ctxnb.batch.record import record, run_folder
counter = run_folder() / "attempts"
counter.write_text(counter.read_text() + "x" if counter.exists() else "x")
time.sleep(seconds)
record({"loss": context_length ** -0.5 + 0.01 * seed, "curve": [1.0 / (i + 1) for i in range(context_length)]})
"""
TIMINGS = ["seconds", "process_memory_mb", "started"]


class Project:
    """A folder with one template and one grid, and the `ctxnb` command to run on it."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, folder / "runs"
        (folder / "quick").mkdir(parents=True)
        self.grid = folder / "quick" / "work.toml"
        self.template(WORK)
        self.axes(context_length=[4, 8, 16, 32], seed=[0, 1])

    def template(self, body: str, parameters: str = "context_length = 8\nseed = 0\nseconds = 0.3") -> None:
        cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(body)]
        kernel = {"name": "python3", "language": "python", "display_name": "python3"}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), self.folder / "work.ipynb")

    def axes(self, more: str = "", **axes) -> None:
        lines = ['notebook = "../work.ipynb"', "[axes]", *(f"{k} = {json.dumps(v)}" for k, v in axes.items()),
                 "[resources]", "workers = 2", "minutes = 0.01", more]
        self.grid.write_text("\n".join(lines))

    def start(self, *arguments, **options) -> subprocess.Popen:
        command = [*COMMAND, arguments[0], str(self.grid), "--runs-dir", str(self.runs), *arguments[1:]]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)

    def __call__(self, *arguments, expect: int = 0) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        assert process.returncode == expect, f"exit code {process.returncode}\n{out}\n{err}"
        return out + err

    def finished(self) -> dict[str, int]:
        """Run id -> modification time of its result, of the finished runs."""
        return {p.parent.name: p.stat().st_mtime_ns for p in self.runs.glob("work-*/result.json")
                if not p.parent.name.endswith(".partial")}

    def wait_for(self, number: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.finished()) < number:
            assert time.monotonic() < deadline, f"only {len(self.finished())} runs finished"
            time.sleep(0.02)

    def wait_for_change(self) -> None:
        """Until some run begins or ends."""
        before, deadline = set(self.runs.glob("work-*")), time.monotonic() + 60
        while set(self.runs.glob("work-*")) == before:
            assert time.monotonic() < deadline, "nothing happens"
            time.sleep(0.02)

    def table(self) -> pd.DataFrame:
        self("results", "-o", str(self.folder / "table.parquet"))
        return pd.read_parquet(self.folder / "table.parquet").drop(columns=TIMINGS)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "a folder with späces")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The table of the grid when nothing goes wrong."""
    project = Project(tmp_path_factory.mktemp("undisturbed") / "p")
    project("run")
    return project.table()


def same(table: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(table, other)


def test_run_twice_does_nothing_the_second_time(project, undisturbed):
    assert "8 missing" in project("plan") and not project.runs.exists()
    assert "8 done" in project("run")
    before = project.finished()
    assert "to do: 0" in project("run") and project.finished() == before
    same(project.table(), undisturbed)
    assert list(undisturbed.columns[:4]) == ["run", "context_length", "seed", "loss"]
    assert len(undisturbed.curve[7]) == 32


def test_launcher_killed_in_the_middle(project, undisturbed):
    launcher = project.start("run")
    project.wait_for(3)
    launcher.kill()
    launcher.wait()
    time.sleep(1)  # workers notice that their launcher is gone
    finished = project.finished()
    assert 3 <= len(finished) < 8
    status = project("status")
    assert "running" not in status and f"{len(finished)} done" in status and "interrupted" in status
    project("run")
    after = project.finished()
    assert {run: after[run] for run in finished} == finished, "a finished run was touched"
    same(project.table(), undisturbed)


def test_ctrl_c_and_again(project, undisturbed):
    launcher = project.start("run", start_new_session=True)
    project.wait_for(2)
    os.killpg(launcher.pid, signal.SIGINT)  # what a terminal does
    out, err = launcher.communicate(timeout=20)
    assert launcher.returncode == 130 and "The same command goes on" in err and "Traceback" not in err
    assert "running" not in project("status")
    project("run")
    same(project.table(), undisturbed)


@pytest.mark.parametrize("seed", range(3))
def test_random_kills_of_anything(project, undisturbed, seed):
    """Kill launchers and workers at random moments until the grid is done."""
    chance = random.Random(seed)
    kills = 0
    while "8 done" not in project("status"):
        launcher = project.start("run")
        project.wait_for_change()  # the grid is at work ...
        time.sleep(chance.uniform(0, 0.7))  # ... and anything may be happening in it
        children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
        grandchildren = subprocess.run(["pgrep", "-P", ",".join(children) or "0"], capture_output=True, text=True).stdout.split()
        victim = int(chance.choice([launcher.pid, *grandchildren]))
        if launcher.poll() is None:
            os.kill(victim, signal.SIGKILL)
            kills += 1
        launcher.communicate(timeout=60)
        assert kills < 30
    assert kills
    same(project.table(), undisturbed)


def test_two_launchers_share_a_grid(project, undisturbed):
    first, second = project.start("run"), project.start("run")
    for launcher in (first, second):
        launcher.communicate(timeout=60)
    project("run")  # what one of them left to the other is done by now
    same(project.table(), undisturbed)
    attempts = [path.read_text() for path in project.runs.glob("work-*/attempts")]
    assert attempts == ["x"] * 8, "a cell was run twice"


def test_failed_runs_wait_for_retry(project):
    project.template(WORK + "\nif seed == 1 and not (run_folder() / 'mended').exists(): raise RuntimeError('no luck')")
    out = project("run", expect=1)
    assert "4 failed" in out and "RuntimeError: no luck" in out
    assert "4 of 8 runs are not in the table" in project("results")
    assert "to do: 0" in project("run", expect=1)
    for folder in project.runs.glob("*.partial"):
        assert json.loads((folder / "status.json").read_text())["exit_code"] == 1
        (folder / "mended").touch()
    assert "8 done" in project("run", "--retry-failed")


def test_a_run_over_its_time_limit_is_stopped(project):
    project.axes("timeout_minutes = 0.02", seconds=[0.0, 60.0])
    out = project("run", expect=1)
    assert "1 done, 1 failed" in out and "limit of 0.02 minutes" in out


def test_misspelled_parameter_makes_no_folder(project):
    project.axes(contxt_length=[4, 8])
    for command in ("plan", "run", "status", "results"):
        out = project(command, expect=2)
        assert "'contxt_length'" in out and "did you mean 'context_length'?" in out
    assert not project.runs.exists()


@pytest.mark.parametrize("parameters, message", [
    ("context_length = 8\nseed = 0\nseconds = context_length / 10", "only `name = literal`"),
    ("context_length = '8'\nseed = 0\nseconds = 0.3", "expected a str"),
])
def test_untrustworthy_templates_are_refused(project, parameters, message):
    project.template(WORK, parameters)
    assert message in project("run", expect=2)
    assert not project.runs.exists()


def test_untagged_template_is_refused(project):
    notebook = nbformat.read(project.folder / "work.ipynb", 4)
    notebook.cells[0].metadata.clear()
    nbformat.write(notebook, project.folder / "work.ipynb")
    assert "0 cells tagged 'parameters'" in project("run", expect=2)


def test_same_key_twice_is_refused(project):
    project.axes(seed=[0, 1, 0])
    assert "two runs with the same key: seed=0" in project("run", expect=2)


def test_edited_template_makes_results_stale(project):
    project.axes(seed=[0, 1])
    project("run")
    project.template(WORK.replace("0.01", "0.02"))
    assert "2 stale" in project("status")
    assert "made by another version of its notebook" in project("results")
    project("run")
    assert project.table().loss.tolist() == [8 ** -0.5, 8 ** -0.5 + 0.02]


def test_only_some_of_the_grid(project):
    assert "2 done" in project("run", "--only", "context_length=8", "--only", "seed=0,1")
    assert "2 done, 6 missing" in project("status")
    assert "the axis has 0, 1" in project("run", "--only", "seed=9", expect=2)


def test_fresh_kernels_and_a_killed_one(project, undisturbed):
    project.axes(context_length=[4, 8], seed=[0])
    project.template(WORK.replace("time.sleep(seconds)", "import os, signal\nif context_length == 4 and len(counter.read_text()) == 1: "
                                  "os.kill(os.getpid(), signal.SIGKILL)"))
    out = project("run", "--engine", "kernel", expect=1)
    assert "1 done, 1 interrupted" in out and "DeadKernelError" in out
    assert "2 done" in project("run", "--engine", "kernel")
    assert project.table().loss.tolist() == [0.5, 8 ** -0.5]


def test_full_disk(project):
    disk = project.folder / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        project.runs = disk / "runs"
        (disk / "fill").touch()
        project.template(WORK + """
if seed == 1 and (run_folder().parents[1] / "fill").exists():
    (run_folder() / "big").write_bytes(bytes(10**6))
""")
        project.axes(context_length=[4, 8], seed=[0, 1])
        assert "No space left on device" in project("run", "--workers", "1", expect=1)
        finished = project.finished()
        assert finished and "running" not in project("status")
        (disk / "fill").unlink()  # somebody makes room
        for big in project.runs.glob("*/big"):
            big.unlink()
        project("run")
        after = project.finished()
        assert len(after) == 4 and {run: after[run] for run in finished} == finished
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_damaged_result_is_not_used(project):
    project.axes(seed=[0])
    project("run")
    (result,) = project.runs.glob("work-*/result.json")
    result.write_text(result.read_text()[:20])
    assert "damaged or was edited" in project("status")
    assert "0 rows" in project("results", "-o", str(project.folder / "t.parquet"))
    assert "1 done" in project("run")


def test_executed_notebook_and_table_name_no_folder(project):
    project.axes(seed=[0])
    project("run")
    (notebook,) = project.runs.glob("work-*/notebook.ipynb")
    assert str(project.folder.parent) not in notebook.read_text()
    assert not project.table().astype(str).apply(lambda c: c.str.contains(str(project.folder.parent))).any().any()


def test_results_formats(project):
    project.axes(seed=[0, 1])
    assert "0 rows" in project("results", "-o", str(project.folder / "t.csv"))
    project("run")
    assert project("results").split()[:3] == ["run", "seed", "loss"]
    assert project("results", "--format", "csv").startswith("run,seed,loss,")
    project("results", "-o", str(project.folder / "t.csv"))
    assert len(pd.read_csv(project.folder / "t.csv")) == 2
    assert "needs a file" in project("results", "--format", "parquet", expect=2)
    assert "does not exist" in project("results", "-o", str(project.folder / "no" / "t.csv"), expect=2)
