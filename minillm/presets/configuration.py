"""What a training run is made of, read from a TOML file: a shipped preset or the user's own.

A file has four sections. [model] and [training] take the fields of `TransformerConfig` and `TrainingConfig`, and the
table [model.moe] those of `MoEConfig`; [tokenizer] and [data] the settings of `minillm.training.run.train_run`, and
[data] the corpus too. Every key may be left out. Names and types are checked here, before anything is built; whether a
number makes sense is for the room that uses it to say.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

Configuration = dict[str, dict[str, Any]]


def preset_names() -> list[str]:
    """The presets that come with the package, in alphabetical order."""
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def load_preset(name_or_path: str) -> Configuration:
    """Read a shipped preset by its name, or any TOML file by its path, and check every section, key and type.

    Raises ValueError for an unknown preset, a file that is not TOML, an unknown section or key, naming those allowed;
    TypeError for a value of the wrong type; OSError if the file cannot be read.
    """
    if name_or_path in preset_names():
        text = (_folder() / f"{name_or_path}.toml").read_text(encoding="utf-8")
    elif name_or_path.endswith(".toml"):
        text = Path(name_or_path).read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"unknown preset {name_or_path!r}{_closest(name_or_path, preset_names())}: "
            f"allowed are {', '.join(preset_names())}, or the path of a .toml file"
        )
    try:
        read = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{name_or_path} is not valid TOML: {error}") from None
    configuration: Configuration = {section: {} for section in allowed_keys()}
    for section, values in read.items():
        if not isinstance(values, dict):
            raise ValueError(f"{name_or_path}: {section!r} stands outside a section: write it below [model] or another")
        for key, value in values.items():
            table = value if isinstance(value, dict) else {}  # [model.moe]
            for inner, inner_value in table.items():
                _set(configuration, section, f"{key}.{inner}", inner_value)
            if not table:
                _set(configuration, section, key, value)
    return configuration


def parse_assignment(assignment: str) -> tuple[str, Any]:
    """("section.key", value) from "section.key=value", the value written as in TOML.

    Quotes around a string may be left out, and `none` stands for a value that is not set.
    Raises ValueError for an assignment without a "." or a "=".
    """
    name, equals, text = (part.strip() for part in assignment.partition("="))
    if not (equals and "." in name):
        raise ValueError(f"{assignment!r} must read section.key=value, such as training.max_steps=200")
    try:
        return name, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return name, None if text.lower() == "none" else text


def override(configuration: Configuration, values: Mapping[str, Any]) -> Configuration:
    """A copy of `configuration` with each "section.key" set to its value; checked and refused as by `load_preset`."""
    changed = {section: dict(keys) for section, keys in configuration.items()}
    for name, value in values.items():
        section, _, key = name.partition(".")
        _set(changed, section, key, value)
    return changed


def allowed_keys() -> dict[str, dict[str, Any]]:
    """Section -> key -> type, for all four sections; a key of the table [model.moe] is "moe.key"."""
    from minillm.models import MoEConfig, TransformerConfig
    from minillm.training import TrainingConfig
    from minillm.training.run_settings import DATA_DEFAULTS, TOKENIZER_DEFAULTS

    sections: dict[str, dict[str, Any]] = {
        "model": _fields(TransformerConfig) | {f"moe.{key}": wanted for key, wanted in _fields(MoEConfig).items()},
        "tokenizer": {key: type(value) for key, value in TOKENIZER_DEFAULTS.items()},
        "data": {"corpus": str} | {key: type(value) for key, value in DATA_DEFAULTS.items()},
        "training": _fields(TrainingConfig),
    }
    del sections["model"]["vocab_size"]  # as many as the tokenizer has
    return sections


def _set(configuration: Configuration, section: str, key: str, value: Any) -> None:
    sections = allowed_keys()
    if section not in sections:
        raise ValueError(f"unknown section {section!r}{_closest(section, sections)}: allowed are {', '.join(sections)}")
    if value is None and any(known.startswith(f"{key}.") for known in sections[section]):
        configuration[section][key] = None  # a table that a preset has and this run has not
        return
    if key not in sections[section]:
        raise ValueError(
            f"unknown key {key!r} in [{section}]{_closest(key, sections[section])}: "
            f"allowed are {', '.join(sections[section])}"
        )
    typed = _typed(f"{section}.{key}", value, sections[section][key])
    outer, _, inner = key.rpartition(".")
    if outer:
        configuration[section][outer] = (configuration[section].get(outer) or {}) | {inner: typed}
    else:
        configuration[section][key] = typed


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """`value` as the type `wanted` asks for; TypeError, naming both, if it is another."""
    union = typing.get_origin(wanted) in (types.UnionType, typing.Union)
    choices = typing.get_args(wanted) if union else (wanted,)
    for choice in choices:
        origin, arguments = typing.get_origin(choice), typing.get_args(choice)
        if origin is typing.Literal and value in arguments:
            return value
        if origin is Mapping and isinstance(value, dict):
            return value
        if origin is tuple and isinstance(value, list | tuple) and ... in arguments:
            return tuple(_typed(f"{name}[{i}]", part, arguments[0]) for i, part in enumerate(value))
        if origin is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
            return tuple(_typed(f"{name}[{i}]", part, arguments[i]) for i, part in enumerate(value))
        if choice is float and type(value) is int:  # 1 for 1.0; but True is no number
            return float(value)
        if type(value) is choice:
            return value
    allowed = " or ".join(_described(choice) for choice in choices)
    raise TypeError(f"{name} must be {allowed}, got {value!r} ({type(value).__name__})")


def _described(choice: Any) -> str:
    if typing.get_origin(choice) is typing.Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(choice))
    words = {str: "a string", bool: "true or false", int: "a whole number", float: "a number", types.NoneType: '"none"'}
    if typing.get_origin(choice) is tuple:
        parts = [_described(part) for part in typing.get_args(choice) if part is not ...]
        return f"a list: {', '.join(parts)}" + (", ..." if ... in typing.get_args(choice) else "")
    return "a table" if typing.get_origin(choice) is Mapping else words.get(choice, str(choice))


def _fields(config: type) -> dict[str, Any]:
    """Field -> type, of those fields that a TOML file can give a value."""
    hints = typing.get_type_hints(config)
    fields = {}
    for field in dataclasses.fields(config):
        choices = typing.get_args(hints[field.name]) or (hints[field.name],)
        if not any(dataclasses.is_dataclass(choice) for choice in choices):
            # A size that is worked out from others when it is left out is annotated as the number it becomes.
            fields[field.name] = hints[field.name] if field.default is not None else hints[field.name] | None
    return fields


def _closest(word: str, allowed: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(allowed), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _folder() -> Any:
    return resources.files("minillm.presets")
