"""What a pass on a GPU decides and keeps: its scripts are read here as modules."""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"


def script(name: str):
    """A script of `bench/` as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


ROWS = [
    {"shape": "14 M", "way": "eager", "tokens_per_s": 1e6, "first_s": 2.0, "run_s": 16.0},
    {"shape": "14 M", "way": "graph", "tokens_per_s": 3e6, "first_s": 3.0, "run_s": 8.0},
    {"shape": "14 M", "way": "compile+graph", "tokens_per_s": 4e6, "first_s": 1.0, "run_s": 6.0},
    {"shape": "14 M", "way": "compile", "failed": "first loss 9.1, eager 9.0"},
    {"shape": "14 M", "way": "batched", "seeds": 4, "tokens_per_s": 5e6, "first_s": 2.0},
]


PYTEST = """
tests/test_gpu.py::test_compiled_gives_the_losses_of_eager PASSED        [  9%]
[gw2] [ 12%] FAILED tests/test_gpu.py::test_graph_gives_the_losses_of_eager[0.2-masked]
[gw0] [ 15%] PASSED tests/test_gpu.py::test_graph_gives_the_losses_of_eager[0.2-inside]
tests/test_gpu.py::test_a_process_group_of_one SKIPPED (no GPU)          [ 18%]
FAILED tests/test_gpu.py::test_graph_gives_the_losses_of_eager[0.2-masked] - assert 1 == 2
"""


def test_the_grid_takes_the_fastest_way_that_is_proven():
    run = script("gpu_pass")
    verdicts = run.test_verdicts(PYTEST)
    assert list(verdicts.values()) == ["PASSED", "FAILED", "PASSED", "SKIPPED"]
    assert run.proven_ways(verdicts) == {"eager", "compile", "graph"}
    assert run.proven_ways(verdicts | {"test_graph_gives_the_losses_of_eager[0.0-inside]": "FAILED"}) == {"eager", "compile"}
    assert run.proven_ways(verdicts | {"test_compiled_blocks_in_a_graph_give_the_losses_of_eager": "PASSED"}) == {"eager", "compile", "graph", "compile+graph"}
    assert run.proven_ways({}) == {"eager"}
    assert run.fastest_way(ROWS, {"eager", "compile", "graph", "compile+graph"}) == "compile+graph"
    assert run.fastest_way(ROWS, {"eager", "compile", "graph"}) == "graph"
    assert run.fastest_way(ROWS, {"eager", "compile"}) == run.fastest_way([], {"eager", "graph"}) == "eager"


def collect(monkeypatch, out: Path, results: Path, rehearsal: bool = False, **report) -> None:
    """Collect a pass with this report."""
    (out / "report.json").write_text(json.dumps({"rehearsal": rehearsal, "steps": []} | report))
    monkeypatch.setattr(sys, "argv", ["gpu_collect.py", str(out), "-o", str(results)])
    script("gpu_collect").main()


def test_the_speed_table_grows_by_pass_and_keeps_failures(tmp_path, monkeypatch):
    lengths = [{"shape": "published", "l": 1024, "plain_tokens_per_s": 2.0, "ours_tokens_per_s": 4.0, "utilisation": 0.4, "peak_gib": 9.0}]
    steps = [{"name": "speed: ways", "figures": {"results": ROWS}}, {"name": "speed: published shape", "figures": {"results": lengths}}]
    steps += [{"name": "speed: measuring", "figures": {}}, {"name": "correctness", "figures": {"passed": 3}}]
    for started, device in (("1", "A"), ("2", "B"), ("2", "B")):
        collect(monkeypatch, tmp_path, tmp_path, device=device, started=started, steps=steps)
    rows = pd.read_parquet(tmp_path / "speed.parquet")
    assert rows.groupby("device").size().to_dict() == {"A": 7, "B": 7}
    assert rows.failed.dropna().tolist() == ["first loss 9.1, eager 9.0"] * 2
    assert rows.query("way == 'plain'").ratio.tolist() == [0.5, 0.5]


def test_a_table_keeps_the_rows_of_earlier_passes(tmp_path, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    for number, runs in enumerate(({"a": 1.0, "b": 2.0}, {"b": 2.5, "c": 3.0})):
        out = tmp_path / str(number)
        out.mkdir()
        pd.DataFrame({"run": runs.keys(), "loss": runs.values()}).to_parquet(out / "train.parquet")
        with tarfile.open(out / "runs.tar.gz", "w:gz") as archive:
            archive.add(out / "train.parquet", f"train-{number}/notebook.ipynb")
            archive.add(__file__, f"train-{number}/result.json")
        collect(monkeypatch, out, results, rehearsal=True)
        assert number or not list(results.iterdir())
        collect(monkeypatch, out, results)
    assert pd.read_parquet(results / "train-standard.parquet").set_index("run").loss.to_dict() == {"a": 1.0, "b": 2.5, "c": 3.0}
    with tarfile.open(results / "gpu_runs.tar.gz") as kept:
        assert kept.getnames() == ["train-0/result.json", "train-1/result.json"]
        assert kept.extractfile("train-1/result.json").read() == Path(__file__).read_bytes()


def bare_copy(folder: Path) -> Path:
    """The project as a bare machine has it: what git tracks."""
    for name in subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and not name.startswith(("data/results/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
def test_a_bare_machine_finds_what_the_bundle_holds(tmp_path):
    """One copy of the project has a text and makes the bundle, the other has the grid alone, and goes on where an earlier pass stopped."""
    home, bare, bundle, out = (tmp_path / name for name in ("home", "bare", "bundle", "out"))
    for copy in (bare_copy(home), bare_copy(bare)):
        for name in ("corpora", "results"):
            (copy / "data" / name).mkdir()
        corpus = copy / "data/corpora/words.jsonl"
        grid = script("gpu_pass").small_grid(copy / "data/grids/tiny", corpus)
        grid.write_text(grid.read_text().replace(str(corpus), "data/corpora/words.jsonl").replace("seed = [0, 1]", "seed = [0]"))
    corpus.unlink()
    plain = {name: value for name, value in os.environ.items() if not name.startswith("CTXNB_")} | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def do(copy: Path, *command) -> None:
        done = subprocess.run([*map(str, command)], cwd=copy, env=plain | {"PYTHONPATH": str(copy)}, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr

    for seconds in ("fresh", "resumed"):
        do(home, sys.executable, "bench/gpu_bundle.py", bundle, "--no-wheels", "--grid", "data/grids/tiny/train.toml")
        do(bare, "bash", "bench/gpu_pass.sh", bundle, out / seconds, 300, "--only=science", "--grid=data/grids/tiny/train.toml")
        (step,) = json.loads((out / seconds / "report.json").read_text())["steps"][:1]
        assert (step["verdict"], step["figures"]["runs in the table"]) == ("passed", 4)
        do(home, sys.executable, "bench/gpu_collect.py", out / seconds)
    runs = [pd.read_parquet(out / seconds / "train.parquet")[["run", "started"]] for seconds in ("fresh", "resumed")]
    assert runs[0].equals(runs[1])  # none was made anew


@pytest.mark.slow
def test_every_step_of_the_pass_works_at_tiny_sizes():
    done = subprocess.run(["make", "gpu-rehearsal"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_pass_that_trained_nothing_has_no_model_to_measure(tmp_path, monkeypatch):
    take = script("gpu_pass")
    run = take.Pass(tmp_path, tmp_path, 0.0, rehearse=True, grid=tmp_path)
    assert not take.take_largest_model(run)
    pd.DataFrame([]).to_parquet(tmp_path / "train.parquet")  # as `ctxnb results` writes a table without rows
    assert not take.take_largest_model(run)
    largest = {"train_tokens": 4000, "context_length": 16, "seed": 0}
    pd.DataFrame([{"run": "small"} | largest | {"context_length": 4}, {"run": "large"} | largest]).to_parquet(tmp_path / "train.parquet")
    monkeypatch.setenv("CTXNB_RUNS", str(tmp_path / "runs"))
    for name in ("small", "large"):
        (tmp_path / "runs" / name / "model").mkdir(parents=True)
        (tmp_path / "runs" / name / "model" / name).touch()
    assert take.take_largest_model(run) and [file.name for file in run.model.iterdir()] == ["large"]
