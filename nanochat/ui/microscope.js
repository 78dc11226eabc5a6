// An answer as the model wrote it: token by token, each as sure as it was, with what else it might have been.

import { el, iconButton } from "./dom.js";

const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  if (p < 0.1 || (p > 99.9 && p < 100)) return p < 0.1 ? "<0.1 %" : ">99.9 %";
  return `${p.toFixed((p >= 10 && p <= 99) || p === 100 ? 0 : 1)} %`;
};

/** A token's text where every character can be seen. */
const visible = (text) => text.replace(/ /g, "·").replace(/\t/g, "⇥").replace(/\r/g, "␍").replace(/\n/g, "⏎") || "∅";
const name = (token) => (token.special ? token.text.replace(/[<|>]/g, "") : visible(token.text));
const ofTool = (token) => token.special && /python|output/.test(token.text);

function label(token) {
  const by = token.forced ? ", put in by a tool" : token.chosen ? ", chosen by you" : "";
  return `${token.special ? name(token) : JSON.stringify(token.text)}, ${percent(token.logprob)}${by}`;
}

let opened = null; // closes the panel that is open

/** Whether there was one to close. */
export function closePanel() {
  const close = opened;
  close?.(true);
  return Boolean(close);
}

/**
 * The tokens of an answer, which may still grow: {node, show(tokens)}. goOn(index, alternative) is called for an answer
 * that goes on from another token. Arrow keys move between tokens; Enter looks at one.
 */
export function tokenView(goOn) {
  const node = el("div", { class: "tokens", role: "group", "aria-label": "Tokens of the answer", dir: "ltr" });
  const panel = el("div", { class: "panel", role: "region", "aria-label": "Token" });
  const buttons = [];
  let tokens = [], current = 0, width = 0;

  const select = (to) => {
    buttons[current].tabIndex = -1;
    buttons[to].tabIndex = 0;
    current = to;
  };
  const close = (refocus) => {
    if (!panel.isConnected) return;
    panel.remove();
    opened = null;
    buttons[current].setAttribute("aria-expanded", "false");
    if (refocus) buttons[current].focus();
  };
  const look = (index) => {
    const again = panel.isConnected && index === current;
    opened?.(false);
    select(index);
    if (again) return;
    opened = close;
    buttons[index].setAttribute("aria-expanded", "true");
    panel.replaceChildren(...details(tokens, index, goOn, () => close(true)));
    place();
    panel.scrollIntoView({ block: "nearest" });
  };
  /** The panel stands under the line of its token, so that this stays in view. */
  const place = () => {
    const focused = panel.contains(document.activeElement) ? document.activeElement : null, scrolled = panel.scrollTop;
    panel.hidden = true; // lines as they are without it
    const line = buttons[current].offsetTop + buttons[current].offsetHeight / 2;
    const last = buttons.slice(current).findLast((button) => button.offsetTop < line);
    if (last.nextSibling !== panel) last.after(panel);
    panel.hidden = false;
    panel.scrollTop = scrolled;
    focused?.focus({ preventScroll: true });
    width = node.clientWidth;
  };
  /** The token above or below. */
  const beside = (step) => {
    const { offsetTop: top, offsetLeft: left } = buttons[current];
    const others = buttons.map((button, index) => ({ index, down: (button.offsetTop - top) * step, aside: Math.abs(button.offsetLeft - left) }));
    const beyond = others.filter((other) => other.down > 4);
    const nearest = Math.min(...beyond.map((other) => other.down));
    return beyond.filter((other) => other.down < nearest + 4).sort((a, b) => a.aside - b.aside)[0]?.index ?? current;
  };

  new ResizeObserver(() => { if (panel.isConnected && node.clientWidth !== width) place(); }).observe(node);
  node.addEventListener("keydown", (event) => {
    if (!event.target.classList.contains("token")) return;
    const to = {
      ArrowRight: () => current + 1, ArrowLeft: () => current - 1, ArrowDown: () => beside(1), ArrowUp: () => beside(-1),
      Home: () => 0, End: () => buttons.length - 1,
    }[event.key]?.();
    if (to === undefined) return;
    event.preventDefault();
    if (!buttons[to] || to === current) return;
    const looking = panel.isConnected;
    if (looking) look(to);
    else select(to);
    buttons[to].focus();
  });

  const add = (token, index) => {
    const kinds = ["token", token.special && "special", token.forced && "forced", token.chosen && "chosen"];
    const button = el("button", {
      class: kinds.filter(Boolean).join(" "),
      text: name(token),
      tabindex: index ? "-1" : "0",
      "aria-label": label(token),
      "aria-expanded": "false",
      onclick: () => look(index),
    });
    button.style.setProperty("--doubt", String(1 - Math.exp(token.logprob)));
    buttons.push(button);
    node.append(button);
    if (!token.special && token.text.includes("\n")) node.append(el("br"));
  };

  return {
    node,
    show(now) {
      if (now.length < tokens.length || tokens.some((token, index) => token.id !== now[index].id)) {
        close(false);
        node.replaceChildren();
        buttons.length = current = 0;
        tokens = [];
      }
      now.slice(tokens.length).forEach((token, n) => add(token, tokens.length + n));
      tokens = [...now];
      if (!panel.isConnected) return;
      panel.querySelector(".total").textContent = tokens.length;
      place();
    },
  };
}

function details(tokens, index, goOn, close) {
  const token = tokens[index];
  const said = [];
  if (token.forced) said.push("Put in by the tool: the model did not choose it. This is how likely it found it.");
  else if (token.chosen) said.push("Chosen by you: the model went on from here.");
  if (token.special && !ofTool(token)) said.push("Here the model ended its turn.");
  const listed = token.likeliest.some((other) => other.id === token.id) ? token.likeliest : [...token.likeliest, token];
  return [
    el("div", { class: "head" },
      el("code", { class: token.special ? "special" : "", text: name(token) }),
      el("span", { class: "small", text: `id ${token.id} · ${percent(token.logprob)} · token ${index + 1} of ` }, el("span", { class: "total", text: tokens.length })),
      iconButton("close", "Close", close),
    ),
    ...said.map((text) => el("p", { class: "small", text })),
    el("ol", { class: "alternatives", "aria-label": "The likeliest tokens here" },
      ...listed.map((other) => alternative(other, other.id === token.id, () => goOn(index, other)))),
    el("p", { class: "small", text: "As likely as the model finds them, before temperature, top-k and top-p. Choose another, and it goes on from there." }),
  ];
}

function alternative(token, taken, goOn) {
  const inside = [
    el("code", { class: token.special ? "special" : "", text: name(token) }),
    el("span", { class: "bar" }),
    el("span", { class: "share", text: percent(token.logprob) }),
  ];
  // Marks of turns end an answer: none goes on from them.
  const usable = !taken && (!token.special || ofTool(token));
  const row = usable
    ? el("button", { onclick: goOn, "aria-label": `Go on from ${JSON.stringify(token.text)}, ${percent(token.logprob)}` }, ...inside, el("span", { class: "go", text: "go on" }))
    : el("div", {}, ...inside, el("span", { class: "go", text: taken ? "taken" : "" }));
  row.style.setProperty("--share", String(Math.exp(token.logprob)));
  return el("li", { class: taken ? "taken" : "" }, row);
}
