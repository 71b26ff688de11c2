// Runs before the page is drawn, so that a chosen theme doesn't flash. Without a choice the system's is used (app.css).
(() => {
  const root = document.documentElement;
  const stored = () => { try { return localStorage.getItem("swarm.theme"); } catch { return null; } };
  const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  if (stored()) root.dataset.theme = stored();
  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const name = () => button.setAttribute("aria-label", dark() ? "Use the light theme" : "Use the dark theme");
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      try { localStorage.setItem("swarm.theme", root.dataset.theme); } catch { /* private mode: for this page only */ }
      name();
      dispatchEvent(new Event("themechange"));
    });
    name();
  });
})();
