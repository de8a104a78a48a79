"""`--profile`: whether a run comes to these steps, and how its ranks hear of them."""

from rich.console import Console

from launch.terminal.console import say
from pretrain.config.run import RunConfig
from pretrain.data.manifest import Manifest
from pretrain.run.folder import RunFolder
from pretrain.training.monitor.profiled_steps import VARIABLE, ProfiledSteps, check_steps


def profiling(steps: ProfiledSteps | None, config: RunConfig, manifest: Manifest, console: Console) -> dict[str, str]:
    """Environment variables by which the ranks record these steps; none if there is nothing to record.

    Raises:
        UserError: the run does not come to these steps.
    """
    if steps is None:
        return {}
    run = RunFolder.of(config)
    state = run.newest_state()
    if not check_steps(steps, config, manifest.splits["train"], state.step if state else 0):
        say(console, f"steps {steps} are recorded in {run.profile} already")
        return {}
    return {VARIABLE: str(steps)}
