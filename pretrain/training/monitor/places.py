"""Where the main loop of a rank may be: the words for it, what its time is charged to, how long it may take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A part of the training loop."""

    doing: str
    """Words for heartbeats and logs."""
    section: str | None = None
    """Section of the step clock, one of `SECTIONS`, that its time is charged to."""
    patient: bool = False
    """Whether the watchdog allows it long silence: it compiles, loads, or writes much."""
    state: str | None = None
    """State that status.json shows meanwhile; None leaves it as it is."""


STARTING = Place("starting", patient=True)
READING = Place("reading rows", "data")
AGREEING = Place("agreeing on the step", "communication")
COMPUTING = Place("computing")
VALIDATING = Place("validating", "validation", patient=True, state="validating")
SAVING = Place("saving", "saving", patient=True, state="saving")
GOING_BACK = Place("going back", patient=True)
