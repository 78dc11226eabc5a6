// Markdown to elements: what models write of it, block by block, in time proportional to the text. No string ever becomes
// markup: there are elements of a fixed set, text inside them, and links to http and https.
// Unlike CommonMark, * and _ within a word stay as they are (2*3*4), and a line break is one.

import { copyButton, el } from "./dom.js";

const DEEPEST = 8; // quotes in lists in quotes
const MARK = /[\ufdd0-\ufdef]/g; // characters that no text has: they stand for the calls of tools
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)(.*)$/;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const RULE = /^ {0,3}(?:(?:- *){3,}|(?:\* *){3,}|(?:_ *){3,})$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;

/** The parts of an answer as elements; a tool's call and its result become one box in the line. */
export function render(parts) {
  const tools = [];
  let text = "";
  for (const part of parts) {
    const last = tools.at(-1);
    if (part.type === "text") text += part.text.replace(MARK, "\ufffd").replace(/\r\n?/g, "\n");
    else if (part.type === "python_output" && last && last.result === undefined && text.endsWith("\ufdd1")) last.result = part.text;
    else {
      tools.push(part.type === "python" ? { call: part.text } : { result: part.text });
      text += `\ufdd0${tools.length - 1}\ufdd1`;
    }
  }
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(text.split("\n"), { tools, depth: 0 }));
  return fragment;
}

function toolBox({ call, result }) {
  return el(
    "span",
    { class: "tool", role: "group", "aria-label": "Calculator" },
    call === undefined ? null : el("code", { text: call }),
    result === undefined ? null : el("span", { class: "result", text: result }),
  );
}

function blocks(lines, context) {
  const made = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    const deeper = context.depth < DEEPEST ? { ...context, depth: context.depth + 1 } : null;
    let found;
    if (!line.trim()) i += 1;
    else if ((found = line.match(FENCE))) {
      const code = [];
      const close = new RegExp(`^ {0,3}${found[1][0]}{${found[1].length},}\\s*$`);
      for (i += 1; i < lines.length && !close.test(lines[i]); i++) code.push(lines[i]);
      i += 1;
      made.push(codeBlock(code.join("\n"), found[2].trim(), context));
    } else if ((found = line.match(HEADING))) {
      // Under the page's own headings.
      made.push(el(`h${Math.min(6, found[1].length + 2)}`, { dir: "auto" }, ...inline(found[2].trimEnd().replace(/ #+$/, ""), context)));
      i += 1;
    } else if (RULE.test(line)) {
      made.push(el("hr"));
      i += 1;
    } else if (deeper && /^ {0,3}>/.test(line)) {
      const quoted = [];
      for (; i < lines.length && /^ {0,3}>/.test(lines[i]); i++) quoted.push(lines[i].replace(/^ {0,3}> ?/, ""));
      made.push(el("blockquote", { dir: "auto" }, ...blocks(quoted, deeper)));
    } else if (deeper && ITEM.test(line)) {
      const [list, next] = listBlock(lines, i, deeper);
      made.push(list);
      i = next;
    } else if (line.includes("|") && (found = alignments(lines[i + 1]))) {
      const rows = [cells(line)];
      for (i += 2; i < lines.length && lines[i].includes("|"); i++) rows.push(cells(lines[i]));
      made.push(tableBlock(rows, found, context));
    } else {
      const text = [line];
      for (i += 1; i < lines.length && lines[i].trim() && !beginsBlock(lines[i], deeper); i++) text.push(lines[i]);
      made.push(el("p", { dir: "auto" }, ...inline(text.join("\n"), context)));
    }
  }
  return made;
}

function beginsBlock(line, deeper) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || (deeper && (/^ {0,3}>/.test(line) || ITEM.test(line)));
}

/** The list that begins at line i, and the line after it. What is indented under an item belongs to it. */
function listBlock(lines, i, context) {
  const [, indent, mark] = lines[i].match(ITEM);
  const ordered = /\d/.test(mark);
  const list = el(ordered ? "ol" : "ul", ordered ? { start: String(parseInt(mark, 10)) } : {});
  let ahead = i;
  const notBlank = (from) => { // the first line from there on that is not blank
    for (ahead = Math.max(ahead, from); ahead < lines.length && !lines[ahead].trim(); ) ahead += 1;
    return ahead;
  };
  while (i < lines.length) {
    const found = lines[i].match(ITEM);
    if (!found || found[1].length > indent.length + 3 || /\d/.test(found[2]) !== ordered) break;
    const own = [found[3]];
    const least = found[1].length + 2, width = found[1].length + found[2].length + 1;
    for (i += 1; i < lines.length; i++) {
      const next = notBlank(i);
      if (next === lines.length || lines[next].search(/\S/) < least) break;
      own.push(lines[i].slice(Math.min(width, Math.max(0, lines[i].search(/\S/)))));
    }
    const content = blocks(own, context);
    const tight = content.length && content[0].tagName === "P";
    list.append(el("li", { dir: "auto" }, ...(tight ? [...content[0].childNodes, ...content.slice(1)] : content)));
    if (i < lines.length && !lines[i].trim() && ITEM.test(lines[notBlank(i)] ?? "")) i = ahead;
  }
  return [list, i];
}

function codeBlock(code, language, context) {
  const text = code.replace(/\ufdd0(\d+)\ufdd1/g, (_, n) => context.tools[n].call ?? context.tools[n].result);
  const head = el("div", { class: "head" }, el("span", { text: language }), copyButton(() => text));
  return el("div", { class: "code" }, head, el("pre", { tabindex: "0" }, el("code", { text })));
}

/** The texts of a row: | within ` or after \\ is none between cells. */
function cells(line) {
  const found = [""];
  let code = false;
  for (let i = 0, text = line.trim().replace(/^\|/, "").replace(/\|$/, ""); i < text.length; i++) {
    if (text[i] === "\\" && text[i + 1] === "|") found[found.length - 1] += text[++i];
    else if (text[i] === "|" && !code) found.push("");
    else {
      code = code !== (text[i] === "`");
      found[found.length - 1] += text[i];
    }
  }
  return found.map((cell) => cell.trim());
}

/** How the columns are aligned, if this is the line under a table's head. */
function alignments(line) {
  if (!line?.includes("-")) return null;
  const found = cells(line);
  if (!found.every((cell) => /^:?-+:?$/.test(cell))) return null;
  return found.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
}

function tableBlock([head, ...rows], align, context) {
  const row = (tag, texts) => el("tr", {}, ...texts.map((text, n) => el(tag, { class: align[n] || undefined, dir: "auto" }, ...inline(text, context))));
  const body = el("tbody", {}, ...rows.map((texts) => row("td", texts)));
  return el("div", { class: "table", tabindex: "0" }, el("table", {}, el("thead", {}, row("th", head)), body));
}

// ---- within a line

const WORD = /[[\p{L}\p{N}]--[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Hangul}\p{sc=Thai}]]/v; // these have no spaces
const PAIRS = [["***", "strong", "em"], ["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const LINK = /!?\[([^[\]\n\ufdd0]{1,500})\]\((https?:\/\/[^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)(?: +"[^"\n]*")?\)/y;
const ADDRESS = /https?:\/\/[^\s<>"`\ufdd0\ufdd1]+/y;

function inline(text, context, depth = 0) {
  const made = [];
  const without = new Set(); // pairs that nothing closes from here on
  let plain = "";
  let i = 0;
  const put = (node, next) => {
    if (plain) made.push(document.createTextNode(plain));
    plain = "";
    made.push(node);
    i = next;
  };
  const take = (pattern) => {
    pattern.lastIndex = i;
    return pattern.exec(text);
  };
  while (i < text.length) {
    const c = text[i];
    let found;
    if (c === "\n") put(el("br"), i + 1);
    else if (c === "\ufdd0" && (found = take(/\ufdd0(\d+)\ufdd1/y))) put(toolBox(context.tools[found[1]]), i + found[0].length);
    else if (c === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
    } else if (c === "`") {
      const ticks = take(/`+/y)[0];
      const end = without.has(ticks) ? -1 : closing(text, ticks, i + ticks.length);
      if (end < 0) {
        without.add(ticks);
        plain += ticks;
        i += ticks.length;
      } else put(el("code", { text: codeText(text.slice(i + ticks.length, end), context) }), end + ticks.length);
    } else if ((c === "[" || (c === "!" && text[i + 1] === "[")) && (found = take(LINK))) put(link(found[2], found[1]), i + found[0].length);
    else if (c === "h" && !WORD.test(text[i - 1] ?? " ") && (found = take(ADDRESS))) {
      let address = found[0].replace(/[.,;:!?'*\]}]+$/, "");
      if (address.endsWith(")") && !address.includes("(")) address = address.replace(/\)+$/, "");
      put(link(address, address), i + address.length);
    } else {
      const pair = depth < DEEPEST && PAIRS.find(([mark]) => text.startsWith(mark, i));
      const end = pair && opens(text, i, pair[0]) && !without.has(pair[0]) ? closer(text, i, pair[0]) : -1;
      if (end > 0) {
        const inner = inline(text.slice(i + pair[0].length, end), context, depth + 1);
        put(el(pair[1], {}, ...(pair[2] ? [el(pair[2], {}, ...inner)] : inner)), end + pair[0].length);
      }
      else {
        if (pair && opens(text, i, pair[0])) without.add(pair[0]);
        const mark = pair ? pair[0] : c;
        plain += mark;
        i += mark.length;
      }
    }
  }
  if (plain) made.push(document.createTextNode(plain));
  return made;
}

function codeText(text, context) {
  return text.replace(/\ufdd0(\d+)\ufdd1/g, (_, n) => context.tools[n].call ?? context.tools[n].result).trim() || text;
}

/** Where a run of exactly these ticks stands again. */
function closing(text, ticks, from) {
  for (let end = text.indexOf(ticks, from); end >= 0; end = text.indexOf(ticks, end)) {
    let after = end;
    while (text[after] === "`") after += 1;
    if (after - end === ticks.length) return end;
    end = after;
  }
  return -1;
}

function opens(text, i, mark) {
  return !WORD.test(text[i - 1] ?? " ") && /\S/.test(text[i + mark.length] ?? " ");
}

function closer(text, i, mark) {
  for (let end = text.indexOf(mark, i + mark.length + 1); end >= 0; end = text.indexOf(mark, end + 1)) {
    const long = mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark); // half of a ** is no *
    if (!long && /\S/.test(text[end - 1]) && !WORD.test(text[end + mark.length] ?? " ")) return end;
  }
  return -1;
}

function link(address, text) {
  const url = URL.canParse(address) ? new URL(address) : null;
  if (!url || !["http:", "https:"].includes(url.protocol)) return document.createTextNode(text);
  // A text that is itself an address, but another one, would lie about where it leads.
  const honest = /^\s*https?:/.test(text) && URL.canParse(text) && new URL(text).host !== url.host ? url.href : text;
  return el("a", { href: url.href, title: url.href, target: "_blank", rel: "noopener noreferrer", text: honest });
}
