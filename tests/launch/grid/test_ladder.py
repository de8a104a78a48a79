"""Ladders: what their rungs are, and what the law through their losses says."""

import json
import math
import random

import pytest

from launch.grid.ladder_report import Climbed, findings, fit_power_law, read_climbed, write_report
from launch.grid.rungs import Ladder, Rung, plan_ladder, read_ladder
from pretrain.errors import UserError

RUNGS = [Rung(name, 10**k, 20 * 10**k, 6.0 * 20 * 100**k) for k, name in enumerate(("a", "b", "c"), start=6)]
NEXT = Rung("d", 10**9, 20 * 10**9, 6.0 * 20 * 100**9)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"runs: {tmp_path}/runs\ncorpus: {{path: {tmp_path}/corpus, tokenizer: {{vocab_size: 512}}}}\n"
        "training: {batch_size: 8}\nmodel: {num_layers: 1, hidden_size: 8}\n"
    )
    return str(path)


def law(flops: float) -> float:
    return 30.0 * flops**-0.05


def climbed(losses: dict[str, list[float]], rungs: list[Rung] = RUNGS) -> Climbed:
    return Climbed("mine", Ladder(rungs, NEXT, 20.0), losses, [])


def test_every_size_gets_as_many_tokens_per_parameter_and_all_together_the_budget(config, tmp_path):
    sweep, ladder = plan_ladder(config, ["name=l"], ["4m", "1m"], seeds=[1, 2], budget=2e14)
    assert [rung.size for rung in ladder.rungs] == ["1m", "4m"]
    assert 2 * sum(rung.flops for rung in ladder.rungs) == pytest.approx(2e14, rel=1e-4)
    for rung in ladder.rungs:
        assert rung.tokens / rung.parameters == pytest.approx(ladder.tokens_per_parameter, rel=1e-4)
    assert [member.name for member in sweep.members] == ["size1m-seed1", "size1m-seed2", "size4m-seed1", "size4m-seed2"]
    last = sweep.configs[-1]
    # What the size says overrules what the config says.
    assert (last.model.hidden_size, last.model.num_layers, last.optimizer.learning_rate) == (256, 5, 2e-3)
    assert (last.training.tokens, last.training.batch_size, last.seed) == (ladder.rungs[1].tokens, 8, 2)
    assert ladder.next_rung is not None
    assert ladder.next_rung.size == "15m"
    assert ladder.next_rung.tokens / ladder.next_rung.parameters == pytest.approx(ladder.tokens_per_parameter, rel=1e-4)
    sweep.folder.mkdir(parents=True)
    ladder.write(sweep.folder)
    assert read_ladder(sweep.folder) == ladder


def test_what_makes_no_ladder_is_an_answer(config, tmp_path):
    for sizes, wanted, answer in (
        (["1m"], {}, "several different sizes"),
        (["1m", "4m", "1m"], {}, "several different sizes"),
        (["1m", "5m"], {}, "no config 'model/5m'"),
        (
            ["1m", "4m"],
            {"budget": 1e12},
            "1m would be trained on .* fewer than 20 steps of up to 1,024; raise --budget",
        ),
    ):
        with pytest.raises(UserError, match=answer):
            plan_ladder(config, [], sizes, seeds=[1], **wanted)
    with pytest.raises(UserError, match="is no ladder"):
        read_ladder(tmp_path)


def test_a_law_is_found_again_and_foretells_exactly():
    flops = [1e12, 1e13, 1e14]
    found = fit_power_law(flops, [law(x) for x in flops])
    assert found.exponent == pytest.approx(0.05)
    assert found.predict(1e16).value == pytest.approx(law(1e16))
    assert fit_power_law(flops[:2], [5.0, 4.0]).predict(1e15).interval is None


def test_intervals_hold_as_often_as_they_say():
    source, flops, inside, inside_exponent = random.Random(0), [1e12, 1e12, 1e13, 1e13, 1e14, 1e14], 0, 0
    for _ in range(1000):
        noisy = [law(x) * math.exp(source.gauss(0, 0.02)) for x in flops]
        found = fit_power_law(flops, noisy)
        new = law(1e15) * math.exp(source.gauss(0, 0.02))
        low, high = found.predict(1e15).interval
        inside += low <= new <= high
        low, high = found.exponent_estimate().interval
        inside_exponent += low <= 0.05 <= high
    # 95 %, within four standard deviations of the count.
    assert 922 <= inside <= 978
    assert 922 <= inside_exponent <= 978


def test_the_largest_size_is_foretold_by_the_smaller_and_the_next_by_all():
    true = {rung.size: [law(rung.flops) * (1 + e) for e in (-0.001, 0.001)] for rung in RUNGS}
    text = "\n".join(findings(climbed(true)))
    assert "a power of compute, with the exponent 0.050 (0.050 to 0.050)" in text
    foretold = law(RUNGS[-1].flops)
    assert f"Left out, c: foretold {foretold:.3f}" in text
    assert "inside the interval" in text
    assert f"Next, d: {law(NEXT.flops):.3f}" in text
    bent = "\n".join(findings(climbed(true | {"c": [x * 1.2 for x in true["c"]]})))
    assert "(+20.0%), OUTSIDE the interval" in bent


def test_too_little_for_a_law_or_for_intervals_is_said():
    one = findings(climbed({"a": [5.0]}))
    assert "nothing to fit" in one[-1]
    two = "\n".join(findings(climbed({"a": [5.0], "b": [4.0]})))
    assert "no intervals" in two
    assert "none can be left out" in two
    rising = "\n".join(findings(climbed({"a": [4.0], "b": [4.5], "c": [5.0]})))
    assert "larger sizes are no better" in rising


def test_a_report_holds_finished_runs_and_names_the_others(tmp_path):
    Ladder(RUNGS, None, 20.0).write(tmp_path)
    members = [{"name": f"size{r.size}-seed1", "labels": {"size": r.size, "seed": "1"}, "overrides": []} for r in RUNGS]
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 1, "members": members}))
    with pytest.raises(UserError, match="no run of .* is finished yet"):
        read_climbed(tmp_path, 0.0)
    for rung, share in zip(RUNGS, (1, 1, 0.5), strict=True):
        run = tmp_path / f"size{rung.size}-seed1"
        run.mkdir()
        record = {"step": 1, "tokens": int(rung.tokens * share), "validation_loss": law(rung.flops)}
        (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    found = read_climbed(tmp_path, 0.0)
    assert set(found.losses) == {"a", "b"}
    assert found.unfinished == ["sizec-seed1"]
    report = write_report(tmp_path, found).read_text()
    assert "left out: sizec-seed1" in report
    assert "| c | 100 M | 2.00 G | 1.20e+18 | - | 0 |" in report
    assert (tmp_path / "ladder.png").stat().st_size > 10_000
