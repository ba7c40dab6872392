"""The one parser: `python -m m2d COMMAND` and jobs/*.py are the same commands.

Every setting is a flag (--batch_size and --batch-size alike), a key of a --config file, or part of a --preset; flags
win over files, a later file over an earlier one. Heavy packages are imported after the arguments are known to be good.
"""

import errno
import io
import os
import pkgutil
import select
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from m2d import __version__
from m2d.arguments import parse_arguments, preset_names
from m2d.data.settings import SetupConfig
from m2d.errors import ConfigError, Incomplete, M2DError
from m2d.evaluation.settings import EvaluateConfig, PickConfig, ProbeConfig
from m2d.experiments.settings import CleanConfig, CompareConfig, ListConfig, ReportConfig, ShowConfig
from m2d.export.settings import ExportConfig
from m2d.files.atomic import FULL
from m2d.files.paths import ensure_home
from m2d.generation.settings import GenerateConfig, VerifyConfig
from m2d.serving.settings import KeysConfig, ServeConfig
from m2d.training.settings import TrainConfig
from m2d.tuning.settings import SweepConfig


@dataclass(frozen=True)
class Command:
    """One command: its settings, and the function that they go to, named so that only its own command imports it."""

    config: type
    run: str  # module:function
    description: str
    presets: bool = False
    also_known: type | None = None  # another command's settings: a file of that one serves this one too
    positional: str | None = None  # the setting that words without a flag are
    only_says: bool = False  # what it prints is all that it does
    resumes: bool = True  # what an interrupted one did is not done again


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo: images, a training run with two workers, samples."""

    directory: str = "./demo"  # where images, experiment and samples go
    images: int = 700  # rendered ones, of all classes together
    num_samples: int = 6  # per class
    fresh: bool = False  # render and train again


LISTING = "m2d.experiments.commands:list_command"
GONE = (errno.EPIPE, errno.EIO)  # of a pipe whose reader has ended, and of a terminal that was closed
COMMANDS: dict[str, Command] = {
    "train": Command(
        TrainConfig, "m2d.cli:run_training", "Train on a folder of class folders; run again to resume.", presets=True
    ),
    "setup_data": Command(
        SetupConfig,
        "m2d.data.setup:setup_data",
        "Scan a dataset, prepare its images and cache the extractor's features; run again to resume.",
        presets=True,
        also_known=TrainConfig,
    ),
    "generate": Command(GenerateConfig, "m2d.generation.run:generate", "Generate labelled images from a checkpoint."),
    "verify": Command(
        VerifyConfig,
        "m2d.generation.verify:verify",
        "Verify what images say of themselves: text, signed manifest, and whether they were changed.",
        positional="files",
        only_says=True,
    ),
    "serve": Command(
        ServeConfig, "m2d.serving.command:serve_command", "Serve images on demand over HTTP, and a page, on Ray Serve."
    ),
    "serve keys": Command(
        KeysConfig,
        "m2d.serving.access:keys_command",
        "Serve by API keys: keys add NAME, keys list, keys remove NAME.",
        positional="words",
        only_says=True,
    ),
    "evaluate": Command(
        EvaluateConfig,
        "m2d.evaluation.evaluate:evaluate",
        "Evaluate realism, diversity and privacy of generated images, and whether they help.",
    ),
    "evaluate probe": Command(
        ProbeConfig,
        "m2d.evaluation.classifiers.probe:probe",
        "Evaluate how well a linear probe on features predicts the classes.",
    ),
    "evaluate pick": Command(
        PickConfig,
        "m2d.evaluation.pick:pick",
        "Pick the images of a run that show their class best and differ most, or as many at random.",
    ),
    "tune": Command(
        SweepConfig,
        "m2d.tuning.sweep:sweep",
        "Sweep loss weights and learning rates; run again to resume.",
        presets=True,
    ),
    "experiments": Command(ListConfig, LISTING, "List the experiments; the same as experiments list.", only_says=True),
    "experiments list": Command(
        ListConfig, LISTING, "List the experiments, their states and best measures.", only_says=True
    ),
    "experiments show": Command(
        ShowConfig,
        "m2d.experiments.commands:show_command",
        "Show one experiment: what it did, how it went, how to continue it.",
        positional="experiment",
        only_says=True,
    ),
    "experiments compare": Command(
        CompareConfig,
        "m2d.experiments.commands:compare_command",
        "Set experiments side by side: settings that differ, measures.",
        positional="experiments",
        only_says=True,
    ),
    "experiments report": Command(
        ReportConfig,
        "m2d.experiments.page:report_experiment",
        "Write an experiment's report.html again.",
        positional="experiment",
    ),
    "experiments clean": Command(
        CleanConfig, "m2d.experiments.commands:clean_command", "Remove old experiments; asks first."
    ),
    "export": Command(
        ExportConfig,
        "m2d.export.export:export",
        "Share a checkpoint as a folder, or on the Hugging Face hub, that diffusers loads, with a model card.",
        positional="checkpoint",
        resumes=False,
    ),
    "demo": Command(
        DemoConfig, "m2d.demo_command:run_demo", "Render demo images, train on them with two workers, generate samples."
    ),
}


def main(command: str, arguments: Sequence[str] | None = None) -> None:
    """Run one command as a script: exit code 0, or an M2DError's after its line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    keep_saying()
    only_says = True  # --help and --print_config
    try:
        ensure_home()
        # `evaluate` before `probe ...` is the command `evaluate probe`.
        longer = [name for name in COMMANDS if name.startswith(f"{command} ")]
        if longer and given and not given[0].startswith("-"):
            command = f"{command} {given.pop(0)}"
            if command not in longer:
                known = ", ".join([command.partition(" ")[0], *longer])
                raise ConfigError(f"command {command} is not known; choose from {known}")
        config = parse(command, given)
        only_says = COMMANDS[command].only_says or getattr(config, "dry_run", False)
        pkgutil.resolve_name(COMMANDS[command].run)(config)
    except M2DError as error:
        print(f"error: {error}" if error.exit_code == M2DError.exit_code else str(error), file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"error: {error.filename}: {error.strerror}; make room and run the same command again", file=sys.stderr)
        sys.exit(M2DError.exit_code)
    except KeyboardInterrupt:
        resumes = COMMANDS[command].resumes and not only_says
        print(f"interrupted; run the same command again{' to resume' if resumes else ''}", file=sys.stderr)
        sys.exit(130)
    finally:
        lost = getattr(getattr(sys.stdout, "buffer", None), "lost", None)
        if only_says and lost:
            print(f"error: stdout cannot be written ({lost}); make room, or send it elsewhere", file=sys.stderr)
            sys.exit(M2DError.exit_code)


def main_from_shell(arguments: Sequence[str] | None = None) -> None:
    """`m2d COMMAND ...`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    keep_saying()
    if not given or given[0] in ("-h", "--help"):
        lines = [f"  {name:20} {command.description}" for name, command in COMMANDS.items()]
        print("\n".join(["usage: python -m m2d COMMAND [--help] ...", "", *lines]))
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
    return parse_arguments(
        spec.config,
        arguments,
        prog=f"python -m m2d {command}",
        description=spec.description + (f" Presets: {', '.join(preset_names())}." if spec.presets else ""),
        presets=spec.presets,
        also_known=spec.also_known,
        positional=spec.positional,
    )


def keep_saying() -> None:
    """From here on a console that is gone, full or without a character breaks nothing, in a signal's handler either."""
    for name in ("stdout", "stderr"):
        stream, first = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is not first:
            continue  # a test's, a notebook's, or made here before
        if stream is None:  # closed by the shell (`>&-`); the next file that is opened must not take its number
            raw, encoding = _Console(os.devnull, "w"), "utf-8"
        else:
            stream.flush()
            raw, encoding = _Console(stream.fileno(), "w", closefd=False), stream.encoding
        how: dict[str, Any] = {"encoding": encoding, "errors": "backslashreplace", "line_buffering": True}
        setattr(sys, name, io.TextIOWrapper(raw, **how))


class _Console(io.FileIO):
    """stdout or stderr. What nobody reads is dropped.

    Without a buffer, which raises where a signal's handler writes while the main thread does, and where what is left
    in it is flushed as the process ends.
    """

    lost: str | None = None  # why text was dropped although it has a reader, such as a log on a full disk

    def write(self, text: Any, /) -> int:
        """Write it all, waiting where the reader takes no more. Never raises OSError."""
        rest = memoryview(text)
        try:
            while rest:
                written: int | None = super().write(rest)
                if written is None:  # another program has set the pipe not to block
                    select.select([], [self], [])
                rest = rest[written or 0 :]
        except OSError as error:
            if error.errno not in GONE:
                self.lost = error.strerror
        return len(text)


def run_training(config: TrainConfig) -> None:
    """Train, then write the page; with dry_run only say what it would need. Raises Incomplete: most steps skipped."""
    if config.dry_run:
        from m2d.training.dry_run import dry_run

        dry_run(config)
        return

    from m2d.training.trainer import MOST_SKIPPED, train

    experiment = train(config)
    try:
        from m2d.experiments.page import write_report

        print(f"report: {write_report(experiment)}")
    except Exception as error:  # the run is complete; a page about it must not make it look failed
        reason = " ".join(str(error).split()) or type(error).__name__
        again = f"python -m m2d experiments report {experiment.name} --experiments_dir {config.experiments_dir}"
        print(f"WARNING: the report could not be written ({reason}); try again: {again}")
    info = experiment.info()
    if info.get("skipped_steps", 0) > MOST_SKIPPED * info["total_steps"]:
        raise Incomplete(f"incomplete: {info['degraded'][-1]}")
