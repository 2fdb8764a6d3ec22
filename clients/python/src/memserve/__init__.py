"""Python side of memserve. So far: `memserve.convert`, the checkpoint converter."""

__version__ = "0.1.0"
