// What shows while there is no tree: a prompt box, or the saved tree when no kernel answers.
import type { Connection } from "./app";
import { el } from "./dom";

export class Welcome {
  readonly element = el("div", "dl-welcome");
  private readonly form = el("form", "dl-welcome-form");
  private readonly saved = el("div", "dl-saved");
  private readonly waiting = el("div", "dl-placeholder", {}, "Connecting to the kernel\u2026");

  constructor(fallback: string, prompt: (text: string) => void) {
    const area = el("textarea", "dl-textarea", { rows: 3, placeholder: "Once upon a time\u2026", "aria-label": "Prompt" });
    const go = el("button", "dl-button dl-primary", { type: "submit" }, "Start a tree");
    area.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (area.value) prompt(area.value);
    });
    this.form.append(
      el("h3", "", {}, "No branches yet"),
      el("p", "", {}, "Type a prompt. It becomes the root; every fork below it shares its pages."),
      area,
      el("div", "dl-editor-row", {}, go),
    );
    this.saved.append(
      el("p", "dl-saved-note", {}, "Kernel not connected. This is the tree as it was saved; run the cell again to bring it back to life."),
      el("pre", "dl-saved-tree", {}, fallback || "(nothing was saved)"),
    );
    this.element.append(this.form, this.saved, this.waiting);
  }

  update(connection: Connection, nodes: number): void {
    this.form.hidden = connection !== "live" || nodes > 0;
    this.saved.hidden = connection !== "lost" || nodes > 0;
    this.waiting.hidden = connection !== "connecting";
    this.element.hidden = this.form.hidden && this.saved.hidden && this.waiting.hidden;
  }
}
