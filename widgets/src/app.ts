// One per widget model: the connection to Python. Views come and go, this stays.
import { Commands } from "./commands";
import type { FrameHeader, Incoming, Reply, ReplyError } from "./protocol";
import { Store } from "./store";

/** The part of anywidget's model that is used. */
export interface Model {
  get(key: string): unknown;
  send(content: unknown, callbacks?: unknown, buffers?: unknown): void;
  on(event: string, callback: (...args: never[]) => void): void;
  off(event: string, callback?: (...args: never[]) => void): void;
}

export type Connection = "connecting" | "live" | "lost";

export interface Listener {
  /** A frame was applied. */
  frame: (structure: boolean, changed: readonly number[]) => void;
  /** Python selected a node. */
  select: (node: number) => void;
  connection: (state: Connection) => void;
  fault: (error: ReplyError) => void;
}

const ANSWER_MS = 4000;
const HEARTBEAT_MS = 5000;

export class App {
  readonly store = new Store();
  readonly commands: Commands;
  connection: Connection = "connecting";
  private readonly listeners = new Set<Listener>();
  private timer: ReturnType<typeof setTimeout> | undefined;
  private beat: ReturnType<typeof setInterval> | undefined;
  private lastAck = 0;
  private heard = 0;

  constructor(private readonly model: Model) {
    const unique = crypto.getRandomValues(new Uint32Array(2));
    this.commands = new Commands((m) => this.send(m), `${unique[0]?.toString(36)}${unique[1]?.toString(36)}`);
    model.on("msg:custom", this.receive as (...args: never[]) => void);
    this.hello();
  }

  listen(listener: Listener, signal: AbortSignal): void {
    this.listeners.add(listener);
    signal.addEventListener("abort", () => this.listeners.delete(listener));
  }

  /** Ask for everything; without an answer the kernel is gone. */
  hello(): void {
    this.send({ t: "hello" });
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.setConnection("lost"), ANSWER_MS);
    // Answers an acknowledgement that got lost, and finds out that the kernel came back.
    this.beat ??= setInterval(() => this.heartbeat(), HEARTBEAT_MS);
  }

  /** A view drew the state up to `store.seq`: Python may send more. */
  drawn(): void {
    const seq = this.store.seq;
    if (seq <= this.lastAck) return;
    this.lastAck = seq;
    this.send({ t: "ack", seq });
  }

  close(): void {
    clearTimeout(this.timer);
    clearInterval(this.beat);
    this.model.off("msg:custom", this.receive as (...args: never[]) => void);
    this.commands.close();
    this.listeners.clear();
  }

  private heartbeat(): void {
    if (this.connection === "lost") this.send({ t: "hello" });
    else if (this.lastAck) this.send({ t: "ack", seq: this.lastAck });
  }

  private send(message: unknown): void {
    try {
      this.model.send(message);
    } catch (error) {
      // A model without a comm (a saved notebook, a dead kernel) throws: that is "not connected".
      void error;
      this.setConnection("lost");
    }
  }

  private readonly receive = (message: Incoming, buffers: readonly DataView[]): void => {
    this.heard = performance.now();
    if (message.t === "frame") this.frame(message, buffers[0]);
    else if (message.t === "reply") this.commands.settle(message as Reply);
    else if (message.t === "select") this.each((listener) => listener.select(message.node));
    else if (message.t === "fault") this.each((listener) => listener.fault(message.error));
  };

  private frame(header: FrameHeader, buffer: DataView | undefined): void {
    const applied = this.store.apply(header, buffer);
    if (applied.kind === "gap") this.send({ t: "snapshot" });
    if (applied.kind !== "ok") return;
    if (header.snapshot) this.lastAck = 0;
    clearTimeout(this.timer);
    this.setConnection("live");
    this.each((listener) => listener.frame(applied.structure, applied.changed));
    if (!this.listeners.size) this.drawn();
  }

  private setConnection(state: Connection): void {
    if (state === this.connection) return;
    this.connection = state;
    this.each((listener) => listener.connection(state));
  }

  private each(run: (listener: Listener) => void): void {
    for (const listener of [...this.listeners]) run(listener);
  }

  /** Milliseconds since Python was last heard. */
  get silence(): number {
    return performance.now() - this.heard;
  }
}
