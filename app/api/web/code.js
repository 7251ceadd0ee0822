// A request as something to paste elsewhere.

const OPENAI_FIELDS = new Set([
  "model", "prompt", "messages", "echo", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "max_tokens", "n",
  "presence_penalty", "seed", "stop", "temperature", "top_p", "response_format", "stream", "stream_options",
]);

export function curl(url, body) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl -N ${url} \\\n  -H 'content-type: application/json' \\\n  -d '${quoted}'\n`;
}

export function python(base, body, isChat) {
  const own = {};
  const given = {};
  for (const [name, value] of Object.entries(body)) (OPENAI_FIELDS.has(name) ? given : own)[name] = value;
  const lines = Object.entries(given).map(([name, value]) => `    ${name}=${literal(value)},`);
  if (Object.keys(own).length) lines.push(`    extra_body=${literal(own)},`);
  const call = isChat ? "client.chat.completions.create" : "client.completions.create";
  const piece = isChat ? "chunk.choices[0].delta.content or \"\"" : "chunk.choices[0].text";
  return [
    "from openai import OpenAI", "", `client = OpenAI(base_url=${literal(base)}, api_key="none")`, `stream = ${call}(`, ...lines, ")",
    "for chunk in stream:", "    if chunk.choices:", `        print(${piece}, end="", flush=True)`, "",
  ].join("\n");
}

function literal(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([key, one]) => `${JSON.stringify(key)}: ${literal(one)}`).join(", ")}}`;
  return JSON.stringify(value);
}
