"""Secrets are taken out of text before it is written anywhere: one function, used wherever text leaves the program."""

import logging
import os
import re

HIDDEN = "***"
_NAME = r"token|secret|passw(?:or)?d|pwd|api_?key|access_?key|private_?key"
_VARIABLE = re.compile(rf"(?:^|_)(?:{_NAME})(?:_|$)", re.IGNORECASE)
_DIRECTORIES = ("PWD", "OLDPWD")
"""Variables of the shell that hold no passwords, whatever their names end in."""
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s'\"]+(?=@)")
_QUERY = re.compile(rf"(?<=[?&])([\w.-]*(?:{_NAME}|credential|signature|sig|auth)[\w.-]*)=[^&#\s'\"]+", re.IGNORECASE)
_HEADER = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE)
_SHORTEST = 6
"""A shorter value of a variable is no secret worth hiding, and would blank out ordinary words."""


def redact(text: str) -> str:
    """`text` without the passwords and tokens of URLs, and without the values of variables whose names mean secrets."""
    for value in _secrets_of_environment():
        text = text.replace(value, HIDDEN)
    text = _USER_IN_URL.sub(HIDDEN, text)
    text = _QUERY.sub(rf"\1={HIDDEN}", text)
    return _HEADER.sub(rf"\1 {HIDDEN}", text)


def _secrets_of_environment() -> list[str]:
    """Longest first: one may be part of another."""
    values = {
        value
        for name, value in os.environ.items()
        if _VARIABLE.search(name) and name not in _DIRECTORIES and len(value) >= _SHORTEST
    }
    return sorted(values, key=len, reverse=True)


class RedactingFormatter(logging.Formatter):
    """A log line, its traceback included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Format as `logging.Formatter` does, then redact."""
        return redact(super().format(record))
