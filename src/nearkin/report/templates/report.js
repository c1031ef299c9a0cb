// The map, the neighbour browser and the marks of a report. Plain JavaScript, checked by tsc --checkJs --strict.
"use strict";

/**
 * What the page knows; written by report/browser.py. Shares are in thousandths, -1 where not known; `kin` and `weight`
 * hold ten values for each image of `withKin`; `votes` are label, share, share without the ten nearest, and so on.
 * @typedef {{
 *   run: string, root: string, split: string, classes: string[], rawClasses: Record<string, string>,
 *   evaluated: number, attended: number, trained: number, folders: string[], folder: number[], base: string[],
 *   raw: Record<string, string>, label: number[], predicted: number[], probability: number[], own: number[],
 *   unlike: number[], suspicion: number[], other: number[], pca: number[], tsne: number[] | null, cell: number[], columns: number,
 *   withKin: number[], kin: number[], weight: number[], votes: number[][]
 * }} Data
 */

(() => {
  const FINE = 4096;
  const MOST_LISTED = 200;
  const MOST_OF_PAIR = 60;

  /** @type {Data} */
  const data = JSON.parse(element("data").textContent || "");
  const rowOf = new Map(data.withKin.map((place, row) => [place, row]));
  const narrow = window.matchMedia("(max-width: 68.99rem)");

  // ---- Small helpers ----

  /** @param {string} id @returns {HTMLElement} */
  function element(id) {
    const found = document.getElementById(id);
    if (!found) throw new Error(`no element ${id}`);
    return found;
  }

  /**
   * A new element; text is set as text, so that names cannot become markup.
   * @template {keyof HTMLElementTagNameMap} T
   * @param {T} tag @param {string} [name] @param {string | number} [text] @param {Record<string, string>} [attributes]
   * @returns {HTMLElementTagNameMap[T]}
   */
  function make(tag, name = "", text = "", attributes = {}) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== "") made.textContent = String(text);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  /** @param {number} parts @param {number} of how many */
  function percent(parts, of = 1000) {
    return `${((100 * parts) / of).toFixed(of > 1000 ? 1 : 0)} %`;
  }

  /** A probability or a share, whose rounding does not say never or always. @param {number} parts thousandths */
  function chance(parts) {
    if (parts <= 0) return "< 0.1 %";
    if (parts >= 1000) return "> 99.9 %";
    return parts < 100 || parts > 990 ? `${(parts / 10).toFixed(1)} %` : percent(parts);
  }

  /** @param {number} place */
  const isTraining = (place) => place >= data.evaluated;
  /** @param {number} place */
  const isWrong = (place) => !isTraining(place) && data.label[place] !== data.predicted[place];
  /** @param {number} place */
  const nameOf = (place) => data.folders[data.folder[place]] + data.base[place];
  /** The name as the file system has it. @param {number} place */
  const rawName = (place) => data.raw[place] ?? nameOf(place);
  /** @param {number} label */
  const rawClass = (label) => data.rawClasses[label] ?? data.classes[label];
  /** @param {number} place */
  const labelOf = (place) => data.classes[data.label[place]];
  /** @param {number} place */
  const splitOf = (place) => (isTraining(place) ? "train" : data.split);

  /** What an image is, in one line. @param {number} place */
  function describe(place) {
    if (isTraining(place)) return `${labelOf(place)}, training image ${nameOf(place)}`;
    const said = isWrong(place)
      ? `${labelOf(place)}, taken for ${data.classes[data.predicted[place]]}`
      : `${labelOf(place)}, recognised`;
    return `${said}, ${nameOf(place)}`;
  }

  /** The small picture of an image. @param {number} place @param {string} [name] */
  function thumb(place, name = "") {
    const number = data.cell[place];
    if (number < 0) return make("span", `thumb none ${name}`, "no picture");
    const found = make("span", `thumb ${name}`);
    found.style.setProperty("--x", String(number % data.columns));
    found.style.setProperty("--y", String(Math.floor(number / data.columns)));
    return found;
  }

  /** A button that chooses an image. @param {number} place @param {(Node | string)[]} inner */
  function picker(place, ...inner) {
    const button = make("button", "pick", "", { type: "button", "data-place": String(place) });
    button.setAttribute("aria-label", describe(place));
    button.append(...inner);
    return button;
  }

  // ---- The neighbour browser ----

  const panel = element("kin");
  const heading = element("kin-title");
  /** @type {Element | null} where the focus was before an image was chosen by keyboard */
  let origin = null;
  let chosen = -1;

  /** @param {number} place @param {Element | null} [from] */
  function choose(place, from = null) {
    chosen = place;
    const body = element("kin-body");
    body.replaceChildren(summary(place), ...kinParts(place));
    heading.textContent = isTraining(place)
      ? `Kin of a training image: ${labelOf(place)}`
      : `Kin of an image of ${data.split}: ${labelOf(place)}`;
    panel.classList.add("open");
    panel.scrollTop = 0;
    for (const old of document.querySelectorAll(".pick[aria-current]")) old.removeAttribute("aria-current");
    for (const same of document.querySelectorAll(`main .pick[data-place="${place}"]`)) same.setAttribute("aria-current", "true");
    if (from) {
      origin = from;
      heading.focus({ preventScroll: !narrow.matches });
    }
    map.draw();
  }

  function back() {
    panel.classList.remove("open");
    if (origin instanceof HTMLElement && origin.isConnected) origin.focus();
    origin = null;
  }

  /** Picture, labels, path and marks of the chosen image. @param {number} place */
  function summary(place) {
    const box = make("div", "chosen");
    const words = make("div");
    const list = make("dl");
    /** @param {string} term @param {string} text @param {string} [name] */
    const say = (term, text, name = "") => list.append(make("dt", "", term), make("dd", name, text));
    say("label", labelOf(place));
    if (!isTraining(place)) {
      const right = !isWrong(place);
      say("predicted", `${data.classes[data.predicted[place]]} with ${chance(data.probability[place])}`, right ? "" : "bad");
      if (!right) say("its label got", chance(data.own[place]));
      if (data.unlike[place] >= 0) say("further from its kin than", `${chance(data.unlike[place])} of validation`);
    } else if (data.other[place - data.evaluated] >= 0) {
      const other = data.classes[data.other[place - data.evaluated]];
      say("strongest other label of the nearest", `${other} with ${percent(data.suspicion[place - data.evaluated])}`);
    }
    words.append(list);
    box.append(thumb(place, "large"), words);
    const whole = make("div");
    whole.append(box, ...actions(place));
    return whole;
  }

  /** Its path, and what can be done with it. @param {number} place @returns {HTMLElement[]} */
  function actions(place) {
    const line = make("p", "path");
    line.append(make("code", "", nameOf(place)));
    const group = make("div", "actions", "", { role: "group", "aria-label": nameOf(place) });
    group.append(make("button", "small", "Copy path", { type: "button", "data-copy": String(place) }));
    for (const mark of MARKS) {
      const pressed = String(marks.get(place)?.[0] === mark);
      group.append(make("button", "small toggle", mark, { type: "button", "data-mark": mark, "data-of": String(place), "aria-pressed": pressed }));
    }
    return [line, group, rightLabel(place)];
  }

  /** What the label should be, where it was marked as wrong. @param {number} place */
  function rightLabel(place) {
    const line = make("label", "right-label", "right label ");
    line.hidden = marks.get(place)?.[0] !== MARKS[0];
    const select = make("select", "", "", { "data-right": String(place) });
    select.append(make("option", "", "not known", { value: "-1" }));
    data.classes.forEach((name, number) => {
      if (number !== data.label[place]) select.append(make("option", "", name, { value: String(number) }));
    });
    select.value = String(marks.get(place)?.[1] ?? -1);
    line.append(select);
    return line;
  }

  /** Its nearest training images and their votes. @param {number} place @returns {HTMLElement[]} */
  function kinParts(place) {
    const row = rowOf.get(place);
    if (row === undefined) return [make("p", "soft", "The kin of this training image are not in the page.")];
    const list = make("ol", "kin-list");
    let sum = 0;
    const heaviest = Math.max(1, data.weight[10 * row]);
    for (let k = 10 * row; k < 10 * row + 10 && data.kin[k] >= 0; k++) {
      const other = data.kin[k];
      const same = data.label[other] === data.label[place];
      sum += data.weight[k];
      const item = make("li");
      const bar = make("span", "bar-track");
      const fill = make("span", "bar-fill");
      fill.style.width = `${(100 * data.weight[k]) / heaviest}%`;
      bar.append(fill);
      const button = picker(other, thumb(other), make("span", same ? "kin-label" : "kin-label bad", (same ? "" : "≠ ") + labelOf(other)), bar, make("span", "weight", percent(data.weight[k], 10000)));
      button.removeAttribute("aria-label"); // its text says as much
      button.title = nameOf(other);
      item.append(button);
      list.append(item);
    }
    const shown = list.children.length;
    const title = make("h3", "", `The ${shown} nearest training images`);
    const attended = Math.min(data.attended, data.trained - (isTraining(place) ? 1 : 0)); // it is not its own kin
    const note = make("p", "soft", attended > shown
      ? `They hold ${percent(sum, 10000)} of the weight of the ${attended} kin that count.`
      : "Their weights are all that count.");
    return [title, list, note, ...votes(row, place)];
  }

  /** @param {number} row @param {number} place @returns {HTMLElement[]} */
  function votes(row, place) {
    const values = data.votes[row];
    /** @type {[number, number, number][]} */
    const found = [];
    for (let k = 0; k < values.length; k += 3) found.push([values[k], values[k + 1], values[k + 2]]);
    const without = found.some((vote) => vote[2] > 0);
    /** @param {1 | 2} column */
    const winner = (column) => found.reduce((best, vote) => (vote[column] > best[column] ? vote : best))[0];
    const first = data.classes[winner(1)];
    let sentence = `The kin vote ${first}.`;
    if (without) {
      sentence = winner(1) === winner(2)
        ? `The kin vote ${first}, and would without the ten nearest.`
        : `The kin vote ${first}; without the ten nearest they would vote ${data.classes[winner(2)]}.`;
    }
    const table = make("table", "votes");
    const head = make("tr");
    head.append(make("th", "", "class", { scope: "col" }), make("th", "", "all kin", { scope: "col" }), make("th", "", "without the ten nearest", { scope: "col" }));
    const top = make("thead");
    top.append(head);
    const body = make("tbody");
    for (const [label, share, rest] of found) {
      const line = make("tr");
      line.append(make("th", "", data.classes[label] + (label === data.label[place] ? " (label)" : ""), { scope: "row" }), voteCell(share), without ? voteCell(rest, "hollow-fill") : make("td", "", "–"));
      body.append(line);
    }
    table.append(top, body);
    return [make("h3", "", "If the ten nearest were left out"), make("p", "", sentence), table];
  }

  /** @param {number} share @param {string} [name] */
  function voteCell(share, name = "") {
    const found = make("td", "", percent(share));
    const bar = make("span", "bar-track");
    const fill = make("span", `bar-fill ${name}`);
    fill.style.width = `${share / 10}%`;
    bar.append(fill);
    found.append(bar);
    return found;
  }

  // ---- Marks ----

  const MARKS = ["wrong label", "leave out"];
  // The path of this page: browsers may share what they keep among all pages that are files.
  const STORE = `nearkin marks ${location.pathname}`;
  /** @type {unknown[]} remembered marks of images that are not in this page, such as those of another drawing */
  let absent = [];
  /** @type {Map<number, [string, number]>} the mark of an image, and its right label, -1 where not known */
  const marks = new Map();

  /** An image by its split, name and label: its place in the page may change. @param {number} place */
  const keyOf = (place) => JSON.stringify([splitOf(place), rawName(place), rawClass(data.label[place])]);

  /** Marks of an earlier visit or another tab; some browsers keep nothing for files. */
  function remembered() {
    try {
      const stored = JSON.parse(localStorage.getItem(STORE) || "null");
      if (!stored) return;
      marks.clear();
      absent = [];
      const places = new Map(data.base.map((_, place) => [keyOf(place), place]));
      const classes = new Map(data.classes.map((_, label) => [rawClass(label), label]));
      for (const [key, mark, right] of stored) {
        const place = places.get(key);
        if (place === undefined) absent.push([key, mark, right]);
        else if (MARKS.includes(mark)) marks.set(place, [mark, classes.get(right) ?? -1]);
      }
    } catch { /* nothing is remembered */ }
  }

  function showMarks() {
    for (const button of document.querySelectorAll("[data-mark]")) {
      button.setAttribute("aria-pressed", String(marks.get(Number(button.getAttribute("data-of")))?.[0] === button.getAttribute("data-mark")));
    }
    const right = panel.querySelector(".right-label"), select = panel.querySelector("[data-right]");
    if (right instanceof HTMLElement) right.hidden = marks.get(chosen)?.[0] !== MARKS[0];
    if (select instanceof HTMLSelectElement) select.value = String(marks.get(chosen)?.[1] ?? -1);
    element("marks").hidden = marks.size === 0;
    element("marks-count").textContent = marks.size === 1 ? "1 image marked" : `${marks.size} images marked`;
  }

  /** Changes what is remembered, which another tab may have changed. @param {() => void} change */
  function mark(change) {
    remembered();
    change();
    showMarks();
    try {
      const kept = [...marks].map(([place, [mark, label]]) => [keyOf(place), mark, label < 0 ? null : rawClass(label)]);
      localStorage.setItem(STORE, JSON.stringify([...kept, ...absent]));
    } catch { /* nothing is remembered */ }
  }

  /** path,label,split,mark,correct; texts are quoted. */
  function marksAsCsv() {
    /** @param {string} text */
    const quoted = (text) => `"${text.replaceAll('"', '""')}"`;
    const rows = [...marks].sort((a, b) => a[0] - b[0]).map(([place, [mark, right]]) => {
      const correct = mark === MARKS[0] && right >= 0 ? rawClass(right) : "";
      return [rawName(place), rawClass(data.label[place]), splitOf(place), mark, correct].map(quoted).join(",");
    });
    return ["path,label,split,mark,correct", ...rows, ""].join("\n");
  }

  /** UTF-8, with the bytes that Python keeps in U+DC80 to U+DCFF as they are. @param {string} text */
  function bytes(text) {
    const encoder = new TextEncoder();
    /** @type {Uint8Array<ArrayBuffer>[]} */
    const parts = [];
    for (const part of text.split(/([\udc80-\udcff])/u)) {
      const code = part.length === 1 ? part.charCodeAt(0) : 0;
      parts.push(code >= 0xdc80 && code <= 0xdcff ? new Uint8Array([code - 0xdc00]) : new Uint8Array(encoder.encode(part)));
    }
    return parts;
  }

  function save() {
    const link = make("a");
    link.href = URL.createObjectURL(new Blob(bytes(marksAsCsv()), { type: "text/csv" }));
    link.download = "marks.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  /** @param {number} place @param {HTMLElement} button */
  async function copy(place, button) {
    const name = rawName(place), whole = /^([\\/]|[A-Za-z]:)/.test(name);
    const path = (data.root && !whole ? `${data.root.replace(/\/$/, "")}/` : "") + name;
    let done = true;
    try {
      await navigator.clipboard.writeText(path);
    } catch {
      const field = make("textarea", "", "", { "aria-hidden": "true" });
      field.value = path;
      document.body.append(field);
      field.select();
      done = document.execCommand("copy");
      field.remove();
      button.focus();
    }
    button.textContent = done ? "Copied" : "Not copied";
    setTimeout(() => { button.textContent = "Copy path"; }, 1500);
  }

  // ---- Confused classes ----

  /** @param {string} pair @param {number} count of all images @param {Element | null} from */
  function showPair(pair, count, from) {
    const [label, predicted] = pair.split(",").map(Number);
    const places = [];
    for (let place = 0; place < data.evaluated; place++) {
      if (data.label[place] === label && data.predicted[place] === predicted) places.push(place);
    }
    places.sort(label === predicted ? (a, b) => data.own[a] - data.own[b] : (a, b) => data.probability[b] - data.probability[a]);
    const text = label === predicted
      ? `${data.classes[label]}, recognised`
      : `${data.classes[label]}, taken for ${data.classes[predicted]}`;
    const part = count > places.length ? `, ${places.length} of them in this page` : "";
    element("pair-title").textContent = `${text} (${count}${part})`;
    const box = element("pair-images");
    box.replaceChildren(...places.slice(0, MOST_OF_PAIR).map((place) => picker(place, thumb(place))));
    if (places.length > MOST_OF_PAIR) box.append(make("span", "soft", `and ${places.length - MOST_OF_PAIR} more`));
    element("pair").hidden = false;
    for (const old of document.querySelectorAll("[data-pair][aria-current]")) old.removeAttribute("aria-current");
    for (const same of document.querySelectorAll(`[data-pair="${pair}"]`)) same.setAttribute("aria-current", "true");
    if (narrow.matches) { // a panel over the page would hide the images
      element("pair").scrollIntoView();
      element("pair-title").focus({ preventScroll: true });
    } else if (places.length) {
      choose(places[0], from);
      element("pair").scrollIntoView({ block: "nearest" });
    }
  }

  // ---- The map ----

  const canvas = /** @type {HTMLCanvasElement} */ (element("map"));
  const map = makeMap();

  function makeMap() {
    const paint = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    const onlyClass = /** @type {HTMLSelectElement} */ (element("map-class"));
    const onlyErrors = /** @type {HTMLInputElement} */ (element("map-errors"));
    const training = /** @type {HTMLInputElement} */ (element("map-training"));
    const projection = /** @type {HTMLSelectElement | null} */ (document.getElementById("map-projection"));
    const list = element("map-list");
    const tip = element("map-tip");
    let zoom = 1, x0 = 0.5, y0 = 0.5; // the middle of what is seen, in [0, 1]
    let width = 0, height = 0, active = -1, waiting = false;
    /** @type {number[]} */
    let listed = [];

    const places = () => (projection?.value === "tsne" && data.tsne ? data.tsne : data.pca);
    /** How much of the unit square the images cover. @param {number[]} all @returns {[number, number]} */
    function extent(all) {
      const ends = [FINE, 0, FINE, 0];
      for (let k = 0; k < all.length; k += 2) {
        if (all[k] < 0) continue;
        ends[0] = Math.min(ends[0], all[k]);
        ends[1] = Math.max(ends[1], all[k]);
        ends[2] = Math.min(ends[2], all[k + 1]);
        ends[3] = Math.max(ends[3], all[k + 1]);
      }
      return [Math.max(0.05, (ends[1] - ends[0]) / FINE), Math.max(0.05, (ends[3] - ends[2]) / FINE)];
    }
    const extents = new Map([data.pca, ...(data.tsne ? [data.tsne] : [])].map((all) => [all, extent(all)]));

    /** Pixels of the side of the unit square. */
    function size() {
      const [across, up] = extents.get(places()) ?? [1, 1];
      return Math.min(width / across, height / up) * 0.92 * zoom;
    }
    /** @param {number} place @returns {[number, number]} */
    function at(place) {
      const all = places();
      return [width / 2 + (all[2 * place] / FINE - x0) * size(), height / 2 - (all[2 * place + 1] / FINE - y0) * size()];
    }

    /** @param {number} place */
    function shown(place) {
      if (places()[2 * place] < 0) return false;
      if (isTraining(place) && !training.checked) return false;
      if (onlyErrors.checked && !isWrong(place)) return false;
      return onlyClass.value === "" || data.label[place] === Number(onlyClass.value);
    }

    /** @param {string} name */
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

    function draw() {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; drawNow(); });
    }

    function drawNow() {
      const ratio = window.devicePixelRatio || 1;
      width = canvas.clientWidth;
      height = canvas.clientHeight;
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      paint.setTransform(ratio, 0, 0, ratio, 0, 0);
      const colours = Array.from({ length: 10 }, (_, k) => colour(`--m${k}`));
      const radius = Math.min(6, 2.2 + zoom ** 0.5 * (data.base.length < 1500 ? 1.2 : 0.4));
      for (let place = data.base.length - 1; place >= 0; place--) { // training images first, below the others
        if (!shown(place)) continue;
        const [x, y] = at(place);
        if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
        const tone = colours[data.label[place] % 10];
        paint.globalAlpha = isTraining(place) ? 0.4 : 0.9;
        if (isTraining(place)) {
          paint.fillStyle = tone;
          paint.fillRect(x - radius * 0.5, y - radius * 0.5, radius, radius);
        } else if (!isWrong(place)) {
          paint.fillStyle = tone;
          paint.beginPath();
          paint.arc(x, y, radius, 0, 7);
          paint.fill();
        }
      }
      paint.globalAlpha = 1;
      const ink = colour("--ink"), paper = colour("--paper");
      for (let place = 0; place < data.evaluated; place++) {
        if (!isWrong(place) || !shown(place)) continue;
        const [x, y] = at(place);
        cross(x, y, radius + 2.5, paper, 5);
        cross(x, y, radius + 2, colours[data.label[place] % 10], 2.6);
      }
      drawKin(ink, paper, radius);
    }

    /** @param {number} x @param {number} y @param {number} r @param {string} tone @param {number} thick */
    function cross(x, y, r, tone, thick) {
      paint.strokeStyle = tone;
      paint.lineWidth = thick;
      paint.beginPath();
      paint.moveTo(x - r, y - r);
      paint.lineTo(x + r, y + r);
      paint.moveTo(x + r, y - r);
      paint.lineTo(x - r, y + r);
      paint.stroke();
    }

    /** Lines from the chosen image to its kin, the heavier the thicker. @param {string} ink @param {string} paper @param {number} radius */
    function drawKin(ink, paper, radius) {
      for (const place of [active, chosen]) {
        if (place < 0 || places()[2 * place] < 0) continue;
        const [x, y] = at(place);
        const row = rowOf.get(place);
        paint.strokeStyle = ink;
        if (row !== undefined && place === chosen) {
          for (let k = 10 * row; k < 10 * row + 10 && data.kin[k] >= 0; k++) {
            if (places()[2 * data.kin[k]] < 0) continue;
            const [a, b] = at(data.kin[k]);
            paint.globalAlpha = 0.75;
            paint.lineWidth = 0.8 + Math.min(3, data.weight[k] / 1200);
            paint.beginPath();
            paint.moveTo(x, y);
            paint.lineTo(a, b);
            paint.stroke();
            paint.strokeRect(a - radius * 0.8, b - radius * 0.8, radius * 1.6, radius * 1.6);
          }
          paint.globalAlpha = 1;
        }
        paint.lineWidth = 5;
        paint.strokeStyle = paper;
        paint.beginPath();
        paint.arc(x, y, radius + 5, 0, 7);
        paint.stroke();
        paint.lineWidth = 2.2;
        paint.strokeStyle = ink;
        paint.stroke();
      }
    }

    /** The image that is nearest to a point of the canvas, or -1. @param {number} x @param {number} y */
    function nearest(x, y) {
      let best = -1, least = 14 * 14;
      for (let place = 0; place < data.base.length; place++) {
        if (!shown(place)) continue;
        const [a, b] = at(place);
        const far = (a - x) ** 2 + (b - y) ** 2 + (isTraining(place) ? 20 : isWrong(place) ? -20 : 0);
        if (far < least) { least = far; best = place; }
      }
      return best;
    }

    /** @param {number} place */
    function hover(place) {
      if (place === active) return;
      active = place;
      canvas.style.cursor = place < 0 ? "" : "pointer";
      tip.hidden = place < 0;
      if (place >= 0) {
        const [x, y] = at(place);
        const text = make("span", isWrong(place) ? "bad" : "", isTraining(place) || !isWrong(place) ? labelOf(place) : `${labelOf(place)} taken for ${data.classes[data.predicted[place]]}`);
        tip.replaceChildren(thumb(place), text, make("small", "", isTraining(place) ? "training image" : chance(data.probability[place])));
        tip.style.left = `${Math.max(0, Math.min(width - 112, x + 14))}px`;
        tip.style.top = `${y > height - 150 ? y - 150 : y + 14}px`;
      }
      draw();
    }

    /** @param {number} factor @param {number} [x] @param {number} [y] of the point that stays */
    function zoomBy(factor, x = width / 2, y = height / 2) {
      const next = Math.max(1, Math.min(40, zoom * factor));
      const u = x0 + (x - width / 2) / size(), v = y0 - (y - height / 2) / size();
      zoom = next;
      x0 = u - (x - width / 2) / size();
      y0 = v + (y - height / 2) / size();
      moved();
    }

    /** @param {number} dx @param {number} dy in pixels */
    function pan(dx, dy) {
      x0 -= dx / size();
      y0 += dy / size();
      moved();
    }

    function moved() {
      x0 = Math.max(0, Math.min(1, x0));
      y0 = Math.max(0, Math.min(1, y0));
      canvas.classList.toggle("zoomed", zoom > 1);
      hover(-1);
      draw();
      fillLater();
    }

    function reset() {
      zoom = 1;
      x0 = y0 = 0.5;
      moved();
    }

    // The list beside the map names the images that the map shows, errors first.
    let timer = 0;
    function fillLater() {
      clearTimeout(timer);
      timer = setTimeout(fill, 120);
    }

    function fill() {
      const seen = [];
      for (let place = 0; place < data.base.length; place++) {
        if (!shown(place)) continue;
        const [x, y] = at(place);
        if (x >= 0 && y >= 0 && x <= width && y <= height) seen.push(place);
      }
      /** @param {number} place */
      const rank = (place) => (isWrong(place) ? 0 : isTraining(place) ? 2 : 1);
      seen.sort((a, b) => rank(a) - rank(b) || a - b);
      listed = seen.slice(0, MOST_LISTED);
      list.replaceChildren(...listed.map((place, row) => {
        const wrong = isWrong(place);
        const option = make("div", "option", "", { role: "option", id: `option-${row}`, "aria-selected": "false", "data-row": String(row) });
        option.append(make("span", wrong ? "bad" : "", wrong ? `✕ ${labelOf(place)} taken for ${data.classes[data.predicted[place]]}` : labelOf(place)), make("small", "", isTraining(place) ? `training, ${data.base[place]}` : data.base[place]));
        return option;
      }));
      list.removeAttribute("aria-activedescendant");
      const errors = seen.filter(isWrong).length;
      element("map-count").textContent = `${seen.length} images in view, ${errors} of them errors` + (seen.length > listed.length ? `; the list has the first ${listed.length}` : "");
    }

    /** @param {number} row @param {boolean} pick */
    function activate(row, pick) {
      if (row < 0 || row >= listed.length) return;
      list.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
      const option = element(`option-${row}`);
      option.setAttribute("aria-selected", "true");
      list.setAttribute("aria-activedescendant", option.id);
      option.scrollIntoView({ block: "nearest" });
      hover(listed[row]);
      if (pick) choose(listed[row], narrow.matches || document.activeElement === list ? list : null);
    }

    list.addEventListener("keydown", (event) => {
      const row = Number(list.querySelector('[aria-selected="true"]')?.getAttribute("data-row") ?? -1);
      /** @type {Record<string, number>} */
      const next = { ArrowDown: row + 1, ArrowUp: row < 0 ? 0 : row - 1, Home: 0, End: listed.length - 1, PageDown: row + 10, PageUp: row - 10 };
      if (event.key in next) {
        event.preventDefault();
        activate(Math.max(0, Math.min(listed.length - 1, next[event.key])), false);
      } else if ((event.key === "Enter" || event.key === " ") && row >= 0) {
        event.preventDefault();
        activate(row, true);
      }
    });
    list.addEventListener("click", (event) => {
      const option = /** @type {Element} */ (event.target).closest(".option");
      if (option) activate(Number(option.getAttribute("data-row")), true);
    });
    list.addEventListener("blur", () => hover(-1));

    /** @type {{x: number, y: number, far: number} | null} */
    let held = null;
    canvas.addEventListener("pointerdown", (event) => {
      held = { x: event.clientX, y: event.clientY, far: 0 };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (held) {
        const dx = event.clientX - held.x, dy = event.clientY - held.y;
        held = { x: event.clientX, y: event.clientY, far: held.far + Math.abs(dx) + Math.abs(dy) };
        if (held.far > 4) pan(dx, dy);
      } else {
        hover(nearest(event.offsetX, event.offsetY));
      }
    });
    canvas.addEventListener("pointerup", (event) => {
      const still = held && held.far <= 4;
      held = null;
      if (!still) return;
      const place = nearest(event.offsetX, event.offsetY);
      if (place >= 0) choose(place, narrow.matches ? canvas : null);
    });
    canvas.addEventListener("pointercancel", () => { held = null; });
    canvas.addEventListener("pointerleave", () => hover(-1));
    canvas.addEventListener("wheel", (event) => {
      // The page scrolls over the map, unless it was clicked or the zoom key is held.
      if (document.activeElement !== canvas && !event.ctrlKey) return;
      event.preventDefault();
      zoomBy(Math.exp(-event.deltaY / 300), event.offsetX, event.offsetY);
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      /** @type {Record<string, () => void>} */
      const keys = {
        "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), "0": reset,
        ArrowLeft: () => pan(40, 0), ArrowRight: () => pan(-40, 0), ArrowUp: () => pan(0, 40), ArrowDown: () => pan(0, -40),
      };
      if (event.ctrlKey || event.metaKey || !(event.key in keys)) return;
      event.preventDefault();
      keys[event.key]();
    });
    element("map-in").addEventListener("click", () => zoomBy(1.6));
    element("map-out").addEventListener("click", () => zoomBy(1 / 1.6));
    element("map-reset").addEventListener("click", reset);
    for (const control of [onlyClass, onlyErrors, training, projection]) control?.addEventListener("change", () => { hover(-1); draw(); fill(); });
    new ResizeObserver(() => { draw(); fillLater(); }).observe(canvas);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    return { draw };
  }

  // ---- Everything that is clicked ----

  document.addEventListener("click", (event) => {
    const target = /** @type {Element} */ (event.target).closest("button");
    if (!target) return;
    const byKey = event.detail === 0 || narrow.matches; // then the focus moves to what was asked for
    const place = target.getAttribute("data-place");
    const pair = target.getAttribute("data-pair");
    const asked = target.getAttribute("data-mark");
    const copied = target.getAttribute("data-copy");
    if (place !== null) {
      const inside = panel.contains(target); // the focused button is replaced
      choose(Number(place), byKey && !inside ? target : null);
      if (byKey && inside) heading.focus();
    }
    if (pair !== null) showPair(pair, Number(target.getAttribute("data-count")), byKey ? target : null);
    if (copied !== null) copy(Number(copied), target);
    if (asked !== null) {
      const of = Number(target.getAttribute("data-of")), pressed = target.getAttribute("aria-pressed") === "true";
      mark(() => pressed ? marks.delete(of) : marks.set(of, [asked, -1]));
    }
    if (target.id === "kin-close") back();
    if (target.id === "marks-save") save();
    if (target.id === "marks-clear") mark(() => { marks.clear(); absent = []; });
  });
  document.addEventListener("change", (event) => {
    const select = event.target;
    if (!(select instanceof HTMLSelectElement) || !select.hasAttribute("data-right")) return;
    mark(() => marks.set(Number(select.getAttribute("data-right")), [MARKS[0], Number(select.value)]));
  });
  window.addEventListener("storage", (event) => {
    if (event.key !== STORE) return;
    remembered();
    showMarks();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && (origin || panel.classList.contains("open"))) back();
  });

  remembered();
  showMarks();
  const first = Number(panel.getAttribute("data-first"));
  if (!narrow.matches && first >= 0) choose(first);
  else panel.classList.remove("open");
})();
