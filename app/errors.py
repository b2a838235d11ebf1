"""What ends a command without a traceback: a mistake that the user can mend (exit code 2), or Ctrl-C (130)."""


class UserError(Exception):
    """A mistake in input, configuration or environment; the message names what, its value and the remedy."""


class Diverged(UserError):
    """A loss or a gradient is no number any more; the message says which, and what to set."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after what was under way has been saved; the message says what, and how to go on."""
