"""A grid on a real Slurm, started for these tests by `slurm.py`: what a user of a cluster goes through, on one machine.

The node says it has eight cores, so that jobs of several cases work at the same time. A run that is to be interrupted
counts its seconds in a file in its folder, as training keeps a checkpoint, and goes on from there.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from slurm import Slurm
from test_batch import ALL_FOUR, WORK, Project, same

STEPS = WORK.replace("time.sleep(seconds)", """
place = run_folder() / "seconds"
for second in range(int(place.read_text()) if place.exists() else 0, int(seconds)):
    time.sleep(1)
    place.write_text(str(second + 1))
""")
pytestmark = pytest.mark.system("slurmctld", "slurmd", "munged")
ONE_BY_ONE = "job_minutes = 0\n"  # a job for each run


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    with Slurm(tmp_path_factory.mktemp("slurm"), cpus=8) as cluster, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        patch.setenv("OMP_NUM_THREADS", "1")
        yield cluster


@pytest.fixture
def project(slurm, tmp_path):
    return Project(tmp_path / "a folder with späces")


@pytest.fixture(scope="module")
def over_its_time(slurm, tmp_path_factory):
    """A run that needs longer than its job may last, submitted before the other cases, which it does not disturb.

    Slurm looks at time limits every 30 s and warns up to 30 s early, so the warning due after 65 s comes within 35 to 65 s, and 66 s are too many for one job.
    """
    project = Project(tmp_path_factory.mktemp("time") / "p")
    project.template(STEPS)
    project.axes(f"hours = {2 / 60}\nwarn_seconds = 55", seconds=[66.0])
    project("run", "--backend", "slurm")
    return project


def jobs_of(project) -> list[str]:
    return [job for note in (project.runs / ".jobs").glob("*.json") for job in json.loads(note.read_text())["jobs"]]


def wait_for(true, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


def attempts(project) -> list[str]:
    return [path.read_text() for path in sorted(project.runs.glob("work-*/attempts"))]


def begun(project, number: int = 1):
    return lambda: len(list(project.runs.glob("work-*/attempts"))) >= number


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("undisturbed") / "p")
    project("run")
    return project.table()


def test_an_array_of_eight_submitted_twice(project, undisturbed, over_its_time):
    project.axes(ONE_BY_ONE + "array_parallelism = 3", context_length=[4, 8, 16, 32], seed=[0, 1])
    out = project("run", "--backend", "slurm")
    assert "submitted 8 runs as 8 jobs" in out and "8 queued" in out
    again = project("run", "--backend", "slurm")
    assert "nothing to submit" in again and len(jobs_of(project)) == 8
    assert len({job.split("_")[0] for job in jobs_of(project)}) == 2  # the cluster's MaxArraySize
    assert project("wait", "--timeout", "4", patience_s=300).splitlines()[-1].endswith("(8 done)")
    assert "to do: 0" in project("run")  # the other backend sees the same runs
    same(project.table(), undisturbed)
    assert attempts(project) == ["x"] * 8
    rows = project.table()
    assert rows.commit.notna().all() and rows.hardware.notna().all()


def test_short_runs_share_a_job(project, undisturbed):
    project.axes("job_minutes = 0.02", context_length=[4, 8], seed=[0, 1])  # two runs of 0.01 minutes
    assert "submitted 4 runs as 2 jobs" in project("run", "--backend", "slurm")
    project("wait", "--timeout", "2")
    same(project.table(), undisturbed[undisturbed.context_length < 16].reset_index(drop=True))


def test_scancel_and_cancel(project, slurm):
    project.template(STEPS)
    project.axes(ONE_BY_ONE + "array_parallelism = 1", seed=[0, 1, 2], seconds=[30.0])
    project("run", "--backend", "slurm")
    wait_for(begun(project), "the first run")
    (array,) = {job.split("_")[0] for job in jobs_of(project)}
    slurm("scancel", f"{array}_1")  # by hand, one that waits
    status = project("status")
    assert "1 running, 1 queued, 1 missing" in status and re.search(rf"job {array}_2 waits \(JobArrayTaskLimit\)", status)
    assert "told to stop: 2 Slurm jobs" in project("cancel")  # the one that runs, and the other that waits
    out = project("wait", "--timeout", "1", expect=1)
    assert "interrupted" in out and "ctxnb logs" in out
    assert "1 interrupted, 2 missing" in project("status") and "nothing to cancel" in project("cancel")


def test_a_killed_worker_fails_its_job_and_goes_on_later(project, slurm):
    project.template(STEPS)
    project.axes(ONE_BY_ONE, seconds=[3.0])
    project("run", "--backend", "slurm")
    wait_for(lambda: list(project.runs.glob("*.partial/seconds")), "the run's first step")
    (status,) = project.runs.glob("*.partial/status.json")
    os.kill(json.loads(status.read_text())["pid"], signal.SIGKILL)
    assert "its process was killed (exit code -9)" in project("wait", "--timeout", "1", expect=1)
    (job,) = jobs_of(project)
    wait_for(lambda: slurm.states()[job] == "FAILED", "Slurm to see the failure")
    logs = project.logs(status.parent.name.removesuffix(".partial"))
    assert "not all runs are done" in logs and "killed (exit code -9)" in logs  # the job's log, and the run's end
    assert "submitted 1 runs" in project("run", "--backend", "slurm")
    project("wait", "--timeout", "1")
    assert attempts(project) == ["xx"]


def test_killed_step_daemon_leaves_an_orphan_that_nobody_runs_beside(project):
    project.template(STEPS)
    project.axes(ONE_BY_ONE, seconds=[8.0])
    project("run", "--backend", "slurm")
    wait_for(begun(project), "the run")
    (status,) = project.runs.glob("*.partial/status.json")
    step = next(p for p in psutil.Process(json.loads(status.read_text())["pid"]).parents() if p.name() == "slurmstepd")
    step.kill()
    assert "1 running" in project("status") and "nothing to submit" in project("run", "--backend", "slurm")
    wait_for(project.finished, "the orphan")
    assert attempts(project) == ["x"]


def test_a_drained_node_keeps_the_queue(project, slurm):
    project.axes(ONE_BY_ONE + "array_parallelism = 1", seed=[0, 1])
    project("run", "--backend", "slurm")
    wait_for(begun(project), "the first run")
    slurm("scontrol", "update", "nodename=localhost", "state=drain", "reason=test")
    try:
        project.wait_for(1)
        wait_for(lambda: "1 done, 1 queued" in project("status"), "the queue to stand")
        project("wait", "--timeout", "0", expect=3)
    finally:
        slurm("scontrol", "update", "nodename=localhost", "state=resume")
    assert project("wait", "--timeout", "2").splitlines()[-1].endswith("(2 done)")
    assert attempts(project) == ["x"] * 2


def test_a_restarted_controller_loses_nothing(project, slurm):
    project.axes(ONE_BY_ONE + "array_parallelism = 1", seed=[0, 1], seconds=[11.0])  # longer than the outage
    project("run", "--backend", "slurm")
    wait_for(begun(project), "the first run")
    slurm.stop_controller()
    try:
        assert "Slurm does not answer" in project("status")
    finally:
        slurm.start_controller()
    assert project("wait", "--timeout", "2").splitlines()[-1].endswith("(2 done)")
    assert attempts(project) == ["x"] * 2


def test_each_run_sees_its_own_gpu(project):
    sees = WORK.replace("import time", "import os, time").replace('"loss":', '"gpus": os.environ["CUDA_VISIBLE_DEVICES"], "loss":')
    project.template(sees)
    project.axes(ONE_BY_ONE + "gpus = 1", seed=[0, 1], seconds=[3.0])
    project("run", "--backend", "slurm")
    project("wait", "--timeout", "2")
    assert set(project.table().gpus) == {"0", "1"}


def test_runs_of_one_job_share_its_gpu(project, slurm):
    project.template(ALL_FOUR)
    project.axes(ONE_BY_ONE + "gpus = 1\nruns_per_gpu = 2\ncpus = 2", seed=[0, 1, 2, 3])
    assert "submitted 4 runs as 2 jobs" in project("run", "--backend", "slurm")
    project("wait", "--timeout", "2")
    assert sorted(project.table().gpus) == ["0", "0", "1", "1"]
    assert "NumCPUs=4 " in slurm("scontrol", "show", "job", jobs_of(project)[0])


def test_the_written_script_does_the_same(project, slurm, undisturbed):
    project.axes(context_length=[4, 8], seed=[0])
    script = project.folder / "grid.sh"
    script.write_text(project("script"))
    subprocess.run(["sbatch", str(script)], check=True, capture_output=True)
    wait_for(lambda: len(project.finished()) == 2, "the script's runs")
    same(project.table(), undisturbed[(undisturbed.context_length < 16) & (undisturbed.seed == 0)].reset_index(drop=True))
    assert "there is nothing to submit" in project("script", expect=2)


def test_a_job_over_its_time_limit_is_requeued_and_resumes(over_its_time, slurm):
    assert over_its_time("wait", "--timeout", "5", patience_s=360).splitlines()[-1].endswith("(1 done)")
    (job,) = jobs_of(over_its_time)
    restarts = int(re.search(r"Restarts=(\d+)", slurm("scontrol", "show", "job", job))[1])
    # two jobs do on an idle machine, six were seen on a busy one, where starting takes much of the time; none tries twice
    assert 2 <= len(attempts(over_its_time)[0]) <= restarts + 1
    assert "timed-out" in (over_its_time.runs / ".slurm" / f"{job}_0_log.out").read_text()
    assert next(over_its_time.runs.glob("work-*/seconds")).read_text() == "66"  # no second was done twice


def test_a_preempted_job_resumes(project, slurm):
    project.template(STEPS)
    project.axes(ONE_BY_ONE, seconds=[20.0])
    project("run", "--backend", "slurm")
    wait_for(lambda: list(project.runs.glob("*.partial/seconds")), "the run's first step")
    slurm("srun", "--partition=urgent", "--cpus-per-task=8", "-n1", "sleep", "1")
    assert project("wait", "--timeout", "2").splitlines()[-1].endswith("(1 done)")
    assert attempts(project) == ["xx"] and next(project.runs.glob("work-*/seconds")).read_text() == "20"


def test_a_preempted_job_that_is_cancelled_is_interrupted(project, slurm):
    """Where PreemptMode is CANCEL, Slurm does not requeue: the same command submits the rest."""
    project.template(STEPS)
    project.axes(ONE_BY_ONE + 'partition = "volatile"', seconds=[20.0])
    project("run", "--backend", "slurm")
    wait_for(lambda: list(project.runs.glob("*.partial/seconds")), "the run's first step")
    slurm("srun", "--partition=urgent", "--cpus-per-task=8", "-n1", "sleep", "1")
    assert "1 interrupted" in project("wait", "--timeout", "2", expect=1)
    assert "submitted 1 runs" in project("run", "--backend", "slurm")
    assert project("wait", "--timeout", "2").splitlines()[-1].endswith("(1 done)")
    assert attempts(project) == ["xx"] and next(project.runs.glob("work-*/seconds")).read_text() == "20"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of commands that come before Slurm's own, as a site puts them."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def command(name: str, script: str) -> None:
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    return command


def test_a_site_with_gres_only_and_without_scontrol(project, slurm, site):
    real = shutil.which("scontrol")
    site("sbatch", f'grep -q gpus-per-node "$1" && echo "sbatch: error: use --gres" >&2 && exit 1\nexec {shutil.which("sbatch")} "$@"')
    site("scontrol", "echo 'scontrol: not for users' >&2; exit 1")
    project.template(WORK.replace("import time", "import os, time").replace('"loss":', '"gpus": os.environ["CUDA_VISIBLE_DEVICES"], "loss":'))
    project.axes(ONE_BY_ONE + 'sbatch = ["--gres=gpu:1", "--comment=mine"]', seed=[0, 1], seconds=[3.0])
    assert "submitted 2 runs" in project("run", "--backend", "slurm")
    assert "Comment=mine" in slurm(real, "show", "job", jobs_of(project)[0])
    project("wait", "--timeout", "2")
    assert set(project.table().gpus) == {"0", "1"}
    project.axes(ONE_BY_ONE + "gpus = 1", seed=[2])
    assert "use --gres" in project("run", "--backend", "slurm", expect=2)


def test_a_submission_that_breaks_off_is_named_and_resumed(project, site, tmp_path):
    """Eight runs are two arrays; the second is refused, as at a limit of jobs per user."""
    site("sbatch", f'[ -e {tmp_path}/once ] && echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2 && exit 1\n'
                   f'touch {tmp_path}/once\nexec {shutil.which("sbatch")} "$@"')
    project.axes(ONE_BY_ONE, context_length=[4, 8, 16, 32], seed=[0, 1])
    out = project("run", "--backend", "slurm", expect=2)
    assert "QOSMaxSubmitJobPerUserLimit" in out and "5 jobs were submitted before and stay queued; the same command submits the rest" in out
    (tmp_path / "bin" / "sbatch").unlink()
    assert "submitted 3 runs as 3 jobs" in project("run", "--backend", "slurm")
    assert project("wait", "--timeout", "2").splitlines()[-1].endswith("(8 done)")
    assert attempts(project) == ["x"] * 8


def test_slurm_refuses_in_its_own_words(project):
    project.axes('partition = "nowhere"', seed=[0])
    out = project("run", "--backend", "slurm", expect=2)
    assert "Slurm refused the jobs" in out and "invalid partition" in out
    assert "1 missing" in project("status")
