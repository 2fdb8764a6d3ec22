"""The one error of this package: what is wrong with a file or an option, in one line."""


class ConvertError(Exception):
    def __init__(self, message: str):
        # Names come from files: no control characters, and never more than a line's worth.
        clean = "".join(c if c.isprintable() else "?" for c in message)
        super().__init__(clean if len(clean) <= 1000 else clean[:1000] + "…")


def short(value: object, limit: int = 100) -> str:
    """A value from a file as it may appear in a message."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[:limit] + "…"
