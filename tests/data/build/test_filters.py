"""Which documents a build leaves out."""

import json

from pretrain.config.data import CorpusConfig, FilterConfig
from pretrain.data.build.corpus import build_corpus
from pretrain.data.build.filters import reason_to_remove, share_of_letters, share_of_repeated_lines
from pretrain.data.inspection import verify_corpus
from tests.conftest import generated_text
from tests.data.build.test_corpus import texts_by_split


def test_filters_know_no_language():
    assert share_of_letters("abc 123") == 0.5
    assert share_of_letters("дом דום 家") == 1
    assert share_of_repeated_lines("a\na\n\n b\na") == 0.5
    filters = FilterConfig(min_characters=3, max_characters=20, min_letters=0.5, max_repeated_lines=0.4)
    reasons = [reason_to_remove(t, filters) for t in ("ab", "a" * 21, "1234a", "aa\naa\naa", "good text")]
    assert reasons == ["too short", "too long", "too few letters", "repeated lines", None]


def test_a_build_counts_what_each_filter_removed_and_duplicates_go_over_all_sources(tmp_path):
    texts = [generated_text(n, 30) for n in range(60)]
    for name, of_file in (("a", texts[:40]), ("b", [texts[0] + "\n", "1234 5678 90", "x", *texts[30:]])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in of_file)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    config = CorpusConfig.model_validate(
        {
            "path": tmp_path / "c",
            "sources": [{"path": str(tmp_path / f"{name}.jsonl")} for name in "ab"],
            "tokenizer": {"vocab_size": 100, "byte_fallback": False},
            "filters": {"min_characters": 5, "min_letters": 0.5, "deduplicate": True},
            "min_train_shards": 4,
            "splits": {"valid": 0.1, "test": 0.1},
            "processes": 1,
        }
    )
    manifest = build_corpus(config)
    assert [source.skipped for source in manifest.sources] == [
        {},
        {"duplicate": 11, "too few letters": 1, "too short": 1},
    ]
    assert [source.documents for source in manifest.sources] == [40, 20]
    kept = [text for split in texts_by_split(config.path).values() for text in split]
    assert sorted(kept) == sorted(texts)
    assert verify_corpus(config.path) == []
    assert sum(split.characters for split in manifest.splits.values()) == sum(map(len, texts))
