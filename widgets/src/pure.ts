// What the node tests load: every module without a DOM.
export * from "./protocol";
export * from "./store";
export * from "./layout";
export * from "./viewport";
export * from "./navigate";
export * from "./heat";
export * from "./format";
export * from "./commands";
