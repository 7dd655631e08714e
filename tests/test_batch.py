"""What a notebook cell cannot show of the batch runner: the command line. What goes wrong is in test_faults.py and test_slurm.py.

Every case drives the installed `ctxnb` command on a real grid through real papermill. The template is short so
that many faults fit in little time; its result is a pure function of the parameters, so tables can be compared.
"""
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from click.testing import CliRunner

from ctxnb.cli import EXIT_CODES, main

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

    def template(self, body: str, parameters: str = "context_length = 8\nseed = 0\nseconds = 0.3", recipe: int = 1) -> None:
        cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
                 nbformat.v4.new_code_cell(f"recipe = {recipe}", metadata={"tags": ["settings"]}), nbformat.v4.new_code_cell(body)]
        kernel = {"name": "python3", "language": "python", "display_name": "python3"}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), self.folder / "work.ipynb")

    def axes(self, more: str = "", **axes) -> None:
        lines = ['notebook = "../work.ipynb"', "[axes]", *(f"{k} = {json.dumps(v)}" for k, v in axes.items()),
                 "[resources]", "workers = 2", "minutes = 0.01", more]
        self.grid.write_text("\n".join(lines))

    def start(self, *arguments, **options) -> subprocess.Popen:
        command = [*COMMAND, arguments[0], str(self.grid), "--runs-dir", str(self.runs), *arguments[1:]]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)

    def __call__(self, *arguments, expect: int = 0, patience_s: float = 120) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=patience_s)
        assert process.returncode == expect, f"exit code {process.returncode}\n{out}\n{err}"
        return out + err

    def logs(self, run: str) -> str:
        """What `ctxnb logs` says of a run."""
        command = [*COMMAND, "logs", run, "--runs-dir", str(self.runs)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    def finished(self) -> dict[str, int]:
        """Run id -> modification time of its result, of the finished runs."""
        return {p.parent.name: p.stat().st_mtime_ns for p in self.runs.glob("work-*/result.json")
                if not p.parent.name.endswith(".partial")}

    def seconds(self) -> float:
        """Median duration of the finished runs."""
        return statistics.median(json.loads(p.read_text())["seconds"] for p in self.runs.glob("work-*/status.json"))

    def wait_for(self, number: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.finished()) < number:
            assert time.monotonic() < deadline, f"only {len(self.finished())} runs finished"
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


def test_a_run_ends_by_itself(project):
    """Its process is not ended while it gives back what it holds: nothing is left for Python to warn of."""
    project.template("import multiprocessing\nlock = multiprocessing.RLock()\n" + WORK)
    said = project("run")
    assert "8 done" in said and "leaked" not in said


def test_two_launchers_share_a_grid(project, undisturbed):
    first, second = project.start("run"), project.start("run")
    for launcher in (first, second):
        launcher.communicate(timeout=120)
    project("run")  # what one of them left to the other is done by now
    same(project.table(), undisturbed)
    attempts = [path.read_text() for path in project.runs.glob("work-*/attempts")]
    assert attempts == ["x"] * 8, "a cell was run twice"


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


def test_other_code_is_information_and_another_recipe_makes_results_stale(project):
    project.axes(seed=[0, 1])
    project("run")
    project.template(WORK.replace("0.01", "0.02"))
    assert "2 done" in project("status") and "to do: 0" in project("run")
    for status in project.runs.glob("work-*/status.json"):
        status.write_text(json.dumps(json.loads(status.read_text()) | {"code": "0123456789ab"}))
    assert "2 done" in (out := project("status")) and out.count("made by other code, 0123456789ab") == 2
    project.template(WORK.replace("0.01", "0.02"), recipe=2)
    assert "2 stale" in (out := project("status")) and out.count("made with recipe 1; today's is 2") == 2
    assert "made with recipe 1; today's is 2" in project("results", expect=3)
    project("run")
    assert project.table().loss.tolist() == [8 ** -0.5, 8 ** -0.5 + 0.02] and project.table().recipe.tolist() == [2, 2]


def test_a_new_parameter_at_its_default_keeps_results(project):
    project.axes(seed=[0, 1])
    project("run")
    project.template(WORK, "context_length = 8\nseed = 0\nseconds = 0.3\ndropout = 0.0")
    assert "2 done" in project("status") and project.table().dropout.tolist() == [0.0, 0.0]


def test_only_some_of_the_grid(project):
    assert "2 done" in project("run", "--only", "context_length=8", "--only", "seed=0,1")
    assert "2 done, 6 missing" in project("status")
    assert "the axis has 0, 1" in project("run", "--only", "seed=9", expect=2)


def test_results_formats(project):
    project.axes(seed=[0, 1])
    assert "0 rows" in project("results", "-o", str(project.folder / "t.csv"), expect=3)
    project("run")
    assert project("results").split()[:3] == ["run", "seed", "loss"]
    assert project("results", "--format", "csv").startswith("run,seed,loss,")
    project("results", "-o", str(project.folder / "t.csv"))
    assert len(pd.read_csv(project.folder / "t.csv")) == 2
    assert "needs a file" in project("results", "--format", "parquet", expect=2)
    assert "does not exist" in project("results", "-o", str(project.folder / "no" / "t.csv"), expect=2)
    table = project.folder / "t.parquet"
    for seed in (0, 1, 1):
        project("results", "-o", str(table), "--add", "--only", f"seed={seed}")
    assert pd.read_parquet(table).seed.tolist() == [0, 1]


def test_results_are_filtered_and_joined(project):
    project.axes(context_length=[4, 8], seed=[0, 1], seconds=[0.0])
    project("run")
    assert project("results", "--format", "csv", "--where", "loss < 0.5 and seed == 1").count("\n") == 2
    assert "Columns: run, context_length" in project("results", "--where", "los < 1", expect=2)
    other = project.folder / "entropy.csv"
    other.write_text("context_length,loss,entropy\n8,1.5,2.5\n")
    rows = project("results", "--format", "csv", "--join", str(other)).splitlines()
    assert rows[0].endswith("loss_entropy,entropy") and [row.endswith("1.5,2.5") for row in rows[1:5]] == [False, False, True, True]
    assert rows[5].endswith("entropy.csv: 2 of 4 rows found a partner")
    assert "name more columns with --on" in project("results", "--join", str(project.grid), "--on", "context_length", expect=2)
    assert "expected a grid (.toml) or a table" in project("results", "--join", "x.txt", expect=2)


def test_every_row_says_where_it_comes_from(project):
    project.axes(seed=[0], seconds=[0.0])
    project("run")
    project("results", "-o", str(project.folder / "t.parquet"))
    (row,) = pd.read_parquet(project.folder / "t.parquet").to_dict("records")
    for column in ("run", "notebook", "notebook_hash", "recipe", "code", "commit", "dirty", "hardware", "python",
                   "papermill_version", "started", "seconds", "process_memory_mb"):
        assert row[column] not in ("", None), column
    assert row["data"] == "" and row["dirty"] in (True, False)  # this grid names no data


def test_one_run_by_its_key_or_number(project):
    project.axes(seed=[0, 1], seconds=[0.0])
    assert "done work-" in project("one", "1")
    (run,) = project.finished()
    before = project.finished()
    assert f"done {run}" in project("one", run) and f"done {run}" in project("one", run[-12:-6]) and project.finished() == before
    assert "is no run (there are 2, numbered from 0)" in project("one", "7", expect=2)
    assert f"{run}: done" in project.logs(run) and "it wrote nothing" in project.logs(run[:9])
    wrong = subprocess.run([*COMMAND, "logs", "nothing", "--runs-dir", str(project.runs)], capture_output=True, text=True)
    assert wrong.returncode == 2 and "expected the id of one run" in wrong.stderr


def test_waiting_for_another_terminal(project):
    project.axes(seed=[0, 1], seconds=[2.0])
    assert "2 missing" in project("wait", expect=3)
    launcher = project.start("run")
    while not list(project.runs.glob("*.partial/attempts")):
        time.sleep(0.02)
    project("wait", "--timeout", "0", expect=3)
    launcher.communicate(timeout=60)
    assert "2 done" in project("wait")


def test_workers_keep_to_their_places(project):
    project.template("import os, time\nfrom ctxnb.batch.record import record\ntime.sleep(1)\n"
                     "record({'cores': sorted(os.sched_getaffinity(0)), 'gpus': os.environ.get('CUDA_VISIBLE_DEVICES', '')})")
    project.axes("gpus = 1", seed=[0, 1])
    none = project.start("run", env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert "gpus = 1 for each run: this machine shows 0" in none.communicate()[1]
    project.start("run", env=os.environ | {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}).communicate(timeout=60)
    project("results", "-o", str(project.folder / "t.parquet"))
    table = pd.read_parquet(project.folder / "t.parquet")
    assert sorted(table.gpus) == ["GPU-a", "GPU-b"]
    if len(os.sched_getaffinity(0)) > 1:
        assert not set(table.cores[0]) & set(table.cores[1])


# a run that ends only when all four have begun, and says which GPU it saw
ALL_FOUR = """
import os, time
from ctxnb.batch.record import record, run_folder
(run_folder() / "begun").touch()
deadline = time.monotonic() + 60
while len(list(run_folder().parent.glob("work-*/begun"))) < 4:
    assert time.monotonic() < deadline, "the others did not begin"
    time.sleep(0.05)
record({"gpus": os.environ["CUDA_VISIBLE_DEVICES"]})
"""


def test_runs_that_share_a_gpu_work_at_the_same_time(project):
    project.template(ALL_FOUR)
    project.axes("gpus = 1\nruns_per_gpu = 2", seed=[0, 1, 2, 3])
    launcher = project.start("run", "--workers", "9", env=os.environ | {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"})
    assert launcher.communicate(timeout=120) and launcher.returncode == 0
    assert sorted(project.table().gpus) == ["GPU-a", "GPU-a", "GPU-b", "GPU-b"]
    project.axes("runs_per_gpu = 2", seed=[0])
    assert "runs_per_gpu = 2 and gpus = 0: expected gpus = 1" in project("plan", expect=2)


def test_the_users_resources_go_before_the_grids(project):
    file = project.folder / "resources.toml"
    file.write_text("partition = 'long'\nhours = 3\nsetup = ['module load x']")
    project.axes("partition = 'short'", seed=[0])
    script = project("script", "--resources", str(file))
    assert "--partition=long" in script and "--time=180" in script and "\nmodule load x\n" in script and "one " in script
    file.write_text("partitoin = 'long'")
    assert "did you mean 'partition'" in project("script", "--resources", str(file), expect=2)
    assert "Slurm is not here" in project.start("run", "--backend", "slurm", env=os.environ | {"PATH": "/nowhere"}).communicate()[1]


def test_papermills_own_command_records_the_same_result(tmp_path):
    """One cell of the training grid, tiny: by papermill's command line and by `ctxnb one`."""
    tiny = dict(context_length=4, train_tokens=4000, layers=1, heads=1, width=8, tokens_per_step=64, max_context=8, dev_targets=1, test_targets=1, device="cpu", precision="float32")
    template = Path(__file__).parents[1] / "nbs" / "runs" / "train.ipynb"
    papermill = Path(sys.executable).with_name("papermill")
    arguments = [text for name, value in tiny.items() for text in ("-p", name, str(value))]
    environment = os.environ | {"CTXNB_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    subprocess.run([papermill, template, tmp_path / "out.ipynb", *arguments], check=True, capture_output=True, env=environment)
    (by_hand,) = (tmp_path / "runs" / "by-hand").glob("*/result.json")
    said = [output.get("text", "") for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells for output in cell.get("outputs", [])]
    assert any(f"by-hand/{by_hand.parent.name}/result.json" in text for text in said)
    grid = tmp_path / "tiny.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in tiny.items()]
    grid.write_text("\n".join([f"notebook = {json.dumps(str(template))}", "[parameters]", *lines]))
    subprocess.run([*COMMAND, "one", grid, "0"], check=True, capture_output=True, env=environment)
    (by_grid,) = (tmp_path / "runs").glob("train-*/result.json")
    losses = [json.loads(file.read_text())["loss"] for file in (by_hand, by_grid)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    # more test targets: the same model, tested again
    grid.write_text(grid.read_text().replace("test_targets = 1", "test_targets = 2"))
    subprocess.run([*COMMAND, "one", grid, "0"], check=True, capture_output=True, env=environment)
    (again,) = set((tmp_path / "runs").glob("train-*/result.json")) - {by_grid}
    row, before = json.loads(again.read_text()), json.loads(by_grid.read_text())
    assert (row["trained_in"], row["dev_loss"]) == (by_grid.parent.name, before["dev_loss"])
    assert sum(row["document_targets"]) == 2 * sum(before["document_targets"])


def test_every_help_is_for_a_newcomer():
    overview = CliRunner().invoke(main, ["--help"]).output
    assert all(f"{code}  " in overview for code in EXIT_CODES) and "To begin:" in overview
    commands = re.findall(r"^  (\w+)  ", overview.partition("Commands:")[2].partition("To begin:")[0], re.M)
    assert set(commands) == set(main.list_commands(None))
    for command in commands:
        text = CliRunner().invoke(main, [command, "--help"]).output
        assert text.startswith(f"Usage: main {command}") and len(text.splitlines()[2]) > 20
        for option in main.get_command(None, command).params:
            assert option.param_type_name == "argument" or option.help, f"{command} {option.name} has no help"
