"""Settings of the experiments commands. Light on purpose: the command line reads them before anything else."""

from dataclasses import dataclass

from m2d.errors import require, require_range


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """Which experiments are listed."""

    experiments_dir: str = "./experiments"  # path or URI that holds the experiment directories
    name: str | None = None  # only those of this name: the part before _YYYYMMDD_HHMMSS
    json: bool = False  # for machines


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which experiment's report.html is written again."""

    experiment: str = "latest"  # its directory's name, the beginning of it where only one begins so, or latest
    experiments_dir: str = "./experiments"  # path or URI that holds the experiment directories


@dataclass(frozen=True, kw_only=True)
class ShowConfig(ReportConfig):
    """Which experiment is shown."""

    json: bool = False  # for machines


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Which experiments are compared."""

    experiments: list[str]  # two or more, named as for show
    experiments_dir: str = "./experiments"  # path or URI that holds the experiment directories
    json: bool = False  # for machines

    def __post_init__(self) -> None:
        found = " ".join(self.experiments) or "none"
        message = f"experiments: {found}; compare needs two or more, such as: compare NAME_A NAME_B"
        require(len(self.experiments) >= 2, message)


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """What is removed, and whether it asks first."""

    experiments_dir: str = "./experiments"  # the folder that holds the experiment directories
    keep: int = 5  # so many of each name stay, the newest
    name: str | None = None  # only those of this name: the part before _YYYYMMDD_HHMMSS
    include_unfinished: bool = False  # also what could be resumed, or holds a checkpoint and cannot be read
    caches: bool = False  # keep every experiment and remove the caches of those that are done or superseded
    yes: bool = False  # do not ask
    dry_run: bool = False  # say what would be removed, and stop
    json: bool = False  # for machines; needs yes or dry_run, as it cannot ask

    def __post_init__(self) -> None:
        require_range(self, "", 0, "keep")
        answered = not self.json or self.yes or self.dry_run
        require(answered, "json is set and clean asks first, which a machine cannot answer; add --yes or --dry_run")
