"""What people look at after a run: tables of volumes, pictures, the HTML report."""


def plain(text: object) -> str:
    """A text that can be shown: no control characters, and bytes of a name that are no UTF-8 as a sign for them."""
    known = str(text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in known)
