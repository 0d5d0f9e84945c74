// Small helpers of the DOM. Text from the server or from clients reaches the page as text nodes alone, never as HTML.

export const find = (id) => document.getElementById(id);

/** A new element with properties and children. */
export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** Writes a text only where it differs, so that an unchanged page costs nothing. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

export function setHidden(node, hidden) {
  if (node.hidden !== hidden) node.hidden = hidden;
}

/** A line that is there only while it says something. `kind`: "error" or "". */
export function say(node, text, kind = "") {
  setText(node, text);
  setHidden(node, !text);
  node.dataset.kind = kind;
}

/** Opens a dialog whose Cancel button closes it. */
export function openDialog(dialog, first) {
  if (!dialog.open) dialog.showModal();
  first?.focus();
}
