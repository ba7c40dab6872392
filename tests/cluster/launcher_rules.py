"""What is wrong with a file for Ray's cluster launcher: Ray's own checks, and what this project asks of it besides."""

import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from cluster.cluster_files import other_versions
from cluster.shell import problems as shell_problems
from ray.autoscaler._private.util import prepare_config, validate_config

Config = dict[str, Any]
COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip
TOKEN = "/home/ray/.ray/auth_token"  # where Ray looks for it in its own images
# Of EC2's parameters of an instance, those that the project uses; Ray hands them on unread.
NODE_CONFIG = {
    "type": "object",
    "required": ["InstanceType", "ImageId", "BlockDeviceMappings"],
    "additionalProperties": False,
    "properties": {
        "InstanceType": {"type": "string", "pattern": r"^[a-z]\w*\.\w+$"},
        "ImageId": {"type": "string", "pattern": "^ami-[0-9a-f]{17}$"},
        "InstanceMarketOptions": {"type": "object", "properties": {"MarketType": {"const": "spot"}}},
        "BlockDeviceMappings": {"type": "array", "items": {"required": ["DeviceName", "Ebs"]}},
    },
}


def problems(text: str, root: Path) -> list[str]:
    """One line for each; none for a good file. root: where `ray up` runs, which file_mounts are relative to."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [f"not YAML: {' '.join(str(error).split())}"]
    try:
        validate_config(prepare_config(config))
    except jsonschema.ValidationError as error:
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}"]
    # Ray's checks raise whatever comes to hand; `click` ends the process.
    except (Exception, SystemExit) as error:
        return [f"{type(error).__name__}: {error}"]
    found = _missing(config)
    if not found:
        for check in (_start, _shared_memory, _shared_storage, _commands, _nodes):
            found += check(config)
        found += _mounts(config, root)
    return found + [f"not requirements.lock's: {name}" for name in other_versions(text)]


def _missing(config: Config) -> list[str]:
    """What Ray would fill in with a default that does harm, such as installing a nightly build."""
    needed = ("docker", "file_mounts", "max_workers", "idle_timeout_minutes", "auth", *COMMANDS)
    return [f"{name} is missing" for name in needed if name not in config]


def _option(words: list[str], name: str) -> str | None:
    values = [word.partition("=")[2] for word in words if word.partition("=")[0] == name]
    return values[-1] if values else None


def _start_words(config: Config, which: str) -> list[str]:
    starts = [command for command in config[f"{which}_start_ray_commands"] if "ray start" in command]
    return shlex.split(starts[0]) if len(starts) == 1 else []


def _start(config: Config) -> list[str]:
    """Closed to strangers: a token for every process, and a dashboard that only the head's own machine reaches."""
    head, worker = _start_words(config, "head"), _start_words(config, "worker")
    wanted = {
        "the head does not run ray start --head": "--head" in head,
        "the dashboard is not on loopback": _option(head, "--dashboard-host") == "127.0.0.1",
        "the head tells the autoscaler nothing": _option(head, "--autoscaling-config") is not None,
        "a worker does not join the head": _option(worker, "--address") == "$RAY_HEAD_IP:6379",
        "the head listens elsewhere": _option(head, "--port") == "6379",
        "RAY_AUTH_MODE=token is not set": "--env RAY_AUTH_MODE=token" in config["docker"].get("run_options", []),
        "a stopped job has no time to save": any(
            re.fullmatch(r"--env RAY_JOB_STOP_WAIT_TIME_S=\d\d+", option)
            for option in config["docker"].get("run_options", [])
        ),
        "the token is not mounted": config["file_mounts"].get(TOKEN) == "~/.ray/auth_token",
    }
    return [problem for problem, good in wanted.items() if not good]


def _shared_memory(config: Config) -> list[str]:
    """/dev/shm is larger than the object store, or Ray falls back to the disk."""
    found = []
    for which in ("head", "worker"):
        options = " ".join(config["docker"].get(f"{which}_run_options", []))
        size = re.search(r"--shm-size=(\d+)gb\b", options)
        store = _option(_start_words(config, which), "--object-store-memory")
        # Docker's gb is 2^30 bytes.
        if size is None or store is None or not 1.05 * int(store) <= int(size[1]) * 2**30:
            found.append(f"{which}: --shm-size {size and size[0]} is too small for --object-store-memory {store}")
    return found


def _mounts(config: Config, root: Path) -> list[str]:
    local = [source for source in config["file_mounts"].values() if not source.startswith("~")]
    return [f"file_mounts: {source} is not in the repository" for source in local if not (root / source).exists()]


def _shared_storage(config: Config) -> list[str]:
    inside = "--volume /mnt/m2d:/mnt/m2d" in config["docker"].get("run_options", [])
    on_host = "mountpoint -q /mnt/m2d" in " ".join(config["initialization_commands"])
    found = [] if inside and on_host else ["/mnt/m2d is not mounted on the host and in the container"]
    told = "--env M2D_STORAGE=/mnt/m2d" in config["docker"].get("run_options", [])
    return found if told else [*found, "M2D_STORAGE does not tell jobs where the shared storage is"]


def _commands(config: Config) -> list[str]:
    setup = " ".join(config["setup_commands"])
    found = [] if "-c /home/ray/m2d/requirements.lock" in setup else ["setup_commands do not install requirements.lock"]
    written = [(name, command) for name in COMMANDS for command in config[name]]
    if shell_problems("\n".join(command for _, command in written)):  # one by one only to tell which
        found += [f"{name}: {problem}" for name, command in written for problem in shell_problems(command)]
    return found


def _nodes(config: Config) -> list[str]:
    """On AWS: EC2's parameters, a head without work, spot workers that say what they have."""
    if config["provider"]["type"] != "aws":
        idle = {"--num-cpus": "0", "--num-gpus": "0"}
        head = _start_words(config, "head")
        return [f"the head takes work: {name}" for name, value in idle.items() if _option(head, name) != value]
    found = []
    for name, node in config["available_node_types"].items():
        errors = jsonschema.Draft202012Validator(NODE_CONFIG).iter_errors(node["node_config"])
        found += [f"{name}: {error.message}" for error in errors]
        if not node.get("labels"):
            found.append(f"{name}: no labels")
        if name == config["head_node_type"]:
            if any(node["resources"].get(kind) != 0 for kind in ("CPU", "GPU")):
                found.append(f"{name}: the head takes work")
        elif not (node["resources"].get("GPU", 0) > 0 and "InstanceMarketOptions" in node["node_config"]):
            found.append(f"{name}: no GPU, or not a spot instance")
    return found
