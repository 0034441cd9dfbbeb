"""The configuration: one dataclass per section, one field per key, help and bounds with the field.

Layers, later ones win: defaults, the checkpoint's own configuration when resuming, ``--config``
YAML, ``key=value`` arguments. Keys and value types are checked against the dataclasses.
"""

from train.config.layers import (
    COMMAND_LINE,
    describe_keys,
    make_config,
    of_a_run,
    parse_overrides,
    read_yaml,
    to_dict,
    to_yaml,
)
from train.config.rules import check
from train.config.sections import Config, iter_keys

__all__ = [
    "COMMAND_LINE",
    "Config",
    "check",
    "describe_keys",
    "iter_keys",
    "make_config",
    "of_a_run",
    "parse_overrides",
    "read_yaml",
    "to_dict",
    "to_yaml",
]
