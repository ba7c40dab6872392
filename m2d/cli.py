"""The one parser: `python -m m2d COMMAND` and jobs/*.py are the same commands.

Every setting is a flag (--batch_size and --batch-size alike), a key of a --config file, or part of a --preset; later
ones win. Heavy packages are imported after the arguments are known to be good.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from m2d import __version__
from m2d.config import TrainConfig, preset_names, preset_path
from m2d.errors import ConfigError, M2DError
from m2d.generation.settings import GenerateConfig


@dataclass(frozen=True)
class Command:
    """One command: its settings, and what runs once they are good."""

    description: str
    config: type
    run: Callable[[Any], None]
    presets: bool = False


def _train(config: TrainConfig) -> None:
    from m2d.training.trainer import train

    train(config)


def _generate(config: GenerateConfig) -> None:
    from m2d.generation.run import generate

    generate(config)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo: images, a training run with two workers, samples."""

    directory: str = "./demo"
    images: int = 700
    num_samples: int = 6  # per class
    fresh: bool = False


def _demo(config: DemoConfig) -> None:
    from m2d.demo import run_demo

    run_demo(config.directory, config.images, config.num_samples, config.fresh)


COMMANDS: dict[str, Command] = {
    "train": Command("Train on a folder of class folders; run again to resume.", TrainConfig, _train, presets=True),
    "generate": Command("Generate labelled images from a checkpoint.", GenerateConfig, _generate),
    "demo": Command("Render demo images, train on them with two workers, generate samples.", DemoConfig, _demo),
}


def main(command: str, arguments: Sequence[str] | None = None) -> None:
    """Run one command as a script: exit code 0, or 2 after one line for what a user can mend."""
    try:
        _run(command, list(sys.argv[1:] if arguments is None else arguments))
    except M2DError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def main_from_shell(arguments: Sequence[str] | None = None) -> None:
    """`m2d COMMAND ...`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0 if given else 2)
    if given[0] == "--version":
        print(__version__)
        sys.exit(0)
    if given[0] not in COMMANDS:
        print(f"error: command {given[0]} is not known; choose from {' '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    main(given[0], given[1:])


def parse(command: str, arguments: Sequence[str]) -> Any:
    """The command's config from arguments. Raises ConfigError in one line; exits after --help and --print_config."""
    spec = COMMANDS[command]
    description = spec.description
    if spec.presets:
        description += f" --preset NAME stands for --config with settings that come with M2D: {', '.join(preset_names())}."
    parser = _Parser(prog=f"python -m m2d {command}", description=description)
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of settings; may be given more than once")
    parser.add_class_arguments(spec.config, nested_key=None)
    try:
        values = parser.parse_args(_spelled_out(arguments, spec.config))
        for key in ("config", "preset"):
            values.pop(key, None)
        return spec.config(**vars(parser.instantiate(values)))
    except _ArgumentProblem as problem:
        raise ConfigError(" ".join(str(problem).split())) from None


def _run(command: str, arguments: list[str]) -> None:
    config = parse(command, arguments)
    COMMANDS[command].run(config)


class _ArgumentProblem(Exception):
    pass


class _Parser(ArgumentParser):
    """jsonargparse's parser, whose errors come back instead of ending the process with a usage text."""

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, M2DError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        raise _ArgumentProblem(message)


def _spelled_out(arguments: Sequence[str], config: type) -> list[str]:
    """Dashes in a flag's name become underscores, a bare switch (--fresh) gets its `true`, a preset its file."""
    switches = {f"--{field.name}" for field in dataclasses.fields(config) if field.type in (bool, "bool")}
    spelled: list[str] = []
    for position, argument in enumerate(arguments):
        if spelled and spelled[-1] == "--preset":
            spelled[-1] = "--config"
            argument = str(preset_path(argument))
        elif argument.startswith("--preset="):
            argument = f"--config={preset_path(argument.partition('=')[2])}"
        elif argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = "--" + name[2:].replace("-", "_") + equals + value
            following = arguments[position + 1] if position + 1 < len(arguments) else "--"
            if argument in switches and following.startswith("--"):
                argument += "=true"
        spelled.append(argument)
    return spelled


def _overview() -> str:
    lines = [f"  {name:10} {command.description}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: python -m m2d COMMAND [--help] ...", "", *lines])
