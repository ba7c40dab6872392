"""The nodes of the Ray cluster that is joined: the paths that they see, what their GPUs can do, waiting for more."""

import ctypes
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path

from m2d.errors import ConfigError, first_line
from m2d.models.settings import Precision

logger = logging.getLogger(__name__)
ANSWER_S = 120.0  # a node may first have to start a process, or to fetch a job's working directory
APPEAR_S = 5.0  # in which a shared file system shows a new file to another node
POLL_S = 2.0
DRIVER = Path("/proc/driver/nvidia/version")  # of NVIDIA's kernel module
GPU_SHARE = 0.01  # of a task that only asks: it finds room beside others
ENTRIES = 64  # of a folder that is read, which another node has to have too
FIX = "name a path on storage that every node mounts under this name (NFS, EFS), or run on one node"


Look = tuple[str, str, list[str]]  # what a node has to find: a setting's folder, and these entries in it


def require_shared(*, written: Mapping[str, str], read: Mapping[str, str]) -> None:
    """Raise ConfigError where a node that works for us does not see what this one does under the same path.

    written, read: setting -> local path or URI. A `written` folder is made if need be, and for the time of the check
    holds a file that the nodes look for; of a `read` one the first entries have to be there, and what is not here is
    passed over. A URI is no matter where it is read, and refused as `written`: its files are staged on this machine.
    Costs nothing where no other node works; a node that does not answer in time is warned of and passed over.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    others = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here and node["Resources"].get("CPU", 0) > 0
    }
    if not others:
        return
    looks: list[Look] = []
    for setting, path in read.items():
        if "://" not in path and os.path.isdir(path):  # hidden entries may be gone in a moment
            looks.append((setting, path, sorted(name for name in os.listdir(path) if name[0] != ".")[:ENTRIES]))
    markers = []
    try:
        for setting, path in written.items():
            if "://" in path:
                raise ConfigError(
                    f"{setting}: {path} is a URI, whose files are staged on one machine, and the cluster has "
                    f"{len(others)} other running node(s); {FIX}"
                )
            markers.append(Path(path) / f".m2d-seen-by-{uuid.uuid4().hex}")
            looks.append((setting, path, [markers[-1].name]))
            try:
                markers[-1].parent.mkdir(parents=True, exist_ok=True)
                markers[-1].touch()
            except OSError as error:
                markers.pop()
                raise ConfigError(f"{setting}: {path} cannot be written ({error.strerror}); name another") from None
        unseen = _unseen(others, looks)
    finally:
        for marker in markers:
            marker.unlink(missing_ok=True)
    for setting, path, _ in looks:
        addresses = sorted({others[node] for node, settings in unseen.items() if setting in settings})
        if addresses:
            more = f" and {len(addresses) - 1} more" if len(addresses) > 1 else ""
            raise ConfigError(
                f"{setting}: {path} of this machine is not seen by the node {addresses[0]}{more}, which has another "
                f"folder or none there; {FIX}"
            )


def _unseen(others: Mapping[str, str], looks: list[Look]) -> dict[str, list[str]]:
    """Node id -> the settings whose paths it does not see."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(not_seen)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(looks): node
        for node in others
    }
    ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    unseen = {}
    for answer, node in asked.items():
        try:
            unseen[node] = ray.get(answer, timeout=0)
        except ray.exceptions.RayTaskError as error:
            raise _cannot_run(f"the node {others[node]}", error) from None
        except ray.exceptions.RayError as error:  # it went away or is slow; what else runs there notices by itself
            ray.cancel(answer, force=True)
            reason = first_line(error)
            logger.warning("the node %s did not report which paths it sees (%s); continuing", others[node], reason)
    return unseen


def not_seen(looks: list[Look]) -> list[str]:
    """The settings whose paths the machine where this runs does not see as they should be."""
    deadline = time.monotonic() + APPEAR_S
    while True:
        unseen = [
            setting
            for setting, path, entries in looks
            if not (os.path.isdir(path) and all(os.path.lexists(os.path.join(path, entry)) for entry in entries))
        ]
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(0.2)


def wait_for_nodes(bundles: Sequence[Mapping[str, float]], wait_s: float, say: Callable[[str], None]) -> bool:
    """Ask a cluster that grows by itself for room for `bundles` at once; whether it has it, after at most wait_s.

    bundles: resource -> amount, what one worker needs on one node. A cluster that does not grow would be waited for in
    vain, and nothing public says which does: so the caller waits only where the user asked for it. Ray keeps one such
    request for the whole cluster; it is withdrawn at the end so that the nodes do not stay forever.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    needed = {name: sum(one.get(name, 0) for one in bundles) for bundle in bundles for name in bundle}
    deadline, said, asked = time.monotonic() + wait_s, "", False
    try:
        while True:
            there = ray.cluster_resources()
            lacking = [name for name, amount in needed.items() if there.get(name, 0) < amount]
            if not lacking or time.monotonic() >= deadline:
                return not lacking
            if not asked:
                request_resources(bundles=[{name: ceil(amount) for name, amount in one.items()} for one in bundles])
                asked = True
            state = ", ".join(f"{there.get(name, 0):g} of {needed[name]:g} {name}" for name in lacking)
            if state != said:
                say(f"waiting up to {wait_s:g} s for nodes: the cluster has {state}")
                said = state
            time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
    finally:
        if asked:
            request_resources(bundles=[])


def node_resources() -> list[dict[str, float]]:
    """What each node of the cluster that is joined has, by Ray's names."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def cluster_total(name: str) -> float:
    """How much of a resource, by Ray's name, the nodes of the cluster that is joined have together."""
    import ray

    return float(ray.cluster_resources().get(name, 0))


def places(bundle: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """Workers that the nodes hold together, each of which takes the whole `bundle` from one node."""
    asked = [(name, amount) for name, amount in bundle.items() if amount > 0]
    return sum(max(0, min(floor(node.get(name, 0) / amount + 1e-9) for name, amount in asked)) for node in nodes)


@dataclass(frozen=True)
class GpuFacts:
    """What torch says of a machine's GPU."""

    name: str | None  # None: torch sees no GPU there
    precision: Precision  # in which networks compute there, unless the user asks for another
    torch: str  # its version
    cuda: str | None  # that this torch was built for; None: for none
    driver: str | None  # version of NVIDIA's driver; None: there is none
    driver_cuda: str | None  # the newest CUDA that this driver runs

    @property
    def advice(self) -> str:
        """Why torch sees no GPU here, as far as versions tell, and the ways out."""
        built = "without CUDA" if self.cuda is None else f"for CUDA {self.cuda}"
        runs = "" if self.driver_cuda is None else f", which runs CUDA up to {self.driver_cuda}"
        if self.driver_cuda is None:
            way_out = "libcuda.so.1 cannot be loaded: install the driver, or give the container its GPUs"
        elif self.cuda is None or float(self.driver_cuda) < float(self.cuda.partition(".")[0]):
            way_out = (
                f"install a newer driver (CUDA 13 needs R580), or torch built for CUDA {self.driver_cuda} or older"
            )
        else:
            way_out = "look whether CUDA_VISIBLE_DEVICES hides the GPU, and whether nvidia-smi shows it"
        return f"torch {self.torch} is built {built}, NVIDIA's driver is {self.driver or 'not found'}{runs}; {way_out}"


def gpu_facts() -> GpuFacts:
    """Those of the process where this runs."""
    import torch

    from m2d.models.precision import pick_precision

    sees = torch.cuda.is_available()
    driver = driver_cuda = None
    try:
        # `535.183.01` of `NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  ...`, which has several forms.
        found = re.search(r"NVRM version:.*?\s(\d+\.\d[\d.]*)", DRIVER.read_text(encoding="utf-8"))
        driver = found[1] if found else "of an unknown version"
    except OSError:
        pass
    try:
        # `12.2`, as the driver's own library says; torch asks it too, and is silent where the answer is too low.
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            driver_cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    except (OSError, AttributeError):
        pass
    return GpuFacts(
        name=torch.cuda.get_device_name() if sees else None,
        precision=pick_precision(None, torch.device("cuda" if sees else "cpu")),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        driver=driver,
        driver_cuda=driver_cuda,
    )


def cluster_gpu() -> GpuFacts:
    """Those of one of the cluster's GPUs, asked by a small task there: the driver's machine may have none.

    Waits for a GPU that is not wholly taken. Raises ConfigError where the node cannot run M2D, or torch there does not
    see the GPU that Ray counts: Ray asks the driver's management library, which an older driver has too.
    """
    import ray

    answer = ray.remote(num_gpus=GPU_SHARE, num_cpus=0)(gpu_facts).remote()
    if not ray.wait([answer], timeout=ANSWER_S)[0]:
        logger.warning("all GPUs of the cluster are taken; waiting for one")
    try:
        facts: GpuFacts = ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise _cannot_run("a GPU node", error) from None
    if facts.name is None:
        raise ConfigError(f"Ray counts GPUs and torch sees none: {facts.advice}")
    return facts


def device_of_actor(device: str) -> str:
    """What an actor or a task calls the GPU that it reserves. It sees no other: `cuda:1` out here is its `cuda`."""
    return device.partition(":")[0]


def _cannot_run(node: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{node} cannot run M2D ({str(error).strip().splitlines()[-1]}); install it there, or submit the job with "
        "--working-dir ."
    )
