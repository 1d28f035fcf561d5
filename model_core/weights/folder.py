"""A model's folder under the weight folder: which one it is, whether it is complete, and who may write to it.

A complete folder holds `.complete.json`, written last: where the files came from and each file's size and sha256.
`.incomplete.json` marks a download that has not ended. Both are replaced atomically.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from model_core.errors import DownloadError
from model_core.weights.progress import Progress, format_bytes

COMPLETE = ".complete.json"
INCOMPLETE = ".incomplete.json"
_LOCK = ".lock"
_WAIT_REPORT_S = 30.0
_MAX_MARKER = 4 << 20
_CHUNK = 1 << 20
# Room left free besides the files themselves.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class FileRecord:
    """One verified file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Marker:
    """What a complete folder holds. `model` and `revision` are as asked for, `commit` what they meant."""

    model: str
    revision: str
    commit: str
    files: dict[str, FileRecord]


def read_marker(folder: Path) -> Marker | None:
    """The marker of a complete folder; None if there is none, it is damaged, or a file is absent or of another size."""
    try:
        if (folder / COMPLETE).stat().st_size > _MAX_MARKER:
            return None
        found = json.loads((folder / COMPLETE).read_text("utf-8"))
        files = {name: FileRecord(int(entry["size"]), str(entry["sha256"])) for name, entry in found["files"].items()}
        marker = Marker(str(found["model"]), str(found["revision"]), str(found["commit"]), files)
        complete = all((folder / name).stat().st_size == record.size for name, record in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return marker if complete and files else None


def write_marker(folder: Path, marker: Marker) -> None:
    """Declare `folder` complete. The last step: every file it lists is on disk and verified."""
    _write_json(folder / COMPLETE, asdict(marker))
    (folder / INCOMPLETE).unlink(missing_ok=True)


def find_complete(weight_dir: Path, model: str, revision: str) -> Path | None:
    """The complete folder of `model` at `revision` (as asked for, or its commit); None if there is none."""
    for marker_path in sorted(weight_dir.glob(f"*/{COMPLETE}")):
        marker = read_marker(marker_path.parent)
        if marker and marker.model == model and revision in (marker.revision, marker.commit):
            return marker_path.parent
    return None


def claim_folder(weight_dir: Path, model: str, revision: str, name: str) -> Path:
    """The folder to fill, created and marked as ours: `name`, or a longer name if another model has that one."""
    long_name = model.replace("/", "--")
    for candidate in (name, long_name, f"{long_name}@{revision}"):
        folder = weight_dir / re.sub(r"[^\w.@=-]", "_", candidate)
        if _owner(folder) in (None, (model, revision)):
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(folder / INCOMPLETE, {"model": model, "revision": revision})
            (folder / COMPLETE).unlink(missing_ok=True)  # it listed a file that is gone or of another size
            return folder
    raise DownloadError(f"{weight_dir} has other models under every name for {model}; remove one of the folders")


def _owner(folder: Path) -> tuple[str, str] | None:
    """(model, revision) of the folder, complete or not; None if it is free or was filled by hand."""
    for name in (COMPLETE, INCOMPLETE):
        try:
            found = json.loads((folder / name).read_text("utf-8"))
            return str(found["model"]), str(found["revision"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def is_filled_by_hand(folder: Path) -> bool:
    """Whether somebody put files here and no download of ours ever began."""
    return folder.is_dir() and _owner(folder) is None and any(folder.iterdir())


def record_files(folder: Path, names: list[str], progress: Progress) -> dict[str, FileRecord]:
    """Size and sha256 of each file, read once."""
    progress.begin(f"hashing {folder.name}", sum((folder / name).stat().st_size for name in names))
    records = {}
    for name in names:
        digest = hashlib.sha256()
        with open(folder / name, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                progress.advance(len(chunk))
        records[name] = FileRecord((folder / name).stat().st_size, digest.hexdigest())
    progress.end()
    return records


@contextmanager
def locked(weight_dir: Path, progress: Progress) -> Iterator[None]:
    """Hold the one lock of the weight folder; says that it waits, and how long, while another process holds it.

    The lock is the operating system's, so it ends with its holder, however that ends.
    """
    with explained(weight_dir):
        weight_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(weight_dir / _LOCK)
        started = time.monotonic()
        timeout = 0.0
        while True:
            try:
                lock.acquire(timeout=timeout)
                break
            except Timeout:
                waited = time.monotonic() - started
                progress.say(f"another process is filling {weight_dir}; waiting for it ({waited:.0f} s so far)")
                timeout = _WAIT_REPORT_S
    try:
        yield
    finally:
        lock.release()


@contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write under `place` into a DownloadError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(f"the disk of {place} is full ({error.strerror}); free some space and start again: the "
                                "download goes on where it stopped") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise DownloadError(f"{place} cannot be written to ({error.strerror}); make it writable, or set weight_dir "
                                "to a folder that is, or fill it on another machine and mount it complete") from error
        raise


def require_space(place: Path, needed: int, what: str) -> None:
    """Raise DownloadError unless `needed` bytes (and 64 MiB to spare) are free under `place`."""
    free = shutil.disk_usage(place).free
    if free < needed + _SPARE_BYTES:
        raise DownloadError(f"{what} needs {format_bytes(needed)} in {place}, but only {format_bytes(free)} are free; "
                            "free some space or set weight_dir to a larger disk")


def _write_json(path: Path, content: dict[str, object]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
