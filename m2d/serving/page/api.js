/** The HTTP API: requests with the key where one is asked for, problems as errors, streams line by line. */

const KEY = "m2d-key";

/** An answer that is none: `words` of the page's own or an RFC 9457 problem's title and detail. */
export class Problem extends Error {
  constructor({ words, status, title, detail, retryAfter }) {
    super(detail ?? title ?? words);
    Object.assign(this, { words, status, title, detail, retryAfter });
  }
}

/** Whole numbers beyond 2^53 as BigInt: the seeds of images have 63 bits. */
export const parse = (text) =>
  JSON.parse(text, (_, value, at) => (/^\d{16,}$/.test(at?.source) ? BigInt(at.source) : value));
export const serialize = (value, indent) =>
  JSON.stringify(value, (_, one) => (typeof one === "bigint" ? JSON.rawJSON?.(String(one)) ?? String(one) : one), indent);

export const storedKey = () => sessionStorage.getItem(KEY);
export const forgetKey = () => sessionStorage.removeItem(KEY);

let asking = null;
/** Ask for a key, once for however many requests wait for it. Set by the page; resolves to the key or to null. */
let ask = async () => null;
export const onKeyNeeded = (asker) => {
  ask = asker;
};
async function key(refused) {
  asking ??= ask(refused).finally(() => (asking = null));
  const given = await asking;
  if (given === null) throw new Problem({ words: "keyNeeded", status: 401 });
  sessionStorage.setItem(KEY, given);
  document.dispatchEvent(new Event("key"));
}

/** A Response that is ok. path: relative to the page. Raises Problem, or an AbortError where `signal` says so. */
export async function call(path, { headers = {}, ...options } = {}) {
  for (;;) {
    const used = storedKey();
    const all = { ...headers, ...(used && { Authorization: `Bearer ${used}` }) };
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), { ...options, headers: all });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem({ words: "unreachable" });
    }
    if (response.ok) return response;
    if (response.status === 401) {
      if (storedKey() === used) await key(used !== null);
      continue;
    }
    const told = await response.json().catch(() => ({}));
    const retryAfter = Number(response.headers.get("Retry-After")) || undefined;
    throw new Problem({ title: response.statusText || String(response.status), ...told, status: response.status, retryAfter });
  }
}

export const get = async (path) => parse(await (await call(path)).text());

/** The body of an order: JSON, or with reference images a form of which it is the part `request`. */
export function body(request, files) {
  if (!Object.keys(files).length) {
    return { body: serialize(request), headers: { "Content-Type": "application/json" } };
  }
  const form = new FormData();
  form.append("request", serialize(request));
  for (const [name, file] of Object.entries(files)) form.append(name, file, "image");
  return { body: form };
}

/** The events of POST /v1/images as they come. Raises Problem. */
export async function* draw(request, files, signal) {
  const { headers, ...rest } = body(request, files);
  const response = await call("v1/images", {
    method: "POST",
    signal,
    headers: { ...headers, Accept: "application/x-ndjson" },
    ...rest,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  let last;
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw signal.aborted ? error : new Problem({ words: "broken" });
    });
    const lines = (left + (value ?? "")).split("\n");
    left = done ? "" : lines.pop();
    for (const line of lines.filter((one) => one.trim())) {
      last = parse(line);
      if (last.event === "error") throw new Problem(last);
      yield last;
    }
    if (done) break;
  }
  if (last?.event !== "done") throw new Problem({ words: "broken" });
}

export const png = (base64) => new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], { type: "image/png" });

/** Hand a blob to the person as a file. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Download a path as a file; without a key, or where the browser can write as it reads, it is never in memory whole. */
export async function download(path, name) {
  if (storedKey() === null) {
    const link = document.createElement("a");
    link.href = new URL(path, document.baseURI);
    link.download = name;
    link.click();
    return;
  }
  if ("showSaveFilePicker" in window) {
    const file = await window.showSaveFilePicker({ suggestedName: name });
    const response = await call(path);
    await response.body.pipeTo(await file.createWritable());
    return;
  }
  save(await (await call(path)).blob(), name);
}
