"""Text for a terminal: colours, and nothing in it that could command the terminal."""

import math
import re

STYLES = {"dim": "2", "bold": "1", "red": "31", "green": "32", "yellow": "33", "cyan": "36", "inverse": "7"}
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def paint(text: str, *styles: str, on: bool = True) -> str:
    codes = ";".join(STYLES[style] for style in styles)
    return f"\x1b[{codes}m{text}\x1b[0m" if on and text and codes else text


def plain(text: str) -> str:
    """Control characters in it are spelled: a model, or a file, can write escape sequences."""
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def token(text: str) -> str:
    """A token where every character can be seen, on one line."""
    return plain(text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·"))


def percent(logprob: float) -> str:
    share = 100 * math.exp(logprob)
    if share < 0.1 or 99.9 < share < 100:
        return "<0.1 %" if share < 0.1 else ">99.9 %"
    return f"{share:.0f} %" if 10 <= share <= 99 or share == 100 else f"{share:.1f} %"


def aligned(lines: list[list[str]]) -> str:
    """Columns of equal width, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
