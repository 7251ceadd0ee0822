// The answer as tokens: colours, walking, the box of alternatives. Whatever a model says goes through textContent.

import { encode, spell } from "./api.js";
import { percent, seconds, t } from "./i18n.js";

const BOUNDS = [0.9, 0.6, 0.3, 0.1, 0.02];
const byId = (id) => document.getElementById(id);

export function level(logprob) {
  const share = Math.exp(logprob);
  const index = BOUNDS.findIndex((bound) => share >= bound);
  return index < 0 ? BOUNDS.length : index;
}

export function drawScale() {
  const parts = [element("span", "word", t("probability"))];
  [...BOUNDS, 0].forEach((bound, index) => {
    parts.push(element("span", `swatch p${index}`, bound ? `≥ ${bound * 100} %` : `< ${BOUNDS.at(-1) * 100} %`));
  });
  byId("scale").replaceChildren(...parts);
}

export function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣");

function spoken(token) {
  const name = token.t.trim() || (token.t.includes("\n") ? t("newline") : token.t ? t("space") : token.s ?? t("part"));
  return token.lp === null ? name : `${name}, ${percent(Math.exp(token.lp))}`;
}

export class Answer {
  // `fork(index, ids, texts)` is called when the reader chose how to go on at a token.
  constructor(fork) {
    this.fork = fork;
    this.box = byId("tokens");
    this.popover = byId("popover");
    this.tokens = [];
    this.open = null;
    this.canFork = false;
    this.box.addEventListener("click", (event) => this.clicked(event));
    this.box.addEventListener("keydown", (event) => this.walked(event));
    this.popover.addEventListener("keydown", (event) => this.choosing(event));
    document.addEventListener("pointerdown", (event) => {
      if (this.open !== null && !this.popover.contains(event.target) && !event.target.closest(".tok")) this.close();
    });
    window.addEventListener("resize", () => this.close());
  }

  show(tokens, marks) {
    this.close();
    this.tokens = [];
    this.box.replaceChildren();
    tokens.forEach((token, index) => {
      for (const mark of marks) if (mark.at === index) this.mark(mark);
      this.push(token);
    });
  }

  push(token) {
    const span = document.createElement("span");
    span.tabIndex = this.tokens.length ? -1 : 0;
    span.setAttribute("role", "button");
    span.dataset.index = this.tokens.length;
    this.tokens.push(token);
    this.paint(span, token);
    this.box.append(span);
  }

  // A token's text may come late: a character of several tokens, text held back before a stop string.
  repaint(index) {
    const span = this.spanAt(index);
    if (span) this.paint(span, this.tokens[index]);
  }

  paint(span, token) {
    span.className = "tok";
    span.textContent = token.t;
    if (token.lp !== null) span.classList.add(`p${level(token.lp)}`);
    if (token.top.length && token.top.some(([, lp]) => lp > token.lp)) span.classList.add("unlikely");
    if (token.picked) span.classList.add("picked");
    if (!token.t) span.classList.add(token.isEnd ? "end" : "part");
    if (/^\n+$/.test(token.t)) span.classList.add("newline");
    if (token.isEnd) span.dataset.end = token.s ?? t("endToken");
    span.setAttribute("aria-label", spoken(token));
  }

  mark({ generation, seconds: pause }, before = null) {
    const text = pause === null ? t("gen", generation) : t("handOver", generation, seconds(pause));
    this.box.insertBefore(element("span", "hand-over", text), before);
  }

  markAt(mark) {
    this.mark(mark, this.spanAt(mark.at));
  }

  spanAt(index) {
    return this.box.querySelector(`.tok[data-index="${index}"]`);
  }

  clicked(event) {
    const span = event.target.closest(".tok");
    if (span) this.openAt(Number(span.dataset.index));
  }

  walked(event) {
    const span = event.target.closest(".tok");
    if (!span) return;
    const index = Number(span.dataset.index);
    const moves = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: this.tokens.length - 1, ArrowDown: null, ArrowUp: null };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.openAt(index);
    } else if (event.key in moves) {
      event.preventDefault();
      const target = moves[event.key] ?? this.nextLine(span, event.key === "ArrowDown");
      this.focus(Math.min(this.tokens.length - 1, Math.max(0, target)));
    }
  }

  // The token nearest below or above.
  nextLine(span, isDown) {
    const from = span.getBoundingClientRect();
    const index = Number(span.dataset.index);
    const step = isDown ? 1 : -1;
    let best = index;
    let line = null;
    let distance = Infinity;
    for (let other = index + step; other >= 0 && other < this.tokens.length; other += step) {
      const place = this.spanAt(other).getBoundingClientRect();
      if (Math.abs(place.top - from.top) < 4) continue;
      line ??= place.top;
      if (Math.abs(place.top - line) > 4) break;
      if (Math.abs(place.left - from.left) < distance) [best, distance] = [other, Math.abs(place.left - from.left)];
    }
    return best;
  }

  focus(index) {
    const span = this.spanAt(index);
    if (!span) return;
    for (const other of this.box.querySelectorAll('.tok[tabindex="0"]')) other.tabIndex = -1;
    span.tabIndex = 0;
    span.focus();
  }

  async openAt(index) {
    const token = this.tokens[index];
    if (!token) return;
    this.close();
    const ids = [...new Set([token.id, ...token.top.map(([id]) => id)])].filter((id) => id >= 0);
    const texts = new Map();
    try {
      (await spell(ids)).forEach((text, place) => texts.set(ids[place], text));
    } catch { /* then ids are shown */ }
    this.open = index;
    this.popover.replaceChildren(...this.content(token, index, texts));
    this.popover.hidden = false;
    this.place(this.spanAt(index));
    this.spanAt(index)?.classList.add("opened");
    (this.popover.querySelector("button.choice:enabled") ?? this.popover.querySelector("input") ?? this.popover).focus({ preventScroll: true });
  }

  content(token, index, texts) {
    const rank = 1 + token.top.filter(([, lp]) => lp > token.lp).length;
    const head = element("p", "about");
    head.append(element("b", "", visible(texts.get(token.id) ?? token.t)));
    const share = token.lp === null ? null : percent(Math.exp(token.lp));
    const facts = [share, token.lp === null ? null : t("rank", rank > token.top.length - 1 && rank > 1 ? `≥ ${rank}` : rank), t("id", token.id), token.picked ? t("picked") : null];
    head.append(element("span", "facts", facts.filter(Boolean).join(" · ")));
    const list = element("div", "choices");
    for (const [id, lp] of [...token.top].sort((a, b) => b[1] - a[1])) list.append(this.choice(token, index, { id, lp, text: texts.get(id) }));
    const parts = [head, list];
    if (this.canFork) parts.push(this.own(index));
    else parts.push(element("p", "hint", t("noFork")));
    return parts;
  }

  choice(token, index, { id, lp, text }) {
    const isDrawn = id === token.id;
    const row = element("button", isDrawn ? "choice drawn" : "choice");
    row.type = "button";
    row.disabled = isDrawn || !this.canFork;
    row.append(element("i"), element("span", "what", visible(text ?? t("id", id))));
    if (isDrawn) row.append(element("small", "", t("chosen")));
    row.append(element("span", "share", percent(Math.exp(lp))));
    row.style.setProperty("--share", Math.exp(lp).toFixed(4));
    row.addEventListener("click", () => {
      this.close();
      this.fork(index, [id], [lp], token.top);
    });
    return row;
  }

  own(index) {
    const form = element("form", "own");
    const input = element("input");
    input.placeholder = t("own");
    input.setAttribute("aria-label", t("ownLabel"));
    input.spellcheck = false;
    form.append(input, element("button", "", t("go")));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (!input.value) return;
      const ids = await encode(input.value);
      this.close();
      this.fork(index, ids, ids.map(() => null), []);
    });
    return form;
  }

  place(span) {
    if (!span || window.innerWidth < 640) return;
    const spot = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const size = this.popover.getBoundingClientRect();
    const left = Math.max(8, Math.min(spot.left, document.documentElement.clientWidth - size.width - 8));
    const isBelow = spot.bottom + size.height + 8 < window.innerHeight || spot.top < size.height + 8;
    this.popover.style.left = `${left + window.scrollX}px`;
    this.popover.style.top = `${(isBelow ? spot.bottom + 6 : spot.top - size.height - 6) + window.scrollY}px`;
  }

  choosing(event) {
    if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
    event.preventDefault();
    const places = [...this.popover.querySelectorAll("button.choice:enabled, input")];
    const at = places.indexOf(document.activeElement) + (event.key === "ArrowDown" ? 1 : -1);
    places[(at + places.length) % places.length]?.focus();
  }

  // True where there was something to close.
  close() {
    if (this.open === null) return false;
    const index = this.open;
    this.open = null;
    const hadFocus = this.popover.contains(document.activeElement);
    this.popover.hidden = true;
    this.spanAt(index)?.classList.remove("opened");
    if (hadFocus) this.focus(index);
    return true;
  }
}
