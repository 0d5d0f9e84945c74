// The arena by use, the slots and the traffic.

import { find, make, setHidden, setText } from "./dom.js";
import { bytes, count, percent, rate } from "./format.js";

const USES = ["kv", "prefix", "adapter", "free"];
const MAX_CELLS = 64; // slots drawn one by one; more become one bar
const HISTORY = 120; // samples of the line

const history = [];

/** `rates`: tokens a second of everything, and of the base. */
export function showStatus(status, rates) {
  showArena(status.arena);
  showSlots(status.slots);
  setText(find("resident"), count(status.adapters_resident));
  setText(find("pinned"), count(status.slots.pinned));
  setText(find("host"), bytes(status.host_bytes));
  setText(find("running"), count(status.requests_running));
  setText(find("waiting"), count(status.requests_waiting));
  setText(find("base-rate"), `${rate(rates.base)} tok/s`);
  setText(find("rate"), rate(rates.all));
  history.push(rates.all);
  if (history.length > HISTORY) history.shift();
  drawLine();
}

function showArena(arena) {
  const whole = USES.reduce((sum, use) => sum + arena[use], 0);
  setText(find("arena-total"), whole ? `${bytes(whole * arena.chunk_bytes)} in ${count(whole)} chunks` : "no engine");
  for (const use of USES) {
    const part = find("arena-bar").querySelector(`[data-use=${use}]`);
    part.style.flexGrow = arena[use];
    setHidden(part, !arena[use]);
    const text = `${percent(arena[use], whole)} · ${bytes(arena[use] * arena.chunk_bytes)}`;
    setText(find("arena-legend").querySelector(`[data-use=${use}] dd`), text);
  }
}

function showSlots({ total, used, pinned }) {
  setText(find("slots-total"), `${used} of ${total} hold an adapter`);
  const row = find("slots-row");
  const cells = Math.min(total, MAX_CELLS);
  while (row.children.length > cells) row.lastChild.remove();
  while (row.children.length < cells) row.append(make("i"));
  const scale = cells / total;
  [...row.children].forEach((cell, index) => {
    cell.dataset.state = index < pinned * scale ? "pinned" : index < used * scale ? "used" : "free";
  });
}

function drawLine() {
  const top = Math.max(1, ...history);
  const first = HISTORY - history.length;
  const points = history.map((value, index) => `${first + index},${(31 - (29 * value) / top).toFixed(2)}`);
  const line = `M${points.join("L")}`;
  find("spark").querySelector(".line").setAttribute("d", line);
  find("spark").querySelector(".area").setAttribute("d", `${line}V32H${first}Z`);
}
