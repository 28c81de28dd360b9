/* Sends references to /v1/references, and passes clicks in galleries to Gradio's fields. */
(() => {
  const field = (id) => document.querySelector(`#${id} textarea, #${id} input`);
  const put = (id, value) => {
    const to = field(id);
    to.value = value;
    to.dispatchEvent(new Event("input", { bubbles: true }));
  };
  async function send(drop, file) {
    const alert = drop.querySelector("[role=alert]"), shown = drop.querySelector("img"), hint = drop.querySelector("span");
    alert.textContent = "";
    hint.textContent = "Sending …";
    try {
      const response = await fetch("/v1/references", { method: "POST", body: file });
      const reply = await response.json();
      if (!response.ok) throw new Error(reply.error.message);
      shown.src = `/v1/references/${reply.id}`;
      shown.hidden = false;
      hint.textContent = "Drop, paste, or choose another image";
      put(drop.dataset.to, reply.id);
    } catch (error) {
      hint.textContent = drop.dataset.hint;
      alert.textContent = `This file cannot be used. ${error.message}`;
      shown.hidden = true;
      put(drop.dataset.to, "");
    }
  }
  document.addEventListener("change", (event) => {
    if (event.target.matches(".dq-drop input") && event.target.files.length) {
      send(event.target.closest(".dq-drop"), event.target.files[0]);
      event.target.value = "";
    }
  });
  for (const kind of ["dragover", "dragleave", "drop"])
    document.addEventListener(kind, (event) => {
      const drop = event.target.closest?.(".dq-drop");
      if (!drop) return;
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files.length) send(drop, event.dataTransfer.files[0]);
    });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((f) => f.type.startsWith("image/"));
    const drop = [...document.querySelectorAll(".dq-drop")].find((found) => found.offsetParent); // of the open tab
    if (file && drop) { event.preventDefault(); send(drop, file); }
  });
  let count = 0; // so that the same click twice is two changes
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("button[data-put]");
    if (button) put(button.dataset.put, button.dataset.value + (button.dataset.once ? ` ${++count}` : ""));
  });
  document.addEventListener("input", (event) => {
    if (event.target.matches(".dq-compare-range"))
      event.target.previousElementSibling.style.setProperty("--at", `${100 - event.target.value}%`);
  });
})();
