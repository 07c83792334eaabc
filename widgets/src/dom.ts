// Builds DOM without markup strings: text always goes in as text.

export type Attributes = Record<string, string | number | boolean | undefined>;

/** An element with a class, attributes and children; strings become text nodes. */
export function el<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  className = "",
  attributes: Attributes = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const node = document.createElement(tag);
  if (className) node.className = className;
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children);
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

/** A 16x16 icon from one path. */
export function icon(path: string): SVGSVGElement {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("dl-icon");
  const shape = document.createElementNS(SVG, "path");
  shape.setAttribute("d", path);
  svg.append(shape);
  return svg;
}

export const ICONS = {
  fork: "M4 2v5a3 3 0 0 0 3 3h5M4 2v12M12 10l-2.5-2.5M12 10l-2.5 2.5",
  play: "M5 3l8 5-8 5z",
  all: "M2 3l6 5-6 5zM8 3l6 5-6 5z",
  edit: "M3 13l.7-2.9L11 2.8l2.2 2.2-7.3 7.3z",
  append: "M2 4h8M2 8h5M2 12h5M12 8v6M9 11h6",
  top: "M2 3h11M2 7h8M2 11h5M2 15h3",
  prune: "M4 4.5l8 7M4 11.5l8-7M4.5 4.5a1.5 1.5 0 1 1-3 0 1.5 1.5 0 0 1 3 0zM4.5 11.5a1.5 1.5 0 1 1-3 0 1.5 1.5 0 0 1 3 0z",
  stop: "M4 4h8v8H4z",
  graph: "M2 8h3M5 8V4h3M5 8v4h3M8 2.5h5v3H8zM8 10.5h5v3H8z",
  outline: "M2 4h2M6 4h8M4 8h2M8 8h6M4 12h2M8 12h6",
  heat: "M3 13h2V9H3zM7 13h2V6H7zM11 13h2V3h-2z",
  fit: "M2 6V2h4M10 2h4v4M14 10v4h-4M6 14H2v-4",
  plus: "M8 3v10M3 8h10",
  minus: "M3 8h10",
  pause: "M5 3v10M11 3v10",
  step: "M4 3l6 5-6 5zM12 3v10",
  close: "M4 4l8 8M12 4l-8 8",
} as const;

/** A button with an icon, a label and a key hint. */
export function button(
  label: string,
  options: { icon?: keyof typeof ICONS; key?: string; title?: string; kind?: string; compact?: boolean },
  onClick: () => void,
): HTMLButtonElement {
  const name = options.title ?? label;
  const hint = options.key ? `${name} (${options.key})` : name;
  const node = el("button", `dl-button ${options.kind ?? ""}`, {
    type: "button",
    title: hint,
    "aria-label": name,
    "aria-keyshortcuts": options.key,
  });
  if (options.icon) node.append(icon(ICONS[options.icon]));
  if (label && !options.compact) node.append(el("span", "dl-label", {}, label));
  node.addEventListener("click", onClick);
  return node;
}

export function clear(node: Element): void {
  node.replaceChildren();
}
