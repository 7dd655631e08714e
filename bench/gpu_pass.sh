#!/usr/bin/env bash
# bash bench/gpu_pass.sh BUNDLE OUT [SECONDS] [--rehearse] [--only=correctness|speed|science|others] [--grid=FILE]
#
# Everything that this project does on CUDA, proven, timed and begun, in SECONDS (570) on one GPU without a network. BUNDLE is the folder that
# `make gpu-bundle` made; results go into OUT as they come: report.md says what happened, report.json holds its figures. --rehearse does the same
# on a CPU with tiny sizes. The steps are in bench/gpu_pass.py; here an environment is made for them: the machine's packages, and behind them the
# bundle's. The bundle's texts go into the project's `data`, where grids look for them; everything else is written under OUT or a temporary folder.
set -euo pipefail
began=$(date +%s)
options=()
words=()
for word in "$@"; do case "$word" in --*) options+=("$word") ;; *) words+=("$word") ;; esac; done
bundle=$(realpath "${words[0]:?BUNDLE is missing}")
mkdir -p "${words[1]:?OUT is missing}"
out=$(realpath "${words[1]}")
seconds=${words[2]:-570}
project=$(realpath "$(dirname "$0")/..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}

"$python" - "$bundle" "$work" "$project" <<'PYTHON'
import pathlib, site, sys, venv, zipfile
bundle, work, project = map(pathlib.Path, sys.argv[1:])
for wheel in sorted(bundle.glob("wheels/*.whl")):
    zipfile.ZipFile(wheel).extractall(work / "site")
venv.create(work / "venv", with_pip=False, symlinks=True)
packages = next((work / "venv").glob("lib/python*/site-packages"))
there = [folder for folder in sys.path if folder.endswith("-packages")]
# last of all, so that a package of the machine is never replaced by one of the bundle
(packages / "sitecustomize.py").write_text(
    f"import site, sys\nfor folder in {there!r}:\n    site.addsitedir(folder)\nsys.path.append({str(work / 'site')!r})\n")
(packages / "project.pth").write_text(f"{project}\n")
PYTHON

unset CTXNB_DATA
export CTXNB_RUNS=$work/runs TORCHINDUCTOR_CACHE_DIR=$work/inductor TQDM_DISABLE=1 PYTHONUNBUFFERED=1
mkdir -p "$CTXNB_RUNS"
if [ -f "$bundle/data.tar.xz" ]; then tar -xJf "$bundle/data.tar.xz" -C "$project" --skip-old-files; fi
if [ -f "$bundle/runs.tar.gz" ]; then tar -xzf "$bundle/runs.tar.gz" -C "$CTXNB_RUNS"; fi
cd "$project"
"$work/venv/bin/python" bench/gpu_pass.py "$out" "$work" --seconds "$seconds" --began "$began" "${options[@]}"
