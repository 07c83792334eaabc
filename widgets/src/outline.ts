// The outline: the same tree as indented rows, only those in sight in the DOM. Roles and states for
// screen readers; the focus stays on the list, `aria-activedescendant` names the selected row.
import { clear, el } from "./dom";
import { cardText, fixed } from "./format";
import { heatColor, heatStep } from "./heat";
import { outlineRows, type OutlineRow } from "./navigate";
import { ALIVE, ERROR, FINISH_REASONS, STREAMING } from "./protocol";
import type { Store, TreeNode } from "./store";

export const ROW_HEIGHT = 28;
const OVERSCAN = 6;

export interface OutlineState {
  roots: () => readonly number[];
  selected: ReadonlySet<number>;
  collapsed: ReadonlySet<number>;
  primary: number;
  heat: boolean;
}

export class Outline {
  readonly element: HTMLDivElement;
  private readonly sizer = el("div", "dl-outline-sizer", { role: "presentation" });
  private rows: OutlineRow[] = [];

  constructor(
    private readonly uid: string,
    private readonly store: Store,
    private readonly state: OutlineState,
    private readonly select: (id: number, add: boolean) => void,
    private readonly toggle: (id: number) => void,
  ) {
    this.element = el("div", "dl-outline", {
      role: "tree",
      tabindex: 0,
      "aria-label": "Branches",
      "aria-multiselectable": "true",
    });
    this.element.append(this.sizer);
    this.element.addEventListener("scroll", () => this.render());
    this.element.addEventListener("click", (event) => this.clicked(event));
  }

  /** The shape changed: list the rows again. */
  rebuild(): void {
    this.rows = outlineRows(this.store, this.state.roots(), this.state.collapsed);
    this.sizer.style.height = `${this.rows.length * ROW_HEIGHT}px`;
    this.render();
  }

  /** Only values or the selection changed. */
  render(): void {
    if (!this.element.offsetParent) return;
    const top = this.element.scrollTop;
    const height = this.element.clientHeight;
    const first = Math.max(0, Math.floor(top / ROW_HEIGHT) - OVERSCAN);
    const last = Math.min(this.rows.length, Math.ceil((top + height) / ROW_HEIGHT) + OVERSCAN);
    clear(this.sizer);
    for (let i = first; i < last; i++) {
      const row = this.rows[i] as OutlineRow;
      const node = this.store.get(row.id);
      if (node) this.sizer.append(this.row(row, node, i));
    }
    const shown = this.rows.findIndex((row) => row.id === this.state.primary);
    if (shown >= first && shown < last) {
      this.element.setAttribute("aria-activedescendant", this.rowId(this.state.primary));
    } else this.element.removeAttribute("aria-activedescendant");
  }

  reveal(id: number): void {
    const index = this.rows.findIndex((row) => row.id === id);
    if (index < 0) return;
    const top = index * ROW_HEIGHT;
    const { scrollTop, clientHeight } = this.element;
    if (top < scrollTop) this.element.scrollTop = top;
    else if (top + ROW_HEIGHT > scrollTop + clientHeight) this.element.scrollTop = top + ROW_HEIGHT - clientHeight;
    this.render();
  }

  /** Row above or below; used for the arrow keys, where the outline differs from the graph. */
  neighbour(id: number, by: 1 | -1): number {
    const index = this.rows.findIndex((row) => row.id === id);
    return this.rows[index + by]?.id ?? (index < 0 ? (this.rows[0]?.id ?? 0) : id);
  }

  private rowId(id: number): string {
    return `${this.uid}-row-${id}`;
  }

  private row(row: OutlineRow, node: TreeNode, index: number): HTMLElement {
    const chosen = this.state.selected.has(node.id);
    const open = !this.state.collapsed.has(node.id);
    const element = el("div", `dl-row${chosen ? " dl-chosen" : ""}`, {
      role: "treeitem",
      id: this.rowId(node.id),
      "data-node": node.id,
      "aria-level": row.level,
      "aria-posinset": row.position,
      "aria-setsize": row.size,
      "aria-selected": chosen ? "true" : "false",
      "aria-expanded": node.children.length ? String(open) : undefined,
    });
    element.style.top = `${index * ROW_HEIGHT}px`;
    element.style.paddingLeft = `${8 + Math.min(row.level - 1, 24) * 16}px`;
    const twisty = node.children.length ? (open ? "\u25be" : "\u25b8") : "";
    element.append(
      el("span", "dl-twisty", { "aria-hidden": "true" }, twisty),
      el("span", "dl-row-id", {}, node.branch > 0 ? `#${node.branch}` : "shared"),
      this.text(node),
      ...this.badges(node),
    );
    return element;
  }

  private text(node: TreeNode): HTMLElement {
    const shown = cardText(node.text).trim();
    const empty = node.end > node.start ? "(only white space)" : "no tokens of its own yet";
    const text = el("span", `dl-row-text${shown ? "" : " dl-empty"}`, {}, shown || empty);
    if (!(node.flags & ALIVE)) text.classList.add("dl-dead");
    return text;
  }

  private badges(node: TreeNode): HTMLElement[] {
    const out: HTMLElement[] = [];
    const add = (text: string, kind = "", title = ""): void => {
      out.push(el("span", `dl-badge ${kind}`, { title: title || undefined }, text));
    };
    if (node.flags & STREAMING) add("streaming", "dl-live");
    else if (node.flags & ERROR) add(FINISH_REASONS[node.finish] || "error", "dl-bad");
    if (node.visits) add(`N ${node.visits}  Q ${fixed(node.value)}  UCT ${fixed(node.uct)}`, "dl-values");
    if (Number.isFinite(node.lpMean)) {
      add(`lp ${fixed(node.lpMean)}`, "dl-fixed", "mean log-probability");
      const step = heatStep(node.lpMean);
      if (this.state.heat && step > 0) (out[out.length - 1] as HTMLElement).style.background = heatColor(step);
    }
    add(`${node.end - node.start} tok`, "dl-fixed");
    add(`${node.pages} pg \u00d7${node.holders}`, "dl-fixed", `pages, held by ${node.holders} branches`);
    return out;
  }

  private clicked(event: MouseEvent): void {
    const target = event.target as Element;
    const row = target.closest<HTMLElement>(".dl-row");
    if (!row) return;
    const id = Number(row.dataset["node"]);
    if (target.closest(".dl-twisty") && this.store.get(id)?.children.length) this.toggle(id);
    else this.select(id, event.shiftKey || event.ctrlKey || event.metaKey);
  }
}
