// One model's answer beside the others: a card that fills while its stream comes.

import { post } from "./api.js";
import { make, say, setHidden, setText } from "./dom.js";
import { events } from "./events.js";
import { count, seconds } from "./format.js";

export class Answer {
  #abort = new AbortController();

  /** `id`: the served id, base or base:adapter. */
  constructor(id) {
    this.id = id;
    this.state = "queued";
    this.text = make("div", { className: "text", tabIndex: 0 });
    this.text.setAttribute("role", "region");
    this.text.setAttribute("aria-label", `Answer of ${id}`);
    this.facts = make("span", { className: "muted facts", textContent: "waits for its turn" });
    this.button = make("button", { type: "button", className: "quiet", textContent: "Stop" });
    this.button.setAttribute("aria-label", `Stop ${id}`);
    this.button.addEventListener("click", () => this.stop());
    this.note = make("p", { className: "note", hidden: true });
    this.note.setAttribute("role", "alert");
    const head = make("header", {}, make("h3", { textContent: id }), this.button);
    this.node = make("article", { className: "answer" }, head, this.text, this.note, this.facts);
    this.node.dataset.model = id;
    this.#become("queued");
  }

  stop() {
    this.#abort.abort();
    if (this.state === "queued") this.#become("stopped", "stopped before it began");
  }

  /** Asks, and fills the card until the stream ends. Never throws: what goes wrong stands in the card. */
  async ask(request) {
    if (this.state !== "queued") return;
    this.#become("streaming", "waits for the first token");
    this.start = performance.now();
    this.tokens = 0;
    try {
      await this.#read(await post("v1/chat/completions", { ...request, model: this.id }, this.#abort.signal));
    } catch (error) {
      this.#fail(error);
    }
  }

  async #read(response) {
    for await (const data of events(response)) {
      if (data === "[DONE]") return this.#become("done", this.#summary());
      this.#take(JSON.parse(data));
    }
    throw new Error("The stream broke off: the server went, or the connection to it.");
  }

  #take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    this.tokens = chunk.usage?.completion_tokens ?? this.tokens;
    const choice = chunk.choices[0];
    if (choice?.delta.content) this.#append(choice.delta.content);
    this.reason = choice?.finish_reason ?? this.reason;
    setText(this.facts, this.#summary());
  }

  /** Follows the end of the text unless the reader has scrolled away from it. */
  #append(text) {
    this.first ??= performance.now() - this.start;
    const follow = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 24;
    this.text.append(text);
    if (follow) this.text.scrollTop = this.text.scrollHeight;
  }

  #summary() {
    const took = (performance.now() - this.start) / 1000;
    const parts = [`${count(this.tokens)} tokens`, seconds(took)];
    if (this.first !== undefined) parts.push(`first after ${seconds(this.first / 1000)}`);
    if (this.reason === "length") parts.push("cut at the limit");
    return parts.join(" · ");
  }

  #fail(error) {
    if (this.#abort.signal.aborted) return this.#become("stopped", `stopped · ${this.#summary()}`);
    say(this.note, error instanceof TypeError ? "The connection to the server was lost." : error.message, "error");
    return this.#become("failed", this.tokens ? this.#summary() : "");
  }

  #become(state, facts) {
    this.state = state;
    this.node.dataset.state = state;
    this.node.setAttribute("aria-busy", `${state === "streaming"}`);
    setHidden(this.button, state !== "queued" && state !== "streaming");
    if (facts !== undefined) setText(this.facts, facts);
  }
}
