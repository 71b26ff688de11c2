// One token's time in each hop: network, queue, computing.
import { $, h, s } from "./dom.js";
import { blocks, peerName } from "./route.js";

const PARTS = [["network_ms", "network"], ["queue_ms", "queue"], ["compute_ms", "compute"]];
const total = (hop) => PARTS.reduce((sum, [name]) => sum + hop[name], 0);
const whole = (token) => token.gateway_ms + token.hops.reduce((sum, hop) => sum + total(hop), 0);
const ms = (number) => `${number < 10 ? number.toFixed(2) : number.toFixed(0)} ms`;

/** Opens the dialog for the tokens of a reply. */
export function showTrace(tokens) {
  const slowest = Math.max(...tokens.map(whole));
  const detail = h("div", { className: "token-detail" });
  const buttons = tokens.map((token, index) => {
    const share = whole(token) / slowest;
    return h("button", { type: "button", className: `token time-${Math.ceil(share * 4)}`, "aria-pressed": "false", title: ms(whole(token)),
      textContent: token.text.replaceAll("\n", "⏎") || "∅", "aria-label": `Token ${index + 1}, ${JSON.stringify(token.text)}, ${ms(whole(token))}`,
      onclick: () => pick(index) });
  });
  const pick = (index) => {
    buttons.forEach((button, each) => {
      button.setAttribute("aria-pressed", String(each === index));
      button.tabIndex = each === index ? 0 : -1;
    });
    detail.replaceChildren(...describe(tokens[index], index));
  };
  const list = h("div", { className: "tokens", role: "group", "aria-label": "Tokens of the reply; arrow keys move", onkeydown: (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const at = buttons.indexOf(event.target) + step;
    if (!step || !buttons[at]) return;
    event.preventDefault();
    pick(at);
    buttons[at].focus();
  } }, buttons);
  $("trace-body").replaceChildren(list, detail);
  pick(Math.min(1, tokens.length - 1)); // the first has the whole prompt in it
  $("trace").showModal();
}

function describe(token, index) {
  const rows = [...token.hops.map((hop) => ({ label: `${blocks(hop)} ${peerName(hop)}`, ...hop })),
    { label: "gateway (head, sampling)", network_ms: 0, queue_ms: 0, compute_ms: token.gateway_ms }];
  const all = whole(token) || 1;
  const bar = s("svg", { viewBox: "0 0 1000 40", preserveAspectRatio: "none", class: "stacked", "aria-hidden": "true" });
  let x = 0;
  for (const row of rows) {
    for (const [name, kind] of PARTS) {
      const width = (1000 * row[name]) / all;
      bar.append(s("rect", { x, y: 0, width, height: 40, class: `part-${kind}` }));
      x += width;
    }
    bar.append(s("line", { x1: x, x2: x, y1: 0, y2: 40, class: "edge" }));
  }
  const share = (row) => {
    const line = s("svg", { viewBox: "0 0 1000 10", preserveAspectRatio: "none", class: "stacked small", "aria-hidden": "true" });
    let at = 0;
    for (const [name, kind] of PARTS) {
      const width = (1000 * row[name]) / all;
      line.append(s("rect", { x: at, y: 0, width, height: 10, class: `part-${kind}` }));
      at += width;
    }
    return line;
  };
  const head = ["Hop", "Network", "Queue", "Compute", "Share"].map((textContent) => h("th", { scope: "col", textContent }));
  const lines = rows.map((row) => h("tr", {}, h("th", { scope: "row", textContent: row.label }),
    PARTS.map(([name]) => h("td", { textContent: ms(row[name]) })), h("td", { className: "bar" }, share(row))));
  return [
    h("p", {}, `Token ${index + 1} `, h("code", { textContent: JSON.stringify(token.text) }), `: ${ms(whole(token))}`,
      index ? "" : ", with the prompt before it"),
    bar,
    h("p", { className: "legend" }, PARTS.map(([, kind]) => h("span", {}, s("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, s("rect", { width: 10, height: 10, class: `part-${kind}` })), ` ${kind}`))),
    h("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Times by hop" }, h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, lines))),
    h("p", { className: "muted", textContent: "Queue and compute are what the node says; network is the rest of the time until its answer was here." }),
  ];
}
