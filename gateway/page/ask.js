// The box that asks one prompt of several models side by side.

import { Answer } from "./answer.js";
import { find, make, say, setText } from "./dom.js";

const AT_ONCE = 4; // streams; browsers open six connections to a server, and the figures need one
const MAX_MODELS = 12;
const FIRST = 2; // adapters chosen at the start, beside the base

export class AskBox {
  chosen = new Set(); // served ids, in the order of their choice
  #served = new Map(); // id -> bare name; the base under its own
  #base = "";
  #answers = [];

  /** `changed()` is called when the choice changes. */
  constructor(changed) {
    this.changed = changed;
    find("ask-form").addEventListener("submit", (event) => this.#submit(event));
    find("ask").addEventListener("keydown", (event) => this.#key(event));
    find("stop").addEventListener("click", () => this.stop());
    find("add").addEventListener("change", () => this.#add());
    find("add").addEventListener("keydown", (event) => event.key === "Enter" && this.#enter(event));
  }

  /** What is served now. What is gone leaves the choice. */
  serve(base, cards) {
    const fresh = this.#base === "";
    this.#base = base;
    const served = new Map([[base, base], ...cards.map((card) => [card.id, card.name])]);
    const same = served.size === this.#served.size && [...served.keys()].every((id) => this.#served.has(id));
    this.#served = served;
    if (fresh) this.chosen = new Set([base, ...cards.slice(0, FIRST).map((card) => card.id)]);
    if (same && !fresh) return;
    this.chosen = new Set([...this.chosen].filter((id) => served.has(id)));
    find("names").replaceChildren(...cards.map((card) => make("option", { value: card.name })));
    this.#drawChips();
  }

  choose(id, wanted) {
    if (wanted && this.chosen.size >= MAX_MODELS) say(find("ask-note"), `At most ${MAX_MODELS} models at a time.`, "error");
    else this.chosen[wanted ? "add" : "delete"](id);
    this.#drawChips();
    this.changed();
  }

  stop() {
    for (const answer of this.#answers) answer.stop();
  }

  #drawChips() {
    const chips = [...this.chosen].map((id) => {
      const chip = make("button", { type: "button", className: "chip" }, make("span", { textContent: this.#served.get(id) }));
      chip.dataset.model = id;
      chip.setAttribute("aria-label", `Do not ask ${id}`);
      chip.addEventListener("click", () => this.#remove(id));
      return chip;
    });
    if (!this.chosen.has(this.#base)) chips.unshift(this.#baseChip());
    find("chosen").replaceChildren(...chips);
  }

  #baseChip() {
    const chip = make("button", { type: "button", className: "chip off", textContent: `+ ${this.#base}` });
    chip.setAttribute("aria-label", `Ask the base ${this.#base} too`);
    chip.addEventListener("click", () => this.choose(this.#base, true));
    return chip;
  }

  /** The focus moves on, as the chip that held it goes. */
  #remove(id) {
    this.choose(id, false);
    find("add").focus();
  }

  #add() {
    const given = find("add").value.trim();
    const id = this.#served.has(given) ? given : `${this.#base}:${given}`;
    if (!given) return;
    if (!this.#served.has(id)) {
      say(find("ask-note"), `No adapter is called "${given}".`, "error");
      return;
    }
    say(find("ask-note"), "");
    find("add").value = "";
    this.choose(id, true);
  }

  #enter(event) {
    event.preventDefault();
    this.#add();
  }

  #key(event) {
    if (event.key === "Escape") this.stop();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      if (!find("send").disabled) find("ask-form").requestSubmit();
    }
  }

  async #submit(event) {
    event.preventDefault();
    if (!this.chosen.size) {
      say(find("ask-note"), "Choose at least one model.", "error");
      return;
    }
    say(find("ask-note"), "");
    this.#answers = [...this.chosen].map((id) => new Answer(id));
    find("answers").replaceChildren(...this.#answers.map((answer) => answer.node));
    this.#busy(true);
    setText(find("told"), `Asking ${this.#answers.length} models`);
    await this.#askAll(request());
    this.#busy(false);
    const ends = this.#answers.map((answer) => `${answer.id} ${answer.state}`);
    setText(find("told"), ends.join(", "));
  }

  /** A few streams at once, each next one as another ends. */
  async #askAll(body) {
    const queue = [...this.#answers];
    const work = async () => {
      for (let answer; (answer = queue.shift()); ) await answer.ask(body);
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
  }

  #busy(busy) {
    find("stop").disabled = !busy;
    find("send").disabled = busy;
    if (!busy && document.activeElement === document.body) find("prompt").focus();
  }
}

function request() {
  return {
    messages: [{ role: "user", content: find("prompt").value }],
    max_tokens: find("tokens").valueAsNumber,
    temperature: find("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
}
