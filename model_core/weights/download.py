"""Fetching the files of a snapshot: resumed where they stopped, verified before they get their names.

`hf_hub_download` forgets a partial file when its process ends (huggingface_hub 2.x gives it a random name and deletes
it), so the bytes are streamed here, over the client's own session, headers and error types.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

from model_core.errors import DownloadError
from model_core.weights.folder import FileRecord, explained, require_space
from model_core.weights.hub import RemoteFile, Snapshot, transport_error
from model_core.weights.progress import Progress, format_bytes

_CHUNK = 1 << 20
# Tries in a row that bring no byte before giving up, and the longest pause between them.
_TRIES = 5
_MAX_PAUSE_S = 8.0
# Seconds for connect, read (between two pieces of the body), write, pool.
_TIMEOUT = (10.0, 30.0, 30.0, 10.0)


def fetch(snapshot: Snapshot, folder: Path, progress: Progress) -> dict[str, FileRecord]:
    """Fetch every file of `snapshot` into `folder`; files and parts that are there already are verified and kept.

    Returns what was verified. Raises DownloadError when the hub stops answering, sends something of another size or
    hash, or the disk is full or read-only; what was received stays, and the next call continues from it.
    """
    with explained(folder):
        present = sum(_present(file, folder) for file in snapshot.files)
        require_space(folder, snapshot.nbytes - present, snapshot.repo)
        progress.begin(f"downloading {snapshot.repo}", snapshot.nbytes, present)
        records = {file.name: _fetch_file(file, folder, progress) for file in snapshot.files}
        progress.end()
    return records


def _present(file: RemoteFile, folder: Path) -> int:
    """Bytes of the file that need not be fetched, if they turn out to be right."""
    sizes = [path.stat().st_size for path in (folder / file.name, _part(file, folder)) if path.is_file()]
    return max((size for size in sizes if size <= file.size), default=0)


def _part(file: RemoteFile, folder: Path) -> Path:
    # The digest in the name keeps parts of different commits apart.
    return folder / f"{file.name}.{(file.sha256 or file.blob_id or '')[:12]}.part"


def _fetch_file(file: RemoteFile, folder: Path, progress: Progress) -> FileRecord:
    target, part = folder / file.name, _part(file, folder)
    for stale in folder.glob(f"{file.name}.*.part"):
        if stale != part:
            stale.unlink()
    if target.is_file():
        if target.stat().st_size == file.size:
            digest = _Digest(file)
            digest.read(target)
            if digest.matches():
                return digest.record()
            progress.advance(-file.size)
        target.unlink()
    if part.is_file() and part.stat().st_size > file.size:
        part.unlink()
    resumed = part.is_file() and part.stat().st_size > 0
    digest = _receive(file, part, progress)
    if not digest.matches():
        part.unlink()
        if not resumed:
            raise DownloadError(f"{file.name} from {file.url} is {digest.found}, but the hub announced "
                                f"{digest.expected}; the file was thrown away; a mirror or proxy may alter it")
        progress.say(f"{file.name}: the resumed part was damaged; fetching the file from its start")
        progress.advance(-file.size)
        return _fetch_file(file, folder, progress)
    os.replace(part, target)
    return digest.record()


def _receive(file: RemoteFile, part: Path, progress: Progress) -> _Digest:
    """Append to `part` until it has the file's size; returns the digest of the whole."""
    from huggingface_hub.errors import HfHubHTTPError

    digest = _Digest(file)
    with open(part, "a+b") as sink:
        sink.seek(0)
        digest.read(sink)
        failures = 0
        while digest.size < file.size:
            before, reason = digest.size, "the connection was closed"
            try:
                _stream(file, sink, digest, progress)
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status == 416:
                    _restart(sink, digest, progress)
                elif status < 500 and status not in (408, 429):
                    remedy = "set HF_TOKEN to a token that may read it" if status in (401, 403) else "start again"
                    raise DownloadError(f"{file.url}: HTTP {status}; {remedy}") from None
                reason = f"HTTP {status}"
            except transport_error() as error:
                reason = f"{type(error).__name__}: {error}"
            if digest.size >= file.size:
                break
            failures = 0 if digest.size > before else failures + 1
            if failures >= _TRIES:
                raise DownloadError(
                    f"{file.name}: stopped after {format_bytes(digest.size)} of {format_bytes(file.size)} ({reason}, "
                    f"{_TRIES} tries); start again: the download goes on from there")
            progress.say(f"{file.name}: {reason} after {format_bytes(digest.size)}; trying again")
            sink.flush()
            time.sleep(min(_MAX_PAUSE_S, 0.25 * 2**failures))
        sink.flush()
        os.fsync(sink.fileno())
    return digest


def _stream(file: RemoteFile, sink: BinaryIO, digest: _Digest, progress: Progress) -> None:
    """One GET from where the part ends. Raises the client's errors, DownloadError if the sizes disagree."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if digest.size:
        headers["Range"] = f"bytes={digest.size}-"
    with get_session().stream("GET", file.url, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if digest.size and response.status_code != 206:
            _restart(sink, digest, progress)
        total = _announced_size(response, digest.size)
        if total is not None and total != file.size:
            raise DownloadError(f"{file.url} is {total} bytes, but the hub's listing says {file.size}; the mirror or "
                                "proxy (HF_ENDPOINT) serves another file")
        for chunk in response.iter_bytes():
            if digest.size + len(chunk) > file.size:
                raise DownloadError(f"{file.url} sends more than the {file.size} bytes that the hub's listing says")
            sink.write(chunk)
            digest.update(chunk)
            progress.advance(len(chunk))


def _announced_size(response: Any, offset: int) -> int | None:
    """The size of the whole file by the response's headers; None if they do not say."""
    headers = response.headers
    if headers.get("Content-Encoding", "identity") != "identity":
        return None
    if response.status_code == 206:
        span, _, total = headers.get("Content-Range", "").partition("/")
        if not span.startswith(f"bytes {offset}-"):
            raise DownloadError(f"{response.url}: asked for bytes from {offset}, was sent {span!r}")
        return int(total) if total.isdigit() else None
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _restart(sink: BinaryIO, digest: _Digest, progress: Progress) -> None:
    progress.advance(-digest.size)
    sink.truncate(0)
    digest.reset()


class _Digest:
    """sha256 of a file as it arrives, and the git blob id where that is what the hub announced."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self.reset()

    def reset(self) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._blob = hashlib.sha1(b"blob %d\0" % self._file.size, usedforsecurity=False)

    def update(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self._sha256.update(chunk)
        if self._file.blob_id:
            self._blob.update(chunk)

    def read(self, source: Path | BinaryIO) -> None:
        """Take in all that `source` holds from its position on."""
        if isinstance(source, Path):
            with open(source, "rb") as opened:
                return self.read(opened)
        while chunk := source.read(_CHUNK):
            self.update(chunk)

    @property
    def expected(self) -> str:
        return f"sha256 {self._file.sha256}" if self._file.sha256 else f"git blob {self._file.blob_id}"

    @property
    def found(self) -> str:
        if self._file.sha256:
            return f"sha256 {self._sha256.hexdigest()}"
        return f"git blob {self._blob.hexdigest()}"

    def matches(self) -> bool:
        return self.size == self._file.size and self.found == self.expected

    def record(self) -> FileRecord:
        return FileRecord(self.size, self._sha256.hexdigest())
