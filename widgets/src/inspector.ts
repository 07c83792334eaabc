// The pane beside the tree: the text down to the selected node, its tokens as chips, what it costs,
// and the most likely next tokens. Model text only ever becomes text nodes.
import { clear, el } from "./dom";
import { fixed, percent, plural, visibleToken } from "./format";
import { HEAT_STEPS, heatColor, heatStep } from "./heat";
import { ALIVE, ERROR, FINISH_REASONS, ROOT, STREAMING, TIP } from "./protocol";
import type { Store, TreeNode } from "./store";
import type { TokenCache } from "./tokens";

const MAX_CHIPS = 1200;
const MAX_ABOVE = 1500;

export interface Alternative {
  token_id: number;
  text: string;
  logprob: number;
}

export interface Alternatives {
  node: number;
  at: number;
  list: Alternative[] | undefined;
}

export interface InspectorEvents {
  /** A token of the selected node was clicked; -1 takes the mark away. */
  pickToken: (index: number) => void;
  pickNode: (id: number) => void;
  force: (alternative: Alternative) => void;
  forkHere: () => void;
  alternativesHere: () => void;
  editSubmit: (mode: "edit" | "append", text: string) => void;
  editCancel: () => void;
}

export interface InspectorState {
  primary: number;
  token: number;
  heat: boolean;
  alternatives: Alternatives | undefined;
}

export class Inspector {
  readonly element = el("aside", "dl-inspector", { "aria-label": "Selected node" });
  private readonly facts = el("div", "dl-facts");
  private readonly body = el("div", "dl-text", { "aria-label": "Text down to the selected node" });
  private readonly legend = el("div", "dl-legend", { "aria-label": "Colours of token probability" });
  private readonly tokenBar = el("div", "dl-token-bar");
  private readonly options = el("div", "dl-options");
  private readonly editor = el("form", "dl-editor");
  private editing: "edit" | "append" | undefined;
  private shown = "";

  constructor(
    private readonly store: Store,
    private readonly tokens: TokenCache,
    private readonly state: InspectorState,
    private readonly events: InspectorEvents,
  ) {
    this.element.append(this.facts, this.body, this.legend, this.tokenBar, this.editor, this.options);
    this.body.addEventListener("click", (event) => this.clicked(event));
    this.editor.hidden = true;
    this.fillLegend();
  }

  render(): void {
    const node = this.store.get(this.state.primary);
    this.element.classList.toggle("dl-none", !node);
    this.legend.hidden = !this.state.heat || !node;
    if (!node) {
      this.empty();
      return;
    }
    this.renderFacts(node);
    this.renderText(node);
    this.renderTokenBar(node);
    this.renderOptions(node);
  }

  get isEditing(): boolean {
    return this.editing !== undefined;
  }

  /** Open the text box: on the node's own text to edit, or empty to append. */
  openEditor(mode: "edit" | "append", text: string): void {
    this.editing = mode;
    clear(this.editor);
    const area = el("textarea", "dl-textarea", {
      rows: mode === "edit" ? 5 : 3,
      "aria-label": mode === "edit" ? "New text of the node" : "Text to append",
      placeholder: mode === "edit" ? "" : "Text to append after this node\u2026",
      spellcheck: "false",
    });
    area.value = text;
    const hint =
      mode === "edit"
        ? "Forks at the longest common token prefix. The old text is kept."
        : "Appended as given text; nothing is recomputed above it.";
    const submit = el("button", "dl-button dl-primary", { type: "submit" }, mode === "edit" ? "Fork with this text" : "Append");
    const cancel = el("button", "dl-button", { type: "button" }, "Cancel");
    cancel.addEventListener("click", () => this.closeEditor());
    area.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Escape") this.closeEditor();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.editor.requestSubmit();
    });
    this.editor.onsubmit = (event) => {
      event.preventDefault();
      this.events.editSubmit(mode, area.value);
    };
    this.editor.append(area, el("div", "dl-hint", {}, hint), el("div", "dl-editor-row", {}, submit, cancel));
    this.editor.hidden = false;
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  closeEditor(): void {
    if (!this.editing) return;
    this.editing = undefined;
    this.editor.hidden = true;
    this.events.editCancel();
  }

  private empty(): void {
    this.shown = "";
    for (const part of [this.facts, this.body, this.tokenBar, this.options]) clear(part);
    this.tokenBar.hidden = this.options.hidden = true;
    this.body.append(
      el("p", "dl-placeholder", {}, "Select a node to read its text, see what it costs, and fork it."),
    );
  }

  private renderFacts(node: TreeNode): void {
    clear(this.facts);
    const name = node.branch > 0 ? `Branch #${node.branch}` : "Shared tokens";
    const head = el("div", "dl-facts-head", {}, el("strong", "", {}, name));
    head.append(el("span", `dl-status ${statusClass(node)}`, {}, statusText(node)));
    const list = el("div", "dl-grid");
    const add = (term: string, value: string, title = ""): void => {
      list.append(
        el("div", "", { title: title || undefined }, el("span", "dl-term", {}, term), el("span", "dl-value", {}, value)),
      );
    };
    const length = node.end - node.start;
    add("Tokens", `${length}`, `positions ${node.start} to ${node.end}`);
    add("Path", `${node.end}`, "tokens from the root to the end of this node");
    if (node.flags & TIP) {
      add("Own", `${node.owned}`, "pages that pruning this branch would free");
      add("Shared", `${Math.max(0, node.pages - node.owned)}`, "pages that other branches hold too");
      add("Refcount", `${node.tailRefs}`, "references to the segment in which the branch ends");
    } else add("Pages", `${node.pages}`, "pages in which the tokens of this node lie");
    add("Held by", `${node.holders}`, "live branches whose path runs through here");
    if (Number.isFinite(node.lpMean)) {
      add("Mean lp", fixed(node.lpMean), `mean log-probability; ${percent(node.lpMean)} a token`);
      add("Last lp", fixed(node.lpLast), `log-probability of the last token: ${percent(node.lpLast)}`);
    }
    if (node.visits) {
      add("N", `${node.visits}`, "visits of the search");
      add("Q", fixed(node.value, 3), "mean value");
      add("UCT", fixed(node.uct, 3), "score by which the search picks");
    }
    this.facts.append(head, list);
  }

  private renderText(node: TreeNode): void {
    const path = this.store.path(node.id);
    this.tokens.want(path);
    const have = this.tokens.get(node.id);
    const count = have?.ids.length ?? 0;
    const above = path.slice(0, -1).map((id) => `${id}:${this.tokens.get(id)?.ids.length ?? 0}`);
    const key = [node.id, node.start, this.state.heat, this.state.token, ...above].join("|");
    const atEnd = this.body.scrollHeight - this.body.scrollTop - this.body.clientHeight < 24;
    const old = this.shown.split("\n");
    if (old[0] === key && Number(old[1]) <= count && count > 0 && Number(old[1]) > 0) {
      for (let i = Number(old[1]); i < count; i++) this.body.append(this.chip(node, i));
    } else {
      clear(this.body);
      this.appendAbove(path.slice(0, -1));
      const first = Math.max(0, count - MAX_CHIPS);
      if (first) this.body.append(el("span", "dl-more", {}, `\u2026 ${plural(first, "token")} before `));
      for (let i = first; i < count; i++) this.body.append(this.chip(node, i));
      if (!count) this.body.append(el("span", "dl-placeholder", {}, node.end > node.start ? "\u2026" : "no tokens of its own yet"));
    }
    const fresh = old[0]?.split("|")[0] !== String(node.id);
    this.shown = `${key}\n${count}`;
    if (fresh || atEnd) this.body.scrollTop = this.body.scrollHeight;
  }

  private appendAbove(path: readonly number[]): void {
    let left = MAX_ABOVE;
    const spans: HTMLElement[] = [];
    for (let i = path.length - 1; i >= 0 && left > 0; i--) {
      const id = path[i] as number;
      const text = this.tokens.get(id)?.texts.join("") ?? this.store.get(id)?.text ?? "";
      const cut = text.length > left;
      const span = el("span", "dl-above", { "data-node": id, title: "Select this node" }, cut ? "\u2026" + text.slice(-left) : text);
      left -= text.length;
      spans.push(span);
    }
    this.body.append(...spans.reverse());
  }

  private chip(node: TreeNode, index: number): HTMLElement {
    const have = this.tokens.get(node.id);
    const text = have?.texts[index] ?? "";
    const logprob = have?.logprobs[index] ?? null;
    const step = heatStep(logprob);
    const chip = el("span", "dl-chip", { "data-token": index });
    chip.title =
      `token ${have?.ids[index] ?? ""} at position ${node.start + index}` +
      (logprob === null ? ", given" : `, log-probability ${fixed(logprob)} (${percent(logprob)})`);
    // Line breaks stay line breaks, after a visible sign.
    chip.append(text.includes("\n") ? text.replace(/\n/g, "\u21b5\n") : text || "\u200b");
    if (logprob === null) chip.classList.add("dl-given");
    if (this.state.heat && step > 0) {
      chip.style.backgroundColor = heatColor(step);
      chip.classList.add(`dl-heat-${step}`);
    }
    if (index === this.state.token) chip.classList.add("dl-picked");
    return chip;
  }

  private renderTokenBar(node: TreeNode): void {
    clear(this.tokenBar);
    const index = this.state.token;
    const text = this.tokens.get(node.id)?.texts[index];
    this.tokenBar.hidden = index < 0 || text === undefined;
    if (this.tokenBar.hidden) return;
    const act = (label: string, title: string, run: () => void): HTMLElement => {
      const node_ = el("button", "dl-button dl-small", { type: "button", title }, label);
      node_.addEventListener("click", run);
      return node_;
    };
    this.tokenBar.append(
      el("span", "dl-token-name", {}, "After ", el("code", "", {}, visibleToken(text ?? ""))),
      act("Fork here", "Fork after this token (f)", this.events.forkHere),
      act("Next tokens", "Most likely tokens after this one (n)", this.events.alternativesHere),
      act("\u00d7", "Back to the node's end (Escape)", () => this.events.pickToken(-1)),
    );
  }

  private renderOptions(node: TreeNode): void {
    clear(this.options);
    const found = this.state.alternatives;
    this.options.hidden = !found || found.node !== node.id;
    if (!found || this.options.hidden) return;
    const where = found.at === node.end ? "after this node" : `at position ${found.at}`;
    this.options.append(el("div", "dl-options-head", {}, `Most likely ${where}`));
    if (!found.list) {
      this.options.append(el("div", "dl-placeholder", {}, "computing\u2026"));
      return;
    }
    for (const option of found.list) this.options.append(this.option(option));
    this.options.append(el("div", "dl-hint", {}, "Click one to fork with that token."));
  }

  private option(option: Alternative): HTMLElement {
    const row = el("button", "dl-option", {
      type: "button",
      title: `token ${option.token_id}, log-probability ${fixed(option.logprob)}`,
    });
    const bar = el("span", "dl-bar", { "aria-hidden": "true" });
    bar.style.width = `${Math.max(1, Math.exp(option.logprob) * 100)}%`;
    row.append(
      bar,
      el("code", "dl-option-text", {}, visibleToken(option.text)),
      el("span", "dl-option-p", {}, percent(option.logprob)),
    );
    row.addEventListener("click", () => this.events.force(option));
    return row;
  }

  private fillLegend(): void {
    this.legend.append(el("span", "", {}, "token probability"));
    HEAT_STEPS.forEach((step, i) => {
      const swatch = el("span", `dl-swatch dl-heat-${i}`, {}, step.label);
      swatch.style.backgroundColor = heatColor(i);
      this.legend.append(swatch);
    });
  }

  private clicked(event: MouseEvent): void {
    const target = event.target as HTMLElement;
    const chip = target.closest<HTMLElement>("[data-token]");
    const above = target.closest<HTMLElement>("[data-node]");
    if (chip) {
      const index = Number(chip.dataset["token"]);
      this.events.pickToken(index === this.state.token ? -1 : index);
    } else if (above) this.events.pickNode(Number(above.dataset["node"]));
  }
}

export function statusText(node: TreeNode): string {
  if (node.flags & STREAMING) return "streaming";
  if (!(node.flags & ALIVE)) return "pruned, held by branches below";
  const reason = FINISH_REASONS[node.finish] ?? "";
  if (reason) return reason === "length" ? "done (token limit)" : reason.replace(/_/g, " ");
  if (node.flags & TIP) return node.flags & ROOT && !node.children.length ? "prompt" : "ready";
  return "inner";
}

function statusClass(node: TreeNode): string {
  if (node.flags & STREAMING) return "dl-live";
  return node.flags & ERROR ? "dl-bad" : "";
}
