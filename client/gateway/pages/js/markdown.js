// A model's text to elements: marked, then DOMPurify. HTML in the text is shown as text; images become links.
import DOMPurify from "../vendor/purify.js";
import hljs from "../vendor/highlight.js";
import { Marked } from "../vendor/marked.js";
import { copyButton, h } from "./dom.js";

const LANGUAGES = ["bash", "c", "cpp", "css", "diff", "go", "java", "javascript", "json", "markdown", "python", "rust", "sql", "typescript", "xml", "yaml"];
const loaded = new Map(); // language to a promise
const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});
const purify = DOMPurify(window), painter = DOMPurify(window); // of highlight.js only the classes are wanted
const RULES = {
  ALLOWED_TAGS: "p br hr h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code em strong del a table thead tbody tr th td sup sub".split(" "),
  ALLOWED_ATTR: ["href", "title", "start", "class"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.hasAttribute("class") && !(node.tagName === "CODE" && /^language-[\w+#-]+$/.test(node.className))) node.removeAttribute("class");
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
});

/** A fragment for `text`. Code is coloured once its language is loaded. */
export function render(text) {
  const fragment = purify.sanitize(marked.parse(text), RULES);
  for (const heading of fragment.querySelectorAll("h1, h2")) heading.replaceWith(h("h3", {}, ...heading.childNodes)); // the page's own are above
  for (const code of fragment.querySelectorAll("pre > code")) dress(code);
  return fragment;
}

function dress(code) {
  const language = (code.className.match(/^language-(.+)$/) ?? [])[1] ?? "";
  const pre = code.parentElement;
  pre.tabIndex = 0; // it scrolls, so keys have to reach it
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  const source = code.textContent;
  const block = h("div", { className: "code" }, h("div", { className: "code-head" }, h("span", { textContent: language }), copyButton(() => source)));
  pre.replaceWith(block);
  block.append(pre);
  colour(code, language, source);
}

function colour(code, wanted, source) {
  const alias = { py: "python", js: "javascript", ts: "typescript", sh: "bash", shell: "bash", html: "xml", yml: "yaml", "c++": "cpp", rs: "rust", md: "markdown" };
  const language = alias[wanted] ?? wanted;
  if (!LANGUAGES.includes(language)) return;
  const paint = () => { code.replaceChildren(painter.sanitize(hljs.highlight(source, { language, ignoreIllegals: true }).value, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true })); };
  if (hljs.getLanguage(language)) { paint(); return; }
  if (!loaded.has(language)) loaded.set(language, import(`../vendor/languages/${language}.js`).then((m) => hljs.registerLanguage(language, m.default)));
  loaded.get(language).then(paint, () => {});
}
