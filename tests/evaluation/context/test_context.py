"""The context evaluation: the same targets at every length, and what follows from their losses."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from pretrain.batch import IGNORED
from pretrain.data.manifest import TOKENIZER, load_manifest, save_manifest
from pretrain.data.tokenizer import MASK
from pretrain.errors import UserError
from pretrain.evaluation.context.evaluate import run_evaluation
from pretrain.evaluation.context.plan import EvaluationPlan, share_out
from pretrain.evaluation.context.planning import PLAN_FILE, _measurable, plan_evaluation
from pretrain.evaluation.context.request import Request
from pretrain.evaluation.context.results.curves import profiles
from pretrain.evaluation.context.results.evaluation import Evaluation
from pretrain.evaluation.context.results.verdict import (
    cautions,
    effective_multiple,
    headline,
    held_multiple,
    used_multiple,
)
from pretrain.evaluation.context.session import Session, config_of_run
from pretrain.evaluation.context.windows import draw_windows, make_rows, middle_targets, single_mask_rows
from pretrain.evaluation.context.work import compute_part, missing_parts, part_file, run_parts
from pretrain.evaluation.report.markdown import markdown_table
from pretrain.evaluation.report.schema import LengthResult, read_report
from pretrain.evaluation.report.sections import intervention_table, length_table
from pretrain.evaluation.report.writing import write_context_report
from pretrain.run.folder import RunFolder

CPU = torch.device("cpu")


def without_times(report) -> dict:
    """What must be the same each time: all but speed and the date."""
    content = report.model_dump(mode="json", exclude={"speed"})
    content["provenance"] = {k: v for k, v in content["provenance"].items() if k not in ("written", "ranks", "command")}
    return content


@pytest.fixture
def session(trained) -> Session:
    plan, _, documents = plan_evaluation(
        Request(trained.run_folder, overrides=("evaluation.windows=12",), step=None), CPU
    )
    return Session(plan, CPU, documents)


# ------------------------------------------------------------------------------------------------------- the curve


def test_losses_of_a_trained_run_lie_below_unigram_and_the_report_says_them(trained, evaluated):
    report, folder = evaluated.report, evaluated.folder
    assert [r.multiple for r in report.results] == [0.5, 1, 2, 4, 8]
    assert report.windows == 48
    first = report.result(1)
    assert 0 < first.loss < report.unigram_loss
    assert first.gain == 0
    assert first.loss_interval[0] < first.loss < first.loss_interval[1]
    for before, result in zip([None, *report.results], report.results, strict=False):
        assert result.perplexity == pytest.approx(np.exp(result.loss))
        assert result.gain == pytest.approx(first.loss - result.loss)
        if before is not None:
            assert result.step_gain == pytest.approx(before.loss - result.loss)

    assert read_report(folder / "report.json") == report
    assert json.loads((folder / "report.json").read_text())["format"] == 2
    text = (folder / "report.md").read_text()
    assert report.headline in text
    for table in (length_table(report), intervention_table(report.readings)):
        assert markdown_table(table) in text
    assert f"| 1x | 32 | {first.loss:.3f} |" in text
    assert all((folder / image).stat().st_size > 5_000 for image in re.findall(r"\]\((.*?\.png)\)", text))


def test_the_same_request_gives_the_same_numbers(trained, evaluated, tmp_path):
    shutil.rmtree(evaluated.folder / "parts")
    again = run_evaluation(Request(trained.run_folder))
    assert without_times(again.report) == without_times(evaluated.report)


def test_tensorboard_gets_curves_over_length_and_figures(trained, evaluated):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(trained.run_folder / "tensorboard" / "context"))
    board.Reload()
    losses = {event.step: event.value for event in board.Scalars("context/loss_by_length")}
    assert losses == pytest.approx({r.length: r.loss for r in evaluated.report.results}, rel=1e-6)
    assert {"context/loss_by_length", "context/gain_by_length"} <= set(board.Tags()["images"])


def test_every_length_scores_the_same_targets_and_masks(session):
    plan = session.plan
    seen = {}
    for multiple in plan.multiples:
        rows = make_rows(session.windows, plan.length(multiple), 32, session.rule, plan.seed)
        is_target = rows.targets != IGNORED
        seen[multiple] = (rows.targets[is_target].tolist(), rows.inputs[is_target].tolist())
        assert len(rows.targets) == len(session.windows) * max(1, round(1 / multiple))
    assert len(seen[1][0]) > 50
    assert all(value == seen[1] for value in seen.values())
    assert MASK in seen[1][1]


def test_windows_lie_inside_documents_and_their_blocks_anywhere_in_them():
    documents = [np.arange(n) for n in (100, 300, 64, 256)]
    windows = draw_windows(documents, 32, 256, 100, 1)
    assert {w.document for w in windows} == {1, 3}
    assert len(windows) == 9 + 8
    for window in windows:
        assert (np.diff(window.ids) == 1).all()
        assert len(window.ids) == 256
        assert 0 <= window.offset <= 224
    blocks = [int(w.ids[w.offset]) for w in windows if w.document == 1]
    assert sorted(blocks) == list(range(0, 288, 32))
    fewer = draw_windows(documents, 32, 256, 5, 1)
    assert [w.key for w in fewer] == [w.key for w in windows[:5]]


def test_a_block_stands_at_every_place_of_its_longest_window_that_there_is():
    middle = 4
    windows = [
        w for seed in range(60) for w in draw_windows([np.arange(12)], 4, 8, 3, seed) if w.ids[w.offset] == middle
    ]
    assert {w.offset for w in windows} == {0, 1, 2, 3, 4}


def test_single_mask_rows_mask_the_middle_target_and_nothing_else(session):
    plan = session.plan
    cheap = make_rows(session.windows, 64, 32, session.rule, plan.seed)
    rows = single_mask_rows(session.windows, 64, 32, session.rule, plan.seed)
    assert ((rows.targets != IGNORED).sum(axis=1) == 1).all()
    assert (rows.inputs == MASK).sum() == len(rows.inputs)
    middle = middle_targets(cheap)
    assert (rows.targets[middle] == cheap.targets[middle]).all()
    unmasked = np.where(middle, cheap.targets, rows.inputs)
    for row, window in zip(unmasked, session.windows, strict=True):
        assert str(row.tolist())[1:-1] in str(window.ids.tolist())


def test_more_windows_than_there_are_blocks_to_draw_are_as_many_as_there_are(trained):
    plan, _, documents = plan_evaluation(Request(trained.run_folder, overrides=("evaluation.windows=100000",)), CPU)
    block = plan.training_length
    assert plan.windows == sum(len(ids) // block for ids in documents if len(ids) >= plan.longest) < 100_000
    assert len(Session(plan, CPU, documents).windows) == plan.windows


def test_profiles_count_every_target_once(trained, evaluated):
    report = evaluated.report
    assert all(b.targets >= 20 for p in report.profiles for b in p.bins)
    plan, folder, documents = plan_evaluation(Request(trained.run_folder), CPU)
    found = profiles(Evaluation(Session(plan, CPU, documents), folder), min_targets=1)
    for profile in found:
        assert sum(b.targets for b in profile.bins) == report.targets
        mean = sum(b.loss * b.targets for b in profile.bins) / report.targets
        assert mean == pytest.approx(report.result(profile.multiple).loss)
    edges = next(p for p in found if (p.by, p.multiple) == ("edge_distance", 1))
    assert [b.low for b in edges.bins] == [0, 8]


def test_interventions_are_set_for_the_length_that_they_are_measured_at_if_they_have_a_factor(evaluated):
    factors = {(r.reading, r.multiple): r.factor for r in evaluated.report.readings}
    names = ("plain", "interpolation", "ntk", "dynamic_ntk", "yarn", "dropped", "log_length", "windowed")
    factored = ("interpolation", "ntk", "yarn")
    assert factors == {(name, m): m if name in factored else 1.0 for name in names for m in (2, 4, 8)}


def test_tokens_that_need_context_are_chosen_within_the_training_length(evaluated):
    report, need = evaluated.report, evaluated.report.context_need
    assert need is not None
    assert (need.short_length, need.threshold) == (16, 0.5)
    assert 0 < need.targets < report.targets
    short, trained = report.result(0.5), report.result(1)
    assert short.needing_loss - trained.needing_loss > need.threshold
    assert trained.needing_gain == 0
    assert trained.helped == trained.hurt == 0


# ---------------------------------------------------------------------------------------------- the effective length


def result(multiple: float, loss: float, base: float, before: float, width: float = 0.02) -> LengthResult:
    gain, step = base - loss, before - loss
    return LengthResult(
        multiple=multiple,
        length=int(128 * multiple),
        loss=loss,
        loss_interval=(loss - 0.1, loss + 0.1),
        perplexity=np.exp(loss),
        masked_accuracy=0.3,
        accuracy_interval=(0.2, 0.4),
        gain=gain,
        gain_interval=(gain - width, gain + width),
        step_gain=step,
        step_gain_interval=(step - width, step + width),
        helped=0.0,
        hurt=0.0,
        needing_loss=None,
        needing_gain=None,
        needing_gain_interval=None,
    )


def curve(losses: dict[float, float]) -> list[LengthResult]:
    befores = [losses[1], *losses.values()]
    return [result(m, loss, losses[1], b) for (m, loss), b in zip(losses.items(), befores, strict=False)]


def test_the_effective_length_needs_a_held_loss_and_a_sure_gain_at_every_length_on_the_way():
    growing = curve({0.5: 3.2, 1: 3.0, 2: 2.9, 4: 2.8, 8: 2.8, 16: 2.81})
    assert (effective_multiple(growing), used_multiple(growing), held_multiple(growing)) == (16, 4, 16)
    assert "Effective length 16x, 2,048 tokens" in headline(growing)
    assert "beyond 4x a longer window gains nothing" in headline(growing)
    cropping = curve({1: 3.0, 2: 3.0, 4: 3.005, 8: 3.02, 16: 3.4})
    assert (effective_multiple(cropping), held_multiple(cropping)) == (1, 8)
    assert "No extension" in headline(cropping)
    assert "held up to 8x; at 16x perplexity is 1.49 times" in headline(cropping)
    gap = curve({1: 3.0, 2: 3.2, 4: 2.8})
    assert (effective_multiple(gap), held_multiple(gap)) == (1, 1)


def test_a_headline_cautions_where_little_was_learned_and_where_documents_are_few():
    results = curve({1: 3.0, 2: 2.9})
    assert cautions(results, documents=20, unigram_loss=3.2) == []
    little, few = cautions(results, documents=19, unigram_loss=3.1)
    assert "the loss is 3.000, and token frequencies alone cost 3.100" in little
    assert "from 19 documents" in few


# ------------------------------------------------------------------------------------------------------- refusals


def test_lengths_without_documents_are_left_out_unless_they_were_asked_for(trained, evaluated):
    assert evaluated.report.skipped["16x"] == "documents of the test split with 512 tokens: 1"
    with pytest.raises(
        UserError,
        match=r"16x cannot be measured: documents of the test split with 512 tokens: 1\..*has \d+ of 32 or more",
    ) as e:
        plan_evaluation(Request(trained.run_folder, lengths=(1, 2, 16)), CPU)
    assert "Use --lengths 1x,2x" in str(e.value)
    with pytest.raises(UserError, match=r"windows of 0\.75x do not tile"):
        plan_evaluation(Request(trained.run_folder, lengths=(0.75,)), CPU)


def test_learned_positions_beyond_their_table_are_refused(trained):
    model = trained.model.model_copy(update={"positions": "learned", "max_positions": 100})
    config = trained.model_copy(update={"model": model})
    multiples, skipped = _measurable(Request(trained.run_folder), config, [2000] * 9)
    assert multiples == [0.5, 1, 2]
    assert skipped["4x"] == "128 positions are beyond the 100 learned ones"
    with pytest.raises(UserError, match="128 positions are beyond the 100 learned ones"):
        _measurable(Request(trained.run_folder, lengths=(4,)), config, [2000] * 9)


def test_another_corpus_of_the_same_tokenizer_is_read_and_one_of_another_is_refused(trained, evaluated, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained.corpus.path, copy)
    plan, folder, _ = plan_evaluation(Request(trained.run_folder, corpus=copy), CPU)
    assert (plan.corpus, folder.name) == (copy, "context-copy")
    with (copy / TOKENIZER).open("ab") as file:
        file.write(b"\0")
    from pretrain.files import sha256_of

    manifest = load_manifest(trained.corpus.path)
    entry = manifest.tokenizer.model_copy(update={"sha256": sha256_of(copy / TOKENIZER)})
    save_manifest(copy, manifest.model_copy(update={"tokenizer": entry}))
    with pytest.raises(UserError, match=r"of another tokenizer .*corpus\.tokenizer\.model="):
        config_of_run(trained.run_folder, copy, ())


def test_missing_runs_checkpoints_and_reports_are_named(trained, tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        plan_evaluation(Request(tmp_path), CPU)
    with pytest.raises(UserError, match=r"no checkpoint of step 12345 in .*; there are: \d+"):
        plan_evaluation(Request(trained.run_folder, step=12345), CPU)
    with pytest.raises(UserError, match="diptych evaluate context"):
        read_report(tmp_path / "run" / "evaluation" / "context" / "report.json")
    old = tmp_path / "run" / "evaluation" / "context" / "report.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"format": 1}')
    with pytest.raises(UserError, match="not a context report of this version"):
        read_report(old)


# ------------------------------------------------------------------------------------------ parts, ranks, time limit


def test_ranks_share_all_parts_evenly_and_none_twice(session):
    parts = session.plan.parts()
    assert len({part.name for part in parts}) == len(parts)
    for ranks in (1, 3, 4):
        shares = share_out(parts, ranks)
        assert sorted(p.name for share in shares for p in share) == sorted(p.name for p in parts)
        loads = [sum(p.cost for p in share) for share in shares]
        assert max(loads) - min(loads) <= max(p.cost for p in parts)


def test_an_interrupted_evaluation_goes_on_with_its_plan_where_it_was(trained, evaluated, tmp_path):
    request = Request(trained.run_folder, budget_s=600.0, overrides=("evaluation.split=valid",))
    plan, folder, documents = plan_evaluation(request, CPU)
    session = Session(plan, CPU, documents)
    looks = iter([False, False, False, True])
    assert not run_parts(session, plan.parts(), folder, stop=lambda: next(looks))
    left = missing_parts(folder, plan)
    assert len(left) == len(plan.parts()) - 3
    assert plan_evaluation(request, CPU)[0] == plan
    before = part_file(folder, plan, plan.parts()[0]).stat().st_mtime_ns
    finished = run_evaluation(request)
    assert missing_parts(folder, plan) == []
    assert part_file(folder, plan, plan.parts()[0]).stat().st_mtime_ns == before
    assert finished.report.budget is not None


def test_a_time_limit_leaves_out_windows_and_then_lengths(trained, monkeypatch):
    from pretrain.evaluation.context import planning

    def plan(budget_s: float, seconds: float) -> EvaluationPlan:
        monkeypatch.setattr(planning, "time_positions", lambda s: dict.fromkeys(s.plan.multiples, seconds))
        request = Request(trained.run_folder, step=None, budget_s=budget_s, overrides=("evaluation.windows=128",))
        (trained.run_folder / "evaluation" / "context" / PLAN_FILE).unlink(missing_ok=True)
        return plan_evaluation(request, CPU)[0]

    def cost(p: EvaluationPlan) -> int:
        return sum(part.positions for part in p.parts())

    whole = plan(600, 1e-9)
    assert (whole.windows, whole.multiples[-1]) == (128, 8)
    fewer = plan(600, 600 / cost(whole))
    assert (fewer.windows, fewer.multiples[-1]) == (64, 8)
    assert cost(fewer) * 600 / cost(whole) <= 0.8 * 600
    shorter = plan(600, 600 * 8 / cost(whole))
    assert shorter.multiples[-1] < 8
    assert shorter.skipped["8x"] == "left out for the budget of 600 s"
    assert "planned" in shorter.budget
    with pytest.raises(UserError, match="too short even for the training length"):
        plan(1, 1.0)


def test_a_length_that_does_not_fit_is_left_out_and_a_batch_that_does_not_is_halved(session, monkeypatch):
    real, sizes = Session.score, []

    def score(self, rows):
        sizes.append(rows.inputs.shape)
        if rows.inputs.shape[1] == 256 or len(rows.inputs) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, rows)

    part = next(p for p in session.plan.parts() if p.multiple == 2)
    whole = compute_part(session, part)["losses"]
    monkeypatch.setattr(Session, "score", score)
    np.testing.assert_allclose(compute_part(session, part)["losses"], whole, rtol=1e-5, atol=1e-5)
    assert [size[0] for size in sizes] == [12, 6, 3, 3, 3, 3]
    longest = next(p for p in session.plan.parts() if p.multiple == 8)
    assert str(compute_part(session, longest)["skipped"]) == "a row of 256 does not fit into the memory of cpu"
    monkeypatch.setattr(Session, "score", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        compute_part(session, part)


def test_the_report_says_which_length_did_not_fit(trained, evaluated, monkeypatch):
    real = Session.score

    def score(self, rows):
        if rows.inputs.shape[1] > 128:
            raise MemoryError
        return real(self, rows)

    monkeypatch.setattr(Session, "score", score)
    # A folder of its own: the report of all tests stays as it is.
    step = evaluated.report.step
    finished = run_evaluation(Request(trained.run_folder, step=step, overrides=("evaluation.windows=20",)))
    assert finished.folder.name == f"context-step-{step}"
    assert [r.multiple for r in finished.report.results] == [0.5, 1, 2, 4]
    assert finished.report.skipped["8x"] == "a row of 256 does not fit into the memory of cpu"
    assert {r.multiple for r in finished.report.readings} == {2, 4}
    write_context_report(RunFolder.of(trained), finished.folder, finished.report)
    assert "8x: a row of 256 does not fit" in (finished.folder / "report.md").read_text()


def test_two_plans_do_not_share_parts(session):
    other = session.plan.model_copy(update={"seed": session.plan.seed + 1})
    assert other.key != session.plan.key
    same = session.plan.model_copy(update={"budget": "said otherwise"})
    assert same.key == session.plan.key
    assert replace(session.plan.parts()[0]) in same.parts()
