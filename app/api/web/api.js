// Talking to the server: JSON, event streams, keys. Paths are relative, so that a proxy may publish it under any path.

export class ApiError extends Error {
  constructor(status, message, param) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

const spelled = new Map();

function headers(extra) {
  const key = readKey();
  return key ? { ...extra, authorization: `Bearer ${key}` } : extra;
}

function readKey() {
  try {
    return sessionStorage.getItem("headwater-key");
  } catch {
    return null;
  }
}

export function useKey(key) {
  try {
    sessionStorage.setItem("headwater-key", key);
  } catch { /* without storage the key is asked for again */ }
}

async function check(response) {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  let param = null;
  try {
    const { error } = await response.json();
    message = error.message ?? message;
    param = error.param ?? null;
  } catch { /* not an answer of ours: the status must do */ }
  throw new ApiError(response.status, message, param);
}

export async function get(path, signal) {
  const response = await fetch(path, { headers: headers({}), signal, cache: "no-store" });
  return (await check(response)).json();
}

async function send(path, body, signal) {
  const content = { method: "POST", headers: headers({ "content-type": "application/json" }), body: JSON.stringify(body), signal };
  return check(await fetch(path, content));
}

export const post = async (path, body, signal) => (await send(path, body, signal)).json();

// The JSON events of a stream. Ends at [DONE], throws ApiError where the server reports an error inside.
export async function* stream(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "The connection ended before the answer did.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice(6);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.code ?? 0, chunk.error.message);
      yield chunk;
    }
  }
}

// Texts of single tokens, asked for once each: `bytes:\x..` where a token is no whole character.
export async function spell(ids) {
  const missing = [...new Set(ids)].filter((id) => !spelled.has(id));
  if (missing.length) {
    const answer = await post("detokenize", { tokens: missing, return_token_strs: true });
    missing.forEach((id, index) => spelled.set(id, answer.token_strs[index]));
  }
  return ids.map((id) => spelled.get(id));
}

// Texts of consecutive tokens: a character of several tokens is the text of the last of them.
export function join(spellings) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return spellings.map((text) => decoder.decode(bytesOf(text), { stream: true }));
}

function bytesOf(text) {
  const encoder = new TextEncoder();
  if (!/^bytes:.*\\x[89a-f]/.test(text)) return encoder.encode(text);
  const parts = text.slice(6).split(/\\x([0-9a-f]{2})/);
  return Uint8Array.from(parts.flatMap((part, place) => (place % 2 ? [parseInt(part, 16)] : [...encoder.encode(part)])));
}

export async function encode(text) {
  return (await post("tokenize", { prompt: text, add_special_tokens: false })).tokens;
}

// What this server's routes take: the honoured fields of each request, from its own description.
export async function abilities() {
  const document = await get("openapi.json");
  const fieldsOf = (path) => {
    const content = document.paths?.[path]?.post?.requestBody?.content?.["application/json"]?.schema?.$ref;
    if (!content) return null;
    return new Set(Object.keys(document.components.schemas[content.split("/").pop()]?.properties ?? {}));
  };
  return { completion: fieldsOf("/v1/completions"), chat: fieldsOf("/v1/chat/completions") };
}
