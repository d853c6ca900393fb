"""Options as dataclasses: one field is the flag, the JSON key and its documentation."""

import contextlib
import dataclasses
import json
from collections.abc import Generator
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from clt.errors import ConfigError

# typing.Self would read better, but the shape checker of the tests cannot check it on single methods.
AnyConfig = TypeVar("AnyConfig", bound="Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A frozen set of options that can be written to JSON and read back."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as `json.dump` takes them."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    def to_json(self, path: str | Path) -> None:
        """Write all fields, indented, replacing the file in one step."""
        write_text_atomically(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_dict(cls: type[AnyConfig], values: dict[str, Any]) -> AnyConfig:
        """Build from JSON values.

        Raises:
            ConfigError: a key is no field of this class, or a required field is missing.
        """
        values = cls.migrate(dict(values))
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}. Fields: {', '.join(sorted(known))}.\n"
                "The file was probably written by a newer version or for another command."
            )
        missing = sorted(
            name
            for name, f in known.items()
            if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        )
        if missing:
            raise ConfigError(f"{cls.__name__} needs {', '.join(map(repr, missing))}, which the file does not give.")
        return cls(**values)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The JSON values of the fields that have one."""
        fields = [f for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING]
        return {f.name: f.default for f in fields}

    @classmethod
    def from_json(cls: type[AnyConfig], path: str | Path) -> AnyConfig:
        """Read what `to_json` (or an older version, or a seed project) wrote."""
        path = Path(path)
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist.") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON (line {error.lineno}: {error.msg}). Was it cut off?") from None
        return cls.from_dict(values)

    @classmethod
    def migrate(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Turn the spellings of older versions and of the seed projects into today's."""
        return values

    def replace(self: AnyConfig, **changes: Any) -> AnyConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def write_text_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the whole new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


@contextlib.contextmanager
def readable_as_usual(path: Path) -> Generator[None]:
    """Give a file written meanwhile the mode that new files have here: safetensors makes it for its owner alone."""
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


def require_one_of(owner: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuse a value outside a short list, naming the list."""
    if value not in allowed:
        raise ConfigError(f"{owner}.{name} = {value!r} is not one of {', '.join(map(repr, allowed))}.")


def require_numbers(owner: str, **values: Any) -> None:
    """Refuse what is no number; None means 'not set' and passes."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Real):
            raise ConfigError(f"{owner}.{name} = {value!r} must be a number.")


def require_positive(owner: str, **values: float | int | None) -> None:
    """Refuse numbers that are zero or below, and what is no number; None means 'not set' and passes."""
    require_numbers(owner, **values)
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{owner}.{name} = {value} must be greater than 0.")
