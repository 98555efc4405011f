"""TensorFlow adapter."""
