// Token texts of nodes, fetched from Python when they are looked at and kept while they stay valid.
import type { Commands } from "./commands";
import type { Store } from "./store";

export interface NodeTokens {
  texts: string[];
  ids: number[];
  logprobs: (number | null)[];
}

interface Part {
  node: number;
  from: number;
  end: number;
  texts: string[];
  ids: number[];
  logprobs: (number | null)[];
}

const KEPT_NODES = 256;

export class TokenCache {
  private readonly parts = new Map<number, NodeTokens>();
  private asking = false;
  private again = false;

  constructor(
    private readonly store: Store,
    private readonly commands: Commands,
    private readonly changed: () => void,
  ) {}

  /** Tokens known of a node, possibly fewer than it has by now. */
  get(id: number): NodeTokens | undefined {
    return this.parts.get(id);
  }

  /** Forget everything: ids may mean other nodes now. */
  clear(): void {
    this.parts.clear();
  }

  /** Ask for what is missing of these nodes; one question at a time, the newest wins. */
  want(ids: readonly number[]): void {
    if (this.asking) {
      this.again = true;
      return;
    }
    const parts: { node: number; from: number }[] = [];
    for (const id of ids) {
      const node = this.store.get(id);
      if (!node) continue;
      const have = this.parts.get(id);
      const length = node.end - node.start;
      if (have && have.ids.length > length) this.trim(have, length);
      const from = have?.ids.length ?? 0;
      if (from < length) parts.push({ node: id, from });
    }
    if (!parts.length) return;
    this.asking = true;
    this.commands
      .run("tokens", 0, { parts })
      .then((reply) => this.take((reply.result?.["parts"] ?? []) as Part[]))
      .catch(() => undefined) // the node is gone, or the kernel is: the view shows that already
      .finally(() => {
        this.asking = false;
        if (this.again) {
          this.again = false;
          this.changed();
        }
      });
  }

  private take(parts: Part[]): void {
    for (const part of parts) {
      const have = this.parts.get(part.node) ?? { texts: [], ids: [], logprobs: [] };
      if (part.from > have.ids.length) continue;
      this.trim(have, part.from);
      have.texts.push(...part.texts);
      have.ids.push(...part.ids);
      have.logprobs.push(...part.logprobs);
      this.parts.delete(part.node);
      this.parts.set(part.node, have);
    }
    for (const id of this.parts.keys()) {
      if (this.parts.size <= KEPT_NODES) break;
      this.parts.delete(id);
    }
    if (parts.length) this.changed();
  }

  private trim(have: NodeTokens, length: number): void {
    have.texts.length = Math.min(have.texts.length, length);
    have.ids.length = Math.min(have.ids.length, length);
    have.logprobs.length = Math.min(have.logprobs.length, length);
  }
}
