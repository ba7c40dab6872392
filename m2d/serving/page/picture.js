/** One image in a dialog, with where it comes from. */
import { save, serialize } from "./api.js";
import { keeper } from "./kept.js";
import * as settings from "./settings.js";
import { element, find, say, time } from "./words.js";

const dialog = find("#picture");
let shown = null;
let neighbours = () => [];

dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && event.target.tagName !== "PRE") move(step);
});
document.addEventListener("language", () => dialog.open && build());

/** among: gives the image and its neighbours, of which more may come. "Use this seed again" is the event "again", with the image as its detail. */
export function openPicture(image, among) {
  shown = image;
  neighbours = among;
  build();
  dialog.showModal();
}

function move(step) {
  const all = neighbours();
  const next = all[all.findIndex(({ id }) => id === shown.id) + step];
  if (!next) return;
  shown = next;
  build();
  find(`.${step < 0 ? "previous" : "next"}:enabled, .close`, dialog).focus();
}

function fact(label, value) {
  const description = element("dd");
  if (Array.isArray(value)) say(description, ...value);
  else description.append(value);
  return [element("dt", { words: label }), description];
}

function gates({ gates: order, row }) {
  if (row.gates === "off" || order?.at_work.length === 0) return ["gatesNone"];
  const named = order ? order.at_work.join(", ") : [`gate_${row.gates}`];
  return ["gatesAtWork", { gates: named, copies: order?.near_copy === false ? ["nearCopyOff"] : "" }];
}

function build() {
  const { row, blob, diagnosis, model, request } = shown;
  const all = neighbours();
  const place = all.findIndex(({ id }) => id === shown.id);
  const name = settings.classNames(diagnosis);
  const close = element("button", { type: "button", class: "quiet close", words: "close", on: { click: () => dialog.close() } });
  const heading = element("h2", { id: "picture-heading", words: ["setHeading", { code: row.class, name }] });
  heading.prepend(settings.swatch(diagnosis.colour));

  const image = element("img", { alt: ["openImage", { id: row.id, name }], width: row.width, height: row.height });
  image.src = URL.createObjectURL(blob);
  image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });

  const turn = (key, step, there) =>
    element("button", { type: "button", class: `quiet ${key}`, words: key, disabled: !there, on: { click: () => move(step) } });
  const turns = [turn("previous", -1, place > 0), turn("next", 1, place + 1 < all.length)];
  const again = element("button", {
    type: "button", class: "main", words: "useSeed",
    on: {
      click: () => {
        dialog.close();
        document.dispatchEvent(new CustomEvent("again", { detail: shown }));
      },
    },
  });
  const keeping = keeper(shown, element("span", { words: "keep" }));
  const png = element("button", {
    type: "button", words: "downloadPng",
    on: { click: () => save(blob, `${row.id}_${shown.id.slice(0, 8)}.png`) },
  });

  const facts = element(
    "dl", {},
    ...fact("seed", String(request.seed)),
    ...fact("imageNumber", String(row.index)),
    ...fact("imageSeed", String(row.seed)),
    ...fact("mode", [row.mode]),
    ...(row.strength === null ? [] : fact("strength", String(row.strength))),
    ...(row.position === null ? [] : fact("position", String(Math.round(100 * row.position) / 100))),
    ...fact("guidedSteps", ["guidedValue", { scale: row.guidance_scale, low: row.guidance_low, high: row.guidance_high }]),
    ...fact("steps", ["stepsValue", { steps: row.steps, solver: row.solver }]),
    ...fact("feature", [`feature_${row.feature}`]),
    ...fact("gates", gates(shown)),
    ...fact("from_model", ["stepValue", { name: model.id, step: String(model.step) }]),
    ...fact("checkpoint", element("code", {}, row.checkpoint)),
    ...fact("sha256", element("code", {}, row.sha256)),
    ...fact("created", time(Date.parse(row.created) / 1000)),
  );
  const manifest = element(
    "details", {},
    element("summary", { words: "manifest" }),
    element("pre", { tabindex: "0" }, serialize(row, 1)),
  );
  dialog.replaceChildren(
    element("div", { class: "heading" }, heading, ...turns, close),
    element(
      "div", { class: "picture" },
      element("figure", {}, image, element("figcaption", {}, row.id, " · ", find("#notice").textContent)),
      element("div", {}, element("div", { class: "buttons" }, again, keeping, png), facts, manifest),
    ),
  );
}
