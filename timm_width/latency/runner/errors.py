"""What users are told."""

__all__ = ['RunnerError']


class RunnerError(ValueError):
    """Something given cannot be timed: one line that says what is wrong and what would be right."""
