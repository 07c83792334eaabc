// Draws the visible part of the tree. Level of detail by scale: cards, labelled chips, dots.
import { cardText, fixed, wrap } from "./format";
import { heatColor, heatStep } from "./heat";
import type { Layout, Placed } from "./layout";
import { ALIVE, BEST, ERROR, FINISH_REASONS, ROOT, STREAMING, TIP } from "./protocol";
import type { Store, TreeNode } from "./store";
import type { Theme } from "./theme";
import { lowerBound, nodeRect, visibleNodes, type Metrics, type Rect, type Viewport } from "./viewport";

export interface Scene {
  store: Store;
  layout: Layout;
  metrics: Metrics;
  view: Viewport;
  theme: Theme;
  selected: ReadonlySet<number>;
  primary: number;
  path: ReadonlySet<number>;
  hover: number;
  collapsed: ReadonlySet<number>;
  heat: boolean;
  pulse: number;
  /** Where a node is drawn while it moves to its place. */
  placeOf: (node: Placed) => Placed;
}

export const CARD_SCALE = 0.56;
export const CHIP_SCALE = 0.2;

type Context = CanvasRenderingContext2D;

/** Draw one frame; returns how many nodes were drawn. */
export function draw(ctx: Context, scene: Scene, ratio: number): number {
  const { view, theme } = scene;
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.fillStyle = theme.page;
  ctx.fillRect(0, 0, view.width, view.height);
  const rect = view.visible();
  const nodes = visibleNodes(scene.layout, scene.metrics, rect);
  drawEdges(ctx, scene, rect);
  if (view.scale >= CARD_SCALE) for (const node of nodes) drawCard(ctx, scene, node);
  else if (view.scale >= CHIP_SCALE) for (const node of nodes) drawChip(ctx, scene, node);
  else drawDots(ctx, scene, nodes);
  return nodes.length;
}

/** Parents of a column are in order and so are their children: the visible edges are one range. */
function drawEdges(ctx: Context, scene: Scene, rect: Rect): void {
  const { layout, metrics: m, view } = scene;
  const first = Math.max(0, Math.floor(rect.x0 / m.columnPitch) - 1);
  const last = Math.min(layout.columns.length - 2, Math.floor(rect.x1 / m.columnPitch));
  const plain = new Path2D();
  const strong = new Path2D();
  const y0 = (rect.y0 - m.cardHeight) / m.rowPitch;
  const y1 = rect.y1 / m.rowPitch;
  for (let depth = first; depth <= last; depth++) {
    for (const child of edgeRange(layout, depth + 1, y0, y1, scene)) {
      const node = scene.store.get(child.id);
      const above = node && layout.at.get(node.parent);
      if (!above) continue;
      addEdge(scene.path.has(child.id) ? strong : plain, scene.placeOf(above), scene.placeOf(child), m, view);
    }
  }
  ctx.lineWidth = Math.max(0.75, 1.4 * Math.min(1, view.scale * 1.6));
  ctx.strokeStyle = scene.theme.edge;
  ctx.stroke(plain);
  ctx.lineWidth += 0.9;
  ctx.strokeStyle = scene.theme.brand;
  ctx.stroke(strong);
}

/** Children at `depth` whose edge can be seen: their own row or their parent's is in sight. */
function edgeRange(layout: Layout, depth: number, y0: number, y1: number, scene: Scene): Placed[] {
  const column = layout.columns[depth] ?? [];
  let low = lowerBound(column, y0);
  let high = lowerBound(column, y1);
  const parentY = (node: Placed | undefined): number => {
    const parent = node && scene.store.get(node.id)?.parent;
    return (parent !== undefined && layout.at.get(parent)?.y) || 0;
  };
  while (low > 0 && parentY(column[low - 1]) >= y0) low--;
  while (high < column.length && parentY(column[high]) <= y1) high++;
  return column.slice(low, high);
}

function addEdge(path: Path2D, above: Placed, below: Placed, m: Metrics, view: Viewport): void {
  const a = nodeRect(above, m);
  const b = nodeRect(below, m);
  const x0 = a.x1 * view.scaleX + view.tx;
  const y0 = ((a.y0 + a.y1) / 2) * view.scale + view.ty;
  const x1 = b.x0 * view.scaleX + view.tx;
  const y1 = ((b.y0 + b.y1) / 2) * view.scale + view.ty;
  path.moveTo(x0, y0);
  if (view.scale < CHIP_SCALE) path.lineTo(x1, y1);
  else path.bezierCurveTo((x0 + x1) / 2, y0, (x0 + x1) / 2, y1, x1, y1);
}

function screenRect(scene: Scene, placed: Placed): { x: number; y: number; w: number; h: number } {
  const r = nodeRect(scene.placeOf(placed), scene.metrics);
  const { scale, scaleX, tx, ty } = scene.view;
  return { x: r.x0 * scaleX + tx, y: r.y0 * scale + ty, w: (r.x1 - r.x0) * scaleX, h: (r.y1 - r.y0) * scale };
}

function drawCard(ctx: Context, scene: Scene, placed: Placed): void {
  const node = scene.store.get(placed.id);
  if (!node) return;
  const { theme, view } = scene;
  const { x, y, w, h } = screenRect(scene, placed);
  const s = view.scale;
  const chosen = scene.selected.has(node.id);
  frameCard(ctx, scene, node, x, y, w, h);
  const pad = 11 * s;
  const inner = w - 2 * pad - 2 * s;
  const left = x + pad + 2 * s;
  ctx.textBaseline = "alphabetic";
  drawHeader(ctx, scene, node, left, y + 17 * s, inner);
  ctx.font = `${12.5 * s}px ${theme.font}`;
  const shown = cardText(node.text);
  if (shown.trim() === "") {
    ctx.fillStyle = theme.faint;
    ctx.font = `italic ${12.5 * s}px ${theme.font}`;
    ctx.fillText(node.end > node.start ? "(only white space)" : "no tokens of its own yet", left, y + 38 * s);
  } else {
    ctx.fillStyle = node.flags & ALIVE ? theme.text : theme.muted;
    const lines = wrap(shown, inner, 2, (text) => ctx.measureText(text).width);
    lines.forEach((line, i) => ctx.fillText(line, left, y + (37 + 16.5 * i) * s));
  }
  drawFooter(ctx, scene, node, left, y + 76 * s, inner);
  if (scene.store.hasValues) drawValues(ctx, scene, node, left, y + 92.5 * s, inner);
  drawCollapse(ctx, scene, node, x + w, y + h / 2, chosen || scene.hover === node.id);
}

function frameCard(
  ctx: Context, scene: Scene, node: TreeNode, x: number, y: number, w: number, h: number,
): void {
  const { theme, view } = scene;
  const chosen = scene.selected.has(node.id);
  const radius = 7 * view.scale;
  ctx.beginPath();
  ctx.roundRect(x, y, w, h, radius);
  if (node.id === scene.primary) {
    ctx.save();
    ctx.shadowColor = theme.brandSoft;
    ctx.shadowBlur = 14 * view.scale;
  }
  ctx.fillStyle = node.flags & ALIVE ? theme.card : theme.cardDim;
  ctx.fill();
  if (node.id === scene.primary) ctx.restore();
  ctx.save();
  ctx.clip();
  ctx.fillStyle = accent(scene, node);
  ctx.fillRect(x, y, 4 * view.scale, h);
  ctx.restore();
  ctx.lineWidth = chosen ? 2 : 1;
  ctx.strokeStyle = chosen ? theme.brand : scene.hover === node.id ? theme.borderStrong : theme.border;
  ctx.beginPath();
  ctx.roundRect(x, y, w, h, radius);
  ctx.stroke();
}

/** The stripe: surprise of the node's tokens, else what the node is. */
function accent(scene: Scene, node: TreeNode): string {
  const { theme } = scene;
  if (node.flags & ERROR) return theme.bad;
  if (node.flags & BEST) return theme.good;
  if (node.flags & STREAMING) return theme.brand;
  const step = scene.heat ? heatStep(node.lpMean) : -1;
  if (step > 0) return heatColor(step);
  return node.flags & ROOT ? theme.borderStrong : theme.border;
}

function drawHeader(ctx: Context, scene: Scene, node: TreeNode, x: number, y: number, width: number): void {
  const { theme, view } = scene;
  const s = view.scale;
  ctx.font = `600 ${11 * s}px ${theme.font}`;
  ctx.fillStyle = theme.muted;
  const name = node.branch > 0 ? `#${node.branch}` : "shared";
  ctx.fillText(name, x, y);
  const after = x + ctx.measureText(name).width + 7 * s;
  ctx.font = `${11 * s}px ${theme.font}`;
  ctx.fillStyle = theme.faint;
  const count = node.end - node.start;
  ctx.fillText(`${node.flags & ROOT ? "prompt \u00b7 " : ""}${count} tok`, after, y);
  const [label, color, dot] = status(scene, node);
  if (!label) return;
  ctx.fillStyle = color;
  const right = x + width;
  const w = ctx.measureText(label).width;
  ctx.fillText(label, right - w, y);
  if (dot) {
    ctx.globalAlpha = dot === "pulse" ? 0.35 + 0.65 * scene.pulse : 1;
    ctx.beginPath();
    ctx.arc(right - w - 8 * s, y - 3.6 * s, 3.2 * s, 0, 7);
    ctx.fill();
    ctx.globalAlpha = 1;
  }
}

function status(scene: Scene, node: TreeNode): [string, string, "" | "dot" | "pulse"] {
  const { theme } = scene;
  if (node.flags & STREAMING) return ["streaming", theme.brand, "pulse"];
  if (!(node.flags & ALIVE)) return ["pruned, held below", theme.faint, ""];
  const reason = FINISH_REASONS[node.finish] ?? "";
  if (node.flags & ERROR) return [reason || "error", theme.bad, "dot"];
  if (node.flags & BEST) return ["best", theme.good, "dot"];
  if (reason === "length") return ["done", theme.faint, ""];
  if (reason === "eos" || reason === "stop") return ["ended", theme.good, ""];
  return [reason, reason === "cancelled" ? theme.warn : theme.bad, ""];
}

function drawFooter(ctx: Context, scene: Scene, node: TreeNode, x: number, y: number, width: number): void {
  const { theme, view } = scene;
  const s = view.scale;
  ctx.font = `${10.5 * s}px ${theme.font}`;
  ctx.fillStyle = theme.muted;
  if (Number.isFinite(node.lpMean)) {
    ctx.fillText(`lp ${fixed(node.lpMean)}  last ${fixed(node.lpLast)}`, x, y);
  } else if (node.end > node.start) {
    ctx.fillStyle = theme.faint;
    ctx.fillText("given text", x, y);
  }
  const label = pagesLabel(node);
  const w = ctx.measureText(label).width;
  ctx.fillStyle = theme.muted;
  ctx.fillText(label, x + width - w, y);
  pageGlyph(ctx, x + width - w - 13 * s, y - 8 * s, s, node.holders > 1 ? theme.brand : theme.faint);
}

/** "2 own + 12" for a branch's end, "12 \u00d73" for pages that three branches hold. */
export function pagesLabel(node: TreeNode): string {
  const shared = Math.max(0, node.pages - node.owned);
  if (node.flags & TIP && node.holders <= 1) {
    return shared ? `${node.owned} own + ${shared} shared` : `${node.owned} own`;
  }
  return `${node.pages} pg \u00d7${node.holders}`;
}

function pageGlyph(ctx: Context, x: number, y: number, s: number, color: string): void {
  ctx.strokeStyle = color;
  ctx.lineWidth = Math.max(0.8, s);
  ctx.strokeRect(x, y, 6.5 * s, 8.5 * s);
  ctx.beginPath();
  ctx.moveTo(x + 1.8 * s, y + 3 * s);
  ctx.lineTo(x + 4.8 * s, y + 3 * s);
  ctx.moveTo(x + 1.8 * s, y + 5.5 * s);
  ctx.lineTo(x + 4.8 * s, y + 5.5 * s);
  ctx.stroke();
}

function drawValues(ctx: Context, scene: Scene, node: TreeNode, x: number, y: number, width: number): void {
  const { theme, view } = scene;
  const s = view.scale;
  ctx.font = `${10.5 * s}px ${theme.font}`;
  if (!node.visits) {
    ctx.fillStyle = theme.faint;
    ctx.fillText("not visited by the search", x, y);
    return;
  }
  const third = width / 3;
  const parts: [string, string][] = [["N", String(node.visits)], ["Q", fixed(node.value)], ["UCT", fixed(node.uct)]];
  parts.forEach(([name, value], i) => {
    ctx.fillStyle = theme.faint;
    ctx.fillText(name, x + third * i, y);
    const w = ctx.measureText(`${name} `).width;
    ctx.fillStyle = theme.text;
    ctx.fillText(value, x + third * i + w, y);
  });
}

function drawCollapse(ctx: Context, scene: Scene, node: TreeNode, x: number, y: number, hot: boolean): void {
  const hidden = scene.collapsed.has(node.id);
  if (!node.children.length || !(hidden || hot)) return;
  const { theme, view } = scene;
  const s = view.scale;
  const label = hidden ? `+${node.children.length}` : "\u2212";
  ctx.font = `600 ${10.5 * s}px ${theme.font}`;
  const w = Math.max(18 * s, ctx.measureText(label).width + 10 * s);
  ctx.beginPath();
  ctx.roundRect(x - w / 2, y - 9 * s, w, 18 * s, 9 * s);
  ctx.fillStyle = hidden ? theme.brand : theme.card;
  ctx.fill();
  ctx.lineWidth = 1;
  ctx.strokeStyle = hidden ? theme.brand : theme.borderStrong;
  ctx.stroke();
  ctx.fillStyle = hidden ? theme.card : theme.muted;
  ctx.fillText(label, x - ctx.measureText(label).width / 2, y + 3.8 * s);
}

function drawChip(ctx: Context, scene: Scene, placed: Placed): void {
  const node = scene.store.get(placed.id);
  if (!node) return;
  const { theme } = scene;
  const { x, y, w, h } = screenRect(scene, placed);
  frameCard(ctx, scene, node, x, y, w, h);
  const size = Math.min(11, h * 0.34);
  if (size < 6) return;
  ctx.font = `${size}px ${theme.font}`;
  ctx.fillStyle = theme.text;
  const text = cardText(node.text).trim();
  const lines = wrap(text, w - 12, 2, (t) => ctx.measureText(t).width);
  lines.forEach((line, i) => ctx.fillText(line, x + 8, y + h * 0.36 + i * size * 1.3));
}

/** Far out only position, selection and surprise can be seen: one fill per colour. */
function drawDots(ctx: Context, scene: Scene, nodes: Placed[]): void {
  const { theme } = scene;
  const groups = new Map<string, Path2D>();
  for (const placed of nodes) {
    const node = scene.store.get(placed.id);
    if (!node) continue;
    const { x, y, w, h } = screenRect(scene, placed);
    const base = accent(scene, node);
    const color = scene.selected.has(node.id) ? theme.brand : base === theme.border ? theme.borderStrong : base;
    let path = groups.get(color);
    if (!path) groups.set(color, (path = new Path2D()));
    path.rect(x, y, Math.max(2, w), Math.max(1.5, h));
  }
  for (const [color, path] of groups) {
    ctx.fillStyle = color;
    ctx.fill(path);
  }
}
