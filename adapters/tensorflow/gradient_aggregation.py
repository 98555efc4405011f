"""``horovod.tensorflow.gradient_aggregation``, where scripts look for it."""

from horovod.tensorflow.gradient_aggregation import (
    LocalGradientAggregationHelper,
    apply_op_to_not_none_tensors,
    get_not_none_from_list,
)

__all__ = ["LocalGradientAggregationHelper", "apply_op_to_not_none_tensors", "get_not_none_from_list"]
