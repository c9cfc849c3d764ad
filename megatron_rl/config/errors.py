"""The errors a user can cause and mend."""


class SettingsError(ValueError):
    """A setting, file or combination that cannot work. The message says what, where and what to do."""
