// Untrusted text from models: escape invisible characters, truncate, insert as text nodes only.

const INVISIBLE = new RegExp(
  "[\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180e\\u3164\\uffa0\\u200b-\\u200f\\u202a-\\u202e\\u2060-\\u2069\\ufeff\\ufff9-\\ufffb]" +
  "|[\\u{e0000}-\\u{e0fff}\\ud800-\\udfff]" +
  "|[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029]", "gu");
const MAX_CHARS = 1200;
const MORE = 200000;

/** The same rule as `leeway.report.formatting.escape_invisible`. */
function escapeInvisible(text) {
  return text.replace(INVISIBLE, (c) => "⟨U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");
}

/** Create an element with attributes and children; strings become text nodes. */
function make(tag, attributes, ...children) {
  const found = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) found.setAttribute(key, value);
  found.append(...children);
  return found;
}

const formatCount = (n) => n.toLocaleString("en-US");

/** Return a cut position that does not split a surrogate pair. */
function cutAt(text, at) {
  const code = text.charCodeAt(at - 1);
  return at < text.length && code >= 0xd800 && code < 0xdc00 ? at - 1 : at;
}

/** Return untrusted text as a block, truncated with a button to show more. */
function block(text) {
  const pre = make("pre", { dir: "auto" });
  const found = make("div", {}, pre);
  if (!text) {
    found.replaceChildren(make("p", { class: "soft" }, "(empty)"));
    return found;
  }
  let shown = cutAt(text, Math.min(MAX_CHARS, text.length));
  pre.textContent = escapeInvisible(text.slice(0, shown));
  if (shown === text.length) return found;
  const button = make("button", { type: "button", class: "more" });
  const label = () => {
    const left = text.length - shown;
    button.textContent = left > MORE ? `Show ${formatCount(MORE)} of ${formatCount(left)} more characters` : `Show all: ${formatCount(left)} more characters`;
  };
  label();
  button.addEventListener("click", () => {
    const to = cutAt(text, Math.min(shown + MORE, text.length));
    pre.append(escapeInvisible(text.slice(shown, to)));
    shown = to;
    if (shown === text.length) button.remove(); else label();
  });
  found.append(button);
  return found;
}
