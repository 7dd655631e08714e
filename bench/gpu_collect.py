"""What a pass on a GPU brought back, put where the pages and the next pass find it: python bench/gpu_collect.py OUT

OUT is the folder that `bench/gpu_pass.sh` wrote. Into `data/results` go
- the tables of its grids, with the rows of earlier passes that they lack (`TABLES`);
- the rates of its report, one row each, as `speed.parquet`; rows of other passes stay;
- the results of all finished runs, as `gpu_runs.tar.gz`, some 4 kB a run: the next bundle has them, and its pass goes on where this one stopped.
Commit all of them. A rehearsal's tables are those of tiny runs: only its rates are taken.
"""
import argparse
import io
import json
import tarfile
from pathlib import Path

import pandas as pd

from ctxnb.batch.results import added_to
from ctxnb.paths import write_atomic

RESULTS = Path(__file__).resolve().parents[1] / "data/results"
# The runs of `limited.toml` on a GPU are beside those on a CPU.
TABLES = {"train": "train-standard", "measure_tokens": "measure_tokens-standard", "synthetic_transformer": "synthetic_transformer-standard", "limited": "limited_gpu-standard"}


def rows_of(report: dict) -> list[dict]:
    """Rates of one report; a step that measured nothing gives none."""
    about = {key: report.get(key) for key in ("device", "started", "rehearsal", "torch", "load")}
    rows = []

    def row(bench: str, way: str, rate: float, unit: str = "tokens/s", **more) -> None:
        rows.append(about | {"bench": bench, "way": way, "rate": rate, "unit": unit} | more)

    for step in report["steps"]:
        figures, name = step["figures"], step["name"].removeprefix("speed: ")
        if name == "ways":
            for r in figures.get("results", []):
                if "tokens_per_s" in r:
                    row(name, r["way"], r["tokens_per_s"], shape=r["shape"], runs=r.get("runs", 1), seeds=r.get("seeds", 1), first_s=r["first_s"], ratio=r.get("ratio_to_one"))
                else:
                    row(name, r["way"], None, shape=r["shape"], runs=r.get("runs", 1), seeds=r.get("seeds", 1), failed=r["failed"])
        if name == "published shape":
            for r in figures.get("results", []):
                for way in ("plain", "compiled", "ours"):
                    if rate := r.get(f"{way}_tokens_per_s"):
                        only_ours = {"utilisation": r.get("utilisation"), "peak_gib": r.get("peak_gib")} if way == "ours" else {}
                        row(name, way, rate, shape=r["shape"], context_length=r["l"], ratio=rate / r["ours_tokens_per_s"], **only_ours)
        if name == "measuring" and figures:
            row(name, "ours, float32", figures["tokens_per_s"], ratio=figures["time_ratio"])
            row(name, "ours, bfloat16", figures["bfloat16_tokens_per_s"], ratio=figures["bfloat16_time_ratio"])
        if name == "synthetic" and figures:
            row(name, "ours", figures["train_samples_per_s"], "samples/s", ratio=figures["epoch_ratio"])
            for key, rate in figures.items():
                if key.startswith(("replicas", "transformer")) and key.endswith("_samples_per_s"):
                    way = key.removesuffix("_samples_per_s")
                    row(name, way.replace("_", " "), rate, "samples/s", ratio=figures.get(f"{way}_ratio"))
    return rows


def add_rows(new: pd.DataFrame, file: Path, key: str) -> None:
    """Write a table with the rows of the one that is there, but those with the same `key` replaced."""
    table = added_to(file, new, key)
    table.to_parquet(file, index=False)
    print(f"{file}: {len(table)} rows")


def keep_runs(archive: Path, file: Path) -> None:
    """Add the JSON files of an archive of runs, which say all that makes a run finished, to those of earlier passes."""
    kept: dict[str, bytes] = {}
    for source in (file, archive):
        if source.is_file():
            with tarfile.open(source) as runs:
                kept |= {member.name: runs.extractfile(member).read() for member in runs if member.name.endswith(".json")}
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as runs:
        for name, text in sorted(kept.items()):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            runs.addfile(member, io.BytesIO(text))
    write_atomic(file, content.getvalue())
    print(f"{file}: {len(kept)} files, {file.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("-o", "--results", type=Path, default=RESULTS, help="folder of the tables")
    arguments = parser.parse_args()
    report = json.loads((arguments.out / "report.json").read_text())
    if rates := rows_of(report):
        add_rows(pd.DataFrame(rates), arguments.results / "speed.parquet", "started")
    if report["rehearsal"]:
        return
    for name, table in TABLES.items():
        if (file := arguments.out / f"{name}.parquet").is_file():
            add_rows(pd.read_parquet(file), arguments.results / f"{table}.parquet", "run")
    if (archive := arguments.out / "runs.tar.gz").is_file():
        keep_runs(archive, arguments.results / "gpu_runs.tar.gz")


if __name__ == "__main__":
    main()
