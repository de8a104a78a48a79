"""A small campaign; `python -m tests.campaign --kills 100` is the large one."""

import pytest

from tests.campaign.__main__ import KINDS, run_campaign


@pytest.mark.slow
def test_runs_that_are_killed_lose_and_leave_nothing(tmp_path):
    campaign = run_campaign(len(KINDS), 2026, tmp_path / "a campaign")
    assert campaign.problems == []
    assert campaign.kills["save"] >= len(KINDS) // 3
