// The live view: polls /engine while the page is seen, and draws what it says. Bars and lines are SVG, so that both
// themes style them and a screen reader hears one sentence for each.

import { get } from "./api.js";
import { percent, seconds, t } from "./i18n.js";

const BUSY_MS = 400;
const IDLE_MS = 1500;
const WINDOW = 60;
const BIN = 0.5;
const NUM_STEPS = 75;
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

export class Live {
  constructor(onState) {
    this.onState = onState;
    this.view = null;
    this.generation = 0;
    this.isBusy = false;
    this.steps = [];
    this.bins = new Map();
    this.after = 0;
    this.timer = null;
    document.addEventListener("visibilitychange", () => this.poll());
  }

  // Ask now; the answer also schedules the next look. Never throws.
  async poll() {
    clearTimeout(this.timer);
    if (document.hidden) return;
    try {
      this.take(await get(`engine?after=${this.after}`));
    } catch (error) {
      this.onState(error.status === 401 ? "key" : "offline", error);
      this.view = null;
    }
    clearTimeout(this.timer);
    const isBusy = this.isBusy || (this.view && this.view.num_running + this.view.num_waiting > 0);
    this.timer = setTimeout(() => this.poll(), isBusy ? BUSY_MS : IDLE_MS);
  }

  take(view) {
    if (view.last_step < this.after) this.forget();
    this.after = view.last_step;
    this.view = view;
    this.generation = view.generation;
    for (const [, at, , , prefill, decode, cached] of view.steps) {
      const bin = Math.floor(at / BIN);
      this.bins.set(bin, (this.bins.get(bin) ?? 0) + decode);
      if (prefill + decode > 0) this.steps.push({ prefill, decode, cached });
    }
    this.steps = this.steps.slice(-NUM_STEPS);
    const oldest = Math.floor((view.now - WINDOW) / BIN) - 1;
    for (const bin of this.bins.keys()) if (bin < oldest) this.bins.delete(bin);
    this.draw();
    this.onState(view.state);
  }

  forget() {
    this.steps = [];
    this.bins.clear();
  }

  draw() {
    const view = this.view;
    if (!view) return;
    const speed = view.decode_tokens_per_second;
    byId("n-speed").textContent = speed >= 100 ? Math.round(speed) : speed.toFixed(speed ? 1 : 0);
    byId("n-running").textContent = view.num_running;
    byId("n-waiting").textContent = view.num_waiting;
    byId("engine-line").textContent = `${t("gen", view.generation)}${view.engine_pid ? ` · pid ${view.engine_pid}` : ""}`;
    this.drawSpeed(view);
    this.drawSteps();
    this.drawKv(view);
    drawLatency("ttft", view.time_to_first_token);
    drawLatency("itl", view.inter_token_latency);
    drawHandOvers(view);
    byId("kill").hidden = !view.engine_pid || view.state !== "ready" || !isLocal();
    byId("kill-command").textContent = `kill -9 ${view.engine_pid}`;
  }

  drawSpeed(view) {
    const last = Math.floor(view.now / BIN);
    const values = [];
    for (let bin = last - WINDOW / BIN; bin <= last - 1; bin += 1) values.push((this.bins.get(bin) ?? 0) / BIN);
    const peak = Math.max(...values);
    const scale = Math.max(peak, 10);
    const points = values.map((value, index) => `${((index / (values.length - 1)) * 300).toFixed(1)},${(44 - (value / scale) * 40).toFixed(1)}`);
    const shapes = [];
    for (const { at, pause_seconds: pause } of view.hand_overs) {
      const x = 300 - ((view.now - at) / WINDOW) * 300;
      const width = Math.max(2, ((pause ?? 0) / WINDOW) * 300);
      if (x > 0) shapes.push(shape("rect", { x: x - width, y: 0, width, height: 46, class: "pause" }));
    }
    shapes.push(shape("polygon", { points: `0,45 ${points.join(" ")} 300,45`, class: "area" }));
    shapes.push(shape("polyline", { points: points.join(" "), class: "line" }));
    show("speed-chart", shapes, t("chartSpeed", Math.round(view.decode_tokens_per_second)));
    byId("speed-max").textContent = peak > 0 ? t("peak", Math.round(peak)) : "";
  }

  drawSteps() {
    const total = (name) => this.steps.reduce((sum, step) => sum + step[name], 0);
    const largest = Math.max(0, ...this.steps.map((step) => step.prefill + step.decode + step.cached));
    // A decode step of one row must be seen beside a prefill of hundreds: heights go with the root.
    const height = (tokens) => (Math.sqrt(tokens) / Math.sqrt(Math.max(8, largest))) * 58;
    const shapes = [];
    this.steps.forEach((step, index) => {
      const x = 300 - (this.steps.length - index) * 4;
      let sum = 0;
      for (const kind of ["decode", "prefill", "cached"]) {
        if (!step[kind]) continue;
        const low = height(sum);
        sum += step[kind];
        shapes.push(shape("rect", { x, y: 60 - height(sum), width: 3, height: height(sum) - low, class: `b-${kind}` }));
      }
    });
    show("steps-chart", shapes, t("chartSteps", this.steps.length, total("decode"), total("prefill"), total("cached")));
    byId("steps-max").textContent = this.steps.length ? t("stepOf", largest) : "";
  }

  drawKv({ kv, prefix_hit_rate: rate }) {
    byId("hits").textContent = rate === null ? "" : t("hits", percent(rate, 0));
    if (!kv) return;
    const width = (blocks) => (blocks ? Math.max(1.5, (blocks / kv.num_blocks) * 300) : 0);
    const own = width(kv.num_used - kv.num_shared);
    const shared = width(kv.num_shared);
    const parts = [["b-decode", 0, own], ["b-shared", own, shared], ["b-cached", own + shared, width(kv.num_cached)]];
    const shapes = parts.map(([name, x, size]) => shape("rect", { x, y: 0, width: size, height: 10, class: name }));
    show("kv-chart", shapes, t("chartKv", kv.num_used, kv.num_blocks, kv.num_shared, kv.num_cached));
    byId("kv-text").textContent = t("blocks", kv.num_used, kv.num_blocks, kv.block_size);
  }
}

function drawLatency(id, values) {
  const cells = byId(id).querySelectorAll("td");
  ["p50", "p90", "p99"].forEach((name, index) => { cells[index].textContent = seconds(values[name]); });
}

function drawHandOvers(view) {
  const items = view.hand_overs.slice(-3).reverse().map(({ generation, pause_seconds: pause }) => {
    const item = document.createElement("li");
    item.textContent = pause === null ? t("handOverIdle", generation) : t("handOver", generation, seconds(pause));
    return item;
  });
  byId("hand-overs").replaceChildren(...items);
}

const isLocal = () => ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);

function show(id, shapes, label) {
  const chart = byId(id);
  chart.setAttribute("aria-label", label);
  chart.replaceChildren(...shapes);
}

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, typeof value === "number" ? value.toFixed(1) : value);
  return element;
}
