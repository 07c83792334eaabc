// The line below the tree: connection, counts, pages, speed, and what the last action cost.
import type { Connection } from "./app";
import { clear, el } from "./dom";
import { bytes, micros, plural } from "./format";
import type { Cost, Totals } from "./protocol";

export class StatusBar {
  readonly element = el("div", "dl-statusbar");
  private readonly dot = el("span", "dl-dot");
  private readonly counts = el("span", "dl-counts");
  private readonly meter = el("span", "dl-meter", { role: "img" });
  private readonly pages = el("span", "dl-pages");
  private readonly speed = el("span", "dl-speed");
  private readonly last = el("span", "dl-cost", { role: "status" });

  constructor() {
    this.element.append(this.dot, this.counts, this.meter, this.pages, this.speed, el("span", "dl-spring"), this.last);
  }

  update(connection: Connection, nodes: number, totals: Totals): void {
    this.dot.className = `dl-dot dl-${connection}`;
    this.dot.title = { connecting: "connecting to the kernel", live: "live", lost: "kernel not connected" }[connection];
    const branches = totals.branches === undefined ? "" : ` \u00b7 ${plural(totals.branches, "branch")}`;
    this.counts.textContent = connection === "lost" ? "kernel not connected" : `${plural(nodes, "node")}${branches}`;
    this.renderPages(totals);
    const rate = totals.tokens_per_s ?? 0;
    const busy = totals.streaming ?? 0;
    this.speed.textContent = busy ? `${plural(busy, "branch")} streaming \u00b7 ${rate.toFixed(rate < 10 ? 1 : 0)} tok/s` : "";
  }

  /** Say what an action cost, as measured. */
  cost(op: string, cost: Cost): void {
    const parts = [micros(cost.us)];
    if (cost.pages_taken !== undefined) parts.push(plural(cost.pages_taken, "page"), `${bytes(cost.bytes_copied ?? 0)} copied`);
    if (cost.pages_freed !== undefined) parts.push(`${plural(cost.pages_freed, "page")} freed (${bytes(cost.bytes_freed ?? 0)})`);
    const verb = op === "prune" ? op : "fork";
    const name = cost.count && cost.count > 1 ? `${verb} \u00d7${cost.count}` : verb;
    if (cost.tokens_shared) parts.unshift(`${plural(cost.tokens_shared, "token")} shared`);
    this.say(name, parts.join(" \u00b7 "));
  }

  say(title: string, text: string): void {
    clear(this.last);
    this.last.append(el("strong", "", {}, title), ` ${text}`);
  }

  private renderPages(totals: Totals): void {
    const total = totals.pages_total ?? 0;
    if (!total) {
      this.pages.textContent = "";
      this.meter.hidden = true;
      return;
    }
    const shared = totals.pages_shared ?? 0;
    const own = (totals.pages_live ?? 0) - shared;
    const cached = totals.pages_cached ?? 0;
    this.meter.hidden = false;
    clear(this.meter);
    for (const [kind, count] of [["shared", shared], ["own", own], ["cached", cached]] as const) {
      const part = el("i", `dl-part-${kind}`);
      part.style.width = `${(100 * count) / total}%`;
      this.meter.append(part);
    }
    const saved = totals.bytes_saved ? `, sharing saves ${bytes(totals.bytes_saved)}` : "";
    const text = `${shared} shared + ${own} own${cached ? ` + ${cached} cached` : ""} of ${total.toLocaleString("en-US")} pages`;
    this.meter.setAttribute("aria-label", text);
    this.meter.title = `${text}${saved}; ${totals.cow_copies ?? 0} copies on write`;
    const pool = totals.bytes_total ? ` (${totals.kv_format}, ${bytes(totals.bytes_total)})` : "";
    this.pages.textContent = text + pool;
    this.pages.title = this.meter.title;
  }
}
