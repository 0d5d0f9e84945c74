// The page's round: ask the server for its figures each second, show them, and keep trying where it does not answer.

import { Admin } from "./admin.js";
import { Table } from "./adapters.js";
import { get, key } from "./api.js";
import { AskBox } from "./ask.js";
import { find, setText } from "./dom.js";
import { Keys } from "./keys.js";
import { showStatus } from "./overview.js";
import { Rates } from "./rates.js";

const EVERY = 1000; // milliseconds between two rounds
const LONGEST = 5000; // likewise, while the server cannot be reached
const HEALTH = { up: ["ok", "serving"], down: ["warn", "engine is being started again"] };

const rates = new Rates();
const keys = new Keys(() => restart());
const admin = new Admin((why) => keys.ask(why), () => round());
const box = new AskBox(() => table.mark(box.chosen));
const table = new Table({
  ask: (id, wanted) => box.choose(id, wanted),
  pin: (card) => admin.pin(card),
  unload: (card) => admin.unload(card),
});
let timer = 0;
let wait = EVERY;
let asking = false;
let askedKey = false;

/** With another key: what was refused may work, and what is refused again is told again. */
function restart() {
  askedKey = false;
  wait = EVERY;
  round();
}

async function round() {
  if (asking) return;
  asking = true;
  clearTimeout(timer);
  try {
    const [status, list] = await Promise.all([get("status"), get("v1/lora_adapters")]);
    show(status.data, list.data.data, list.clock);
    wait = EVERY;
  } catch (error) {
    fail(error);
  } finally {
    asking = false;
    if (!document.hidden) timer = setTimeout(round, wait);
  }
}

function show(status, cards, clock) {
  const now = performance.now();
  const known = cards.map((card) => {
    const rate = rates.tell(`${card.id} ${card.created}`, card.generated_tokens, now);
    return { ...card, clock, rate };
  });
  const base = rates.tell(status.base.name, status.base.generated_tokens, now);
  rates.sweep(now);
  const all = known.reduce((sum, card) => sum + card.rate, base);
  setText(find("base"), status.base.name);
  setText(find("facts"), `${status.dtype} on ${status.device}`);
  document.title = `${status.base.name} · loramux`;
  health(...HEALTH[status.engine]);
  admin.allow(status.admin_key);
  showStatus(status, { all, base });
  box.serve(status.base.name, known);
  table.show(known, box.chosen);
}

function fail(error) {
  if (error.status === 401) {
    health("warn", "needs a key");
    if (!askedKey) keys.ask(key.get() ? "The server refused this key." : "This server answers only with its key.");
    askedKey = true;
    return;
  }
  wait = Math.min(LONGEST, wait * 1.5);
  health("bad", error.status ? error.message : "server unreachable, trying again");
}

/** `state`: ok, warn (figures are old or none) or bad. */
function health(state, text) {
  find("health").dataset.state = state;
  document.body.dataset.stale = `${state === "bad"}`;
  setText(find("health"), text);
}

document.addEventListener("visibilitychange", () => document.hidden || round());
round();
