// The page without a server: theme, filters, links that open what they name, enlarged figures, print.
"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const THEME = "lindm-theme";
  root.classList.add("script");
  try {
    const chosen = localStorage.getItem(THEME);
    if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  } catch { /* a page of a file may have no storage */ }

  const isDark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";

  function startTheme() {
    const button = document.getElementById("theme");
    const show = () => button.setAttribute("aria-pressed", String(isDark()));
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      try { localStorage.setItem(THEME, root.dataset.theme); } catch { /* as above */ }
      show();
    });
    system.addEventListener("change", show);
    show();
  }

  // Returns the function that shows all claims.
  function startFilters() {
    const [search, verdict, group, count] = ["search", "verdict", "group", "count"].map((id) => document.getElementById(id));
    if (!search) return () => {};
    const nothing = document.getElementById("nothing");
    const tiles = [...document.querySelectorAll(".tile")];
    const plain = (text) => text.toLowerCase().replace(/\s+/g, " ");
    const groups = [...document.querySelectorAll(".group")].map((element) => ({
      element,
      claims: [...element.querySelectorAll(".claim")].map((claim) => ({
        element: claim,
        text: plain([element.querySelector("h2"), ...claim.querySelectorAll(".verdict, h3, .statement, .num, dd")]
          .map((part) => part.textContent).join(" ")),
      })),
    }));
    const total = groups.reduce((sum, { claims }) => sum + claims.length, 0);

    function apply() {
      const words = plain(search.value).trim().split(" ").filter(Boolean);
      const [field, value] = verdict.value.split(":");
      let shown = 0;
      for (const { element, claims } of groups) {
        let inside = 0;
        for (const claim of claims) {
          const fits = (!field || claim.element.dataset[field] === value) &&
            (!group.value || group.value === element.id) && words.every((word) => claim.text.includes(word));
          claim.element.hidden = !fits;
          inside += fits;
        }
        element.hidden = inside === 0;
        shown += inside;
      }
      count.textContent = `${shown} of ${total} claims`;
      nothing.hidden = shown > 0;
      for (const tile of tiles) tile.setAttribute("aria-pressed", String(tile.dataset.show === verdict.value));
    }

    function reset() {
      search.value = verdict.value = group.value = "";
      apply();
    }
    search.form.addEventListener("submit", (event) => event.preventDefault());
    search.addEventListener("input", apply);
    for (const choice of [verdict, group]) choice.addEventListener("change", apply);
    for (const tile of tiles) {
      tile.addEventListener("click", () => {
        verdict.value = verdict.value === tile.dataset.show ? "" : tile.dataset.show;
        apply();
      });
    }
    document.getElementById("reset").addEventListener("click", () => { reset(); search.focus(); });
    apply(); // a browser may have kept what was typed
    return reset;
  }

  // Show what the address names, although it is folded or filtered away.
  function reveal(reset) {
    let id = location.hash.slice(1);
    try { id = decodeURIComponent(id); } catch { /* as it is */ }
    const target = id && document.getElementById(id);
    if (!target) return;
    if (target.closest("[hidden]")) reset();
    for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
    if (target.classList.contains("claim")) target.querySelector("details").open = true;
    target.scrollIntoView({ behavior: "instant" });
  }

  function startFigures() {
    const dialog = document.getElementById("zoom");
    const place = document.getElementById("zoom-image");
    const size = document.getElementById("zoom-size");
    const setActual = (actual) => {
      place.classList.toggle("actual", actual);
      size.setAttribute("aria-pressed", String(actual));
    };
    const toggle = () => setActual(!place.classList.contains("actual"));
    for (const button of document.querySelectorAll("button.zoom")) {
      button.addEventListener("click", () => {
        const image = button.querySelector("img").cloneNode();
        image.addEventListener("click", toggle);
        place.replaceChildren(image);
        document.getElementById("zoom-name").textContent = button.dataset.name;
        setActual(false);
        dialog.showModal();
      });
    }
    size.addEventListener("click", toggle);
    document.getElementById("zoom-close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  }

  function startPrint() {
    let folded = [];
    addEventListener("beforeprint", () => {
      folded = [...document.querySelectorAll("details:not([open])")];
      for (const details of folded) details.open = true;
    });
    addEventListener("afterprint", () => { for (const details of folded) details.open = false; });
  }

  document.addEventListener("DOMContentLoaded", () => {
    startTheme();
    const reset = startFilters();
    startFigures();
    startPrint();
    addEventListener("hashchange", () => reveal(reset));
    document.addEventListener("click", (event) => { // a second click on the link of the address changes nothing
      if (event.target.closest?.(`a[href="${CSS.escape(location.hash)}"]`)) reveal(reset);
    });
    reveal(reset);
  });
})();
