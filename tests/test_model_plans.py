"""The sizes in configs/model/ and the plans in their comments."""

import pytest

from benchmarks.model_plans import sizes, with_plan


def test_every_size_of_the_ladder_has_a_plan():
    assert {path.stem for path in sizes()} == {"1m", "4m", "15m", "50m", "133m", "400m", "1b", "3b", "7b", "15b"}


@pytest.mark.parametrize("path", sizes(), ids=lambda path: path.stem)
def test_the_plan_in_a_size_is_what_its_command_prints(path):
    text = path.read_text("utf-8")
    assert with_plan(text) == text, "run python -m benchmarks.model_plans"
