"""What ends a command without a traceback: a mistake that the user can mend (exit code 2), or Ctrl-C (130)."""

import re


def masked(text: str) -> str:
    """`text` without the passwords of the URIs in it, which may go into logs, run folders and tracking servers."""
    # in a database's URI a password may hold slashes, which elsewhere end what may be a port
    text = re.sub(r"(?i)\b((?!https?:|file:)[a-z][a-z0-9+.-]*://[^/\s:@]*):[^\s@'\"]+@", r"\1:***@", text)
    text = re.sub(r"(://[^/\s:@]*):[^/\s@]+@", r"\1:***@", text)
    return re.sub(r"(?i)\b(\w*(?:password|secret)\w*|(?:\w*_)?token)=[^&\s]+", r"\1=***", text)


def check_not_masked(key: str, uri: str | None) -> None:
    """Refuse a URI as a run's files have it, with which nothing could be reached.

    Raises:
        UserError: it says how to give the whole one.
    """
    if uri is not None and "***" in uri:
        raise UserError(
            f"{key}={uri!r} has its password masked, as all files of a run have it; give the whole URI again, as "
            f"{key}=URI, or in the configuration as ${{oc.env:NAME}}, which takes it from the environment"
        )


class UserError(Exception):
    """A mistake in input, configuration or environment; the message names what, its value and the remedy.

    Messages go to logs that others read, so whatever is put into one, no password stays in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class Diverged(UserError):
    """A loss or a gradient is no number any more; the message says which, and what to set."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after what was under way has been saved; the message says what, and how to go on."""
