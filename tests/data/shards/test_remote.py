"""A corpus behind a server that fails, stalls and cuts off; a bounded cache that processes share."""

import json
import shutil
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pretrain.config.data import SourceConfig
from pretrain.data.fetching import FetchRule, NotThereError, fetch
from pretrain.data.manifest import load_manifest
from pretrain.data.shards.remote import RemoteShards, fetch_description
from pretrain.data.sources.inputs import find_inputs
from pretrain.data.sources.reading import read_documents
from pretrain.errors import UserError
from pretrain.files import sha256_of
from tests.data.stream.test_stream import first_steps, rows_of

QUICK = FetchRule(timeout_s=0.5, attempts=6, pause_s=0.01)


class Server(ThreadingHTTPServer):
    """Serves a folder on loopback; `trouble` is a list of what to do to the next requests."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.trouble, self.always, self.requests = folder, [], None, Counter()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server = self.server
        server.requests[self.path] += 1
        trouble = server.trouble.pop() if server.trouble else server.always
        path = server.folder / self.path.lstrip("/")
        if trouble == "fail":
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if trouble == "stall":
            self.wfile.write(content[:100])
            self.wfile.flush()
            time.sleep(1.5)
        elif trouble == "cut":
            self.wfile.write(content[: len(content) // 2])
        elif trouble == "flip":
            self.wfile.write(content[:-1] + bytes([content[-1] ^ 1]))
        else:
            self.wfile.write(content)


@pytest.fixture
def server(corpus_values):
    server = Server(Path(corpus_values["path"]))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("trouble", ["fail", "stall", "cut", "flip"])
def test_a_fetch_survives_trouble_and_never_leaves_half_a_file(server, manifest, tmp_path, trouble):
    entry = manifest.splits["train"].shards[0]
    server.trouble = [trouble] * 3
    fetch(f"{server.url}/{entry.path}", tmp_path / "got.tar", QUICK, entry.sha256)
    assert sha256_of(tmp_path / "got.tar") == entry.sha256
    assert server.requests[f"/{entry.path}"] == 4
    server.always = trouble
    with pytest.raises(NotThereError if trouble == "flip" else UserError, match=r"damaged|in 6 attempts"):
        fetch(f"{server.url}/{entry.path}", tmp_path / "other.tar", QUICK, entry.sha256)
    assert [p.name for p in tmp_path.iterdir()] == ["got.tar"]


def test_what_is_not_there_is_not_asked_for_again(server, tmp_path):
    with pytest.raises(NotThereError, match="404"):
        fetch(f"{server.url}/train/none.tar", tmp_path / "x", QUICK)
    assert server.requests["/train/none.tar"] == 1


def test_many_threads_fetch_a_shard_once(server, manifest, tmp_path):
    entries = manifest.splits["train"].shards[:4]
    remotes = [RemoteShards(server.url, tmp_path, "f" * 64, 2**30, QUICK) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda pair: pair[0].ensure(pair[1]), [(r, e) for r in remotes for e in entries]))
    assert set(server.requests.values()) == {1}
    assert len(server.requests) == 8


def test_the_cache_stays_within_its_bound_and_drops_what_was_opened_longest_ago(server, manifest, tmp_path):
    entries = manifest.splits["train"].shards[:6]
    size = max(entry.bytes for entry in entries)
    remote = RemoteShards(server.url, tmp_path, "f" * 64, 3 * size, QUICK)
    for entry in entries[:3]:
        folder = remote.ensure(entry)
        time.sleep(0.01)
    remote.ensure(entries[0])
    for entry in entries[3:5]:
        time.sleep(0.01)
        remote.ensure(entry)
    kept = {path.name for path in folder.glob("train/*.tar")}
    assert kept == {Path(entries[n].path).name for n in (0, 3, 4)}
    assert len(list(folder.glob("train/*.npy"))) == 3
    assert sum(path.stat().st_size for path in folder.glob("train/*.tar")) <= 3 * size


def remote_config(make_config, server, tmp_path, **data):
    corpus = {"path": str(tmp_path / "there"), "sources": [], "url": server.url}
    settings = {"fetch_timeout_s": 0.5, "fetch_attempts": 6, **data}
    return make_config(corpus=corpus, data=settings)


@pytest.mark.slow
def test_rows_are_the_same_from_a_stuttering_server_with_a_cache_smaller_than_the_corpus(
    make_config, manifest, server, tmp_path
):
    expected = rows_of(first_steps(make_config(), manifest, 40))
    fetch_description(server.url, tmp_path / "there")
    assert load_manifest(tmp_path / "there") == manifest
    server.trouble = ["flip", "cut", "stall", "fail"]
    limit = 5 * manifest.splits["train"].shards[0].bytes
    config = remote_config(make_config, server, tmp_path, cache_bytes=limit, workers=1)
    assert rows_of(first_steps(config, manifest, 40, 2)) == expected
    assert not server.trouble
    tars = list((tmp_path / "cache").rglob("*.tar"))
    assert sum(tar.stat().st_size for tar in tars) <= limit
    assert not list((tmp_path / "there").rglob("*.tar"))


def test_a_shard_damaged_in_the_cache_is_fetched_again(make_config, manifest, server, tmp_path):
    config = remote_config(make_config, server, tmp_path)
    fetch_description(server.url, tmp_path / "there")
    expected = rows_of(first_steps(config, manifest, 5))
    for tar in (tmp_path / "cache").rglob("*.tar"):
        content = bytearray(tar.read_bytes())
        content[len(content) // 2] ^= 1
        tar.write_bytes(content)
    assert rows_of(first_steps(config, manifest, 5)) == expected


def test_a_shard_missing_at_the_server_is_a_damaged_one_and_no_server_is_none(
    make_config, manifest, server, tmp_path, corpus_values
):
    server.folder = tmp_path / "served"
    shutil.copytree(corpus_values["path"], server.folder)
    fetch_description(server.url, tmp_path / "there")
    entry = manifest.splits["train"].shards[3]
    (server.folder / entry.path).unlink()
    with pytest.raises(UserError, match=r"404.*on_corrupt=skip"):
        first_steps(remote_config(make_config, server, tmp_path), manifest, 1)
    skipping = remote_config(make_config, server, tmp_path, on_corrupt="skip")
    assert first_steps(skipping, manifest, 1)[0][0].state.lost.sum() == entry.samples
    server.always = "fail"
    shutil.rmtree(tmp_path / "cache")
    slow = remote_config(make_config, server, tmp_path, on_corrupt="skip", fetch_attempts=1)
    with pytest.raises(UserError, match="could not be fetched in 1 attempts"):
        first_steps(slow, manifest, 1)


def test_a_source_may_be_a_url(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server.folder = tmp_path
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(5)))
    source = SourceConfig(path=f"{server.url}/a.jsonl")
    for _ in range(2):
        documents = list(read_documents(source, find_inputs(source), "error", Counter()))
    assert [d.text for d in documents] == [f"document {n}" for n in range(5)]
    assert documents[0].id == "a.jsonl:1"
    assert server.requests["/a.jsonl"] == 1
    with pytest.raises(UserError, match="404"):
        find_inputs(SourceConfig(path=f"{server.url}/none.jsonl"))
    memory = SourceConfig(path=f"file://{tmp_path}/*.jsonl")
    assert len(list(read_documents(memory, find_inputs(memory), "error", Counter()))) == 5


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/a.txt", "s3fs"), ("gs://bucket/a.txt", "gcsfs")])
def test_a_missing_package_is_named_at_once(tmp_path, monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs the package {package}: run `pip install {package}`"):
        fetch(url, tmp_path / "a.txt", QUICK)
    with pytest.raises(UserError, match=package):
        find_inputs(SourceConfig(path=url.replace("a.txt", "*.txt")))
