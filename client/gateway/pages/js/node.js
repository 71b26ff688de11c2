// A node by itself: what it says, and its last ten minutes as lines.
import { ask } from "./api.js";
import { h, s } from "./dom.js";

const CHARTS = [
  ["decode", "Tokens decoded a second", (n) => n.toFixed(1)],
  ["prefill", "Tokens of prompts a second", (n) => n.toFixed(1)],
  ["busy", "Share of the time that it computes", (n) => `${(100 * n).toFixed(0)} %`, 1],
  ["cache_used", "KV cache in use", (n) => `${(100 * n).toFixed(0)} %`, 1],
  ["sessions", "Sessions", (n) => n.toFixed(0)],
  ["waiting", "Steps that wait", (n) => n.toFixed(0)],
  ["rtt_ms", "Round trip from the gateway", (n) => `${n.toFixed(1)} ms`],
];

/** Shows the node `peer` in `place`, with the history that the gateway keeps, until `signal` ends it. */
export async function showNode(place, peer, facts, signal) {
  const list = h("dl", { className: "facts" });
  const charts = h("div", { className: "charts" });
  place.replaceChildren(h("p", {}, h("a", { href: "swarm.html", textContent: "← All nodes", onclick: (event) => { event.preventDefault(); location.hash = ""; } })), list, charts);
  const timer = setInterval(draw, 5000);
  const facing = setInterval(tell, 1000);
  signal.addEventListener("abort", () => { clearInterval(timer); clearInterval(facing); });
  tell();
  await draw();

  function tell() {
    const node = facts();
    const rows = node ? describe(node) : [["State", "gone: the swarm does not know it any more"], ["Peer", peer]];
    list.replaceChildren(...rows.flatMap(([name, value]) => [h("dt", { textContent: name }), h("dd", { textContent: value })]));
  }

  async function draw() {
    try {
      const { columns, points } = await (await ask(`api/swarm/nodes/${encodeURIComponent(peer)}`, { signal })).json();
      charts.replaceChildren(...CHARTS.map(([column, title, text, most]) => chart(title, text, most, points.map((p) => [p[0], p[columns.indexOf(column)]]))));
    } catch (error) {
      if (error.name !== "AbortError") charts.replaceChildren(h("p", { className: "muted", textContent: error.status === 404 ? "There is no history of it yet." : error.message }));
    }
  }
}

function describe(node) {
  const { meter, rates } = node;
  return [
    ["Name", node.name || "none"], ["Peer", node.peer_id], ["State", node.state], ["Blocks", `${node.start}:${node.end}`],
    ["Speed", `${node.throughput.toFixed(0)} blocks/s`],
    rates && ["Now", `${rates.decode.toFixed(1)} tokens/s, ${(100 * rates.busy).toFixed(0)} % busy`],
    meter && ["Sessions", `${meter.sessions}, ${meter.waiting} steps wait`],
    meter && ["KV cache", `${meter.cache_tokens_free} of ${meter.cache_tokens} tokens free`],
    meter && ["Round trip", `${(1e3 * meter.rtt).toFixed(1)} ms`],
    ["Weights", [node.dtype, node.quantization].filter((each) => each && each !== "none").join(", ") || "?"],
    ["Version", node.version ?? "?"], ["Up since", node.started ? new Date(1e3 * node.started).toLocaleString() : "?"],
    ["Reached by", reachedBy(node)], ["Deterministic", node.deterministic ? "yes" : "no"],
  ].filter(Boolean);
}

function reachedBy({ reached, relayed }) {
  if (reached === "hole-punched") return "hole punching from this gateway, others through a relay";
  if (relayed) return "a relay";
  return { direct: "its own address", unreachable: "nobody", unknown: "not known yet" }[reached] ?? "?";
}

const WIDTH = 300, HEIGHT = 70, SPAN = 600;

function chart(title, text, most, points) {
  if (!points.length) return h("figure", {}, h("figcaption", { textContent: `${title}: nothing yet` }));
  const values = points.map(([, value]) => value), top = most ?? (Math.max(...values) || 1);
  const now = points.at(-1)[0];
  const line = points.map(([at, value]) => `${(WIDTH * (1 - (now - at) / SPAN)).toFixed(1)},${(HEIGHT - 2 - (HEIGHT - 4) * Math.min(1, value / top)).toFixed(1)}`).join(" ");
  const said = `${title}: ${text(values.at(-1))} now, ${text(Math.min(...values))} to ${text(Math.max(...values))} in the last ten minutes`;
  return h("figure", {}, h("figcaption", {}, `${title} `, h("b", { textContent: text(values.at(-1)) }), h("span", { className: "muted", textContent: ` up to ${text(Math.max(...values))}` })),
    s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": said }, s("polyline", { points: line, class: "line" })));
}
