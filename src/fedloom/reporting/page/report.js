"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // The scheme follows the system until the button is pressed.
  const scheme = document.getElementById("scheme");
  scheme?.addEventListener("click", () => {
    const root = document.documentElement;
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    root.dataset.scheme = (root.dataset.scheme ?? system) === "dark" ? "light" : "dark";
  });

  // The key hides and shows a method in every chart.
  const hidden = new Set();
  for (const button of all("[data-key]")) {
    button.addEventListener("click", () => {
      const label = button.dataset.key;
      hidden.has(label) ? hidden.delete(label) : hidden.add(label);
      button.setAttribute("aria-pressed", String(!hidden.has(label)));
      for (const series of all(".series")) series.classList.toggle("off", hidden.has(series.dataset.series));
    });
  }

  // Lists show one of their panels: the one that bears the chosen names.
  for (const choice of all(".choice")) {
    const panels = all(":scope > .panel", choice);
    const selects = all(":scope > .choose select", choice);
    const show = () => {
      const names = selects.map((select) => select.value);
      const score = (panel) => JSON.parse(panel.dataset.names).filter((name, i) => name === names[i]).length;
      const best = panels.reduce((one, other) => (score(other) > score(one) ? other : one));
      for (const panel of panels) panel.hidden = panel !== best;
    };
    for (const select of selects) select.addEventListener("change", show);
    show();
  }

  // Hovering, or the arrow keys, reads every curve at the nearest x.
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);

  const reader = (svg) => {
    const series = JSON.parse(svg.dataset.points);
    const stops = [...new Set(series.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
    const crosshair = svg.querySelector(".crosshair");
    let index = -1;

    const nearest = (x) => stops.reduce((best, stop, i) => (Math.abs(stop - x) < Math.abs(stops[best] - x) ? i : best), 0);

    const read = (at) => {
      index = at;
      const found = [];
      for (const one of series) {
        if (hidden.has(one.label)) continue;
        const point = one.points.find((candidate) => Math.abs(candidate[0] - stops[index]) < 0.6);
        if (point) found.push([one, point]);
      }
      if (!found.length) return;
      found.sort((a, b) => a[1][1] - b[1][1]);
      crosshair.setAttribute("x1", stops[index]);
      crosshair.setAttribute("x2", stops[index]);
      crosshair.style.visibility = "visible";
      tip.replaceChildren(line(null, found[0][0].x, found[0][1][2]), ...found.map(([one, p]) => line(one.colour, one.label, p[3])));
      tip.hidden = false;
      place(svg, stops[index], found[0][1][1]);
    };

    const away = () => { tip.hidden = true; crosshair.style.visibility = "hidden"; };

    svg.addEventListener("pointermove", (event) => {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      read(nearest(point.x));
    });
    svg.addEventListener("pointerleave", away);
    svg.addEventListener("blur", away);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") away();
      if (!step) return;
      event.preventDefault();
      read(Math.min(Math.max(index + step, 0), stops.length - 1));
    });
  };

  const line = (colour, label, text) => {
    const row = document.createElement("div");
    if (colour !== null) {
      const swatch = document.createElement("span");
      swatch.className = `swatch s${colour}`;
      row.append(swatch);
    }
    const value = document.createElement("b");
    value.textContent = text;
    row.append(label, value);
    return row;
  };

  const place = (svg, x, y) => {
    const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
    const box = tip.getBoundingClientRect();
    const left = at.x + 14 + box.width > innerWidth ? at.x - 14 - box.width : at.x + 14;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.min(Math.max(4, at.y - box.height / 2), innerHeight - box.height - 4)}px`;
  };

  for (const svg of all("svg[data-points]")) reader(svg);
  document.documentElement.dataset.ready = "yes";
})();
