// Which node an arrow key leads to, and which nodes are shown. Pure.
import type { Layout } from "./layout";
import type { Store } from "./store";

export type Direction = "parent" | "child" | "up" | "down" | "first" | "last";

/** Children to show below `id`: none below a collapsed node. */
export function shownChildren(store: Store, collapsed: ReadonlySet<number>, id: number): readonly number[] {
  return collapsed.has(id) ? [] : (store.get(id)?.children ?? []);
}

/** The node one step from `from`; `from` itself where there is none. */
export function step(store: Store, layout: Layout, from: number, direction: Direction): number {
  const placed = layout.at.get(from);
  const node = store.get(from);
  const first = layout.columns[0]?.[0]?.id ?? 0;
  if (!placed || !node) return first;
  if (direction === "first") return first;
  if (direction === "parent") return layout.at.has(node.parent) ? node.parent : from;
  if (direction === "child") return node.children.find((id) => layout.at.has(id)) ?? from;
  if (direction === "last") {
    const column = layout.columns[layout.columns.length - 1];
    return column?.[column.length - 1]?.id ?? from;
  }
  const column = layout.columns[placed.depth] ?? [];
  const next = column[column.indexOf(placed) + (direction === "down" ? 1 : -1)];
  return next?.id ?? from;
}

export interface OutlineRow {
  id: number;
  level: number;
  position: number;
  size: number;
}

/** Rows of the outline, parents before children; what is collapsed is left out. */
export function outlineRows(
  store: Store,
  roots: readonly number[],
  collapsed: ReadonlySet<number>,
): OutlineRow[] {
  const rows: OutlineRow[] = [];
  const stack: OutlineRow[] = [];
  const push = (ids: readonly number[], level: number): void => {
    for (let i = ids.length - 1; i >= 0; i--) {
      stack.push({ id: ids[i] as number, level, position: i + 1, size: ids.length });
    }
  };
  push(roots, 1);
  while (stack.length) {
    const row = stack.pop() as OutlineRow;
    rows.push(row);
    push(shownChildren(store, collapsed, row.id), row.level + 1);
  }
  return rows;
}
