// Loads, unloads and pins. The server wants the admin key for each; without one it refuses every web page, this one too.

import { key, post } from "./api.js";
import { find, openDialog, say, setText } from "./dom.js";

const NO_ADMIN_KEY = "The server runs without --admin-api-key, so no web page can load, unload or pin; curl on its machine can.";

export class Admin {
  #allowed = null;
  #unloading = "";

  /** `askKey(why)` asks for a key; `changed()` is called when something was done. */
  constructor(askKey, changed) {
    this.askKey = askKey;
    this.changed = changed;
    find("load-open").addEventListener("click", () => this.#openLoad());
    find("load-form").addEventListener("submit", (event) => this.#load(event));
    find("load-cancel").addEventListener("click", () => find("load-dialog").close());
    find("unload-form").addEventListener("submit", (event) => this.#unload(event));
    find("unload-cancel").addEventListener("click", () => find("unload-dialog").close());
  }

  /** Whether the server has an admin key. */
  allow(allowed) {
    if (allowed === this.#allowed) return;
    this.#allowed = allowed;
    document.body.dataset.admin = allowed ? "key" : "none";
    find("load-open").disabled = !allowed;
    find("load-open").title = allowed ? "" : NO_ADMIN_KEY;
    say(find("note"), allowed ? "" : NO_ADMIN_KEY);
  }

  pin(card) {
    const [route, done] = card.pinned ? ["unpin_lora_adapter", "unpinned"] : ["pin_lora_adapter", "pinned"];
    return this.#act(route, card.name, done);
  }

  unload(card) {
    if (!this.#hasKey()) return;
    this.#unloading = card.name;
    setText(find("unload-name"), card.name);
    openDialog(find("unload-dialog"), find("unload-cancel"));
  }

  #unload(event) {
    event.preventDefault();
    find("unload-dialog").close();
    this.#act("unload_lora_adapter", this.#unloading, "unloaded");
  }

  #openLoad() {
    if (!this.#hasKey()) return;
    say(find("load-note"), "");
    openDialog(find("load-dialog"), find("load-name"));
  }

  async #load(event) {
    event.preventDefault();
    const name = find("load-name").value;
    const body = { lora_name: name, lora_path: find("load-path").value, pinned: find("load-pinned").checked };
    find("load-send").disabled = true;
    say(find("load-note"), "Loading; running streams go on.");
    try {
      await post("load_lora_adapter", body);
      find("load-form").reset();
      find("load-dialog").close();
      say(find("note"), `${name}: loaded`);
      this.changed();
    } catch (error) {
      say(find("load-note"), explain(error), "error");
    } finally {
      find("load-send").disabled = false;
    }
  }

  async #act(route, name, done) {
    if (!this.#hasKey()) return;
    say(find("note"), `${name}: …`);
    try {
      await post(route, { lora_name: name });
      say(find("note"), `${name}: ${done}`);
    } catch (error) {
      say(find("note"), `${name}: ${explain(error)}`, "error");
    }
    this.changed();
  }

  #hasKey() {
    if (!key.get()) this.askKey("Loading, unloading and pinning need the admin key.");
    return key.get() !== "";
  }
}

function explain(error) {
  return error.status === 401 ? "The server refused the key: this needs the admin key." : error.message;
}
