"""Where this project's log goes in Ray's workers."""

from __future__ import annotations

import logging
import sys


def log_to_stderr(pattern: str = "%(levelname).1s %(message)s") -> None:
    """Our log as plain lines in this process' own stderr, which Ray collects and shows where Serve was started.

    Not sys.stderr: in a replica that is Serve's logger, which holds lines back until it has 1000 of them.
    """
    logger = logging.getLogger("mini_llm")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(logging.Formatter(pattern))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO)
