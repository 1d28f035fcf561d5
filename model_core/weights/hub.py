"""What a model repository holds and where its files are, asked of the hub through the huggingface_hub client."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from model_core.errors import DownloadError, UnsupportedModel

# One TCP connection must open within this time, all addresses and the name look-up included, or the hub counts as
# unreachable; a fallback then costs a start no more than that.
_CONNECT_S = 3.0
# The hub was reached: its answer of some 10 kB may take this long.
_ANSWER_S = 10.0
_TRIES = 2
_TRUE = ("1", "ON", "YES", "TRUE")

_TEXT_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json",
    "merges.txt", "model.safetensors.index.json",
)  # fmt: skip
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][\w.+=@ -]*")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SPLIT_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# Of several GGUF files one is fetched: the least lossy that is not larger than the bf16 weights, then the smaller ones.
_GGUF_ORDER = ("Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "BF16", "F16", "F32", "Q3_K", "Q2_K")


class HubUnreachable(Exception):
    """No hub answered: refused, timed out, no name, proxy, 5xx, offline mode. The text says which."""


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch. Exactly one digest is set: sha256 of the content, or the git blob id (sha1)."""

    name: str
    url: str
    size: int
    sha256: str | None
    blob_id: str | None


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one commit that are needed to serve it."""

    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT as it is set now (huggingface_hub reads it once, at import), else that client's own."""
    from huggingface_hub.constants import ENDPOINT

    found = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    parts = urlsplit(found)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DownloadError(f"HF_ENDPOINT is {found!r}; it must be an address such as https://hub.example")
    return found


def snapshot(repo: str, revision: str) -> Snapshot:
    """Ask the hub what `repo` holds at `revision`, without downloading it.

    Raises HubUnreachable if no hub answers (after 2 tries; a dead address costs 3 s), DownloadError if the hub answers
    that there is no such repository or revision or that it may not be read, UnsupportedModel if there is nothing in it
    that this engine reads.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
        raise HubUnreachable("HF_HUB_OFFLINE is set")
    base = endpoint()
    _connect(base)
    info = _model_info(base, repo, revision)
    if not info.sha:
        raise HubUnreachable(f"{base} gave no commit for {repo}; it does not answer as a model hub does")
    names = choose_files(repo, [entry.rfilename for entry in info.siblings or []])
    entries = {entry.rfilename: entry for entry in info.siblings or []}
    try:
        return Snapshot(repo, revision, info.sha, tuple(_remote(base, repo, info.sha, entries[name]) for name in names))
    except transport_error() as error:
        raise HubUnreachable(f"{base} stopped answering: {type(error).__name__}: {error}") from None


def choose_files(repo: str, names: list[str]) -> list[str]:
    """Which of a repository's files to fetch: text files, then all safetensors, or else one GGUF file.

    Only files at the top: folders hold other formats of the same model. Raises UnsupportedModel if no weights are left.
    """
    top = [name for name in names if _PLAIN_NAME.fullmatch(name)]
    weights = sorted(name for name in top if name.endswith(".safetensors"))
    # Mistral's repositories hold the weights twice; "consolidated" has other tensor names.
    if any(name.startswith("model") for name in weights):
        weights = [name for name in weights if name.startswith("model")]
    if not weights:
        ggufs = [name for name in top if name.endswith(".gguf") and not _SPLIT_GGUF.search(name)]
        weights = sorted(ggufs, key=lambda name: (_gguf_rank(name), name))[:1]
    if not weights:
        pickles = [name for name in names if name.endswith(_PICKLES)]
        raise UnsupportedModel(
            f"{repo} holds only pickle weights ({', '.join(pickles[:3])}): they can run code when opened and are "
            "refused; choose a repository with safetensors or GGUF" if pickles else
            f"{repo} holds no *.safetensors and no (unsplit) *.gguf at its top; choose another repository")
    return [name for name in _TEXT_FILES if name in top] + weights


def _gguf_rank(name: str) -> int:
    upper = name.upper()
    # BF16 contains F16: the longest label that fits decides.
    fitting = [label for label in _GGUF_ORDER if label in upper]
    return _GGUF_ORDER.index(max(fitting, key=len)) if fitting else len(_GGUF_ORDER)


def _connect(base: str) -> None:
    """Open and close one TCP connection to the hub, or to the proxy before it.

    The HTTP client bounds the time for each address and none for the name look-up; this bounds the whole.
    """
    url = urlsplit(base)
    host = url.hostname or ""
    proxies = getproxies()
    proxy = None if proxy_bypass(host) else proxies.get(url.scheme) or proxies.get("all")
    target = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else url
    address = (target.hostname or host, target.port or (443 if target.scheme == "https" else 80))
    outcome: list[str] = []

    def attempt() -> None:
        try:
            socket.create_connection(address, timeout=_CONNECT_S).close()
            outcome.append("")
        except OSError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_CONNECT_S)
    where = f"{base} (through the proxy {address[0]}:{address[1]})" if proxy else base
    if not outcome:
        raise HubUnreachable(f"{where} did not accept a connection within {_CONNECT_S:.0f} s")
    if outcome[0]:
        raise HubUnreachable(f"{where} cannot be reached: {outcome[0]}")


def _model_info(base: str, repo: str, revision: str) -> Any:
    # Imported late: 0.3 s that a start with complete weights does not need.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    reason = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(0.5)
        try:
            return HfApi(endpoint=base).model_info(repo, revision=revision, files_metadata=True, timeout=_ANSWER_S)
        except HFValidationError as error:
            raise DownloadError(f"model {repo!r} is neither a folder nor a repository id such as 'org/name': "
                                f"{error}") from None
        except OfflineModeIsEnabled:
            raise HubUnreachable("HF_HUB_OFFLINE is set") from None
        except RevisionNotFoundError:
            raise DownloadError(f"{repo} has no revision {revision!r} on {base}; set revision to a branch, tag or "
                                "commit that exists") from None
        except GatedRepoError:
            raise DownloadError(f"{repo} is gated on {base}: accept its terms there with your account, then set "
                                "HF_TOKEN to a token of that account") from None
        except RepositoryNotFoundError as error:
            private = "; if it is private, set HF_TOKEN to a token that may read it"
            raise DownloadError(f"{base} has no model {repo!r} (HTTP {error.response.status_code}); check the spelling"
                                f"{private}") from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise DownloadError(f"{base} refuses access to {repo} (HTTP {status}); set HF_TOKEN to a token that "
                                    "may read it") from None
            if status < 500:
                raise DownloadError(f"{base} answered HTTP {status} for {repo}: {error}") from None
            reason = f"{base} answered HTTP {status}"
        except transport_error() as error:
            reason = f"{base} cannot be reached: {type(error).__name__}: {error}"
            if "Timeout" in type(error).__name__:
                break
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{base} does not answer as a model hub does ({type(error).__name__}: {error})"
    raise HubUnreachable(reason)


def transport_error() -> type[Exception]:
    """The HTTP client's base error, whichever httpx generation huggingface_hub is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base


def _remote(base: str, repo: str, commit: str, entry: Any) -> RemoteFile:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo, entry.rfilename, revision=commit, endpoint=base)
    if entry.lfs:
        return RemoteFile(entry.rfilename, url, int(entry.lfs.size), entry.lfs.sha256, None)
    size, digest = entry.size, entry.blob_id
    if size is None or not digest:
        # Some mirrors leave sizes out of the listing; the file's own headers have them.
        headers = get_hf_file_metadata(url, endpoint=base, timeout=_ANSWER_S)
        size, digest = headers.size, headers.etag
    if size is None or not digest or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest):
        raise DownloadError(f"{base} does not tell size and hash of {repo}/{entry.rfilename}, so it could not be "
                            "verified; use another HF_ENDPOINT")
    large = len(digest) == 64
    return RemoteFile(entry.rfilename, url, int(size), digest if large else None, None if large else digest)
