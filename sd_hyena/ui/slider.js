// Two pictures under one slider, and their difference.
function arm() {
  const range = element.querySelector("input[type=range]"), right = element.querySelector(".right");
  if (!range || !right || range.dataset.armed) return;
  range.dataset.armed = "yes";
  const set = () => {
    right.style.clipPath = `inset(0 0 0 ${range.value}%)`;
    element.querySelector(".line").style.left = `${range.value}%`;
  };
  range.addEventListener("input", set);
  const pair = element.querySelector(".pair");
  const follow = event => {
    const box = pair.getBoundingClientRect();
    range.value = Math.round(100 * (event.clientX - box.left) / box.width);
    set();
  };
  pair.addEventListener("pointerdown", event => { pair.setPointerCapture(event.pointerId); follow(event); });
  pair.addEventListener("pointermove", event => { if (event.buttons) follow(event); });
  set();
}
watch("value", arm);
arm();
