"""Whole training runs as TOML files, shipped with the package or written by the user."""

from minillm.presets.configuration import (
    Configuration,
    allowed_keys,
    load_preset,
    override,
    parse_assignment,
    preset_names,
)

__all__ = ["Configuration", "allowed_keys", "load_preset", "override", "parse_assignment", "preset_names"]
