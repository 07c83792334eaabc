import assert from "node:assert/strict";
import { test } from "node:test";
import { ALIVE, Store, TIP, decodeRows } from "../.test/pure.mjs";
import { frame, node, storeOf } from "./helpers.mjs";

test("rows survive packing, floats and negative branch ids included", () => {
  const [header, view] = frame(1, [
    node(7, 3, { branch: -2, start: 5, end: 9, visits: 4, lp_mean: -1.5, uct: NaN, text: "a\u{1F333}" }),
  ]);
  const [row] = decodeRows(header, view);
  assert.equal(row.id, 7);
  assert.equal(row.branch, -2);
  assert.equal(row.lpMean, -1.5);
  assert.ok(Number.isNaN(row.uct));
  assert.equal(row.text, "a\u{1F333}");
});

test("a buffer that is too short is refused, unknown columns are skipped", () => {
  const [header, view] = frame(1, [node(1), node(2)]);
  assert.throws(() => decodeRows(header, new DataView(view.buffer, 0, 8)), RangeError);
  header.cols[10] = "from_the_future";
  assert.equal(decodeRows(header, view)[0].visits, undefined);
});

test("deltas before the first snapshot are ignored", () => {
  const store = new Store();
  assert.equal(store.apply(...frame(5, [node(1)])).kind, "ignored");
  assert.equal(store.nodes.size, 0);
});

test("a gap asks once for a snapshot, then deltas are ignored until it comes", () => {
  const store = storeOf(node(1));
  assert.equal(store.apply(...frame(2, [node(2, 1)])).kind, "ok");
  assert.equal(store.apply(...frame(4, [node(4, 1)])).kind, "gap");
  assert.equal(store.apply(...frame(5, [node(5, 1)])).kind, "ignored");
  assert.deepEqual([...store.nodes.keys()], [1, 2]);
  assert.equal(store.apply(...frame(6, [node(1), node(9, 1)], { snapshot: true })).kind, "ok");
  assert.deepEqual([...store.nodes.keys()], [1, 9]);
  assert.equal(store.apply(...frame(7, [])).kind, "ok");
});

test("a repeated frame changes nothing", () => {
  const store = storeOf(node(1, 0, { end: 4 }));
  store.apply(...frame(2, [node(1, 0, { end: 5 })]));
  assert.equal(store.apply(...frame(2, [node(1, 0, { end: 3 })])).kind, "ignored");
  assert.equal(store.get(1).end, 5);
});

test("new values of a known node are no structural change", () => {
  const store = storeOf(node(1), node(2, 1));
  const applied = store.apply(...frame(2, [node(2, 1, { end: 9 })]));
  assert.deepEqual([applied.structure, applied.changed], [false, [2]]);
  assert.equal(store.apply(...frame(3, [], { removed: [2] })).structure, true);
  assert.deepEqual(store.get(1).children, []);
});

test("holders count the live branches below, wherever they end", () => {
  const store = storeOf(
    node(1), node(2, 1), node(3, 1, { flags: 0, branch: -1 }), node(4, 3), node(5, 3),
    node(6, 1, { flags: ALIVE, branch: 6 }), node(7, 6, { branch: 6, flags: ALIVE | TIP }),
  );
  assert.equal(store.get(1).holders, 5);
  assert.equal(store.get(3).holders, 2);
  assert.equal(store.get(6).holders, 1);
});

test("the branch's own continuation comes first, then children as they were forked", () => {
  const store = storeOf(node(10, 0, { branch: 1 }), node(12, 10, { branch: 5 }), node(13, 10, { branch: 3 }), node(14, 10, { branch: 1 }));
  assert.deepEqual(store.get(10).children, [14, 13, 12]);
});

test("paths, subtrees and leaves", () => {
  const store = storeOf(node(1), node(2, 1), node(3, 2), node(4, 2), node(5, 1));
  assert.deepEqual(store.path(4), [1, 2, 4]);
  assert.deepEqual(store.subtree(2), [2, 3, 4]);
  assert.deepEqual(store.leaves().sort(), [3, 4, 5]);
  assert.deepEqual(store.path(99), []);
  assert.deepEqual(store.subtree(99), []);
});

test("a node whose parent is not known is shown as a root", () => {
  const store = storeOf(node(2, 1), node(3, 2));
  assert.deepEqual(store.roots, [2]);
});
