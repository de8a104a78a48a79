"""Documents from other files than text: parquet, zstandard, WebDataset."""

import io
import json
import tarfile
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pretrain.config.data import SourceConfig
from pretrain.data.sources.inputs import find_inputs
from pretrain.data.sources.reading import read_documents
from pretrain.errors import UserError
from tests.conftest import generated_text


def documents(path, on_bad="error", skipped=None, **settings):
    source = SourceConfig(path=str(path), **settings)
    read = read_documents(source, find_inputs(source), on_bad, Counter() if skipped is None else skipped)
    return [(document.id, document.text) for document in read]


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_parquet_gives_a_document_a_row_with_its_own_id_or_its_number(tmp_path):
    texts = [f"document {n}" for n in range(3000)]
    pq.write_table(pa.table({"body": texts, "id": list(range(3000)), "other": [1.0] * 3000}), tmp_path / "a.parquet")
    assert documents(tmp_path, text_field="body") == [(str(n), text) for n, text in enumerate(texts)]
    found = documents(tmp_path, text_field="body", id_field="none")
    assert found[2999] == ("a.parquet:3000", "document 2999")


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"text": ["a", None, "b"]}, "text is no string"),
        ({"body": ["a"]}, "no text field"),
        ({"text": [1, 2]}, "text is no string"),
    ],
)
def test_parquet_rows_without_text_are_named_or_counted(tmp_path, table, reason):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet"):
        documents(tmp_path)
    skipped = Counter()
    documents(tmp_path, "skip", skipped)
    assert set(skipped) == {reason}


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no such thing PAR1")
    with pytest.raises(UserError, match="a.parquet is damaged"):
        documents(tmp_path)


def test_zstandard_files_of_several_frames_are_read_like_plain_ones(tmp_path):
    lines = [json.dumps({"text": "word " * n, "id": n}) + "\n" for n in range(1, 400)]
    frames = [zstandard.compress("".join(part).encode()) for part in (lines[:150], lines[150:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert [number for number, _ in documents(tmp_path)] == [str(n) for n in range(1, 400)]


@pytest.mark.parametrize("damage", ["cut", "flip", "no zstandard"])
def test_a_damaged_zstandard_file_is_named(tmp_path, damage):
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    content = bytearray(compressor.compress(generated_text(1, 5000).encode()))
    if damage == "cut":
        del content[-9:]
    elif damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        content = bytearray(b"plain text")
    (tmp_path / "a.txt.zst").write_bytes(content)
    with pytest.raises(UserError, match="a.txt.zst is truncated or damaged"):
        documents(tmp_path)


def test_text_is_split_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \nthree\n\n")
    assert [text for _, text in documents(tmp_path, separator=r"^\s*$")] == ["one\ntwo\n", "three\n"]


def test_webdataset_samples_are_documents_of_their_txt_or_json(tmp_path):
    members = [
        ("one.txt", b"first"),
        ("one.json", b'{"text": "not this"}'),
        ("two.json", b'{"text": "second", "id": "own"}'),
        ("two.jpg", b"\xff"),
        ("folder/three.txt", "drittes ß".encode()),
    ]
    tar_of(tmp_path / "a.tar", members)
    expected = [("one", "first"), ("own", "second"), ("folder/three", "drittes ß")]
    assert documents(tmp_path) == expected
    (tmp_path / "b.tar.zst").write_bytes(zstandard.compress((tmp_path / "a.tar").read_bytes()))
    assert documents(tmp_path) == expected * 2


def test_webdataset_samples_without_text_and_damaged_tars_are_named_or_counted(tmp_path):
    tar_of(tmp_path / "a.tar", [("one.npy", b"x"), ("two.json", b"{}"), ("three.txt", b"\xff"), ("four.txt", b"ok")])
    with pytest.raises(UserError, match=r"sample one has .npy but no .txt or .json.*data index"):
        documents(tmp_path)
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(content[:600])
    skipped = Counter()
    assert documents(tmp_path, "skip", skipped) == [("four", "ok")]
    assert skipped == {"no .txt or .json": 1, "no text field": 1, "not UTF-8": 1, "damaged tar": 1}
