/** The view of what is kept, and its download. */
import { save, serialize } from "./api.js";
import { allKept, keep, lasts, readKept } from "./kept.js";
import { newTile, showImage } from "./tiles.js";
import { announce, find, findAll, say, words } from "./words.js";
import { zip } from "./zip.js";

const grid = find("#tray-images");

export async function startTray() {
  find("#download").addEventListener("click", download);
  find("#clear").addEventListener("click", async () => {
    if (!confirm(words("clearSure", { n: allKept().length }))) return;
    for (const image of allKept()) await keep(image, false);
  });
  await readKept();
  show();
  document.addEventListener("kept", () => {
    show();
    announce("saidKept", { n: allKept().length }, 500);
  });
}

function show() {
  const all = allKept();
  const ids = new Set(all.map(({ id }) => id));
  find("#kept").textContent = all.length || "";
  say(find("#tray-hint"), all.length ? (lasts() ? "trayHint" : "trayMemory") : "trayEmpty");
  find("#download").hidden = find("#clear").hidden = !all.length;
  const tiles = findAll(".tile", grid);
  for (const tile of tiles.filter(({ dataset }) => !ids.has(dataset.image))) {
    const next = tile.nextElementSibling ?? tile.previousElementSibling;
    if (tile.contains(document.activeElement)) (next ? find(".keep", next) : find("#tray-heading")).focus();
    tile.remove();
  }
  const shown = new Set(tiles.map(({ dataset }) => dataset.image));
  for (const image of all.filter(({ id }) => !shown.has(id))) showImage(newTile(grid), image, allKept);
}

/** A zip of CLASS/ID_HASH.png, for ids repeat with each seed, and manifest.json, whose rows are the service's. */
async function download() {
  const path = ({ row }) => `${row.class}/${row.id}_${row.sha256.slice(0, 8)}.png`;
  const rows = allKept().map((image) => ({
    ...image.row, path: path(image), model: image.model, gates_at_work: image.gates, request: image.request,
  }));
  const manifest = { synthetic: true, notice: find("#notice").textContent, images: rows };
  const text = new Blob([serialize(manifest, 2)], { type: "application/json" });
  save(await zip([["manifest.json", text], ...allKept().map((image) => [path(image), image.blob])]), "m2d-tray.zip");
}
