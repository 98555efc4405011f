"""Building Horovod for the frameworks installed here: source, edits, toolchain, cache, compilation."""

from hvdscale.runtime.horovod_build.build import BuiltWheel, Progress, build_horovod, install_wheel
from hvdscale.runtime.horovod_build.edits import HOROVOD
from hvdscale.runtime.horovod_build.source import Edit, Source

__all__ = [
    "HOROVOD",
    "BuiltWheel",
    "Edit",
    "Progress",
    "Source",
    "build_horovod",
    "install_wheel",
]
