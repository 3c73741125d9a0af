// A mask painted on a picture: white where it is drawn anew. Its value is a PNG as a data URL, empty while nothing is painted.
const LARGEST = 512;
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) name.startsWith("on") ? node.addEventListener(name.slice(2), value) : node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const picture = make("img", {alt: "the picture to paint on", draggable: "false"});
const canvas = make("canvas", {tabindex: "0", role: "img", "aria-label": "mask: paint where the picture is drawn anew"});
const brush = make("input", {type: "range", min: 2, max: 128, value: 32, "aria-label": "size of the brush"});
const erase = make("input", {type: "checkbox", "aria-label": "erase"});
const button = (text, action) => make("button", {type: "button", onclick: action}, text);
const root = make("div", {class: "painter"},
  make("div", {class: "bar"}, make("label", {}, "brush ", brush), make("label", {}, erase, " erase"),
    button("undo", () => { if (past.length) { restore(past.pop()); } }),
    button("all", () => { keep(); pen.fillStyle = "#fff"; pen.fillRect(0, 0, canvas.width, canvas.height); emit(); }),
    button("clear", () => { keep(); pen.clearRect(0, 0, canvas.width, canvas.height); emit(); })),
  make("div", {class: "sheet"}, picture, canvas));
const pen = canvas.getContext("2d"), past = [];
let sent = "", last = null;

function attach() {
  const host = element.querySelector(".host");
  if (host && !host.contains(root)) host.replaceChildren(root);
}
function keep() {
  past.push(pen.getImageData(0, 0, canvas.width, canvas.height));
  if (past.length > 20) past.shift();
}
function restore(data) {
  pen.putImageData(data, 0, 0);
  emit();
}
function emit() {
  const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;
  let painted = false;
  for (let i = 3; i < data.length && !painted; i += 4) painted = data[i] > 127;
  sent = painted ? canvas.toDataURL("image/png") : "";
  props.value = sent;
  trigger("change");
  attach();
}
function at(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
}
canvas.addEventListener("pointerdown", event => {
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  keep();
  last = at(event);
  stroke(last);
});
canvas.addEventListener("pointermove", event => { if (last) stroke(at(event)); });
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { if (last) { last = null; emit(); } });
function stroke([x, y]) {
  pen.globalCompositeOperation = erase.checked ? "destination-out" : "source-over";
  pen.strokeStyle = "#fff";
  pen.lineCap = pen.lineJoin = "round";
  pen.lineWidth = Number(brush.value);
  pen.beginPath();
  pen.moveTo(...last);
  pen.lineTo(x, y);
  pen.stroke();
  pen.globalCompositeOperation = "source-over";
  last = [x, y];
}
function size() {
  attach();
  root.hidden = !props.src;
  if (!props.src) { picture.removeAttribute("src"); return; }
  if (picture.getAttribute("src") !== props.src) { picture.src = props.src; }
}
picture.addEventListener("load", () => {
  const scale = Math.min(1, LARGEST / Math.max(picture.naturalWidth, picture.naturalHeight));
  canvas.width = Math.max(1, Math.round(picture.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(picture.naturalHeight * scale));
  past.length = 0;
  if (props.value) { const image = new Image(); image.onload = () => pen.drawImage(image, 0, 0, canvas.width, canvas.height); image.src = props.value; }
});
watch("src", size);
watch("value", () => { if (!props.value && sent) { sent = ""; pen.clearRect(0, 0, canvas.width, canvas.height); } attach(); });
size();
