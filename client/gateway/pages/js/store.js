// Conversations and settings, in this browser's localStorage only.
const CHATS = "swarm.chats", SETTINGS = "swarm.settings", MODEL = "swarm.model", KEPT = 100;

function read(name, otherwise) {
  try { return JSON.parse(localStorage.getItem(name)) ?? otherwise; } catch { return otherwise; }
}

function write(name, value) {
  try { localStorage.setItem(name, JSON.stringify(value)); return true; } catch { return false; }
}

export const settings = { get: () => read(SETTINGS, {}), set: (value) => write(SETTINGS, value) };
export const model = { get: () => read(MODEL, null), set: (value) => write(MODEL, value) };

/** Newest first; each is {id, title, messages: [{role, content, …}]}. */
export const chats = read(CHATS, []).filter((chat) => Array.isArray(chat?.messages));

/** Keeps what `chats` holds. Traces are left out: they are large, and only of interest for a while. False: no room. */
export function save() {
  const kept = chats.filter((chat) => chat.messages.length).slice(0, KEPT);
  return write(CHATS, kept.map((chat) => ({ ...chat, messages: chat.messages.map(({ trace, ...message }) => message) })));
}

export function create() {
  const empty = chats.find((chat) => !chat.messages.length);
  if (empty) return empty;
  const id = Array.from(crypto.getRandomValues(new Uint32Array(2)), (n) => n.toString(36)).join("");
  chats.unshift({ id, title: "New chat", messages: [] });
  return chats[0];
}

export function remove(chat) {
  chats.splice(chats.indexOf(chat), 1);
  save();
}
