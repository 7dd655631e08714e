"""ctxnb without its checkout: a wheel in a fresh environment, used from a folder of one's own. The packages it needs are those of this environment."""
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The command of a wheel that was built from a copy of the tree, and is alone in its environment."""
    folder = tmp_path_factory.mktemp("installed")
    copy = shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "results", "corpora", "tokens", "models", "site", "data/runs"))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, copy], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    packages = [path for path in sys.path if Path(path).name == "site-packages" or path == sysconfig.get_path("purelib")]
    (site / "packages.pth").write_text("\n".join(packages))
    shutil.rmtree(copy)
    return folder / "venv" / "bin" / "ctxnb"


def test_a_copied_grid_runs_in_a_folder_of_ones_own(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CTXNB_", "PYTHON"))}

    def ctxnb(*arguments) -> str:
        done = subprocess.run([installed, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert {"counts", "measure", "synthetic", "train"} <= {line.split()[0] for line in ctxnb("grids").splitlines()}
    ctxnb("grids", "counts", "synthetic")
    assert "missing" in ctxnb("plan", "synthetic.toml")
    one = ["counts.toml", "--only", "train_tokens=4000", "--only", "seed=0"]
    shown = ctxnb("run", *one)
    assert f"runs in {tmp_path}/data/runs" in shown and "1 done" in shown, shown
    ctxnb("results", *one, "-o", "t.csv")
    row = pd.read_csv(tmp_path / "t.csv").iloc[0]
    assert (row.notebook, row.commit) == ("nbs/runs/counts.ipynb", "unknown") and row.loss > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counts.toml", "data", "synthetic.toml", "t.csv"]
