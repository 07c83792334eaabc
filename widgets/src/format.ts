// Numbers and texts as people read them. Pure.

export function micros(us: number): string {
  if (us < 10) return `${us.toFixed(1)} \u00b5s`;
  if (us < 1000) return `${Math.round(us)} \u00b5s`;
  if (us < 1e6) return `${(us / 1000).toFixed(us < 1e4 ? 1 : 0)} ms`;
  return `${(us / 1e6).toFixed(1)} s`;
}

export function bytes(n: number): string {
  if (n < 1024) return `${n} B`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let value = n;
  let unit = -1;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

export function plural(n: number, word: string): string {
  return `${n.toLocaleString("en-US")} ${word}${n === 1 ? "" : word.endsWith("ch") ? "es" : "s"}`;
}

export function fixed(value: number, digits = 2): string {
  return Number.isFinite(value) ? value.toFixed(digits).replace("-", "\u2212") : "\u2013";
}

export function percent(logprob: number): string {
  const p = Math.exp(logprob) * 100;
  return p >= 9.95 ? `${Math.round(p)}%` : p >= 0.095 ? `${p.toFixed(1)}%` : "<0.1%";
}

/** Text of a token with invisible characters made visible; for chips and lists, never for editing. */
export function visibleToken(text: string): string {
  if (text === "") return "\u2205";
  return text.replace(/^ +| +$/g, (s) => "\u2423".repeat(s.length)).replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g, (c) =>
    `\\u{${c.charCodeAt(0).toString(16)}}`,
  );
}

/** Text for one line of a card: line breaks as signs, invisible and direction-changing characters out. */
export function cardText(text: string): string {
  return text
    .replace(/\r\n|\r|\n/g, " \u21b5 ")
    .replace(/\t/g, " ")
    .replace(/[\u0000-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g, "\u00b7");
}

/** Break `text` into at most `lines` lines of at most `width`, as `measure` sees it; what does not fit
 * is replaced by an ellipsis at the front of the last line, so that the newest words stay visible. */
export function wrap(text: string, width: number, lines: number, measure: (s: string) => number): string[] {
  const out: string[] = [];
  let rest = text.trimStart();
  while (rest && out.length < lines - 1) {
    const cut = fitting(rest, width, measure);
    if (cut >= rest.length) break;
    out.push(rest.slice(0, cut).trimEnd());
    rest = rest.slice(cut).trimStart();
  }
  if (rest) out.push(measure(rest) <= width ? rest : tailFitting(rest, width, measure));
  return out;
}

function fitting(text: string, width: number, measure: (s: string) => number): number {
  if (measure(text) <= width) return text.length;
  let low = 1;
  let high = text.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (measure(text.slice(0, middle)) <= width) low = middle;
    else high = middle - 1;
  }
  const space = text.lastIndexOf(" ", low);
  return space > low / 2 ? space + 1 : low;
}

function tailFitting(text: string, width: number, measure: (s: string) => number): string {
  let low = 0;
  let high = text.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (measure("\u2026" + text.slice(middle)) <= width) high = middle;
    else low = middle + 1;
  }
  const space = text.indexOf(" ", low); // begin with a whole word where that costs little
  return "\u2026" + text.slice(space > low && space - low < 12 ? space : low);
}
