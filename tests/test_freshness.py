"""A results table that no longer is what the code, the notebook, the data or the grid would give is called so."""

import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from freshness import provenance  # noqa: E402

from ctxnb.batch.code import code_version  # noqa: E402
from ctxnb.batch.grid import read_grid, runs_of  # noqa: E402

GRID = ROOT / "data/grids/quick/train.toml"


@pytest.fixture(scope="module")
def fresh() -> pd.DataFrame:
    """The rows that a run of the quick training grid would leave now, without its results."""
    grid = read_grid(GRID)
    return pd.DataFrame(
        dict(
            code=code_version(grid.template.imports), commit="0123456789ab", data=run.data, notebook=run.notebook_name,
            notebook_hash=run.notebook_hash, parameters_hash=run.parameters_hash, started="2026-11-24T00:00:00+00:00",
        )
        for run in runs_of(grid)
    )


def complaints(rows: pd.DataFrame, folder: Path) -> list[str]:
    rows.to_parquet(folder / "train-quick.parquet")
    made_from, wrong = provenance(folder / "train-quick.parquet", ROOT)
    assert made_from.startswith(f"{len(rows)} runs of 2026-11-24: notebook `nbs/runs/train.ipynb`; code ")
    return wrong


def test_what_the_code_gives_now_is_fresh(fresh, tmp_path):
    assert complaints(fresh, tmp_path) == []


@pytest.mark.parametrize("change, said", [
    (lambda rows: rows.assign(code=["0" * 12] * 5 + rows.code.tolist()[5:]), "5 of 36 runs were made by other code"),
    (lambda rows: rows.assign(notebook_hash="0"), "36 of 36 runs were made by another version of their notebook"),
    (lambda rows: rows.iloc[:-4], "4 of 36 runs of `data/grids/quick/train.toml` are missing"),
    (lambda rows: rows.iloc[1:].assign(data="0"), "1 of 36 runs of `data/grids/quick/train.toml` are missing"),
])
def test_what_differs_is_said(fresh, tmp_path, change, said):
    assert any(line.startswith(said) for line in complaints(change(fresh), tmp_path))


def test_other_data_are_said_where_they_can_be_compared(fresh, tmp_path):
    prepared = (fresh.data != "unprepared").all()
    wrong = complaints(fresh.assign(data="0" * 64), tmp_path)
    assert wrong == (["36 of 36 runs were made from other data"] if prepared else [])


def test_a_table_that_is_not_of_runs_says_nothing(tmp_path):
    pd.DataFrame({"loss": [1.0]}).to_parquet(tmp_path / "other.parquet")
    assert provenance(tmp_path / "other.parquet", ROOT) == ("", [])


def test_a_grid_that_cannot_be_asked_is_no_crash(fresh, tmp_path):
    """A grid that reads a model of another machine is not compared; one with a misspelled parameter is named."""
    grid = tmp_path / "data/grids/quick/train.toml"
    grid.parent.mkdir(parents=True)
    shutil.copytree(ROOT / "nbs/runs", tmp_path / "nbs/runs")
    text = GRID.read_text(encoding="utf-8")
    fresh.to_parquet(tmp_path / "train-quick.parquet")
    (tmp_path / "settings.ini").touch()
    grid.write_text(text.replace('corpus = "sotu"', 'corpus = "not/here"'))
    assert provenance(tmp_path / "train-quick.parquet", tmp_path)[1] == []
    grid.write_text(text.replace("layers = 2", "layer = 2"))
    assert "did you mean 'layers'" in provenance(tmp_path / "train-quick.parquet", tmp_path)[1][0]
