// Wire format shared with dendrite_lab/protocol.py.

export const ALIVE = 1;
export const STREAMING = 2;
export const TIP = 4;
export const ROOT = 8;
export const ERROR = 16;
export const BEST = 32;

export const FINISH_REASONS = [
  "",
  "stop",
  "eos",
  "length",
  "cancelled",
  "out_of_pages",
  "context_full",
  "numeric_error",
  "stale",
  "error",
  "dead_end",
  "grammar_error",
] as const;

/** One node of the tree: a run of tokens between two forks. */
export interface NodeData {
  id: number;
  parent: number;
  branch: number;
  start: number;
  end: number;
  flags: number;
  finish: number;
  pages: number;
  owned: number;
  tailRefs: number;
  visits: number;
  lpMean: number;
  lpLast: number;
  value: number;
  uct: number;
  text: string;
}

export interface SearchSummary {
  state: string;
  iterations: number;
  nodes: number;
  tokens: number;
}

export interface Totals {
  pages_total?: number;
  pages_free?: number;
  pages_live?: number;
  pages_shared?: number;
  pages_cached?: number;
  branches?: number;
  cow_copies?: number;
  bytes_saved?: number;
  page_bytes?: number;
  bytes_total?: number;
  kv_format?: string;
  step_ms?: number;
  streaming?: number;
  tokens_per_s?: number;
  search?: SearchSummary | null;
}

export interface FrameHeader {
  t: "frame";
  v: number;
  seq: number;
  snapshot: boolean;
  count: number;
  cols: string[];
  texts: string[];
  removed: number[];
  totals?: Totals;
}

export interface Cost {
  us: number;
  count?: number;
  tokens_shared?: number;
  pages_taken?: number;
  bytes_copied?: number;
  pages_freed?: number;
  bytes_freed?: number;
  branches?: number;
}

export interface ReplyError {
  type: string;
  message: string;
}

export interface Reply {
  t: "reply";
  id: string;
  op: string;
  ok: boolean;
  elapsed_us: number;
  result?: Record<string, unknown>;
  error?: ReplyError;
}

export type Incoming =
  | FrameHeader
  | Reply
  | { t: "select"; node: number }
  | { t: "fault"; error: ReplyError };

const FIELDS: Record<string, [keyof NodeData, "u" | "i" | "f"]> = {
  node: ["id", "u"],
  parent: ["parent", "u"],
  branch: ["branch", "i"],
  start: ["start", "u"],
  end: ["end", "u"],
  flags: ["flags", "u"],
  finish: ["finish", "u"],
  pages: ["pages", "u"],
  owned: ["owned", "u"],
  tail_refs: ["tailRefs", "u"],
  visits: ["visits", "u"],
  lp_mean: ["lpMean", "f"],
  lp_last: ["lpLast", "f"],
  value: ["value", "f"],
  uct: ["uct", "f"],
};

/** Unpack the columns of a frame. Columns this version doesn't know are skipped. */
export function decodeRows(header: FrameHeader, buffer: DataView | undefined): NodeData[] {
  const { count, cols, texts } = header;
  const rows: NodeData[] = [];
  if (count === 0) return rows;
  if (!buffer || buffer.byteLength < count * cols.length * 4) {
    throw new RangeError(`frame ${header.seq} announces ${count} rows but its buffer is too short`);
  }
  for (let i = 0; i < count; i++) rows.push({ text: texts[i] ?? "" } as NodeData);
  cols.forEach((name, column) => {
    const field = FIELDS[name];
    if (!field) return;
    const [key, kind] = field;
    for (let i = 0; i < count; i++) {
      const at = (column * count + i) * 4;
      const row = rows[i] as unknown as Record<string, number>;
      row[key] =
        kind === "u"
          ? buffer.getUint32(at, true)
          : kind === "i"
            ? buffer.getInt32(at, true)
            : buffer.getFloat32(at, true);
    }
  });
  return rows;
}
