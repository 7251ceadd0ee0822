// A choice of a streamed chunk as tokens, whichever of the two routes it comes from.

// Tokens of a chunk with their candidates; texts come from the chunk. Prompt tokens of an echo come first, marked.
export function tokensOf(choice) {
  const ids = choice.token_ids ?? [];
  const { logprobs } = choice;
  const idOf = (name) => Number(/^token_id:(\d+)$/.exec(name)?.[1] ?? -1);
  let entries = [];
  if (logprobs?.content) {
    entries = logprobs.content.map((one) => ({ id: idOf(one.token), lp: one.logprob, top: one.top_logprobs.map((other) => [idOf(other.token), other.logprob]) }));
  } else if (logprobs?.tokens) {
    entries = logprobs.tokens.map((name, place) => ({ id: idOf(name), lp: logprobs.token_logprobs[place], top: Object.entries(logprobs.top_logprobs[place] ?? {}).map(([other, lp]) => [idOf(other), lp]) }));
  } else {
    entries = ids.map((id) => ({ id, lp: null, top: [] }));
  }
  const numPrompt = Math.max(0, entries.length - (choice.token_ids ? ids.length : entries.length));
  return entries.map((entry, place) => ({ ...entry, t: "", isPrompt: place < numPrompt }));
}
