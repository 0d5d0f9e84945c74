// The dialog for the key. It is kept in this tab's session storage alone.

import { key } from "./api.js";
import { find, openDialog, setText } from "./dom.js";

const WHY = "What the server was started with as --api-key or --admin-api-key.";

export class Keys {
  /** `changed()` is called when another key is in use. */
  constructor(changed) {
    this.changed = changed;
    find("key-open").addEventListener("click", () => this.ask(WHY));
    find("key-form").addEventListener("submit", (event) => this.#use(event, find("key").value.trim()));
    find("key-forget").addEventListener("click", (event) => this.#use(event, ""));
    find("key-cancel").addEventListener("click", () => find("key-dialog").close());
    find("key-dialog").addEventListener("close", () => (find("key").value = ""));
    this.#mark();
  }

  ask(why) {
    setText(find("key-why"), why);
    openDialog(find("key-dialog"), find("key"));
  }

  #use(event, value) {
    event.preventDefault();
    key.set(value);
    this.#mark();
    find("key-dialog").close();
    this.changed();
  }

  #mark() {
    setText(find("key-open"), key.get() ? "Key set" : "Key");
    find("key-forget").disabled = !key.get();
  }
}
