import assert from "node:assert/strict";
import { test } from "node:test";
import { Viewport, hitTest, layoutBounds, layoutTree, nodeRect, visibleNodes } from "../.test/pure.mjs";
import { random, randomTree } from "./helpers.mjs";

const M = { cardWidth: 200, cardHeight: 80, columnPitch: 260, rowPitch: 100 };

test("hit tests agree with the rectangles of all nodes", () => {
  const layout = layoutTree([1], randomTree(400, 3));
  const next = random(5);
  const bounds = layoutBounds(layout, M);
  let hits = 0;
  for (let i = 0; i < 3000; i++) {
    const x = bounds.x0 + next() * (bounds.x1 - bounds.x0);
    const y = bounds.y0 + next() * (bounds.y1 - bounds.y0);
    const inside = [...layout.at.values()].find((p) => {
      const r = nodeRect(p, M);
      return x >= r.x0 && x <= r.x1 && y >= r.y0 && y <= r.y1;
    });
    assert.equal(hitTest(layout, M, x, y)?.id, inside?.id);
    hits += inside ? 1 : 0;
  }
  assert.ok(hits > 100);
});

test("the gaps between cards hit nothing", () => {
  const layout = layoutTree([1], (id) => (id === 1 ? [2, 3] : []));
  assert.equal(hitTest(layout, M, 230, 0), undefined);
  assert.equal(hitTest(layout, M, 300, 40), undefined);
  assert.equal(hitTest(layout, M, -5, 10), undefined);
});

test("culling keeps exactly the nodes that meet the rectangle", () => {
  const layout = layoutTree([1], randomTree(500, 11));
  const next = random(2);
  for (let i = 0; i < 200; i++) {
    const x0 = next() * 3000 - 200;
    const y0 = next() * 4000 - 2000;
    const rect = { x0, y0, x1: x0 + 700, y1: y0 + 500 };
    const expected = [...layout.at.values()]
      .filter((p) => {
        const r = nodeRect(p, M);
        return r.x1 >= rect.x0 && r.x0 <= rect.x1 && r.y1 >= rect.y0 && r.y0 <= rect.y1;
      })
      .map((p) => p.id)
      .sort();
    assert.deepEqual(visibleNodes(layout, M, rect).map((p) => p.id).sort(), expected);
  }
});

test("zooming keeps the point under the pointer and respects the limits", () => {
  const view = new Viewport();
  Object.assign(view, { width: 800, height: 600 });
  const before = view.toWorld(300, 200);
  view.zoomAt(300, 200, 1.7);
  const after = view.toWorld(300, 200);
  assert.ok(Math.hypot(before.x - after.x, before.y - after.y) < 1e-9);
  for (let i = 0; i < 100; i++) view.zoomAt(0, 0, 2);
  assert.equal(view.scale, 2.5);
});

test("fit shows everything and does not enlarge", () => {
  const view = new Viewport();
  Object.assign(view, { width: 800, height: 600 });
  view.fit({ x0: -100, y0: -5000, x1: 4000, y1: 5000 });
  const seen = view.visible();
  assert.ok(seen.x0 <= -100 && seen.x1 >= 4000 && seen.y0 <= -5000 && seen.y1 >= 5000);
  view.fit({ x0: 0, y0: 0, x1: 10, y1: 10 });
  assert.equal(view.scale, 1);
});

test("far out the columns keep some width, and zooming in ends that without a jump", () => {
  const view = new Viewport();
  Object.assign(view, { width: 800, height: 600 });
  view.fit({ x0: 0, y0: 0, x1: 2000, y1: 800000 });
  assert.ok(view.scaleX > 50 * view.scale && view.scaleX <= 0.2);
  let last = view.scaleX;
  while (view.scale < 1) {
    const before = view.toWorld(123, 456);
    view.zoomAt(123, 456, 1.1);
    const after = view.toWorld(123, 456);
    assert.ok(Math.abs(before.x - after.x) < 1e-6 && Math.abs(before.y - after.y) < 1e-6);
    assert.ok(view.scaleX >= last && view.scaleX <= last * 1.1 + 1e-9);
    last = view.scaleX;
  }
  assert.equal(view.scaleX, view.scale);
});

test("reveal moves only as far as needed", () => {
  const view = new Viewport();
  Object.assign(view, { width: 800, height: 600 });
  view.reveal({ x0: 100, y0: 100, x1: 300, y1: 180 });
  assert.deepEqual([view.tx, view.ty], [0, 0]);
  view.reveal({ x0: 900, y0: 100, x1: 1100, y1: 180 });
  assert.deepEqual([view.tx, view.ty], [-324, 0]);
});
