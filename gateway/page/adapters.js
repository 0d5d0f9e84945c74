// The table of adapters: a row each, kept and changed in place; filtered, sorted and cut so that hundreds stay quick.

import { find, make, setAttribute, setHidden, setText } from "./dom.js";
import { ago, bytes, count, rate } from "./format.js";

const PAGE = 100; // rows shown before "Show all"
const METER = 56; // pixels of the busiest adapter's bar
const COLUMNS = [
  { id: "ask", label: "Ask" },
  { id: "name", label: "Name", text: (card) => card.name, sort: (card) => card.name },
  { id: "state", label: "State", text: (card) => card.state, sort: (card) => card.state },
  { id: "tier", label: "Tier", text: (card) => card.tier, sort: (card) => card.tier },
  { id: "rank", label: "Rank", text: (card) => (card.rank ? `${card.rank}` : "–"), sort: (card) => -card.rank },
  { id: "bytes", label: "Size", text: (card) => (card.bytes ? bytes(card.bytes) : "–"), sort: (card) => -card.bytes },
  { id: "pinned", label: "Pin", text: (card) => (card.pinned ? "pinned" : ""), sort: (card) => -card.pinned },
  { id: "flight", label: "In flight", text: flight, sort: (card) => -(card.requests_running + card.requests_waiting) },
  { id: "rate", label: "Tokens/s", text: (card) => rate(card.rate), sort: (card) => -card.rate },
  { id: "requests", label: "Requests", text: (card) => count(card.requests_total), sort: (card) => -card.requests_total },
  { id: "used", label: "Last used", text: lastUsed, sort: (card) => -(card.last_used ?? 0) },
  { id: "actions", label: "Actions" },
];
const VALUES = COLUMNS.filter((column) => column.text);

function flight(card) {
  const waiting = card.requests_waiting ? ` + ${card.requests_waiting} waiting` : "";
  return card.requests_running || waiting ? `${card.requests_running}${waiting}` : "–";
}

function lastUsed(card) {
  return card.last_used ? ago(card.clock - card.last_used) : "never";
}

/** `on.ask(id, wanted)`, `on.pin(card)`, `on.unload(card)` are called by a row's controls. */
export class Table {
  #rows = new Map(); // name -> row
  #cards = [];
  #by = null; // the column that orders, or null: as loaded
  #falling = false;
  #all = false;

  constructor(on) {
    this.on = on;
    this.body = find("rows");
    find("columns").append(...COLUMNS.map((column) => this.#heading(column)));
    find("filter").addEventListener("input", () => this.#arrange());
    find("more").addEventListener("click", () => this.#showAll());
  }

  /** Shows these adapters; `chosen`: the ids that the prompt goes to. */
  show(cards, chosen) {
    this.#cards = cards;
    const names = new Set(cards.map((card) => card.name));
    for (const [name, row] of this.#rows) if (!names.has(name)) this.#forget(name, row);
    this.#arrange(this.body.contains(document.activeElement));
    this.mark(chosen);
  }

  /** Ticks the rows whose adapters are asked. */
  mark(chosen) {
    for (const row of this.#rows.values()) row.ask.checked = chosen.has(row.card.id);
  }

  /** Puts the rows in order. `still`: rows that are there keep their places, since the focus is among them. */
  #arrange(still = false) {
    const found = this.#found();
    const shown = this.#all ? found : found.slice(0, PAGE);
    const top = Math.max(1, ...this.#cards.map((card) => card.rate));
    const rows = shown.map((card) => this.#row(card, top));
    this.#place(rows.map((row) => row.node), still);
    this.#tell(found.length, shown.length);
  }

  #found() {
    const words = find("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (card) => {
      const text = `${card.name} ${card.state} ${card.tier} ${card.pinned ? "pinned" : ""}`.toLowerCase();
      return words.every((word) => text.includes(word));
    };
    const found = this.#cards.filter(matches);
    const key = this.#by?.sort;
    if (!key) return found;
    const sign = this.#falling ? -1 : 1;
    const compare = (a, b) => (key(a) < key(b) ? -sign : key(a) > key(b) ? sign : 0);
    return found.sort(compare);
  }

  #place(nodes, still) {
    const wanted = new Set(nodes);
    for (const node of [...this.body.children]) if (!wanted.has(node)) node.remove();
    if (still) nodes = nodes.filter((node) => node.parentNode !== this.body);
    nodes.forEach((node, index) => {
      const place = still ? null : this.body.children[index] ?? null;
      if (place !== node || node.parentNode !== this.body) this.body.insertBefore(node, place);
    });
  }

  #tell(found, shown) {
    const all = this.#cards.length;
    setText(find("shown"), found === all ? `${count(all)} loaded` : `${count(found)} of ${count(all)}`);
    setHidden(find("more"), shown === found);
    setText(find("more"), `Show all ${count(found)}`);
    setHidden(find("none"), found > 0);
    setText(find("none"), all ? "No adapter matches." : "No adapter is loaded.");
  }

  #showAll() {
    this.#all = true;
    this.#arrange();
    this.body.children[PAGE]?.querySelector("input").focus();
  }

  #row(card, top) {
    let row = this.#rows.get(card.name);
    if (!row) this.#rows.set(card.name, (row = this.#newRow(card)));
    row.card = card;
    for (const column of VALUES) setText(row.texts[column.id], column.text(card));
    setText(row.why, card.error ?? "");
    setHidden(row.why, !card.error);
    setAttribute(row.node, "data-state", card.state);
    setAttribute(row.node, "data-pinned", `${card.pinned}`);
    setAttribute(row.node, "data-busy", `${card.requests_running + card.requests_waiting > 0}`);
    row.meter.style.width = `${(METER * card.rate) / top}px`;
    setText(row.pin, card.pinned ? "Unpin" : "Pin");
    setAttribute(row.pin, "aria-label", `${card.pinned ? "Unpin" : "Pin"} ${card.name}`);
    return row;
  }

  #newRow(card) {
    const ask = make("input", { type: "checkbox", ariaLabel: `Ask ${card.name}` });
    const pin = make("button", { type: "button", className: "quiet" });
    const unload = make("button", { type: "button", className: "quiet", textContent: "Unload" });
    const meter = make("i", { className: "meter" });
    const texts = Object.fromEntries(VALUES.map((column) => [column.id, make("span")]));
    const why = make("p", { className: "why", hidden: true });
    const row = { card, ask, pin, meter, texts, why, node: make("tr", { role: "row" }) };
    unload.setAttribute("aria-label", `Unload ${card.name}`);
    texts.name.title = card.modules.length ? `modules: ${card.modules.join(", ")}` : "";
    row.node.append(...COLUMNS.map((column) => this.#cell(column, row, unload)));
    ask.addEventListener("change", () => this.on.ask(row.card.id, ask.checked));
    pin.addEventListener("click", () => this.on.pin(row.card));
    unload.addEventListener("click", () => this.on.unload(row.card));
    return row;
  }

  #cell(column, row, unload) {
    const cell = make("td", { className: column.id });
    cell.setAttribute("role", "cell");
    cell.dataset.label = column.label;
    if (column.id === "ask") cell.append(row.ask);
    else if (column.id === "actions") cell.append(row.pin, unload);
    else cell.append(row.texts[column.id]);
    if (column.id === "rate") cell.append(row.meter);
    if (column.id === "state") cell.append(row.why);
    return cell;
  }

  #forget(name, row) {
    row.node.remove();
    this.#rows.delete(name);
  }

  #heading(column) {
    const node = make("th", { className: column.id, scope: "col" });
    node.setAttribute("role", "columnheader");
    if (!column.sort) {
      node.append(make("span", { className: column.id === "actions" ? "unseen" : "", textContent: column.label }));
      return node;
    }
    node.append(make("button", { type: "button", textContent: column.label, onclick: () => this.#sortBy(column) }));
    column.node = node;
    return node;
  }

  /** First click: the natural order of a column, largest numbers first; second: reversed; third: as loaded. */
  #sortBy(column) {
    const again = this.#by === column;
    if (again && this.#falling) this.#by = null;
    else this.#by = column;
    this.#falling = again && this.#by !== null;
    for (const other of VALUES) other.node.removeAttribute("aria-sort");
    const numbers = column.id !== "name" && column.id !== "state" && column.id !== "tier";
    if (this.#by) column.node.setAttribute("aria-sort", numbers === this.#falling ? "ascending" : "descending");
    this.#arrange();
  }
}
