// The editor of regions: rectangles on a canvas with a list beside it. Its value is a JSON text of bbox_controls, in
// fractions of the canvas. The root is kept by this closure, for the template around it is rendered anew at will.
const CELL = 8;
const HANDLES = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];
const BLANK = {prompt: "", neg_prompt: "", blend_mode: "Background", feather_ratio: 0.2, seed: -1, enable: true};
const PAUSE = 400; // ms without a key after which a text is sent, though its field was not left
let regions = [], selected = -1, drag = null, sent = null, loaded = null, later = 0;
const past = [], future = [];

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
};
const button = (text, label, action) => make("button", {type: "button", "aria-label": label, title: label, onclick: action}, text);
const underlay = make("img", {class: "underlay", alt: "", draggable: "false"});
const stage = make("div", {class: "stage", tabindex: "-1", role: "group", "aria-label": "canvas: drag to draw a region"}, underlay);
const hint = make("p", {class: "hint", "aria-live": "polite"});
const list = make("ol", {class: "list", "aria-label": "regions"});
const known = make("datalist", {id: "regions-loras"});
const bar = make("div", {class: "bar"},
  button("+ region", "add a region in the middle", () => add({x: 0.25, y: 0.25, w: 0.5, h: 0.5})),
  button("undo", "undo (Ctrl+Z)", () => undo(past, future)),
  button("redo", "redo (Ctrl+Y)", () => undo(future, past)),
  button("clear", "delete all regions", () => regions.length && change(() => { regions = []; selected = -1; })));
const root = make("div", {class: "editor", onkeydown: keys}, make("div", {class: "left"}, bar, stage, hint, known), list);

const cells = () => [Math.max(1, Math.round((props.width || 512) / CELL)), Math.max(1, Math.round((props.height || 512) / CELL))];
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const colour = (i, alpha = 1) => `hsl(${Math.round(i * 137.5) % 360} 70% 50% / ${alpha})`;
const snapshot = () => JSON.stringify(regions);

function attach() {
  const host = element.querySelector(".host");
  if (host && !host.contains(root)) host.replaceChildren(root);
}
function emit() {
  clearTimeout(later);
  sent = snapshot();
  props.value = sent;
  trigger("change");
  attach();
}
function keep(before) {
  past.push(before);
  if (past.length > 100) past.shift();
  future.length = 0;
}
function regain(node) { // what had the focus is gone: keys go on working from here
  if (document.activeElement === document.body || !document.activeElement) (node || stage).focus({preventScroll: true});
}
function change(act) {
  keep(snapshot());
  act();
  show();
  emit();
}
function undo(from, to) {
  if (!from.length) return;
  to.push(snapshot());
  regions = JSON.parse(from.pop());
  selected = Math.min(selected, regions.length - 1);
  show();
  emit();
  regain();
}
function add(rectangle) {
  change(() => { regions.push({...BLANK, ...snapped(rectangle)}); selected = regions.length - 1; });
}
function remove(i) {
  change(() => { regions.splice(i, 1); selected = Math.min(i, regions.length - 1); });
  (stage.querySelectorAll(".region")[selected] || stage).focus();
}
function snapped({x, y, w, h}) {
  const [across, down] = cells();
  const axis = (start, length, count) => {
    const first = clamp(Math.round(start * count), 0, count - 1);
    const last = clamp(Math.round((start + length) * count), first + 1, count);
    return [first / count, (last - first) / count];
  };
  const [left, width] = axis(x, w, across), [top, height] = axis(y, h, down);
  return {x: left, y: top, w: width, h: height};
}
function place(i) {
  const region = regions[i], node = stage.querySelectorAll(".region")[i];
  if (!node) return;
  for (const [name, value] of Object.entries({left: region.x, top: region.y, width: region.w, height: region.h})) node.style[name] = `${100 * value}%`;
  const box = stage.getBoundingClientRect();
  const edge = region.blend_mode === "Foreground" ? region.feather_ratio * Math.min(region.w * box.width, region.h * box.height) / 2 : 0;
  node.style.setProperty("--edge", `${edge}px`);
  node.style.setProperty("--colour", colour(i));
  node.style.setProperty("--fill", colour(i, region.enable ? 0.28 : 0.06));
  node.classList.toggle("selected", i === selected);
  node.classList.toggle("off", !region.enable);
  const [across, down] = cells();
  const at = [region.x * across, region.y * down, region.w * across, region.h * down].map(v => Math.round(v) * CELL);
  node.setAttribute("aria-label", `region ${i + 1}, ${region.prompt || "no prompt"}, at ${at[0]} ${at[1]}, ${at[2]} by ${at[3]} pixels`);
}
function arrange() {
  regions.forEach((_, i) => place(i));
}
function frame() { // a field that is taken out of the list would send what was typed in it: the list stays
  attach();
  stage.style.aspectRatio = `${props.width || 512} / ${props.height || 512}`;
  if (props.src && underlay.getAttribute("src") !== props.src) underlay.src = props.src;
  if (!props.src) underlay.removeAttribute("src");
}
function show() {
  frame();
  const nodes = stage.querySelectorAll(".region");
  for (let i = nodes.length; i < regions.length; i++) {
    const node = make("div", {class: "region", tabindex: "0", role: "button", onfocus: () => select(i)}, make("span", {class: "number"}, `${i + 1}`));
    for (const name of HANDLES) node.append(make("i", {class: `handle ${name}`, "data-handle": name}));
    stage.append(node);
  }
  for (let i = regions.length; i < nodes.length; i++) nodes[i].remove();
  arrange();
  const said = [...list.children].map(node => node.querySelector(":scope > .fault-here"));
  list.replaceChildren(...regions.map(entry));
  [...list.children].forEach((node, i) => said[i] && node.append(said[i]));
  tell();
}
function select(i) {
  selected = i;
  arrange();
  [...list.children].forEach((node, k) => node.classList.toggle("selected", k === i));
}
function tell() {
  if (!regions.some(region => region.enable)) {
    hint.textContent = "No region: the whole canvas is drawn from the picture's prompt. Drag on the canvas to draw one.";
    return;
  }
  const n = 96;
  let bare = 0;
  for (let j = 0; j < n; j++) for (let i = 0; i < n; i++) {
    const x = (i + 0.5) / n, y = (j + 0.5) / n;
    if (!regions.some(r => r.enable && x >= r.x && x < r.x + r.w && y >= r.y && y < r.y + r.h)) bare++;
  }
  const share = Math.round(100 * bare / (n * n));
  hint.textContent = share ? `${share} % of the canvas has no region: drawn from the picture's prompt.` : "Regions cover the whole canvas.";
}
function entry(region, i) {
  const edit = (name, read) => event => {
    keep(snapshot());
    const value = read(event.target);
    if (value === undefined) delete region[name]; else region[name] = value;
    place(i);
    tell();
    emit();
  };
  const number = node => node.value === "" ? undefined : Number(node.value);
  const field = (label, node) => make("label", {}, make("span", {}, label), node);
  const text = (name, rows) => {
    let fresh = true; // whether what is typed is the first since the field was entered: all of it is undone at once
    const node = make("textarea", {rows, "aria-label": `${name.replace("neg_", "negative ")} of region ${i + 1}`,
      oninput: () => {
        if (fresh) keep(snapshot());
        fresh = false;
        region[name] = node.value;
        place(i);
        clearTimeout(later);
        later = setTimeout(emit, PAUSE);
      },
      onchange: () => { fresh = true; if (sent !== snapshot()) emit(); }});
    node.value = region[name] || "";
    return node;
  };
  const input = (name, attributes, read) => {
    const node = make("input", {...attributes, "aria-label": `${name.replaceAll("_", " ")} of region ${i + 1}`, onchange: edit(name, read)});
    node.value = region[name] ?? "";
    return node;
  };
  const kind = make("select", {"aria-label": `kind of region ${i + 1}`, onchange: edit("blend_mode", n => n.value)},
    ...["Background", "Foreground"].map(name => make("option", {value: name, selected: name === region.blend_mode}, name.toLowerCase())));
  const on = make("input", {type: "checkbox", checked: region.enable, "aria-label": `region ${i + 1} is on`, onchange: edit("enable", n => n.checked)});
  const loras = make("input", {type: "text", placeholder: "as the picture's", list: known.id, "aria-label": `LoRAs of region ${i + 1}`,
    onfocus: () => suggest(loras), oninput: () => suggest(loras),
    onchange: edit("adapters", n => n.value.trim() ? n.value.split(",").map(s => s.trim()).filter(Boolean) : undefined)});
  loras.value = (region.adapters || []).join(", ");
  const grey = make("input", {type: "file", accept: "image/*", hidden: true, onchange: async event => {
    const file = event.target.files[0];
    if (!file) return;
    const {path} = await upload(file);
    change(() => { region.mask = path; });
  }});
  const mask = make("span", {class: "mask"}, grey,
    button((region.mask || "").split(/[\\/]/).pop() || "choose", `mask of region ${i + 1}: a grey picture laid over it`, () => grey.click()));
  if (region.mask) mask.append(button("✕", `no mask for region ${i + 1}`, () => change(() => { delete region.mask; })));
  const swap = (k, which) => {
    change(() => { [regions[i], regions[k]] = [regions[k], regions[i]]; selected = k; });
    list.children[k].querySelectorAll(".head button")[which].focus();
  };
  const head = make("div", {class: "head"}, make("b", {style: `background:${colour(i)}`}, `${i + 1}`), on,
    button("↑", `region ${i + 1} up`, () => i > 0 && swap(i - 1, 0)),
    button("↓", `region ${i + 1} down`, () => i + 1 < regions.length && swap(i + 1, 1)),
    button("✕", `delete region ${i + 1}`, () => remove(i)));
  return make("li", {id: `region-${i + 1}`, class: i === selected ? "selected" : "", onfocusin: () => select(i)}, head,
    field("prompt", text("prompt", 2)), field("negative", text("neg_prompt", 1)),
    make("div", {class: "row"}, field("kind", kind),
      field("soft edge", input("feather_ratio", {type: "range", min: 0, max: 1, step: 0.05}, n => Number(n.value))),
      field("seed", input("seed", {type: "number", step: 1, min: -1}, n => n.value === "" ? -1 : Math.trunc(Number(n.value)))),
      field("guidance", input("guidance_scale", {type: "number", step: 0.5, min: 1, placeholder: "as the picture's"}, number)),
      field("LoRAs", loras), make("div", {class: "field"}, make("span", {}, "mask"), mask)));
}
function suggest(field) { // LoRAs behind those that are named already
  let names = [];
  try { names = JSON.parse(props.loras || "[]"); } catch {}
  const before = field.value.slice(0, field.value.lastIndexOf(",") + 1), given = before.split(",").map(s => s.trim());
  known.replaceChildren(...names.filter(name => !given.includes(name)).map(name => make("option", {value: `${before}${before && " "}${name}`})));
}
function at(event) {
  const box = stage.getBoundingClientRect();
  return [clamp((event.clientX - box.left) / box.width, 0, 1), clamp((event.clientY - box.top) / box.height, 0, 1)];
}
stage.addEventListener("pointerdown", event => {
  if (event.button) return;
  event.preventDefault();
  const node = event.target.closest(".region"), [x, y] = at(event);
  stage.setPointerCapture(event.pointerId);
  const before = snapshot();
  if (node) {
    const i = [...stage.querySelectorAll(".region")].indexOf(node);
    drag = {i, x, y, start: {...regions[i]}, handle: event.target.dataset.handle || "move", before};
    node.focus();
    select(i);
  } else drag = {i: -1, x, y, handle: "new", before};
});
stage.addEventListener("pointermove", event => {
  if (!drag) return;
  const [x, y] = at(event);
  if (drag.handle === "new") {
    const [across, down] = cells();
    if (drag.i < 0 && (Math.abs(x - drag.x) * across < 1 || Math.abs(y - drag.y) * down < 1)) return;
    if (drag.i < 0) { regions.push({...BLANK}); drag.i = selected = regions.length - 1; }
    const next = snapped({x: Math.min(x, drag.x), y: Math.min(y, drag.y), w: Math.abs(x - drag.x), h: Math.abs(y - drag.y)});
    Object.assign(regions[drag.i], next);
    if (stage.querySelectorAll(".region").length < regions.length) show(); else place(drag.i);
    tell();
    return;
  }
  const {start, handle} = drag, dx = x - drag.x, dy = y - drag.y;
  let {x: left, y: top, w, h} = start;
  if (handle === "move") { left = clamp(left + dx, 0, 1 - w); top = clamp(top + dy, 0, 1 - h); }
  let right = left + w, bottom = top + h;
  if (/w$/.test(handle)) left = clamp(left + dx, 0, right);
  if (/^(n|s)?e$/.test(handle)) right = clamp(right + dx, left, 1);
  if (/^n/.test(handle)) top = clamp(top + dy, 0, bottom);
  if (/^s/.test(handle)) bottom = clamp(bottom + dy, top, 1);
  Object.assign(regions[drag.i], snapped({x: left, y: top, w: right - left, h: bottom - top}));
  place(drag.i);
  tell();
});
const drop = event => {
  if (!drag) return;
  const {before, i} = drag;
  drag = null;
  if (i < 0) { select(-1); return; }
  if (before === snapshot()) return;
  keep(before);
  show();
  stage.querySelectorAll(".region")[i]?.focus();
  emit();
};
stage.addEventListener("pointerup", drop);
stage.addEventListener("pointercancel", drop);

function keys(event) {
  const key = event.key.toLowerCase(), typing = /^(input|textarea|select)$/i.test(event.target.tagName);
  if ((event.ctrlKey || event.metaKey) && !typing && (key === "z" || key === "y")) {
    event.preventDefault();
    if (key === "y" || event.shiftKey) undo(future, past); else undo(past, future);
    return;
  }
  const i = [...stage.querySelectorAll(".region")].indexOf(event.target);
  if (i < 0) return;
  const step = {arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1]}[key];
  if (key === "delete" || key === "backspace") { event.preventDefault(); remove(i); }
  else if (key === "enter") { event.preventDefault(); list.children[i].querySelector("textarea").focus(); }
  else if (step) {
    event.preventDefault();
    const [across, down] = cells(), region = regions[i], [dx, dy] = [step[0] / across, step[1] / down];
    const next = event.shiftKey
      ? {x: region.x, y: region.y, w: clamp(region.w + dx, 1 / across, 1 - region.x), h: clamp(region.h + dy, 1 / down, 1 - region.y)}
      : {x: clamp(region.x + dx, 0, 1 - region.w), y: clamp(region.y + dy, 0, 1 - region.h), w: region.w, h: region.h};
    change(() => Object.assign(region, snapped(next)));
    stage.querySelectorAll(".region")[i].focus();
  }
}
function load() {
  if (drag) return;
  const given = props.value || "[]";
  const before = snapshot();
  if (given === sent && (given === before || loaded === before)) { attach(); return; } // one may be typing
  clearTimeout(later);
  try { regions = JSON.parse(given).map(region => ({...BLANK, ...region})); } catch { regions = []; }
  sent = given;
  loaded = snapshot();
  selected = -1;
  if (!document.body.dataset.opened) past.length = future.length = 0; // what a page is opened with is its beginning
  else if (loaded !== before) keep(before);
  show();
}
watch("value", load);
let looks = "";  // a look at the settings tells the size again, changed or not
watch("width height src".split(" "), () => {
  const now = [props.width, props.height, props.src].join();
  if (drag || now === looks) return;
  looks = now;
  frame();
  arrange();
});
new ResizeObserver(arrange).observe(stage);
load();
