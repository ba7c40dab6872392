"""Command-line arguments for a dataclass of settings: each field is a flag, its trailing comment the flag's help.

m2d.cli calls it. It knows no command and imports nothing heavy.
"""

import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from m2d.errors import ConfigError, M2DError, refuse_repeated_keys
from m2d.files.paths import input_path

ConfigT = TypeVar("ConfigT")
PRESETS_DIR = Path(__file__).parent / "presets"


def parse_arguments(
    config: type[ConfigT],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    presets: bool = False,
    also_known: type | None = None,
    positional: str | None = None,
) -> ConfigT:
    """The config that the arguments spell: defaults, then --preset and --config files as given, then flags.

    also_known: another command's settings, whose files are accepted too; what only that one has is ignored.
    positional: the setting that words without a flag are: one word, or for a list any number.
    Raises ConfigError in one line; exits after --help and --print_config.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.settings = dict(setting_types(config))
    words = f"[{positional.upper()} ...] " if positional else ""
    parser.usage = f"{prog} {words}{'[--preset NAME] ' if presets else ''}[--config FILE] [--SETTING VALUE ...]"
    if presets:
        parser.add_argument(
            "--preset", metavar="NAME", help="settings that come with M2D; the same as --config with its file"
        )
    parser.add_argument(
        "--config", metavar="FILE", action=ActionConfigFile, help="a YAML file of settings; may be given more than once"
    )
    parser.add_class_arguments(config, nested_key=None)
    if {"-h", "--help"} & set(arguments):
        comments = dict(setting_comments(config))
        for action in parser._actions:
            action.help = comments.get(action.dest, action.help)
    ignored = set(typing.get_type_hints(also_known or config)) - set(typing.get_type_hints(config))
    values = parser.parse_args(_for_jsonargparse(arguments, parser.settings, presets, ignored, positional))
    for key in ("config", "preset"):
        values.pop(key, None)
    return config(**parser.instantiate(values).as_dict())  # vars() gives a setting called `keys` another name


def setting_types(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`data.image_size`, int) and so on, for every leaf of a tree of dataclasses."""
    for name, kind in typing.get_type_hints(config).items():
        if dataclasses.is_dataclass(kind):
            yield from setting_types(typing.cast(type, kind), f"{prefix}{name}.")
        elif typing.get_origin(kind) is not typing.ClassVar:
            yield prefix + name, kind


def setting_comments(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(`data.image_size`, "pixels a side ...") and so on: the comment at the end of each field's line.

    A comment is where a reader of the settings looks, and takes one line where an attribute's docstring takes two.
    """
    for base in filter(dataclasses.is_dataclass, reversed(config.__mro__)):
        for name, comment in re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(base), flags=re.MULTILINE):
            yield prefix + name, comment
    for name, kind in typing.get_type_hints(config).items():
        if dataclasses.is_dataclass(kind):
            yield from setting_comments(typing.cast(type, kind), f"{prefix}{name}.")


def preset_files(name: str) -> list[Path]:
    """The files whose settings a preset is, later ones over earlier: isic-256-latent comes over isic-256.

    Raises ConfigError that lists the known presets.
    """
    known = preset_names()
    if name not in known:
        raise ConfigError(f"preset {name} is not known; choose from {' '.join(known)}")
    return [PRESETS_DIR / f"{base}.yaml" for base in known if f"{name}-".startswith(f"{base}-")]


def preset_names() -> list[str]:
    """The presets that come with M2D."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def _for_jsonargparse(
    arguments: Sequence[str], kinds: dict[str, Any], presets: bool, ignored: set[str], positional: str | None
) -> list[str]:
    """What jsonargparse lacks: presets, dashes, bare switches (a group's `enabled` too), flags over files, and a list
    of texts as one flag that is given several times.

    ignored: top-level keys left out of files.
    """
    files: list[str] = []
    flags: list[str] = []
    words: list[str] = []
    gathered: dict[str, list[str]] = {}
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--"):
            words.append(argument)
            continue
        name, equals, value = argument.partition("=")
        following = waiting[0] if waiting and not waiting[0].startswith("--") else None
        if name == "--config" or (presets and name == "--preset"):
            if not equals and following is None:
                raise ConfigError(f"{name} needs a {'file' if name == '--config' else 'name'} after it")
            value = value if equals else waiting.pop(0)
            for file in preset_files(value) if name == "--preset" else [Path(input_path("config", value)).expanduser()]:
                files += ["--config", _without_keys(file, ignored)]
            continue
        # A key of a mapping is the user's own word: in --data.class_map.basal-cell its dash stays.
        mapping = next((m for m in kinds if f"{name[2:]}.".replace("-", "_").startswith(f"{m}.")), name[2:])
        key = mapping.replace("-", "_") + name[2 + len(mapping) :]
        if not equals and following is None and key not in kinds and f"{key}.enabled" in kinds:
            key = f"{key}.enabled"
        is_value = following is not None and (positional is None or following.lower() in ("true", "false"))
        if not equals and kinds.get(key) is bool and not is_value:
            equals, value = "=", "true"
        elif not equals and following is not None:
            equals, value = "=", waiting.pop(0)
        if kinds.get(key) == list[str] and value and not value.startswith("["):
            gathered.setdefault(key, []).append(value)
            continue
        if value.startswith("{"):
            with suppress(yaml.YAMLError):  # jsonargparse reports it
                refuse_repeated_keys(value, key)
        flags.append(f"--{key}{equals}{value}")
    if positional and words and "-h" not in words:
        takes_many = typing.get_origin(kinds[positional]) is list
        if not takes_many and len(words) > 1:
            raise ConfigError(f"{positional} is one word, and there are {len(words)}: {' '.join(words)}; give one")
        words = [f"--{positional}={json.dumps(words) if takes_many else words[0]}"]
    return [*files, *flags, *(f"--{key}={json.dumps(values)}" for key, values in gathered.items()), *words]


def _without_keys(file: Path, ignored: set[str]) -> str:
    """What --config takes: the file's path, or the text of what remains without these keys."""
    if not file.is_file():
        raise ConfigError(f"config: {file} is not a file; give the path of a YAML file of settings")
    try:
        text = file.read_text(encoding="utf-8")
        refuse_repeated_keys(text, f"config: {file}")
        # As nodes, not values: what remains keeps its spelling, and jsonargparse reads YAML in its own way.
        root = yaml.compose(text, Loader=yaml.SafeLoader) if ignored else None
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        root = None  # jsonargparse reports what is wrong with it
    if not isinstance(root, yaml.MappingNode):
        return str(file)
    root.value = [(key, value) for key, value in root.value if key.value not in ignored]
    return str(yaml.serialize(root))


class _Parser(ArgumentParser):
    """jsonargparse's parser, whose errors are one line each and raised instead of ending the process."""

    settings: dict[str, Any]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, M2DError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        message = " ".join(message.split())
        if (wrong := _WRONG_VALUE.search(message)) and wrong[1] in self.settings:
            message = f"{wrong[1]} is {wrong[2] or 'empty'}; it must be {_type_text(self.settings[wrong[1]])}"
            if wrong[2] == "False" and "no" in message:  # YAML reads a bare no as false
                message += "; in a file write 'no' with its quotes"
        elif unknown := _UNKNOWN.search(message):
            flag, group, option = unknown.groups()
            name = flag or ".".join(filter(None, (group, option)))
            known = f"--{name} is not known" if flag else f"{name} is not a setting"
            # Judged by the last part of a name: people forget which group a setting belongs to.
            last = name.rpartition(".")[2]
            (near, *_) = difflib.get_close_matches(last, [key.rpartition(".")[2] for key in self.settings], n=1) or [""]
            meant = [key for key in self.settings if key.rpartition(".")[2] == near]
            same_group = name[: len(name) - len(last)] + near
            meant = [same_group] if same_group in meant else meant[:1]
            hint = f"did you mean {'--' if flag else ''}{meant[0]}?" if meant else "--help lists them all"
            message = f"{known}; {hint}"
        elif "parsing" in message or message.startswith("Unexpected config"):
            message = f"config: not a YAML file of `setting: value` lines ({message})"
        raise ConfigError(message.replace("Parser key ", "")) from None


_WRONG_VALUE = re.compile(r'Parser key "([\w.]+)":.*?(?:Got|Given) value: ?(.*)')
_UNKNOWN = re.compile(
    r"unrecognized arguments: --([\w.]+)|(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'"
)


def _type_text(kind: Any) -> str:
    """`no or bf16 or fp16`, `a whole number or null`, `list[int]`."""
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_type_text, typing.get_args(kind)))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(kind, str(kind))
