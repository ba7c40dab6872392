"""The images that the runs of these tests train on."""

from pathlib import Path

import pytest
from tiny_run import write_images


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))
