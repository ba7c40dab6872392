/** Starts the page: language, theme, views, the key, then what the service has. */
import { Problem, forgetKey, get, onKeyNeeded, storedKey } from "./api.js";
import { startDrawing } from "./draw.js";
import { startJobs } from "./jobs.js";
import { startTray } from "./tray.js";
import { alarm, element, find, findAll, otherLanguage, say, setLanguage } from "./words.js";

const THEMES = ["auto", "light", "dark"];
const trouble = find("#trouble");

// --- language and theme ---------------------------------------------------------------------------------------------

function showTheme(theme) {
  localStorage.setItem("m2d-theme", theme);
  document.documentElement.dataset.theme = theme;
  say(find("#theme"), `theme_${theme}`);
  say(find("#theme"), "theme", { theme: [`theme_${theme}`] }, "label");
}

say(find("#notice"), "notice");
setLanguage();
showTheme(THEMES.find((one) => one === localStorage.getItem("m2d-theme")) ?? "auto");
find("#theme").addEventListener("click", () => {
  showTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
});
const language = find("#language");
const showOther = () => {
  say(language, "language");
  language.lang = otherLanguage() === "zh" ? "zh-Hans" : "en";
};
showOther();
language.addEventListener("click", () => {
  setLanguage(otherLanguage());
  showOther();
});

// --- views ----------------------------------------------------------------------------------------------------------

function showView() {
  const views = findAll("main > section");
  const shown = views.find(({ id }) => `#${id}` === location.hash) ?? views[0];
  for (const view of views) view.hidden = view !== shown;
  for (const link of findAll("nav a")) {
    if (link.hash === `#${shown.id}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

showView();
window.addEventListener("hashchange", showView);

// --- the key --------------------------------------------------------------------------------------------------------

const dialog = find("#key");

onKeyNeeded(
  (refused) =>
    new Promise((resolve) => {
      const input = find("#key-value");
      input.value = "";
      say(find("#key-hint"), refused ? "keyWrong" : "keyHint");
      dialog.returnValue = "";
      dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" ? input.value.trim() : null), { once: true });
      dialog.showModal();
    }),
);

const forget = find("#forget");
const showForget = () => (forget.hidden = storedKey() === null);
document.addEventListener("key", showForget);
forget.addEventListener("click", () => {
  forgetKey();
  location.reload();
});
showForget();

// --- the service ----------------------------------------------------------------------------------------------------

async function start() {
  trouble.replaceChildren(element("p", { class: "empty", words: "loading" }));
  try {
    const service = await get("v1/service");
    say(find("#notice"), "noticeOfService", { notice: service.notice });
    const { data: models } = await get("v1/models");
    if (!models.length) throw new Problem({ words: "notReady", retryAfter: 5 });
    startDrawing(service, models);
    startJobs(service, models);
    document.body.classList.add("started");
    trouble.replaceChildren();
  } catch (error) {
    alarm(trouble, error, element("button", { type: "button", words: "tryAgain", on: { click: start } }));
    if (error.retryAfter) setTimeout(start, 1000 * error.retryAfter);
  }
}

await startTray();
await start();
