"""Networks, steps, generator, extractors and evaluation with device cuda, on a GPU that computes nothing.

One subprocess runs all lane_*.py tests of this folder; this test fails with their report.
"""

import os
from pathlib import Path

import pytest
from fake_cuda.mock_gpu import build, reason_not_to_build, run_lane

MISSING = reason_not_to_build()


@pytest.mark.fake_cuda
@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None and not os.environ.get("CI"), reason=str(MISSING))
def test_gpu_code_runs_on_cuda_and_no_step_waits_for_the_host(tmp_path: Path) -> None:
    assert MISSING is None
    lane = run_lane(build(tmp_path))
    if lane.returncode != 0:
        pytest.fail(lane.stdout, pytrace=False)
