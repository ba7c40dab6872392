"""Sending an export to the Hugging Face hub. The token is the hub client's own: HF_TOKEN, or `hf auth login`."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from m2d.errors import ConfigError, first_line
from m2d.export.settings import ExportConfig
from m2d.models.published import repository


def send(config: ExportConfig, write: Callable[[Path, str], None], kind: str = "model") -> str:
    """Write an export into a temporary folder and send it. Returns its address, or with dry_run the location asked for.

    write: (empty folder, USER/NAME) -> its files. kind: model or dataset. Files that the repository has already are
    not sent again. Raises ConfigError where the hub refuses, CheckpointError for a location that names no repository.
    """
    name, revision = repository("to", config.to)
    with tempfile.TemporaryDirectory(prefix="m2d-export-") as made:
        folder = Path(made)
        write(folder, name)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if config.dry_run:
            for file in files:
                print(f"{file.stat().st_size:>12,}  {file.relative_to(folder)}")
            print(
                f"would send {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB, to {name}"
            )
            return config.to
        return _upload(folder, name, revision, kind, private=config.private)


def _upload(folder: Path, name: str, revision: str | None, kind: str, *, private: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        address = api.create_repo(name, repo_type=kind, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, repo_type=kind, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, repo_type=kind, revision=revision, commit_message="Export by M2D"
        )
    except LocalTokenNotFoundError:
        raise ConfigError(f"to: {name}: there is no token; log in by hf auth login, or set HF_TOKEN") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"to: {name} cannot be sent ({first_line(error)}); check network and token (hf auth login), then run again"
        ) from None
    print(f"sent to {address}")
    return str(address)
