"""User-facing errors. The command line prints them as one line and exits with their code; anything else is a bug."""

from math import inf
from typing import Any


class M2DError(Exception):
    """What is wrong, where, and what to do, in one line."""

    exit_code = 2  # the command did not do what it was asked for; 1 is Python's, for a bug


class ConfigError(M2DError):
    """A setting has a value that cannot work."""


class DataError(M2DError):
    """A dataset cannot be used as it is."""


class CheckpointError(M2DError):
    """A checkpoint is missing, broken, or made by something else."""


class ExperimentError(M2DError):
    """An experiment directory cannot be created, found or continued."""


class TrainingError(M2DError):
    """Training cannot continue; the message names the cause."""


class Incomplete(M2DError):
    """A command came to its end and made less than it was asked for; what it made is whole, and stays."""

    exit_code = 3


def require(condition: object, message: str) -> None:
    """Raise ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_range(
    config: object, room: str, low: float, *names: str, high: float = inf, above: bool = False, below: bool = False
) -> None:
    """Each named number of the settings is None or finite and in [low, high].

    room: "schedule." say. above, below: an end that is left out.
    """
    shown = f"above {low:g}" if above else f"at least {low:g}"
    if high < inf:
        shown = f"in [{low:g}, {high:g}{')' if below else ']'}"
    for name in names:
        value = getattr(config, name)
        inside = value is None or (low <= value <= high and value != inf)  # and not nan
        excluded = [low] * above + [high] * below
        require(inside and value not in excluded, f"{room}{name} is {value}; it must be {shown}")


def refuse_repeated_keys(text: str, where: str) -> None:
    """Raise ConfigError where a mapping of a YAML text has a key twice: YAML's readers drop the first one silently.

    where: how the message begins. Raises yaml.YAMLError for what is no YAML.
    """
    import yaml

    lines: dict[str, int] = {}  # `data.image_size` -> where it stands, in either of its two spellings

    def look(node: Any, name: str, above: tuple[Any, ...]) -> None:
        if not isinstance(node, yaml.CollectionNode) or node in above:
            return
        for place, entry in enumerate(node.value):
            if isinstance(node, yaml.SequenceNode):
                look(entry, f"{name}[{place}].", (*above, node))
                continue
            key, value = entry
            word, line = f"{name}{key.value}", key.start_mark.line + 1
            if word in lines:
                raise ConfigError(f"{where} has {word} twice, in lines {lines[word]} and {line}; keep one")
            lines[word] = line
            look(value, f"{word}.", (*above, node))

    look(yaml.compose(text, Loader=yaml.SafeLoader), "", ())


def first_line(error: Exception) -> str:
    """Of another library's error, whose further lines are advice on its own settings; its class where it is silent."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
