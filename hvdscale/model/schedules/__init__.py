"""Orders in which the stages of a pipeline work on micro-batches, each made by a function of its own."""

from hvdscale.model.schedules.gpipe import gpipe
from hvdscale.model.schedules.interleaved import interleaved
from hvdscale.model.schedules.one_f_one_b import one_f_one_b
from hvdscale.model.schedules.registry import SCHEDULES, make_schedule
from hvdscale.model.schedules.zero_bubble import zero_bubble

__all__ = ["SCHEDULES", "gpipe", "interleaved", "make_schedule", "one_f_one_b", "zero_bubble"]
