"""The one error that is the user's to mend."""


class BadInput(ValueError):
    """A value the user gave cannot work. One line: the value, the rule, what to do. Commands exit with 2."""

    def __init__(self, message: str):
        """What cannot be printed, line breaks and a terminal's commands out of a stranger's file, is spelt out."""
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))
