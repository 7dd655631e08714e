"""Packaging, read from settings.ini so that names, versions and requirements stand in one place."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

settings = ConfigParser(delimiters=["="])
settings.read("settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]


class Build(build_py):
    """Also copies what `ctxnb.paths.shipped` finds without the checkout: templates, quick grids, task sets."""

    def run(self):
        super().run()
        for pattern in cfg["shipped"].split() if not self.editable_mode else ():
            for file in Path().glob(pattern):
                copy = Path(self.build_lib, "ctxnb", "shipped", file)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    license="Apache-2.0",
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=["ctxnb", "ctxnb.*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": Build},
)
