// A reply's way through the swarm while it comes: its hops, its detours, and how fast it goes.
import { h } from "./dom.js";

export const peerName = (hop) => hop.name || `…${hop.peer.slice(-6)}`;
export const blocks = (hop) => `${hop.start}:${hop.end}`;
const same = (a, b) => a.peer === b.peer && a.start === b.start;

/** Follows one reply. `tokens` are kept for the trace. */
export class Route {
  constructor() {
    this.hops = [];
    this.tokens = [];
    this.detours = []; // {failed, by: hops or null}
    this.failing = null;
    this.first = this.last = 0;
    this.element = h("div", { className: "route" });
  }

  /** Takes a chunk's field `swarm`. */
  take({ tokens, events }) {
    for (const { kind, hops, reason } of events) {
      if (kind === "route") this.hops = hops;
      else if (kind === "failed" || kind === "left") {
        this.detours.push({ failed: hops[0], slow: kind === "left", reason, by: null, at: this.tokens.length });
      } else if (kind === "replaced") {
        const detour = this.detours.find((one) => !one.by); // none: a hop that can't forget tokens was opened anew
        if (detour) detour.by = hops;
        const index = this.hops.findIndex((hop) => (detour ? same(hop, detour.failed) : hop.start === hops[0].start));
        if (index >= 0) this.hops = [...this.hops.slice(0, index), ...hops, ...this.hops.slice(index + 1)];
      }
    }
    if (tokens.length) {
      this.last = performance.now();
      this.first ||= this.last;
      this.tokens.push(...tokens);
    }
  }

  /** Tokens a second after the first; null before there are two. */
  get speed() {
    return this.tokens.length > 1 && this.last > this.first ? (this.tokens.length - 1) / ((this.last - this.first) / 1e3) : null;
  }

  /** Brings `element` up to date. */
  draw() {
    const down = (hop) => this.detours.some((detour) => !detour.by && same(detour.failed, hop));
    const speed = this.speed;
    const chips = this.hops.flatMap((hop, index) => [
      index ? h("span", { className: "arrow", textContent: "→" }) : null,
      h("a", { className: down(hop) ? "hop down" : "hop", href: `swarm.html#${hop.peer}`, target: "_blank", title: hop.peer },
        h("b", { textContent: blocks(hop) }), ` ${peerName(hop)}`),
    ]);
    const detours = this.detours.map(({ failed, slow, by, at, reason }) => h("li", { className: "detour", title: reason },
      `Detour at token ${at + 1}: ${peerName(failed)} ${slow ? "became slow" : "failed"}; `,
      by ? `blocks ${blocks(failed)} went on at ${by.map(peerName).join(", ")}.` : `looking for another node with blocks ${blocks(failed)}…`));
    const many = this.tokens.length;
    this.element.replaceChildren(
      h("span", { className: "speed", textContent: speed === null ? "…" : `${speed.toFixed(1)} tokens/s · ${many} tokens` }),
      h("span", { className: "hops" }, chips),
      detours.length ? h("ul", { className: "detours" }, detours) : "");
  }
}
