"""What a results table was made from, and whether that is still how things stand.

A table's rows name the code, the commit, the notebook and the data of their runs. Here they are compared with the
present notebook and code, and with the grid that asked for the runs; a result page says what comes of it.
"""

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

COLUMNS = ("code", "commit", "data", "notebook", "notebook_hash", "parameters_hash", "started")


def provenance(table: Path, root: Path) -> tuple[str, list[str]]:
    """What a table was made from, and what is wrong with that today.

    Args:
        table: results table in Parquet that `ctxnb results` wrote.
        root: the project's folder.

    Returns:
        A sentence, and complaints: runs made by other code, another version of their notebook or from other data,
        runs that the grid asks for and the table lacks. A table that is not of runs has neither.
    """
    if not set(COLUMNS) <= set(pq.read_schema(table).names):
        return "", []
    rows = pd.read_parquet(table, columns=list(COLUMNS))
    days = sorted({text[:10] for text in rows.started})
    made = f"{len(rows)} run{'s' * (len(rows) > 1)} of {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "")
    named = "; ".join(
        f"{column} {', '.join(f'`{value}`' for value in (rows[column].str[:12] if column == 'data' else rows[column]).unique())}"
        for column in ("notebook", "code", "commit", "data")
        if rows[column].astype(bool).any()
    )
    return f"{made}: {named}.", [*_stale(rows, root), *_against_grid(rows, table, root)]


def _stale(rows: pd.DataFrame, root: Path) -> list[str]:
    from ctxnb.batch.code import code_version  # not at the top: a site without runs does not need the runner
    from ctxnb.batch.grid import GridError, read_template

    complaints = []
    for notebook, part in rows.groupby("notebook"):
        try:
            template = read_template(root / notebook)
        except GridError as problem:
            complaints.append(f"their notebook cannot be read: {problem}")
            continue
        now = code_version(template.imports)
        other = {
            f"other code (now `{now}`)": (part.code != now).sum(),
            "another version of their notebook": (part.notebook_hash != template.code_hash).sum(),
        }
        complaints += [
            f"{number} of {len(part)} runs were made by {what}" for what, number in other.items() if number
        ]
    return complaints


def _against_grid(rows: pd.DataFrame, table: Path, root: Path) -> list[str]:
    """`<experiment>-<preset>.parquet` holds the runs of `data/grids/<preset>/<experiment>.toml`."""
    from ctxnb.batch.grid import GridError, read_grid, runs_of

    experiment, _, preset = table.stem.rpartition("-")
    grid = root / "data" / "grids" / preset / f"{experiment}.toml"
    if not grid.is_file():
        return []
    try:
        wanted = {run.parameters_hash: run.data for run in runs_of(read_grid(grid))}
    except OSError:  # it reads what lies on another machine, a model trained there for example
        return []
    except GridError as problem:
        return [f"their grid cannot be read: {problem}"]
    lacking = len(wanted.keys() - set(rows.parameters_hash))
    # data that are not prepared on this machine cannot be compared
    now = rows.parameters_hash.map(wanted).replace({"": None, "unprepared": None})
    changed = (now.notna() & (now != rows.data)).sum()
    return [f"{lacking} of {len(wanted)} runs of `{grid.relative_to(root)}` are missing"] * bool(lacking) + [
        f"{changed} of {len(rows)} runs were made from other data"
    ] * bool(changed)
