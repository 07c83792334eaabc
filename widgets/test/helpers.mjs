// Builds frames as Python packs them.
import { Store } from "../.test/pure.mjs";

export const COLUMNS = [
  ["node", "u"], ["parent", "u"], ["branch", "i"], ["start", "u"], ["end", "u"], ["flags", "u"],
  ["finish", "u"], ["pages", "u"], ["owned", "u"], ["tail_refs", "u"], ["visits", "u"],
  ["lp_mean", "f"], ["lp_last", "f"], ["value", "f"], ["uct", "f"],
];

const KEYS = ["node", "parent", "branch", "start", "end", "flags", "finish", "pages", "owned",
  "tail_refs", "visits", "lp_mean", "lp_last", "value", "uct"];

export function frame(seq, rows, { snapshot = false, removed = [], totals } = {}) {
  const view = new DataView(new ArrayBuffer(rows.length * COLUMNS.length * 4));
  COLUMNS.forEach(([, kind], c) => {
    rows.forEach((row, i) => {
      const at = (c * rows.length + i) * 4;
      const value = row[KEYS[c]] ?? 0;
      if (kind === "u") view.setUint32(at, value, true);
      else if (kind === "i") view.setInt32(at, value, true);
      else view.setFloat32(at, value, true);
    });
  });
  const header = {
    t: "frame", v: 1, seq, snapshot, count: rows.length, cols: COLUMNS.map(([name]) => name),
    texts: rows.map((row) => row.text ?? ""), removed, totals,
  };
  return [header, view];
}

/** A tip of a live branch. */
export function node(id, parent = 0, extra = {}) {
  return { node: id, parent, branch: id, start: 0, end: 4, flags: 1 | 4, ...extra };
}

export function storeOf(...rows) {
  const store = new Store();
  store.apply(...frame(1, rows, { snapshot: true }));
  return store;
}

/** A pseudo-random generator: tests must not depend on Math.random. */
export function random(seed) {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

export function randomTree(count, seed, reach = 6) {
  const next = random(seed);
  const children = new Map([[1, []]]);
  for (let id = 2; id <= count; id++) {
    const parent = Math.max(1, id - 1 - Math.floor(next() * reach * 4));
    children.get(parent).push(id);
    children.set(id, []);
  }
  return (id) => children.get(id) ?? [];
}
