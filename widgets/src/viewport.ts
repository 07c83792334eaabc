// Pan, zoom, culling and hit tests over a layout. Pure arithmetic: no canvas.
import type { Layout, Placed } from "./layout";

export interface Metrics {
  cardWidth: number;
  cardHeight: number;
  columnPitch: number;
  rowPitch: number;
}

export interface Rect {
  x0: number;
  y0: number;
  x1: number;
  y1: number;
}

export const MIN_SCALE = 0.0005;
export const MAX_SCALE = 2.5;

/** Below this scale only rows shrink further: far out, a tall tree must not become a thread. */
export const STRETCH_TO = 0.2;

/** Screen = world * (scaleX, scale) + (tx, ty); the two scales differ only far out. */
export class Viewport {
  scale = 1;
  private stretch = 1;
  tx = 0;
  ty = 0;
  width = 1;
  height = 1;

  zoomAt(x: number, y: number, factor: number): void {
    const next = clamp(this.scale * factor, MIN_SCALE, MAX_SCALE);
    const [oldX, oldY] = [this.scaleX, this.scale];
    this.scale = next;
    this.tx = x - ((x - this.tx) * this.scaleX) / oldX;
    this.ty = y - ((y - this.ty) * this.scale) / oldY;
  }

  get scaleX(): number {
    return Math.max(this.scale, Math.min(this.scale * this.stretch, STRETCH_TO));
  }

  pan(dx: number, dy: number): void {
    this.tx += dx;
    this.ty += dy;
  }

  /** Show all of `bounds`, at most at `maxScale` and at least at `minScale`. */
  fit(bounds: Rect, padding = 28, maxScale = 1, minScale = MIN_SCALE): void {
    const w = Math.max(1, bounds.x1 - bounds.x0);
    const h = Math.max(1, bounds.y1 - bounds.y0);
    const room = Math.min((this.width - 2 * padding) / w, (this.height - 2 * padding) / h);
    this.scale = clamp(Math.min(room, maxScale), minScale, MAX_SCALE);
    this.stretch = Math.max(1, (this.width - 2 * padding) / (w * this.scale));
    this.tx = (this.width - w * this.scaleX) / 2 - bounds.x0 * this.scaleX;
    this.ty = (this.height - h * this.scale) / 2 - bounds.y0 * this.scale;
  }

  /** Move as little as needed for `rect` to be inside, `margin` screen pixels from the edges. */
  reveal(rect: Rect, margin = 24): void {
    const x0 = rect.x0 * this.scaleX + this.tx;
    const x1 = rect.x1 * this.scaleX + this.tx;
    const y0 = rect.y0 * this.scale + this.ty;
    const y1 = rect.y1 * this.scale + this.ty;
    this.tx += nudge(x0, x1, this.width, margin);
    this.ty += nudge(y0, y1, this.height, margin);
  }

  toWorld(x: number, y: number): { x: number; y: number } {
    return { x: (x - this.tx) / this.scaleX, y: (y - this.ty) / this.scale };
  }

  visible(): Rect {
    const a = this.toWorld(0, 0);
    const b = this.toWorld(this.width, this.height);
    return { x0: a.x, y0: a.y, x1: b.x, y1: b.y };
  }
}

export function nodeRect(node: Placed, m: Metrics): Rect {
  const x0 = node.depth * m.columnPitch;
  const y0 = node.y * m.rowPitch;
  return { x0, y0, x1: x0 + m.cardWidth, y1: y0 + m.cardHeight };
}

export function layoutBounds(layout: Layout, m: Metrics): Rect {
  return {
    x0: 0,
    y0: layout.minY * m.rowPitch,
    x1: Math.max(0, layout.columns.length - 1) * m.columnPitch + m.cardWidth,
    y1: layout.maxY * m.rowPitch + m.cardHeight,
  };
}

/** Nodes whose card meets `rect`: binary search in each column that the rectangle crosses. */
export function visibleNodes(layout: Layout, m: Metrics, rect: Rect): Placed[] {
  const found: Placed[] = [];
  const first = Math.max(0, Math.ceil((rect.x0 - m.cardWidth) / m.columnPitch));
  const last = Math.min(layout.columns.length - 1, Math.floor(rect.x1 / m.columnPitch));
  for (let depth = first; depth <= last; depth++) {
    const column = layout.columns[depth] ?? [];
    const end = rect.y1 / m.rowPitch;
    for (let i = lowerBound(column, (rect.y0 - m.cardHeight) / m.rowPitch); i < column.length; i++) {
      const node = column[i] as Placed;
      if (node.y > end) break;
      found.push(node);
    }
  }
  return found;
}

/** Node whose card holds the world point, if any. O(log nodes). */
export function hitTest(layout: Layout, m: Metrics, x: number, y: number): Placed | undefined {
  const depth = Math.floor(x / m.columnPitch);
  const column = layout.columns[depth];
  if (!column || x - depth * m.columnPitch > m.cardWidth) return undefined;
  const node = column[lowerBound(column, (y - m.cardHeight) / m.rowPitch)];
  if (!node) return undefined;
  const rect = nodeRect(node, m);
  return y >= rect.y0 && y <= rect.y1 ? node : undefined;
}

/** Index of the first node of a column with y >= `y`. */
export function lowerBound(column: readonly Placed[], y: number): number {
  let low = 0;
  let high = column.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((column[middle] as Placed).y < y) low = middle + 1;
    else high = middle;
  }
  return low;
}

function clamp(value: number, low: number, high: number): number {
  return Math.min(high, Math.max(low, value));
}

function nudge(low: number, high: number, size: number, margin: number): number {
  if (high - low > size - 2 * margin) return margin - low;
  if (low < margin) return margin - low;
  if (high > size - margin) return size - margin - high;
  return 0;
}
