// One view of the explorer: owns what is selected and shown, and wires the parts together.
import { Actions, type Host } from "./actions";
import { App, type Connection, type Model } from "./app";
import { el } from "./dom";
import { Graph } from "./graph";
import { Inspector, type Alternatives } from "./inspector";
import { actionOf, type Action } from "./keys";
import { step, type Direction } from "./navigate";
import { Outline } from "./outline";
import { Overlays } from "./overlays";
import type { Cost } from "./protocol";
import { StatusBar } from "./statusbar";
import { readTheme, watchTheme } from "./theme";
import { TokenCache } from "./tokens";
import { Toolbar } from "./toolbar";
import { Welcome } from "./welcome";

let views = 0;

export class View implements Host {
  readonly root: HTMLElement;
  primary = 0;
  selected = new Set<number>();
  collapsed = new Set<number>();
  token = -1;
  forkCount = 2;
  heat = true;
  mode: "graph" | "outline" = "graph";
  alternatives: Alternatives | undefined;
  private hoisted = 0;
  private expected: number[] = [];
  private readonly actions = new Actions(this);
  private readonly graph: Graph;
  private readonly outline: Outline;
  private readonly inspector: Inspector;
  private readonly toolbar: Toolbar;
  private readonly status = new StatusBar();
  private readonly overlays: Overlays;
  private readonly tokens: TokenCache;
  private readonly welcome: Welcome;
  private readonly live = el("div", "dl-sr", { "aria-live": "polite" });
  private readonly main = el("div", "dl-main");

  constructor(
    readonly app: App,
    model: Model,
    host: HTMLElement,
    private readonly signal: AbortSignal,
  ) {
    const defaults = (model.get("_defaults") ?? {}) as { max_tokens?: number; temperature?: number };
    // JupyterLab must not take our keys for its own shortcuts (x cuts a cell).
    this.root = el("div", "dl-root", { tabindex: -1, "data-lm-suppress-shortcuts": "true" });
    this.root.style.height = `${Number(model.get("_height") ?? 520)}px`;
    this.overlays = new Overlays(this.root);
    this.tokens = new TokenCache(app.store, app.commands, () => this.inspector.render());
    const pick = (id: number, add: boolean): void => this.select(id, add, true);
    const toggle = (id: number): void => this.toggle(id);
    this.graph = new Graph(app.store, this, { select: pick, toggle, drawn: () => app.drawn() }, readTheme(this.root), signal);
    this.outline = new Outline(`dl${++views}`, app.store, this, pick, toggle);
    this.inspector = new Inspector(app.store, this.tokens, this, {
      pickToken: (index) => this.pickToken(index),
      pickNode: (id) => this.select(id, false, true),
      force: (alternative) => void this.actions.force(alternative),
      forkHere: () => void this.actions.fork(false),
      alternativesHere: () => void this.actions.alternatives(),
      editSubmit: (mode, text) => void this.submitEdit(mode, text),
      editCancel: () => this.focusTree(),
    });
    this.toolbar = new Toolbar((a) => this.do(a), (a) => void this.actions.steer(a), (n) => (this.forkCount = n), {
      maxTokens: defaults.max_tokens ?? 24,
      temperature: defaults.temperature ?? 0.8,
    });
    this.welcome = new Welcome(String(model.get("_fallback") ?? ""), (text) => void this.actions.prompt(text));
    this.build(host);
  }

  /** Roots of what is shown: all trees, or the hoisted node. */
  roots = (): readonly number[] => (this.hoisted ? [this.hoisted] : this.app.store.roots);

  // ---- Host -----------------------------------------------------------------------------------

  generation = (): { max_tokens: number; temperature: number } => this.toolbar.generation;
  cost = (op: string, cost: Cost): void => this.status.cost(op, cost);
  say = (title: string, text: string): void => this.status.say(title, text);
  toast = (title: string, message: string, kind: "info" | "error"): void =>
    this.overlays.toast(title, message, kind);
  confirm = (title: string, text: string, action: string, run: () => void): ((text: string) => void) =>
    this.overlays.confirm(title, text, action, run);
  refresh = (): void => this.render();

  /** Select these nodes as soon as they are known. */
  expect = (nodes: readonly number[]): void => {
    this.expected = [...nodes];
    this.takeExpected();
  };

  // ---- building and drawing -------------------------------------------------------------------

  private build(host: HTMLElement): void {
    const { zoom } = this.toolbar;
    const stage = el("div", "dl-stage", {}, this.graph.canvas, zoom, this.outline.element, this.welcome.element);
    this.main.append(stage, this.inspector.element);
    this.root.append(
      this.toolbar.element, this.toolbar.strip, this.main, this.status.element,
      this.overlays.layer, this.overlays.toasts, this.live,
    );
    stage.tabIndex = 0;
    stage.setAttribute("role", "group");
    stage.setAttribute("aria-label", "Tree of branches; arrow keys move, question mark lists the keys");
    host.append(this.root);
    this.root.addEventListener("keydown", (event) => this.key(event), { signal: this.signal });
    stage.addEventListener("pointerdown", () => this.focusTree(), { signal: this.signal });
    // A button that goes away or is disabled would drop the focus to the page, and the next key press
    // would reach the notebook (where x cuts a cell): clicks leave the focus on the tree.
    this.root.addEventListener("mousedown", (event) => this.keepFocus(event), { signal: this.signal });
    const watch = new ResizeObserver(() => this.resized(stage));
    watch.observe(stage);
    this.signal.addEventListener("abort", () => watch.disconnect());
    watchTheme(() => this.themed(), this.signal);
    this.app.listen(
      {
        frame: (structure) => this.frame(structure),
        select: (node) => (node === this.primary ? undefined : this.adopt(node)),
        connection: (state) => this.connected(state),
        fault: (error) => this.toast(`Live updates stopped: ${error.type}`, error.message, "error"),
      },
      this.signal,
    );
    this.themed();
    this.setMode(this.mode);
    this.frame(true);
  }

  private resized(stage: HTMLElement): void {
    if (this.mode === "graph") this.graph.resize(stage.clientWidth, stage.clientHeight);
    else this.outline.render();
    this.root.classList.toggle("dl-narrow", this.root.clientWidth < 720);
  }

  private themed(): void {
    this.graph.theme = readTheme(this.root);
    this.root.classList.toggle("dl-dark", this.graph.theme.dark);
    this.graph.theme = readTheme(this.root);
    this.graph.invalidate();
  }

  private frame(structure: boolean): void {
    const { store } = this.app;
    if (structure) {
      for (const id of [...this.selected]) if (!store.get(id)) this.selected.delete(id);
      if (this.hoisted && !store.get(this.hoisted)) this.hoisted = 0;
      if (!store.get(this.primary)) this.primary = [...this.selected][0] ?? 0;
      if (!this.primary && store.roots.length && !this.expected.length) {
        this.select(store.roots[0] as number, false, false);
      }
      this.takeExpected();
      this.relayout();
    }
    this.render();
  }

  private relayout(): void {
    this.graph.relayout();
    this.outline.rebuild();
  }

  private render(): void {
    const { store, connection } = this.app;
    this.graph.invalidate();
    if (this.mode === "outline") this.outline.render();
    this.inspector.render();
    this.toolbar.update({
      hasTree: store.nodes.size > 0,
      hasNode: store.get(this.primary) !== undefined,
      selectedCount: this.selected.size,
      streaming: (store.totals.streaming ?? 0) > 0,
      live: connection === "live",
      mode: this.mode,
      heat: this.heat,
      forkCount: this.forkCount,
    });
    this.toolbar.updateSearch(store.totals.search);
    this.status.update(connection, store.nodes.size, store.totals);
    this.welcome.update(connection, store.nodes.size);
    this.toolbar.zoom.hidden = this.mode !== "graph" || store.nodes.size === 0;
    // Without a canvas on screen nothing else acknowledges.
    if (this.mode === "outline") requestAnimationFrame(() => this.app.drawn());
  }

  private connected(state: Connection): void {
    if (state === "lost") this.root.classList.add("dl-offline");
    else this.root.classList.remove("dl-offline");
    if (state === "live") this.tokens.clear();
    this.render();
  }

  // ---- selection ------------------------------------------------------------------------------

  private select(id: number, add: boolean, tell: boolean): void {
    if (add && this.selected.has(id) && this.selected.size > 1) {
      this.selected.delete(id);
      this.primary = [...this.selected].pop() ?? 0;
    } else {
      if (!add) this.selected.clear();
      this.selected.add(id);
      this.primary = id;
    }
    this.token = -1;
    if (this.alternatives?.node !== this.primary) this.alternatives = undefined;
    this.inspector.closeEditor();
    if (tell) this.actions.select(this.primary);
    const node = this.app.store.get(this.primary);
    this.live.textContent = node ? `branch ${node.branch}, ${node.end - node.start} tokens: ${node.text.slice(0, 120)}` : "";
    this.graph.reveal(this.primary);
    if (this.mode === "outline") this.outline.reveal(this.primary);
    this.render();
  }

  /** Python selected a node; it may be one we don't know yet. */
  private adopt(node: number): void {
    if (node === 0) return;
    if (this.app.store.get(node)) this.select(node, false, false);
    else this.expected = [node];
  }

  private takeExpected(): void {
    const known = this.expected.filter((id) => this.app.store.get(id));
    if (!known.length || known.length < this.expected.length) return;
    this.expected = [];
    this.select(known[0] as number, false, true);
    for (const id of known.slice(1)) this.selected.add(id);
    this.render();
  }

  private pickToken(index: number): void {
    const node = this.app.store.get(this.primary);
    if (!node) return;
    const last = node.end - node.start - 1;
    this.token = index < 0 ? -1 : Math.min(index, last);
    this.render();
  }

  private toggle(id: number): void {
    if (this.collapsed.has(id)) this.collapsed.delete(id);
    else this.collapsed.add(id);
    this.relayout();
    this.render();
  }

  private setMode(mode: "graph" | "outline"): void {
    this.mode = mode;
    this.graph.canvas.hidden = mode !== "graph";
    this.outline.element.hidden = mode !== "outline";
    const stage = this.graph.canvas.parentElement;
    if (stage) this.resized(stage);
    if (mode === "outline") this.outline.rebuild();
    this.render();
  }

  private keepFocus(event: MouseEvent): void {
    if (this.overlays.isOpen || !(event.target as Element).closest("button, .dl-chip, .dl-above")) return;
    event.preventDefault();
    if (!this.inspector.isEditing) this.focusTree();
  }

  private focusTree(): void {
    const target = this.mode === "outline" ? this.outline.element : this.graph.canvas.parentElement;
    target?.focus({ preventScroll: true });
  }

  private async submitEdit(mode: "edit" | "append", text: string): Promise<void> {
    if (await this.actions.edit(mode, text)) this.inspector.closeEditor();
  }

  // ---- keys and actions -----------------------------------------------------------------------

  private key(event: KeyboardEvent): void {
    const target = event.target as HTMLElement;
    if (this.overlays.isOpen || target.matches("input, textarea, select")) return;
    if (target.matches("button") && (event.key === "Enter" || event.key === " ")) return;
    if (/^[1-9]$/.test(event.key) && !event.ctrlKey && !event.metaKey && !event.altKey) {
      this.forkCount = Number(event.key);
      this.say("fork", `${this.forkCount} children next time`);
      this.render();
    } else {
      const action = actionOf(event);
      if (!action) return;
      this.do(action, event.shiftKey);
    }
    event.preventDefault();
    event.stopPropagation();
  }

  private do(action: Action, shift = false): void {
    const known = this.app.store.get(this.primary) !== undefined;
    const withNode = (run: () => void): void => (known ? run() : this.say("nothing selected", "click a node first"));
    const run: Record<Action, () => void> = {
      parent: () => this.move("parent", shift),
      child: () => this.move("child", shift),
      up: () => this.move("up", shift),
      down: () => this.move("down", shift),
      first: () => this.move("first", shift),
      last: () => this.move("last", shift),
      fork: () => withNode(() => void this.actions.fork(false)),
      forkGo: () => withNode(() => void this.actions.fork(true)),
      continue: () => withNode(() => void this.actions.continueSelected()),
      continueLeaves: () => void this.actions.continueLeaves(),
      stop: () => void this.actions.stop(),
      edit: () => withNode(() => this.openEditor("edit")),
      append: () => withNode(() => this.openEditor("append")),
      top: () => withNode(() => void this.actions.alternatives()),
      prune: () => withNode(() => this.actions.prune()),
      collapse: () => withNode(() => this.toggle(this.primary)),
      hoist: () => this.hoist(),
      selectLeaves: () => this.selectLeaves(),
      tokenBack: () => this.pickToken(this.token < 0 ? Number.MAX_SAFE_INTEGER : Math.max(0, this.token - 1)),
      tokenOn: () => this.pickToken(this.token + 1),
      view: () => this.setMode(this.mode === "graph" ? "outline" : "graph"),
      heat: () => {
        this.heat = !this.heat;
        this.render();
      },
      fit: () => this.graph.fit(),
      zoomIn: () => this.graph.zoom(1.25),
      zoomOut: () => this.graph.zoom(0.8),
      help: () => this.overlays.help(),
      escape: () => (this.token >= 0 ? this.pickToken(-1) : this.clearExtras()),
    };
    run[action]();
  }

  /** Go one step; with Shift the node on the way joins the selection. */
  private move(direction: Direction, add: boolean): void {
    let next: number;
    if (this.mode === "outline" && (direction === "up" || direction === "down")) {
      next = this.outline.neighbour(this.primary, direction === "down" ? 1 : -1);
    } else if (direction === "child" && this.collapsed.has(this.primary)) {
      this.toggle(this.primary);
      return;
    } else next = step(this.app.store, this.graph.layout, this.primary, direction);
    if (next) this.select(next, add, true);
  }

  private openEditor(mode: "edit" | "append"): void {
    const have = this.tokens.get(this.primary)?.texts.join("");
    this.inspector.openEditor(mode, mode === "edit" ? (have ?? this.app.store.get(this.primary)?.text ?? "") : "");
  }

  private hoist(): void {
    this.hoisted = this.hoisted || this.primary === this.app.store.roots[0] ? 0 : this.primary;
    this.say(this.hoisted ? "hoisted" : "whole tree", this.hoisted ? "only this subtree is shown; h goes back" : "");
    this.relayout();
    this.graph.reveal(this.primary);
    this.render();
  }

  private selectLeaves(): void {
    this.selected = new Set(this.app.store.leaves());
    this.primary = [...this.selected][0] ?? 0;
    this.render();
  }

  private clearExtras(): void {
    this.alternatives = undefined;
    if (this.selected.size > 1) this.selected = new Set([this.primary]);
    this.render();
  }
}
