// A tidy tree (Reingold and Tilford 1981) of fixed-size nodes: depth runs right, siblings run down.
// Contours are kept deepest first and the shorter one is folded into the deeper one, so the whole
// layout is O(nodes); no recursion, so depth is no limit.

export interface Placed {
  id: number;
  depth: number;
  y: number;
}

export interface Layout {
  /** Node id -> column (depth) and row (fractional). */
  at: Map<number, Placed>;
  /** Per depth, nodes from top to bottom. */
  columns: Placed[][];
  minY: number;
  maxY: number;
}

interface Contour {
  top: number[];
  bottom: number[];
  shift: number;
}

export const ROOT_GAP = 0.35;

/** Lay out the trees below `roots`; `childrenOf` leaves out what is collapsed. */
export function layoutTree(
  roots: readonly number[],
  childrenOf: (id: number) => readonly number[],
): Layout {
  const order: Placed[] = [];
  const at = new Map<number, Placed>();
  const stack: Placed[] = [];
  for (let i = roots.length - 1; i >= 0; i--) stack.push({ id: roots[i] as number, depth: 0, y: 0 });
  while (stack.length) {
    const node = stack.pop() as Placed;
    if (at.has(node.id)) continue;
    order.push(node);
    at.set(node.id, node);
    const children = childrenOf(node.id);
    for (let i = children.length - 1; i >= 0; i--) {
      stack.push({ id: children[i] as number, depth: node.depth + 1, y: 0 });
    }
  }
  const offset = new Map<number, number>();
  const contours = new Map<number, Contour>();
  for (let i = order.length - 1; i >= 0; i--) {
    const node = order[i] as Placed;
    const children = childrenOf(node.id).filter((child) => contours.has(child));
    contours.set(node.id, place(children, contours, offset, 1));
  }
  place(roots, contours, offset, 1 + ROOT_GAP);
  return finish(order, at, offset, roots, childrenOf);
}

/** Put `children` under each other as close as their subtrees allow; returns the joint contour. */
function place(
  children: readonly number[],
  contours: Map<number, Contour>,
  offset: Map<number, number>,
  gap: number,
): Contour {
  let joint: Contour | undefined;
  for (const child of children) {
    const contour = contours.get(child) as Contour;
    contours.delete(child);
    if (!joint) {
      offset.set(child, 0);
      joint = contour;
      continue;
    }
    const shift = separation(joint, contour, gap);
    offset.set(child, shift);
    contour.shift += shift;
    joint = merge(joint, contour);
  }
  if (!joint) return { top: [0], bottom: [0], shift: 0 };
  const first = offset.get(children[0] as number) as number;
  const last = offset.get(children[children.length - 1] as number) as number;
  const middle = (first + last) / 2;
  for (const child of children) offset.set(child, (offset.get(child) as number) - middle);
  joint.shift -= middle;
  joint.top.push(-joint.shift);
  joint.bottom.push(-joint.shift);
  return joint;
}

function separation(above: Contour, below: Contour, gap: number): number {
  const depth = Math.min(above.top.length, below.top.length);
  let shift = -Infinity;
  for (let k = 1; k <= depth; k++) {
    const bottom = (above.bottom[above.bottom.length - k] as number) + above.shift;
    const top = (below.top[below.top.length - k] as number) + below.shift;
    shift = Math.max(shift, bottom - top + gap);
  }
  return shift;
}

function merge(above: Contour, below: Contour): Contour {
  const depth = Math.min(above.top.length, below.top.length);
  const [deep, other] = above.top.length >= below.top.length ? [above, below] : [below, above];
  for (let k = 1; k <= depth; k++) {
    const i = deep.top.length - k;
    const j = other.top.length - k;
    if (deep === above) deep.bottom[i] = (other.bottom[j] as number) + other.shift - deep.shift;
    else deep.top[i] = (other.top[j] as number) + other.shift - deep.shift;
  }
  return deep;
}

function finish(
  order: Placed[],
  at: Map<number, Placed>,
  offset: Map<number, number>,
  roots: readonly number[],
  childrenOf: (id: number) => readonly number[],
): Layout {
  const columns: Placed[][] = [];
  let minY = Infinity;
  let maxY = -Infinity;
  for (const root of roots) {
    const node = at.get(root);
    if (node) node.y = offset.get(root) ?? 0;
  }
  for (const node of order) {
    (columns[node.depth] ??= []).push(node);
    minY = Math.min(minY, node.y);
    maxY = Math.max(maxY, node.y);
    for (const child of childrenOf(node.id)) {
      const below = at.get(child);
      if (below && below.depth === node.depth + 1) below.y = node.y + (offset.get(child) ?? 0);
    }
  }
  return { at, columns, minY: order.length ? minY : 0, maxY: order.length ? maxY : 0 };
}
