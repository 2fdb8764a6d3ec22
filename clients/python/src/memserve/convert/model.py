"""What a family makes of a source: the configuration and the tensors of the folder to be written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Set

from memserve.convert.files import Source
from memserve.convert.tensor import Tensor


@dataclass
class Model:
    family: str  # for the provenance
    source: Source
    config: Dict[str, Any]  # config.json
    tensors: Dict[str, Tensor]  # by the names in the folder that is written
    tables: Set[str] = field(default_factory=set)  # value tables: they follow --table_dtype
    exact: Set[str] = field(default_factory=set)  # stored as they are, whatever the options say
    files: Dict[str, bytes] = field(default_factory=dict)  # tokenizer and templates
    notes: List[str] = field(default_factory=list)  # what the user should know
    # Keys of the configuration that name the weights' type, to be kept in step with --dtype.
    dtype_keys: Set[str] = field(default_factory=set)
    check: Optional[Callable[[], None]] = None  # what can only be known by reading tensors; run before writing
