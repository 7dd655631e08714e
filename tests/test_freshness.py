"""A results table is called stale where recipe, parameters or data differ from today's; other code is no reason."""

import re
import shutil
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from build import tables_of  # noqa: E402
from freshness import provenance  # noqa: E402

from ctxnb.batch.grid import read_grid  # noqa: E402
from ctxnb.batch.runs import UNPREPARED, runs_of  # noqa: E402

GRID = ROOT / "data/grids/quick/train.toml"


@pytest.fixture(scope="module")
def fresh() -> pd.DataFrame:
    """The rows that a run of the quick training grid would leave now, without its results."""
    return pd.DataFrame(
        run.parameters
        | dict(recipe=run.template.recipe, code="c0de", commit="0123456789ab", data=run.data, notebook=run.template.name,
               started="2026-11-24T00:00:00+00:00")
        for run in runs_of(read_grid(GRID))
    )


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the templates and the quick training grid."""
    shutil.copytree(ROOT / "nbs/runs", tmp_path / "nbs/runs")
    (tmp_path / "data/grids/quick").mkdir(parents=True)
    shutil.copy(GRID, tmp_path / "data/grids/quick")
    (tmp_path / "settings.ini").touch()
    return tmp_path


def complaints(rows: pd.DataFrame, folder: Path, root: Path = ROOT, page: str = "") -> list[str]:
    rows.to_parquet(folder / "train-quick.parquet")
    made_from, wrong = provenance(folder / "train-quick.parquet", root, page)
    assert made_from.startswith(f"{len(rows)} runs of 2026-11-24: notebook `nbs/runs/train.ipynb`; recipe ")
    return wrong


def edit_template(root: Path, change) -> None:
    notebook = nbformat.read(root / "nbs/runs/train.ipynb", 4)
    change({tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", [])})
    nbformat.write(notebook, root / "nbs/runs/train.ipynb")


def new_recipe(cells) -> None:
    cells["settings"].source = re.sub(r"recipe = (\d+)", lambda found: f"recipe = {int(found[1]) + 1}", cells["settings"].source)


def new_parameter(cells) -> None:
    """Without the settings class, which does not know it."""
    cells["settings"].source = "".join(re.findall(r"recipe = \d+", cells["settings"].source))
    cells["parameters"].source += "\nnew_parameter = 0.0  # added today"


def test_todays_grid_is_fresh_whatever_code_made_it(fresh, tmp_path):
    assert complaints(fresh.assign(code=[f"{i:012}" for i in range(len(fresh))]), tmp_path) == []


def test_a_parameter_added_with_a_default_makes_nothing_stale(fresh, project):
    edit_template(project, new_parameter)
    assert complaints(fresh, project, project) == []


def test_an_older_recipe_is_said_and_may_be_stated_by_the_page(fresh, project):
    then = fresh.recipe.iloc[0]
    edit_template(project, new_recipe)
    said = f"{len(fresh)} of {len(fresh)} runs were made with recipe {then}; today's is {then + 1}"
    assert complaints(fresh, project, project) == [said]
    assert complaints(fresh, project, project, page=f"These numbers are of recipe {then + 7}.") == [said]
    assert complaints(fresh, project, project, page=f"These numbers are of recipe {then}.") == []
    assert said in provenance(project / "train-quick.parquet", project, f"recipe {then}")[0]


@pytest.mark.parametrize("change, lacking", [
    (lambda rows: rows.iloc[:-4], 4),
    (lambda rows: rows.iloc[1:].assign(data="0"), 1),
    (lambda rows: rows.assign(width=rows.width + 1), None),
])
def test_what_differs_is_said(fresh, tmp_path, change, lacking):
    said = f"{lacking or len(fresh)} of {len(fresh)} runs of `data/grids/quick/train.toml` are missing"
    assert any(line.startswith(said) for line in complaints(change(fresh), tmp_path))


def test_a_grid_under_way_may_be_stated_by_the_page(fresh, tmp_path):
    part = fresh.iloc[:-4]
    said = f"4 of {len(fresh)} runs of `data/grids/quick/train.toml` are missing"
    assert complaints(part, tmp_path, page="These are the runs of one week.") == [said]
    assert complaints(part, tmp_path, page="This page shows the runs so far.") == []
    assert said in provenance(tmp_path / "train-quick.parquet", ROOT, "the runs so far")[0]


def test_other_data_are_said_where_they_can_be_compared(fresh, tmp_path):
    prepared = (fresh.data != UNPREPARED).all()
    wrong = complaints(fresh.assign(data="0" * 64), tmp_path)
    assert wrong == ([f"{len(fresh)} of {len(fresh)} runs were made from other data"] if prepared else [])


def test_the_page_says_what_was_repeated(fresh, tmp_path):
    fresh.to_parquet(tmp_path / "train-quick.parquet")
    (tmp_path / "verified.jsonl").write_text(
        '{"table": "train-quick.parquet", "date": "2026-11-25", "runs": ["train-1"], "of": 36, "recorded_code": ["c0de"], '
        '"code": "c0de", "hardware": "cpu", "loss": 2e-05, "column": "history_dev_loss", "absolute": 0.001}\n')
    said = "1 of 36 runs repeated on 2026-11-25 with code c0de: largest difference in the loss 2e-05 nats"
    assert said in provenance(tmp_path / "train-quick.parquet", ROOT)[0]


def test_a_table_that_is_not_of_runs_says_nothing(tmp_path):
    pd.DataFrame({"loss": [1.0]}).to_parquet(tmp_path / "other.parquet")
    assert provenance(tmp_path / "other.parquet", ROOT) == ("", [])


def test_a_grid_that_cannot_be_asked_is_no_crash(fresh, project):
    """A grid that reads a text of another machine is compared without it; one with a misspelled parameter is named."""
    grid = project / "data/grids/quick/train.toml"
    text = grid.read_text(encoding="utf-8")
    grid.write_text(text.replace('corpus = "sotu"', 'corpus = "not/here"'))
    fresh.assign(corpus="not/here").to_parquet(project / "train-quick.parquet")
    assert provenance(project / "train-quick.parquet", project)[1] == []
    grid.write_text(text.replace("layers = 2", "layer = 2"))
    assert "did you mean 'layers'" in provenance(project / "train-quick.parquet", project)[1][0]


@pytest.mark.parametrize("page", sorted([*(ROOT / "nbs/results").glob("*.ipynb"), ROOT / "nbs/about/claims.ipynb"]), ids=lambda page: page.stem)
def test_no_page_shows_a_stale_table(page):
    """Or one that lacks runs of its grid, where the page does not say so."""
    words = "\n".join(cell.source for cell in nbformat.read(page, 4).cells)
    assert {table.name: wrong for table in tables_of(page).values() if table.is_file() and (wrong := provenance(table, ROOT, words)[1])} == {}
