// The map: every block a column, every node a bar over its span with a dark line for the KV cache in use, holes in red.
import { h, s } from "./dom.js";
import { coverage, layLanes, speedClass } from "./lanes.js";

const ROW = 22, HEAD = 46, UNIT = 1000;

/** Draws overviews into `place`; elements are kept from one to the next, and only what has changed is touched. */
export class SwarmMap {
  constructor(place, pick) {
    this.bars = new Map();
    this.pick = pick;
    this.back = s("g");
    this.front = s("g");
    this.svg = s("svg", { class: "map", role: "img", preserveAspectRatio: "none" }, this.back, this.front);
    this.ticks = h("div", { className: "map-labels", "aria-hidden": "true" });
    this.labels = h("div", { className: "map-labels", "aria-hidden": "true" });
    this.place = h("div", { className: "map-place" }, this.svg, this.ticks, this.labels);
    place.append(this.place);
    this.shape = "";
  }

  draw(overview) {
    const { nodes, num_blocks: blocks, holes } = overview;
    const { lanes, count } = layLanes(nodes);
    const height = HEAD + ROW * Math.max(1, count);
    const unit = UNIT / blocks;
    const served = coverage(nodes, blocks);
    const shape = JSON.stringify([blocks, count, holes, served]);
    if (shape !== this.shape) {
      this.shape = shape;
      this.svg.setAttribute("viewBox", `0 0 ${UNIT} ${height}`);
      this.place.style.height = `${height}px`;
      this.svg.setAttribute("aria-label", `${nodes.length} nodes over ${blocks} blocks; ${holes.length ? `nobody serves blocks ${holes.map((hole) => hole.join(":")).join(", ")}` : "every block is served"}`);
      const most = Math.max(1, ...served), step = Math.max(1, Math.ceil(blocks / 16));
      this.ticks.replaceChildren(...served.flatMap((_, block) => (block % step ? [] : [tick(block, blocks)])));
      this.back.replaceChildren(
        ...served.map((many, block) => s("rect", { x: block * unit, y: HEAD - 2 - (18 * many) / most, width: Math.max(unit - 0.6, unit * 0.6), height: (18 * many) / most, class: "served" })),
        ...holes.map(([start, end]) => s("rect", { x: start * unit, y: 0, width: (end - start) * unit, height, class: "hole" })));
    }
    const fastest = Math.max(0, ...nodes.map((node) => node.throughput));
    const gone = new Set(this.bars.keys());
    nodes.forEach((node, index) => {
      gone.delete(node.peer_id);
      let bar = this.bars.get(node.peer_id);
      if (!bar) {
        bar = { rect: s("rect", { height: ROW - 4, rx: 3 }), used: s("rect", { height: 3, class: "used" }), title: s("title"), label: h("span"), seen: "", said: "" };
        bar.rect.append(bar.title);
        bar.rect.addEventListener("click", () => this.pick(node.peer_id));
        this.bars.set(node.peer_id, bar);
        this.front.append(bar.rect, bar.used);
        this.labels.append(bar.label);
      }
      const kind = `bar speed-${speedClass(node.throughput, fastest)} ${node.state === "online" && node.meter ? "" : "away"}`;
      const { cache_tokens: all = 0, cache_tokens_free: free = 0, sessions = 0 } = node.meter ?? {};
      const used = all ? 1 - free / all : 0;
      const seen = `${node.start} ${node.end} ${lanes[index]} ${unit} ${kind} ${node.name} ${sessions} ${used}`;
      if (seen !== bar.seen) {
        bar.seen = seen;
        const y = HEAD + ROW * lanes[index] + 2;
        const put = { x: node.start * unit + 0.4, y, width: Math.max(0.5, (node.end - node.start) * unit - 0.8), class: kind };
        for (const [name, value] of Object.entries(put)) bar.rect.setAttribute(name, value);
        for (const [name, value] of Object.entries({ x: put.x, y: y + ROW - 7, width: put.width * used })) bar.used.setAttribute(name, value);
        Object.assign(bar.label.style, { left: `${(100 * node.start) / blocks}%`, width: `${(100 * (node.end - node.start)) / blocks}%`, top: `${y}px` });
        bar.label.textContent = (node.name || node.peer_id.slice(-6)) + (sessions ? ` · ${sessions}` : "");
        bar.label.className = kind;
      }
      const said = tip(node);
      if (said !== bar.said) bar.title.textContent = bar.said = said;
    });
    for (const peer of gone) {
      const { rect, used, label } = this.bars.get(peer);
      for (const part of [rect, used, label]) part.remove();
      this.bars.delete(peer);
    }
  }
}

function tick(block, blocks) {
  const mark = h("span", { className: "tick", textContent: block });
  mark.style.left = `${(100 * block) / blocks}%`;
  return mark;
}

function tip(node) {
  const { meter, rates } = node;
  return [
    `${node.name || node.peer_id}, blocks ${node.start}:${node.end}, ${node.state}`,
    `${node.throughput.toFixed(0)} blocks/s, version ${node.version ?? "?"}`,
    rates && `${rates.decode.toFixed(1)} tokens/s, ${(100 * rates.busy).toFixed(0)} % busy`,
    !meter && "does not answer, or is a server of Petals",
    meter && `${meter.sessions} sessions, ${meter.cache_tokens_free} of ${meter.cache_tokens} KV tokens free, ${(1e3 * meter.rtt).toFixed(1)} ms away`,
  ].filter(Boolean).join("\n");
}
