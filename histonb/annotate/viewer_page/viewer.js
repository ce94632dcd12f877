// A slide with its annotation, in a page that is opened from a folder: nothing is fetched, data come as scripts.
//   slides.js               calls histonb.start([{name, folder, fault}, ...])
//   FOLDER/slide.js         calls histonb.show({...})
//   FOLDER/objects/CELL.js  calls histonb.addCell("CELL", {...}): the objects of one square of the slide
// Lengths are in pixels of the slide's level 0 where nothing else is said.
"use strict";

const histonb = (() => {
  const OUTLINES = 0.8; // µm per pixel of the screen from which outlines of nuclei are dots
  const THICK = 0.4; // µm per pixel of the screen up to which outlines are thick
  const HALF = 0.5; // unit of the coordinates of outlines, pixels
  const DOT_UM = 4; // side of a dot
  const at = (id) => document.getElementById(id);
  const state = { slide: null, base: "", viewer: null, canvas: null, selected: null, frames: [] };

  // ---- faults: said in the page

  function fail(text) {
    at("fault").textContent = text;
    at("fault").hidden = false;
  }

  function isMissing(what) {
    fail(`${what} is missing or damaged: copy the whole folder again, or make it again with histonb view.`);
  }

  function loadScript(path) {
    const script = document.createElement("script");
    script.src = path;
    script.onerror = () => isMissing(decodeURIComponent(path));
    document.head.append(script);
  }

  // ---- which slide

  function start(slides) {
    const wanted = decodeURIComponent(location.hash.slice(1));
    const chosen = slides.find((s) => s.name === wanted) || slides[0];
    at("choose").replaceChildren(...slides.map((s) => new Option(s.name, s.name, false, s === chosen)));
    at("choose").hidden = slides.length < 2;
    at("choose").onchange = () => (location.hash = encodeURIComponent(at("choose").value));
    addEventListener("hashchange", () => location.reload());
    at("title").textContent = document.title = chosen.name;
    at("panel").open = innerWidth > 700;
    if (chosen.fault) return fail(chosen.fault);
    state.base = chosen.folder.split("/").map(encodeURIComponent).join("/");
    loadScript(`${state.base}/slide.js`);
  }

  function show(slide) {
    state.slide = slide;
    slide.classes.forEach((c) => (c.on = true));
    slide.cells.forEach((cell) => (cell.state = "absent"));
    slide.maps.forEach(loadMap);
    openViewer(slide);
    fillPanel(slide);
    at("close").onclick = () => select(null);
  }

  function loadMap(map) {
    map.image = new Image();
    map.image.onload = redraw;
    map.image.onerror = () => isMissing(map.file);
    map.image.src = `${state.base}/${map.file}`;
  }

  // ---- the slide: OpenSeadragon draws the tiles, a canvas above them the objects

  function openViewer(slide) {
    const tiles = slide.tiles;
    const viewer = OpenSeadragon({
      element: at("slide"),
      drawer: "canvas", // WebGL may not read pictures from the file system
      tileSources: {
        width: tiles.width,
        height: tiles.height,
        tileSize: tiles.side,
        minLevel: 0,
        maxLevel: tiles.levels - 1,
        getTileUrl: (level, column, row) => `${state.base}/tiles/${level}/${row}_${column}.jpg`,
      },
      showNavigationControl: false,
      showNavigator: innerWidth > 700,
      navigatorPosition: "BOTTOM_RIGHT",
      navigatorSizeRatio: 0.15,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { clickToZoom: false },
      gestureSettingsPen: { clickToZoom: false },
      animationTime: 0.6,
      maxZoomPixelRatio: 6,
      minZoomImageRatio: 0.7,
      visibilityRatio: 0.3,
    });
    state.viewer = viewer;
    state.canvas = document.createElement("canvas");
    state.canvas.id = "overlay";
    viewer.canvas.append(state.canvas);
    viewer.addHandler("update-viewport", draw);
    viewer.addHandler("open", draw);
    viewer.addHandler("tile-load-failed", (event) => isMissing(decodeURIComponent(event.tile.getUrl())));
    viewer.addHandler("canvas-click", (event) => event.quick && select(objectAt(event.position)));
    viewer.addHandler("canvas-key", (event) => {
      if ("rRfF".includes(event.originalEvent.key)) event.preventDefaultAction = true; // no turning, no mirror
    });
    at("zoom-in").onclick = () => viewer.viewport.zoomBy(2);
    at("zoom-out").onclick = () => viewer.viewport.zoomBy(0.5);
    at("whole").onclick = () => viewer.viewport.goHome();
  }

  // What the screen shows: `scale` pixels of the screen for a pixel of the slide, whose corner is at x, y.
  function currentView() {
    const viewport = state.viewer.viewport;
    const origin = viewport.pixelFromPoint(new OpenSeadragon.Point(0, 0), true);
    const size = viewport.getContainerSize();
    const scale = (viewport.getZoom(true) * size.x) / state.slide.width;
    const left = -origin.x / scale;
    const top = -origin.y / scale;
    return {
      scale,
      um: state.slide.mpp / scale, // µm per pixel of the screen
      ratio: devicePixelRatio || 1,
      size,
      x: origin.x,
      y: origin.y,
      left,
      top,
      right: left + size.x / scale,
      bottom: top + size.y / scale,
    };
  }

  function touches(box, view) {
    return box.left < view.right && box.right > view.left && box.top < view.bottom && box.bottom > view.top;
  }

  // ---- drawing

  let waiting = false;
  function redraw() {
    if (waiting || !state.viewer) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      if (state.viewer.world.getItemCount()) draw();
    });
  }

  function draw() {
    const began = performance.now();
    const view = currentView();
    const context = clearCanvas(view);
    for (const map of state.slide.maps) if (map.on && isShown(map, view)) drawMap(context, map);
    for (const cell of state.slide.cells) if (isDrawn(cell, view)) drawCell(context, cell, view);
    if (state.selected) drawSelected(context, view);
    drawScale(view);
    state.frames.push(performance.now() - began);
    if (state.frames.length > 1000) state.frames.shift();
  }

  function clearCanvas(view) {
    const width = Math.round(view.size.x * view.ratio);
    const height = Math.round(view.size.y * view.ratio);
    const context = state.canvas.getContext("2d");
    if (state.canvas.width !== width) state.canvas.width = width;
    if (state.canvas.height !== height) state.canvas.height = height;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    const scale = view.scale * view.ratio;
    context.setTransform(scale, 0, 0, scale, view.x * view.ratio, view.y * view.ratio);
    return context;
  }

  // A nucleus is a speck on a small picture of a slide: there its density map is shown in its place.
  const areSpecks = (view) => view.um > state.slide.speck_um;
  const isShown = (map, view) => !map.for_specks || areSpecks(view);

  function drawMap(context, map) {
    const { image, side } = map;
    if (!image.complete || !image.naturalWidth) return;
    context.save();
    context.beginPath();
    context.rect(0, 0, state.slide.width, state.slide.height);
    context.clip();
    context.imageSmoothingEnabled = !map.classes;
    context.drawImage(image, 0, 0, image.naturalWidth * side, image.naturalHeight * side);
    context.restore();
  }

  function isDrawn(cell, view) {
    if (!touches(cell, view) || (cell.task === "nucleus" && areSpecks(view))) return false;
    return cell.classes.some((i) => state.slide.classes[i].on);
  }

  function drawCell(context, cell, view) {
    if (cell.state === "absent") loadCell(cell);
    if (cell.state !== "loaded") return;
    for (const i of cell.classes) {
      const { color, on } = state.slide.classes[i];
      if (!on) continue;
      context.fillStyle = context.strokeStyle = color;
      if (cell.task === "nucleus" && view.um > OUTLINES) drawDots(context, cell.centres[i]);
      else strokeClass(context, cell, i, view);
    }
  }

  function drawDots(context, centres) {
    const side = DOT_UM / state.slide.mpp;
    for (let k = 0; k < centres.length; k += 2) context.fillRect(centres[k] - side / 2, centres[k + 1] - side / 2, side, side);
  }

  // Lines of one pixel are drawn ten times faster than thick ones: these are for the few objects that are seen from near.
  function strokeClass(context, cell, i, view) {
    const isNear = view.um < THICK;
    const path = isNear ? pathInView(cell, i, view) : pathOfClass(cell, i, view);
    const pixel = 1 / view.ratio / view.scale;
    context.lineWidth = isNear ? 2 / view.scale : pixel;
    context.stroke(path);
    if (isNear || cell.task === "nucleus") return;
    context.translate(pixel, pixel); // two thin lines, one beside the other
    context.stroke(path);
    context.translate(-pixel, -pixel);
  }

  function pathInView(cell, i, view) {
    const path = new Path2D();
    cell.objects.outlines.forEach((outline, k) => {
      if (cell.objects.classes[k] === i && touches(cell.objects.boxes[k], view)) tracePath(path, outline, 0);
    });
    return path;
  }

  // Points that fall on the same pixel of the screen are left out: a path is kept for each doubling of the scale.
  function pathOfClass(cell, i, view) {
    const level = Math.max(0, Math.floor(Math.log2(1 / view.scale)));
    const kept = cell.paths[i];
    if (!kept[level]) {
      kept[level] = new Path2D();
      cell.objects.outlines.forEach((outline, k) => {
        if (cell.objects.classes[k] === i) tracePath(kept[level], outline, level && 2 ** level);
      });
    }
    return kept[level];
  }

  function drawSelected(context, view) {
    const path = new Path2D();
    tracePath(path, state.selected.outline, 0);
    context.strokeStyle = "#fff";
    context.lineWidth = 5 / view.scale;
    context.stroke(path);
    context.strokeStyle = "#000";
    context.lineWidth = 2 / view.scale;
    context.stroke(path);
  }

  function drawScale(view) {
    const most = Math.min(160, view.size.x / 4) * view.um;
    const unit = 10 ** Math.floor(Math.log10(most));
    const length = unit * [5, 2, 1].find((k) => k * unit <= most);
    at("scale-text").textContent = length < 1000 ? `${+length.toPrecision(1)} µm` : `${length / 1000} mm`;
    at("scale-bar").style.width = `${length / view.um}px`;
  }

  // ---- objects: a cell holds those of a square of the slide, and is loaded when it is first in view

  function loadCell(cell) {
    cell.state = "loading";
    loadScript(`${state.base}/objects/${cell.name}.js`);
  }

  function addCell(name, objects) {
    const cell = state.slide.cells.find((c) => c.name === name);
    objects.outlines = objects.outlines.map((outline) => outline.map(placesOf));
    objects.boxes = objects.outlines.map((outline) => boundsOf(outline[0]));
    cell.objects = objects;
    cell.paths = Object.fromEntries(cell.classes.map((i) => [i, []]));
    cell.centres = Object.fromEntries(cell.classes.map((i) => [i, []]));
    objects.boxes.forEach((box, k) => {
      cell.centres[objects.classes[k]].push((box.left + box.right) / 2, (box.top + box.bottom) / 2);
    });
    cell.state = "loaded";
    redraw();
  }

  // A ring comes as x, y of its first point and the steps to the others, in half pixels; here as x, y of every point.
  function placesOf(steps) {
    const places = new Float32Array(steps.length);
    for (let k = 0; k < steps.length; k++) places[k] = steps[k] * HALF + (k > 1 ? places[k - 2] : 0);
    return places;
  }

  // Add an outline to a path; points nearer than `least` to the one before are left out.
  function tracePath(path, outline, least) {
    for (const ring of outline) {
      let [x, y] = ring;
      path.moveTo(x, y);
      for (let k = 2; k < ring.length; k += 2) {
        if (Math.abs(ring[k] - x) + Math.abs(ring[k + 1] - y) < least) continue;
        x = ring[k];
        y = ring[k + 1];
        path.lineTo(x, y);
      }
      path.closePath();
    }
  }

  function boundsOf(ring) {
    const box = { left: Infinity, top: Infinity, right: -Infinity, bottom: -Infinity };
    for (let k = 0; k < ring.length; k += 2) {
      box.left = Math.min(box.left, ring[k]);
      box.right = Math.max(box.right, ring[k]);
      box.top = Math.min(box.top, ring[k + 1]);
      box.bottom = Math.max(box.bottom, ring[k + 1]);
    }
    return box;
  }

  // ---- a click: the smallest object there

  function objectAt(position) {
    const view = currentView();
    const x = view.left + position.x / view.scale;
    const y = view.top + position.y / view.scale;
    const point = { left: x, top: y, right: x, bottom: y };
    const found = [];
    for (const cell of state.slide.cells) {
      if (cell.state === "loaded" && isDrawn(cell, view) && touches(cell, point)) found.push(...objectsOfCell(cell, x, y));
    }
    return found.sort((a, b) => a.area - b.area)[0] || null;
  }

  function* objectsOfCell(cell, x, y) {
    const { outlines, boxes, classes, rows } = cell.objects;
    for (let k = 0; k < outlines.length; k++) {
      const box = boxes[k];
      if (x < box.left || x > box.right || y < box.top || y > box.bottom) continue;
      if (!state.slide.classes[classes[k]].on || !isInside(outlines[k], x, y)) continue;
      yield { outline: outlines[k], class: classes[k], row: rowOf(rows, k), area: areaOf(box) };
    }
  }

  const areaOf = (box) => (box.right - box.left) * (box.bottom - box.top);
  const rowOf = (rows, k) => Object.entries(rows).map(([name, values]) => [name, values[k]]);

  // A point is inside where a ray to its right crosses the rings an odd number of times.
  function isInside(outline, x, y) {
    let inside = false;
    for (const ring of outline) {
      let [x0, y0] = ring.slice(-2);
      for (let k = 0; k < ring.length; k += 2) {
        const [x1, y1] = [ring[k], ring[k + 1]];
        if (y0 > y !== y1 > y && x < x0 + ((y - y0) * (x1 - x0)) / (y1 - y0)) inside = !inside;
        [x0, y0] = [x1, y1];
      }
    }
    return inside;
  }

  function select(object) {
    state.selected = object;
    at("card").hidden = !object;
    if (object) {
      at("card-title").textContent = state.slide.classes[object.class].name;
      at("card-rows").replaceChildren(...object.row.filter(([, value]) => value !== null).map(cardRow));
    }
    redraw();
  }

  function cardRow([name, value]) {
    const row = document.createElement("tr");
    row.insertCell().textContent = name;
    row.insertCell().textContent = typeof value === "number" ? value.toLocaleString("en") : value;
    return row;
  }

  // ---- panel: a switch for every layer, which is the legend too

  function element(tag, className, text = "") {
    const made = document.createElement(tag);
    made.className = className;
    made.textContent = text;
    return made;
  }

  function swatch(color, filled) {
    const made = element("span", "swatch");
    made.style.borderColor = color;
    if (filled) made.style.background = color;
    return made;
  }

  function addSwitch(group, layer, ...before) {
    const label = element("label", "");
    const box = element("input", "");
    box.type = "checkbox";
    box.checked = layer.on;
    box.onchange = () => {
      layer.on = box.checked;
      redraw();
    };
    label.append(box, ...before, element("span", "", layer.name));
    if (layer.count !== undefined) label.append(element("span", "count", layer.count.toLocaleString("en")));
    group.append(label);
  }

  function addGroup(title) {
    const group = element("fieldset", "");
    group.append(element("legend", "", title));
    at("layers").append(group);
    return group;
  }

  function fillPanel(slide) {
    const objects = slide.classes.length && addGroup("Objects");
    for (const layer of slide.classes) addSwitch(objects, layer, swatch(layer.color));
    const maps = slide.maps.length && addGroup("Maps");
    for (const map of slide.maps) {
      addSwitch(maps, map);
      maps.append(...(map.classes ? map.classes.map(keyOfClass) : keyOfRamp(map)));
    }
    at("notes").replaceChildren(...slide.notes.map((note) => element("p", "", note)));
  }

  function keyOfClass({ name, color }) {
    const key = element("div", "key");
    key.append(swatch(color, true), element("span", "", name));
    return key;
  }

  function keyOfRamp(map) {
    const ramp = element("div", "ramp");
    ramp.style.background = `linear-gradient(to right, ${map.colors.join(", ")})`;
    const ends = element("div", "ends");
    ends.append(element("span", "", map.low), element("span", "", map.high));
    return [ramp, ends];
  }

  return { start, show, addCell, fail, state };
})();
