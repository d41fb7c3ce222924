"""The configuration as strict YAML plus ``section.key=value`` overrides.

Every mistake is reported at once, each with its full key, the rule, and the nearest valid name.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from uvit_dist.config import Config
from uvit_dist.config_rules import rules_between
from uvit_dist.errors import ConfigError


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section class of a field, which may be optional; none where the field is a plain value."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _key_names(root: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """Names that are valid beside the last key of ``loc``."""
    section: type[BaseModel] | None = root
    for key in loc[:-1]:
        field = section.model_fields.get(str(key)) if section else None
        section = _section(field.annotation) if field else None
    return list(section.model_fields) if section else []


def described(error: Any, root: type[BaseModel] = Config) -> list[str]:
    """One of pydantic's errors about ``root`` in our words, a line for each mistake, with the nearest valid name."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _key_names(root, error["loc"]), n=1, cutoff=0.5)
        nearest = ".".join([*map(str, error["loc"][:-1]), *near])
        hint = f"did you mean {nearest}?" if near else "docs/configuration.md has those there are"
        return [f"{key}: no such key; {hint}"]
    if error["type"] == "missing":
        return [f"{key}: missing; give it a value"]
    if error["type"] == "value_error":  # one of our own rules, perhaps several
        return [f"{key}: {line}" if key else line for line in str(error["ctx"]["error"]).splitlines()]
    return [f"{key}: {error['input']!r}: {error['msg']}"]


def parse_config(tree: dict[str, Any], origin: str = "configuration") -> Config:
    """A mapping as read from YAML → ``Config``. Raises ``ConfigError`` that lists every mistake."""
    try:  # JSON's strict rules: a list may be a tuple and 1 may be 1.0, but "1" is no number
        return Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        errors = error.errors()
        lines = [line for item in errors for line in described(item)]
        if not any(item["loc"] == () for item in errors):  # pydantic looks at these only where all else is well
            lines += [message for holds, message in rules_between(_valid_sections(tree)) if not holds]
        raise ConfigError(f"{origin}: {len(lines)} mistake(s)\n" + "\n".join(f"  {line}" for line in lines)) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: {error}; use plain numbers, strings, lists and mappings") from None


def _valid_sections(tree: dict[str, Any]) -> dict[str, Any]:
    """The sections, and single values, that are right in themselves."""
    found = {}
    for name, field in Config.model_fields.items():
        if name not in tree and not field.is_required():
            found[name] = field.get_default()
            continue
        value = tree.get(name)
        with contextlib.suppress(ValidationError):
            adapter: TypeAdapter[Any] = TypeAdapter(field.annotation)  # type: ignore[arg-type]
            found[name] = adapter.validate_json(json.dumps(value), strict=True)
    return found


QUOTE = "correct it; a text with ': ', ' #', brackets or braces in it must be in quotes"


def parse_yaml(text: str, origin: str) -> Any:
    """YAML of plain values. Raises ``ConfigError``, which names the origin and the line."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{origin}{where}: not valid YAML: {error.problem}; {QUOTE}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}; {QUOTE}") from None


def changed(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A mapping as read from YAML with ``section.key=value`` overrides applied in place. Raises ``ConfigError``."""
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"override {override!r}: write it as section.key=value")
        *parents, last = key.split(".")
        branch = tree
        for parent in parents:
            if branch.get(parent) is None:  # a section that was left out, or is null
                branch[parent] = {}
            branch = branch[parent]
            if not isinstance(branch, dict):
                raise ConfigError(f"override {override!r}: {parent} is a value, not a section; write section.key=value")
        branch[last] = parse_yaml(value, f"override {override!r}")
    return tree


INSTALLED = {"configs": "configs", "slurm": "profiles"}
"""Where the package has these folders of the checkout, when it is installed; data_tools is beside it in both."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``section.key=value`` overrides (values are YAML), check everything.

    A file may name another as its ``base``, by a path relative to its own, and then holds only what differs. Those of
    ``configs/`` are found from everywhere, as a base too: ``uvit_h_imagenet512``, ``configs/uvit_h_imagenet512.yaml``.
    Raises ``ConfigError`` (exit code 78) with every mistake and its full key.
    """
    return parse_config(changed(_read(shipped(path, "configs"), ()), overrides), str(path))


def shipped(path: str | Path, folder: Literal["configs", "slurm", "data_tools"]) -> Path:
    """The file of a path; where there is none, the one of that name that came with the package, if there is one.

    Only a bare name, and one below ``folder``, may mean such a file; ``.yaml`` can be left out.
    """
    path = Path(path)
    if path.exists() or path.is_absolute():
        return path
    parts = path.parts[1:] if path.parts[:1] == (folder,) else path.parts
    if len(parts) != 1 and path.parts[:1] != (folder,):
        return path
    name, package = Path(*parts) if parts else path, Path(__file__).absolute().parent
    homes = (package / INSTALLED.get(folder, folder), package.parent / folder)
    found = (home / other for home in homes for other in (name, name.with_name(f"{name.name}.yaml")))
    return next((other for other in found if other.is_file()), path)


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in a file, over that of its base. readers: the files that led here."""
    named = f"--config {path}" if not readers else f"base {path} of {readers[-1]}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{named}: cannot be read ({error}); give the path of a YAML file") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: holds {type(tree).__name__}, not a mapping of sections; write it as those in configs/ are"
        )
    if "base" not in tree:
        return tree
    name = str(tree.pop("base"))
    base = path.parent / name
    if not base.exists() and shipped(name, "configs").is_file():
        base = shipped(name, "configs")
    if base.resolve() in {reader.resolve() for reader in (*readers, path)}:
        raise ConfigError(f"base {base} of {path}: is based on itself; name another file")
    return _merged(_read(base, (*readers, path)), tree)


def _merged(base: Any, over: Any) -> Any:
    """Mappings are merged key by key; anything else of ``over`` replaces what ``base`` has."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {
        key: _merged(base[key], over[key]) if key in base and key in over else (base | over)[key] for key in base | over
    }


def dump_config(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that ``load_config`` reads back to an equal one."""
    out = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.dump(config.model_dump(mode="json"), out)
    return out.getvalue()
