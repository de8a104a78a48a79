"""The learning rate as a pure function of tokens seen."""

from pretrain.config.training import ScheduleConfig


def learning_rate(tokens_seen: int, total_tokens: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of the step that ends at `tokens_seen`: linear warm-up, plateau at `peak`, linear decay to its end."""
    warmup_tokens = schedule.warmup * total_tokens
    decay_tokens = schedule.decay * total_tokens
    if tokens_seen < warmup_tokens:
        return peak * tokens_seen / warmup_tokens
    left = max(total_tokens - tokens_seen, 0)
    if left < decay_tokens:
        return peak * (schedule.final + (1 - schedule.final) * left / decay_tokens)
    return peak
