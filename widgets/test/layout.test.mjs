import assert from "node:assert/strict";
import { test } from "node:test";
import { layoutTree } from "../.test/pure.mjs";
import { randomTree } from "./helpers.mjs";

const placed = (layout) => Object.fromEntries([...layout.at.values()].map((p) => [p.id, [p.depth, p.y]]));

test("nothing gives an empty layout", () => {
  const layout = layoutTree([], () => []);
  assert.equal(layout.at.size, 0);
  assert.deepEqual([layout.minY, layout.maxY], [0, 0]);
});

test("children are one column on, a row apart, centred on their parent", () => {
  const tree = { 1: [2, 3, 4] };
  const layout = layoutTree([1], (id) => tree[id] ?? []);
  assert.deepEqual(placed(layout), { 1: [0, 0], 2: [1, -1], 3: [1, 0], 4: [1, 1] });
});

test("a short subtree tucks in beside a long one", () => {
  const tree = { 1: [2, 3], 2: [4, 5, 6], 4: [], 3: [] };
  const layout = layoutTree([1], (id) => tree[id] ?? []);
  const rows = layout.maxY - layout.minY;
  assert.ok(rows <= 2.5, `three leaves in one column need no more than 2.5 rows apart, got ${rows}`);
});

test("no two nodes of a column overlap, columns are sorted, parents are centred", () => {
  for (let seed = 1; seed <= 30; seed++) {
    const children = randomTree(300, seed);
    const layout = layoutTree([1], children);
    assert.equal(layout.at.size, 300);
    for (const column of layout.columns) {
      for (let i = 1; i < column.length; i++) {
        const gap = column[i].y - column[i - 1].y;
        assert.ok(gap >= 1 - 1e-9, `seed ${seed}: nodes ${column[i - 1].id} and ${column[i].id} are ${gap} apart`);
      }
    }
    for (const { id, y } of layout.at.values()) {
      const below = children(id).map((child) => layout.at.get(child).y);
      if (below.length) assert.ok(Math.abs(y - (below[0] + below.at(-1)) / 2) < 1e-6);
    }
  }
});

test("several roots are kept further apart than siblings", () => {
  const tree = { 1: [2, 3], 4: [5] };
  const layout = layoutTree([1, 4], (id) => tree[id] ?? []);
  assert.ok(layout.at.get(5).y - layout.at.get(3).y > 1.2);
});

test("a chain of 20,000 nodes and 20,000 siblings need no recursion", () => {
  const chain = layoutTree([1], (id) => (id < 20000 ? [id + 1] : []));
  assert.equal(chain.columns.length, 20000);
  const fan = layoutTree([1], (id) => (id === 1 ? Array.from({ length: 20000 }, (_, i) => i + 2) : []));
  assert.equal(fan.maxY - fan.minY, 19999);
});

test("the layout is the same for the same tree", () => {
  const children = randomTree(500, 7);
  assert.deepEqual(placed(layoutTree([1], children)), placed(layoutTree([1], children)));
});
