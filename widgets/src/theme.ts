// Colours for the canvas, read from the page's --jp-* variables and re-read when the theme changes.

export interface Theme {
  dark: boolean;
  page: string;
  card: string;
  cardDim: string;
  border: string;
  borderStrong: string;
  edge: string;
  text: string;
  muted: string;
  faint: string;
  brand: string;
  brandSoft: string;
  good: string;
  warn: string;
  bad: string;
  font: string;
  mono: string;
}

/** Luminance of the resolved background decides between light and dark, whatever set it. */
export function readTheme(root: HTMLElement): Theme {
  const style = getComputedStyle(root);
  const get = (name: string, fallback: string): string => {
    const value = style.getPropertyValue(name).trim();
    return value || fallback;
  };
  const dark = isDark(style.backgroundColor, root);
  return {
    dark,
    page: get("--dl-canvas", dark ? "#15171b" : "#f6f7f9"),
    card: get("--dl-card", dark ? "#212429" : "#ffffff"),
    cardDim: get("--dl-card-dim", dark ? "#1a1d21" : "#f0f1f4"),
    border: get("--dl-border", dark ? "#3a3f47" : "#d5d9e0"),
    borderStrong: get("--dl-border-strong", dark ? "#5b626d" : "#a7aeb9"),
    edge: get("--dl-edge", dark ? "#4a515c" : "#b9c0cb"),
    text: get("--dl-text", dark ? "#e6e8eb" : "#1c1f23"),
    muted: get("--dl-muted", dark ? "#a3abb6" : "#5b6470"),
    faint: get("--dl-faint", dark ? "#747d89" : "#8a929d"),
    brand: get("--dl-brand", dark ? "#64b5f6" : "#1976d2"),
    brandSoft: get("--dl-brand-soft", dark ? "rgba(100,181,246,.22)" : "rgba(25,118,210,.16)"),
    good: get("--dl-good", dark ? "#5fd3a4" : "#00795b"),
    warn: get("--dl-warn", dark ? "#f0b95e" : "#a85a00"),
    bad: get("--dl-bad", dark ? "#ff8a80" : "#c62828"),
    font: get("--jp-ui-font-family", "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"),
    mono: get("--jp-code-font-family", "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"),
  };
}

/** Call `onChange` when the page's theme changes, until `signal` aborts. */
export function watchTheme(onChange: () => void, signal: AbortSignal): void {
  const observer = new MutationObserver(onChange);
  const watched = ["data-jp-theme-light", "data-jp-theme-name", "data-vscode-theme-kind", "data-theme", "class"];
  for (const target of [document.body, document.documentElement]) {
    observer.observe(target, { attributes: true, attributeFilter: watched });
  }
  // The theme's stylesheet may come after the attribute changed.
  const late = new MutationObserver((records) => {
    if (records.some((r) => [...r.addedNodes, ...r.removedNodes].some((n) => n.nodeName === "LINK" || n.nodeName === "STYLE"))) onChange();
  });
  late.observe(document.head, { childList: true });
  const query = matchMedia("(prefers-color-scheme: dark)");
  query.addEventListener("change", onChange, { signal });
  signal.addEventListener("abort", () => {
    observer.disconnect();
    late.disconnect();
  });
}

function isDark(background: string, root: HTMLElement): boolean {
  const flag = document.body.getAttribute("data-jp-theme-light");
  if (flag === "false") return true;
  if (flag === "true") return false;
  const kind = document.body.getAttribute("data-vscode-theme-kind") ?? "";
  if (kind.includes("dark")) return true;
  if (kind.includes("light")) return false;
  const rgb = /rgba?\(([^)]+)\)/.exec(background)?.[1]?.split(",").map(Number);
  if (rgb && rgb.length >= 3 && (rgb[3] ?? 1) > 0.5) {
    return 0.299 * (rgb[0] ?? 0) + 0.587 * (rgb[1] ?? 0) + 0.114 * (rgb[2] ?? 0) < 128;
  }
  void root;
  return matchMedia("(prefers-color-scheme: dark)").matches;
}
