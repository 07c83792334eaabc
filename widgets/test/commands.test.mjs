import assert from "node:assert/strict";
import { test } from "node:test";
import { CommandFailed, Commands } from "../.test/pure.mjs";

test("a reply settles the command with its id, others are left alone", async () => {
  const sent = [];
  const commands = new Commands((m) => sent.push(m), "t");
  const done = commands.run("fork", 3, { count: 2 });
  assert.deepEqual(sent, [{ t: "cmd", id: "t-1", op: "fork", node: 3, args: { count: 2 } }]);
  assert.equal(commands.settle({ t: "reply", id: "py-1", ok: true }), false);
  assert.equal(commands.settle({ t: "reply", id: "t-1", ok: true, result: { x: 1 } }), true);
  assert.equal((await done).result.x, 1);
  assert.equal(commands.pending, 0);
});

test("an error reply rejects with its type and message", async () => {
  const commands = new Commands(() => undefined, "t");
  const done = commands.run("prune", 1);
  commands.settle({ t: "reply", id: "t-1", ok: false, error: { type: "StaleBranch", message: "gone" } });
  await assert.rejects(done, (e) => e instanceof CommandFailed && e.typeName === "StaleBranch" && e.message === "gone");
});

test("a command without an answer fails by itself", async () => {
  const commands = new Commands(() => undefined, "t", 5);
  await assert.rejects(commands.run("top", 1), (e) => e.typeName === "NoAnswer");
  assert.equal(commands.pending, 0);
});
