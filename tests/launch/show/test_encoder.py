"""`diptych model show`, on configs that come with Diptych and on a built corpus."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from launch.show.encoder import show_model
from pretrain.data.manifest import Manifest


@pytest.fixture
def show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name: str, *overrides: str) -> str:
        to = Console(file=io.StringIO(), width=120, color_system=None)
        show_model(name, list(overrides), to)
        assert isinstance(to.file, io.StringIO)
        return to.file.getvalue()

    return run


def cells(shown: str, name: str) -> list[str]:
    """The words after `name` in the first line that begins with it."""
    lines = [line.strip() for line in shown.splitlines()]
    return next(line for line in lines if line.startswith(f"{name} ")).removeprefix(name).split()


def test_the_largest_config_is_shown_with_its_parameters_and_flops(show):
    shown = show("model/1b", "corpus.tokenizer.vocab_size=32768", "data.sequence_length=1024")
    assert cells(shown, "embedding")[:2] == ["1", f"{32_768 * 2048:,}"]
    assert cells(shown, "attention")[:2] == ["40", f"{20 * 4 * 2048**2:,}"]
    assert cells(shown, "head") == ["-", "the", "embedding", "-"]
    assert cells(shown, "lower sub-heads")[:2] == ["16", "64"]
    assert cells(shown, "upper sub-heads")[:2] == ["16", "64"]
    assert "vocabulary: 32,768 pieces, by corpus.tokenizer.vocab_size (the corpus is not built)" in shown
    # 20 layers x (2 products x 2 FLOPs) x 3 passes x hidden x length; triangles hold 1025/2048 of the pairs.
    assert cells(shown[shown.index("FLOPs") :], "attention") == ["252M", "503M"]


def test_without_sub_heads_the_heads_are_whole(show):
    shown = show("model/1m", "model.attention=bidirectional")
    assert "sub-heads" not in shown
    assert "past, self and future" in shown


def test_proteins_have_the_vocabulary_of_their_alphabet(show):
    assert "vocabulary: 30 pieces, of the protein alphabet" in show("data/proteins")


def test_a_built_corpus_gives_the_vocabulary(show, tmp_path, corpus_values, manifest: Manifest):
    (tmp_path / "mine.yaml").write_text(json.dumps({"corpus": corpus_values, "data": {"streams": 16}}))
    shown = show("mine.yaml", "corpus.tokenizer.vocab_size=999")
    assert f"{manifest.tokenizer.vocab_size:,} pieces, of the corpus {Path(corpus_values['path'])}" in shown
