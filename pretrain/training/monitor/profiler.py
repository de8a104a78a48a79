"""A torch profiler trace of some steps, a file from each rank: for Perfetto, or TensorBoard's profiler plugin."""

from typing import Any

import torch
from torch.profiler import ProfilerActivity

from pretrain.run.folder import RunFolder
from pretrain.training.monitor.profiled_steps import ProfiledSteps


class StepProfiler:
    """Records some steps of one rank."""

    def __init__(self, run: RunFolder, steps: ProfiledSteps | None, rank: int, device: torch.device) -> None:
        self._folder, self._steps, self._rank = run.profile, steps, rank
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profile: Any = None
        self._mark: Any = None
        self._recorded: list[int] = []

    def begin(self, step: int) -> bool:
        """A step begins. If it is among those wanted, it is recorded from here on; returns whether it is."""
        if self._steps is None or not self._steps.first <= step <= self._steps.last:
            return False
        if self._profile is None:
            self._profile = torch.profiler.profile(activities=self._activities)
            self._profile.start()
        self._leave_mark()
        # The name by which TensorBoard's plugin knows a step.
        self._mark = torch.profiler.record_function(f"ProfilerStep#{step}")
        self._mark.__enter__()
        return True

    def end(self, step: int) -> str | None:
        """A step has ended. After the last one wanted the trace is written; returns what to tell of it."""
        if self._profile is None:
            return None
        self._leave_mark()
        self._recorded.append(step)
        assert self._steps is not None
        return self._write() if step >= self._steps.last else None

    def _write(self) -> str | None:
        """Write what is recorded, if anything is: a run may end before the last step. Returns what to tell of it."""
        if self._profile is None:
            return None
        self._leave_mark()
        self._profile.stop()
        profile, self._profile, self._steps = self._profile, None, None
        if not self._recorded:
            return None
        first, last = self._recorded[0], self._recorded[-1]
        path = self._folder / f"rank-{self._rank:04d}.steps-{first}-{last}.pt.trace.json"
        unfinished = path.with_name(f".{path.name}.tmp")
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            profile.export_chrome_trace(str(unfinished))
            unfinished.replace(path)
        except (OSError, RuntimeError) as error:
            unfinished.unlink(missing_ok=True)
            return f"the profile of steps {first} to {last} could not be written: {error}"
        files = self._folder / path.name.replace(f"{self._rank:04d}", "*", 1)
        return f"profile of steps {first} to {last}: {files} (open one at https://ui.perfetto.dev)"

    def close(self, step: int) -> str | None:
        """The run ends after `step`; returns what to tell of a trace that is unfinished, or of one that never began."""
        if self._steps is not None and not self._recorded and step < self._steps.first:
            return f"profile: the run ends after step {step}, before step {self._steps.first}; there is no trace"
        return self._write()

    def _leave_mark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
