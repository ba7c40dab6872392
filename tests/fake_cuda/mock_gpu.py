"""Builds the mock GPU and runs the lane_*.py tests with it: python tests/fake_cuda/mock_gpu.py [pytest's arguments].

They run in a process of their own, because the mock must be loaded before torch is.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def reason_not_to_build() -> str | None:
    """What the mock GPU lacks on this machine; None where nothing is missing."""
    if not sys.platform.startswith("linux"):
        return "the mock GPU is loaded by LD_PRELOAD, which needs Linux"
    if _compiler() is None:
        return "the mock GPU needs a C compiler; there is no cc or gcc"
    if importlib.util.find_spec("triton") is None:
        return "the mock GPU needs CUDA's type headers, which come with triton, and triton is not installed"
    return None


def build(folder: Path) -> Path:
    """Compile the mock into the folder; returns the library. Only where `reason_not_to_build` has none."""
    headers = Path(str(importlib.util.find_spec("triton").origin)).parent / "backends" / "nvidia" / "include"
    compiler = _compiler()
    library = folder / "libmock_gpu.so"
    # With the driver's soname, so that torch finds the driver already loaded.
    options = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-pthread"]
    subprocess.run([compiler, *options, f"-I{headers}", HERE / "mock_gpu.c", "-o", library], check=True)
    return library


def run_lane(library: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the lane_*.py tests with the mock; stdout holds stderr too."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTORCH_"))}
    environment |= {
        "LD_PRELOAD": f"{library} {os.environ.get('LD_PRELOAD', '')}".strip(),
        "OMP_NUM_THREADS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":0:0",  # no workspaces, so that memory counts tensors alone
        "CUBLASLT_WORKSPACE_SIZE": "0",
    }
    lane = sorted(str(path) for path in HERE.glob("lane_*.py"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", *lane, *arguments]
    return subprocess.run(
        command, cwd=HERE.parents[1], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        ran = run_lane(build(Path(temporary)), *sys.argv[1:])
    print(ran.stdout, end="")
    sys.exit(ran.returncode)
