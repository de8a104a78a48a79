"""A real corpus for tests: built by the product from generated text, once per session."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config.load import to_yaml, validate
from pretrain.config.run import RunConfig
from pretrain.data.build.corpus import build_corpus
from pretrain.data.manifest import Manifest, load_manifest
from tests.ranks import run_on_ranks, train_alone

if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared by the workers
    torch.set_num_threads(1)

SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def generated_text(seed: int, words: int) -> str:
    """Made-up words of which one mostly decides the next, so that there is something to learn."""
    chosen, word, text = random.Random(seed), seed % len(SYLLABLES), []
    for _ in range(words):
        word = (word * 3 + 1) % len(SYLLABLES) if chosen.random() < 0.9 else chosen.randrange(len(SYLLABLES))
        text.append(SYLLABLES[word] + SYLLABLES[(word * 7 + 2) % len(SYLLABLES)])
    return " ".join(text)


def write_texts(folder: Path, number: int) -> None:
    """Files of 100 to 370 such words, in a new folder."""
    folder.mkdir(parents=True)
    for seed in range(number):
        (folder / f"{seed:03d}.txt").write_text(generated_text(seed, 100 + 30 * (seed % 10)))


@pytest.fixture(scope="session")
def corpus_values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The `corpus` section of a small corpus that is built already: 16 training shards, long enough for 8 x 32."""
    folder = tmp_path_factory.mktemp("a corpus")
    sources = folder / "raw text"
    sources.mkdir()
    for number in range(240):
        (sources / f"{number:03d}.txt").write_text(generated_text(number, 20 + 41 * (number % 12)))
    values = {
        "path": str(folder / "corpus"),
        "sources": [{"path": str(sources)}],
        "tokenizer": {"vocab_size": 120, "byte_fallback": False},
        "splits": {"valid": 0.1, "test": 0.1},
        "min_train_shards": 16,
        "processes": 1,
    }
    build_corpus(validate({"name": "x", "corpus": values, "data": {"streams": 16}}, "test").corpus)
    return values


def tiny_run(corpus_values: dict[str, Any], runs: Path, name: str, **sections: dict[str, Any]) -> RunConfig:
    """A run on the test corpus that trains in seconds, with some sections changed."""
    values: dict[str, Any] = {
        "name": name,
        "runs": str(runs),
        "seed": 7,
        "corpus": corpus_values,
        "data": {"sequence_length": 32, "streams": 16, "workers": 0, "cache": str(runs.parent / "cache")},
        "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2},
        "training": {"tokens": 12_000, "batch_size": 16, "micro_batch_size": 4, "validation_rows": 40},
    }
    for section, changed in sections.items():
        values[section] = {**values.get(section, {}), **changed}
    return validate(values, "test")


@pytest.fixture
def make_config(corpus_values: dict[str, Any], tmp_path: Path) -> Callable[..., RunConfig]:
    """`make_config(name, section={...})`: `tiny_run` in a folder of this test."""

    def make(name: str = "run", **sections: dict[str, Any]) -> RunConfig:
        return tiny_run(corpus_values, tmp_path / "runs", name, **sections)

    return make


@pytest.fixture
def manifest(corpus_values: dict[str, Any]) -> Manifest:
    """Of the test corpus."""
    return load_manifest(Path(corpus_values["path"]))


TRAINED: dict[str, dict[str, Any]] = {
    "training": {"tokens": 40_000, "micro_batch_size": 16, "sharding": "none"},
    "optimizer": {"learning_rate": 1e-2},
    "checkpoint": {"every": 40, "keep_last": 3},
}
"""Sections of a run that has learned something when it ends, after 83 steps, and has three checkpoints."""


@pytest.fixture(scope="session")
def trained_once(corpus_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of one rank that is trained to its end; not to be changed, `finished` and `trained` are copies of it."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_run(corpus_values, folder / "runs", "run", **TRAINED)
    from pretrain.run.opening import open_run_folder

    open_run_folder(config, load_manifest(config.corpus.path))
    run_on_ranks(train_alone, 1, folder / "ranks", config)
    return config


def copy_of_run(trained: RunConfig, config: RunConfig) -> RunConfig:
    """Give `config` the folder of a trained run."""
    shutil.copytree(trained.run_folder, config.run_folder)
    (config.run_folder / "config.yaml").write_text(to_yaml(config))
    return config


@pytest.fixture
def finished(trained_once: RunConfig, make_config: Callable[..., RunConfig]) -> RunConfig:
    """The trained run, in a folder of this test."""
    return copy_of_run(trained_once, make_config(**TRAINED))
