// The tree of answers as a list of buttons.

import { element } from "./answer.js";
import { t } from "./i18n.js";

const byId = (id) => document.getElementById(id);

// `page` tells what is shown and whether something runs; its `visit` and `remove` are called with a node.
export function drawBranches(tree, page) {
  const list = branchList(tree, null, page);
  byId("tree").replaceChildren(list ?? element("p", "empty", t("noBranches")));
  byId("save").disabled = !tree.nodes.size || page.isRunning;
  byId("branch-count").hidden = !tree.nodes.size;
  byId("branch-count").textContent = tree.nodes.size;
}

function branchList(tree, parent, page) {
  const nodes = tree.children(parent);
  if (!nodes.length) return null;
  const list = element("ul");
  if (!parent) nodes.reverse();
  for (const node of nodes) {
    const item = element("li");
    const row = element("div", "branch");
    const button = element("button", node === page.active ? "open" : "");
    button.type = "button";
    if (node === page.active) button.setAttribute("aria-current", "true");
    const [lead, rest] = labelOf(node);
    button.append(element("b", `kind-${node.kind}`, lead), element("span", "rest", rest));
    button.append(element("small", "", t("nTokens", node.tokens.length) + (node.usage?.cached ? ` · ${t("cachedShort", node.usage.cached)}` : "")));
    button.addEventListener("click", () => page.visit(node));
    const cross = element("button", "remove", "×");
    cross.type = "button";
    cross.setAttribute("aria-label", t("remove"));
    cross.disabled = page.isRunning;
    cross.addEventListener("click", () => page.remove(node));
    row.append(button, cross);
    item.append(row);
    const below = branchList(tree, node, page);
    if (below) item.append(below);
    list.append(item);
  }
  return list;
}

function labelOf(node) {
  const text = (from) => node.tokens.slice(from, from + 40).map((token) => token.t).join("").replace(/\s+/g, " ");
  if (node.kind !== "fork") return [node.prompt.replace(/\s+/g, " ").slice(0, 80), text(0)];
  const picked = node.tokens.filter((token) => token.picked);
  return [picked.map((token) => token.t || token.s || "").join("").replace(/\s+/g, " ") || "…", text(picked.length)];
}
