"""Packaging: the core is ``hvdscale``; each folder of ``adapters`` is importable as ``hvdscale.<name>``."""

from setuptools import find_packages, setup

ADAPTERS = ("torch", "tensorflow", "keras")

setup(
    packages=[
        *find_packages(include=["hvdscale", "hvdscale.*"]),
        *(f"hvdscale.{name}" for name in ADAPTERS),
    ],
    package_dir={f"hvdscale.{name}": f"adapters/{name}" for name in ADAPTERS},
    package_data={"hvdscale": ["py.typed"]},
)
