"""People's mistakes and other people's files: each ends in one line that names the thing, and destroys nothing.

Every case calls the command in this process, on a grid of a template that only the runner reads; runs are written as the runner writes them. What needs
real runs is in test_batch.py and test_faults.py.
"""

import csv
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxnb.batch.grid import read_grid
from ctxnb.batch.runs import runs_of
from ctxnb.cli import main
from ctxnb.text.tokens import token_store

WORDS = """
import hashlib, pathlib
class Data: pass
def other(corpus, build=False):
    data = Data()
    data.digest, data.prepared = "0" * 64, False
    return data
def words(corpus, build=False):
    file, data = pathlib.Path(corpus), Data()
    if not file.exists(): raise FileNotFoundError(f"corpus {corpus} does not exist")
    if not build and not pathlib.Path("prepared").exists(): return None
    pathlib.Path("prepared").touch()
    data.digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return data
"""


class Folder:
    """A grid of two runs on a text, and the command."""

    def __init__(self, path: Path):
        self.path, self.grid, self.runs = path, path / "g.toml", path / "runs"
        cells = [nbformat.v4.new_code_cell("corpus = 'text.txt'\nl = 8\nsizes = [1]\nskip_bad = 0.0", metadata={"tags": ["parameters"]}),
                 nbformat.v4.new_code_cell("from ctxnb.batch.record import record\nrecord({'loss': 1 / l})")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path / "w.ipynb")
        (path / "ctxnb_words.py").write_text(WORDS)
        (path / "text.txt").write_text("one two")
        self.write('data = "ctxnb_words:words"\n[axes]\nl = [4, 8]')

    def write(self, text: str) -> None:
        self.grid.write_text(f'notebook = "w.ipynb"\n{text}\n')

    def __call__(self, *arguments) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
        return result

    def on_grid(self, command: str, *more) -> Result:
        return self(command, self.grid, "--runs-dir", self.runs, *more)

    def launched(self) -> subprocess.CompletedProcess:
        """`ctxnb run` as a process of its own: a fork server keeps the environment of the first test that started one."""
        command = [sys.executable, "-m", "ctxnb", "run", self.grid, "--runs-dir", self.runs]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(self.path)})

    def finish(self) -> None:
        """Both runs, as the runner leaves them."""
        for run in runs_of(read_grid(self.grid), build=True):
            folder = self.runs / run.id
            folder.mkdir(parents=True)
            result = json.dumps({"loss": 1 / run.parameters["l"]})
            status = dict(run=run.id, state="done", notebook=run.template.name, recipe=1, data=run.data, code="c0de", commit="c", packages={}, seconds=1.0,
                          started="2026", peak_memory_mb=1.0, python="3", result_sha256=hashlib.sha256(result.encode()).hexdigest())
            for name, content in ("result.json", result), ("parameters.json", json.dumps(run.parameters)), ("status.json", json.dumps(status)):
                (folder / name).write_text(content)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CTXNB_TRUST", "ctxnb_words")
    monkeypatch.setenv("CTXNB_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("CTXNB_RUNS", raising=False)
    sys.modules.pop("ctxnb_words", None)
    return Folder(tmp_path)


@pytest.fixture
def finished(folder):
    folder.finish()
    return folder


# --- results outlive their text -------------------------------------------------------------------------


@pytest.mark.parametrize("happens", [
    lambda path: os.utime(path / "text.txt", (0, 0)),
    lambda path: (path / "text.txt").rename(path / "moved.txt"),
    lambda path: (path / "prepared").unlink(),
], ids=["touched", "gone", "store deleted"])
def test_results_of_finished_runs_outlive_their_text(finished, happens):
    happens(finished.path)
    assert "2 done" in finished.on_grid("status").output
    assert finished.on_grid("results", "-o", finished.path / "t.csv").exit_code == 0
    assert pd.read_csv(finished.path / "t.csv").loss.tolist() == [0.25, 0.125]


def test_another_text_is_another_result(finished):
    (finished.path / "text.txt").write_text("one two three")
    assert "2 stale" in (shown := finished.on_grid("status").output) and shown.count("made from other data") == 2


def test_a_copied_project_has_its_results(finished, tmp_path):
    copy = shutil.copytree(finished.path, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("elsewhere"))
    shown = finished("status", copy / "g.toml", "--runs-dir", copy / "runs").output
    assert "2 done" in shown and str(copy / "runs") in shown


def test_a_text_that_is_gone_is_refused_before_a_run(folder):
    (folder.path / "text.txt").unlink()
    for command in "plan", "run":
        refused = folder.on_grid(command)
        assert refused.exit_code == 2 and "text.txt" in refused.output, refused.output


def test_the_working_folder_plays_no_part(finished, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    shown = finished.on_grid("plan").output
    assert "2 done" in shown and f"relative paths start at {finished.path}" in shown


def test_a_run_refuses_other_data_than_planned(folder):
    (folder.path / "texts").mkdir()
    for number in range(40):
        (folder.path / "texts" / f"{number}.txt").write_text(f"document {number} " * 40)
    fixed = 'corpus = "texts"\ntrain_tokens = 500\nmax_context = 16\ncontext_lengths = [1, 2]\ntest_targets = 4'
    folder.grid.write_text(f'notebook = "nbs/runs/counts.ipynb"\ndata = "ctxnb_words:other"\n[parameters]\n{fixed}')
    shown = folder.launched()
    assert shown.returncode == 1 and "1 interrupted" in shown.stdout, shown.stderr
    digest = token_store(folder.path / "texts", build=False).digest
    assert f"opened data {digest[:12]}, planned were {'0' * 12}" in shown.stderr, shown.stderr


def test_plan_and_row_say_what_was_skipped_and_what_overlaps(folder):
    texts = [f"document {number} " * 20 + "the same words at the end of all " * 5 for number in range(60)] + [""]
    (folder.path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fixed = 'corpus = "texts.jsonl"\nskip_bad = 0.05\ntrain_tokens = 500\nmax_context = 16\ncontext_lengths = [1, 2]\ntest_targets = 4'
    folder.grid.write_text(f'notebook = "nbs/runs/counts.ipynb"\ndata = "ctxnb.text.tokens:token_store"\n[parameters]\n{fixed}')
    store = token_store(folder.path / "texts.jsonl", skip_bad=0.05)
    assert store.overlap > 0
    assert (shown := folder.launched()).returncode == 0, shown.stderr
    folder.on_grid("results", "-o", folder.path / "t.csv")
    row = pd.read_csv(folder.path / "t.csv").iloc[0]
    assert (row.skipped_documents, row.test_overlap, row.data_digest) == (1, store.overlap, store.digest)
    shutil.rmtree(folder.runs)
    shown = folder.on_grid("plan").output
    assert "1 bad documents skipped" in shown and "50-token passages occur in the training split" in shown, shown


# --- nothing is destroyed --------------------------------------------------------------------------------


def test_a_table_without_rows_replaces_nothing(finished):
    table = finished.path / "t.parquet"
    assert finished.on_grid("results", "-o", table).exit_code == 0
    before = table.read_bytes()
    shutil.rmtree(finished.runs)
    refused = finished.on_grid("results", "-o", table)
    assert refused.exit_code == 2 and "is kept" in refused.output and table.read_bytes() == before


def test_output_goes_through_links_and_devices(finished):
    link = finished.path / "link.csv"
    link.symlink_to(finished.path / "t.csv")
    assert finished.on_grid("results", "-o", link).exit_code == 0
    assert link.is_symlink() and len(pd.read_csv(finished.path / "t.csv")) == 2
    assert finished.on_grid("results", "-o", "/dev/null").exit_code == 0 and Path("/dev/null").is_char_device()


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"state": "done"}', '{"code": 3, "packages": [], "commit": null}'])
def test_an_odd_folder_stops_nothing(finished, content):
    first = sorted(finished.runs.iterdir())[0]
    (first / "status.json").write_text(content)
    for command, code in ("status", 0), ("plan", 0), ("results", 0), ("cancel", 0), ("wait", 3):
        shown = finished.on_grid(command)
        assert shown.exit_code == code, shown.output
    assert "1 done, 1 stale" in finished.on_grid("status").output
    (first / "status.json").unlink()
    (first / "result.json").write_text("[1]")
    assert "1 done, 1 stale" in finished.on_grid("status").output


# --- other people's files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["os:environ", "torch.hub:load", "ctxnb.paths", "ctxnb.batch.record:RESULT", ":", "ctxnb.nothing:f"])
def test_a_foreign_grid_runs_nothing(folder, data):
    folder.write(f'data = "{data}"')
    for command in "plan", "status", "results":
        refused = folder.on_grid(command)
        assert refused.exit_code == 2 and "data = " in refused.output and os.environ["PATH"] not in refused.output


@pytest.mark.parametrize("condition", [
    "@pd.io.common.os.system('touch {}')", "corpus.map(@Path('{}').write_text) > 0", "__import__('os').system('touch {}')", "0", "10**10**10", "l <"])
def test_a_condition_calls_nothing(finished, condition):
    mark = finished.path / "called"
    refused = finished.on_grid("results", "--where", condition.format(mark))
    assert refused.exit_code == 2 and "--where" in refused.output and not mark.exists()


def test_python_files_of_the_working_folder_are_not_run(tmp_path):
    for name in "json.py", "random.py", "torch.py":
        (tmp_path / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    cells = [nbformat.v4.new_code_cell("l = 8", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell("from ctxnb.batch.record import record\nrecord({'loss': 1 / l})")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "w.ipynb")
    (tmp_path / "g.toml").write_text('notebook = "w.ipynb"\n')
    command = [Path(sys.executable).with_name("ctxnb"), "run", "g.toml", "--runs-dir", "runs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not (tmp_path / "executed").exists(), done.stderr


# --- mistakes, each one line -------------------------------------------------------------------------------


@pytest.mark.parametrize("text, said", [
    ("parameters = 3", "expected a table"), ("axes = 3", "expected a table"), ("resources = [1]", "expected a table"),
    ("[axes]\nsizes = [[2026-01-01]]", "found a date"), ("[resources]\ntimeout_minutes = nan", "timeout_minutes = nan"),
    ("[resources]\nhours = inf", "hours = inf"), ("[resources]\nmemory_gb = 1e300", "at most"),
    ("[axes]\n" + "\n".join(f"{name} = {list(range(1000))}" for name in ("l",)) + "\ncorpus = " + str([str(i) for i in range(1000)]), "1,000,000 runs"),
])
def test_a_wrong_grid_is_refused(folder, text, said):
    folder.write(text)
    refused = folder.on_grid("plan")
    assert refused.exit_code == 2 and said in refused.output and "Traceback" not in refused.output


def test_a_grid_with_a_byte_order_mark_is_read(folder):
    folder.grid.write_bytes(b"\xef\xbb\xbf" + folder.grid.read_bytes())
    assert "2 missing" in folder.on_grid("plan").output


@pytest.mark.parametrize("output, said", [("t.xlsx", "expected an ending"), (".", "is a folder"), ("no/t.csv", "does not exist")])
def test_an_output_that_cannot_be_is_refused(finished, output, said, monkeypatch):
    monkeypatch.chdir(finished.path)
    refused = finished.on_grid("results", "-o", output)
    assert refused.exit_code == 2 and said in refused.output


def test_a_full_standard_output_is_one_line(finished):
    with open("/dev/full", "w") as full:
        command = [Path(sys.executable).with_name("ctxnb"), "results", finished.grid, "--runs-dir", finished.runs]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(finished.path)})
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_join_says_what_it_found(finished):
    (finished.path / "other.csv").write_text("l,entropy\n8,2.5\n16,3.5\n")
    shown = finished.on_grid("results", "--join", finished.path / "other.csv")
    assert "1 of 2 rows found a partner" in shown.output and "entropy" in shown.output


def test_run_ends_with_its_documented_codes(finished):
    assert finished.launched().returncode == 0
    first = sorted(finished.runs.iterdir())[0]
    shutil.rmtree(first)
    first.with_name(f"{first.name}.partial").touch()
    shown = finished.on_grid("run")
    assert shown.exit_code == 1 and "is a file where the run's folder should be" in shown.output


# --- whatever a file holds: no traceback ---------------------------------------------------------------------

VALUES = st.recursive(st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=8)), lambda each: st.lists(each, max_size=3), max_leaves=4)
TOML = st.dictionaries(st.sampled_from(["notebook", "data", "parameters", "axes", "resources", "other"]),
                       st.one_of(VALUES, st.dictionaries(st.sampled_from(["l", "sizes", "corpus", "workers", "hours", "setup"]), VALUES, max_size=3)), max_size=4)


def toml(content: dict) -> str:
    def value(item) -> str:
        if isinstance(item, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {value(v)}" for k, v in item.items()) + "}"
        return "[" + ", ".join(map(value, item)) + "]" if isinstance(item, list) else json.dumps(item).replace("NaN", "nan").replace("Infinity", "inf")
    return "\n".join(f"{name} = {value(item)}" for name, item in content.items())


FUZZ = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@settings(max_examples=1000, **FUZZ)
@given(content=TOML, known=st.booleans(), tail=st.text(max_size=3))
def test_any_grid_file_gives_a_plan_or_one_line(tmp_path_factory, content, known, tail):
    folder = fuzzed(tmp_path_factory)
    text = toml(content | {"notebook": "w.ipynb"} if known else content)
    folder.grid.write_text(text + tail, encoding="utf-8", errors="replace")
    assert folder.on_grid("plan").exit_code in (0, 2)


@settings(max_examples=350, **FUZZ)
@given(status=st.one_of(st.binary(max_size=20), st.dictionaries(
    st.sampled_from(["run", "state", "code", "commit", "packages", "seconds", "result_sha256", "started", "job", "recipe", "exception"]), VALUES)),
    result=st.one_of(st.binary(max_size=20), st.dictionaries(st.text(max_size=4), VALUES)), partial=st.booleans())
def test_any_status_and_result_are_looked_at(tmp_path_factory, status, result, partial):
    folder = fuzzed(tmp_path_factory)
    folder.write("[axes]\nl = [4, 8]")
    run = runs_of(read_grid(folder.grid))[0]
    place = folder.runs / (run.id + ".partial" * partial)
    place.mkdir(parents=True, exist_ok=True)
    for name, content in ("status.json", status), ("result.json", result):
        (place / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    for command in "status", "results", "logs":
        shown = folder.on_grid(command) if command != "logs" else folder("logs", run.id, "--runs-dir", folder.runs)
        assert shown.exit_code in (0, 1, 2, 3), shown.output
    shutil.rmtree(folder.runs)


LINES = st.lists(st.one_of(st.binary(max_size=30), st.text(max_size=20).map(str.encode), st.text(max_size=20).map(lambda text: json.dumps({"text": text}).encode()),
                           VALUES.map(lambda value: json.dumps({"text": value}).encode())), max_size=6)


@settings(max_examples=325, **FUZZ)
@given(lines=LINES, ending=st.sampled_from([".txt", ".jsonl", ".TXT", ".jsonl.gz", ".txt.zst", ".parquet", ".csv"]), folder_of=st.booleans(),
       packed=st.booleans(), skip_bad=st.sampled_from([0.0, 0.5]))
def test_any_corpus_is_read_or_refused(tmp_path_factory, lines, ending, folder_of, packed, skip_bad):
    """`script` prepares the data and starts nothing."""
    folder = fuzzed(tmp_path_factory)
    shutil.rmtree(place := folder.path / "corpus", ignore_errors=True)
    place.mkdir()
    content = b"\n".join(lines)
    (place / f"a{ending}").write_bytes(gzip.compress(content) if packed and ending.endswith(".gz") else content)
    for number in range(20 if folder_of else 0):
        (place / f"{number}.txt").write_text(f"document {number}")
    corpus = f"corpus{'' if folder_of else f'/a{ending}'}"
    folder.write(f'data = "ctxnb.text.tokens:token_store"\n[parameters]\ncorpus = "{corpus}"\nskip_bad = {skip_bad}\n[axes]\nl = [4, 8]')
    shown = folder.on_grid("script")
    assert shown.exit_code in (0, 2), shown.output
    shutil.rmtree(folder.path / "data", ignore_errors=True)


CELLS = st.one_of(st.integers(-2, 2**40), st.floats(), st.text(max_size=4), st.sampled_from(["", "4", "8", "16000", "0.5", "nan"]))
WHOLE = ["context_length", "train_tokens", "seed", "loss", "l", "run", "document_loss"]
HEADER = st.one_of(st.just(WHOLE), st.just(WHOLE[:5]), st.lists(st.sampled_from(WHOLE), max_size=7))


@settings(max_examples=325, **FUZZ)
@given(content=st.one_of(st.binary(max_size=40), st.tuples(HEADER, st.lists(st.lists(CELLS, min_size=5, max_size=7), max_size=4))), command=st.booleans())
def test_any_table_is_read_or_refused(tmp_path_factory, content, command):
    folder = fuzzed(tmp_path_factory)
    file = folder.path / "t.csv"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        with file.open("w", newline="", encoding="utf-8", errors="replace") as out:
            csv.writer(out).writerows([content[0], *content[1]])
    if command:
        shown = folder("best", file)
    else:
        folder.write("[axes]\nl = [4, 8]")
        if not any(folder.runs.glob("w-*/status.json")):
            folder.finish()
        shown = folder.on_grid("results", "--join", file, "--on", "l")
    assert shown.exit_code in (0, 2, 3), shown.output


_FUZZED: list[Folder] = []


def fuzzed(tmp_path_factory) -> Folder:
    if not _FUZZED:
        _FUZZED.append(Folder(tmp_path_factory.mktemp("fuzz")))
    return _FUZZED[0]
