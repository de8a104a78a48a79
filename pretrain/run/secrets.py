"""Passwords and tokens in a config's URLs: no file of a run holds them, and whoever needs them puts them back."""

import os

from pretrain.config.run import RunConfig
from pretrain.errors import UserError
from pretrain.redaction import HIDDEN, redact

CORPUS_URL = "DIPTYCH_CORPUS_URL"
"""The environment variable that holds a `corpus.url` with a password or token: config.yaml does not."""


def public(config: RunConfig) -> RunConfig:
    """The config as it may be written: no passwords and tokens in its URLs."""
    corpus = config.corpus
    sources = [source.model_copy(update={"path": redact(source.path)}) for source in corpus.sources]
    update = {"url": corpus.url and redact(corpus.url), "sources": sources}
    return config.model_copy(update={"corpus": corpus.model_copy(update=update)})


def is_without_secret(url: str) -> bool:
    """Whether a URL was written without its password or token."""
    return "://" in url and HIDDEN in url


def remember_secrets(config: RunConfig) -> None:
    """Put what no file of the run holds into the environment of this process, for its ranks and for `with_secrets`."""
    if config.corpus.url:
        os.environ[CORPUS_URL] = config.corpus.url


def with_secrets(config: RunConfig) -> RunConfig:
    """A config that was read from a run folder, with the URL that was left out there.

    Raises:
        UserError: it is not in the environment.
    """
    url = config.corpus.url
    if url is None or not is_without_secret(url):
        return config
    whole = os.environ.get(CORPUS_URL)
    if whole is None or redact(whole) != url:
        raise UserError(
            f"config.yaml holds corpus.url without its password or token ({url}); set {CORPUS_URL} to the whole URL"
        )
    return config.model_copy(update={"corpus": config.corpus.model_copy(update={"url": whole})})
