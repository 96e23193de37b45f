"""Settings composed by Hydra, and checked before anything starts."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from smi_fed.checks import SettingError, nearest, read, require
from smi_fed.layers import ABSENT, choice_paths, dotted_keys, nested, settled
from smi_fed.settings import (
    STRATEGIES,
    ClientConfig,
    ModelsConfig,
    ServerConfig,
    Settings,
    StrategyConfig,
)

__all__ = [
    "CONF",
    "STRATEGIES",
    "ClientConfig",
    "ModelsConfig",
    "ServerConfig",
    "Settings",
    "StrategyConfig",
    "compose",
    "join_overrides",
    "load_settings",
    "quoted",
    "split_overrides",
]

_INSTALLED = Path(__file__).resolve().parent / "app" / "conf"
CONF = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[1] / "conf"
"""The settings' files, beside `server/` and `clients/`: inside the package where it was installed, around it else."""

_PIECE = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\s+|.""", re.DOTALL)
"""Of overrides in one text: what stands in quotes, space, or one other sign."""

_HYDRA_LOCK = threading.RLock()
"""Hydra keeps one global state, and a ServerApp runs in a thread."""


def load_settings(directory: Path, overrides: str | Sequence[str] = "") -> Settings:
    """Compose and check the configuration below `directory`.

    Args:
        directory: absolute path of conf/.
        overrides: Hydra overrides: a list, a JSON list in one text (`join_overrides` writes it),
            or one text separated by spaces.

    Raises:
        SettingError: keys or values that cannot be: the key, what was got, what is allowed.
    """
    words = split_overrides(overrides) if isinstance(overrides, str) else list(overrides)
    return read(Settings, compose(directory, words))


def join_overrides(words: Sequence[str]) -> str:
    """One text of overrides for `load_settings`, which finds each as it is here, whatever stands in it."""
    return json.dumps(list(words))


def split_overrides(text: str) -> list[str]:
    """The overrides in one text: a JSON list, or separated by spaces outside of quotes and brackets.

    Raises:
        SettingError: neither of both.
    """
    if not text.lstrip().startswith("["):
        words, depth = [""], 0
        for piece in _PIECE.findall(text):
            depth = max(0, depth + (piece in ("[", "{", "(")) - (piece in ("]", "}", ")")))
            if piece.isspace() and not depth:
                words.append("")
            else:
                words[-1] += piece
        require(depth == 0, "overrides", text, "overrides separated by spaces, each bracket closed, or a JSON list")
        return list(filter(None, words))
    try:
        return TypeAdapter(list[str]).validate_json(text, strict=True)
    except ValidationError as error:
        raise SettingError("overrides", text, "a JSON list of overrides, or overrides separated by spaces") from error


def quoted(text: str) -> str:
    """`text` as a value that Hydra reads as this text; ${...} in it stays an interpolation."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text) + "'"


def _readable(override: str) -> str:
    """The same, or with its value in quotes where Hydra would not read it or take it for several."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = override.partition("=")
    try:
        if not equals or not OverridesParser.create().parse_override(override).is_sweep_override():
            return override
    except HydraException:
        pass
    return f"{key}={quoted(value)}"


def compose(directory: Path, overrides: Sequence[str], name: str = "config") -> dict[str, Any]:
    """Hydra's composition of `name`.yaml below `directory` as plain containers.

    Raises:
        SettingError: an override that Hydra refuses.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    with _HYDRA_LOCK:
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(directory.absolute()), version_base="1.3"):
                config = _composed(name, [_readable(each) for each in overrides])
            plain = OmegaConf.to_container(config, resolve=True)
        except Exception as error:  # Hydra and OmegaConf raise many kinds, ValueError among them
            raise _explain(directory, overrides, name, error) from error
        finally:
            GlobalHydra.instance().clear()
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _composed(name: str, overrides: list[str]) -> Any:
    """Hydra's composition, but for choices: Hydra would leave keys of one kind in another, and refuse new ones."""
    from hydra import compose as hydra_compose
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    paths = tuple(choice_paths(Settings))
    parsed = [each for each in OverridesParser.create().parse_overrides(overrides) if each.package is None]
    own = [each for each in parsed if f"{each.key_or_group}.".startswith(tuple(f"{path}." for path in paths))]
    own = {each.input_line for each in own if not (each.is_delete() and each.key_or_group in paths)}
    others = [each for each in overrides if each not in own]
    config = hydra_compose(name, overrides=others)
    said = [nested(each.key_or_group, ABSENT if each.is_delete() else each.value()) for each in parsed]
    for path, value in settled(paths, [*_files(name, others), *said]):
        OmegaConf.update(config, path, value, merge=False, force_add=True)
    return config


def _files(name: str, overrides: list[str]) -> Iterator[Any]:
    """What the files say that Hydra merges, in their order."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    loader = GlobalHydra.instance().config_loader()
    for each in loader.compute_defaults_list(name, overrides, RunMode.RUN).defaults:
        source = next(source for source in loader.get_sources() if source.is_config(each.config_path))
        yield nested(each.package or "", OmegaConf.to_container(source.load_config(each.config_path).config))


def _explain(directory: Path, overrides: Sequence[str], name: str, error: Exception) -> SettingError:
    """Which of the overrides Hydra refused, beside those that choose a group's file, and what it could have been."""
    groups = sorted(path.name for path in directory.iterdir() if path.is_dir())
    chosen = [each for each in overrides if _key(each) in groups]
    others = [each for each in overrides if _key(each) not in groups]
    for trial in [*([each] for each in chosen), *([*chosen, each] for each in others)]:
        if trial != list(overrides):
            try:
                compose(directory, trial, name)
            except SettingError as found:
                return found
    if len(others or chosen) != 1:
        return SettingError("overrides", " ".join(overrides), f"Hydra overrides ({error})")
    (override,) = others or chosen
    key, value = _key(override), override.partition("=")[2]
    if key in groups:
        return SettingError(key, value, " | ".join(sorted(path.stem for path in (directory / key).glob("*.yaml"))))
    known = [*groups, *dotted_keys(compose(directory, chosen, name))]
    if key in known:
        return SettingError(key, value, f"a value that Hydra reads ({error})")
    return SettingError(key, value, f"a key of the configuration: {nearest(key, known)}")


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
