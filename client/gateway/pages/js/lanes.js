// Where the bars of a map go. Pure functions.

/** Gives each of `nodes` ({start, end}) a lane so that no two in a lane overlap, in as few lanes as there can be. */
export function layLanes(nodes) {
  const order = nodes.map((_, index) => index).sort((a, b) => nodes[a].start - nodes[b].start || nodes[b].end - nodes[a].end || a - b);
  const ends = []; // of the last bar of each lane
  const lanes = new Array(nodes.length);
  for (const index of order) {
    let lane = ends.findIndex((end) => end <= nodes[index].start);
    if (lane < 0) lane = ends.length;
    ends[lane] = nodes[index].end;
    lanes[index] = lane;
  }
  return { lanes, count: ends.length };
}

/** How many nodes that are online serve each block. */
export function coverage(nodes, blocks) {
  const change = new Array(blocks + 1).fill(0);
  for (const { start, end, state } of nodes) {
    if (state !== "online") continue;
    change[start] += 1;
    change[end] -= 1;
  }
  let served = 0;
  return change.slice(0, blocks).map((each) => (served += each));
}

/** 0 to 4 for a throughput between none and `most`, each class half as fast as the next. */
export const speedClass = (throughput, most) => (most > 0 ? Math.max(0, 4 + Math.ceil(Math.log2(Math.max(throughput, 1e-9) / most))) : 0);
