"""Packaging: the core is ``hvdscale``; each folder of ``adapters``, with what is inside, is importable under it."""

from setuptools import find_packages, setup

ADAPTERS = {
    "torch": "torch",
    "tensorflow": "tensorflow",
    "keras": "keras",
    "tensorflow.keras": "tensorflow_keras",  # Horovod's second name for Keras
}

packages = {f"hvdscale.{name}": f"adapters/{folder}" for name, folder in ADAPTERS.items()}
inner = {
    f"{package}.{name}": f"{folder}/{name.replace('.', '/')}"
    for package, folder in packages.items()
    for name in find_packages(folder)
}

setup(
    packages=[*find_packages(include=["hvdscale", "hvdscale.*"]), *packages, *inner],
    package_dir={**packages, **inner},
)
