// The key map: one table feeds the handler and the overlay.

export type Action =
  | "parent" | "child" | "up" | "down" | "first" | "last"
  | "fork" | "forkGo" | "continue" | "continueLeaves" | "stop"
  | "edit" | "append" | "top" | "prune"
  | "collapse" | "hoist" | "selectLeaves" | "tokenBack" | "tokenOn"
  | "view" | "heat" | "fit" | "zoomIn" | "zoomOut" | "help" | "escape";

const BINDINGS: Record<string, Action> = {
  ArrowLeft: "parent",
  ArrowRight: "child",
  ArrowUp: "up",
  ArrowDown: "down",
  Home: "first",
  End: "last",
  f: "fork",
  F: "forkGo",
  c: "continue",
  Enter: "continue",
  C: "continueLeaves",
  s: "stop",
  e: "edit",
  t: "append",
  n: "top",
  p: "prune",
  Delete: "prune",
  " ": "collapse",
  h: "hoist",
  a: "selectLeaves",
  "[": "tokenBack",
  "]": "tokenOn",
  g: "view",
  l: "heat",
  "0": "fit",
  "+": "zoomIn",
  "=": "zoomIn",
  "-": "zoomOut",
  "?": "help",
  Escape: "escape",
};

export const KEY_MAP: readonly { group: string; keys: readonly [string, string][] }[] = [
  {
    group: "Move",
    keys: [
      ["\u2190 \u2192", "parent, first child"],
      ["\u2191 \u2193", "node above, below"],
      ["Home End", "first, last node"],
      ["Shift+arrow", "add nodes to the selection"],
      ["[ ]", "token by token inside the node"],
    ],
  },
  {
    group: "Grow",
    keys: [
      ["f", "fork the node, or after the picked token"],
      ["1 \u2026 9", "how many children"],
      ["F", "fork and stream into all children"],
      ["c Enter", "continue the selected nodes"],
      ["C", "continue every leaf, in one batch"],
      ["s", "stop streaming"],
    ],
  },
  {
    group: "Change",
    keys: [
      ["e", "edit: fork at the common prefix"],
      ["t", "type text to append"],
      ["n", "most likely next tokens"],
      ["p Delete", "prune the node and all below"],
    ],
  },
  {
    group: "Look",
    keys: [
      ["Space", "collapse or expand"],
      ["h", "show only this subtree, and back"],
      ["a", "select all leaves"],
      ["g", "graph or outline"],
      ["l", "token probability colours"],
      ["0 + \u2212", "fit, zoom in, zoom out"],
      ["?", "this overview"],
    ],
  },
];

/** Action of a key press; undefined when the key is not ours (or Ctrl, Alt or Meta is held). */
export function actionOf(event: { key: string; ctrlKey: boolean; altKey: boolean; metaKey: boolean }): Action | undefined {
  if (event.ctrlKey || event.altKey || event.metaKey) return undefined;
  return BINDINGS[event.key];
}
