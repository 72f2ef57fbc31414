"""Untrusted text made visible: no character may move, hide or reverse what stands around it."""

from __future__ import annotations

import unicodedata

# Characters of category Cf that belong to ordinary writing: joiners of Indic and Arabic scripts and
# of emoji, and the soft hyphen. They cannot reorder a line.
_HARMLESS = {"\u00ad", "\u200c", "\u200d"}


def visible(text: str) -> str:
    """`text` with control, bidirectional and other invisible characters written as [U+XXXX].

    Also lone surrogates, private-use and unassigned code points, and line and paragraph separators.
    Line feeds and tabs stay. Escaping for HTML is the template's duty, not this function's.
    """
    return "".join(_visible(char) for char in text)


def _visible(char: str) -> str:
    if char in "\n\t" or char in _HARMLESS:
        return char
    category = unicodedata.category(char)
    if category[0] == "C" or category in ("Zl", "Zp"):
        return f"[U+{ord(char):04X}]"
    return char
