// Sends commands and matches replies by id. A command that gets no answer fails by itself.
import type { Reply, ReplyError } from "./protocol";

export class CommandFailed extends Error {
  constructor(
    readonly typeName: string,
    message: string,
  ) {
    super(message);
  }
}

interface Waiting {
  resolve: (reply: Reply) => void;
  reject: (error: Error) => void;
  timer: ReturnType<typeof setTimeout>;
  op: string;
}

export class Commands {
  private readonly waiting = new Map<string, Waiting>();
  private next = 1;

  /**
   * @param send hands a message to Python.
   * @param prefix makes ids of this front end unlike those of any other.
   */
  constructor(
    private readonly send: (message: unknown) => void,
    private readonly prefix: string,
    private readonly timeoutMs = 60_000,
  ) {}

  get pending(): number {
    return this.waiting.size;
  }

  /** Run one operation in Python; rejects with CommandFailed when Python answers with an error. */
  run(op: string, node = 0, args: Record<string, unknown> = {}): Promise<Reply> {
    const id = `${this.prefix}-${this.next++}`;
    return new Promise<Reply>((resolve, reject) => {
      const timer = setTimeout(() => {
        this.waiting.delete(id);
        reject(new CommandFailed("NoAnswer", `${op}: the kernel did not answer; is it still running?`));
      }, this.timeoutMs);
      this.waiting.set(id, { resolve, reject, timer, op });
      this.send({ t: "cmd", id, op, node, args });
    });
  }

  /** A reply came; replies to others' commands (Python, other tabs) are ignored. */
  settle(reply: Reply): boolean {
    const waiting = this.waiting.get(reply.id);
    if (!waiting) return false;
    this.waiting.delete(reply.id);
    clearTimeout(waiting.timer);
    if (reply.ok) waiting.resolve(reply);
    else {
      const error = reply.error ?? ({ type: "Error", message: "unknown error" } satisfies ReplyError);
      waiting.reject(new CommandFailed(error.type, error.message));
    }
    return true;
  }

  close(): void {
    for (const { timer } of this.waiting.values()) clearTimeout(timer);
    this.waiting.clear();
  }
}
