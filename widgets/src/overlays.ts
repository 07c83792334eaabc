// Toasts, the confirmation dialog and the key map.
import { clear, el } from "./dom";
import { KEY_MAP } from "./keys";

const TOAST_MS = 6000;
const ERROR_MS = 12_000;

export class Overlays {
  readonly toasts = el("div", "dl-toasts", { role: "status", "aria-live": "polite" });
  readonly layer = el("div", "dl-layer");
  private restore: HTMLElement | null = null;

  constructor(private readonly root: HTMLElement) {
    this.layer.hidden = true;
    this.layer.addEventListener("click", (event) => {
      if (event.target === this.layer) this.close();
    });
    this.layer.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Escape") this.close();
    });
  }

  get isOpen(): boolean {
    return !this.layer.hidden;
  }

  toast(title: string, message: string, kind: "info" | "error" = "info"): void {
    const close = el("button", "dl-toast-close", { type: "button", "aria-label": "Dismiss" }, "\u00d7");
    const box = el("div", `dl-toast dl-${kind}`, {}, el("strong", "", {}, title), el("span", "", {}, message), close);
    close.addEventListener("click", () => box.remove());
    this.toasts.append(box);
    while (this.toasts.children.length > 3) this.toasts.firstElementChild?.remove();
    setTimeout(() => box.remove(), kind === "error" ? ERROR_MS : TOAST_MS);
  }

  /** Ask before something that can't be taken back. The text may be filled in later. */
  confirm(title: string, text: string, action: string, run: () => void): (text: string) => void {
    const message = el("p", "", {}, text);
    const go = el("button", "dl-button dl-danger", { type: "button" }, action);
    const no = el("button", "dl-button", { type: "button" }, "Cancel");
    go.addEventListener("click", () => {
      this.close();
      run();
    });
    no.addEventListener("click", () => this.close());
    this.open(title, [message, el("div", "dl-editor-row", {}, go, no)]);
    go.focus();
    return (better) => message.replaceChildren(better);
  }

  help(): void {
    const columns = el("div", "dl-help");
    for (const { group, keys } of KEY_MAP) {
      const list = el("div", "dl-keys");
      for (const [key, what] of keys) {
        const names = key.split(" ").flatMap((k, i) => (i ? [" ", el("kbd", "", {}, k)] : [el("kbd", "", {}, k)]));
        list.append(el("span", "", {}, ...names), el("span", "", {}, what));
      }
      columns.append(el("section", "", {}, el("h4", "", {}, group), list));
    }
    const close = el("button", "dl-button", { type: "button" }, "Close");
    close.addEventListener("click", () => this.close());
    this.open("Keys", [columns, el("div", "dl-editor-row", {}, close)]);
    close.focus();
  }

  close(): void {
    this.layer.hidden = true;
    clear(this.layer);
    this.restore?.focus();
    this.restore = null;
  }

  private open(title: string, content: Node[]): void {
    this.restore ??= this.root.contains(document.activeElement) ? (document.activeElement as HTMLElement) : null;
    clear(this.layer);
    this.layer.append(
      el("div", "dl-dialog", { role: "dialog", "aria-modal": "true", "aria-label": title }, el("h3", "", {}, title), ...content),
    );
    this.layer.hidden = false;
  }
}
