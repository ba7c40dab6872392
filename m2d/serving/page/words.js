/** Elements, and words on them that change with the language. */
import { TEXTS } from "./texts.js";

const KEPT = "m2d-language";
const known = (tag) => Object.keys(TEXTS).find((name) => tag?.toLowerCase().split("-")[0] === name);
let language = known(localStorage.getItem(KEPT)) ?? navigator.languages.map(known).find(Boolean) ?? "en";

/** A number as the language writes it, [key, values] as those words, {en, zh} as the word of the language. */
function here(value) {
  if (typeof value === "number") return new Intl.NumberFormat(language, { maximumFractionDigits: 2 }).format(value);
  if (Array.isArray(value)) return words(...value);
  return value !== null && typeof value === "object" ? value[language] : value;
}

export function words(key, values = {}) {
  const said = TEXTS[language][key];
  if (typeof said !== "function") return said;
  return said(Object.fromEntries(Object.entries(values).map(([name, value]) => [name, here(value)])));
}

export const time = (unix) =>
  new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" }).format(new Date(unix * 1000));

/** Where words go: data-words is the node's text, data-label its aria-label, and so on. */
const PLACES = { words: "textContent", label: "ariaLabel", title: "title", placeholder: "placeholder", alt: "alt" };

function write(node, place) {
  const [key, values] = node.dataset[place].startsWith("[") ? JSON.parse(node.dataset[place]) : [node.dataset[place]];
  node[PLACES[place]] = words(key, values);
}

/** Say words on a node, in the language of now and in whichever comes after. */
export function say(node, key, values = {}, place = "words") {
  node.dataset[place] = JSON.stringify([key, values]);
  write(node, place);
}

export function translate(root = document) {
  for (const place of Object.keys(PLACES)) {
    for (const node of root.querySelectorAll(`[data-${place}]`)) write(node, place);
  }
}

export function setLanguage(next = language) {
  language = next;
  localStorage.setItem(KEPT, language);
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  document.title = `M2D · ${words("title")}`;
  translate();
  document.dispatchEvent(new Event("language"));
}

export const otherLanguage = () => (language === "en" ? "zh" : "en");

/** An element. words, label, alt: a key or [key, values]; on: listeners; the others are attributes. */
export function element(tag, { on = {}, ...given } = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (name in PLACES) say(node, ...[value].flat(), ...(Array.isArray(value) && value[1] ? [] : [{}]), name);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const [event, listener] of Object.entries(on)) node.addEventListener(event, listener);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const find = (selector, root = document) => root.querySelector(selector);
export const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];

/** Said to a screen reader once it has said what it is at; at most one in `every` ms, the last one always. */
let nextAt = 0;
let waiting;
export function announce(key, values = {}, every = 0) {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    nextAt = Date.now() + 4000;
    say(find("#status"), key, values);
  }, every ? Math.max(0, nextAt - Date.now()) : 0);
}

/** An error for people to read, in place of what the node held. */
export function alarm(place, error, ...more) {
  const alert = element("div", { class: "alert", role: "alert" });
  if (error.words) alert.append(element("p", { words: error.words }));
  if (error.title) alert.append(element("p", { words: ["problem", { status: String(error.status), title: error.title }] }));
  if (error.detail) alert.append(element("p", { lang: "en" }, error.detail));
  if (!alert.children.length) alert.append(element("p", { lang: "en" }, String(error)));
  alert.append(...more);
  place.replaceChildren(alert);
  alert.scrollIntoView({ block: "nearest" });
}
