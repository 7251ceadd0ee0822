// The page: what the buttons and keys do, one request at a time, and the tree that it grows.

import { abilities, ApiError, get, join, spell, stream, useKey } from "./api.js";
import { Answer, drawScale, element } from "./answer.js";
import { drawBranches } from "./branches.js";
import { tokensOf } from "./chunks.js";
import { curl, python } from "./code.js";
import { Invalid } from "./fields.js";
import { language, percent, seconds, setLanguage, t } from "./i18n.js";
import { Live } from "./live.js";
import { changed, drawFields, setFields, settings, showFields, translateFields } from "./settings.js";
import { store } from "./store.js";
import { Tree } from "./tree.js";

const PAUSE_MS = 250; // a longer gap between chunks may be a hand-over: the engine is asked
const byId = (id) => document.getElementById(id);
const EXAMPLES = {
  completion: { en: ["Once upon a time", "def fibonacci(n):", "The capital of France is"], zh: ["Once upon a time", "从前，", "The capital of France is"] },
  chat: { en: ["Why is the sky blue?", "Write a haiku about rivers.", "Name three planets."], zh: ["Why is the sky blue?", "用中文介绍一下你自己。", "Name three planets."] },
};

const tree = new Tree();
const answer = new Answer((index, ids, logprobs, top) => fork(index, ids, logprobs, top));
const live = new Live(showState);
let mode = "completion";
let active = null;
let running = null;
let model = "";
let able = { completion: null, chat: null };

// --- what is sent

function draft() {
  const text = byId("prompt").value;
  if (mode === "completion") return { path: "v1/completions", body: { model, prompt: text, ...settings("completion"), stream: true } };
  return { path: "v1/chat/completions", body: { model, messages: messages(text), ...settings("chat"), stream: true } };
}

function messages(text) {
  const next = { role: "user", content: text };
  if (active?.mode === "chat" && !text) return tree.head(active).messages; // as code: the question that is shown
  if (active?.mode === "chat") return [...tree.head(active).messages, { role: "assistant", content: tree.text(active) }, next];
  const system = byId("system").value;
  return system ? [{ role: "system", content: system }, next] : [next];
}

function withIds(body, forMode) {
  const full = { ...body, stream: true, stream_options: { include_usage: true } };
  for (const name of ["return_token_ids", "return_tokens_as_token_ids"]) if (able[forMode]?.has(name) ?? true) full[name] = true;
  // Every token is shown with its text, those of the model's reasoning, too.
  if (able[forMode]?.has("separate_reasoning")) full.separate_reasoning = false;
  return full;
}

// --- runs

async function run() {
  if (running) return;
  const text = byId("prompt").value;
  if (!text) return fail(new Error(t("emptyPrompt")));
  const request = guard(draft);
  if (!request) return;
  const isReply = mode === "chat" && active?.mode === "chat";
  const fields = { kind: isReply ? "turn" : "root", parent: isReply ? active.id : null, mode, prompt: text, messages: request.body.messages ?? [] };
  const count = request.body.n ?? 1;
  const nodes = Array.from({ length: count }, () => tree.add({ ...fields }));
  if (mode === "chat") byId("prompt").value = "";
  await follow(nodes, request.path, withIds(request.body, mode));
}

// Go on from `index` tokens of the active path, with these tokens first. Always by ids: exactly what was there before.
async function fork(index, ids, logprobs, top) {
  if (running) stop();
  const head = tree.head(active);
  const kept = tree.path(active).slice(0, index);
  const body = guard(() => settings("completion"));
  if (!body || !head.promptIds) return;
  const texts = await spell(ids).catch(() => ids.map(() => ""));
  const joined = join(texts);
  const picked = ids.map((id, place) => ({ id, t: joined[place], s: texts[place], lp: logprobs[place], top, picked: true }));
  const parent = ids.length ? tree.owner(active, index) : active;
  delete body.echo;
  delete body.add_special_tokens;
  delete body.truncate_prompt_tokens;
  const nodes = Array.from({ length: body.n ?? 1 }, () => tree.add({ kind: "fork", parent: parent.id, at: index, mode: head.mode, tokens: picked.map((token) => ({ ...token })) }));
  const prompt = [...head.promptIds, ...kept.map((token) => token.id), ...ids];
  await follow(nodes, "v1/completions", withIds({ model, prompt, ...body }, "completion"));
}

async function follow(nodes, path, body) {
  const controller = new AbortController();
  const start = performance.now();
  const clocks = new Map(nodes.map((node) => [node, { start, last: start, first: null, count: 0 }]));
  running = { controller, nodes };
  live.isBusy = true;
  for (const node of nodes) node.generation = live.generation;
  fail(null);
  activate(nodes[0]);
  live.poll();
  byId("caret").hidden = false;
  byId("hint").textContent = t("working");
  try {
    for await (const chunk of stream(path, body, controller.signal)) take(nodes, chunk, clocks);
  } catch (error) {
    for (const node of nodes) node.finish ??= error.name === "AbortError" ? "stop-button" : "error";
    if (error.name !== "AbortError") fail(error);
  }
  if (running?.controller === controller) running = null;
  live.isBusy = Boolean(running);
  for (const [node, clock] of clocks) {
    node.speed = clock.count > 1 ? (clock.count - 1) / ((clock.last - clock.first) / 1000) : null;
    if (!node.tokens.length && node.finish === "error") drop(node);
    else await tidy(node, 0);
  }
  refresh({ keepTokens: nodes.includes(active) });
}

// A run that brought nothing leaves no branch, and the message goes back to where it was typed.
function drop(node) {
  tree.remove(node);
  if (node.mode === "chat" && !byId("prompt").value) byId("prompt").value = node.prompt;
  if (active === node) active = tree.nodes.get(node.parent) ?? null;
}

function take(nodes, chunk, clocks) {
  const choice = chunk.choices[0];
  if (chunk.prompt_token_ids) for (const node of nodes) node.promptIds = chunk.prompt_token_ids;
  if (chunk.seed !== undefined) for (const node of nodes) node.seed = chunk.seed;
  if (chunk.usage) {
    const { prompt_tokens: prompt, prompt_tokens_details: details } = chunk.usage;
    for (const node of nodes) node.usage = { prompt, cached: details?.cached_tokens ?? 0 };
  }
  if (!choice) return;
  const node = nodes[choice.index] ?? nodes[0];
  if (choice.prompt_token_ids) for (const one of nodes) one.promptIds ??= choice.prompt_token_ids;
  const tokens = tokensOf(choice);
  const now = performance.now();
  if (tokens.length) {
    const clock = clocks.get(node);
    const gap = now - clock.last;
    if (clock.first !== null && gap > PAUSE_MS) askWhy(node, node.tokens.length, gap / 1000);
    if (clock.first === null && isShown(node)) byId("hint").textContent = t(tokens.some((token) => token.lp !== null) ? hintOfTokens() : "hintPlain");
    clock.first ??= now;
    node.ttft ??= (now - clock.start) / 1000;
    clock.last = now;
    clock.count += tokens.length;
  }
  append(node, tokens, choice.text ?? choice.delta?.content ?? "");
  if (choice.finish_reason) {
    node.finish = choice.finish_reason;
    const last = node.tokens.at(-1);
    if (last && choice.finish_reason === "stop" && !last.t && choice.stop_reason == null) last.isEnd = true;
  }
  if (isShown(node)) answer.canFork = Boolean(tree.head(node).promptIds);
  if (isShown(node)) byId("facts").textContent = facts(node);
}

function append(node, tokens, text) {
  const prompt = tokens.filter((token) => token.isPrompt).map(({ isPrompt: _, ...token }) => token);
  const output = tokens.filter((token) => !token.isPrompt).map(({ isPrompt: _, ...token }) => token);
  if (prompt.length) {
    node.promptTokens = prompt;
    const rest = text.startsWith(node.prompt) ? text.slice(node.prompt.length) : text;
    spellPrompt(node);
    return append(node, output, rest);
  }
  const first = node.tokens.length;
  if (!output.length && text && node.promptIds && !first) return undefined; // an echo without logprobs: the prompt is shown anyway
  node.tokens.push(...output);
  const last = node.tokens.at(-1);
  if (last) last.t += text;
  if (isShown(node)) {
    const offset = node.kind === "fork" ? node.at : 0;
    output.forEach((token) => answer.push(token));
    if (!output.length && text) answer.repaint(offset + node.tokens.length - 1);
  }
  if (output.length > 1) tidy(node, first);
  return undefined;
}

const isShown = (node) => node === active;

// Give each token its own text where several share one: chunks of several tokens, text that was held back.
async function tidy(node, from) {
  const ids = node.tokens.map((token) => token.id);
  if (ids.some((id) => id < 0)) return;
  let start = from;
  for (let end = from; end < node.tokens.length; end += 1) {
    const isLast = end === node.tokens.length - 1;
    if (!node.tokens[end].t && !isLast) continue;
    if (end > start || !node.tokens[end].t) await share(node, start, end);
    start = end + 1;
  }
}

async function share(node, start, end) {
  const run = node.tokens.slice(start, end + 1);
  const text = run.map((token) => token.t).join("");
  const texts = await spell(run.map((token) => token.id)).catch(() => null);
  if (!texts) return;
  const joined = join(texts);
  const fits = joined.join("") === text;
  run.forEach((token, place) => {
    token.s = texts[place];
    if (fits) token.t = joined[place];
    if (isShown(node)) answer.repaint((node.kind === "fork" ? node.at : 0) + start + place);
  });
}

async function spellPrompt(node) {
  const texts = await spell(node.promptTokens.map((token) => token.id)).catch(() => null);
  if (!texts) return;
  const joined = join(texts);
  node.promptTokens.forEach((token, place) => { token.t = joined[place]; });
  if (isShown(node)) showPrompt(node);
}

async function askWhy(node, index, gap) {
  await live.poll();
  if (!live.generation || live.generation === node.generation) return;
  node.generation = live.generation;
  const mark = { at: index, generation: live.generation, seconds: gap };
  node.marks.push(mark);
  if (isShown(node)) answer.markAt({ ...mark, at: index + (node.kind === "fork" ? node.at : 0) });
}

function stop() {
  running?.controller.abort();
}

const WANTED = { ids: "wantedIds", json: "wantedJson" };

function guard(make) {
  try {
    return make();
  } catch (error) {
    if (!(error instanceof Invalid)) throw error;
    byId(`f-${error.field}`).closest("details").open = true;
    byId(`f-${error.field}`).focus();
    fail(new Error(t("badSetting", error.field, t(WANTED[error.kind] ?? "wantedNumber"))));
    return null;
  }
}

function fail(error) {
  byId("error").hidden = !error;
  byId("error").textContent = error ? error.message : "";
  if (error instanceof ApiError && error.status === 401) askKey();
  if (error?.param && byId(`f-${error.param}`)) byId(`f-${error.param}`).focus();
}

function askKey() {
  if (!byId("key-box").open) byId("key-box").showModal();
}

// --- what is shown

function activate(node) {
  active = node;
  refresh();
}

function refresh({ keepTokens = false } = {}) {
  const isChat = mode === "chat";
  byId("run").disabled = Boolean(running);
  byId("stop").disabled = !running;
  byId("new-chat").hidden = !isChat || active?.mode !== "chat";
  byId("system-box").hidden = !isChat || active?.mode === "chat";
  byId("caret").hidden = !running || !running.nodes.includes(active);
  showPrompt(active);
  const tokens = active ? tree.path(active) : [];
  if (!keepTokens) answer.show(tokens, active ? tree.marks(active) : []);
  answer.canFork = Boolean(active && tree.head(active).promptIds);
  byId("facts").textContent = active ? facts(active) : "";
  const hasLogprobs = tokens.some((token) => token.lp !== null);
  byId("hint").textContent = !active ? t("hintStart") : running && !tokens.length ? t("working") : t(hasLogprobs || !tokens.length ? hintOfTokens() : "hintPlain");
  byId("copy-text").hidden = !tokens.length;
  byId("more").hidden = Boolean(running) || !tokens.length || !tree.head(active).promptIds || !["length", "stop-button", "error"].includes(active.finish);
  drawBranches(tree, { active, isRunning: Boolean(running), visit, remove });
}

function remove(node) {
  tree.remove(node);
  if (active && !tree.nodes.has(active.id)) active = null;
  refresh();
}

function showPrompt(node) {
  const head = node ? tree.head(node) : null;
  const turns = head?.mode === "chat" ? head.messages : [];
  byId("turns").replaceChildren(...turns.map(({ role, content }) => {
    const turn = element("p", `turn ${["user", "assistant", "system"].includes(role) ? role : "other"}`);
    turn.append(element("b", "", t(role)), document.createTextNode(content));
    return turn;
  }), ...(head?.mode === "chat" ? [element("b", "speaker", t("assistant"))] : []));
  const shown = byId("shown-prompt");
  if (!head || head.mode === "chat") return shown.replaceChildren();
  if (!head.promptTokens.length || !head.promptTokens[0].t) return shown.replaceChildren(head.prompt);
  return shown.replaceChildren(...head.promptTokens.map((token) => {
    const span = element("span", token.lp === null ? "" : `scored p${levelOf(token.lp)}`, token.t);
    if (token.lp !== null) span.title = percent(Math.exp(token.lp));
    return span;
  }));
}

const hintOfTokens = () => (matchMedia("(pointer: coarse)").matches ? "hintTouch" : "hintTokens");

const levelOf = (logprob) => [0.9, 0.6, 0.3, 0.1, 0.02].filter((bound) => Math.exp(logprob) < bound).length;

function facts(node) {
  const count = tree.path(node).length;
  const parts = [count === 1 ? t("nToken") : t("nTokens", count)];
  if (node.speed) parts.push(t("perSecond", node.speed.toFixed(node.speed < 10 ? 1 : 0)));
  if (node.ttft !== null) parts.push(t("firstToken", seconds(node.ttft)));
  if (node.usage) parts.push(t("nCached", node.usage.cached, node.usage.prompt));
  if (node.seed !== null) parts.push(t("seed", node.seed));
  if (node.finish === "stop-button") parts.push(t("stopped"));
  return parts.join(" · ");
}

function visit(node) {
  if (node.mode !== mode) setMode(node.mode, { keep: true });
  if (node.mode === "completion") byId("prompt").value = tree.head(node).prompt;
  activate(node);
}

function setMode(name, { keep = false } = {}) {
  mode = name;
  byId("mode-completion").setAttribute("aria-pressed", String(mode === "completion"));
  byId("mode-chat").setAttribute("aria-pressed", String(mode === "chat"));
  byId("prompt-label").dataset.t = mode === "chat" ? "message" : "prompt";
  byId("run").firstElementChild.dataset.t = mode === "chat" ? "send" : "run";
  if (!keep) {
    active = null;
    byId("prompt").value = EXAMPLES[mode][language()][0];
  }
  showFields(isTaken);
  translate();
}

const isTaken = ({ name }) => (name === "echo" && mode === "chat" ? false : able[mode] ? able[mode].has(name) : name !== "response_format");

function showState(state, error) {
  const words = { starting: "starting", ready: "ready", restarting: "restarting", draining: "draining", failed: "failedState", offline: "offline", key: "keyTitle" };
  const box = byId("state");
  if (box.dataset.state !== state || byId("state-text").dataset.t !== (words[state] ?? "offline")) {
    if (state === "ready" && box.dataset.state !== "ready") learn();
    box.dataset.state = state;
    byId("state-text").dataset.t = words[state] ?? "offline";
    byId("state-text").textContent = t(words[state] ?? "offline");
  }
  if (state === "key" && error) askKey();
}

// Which model, and what its routes take: known once an engine is ready.
async function learn() {
  try {
    const [models, taken] = await Promise.all([get("v1/models"), abilities()]);
    const [first] = models.data;
    model = first.id;
    able = taken;
    byId("model-name").textContent = model;
    byId("model-facts").hidden = false;
    byId("model-facts").textContent = [first.tier, first.dtype, first.max_model_len].filter(Boolean).join(" · ");
    byId("mode-chat").hidden = !able.chat;
    setMode(mode, { keep: true });
  } catch (error) {
    fail(error);
  }
}

// --- copying, files, help

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast(t("copied"));
  } catch {
    toast(t("copyFailed"));
  }
}

let toastTimer = null;
function toast(text) {
  byId("toast").textContent = text;
  byId("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { byId("toast").hidden = true; }, 2500);
}

function showCode(kind) {
  const request = guard(draft);
  if (!request) return;
  const base = new URL("v1", location.href).href;
  const isChat = request.path.includes("chat");
  const url = new URL(request.path, location.href).href;
  byId("code-text").textContent = kind === "curl" ? curl(url, request.body) : python(base, request.body, isChat);
  byId("code-curl").setAttribute("aria-pressed", String(kind === "curl"));
  byId("code-python").setAttribute("aria-pressed", String(kind === "python"));
  if (!byId("code-box").open) byId("code-box").showModal();
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([tree.toFile(model)], { type: "application/json" }));
  link.download = "headwater-branches.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function load(file) {
  try {
    tree.fromFile(await file.text());
    toast(t("loaded", tree.nodes.size));
    const first = tree.children(null).at(-1);
    if (first) visit(first);
    else activate(null);
  } catch {
    fail(new Error(t("badFile")));
  }
}

function drawHelp() {
  const keys = [["Ctrl ↵", "k1"], ["Esc", "k2"], ["← →  ↑ ↓", "k3"], ["↵", "k4"], ["↑ ↓  ↵", "k5"], ["/", "k6"], ["?", "k7"]];
  byId("help-list").replaceChildren(...keys.flatMap(([key, what]) => {
    const term = element("dt");
    term.append(element("kbd", "", key));
    return [term, element("dd", "", t(what))];
  }));
}

function drawExamples() {
  const buttons = EXAMPLES[mode][language()].map((text) => {
    const button = element("button", "quiet", text);
    button.type = "button";
    button.addEventListener("click", () => {
      byId("prompt").value = text;
      if (mode === "completion") active = null;
      if (!running) run();
    });
    return button;
  });
  byId("examples").replaceChildren(element("span", "", t("try")), ...buttons);
}

// --- language, theme, keys

function translate() {
  setLanguage(language());
  byId("language").textContent = t("language");
  byId("language").setAttribute("aria-label", t("languageLabel"));
  for (const name of ["theme", "help"]) {
    byId(name).setAttribute("aria-label", t(name));
    byId(name).title = t(name);
  }
  translateFields();
  drawScale();
  drawHelp();
  drawExamples();
  live.draw();
  refresh();
  changed();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function flipTheme() {
  const isDark = document.documentElement.dataset.theme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  setTheme(isDark ? "light" : "dark");
  store.write("theme", isDark ? "light" : "dark");
}

function onKey(event) {
  const isTyping = event.target.matches("input, textarea");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (!answer.close()) stop();
  } else if (event.key === "?" && !isTyping) {
    byId("help-box").showModal();
  } else if (event.key === "/" && !isTyping) {
    event.preventDefault();
    byId("prompt").focus();
  }
}

function wire() {
  const on = (id, what) => byId(id).addEventListener("click", what);
  on("run", run);
  on("stop", stop);
  on("new-chat", () => activate(null));
  on("more", () => fork(tree.path(active).length, [], [], []));
  on("copy-text", () => copy(tree.text(active)));
  on("copy-kill", () => copy(byId("kill-command").textContent));
  on("code", () => showCode("curl"));
  on("code-curl", () => showCode("curl"));
  on("code-python", () => showCode("python"));
  on("code-copy", (event) => { event.preventDefault(); copy(byId("code-text").textContent); });
  on("save", save);
  on("load", () => byId("file").click());
  byId("file").addEventListener("change", (event) => { if (event.target.files[0]) load(event.target.files[0]); event.target.value = ""; });
  on("help", () => byId("help-box").showModal());
  on("theme", flipTheme);
  on("language", () => {
    const next = language() === "zh" ? "en" : "zh";
    setLanguage(next);
    store.write("language", next);
    translate();
  });
  on("mode-completion", () => mode === "completion" || setMode("completion"));
  on("mode-chat", () => mode === "chat" || setMode("chat"));
  on("reset", () => setFields({}));
  byId("key-form").addEventListener("submit", () => { useKey(byId("key").value); live.poll(); learn(); });
  document.addEventListener("keydown", onKey);
}

function begin() {
  setLanguage(store.read("language") ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"));
  if (store.read("theme")) setTheme(store.read("theme"));
  if (matchMedia("(max-width: 900px)").matches) for (const id of ["engine", "settings"]) byId(id).open = false;
  drawFields();
  wire();
  setMode("completion");
  live.poll();
}

begin();
