"""Sentencepiece: train a model, check one that was brought along, text -> ids and back.

The ids of the special symbols are the same in every vocabulary. Models are plain sentencepiece files; anyone's
`SentencePieceProcessor` reads them.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece as spm

from pretrain.config.data import TokenizerConfig
from pretrain.data.arrays import AnyInts
from pretrain.errors import UserError
from pretrain.files import atomic_path

PAD, UNK, BOS, EOS, MASK = range(5)
SPECIAL_PIECES = ("<pad>", "<unk>", "<s>", "</s>", "[MASK]")
"""Pieces with the ids PAD, UNK, BOS, EOS, MASK."""
RESIDUES = "ACDEFGHIKLMNPQRSTVWYBZXUO"
"""The 20 amino acids and B, Z, X, U, O, in the order of their ids."""
TokenDtype = Literal["uint8", "uint16", "uint32"]
_TRAINER_THREADS = 16
"""A constant, not the number of cores: sentencepiece sums expectations per thread, so the model depends on it."""
_CHUNK_CHARACTERS = 4096
_CHARACTERS_PER_PIECE = 2500
"""Training text per piece of the vocabulary. On Python docstrings three times more shortens the encoding by 0.6 %."""
_SPACE = "\u2581"
"""Sentencepiece writes a space as this character, and so cannot tell the character itself from a space."""


def token_dtype(vocab_size: int) -> TokenDtype:
    """Return the name of the smallest unsigned type that holds every id."""
    if vocab_size <= 2**8:
        return "uint8"
    return "uint16" if vocab_size <= 2**16 else "uint32"


def training_characters(config: TokenizerConfig) -> int:
    """Return how much text `train_tokenizer` should be given: `sample_characters`, but no more than can help."""
    return min(config.sample_characters, max(1_000_000, _CHARACTERS_PER_PIECE * config.vocab_size))


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, path: Path) -> None:
    """Train a model and write it to `path`; the same texts and config give the same bytes, on any number of cores.

    For proteins, `texts` is not read: the vocabulary is the alphabet.

    Raises:
        UserError: the texts are too small for the vocabulary, or the vocabulary for the texts.
    """
    options: dict[str, Any]
    if config.kind == "protein":
        # Falling frequencies give the pieces of a character model the order of the alphabet.
        sentences = [residue * (len(RESIDUES) - rank) for rank, residue in enumerate(RESIDUES)]
        options = {"model_type": "char", "vocab_size": len(SPECIAL_PIECES) + len(RESIDUES), "character_coverage": 1.0}
    else:
        sentences = [chunk for text in texts for chunk in _chunks(text)]
        options = {
            "model_type": config.kind,
            "vocab_size": config.vocab_size,
            "byte_fallback": config.byte_fallback,
            "normalization_rule_name": config.normalization,
            "character_coverage": 0.9999,
            "allow_whitespace_only_pieces": True,
            "max_sentence_length": 4 * _CHUNK_CHARACTERS,
        }
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            **{"normalization_rule_name": "identity", **options},
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            control_symbols=[SPECIAL_PIECES[MASK]],
            num_threads=_TRAINER_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_explain_training(str(error), config)) from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.getvalue())


def _chunks(text: str) -> Iterator[str]:
    """Cut a text into pieces short enough for the trainer, which drops longer ones; before white space if possible."""
    start = 0
    while start < len(text):
        stop = start + _CHUNK_CHARACTERS
        if stop < len(text):
            cut = max(text.rfind(" ", start + 1, stop), text.rfind("\n", start + 1, stop))
            stop = cut if cut > 0 else stop
        yield text[start:stop]
        start = stop


def _explain_training(message: str, config: TokenizerConfig) -> str:
    size = config.vocab_size
    if too_high := re.search(r"too high .*<= (\d+)", message):
        return (
            f"the training text is too small for corpus.tokenizer.vocab_size = {size}: it yields {too_high[1]} pieces "
            f"at most; set corpus.tokenizer.vocab_size={too_high[1]} or less, or add text"
        )
    if too_low := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"corpus.tokenizer.vocab_size = {size} is too small: the special symbols, the byte pieces (if any) and the "
            f"characters of the text alone take {too_low[1]}; set corpus.tokenizer.vocab_size above {too_low[1]}"
        )
    if "sentences_.empty()" in message:
        return "there is no text to train the tokenizer on; look at the sources and at corpus.splits"
    return f"sentencepiece could not train a model of {size} pieces: {message}"


class Tokenizer:
    """A sentencepiece model whose special symbols are ours."""

    def __init__(self, path: Path) -> None:
        """Load and check.

        Raises:
            UserError: the file is no sentencepiece model, or its special symbols have other ids.
        """
        try:
            self._processor = spm.SentencePieceProcessor(model_proto=path.read_bytes())
            self.vocab_size: int = self._processor.vocab_size() if path.stat().st_size else 0
        except OSError as error:
            raise UserError(f"the tokenizer {path} cannot be read: {error.strerror or error}") from error
        except RuntimeError as error:
            raise UserError(f"{path} is not a sentencepiece model: {str(error).strip()}") from error
        if not self.vocab_size:
            raise UserError(f"{path} is not a sentencepiece model: it is empty")
        self._check_special_pieces(path)
        self.token_dtype: TokenDtype = token_dtype(self.vocab_size)
        of_kind = (self._processor.is_control, self._processor.is_unknown, self._processor.is_unused)
        self.special_ids = frozenset(i for i in range(self.vocab_size) if any(test(i) for test in of_kind))
        """Control, unknown and unused ids: never masked, never drawn at random."""
        self._space_bytes = self._bytes_of_space()

    def _check_special_pieces(self, path: Path) -> None:
        found = [self.piece(i) for i in range(min(len(SPECIAL_PIECES), self.vocab_size))]
        wrong = [
            f"id {i} should be {expected!r}" + (f" and is {found[i]!r}" if i < len(found) else " and is absent")
            for i, expected in enumerate(SPECIAL_PIECES)
            if i >= len(found) or found[i] != expected
        ]
        if not wrong and not self._processor.is_control(MASK):
            wrong = [f"{SPECIAL_PIECES[MASK]!r} should be a control symbol, so that no text can contain it"]
        if wrong:
            raise UserError(
                f"the sentencepiece model {path} does not have Diptych's special symbols: {'; '.join(wrong)}. Train it "
                "with pad_id=0 unk_id=1 bos_id=2 eos_id=3 control_symbols=[MASK], or leave corpus.tokenizer.model out"
            )

    def _bytes_of_space(self) -> list[int] | None:
        """Return the ids of U+2581 as bytes; None if the model has no byte pieces or begins every text with a space."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        begins_with_space = self._processor.encode("a", out_type=str)[0].startswith(_SPACE)
        return None if begins_with_space or not all(map(self._processor.is_byte, ids)) else ids

    def encode(self, text: str) -> AnyInts:
        """Return ids [tokens] of `token_dtype`, without begin or end symbols; of special symbols, only UNK occurs.

        With byte fallback and identity normalisation `decode` gives the text back exactly.
        """
        if self._space_bytes is None or _SPACE not in text:
            return np.array(self._processor.encode(text), dtype=self.token_dtype)
        first, *rest = text.split(_SPACE)
        ids = self._processor.encode(first)
        for words in rest:
            ids += self._space_bytes + self._processor.encode(words)
        return np.array(ids, dtype=self.token_dtype)

    def decode(self, ids: Sequence[int] | AnyInts) -> str:
        """Return the text of the ids; control symbols have none."""
        return self._processor.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        """Return how the vocabulary writes an id: its text with spaces as U+2581, `<0x0A>` for a byte, `[MASK]`."""
        return self._processor.id_to_piece(token)
