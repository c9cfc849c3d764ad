"""The errors a user can cause and mend. The command line prints their message and no traceback."""


class UserError(Exception):
    """Something a user can mend. The message says what is wrong, where, and what to do."""


class SettingsError(UserError, ValueError):
    """A setting, file or combination that cannot work."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, read or used."""


class DataError(UserError, ValueError):
    """Prompts that cannot be read, or cannot be used as they are."""


class BankError(UserError, RuntimeError):
    """A bank of rollouts that cannot be opened, written or read."""
