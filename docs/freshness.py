"""What a results table was made from, and whether it agrees with today's recipe, parameters and data.

A result is valid by recipe, parameters and data; the code that made it is named, and whether today's code repeats it is measured by `ctxnb verify`. A table of
an older recipe may be shown as what it is: where the page says "recipe 1" in its text, that it was made with recipe 1 is information, not a complaint.
So are the missing runs of a grid under way, where the page says that it shows "the runs so far".
"""

import re
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

COLUMNS = ("recipe", "code", "commit", "data", "notebook", "started")


def provenance(table: Path, root: Path, page: str = "") -> tuple[str, list[str]]:
    """What a table was made from, and what is wrong with that today.

    Args:
        table: results table in Parquet that `ctxnb results` wrote.
        root: the project's folder.
        page: text of the page that shows the table.

    Returns:
        Sentences, and complaints: rows of an older recipe that the page does not state, or made from other data, and runs
        that the grid asks for and the table lacks. A table that is not of runs has neither.
    """
    if not set(COLUMNS) <= set(pq.read_schema(table).names):
        return "", []
    from ctxnb.batch.verify import verifications  # not at the top: a site without runs does not need the runner

    rows = pd.read_parquet(table)
    days = sorted({text[:10] for text in rows.started})
    made = f"{len(rows)} run{'s' * (len(rows) > 1)} of {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "")
    named = "; ".join(
        f"{column} {', '.join(f'`{value}`' for value in (rows[column].str[:12] if column == 'data' else rows[column]).unique())}"
        for column in ("notebook", "recipe", "code", "commit", "data")
        if rows[column].astype(bool).any()
    )
    older, stated = _older_recipe(rows, root, page)
    again = verifications(table)
    missing, changed = ("", []) if older or stated else _against_grid(rows, table, root)
    under_way = "the runs so far" in page
    notes = [f"{made}: {named}", *stated, *([missing] if missing and under_way else []), *([str(again[-1])] if again else [])]
    return f"{'. '.join(notes)}.", older or [missing] * bool(missing and not under_way) + changed


def _older_recipe(rows: pd.DataFrame, root: Path, page: str) -> tuple[list[str], list[str]]:
    """Rows of an older recipe: those that the page does not state, and those that it does."""
    from ctxnb.batch.template import GridError, read_template

    complaints, stated = [], []
    for (notebook, recipe), part in rows.groupby(["notebook", "recipe"]):
        try:
            now = read_template(root / notebook).recipe
        except GridError as problem:
            complaints.append(f"their notebook cannot be read: {problem}")
            continue
        if recipe != now:
            known = re.search(rf"\brecipe\s+{recipe}\b", page)
            (stated if known else complaints).append(f"{len(part)} of {len(rows)} runs were made with recipe {recipe}; today's is {now}")
    return complaints, stated


def _against_grid(rows: pd.DataFrame, table: Path, root: Path) -> tuple[str, list[str]]:
    """What is missing of the runs of `data/grids/<preset>/<experiment>.toml`, which `<experiment>-<preset>.parquet` holds, and complaints."""
    from ctxnb.batch.grid import read_grid
    from ctxnb.batch.results import row_parameters
    from ctxnb.batch.runs import UNPREPARED, DataSource
    from ctxnb.batch.template import GridError, digest

    experiment, _, preset = table.stem.rpartition("-")
    file = root / "data" / "grids" / preset / f"{experiment}.toml"
    if not file.is_file():
        return "", []
    try:
        grid = read_grid(file)
    except GridError as problem:
        return "", [f"their grid cannot be read: {problem}"]
    made = {digest(row_parameters(row, grid.template)): row["data"] for row in rows.to_dict("records")}
    source, cells = DataSource(grid.data_source, grid.base), list(grid.cells())
    lacking = sum(digest(cell) not in made for cell in cells)
    # data that are not prepared on this machine cannot be compared
    pairs = [(made[key], source.digest(cell)) for cell in cells if (key := digest(cell)) in made]
    changed = sum(today not in ("", UNPREPARED) and today != then for then, today in pairs)
    missing = f"{lacking} of {len(cells)} runs of `{file.relative_to(root)}` are missing" if lacking else ""
    return missing, [f"{changed} of {len(rows)} runs were made from other data"] * bool(changed)
