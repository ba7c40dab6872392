"""The one parser: `python -m m2d COMMAND` and jobs/*.py are the same commands.

Every setting is a flag (--batch_size and --batch-size alike), a key of a --config file, or part of a --preset; flags
win over files, a later file over an earlier one. Heavy packages are imported after the arguments are known to be good.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from m2d import __version__
from m2d.arguments import parse_arguments, preset_files, preset_names
from m2d.data.settings import SetupConfig
from m2d.errors import ConfigError, M2DError
from m2d.evaluation.settings import EvaluateConfig, ProbeConfig
from m2d.experiments.settings import CleanConfig, CompareConfig, ListConfig, ReportConfig, ShowConfig
from m2d.generation.settings import GenerateConfig
from m2d.training.settings import TrainConfig
from m2d.tuning.settings import SweepConfig


@dataclass(frozen=True)
class Command:
    """One command: its settings, and what runs once they are good."""

    description: str
    config: type
    run: Callable[[Any], None]
    presets: bool = False
    also_known: type | None = None  # another command's settings: a file of that one serves this one too
    positional: str | None = None  # the setting that words without a flag are


def _train(config: TrainConfig) -> None:
    if config.dry_run:
        from m2d.training.dry_run import dry_run

        return dry_run(config)

    from m2d.training.trainer import train

    experiment = train(config)
    try:
        from m2d.experiments.page import write_report

        print(f"report: {write_report(experiment)}")
    except Exception as error:  # the run is done and whole; a page about it must not make it look failed
        reason = " ".join(str(error).split()) or type(error).__name__
        from m2d.files.storage import without_secrets

        place = without_secrets(config.experiments_dir)
        again = f"python -m m2d experiments report {experiment.name} --experiments_dir {place}"
        print(f"WARNING: the report could not be written ({reason}); try again: {again}")


def _setup_data(config: SetupConfig) -> None:
    from m2d.data.setup import setup_data

    setup_data(config)


def _generate(config: GenerateConfig) -> None:
    from m2d.generation.run import generate

    generate(config)


def _evaluate(config: EvaluateConfig) -> None:
    from m2d.evaluation.evaluate import evaluate

    evaluate(config)


def _probe(config: ProbeConfig) -> None:
    from m2d.evaluation.classifiers.probe import probe

    probe(config)


def _tune(config: SweepConfig) -> None:
    from m2d.tuning.sweep import sweep

    sweep(config)


def _list_experiments(config: ListConfig) -> None:
    from m2d.experiments.listing import list_command

    list_command(config)


def _show_experiment(config: ShowConfig) -> None:
    from m2d.experiments.listing import show_command

    show_command(config)


def _report_experiment(config: ReportConfig) -> None:
    from m2d.experiments.page import report_experiment

    report_experiment(config)


def _clean_experiments(config: CleanConfig) -> None:
    from m2d.experiments.clean import clean_command

    clean_command(config)


def _compare_experiments(config: CompareConfig) -> None:
    from m2d.experiments.compare import compare_command

    compare_command(config)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo: images, a training run with two workers, samples."""

    directory: str = "./demo"  # where images, experiment and samples go
    images: int = 700  # rendered ones, of all classes together
    num_samples: int = 6  # per class
    fresh: bool = False  # render and train anew


def _demo(config: DemoConfig) -> None:
    from m2d.demo_command import run_demo

    run_demo(config.directory, config.images, config.num_samples, config.fresh)


COMMANDS: dict[str, Command] = {
    "train": Command("Train on a folder of class folders; run again to resume.", TrainConfig, _train, presets=True),
    "setup_data": Command(
        "Scan a dataset, prepare its images and cache the extractor's features; run again to go on.",
        SetupConfig,
        _setup_data,
        presets=True,
        also_known=TrainConfig,
    ),
    "generate": Command("Generate labelled images from a checkpoint.", GenerateConfig, _generate),
    "evaluate": Command(
        "Tell whether generated images are real, diverse and private enough, and whether they help.",
        EvaluateConfig,
        _evaluate,
    ),
    "evaluate probe": Command("Tell how well a linear probe on features knows the classes.", ProbeConfig, _probe),
    "tune": Command("Sweep loss weights and learning rates; run again to go on.", SweepConfig, _tune, presets=True),
    "experiments": Command("List the experiments; the same as experiments list.", ListConfig, _list_experiments),
    "experiments list": Command("List the experiments, their states and best measures.", ListConfig, _list_experiments),
    "experiments show": Command(
        "Show one experiment: what it did, how it went, how to continue it.",
        ShowConfig,
        _show_experiment,
        positional="experiment",
    ),
    "experiments compare": Command(
        "Set experiments side by side: settings that differ, measures.",
        CompareConfig,
        _compare_experiments,
        positional="experiments",
    ),
    "experiments report": Command(
        "Write an experiment's report.html again.", ReportConfig, _report_experiment, positional="experiment"
    ),
    "experiments clean": Command("Remove old experiments; asks first.", CleanConfig, _clean_experiments),
    "demo": Command("Render demo images, train on them with two workers, generate samples.", DemoConfig, _demo),
}


def main(command: str, arguments: Sequence[str] | None = None) -> None:
    """Run one command as a script: exit code 0, or 2 after one line for what a user can mend."""
    try:
        _run(*_whole_name(command, list(sys.argv[1:] if arguments is None else arguments)))
    except M2DError as error:
        asked = getattr(error, "exit_code", None)  # a run that was asked to stop, and did
        print(str(error) if asked else f"error: {error}", file=sys.stderr)
        sys.exit(asked or 2)
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
    if given[0] not in {name.split()[0] for name in COMMANDS}:
        print(f"error: command {given[0]} is not known; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    main(given[0], given[1:])


def parse(command: str, arguments: Sequence[str]) -> Any:
    """The command's config from arguments. Raises ConfigError in one line; exits after --help and --print_config."""
    spec = COMMANDS[command]
    description = spec.description
    if spec.presets:
        description += f" Presets: {', '.join(preset_names())}."
    return parse_arguments(
        spec.config,
        arguments,
        prog=f"python -m m2d {command}",
        description=description,
        preset_files=preset_files if spec.presets else None,
        also_known=spec.also_known,
        positional=spec.positional,
    )


def _run(command: str, arguments: list[str]) -> None:
    config = parse(command, arguments)
    COMMANDS[command].run(config)


def _whole_name(command: str, arguments: list[str]) -> tuple[str, list[str]]:
    """`evaluate` before `probe ...` is the command `evaluate probe`. Raises ConfigError for another word there."""
    whole = " ".join([command, *arguments[:1]])
    if whole in COMMANDS:
        return whole, arguments[1:]
    longer = [name for name in COMMANDS if name.startswith(f"{command} ")]
    if longer and arguments and not arguments[0].startswith("-"):
        raise ConfigError(f"command {whole} is not known; choose from {', '.join([command, *longer])}")
    return command, arguments


def _overview() -> str:
    lines = [f"  {name:20} {command.description}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: python -m m2d COMMAND [--help] ...", "", *lines])
