"""cluster.yaml and its sibling for machines of one's own, as far as they can be held without a cloud."""

import re
import shlex
import socket
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from cluster.cluster_files import FOLDER, LAUNCHER_FILES, ROOT, locked, other_versions, syntax_errors
from ray.autoscaler._private.util import prepare_config, validate_config

AWS, LOCAL = LAUNCHER_FILES
Config = dict[str, Any]
SHELL_LISTS = (
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


def problems(text: str) -> list[str]:
    """What Ray's own checks and this project's refuse, one line each; none for a good file."""
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
    # What Ray would fill in with a default that does harm, such as installing a nightly build.
    needed = ("docker", "file_mounts", "max_workers", "idle_timeout_minutes", "auth", *SHELL_LISTS)
    found = [f"{name} is missing" for name in needed if name not in config]
    if not found:
        found = [problem for check in (_start, _shared_memory, _files, _commands, _nodes) for problem in check(config)]
    return found + [f"not requirements.lock's: {name}" for name in other_versions(text)]


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


def _files(config: Config) -> list[str]:
    """What is mounted is in the repository, where `ray up` runs; the shared storage is there, and jobs know where."""
    local = [source for source in config["file_mounts"].values() if not source.startswith("~")]
    found = [f"file_mounts: {source} is not in the repository" for source in local if not (ROOT / source).exists()]
    options = config["docker"].get("run_options", [])
    on_host = "mountpoint -q /mnt/m2d" in " ".join(config["initialization_commands"])
    if not on_host or "--volume /mnt/m2d:/mnt/m2d" not in options:
        found.append("/mnt/m2d is not mounted on the host and in the container")
    if "--env M2D_STORAGE=/mnt/m2d" not in options:
        found.append("M2D_STORAGE does not tell jobs where the shared storage is")
    return found


def _commands(config: Config) -> list[str]:
    setup = " ".join(config["setup_commands"])
    found = [] if "-c /home/ray/m2d/requirements.lock" in setup else ["setup_commands do not install requirements.lock"]
    written = [(name, command) for name in SHELL_LISTS for command in config[name]]
    if syntax_errors("\n".join(command for _, command in written)):  # one by one only to tell which
        found += [f"{name}: {problem}" for name, command in written for problem in syntax_errors(command)]
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


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a check went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("path", LAUNCHER_FILES, ids=lambda path: path.name)
def test_the_launcher_takes_the_file(path: Path) -> None:
    assert problems(path.read_text()) == []


RAY, PYTHON = str(locked()[0]), f"py{locked()[1]}"
BREAKS = {
    "no provider": (AWS, "provider:\n", "provided:\n", "provider"),
    "no maximum": (AWS, "max_workers: 4\n\n", "\n", "max_workers is missing"),
    "no setup, so a nightly build": (AWS, "\nsetup_commands:", "\nmetadata:\n  setup:", "setup_commands is missing"),
    "a head type that is not there": (AWS, "head_node_type: head", "head_node_type: boss", "head_node_type"),
    "no container's name": (AWS, "  container_name: m2d\n", "", "container"),
    "a word for a number": (AWS, "idle_timeout_minutes: 15", "idle_timeout_minutes: soon", "'soon' is not of type"),
    "half a GPU": (AWS, '"GPU": 4', '"GPU": 0.5', "0.5 is not of type 'integer'"),
    "a misspelt key": (AWS, "upscaling_speed", "upscaling_spede", "upscaling_spede"),
    "a misspelt EC2 parameter": (AWS, "InstanceMarketOptions", "InstanceMarketOption", "InstanceMarketOption'"),
    "more workers kept than allowed": (AWS, "min_workers: 1", "min_workers: 5", "max_workers"),
    "broken YAML": (AWS, "cluster_name: m2d", "cluster_name: [m2d", "not YAML"),
    "another Ray": (AWS, f"ray:{RAY}-{PYTHON}-gpu", f"ray:2.59.0-{PYTHON}-gpu", "not requirements.lock's"),
    "another Python": (AWS, f"ray:{RAY}-{PYTHON}\n", f"ray:{RAY}-py310\n", "not requirements.lock's"),
    "an open cluster": (AWS, "    - --env RAY_AUTH_MODE=token\n", "", "RAY_AUTH_MODE"),
    "no token": (AWS, "  /home/ray/.ray/auth_token: ~/.ray/auth_token\n", "", "the token is not mounted"),
    "a public dashboard": (AWS, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "not on loopback"),
    "little shared memory": (AWS, "--shm-size=44gb", "--shm-size=8gb", "worker: --shm-size"),
    "a head that works": (AWS, '"CPU": 0, "GPU": 0', '"CPU": 8, "GPU": 0', "the head takes work"),
    "a file that is not there": (AWS, "m2d/jobs: jobs", "m2d/jobs: job", "job is not in the repository"),
    "no shared storage": (AWS, "    - --volume /mnt/m2d:/mnt/m2d\n", "", "/mnt/m2d is not mounted"),
    "jobs that do not know the storage": (AWS, "    - --env M2D_STORAGE=/mnt/m2d\n", "", "M2D_STORAGE"),
    "jobs killed at once": (AWS, "STOP_WAIT_TIME_S=60", "STOP_WAIT_TIME_S=3", "a stopped job has no time to save"),
    "on premises, jobs that do not know the storage": (LOCAL, "M2D_STORAGE=/mnt", "M2D_STORAGE=/tmp", "M2D_STORAGE"),
    "a syntax error in a command": (AWS, "- command -v", "- (command -v", "initialization_commands"),
    "on premises, no address of the head": (LOCAL, "  head_ip: 192.0.2.10\n", "", "head_ip"),
    "on premises, node types": (LOCAL, "max_workers: 2", "available_node_types: {a: {}}", "not supported"),
    "on premises, a text for a list": (LOCAL, "[192.0.2.11, 192.0.2.12]", "many", "is not of type 'array'"),
    "on premises, another Ray": (LOCAL, f"ray:{RAY}-", "ray:2.61.0-", "not requirements.lock's"),
    "on premises, a head that works": (LOCAL, "--num-cpus=0 ", "", "the head takes work"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_caught(name: str) -> None:
    path, whole, broken, told = BREAKS[name]
    text = path.read_text()
    assert whole in text
    found = problems(text.replace(whole, broken, 1))
    assert any(told in line for line in found), found


def test_only_what_ray_must_read_at_every_start_is_mounted() -> None:
    """Ray hashes whole directories, ignored files too: the repository's root holds .venv and experiments."""
    for path in LAUNCHER_FILES:
        assert "/home/ray/m2d: ." not in path.read_text()


def test_the_folder_holds_nothing_that_is_not_checked() -> None:
    checked = {*LAUNCHER_FILES, *(FOLDER / name for name in ("kuberay-rayjob.yaml", "kuberay-rayservice.yaml"))}
    checked |= {FOLDER / name for name in ("slurm.sh", "README.md", "Dockerfile")}
    assert {path for path in FOLDER.iterdir() if path.is_file()} <= checked
