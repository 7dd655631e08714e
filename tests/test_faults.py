"""The table of faults (faults.toml): each is made to happen, and what the user sees and what lies on disk is what the table says.

A grid of two runs: one is quick, the other works for a minute on its first attempt and is quick on the next, so that a fault
can strike in the middle of it. Every case runs in a folder with a space and an umlaut in its name. The random-kill study
at the end is the same for all moments: launchers, workers and kernels are killed until enough are, and nothing is lost.
"""
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from test_batch import COMMAND, WORK, Project, same

TABLE = tomllib.loads((Path(__file__).parent / "faults.toml").read_text(encoding="utf-8"))
PATIENT = WORK.replace("time.sleep(seconds)", "time.sleep(seconds if counter.read_text() == 'x' else 0)")
SECRET = "hf_" + "a1B2" * 8


@dataclass
class Observed:
    """What a case saw: the command's exit code and words, the disk, and what came of it later."""

    exit: int
    said: str
    disk: str
    then: str


class FaultProject(Project):
    """A grid of a quick and a patient run."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.template(PATIENT)
        self.axes(seconds=[0.0, 60.0])

    def call(self, *arguments, **options) -> tuple[int, str]:
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=120)
        return process.returncode, out + err

    def disk(self) -> str:
        """What the folder of the runs holds, by the files alone."""
        partial = [json.loads((folder / "status.json").read_text())["state"] for folder in sorted(self.runs.glob("work-*.partial"))]
        parts = [f"{len(self.finished())} finished"] if self.finished() else []
        parts += [f"{len(partial)} partial ({', '.join(partial)})"] if partial else []
        return ", ".join(parts) or "nothing"

    def in_the_middle(self, *arguments, **options) -> subprocess.Popen:
        """A launcher whose quick run is done and whose patient run works."""
        launcher = self.start("run", *arguments, **options)
        self.wait_for(1)
        deadline = time.monotonic() + 60
        while not list(self.runs.glob("work-*.partial/attempts")):
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.02)
        return launcher

    def patient_pid(self) -> int:
        (status,) = self.runs.glob("work-*.partial/status.json")
        return json.loads(status.read_text())["pid"]

    def counts(self, output: str) -> str:
        """`2 done` of the last summary in what a command said."""
        return [line for line in output.splitlines() if line.startswith("work-quick:")][-1].split("(")[1].rstrip(")")


def ended(launcher: subprocess.Popen) -> tuple[int, str]:
    out, err = launcher.communicate(timeout=120)
    return launcher.returncode, out + err


def mended(project: FaultProject, exit: int, said: str, disk: str, mend=lambda: None) -> Observed:
    """A failed run is left alone until somebody says to retry it."""
    left = project.counts(project.call("run")[1])
    mend()
    retried = project.counts(project("run", "--retry-failed"))
    return Observed(exit, said, disk, f"{left}; with --retry-failed, once mended: {retried}")


# --- the cases ----------------------------------------------------------------------------------------------


def launcher_killed(project):
    launcher = project.in_the_middle()
    worker = psutil.Process(project.patient_pid())
    launcher.kill()
    launcher.communicate()
    worker.wait(20)  # it notices that its launcher is gone
    exit, said = project.call("status")
    return Observed(exit, said, project.disk(), project.counts(project("run")))


def worker_killed(project):
    launcher = project.in_the_middle()
    os.kill(project.patient_pid(), signal.SIGKILL)
    exit, said = ended(launcher)
    return Observed(exit, said, project.disk(), project.counts(project("run")))


def kernel_killed(project):
    launcher = project.in_the_middle("--engine", "kernel", "--workers", "2")
    (kernel,) = psutil.Process(project.patient_pid()).children()
    kernel.kill()
    exit, said = ended(launcher)
    return Observed(exit, said, project.disk(), project.counts(project("run")))


def stopped_by_hand(project):
    launcher = project.in_the_middle()
    assert "told to stop: 1 launchers here" in project("cancel")
    exit, said = ended(launcher)
    return Observed(exit, said, project.disk(), project.counts(project("run")))


def notebook_fails(project):
    project.template(PATIENT + "\nif seconds and not (run_folder() / 'mended').exists(): raise RuntimeError('no luck')")
    project.axes(seconds=[0.0, 0.1])
    exit, said = project.call("run")
    disk = project.disk()
    (folder,) = project.runs.glob("*.partial")
    logs = project.logs(folder.name.removesuffix(".partial"))
    assert "raise RuntimeError('no luck')" in logs and "RuntimeError: no luck" in logs
    return mended(project, exit, said, disk, (folder / "mended").touch)


def hangs(project):
    project.axes("timeout_minutes = 0.03", seconds=[0.0, 60.0])
    exit, said = project.call("run")
    disk = project.disk()
    (folder,) = project.runs.glob("*.partial")
    assert "most recent call first" in (folder / "log.txt").read_text()  # where it hung
    return mended(project, exit, said, disk)


def leaks_memory(project):
    project.template(PATIENT.replace("time.sleep(", "leak = []\nwhile seconds and counter.read_text() == 'x':\n"
                                     "    leak.append(b'x' * 10**7)\n    time.sleep(0.01)\ntime.sleep(0 * "))
    project.axes("memory_gb = 0.6", seconds=[0.0, 60.0])
    exit, said = project.call("run")
    (status,) = project.runs.glob("*.partial/status.json")
    assert 570 < json.loads(status.read_text())["peak_memory_mb"] < 1500  # 0.6 GB are 572 MiB
    return mended(project, exit, said, project.disk())


def full_disk(project):
    with mounted(project, "size=400k") as disk:
        (disk / "fill").touch()
        project.template(WORK + "\nif seconds and (run_folder().parents[1] / 'fill').exists():\n"
                         "    (run_folder() / 'big').write_bytes(bytes(10**6))")
        project.axes(seconds=[0.0, 0.1])
        exit, said = project.call("run", "--workers", "1")
        states = "1 finished, 1 partial (interrupted)" if "1 interrupted" in project("status") else project.disk()
        (disk / "fill").unlink()  # somebody makes room
        for big in project.runs.glob("*/big"):
            big.unlink()
        return Observed(exit, said, states, f"once there is room: {project.counts(project('run'))}")


def read_only(project):
    project.axes(seconds=[0.0, 0.1])
    with mounted(project, "size=1m") as disk:
        project("run", "--only", "seconds=0.0")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        exit, said = project.call("run")
        assert "1 done, 1 missing" in project("status")  # it can still be read
        disk_now = project.disk()
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        return Observed(exit, said, disk_now, f"once it can: {project.counts(project('run'))}")


def truncated_result(project):
    return _damaged(project, lambda text: text[:20])


def edited_result(project):
    return _damaged(project, lambda text: text.replace("0.3", "0.2", 1))


def _damaged(project, change):
    project.axes(seconds=[0.0, 0.1])
    project("run")
    before = project.table()
    result = sorted(project.runs.glob("work-*/result.json"))[0]
    changed = change(result.read_text())
    assert changed != result.read_text()
    result.write_text(changed)
    exit, said = project.call("status")
    assert "1 rows" in project("results", "-o", str(project.folder / "t.parquet"))  # a damaged result enters no table
    disk = project.disk()
    after = project.counts(project("run"))
    same(project.table(), before)
    kept = [path / "result.json" for path in (project.runs / "superseded").iterdir()]
    assert [path.read_text() for path in kept] == [changed]
    return Observed(exit, said, disk, f"{after}, and the old folder is kept in superseded/")


def clock_goes_back(project):
    now = project.folder / "now"  # seconds that this host's clock is off, for every Python that starts here
    now.write_text("0")
    (project.folder / "sitecustomize.py").write_text(
        f"import pathlib, time\nreal, now = time.time, pathlib.Path({str(now)!r})\ntime.time = lambda: real() + float(now.read_text() or 0)\n")
    environment = os.environ | {"PYTHONPATH": f"{project.folder}:{os.environ.get('PYTHONPATH', '')}", "CTXNB_LEASE_SECONDS": "3"}
    project.template(PATIENT.replace("time.sleep(", "while seconds and not (run_folder() / 'go').exists():\n"
                                     "    time.sleep(0.1)\ntime.sleep(0 * "))
    project.axes("timeout_minutes = 3", seconds=[0.0, 60.0])
    launcher = project.in_the_middle(env=environment)
    now.write_text("-3600")
    for marker in (project.runs / ".locks").iterdir():  # the clock that dates the files went back too: they are of the future now
        os.utime(marker, (time.time() + 3600,) * 2)
    time.sleep(2)  # the run renews its lock every second
    assert "1 done, 1 running" in project.call("status", env=environment)[1]
    assert "to do: 0" in project.call("run", env=environment)[1]  # a second launcher leaves it alone
    (folder,) = project.runs.glob("work-*.partial")
    (folder / "go").touch()
    exit, said = ended(launcher)
    assert attempts(project) == ["x", "x"]
    return Observed(exit, said, project.disk(), f"nothing to do: {project.counts(project('run'))}")


def corpus_changes(project):
    corpus, module = project.folder / "corpus.txt", project.folder / "words.py"
    corpus.write_text("one two")
    module.write_text("import hashlib, pathlib\nclass Data: pass\ndef words(build=False):\n    data = Data()\n"
                      f"    data.digest = hashlib.sha256(pathlib.Path({str(corpus)!r}).read_bytes()).hexdigest()\n    return data\n")
    environment = os.environ | {"PYTHONPATH": f"{project.folder}:{os.environ.get('PYTHONPATH', '')}", "CTXNB_TRUST": "words"}
    project.axes(seconds=[0.0, 0.1])
    project.grid.write_text('data = "words:words"\n' + project.grid.read_text())
    assert "2 done" in project.call("run", env=environment)[1]
    corpus.write_text("one two three")
    exit, said = project.call("status", env=environment)
    disk, old = project.disk(), project.finished()
    after = project.counts(project.call("run", env=environment)[1])
    assert len(project.finished()) == 4 and project.finished().items() >= old.items()
    return Observed(exit, said, disk, f"{after}, and the old folders stay beside the new ones")


def code_changes(project):
    project.axes(seconds=[0.0, 0.1])
    project("run")
    for status in project.runs.glob("work-*/status.json"):  # as if by the library before its last change
        status.write_text(json.dumps(json.loads(status.read_text()) | {"code": "0123456789ab"}))
    exit, said = project.call("status")
    disk = project.disk()
    return Observed(exit, said, disk, f"nothing to do: {project.counts(project('run'))}")


def notebook_edited(project):
    project.axes(seconds=[3.0, 0.1])
    launcher = project.start("run", "--workers", "1")  # the second run waits for the first
    deadline = time.monotonic() + 60
    while not list(project.runs.glob("work-*.partial/attempts")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    project.template(PATIENT.replace("0.01", "0.02"), recipe=2)
    exit, said = ended(launcher)
    disk = project.disk()
    return Observed(exit, said, disk, f"{project.counts(project('run'))}, by the new recipe")


def two_hosts(project):
    project.axes(seconds=[3.0], seed=[0, 1])
    launchers = [project.start("run", "--workers", "1"), on_host("other", project, "run", "--workers", "1")]
    outputs = [ended(launcher) for launcher in launchers]
    hosts = {json.loads(path.read_text())["host"] for path in project.runs.glob("work-*/status.json")}
    assert attempts(project) == ["x", "x"] and hosts <= {"other", socket.gethostname()}
    exit, said = project.call("run")
    assert all(code in (0, 3) for code, _ in outputs)
    return Observed(exit, said, project.disk(), f"nothing to do: {project.counts(said)}; no run was begun twice")


def host_dies(project):
    environment = os.environ | {"CTXNB_LEASE_SECONDS": "4"}
    launcher = on_host("other", project, "run", env=environment)
    project.wait_for(1)
    while not list(project.runs.glob("work-*.partial/attempts")):
        time.sleep(0.02)
    assert "1 running" in project.call("status", env=environment)[1] and "on other" in project.call("status", env=environment)[1]
    descendants = psutil.Process(launcher.pid).children(recursive=True)
    for process in [psutil.Process(launcher.pid), *descendants]:
        process.kill()
    launcher.communicate()
    time.sleep(5)  # the lease runs out
    exit, said = project.call("status", env=environment)
    disk = project.disk()
    after = project.counts(project.call("run", env=environment)[1])
    return Observed(exit, said, disk, f"{after}, on another host, after watching the dead one's lock for a while")


def killed_at_lock(project):
    """The lock file is what a process leaves that was killed between making it and writing its name there: empty."""
    project.axes(seconds=[0.0])
    (run,) = re.findall("work-[0-9a-f]{12}", project("status"))
    (project.runs / ".locks").mkdir(parents=True, exist_ok=True)
    (project.runs / ".locks" / f"{run}.lock").touch()
    began = time.monotonic()
    exit, said = project.call("run", env=os.environ | {"CTXNB_LEASE_SECONDS": "4"})
    return Observed(exit, said, project.disk(), "begun once the lease was over" if time.monotonic() - began > 4 else "begun too early")


def secret(project):
    project.template(PATIENT, "context_length = 8\nseed = 0\nseconds = 0.3\nname = ''")
    project.axes(name=["a", SECRET])
    exit, said = project.call("run")
    again = project.call("run")[1]
    assert SECRET not in said + again
    return Observed(exit, said, project.disk(), "refused again; the message never repeats the value" if "refused" in again else again)


def names(project):
    project.template(WORK + """
import getpass, os, pathlib, socket, sys, warnings
print(os.getcwd(), pathlib.Path.home() / "models", run_folder(), sys.executable, f"{getpass.getuser()}@{socket.gethostname()}")
warnings.warn("from a library")
record({"loss": 1.0, "where": os.getcwd(), "who": f"{getpass.getuser()} on {socket.gethostname()}"})
""", f"context_length = 8\nseed = 0\nseconds = 0.0\ncorpus = {str(project.folder / 'text.txt')!r}")
    project.axes(seconds=[0.0])
    exit, said = project.call("run", env=os.environ | {"LOGNAME": "lovelace"})
    (notebook,) = project.runs.glob("work-*/notebook.ipynb")
    project.call("results", "-o", str(project.folder / "t.csv"), env=os.environ | {"LOGNAME": "lovelace"})
    texts = notebook.read_text() + (project.folder / "t.csv").read_text()
    telling = [str(project.folder), str(project.folder.parent), f"{Path.home()}/", "/tmp/", "lovelace", f"@{socket.gethostname()}"]
    found = [name for name in telling if name in texts]
    return Observed(exit, said, project.disk(), "notebook and table hold no absolute path, user or host" if not found else str(found))


def unicode(project):
    project.template(WORK, "context_length = 8\nseed = 0\nseconds = 0.0\nname = ''")
    project.axes(name=["größe = ½ 'x'", "日本 語"])
    exit, said = project.call("run")
    assert set(project.table().name) == {"größe = ½ 'x'", "日本 語"}
    return Observed(exit, said, project.disk(), f"nothing to do: {project.counts(project('run'))}")


def many_runs(project):
    project.axes(context_length=list(range(1, 21)), seed=list(range(100)))
    took = {command: min(_seconds(project, command) for _ in range(2)) for command in ("plan", "status")}
    exit, said = project.call("status")
    fast = all(seconds < 2 for seconds in took.values())
    return Observed(exit, said, project.disk(), "`plan` and `status` take less than 2 seconds each" if fast else str(took))


def _seconds(project, command: str) -> float:
    began = time.monotonic()
    project(command)
    return time.monotonic() - began


# --- what they need -----------------------------------------------------------------------------------------


class mounted:
    """A small file system of its own for the runs of a project; a context manager."""

    def __init__(self, project: FaultProject, options: str):
        self.project, self.options, self.disk = project, options, project.folder / "disk"

    def __enter__(self) -> Path:
        self.disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", self.options, "tmpfs", str(self.disk)], capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root")
        self.project.runs = self.disk / "runs"
        return self.disk

    def __exit__(self, *exc) -> None:
        subprocess.run(["umount", "-l", str(self.disk)], check=True)


def on_host(name: str, project: FaultProject, *arguments, **options) -> subprocess.Popen:
    """Start `ctxnb` with another host name, as on another machine that sees the same folder."""
    if subprocess.run(["unshare", "--uts", "hostname", name], capture_output=True).returncode:
        pytest.skip("a host name of one's own needs root and unshare")
    command = [*COMMAND, arguments[0], str(project.grid), "--runs-dir", str(project.runs), *arguments[1:]]
    return subprocess.Popen(["unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh", *command],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def attempts(project) -> list[str]:
    return [path.read_text() for path in sorted(project.runs.glob("work-*/attempts"))]


# --- the table ----------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    return FaultProject(tmp_path / "a folder with späces")


FAST = {"worker_killed", "notebook_fails", "secret", "unicode"}
SYSTEM = {"full_disk": ("mount",), "read_only": ("mount",), "two_hosts": ("unshare",), "host_dies": ("unshare",)}


def marked(name: str):
    """A fault as a parameter of the test, with its marker."""
    if name in SYSTEM:
        return pytest.param(name, marks=pytest.mark.system(*SYSTEM[name]))
    return pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])


@pytest.mark.parametrize("name", [marked(name) for name in TABLE])
def test_fault(project, name):
    row, observed = TABLE[name], globals()[name](project)
    assert observed.exit == row["exit"], observed.said
    for text in row["sees"]:
        assert text in observed.said
    assert (observed.disk, observed.then) == (row["disk"], row["then"])


# --- random kills -------------------------------------------------------------------------------------------

KILLS = 54
KINDS = {"launcher", "worker", "kernel"}  # what is killed


@pytest.mark.slow
def test_random_kills_lose_nothing(tmp_path, record_property, monkeypatch):
    """At least 50 kills at random moments over grids of short runs; every table is the undisturbed one."""
    monkeypatch.setenv("CTXNB_LEASE_SECONDS", "20")  # who is killed while it takes a lock blocks its run for so long
    chance, deadline = random.Random(7), time.monotonic() + 1200
    undisturbed = short_grid(tmp_path / "undisturbed")
    undisturbed("run")
    pace = undisturbed.seconds()  # of one run
    kills, grids, repeated, victims = 0, 0, 0, []
    while kills < KILLS or set(victims) != KINDS:
        project = short_grid(tmp_path / f"grid {grids}")
        spared = 0  # runs that finish before the next kill
        while "16 done" not in (status := project("status")):
            assert "failed" not in status, status  # what was killed has not failed
            engine = "kernel" if chance.random() < 0.25 else "shell"
            launcher = project.start("run", "--engine", engine)
            while launcher.poll() is None:
                time.sleep(chance.uniform(0, 3 * pace))
                done = len(project.finished())
                assert time.monotonic() < deadline, f"{done} of 16 done after {kills} kills, grid {grids}: nothing goes on\n{project('status')}"
                if done >= spared and (victim := a_victim(launcher, chance)):
                    victims.append(victim)
                    kills += 1
                    spared = done + chance.randint(0, 1)  # every second kill waits for a finished run: the grid ends however busy the machine is
                    print(kills, victim, done, flush=True)
            launcher.communicate(timeout=120)
            assert kills < 4 * KILLS, "the grid comes to no end"
        grids += 1
        repeated += sum(len(text) - 1 for text in attempts(project))
        same(project.table().drop(columns=["engine"]), undisturbed.table().drop(columns=["engine"]))
    of = {kind: victims.count(kind) for kind in sorted(set(victims))}
    figures = dict(kills=kills, of=of, grids=grids, runs=16 * grids, lost=0, repeated=repeated)
    record_property("random kills", json.dumps(figures))
    print(figures)
    assert set(victims) == KINDS


def short_grid(folder: Path) -> Project:
    project = Project(folder)
    project.axes(context_length=[4, 8, 16, 32], seed=[0, 1, 2, 3], seconds=[0.1])
    return project


def a_victim(launcher: subprocess.Popen, chance: random.Random) -> str:
    """Kill the launcher, a worker that has a run, or a run's kernel; say which, or nothing where there was none."""
    try:
        server = [p for p in psutil.Process(launcher.pid).children() if "forkserver" in " ".join(p.cmdline())]
        workers = [p for process in server for p in process.children()]
        kernels = [p for worker in workers for p in worker.children() if "ipykernel" in " ".join(p.cmdline())]
        if not workers:  # it is only starting up
            return ""
        kind = chance.choices(["launcher", "worker", "kernel"], [1, 5, 5 * bool(kernels)])[0]
        {"launcher": lambda: launcher, "worker": lambda: chance.choice(workers), "kernel": lambda: chance.choice(kernels)}[kind]().kill()
        return kind
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
