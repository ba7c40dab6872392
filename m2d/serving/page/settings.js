/** What both forms have: the model, and how noise becomes an image. */
import { element, find, findAll, translate } from "./words.js";

/** Put the template's fields into a form. */
export function addSettings(form, { defaults, solvers, limits }) {
  find(".settings", form).replaceWith(find("#settings").content.cloneNode(true));
  for (const label of findAll("[data-for]", form)) {
    const field = form.elements[label.dataset.for];
    field.id ||= `${form.id}-${field.name}`;
    label.htmlFor = field.id;
  }
  translate(form);
  form.solver.append(...solvers.map((one) => element("option", { value: one }, one)));
  form.steps.max = limits.steps;
  const [low, high] = defaults.guidance_interval;
  fill(form, { ...defaults, guidance_low: low, guidance_high: high });
  showRanges(form);
  form.addEventListener("input", () => showRanges(form));
  // A field that is hidden in closed details cannot be pointed at by the browser.
  form.addEventListener("invalid", (event) => event.target.closest("details")?.setAttribute("open", ""), true);
}

export function fill(form, values) {
  for (const [name, value] of Object.entries(values)) {
    if (form.elements[name] !== undefined && value !== null && value !== undefined) form.elements[name].value = value;
  }
  form.dispatchEvent(new Event("input"));
}

function showRanges(form) {
  for (const range of findAll("input[type=range]", form)) {
    const value = find(".value", range.labels[0]);
    value.textContent = new Intl.NumberFormat("en", { maximumFractionDigits: 2 }).format(range.valueAsNumber);
  }
}

/** The settings of the template's fields, as the API has them. */
export function readSettings(form) {
  return {
    ...(form.model.value && { model: form.model.value }),
    solver: form.solver.value,
    steps: form.steps.valueAsNumber,
    guidance_scale: form.guidance_scale.valueAsNumber,
    guidance_interval: [form.guidance_low.valueAsNumber, form.guidance_high.valueAsNumber],
    feature_temperature: form.feature_temperature.valueAsNumber,
    ...(form.feature.value && { feature: form.feature.value }),
  };
}

/** A number if it is exact as one. */
export const readSeed = (text) => (Number.isSafeInteger(Number(text)) ? Number(text) : BigInt(text));

export function addModels(select, models, box) {
  const option = ({ id, image_size: size, step }) =>
    element("option", { value: id, words: ["modelOption", { name: id, size: String(size), step: String(step) }] });
  select.replaceChildren(...models.map(option));
  box.hidden = models.length < 2;
}

/** Show the parts of a form that belong to a choice. Fields that are hidden are not checked and not sent. */
export function showOnly(form, choice) {
  for (const part of findAll("[data-only]", form)) {
    part.hidden = !part.dataset.only.split(" ").includes(choice);
    for (const field of findAll("input, select", part)) field.disabled = part.hidden;
  }
}

export const classNames = ({ name, chinese_name }) => ({ en: name, zh: chinese_name });

/** A class's colour; it may be black or white, so it has an edge of its own. */
export function swatch(colour) {
  const node = element("span", { class: "swatch", "aria-hidden": "true" });
  node.style.backgroundColor = colour;
  return node;
}

export function summary(request) {
  const { guidance_scale: guidance, steps, solver } = request;
  const parts = [element("span", { words: ["setSettings", { guidance, steps, solver }] })];
  if (request.mode !== "standard") parts.unshift(element("span", { words: request.mode }));
  if (request.mode === "image2image") {
    parts.push(element("span", { words: ["setStrength", { strength: request.strength }] }));
  }
  return parts;
}

