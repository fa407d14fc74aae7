
// A link to a folded element unfolds and focuses it.
function reveal(hash) {
  const target = document.getElementById(hash.slice(1));
  if (!target) return;
  const part = target.querySelector(":scope > details");
  if (part) part.open = true;
  for (let details = target.closest("details"); details; details = details.parentElement.closest("details")) details.open = true;
  target.scrollIntoView();
  target.querySelector("summary, a")?.focus({ preventScroll: true });
}

window.addEventListener("hashchange", () => reveal(location.hash));
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  if (link?.hash === location.hash) reveal(link.hash); // the hash does not change, so there is no hashchange event
});
reveal(location.hash);
