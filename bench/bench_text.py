"""Peak memory and rate of tokenising, against the size of the text: `python bench/bench_text.py 64 256 2048` (megabytes each).

Each size is tokenised in a process of its own, from one .jsonl file of distinct documents of 30 kB, as bytes; file and store are deleted afterwards.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LINE = "the state of the union is as it was, and ever shall be so. " * 500
CHILD = r"""
import re, sys
from ctxnb.text.tokens import token_store
print(len(token_store(sys.argv[1]).tokens), re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
"""


def measure(megabytes: int, folder: Path) -> str:
    """Tokens, peak resident memory and rate for one size, in words."""
    file = folder / "text.jsonl"
    with file.open("w") as out:
        out.writelines(f'{{"text": "{i} {LINE}"}}\n' for i in range(megabytes * 10**6 // len(LINE)))
    done = subprocess.run([sys.executable, "-c", CHILD, file], env=os.environ | {"CTXNB_DATA": str(folder / "data")}, capture_output=True, text=True, check=True)
    tokens, peak = map(int, done.stdout.split())
    rate = re.search(r"\(([\d.]+ MB/s)", done.stderr)
    return f"{megabytes:>5} MB: {tokens / 1e6:.0f} M tokens, peak memory {peak / 1024:.0f} MiB, {rate[1] if rate else done.stderr}"


if __name__ == "__main__":
    for size in map(int, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            print(measure(size, Path(folder)), flush=True)
