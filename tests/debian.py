"""Debian packages that a test needs, installed where the tests may do so."""
import os
import subprocess


def install(*packages: str) -> str:
    """Install packages with apt-get, as root; the words of the command that failed, empty where none did."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            return f"{' '.join(command)} failed: {done.stderr.strip()[-200:]}"
    return ""
