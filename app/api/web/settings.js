// The boxes of the settings: drawn, filled, read, and kept for the next visit.

import { element } from "./answer.js";
import { FIELDS, meaning, valueOf } from "./fields.js";
import { language, t } from "./i18n.js";
import { store } from "./store.js";

const byId = (id) => document.getElementById(id);

export function drawFields() {
  for (const field of FIELDS) {
    const box = element("div", `field ${field.kind}`);
    const label = element("label");
    const control = element(["lines", "json"].includes(field.kind) ? "textarea" : "input");
    control.id = `f-${field.name}`;
    label.htmlFor = control.id;
    const code = element("code");
    code.append(...field.name.split(/(?<=_)/).flatMap((part) => [part, element("wbr")]));
    label.append(code, element("small"));
    if (field.kind === "number") {
      control.type = "number";
      control.step = "any";
      for (const name of ["min", "max"]) if (field[name] !== undefined) control[name] = field[name];
    } else if (field.kind === "flag") {
      control.type = "checkbox";
    } else {
      control.spellcheck = false;
      if (control.rows) control.rows = 2;
    }
    box.append(label, control);
    byId(field.first ? "fields" : "more-fields").append(box);
    control.addEventListener("input", changed);
  }
  setFields(JSON.parse(store.read("settings") ?? "{}"));
}

export function setFields(values) {
  for (const field of FIELDS) {
    const control = byId(`f-${field.name}`);
    const value = values[field.name] ?? field.initial;
    if (field.kind === "flag") control.checked = Boolean(value);
    else control.value = value ?? "";
  }
  changed();
}

export function changed() {
  const values = {};
  for (const field of FIELDS) {
    const control = byId(`f-${field.name}`);
    const value = field.kind === "flag" ? control.checked : control.value;
    const initial = field.kind === "flag" ? Boolean(field.initial) : (field.initial ?? "");
    if (value !== initial) values[field.name] = value;
    control.setAttribute("aria-invalid", String(!isValid(field, control)));
  }
  store.write("settings", JSON.stringify(values));
  const count = Object.keys(values).length;
  byId("changed").textContent = count ? t("changed", count) : "";
}

function isValid(field, control) {
  try {
    valueOf(field, control);
    return true;
  } catch {
    return false;
  }
}

// Show the boxes of what the server takes.
export function showFields(isTaken) {
  for (const field of FIELDS) byId(`f-${field.name}`).closest(".field").hidden = !isTaken(field);
}

export function translateFields() {
  for (const field of FIELDS) byId(`f-${field.name}`).previousElementSibling.lastElementChild.textContent = meaning(field.name, language());
}

// What is set, as fields of a request. Throws Invalid.
export function settings(forMode) {
  const body = {};
  for (const field of FIELDS) {
    const control = byId(`f-${field.name}`);
    if (!control || control.closest(".field").hidden) continue;
    const value = valueOf(field, control);
    if (value !== undefined) body[field.name] = value;
  }
  if (forMode === "chat") {
    delete body.echo;
    if (body.logprobs !== undefined) [body.logprobs, body.top_logprobs] = [true, body.logprobs];
  }
  return body;
}
