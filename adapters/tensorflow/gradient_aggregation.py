"""``horovod.tensorflow.gradient_aggregation``, where scripts look for it."""

from horovod.tensorflow.gradient_aggregation import LocalGradientAggregationHelper

__all__ = ["LocalGradientAggregationHelper"]
