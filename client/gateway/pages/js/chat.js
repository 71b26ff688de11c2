// The chat page: conversations, and replies as they stream.
import { apiKey, ask, events } from "./api.js";
import { $, copyButton, h } from "./dom.js";
import { render } from "./markdown.js";
import { Route } from "./route.js";
import * as store from "./store.js";
import { showTrace } from "./trace.js";

let chat = store.chats[0] ?? store.create();
let replying = null; // {chat, abort, …} while a reply streams
const log = $("log"), composer = $("composer");

// drawing

const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;
const toEnd = () => { log.scrollTop = log.scrollHeight; };

/** The next key is for the message field; not where that brings up a keyboard over half of the screen. */
function ready() {
  if (matchMedia("(pointer: fine)").matches) composer.focus();
}

function drawChats() {
  $("conversations").replaceChildren(...store.chats.map((each) => h("li", {},
    h("button", { type: "button", className: "open", textContent: each.title, "aria-current": each === chat ? "true" : undefined,
      onclick: () => { open(each); closeMenu(); } }),
    h("button", { type: "button", className: "icon", textContent: "×", "aria-label": `Delete ${each.title}`, onclick: () => remove(each) }))));
}

function drawMessages() {
  const { messages } = chat;
  log.replaceChildren(...messages.map(drawMessage));
  if (!messages.length) log.append(h("p", { className: "empty muted", textContent: "Ask something. Each token passes all nodes of the route below its reply." }));
  if (replying?.chat === chat) log.append(replying.element);
  toEnd();
}

function drawMessage(message, index) {
  if (message.role === "error") return h("article", { className: "message error", role: "alert" }, h("p", { textContent: message.content }), actions(message, index));
  const mine = message.role === "user";
  const body = h("div", { className: "body" });
  if (mine) body.textContent = message.content;
  else body.append(render(message.content));
  return h("article", { className: `message ${message.role}`, "aria-label": mine ? "You" : "Reply" }, body,
    message.note ? h("p", { className: "muted note", textContent: message.note }) : null,
    message.detours?.length ? h("ul", { className: "detours" }, message.detours.map((text) => h("li", { className: "detour", textContent: text }))) : null,
    actions(message, index));
}

function actions(message, index) {
  const last = index === chat.messages.length - 1;
  const button = (textContent, onclick) => h("button", { type: "button", className: "small", textContent, onclick });
  return h("div", { className: "actions" },
    message.role !== "error" ? copyButton(() => message.content) : null,
    message.role === "user" ? button("Edit", () => edit(index)) : null,
    last && message.role !== "user" ? button(message.role === "error" ? "Try again" : "Regenerate", regenerate) : null,
    message.trace?.length ? button("Token times", () => showTrace(message.trace)) : null);
}

function open(other) {
  chat = other;
  drawChats();
  drawMessages();
  ready();
}

function remove(other) {
  if (replying?.chat === other) stop();
  store.remove(other);
  open(other === chat ? store.chats[0] ?? store.create() : chat);
}

// asking

function send(text) {
  if (!text.trim() || replying) return false;
  if (!chat.messages.length) chat.title = text.trim().split("\n")[0].slice(0, 60);
  chat.messages = chat.messages.filter(({ role }) => role !== "error");
  chat.messages.push({ role: "user", content: text });
  reply();
  return true;
}

function regenerate() {
  if (replying) return;
  while (chat.messages.length && chat.messages.at(-1).role !== "user") chat.messages.pop();
  if (chat.messages.length) reply();
}

function edit(index) {
  if (replying) return;
  const article = log.children[index];
  const field = h("textarea", { value: chat.messages[index].content, rows: 4, "aria-label": "Edit the message" });
  const resend = () => {
    if (!field.value.trim()) return;
    chat.messages.length = index;
    send(field.value);
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); resend(); }
    if (event.key === "Escape") { event.stopPropagation(); drawMessages(); composer.focus(); }
  });
  article.replaceChildren(h("div", { className: "editing" }, field, h("div", { className: "actions" },
    h("button", { type: "button", className: "small primary", textContent: "Send again", onclick: resend }),
    h("button", { type: "button", className: "small", textContent: "Cancel", onclick: drawMessages }))));
  field.focus();
}

function body() {
  const given = store.settings.get();
  const messages = chat.messages.filter(({ role }) => role !== "error").map(({ role, content }) => ({ role, content }));
  if (given.system) messages.unshift({ role: "system", content: given.system });
  const options = Object.fromEntries(["temperature", "top_p", "top_k", "max_tokens", "seed"].filter((name) => given[name] != null).map((name) => [name, given[name]]));
  return { model: $("model").value, messages, stream: true, swarm_trace: true, ...options };
}

async function reply() {
  const abort = new AbortController(), route = new Route();
  const content = h("div", { className: "body" });
  const element = h("article", { className: "message assistant", "aria-label": "Reply", "aria-busy": "true" }, content, route.element);
  const mine = replying = { chat, abort, element };
  const request = body();
  store.save();
  drawChats();
  drawMessages();
  busy(true);
  let text = "", finish = null, error = null, frame = 0;
  const paint = () => {
    frame = 0;
    const follow = atEnd();
    content.replaceChildren(render(text));
    route.draw();
    if (follow) toEnd();
  };
  try {
    const response = await ask("v1/chat/completions", { body: request, signal: abort.signal });
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.swarm) route.take(chunk.swarm);
      const choice = chunk.choices?.[0];
      text += choice?.delta?.content ?? "";
      finish = choice?.finish_reason ?? finish;
      frame ||= requestAnimationFrame(paint);
    }
  } catch (caught) {
    if (caught.name === "AbortError") finish = "stopped";
    else error = caught;
  }
  cancelAnimationFrame(frame);
  route.draw();
  if (text || !error) {
    const detours = [...route.element.querySelectorAll(".detour")].map((each) => each.textContent);
    mine.chat.messages.push({ role: "assistant", content: text, note: note(route, finish), detours, trace: route.tokens });
  }
  if (error) mine.chat.messages.push({ role: "error", content: error.message || String(error) });
  if (!store.save()) mine.chat.messages.push({ role: "error", content: "The browser has no room left for conversations: delete old ones." });
  replying = null;
  busy(false);
  if (mine.chat === chat) drawMessages();
  if (document.activeElement === document.body) ready();
  $("status").textContent = error ? "The reply failed." : `The reply is there: ${route.tokens.length} tokens.`;
  if (error?.status === 401) openSettings($("key"));
}

function note(route, finish) {
  const why = { length: "as long as was asked for", stopped: "stopped" }[finish];
  const way = route.hops.map((hop) => `${hop.start}:${hop.end} ${hop.name || `…${hop.peer.slice(-6)}`}`).join(" → ");
  return [route.speed && `${route.speed.toFixed(1)} tokens/s`, `${route.tokens.length} tokens`, way, why].filter(Boolean).join(" · ");
}

function stop() { replying?.abort.abort(); }

function busy(on) {
  $("stop").hidden = !on;
  $("send").hidden = on;
  if (on) $("status").textContent = "The reply is coming.";
}

// settings, models, menus

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

function openSettings(focus) {
  const given = store.settings.get();
  $("system").value = given.system ?? "";
  for (const name of NUMBERS) $(name).value = given[name] ?? "";
  $("key").value = apiKey.get();
  $("settings").showModal();
  focus?.focus();
}

$("settings").addEventListener("close", () => {
  const numbers = NUMBERS.filter((name) => $(name).value !== "" && $(name).checkValidity()).map((name) => [name, Number($(name).value)]);
  store.settings.set({ system: $("system").value, ...Object.fromEntries(numbers) });
  const before = apiKey.get();
  apiKey.set($("key").value.trim());
  if (apiKey.get() !== before || !$("model").options.length) loadModels();
  composer.focus();
});

async function loadModels() {
  try {
    const { data } = await (await ask("v1/models")).json();
    $("model").replaceChildren(...data.map(({ id }) => h("option", { value: id, textContent: id })));
    if (data.some(({ id }) => id === store.model.get())) $("model").value = store.model.get();
    if (log.querySelector(".no-models")) drawMessages();
  } catch (error) {
    if (error.status === 401) openSettings($("key"));
    log.replaceChildren(h("article", { className: "message error no-models", role: "alert" }, h("p", { textContent: error.message }),
      h("div", { className: "actions" }, h("button", { type: "button", className: "small", textContent: "Try again", onclick: () => { drawMessages(); loadModels(); } }))));
  }
}

function closeMenu() {
  document.body.classList.remove("menu");
  $("menu").setAttribute("aria-expanded", "false");
}

$("menu").addEventListener("click", () => {
  $("menu").setAttribute("aria-expanded", String(document.body.classList.toggle("menu")));
});
$("model").addEventListener("change", () => store.model.set($("model").value));
$("new").addEventListener("click", () => { open(store.create()); closeMenu(); });
$("stop").addEventListener("click", stop);
$("settings-open").addEventListener("click", () => openSettings());
$("shortcuts-open").addEventListener("click", () => $("shortcuts").showModal());

// keys

function grow() {
  composer.rows = Math.min(10, composer.value.split("\n").length);
}

function submit() {
  if (!send(composer.value)) return;
  composer.value = "";
  grow();
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
composer.addEventListener("input", grow);
composer.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  const lastMine = chat.messages.findLastIndex(({ role }) => role === "user");
  const alt = { KeyR: regenerate, KeyE: () => lastMine >= 0 && edit(lastMine), KeyN: () => open(store.create()), KeyS: () => openSettings() };
  let act = null;
  if (event.key === "Escape") act = document.body.classList.contains("menu") ? closeMenu : replying && stop;
  else if (event.altKey && !event.ctrlKey && !event.metaKey) act = alt[event.code];
  else if (!typing && !event.ctrlKey && !event.metaKey) act = { "/": () => composer.focus(), "?": () => $("shortcuts").showModal() }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

open(chat);
loadModels();
