/** Large orders: the form, and what becomes of each. */
import { call, download, get, serialize } from "./api.js";
import * as settings from "./settings.js";
import { newTile, showImage } from "./tiles.js";
import { alarm, announce, element, find, findAll, say, time } from "./words.js";

const POLL_MS = 2000;
const PAGE = 24; // images of a job shown at once
const HAVE = "m2d-have";
const form = find("#job");
const list = find("#job-list");
const body = find("#counts tbody");
const cards = new Map(); // id -> what shows the job
let models = [];
let idempotency = null; // of an order whose answer has not come

const model = () => models.find(({ id }) => id === form.model.value) ?? models[0];
const target = () => form.elements.target.value;
const isOver = ({ state }) => !["queued", "running"].includes(state);

export function startJobs(service, served) {
  models = served;
  settings.addSettings(form, service);
  settings.addModels(form.model, models, find("#job-models"));
  form.model.addEventListener("change", showClasses);
  form.addEventListener("input", () => {
    idempotency = null;
    showCounts();
  });
  find("#folder").addEventListener("change", (event) => countFolder(event.target.files));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    order();
  });
  showClasses();
  poll();
}

// --- the form -------------------------------------------------------------------------------------------------------

function showClasses() {
  const have = JSON.parse(localStorage.getItem(HAVE) ?? "{}");
  body.replaceChildren(
    ...model().classes.map((one) => {
      const names = settings.classNames(one);
      const input = element("input", {
        type: "number", name: `have-${one.code}`, min: 0, step: 1, value: have[one.code] ?? 0, required: true,
        label: ["haveOf", { name: names }],
      });
      input.dataset.code = one.code;
      const name = element("span", { class: "name", words: ["setName", { name: names }] });
      const head = element("th", { scope: "row" }, settings.swatch(one.colour), element("b", {}, one.code), " ", name);
      return element("tr", {}, head, element("td", {}, input), element("td", { "data-only": "max number" }));
    }),
  );
  showCounts();
}

const readHave = () =>
  Object.fromEntries(findAll("input", body).map((input) => [input.dataset.code, input.valueAsNumber || 0]));

/** What will be made of each class: what the service itself will answer. */
function showCounts() {
  settings.showOnly(form, target());
  say(find("#have-heading"), target() === "counts" ? "makeHeading" : "youHave");
  const have = readHave();
  localStorage.setItem(HAVE, JSON.stringify(have));
  const goal = target() === "max" ? Math.max(...Object.values(have)) : find("#to").valueAsNumber || 0;
  let made = 0;
  for (const [row, count] of findAll("tr", body).map((one, place) => [one, Object.values(have)[place]])) {
    const missing = target() === "counts" ? count : Math.max(0, goal - count);
    row.lastChild.textContent = missing;
    made += missing;
  }
  const sum = Object.values(have).reduce((a, b) => a + b, 0);
  const [, first, second] = find("#counts tfoot tr").children;
  first.textContent = sum;
  second.textContent = made;
  return made;
}

/** Count the images of each class's folder, as `generate --mode balance` would; nothing is sent. */
function countFolder(files) {
  const counts = Object.fromEntries(model().classes.map(({ code }) => [code, 0]));
  const codes = new Map(model().classes.map(({ code }) => [code.toLowerCase(), code]));
  const images = [...files].filter(({ type }) => type.startsWith("image/"));
  for (const { webkitRelativePath: path } of images) {
    const code = path.toLowerCase().split("/").slice(0, -1).map((folder) => codes.get(folder)).findLast(Boolean);
    if (code) counts[code] += 1;
  }
  for (const input of findAll("input", body)) input.value = counts[input.dataset.code];
  const n = Object.values(counts).reduce((a, b) => a + b, 0);
  say(find(".from-folder .hint"), "counted", { n, files: images.length });
  form.dispatchEvent(new Event("input"));
}

async function order() {
  const trouble = find("#job-trouble");
  trouble.replaceChildren();
  if (showCounts() === 0) {
    alarm(trouble, { words: "nothingToMake" });
    return;
  }
  const have = readHave();
  const wanted = Object.entries(have).filter(([, count]) => count);
  const request = {
    ...(target() === "counts"
      ? { counts: Object.fromEntries(wanted) }
      : { balance: { have, to: target() === "max" ? "max" : form.to.value } }),
    seed: settings.readSeed(form.seed.value),
    ...settings.readSettings(form),
  };
  // The same order again, after an answer that was lost, is the same job.
  idempotency ??= Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const button = find("button.main", form);
  button.disabled = true;
  try {
    const headers = { "Content-Type": "application/json", "Idempotency-Key": idempotency };
    const job = await (await call("v1/jobs", { method: "POST", headers, body: serialize(request) })).json();
    idempotency = null;
    announce("saidOrdered", { total: job.total });
    show(job);
    poll();
  } catch (error) {
    const again = error.retryAfter ? element("p", { words: ["againIn", { n: error.retryAfter }] }) : "";
    alarm(trouble, error, again);
  }
  button.disabled = false;
}

// --- jobs -----------------------------------------------------------------------------------------------------------

let timer;
/** Ask how the jobs are, again and again while one is not over and somebody may look. */
async function poll() {
  clearTimeout(timer);
  let wait = POLL_MS;
  try {
    const { data } = await get("v1/jobs");
    for (const job of data.toReversed()) show(job);
    if (data.every(isOver)) return;
  } catch (error) {
    wait = Math.max(5000, 1000 * (error.retryAfter ?? 0));
    if (error.status === 401) return;
  }
  timer = setTimeout(() => (document.hidden ? document.addEventListener("visibilitychange", poll, { once: true }) : poll()), wait);
}

function duration(seconds) {
  if (seconds < 90) return ["seconds", { n: Math.ceil(seconds) }];
  if (seconds < 5400) return ["minutes", { n: Math.round(seconds / 60) }];
  return ["hours", { n: Math.round(seconds / 360) / 10 }];
}

function show(job) {
  const card = cards.get(job.id) ?? newCard(job);
  const before = card.job;
  card.job = job;
  say(card.state, `state_${job.state}`);
  card.state.dataset.state = job.state;
  card.bar.max = job.total;
  card.bar.value = job.done;
  say(card.done, "jobDone", { done: job.done, total: job.total });
  card.bar.hidden = isOver(job);
  card.cancel.hidden = isOver(job);
  card.tar.hidden = card.look.hidden = !job.done;
  card.rate.hidden = !job.images_per_second;
  say(card.rate, "jobRate", { rate: job.images_per_second ?? 0 });
  card.left.hidden = isOver(job) || job.seconds_left === null;
  say(card.left, "jobLeft", { left: duration(job.seconds_left ?? 0) });
  card.detail.hidden = !job.detail;
  card.detail.textContent = job.detail ?? "";
  if (before && isOver(job) && !isOver(before)) {
    announce("saidJob", { state: [`state_${job.state}`], total: job.total });
  }
}

function newCard(job) {
  const { classes } = models.find(({ id }) => id === job.model) ?? model();
  const counts = Object.entries(job.counts).map(([code, count]) => {
    const one = classes.find((known) => known.code === code);
    return element("span", {}, ...(one ? [settings.swatch(one.colour)] : []), element("b", {}, code), ` ${count}`);
  });
  const card = {
    job: null,
    state: element("span", { class: "state" }),
    bar: element("progress", { label: "progressOf", value: 0 }),
    done: element("span"),
    rate: element("span"),
    left: element("span"),
    detail: element("p", { class: "detail", lang: "en" }),
    trouble: element("div"),
    cancel: element("button", { type: "button", words: "cancel" }),
    tar: element("button", { type: "button", words: "downloadTar" }),
    look: element("details", {}, element("summary", { words: "showImages" })),
  };
  const created = element("time", { datetime: new Date(job.created * 1000).toISOString() }, time(job.created));
  document.addEventListener("language", () => (created.textContent = time(job.created)));
  const heading = element("h2", { tabindex: "-1", words: ["jobTotal", { total: job.total }] });
  const node = element(
    "article", { class: "set" },
    element("div", { class: "heading" }, heading, card.state, card.tar, card.cancel),
    element("p", { class: "facts" }, created, element("span", {}, job.model), card.done, card.rate, card.left),
    element("p", { class: "facts counts" }, ...counts),
    card.bar, card.detail, card.trouble, card.look,
  );
  card.cancel.addEventListener("click", () =>
    attempt(card, card.cancel, async () => {
      show(await (await call(`v1/jobs/${job.id}`, { method: "DELETE" })).json());
      heading.focus();
    }),
  );
  card.tar.addEventListener("click", () =>
    attempt(card, card.tar, () => download(`v1/jobs/${job.id}/archive`, `m2d-job-${job.id.slice(0, 8)}.tar`)),
  );
  addImages(card, job, classes);
  find(".empty", list)?.remove();
  list.prepend(node);
  cards.set(job.id, card);
  return card;
}

/** The images of a job, a page at a time. */
function addImages(card, job, classes) {
  const grid = element("div", { class: "grid" });
  const more = element("button", { type: "button", words: "moreImages" });
  card.look.append(grid, more);
  const images = [];
  const { sha256 } = job;
  const step = models.find((one) => one.sha256 === sha256)?.step ?? null;
  const load = () =>
    attempt(card, more, async () => {
      const { data, next } = await get(`v1/jobs/${job.id}/images?first=${images.length}&count=${PAGE}`);
      const shown = new Set(images.map(({ row }) => row.id)); // a running job's come in between
      for (const { url, ...row } of data.filter(({ id }) => !shown.has(id))) {
        const blob = await (await call(url)).blob();
        const interval = [row.guidance_low, row.guidance_high];
        const { mode, solver, steps, guidance_scale, feature, feature_temperature } = row;
        const asked = { mode, solver, steps, guidance_scale, guidance_interval: interval, feature };
        const request = { class: row.class, model: job.model, seed: job.request.seed ?? 0, ...asked };
        if (feature_temperature !== null) request.feature_temperature = feature_temperature;
        images.push({
          id: row.sha256, row, blob, request, references: {}, gates: null,
          diagnosis: classes.find(({ code }) => code === row.class), model: { id: job.model, sha256, step },
        });
        showImage(newTile(grid), images.at(-1), () => images);
      }
      more.hidden = next === null && isOver(card.job);
    });
  more.addEventListener("click", load);
  card.look.addEventListener("toggle", () => {
    if (!card.look.open) return;
    images.length = 0;
    grid.replaceChildren();
    load();
  });
}

/** Do what a button is for; the problem, if any, is said on the job. */
async function attempt(card, button, action) {
  button.disabled = true;
  card.trouble.replaceChildren();
  try {
    await action();
  } catch (error) {
    if (error.name !== "AbortError") alarm(card.trouble, error);
  }
  button.disabled = false;
}
