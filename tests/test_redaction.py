"""Secrets in text, one kind after the other."""

import logging
import sys

import pytest

from pretrain.redaction import RedactingFormatter, redact


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("https://me:pa55@host/x", "https://***@host/x"),
        ("https://tok3n@host:80/x?a=1", "https://***@host:80/x?a=1"),
        ("see https://host/x?token=abc&n=2.", "see https://host/x?token=***&n=2."),
        ("https://h/x?X-Amz-Signature=ab%2F&X-Amz-Date=1", "https://h/x?X-Amz-Signature=***&X-Amz-Date=1"),
        ("Authorization: Bearer abcdefghij", "Authorization: Bearer ***"),
        ("mail me@host, step 3: loss 2.5, s3://bucket/key", "mail me@host, step 3: loss 2.5, s3://bucket/key"),
        ("1,000 tokens/s, max_tokens=5", "1,000 tokens/s, max_tokens=5"),
    ],
)
def test_urls_and_headers_lose_their_secrets_and_nothing_else(text, written):
    assert redact(text) == written


def test_values_of_secret_variables_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t/value")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    monkeypatch.setenv("DB_PWD", "hunter2")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
    monkeypatch.setenv("PWD", "/home/me/project")
    monkeypatch.setenv("OLDPWD", "/home/me")
    assert redact("a s3cr3t/value b hf_abcdef hunter2 falsehood") == "a *** b *** *** falsehood"
    assert redact("/home/me/project/tiny.yaml") == "/home/me/project/tiny.yaml"


def test_a_traceback_in_a_log_is_redacted(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    try:
        raise OSError("https://me:pa55@host refused hf_abcdef")
    except OSError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "it failed", (), sys.exc_info())
    text = RedactingFormatter("%(message)s").format(record)
    assert "https://***@host refused ***" in text
    assert "pa55" not in text
