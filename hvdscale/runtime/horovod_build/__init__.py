"""Building Horovod for the frameworks installed here: source, edits, toolchain, cache, compilation."""

from hvdscale.runtime.horovod_build.build import BuiltWheel, Progress, build_horovod, install_wheel
from hvdscale.runtime.horovod_build.source import EDITS, SOURCE_SHA256, VERSION, Edit

__all__ = [
    "EDITS",
    "SOURCE_SHA256",
    "VERSION",
    "BuiltWheel",
    "Edit",
    "Progress",
    "build_horovod",
    "install_wheel",
]
