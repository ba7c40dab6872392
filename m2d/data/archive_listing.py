"""The list of a collection's images, page by page and kept on disk: a killed or repeated run asks for no page twice.

m2d.data.download reads it. It knows the API's pages (m2d.data.isic_archive), not what becomes of the images.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from m2d.data.isic_archive import ArchiveImage, collection_number, read_record
from m2d.data.settings import DownloadConfig
from m2d.data.transfer import Refused, Transfer, TransferError, Unreachable
from m2d.errors import DataError
from m2d.files.storage import without_secrets

PAGE_SIZE = 100  # the API gives no more


class Listing:
    """The pages of one collection: those on disk first, then the archive's, each written down as it comes."""

    def __init__(self, config: DownloadConfig, state: Path, transfer: Transfer) -> None:
        """Nothing is asked yet. state: folder of the file that keeps the pages."""
        number = collection_number(config.collection)
        assert number is not None, "checked by DownloadConfig"
        self.collection = number
        self._config = config
        self._api = config.api.rstrip("/")
        self._transfer = transfer
        source = hashlib.sha256(self._api.encode()).hexdigest()[:8]
        self._cache = state / f"listing-{number}-{source}.jsonl"
        self._forget_old = config.fresh_listing

    def entries(self, on_page: Callable[[int, int | None], None]) -> Iterator[ArchiveImage | str]:
        """Every record once, in the archive's order: the image, or in a few words why it is of no use.

        on_page(records so far, records announced) is called after each page that is fetched.
        Raises DataError in one line where the archive cannot be reached or does not answer as it should.
        """
        seen: set[str] = set()
        following: str | None = f"{self._api}/images/search/?collections={self.collection}&limit={PAGE_SIZE}"
        announced: int | None = None
        told = 0
        for page in self._kept_pages():
            entries = [read_record(record) for record in page["results"]]
            yield from _unseen(entries, seen)
            told, following, announced = told + len(entries), page["next"], page["count"] or announced
        if told == 0:
            self._check_collection()
        while following is not None:
            page = self._ask(following)
            entries = [read_record(record) for record in page["results"]]
            fresh = list(_unseen(entries, seen))
            if not fresh and page["next"] is not None:
                raise DataError(f"download: {self._shown} repeats its pages; try again with --download.fresh_listing")
            self._keep(page)
            told, following, announced = told + len(entries), page["next"], page["count"] or announced
            on_page(told, announced)
            yield from fresh

    def ask_again(self, isic_id: str) -> ArchiveImage | None:
        """One image's record as of now, for a signed URL that has expired; None where the archive has it no more."""
        try:
            entry = read_record(self._transfer.get_json(f"{self._api}/images/{isic_id}/"))
        except TransferError:
            return None
        return entry if isinstance(entry, ArchiveImage) and entry.isic_id == isic_id else None

    @property
    def _shown(self) -> str:
        return without_secrets(self._api)

    def _check_collection(self) -> None:
        """A search in a collection that does not exist is empty without a word; so ask for the collection itself."""
        about = self._get(f"{self._api}/collections/{self.collection}/")
        name = about.get("name")
        wanted = str(self._config.collection)
        if wanted == "ham10000" and isinstance(name, str) and "ham10000" not in name.casefold():
            raise DataError(
                f"download.collection: number {self.collection} is called {name[:80]!r} in {self._shown}, "
                "not HAM10000; look its number up there and give that"
            )

    def _ask(self, url: str) -> dict[str, Any]:
        page = self._get(url)
        results, following, count = page.get("results"), page.get("next"), page.get("count")
        if not isinstance(results, list) or not (following is None or isinstance(following, str)):
            raise DataError(
                f"download: {self._shown} answered with JSON that is no page of images; is --download.api right?"
            )
        if following is not None and not _same_host(following, self._api):
            raise DataError(
                f"download: the next page of {self._shown} lies on another host "
                f"({without_secrets(following)[:120]}); refused"
            )
        return {"results": results, "next": following, "count": count if isinstance(count, int) else None}

    def _get(self, url: str) -> dict[str, Any]:
        try:
            return self._transfer.get_json(url)
        except Unreachable as error:
            raise DataError(
                f"download: {self._shown} cannot be reached ({error}); run this where there is a network, "
                "or put the images into class folders by hand"
            ) from error
        except Refused as error:
            if error.status == 404 and "/collections/" in url:
                raise DataError(
                    f"download.collection: {self._shown} has no public collection {self._config.collection} "
                    f"(HTTP 404 for number {self.collection}); look its number up in the archive"
                ) from error
            hint = "is --download.api right?" if error.status == 404 else "check the network and --download.api"
            raise DataError(f"download: {self._shown} did not list the images: {error}; {hint}") from error
        except TransferError as error:
            raise DataError(
                f"download: {self._shown} did not list the images: {error}; run the same command again to go on"
            ) from error

    def _keep(self, page: dict[str, Any]) -> None:
        with self._cache.open("w" if self._forget_old else "a", encoding="utf-8") as stream:
            stream.write(json.dumps(page, ensure_ascii=True) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._forget_old = False  # not before the first new page: without a network the old ones are still good

    def _kept_pages(self) -> Iterator[dict[str, Any]]:
        """Pages on disk; from the first that is torn (a run was killed) or foreign on, the file is cut off."""
        if self._forget_old:
            return
        try:
            lines = self._cache.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return
        good = 0
        for line in lines:
            page = _kept_page(line, self._api)
            if page is None:
                with self._cache.open("r+b") as stream:
                    stream.truncate(good)
                return
            good += len(line)
            yield page


def _kept_page(line: bytes, api: str) -> dict[str, Any] | None:
    try:
        page = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(page, dict) or not isinstance(page.get("results"), list):
        return None
    following = page.get("next")
    usable = following is None or (isinstance(following, str) and _same_host(following, api))
    return {"results": page["results"], "next": following, "count": page.get("count")} if usable else None


def _unseen(entries: list[ArchiveImage | str], seen: set[str]) -> Iterator[ArchiveImage | str]:
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        elif entry.isic_id not in seen:
            seen.add(entry.isic_id)
            yield entry


def _same_host(url: str, api: str) -> bool:
    try:
        one, other = urlsplit(url), urlsplit(api)
        return (one.scheme, one.hostname, one.port) == (other.scheme, other.hostname, other.port)
    except ValueError:
        return False
