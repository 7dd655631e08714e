"""What a bare GPU machine lacks, in one folder: wheels for its Python, and the data of the grids, ready made.

Run `make gpu-bundle` (that is `python bench/gpu_bundle.py gpu-bundle`) where there is a network; carry the folder and the project to the GPU;
there run `bash bench/gpu_pass.sh gpu-bundle OUT`. The machine is taken to have PyTorch for CUDA, transformers and the other packages of `THERE`
with all that they need; everything else that the runner imports travels as a wheel. Data are the corpus and the token store of a grid, and the runs that earlier
passes finished (`bench/gpu_collect.py`), so that a pass goes on where the last one stopped. The later grids of a pass read the same corpus in other tokens, which
would bring the bundle above its 50 MB (14 MB for `limited.toml`); they are made there, in seconds on 16 cores.
"""
import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from ctxnb.batch.grid import Grid, read_grid
from ctxnb.batch.runs import DataSource
from ctxnb.paths import data_dir

ROOT = Path(__file__).resolve().parents[1]
GRID = ROOT / "data/grids/standard/train.toml"
RUNS = ROOT / "data/results/gpu_runs.tar.gz"  # of earlier passes
THERE = ("torch", "transformers", "numpy", "pandas", "pyarrow", "tiktoken", "tokenizers", "safetensors", "scipy", "scikit-learn", "matplotlib", "psutil")
NEEDED = ("papermill", "execnb", "fastcore", "pebble", "nbformat", "filelock", "click", "tqdm", "pytest", "pytest-xdist")  # with all that they need in turn
ALONE = ("accelerate",)  # what it needs is there, and would bring PyTorch's libraries along
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
MOST_MB = 50


def plain(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names: tuple[str, ...]) -> set[str]:
    """Packages and all that they need, by what is installed here."""
    seen: set[str] = set()
    queue = [plain(name) for name in names]
    while queue:
        if (name := queue.pop()) in seen:
            continue
        seen.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        queue += [plain(match[0]) for need in needs if "extra ==" not in need and (match := re.match(r"[\w.-]+", need))]
    return seen


def fetch_wheels(folder: Path, python: str) -> None:
    """Download the wheels of `NEEDED` at the lock file's versions, and drop those that are there."""
    lock = folder.with_name("constraints.txt")
    lock.write_text("".join(line for line in (ROOT / "requirements.lock").read_text().splitlines(keepends=True) if not line.startswith(("#", "torch="))))
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    download = [sys.executable, "-m", "pip", "download", "-q", "-d", folder, "-c", lock, "--only-binary=:all:", "--python-version", python, *platforms]
    subprocess.run([*download, *NEEDED], check=True)
    subprocess.run([*download, "--no-deps", *ALONE], check=True)
    lock.unlink()
    there = closure(THERE)
    for wheel in folder.glob("*.whl"):
        if plain(wheel.name.split("-")[0]) in there:
            wheel.unlink()


def prepare_data(grid: Grid) -> list[Path]:
    """Build the token store that a grid reads, where it is not there; the files and folders that it reads."""
    parameters = grid.template.defaults | grid.parameters
    store = DataSource(grid.data_source, ROOT).open(parameters, build=True)
    corpus = ROOT / str(parameters["corpus"])
    found = [Path(store.folder), *(file for file in (corpus, corpus.with_suffix(".json")) if file.is_file())]
    if outside := [path for path in found if not path.is_relative_to(data_dir())]:
        raise SystemExit(f"outside the data folder {data_dir()}: {', '.join(map(str, outside))}")
    return found


def pack(archive: Path, grid: Grid) -> None:
    """Write what a grid reads as an archive to be unpacked in a project."""
    with tarfile.open(archive, "w:xz", preset=1) as file:
        for path in prepare_data(grid):
            file.add(path, Path("data") / path.relative_to(data_dir()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--grid", type=Path, default=GRID, help="what the pass trains; the standard grid on tokens when not given")
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    parser.add_argument("--no-wheels", action="store_true", help="for a rehearsal in this environment, which has all packages")
    parser.add_argument("--no-data", action="store_true", help="for a rehearsal, which makes its own small data")
    arguments = parser.parse_args()
    folder, grid = arguments.folder.resolve(), arguments.grid.resolve()
    os.chdir(ROOT)
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    if not arguments.no_wheels:
        fetch_wheels(wheels, arguments.python)
    if not arguments.no_data:
        pack(folder / "data.tar.xz", read_grid(grid))
        if RUNS.is_file():
            shutil.copy(RUNS, folder / "runs.tar.gz")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    print(f"{folder}: {len(list(wheels.glob('*.whl')))} wheels for Python {arguments.python}, {size:.1f} MB in all")
    if size > MOST_MB:
        raise SystemExit(f"more than {MOST_MB} MB")


if __name__ == "__main__":
    main()
