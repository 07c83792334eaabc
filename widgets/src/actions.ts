// What buttons and keys do: reads the view's state, runs commands, reports what they cost.
import type { App } from "./app";
import { CommandFailed } from "./commands";
import { bytes, plural } from "./format";
import type { Alternative, Alternatives } from "./inspector";
import { STREAMING } from "./protocol";
import type { Cost, Reply } from "./protocol";

/** The view, as far as actions need it. */
export interface Host {
  app: App;
  primary: number;
  selected: Set<number>;
  token: number;
  forkCount: number;
  alternatives: Alternatives | undefined;
  generation: () => { max_tokens: number; temperature: number };
  expect: (nodes: readonly number[]) => void;
  cost: (op: string, cost: Cost) => void;
  say: (title: string, text: string) => void;
  toast: (title: string, message: string, kind: "info" | "error") => void;
  confirm: (title: string, text: string, action: string, run: () => void) => (text: string) => void;
  refresh: () => void;
}

export class Actions {
  constructor(private readonly host: Host) {}

  /** Fork the primary node, after the picked token if there is one. */
  async fork(go: boolean): Promise<void> {
    const args: Record<string, unknown> = { count: this.host.forkCount, ...this.at() };
    if (go) Object.assign(args, { go: true }, this.host.generation());
    const reply = await this.run("fork", this.host.primary, args);
    if (reply) this.made(reply, true);
  }

  async continueSelected(): Promise<void> {
    const nodes = [...this.host.selected];
    const reply = await this.run("generate", 0, { nodes, ...this.host.generation() });
    if (reply) this.host.say("continue", `${plural(nodes.length, "branch")} in one batch`);
    if (reply && nodes.length === 1) this.made(reply, false);
  }

  async continueLeaves(): Promise<void> {
    const reply = await this.run("generate", 0, { leaves: true, ...this.host.generation() });
    const job = reply?.result?.["job"] as { branches: number } | undefined;
    if (job) this.host.say("continue", `${plural(job.branches, "branch")} in one batch`);
  }

  async stop(): Promise<void> {
    await this.run("stop", 0, { nodes: [] });
  }

  async edit(mode: "edit" | "append", text: string): Promise<boolean> {
    const reply = await this.run(mode === "edit" ? "edit" : "extend", this.host.primary, { text });
    if (!reply) return false;
    const result = reply.result ?? {};
    if (mode === "edit") {
      this.host.say("edit", `${plural(Number(result["tokens_reused"]), "token")} reused, ${Number(result["tokens_new"])} new`);
    }
    this.made(reply, true);
    return true;
  }

  async alternatives(): Promise<void> {
    const { primary } = this.host;
    const node = this.host.app.store.get(primary);
    if (!node) return;
    const at = (this.at()["at"] as number | undefined) ?? node.end;
    this.host.alternatives = { node: primary, at, list: undefined };
    this.host.refresh();
    const reply = await this.run("top", primary, { k: 8, at });
    const current = this.host.alternatives;
    if (current.node !== primary || current.at !== at) return;
    this.host.alternatives = reply
      ? { node: primary, at, list: reply.result?.["alternatives"] as Alternative[] }
      : undefined;
    this.host.refresh();
  }

  async force(alternative: Alternative): Promise<void> {
    const found = this.host.alternatives;
    if (!found) return;
    const reply = await this.run("force", found.node, { token_id: alternative.token_id, at: found.at });
    if (reply) this.made(reply, true);
  }

  /** Prune the selected nodes; asks first where more than one branch would go. */
  prune(): void {
    const { store } = this.host.app;
    const chosen = [...this.host.selected].filter((id) => store.get(id));
    const top = chosen.filter((id) => !store.path(id).slice(0, -1).some((up) => this.host.selected.has(up)));
    if (!top.length) return;
    const branches = top.reduce((sum, id) => sum + store.branchesBelow(id), 0);
    const streaming = top.some((id) => store.subtree(id).some((n) => (store.get(n)?.flags ?? 0) & STREAMING));
    const run = (): void => void this.pruneNow(top);
    if (branches <= 1 && !streaming) {
      run();
      return;
    }
    const base = `${plural(branches, "branch")} will be pruned${streaming ? ", some are streaming" : ""}. This can't be undone.`;
    const better = this.host.confirm("Prune this subtree?", base, `Prune ${plural(branches, "branch")}`, run);
    if (top.length === 1) void this.tellCost(top[0] as number, base, better);
  }

  async steer(action: string): Promise<void> {
    await this.run("search", 0, { action });
  }

  select(node: number): void {
    void this.run("select", node);
  }

  async prompt(text: string): Promise<void> {
    const reply = await this.run("prompt", 0, { text });
    if (reply) this.made(reply, true);
  }

  private async tellCost(node: number, base: string, better: (text: string) => void): Promise<void> {
    const reply = await this.run("cost", node);
    const pages = Number(reply?.result?.["pages"]);
    if (reply) better(`${base} It frees ${plural(pages, "page")} (${bytes(Number(reply.result?.["bytes"]))}).`);
  }

  private async pruneNow(nodes: readonly number[]): Promise<void> {
    const parents: number[] = [];
    const total: Cost = { us: 0, pages_freed: 0, bytes_freed: 0 };
    for (const node of nodes) {
      const reply = await this.run("prune", node);
      const cost = reply?.result?.["cost"] as Cost | undefined;
      if (!cost) continue;
      total.us += cost.us;
      total.pages_freed = (total.pages_freed ?? 0) + (cost.pages_freed ?? 0);
      total.bytes_freed = (total.bytes_freed ?? 0) + (cost.bytes_freed ?? 0);
      parents.push(Number(reply?.result?.["parent"]));
    }
    if (!parents.length) return;
    this.host.cost("prune", total);
    this.host.expect(parents.slice(0, 1).filter((id) => id > 0));
  }

  private at(): Record<string, unknown> {
    const node = this.host.app.store.get(this.host.primary);
    return node && this.host.token >= 0 ? { at: node.start + this.host.token + 1 } : {};
  }

  private made(reply: Reply, report: boolean): void {
    const nodes = (reply.result?.["nodes"] ?? []) as number[];
    const cost = reply.result?.["cost"] as Cost | undefined;
    if (report && cost && reply.op !== "edit") this.host.cost(reply.op, cost);
    this.host.alternatives = undefined;
    this.host.expect(nodes);
  }

  /** Run a command; an error becomes a toast and `undefined`. */
  private async run(op: string, node = 0, args: Record<string, unknown> = {}): Promise<Reply | undefined> {
    try {
      return await this.host.app.commands.run(op, node, args);
    } catch (error) {
      const failed = error instanceof CommandFailed ? error : new CommandFailed("Error", String(error));
      this.host.toast(`${op}: ${failed.typeName}`, failed.message, "error");
      return undefined;
    }
  }
}
