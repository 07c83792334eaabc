// Entry point of the widget, in anywidget's shape.
import { App, type Model } from "./app";
import css from "./style.css";
import { el } from "./dom";
import { View } from "./view";

const apps = new WeakMap<object, { app: App; views: number }>();

function render({ model, el: host }: { model: Model; el: HTMLElement }): () => void {
  let entry = apps.get(model);
  if (!entry) {
    entry = { app: new App(model), views: 0 };
    apps.set(model, entry);
  }
  const { app } = entry;
  entry.views++;
  const stop = new AbortController();
  host.append(el("style", "", {}, css));
  new View(app, model, host, stop.signal);
  return () => {
    stop.abort();
    const left = apps.get(model);
    if (left && --left.views === 0) {
      left.app.close();
      apps.delete(model);
    }
  };
}

export default { render };
