/** Images that are kept: in this browser's IndexedDB, or in memory where it has none. Says so by the event "kept". */
import { element, findAll } from "./words.js";

const kept = new Map(); // id -> image, in the order in which they were kept
let database = null;

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
const store = (mode) => database.transaction("tray", mode).objectStore("tray");

/** Whether what is kept outlives the page. */
export const lasts = () => database !== null;
export const allKept = () => [...kept.values()];
const isKept = (image) => kept.has(image.id);

export async function readKept() {
  try {
    const opening = indexedDB.open("m2d", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("tray", { autoIncrement: true });
    database = await done(opening);
    const images = store("readonly");
    const [keys, values] = await Promise.all([done(images.getAllKeys()), done(images.getAll())]);
    values.forEach((image, place) => kept.set(image.id, { ...image, key: keys[place] }));
  } catch {
    database = null;
  }
  tell();
}

/** Keep an image, or let it go. */
export async function keep(image, wanted = true) {
  if (wanted === isKept(image)) return;
  if (wanted) {
    kept.set(image.id, image);
    const { key: _, ...plain } = image;
    if (lasts()) kept.set(image.id, { ...image, key: await done(store("readwrite").add(plain)) });
  } else {
    const { key } = kept.get(image.id);
    kept.delete(image.id);
    if (lasts()) await done(store("readwrite").delete(key));
  }
  tell();
}

/** A switch by which an image is kept. */
export function keeper(image, ...content) {
  const label = ["keepImage", { id: image.row.id }];
  const button = element("button", { type: "button", class: "keep", label }, ...content);
  button.dataset.image = image.id;
  button.setAttribute("aria-pressed", isKept(image));
  button.addEventListener("click", () => keep(image, !isKept(image)));
  return button;
}

function tell() {
  for (const button of findAll(".keep")) button.setAttribute("aria-pressed", kept.has(button.dataset.image));
  document.dispatchEvent(new Event("kept"));
}
