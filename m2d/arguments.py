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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from m2d.errors import ConfigError, M2DError
from m2d.files.paths import input_path

ConfigT = TypeVar("ConfigT")
PRESETS_DIR = Path(__file__).parent / "presets"


def parse_arguments(
    config: type[ConfigT],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    preset_files: Callable[[str], Sequence[Path]] | None = None,
    also_known: type | None = None,
    positional: str | None = None,
) -> ConfigT:
    """The config that the arguments spell: defaults, then --preset and --config files as given, then flags.

    also_known: another command's settings, whose files serve this one too; what only that one has is passed over.
    positional: the setting that words without a flag are: one word, or for a list any number.
    Raises ConfigError in one line; exits after --help and --print_config.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    words = f"[{positional.upper()} ...] " if positional else ""
    parser.usage = f"{prog} {words}{'[--preset NAME] ' if preset_files else ''}[--config FILE] [--SETTING VALUE ...]"
    if preset_files:
        parser.add_argument(
            "--preset", metavar="NAME", help="settings that come with M2D; stands for --config with its file"
        )
    parser.add_argument(
        "--config", metavar="FILE", action=ActionConfigFile, help="a YAML file of settings; may be given more than once"
    )
    parser.add_class_arguments(config, nested_key=None)
    if {"-h", "--help"} & set(arguments):
        _explain(parser, config)
    try:
        passed_over = frozenset(_setting_names(also_known) - _setting_names(config))
        values = parser.parse_args(_spelled_out(arguments, config, preset_files, passed_over, positional))
        for key in ("config", "preset"):
            values.pop(key, None)
        return config(**vars(parser.instantiate(values)))
    except _ArgumentProblem as problem:
        raise ConfigError(_in_our_words(str(problem), config)) from None


def setting_types(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`data.image_size`, int) and so on, for every leaf of a tree of dataclasses."""
    for name, kind in typing.get_type_hints(config).items():
        if dataclasses.is_dataclass(kind):
            yield from setting_types(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def setting_comments(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(`data.image_size`, "pixels a side ...") and so on: the comment at the end of each field's line."""
    for base in reversed(config.__mro__):
        if dataclasses.is_dataclass(base):
            try:
                source = inspect.getsource(base)
            except OSError:  # installed without sources: flags without explanations
                continue
            for name, comment in re.findall(r"^    (\w+): .*?  # (.+)$", source, flags=re.MULTILINE):
                yield prefix + name, comment
    for name, kind in typing.get_type_hints(config).items():
        if dataclasses.is_dataclass(kind):
            yield from setting_comments(typing.cast(type, kind), f"{prefix}{name}.")


class _ArgumentProblem(Exception):
    pass


class _Parser(ArgumentParser):
    """jsonargparse's parser, whose errors come back instead of ending the process with a usage text."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, M2DError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        raise _ArgumentProblem(message)


def _explain(parser: ArgumentParser, config: type) -> None:
    comments = dict(setting_comments(config))
    for action in parser._actions:
        action.help = comments.get(action.dest, action.help)


def _spelled_out(
    arguments: Sequence[str],
    config: type,
    preset_files: Callable[[str], Sequence[Path]] | None,
    passed_over: frozenset[str],
    positional: str | None,
) -> list[str]:
    """As jsonargparse wants them: --preset as --config, files first, underscores, `true` for a bare switch.

    A group that has a switch called `enabled` may stand bare too. passed_over: top-level keys left out of files.
    positional: the setting that words which belong to no flag are.
    """
    kinds = dict(setting_types(config))
    files: list[str] = []
    flags: list[str] = []
    words: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if name in ("--preset", "--config") and (preset_files or name == "--config"):
            if not equals:
                if not waiting or waiting[0].startswith("--"):
                    raise ConfigError(f"{name} needs {'a name' if name == '--preset' else 'a file'} after it")
                value = waiting.pop(0)
            if preset_files and name == "--preset":
                given = preset_files(value)
            else:
                given = [Path(input_path("config", value)).expanduser()]
                if not given[0].is_file():
                    raise ConfigError(f"config: {value} is not a file; give the path of a YAML file of settings")
            for file in given:
                files += ["--config", _without_keys(file, passed_over)]
        elif name.startswith("--"):
            name = _with_underscores(name.removeprefix("--"), kinds)
            bare = not equals and (not waiting or waiting[0].startswith("--"))
            if bare and name not in kinds and f"{name}.enabled" in kinds:
                name = f"{name}.enabled"
            switch = kinds.get(name) is bool and not equals
            if switch and (bare or (positional and waiting[0].lower() not in ("true", "false"))):
                flags.append(f"--{name}=true")
            else:
                flags.append(f"--{name}{equals}{value}")
                if not bare and not equals:
                    flags.append(waiting.pop(0))
        else:
            words.append(argument)
    if positional and words:
        takes_many = typing.get_origin(kinds[positional]) is list
        if not takes_many and len(words) > 1:
            raise ConfigError(f"{positional} is one word, and there are {len(words)}: {' '.join(words)}; give one")
        return [*files, *flags, f"--{positional}={json.dumps(words) if takes_many else words[0]}"]
    return [*files, *flags, *words]


def _setting_names(config: type | None) -> set[str]:
    """Top-level names, groups among them."""
    return set() if config is None else {field.name for field in dataclasses.fields(config)}


def _without_keys(file: Path, passed_over: frozenset[str]) -> str:
    """What --config takes: the file's path, or where it holds keys to pass over, the text of what remains."""
    if not passed_over:
        return str(file)
    try:
        # As nodes, not values: what remains keeps its spelling, and jsonargparse reads YAML in its own way.
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return str(file)  # jsonargparse tells what is wrong with it
    if not isinstance(root, yaml.MappingNode) or all(key.value not in passed_over for key, _ in root.value):
        return str(file)
    root.value = [(key, value) for key, value in root.value if key.value not in passed_over]
    text: str = yaml.serialize(root)
    return text


def _with_underscores(name: str, kinds: dict[str, Any]) -> str:
    """--batch-size is --batch_size; but in --data.class_map.basal-cell the user's own word stays as it is."""
    setting, own_word = name, ""
    for known, kind in kinds.items():
        if typing.get_origin(kind) is dict and name.replace("-", "_").startswith(f"{known}."):
            setting, own_word = name[: len(known)], name[len(known) :]
    return setting.replace("-", "_") + own_word


_WRONG_VALUE = re.compile(r'Parser key "([\w.]+)":.*?(?:Got|Given) value: (.*)', flags=re.DOTALL)
_UNKNOWN_FLAG = re.compile(r"unrecognized arguments: (--([\w.]+))")
_UNKNOWN_KEY = re.compile(r"(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'")


def _in_our_words(problem: str, config: type) -> str:
    """jsonargparse's message as `setting is value; it must be ...`; what is not known here stays as it is."""
    kinds = dict(setting_types(config))
    if (wrong := _WRONG_VALUE.search(problem)) and wrong[1] in kinds:
        key, value = wrong[1], " ".join(wrong[2].split())
        message = f"{key} is {value or 'empty'}; it must be {_wanted(kinds[key])}"
        # YAML reads a bare no as false.
        return f"{message}; in a file write 'no' with its quotes" if value == "False" and "no" in message else message
    if unknown := _UNKNOWN_FLAG.search(problem):
        return f"{unknown[1]} is not known{_nearest(unknown[2], kinds, '--')}"
    if unknown := _UNKNOWN_KEY.search(problem):
        key = ".".join(filter(None, unknown.groups()))
        return f"{key} is not a setting{_nearest(key, kinds)}"
    if "parsing config" in problem or problem.startswith("Unexpected config"):
        return f"config: not a YAML file of `setting: value` lines ({' '.join(problem.split())})"
    return " ".join(problem.replace("Parser key ", "").split())


def _nearest(key: str, known: dict[str, Any], prefix: str = "") -> str:
    """`; did you mean ...?`, judged by the last part of a name: people forget which group a setting belongs to."""
    group, _, last = key.rpartition(".")
    near = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in known], n=1)
    if not near:
        return "; --help lists them all"
    names = [name for name in known if name.rpartition(".")[2] == near[0]]
    best = f"{group}.{near[0]}" if f"{group}.{near[0]}" in names else names[0]
    return f"; did you mean {prefix}{best}?"


def _wanted(kind: Any) -> str:
    """A type in words: `no, bf16 or fp16`, `a whole number or null`."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return _alternatives([str(part) for part in parts])
    if origin in (Union, types.UnionType):
        # The words of a Literal go beside null, not inside: no, bf16, fp16 or null.
        values = [str(v) for part in parts if typing.get_origin(part) is Literal for v in typing.get_args(part)]
        words = [_wanted(part) for part in parts if typing.get_origin(part) is not Literal and part is not type(None)]
        return _alternatives([*values, *words, *(["null"] if type(None) in parts else [])])
    if origin is list:
        return f"a list, each entry {_wanted(parts[0])}, such as {_LISTS.get(parts[0], '[a, b]')}"
    if origin is tuple:
        return f"a list of {len(parts)}, each {_wanted(parts[0])}"
    if origin is dict:
        return "a mapping such as '{name: value}'"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, str(kind))


_LISTS = {int: "[64, 128]", float: "[0.9, 0.999]", bool: "[false, true]"}


def _alternatives(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def preset_path(name: str) -> Path:
    """The YAML of a preset. Raises ConfigError that lists the known ones."""
    path = PRESETS_DIR / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"preset {name} is not known; choose from {' '.join(preset_names())}")
    return path


def preset_files(name: str) -> list[Path]:
    """The files whose settings a preset is, later ones over earlier: isic-256-latent lies over isic-256."""
    below = [base for base in preset_names() if name.startswith(f"{base}-")]
    return [*map(preset_path, below), preset_path(name)]


def preset_names() -> list[str]:
    """The presets that come with M2D."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))
