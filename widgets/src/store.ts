// The tree as the front end knows it: applies frames, notices gaps, keeps children and holders.
import { ALIVE, TIP, decodeRows, type FrameHeader, type NodeData, type Totals } from "./protocol";

export interface TreeNode extends NodeData {
  children: number[];
  /** Live branches whose path runs through this node: how many hold its pages. */
  holders: number;
}

export type Applied =
  | { kind: "ok"; structure: boolean; changed: number[] }
  | { kind: "gap" }
  | { kind: "ignored" };

export class Store {
  readonly nodes = new Map<number, TreeNode>();
  roots: number[] = [];
  seq = 0;
  totals: Totals = {};
  /** Counts structural changes; layouts are valid for one value of it. */
  structure = 0;
  hasValues = false;
  private waiting = true;

  /** Fold one frame in. A delta that does not follow the last frame is dropped: ask for a snapshot. */
  apply(header: FrameHeader, buffer: DataView | undefined): Applied {
    if (!header.snapshot) {
      if (this.waiting) return { kind: "ignored" };
      if (header.seq <= this.seq) return { kind: "ignored" };
      if (header.seq !== this.seq + 1) {
        this.waiting = true;
        return { kind: "gap" };
      }
    }
    const rows = decodeRows(header, buffer);
    let structure = header.snapshot;
    if (header.snapshot) this.nodes.clear();
    for (const id of header.removed) structure = this.nodes.delete(id) || structure;
    for (const row of rows) {
      const old = this.nodes.get(row.id);
      structure ||= !old || old.parent !== row.parent || (old.flags ^ row.flags) & (ALIVE | TIP) ? true : false;
      this.hasValues ||= row.visits > 0;
      if (old) Object.assign(old, row);
      else this.nodes.set(row.id, { ...row, children: [], holders: 0 });
    }
    if (structure) this.relink();
    this.seq = header.seq;
    this.waiting = false;
    this.totals = header.totals ?? this.totals;
    return { kind: "ok", structure, changed: rows.map((row) => row.id) };
  }

  get(id: number): TreeNode | undefined {
    return this.nodes.get(id);
  }

  /** Ids from the root down to `id`; empty for an unknown node. */
  path(id: number): number[] {
    const path: number[] = [];
    const seen = new Set<number>();
    for (let node = this.nodes.get(id); node && !seen.has(node.id); node = this.nodes.get(node.parent)) {
      seen.add(node.id);
      path.push(node.id);
    }
    return path.reverse();
  }

  /** `id` and everything below it, parents first. */
  subtree(id: number): number[] {
    const order: number[] = [];
    const stack = this.nodes.has(id) ? [id] : [];
    while (stack.length) {
      const top = stack.pop() as number;
      order.push(top);
      const children = this.nodes.get(top)?.children ?? [];
      for (let i = children.length - 1; i >= 0; i--) stack.push(children[i] as number);
    }
    return order;
  }

  /** Live branches that end at or below `id`. */
  branchesBelow(id: number): number {
    return this.nodes.get(id)?.holders ?? 0;
  }

  leaves(): number[] {
    return [...this.nodes.values()].filter((node) => node.children.length === 0).map((n) => n.id);
  }

  private relink(): void {
    this.structure++;
    this.roots = [];
    for (const node of this.nodes.values()) {
      node.children = [];
      node.holders = node.flags & TIP && node.flags & ALIVE ? 1 : 0;
    }
    for (const node of this.nodes.values()) {
      const parent = this.nodes.get(node.parent);
      if (parent) parent.children.push(node.id);
      else this.roots.push(node.id);
    }
    for (const node of this.nodes.values()) {
      if (node.children.length > 1) node.children.sort((a, b) => this.order(a, b));
    }
    this.roots.sort((a, b) => this.order(a, b));
    const all = this.roots.flatMap((root) => this.subtree(root));
    for (let i = all.length - 1; i >= 0; i--) {
      const node = this.nodes.get(all[i] as number) as TreeNode;
      const parent = this.nodes.get(node.parent);
      if (parent) parent.holders += node.holders;
    }
  }

  /** The branch's own continuation first (its id is the lowest), then children in fork order. */
  private order(a: number, b: number): number {
    const x = this.nodes.get(a) as TreeNode;
    const y = this.nodes.get(b) as TreeNode;
    return Math.abs(x.branch) - Math.abs(y.branch) || x.id - y.id;
  }
}
