"""Errors that reach a person. Each message names the field or tensor, the limit, and the remedy."""


class MiniLLMError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(MiniLLMError):
    """A setting is wrong: the message names the key, what it may be, and the nearest valid name."""


class UnsupportedModel(MiniLLMError):
    """The checkpoint is of an architecture, format or layout that this engine does not run."""


class CheckpointError(MiniLLMError):
    """A checkpoint is incomplete or damaged; the message names the file or tensor."""


class DownloadError(MiniLLMError):
    """Weights could not be fetched; the message says from where, why, and what to do."""


class OutOfMemory(MiniLLMError):
    """The memory ledger does not add up; the message holds the ledger and the number to set."""


class RequestError(MiniLLMError):
    """A request that cannot be served as asked (HTTP 400 at the edge).

    param: the request field at fault; code: a stable machine-readable code of the OpenAI error envelope.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class EngineDead(MiniLLMError):
    """The engine thread ended; nothing submitted to it will be answered."""
