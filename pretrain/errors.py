"""How Diptych ends: the exit codes, and the one exception that means "your input is wrong"."""

EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_SUPERSEDED, EXIT_RESUME_ME = 0, 1, 2, 3, 75
"""75 is EX_TEMPFAIL of sysexits.h: the same command again resumes. 3 is what a rank tells its launcher when a newer
attempt has taken the run over: this one must not be started again by itself, or it would take the run back, and so on
for ever. To the user, that is 1."""


class UserError(Exception):
    """Something the user gave is wrong; the message says what was given, what was expected and what to do next."""
