"""What pyproject.toml cannot say: every wing is found, and two folders beside them travel inside the package."""

from setuptools import find_packages, setup

BESIDE = {"sd_hyena.configs": "configs", "sd_hyena.tiny_sd": "examples/tiny_sd"}

setup(packages=[*find_packages(include=["safari*", "sd_hyena*"]), *BESIDE], package_dir=BESIDE)
