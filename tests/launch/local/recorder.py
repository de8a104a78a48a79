"""A display for tests."""

from types import TracebackType
from typing import Self

from pretrain.run.status import Status


class Recorder:
    """A display that remembers."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.steps: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def message(self, text: str, style: str | None = None) -> None:
        self.messages.append(text)

    def update(self, status: Status) -> None:
        self.steps.append(status.step)

    @property
    def text(self) -> str:
        return "\n".join(self.messages)
