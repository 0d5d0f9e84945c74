// Calls of the server's routes, with the key that this tab was given. Addresses are relative, so that a proxy may put
// the server under a path of its own.

const KEY = "loramux.key";
const TIMEOUT = 10_000; // milliseconds

/** A refusal or failure, with the API's own words. `status` 0: the server could not be reached. */
export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** GET: the answer's JSON and the server's clock (unix seconds). */
export async function get(path) {
  const response = await call(path, { signal: AbortSignal.timeout(TIMEOUT) });
  const clock = Date.parse(response.headers.get("date") ?? "") || Date.now();
  return { data: await response.json(), clock: clock / 1000 };
}

/** POST of JSON: the response, whose body is still to be read. */
export function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return call(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, ...authorization() }, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** Header values are bytes; a key in UTF-8 goes as its bytes. */
function authorization() {
  const given = key.get();
  if (!given) return {};
  return { authorization: `Bearer ${String.fromCharCode(...new TextEncoder().encode(given))}` };
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const { code, message } = body?.error ?? {};
  return new ApiError(response.status, code ?? "", message ?? `The server answered ${response.status}.`);
}
