// The settings of a request: which there are, how they are typed in, what they become. An empty box is not sent.

const number = (min, max, step) => ({ kind: "number", min, max, step });
const lines = { kind: "lines" };
const ids = { kind: "ids" };
const json = { kind: "json" };
const flag = { kind: "flag" };

const T = {
  max_tokens: ["longest answer", "回答最多 token 数"], temperature: ["0: always the likeliest", "0：总取最可能的"],
  top_p: ["likeliest, to this sum", "按概率总和截取"], top_k: ["so many likeliest", "取最可能的几个"],
  min_p: ["share of the likeliest", "相对最可能者的下限"], seed: ["same seed, same answer", "种子相同，回答相同"],
  logprobs: ["alternatives to show", "显示的备选数"], n: ["answers, as branches", "回答数，成为分支"], presence_penalty: ["against tokens seen", "惩罚出现过的"],
  frequency_penalty: ["by how often", "按次数惩罚"], repetition_penalty: ["divides logits", "重复惩罚，除"], stop: ["one a line", "每行一个"],
  min_tokens: ["no end before", "此前不结束"], stop_token_ids: ["ids, by commas", "id，用逗号"], bad_words: ["one a line", "每行一个"],
  logit_bias: ["{\"id\": bias}", "{\"id\": 偏置}"], allowed_token_ids: ["ids, by commas", "id，用逗号"], ignore_eos: ["go on past the end", "越过结束符"],
  echo: ["colour the prompt too", "提示词也着色"], skip_special_tokens: ["hide special tokens", "隐藏特殊 token"], add_special_tokens: ["add BOS", "添加 BOS"],
  include_stop_str_in_output: ["keep the stop text", "保留停止文本"], truncate_prompt_tokens: ["shorten the prompt", "截短提示词"],
  cache_salt: ["cache of one's own", "独立的缓存"], priority: ["lower goes first", "小者优先"], response_format: ["JSON schema of the answer", "回答的 JSON schema"],
};

export const FIELDS = [
  { name: "max_tokens", ...number(1, 1000000, 1), initial: "64", first: true },
  { name: "temperature", ...number(0, 2, 0.1), initial: "0.7", first: true },
  { name: "top_p", ...number(0, 1, 0.05), first: true },
  { name: "top_k", ...number(-1, 1000000, 1), first: true },
  { name: "min_p", ...number(0, 1, 0.01), first: true },
  { name: "seed", ...number(undefined, undefined, 1), first: true },
  { name: "logprobs", ...number(0, 20, 1), initial: "5", first: true },
  { name: "n", ...number(1, 16, 1), first: true },
  { name: "presence_penalty", ...number(-2, 2, 0.1) },
  { name: "frequency_penalty", ...number(-2, 2, 0.1) },
  { name: "repetition_penalty", ...number(0, 10, 0.05) },
  { name: "min_tokens", ...number(0, 1000000, 1) },
  { name: "stop", ...lines },
  { name: "bad_words", ...lines },
  { name: "stop_token_ids", ...ids },
  { name: "allowed_token_ids", ...ids },
  { name: "logit_bias", ...json },
  { name: "response_format", ...json, isSchema: true },
  { name: "truncate_prompt_tokens", ...number(-1, 1000000, 1) },
  { name: "priority", ...number(-1000, 1000, 1) },
  { name: "cache_salt", kind: "text" },
  { name: "echo", ...flag },
  { name: "ignore_eos", ...flag },
  { name: "add_special_tokens", ...flag, initial: true },
  { name: "skip_special_tokens", ...flag, initial: true },
  { name: "include_stop_str_in_output", ...flag },
];

export const meaning = (name, language) => (T[name] ?? ["", ""])[language === "zh" ? 1 : 0];

export class Invalid extends Error {
  constructor({ name, kind }) {
    super(name);
    this.field = name;
    this.kind = kind;
  }
}

// The value to send, undefined for "not given". Throws Invalid.
export function valueOf(field, control) {
  if (field.kind === "flag") return control.checked === Boolean(field.initial) ? undefined : control.checked;
  const text = control.value;
  if (!control.validity.valid) throw new Invalid(field);
  if (text.trim() === "") return undefined;
  try {
    return READERS[field.kind](text, field);
  } catch {
    throw new Invalid(field);
  }
}

const READERS = {
  number: (text) => Number(text),
  text: (text) => text,
  lines: (text) => text.split("\n").filter((line) => line !== "").map((line) => line.replaceAll("\\n", "\n")),
  ids: (text) => text.split(",").map((part) => {
    if (!/^\s*\d+\s*$/.test(part)) throw new Error(part);
    return Number(part);
  }),
  json: (text, field) => {
    const value = JSON.parse(text);
    if (typeof value !== "object" || value === null || Array.isArray(value)) throw new Error(text);
    return field.isSchema && !value.type?.startsWith?.("json") ? { type: "json_schema", json_schema: { name: "answer", schema: value } } : value;
  },
};
