"""Layers of a configuration: read, merged over the defaults, and written."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.config.keys import choices_of
from train.config.rules import check
from train.config.sections import Config, iter_keys
from train.errors import UserError


def _rename(values: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """User keys to attribute names; any unknown key is an error that suggests a near one."""
    known = dict(iter_keys())
    renamed: dict[str, dict[str, Any]] = {}
    for section, entries in values.items():
        if not isinstance(entries, dict):
            raise UserError(f"{source}: unknown key '{section}'{_suggest(str(section), known)}")
        for name, value in entries.items():
            key = f"{section}.{name}"
            if key not in known:
                raise UserError(f"{source}: unknown key '{key}'{_suggest(key, known)}")
            renamed.setdefault(str(section), {})[known[key].name] = value
    return renamed


def _suggest(key: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else " (--help lists all keys)"


def read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"cannot read configuration {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"configuration {path} is not valid YAML: {error}") from error
    if values is None or values == {}:
        return {}
    return _string_keys(values, str(path))


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """``["train.lr=0.1", ...]`` to nested values; right-hand sides are YAML."""
    for item in overrides:
        key, separator, _ = item.partition("=")
        if not separator or not key:
            raise UserError(f"argument '{item}': expected key=value")
        if "." not in key:
            known = dict(iter_keys())
            raise UserError(f"command line: unknown key '{key}'{_suggest(key, known)}")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"cannot parse arguments {' '.join(overrides)}: {error}") from error
    return _string_keys(values, "command line")


def _string_keys(values: Any, source: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected sections of keys, got {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def make_config(*layers: tuple[str, dict[str, Any]]) -> Config:
    """Merge ``(where it came from, nested values)`` layers over the defaults, and check."""
    merged = OmegaConf.structured(Config)
    for source, values in layers:
        try:
            merged = OmegaConf.merge(merged, _rename(values, source))
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", "") or ""
            user_key = next(
                (k for k, f in iter_keys() if key == f"{k.split('.')[0]}.{f.name}"), key
            )
            raise UserError(f"{source}: {user_key}: {str(error).splitlines()[0]}") from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    check(config)
    return config


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain values under the user's key names; the inverse of :func:`make_config`."""
    values: dict[str, dict[str, Any]] = {}
    for key, f in iter_keys():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = getattr(getattr(config, section), f.name)
    return values


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def describe_keys() -> str:
    """One paragraph per key for ``--help``."""
    defaults = to_dict(Config())
    lines = []
    for key, f in iter_keys():
        section, name = key.split(".")
        default = yaml.safe_dump(defaults[section][name], default_flow_style=True).split("\n")[0]
        lines.append(f"  {key}={default}")
        choices = choices_of(f)
        lines.append(
            f"      {f.metadata['help']}" + (f" ({', '.join(choices)})" if choices else "")
        )
    return "\n".join(lines)
