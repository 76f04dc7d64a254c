// The mouse opens a term's meaning by resting on it; keys and touch need no script. Leaving both closes it.
for (const term of document.querySelectorAll("button.term")) {
  const meaning = term.popoverTargetElement;
  let waiting;
  const soon = (open, milliseconds) => (event) => {
    if (event.pointerType !== "mouse") return;
    clearTimeout(waiting);
    waiting = setTimeout(() => meaning?.togglePopover(open ? { force: true, source: term } : false), milliseconds);
  };
  for (const part of [term, meaning]) {
    part?.addEventListener("pointerenter", soon(true, 150));
    part?.addEventListener("pointerleave", soon(false, 300));
  }
}
// Sphinx answers Escape by hiding a search's marks, and would keep the browser from closing a meaning.
window.addEventListener(
  "keydown",
  (event) => {
    if (event.key === "Escape" && document.querySelector(".meaning:popover-open")) event.stopPropagation();
  },
  true
);
