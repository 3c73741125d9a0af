// What is wrong, said at the field that it is wrong at. The value is a JSON text: element id -> message.
function show() {
  document.querySelectorAll(".fault-here").forEach(node => node.remove());
  document.querySelectorAll("[aria-invalid='true']").forEach(node => node.removeAttribute("aria-invalid"));
  const faults = JSON.parse(props.value || "{}");
  for (const [id, message] of Object.entries(faults)) {
    const field = document.getElementById(id);
    if (!field) continue;
    const node = document.createElement("div");
    node.className = "fault-here";
    node.setAttribute("role", "alert");
    node.textContent = message;
    field.append(node);
    field.querySelectorAll("input, textarea").forEach(input => input.setAttribute("aria-invalid", "true"));
  }
}
watch("value", show);
show();
