import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from pretrain.config.data import SourceConfig
from pretrain.data.sources.documents import Document
from pretrain.data.sources.inputs import find_inputs
from pretrain.data.sources.reading import read_documents
from pretrain.errors import UserError

HINT = "(--on-bad skip / corpus.on_bad=skip leaves such records out and counts them)"


def read(path, on_bad="error", residues_only=False, **settings):
    source = SourceConfig(path=str(path), **settings)
    skipped = Counter()
    documents = list(read_documents(source, find_inputs(source), on_bad, skipped, residues_only))
    return documents, skipped


def refusal(path, **settings):
    with pytest.raises(UserError) as caught:
        read(path, **settings)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- finding files


def test_a_folder_is_read_recursively_and_in_sorted_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/c.txt.gz", ".hidden.txt", ".git/x.txt", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(b"zipped") if name.endswith(".gz") else name.encode())
    documents, _ = read(tmp_path)
    assert [(d.id, d.text) for d in documents] == [
        ("a/c.txt.gz", "zipped"),
        ("a/z.txt", "a/z.txt"),
        ("b.txt", "b.txt"),
    ]
    assert documents[0].source == tmp_path.name


def test_a_folder_gives_only_the_files_of_the_format_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.fasta").write_text(">x\nMK\n")
    assert [d.text for d in read(tmp_path, format="fasta")[0]] == ["MK"]
    assert [d.text for d in read(tmp_path)[0]] == ["text", "MK"]


def test_a_glob_matches_files_and_document_ids_do_not_hold_the_folder_before_it(tmp_path):
    for name in ("x/1.txt", "y/2.txt", "y/3.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.id for d in read(tmp_path / "*" / "*.txt")[0]] == ["x/1.txt", "y/2.txt"]
    assert [d.id for d in read(tmp_path / "**" / "2.*")[0]] == ["y/2.txt"]


def test_a_path_that_holds_brackets_is_a_file_before_it_is_a_glob(tmp_path):
    (tmp_path / "[a].txt").write_text("here")
    assert [d.id for d in read(tmp_path / "[a].txt")[0]] == ["[a].txt"]


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("home")
    assert [d.text for d in read("~/a.txt", name="mine")[0]] == ["home"]


def test_a_source_is_called_by_its_name_or_by_the_last_part_of_its_path(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert read(tmp_path / "a.txt")[0] == [Document("a.txt", "x", "a.txt")]
    assert read(tmp_path / "a.txt", name="letters")[0] == [Document("a.txt", "x", "letters")]


def test_a_source_without_files_is_refused_with_the_place_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal("missing/*.txt")
    assert f"'{tmp_path / 'missing/*.txt'}' matches no file" in message
    assert "set corpus.sources[].path" in message
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.md").write_text("x")
    assert "a folder without .jsonl files" in refusal("folder", format="jsonl")


def test_a_name_that_tells_no_format_is_refused_until_the_format_is_set(tmp_path):
    (tmp_path / "README").write_text("hello")
    message = refusal(tmp_path / "README")
    assert "cannot tell the format" in message
    assert ".fasta" in message
    assert read(tmp_path / "README", format="text")[0][0].text == "hello"


# ---------------------------------------------------------------------------------------------------------- text


def test_without_a_separator_a_file_is_one_document_kept_byte_for_byte(tmp_path):
    text = "  First\r\n\n\tsecond \U0001f600\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert [d.text for d in read(tmp_path / "a.txt")[0]] == [text]


def test_a_separator_line_starts_a_document_and_stays_in_it(tmp_path):
    (tmp_path / "a.txt").write_text("front\nCHAPTER 1\none\nCHAPTER 2\n\ntwo\n")
    documents, _ = read(tmp_path / "a.txt", separator=r"^CHAPTER \d+$")
    assert [(d.id, d.text) for d in documents] == [
        ("a.txt:1", "front\n"),
        ("a.txt:2", "CHAPTER 1\none\n"),
        ("a.txt:4", "CHAPTER 2\n\ntwo\n"),
    ]


def test_a_separator_may_ask_for_the_end_of_a_line_with_windows_line_breaks(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ONE\r\nx\r\nTWO\r\ny\r\n")
    assert [d.text for d in read(tmp_path / "a.txt", separator="^[A-Z]+$")[0]] == ["ONE\r\nx\r\n", "TWO\r\ny\r\n"]


def test_blank_documents_are_dropped_silently(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n--\nx\n")
    (tmp_path / "b.txt").write_text(" \n\t\n")
    documents, skipped = read(tmp_path, separator="^--")
    assert [d.text for d in documents] == ["--\nx\n"]
    assert not skipped


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}')
    assert [d.text for d in read(tmp_path)[0]] == ["hello", "hello"]
    assert [d.text for d in read(tmp_path / "a.txt", separator="^hello")[0]] == ["hello"]


def test_a_separator_that_is_no_regular_expression_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert "separator = '(' is not a regular expression" in refusal(tmp_path / "a.txt", separator="(")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.fasta", "a.txt.gz"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert refusal(tmp_path / name) == f"{tmp_path / name} is empty. {HINT}"
    assert read(tmp_path / name, on_bad="skip") == ([], {"empty file": 1})


def test_text_that_is_not_utf8_is_refused_with_its_byte_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\xe9t\xe9\n")
    message = refusal(tmp_path / "a.txt")
    assert f"{tmp_path / 'a.txt'} is not UTF-8 text: byte 0xe9 at offset 5." in message
    assert message.endswith(HINT)
    assert "offset 5." in refusal(tmp_path / "a.txt", separator="^x")


def test_of_text_that_is_not_utf8_only_the_document_with_the_byte_is_skipped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"#1\ngood\n#2\nb\xffd\nmore\n#3\ngood\n")
    documents, skipped = read(tmp_path / "a.txt", on_bad="skip", separator="^#")
    assert [d.text for d in documents] == ["#1\ngood\n", "#3\ngood\n"]
    assert skipped == {"not UTF-8": 1}
    assert read(tmp_path / "a.txt", on_bad="skip") == ([], {"not UTF-8": 1})


def test_a_truncated_gzip_file_is_refused_by_name(tmp_path):
    whole = gzip.compress(("line of text\n" * 5000).encode() + bytes(range(32, 127)) * 50)
    (tmp_path / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
    message = refusal(tmp_path / "a.txt.gz")
    assert str(tmp_path / "a.txt.gz") in message
    assert "truncated" in message
    assert message.endswith(HINT)
    assert read(tmp_path / "a.txt.gz", on_bad="skip") == ([], {"damaged gzip": 1})


def test_a_file_that_only_claims_to_be_gzip_is_refused(tmp_path):
    (tmp_path / "a.txt.gz").write_text("plain")
    assert "is no gzip file" in refusal(tmp_path / "a.txt.gz")


# --------------------------------------------------------------------------------------------------------- JSONL


def test_jsonl_gives_text_and_id_fields_and_the_line_where_there_is_no_id(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n", "id": 7}\n\n{"text": "two"}\n{"text": " "}\n')
    assert [(d.id, d.text) for d in read(tmp_path / "a.jsonl")[0]] == [("7", "one\n"), ("a.jsonl:3", "two")]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"body": "three", "key": "k"}'))
    documents, _ = read(tmp_path / "b.jsonl.gz", text_field="body", id_field="key")
    assert [(d.id, d.text) for d in documents] == [("k", "three")]


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        ('{"text": "x"', "invalid JSON", "is not JSON"),
        ("[" * 100_000, "invalid JSON", "is not JSON"),
        ('["text"]', "no JSON object", "holds a list"),
        ('{"body": "x", "n": 1}', "no text field", "has no field 'text'; its fields: 'body', 'n'."),
        ('{"text": 5}', "text is no string", "field 'text' is int"),
        ('{"text": "\\ud800"}', "lone surrogate", "\\ud800 is half a surrogate pair"),
    ],
)
def test_a_bad_json_line_is_refused_by_file_and_line_or_skipped_alone(tmp_path, line, reason, words):
    good = json.dumps({"text": "good"})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    message = refusal(tmp_path / "a.jsonl")
    assert message.startswith(f"{tmp_path / 'a.jsonl'}:2")
    assert words in message
    assert message.endswith(HINT)
    documents, skipped = read(tmp_path / "a.jsonl", on_bad="skip")
    assert [d.id for d in documents] == ["a.jsonl:1", "a.jsonl:3"]
    assert skipped == {reason: 1}


def test_a_json_line_that_is_not_utf8_is_skipped_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n')
    assert "offset 24." in refusal(tmp_path / "a.jsonl")
    documents, skipped = read(tmp_path / "a.jsonl", on_bad="skip")
    assert [d.text for d in documents] == ["a", "b"]
    assert skipped == {"not UTF-8": 1}


# --------------------------------------------------------------------------------------------------------- FASTA


def test_fasta_records_span_lines_and_lose_the_final_stop(tmp_path):
    (tmp_path / "a.fa").write_text("\n>sp|P1|X first protein\nmkv\nLLa\n\n>Q2\nACD*\n")
    assert [(d.id, d.text) for d in read(tmp_path / "a.fa")[0]] == [("sp|P1|X", "MKVLLA"), ("Q2", "ACD")]


@pytest.mark.parametrize(
    ("record", "reason", "words"),
    [
        (">x\nMKJ\n", "illegal residue", "record x has 'J' at position 3"),
        (">x\nMK\nV*L\n", "illegal residue", "record x has '*' at position 4"),
        (">x\n*MK\n", "illegal residue", "record x has '*' at position 1"),
        (">x some\n", "no residues", "record x has no residues"),
        (">\nMK\n", "no record id", "a '>' line without an id"),
    ],
)
def test_a_bad_fasta_record_is_refused_by_file_and_place_or_skipped_alone(tmp_path, record, reason, words):
    (tmp_path / "a.fasta").write_text(f">first\nMK\n{record}>last\nMV\n")
    message = refusal(tmp_path / "a.fasta")
    assert message.startswith(str(tmp_path / "a.fasta"))
    assert words in message
    assert message.endswith(HINT)
    documents, skipped = read(tmp_path / "a.fasta", on_bad="skip")
    assert [d.id for d in documents] == ["first", "last"]
    assert skipped == {reason: 1}


def test_a_file_that_does_not_begin_with_a_header_is_no_fasta(tmp_path):
    (tmp_path / "a.fasta").write_text("MKV\n>x\nMK\n")
    assert "does not begin with a '>' line" in refusal(tmp_path / "a.fasta")
    assert [d.id for d in read(tmp_path / "a.fasta", on_bad="skip")[0]] == ["x"]


def test_sequences_in_other_formats_are_held_to_the_same_alphabet(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "p", "text": "mk v*"}\n{"id": "q", "text": "MK1"}\n')
    documents, skipped = read(tmp_path / "a.jsonl", on_bad="skip", residues_only=True)
    assert [(d.id, d.text) for d in documents] == [("p", "MKV")]
    assert skipped == {"illegal residue": 1}
    with pytest.raises(UserError, match="record q has '1' at position 3"):
        read(tmp_path / "a.jsonl", residues_only=True)


def test_only_one_document_is_read_ahead(tmp_path):
    path = Path(tmp_path / "a.jsonl")
    path.write_text('{"text": "good"}\nbroken\n')
    source = SourceConfig(path=str(path))
    documents = read_documents(source, find_inputs(source), "error", Counter())
    assert next(documents).text == "good"
    with pytest.raises(UserError, match="is not JSON"):
        next(documents)
