"""Converts checkpoints into folders that memserve serves: see cli.py for the command, families/ for what is recognised."""

from memserve.convert.errors import ConvertError

__all__ = ["ConvertError"]
