// The swarm page: live by server-sent events.
import { ask, events } from "./api.js";
import { $, copyButton, h, s } from "./dom.js";
import { SwarmMap } from "./map.js";
import { showNode } from "./node.js";

let latest = null, model = null, showing = null; // showing: {peer, abort}
const map = new SwarmMap($("map"), (peer) => { location.hash = peer; });
const rows = new Map();
const current = () => latest?.models.find((each) => each.model === model) ?? latest?.models[0];

// what comes

async function follow() {
  for (;;) {
    try {
      const response = await ask("api/swarm/events");
      $("problem").replaceChildren();
      for await (const look of events(response, { endless: true })) {
        latest = look;
        $("live").textContent !== "live" && ($("live").textContent = "live");
        draw();
      }
    } catch (error) {
      if (error.status === 401 || error.status === 403) {
        $("live").textContent = "";
        $("problem").replaceChildren(h("p", { className: "message error" }, `${error.message} `, h("a", { href: "./", textContent: "Settings are on the chat page." })));
        return;
      }
      console.debug(error.message);
    }
    $("live").textContent = "connection lost, trying again…";
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

// the whole swarm

function draw() {
  const begin = performance.now();
  const names = latest.models.map((each) => each.model);
  if (names.join("\n") !== [...$("model").options].map((each) => each.value).join("\n")) {
    $("model").replaceChildren(...names.map((name) => h("option", { value: name, textContent: name })));
    if (names.includes(model)) $("model").value = model;
  }
  const overview = current();
  if (!overview) return;
  if (!showing) {
    drawSummary(overview);
    map.draw(overview);
    drawTable(overview);
    drawJoin(overview);
  }
  performance.measure("swarm.draw", { start: begin });
}

function drawSummary({ nodes, num_blocks: blocks, holes }) {
  const rates = nodes.map((node) => node.rates).filter(Boolean);
  const made = nodes.filter((node) => node.end === blocks && node.rates).reduce((sum, node) => sum + node.rates.decode, 0); // a token passes the last block once
  const busy = rates.length ? `${((100 * rates.reduce((sum, rate) => sum + rate.busy, 0)) / rates.length).toFixed(0)} % busy` : "measuring…";
  $("summary").replaceChildren(
    `${nodes.length} nodes · ${blocks} blocks · ${made.toFixed(1)} tokens/s · ${busy} · `,
    holes.length ? h("strong", { className: "bad", textContent: `Nobody serves blocks ${holes.map((hole) => hole.join(":")).join(", ")}: no text can be generated yet.` })
      : "Every block is served.");
}

const COLUMNS = [
  ["Blocks", (n) => `${n.start}:${n.end}`], ["Node", null], ["State", (n) => n.state], ["Blocks/s", (n) => n.throughput.toFixed(0)],
  ["Tokens/s", (n) => n.rates?.decode.toFixed(1) ?? "?"], ["Busy", (n) => (n.rates ? `${(100 * n.rates.busy).toFixed(0)} %` : "?")],
  ["Sessions", (n) => n.meter?.sessions ?? n.sessions ?? "?"], ["Queue", (n) => n.meter?.waiting ?? "?"],
  ["Free KV", (n) => n.meter?.cache_tokens_free ?? n.cache_tokens_left ?? "?"], ["RTT ms", (n) => (n.meter ? (1e3 * n.meter.rtt).toFixed(1) : "?")],
  ["Weights", (n) => (n.quantization && n.quantization !== "none" ? n.quantization : n.dtype ?? "?")], ["Version", (n) => n.version ?? "?"],
];

function drawTable({ nodes }) {
  const table = $("nodes");
  if (!table.tHead) {
    table.append(h("thead", {}, h("tr", {}, COLUMNS.map(([textContent]) => h("th", { scope: "col", textContent })))), h("tbody"));
  }
  const body = table.tBodies[0], gone = new Set(rows.keys());
  nodes.forEach((node, index) => {
    gone.delete(node.peer_id);
    let row = rows.get(node.peer_id);
    if (!row) {
      const cells = COLUMNS.map(([, text]) => h(text ? "td" : "th", text ? {} : { scope: "row" }));
      cells[1].append(h("a", { href: `#${node.peer_id}`, textContent: node.name || `…${node.peer_id.slice(-8)}` }));
      row = { element: h("tr", {}, cells), cells, said: [] };
      rows.set(node.peer_id, row);
    }
    COLUMNS.forEach(([, text], column) => {
      const value = text && String(text(node));
      if (value !== null && row.said[column] !== value) row.cells[column].textContent = row.said[column] = value;
    });
    if (body.children[index] !== row.element) body.insertBefore(row.element, body.children[index] ?? null);
  });
  for (const peer of gone) {
    rows.get(peer).element.remove();
    rows.delete(peer);
  }
}

const quote = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

function drawJoin({ model: name }) {
  const [source, ...peers] = latest.join[name];
  const addresses = peers.flatMap((peer) => ["--initial-peers", peer]);
  // of a locked swarm the gateway says "invitation": null if whoever opens this page needn't have a key for it
  const how = latest.invitation ? ["--join", latest.invitation] : latest.invitation === null ? [...addresses, "--swarm-key", "swarm.key"] : addresses;
  const command = ["swarm-node", "serve", source, ...how].map(quote).join(" ");
  if ($("join").textContent === command) return;
  $("join").textContent = command;
  const here = peers.every((peer) => peer.startsWith("/ip4/127.") || peer.startsWith("/ip6/::1/"));
  $("join-note").textContent = here ? "This address is for the gateway's own machine only: on others, use one that its first node prints, with the machine's address in your network." : "";
}

function drawLegend() {
  const box = (kind) => s("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, s("rect", { width: 10, height: 10, class: kind }));
  $("legend").replaceChildren(...[["speed-0", "slow"], ["speed-2", "a quarter of the fastest"], ["speed-4", "fast"], ["hole", "served by nobody"], ["used", "KV cache in use"], ["served", "how many serve a block"]]
    .map(([kind, text]) => h("span", {}, box(`bar ${kind}`), ` ${text}`)));
}

// one node

function route() {
  const peer = decodeURIComponent(location.hash.slice(1));
  showing?.abort.abort();
  showing = peer ? { peer, abort: new AbortController() } : null;
  $("all").hidden = Boolean(peer);
  $("one").hidden = !peer;
  $("title").textContent = peer ? "Node" : "Swarm";
  document.title = `${$("title").textContent} · swarm`;
  if (peer) showNode($("one"), peer, () => current()?.nodes.find((node) => node.peer_id === peer), showing.abort.signal);
  else if (latest) draw();
}

$("join-copy").append(copyButton(() => $("join").textContent));
$("model").addEventListener("change", () => { model = $("model").value; draw(); });
addEventListener("hashchange", route);
drawLegend();
route();
follow();
