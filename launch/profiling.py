"""`--profile`: whether a run comes to these steps, and how its ranks hear of them."""

from rich.console import Console

from launch.terminal.console import say
from pretrain.config.run import RunConfig
from pretrain.data.manifest import Manifest
from pretrain.run.status import read_status
from pretrain.training.monitor.profiled_steps import FOLDER, VARIABLE, ProfiledSteps, check_steps


def profiling(steps: ProfiledSteps | None, config: RunConfig, manifest: Manifest, console: Console) -> dict[str, str]:
    """Environment variables by which the ranks record these steps; none if there is nothing to record.

    Raises:
        UserError: the run does not come to these steps.
    """
    if steps is None:
        return {}
    from pretrain.checkpoint.folder import newest_state

    state = newest_state(config.run_folder / "checkpoints")
    if not check_steps(steps, config, manifest.splits["train"], state.step if state else 0):
        say(console, f"steps {steps} are recorded in {config.run_folder / FOLDER} already")
        return {}
    return {VARIABLE: str(steps)}


def is_complete(config: RunConfig) -> bool:
    """Whether the run has seen all its tokens, and its last checkpoint is still there."""
    status = read_status(config.run_folder)
    if status is None or status.state != "done" or status.checkpoint is None:
        return False
    here = (config.run_folder / "checkpoints" / status.checkpoint).is_dir()
    return here and status.tokens >= config.training.tokens
