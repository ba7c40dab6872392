"""Which checkpoint made a folder of generated images, as far as the folder tells."""

import json
from pathlib import Path

from m2d.errors import CheckpointError, ConfigError
from m2d.generation.output import RECORD_NAME
from m2d.models.checkpoint import checkpoint_sha256, read_info


def find_checkpoint(generated: str, asked: str | None) -> tuple[str | None, list[str]]:
    """The checkpoint's folder, or None, and lines for the report.

    asked: what the user names; it must then be the one that the images' record names, where there is a record. Without
    it the experiment around the images is searched, where m2d's own runs leave them. Raises CheckpointError for a
    folder that is no checkpoint, ConfigError for one that did not make the images.
    """
    recorded = _recorded_sha256(generated)
    if asked is not None:
        read_info(asked)
        sha256 = checkpoint_sha256(Path(asked))
        if recorded not in (None, sha256):
            raise ConfigError(
                f"checkpoint: {asked} ({sha256[:12]}) did not make the images in {generated}, {str(recorded)[:12]} "
                "did; name that one, or leave --checkpoint out"
            )
        return asked, [] if recorded else [f"{generated} does not say what made it; {asked} is taken on trust"]
    if recorded is None:
        return None, [
            f"{generated} does not say what made it and no --checkpoint is given: no autoencoder floor, and whether "
            "the generator saw the test images is not known"
        ]
    for directory in _around(generated):
        try:
            read_info(directory)
            if checkpoint_sha256(directory) == recorded:
                return str(directory), []
        except (CheckpointError, OSError):  # one that is being written, or is of another version
            continue
    return None, [
        f"checkpoint {recorded[:12]}, which made the images, was not found around them: no autoencoder floor; name it "
        "by --checkpoint"
    ]


def _recorded_sha256(generated: str) -> str | None:
    path = Path(generated, RECORD_NAME)
    if "://" in generated or not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return str(record.get("recipe", record)["checkpoint"])
    except (ValueError, KeyError, AttributeError):
        return None


def _around(generated: str) -> list[Path]:
    """Checkpoints of the experiment whose generated_images/ holds the folder."""
    folder = Path(generated).resolve().parent.parent / "checkpoints"
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda path: (path.name != "best", path.name))
