"""Which changes of a config make a resumed run another run."""

from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from pretrain.config.identity import changes, falsifying, is_fixed
from pretrain.config.load import validate
from pretrain.config.run import RunConfig
from pretrain.config.section import fields_of, section_in
from pretrain.errors import UserError
from pretrain.run.opening import open_run_folder

FREE = {
    # Where and how the run is worked on, saved, watched and looked at. Another corpus is told by its fingerprint.
    "name runs corpus checkpoint supervision evaluation cluster sweep parallel",
    # How far and how fast it goes.
    "schedule optimizer.learning_rate optimizer.betas optimizer.eps optimizer.weight_decay optimizer.clip_grad_norm",
    "optimizer.muon training.tokens training.batch_size phases.batch_size",
    # How a step is computed, and what is done about a bad one.
    "training.micro_batch_size training.precision training.sharding training.reduce_dtype training.offload",
    "training.overlap_communication training.offload_folder training.activation_checkpointing training.compile",
    "training.max_skipped_steps training.spikes training.spike_threshold phases.micro_batch_size model.kernel",
    # What is reported.
    "training.log_every training.validate_every training.validation_rows",
    # How rows are fetched; not which ones.
    "data.on_corrupt data.cache data.cache_bytes data.fetch_timeout_s data.fetch_attempts data.workers",
}
"""Settings that a resumed run may change, alone or as whole sections."""


def config_of(**sections: object) -> RunConfig:
    return validate({"name": "n", "corpus": {"path": "c"}, **sections}, "test")


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in fields_of(section).items():
        inside = section_in(field)
        yield from keys_of(inside, f"{prefix}{name}.") if inside else [f"{prefix}{name}"]


@pytest.mark.parametrize("key", sorted(keys_of(RunConfig)))
def test_every_setting_is_either_fixed_or_known_to_be_free(key):
    """A new one fails here until it is marked `Fixed` in the schema, or listed above."""
    parts = key.split(".")
    free = {word for line in FREE for word in line.split()}
    listed = any(".".join(parts[:n]) in free for n in range(1, len(parts) + 1))
    assert is_fixed(key) != listed


@pytest.mark.parametrize(
    ("section", "values", "refused"),
    [
        ("data", {"final_mask_rate": 0.3, "workers": 2}, ["data.final_mask_rate"]),
        ("data", {"mean_span_length": 4.0, "cache": "/c"}, ["data.mean_span_length"]),
        ("data", {"source_weights": {"the.books": 2}}, ["data.source_weights.the.books"]),
        ("model", {"layers": [{"span": 16}], "kernel": "dense"}, ["model.layers"]),
        ("optimizer", {"kind": "muon", "learning_rate": 1, "muon": {"steps": 4}}, ["optimizer.kind"]),
        ("training", {"tokens": 7, "batch_size": 8, "sharding": "full"}, []),
        ("schedule", {"decay": 0.5}, []),
        ("checkpoint", {"async": False}, []),
    ],
)
def test_only_some_changes_make_another_run(section, values, refused):
    assert falsifying(config_of(), config_of(**{section: values}), 1_000) == refused


def test_changes_are_told_leaf_by_leaf():
    differences = changes(config_of(), config_of(model={"num_layers": 6, "layers": [{}]}, checkpoint={"async": False}))
    assert differences["model.num_layers"] == (4, 6)
    assert differences["model.layers"][0] == []
    assert list(differences) == ["checkpoint.async", "model.layers", "model.num_layers"]


@pytest.mark.parametrize(
    ("phases", "refused"),
    [
        ([{"from_tokens": 500, "mask_rate": 0.3}, {"from_tokens": 900, "sequence_length": 512}], False),
        ([{"from_tokens": 500, "mask_rate": 0.3, "batch_size": 8}], False),
        ([{"from_tokens": 500, "mask_rate": 0.4}], True),
        ([{"from_tokens": 400, "mask_rate": 0.3}], True),
        ([{"from_tokens": 300, "rotary_theta": 5.0}, {"from_tokens": 500, "mask_rate": 0.3}], True),
        ([], True),
    ],
)
def test_a_phase_may_change_until_it_has_begun(phases, refused):
    saved = config_of(phases=[{"from_tokens": 500, "mask_rate": 0.3}, {"from_tokens": 700, "mask_rate": 0.1}])
    assert falsifying(saved, config_of(phases=phases), 700) == ["phases"] * refused


def test_a_run_with_other_masks_is_refused_by_name_unless_it_is_allowed(finished, manifest):
    other = finished.changed({"data": finished.data.changed({"final_mask_rate": 0.4})})
    with pytest.raises(UserError, match=r"data.final_mask_rate: None there, 0.4 now\n.*--allow-change data.final_mask"):
        open_run_folder(other, manifest)
    lines = open_run_folder(other, manifest, ["data.final_mask_rate"])
    assert "changed since: data.final_mask_rate None -> 0.4" in lines


def test_a_trained_run_takes_a_phase_that_is_to_come_and_refuses_one_in_the_past(finished, manifest):
    def with_phase(from_tokens: int) -> RunConfig:
        return finished.changed({"phases": [{"from_tokens": from_tokens, "mask_rate": 0.4}]})

    with pytest.raises(UserError, match=r"holds another run:\n  phases: \[\] there, .*\n.*--allow-change phases"):
        open_run_folder(with_phase(1_000), manifest)
    assert any("changed since: phases" in line for line in open_run_folder(with_phase(1_000_000), manifest))
