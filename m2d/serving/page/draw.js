/** The form of an order of images, and the images as they come. */
import { draw, png } from "./api.js";
import { keep } from "./kept.js";
import * as settings from "./settings.js";
import { newTile, showImage, showPreview, showRefusal } from "./tiles.js";
import { alarm, announce, element, find, findAll, say } from "./words.js";

const PREVIEWS = 2;
const form = find("#order");
const sets = find("#sets");
const drops = findAll(".drop");
const files = {}; // reference images by their field
let models = [];

const model = () => models.find(({ id }) => id === form.model.value) ?? models[0];
const mode = () => form.elements.mode.value;
/** Without its extractor a model takes no feature of a reference image, and only its pixels count. */
const seesReferences = () => model().modes.includes("interpolate");
const needed = () => drops.slice(0, { standard: 0, image2image: 1, interpolate: 2 }[mode()]);

export function startDrawing(service, served) {
  models = served;
  settings.addSettings(form, service);
  settings.addModels(form.model, models, find("#models"));
  form.count.max = service.limits.images;
  form.count.value = Math.min(8, service.limits.images);
  form.steps_between.max = service.limits.images - 2;
  drops.forEach(buildDrop);
  document.addEventListener("again", ({ detail }) => useAgain(detail));
  form.model.addEventListener("change", showModel);
  find("#modes").addEventListener("change", showMode);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const missing = needed().find((drop) => !files[drop.dataset.reference]);
    if (missing) {
      alarm(find(".said", missing), { words: "needsReference" });
      find("input", missing).focus();
      return;
    }
    find("#order-trouble").replaceChildren();
    order(readRequest(), Object.fromEntries(needed().map(({ dataset: { reference } }) => [reference, files[reference]])));
  });
  showModel();
}

function showModel() {
  const { classes, modes } = model();
  const chosen = form.elements.class?.value;
  const cards = classes.map((one) => {
    const input = element("input", { type: "radio", name: "class", value: one.code, required: true });
    const names = settings.classNames(one);
    const name = element("span", { class: "name", words: ["setName", { name: names }] });
    return element("label", {}, input, settings.swatch(one.colour), element("b", {}, one.code), name);
  });
  find("#classes").replaceChildren(...cards);
  form.elements.class.value = classes.some(({ code }) => code === chosen) ? chosen : classes[0].code;
  find("option[value=reference]", form.feature).hidden = !seesReferences();
  for (const label of findAll("[data-mode]")) label.hidden = !modes.includes(label.dataset.mode);
  if (!modes.includes(mode())) form.elements.mode.value = modes[0];
  find("#modes").closest("fieldset").hidden = modes.length < 2;
  showMode();
}

function showMode() {
  settings.showOnly(form, mode());
  for (const drop of drops) drop.hidden = !needed().includes(drop);
}

function readRequest() {
  const asked = { class: form.elements.class.value, mode: mode(), ...settings.readSettings(form) };
  if (form.seed.value) asked.seed = settings.readSeed(form.seed.value);
  if (mode() === "interpolate") return { ...asked, steps_between: form.steps_between.valueAsNumber };
  if (mode() === "image2image") asked.strength = form.strength.valueAsNumber;
  if (mode() === "image2image" && !seesReferences()) asked.feature ??= model().has_prior ? "prior" : "none";
  return { ...asked, count: form.count.valueAsNumber, first: form.first.valueAsNumber };
}

/** Fill the form so that it asks for one image again. */
function useAgain({ request, references, row }) {
  find("#order-trouble").replaceChildren();
  const [guidance_low, guidance_high] = request.guidance_interval;
  form.model.value = request.model ?? form.model.value;
  showModel();
  settings.fill(form, { ...request, feature: request.feature ?? "", guidance_low, guidance_high });
  settings.fill(form, { count: 1, first: request.mode === "interpolate" ? 0 : row.index });
  for (const drop of drops) setReference(drop, references[drop.dataset.reference]);
  showMode();
  location.hash = "#draw";
  if (model().sha256 === row.checkpoint) announce("useSeedDone");
  else alarm(find("#order-trouble"), { words: "otherCheckpoint" });
  find("button.main", form).focus();
}

// --- reference images -----------------------------------------------------------------------------------------------

function buildDrop(drop) {
  const name = drop.dataset.reference;
  const input = element("input", { type: "file", accept: "image/*" });
  input.addEventListener("change", () => setReference(drop, input.files[0]));
  const remove = element("button", { type: "button", class: "quiet", words: "removeReference" });
  remove.addEventListener("click", () => {
    setReference(drop, undefined);
    input.focus();
  });
  const picture = element("img", { alt: "" });
  const line = element("span", { class: "file-name" });
  const label = element("label", {}, input, picture, element("b", { words: name }), line);
  drop.replaceChildren(label, remove, element("div", { class: "said" }));
  drop.addEventListener("dragenter", () => drop.classList.add("over"));
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  setReference(drop, undefined);
}

/** An image that is dropped anywhere is a reference: the browser would leave the page to show it. */
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  for (const drop of drops) drop.classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (!file || !models.length) return;
  if (mode() === "standard") form.elements.mode.value = "image2image";
  showMode();
  const empty = needed().find(({ dataset }) => !files[dataset.reference]);
  setReference(event.target.closest(".drop") ?? empty ?? drops[0], file);
});

function setReference(drop, file) {
  const picture = find("img", drop);
  const line = find(".file-name", drop);
  URL.revokeObjectURL(picture.src);
  files[drop.dataset.reference] = file;
  picture.hidden = find("button", drop).hidden = file === undefined;
  find(".said", drop).replaceChildren();
  if (file === undefined) {
    picture.removeAttribute("src");
    find("input", drop).value = "";
    say(line, "dropHere");
  } else {
    picture.src = URL.createObjectURL(file);
    say(line, "fileName", { name: file.name ?? "" });
  }
}

// --- a set of images ------------------------------------------------------------------------------------------------

/** Order images and show them as they come, on top of those that are there. */
async function order(request, references) {
  const card = models.find(({ id }) => id === request.model) ?? model();
  const diagnosis = card.classes.find(({ code }) => code === request.class);
  const name = settings.classNames(diagnosis);
  const total = request.mode === "interpolate" ? request.steps_between + 2 : request.count;
  const stop = new AbortController();

  const seed = element("span", request.seed === undefined ? {} : { words: ["setSeed", { seed: String(request.seed) }] });
  const cancel = element("button", { type: "button", words: "cancel", on: { click: () => stop.abort() } });
  const keepAll = element("button", { type: "button", words: "keepAll", hidden: true });
  const heading = element("h2", { tabindex: "-1", words: ["setHeading", { code: diagnosis.code, name }] });
  heading.prepend(settings.swatch(diagnosis.colour));
  const bar = element("progress", { label: "progressOf", max: 1, value: 0 });
  const state = element("span", { class: "state", words: "setWaiting" });
  const grid = element("div", { class: "grid" });
  const trouble = element("div");
  const set = element(
    "section", { class: "set", "aria-busy": "true" },
    element("div", { class: "heading" }, heading, keepAll, cancel),
    element("p", { class: "facts" }, seed, ...settings.summary(request), state),
    bar, trouble, grid,
  );
  const tiles = Array.from({ length: total }, () => newTile(grid));
  find(".empty", sets)?.remove();
  sets.prepend(set);
  set.scrollIntoView({ block: "nearest" });

  const made = [];
  let refused = 0;
  const again = { ...request };
  const show = (key) => say(state, key, { images: made.length, total });
  try {
    for await (const event of draw({ ...request, partial_images: PREVIEWS }, references, stop.signal)) {
      if (event.event === "started") {
        again.seed = event.seed;
        again.model = card.id;
        Object.assign(card, event.model); // it may have been replaced since the page asked
        say(seed, "setSeed", { seed: String(event.seed) });
        announce("saidStarted", { total });
      } else if (event.event === "progress") {
        bar.max = event.total;
        bar.value = event.done;
        const share = new Intl.NumberFormat("en", { style: "percent" }).format(event.done / event.total);
        say(state, "setProgress", { images: made.length, total, share });
      } else if (event.event === "preview") {
        showPreview(tiles[event.index], png(event.b64_png));
      } else if (event.event === "image") {
        const image = {
          id: event.manifest.sha256, row: event.manifest, blob: png(event.b64_png), request: again, references, diagnosis, gates: null,
          model: { id: card.id, sha256: card.sha256, step: card.step },
        };
        made.push(image);
        made.sort((one, other) => one.row.index - other.row.index); // they come as they are ready
        showImage(tiles[event.index], image, () => made);
        announce("saidProgress", { images: made.length, total }, 1);
      } else if (event.event === "refused") {
        refused += 1;
        showRefusal(tiles[event.index], event.reason);
      } else if (event.event === "done") {
        for (const image of made) image.gates = event.gates;
        say(state, "setDone", { n: made.length });
        if (refused) state.after(element("span", { words: ["setRefused", { n: refused }] }));
        announce("saidDone", { n: made.length });
      }
    }
  } catch (error) {
    for (const tile of tiles.filter((one) => !find(".open", one))) tile.remove();
    if (error.name === "AbortError") {
      show("setCancelled");
      announce("saidCancelled");
    } else {
      show("setFailed");
      showTrouble(trouble, error, () => {
        set.remove();
        order(request, references);
      });
    }
  }
  if (!grid.children.length) grid.remove();
  bar.remove();
  if (cancel === document.activeElement) heading.focus();
  cancel.remove();
  set.setAttribute("aria-busy", "false");
  keepAll.hidden = made.length < 2;
  keepAll.addEventListener("click", async () => {
    for (const image of made) await keep(image);
  });
}

/** The problem, and a button to try again, from when it makes sense to. */
function showTrouble(place, error, retry) {
  const button = element("button", { type: "button", words: "tryAgain", on: { click: retry } });
  if (error.status >= 400 && error.status < 500 && ![401, 429].includes(error.status)) {
    alarm(place, error); // it would fail again
  } else if (error.retryAfter) {
    button.disabled = true;
    setTimeout(() => (button.disabled = false), 1000 * error.retryAfter);
    alarm(place, error, element("p", { words: ["againIn", { n: error.retryAfter }] }), button);
  } else {
    alarm(place, error, button);
  }
}
