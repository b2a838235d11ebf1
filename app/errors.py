"""The one exception that means: the user can fix this. Entry points print it without a traceback and exit 2."""


class UserError(Exception):
    """A mistake in input, configuration or environment; the message names what, its value and the remedy."""
