"""What is written down of a run holds no secret: settings, messages and logs without the keys in URIs.

Called where records are written. The values in use stay with whoever runs, and come from the command line again.
"""

import logging
from collections.abc import Mapping
from typing import Any

from m2d.files.storage import without_secrets


def blanked(values: Any) -> Any:
    """Settings or a record, of any nesting, with the secrets of each URI in its texts blanked."""
    if isinstance(values, str):
        return without_secrets(values)
    if isinstance(values, Mapping):
        return {key: blanked(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [blanked(value) for value in values]
    return values


class BlankingFormatter(logging.Formatter):
    """Lines of a log file, tracebacks too, with the secrets of each URI in them blanked."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return without_secrets(super().format(record))
