// Decompress the rows embedded in the page on first use, in small steps so that the page stays responsive.

const pause = () => new Promise((go) => setTimeout(go));

/** Call `each` for 0 to count - 1 in slices of about 12 ms; stop and return false once `alive()` is false. */
async function inSlices(count, each, alive) {
  let since = performance.now();
  for (let n = 0; n < count; n += 1) {
    each(n);
    if ((n & 255) === 255 && performance.now() - since > 12) {
      await pause();
      if (!alive()) return false;
      since = performance.now();
    }
  }
  return true;
}

async function* bytes() {
  // the rows are at the end of the file: wait until the parser has reached them
  while (document.readyState === "loading") await new Promise((go) => setTimeout(go, 30));
  const text = document.getElementById("rows").textContent.trim();
  const step = 1 << 20; // a multiple of 4, so each chunk is valid base64
  for (let at = 0; at < text.length; at += step) {
    const raw = atob(text.slice(at, at + step));
    const piece = new Uint8Array(raw.length);
    for (let n = 0; n < raw.length; n += 1) piece[n] = raw.charCodeAt(n);
    yield piece;
    await pause();
  }
}

async function* linesOf() {
  const source = bytes();
  const packed = new ReadableStream({
    async pull(to) { const { value, done } = await source.next(); if (done) to.close(); else to.enqueue(value); },
  });
  const reader = packed.pipeThrough(new DecompressionStream("gzip")).pipeThrough(new TextDecoderStream()).getReader();
  let pieces = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = value.split("\n");
    pieces.push(parts[0]);
    for (let n = 1; n < parts.length; n += 1) {
      yield pieces.join("");
      pieces = [parts[n]];
    }
  }
  if (pieces.length) yield pieces.join("");
}

/** Return the table: codes per column, and the texts of the codes. */
async function unpack(onProgress) {
  const table = { columns: {}, texts: {}, rows: 0, models: [], open: new Set() };
  const filled = {};
  let since = performance.now();
  for await (const line of linesOf()) {
    const found = JSON.parse(line);
    if (found.meta) {
      Object.assign(table, found.meta, { open: new Set(found.meta.open) });
    } else if (found.texts) {
      const list = (table.texts[found.texts] ||= []);
      for (const text of found.of) list.push(text);
    } else {
      const name = found.column;
      const column = (table.columns[name] ||= name === "score" ? new Float64Array(table.rows).fill(NaN) : new Int32Array(table.rows));
      let at = filled[name] || 0;
      for (const value of found.of) { if (value !== null) column[at] = value; at += 1; }
      filled[name] = at;
    }
    if (performance.now() - since > 12) { onProgress(filled.score || 0); await pause(); since = performance.now(); }
  }
  return table;
}

/** Return for each text whether it contains the words, ignoring case. */
async function containing(texts, words, alive) {
  const found = new Uint8Array(texts.length);
  const done = await inSlices(texts.length, (n) => { if (texts[n].toLowerCase().includes(words)) found[n] = 1; }, alive);
  return done ? found : null;
}
