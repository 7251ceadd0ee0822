// Answers as a tree. A node is one stream of tokens: a root (a new prompt), a turn (the next message of a chat), or a
// fork (goes on from token number `at` of its parent's path). Plain data; a file holds exactly this.

const FORMAT = "headwater-branches";

export class Tree {
  constructor() {
    this.nodes = new Map();
    this.nextId = 1;
  }

  add(fields) {
    const node = {
      id: this.nextId++, parent: null, at: 0, kind: "root", mode: "completion", prompt: "", messages: [], promptIds: null,
      promptTokens: [], tokens: [], marks: [], finish: null, usage: null, seed: null, ttft: null, speed: null, ...fields,
    };
    this.nodes.set(node.id, node);
    return node;
  }

  remove(node) {
    for (const child of this.children(node)) this.remove(child);
    this.nodes.delete(node.id);
  }

  children(node) {
    return [...this.nodes.values()].filter((other) => other.parent === (node ? node.id : null));
  }

  // The node whose prompt this one goes on from.
  head(node) {
    let head = node;
    while (head.kind === "fork") head = this.nodes.get(head.parent);
    return head;
  }

  // All tokens of the answer, from the prompt on.
  path(node) {
    if (node.kind !== "fork") return node.tokens;
    return [...this.path(this.nodes.get(node.parent)).slice(0, node.at), ...node.tokens];
  }

  // Hand-overs along the path, by token index.
  marks(node) {
    if (node.kind !== "fork") return node.marks;
    const inherited = this.marks(this.nodes.get(node.parent)).filter((mark) => mark.at < node.at);
    return [...inherited, ...node.marks.map((mark) => ({ ...mark, at: mark.at + node.at }))];
  }

  // Where a fork at token `index` of this node's path belongs.
  owner(node, index) {
    let owner = node;
    const isAbove = () => index < owner.at || (index === owner.at && owner.tokens[0]?.picked);
    while (owner.kind === "fork" && isAbove()) owner = this.nodes.get(owner.parent);
    return owner;
  }

  text(node) {
    return this.path(node).map((token) => token.t).join("");
  }

  toFile(model) {
    return JSON.stringify({ format: FORMAT, version: 1, model, nodes: [...this.nodes.values()] });
  }

  // Replace everything by a file's content. Throws where it is no such file; nothing is changed then.
  fromFile(text) {
    const file = JSON.parse(text);
    if (file?.format !== FORMAT || file.version !== 1 || !Array.isArray(file.nodes)) throw new Error("not a tree");
    const tree = new Tree();
    for (const raw of file.nodes) {
      const node = tree.add(readNode(raw));
      const parent = node.parent === null ? null : tree.nodes.get(node.parent);
      if (parent === undefined || (node.kind === "fork" && parent === null)) throw new Error("a branch without a parent");
    }
    this.nodes = tree.nodes;
    this.nextId = 1 + Math.max(0, ...this.nodes.keys());
  }
}

const isNumber = (value) => Number.isFinite(value);
const numberOr = (value, otherwise) => (isNumber(value) ? value : otherwise);
const textOr = (value, otherwise) => (typeof value === "string" ? value : otherwise);
const listOf = (value, read) => (Array.isArray(value) ? value.map(read) : []);

function readNode(raw) {
  if (!Number.isInteger(raw?.id) || raw.id < 1) throw new Error("a branch without a number");
  return {
    id: raw.id,
    parent: Number.isInteger(raw.parent) && raw.parent < raw.id ? raw.parent : null,
    at: numberOr(raw.at, 0),
    kind: ["root", "turn", "fork"].includes(raw.kind) ? raw.kind : "root",
    mode: raw.mode === "chat" ? "chat" : "completion",
    prompt: textOr(raw.prompt, ""),
    messages: listOf(raw.messages, (one) => ({ role: textOr(one?.role, "user"), content: textOr(one?.content, "") })),
    promptIds: Array.isArray(raw.promptIds) ? raw.promptIds.filter(Number.isInteger) : null,
    promptTokens: listOf(raw.promptTokens, readToken),
    tokens: listOf(raw.tokens, readToken),
    marks: listOf(raw.marks, (one) => ({ at: numberOr(one?.at, 0), generation: numberOr(one?.generation, 0), seconds: numberOr(one?.seconds, null) })),
    finish: textOr(raw.finish, null),
    usage: isNumber(raw.usage?.prompt) ? { prompt: raw.usage.prompt, cached: numberOr(raw.usage.cached, 0) } : null,
    seed: numberOr(raw.seed, null),
    ttft: numberOr(raw.ttft, null),
    speed: numberOr(raw.speed, null),
  };
}

function readToken(raw) {
  const top = listOf(raw?.top, (one) => [numberOr(one?.[0], -1), numberOr(one?.[1], -9999)]);
  const token = { id: numberOr(raw?.id, -1), t: textOr(raw?.t, ""), lp: numberOr(raw?.lp, null), top };
  return raw?.picked ? { ...token, picked: true } : token;
}
