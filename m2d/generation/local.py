"""Groups made in this process: threads look at, encode and write one group while the device makes the next."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from m2d.generation.generator import Generator
from m2d.generation.group import GroupResult, GroupWriter, PlanGroups, make_group

_WRITERS = 2  # encoding releases the GIL; more than the device keeps busy would only wait
_AHEAD = 4  # groups made and not yet written: what memory they may take


def make_here(
    generator: Generator, groups: PlanGroups, writer: GroupWriter, *, features: bool
) -> Iterator[GroupResult]:
    """The results of all groups, as they are written. features: compute them, for the gates.

    On an error, and when the caller stops, what was made is still written before this ends. Raises what make_group and
    GroupWriter.write raise.
    """
    waiting: deque[Future[GroupResult]] = deque()
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="m2d-writer") as pool:
        for number in range(len(groups)):
            rows = groups.rows(number)
            made = make_group(generator, rows, with_features=features)
            waiting.append(pool.submit(writer.write, rows, made))
            while waiting and (len(waiting) >= _AHEAD or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
