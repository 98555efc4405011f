"""``horovod.tensorflow.compression``, where scripts look for it."""

from horovod.tensorflow.compression import Compression, Compressor, FP16Compressor, NoneCompressor

__all__ = ["Compression", "Compressor", "FP16Compressor", "NoneCompressor"]
