"""The ways in which a command ends early without a traceback."""

USER_ERROR, RUN_ERROR, INTERRUPTED = 2, 1, 130  # exit codes


class ConfigError(ValueError):
    """A mistake of the user's: one sentence naming the field, its value and the rule it breaks."""


class RunError(RuntimeError):
    """A run that cannot go on, through no mistake in its config: one sentence."""
