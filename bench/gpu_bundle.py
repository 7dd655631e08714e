"""What a bare GPU machine lacks, in one folder: wheels for its Python, and the data of the grids, ready made.

Run `make gpu-bundle` (that is `python bench/gpu_bundle.py gpu-bundle`) where there is a network; carry the folder and the project to the GPU;
there run `bash bench/gpu_pass.sh gpu-bundle OUT`. The machine is taken to have PyTorch for CUDA, transformers and the other packages of `THERE`
with all that they need; everything else that the runner imports travels as a wheel. Data are the corpora and token stores that `GRIDS` name,
in one archive with their times, and the runs of `data/grids/standard/train.toml` that earlier passes finished, so that a pass goes on where the last one stopped.
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

ROOT = Path(__file__).resolve().parents[1]
GRIDS = ("data/grids/standard/train.toml",)
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


def prepare_data(grids: tuple[str, ...]) -> list[Path]:
    """Build what the grids read, where it is not there; the files and folders that they read."""
    from ctxnb.batch.grid import read_grid
    from ctxnb.batch.runs import DataSource
    from ctxnb.paths import data_dir

    found = []
    for name in grids:
        grid = read_grid(ROOT / name)
        parameters = grid.template.defaults | grid.parameters
        store = DataSource(grid.data_source, ROOT).open(parameters, build=True)
        found.append(Path(store.folder))
        corpus = ROOT / str(parameters["corpus"])
        found += [file for file in (corpus, corpus.with_suffix(".json")) if file.is_file()]
    outside = [path for path in found if not path.is_relative_to(data_dir())]
    if outside:
        raise SystemExit(f"outside the data folder {data_dir()}: {', '.join(map(str, outside))}")
    return sorted(set(found))


def earlier_runs(grids: tuple[str, ...]) -> list[Path]:
    """Small files of the finished runs of these grids."""
    from ctxnb.batch.grid import read_grid
    from ctxnb.batch.launch import plan
    from ctxnb.paths import runs_dir

    folders = [state.folder for name in grids for state in plan(read_grid(ROOT / name), runs_dir()).states if state.state == "done"]
    return [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix in (".json", ".ipynb", ".log")]


def pack(folder: Path, grids: tuple[str, ...]) -> None:
    """Write `data.tar.xz`: data and finished runs below `data/` and `runs/`."""
    from ctxnb.paths import data_dir, runs_dir

    with tarfile.open(folder / "data.tar.xz", "w:xz", preset=1) as archive:
        for path in prepare_data(grids):
            archive.add(path, Path("data") / path.relative_to(data_dir()))
        for path in earlier_runs(grids):
            archive.add(path, Path("runs") / path.relative_to(runs_dir()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    parser.add_argument("--no-wheels", action="store_true", help="for a rehearsal in this environment, which has all packages")
    parser.add_argument("--no-data", action="store_true", help="for a rehearsal, which makes its own small data")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    shutil.rmtree(arguments.folder, ignore_errors=True)
    wheels = arguments.folder / "wheels"
    wheels.mkdir(parents=True)
    if not arguments.no_wheels:
        fetch_wheels(wheels, arguments.python)
    if not arguments.no_data:
        pack(arguments.folder, GRIDS)
    size = sum(file.stat().st_size for file in arguments.folder.rglob("*") if file.is_file()) / 1e6
    print(f"{arguments.folder}: {len(list(wheels.glob('*.whl')))} wheels for Python {arguments.python}, {size:.1f} MB in all")
    if size > MOST_MB:
        raise SystemExit(f"more than {MOST_MB} MB")


if __name__ == "__main__":
    main()
