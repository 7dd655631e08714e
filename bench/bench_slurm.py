"""Overhead of a run through Slurm against the local backend, on a real Slurm started here.

Run `python bench/bench_slurm.py` as root (add --json for one line of JSON). The grid's runs do nothing, so all time
is overhead. Both backends work on one run at a time. The local one starts its workers from one preloaded process; Slurm is
measured twice, with a job for each run and with all runs in one job. Time is from the command to the last run's end, by the wall clock,
taken from the same kind of launch in each case and divided by the number of runs; the ratio to local is taken within one call of
this script, since the machine's speed cancels in it. Exits with 77 where no Slurm can be started.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from slurm import Slurm  # noqa: E402
from test_batch import Project  # noqa: E402

CASES = {
    "local": ("", ["run", "--workers", "1"]),
    "slurm, a job for each run": ("job_minutes = 0\narray_parallelism = 1", ["run", "--backend", "slurm"]),
    "slurm, all runs in one job": ("job_minutes = 60", ["run", "--backend", "slurm"]),
}


def seconds_for(folder: Path, resources: str, command: list[str], runs: int) -> float:
    """Wall time of a grid of runs that do nothing, seconds."""
    project = Project(folder)
    project.axes(resources, seed=list(range(runs)), seconds=[0.0])
    began = time.monotonic()
    project(*command)
    while len(project.finished()) < runs:
        time.sleep(0.01)
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8, help="runs in the grid (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args()
    if not shutil.which("slurmctld"):
        print("slurmctld not found: run `make test-system-deps`", file=sys.stderr)
        return 1
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder, Slurm(Path(folder) / "slurm") as cluster:
        os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
        subprocess.run(["srun", "-Qn1", "true"], check=True)
        took = {name: seconds_for(Path(folder) / name, *case, arguments.runs) / arguments.runs for name, case in CASES.items()}
    if arguments.json:
        print(json.dumps({"runs": arguments.runs, "seconds_per_run": took, "ratio": {name: took[name] / took["local"] for name in took}}))
        return 0
    print(f"{arguments.runs} runs that do nothing, one at a time\n{'':30}{'s per run':>10}{'ratio':>8}")
    for name, seconds in took.items():
        print(f"{name:<30}{seconds:>10.2f}{seconds / took['local']:>8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
