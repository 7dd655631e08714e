"""What passes measured about speed, as one tidy table: python bench/speed_table.py OUT/report.json [...] -o data/results/speed.parquet

A row is one rate on one device: of `bench_ways.py`, `bench_train.py`, `bench_measure.py` or `bench_synthetic.py`, as the report of a pass holds them. Rows of the
table that is there stay, but those of the same pass are replaced. `make gpu-collect` calls this.
"""
import argparse
import json
from pathlib import Path

import pandas as pd


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
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    table = pd.DataFrame([row for file in arguments.reports for row in rows_of(json.loads(file.read_text()))])
    if arguments.output.is_file():
        old = pd.read_parquet(arguments.output)
        table = pd.concat([old[~old.started.isin(table.started)], table], ignore_index=True)
    table.to_parquet(arguments.output, index=False)
    print(f"{arguments.output}: {len(table)} rates of {', '.join(sorted(table.device.unique()))}")


if __name__ == "__main__":
    main()
