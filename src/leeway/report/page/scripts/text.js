// Text from models: spelled out, cut, and only ever put in place as text.

const HIDDEN = new RegExp(
  "[\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180e\\u3164\\uffa0\\u200b-\\u200f\\u202a-\\u202e\\u2060-\\u2069\\ufeff\\ufff9-\\ufffb]" +
  "|[\\u{e0000}-\\u{e0fff}\\ud800-\\udfff]" +
  "|[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029]", "gu");
const LONGEST = 1200;
const MORE = 200000;

/** The same rule as `leeway.report.wording.visible`. */
function visible(text) {
  return text.replace(HIDDEN, (c) => "⟨U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");
}

/** An element with attributes and children; a string child becomes a text node. */
function make(tag, attributes, ...children) {
  const found = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) found.setAttribute(key, value);
  found.append(...children);
  return found;
}

const counted = (n) => n.toLocaleString("en-US");

/** A cut that does not fall inside a character. */
function cutAt(text, at) {
  const code = text.charCodeAt(at - 1);
  return at < text.length && code >= 0xd800 && code < 0xdc00 ? at - 1 : at;
}

/** Untrusted text in a block of its own, the first part of it where it is long. */
function block(text) {
  const pre = make("pre", { dir: "auto" });
  const found = make("div", {}, pre);
  if (!text) {
    found.replaceChildren(make("p", { class: "soft" }, "(no text)"));
    return found;
  }
  let shown = cutAt(text, Math.min(LONGEST, text.length));
  pre.textContent = visible(text.slice(0, shown));
  if (shown === text.length) return found;
  const button = make("button", { type: "button", class: "more" });
  const label = () => {
    const left = text.length - shown;
    button.textContent = left > MORE ? `Show ${counted(MORE)} of ${counted(left)} more characters` : `Show all: ${counted(left)} more characters`;
  };
  label();
  button.addEventListener("click", () => {
    const to = cutAt(text, Math.min(shown + MORE, text.length));
    pre.append(visible(text.slice(shown, to)));
    shown = to;
    if (shown === text.length) button.remove(); else label();
  });
  found.append(button);
  return found;
}
