"""Build hook: turn the pages' TeX into MathML, which browsers show without scripts or a network."""

from __future__ import annotations

import html
import re
from typing import Any

# What the Markdown extension `pymdownx.arithmatex` leaves of $…$ and $$…$$.
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*(?:\\\(|\\\[)'
    r"(?P<tex>.*?)(?:\\\)|\\\])\s*</(?P=tag)>",
    re.DOTALL,
)


def on_page_content(content: str, **_: Any) -> str:
    """Replace every formula of a page; called by mkdocs."""
    # Part of the `docs` extra: pytest, which looks for examples here, runs without it.
    from latex2mathml.converter import convert

    def replace(match: re.Match[str]) -> str:
        display = "block" if match["tag"] == "div" else "inline"
        # The converter knows `aligned` by its older name.
        tex = html.unescape(match["tex"]).strip().replace("{aligned}", "{split}")
        return f"<{match['tag']}>{convert(tex, display=display)}</{match['tag']}>"

    return FORMULA.sub(replace, content)
