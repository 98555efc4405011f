"""The ``hvdscale`` command."""
