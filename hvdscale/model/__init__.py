"""Which part of the model a rank holds."""
