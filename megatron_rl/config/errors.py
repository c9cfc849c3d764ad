"""The errors a user can cause and mend. The command line prints their message and no traceback."""


class UserError(Exception):
    """Something a user can mend. The message says what is wrong, where, and what to do."""


class SettingsError(UserError, ValueError):
    """A setting, file or combination that cannot work."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, read or used."""
