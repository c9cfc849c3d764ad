"""Write the list of rewards in docs/rewards.md from their declarations: `python tools/reward_docs.py`.

What stands between the page's markers is made here, the rest is written by hand. A test compares.
"""

from pathlib import Path

from megatron_rl.rewards.registry import Entry, catalogue
from tools.marked_pages import with_part

PAGE = Path(__file__).parent.parent / "docs" / "rewards.md"


def text() -> str:
    """The page as it should be."""
    return with_part(PAGE, "rewards", "\n".join(map(_section, catalogue())))


def _section(entry: Entry) -> str:
    rows = [
        f"| `{option.name}` | {_cell(option.allowed)} | {_code(option.default)} | {_cell(option.text)} |"
        for option in entry.options
    ]
    lines = [f"### {entry.name}", "", entry.text, "", "```yaml", f"- {entry.example}", "```", ""]
    return "\n".join([*lines, "| option | allowed | default | meaning |", "| --- | --- | --- | --- |", *rows, ""])


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


def _code(words: str) -> str:
    quote = "``" if "`" in words else "`"
    return f"{quote}{words.replace('|', chr(92) + '|')}{quote}"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
