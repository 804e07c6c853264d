"""The files in which workers keep their metrics: read as one whole, and folded together when a worker is gone.

prometheus_client writes them: one for each worker and type of metric, ``counter_PID.db``. When the worker has ended,
its file becomes ``counter_PID-GENERATION.db``, for the process ID may soon be another's, and is then added up with all
before it in ``counter_archive-GENERATION.db``. Of the archives the newest alone counts, and what has its generation or
an older one is in it. So one rename decides where a value is counted, and whatever is interrupted, killed or looked at
in between, it is counted once.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple

from prometheus_client import values
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

ADDED_UP = ("counter", "histogram", "summary")  # types whose values outlive their worker
ARCHIVE = "archive"
NAME = re.compile(r"([a-z]+)_(.+?)(?:-(\d+))?\.db")  # type, whose, generation
PATIENCE = 5.0  # seconds of reading anew while files come and go; a worker that starts or ends costs a moment
PAUSE = 0.001  # seconds before that
ENTRY_BYTES = 28  # that an entry takes beside its key, at most (see MmapedDict)


class _File(NamedTuple):
    path: Path
    kind: str
    whose: str
    generation: int  # 0: of a worker that lives


def directory() -> Path | None:
    """Where the workers of this process's gateway keep their metrics; None: it keeps its own in memory."""
    if not values.ValueClass._multiprocess:
        return None
    return Path(MultiProcessCollector(None)._path)  # type: ignore[no-untyped-call]


class AllWorkers(Collector):
    """What the workers that use a directory have counted together, those that are gone included.

    Raises:
        RuntimeError: at a scrape, if the files do not hold still.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def collect(self) -> Iterable[Metric]:
        give_up = monotonic() + PATIENCE
        while True:
            files = _that_count(_listed(self.directory))
            try:  # what is empty is only just being made
                paths = [str(file.path) for file in files if file.path.stat().st_size]
                metrics: Iterable[Metric] = MultiProcessCollector.merge(paths)  # type: ignore[no-untyped-call]
                if files == _that_count(_listed(self.directory)):  # else one may be another worker's by now
                    return metrics
            except FileNotFoundError:
                pass
            if monotonic() > give_up:
                raise RuntimeError(f"The files of metrics in {self.directory} change all the time")
            sleep(PAUSE)


def fold_in(directory: Path, pid: int) -> None:
    """Add up what a worker that has ended has counted with what others had before it; what it said of the present goes.

    It is for one process, the one that starts the workers, before another of them can have the process ID.

    Raises:
        OSError: there is no room; nothing is lost, and the next call makes up for it.
    """
    with suppress(FileNotFoundError):  # a worker has been faster, and sees to the others
        mark_process_dead(pid, str(directory))  # type: ignore[no-untyped-call]
    files = _listed(directory)
    for kind in ADDED_UP:
        generation = 1 + max((file.generation for file in files if file.kind == kind), default=0)
        with suppress(FileNotFoundError):  # it had counted nothing
            (directory / f"{kind}_{pid}.db").rename(directory / f"{kind}_{pid}-{generation}.db")
    for kind in ADDED_UP:
        _fold_in(directory, kind)


def _fold_in(directory: Path, kind: str) -> None:
    files = [file for file in _listed(directory) if file.kind == kind and file.generation]
    sources = _that_count(files)
    for file in files:
        if file not in sources:  # a call that was interrupted had come so far
            file.path.unlink()
    if all(file.whose == ARCHIVE for file in sources):
        return
    totals: defaultdict[str, float] = defaultdict(float)
    for file in sources:
        if not file.path.stat().st_size:  # it was killed before it had written anything
            continue
        for key, value, _, _ in MmapedDict.read_all_values_from_file(file.path):  # type: ignore[no-untyped-call]
            totals[key] += value
    unfinished = directory / f"{kind}_{ARCHIVE}.unfinished"
    _write(unfinished, totals)
    unfinished.rename(directory / f"{kind}_{ARCHIVE}-{max(file.generation for file in sources)}.db")
    # The old archive first: who has that, and no longer finds what was to be added to it, would miss it.
    for file in sorted(sources, key=lambda file: file.whose != ARCHIVE):
        file.path.unlink()


def _write(path: Path, totals: dict[str, float]) -> None:
    path.unlink(missing_ok=True)  # of a call that was interrupted
    with path.open("wb") as file:  # where there is no room this is an error, and a write to a mapped page a SIGBUS
        os.posix_fallocate(file.fileno(), 0, 8 + sum(len(key.encode()) + ENTRY_BYTES for key in totals))
    archive = MmapedDict(str(path))  # type: ignore[no-untyped-call]
    for key, value in totals.items():
        archive.write_value(key, value, 0.0)  # type: ignore[no-untyped-call]
    archive.close()  # type: ignore[no-untyped-call]


def _listed(directory: Path) -> list[_File]:
    """The files that there are, in order."""
    found = [(path, NAME.fullmatch(path.name)) for path in directory.iterdir()]
    return sorted(_File(path, name[1], name[2], int(name[3] or 0)) for path, name in found if name is not None)


def _that_count(files: Iterable[_File]) -> list[_File]:
    """Those that are in no archive, and of each type the newest archive."""
    files = [*files]
    archived: dict[str, int] = {}
    for file in files:
        if file.whose == ARCHIVE:
            archived[file.kind] = max(file.generation, archived.get(file.kind, 0))
    return [
        file
        for file in files
        if not file.generation
        or file.generation > archived.get(file.kind, 0)
        or (file.whose == ARCHIVE and file.generation == archived[file.kind])
    ]
