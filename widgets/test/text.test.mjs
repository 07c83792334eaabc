import assert from "node:assert/strict";
import { test } from "node:test";
import { HEAT_STEPS, bytes, cardText, fixed, heatStep, micros, outlineRows, percent, plural, step, visibleToken, wrap, layoutTree } from "../.test/pure.mjs";
import { node, storeOf } from "./helpers.mjs";

const measure = (text) => text.length;

test("text is wrapped at spaces and keeps its newest words", () => {
  assert.deepEqual(wrap("one two three", 20, 2, measure), ["one two three"]);
  assert.deepEqual(wrap("one two three four", 9, 3, measure), ["one two", "three", "four"]);
  const [first, last] = wrap("alpha beta gamma delta epsilon zeta", 12, 2, measure);
  assert.equal(first, "alpha beta");
  assert.match(last, /^\u2026.*zeta$/);
  assert.ok(last.length <= 12);
});

test("a word longer than the line is cut, nothing loops", () => {
  assert.equal(wrap("x".repeat(100), 10, 2, measure).length, 2);
  assert.deepEqual(wrap("", 10, 2, measure), []);
});

test("control and direction-changing characters never reach a card", () => {
  const shown = cardText("a\u202eb\u0000c\nd\u2066e");
  assert.equal(shown, "a\u00b7b\u00b7c \u21b5 d\u00b7e");
  assert.equal(visibleToken("\n"), "\u21b5");
  assert.equal(visibleToken(" the"), "\u2423the");
  assert.equal(visibleToken(""), "\u2205");
  assert.equal(visibleToken("\u202e"), "\\u{202e}");
});

test("numbers read as people write them", () => {
  assert.equal(micros(0.84), "0.8 \u00b5s");
  assert.equal(micros(1500), "1.5 ms");
  assert.equal(bytes(0), "0 B");
  assert.equal(bytes(1536), "1.5 KiB");
  assert.equal(bytes(94.4 * 2 ** 20), "94 MiB");
  assert.equal(plural(1, "branch"), "1 branch");
  assert.equal(plural(1234, "branch"), "1,234 branches");
  assert.equal(fixed(NaN), "\u2013");
  assert.equal(fixed(-1.234), "\u22121.23");
  assert.equal(percent(Math.log(0.5)), "50%");
});

test("heat steps cover every probability, given tokens have none", () => {
  assert.equal(heatStep(null), -1);
  assert.equal(heatStep(NaN), -1);
  assert.equal(heatStep(0), 0);
  assert.equal(heatStep(Math.log(0.3)), 2);
  assert.equal(heatStep(-50), HEAT_STEPS.length - 1);
  assert.equal(heatStep(-Infinity), HEAT_STEPS.length - 1);
});

test("arrow keys walk the tree as it is drawn", () => {
  const store = storeOf(node(1), node(2, 1), node(3, 1), node(4, 2));
  const layout = layoutTree(store.roots, (id) => store.get(id).children);
  assert.equal(step(store, layout, 1, "child"), 2);
  assert.equal(step(store, layout, 2, "down"), 3);
  assert.equal(step(store, layout, 3, "down"), 3);
  assert.equal(step(store, layout, 4, "parent"), 2);
  assert.equal(step(store, layout, 99, "child"), 1);
});

test("the outline lists what is not collapsed, with levels and positions", () => {
  const store = storeOf(node(1), node(2, 1), node(3, 1), node(4, 2));
  const rows = outlineRows(store, store.roots, new Set());
  assert.deepEqual(rows.map((r) => [r.id, r.level, r.position, r.size]), [[1, 1, 1, 1], [2, 2, 1, 2], [4, 3, 1, 1], [3, 2, 2, 2]]);
  assert.deepEqual(outlineRows(store, store.roots, new Set([2])).map((r) => r.id), [1, 2, 3]);
});
