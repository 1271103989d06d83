"use strict";
// What the scripts of a page share.
const lemo = {
  data: JSON.parse(document.getElementById("data").textContent),
  color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  },
  bytes(base64) {
    const text = atob(base64), out = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
    return out;
  },
  options(select, labels) {
    select.textContent = "";
    labels.forEach((label, i) => {
      const option = document.createElement("option");
      option.value = String(i);
      option.textContent = label;
      select.appendChild(option);
    });
  },
  onColors(redraw) {
    if (window.matchMedia) {
      const dark = window.matchMedia("(prefers-color-scheme: dark)");
      if (dark.addEventListener) dark.addEventListener("change", redraw);
    }
  },
};
