"""Runs that a report is written of."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from report_run import Page, Run, write_full_run, write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """make_run(config={...}, **info): a finished run's record and settings, nothing else."""
    return partial(write_run, tmp_path)


@pytest.fixture
def full_run(tmp_path: Path) -> Run:
    """A finished run with one of everything."""
    return write_full_run(tmp_path)


@pytest.fixture(scope="module")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Its report."""
    return write_full_run(tmp_path_factory.mktemp("full")).page()
