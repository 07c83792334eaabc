// The buttons above the tree, and the strip that steers an attached search.
import { button, clear, el } from "./dom";
import type { Action } from "./keys";
import type { SearchSummary } from "./protocol";

export interface ToolbarState {
  hasTree: boolean;
  hasNode: boolean;
  selectedCount: number;
  streaming: boolean;
  live: boolean;
  mode: "graph" | "outline";
  heat: boolean;
  forkCount: number;
}

export class Toolbar {
  readonly element = el("div", "dl-toolbar", { role: "toolbar", "aria-label": "Explorer" });
  readonly strip = el("div", "dl-strip");
  readonly zoom = el("div", "dl-zoom", { role: "group", "aria-label": "Zoom" });
  private readonly nodeButtons: HTMLButtonElement[] = [];
  private readonly liveButtons: HTMLButtonElement[] = [];
  private readonly stop: HTMLButtonElement;
  private readonly graph: HTMLButtonElement;
  private readonly outline: HTMLButtonElement;
  private readonly heat: HTMLButtonElement;
  private readonly more: HTMLButtonElement;
  private readonly count: HTMLInputElement;
  private readonly maxTokens: HTMLInputElement;
  private readonly temperature: HTMLInputElement;
  private search = "";

  constructor(
    private readonly act: (action: Action) => void,
    private readonly steer: (action: string) => void,
    setCount: (count: number) => void,
    defaults: { maxTokens: number; temperature: number },
  ) {
    this.count = numberInput("Children to fork", 1, 64, 1, 2);
    this.count.addEventListener("change", () => setCount(Number(this.count.value)));
    this.maxTokens = numberInput("Tokens to generate", 1, 100_000, 1, defaults.maxTokens);
    this.temperature = numberInput("Temperature (0 is greedy)", 0, 5, 0.1, defaults.temperature);
    this.more = this.node("Continue", "play", "c", "continue");
    this.more.classList.add("dl-primary");
    this.stop = button("Stop", { icon: "stop", key: "s", title: "Stop streaming", kind: "dl-stop" }, () => act("stop"));
    this.graph = this.look("graph", "Graph view", "view");
    this.outline = this.look("outline", "Outline view", "view");
    this.heat = button("", { icon: "heat", key: "l", title: "Token probability colours" }, () => act("heat"));
    const leaves = button("All leaves", { icon: "all", key: "C", title: "Continue every leaf in one batch" }, () => act("continueLeaves"));
    this.liveButtons.push(leaves);
    this.strip.hidden = true;
    this.element.append(
      group(this.node("Fork", "fork", "f", "fork"), el("span", "dl-times", { "aria-hidden": "true" }, "\u00d7"), this.count),
      group(this.more, leaves, field("tokens", this.maxTokens), field("temp", this.temperature), this.stop),
      group(
        this.node("Edit", "edit", "e", "edit"),
        this.node("Append", "append", "t", "append"),
        this.node("Next tokens", "top", "n", "top"),
        this.node("Prune", "prune", "p", "prune"),
      ),
      el("span", "dl-spring"),
      segmented(this.graph, this.outline),
      group(this.heat, button("?", { key: "?", title: "Keys", kind: "dl-keep" }, () => act("help"))),
    );
    this.zoom.append(
      button("", { icon: "plus", key: "+", title: "Zoom in" }, () => act("zoomIn")),
      button("", { icon: "minus", key: "-", title: "Zoom out" }, () => act("zoomOut")),
      button("", { icon: "fit", key: "0", title: "Fit the tree" }, () => act("fit")),
    );
  }

  /** What "continue" should use. */
  get generation(): { max_tokens: number; temperature: number } {
    return { max_tokens: Number(this.maxTokens.value), temperature: Number(this.temperature.value) };
  }

  update(state: ToolbarState): void {
    for (const item of this.nodeButtons) item.disabled = !state.live || !state.hasNode;
    for (const item of this.liveButtons) item.disabled = !state.live || !state.hasTree;
    this.stop.disabled = !state.live || !state.streaming;
    this.more.title = state.selectedCount > 1 ? `Continue the ${state.selectedCount} selected nodes in one batch (c)` : "Continue (c)";
    this.graph.setAttribute("aria-pressed", String(state.mode === "graph"));
    this.outline.setAttribute("aria-pressed", String(state.mode === "outline"));
    this.heat.setAttribute("aria-pressed", String(state.heat));
    if (Number(this.count.value) !== state.forkCount) this.count.value = String(state.forkCount);
  }

  /** Show the state of the attached search, or nothing without one. */
  updateSearch(search: SearchSummary | null | undefined): void {
    this.strip.hidden = !search;
    const key = search ? search.state : "";
    if (search && key !== this.search) {
      clear(this.strip);
      const running = search.state === "running";
      const ended = !running && search.state !== "paused";
      const steer = (label: string, name: "pause" | "play" | "step" | "stop", action: string): HTMLElement =>
        button(label, { icon: name, kind: "dl-small" }, () => this.steer(action));
      this.strip.append(el("strong", "", {}, `Search ${search.state}`), el("span", "dl-strip-text"));
      if (running) this.strip.append(steer("Pause", "pause", "pause"));
      else if (!ended) this.strip.append(steer("Resume", "play", "resume"), steer("Step", "step", "step"));
      if (!ended) this.strip.append(steer("Stop search", "stop", "stop"));
    }
    this.search = key;
    const text = this.strip.querySelector(".dl-strip-text");
    if (search && text) {
      text.textContent = `${search.iterations} iterations \u00b7 ${search.nodes} nodes \u00b7 ${search.tokens} tokens`;
    }
  }

  private node(label: string, icon: Parameters<typeof button>[1]["icon"] & string, key: string, action: Action): HTMLButtonElement {
    const item = button(label, { icon, key }, () => this.act(action));
    this.nodeButtons.push(item);
    return item;
  }

  private look(mode: "graph" | "outline", title: string, action: Action): HTMLButtonElement {
    return button("", { icon: mode, key: "g", title }, () => {
      const pressed = mode === "graph" ? this.graph : this.outline;
      if (pressed.getAttribute("aria-pressed") !== "true") this.act(action);
    });
  }
}

function group(...items: HTMLElement[]): HTMLElement {
  return el("span", "dl-group", {}, ...items);
}

function segmented(...items: HTMLElement[]): HTMLElement {
  return el("span", "dl-group dl-segmented", { role: "group", "aria-label": "View" }, ...items);
}

function field(label: string, input: HTMLInputElement): HTMLElement {
  return el("label", "dl-field", {}, input, el("span", "", {}, label));
}

function numberInput(title: string, min: number, max: number, step: number, value: number): HTMLInputElement {
  const input = el("input", "dl-number", { type: "number", min, max, step, title, "aria-label": title });
  input.value = String(value);
  input.addEventListener("keydown", (event) => event.stopPropagation());
  input.addEventListener("change", () => {
    const entered = Number(input.value);
    if (!Number.isFinite(entered) || input.value === "") input.value = String(value);
    else input.value = String(Math.min(max, Math.max(min, entered)));
  });
  return input;
}
