"""Packaging: the core is ``hvdscale``; each folder of ``adapters`` is importable as ``hvdscale.<name>``."""

from setuptools import find_packages, setup

ADAPTERS = {
    "torch": "torch",
    "tensorflow": "tensorflow",
    "keras": "keras",
    "tensorflow.keras": "tensorflow_keras",  # Horovod's second name for Keras
}

setup(
    packages=[
        *find_packages(include=["hvdscale", "hvdscale.*"]),
        *(f"hvdscale.{name}" for name in ADAPTERS),
    ],
    package_dir={f"hvdscale.{name}": f"adapters/{folder}" for name, folder in ADAPTERS.items()},
    package_data={"hvdscale": ["py.typed"]},
)
