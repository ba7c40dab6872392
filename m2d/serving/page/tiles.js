/** Images in a grid. */
import { keeper } from "./kept.js";
import { openPicture } from "./picture.js";
import { classNames } from "./settings.js";
import { element, find } from "./words.js";

export function newTile(grid) {
  return grid.appendChild(element("div", { class: "tile" }, element("div", { class: "blank" })));
}

export function picture(blob, alt, more = {}) {
  const image = element("img", { alt, ...more });
  image.src = URL.createObjectURL(blob);
  image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
  return image;
}

export function showPreview(tile, blob) {
  if (!find(".open", tile)) tile.replaceChildren(element("div", { class: "preview" }, picture(blob, "tilePreview")));
}

export function showRefusal(tile, reason) {
  tile.replaceChildren(element("p", { class: "blank", words: ["tileRefused", { reason }] }));
}

/** An image that opens, with those that `among` gives as its neighbours, and a switch by which it is kept. */
export function showImage(tile, image, among) {
  const { row, diagnosis } = image;
  const alt = ["openImage", { id: row.id, name: classNames(diagnosis) }];
  const open = element("button", { type: "button", class: "open" }, picture(image.blob, alt));
  open.addEventListener("click", () => openPicture(image, among));
  tile.dataset.image = image.id;
  tile.replaceChildren(open, element("div", { class: "caption" }, element("span", {}, row.id), keeper(image)));
}
