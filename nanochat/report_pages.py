"""The pages of a report: what a section can hold, and how it is written as Markdown and as HTML.

A number that was measured is a Number, which knows where it stands in the results. The HTML page is one file: its style
is in it, there are no scripts, and nothing is fetched.
"""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from nanochat.chat import SHOWN

STYLE = Path(__file__).parent / "ui" / "report.css"
LONG = 32  # characters of a cell that is broken into lines
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Number:
    """value as the results have it, text as a person reads it; source: file and place, base_eval › core › metric."""

    value: float
    text: str
    source: str

    def __str__(self) -> str:
        return self.text


class Quoted(str):
    """What a model or a task wrote: no mark-up, whatever is in it."""


Cell = str | Number | None
Words = tuple[Cell, ...]  # a sentence with numbers in it


@dataclass
class Paragraph:
    words: Words
    quiet: bool = False


@dataclass
class Cards:
    """The few numbers that matter: (label, number, a note or nothing)."""

    cards: list[tuple[str, Number, str]]


@dataclass
class Table:
    header: list[str]
    rows: list[list[Cell]]


@dataclass
class Bar:
    """colour: a class of the style sheet. share: of the whole width, which may lie below 0."""

    name: str
    number: Number
    share: float
    colour: str


@dataclass
class Bars:
    """Rows of bars: (label, bars, marks); a mark is (what it says, share of the width) and stands across the bars."""

    rows: list[tuple[str, list[Bar], list[tuple[str, float]]]]
    legend: list[tuple[str, str]] = field(default_factory=list)  # (colour, name)
    mark_legend: str = ""


@dataclass
class Chart:
    """svg of report_charts; in Markdown only its title and its last numbers."""

    title: str
    svg: str
    legend: list[tuple[str, Words]] = field(default_factory=list)  # (colour, name and last number)


@dataclass
class Verbatim:
    """What a model or a shell wrote, as it stands."""

    text: str
    label: str = ""


@dataclass
class Talk:
    """Messages of chat: content is text, or parts of which some are a tool's."""

    messages: list[dict]


@dataclass
class Compared:
    """The same asked of several models. columns: (model, colour). rows: (asked, what each of them said, as text or in
    parts)."""

    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[str | list[dict]]]]


@dataclass
class Side:
    """Blocks side by side where there is room."""

    blocks: list


@dataclass
class Fold:
    title: str
    blocks: list


@dataclass
class Section:
    title: str
    blocks: list
    short: str = ""  # in the list of sections


@dataclass
class Page:
    title: str
    summary: Words
    sections: list[Section]


# --- Markdown


def markdown(page: Page) -> str:
    parts = [f"# {page.title}", said(page.summary)]
    for section in page.sections:
        parts += [f"## {section.title}", *map(as_markdown, section.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def said(words: Words) -> str:
    return "".join("-" if word is None else str(word) for word in words)


def as_markdown(block) -> str:
    match block:
        case Paragraph(words):
            return said(words)
        case Cards(cards):
            return "\n".join(f"- {label}: {number}{f' ({note})' if note else ''}" for label, number, note in cards)
        case Table(header, rows):
            return markdown_table(header, rows)
        case Bars(rows):
            names = list(dict.fromkeys(bar.name for _, bars, _ in rows for bar in bars))
            lines = []
            for label, bars, marks in rows:
                numbers = {bar.name: bar.number for bar in bars}
                lines.append([label, *(numbers.get(name) for name in names), ", ".join(text for text, _ in marks)])
            marked = any(line[-1] for line in lines)
            header = ["", *names] + ([block.mark_legend or "marks"] if marked else [])
            return markdown_table(header, lines if marked else [line[:-1] for line in lines])
        case Chart(title, _, legend):
            return f"*{title}*: " + "; ".join(said(words) for _, words in legend)
        case Verbatim(text, label):
            return (f"{label}:\n\n" if label else "") + indented(text)
        case Talk(messages):
            return "\n\n".join(
                f"**{message['role']}**\n\n{indented(plain(message.get('content') or ''))}" for message in messages
            )
        case Compared(columns, rows):
            lines = [[Quoted(asked), *(Quoted(plain(answer)) for answer in answers)] for asked, answers in rows]
            return markdown_table(["", *(name for name, _ in columns)], lines)
        case Side(blocks):
            return "\n\n".join(map(as_markdown, blocks))
        case Fold(title, blocks):
            return "\n\n".join([f"### {title}", *map(as_markdown, blocks)])
    raise TypeError(f"a report cannot hold a {type(block).__name__}")


def markdown_table(header: list[str], rows: list[list[Cell]]) -> str:
    def line(cells):
        return "| " + " | ".join(markdown_cell(cell).replace("|", "\\|") for cell in cells) + " |"

    numeric = [any(isinstance(row[i], Number) for row in rows) for i in range(len(header))]
    ruler = "|" + "|".join(" ---: " if number else " --- " for number in numeric) + "|"
    return "\n".join([line(header), ruler, *map(line, rows)])


def markdown_cell(value: Cell) -> str:
    text = one_line("-" if value is None else str(value))
    if not isinstance(value, Quoted) or not text:
        return text
    fence = "`"
    while fence in text:
        fence += "`"
    return f"{fence} {text} {fence}"


def one_line(text: str) -> str:
    return " ".join(text.split())


def indented(text: str) -> str:
    """An indented block: nothing that a model writes can end it."""
    return "\n".join("    " + line for line in text.splitlines() or [""])


def plain(content: str | list[dict]) -> str:
    """A message as chat.readable() shows it, even where a file lacks the type of a part."""
    if isinstance(content, str):
        return content
    return "".join(str(part["text"]).join(SHOWN.get(part.get("type"), ("", ""))) for part in content if "text" in part)


# --- HTML


def html(page: Page) -> str:
    anchors = [f"s{i}" for i in range(len(page.sections))]
    links = "".join(
        f'<a href="#{anchor}">{escape(section.short or section.title)}</a>'
        for anchor, section in zip(anchors, page.sections, strict=True)
    )
    sections = "".join(
        f'<section id="{anchor}"><h2>{escape(section.title)}</h2>{"".join(map(as_html, section.blocks))}</section>\n'
        for anchor, section in zip(anchors, page.sections, strict=True)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(page.title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(page.title)}</h1><p class="summary">{told(page.summary)}</p><nav>{links}</nav></header>\n'
        f"<main>\n{sections}</main>\n</body>\n</html>\n"
    )


def cell(value: Cell) -> str:
    if value is None:
        return '<span class="none">–</span>'
    if isinstance(value, Number):
        return f'<data value="{escape(str(value.value))}" title="{escape(value.source)}">{escape(value.text)}</data>'
    return escape(value)


def told(words: Words) -> str:
    return "".join(map(cell, words))


def as_html(block) -> str:
    match block:
        case Paragraph(words, quiet):
            return f"<p{' class=quiet' if quiet else ''}>{told(words)}</p>"
        case Cards(cards):
            shown = (
                f"<div><dt>{escape(label)}</dt><dd>{cell(number)}</dd>"
                + (f'<dd class="note">{escape(note)}</dd>' if note else "")
                + "</div>"
                for label, number, note in cards
            )
            return f'<dl class="cards">{"".join(shown)}</dl>'
        case Table(header, rows):
            head = "".join(f"<th>{escape(title)}</th>" for title in header)
            numeric = [any(isinstance(row[i], Number) for row in rows) for i in range(len(header))]
            body = "".join(f"<tr>{''.join(map(table_cell, row, numeric, header))}</tr>" for row in rows)
            quoted = any(isinstance(value, Quoted) for row in rows for value in row)
            kind = "wide stack" if quoted else "wide"
            return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        case Bars():
            return bars_as_html(block)
        case Chart(title, svg, legend):
            keys = "".join(f'<span class="key {colour}">{told(words)}</span>' for colour, words in legend)
            caption = f'<figcaption><b>{escape(title)}</b><span class="keys">{keys}</span></figcaption>'
            return f"<figure>{caption}{svg}</figure>"
        case Verbatim(text, label):
            return (f"<h4>{escape(label)}</h4>" if label else "") + f"<pre>{escape(text)}</pre>"
        case Talk(messages):
            turns = "".join(
                f'<div class="turn {escape(m["role"])}">{spoken(m.get("content") or "")}</div>' for m in messages
            )
            return f'<div class="talk">{turns}</div>'
        case Compared():
            return compared_as_html(block)
        case Side(blocks):
            return f'<div class="side">{"".join(map(as_html, blocks))}</div>'
        case Fold(title, blocks):
            return f"<details><summary>{escape(title)}</summary>{''.join(map(as_html, blocks))}</details>"
    raise TypeError(f"a report cannot hold a {type(block).__name__}")


def table_cell(value: Cell, numeric: bool, title: str) -> str:
    long = isinstance(value, str) and len(value) > LONG
    kind = "number" if numeric and not isinstance(value, str) else "long" if long else "word"
    quoted = f' quoted" data-title="{escape(title)}' if isinstance(value, Quoted) else ""
    return f'<td class="{kind}{quoted}">{cell(value)}</td>'


def compared_as_html(block: Compared) -> str:
    count = len(block.columns) + 1
    head = "".join(
        f'<div class="head"><span class="key {colour}">{escape(name)}</span></div>' for name, colour in block.columns
    )
    rows = ""
    for asked, answers in block.rows:
        said = (
            f'<div class="said {colour}" data-title="{escape(name)}">{spoken(answer)}</div>'
            for (name, colour), answer in zip(block.columns, answers, strict=True)
        )
        *before, last = (escape(line) for line in asked.splitlines())
        quiet = "".join(f'<span class="quiet">{line}</span><br>' for line in before)
        rows += f'<div class="asked">{quiet}{last}</div>{"".join(said)}'
    return f'<div class="compared" style="--columns:{count}"><div class="head"></div>{head}{rows}</div>'


def spoken(content: str | list[dict]) -> str:
    """A message, calls of a tool set off from the text."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    shown = "".join(
        escape(str(part.get("text", "")))
        if part.get("type") == "text"
        else f'<code class="{escape(str(part.get("type")))}">{escape(str(part.get("text", "")))}</code>'
        for part in parts
        if isinstance(part, dict)
    )
    return shown or '<span class="none">(nothing)</span>'


def bars_as_html(block: Bars) -> str:
    def drawn(bar: Bar, marks) -> str:
        width = max(0.0, min(1.0, bar.share))
        lines = "".join(
            f'<b style="left:{100 * at:.2f}%" title="{escape(text)}"></b>' for text, at in marks if 0 < at < 1
        )
        fill = f'<i class="{bar.colour}" style="width:{100 * width:.2f}%"></i>'
        track = f'<span class="track">{fill}{lines}</span>'
        return f'<div class="bar" title="{escape(bar.name)}">{track}{cell(bar.number)}</div>'

    legend = "".join(f'<span class="key {colour}">{escape(name)}</span>' for colour, name in block.legend)
    if block.mark_legend:
        legend += f'<span class="key mark">{escape(block.mark_legend)}</span>'
    rows = "".join(
        f'<div class="label">{escape(label)}</div><div>{"".join(drawn(bar, marks) for bar in bars)}</div>'
        for label, bars, marks in block.rows
    )
    return f'<div class="keys">{legend}</div><div class="bars">{rows}</div>'
