"use strict";
// The maps of a run: what each layer kept of a window, and which tiles its attention computed.
(() => {
  const root = document.getElementById("map-view");
  if (!root || !lemo.data.maps.length) return;
  root.hidden = false;
  const get = (id) => document.getElementById(id);
  const stepSelect = get("map-step"), docSelect = get("map-document"), partSelect = get("map-part");
  const layerSelect = get("tile-layer"), canvas = get("kept-map"), tiles = get("tile-map");
  const panel = get("block-title"), text = get("block-text"), tilePanel = get("tile-title"), tileBox = get("tile-view");
  let snapshot, doc, masks, cursor = { layer: 0, block: 0 }, cell, tileCell;

  const isKept = (mask, block) => (mask[block >> 3] >> (block & 7)) & 1;

  function chooseStep() {
    snapshot = lemo.data.maps[Number(stepSelect.value)];
    masks = snapshot.maps.map(lemo.bytes);
    lemo.options(docSelect, snapshot.documents.map((d) => d.label));
    partSelect.parentElement.hidden = !snapshot.mlp;
    chooseDocument();
  }

  function chooseDocument() {
    doc = snapshot.documents[Number(docSelect.value)];
    const drawn = (snapshot.tiles || []).find((t) => t.document === Number(docSelect.value));
    tileBox.hidden = !drawn;
    if (drawn) lemo.options(layerSelect, drawn.layers.map((t, i) => "layer " + snapshot.layers[i] + (t ? "" : " (every pair)")));
    cursor = { layer: 0, block: 0 };
    draw();
    show();
    drawTiles();
  }

  const listOf = (row) => masks[(partSelect.value === "mlp" && snapshot.mlp ? snapshot.mlp : snapshot.attention)[row]];

  function draw() {
    const width = Math.max(200, root.clientWidth - 2), rows = snapshot.layers.length;
    cell = Math.max(doc.blocks > 8000 ? 1 : 3, Math.min(26, width / doc.blocks));
    const high = Math.max(4, Math.min(18, 480 / rows));
    canvas.width = Math.ceil(cell * doc.blocks);
    canvas.height = Math.ceil(high * rows);
    const context = canvas.getContext("2d");
    const kept = lemo.color("kept"), gone = lemo.color("gone");
    const gap = cell > 5 && high > 5 ? 1 : 0;
    for (let row = 0; row < rows; row++) {
      const mask = listOf(row);
      for (let b = 0; b < doc.blocks; b++) {
        context.fillStyle = isKept(mask, doc.first + b) ? kept : gone;
        context.fillRect(b * cell, row * high, Math.max(1, cell - gap), high - gap);
      }
    }
    context.strokeStyle = lemo.color("focus");
    context.lineWidth = 2;
    context.strokeRect(cursor.block * cell, cursor.layer * high, Math.max(2, cell), high);
  }

  function show() {
    const block = doc.first + cursor.block, rows = snapshot.layers.length;
    let layers = 0;
    for (let row = 0; row < rows; row++) layers += isKept(listOf(row), block);
    const start = doc.start + cursor.block * snapshot.block_size;
    const stop = Math.min(start + snapshot.block_size, doc.start + doc.length);
    panel.textContent = "Layer " + snapshot.layers[cursor.layer] + ", block " + cursor.block + " (tokens " + start + " to " +
      (stop - 1) + " of the document): " + (isKept(listOf(cursor.layer), block) ? "kept" : "left out") +
      "; kept in " + layers + " of " + rows + " layers.";
    text.textContent = snapshot.texts ? snapshot.texts[block] : snapshot.no_text;
  }

  function move(layer, block) {
    cursor.layer = Math.max(0, Math.min(snapshot.layers.length - 1, layer));
    cursor.block = Math.max(0, Math.min(doc.blocks - 1, block));
    draw();
    show();
  }

  function place(target, event, columns, rows) {
    const box = target.getBoundingClientRect();
    return {
      column: Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * columns))),
      row: Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * rows))),
    };
  }

  function atPointer(event) {
    const at = place(canvas, event, doc.blocks, snapshot.layers.length);
    move(at.row, at.column);
  }

  function drawTiles() {
    const drawn = (snapshot.tiles || []).find((t) => t.document === Number(docSelect.value));
    if (!drawn) return;
    const values = drawn.layers[Number(layerSelect.value)];
    const shares = values === null ? null : lemo.bytes(values), n = drawn.cells;
    tileCell = Math.max(1, Math.floor(Math.min(480, root.clientWidth - 2) / n));
    tiles.width = tiles.height = tileCell * n;
    const context = tiles.getContext("2d");
    context.fillStyle = lemo.color("gone");
    context.fillRect(0, 0, tiles.width, tiles.height);
    context.fillStyle = lemo.color("kept");
    for (let q = 0; q < n; q++) {
      for (let k = 0; k <= q; k++) {
        context.globalAlpha = shares === null ? 1 : shares[q * n + k] / 255;
        if (context.globalAlpha > 0) context.fillRect(k * tileCell, q * tileCell, tileCell, tileCell);
      }
    }
    context.globalAlpha = 1;
    tilePanel.textContent = "Rows are queries, columns earlier keys" + (drawn.size > n ?
      "; " + drawn.size + " tiles are drawn as " + n + " cells, each by the share of its pairs." : ". Point at a cell.");
  }

  function atTile(event) {
    const drawn = snapshot.tiles.find((t) => t.document === Number(docSelect.value));
    const n = drawn.cells, at = place(tiles, event, n, n), values = drawn.layers[Number(layerSelect.value)];
    const share = at.column > at.row ? 0 : values === null ? 1 : lemo.bytes(values)[at.row * n + at.column] / 255;
    const range = (i) => {
      const a = Math.floor(i * drawn.size / n), b = Math.floor((i + 1) * drawn.size / n) - 1;
      return a === b ? "tile " + a : "tiles " + a + " to " + b;
    };
    tilePanel.textContent = "Queries of " + range(at.row) + ", keys of " + range(at.column) + ": " +
      (at.column > at.row ? "in the future, never computed." : (100 * share).toFixed(0) + " % of the pairs computed.");
  }

  lemo.options(stepSelect, lemo.data.maps.map((m) => m.label));
  stepSelect.addEventListener("change", chooseStep);
  docSelect.addEventListener("change", chooseDocument);
  partSelect.addEventListener("change", () => { draw(); show(); });
  layerSelect.addEventListener("change", drawTiles);
  canvas.addEventListener("click", atPointer);
  canvas.addEventListener("pointermove", atPointer);
  tiles.addEventListener("click", atTile);
  tiles.addEventListener("pointermove", atTile);
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!by) return;
    event.preventDefault();
    move(cursor.layer + by[0], cursor.block + by[1]);
  });
  window.addEventListener("resize", () => { draw(); drawTiles(); });
  lemo.onColors(() => { draw(); drawTiles(); });
  chooseStep();
})();
