import hashlib
import io
import random

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.data import TokenizerConfig
from pretrain.data import tokenizer as module
from pretrain.data.tokenizer import (
    BOS,
    EOS,
    MASK,
    PAD,
    RESIDUES,
    UNK,
    Tokenizer,
    token_dtype,
    train_tokenizer,
    training_characters,
)
from pretrain.errors import UserError

TEXT = """the whale sea ship harpoon captain white deep water sailed north before storm and of to was little
money purse nothing particular interest shore thought would about see watery part world driving spleen regulating
circulation whenever find myself growing grim mouth damp drizzly november soul involuntarily pausing coffin
warehouses bringing rear every funeral meet especially hypos upper hand requires strong moral principle prevent"""
WORDS = TEXT.split()


def english(words=6000, seed=0):
    choose = random.Random(seed)
    return " ".join(choose.choice(WORDS) + choose.choice(["", "", "", ",", ".\n\n", "\nso"]) for _ in range(words))


def trained(folder, **settings):
    path = folder / "tokenizer.model"
    train_tokenizer([english()], TokenizerConfig(**{"vocab_size": 330, **settings}), path)
    return Tokenizer(path)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def lossless(request, tmp_path_factory):
    return trained(tmp_path_factory.mktemp(request.param), kind=request.param)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_same_text_gives_the_same_model_in_any_folder(tmp_path, kind):
    digests = set()
    for folder in ("a", "b/c"):
        (tmp_path / folder).mkdir(parents=True)
        trained(tmp_path / folder, kind=kind)
        digests.add(hashlib.sha256((tmp_path / folder / "tokenizer.model").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_special_symbols_have_their_fixed_ids(lossless):
    assert [lossless.piece(i) for i in (PAD, UNK, BOS, EOS, MASK)] == ["<pad>", "<unk>", "<s>", "</s>", "[MASK]"]
    assert lossless.special_ids == {0, 1, 2, 3, 4}
    assert lossless.vocab_size == 330
    assert lossless.token_dtype == "uint16"
    assert lossless.encode("the whale").dtype == np.uint16


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   ",
        " begins and ends with a space ",
        "two  spaces,   three",
        "line\nbreak\n\n\ntwo\r\n",
        "\n",
        "\ttab\t\ttab",
        "emoji \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467",
        "control \x00\x01\x1b\x7f\x85",
        "sentencepiece's own \u2581 and \u2585, \u2581\u2581",
        "<s>[MASK]</s><pad><unk><0x41>",
        "e\u0301 \u00e9 \ufb01 \u3000 \ufeff \u2028",
    ],
)
def test_decoding_gives_back_exactly_the_text_that_was_encoded(lossless, text):
    ids = lossless.encode(text)
    assert lossless.decode(ids) == text
    assert not set(ids.tolist()) & lossless.special_ids


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_decoding_gives_back_any_text(lossless, text):
    assert lossless.decode(lossless.encode(text)) == text


def test_text_like_the_training_text_takes_few_pieces_and_strange_characters_are_bytes(lossless):
    assert len(lossless.encode(TEXT)) < 0.7 * len(TEXT)
    assert [lossless.piece(int(i)) for i in lossless.encode("\u00e9")] == ["<0xC3>", "<0xA9>"]


def test_without_byte_fallback_a_strange_character_is_unknown(tmp_path):
    tokenizer = trained(tmp_path, byte_fallback=False, vocab_size=70)
    assert tokenizer.encode("\u00e9").tolist() == [UNK]
    assert tokenizer.token_dtype == "uint8"


def test_nfkc_folds_ligatures_and_identity_does_not(tmp_path, lossless):
    tokenizer = trained(tmp_path, normalization="nfkc")
    assert tokenizer.decode(tokenizer.encode("\ufb01sh  x")) == "fish  x"
    assert lossless.decode(lossless.encode("\ufb01sh")) == "\ufb01sh"


def test_a_document_longer_than_any_sentence_is_learned_from_to_its_end(tmp_path):
    text = english() * 3 + " zyzzyva" * 400 + "x" * 50_000
    path = tmp_path / "long.model"
    train_tokenizer([text], TokenizerConfig(vocab_size=330), path)
    assert len(Tokenizer(path).encode(" zyzzyva")) == 1


def test_chunks_join_to_the_text_and_are_cut_before_white_space():
    text = english(3000) + "y" * 10_000 + "  z"
    chunks = list(module._chunks(text))
    assert "".join(chunks) == text
    assert max(map(len, chunks)) <= module._CHUNK_CHARACTERS
    assert all(chunk[0] in " \n" for chunk in chunks[1:3])


def test_training_text_is_bounded_by_the_vocabulary_and_by_the_setting():
    assert training_characters(TokenizerConfig(vocab_size=4096)) == 10_240_000
    assert training_characters(TokenizerConfig(vocab_size=64_000)) == 50_000_000
    assert training_characters(TokenizerConfig(sample_characters=1000)) == 1000


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_text_too_small_for_the_vocabulary_is_refused_with_the_largest_size_that_works(tmp_path, kind):
    with pytest.raises(UserError, match="vocab_size = 8000") as caught:
        trained(tmp_path, kind=kind, vocab_size=8000)
    largest = int(str(caught.value).split("set corpus.tokenizer.vocab_size=")[1].split()[0])
    assert trained(tmp_path, kind=kind, vocab_size=largest).vocab_size == largest


def test_a_vocabulary_too_small_for_its_characters_is_refused_with_the_least_size(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size = 64 is too small.* above (\d+)") as caught:
        trained(tmp_path, vocab_size=64)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    assert trained(tmp_path, vocab_size=least + 1).vocab_size == least + 1


def test_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="no text to train the tokenizer on"):
        train_tokenizer([], TokenizerConfig(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- proteins


def test_the_protein_vocabulary_is_the_alphabet_in_its_order_whatever_the_config_says(tmp_path):
    tokenizer = trained(tmp_path, kind="protein", vocab_size=5000)
    assert [tokenizer.piece(i) for i in range(tokenizer.vocab_size)] == [
        "<pad>", "<unk>", "<s>", "</s>", "[MASK]", *RESIDUES,
    ]  # fmt: skip
    assert tokenizer.vocab_size == 30
    assert tokenizer.token_dtype == "uint8"
    assert tokenizer.special_ids == {0, 1, 2, 3, 4}


def test_a_protein_is_one_token_per_residue(tmp_path):
    tokenizer = trained(tmp_path, kind="protein")
    assert tokenizer.encode(RESIDUES).tolist() == list(range(5, 30))
    assert tokenizer.encode("MMKO").tolist() == [15, 15, 13, 29]
    assert tokenizer.decode(tokenizer.encode("MKVLLAWW")) == "MKVLLAWW"
    assert tokenizer.encode("J").tolist() == [UNK]


# -------------------------------------------------------------------------------------------------------- loading


def foreign_model(path, **settings):
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(english().split("\n")), model_writer=model, vocab_size=80, minloglevel=2, **settings
    )
    path.write_bytes(model.getvalue())
    return path


OURS = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3}


@pytest.mark.parametrize("content", [b"", b"no model", b"\0" * 100], ids=["empty", "text", "zeros"])
def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path, content):
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        Tokenizer(tmp_path / "x.model")


def test_a_tokenizer_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"x\.model cannot be read: No such file"):
        Tokenizer(tmp_path / "x.model")


def test_a_model_with_other_special_symbols_is_refused_with_each_difference(tmp_path):
    with pytest.raises(UserError, match="id 0 should be '<pad>' and is '<unk>'.*control_symbols=\\[MASK\\]"):
        Tokenizer(foreign_model(tmp_path / "x.model"))
    with pytest.raises(UserError, match="id 4 should be '\\[MASK\\]' and is"):
        Tokenizer(foreign_model(tmp_path / "x.model", **OURS))


def test_a_mask_symbol_that_text_could_contain_is_refused(tmp_path):
    with pytest.raises(UserError, match="'\\[MASK\\]' should be a control symbol"):
        Tokenizer(foreign_model(tmp_path / "x.model", **OURS, user_defined_symbols=["[MASK]"]))


def test_a_model_made_elsewhere_with_our_special_symbols_is_welcome(tmp_path):
    tokenizer = Tokenizer(foreign_model(tmp_path / "x.model", **OURS, control_symbols=["[MASK]", "[CLS]"]))
    assert tokenizer.special_ids == {0, 1, 2, 3, 4, 5}
    assert tokenizer.decode(tokenizer.encode("the white whale")) == "the white whale"


def with_unused(model: bytes, unused: int) -> bytes:
    """The model with one id marked as unused: its piece, field 1 of the message, gets type 5 in field 3."""
    at = 0
    for _ in range(unused):
        at += 2 + model[at + 1]
    end = at + 2 + model[at + 1]
    assert model[at] == 0x0A
    assert end - at < 0x7E, "a longer piece takes two bytes for its size"
    return model[: at + 1] + bytes([end - at]) + model[at + 2 : end] + b"\x18\x05" + model[end:]


def test_ids_that_the_model_leaves_unused_are_never_masked_or_drawn(tmp_path):
    path = foreign_model(tmp_path / "x.model", **OURS, control_symbols=["[MASK]"])
    path.write_bytes(with_unused(path.read_bytes(), 9))
    assert Tokenizer(path).special_ids == {0, 1, 2, 3, 4, 9}


def test_the_token_type_is_the_smallest_that_holds_the_vocabulary():
    sizes = (30, 256, 257, 65_536, 65_537)
    assert [token_dtype(size) for size in sizes] == ["uint8", "uint8", "uint16", "uint16", "uint32"]
