// The canvas view: owns the viewport, turns pointer gestures into intents, draws once a frame.
import { draw, type Scene } from "./draw";
import { el } from "./dom";
import { layoutTree, type Layout, type Placed } from "./layout";
import { STREAMING } from "./protocol";
import { shownChildren } from "./navigate";
import type { Store } from "./store";
import type { Theme } from "./theme";
import { Viewport, hitTest, layoutBounds, nodeRect, type Metrics } from "./viewport";

export interface GraphState {
  roots: () => readonly number[];
  selected: ReadonlySet<number>;
  collapsed: ReadonlySet<number>;
  primary: number;
  heat: boolean;
}

export interface GraphEvents {
  select: (id: number, add: boolean) => void;
  toggle: (id: number) => void;
  drawn: () => void;
}

const MOVE_MS = 180;
const MOVE_MAX_NODES = 1500;
const READABLE = 0.5; // below this a tree that fits is too small to read
const COMFORTABLE = 0.72;

export class Graph {
  readonly canvas = el("canvas", "dl-canvas", { "aria-hidden": "true" });
  readonly view = new Viewport();
  layout: Layout = layoutTree([], () => []);
  theme: Theme;
  drawnNodes = 0;
  lastFrameMs = 0;
  private hover = 0;
  /** What happens to the view when the tree changes: kept readable, kept whole, or left alone. */
  private follow: "auto" | "all" | "manual" = "auto";
  private frame = 0;
  private moved: { from: Map<number, Placed>; start: number } | undefined;
  private readonly reduced = matchMedia("(prefers-reduced-motion: reduce)");

  constructor(
    private readonly store: Store,
    private readonly state: GraphState,
    private readonly events: GraphEvents,
    theme: Theme,
    private readonly signal: AbortSignal,
  ) {
    this.theme = theme;
    this.listen();
  }

  get metrics(): Metrics {
    const height = this.store.hasValues ? 104 : 88;
    return { cardWidth: 246, cardHeight: height, columnPitch: 246 + 58, rowPitch: height + 16 };
  }

  /** The tree's shape or what is shown of it changed: lay it out again. */
  relayout(): void {
    const before = this.layout;
    this.layout = layoutTree(this.state.roots(), (id) =>
      shownChildren(this.store, this.state.collapsed, id),
    );
    if (before.at.size && this.layout.at.size <= MOVE_MAX_NODES && !this.reduced.matches) {
      this.moved = { from: before.at, start: performance.now() };
    }
    this.autoFit();
    this.invalidate();
  }

  resize(width: number, height: number): void {
    const ratio = window.devicePixelRatio || 1;
    this.view.width = Math.max(1, width);
    this.view.height = Math.max(1, height);
    this.canvas.width = Math.round(this.view.width * ratio);
    this.canvas.height = Math.round(this.view.height * ratio);
    this.autoFit();
    // A resized canvas is blank: draw now, not a frame later.
    cancelAnimationFrame(this.frame);
    this.render(performance.now());
  }

  /** Show the whole tree, however small it gets. */
  fit(): void {
    this.follow = "all";
    this.autoFit();
    this.invalidate();
  }

  zoom(factor: number): void {
    this.follow = "manual";
    const { x, y } = this.anchor();
    this.view.zoomAt(x, y, factor);
    this.invalidate();
  }

  /** Where zooming by key or button aims: the selected node while it is in sight, else the middle. */
  private anchor(): { x: number; y: number } {
    const { width, height, scale, scaleX, tx, ty } = this.view;
    const placed = this.layout.at.get(this.state.primary);
    if (placed) {
      const rect = nodeRect(placed, this.metrics);
      const x = ((rect.x0 + rect.x1) / 2) * scaleX + tx;
      const y = ((rect.y0 + rect.y1) / 2) * scale + ty;
      if (x >= 0 && x <= width && y >= 0 && y <= height) return { x, y };
    }
    return { x: width / 2, y: height / 2 };
  }

  reveal(id: number): void {
    const placed = this.layout.at.get(id);
    if (!placed) return;
    this.view.reveal(nodeRect(placed, this.metrics));
    this.invalidate();
  }

  invalidate(): void {
    if (!this.frame) this.frame = requestAnimationFrame((now) => this.render(now));
  }

  /** Until someone pans or zooms: all of a small tree, else a readable part around the selection. */
  private autoFit(): void {
    if (this.follow === "manual") return;
    const bounds = layoutBounds(this.layout, this.metrics);
    this.view.fit(bounds);
    if (this.follow === "all" || this.view.scale >= READABLE) return;
    this.view.fit(bounds, 28, 1, COMFORTABLE);
    this.view.tx = 28;
    const focus = this.layout.at.get(this.state.primary) ?? this.layout.columns[0]?.[0];
    if (focus) this.reveal(focus.id);
  }

  private render(now: number): void {
    this.frame = 0;
    const ctx = this.canvas.getContext("2d");
    if (!ctx) return;
    const t = this.moved ? Math.min(1, (now - this.moved.start) / MOVE_MS) : 1;
    if (t >= 1) this.moved = undefined;
    const streaming = (this.store.totals.streaming ?? 0) > 0;
    const began = performance.now();
    this.drawnNodes = draw(ctx, this.scene(now, easeOut(t)), window.devicePixelRatio || 1);
    this.lastFrameMs = performance.now() - began;
    // For tests and bug reports: what is on screen, and where.
    const { scale, tx, ty } = this.view;
    Object.assign(this.canvas.dataset, {
      drawn: String(this.drawnNodes),
      view: [scale, tx, ty].map((n) => n.toFixed(3)).join(" "),
      frameMs: this.lastFrameMs.toFixed(1),
    });
    this.events.drawn();
    if (this.moved || (streaming && this.anyVisibleStreaming())) this.invalidate();
  }

  private anyVisibleStreaming(): boolean {
    for (const node of this.store.nodes.values()) if (node.flags & STREAMING) return true;
    return false;
  }

  private scene(now: number, t: number): Scene {
    const from = this.moved?.from;
    return {
      store: this.store,
      layout: this.layout,
      metrics: this.metrics,
      view: this.view,
      theme: this.theme,
      selected: this.state.selected,
      primary: this.state.primary,
      path: new Set(this.store.path(this.state.primary)),
      hover: this.hover,
      collapsed: this.state.collapsed,
      heat: this.state.heat,
      pulse: this.reduced.matches ? 1 : (Math.sin(now / 260) + 1) / 2,
      placeOf: (node) => {
        const old = from?.get(node.id) ?? from?.get(this.store.get(node.id)?.parent ?? 0);
        if (!old || t >= 1) return node;
        return { id: node.id, depth: lerp(old.depth, node.depth, t), y: lerp(old.y, node.y, t) };
      },
    };
  }

  private at(event: MouseEvent): { id: number; onHandle: boolean } {
    const box = this.canvas.getBoundingClientRect();
    const p = this.view.toWorld(event.clientX - box.left, event.clientY - box.top);
    const m = this.metrics;
    // The handle hangs half outside the card's right edge.
    const hit = hitTest(this.layout, m, p.x, p.y) ?? hitTest(this.layout, m, p.x - 10, p.y);
    if (!hit) return { id: 0, onHandle: false };
    const rect = nodeRect(hit, m);
    const near = Math.abs(p.x - rect.x1) < 14 && Math.abs(p.y - (rect.y0 + rect.y1) / 2) < 13;
    const inside = p.x <= rect.x1;
    const has = (this.store.get(hit.id)?.children.length ?? 0) > 0;
    return { id: inside || near ? hit.id : 0, onHandle: near && has };
  }

  private listen(): void {
    const { canvas, signal } = this;
    let drag: { x: number; y: number; moved: boolean } | undefined;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      drag = { x: event.clientX, y: event.clientY, moved: false };
      canvas.setPointerCapture(event.pointerId);
    }, { signal });
    canvas.addEventListener("pointermove", (event) => {
      if (!drag) {
        const { id, onHandle } = this.at(event);
        canvas.style.cursor = id ? "pointer" : "grab";
        canvas.title = onHandle ? "Collapse or expand (Space)" : "";
        if (id !== this.hover) {
          this.hover = id;
          this.invalidate();
        }
        return;
      }
      const dx = event.clientX - drag.x;
      const dy = event.clientY - drag.y;
      if (!drag.moved && Math.hypot(dx, dy) < 4) return;
      drag = { x: event.clientX, y: event.clientY, moved: true };
      this.follow = "manual";
      canvas.style.cursor = "grabbing";
      this.view.pan(dx, dy);
      this.invalidate();
    }, { signal });
    canvas.addEventListener("pointerup", (event) => {
      const click = drag && !drag.moved;
      drag = undefined;
      canvas.style.cursor = "grab";
      if (!click) return;
      const { id, onHandle } = this.at(event);
      if (onHandle) this.events.toggle(id);
      else if (id) this.events.select(id, event.shiftKey || event.ctrlKey || event.metaKey);
    }, { signal });
    canvas.addEventListener("pointercancel", () => (drag = undefined), { signal });
    canvas.addEventListener("pointerleave", () => {
      this.hover = 0;
      this.invalidate();
    }, { signal });
    canvas.addEventListener("dblclick", (event) => {
      const { id, onHandle } = this.at(event);
      if (id && !onHandle) this.events.toggle(id);
    }, { signal });
    // A plain wheel scrolls the notebook until the explorer was clicked into.
    canvas.addEventListener("wheel", (event) => this.wheel(event), { signal, passive: false });
  }

  private wheel(event: WheelEvent): void {
    const zooming = event.ctrlKey || event.metaKey;
    const focused = this.canvas.closest(".dl-root")?.contains(document.activeElement) ?? false;
    if (!zooming && !focused) return;
    event.preventDefault();
    this.follow = "manual";
    const box = this.canvas.getBoundingClientRect();
    if (zooming) {
      this.view.zoomAt(event.clientX - box.left, event.clientY - box.top, Math.exp(-event.deltaY * 0.0022));
    } else {
      this.view.pan(-event.deltaX, -event.deltaY);
    }
    this.invalidate();
  }
}

function lerp(a: number, b: number, t: number): number {
  return a + (b - a) * t;
}

function easeOut(t: number): number {
  return 1 - (1 - t) ** 3;
}
