"""Values of options: read, or answered with an example."""

import pytest

from launch.commands.arguments import parse_count, parse_duration, parse_flops, parse_lengths, parse_seeds
from pretrain.errors import UserError


def test_lengths_and_times_are_read_or_answered():
    assert parse_lengths("0.5x, 1x,2,16X") == [0.5, 1, 2, 16]
    assert [parse_duration(t) for t in ("90s", "10m", "1h", "45")] == [90, 600, 3600, 45]
    for wrong in ("", "x", "1x,two", "-1x"):
        with pytest.raises(UserError, match="0.5x,1x,2x"):
            parse_lengths(wrong)
    for wrong in ("", "m", "ten", "-5s", "0"):
        with pytest.raises(UserError, match="90s, 10m or 1h"):
            parse_duration(wrong)


def test_numbers_of_tokens_flops_and_seeds_are_read_or_answered():
    assert [parse_count(t) for t in ("2M", "500k", "300_000", "1g")] == [2_000_000, 500_000, 300_000, 1_000_000_000]
    assert parse_flops("2e15") == 2e15
    assert parse_seeds("3,1,3") == [3, 1]
    for wrong in ("", "M", "many", "0", "-1k"):
        with pytest.raises(UserError, match="--recalibrate .* 500k, 2M or 300000"):
            parse_count(wrong)
    for wrong in ("much", "-1", "inf", "nan"):
        with pytest.raises(UserError, match=f"--budget {wrong}: .* 2e15"):
            parse_flops(wrong)
    with pytest.raises(UserError, match="--seeds 1,b"):
        parse_seeds("1,b")
