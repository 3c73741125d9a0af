"""The one error that is the user's to mend."""


class BadInput(ValueError):
    """A value the user gave cannot work. One line: the value, the rule, what to do. Commands exit with 2."""
