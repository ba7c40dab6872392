"""The work of one image task: decode a few hundred images and write them as one file.

m2d.data.prepare hands such jobs to Ray; nothing here knows of it, nor of torch, which would take each decoding process
seconds and 200 MB. A job returns small numbers, the file holds the rest.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m2d.cluster.fan_out import JobResult
from m2d.data.decode import ImageRejected, decode_resized
from m2d.data.prepared import write_images
from m2d.data.reader import READ_THREADS, ImageReader


@dataclass(frozen=True)
class ImageJobs:
    """Job j: decode the rows `rows[j]` of the reader's catalog. Cheap to pickle."""

    reader: ImageReader
    folder: Path  # of the dataset, in the cache
    paths: Sequence[str]  # of all rows
    sha256: Sequence[str]
    rows: Sequence[np.ndarray]

    def run(self, job: int) -> JobResult:
        """Write the file of job j, without the images that cannot be had."""
        rows = [int(row) for row in self.rows[job]]
        with ThreadPoolExecutor(READ_THREADS) as pool:
            found = list(pool.map(self._decode, rows))
        good = [row for row, pixels in zip(rows, found, strict=True) if isinstance(pixels, np.ndarray)]
        failures = [f"{self.paths[row]}: {why}" for row, why in zip(rows, found, strict=True) if isinstance(why, str)]
        if good:
            pixels = np.stack([image for image in found if isinstance(image, np.ndarray)])
            write_images(self.folder, self.reader.image_size, [self.sha256[row] for row in good], pixels)
        return JobResult(len(good), failures)

    def _decode(self, row: int) -> np.ndarray | str:
        encoded = self.reader.fetch_file(row)
        if isinstance(encoded, str):
            return encoded
        if hashlib.sha256(encoded).hexdigest() != self.sha256[row]:
            return "has changed since the scan"
        try:
            return decode_resized(encoded, self.reader.image_size, max_pixels=self.reader.max_pixels)
        except ImageRejected as rejection:
            return rejection.reason
