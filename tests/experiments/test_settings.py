"""The commands' settings as the command line gives them."""

import subprocess
import sys
from typing import Any

import pytest

from m2d.arguments import parse_arguments, setting_comments, setting_types
from m2d.experiments.settings import CleanConfig, CompareConfig, ListConfig, ShowConfig


def parsed(config: type, *arguments: str) -> Any:
    return parse_arguments(config, arguments, prog="m2d", description="")


def test_flags_reach_their_settings() -> None:
    assert parsed(CleanConfig, "--keep", "3", "--dry-run", "--experiments_dir", "/runs") == CleanConfig(
        keep=3, dry_run=True, experiments_dir="/runs"
    )
    assert parsed(ListConfig, "--json") == ListConfig(json=True)


def test_names_that_look_like_numbers_stay_names() -> None:
    assert parsed(ShowConfig, "--experiment=2025").experiment == "2025"
    assert parsed(CompareConfig, '--experiments=["2025", "1e3"]').experiments == ["2025", "1e3"]


@pytest.mark.parametrize("config", [ListConfig, ShowConfig, CleanConfig, CompareConfig])
def test_every_setting_says_what_it_is(config: type) -> None:
    assert dict(setting_comments(config)).keys() == dict(setting_types(config)).keys()


def test_no_command_loads_torch() -> None:
    """So that a list is there at once."""
    program = """
import sys
from m2d.experiments import commands, settings
print(sorted({"torch", "ray", "matplotlib", "diffusers", "wandb"} & sys.modules.keys()))
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
