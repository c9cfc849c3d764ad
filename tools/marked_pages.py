"""Pages of which a part is made by a tool: what stands between `<!-- name: ... -->` and `<!-- end of name -->`."""

import re
from pathlib import Path


def with_part(page: Path, name: str, made: str, text: str | None = None) -> str:
    """The page, or its `text` so far, with the part of this name made anew."""
    found = page.read_text(encoding="utf-8") if text is None else text
    pattern = re.compile(rf"(<!-- {name}: [^\n]* -->\n).*?(<!-- end of {name} -->)", re.S)
    assert len(pattern.findall(found)) == 1, f"{page} has no place for {name}"
    return pattern.sub(lambda match: f"{match[1]}\n{made}\n{match[2]}", found)
