"""What a pass on a GPU decides and keeps: benches and the speed table are scripts, read here as modules."""
import importlib.util
import json
import sys
from pathlib import Path

import pandas as pd

BENCH = Path(__file__).resolve().parents[1] / "bench"


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


def test_the_grid_takes_the_fastest_way_that_is_proven():
    choose = script("gpu_pass").fastest_way
    assert choose(ROWS, []) == "compile+graph"
    assert choose(ROWS, ["test_compiled_gives_the_losses_of_eager"]) == "graph"
    assert choose(ROWS, ["test_graph_gives_the_losses_of_eager[0.2-inside]"]) == "eager"
    assert choose(ROWS, ["test_graph_gives_the_losses_of_eager[0.2-masked]"]) == "compile+graph"
    assert choose([], []) == "eager"


def test_the_speed_table_grows_by_pass_and_keeps_failures(tmp_path, monkeypatch):
    table = script("speed_table")
    lengths = [{"shape": "published", "l": 1024, "plain_tokens_per_s": 2.0, "ours_tokens_per_s": 4.0, "utilisation": 0.4, "peak_gib": 9.0}]
    steps = [{"name": "speed: ways", "figures": {"results": ROWS}}, {"name": "speed: published shape", "figures": {"results": lengths}}]
    steps += [{"name": "speed: measuring", "figures": {}}, {"name": "correctness", "figures": {"passed": 3}}]
    for started, device in (("1", "A"), ("2", "B"), ("2", "B")):
        report = tmp_path / "report.json"
        report.write_text(json.dumps({"device": device, "started": started, "steps": steps}))
        monkeypatch.setattr(sys, "argv", ["speed_table.py", str(report), "-o", str(tmp_path / "speed.parquet")])
        table.main()
    rows = pd.read_parquet(tmp_path / "speed.parquet")
    assert rows.groupby("device").size().to_dict() == {"A": 7, "B": 7}
    assert rows.failed.dropna().tolist() == ["first loss 9.1, eager 9.0"] * 2
    assert rows.query("way == 'plain'").ratio.tolist() == [0.5, 0.5]
